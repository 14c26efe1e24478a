"""Reads photos, from a folder or from a .tar of it:

    photos/cats/any name.jpg             a folder for each class; the last 10 photos of each, by name, are the test set
    photos/train/cats/any name.jpg       or a training and a test set, which are taken as they are (see TRAIN and TEST)
    photos/test/cats/any name.jpg
    NNN.name/NNN_0001.jpg                or Caltech-256 as it is; the classes have no number in their names

The photos of a class can be at any depth in its folder. Other files, photos that cannot be read, and photos longer than
8:1 are left out and counted. `photo_boxes.py` reads the true boxes.
"""

import io
import posixpath
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.archive import File, list_files, printable, read_bytes
from data.photo_boxes import BOXES_CSV, read_boxes
from experiment.files import UserError
from experiment.images import MAX_ASPECT_RATIO, SUFFIXES, read_picture

TEST_PHOTOS = 10  # of each class
FOLDS = 5  # of the training photos, for validation
TRAIN = "train", "training", "train_set", "training_set"  # folders of separate sets, in any case
TEST = "test", "testing", "test_set", "validation", "valid", "val", "validation_set", "val_set"  # the first is taken
SETS = (
    f"a training set is a folder named {', '.join(TRAIN)}, a test set one named {', '.join(TEST)}, "
    "and both have a folder for each class"
)
NUMBERED = re.compile(r"([0-9]{3})\.([^/]+)/\1_[0-9]{4}\.jpg\Z")  # a photo of Caltech-256
AT_A_TIME = 4  # photos that are checked: a PNG of 48 megapixels takes 220 MB, a transparent one 750 MB


class Photos(NamedTuple):
    """The training or the test set: N photos, which stay in their folder or archive until they are read."""

    files: list[File]
    labels: np.ndarray  # (N,) int64, 0..C-1
    boxes: list | None  # true boxes of each photo, (n, 4) float64, or None; None if there are no boxes at all

    def first(self, count):
        """The first `count` photos."""
        return Photos(self.files[:count], self.labels[:count], None if self.boxes is None else self.boxes[:count])

    def fingerprint(self):
        """What makes these photos the same as others, wherever they lie: names and sizes, labels, boxes."""
        return [(file.name, file.size) for file in self.files], self.labels, self.boxes


def load_photos(archive, chosen=None, test_share=None, fold=None):
    """Finds the training and the test photos, and reads each once to check it.

    Args:
        archive: Path of the folder or archive.
        chosen: Classes to take, each by its name or folder ("coffee-mug" or "041.coffee-mug"); None for all.
        test_share: Share of each class that is the test set, 0..1; None for its last 10 photos.
        fold: For validation, 1..5: this fifth of the training photos of each class, by name, is the test set, and the
            test photos are left out.

    Returns:
        The training and the test `Photos` (in the test set the classes take turns); names of the C classes; notes, a
        line each, about what was left out.

    Raises:
        UserError: The archive is missing, broken or of another layout, or a class is missing or has too few photos.
    """
    archive = Path(archive)
    sets, names, tables, notes = find_photos(archive)
    if unknown := set(chosen or []) - set(names) - set(names.values()):
        raise UserError(f"{archive} has no class {min(unknown)!r}; it has {some(names.values())}")
    if chosen:
        names = {folder: name for folder, name in names.items() if folder in chosen or name in chosen}
    if len(names) < 2:
        found = f"one class ({some(names.values())})" if names else "no class folders"
        raise UserError(f"{archive}: {found}; expected is photos/CLASS/NAME.jpg, with two classes or more")
    separate = "train" in sets
    if separate and test_share is not None:
        raise UserError(f"{archive} has a test set; --test-share is for data without one")
    if separate and (unknown := [name for folder, name in names.items() if folder not in sets["train"]]):
        raise UserError(f"{archive}: {unknown[0]} is in the test set, but not in the training set")
    sets, boxes = check_photos(archive, sets, names, tables, notes)
    train, test = [], []
    for label, (folder, name) in enumerate(names.items()):
        if separate:
            known, new = sets["train"][folder], sets["test"].get(folder, [])
            if not known:
                raise UserError(f"{archive}: {name} has no training photo that can be used")
        else:
            photos = sets[""][folder]
            count = TEST_PHOTOS if test_share is None else max(1, round(test_share * len(photos)))
            if len(photos) <= count:
                found = f"{name} has {len(photos)} usable photos; at least {count + 1} are needed"
                raise UserError(f"{archive}: {found}; set --test-share 0.2, or choose classes with --categories")
            known, new = photos[:-count], photos[-count:]
        if fold:
            if len(known) < FOLDS:
                raise UserError(f"{archive}: {name} has {len(known)} usable training photos; --fold needs {FOLDS}")
            start, end = (fold - 1) * len(known) // FOLDS, fold * len(known) // FOLDS
            known, new = known[:start] + known[end:], known[start:end]
        train += [(label, photo) for photo in known]
        test += [(turn, label, photo) for turn, photo in enumerate(new)]
    if not test:
        raise UserError(f"{archive} has no test photo that can be used")
    in_turn = [(label, photo) for _, label, photo in sorted(test)]
    return make_photos(train, boxes), make_photos(in_turn, boxes), list(names.values()), notes


def load_all_photos(archive, names, wordnet_ids=None):
    """Finds all photos of the classes `names`, to test a network on.

    Args:
        archive: Path of the folder or archive.
        names: Names of the C classes of the network. A folder has one of them as its name, or a WordNet id.
        wordnet_ids: WordNet ids of the classes, such as "n01440764"; None if they have none.

    Returns:
        `Photos`, and notes as `load_photos`.
    """
    archive = Path(archive)
    sets, titles, tables, notes = find_photos(archive)
    labels = {}
    for folder, title in titles.items():
        same = [label for label, name in enumerate(names) if plain(name) in (plain(folder), plain(title))]
        if wordnet_ids and folder in wordnet_ids:
            same = [wordnet_ids.index(folder)]
        if len(same) > 1:
            ids = " or ".join(wordnet_ids[label] for label in same) if wordnet_ids else "the WordNet id"
            raise UserError(f"{archive}: {len(same)} classes are named {title}; name the folder {ids}")
        if same:
            labels[folder] = same[0]
    if not labels:
        raise UserError(f"{archive} has no folder with the name of a class of the network: {some(names)}")
    other = [folder for classes in sets.values() for folder in classes for _ in classes[folder] if folder not in labels]
    examples = sorted(map(printable, set(other)))
    add_note(notes, len(other), "photos of classes that the network does not have", examples)
    names = {folder: names[label] for folder, label in labels.items()}
    sets, boxes = check_photos(archive, sets, names, tables, notes)
    labelled = [(labels[folder], photo) for classes in sets.values() for folder in classes for photo in classes[folder]]
    if not labelled:
        raise UserError(f"{archive} has no photo that can be used")
    return make_photos(labelled, boxes), notes


def plain(name):
    """A class name in one spelling: "coffee_mug", "Coffee-Mug" and "coffee mug" are the same."""
    return name.casefold().replace("_", " ").replace("-", " ")


def make_photos(labelled, boxes):
    """`Photos` of (label, file) pairs; `boxes` by the name of the file."""
    files = [file for _, file in labelled]
    labels = np.array([label for label, _ in labelled], np.int64)
    return Photos(files, labels, [boxes.get(file.name) for file in files] if boxes else None)


def read_photo(file):
    """Reads a photo as a `Picture`; raises a UserError that names it if that is not possible."""
    try:
        content = read_bytes(file)
    except OSError as error:
        raise UserError(f"{file.path} cannot be read ({error.strerror})") from None
    return read_picture(io.BytesIO(content), printable(file.name))


def find_photos(archive):
    """Finds photos in a folder or archive, without reading them.

    Returns:
        sets: Set -> class folder -> `File`s by name. Sets are "train" and "test", or "" if they are not separate.
        names: Class folder -> name of the class.
        tables: Files with boxes, and the names of all photos.
        notes: What was left out.
    """
    found, folders, broken = list_files(archive)
    files = sorted(file for file in found if not is_hidden(file.name))
    photos = [file for file in files if file.name.lower().endswith(SUFFIXES)]
    tables = [
        file for file in files if posixpath.basename(file.name) == BOXES_CSV or file.name.lower().endswith(".xml")
    ]
    if not photos:
        raise UserError(f"{archive} has no photos ({', '.join(SUFFIXES)})")
    notes = []
    add_note(notes, len(found) - len(photos) - len(tables), "other files")
    add_note(notes, broken, "links that lead to no file")
    starts = find_sets(archive, photos)
    sets = {which: group(start, photos) for which, start in starts.items()}
    for which, start in starts.items():
        if which and not sets[which]:
            raise UserError(f"{archive}: {start} has no class folders; {SETS}")
    add_note(notes, len(photos) - count_photos(sets), "photos outside the class folders")
    inside = count_photos(sets)
    sets, names = name_classes(archive, sets)
    add_note(notes, inside - count_photos(sets), "photos not named as in Caltech-256 (NNN_0001.jpg)")
    filled = {folder for start in starts.values() for folder in group(start, [*photos, *tables])}
    below = [folder.removeprefix(start) for start in starts.values() for folder in folders if folder.startswith(start)]
    empty = [folder for folder in below if "/" not in folder and folder not in filled and not is_hidden(folder)]
    add_note(notes, len(empty), "empty folders")
    return sets, names, (tables, {photo.name for photo in photos}), notes


def find_sets(archive, photos):
    """The path above the class folders of each set: {"train": "a/train/", "test": "a/val/"} or {"": "a/"}."""
    root = ""
    while True:
        paths = [photo.name.removeprefix(root).split("/") for photo in photos if photo.name.startswith(root)]
        tops = sorted({path[0] for path in paths if len(path) > 1})
        if len(tops) != 1 or max(map(len, paths)) == 2:
            break
        root += f"{tops[0]}/"  # a single folder that has others
    by_name = {top.lower(): f"{root}{top}/" for top in tops}
    train, test = ([by_name[name] for name in known if name in by_name] for known in (TRAIN, TEST))
    if len(train) == 1 and test:
        return {"train": train[0], "test": test[0]}
    has_classes = any(path[0].lower() in TRAIN + TEST and len(path) > 2 for path in paths)
    if (train or test) and (has_classes or len(tops) == 2):
        raise UserError(f"{archive} has {some(train + test)}, but not one training and one test set; {SETS}")
    return {"": root}


def group(start, photos):
    """The photos below a path, by the first folder in it, which is that of the class."""
    classes = {}
    for photo in photos:
        folder, *below = photo.name.removeprefix(start).split("/")
        if photo.name.startswith(start) and below:
            classes.setdefault(folder, []).append(photo)
    return classes


def count_photos(sets):
    return sum(len(photos) for classes in sets.values() for photos in classes.values())


def name_classes(archive, sets):
    """Returns the sets, and class folder -> name; in Caltech-256 that has no number, and photos of other names go."""
    numbered = {
        which: {folder: [photo for photo in photos if is_numbered(photo, folder)] for folder, photos in classes.items()}
        for which, classes in sets.items()
    }
    folders = sorted(set().union(*sets.values()))
    names = {folder: printable(folder) for folder in folders}
    short = {folder: name[4:] for folder, name in names.items()}
    if all(photos for classes in numbered.values() for photos in classes.values()) and is_unique(short.values()):
        return numbered, short
    if not is_unique(names.values()):
        raise UserError(f"{archive} has class folders whose names differ only in characters that are not printable")
    return sets, names


def is_unique(names):
    return len(set(names)) == len(names)


def is_numbered(photo, folder):
    """Whether a photo is named as in Caltech-256: NNN.name/NNN_0001.jpg."""
    match = NUMBERED.search(photo.name)
    return match is not None and f"{match[1]}.{match[2]}" == folder


def is_hidden(name):
    """Whether a file is what macOS or a network drive puts beside another."""
    return any(part.startswith(".") or part in ("__MACOSX", "@eaDir") for part in name.split("/"))


def some(names):
    """The first ten names, as text."""
    return ", ".join([*names][:10] + ["..."] * (len(names) > 10))


def add_note(notes, count, what, examples=()):
    """Notes how many things were left out, with the first three of the examples."""
    if count:
        named = f": {', '.join([*examples[:3], *['...'] * (len(examples) > 3)])}" if examples else ""
        notes.append(f"{what} left out: {count:,}{named}")


def check_photos(archive, sets, names, tables, notes):
    """Reads the photos of the classes `names` once.

    Args:
        archive, sets, names, tables, notes: As `find_photos` returns them; what is left out is added to the notes.

    Returns:
        The sets with the photos that can be used, and their sizes; name of a photo -> its boxes, (n, 4).
    """
    chosen = [(folder, photo) for classes in sets.values() for folder in names for photo in classes.get(folder, [])]
    with ThreadPoolExecutor(AT_A_TIME) as pool:  # Pillow releases the interpreter lock while it decodes
        checked = pool.map(check, [photo for _, photo in chosen])
        checked = list(tqdm(checked, f"checking {archive}", len(chosen), unit=" photos", disable=None))
    unreadable, usable, longer = [], {}, 0
    for (_, photo), (width, height, reason) in zip(chosen, checked, strict=True):
        if reason:
            unreadable.append(reason)
        elif max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            longer += 1
        else:
            usable[photo.name] = photo._replace(width=width, height=height)
    add_note(notes, len(unreadable), "photos that cannot be read", unreadable)
    add_note(notes, longer, f"photos with an aspect ratio above {MAX_ASPECT_RATIO}:1")
    class_names = {photo.name: (folder, names[folder]) for folder, photo in chosen}
    boxes, strangers = read_boxes(archive, *tables, usable, class_names)
    add_note(notes, strangers, "boxes without a photo")
    return {
        which: {
            folder: [usable[photo.name] for photo in classes.get(folder, []) if photo.name in usable]
            for folder in names
        }
        for which, classes in sets.items()
    }, boxes


def check(photo):
    """Reads a photo: its width, its height, and None; or None, None, and the reason why it cannot be read."""
    try:
        picture = read_photo(photo)
    except UserError as error:
        return None, None, str(error).replace(" is not a readable image", "")  # leaves NAME (reason)
    return picture.width, picture.height, None

"""Reads photos, from a folder or from a .tar of it:

    photos/cats/any name.jpg             a folder for each class; the last 10 photos of each, by name, are the test set
    photos/train/cats/any name.jpg       or a training and a test set, which are taken as they are (see TRAIN and TEST)
    photos/test/cats/any name.jpg
    photos/041.mug/any name.jpg          numbers before all classes, as in Caltech-256, are no part of their names

The photos of a class can be at any depth in its folder. Other files, photos that cannot be read, and photos longer than
8:1 are left out and counted. `photo_boxes.py` reads the true boxes.
"""

import io
import posixpath
import re
from collections import defaultdict
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm.contrib.concurrent import thread_map

from data.archive import File, list_files, printable, read_bytes
from data.dataset import Split
from data.photo_boxes import BOXES_CSV, read_boxes
from experiment.files import UserError
from experiment.images import MAX_ASPECT_RATIO, SUFFIXES, Mapped, read_picture, scale_short_side

TEST_PHOTOS = 10  # of each class
FOLDS = 5  # of the training photos, for validation
TRAIN = "train", "training", "train_set", "training_set"  # folders of separate sets, in any case
TEST = "test", "testing", "test_set", "validation", "valid", "val", "validation_set", "val_set"
NUMBERED = re.compile(r"[0-9]{3}\..")  # the folder of a class, as in Caltech-256
AT_A_TIME = 4  # photos that are checked: a PNG of 48 megapixels takes 220 MB, a transparent one 750 MB


class Photos(NamedTuple):
    """The training or the test set: N photos, which stay in their folder or archive until they are read."""

    files: list[File]
    labels: np.ndarray  # (N,) int64, 0..C-1
    boxes: list | None  # true boxes of each photo, (n, 4) float64, or None; None if there are no boxes at all

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
    photos, names, tables, notes = find_photos(archive)
    if unknown := set(chosen or []) - set(names) - set(names.values()):
        raise UserError(f"{archive} has no class {min(unknown)!r}; it has {some(names.values())}")
    if chosen:
        names = {folder: name for folder, name in names.items() if folder in chosen or name in chosen}
    if len(names) < 2:
        found = f"one class ({some(names.values())})" if names else "no class folders"
        raise UserError(f"{archive}: {found}; expected is photos/CLASS/NAME.jpg, with two classes or more")
    separate = bool(photos[0].part)
    if separate and test_share is not None:
        raise UserError(f"{archive} has a test set; --test-share is for data without one")
    photos, boxes = check_photos(archive, photos, names, tables, notes)
    classes = defaultdict(list)
    for photo in photos:
        classes[photo.part, photo.folder].append(photo)
    train, test = [], []
    for folder, name in names.items():
        if separate:
            known, new = classes["train", folder], classes["test", folder]
            if not known:
                raise UserError(f"{archive}: {name} has no training photo that can be used")
        else:
            of_class = classes["", folder]
            count = TEST_PHOTOS if test_share is None else max(1, round(test_share * len(of_class)))
            if len(of_class) <= count:
                found = f"{name} has {len(of_class)} usable photos; at least {count + 1} are needed"
                raise UserError(f"{archive}: {found}; set --test-share 0.2, or choose classes with --categories")
            known, new = of_class[:-count], of_class[-count:]
        if fold:
            if len(known) < FOLDS:
                raise UserError(f"{archive}: {name} has {len(known)} usable training photos; --fold needs {FOLDS}")
            start, end = (fold - 1) * len(known) // FOLDS, fold * len(known) // FOLDS
            known, new = known[:start] + known[end:], known[start:end]
        train += known
        test += enumerate(new)
    if not test:
        raise UserError(f"{archive} has no test photo that can be used")
    in_turn = [photo for _, photo in sorted(test, key=itemgetter(0))]
    labels = {folder: label for label, folder in enumerate(names)}
    return make_photos(train, labels, boxes), make_photos(in_turn, labels, boxes), list(names.values()), notes


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
    photos, titles, tables, notes = find_photos(archive)
    labels = {}
    for folder, title in titles.items():
        same = [label for label, name in enumerate(names) if plain(name) in (plain(folder), plain(title))]
        if wordnet_ids and folder in wordnet_ids:
            same = [wordnet_ids.index(folder)]
        if len(same) > 1:
            ids = " or ".join(wordnet_ids[label] for label in same) if wordnet_ids else "another name"
            raise UserError(f"{archive}: {len(same)} classes are named {title}; name the folder {ids}")
        if same:
            labels[folder] = same[0]
    if not labels:
        raise UserError(f"{archive} has no folder with the name of a class of the network: {some(names)}")
    add_note(notes, [folder for folder in titles if folder not in labels], "classes that the network does not have")
    used = {folder: names[label] for folder, label in labels.items()}
    photos, boxes = check_photos(archive, photos, used, tables, notes)
    if not photos:
        raise UserError(f"{archive} has no photo that can be used")
    return make_photos(photos, labels, boxes), notes


def plain(name):
    """A class name in one spelling: "coffee_mug", "Coffee-Mug" and "coffee mug" are the same."""
    return name.casefold().replace("_", " ").replace("-", " ")


def make_photos(files, labels, boxes):
    """`Photos` of files; `labels` by class folder, `boxes` by the name of the file."""
    file_labels = np.array([labels[file.folder] for file in files], np.int64)
    return Photos(files, file_labels, [boxes.get(file.name) for file in files] if boxes else None)


def read_photo(file):
    """Reads a photo as a `Picture`; raises a UserError or OSError that names it if that is not possible."""
    return read_picture(io.BytesIO(read_bytes(file)), printable(file.name))


def make_split(photos, short_side, prepare, cached=0):
    """The `Split` of photos, shown at `short_side` pixels on the short side; `prepare` makes the network's inputs.

    Pixels and inputs of the last `cached` photos are kept in memory.
    """
    prepare = lru_cache(cached)(prepare)

    @lru_cache(cached)
    def show(photo):
        return np.rint(scale_short_side(read_photo(photo).pixels, short_side)).astype(np.uint8)

    boxes = photos.boxes
    if boxes is not None:
        scales = [short_side / min(photo.height, photo.width) for photo in photos.files]
        boxes = [found if found is None else scale * found for scale, found in zip(scales, boxes, strict=True)]
    return Split(Mapped(show, photos.files), photos.labels, boxes, Mapped(prepare, photos.files))


def find_photos(archive):
    """Finds photos in a folder or archive, without reading them.

    Returns:
        The photos as `File`s, by name, with their `folder`, and in `part` "train" or "test", or "" if there are no
        separate sets; class folder -> name of the class; files with boxes; notes about what was left out.
    """
    images, tables, other, empty, photos, notes = [], [], [], [], [], []
    for file in sorted(list_files(archive)):
        if is_hidden(file.name):
            continue
        if file.name.lower().endswith(SUFFIXES):
            images.append(file)
        elif posixpath.basename(file.name) == BOXES_CSV or file.name.lower().endswith(".xml"):
            tables.append(file)
        else:
            other.append(file.name)
    if not images:
        raise UserError(f"{archive} has no photos ({', '.join(SUFFIXES)})")
    for part, start in find_sets(archive, images).items():
        for image in images:
            path = image.name.removeprefix(start)
            if image.name.startswith(start) and "/" in path:
                photos.append(image._replace(part=part, folder=path.split("/")[0]))
        if archive.is_dir():
            folders = {path.name for path in (archive / start).iterdir() if path.is_dir() and not is_hidden(path.name)}
            empty += folders - {file.name.removeprefix(start).split("/")[0] for file in [*images, *tables]}
    placed = {photo.name for photo in photos}
    add_note(notes, other, "other files")
    add_note(notes, empty, "empty folders")
    add_note(notes, [image.name for image in images if image.name not in placed], "photos outside the class folders")
    names = {folder: printable(folder) for folder in sorted({photo.folder for photo in photos})}
    short = {folder: name[4:] for folder, name in names.items() if NUMBERED.match(folder)}
    if len(set(short.values())) == len(names):  # all have numbers, without which they still differ
        names = short
    return photos, names, tables, notes


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
    if any(path[0].lower() in TRAIN + TEST and len(path) > 2 for path in paths):
        needed = f"a training set is a folder named {', '.join(TRAIN)}, a test set one named {', '.join(TEST)}"
        raise UserError(f"{archive} has {some(train + test)}, but not a training and a test set; {needed}")
    return {"": root}


def is_hidden(name):
    """Whether a file is what macOS or a network drive puts beside another."""
    return any(part.startswith(".") or part in ("__MACOSX", "@eaDir") for part in name.split("/"))


def some(names):
    """The first ten names, as text."""
    return ", ".join([*names][:10] + ["..."] * (len(names) > 10))


def add_note(notes, left_out, what):
    """Notes how many things are left out, and the first of them."""
    if left_out:
        notes.append(f"{what} left out: {len(left_out):,}, such as {printable(min(left_out))}")


def check_photos(archive, photos, names, tables, notes):
    """Reads the photos of the classes `names` once, and adds what is left out to the notes; arguments as `find_photos`.

    Returns those that can be used, with their sizes, and name of a photo -> its boxes, (n, 4).
    """
    chosen = [photo for photo in photos if photo.folder in names]
    # Pillow releases the interpreter lock while it decodes.
    checked = thread_map(check, chosen, max_workers=AT_A_TIME, desc=f"checking {archive}", unit=" photos", disable=None)
    add_note(notes, [reason for _, reason in checked if reason], "photos that cannot be used")
    usable = [photo for photo, reason in checked if not reason]
    boxes, strangers = read_boxes(archive, tables, photos, usable, names)
    add_note(notes, strangers, "boxes without a photo")
    return usable, boxes


def check(photo):
    """Reads a photo; returns it with its size, and the reason why it cannot be used, or None."""
    try:
        picture = read_photo(photo)
    except (UserError, OSError) as error:
        return photo, str(error)
    if max(picture.width, picture.height) > MAX_ASPECT_RATIO * min(picture.width, picture.height):
        return photo, f"{photo.name} (longer than {MAX_ASPECT_RATIO}:1)"
    return photo._replace(width=picture.width, height=picture.height), None

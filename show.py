"""Class activation maps of your own images.

    python show.py digit.png                          of the LeNet that mnist.py has trained, or of the one in data/
    python show.py dog.jpg cat.jpg --model ResNet50   of a network of keras.applications with its ImageNet weights
    python show.py photo.jpg --model mine.keras       of a saved Keras model whose logits are an affine function of its
                                                      pooled feature maps
    python show.py mug.jpg --model out/photos/efficientnetb0.keras   of a network that photos.py has trained

Writes a figure for each image: the maps of the classes with the highest scores, on one scale, each with the box around
its largest connected component above 20% of the maximum. Prints scores and boxes (x0, y0, x1, y1, half-open, in pixels
of the image), and writes them to boxes.csv. A file mine_classes.txt beside mine.keras may name the classes,
one a line.

LeNet gets a digit as in MNIST: light on black, 20 pixels high. A network of photos.py gets the photo scaled on its
short side as in training. Another network gets RGB or grey pixels, scaled to its input size if that is fixed.

In Python, `predict_cams` does the same.
"""

from experiment import process

if __name__ == "__main__":
    process.start()

import csv
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from experiment.figures import save_class_maps
from experiment.files import UserError, atomic_write
from experiment.images import SUFFIXES
from experiment.predict import Network, predict_cams
from experiment.settings import ArgumentParser, bounded

# Of these LeNets the first that is there: that of one's own run, and one that is a part of the repository.
LENETS = (Path("out/lenet.keras"), Path(__file__).parent / "data" / "lenet.keras")


def show(settings):
    paths, chosen = find_images(settings.images), settings.classes
    if not settings.model:
        settings.model = next(path for path in LENETS if path.exists())
        print(f"network: {settings.model}")
    network = Network(settings.model, settings.pixel_range, settings.preprocess, settings.output)
    count = len(network.class_names)
    if chosen and (len(chosen) not in (1, len(paths)) or min(chosen) < 0 or max(chosen) >= count):
        raise UserError(f"--class takes one class for all images, or one for each of them, of 0..{count - 1}")
    if not network.range_is_known:
        print(f"{settings.model} gets pixels of 0..255; if it was trained on others, say so: --pixel-range 0 1")

    rows = [["file", "class", "score", "probability", "x0", "y0", "x1", "y1"]]  # of boxes.csv
    names, table = figure_names(paths), settings.out / "boxes.csv"
    if table.exists() and not table.read_text(encoding="utf-8", errors="replace").startswith(",".join(rows[0])):
        raise UserError(f"{table} was not written by show.py; give another folder by --out")
    inputs = {path.resolve() for path in paths}
    for name in names:
        if (settings.out / f"{name}.png").resolve() in inputs:
            raise UserError(f"the figure {settings.out / name}.png would replace an image; give another --out")
    failed = 0
    for index, (path, name) in enumerate(zip(paths, names, strict=True)):
        try:
            cams = predict_cams(path, network, settings.top, chosen and [chosen[index % len(chosen)]])
        except UserError as error:
            message = str(error) if str(path) in str(error) else f"{path}: {error}"
            if len(paths) == 1:
                raise UserError(message) from None
            print(f"show.py: {message}", file=sys.stderr)
            failed += 1
            continue
        maps = np.maximum(cams.maps, 0) if settings.relu else cams.maps
        settings.out.mkdir(parents=True, exist_ok=True)
        figure = settings.out / f"{name}.png"
        draw(figure, path.name, cams, maps)
        if settings.npy:
            with atomic_write(figure.with_suffix(".npy")) as part, part.open("wb") as npy:
                np.save(npy, maps)
        print(f"{path} -> {figure}")
        for c in range(len(cams.classes)):
            box, score, probability = cams.boxes[c], cams.scores[c], cams.probabilities[c]
            where = "box {} {} {} {}".format(*box) if box else "nowhere positive"
            print(f"    {cams.names[c]:<24} S = {score:z8.2f}  P = {probability:6.1%}  {where}")
            rows.append([path, cams.names[c], f"{score:.6g}", f"{probability:.6g}", *(box or [""] * 4)])
        with (
            atomic_write(table) as part,
            part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            csv.writer(file).writerows(rows)

    if failed:
        raise UserError(f"{failed} of {len(paths)} images cannot be used")


def find_images(arguments):
    """The paths of the images: files, all images of a folder, and all that match a pattern such as "*.jpg"."""
    paths = []
    for path in arguments:
        matches = sorted(Path().glob(str(path))) if "*" in path.name and not path.is_absolute() else []
        if path.is_dir():
            matches = [file for file in sorted(path.iterdir()) if file.name.lower().endswith(SUFFIXES)]
        elif path.exists():
            matches = [path]
        if not matches:
            raise UserError(f"{path} has no images" if path.is_dir() else f"{path} is missing")
        paths += matches
    return paths


def figure_names(paths):
    """A name for the figure of each image: cam_NAME, or cam_FOLDER_NAME or cam_FOLDER_NAME_2 if that is taken."""
    # File systems take names of 255 bytes; a prefix and a suffix are added.
    short = [path.stem if len(os.fsencode(path.stem)) <= 200 else path.stem[:50] for path in paths]
    stems, counts, names = Counter(short), Counter(), {}
    for path, stem in zip(paths, short, strict=True):
        name = first = f"cam_{stem}"
        if stems[stem] > 1:
            name = first = f"cam_{path.resolve().parent.name[:50]}_{stem[:50]}"
        while name in names:
            counts[first] += 1
            name = f"{first}_{counts[first] + 1}"
        names[name] = path
    return list(names)


def draw(file, title, cams, maps):
    """Writes the figure of an image: itself, and its maps (n, h, w) with their boxes."""
    pixels = cams.picture.pixels
    boxes = [box and np.multiply(box, pixels.shape[1] / cams.picture.width).tolist() for box in cams.boxes]
    if (pixels == pixels[:, :, :1]).all():  # grey
        pixels = pixels[:, :, :1]
    titles = [(title, "black")]
    for name, score, probability in zip(cams.names, cams.scores, cams.probabilities, strict=True):
        titles.append((f"{name}: S = {score:z.2f}, P = {probability:.1%}", "black"))
    save_class_maps(file, pixels, np.moveaxis(maps, 0, 2), titles, boxes)


def main(arguments=None):
    parser = ArgumentParser("show.py", __doc__)
    flag = parser.add_argument
    flag("images", nargs="+", type=Path, metavar="IMAGE", help="image files, folders, or patterns such as '*.jpg'")
    text = "saved model, checkpoint of the repository of 2017, or network of keras.applications"
    flag("--model", help=f"{text} (default: {LENETS[0]} or, without a run, the LeNet in data/)")
    flag("--top", default=5, type=bounded(1), help="number of top classes to show (default: 5)")
    text = "number of the class to show, or one for each image"
    flag("--class", nargs="+", type=int, dest="classes", metavar="C", help=text)
    flag("--out", default=Path("out"), type=Path, help="folder for the figures, cam_NAME.png (default: out)")
    flag("--npy", action="store_true", help="also write the maps, not upsampled, cam_NAME.npy (n, h, w) float32")
    flag("--relu", action="store_true", help="set negative values of the maps to zero (not in the paper)")
    text = "values of black and white for a saved model, such as 0 1 or -1 1 (default: 0 255)"
    flag("--pixel-range", nargs=2, type=float, metavar=("LOW", "HIGH"), help=text)
    text = "apply preprocess_input of this module of keras.applications to images for a saved model, such as resnet"
    flag("--preprocess", help=text)
    flag("--output-name", dest="output", metavar="NAME", help="name of the output, if the model has several")
    process.run_script("show.py", show, parser.parse_args(arguments))


if __name__ == "__main__":
    main()

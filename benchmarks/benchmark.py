"""How fast this project is, compared with what one would do instead: a Markdown table, measured where it runs.

    python benchmarks/benchmark.py                     everything but photos
    python benchmarks/benchmark.py training maps       some parts of it
    python benchmarks/benchmark.py --rounds 1          quick and rough
    python benchmarks/benchmark.py --photos photos.tar --network network.keras     everything

Each thing (see contestants.py) is measured in a process of its own, which has warmed up and sleeps while others are
measured; a whole program starts anew for each measure. The things of a part take turns, A B C A B C ..., `--rounds`
times (what takes long, three times; a whole run of mnist.py, once). A ratio is that of two measures of one round, the
other to ours: above 1, the other takes more time or memory, or is more accurate. The table has the median of the
ratios, and the least and the greatest. Run it on a machine that does nothing else.

Both sides of a row compute in the same precision. Rows in bfloat16 are there only if this machine is faster with it.

Peers that are not installed are left out and named below the table. To install them (a PyTorch for the CPU will do):

    pip install torch torchcam tf-keras-vis

pytorch-grad-cam is not among them, since it needs torchvision.

What is compared: here, training is that of mnist.py, with AdamW and hidden locations, on images of full size; that of
the peers is plain gradient descent. The maps of the peers are those of one class, at the size of the feature maps, as
here. The limit is the rate at which one large matrix product does as many operations as the convolutions. On photos,
whole programs are compared, photos.py with fine_tune.py: both train on frozen features, here for 40 epochs, and draw
maps. Files that were just written are in the operating system's cache.
"""

import argparse
import contextlib
import importlib.metadata
import multiprocessing
import os
import platform
import re
import signal
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import contestants
from tqdm import tqdm

from data.dataset import load_dataset
from experiment.files import UserError

HERE, LIMIT = "here", "limit of the machine"
left_out = []  # lines to print below the table
prepared = []  # in the process of a contestant: the function that measures


def race(part, options, contest, most=sys.maxsize):
    """Measures contestants in turn, at most `most` times.

    `contest` has by name a contestant, (function, arguments ...). Returns the measures by name, (rounds, ...). A peer
    that cannot be prepared is missing there, and is named in `left_out`.
    """
    workers, measures = {}, {}
    # The folder is deleted at the end, since deleting slows a disk down for a while.
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for name, (function, *arguments) in tqdm(contest.items(), f"{part}: preparing", disable=None):
            worker = stack.enter_context(new_worker())
            reason = worker.submit(prepare, function, str(options.data), folder, *arguments).result()
            if reason is None:
                workers[name] = worker
            elif name in (HERE, LIMIT):
                raise RuntimeError(f"{part}, {name}: {reason}")
            else:
                left_out.append(f"{part}, {name}: {reason}")
        for name in tqdm([*workers] * min(options.rounds, most), f"{part}: measuring", disable=None):
            measures.setdefault(name, []).append(workers[name].submit(measure).result())
    return {name: np.array(values) for name, values in measures.items()}


def new_worker():
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initialize)


def initialize():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process silently
    sys.stdout = sys.stderr  # the table alone goes to standard output
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def prepare(function, *arguments):
    """Prepares a contestant; returns why it failed, or None."""
    try:
        prepared.append(function(*arguments))
    except Exception as error:  # whatever a peer raises
        return f"{type(error).__name__}: {error}".splitlines()[0]


def measure():
    return prepared[0]()


def compare(title, precision, measures, text):
    """A table row for each of the others; `text` shows a measure."""
    here = measures.pop(HERE)
    for name, values in measures.items():
        ratios = values / here
        ratio = f"{np.median(ratios):.3g} ({ratios.min():.3g} to {ratios.max():.3g})"
        instead = f"{name}: {text(np.median(values))}"
        yield [title, precision.removeprefix("mixed_"), text(np.median(here)), instead, ratio]


def column(measures, index):
    """One of several numbers that contestants measure at once."""
    return {name: values[:, index] for name, values in measures.items()}


def rate(seconds):
    return f"{1 / seconds:,.0f}/s"


def duration(seconds):
    return f"{seconds:,.0f} s" if seconds > 20 else f"{seconds:.2g} s"


def gigabytes(size):
    return f"{size / 1e9:.2g} GB"


# The parts of the table; each yields rows


def training(options):
    number = 1024  # images in a measure
    for size in (16, 256):  # the batches of mnist.py, and those of 2017
        for precision in options.precisions:
            contest = {
                HERE: (contestants.train_here, precision, size, number),
                "Keras `fit`": (contestants.train_keras, precision, size, number),
                "PyTorch": (contestants.train_torch, precision, size, number),
                LIMIT: (contestants.multiply_matrices, precision, True),
            }
            measures = race(f"training, {size} images, {precision}", options, contest)
            yield from compare(f"training on batches of {size}, images", precision, measures, rate)


def run(options):
    title = f"`python mnist.py`, {options.number:,} images"
    rgb = np.array([options.bytes * 3 * 8])  # the pixels are uint8 and grey
    for precision in options.precisions:
        flags = "--data", str(options.data.resolve()), "--precision", precision, "--out"
        contest = {HERE: (contestants.run_script, "mnist.py", *flags)}
        measures = race(f"run, {precision}", options, contest, 1)  # time and memory hardly vary
        seconds, memory, accuracy = measures[HERE][0]
        measures = {HERE: np.array([memory]), "the images as float64 RGB alone, not measured": rgb}
        whole = f"{title}: {duration(seconds)}, accuracy {accuracy:.1%}; peak memory"
        yield from compare(whole, precision, measures, gigabytes)


def maps(options):
    for precision in options.precisions:
        arguments = precision, 125, 500  # images in a batch, and in a measure
        contest = {
            HERE: (contestants.map_here, *arguments),
            "a plain forward pass": (contestants.map_here, *arguments, False),
            "tf-keras-vis, Grad-CAM, one class": (contestants.map_tf_keras_vis, *arguments),
            "torchcam, CAM, one class": (contestants.map_torchcam, *arguments),
            LIMIT: (contestants.multiply_matrices, precision, False),
        }
        measures = race(f"maps, {precision}", options, contest)
        yield from compare("maps of all ten classes, images", precision, measures, rate)


def heatmaps(options):
    peer = "`plt.imshow` twice, `plt.savefig`"
    contest = {HERE: (contestants.draw_heatmaps, 50), peer: (contestants.draw_heatmaps, 10, True)}
    yield from compare("heatmap PNGs", "-", race("heatmaps", options, contest), rate)


def reading(options):
    contest = {HERE: (contestants.read_here,), "`tar xzf`, `skimage.io.imread`": (contestants.read_skimage,)}
    measures = race("reading", options, contest, 3)
    yield from compare(f"tarball to array, {options.number:,} images", "-", column(measures, 0), duration)
    yield from compare(f"second start, all pixels read, {options.number:,} images", "-", column(measures, 1), duration)


def photos(options):
    if not (options.photos and options.network):
        left_out.append("photos: they need --photos ARCHIVE and --network FILE")
        return
    archive, network = str(options.photos.resolve()), str(options.network.resolve())
    flags = "--data", archive, "--network", network, "--out"
    contest = {
        HERE: (contestants.run_script, "photos.py", *flags),
        "Keras `fit`, 10 epochs, frozen base": (contestants.run_script, "benchmarks/fine_tune.py", archive, network),
    }
    measures = race("photos", options, contest, 3)
    title = "`python photos.py`, archive to classifier and maps"
    yield from compare(title, "float32", column(measures, 0), duration)
    yield from compare(f"{title}, peak memory", "float32", column(measures, 1), gigabytes)
    yield from compare(f"{title}, accuracy", "float32", column(measures, 2), "{:.1%}".format)


PARTS = {part.__name__: part for part in (training, run, maps, heatmaps, reading, photos)}


def header(options):
    """Hardware and versions."""
    information = Path("/proc/cpuinfo")
    named = re.search("model name\t: (.*)", information.read_text()) if information.exists() else None
    versions = []
    for name in ("tensorflow", "keras", "numpy", "scikit-image", "matplotlib", "torch", "torchcam", "tf-keras-vis"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return (
        f"{named[1] if named else platform.machine()}, {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f} at the "
        f"start), {platform.system()}, Python {platform.python_version()}, {', '.join(versions)}; {options.rounds} "
        f"rounds; data: {options.data}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--data", default="data", type=Path, help="folder of the data set (default: data)")
    parser.add_argument("--rounds", default=5, type=int, help="how often each thing is measured (default: 5)")
    parser.add_argument("--photos", type=Path, metavar="ARCHIVE", help="photos, a folder of .jpg files for each class")
    parser.add_argument("--network", type=Path, metavar="FILE", help="a saved Keras network that takes them, 0..255")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {min(unknown)}, only {', '.join(PARTS)}")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} is not at least 1")
    train, test = load_dataset(options.data)  # extracts the tarball, too
    if len(test.labels) < 500:
        raise UserError(f"{options.data} must have at least 500 test images")
    options.number, options.bytes = len(train.labels) + len(test.labels), train.images.nbytes + test.images.nbytes
    with new_worker() as worker:  # TensorFlow is not imported in this process
        options.precisions = worker.submit(contestants.precisions).result()

    print(header(options), flush=True)
    print("\n| | precision | here | instead | ratio: median (least to greatest) |\n|---|---|---|---|---|")
    for part in options.parts or PARTS:
        for row in PARTS[part](options):
            print(f"| {' | '.join(row)} |", flush=True)
    for line in left_out:
        print(f"\nLeft out: {line}")


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, UserError, OSError) as error:
        sys.exit(f"benchmark.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)

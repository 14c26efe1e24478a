import csv
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
settings.register_profile("short", deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("fuzz", settings.get_profile("short"), max_examples=10_000)
settings.load_profile("short")

SMALL = ["--batch-size", 8, "--eval-every", 2, "--samples", 4]  # settings of mnist.py for `small_data`


def pytest_addoption(parser):
    parser.addoption("--all-networks", action="store_true", help="test all networks of keras.applications, not nine")


def pytest_generate_tests(metafunc):
    if "application" in metafunc.fixturenames:
        names = ["MobileNet", "MobileNetV3Small"]  # the second has no exact maps, and so have two of the slow ones
        slow = ["DenseNet121", "EfficientNetB0", "InceptionV3", "NASNetMobile", "ResNet50", "ConvNeXtTiny", "VGG16"]
        names += [pytest.param(name, marks=pytest.mark.slow) for name in slow]
        if metafunc.config.getoption("all_networks"):
            import keras

            names = [name for name in dir(keras.applications) if callable(getattr(keras.applications, name))]
        metafunc.parametrize("application", names)


def encoded(pixels, kind="JPEG"):
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def png(pixels):
    return encoded(pixels, "PNG")


def write_tar(path, files):
    """Writes an uncompressed tar archive of files, bytes by name."""
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_data(folder, images, labels, boxes=None, names=None):
    """Writes a data folder; the images are arrays, or bytes that take the place of a PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "mnist_cluttered.tar.gz", "w:gz") as archive:
        for index, image in enumerate(images):
            content = image if isinstance(image, bytes) else png(image)
            member = tarfile.TarInfo(names[index] if names else f"img_{index + 1}.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    lines = [f"{index}\t{label}\n" for index, label in enumerate(labels, start=1)]
    (folder / "labels.txt").write_text("".join(lines))
    if boxes is not None:
        lines = ["\t".join(map(str, (index, *box))) + "\n" for index, box in enumerate(boxes, start=1)]
        (folder / "boxes.txt").write_text("".join(lines))
    return folder


def rows(path):
    """The rows of a CSV file, as dicts of text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def contents(folder):
    """The bytes of each file below a folder by its name there, but for the locks."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("lock", "img.lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@contextmanager
def start(*arguments, preexec_fn=lambda: None, **environment):
    """Starts a script of the project as a user does; whatever happens, none of its processes survives the block."""

    def prepare():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by pytest, it would be ignored here, too
        preexec_fn()

    with subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {name: str(value) for name, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=prepare,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):  # all have ended
                os.killpg(process.pid, signal.SIGKILL)


def run(*arguments, timeout=300, **options):
    """Runs a script of the project to its end; returns a `subprocess.CompletedProcess`."""
    with start(*arguments, **options) as process:
        output, errors = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def call(script, *arguments):
    """Runs the main function of a script module in this process, which is faster; returns as `run` does."""
    code, output, errors = 0, io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            script.main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def send_signal(process, number, path):
    """Sends a signal to a script as soon as a file of it is there."""
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)


def assert_same_run(out, other):
    """All files of two runs are equal, except the state before the last, which is saved when a run is stopped too."""
    import keras

    found, expected = contents(out), contents(other)
    assert found.keys() == expected.keys()
    different = {name for name in found if found[name] != expected[name]}
    assert different <= {"checkpoint.previous.npz", "lenet.keras"}  # the second holds the time of its making
    weights = [keras.models.load_model(folder / "lenet.keras").get_weights() for folder in (out, other)]
    np.testing.assert_equal(*weights)


def assert_one_line_error(process, *parts):
    """Exit code 2, one line on standard error that holds each of the parts, no traceback."""
    assert process.returncode == 2, process.stderr
    assert len(process.stderr.strip().splitlines()) == 1, process.stderr
    for part in parts:
        assert part in process.stderr


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """30 images of 40 x 44, 9 of them for testing: the first three are equal, their labels are 1, 7 and 1."""
    images = np.random.default_rng(0).integers(0, 256, (30, 40, 44), dtype=np.uint8)
    images[22] = images[23] = images[21]
    labels = np.arange(30) % 10
    labels[21:24] = 1, 7, 1
    return write_data(tmp_path_factory.mktemp("data"), images, labels)


@pytest.fixture
def random_images():
    return np.random.default_rng(0).integers(0, 256, (10, 20, 30), dtype=np.uint8)


@pytest.fixture(scope="session")
def real_data():
    """The folder with real MNIST that the environment variable CAM_TEST_DATA names."""
    folder = os.environ.get("CAM_TEST_DATA")
    if not folder:
        pytest.skip("CAM_TEST_DATA does not name a folder with mnist.npz")
    return Path(folder)

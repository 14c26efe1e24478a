"""Training on several devices and in several processes, by `keras.distribution` on the JAX backend."""

import os
import signal
import socket
from contextlib import ExitStack

import keras
import numpy as np
import pytest
from conftest import ROOT, encoded, rows, start, write_data, write_tar
from keras import layers

pytestmark = pytest.mark.slow
pytest.importorskip("jax")
FLAGS = ("--steps", 6, "--eval-every", 3, "--samples", 2, "--batch-size", 8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    images = np.random.default_rng(0).integers(0, 256, (40, 20, 24), dtype=np.uint8)
    boxes = np.tile([4, 4, 12, 14], (40, 1))
    return write_data(tmp_path_factory.mktemp("data"), images, np.arange(40) % 10, boxes)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The run of one process on one device."""
    out = tmp_path_factory.mktemp("alone") / "out"
    with train(data, out) as process:
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return out


def train(data, out, *flags, **environment):
    """Starts `python mnist.py` with JAX."""
    environment |= {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": ROOT}
    return start(ROOT / "mnist.py", "--data", data, "--out", out, *FLAGS, *flags, **environment)


def train_in_two(stack, data, out, *flags, others=()):
    """Starts two processes that train one network; `others` are flags of the second one alone."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free, and free again now
    environment = {"KERAS_DISTRIBUTION_JOB_ADDRESSES": f"127.0.0.1:{port}", "KERAS_DISTRIBUTION_NUM_PROCESSES": 2}
    return [
        stack.enter_context(
            train(data, out, *flags, *number * others, **environment, KERAS_DISTRIBUTION_PROCESS_ID=number)
        )
        for number in range(2)
    ]


def assert_same_history(out, alone):
    for found, expected in zip(rows(out / "history.csv"), rows(alone / "history.csv"), strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == value or float(found[name]) == pytest.approx(float(value), rel=1e-4)


def assert_same_run(out, alone):
    """Same history and weights as of one process, within the rounding of float32."""
    assert_same_history(out, alone)
    with np.load(out / "weights" / "6.npz") as found, np.load(alone / "weights" / "6.npz") as expected:
        for name in expected.files:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-5)


def test_two_processes_train_as_one(data, alone, tmp_path):
    with ExitStack() as stack:
        first, second = train_in_two(stack, data, tmp_path / "out")
        outputs = [process.communicate(timeout=200) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert_same_run(tmp_path / "out", alone)
    assert "step 6" in outputs[0][0]
    assert "step" not in outputs[1][0]


def test_two_processes_have_one_run(data, tmp_path):
    """Another setting of the second process is refused; when the run is finished, both end at once."""
    for others, code, text in (
        (("--label-smoothing", 0.1), 2, ""),
        ((), 0, "step 6"),
        ((), 0, "already holds this finished run"),
    ):
        with ExitStack() as stack:
            processes = train_in_two(stack, data, tmp_path / "out", others=others)
            (output, errors), (_, other_errors) = [process.communicate(timeout=200) for process in processes]
        assert [process.returncode for process in processes] == [code, code], (errors, other_errors)
        assert text in output
        assert "Traceback" not in errors + other_errors
        assert ("holds a run with --label-smoothing 0.03, not 0.1" in other_errors) == bool(others)


def test_two_devices_train_as_one(data, alone, tmp_path):
    with train(data, tmp_path / "out", XLA_FLAGS="--xla_force_host_platform_device_count=2") as process:
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert_same_run(tmp_path / "out", alone)


def test_photos_on_two_devices(tmp_path):
    """The features, the maps of one photo at a time, which is padded to two, and what is trained."""
    rng = np.random.default_rng(0)
    files = {
        f"photos/{name}/{index}.png": encoded(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8))
        for name in ("a", "b", "c")
        for index in range(14)
    }
    archive = write_tar(tmp_path / "photos.tar", files)
    images = keras.Input((32, 32, 3))
    f = layers.Conv2D(16, 5, 4, activation="relu")(images)
    keras.Model(images, layers.Dense(3)(layers.GlobalAveragePooling2D()(f))).save(tmp_path / "small.keras")
    arguments = ["--data", archive, "--network", tmp_path / "small.keras", "--batch-size", 4, "--steps", 4]
    environment = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": ROOT}
    for name, flags in ("alone", ""), ("out", "--xla_force_host_platform_device_count=2"):
        out = ["--out", tmp_path / name, "--samples", 1]
        with start(ROOT / "photos.py", *arguments, *out, XLA_FLAGS=flags, **environment) as process:
            _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    features = [np.fromfile(next((tmp_path / name).glob("features-*")), np.float32) for name in ("out", "alone")]
    features = [values.reshape(12, 33)[:, :32] for values in features]
    np.testing.assert_allclose(*features, rtol=1e-5)
    assert_same_history(tmp_path / "out", tmp_path / "alone")


def test_a_batch_that_does_not_divide_among_the_devices(data, tmp_path):
    with train(data, tmp_path / "out", XLA_FLAGS="--xla_force_host_platform_device_count=3") as process:
        process.wait(200)
        text = "--batch-size 8 cannot be divided among 3 devices; 6 or 9 can"
        assert process.returncode == 2
        assert text in process.stderr.read()


def test_if_a_process_dies_the_others_end_and_the_same_command_resumes(data, tmp_path):
    flags = ("--steps", 40, "--eval-every", 10)
    with train(data, tmp_path / "alone", *flags) as process:
        process.communicate(timeout=200)
    with ExitStack() as stack:
        first, second = train_in_two(stack, data, tmp_path / "out", *flags)
        while "step 10" not in first.stdout.readline():
            assert first.poll() is None
        os.kill(second.pid, signal.SIGKILL)
        _, errors = first.communicate(timeout=200)
    assert first.returncode == 2
    assert "mnist.py: stopped (" in errors
    assert "if another process has ended, run the same commands again, without --fresh" in errors
    assert "Traceback" not in errors
    with ExitStack() as stack:
        processes = train_in_two(stack, data, tmp_path / "out", *flags)
        outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "resuming after step" in outputs[0][0]
    found, expected = (rows(tmp_path / name / "history.csv") for name in ("out", "alone"))
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    assert float(found[-1]["loss"]) == pytest.approx(float(expected[-1]["loss"]), rel=1e-3)

"""Bad days: each fault is made to happen, and what must survive it is looked at."""

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from conftest import ROOT, SMALL, assert_one_line_error, call, contents, rows, run, start, write_data
from PIL import Image

import mnist
from experiment.files import PART, UserError, acquire_lock
from experiment.run import lock_run_folder

STEPS = 150


@pytest.fixture(scope="module")
def whole_run(small_data, tmp_path_factory):
    """A run that was never stopped, and the seconds that it took."""
    out, start = tmp_path_factory.mktemp("whole"), time.monotonic()
    process = run("mnist.py", *arguments(small_data, out))
    assert process.returncode == 0, process.stderr
    return out, time.monotonic() - start


def arguments(data, out):
    return ["--data", data, "--out", out, "--steps", STEPS, *SMALL]


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def files(folder):
    """The content of each file of a run by name; arrays for what holds the time of its making."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".keras":
            found[name] = [weights.tobytes() for weights in keras.models.load_model(path).get_weights()]
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                found[name] = [arrays[key].tobytes() for key in arrays.files]
        elif path.is_file() and path.name not in ("lock", "settings.json"):
            found[name] = path.read_bytes()
    return found


def assert_same(out, whole):
    """All files of two runs are equal, except the state before the last, which is saved when a run is stopped too."""
    one, other = files(out), files(whole)
    assert one.keys() == other.keys()
    different = [name for name in one if one[name] != other[name] and name != "checkpoint.previous.npz"]
    assert not different


def assert_nothing_is_half_written(out):
    for path in out.rglob("*"):
        if path.name.startswith(PART):
            continue  # its name says what it is, and the next start deletes it
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".npz":
            with np.load(path) as loaded:
                assert all(loaded[name].size for name in loaded.files)
        elif path.suffix == ".csv":
            steps = [row["step"] for row in rows(path)]
            assert steps
            assert len(set(steps)) == len(steps)
        elif path.suffix == ".keras":
            keras.models.load_model(path)
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        elif path.suffix == ".js":
            json.loads(path.read_text().removeprefix("run = ").removesuffix(";\n"))


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_as_one_that_was_never_stopped(small_data, whole_run, tmp_path):
    whole, seconds = whole_run
    seed = time.time_ns()  # other moments in every run of this test; the promise is for all
    print("seed", seed)
    for delay in np.random.default_rng(seed).uniform(0, 0.75 * seconds, 20):
        with start("mnist.py", *arguments(small_data, tmp_path)) as process:
            select.select([process.stderr], [], [], delay)  # waits, unless the run ends before
        assert_nothing_is_half_written(tmp_path)
    last = call(mnist, *arguments(small_data, tmp_path))
    assert last.returncode == 0, last.stderr
    assert_same(tmp_path, whole)
    assert not list(tmp_path.rglob(PART + "*"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_asked_to_stop_ends_the_step_and_saves(small_data, whole_run, tmp_path, number, code):
    with start("mnist.py", *arguments(small_data, tmp_path)) as process:
        wait_for(tmp_path / "img_0" / "cmap_8.png", process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors.split("\n")[-2:] == ["stopped; run the same command again, without --fresh, to continue", ""]
    assert not list(tmp_path.rglob(PART + "*"))
    assert not (tmp_path / "lenet.keras").exists()
    assert (tmp_path / "index.html").exists()  # a run that was stopped has a page, too
    assert '"finished": false' in (tmp_path / "run.js").read_text()
    continued = call(mnist, *arguments(small_data, tmp_path))
    assert continued.returncode == 0, continued.stderr
    assert "resuming after step" in continued.stdout
    assert_same(tmp_path, whole_run[0])


def test_a_signal_before_the_training_stops_too(small_data, tmp_path):
    with start("mnist.py", *arguments(small_data, tmp_path)) as process:
        wait_for(tmp_path / "lock", process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (
        143,
        "stopped; run the same command again, without --fresh, to continue",
    )


@pytest.fixture
def stopped_run(whole_run, tmp_path):
    """A copy of the whole run, stopped before its figures."""
    out = tmp_path / "out"
    shutil.copytree(whole_run[0], out)
    (out / "lenet.keras").unlink()
    return out


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "text"])
def test_of_a_damaged_state_the_one_before_is_used(small_data, whole_run, stopped_run, damage):
    newest = stopped_run / "checkpoint.npz"
    if damage == "flipped":
        flip(newest)
    else:
        newest.write_bytes({"truncated": newest.read_bytes()[:-2000], "empty": b"", "text": b"nothing"}[damage])
    process = call(mnist, *arguments(small_data, stopped_run))
    assert process.returncode == 0, process.stderr
    assert f"{newest} is damaged" in process.stdout
    assert f"resuming after step {STEPS - 2}" in process.stdout
    assert_same(stopped_run, whole_run[0])


@pytest.mark.slow
def test_a_figure_that_fails_costs_no_model(small_data, stopped_run):
    """A heatmap that is missing is left out of the strip; one that is damaged stops the figures, not the model."""
    (stopped_run / "img_1" / "cmap_0.png").unlink()
    (stopped_run / "img_2" / "cmap_0.png").write_bytes(b"damaged")
    process = call(mnist, *arguments(small_data, stopped_run))
    assert_one_line_error(process, "img_2/cmap_0.png")
    assert keras.models.load_model(stopped_run / "lenet.keras").count_params() == 52_736
    (stopped_run / "img_2" / "cmap_0.png").unlink()
    process = call(mnist, *arguments(small_data, stopped_run))
    assert process.returncode == 0, process.stderr
    assert '"finished": true' in (stopped_run / "run.js").read_text()


@pytest.mark.slow
def test_when_both_states_are_damaged_the_run_stops(small_data, stopped_run):
    for name in ("checkpoint.npz", "checkpoint.previous.npz"):
        flip(stopped_run / name)
    before = contents(stopped_run)
    process = call(mnist, *arguments(small_data, stopped_run))
    assert_one_line_error(process, "has no checkpoint that can be read", "--fresh")
    assert contents(stopped_run) == before


@pytest.mark.slow
def test_settings_of_another_run_are_refused(small_data, stopped_run):
    before = contents(stopped_run)
    process = call(mnist, *arguments(small_data, stopped_run), "--learning-rate", 0.5)
    assert_one_line_error(process, "--learning-rate", "not 0.5", "--fresh")
    (stopped_run / "settings.json").write_text("{")
    assert_one_line_error(call(mnist, *arguments(small_data, stopped_run)), "settings.json is damaged", "--fresh")
    del before[stopped_run / "settings.json"]
    assert before.items() <= contents(stopped_run).items()


def test_what_a_run_in_a_folder_below_is_writing_stays(tmp_path):
    mine, other = tmp_path / "img_0" / f"{PART}cmap_0.png", tmp_path / "full" / f"{PART}checkpoint.npz"
    for path in (mine, other, tmp_path / "full" / "lock"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    lock_run_folder(tmp_path).close()
    assert (mine.exists(), other.exists()) == (False, True)


def limited(size):
    """No file can grow beyond `size` bytes in the process: for it, the disk is full there."""
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}


@pytest.mark.slow
def test_a_full_disk_in_training(small_data, stopped_run):
    shutil.copy(stopped_run / "checkpoint.previous.npz", stopped_run / "checkpoint.npz")  # two steps to go
    before = contents(stopped_run)
    process = run("mnist.py", *arguments(small_data, stopped_run), **limited(300_000))  # a checkpoint has twice as much
    assert_one_line_error(process, "mnist.py: ", "checkpoint.npz")
    after = contents(stopped_run)
    for name in ("checkpoint.npz", "checkpoint.previous.npz", "settings.json"):
        assert after[stopped_run / name] == before[stopped_run / name]
    assert_nothing_is_half_written(stopped_run)


@pytest.mark.slow
def test_a_full_disk_in_the_first_start(tmp_path, random_images):
    folder = write_data(tmp_path / "data", random_images, range(10))
    process = run("mnist.py", *arguments(folder, tmp_path / "out"), **limited(4000))  # the images have 6,000 bytes
    assert_one_line_error(process)
    assert sorted(path.name for path in folder.iterdir()) == ["img.lock", "labels.txt", "mnist_cluttered.tar.gz"]


def test_a_disk_that_is_too_small_for_the_images_is_named_before_it_is_full(tmp_path, random_images, monkeypatch):
    from data.dataset import load_dataset

    folder = write_data(tmp_path, random_images, range(10))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))
    with pytest.raises(UserError, match=r"needs up to .* GB are free"):
        load_dataset(folder)
    assert not (folder / "img").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "parts"),
    [("size=1m", ["No space left on device"]), ("ro", ["cannot be written", "Read-only file system"])],
    ids=["full", "read-only"],
)
def test_a_real_disk(small_data, tmp_path, options, parts):
    mount = f"mount -t tmpfs -o {options} none {tmp_path} && "
    inside = ["unshare", "--mount", "sh", "-c"]  # only these processes see the mount
    if not shutil.which("unshare") or subprocess.run([*inside, mount + "true"], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    show = f"; code=$?; find {tmp_path} -name '{PART}*'; exit $code"
    process = subprocess.run(
        [*inside, f'{mount}"$@"{show}', "sh", sys.executable, "mnist.py", *map(str, arguments(small_data, tmp_path))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert_one_line_error(process, str(tmp_path), *parts)
    assert PART not in process.stdout  # nothing half-written is left


@pytest.mark.slow
def test_two_runs_on_one_output_folder(small_data, whole_run, tmp_path):
    with start("mnist.py", *arguments(small_data, tmp_path)) as first:  # killed at the end, it leaves its lock behind
        wait_for(tmp_path / "img_0" / "cmap_2.png", first)
        first.send_signal(signal.SIGSTOP)  # or it could end before the others have started
        for flags in [], ["--fresh"]:
            process = call(mnist, *arguments(small_data, tmp_path), *flags)
            assert_one_line_error(process, f"process {first.pid} uses {tmp_path}")
    second = call(mnist, *arguments(small_data, tmp_path))
    assert second.returncode == 0, second.stderr
    assert_same(tmp_path, whole_run[0])


@pytest.mark.slow
def test_two_first_starts_extract_once(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2000, 60, 60), dtype=np.uint8)
    folder = write_data(tmp_path / "data", images, np.arange(2000) % 10)
    read = f"from data.dataset import load_dataset; load_dataset({str(folder)!r})"
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(start("-c", read)) for _ in range(3)]
        errors = [process.communicate(timeout=60)[1] for process in processes]
        assert 0 in [process.returncode for process in processes]
        for process, error in zip(processes, errors, strict=True):
            assert process.returncode == 0 or "UserError: process" in error
    assert len(list((folder / "img").glob("*.png"))) == 2000
    assert not list(folder.glob("*part*"))


def test_the_holder_of_a_folder_is_named_until_it_lets_go(tmp_path, small_data, random_images):
    folder = write_data(tmp_path / "data", random_images, range(10))
    with acquire_lock(folder / "img.lock"):
        process = call(mnist, *arguments(folder, tmp_path / "out"))
        assert_one_line_error(process, f"process {os.getpid()} uses {folder}")
    acquire_lock(folder / "img.lock").close()


def test_a_loss_that_is_not_finite_ends_the_run_and_the_last_good_state_stays(small_data, tmp_path):
    rate = ["--recipe", "original", "--learning-rate", 1e18]
    process = call(mnist, "--data", small_data, "--out", tmp_path, "--steps", 8, *SMALL, *rate)
    assert_one_line_error(process, "the loss is", "at step 2", "--learning-rate")
    assert [row["step"] for row in rows(tmp_path / "history.csv")] == ["0"]
    assert_nothing_is_half_written(tmp_path)
    with np.load(tmp_path / "checkpoint.npz") as state:
        assert all(np.isfinite(state[name]).all() for name in state.files if state[name].dtype.kind == "f")


def test_weights_that_are_not_finite_at_an_evaluation_end_the_run_in_one_line(small_data, tmp_path):
    rate = ["--recipe", "original", "--learning-rate", 9e18]
    process = call(mnist, "--data", small_data, "--out", tmp_path, "--steps", 8, *SMALL, *rate, "--eval-every", 1)
    assert_one_line_error(process, "--fresh", "--learning-rate")


@pytest.mark.slow
def test_a_generator_that_is_killed_leaves_the_old_tarball_whole(tmp_path):
    rng = np.random.default_rng(0)
    digits = {
        "x_train": rng.integers(0, 256, (60, 28, 28), dtype=np.uint8),
        "y_train": rng.integers(0, 10, 60),
        "x_test": rng.integers(0, 256, (20, 28, 28), dtype=np.uint8),
        "y_test": rng.integers(0, 10, 20),
    }
    np.savez(tmp_path / "mnist.npz", **digits)
    out = tmp_path / "data"
    arguments = ["-m", "data.generate", "--digits", tmp_path / "mnist.npz", "--out", out, "--images"]
    assert run(*arguments, 20).returncode == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "img.lock"}
    part = out / f"{PART}mnist_cluttered.tar.gz"
    for number, code in (signal.SIGINT, 130), (signal.SIGKILL, -9):
        with start(*arguments, 100_000) as process:
            wait_for(part, process)
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == code
        assert "Traceback" not in errors
        after = {path.name: path.read_bytes() for path in out.iterdir()}
        assert before.items() <= after.items()
    assert run(*arguments, 20).returncode == 0  # the next run is not in the way of what was left
    assert not list(out.glob(PART + "*"))

"""Bad days: each fault is made to happen, and what must survive it is looked at."""

import json
import os
import resource
import select
import shutil
import signal
import time

import keras
import numpy as np
import pytest
from conftest import SMALL, assert_one_line_error, assert_same_run, call, contents, run, send_signal, start, write_data
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


READERS = {
    ".png": lambda path: Image.open(path).load(),
    ".npz": lambda path: dict(np.load(path)),
    ".keras": keras.models.load_model,
    ".csv": lambda path: path.read_text().index("\n0,0,"),  # step 0, after 0 images
    ".html": lambda path: path.read_text().index("</html>"),
    ".js": lambda path: json.loads(path.read_text().removeprefix("run = ").removesuffix(";\n")),
}


def assert_nothing_is_half_written(out):
    for path in out.rglob("*"):
        if path.suffix in READERS and not path.name.startswith(PART):  # which the next start deletes
            READERS[path.suffix](path)


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
    assert_same_run(tmp_path, whole)
    assert not list(tmp_path.rglob(PART + "*"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_asked_to_stop_says_how_to_continue(small_data, whole_run, tmp_path, number, code):
    with start("mnist.py", *arguments(small_data, tmp_path)) as process:
        send_signal(process, number, tmp_path / "img_0" / "cmap_8.png")
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors.endswith("\nstopped; run the same command again, without --fresh, to continue\n")
    assert not list(tmp_path.rglob(PART + "*"))
    assert not (tmp_path / "lenet.keras").exists()
    assert (tmp_path / "index.html").exists()  # a run that was stopped has a page, too
    assert '"finished": false' in (tmp_path / "run.js").read_text()
    continued = call(mnist, *arguments(small_data, tmp_path))
    assert continued.returncode == 0, continued.stderr
    assert "resuming after step" in continued.stdout
    assert_same_run(tmp_path, whole_run[0])


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
    assert_same_run(stopped_run, whole_run[0])


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
        assert after[name] == before[name]
    assert_nothing_is_half_written(stopped_run)
    assert not list(stopped_run.rglob(PART + "*"))


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
def test_two_runs_on_one_output_folder(small_data, whole_run, tmp_path):
    with start("mnist.py", *arguments(small_data, tmp_path)) as first:  # killed at the end, it leaves its lock behind
        # It is stopped, or it could end before the others have started.
        send_signal(first, signal.SIGSTOP, tmp_path / "img_0" / "cmap_2.png")
        for flags in [], ["--fresh"]:
            process = call(mnist, *arguments(small_data, tmp_path), *flags)
            assert_one_line_error(process, f"process {first.pid} uses {tmp_path}")
    second = call(mnist, *arguments(small_data, tmp_path))
    assert second.returncode == 0, second.stderr
    assert_same_run(tmp_path, whole_run[0])


@pytest.mark.slow
def test_two_first_starts_extract_once(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2000, 60, 60), dtype=np.uint8)
    folder = write_data(tmp_path / "data", images, np.arange(2000) % 10)
    read = f"from data.dataset import load_dataset; load_dataset({str(folder)!r})"
    with start("-c", read) as one, start("-c", read) as other:
        for process in one, other:
            process.communicate(timeout=60)
        assert (one.returncode, other.returncode) == (0, 0)  # the second waits for the first
    assert len(list((folder / "img").glob("*.png"))) == 2000
    assert not list(folder.glob("*part*"))


def test_the_holder_of_a_folder_is_named_until_it_lets_go(tmp_path, small_data):
    with acquire_lock(tmp_path / "lock"):
        process = call(mnist, *arguments(small_data, tmp_path))
        assert_one_line_error(process, f"process {os.getpid()} uses {tmp_path}")
    acquire_lock(tmp_path / "lock").close()


@pytest.mark.parametrize(
    ("rate", "eval_every", "parts"),
    [(1e18, 2, ["the loss is", "at step 2"]), (9e18, 1, ["NaN"])],
    ids=["loss", "weights at an evaluation"],
)
def test_what_is_not_finite_ends_the_run_and_the_last_good_state_stays(small_data, tmp_path, rate, eval_every, parts):
    flags = ["--recipe", "original", "--learning-rate", rate, "--eval-every", eval_every]
    process = call(mnist, "--data", small_data, "--out", tmp_path, "--steps", 8, *SMALL, *flags)
    assert_one_line_error(process, *parts, "--fresh", "--learning-rate")
    assert (tmp_path / "history.csv").read_text().count("\n") == 2  # the titles, and step 0
    assert_nothing_is_half_written(tmp_path)
    with np.load(tmp_path / "checkpoint.npz") as state:
        assert all(np.isfinite(state[name]).all() for name in state.files if state[name].dtype.kind == "f")

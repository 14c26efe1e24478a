"""process.py: how a script starts, is stopped, and ends."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL, call

import mnist
import photos
import show
from data.dataset import load_dataset
from experiment import process

SIGNALS = (signal.SIGINT, signal.SIGTERM)
MISSING = "nowhere/labels.txt is missing; --data takes a folder, as python -m data.generate makes it"


@pytest.fixture
def host():
    """Signal handlers of the host, such as IPython with `%run mnist.py`, which a script must leave as they are."""

    def handler(number, frame):
        pytest.fail("the host was asked")

    earlier = [signal.signal(number, handler) for number in SIGNALS]
    yield
    found = [signal.signal(number, former) for number, former in zip(SIGNALS, earlier, strict=True)]
    assert found == [handler, handler]


@pytest.mark.parametrize(
    ("event", "ended", "line"),
    [
        (lambda: None, None, ""),
        (lambda: os.kill(os.getpid(), signal.SIGINT), SystemExit(130), "stopped here"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), SystemExit(143), "stopped here"),
        (lambda: [][0], IndexError("list index out of range"), ""),
        (lambda: os.listdir("nowhere"), SystemExit(2), "a.py: [Errno 2] No such file or directory: 'nowhere'"),
        (lambda: load_dataset("nowhere"), SystemExit(2), f"a.py: {MISSING}"),
    ],
    ids=["nothing", "Ctrl-C", "SIGTERM", "a bug", "OSError", "UserError"],
)
def test_how_a_script_ends_in_a_host(event, ended, line, host, capsys):
    environment, found = dict(os.environ), None
    try:
        process.run_script("a.py", lambda settings: event(), None, "stopped here")
    except (SystemExit, IndexError) as error:
        found = error
    assert repr(found) == repr(ended)
    assert capsys.readouterr().err.strip() == line
    assert dict(os.environ) == environment


def test_a_signal_that_the_process_ignores_stays_ignored():
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `nohup` and background jobs do
    try:
        process.run_script("a.py", lambda settings: os.kill(os.getpid(), signal.SIGINT), None)
    finally:
        signal.signal(signal.SIGINT, earlier)


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_console_that_is_closed(small_data, tmp_path, closed):
    arguments = ["mnist.py", "--data", small_data, "--out", tmp_path / "out", "--steps", 1, *SMALL]
    command = ["sh", "-c", f'"$@" {closed}', "sh", sys.executable, *map(str, arguments)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "out" / "lenet.keras").exists()


@pytest.mark.parametrize("script", [mnist, photos, show])
def test_help(script):
    result = call(script, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    for text in (f"usage: {script.__name__}.py", script.__doc__.splitlines()[0], "--out"):
        assert text in result.stdout

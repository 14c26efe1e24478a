"""process.py: how a script starts, is stopped, and ends."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL, assert_one_line_error, run

from experiment import process
from experiment.files import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize(
    ("event", "code", "line"),
    [
        (lambda: None, None, ""),
        (lambda: os.kill(os.getpid(), signal.SIGINT), 130, "stopped here"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "stopped here"),
        (lambda: [][0], IndexError, ""),
    ],
    ids=["nothing", "Ctrl-C", "SIGTERM", "a bug"],
)
def test_the_handlers_of_the_host_are_restored(event, code, line, capsys):
    def handler(number, frame):
        pytest.fail("the host was asked")

    earlier = [signal.signal(number, handler) for number in SIGNALS]
    try:
        if code is None:
            process.run_script("a.py", lambda settings: event(), None)
        else:
            with pytest.raises(SystemExit if isinstance(code, int) else code) as error:
                process.run_script("a.py", lambda settings: event(), None, "stopped here")
            assert not isinstance(code, int) or error.value.code == code
        assert [signal.getsignal(number) for number in SIGNALS] == [handler, handler]
    finally:
        for number, former in zip(SIGNALS, earlier, strict=True):
            signal.signal(number, former)
    assert capsys.readouterr().err.strip() == line


@pytest.mark.parametrize("error", [UserError("x.npz is missing"), OSError("x.npz is missing")])
def test_an_error_that_users_can_fix_is_one_line(error, capsys):
    def main(settings):
        raise error

    with pytest.raises(SystemExit) as ended:
        process.run_script("a.py", main, None)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "a.py: x.npz is missing\n"


def test_a_signal_in_an_uninterrupted_block_comes_at_its_end(capsys):
    done = []

    def main(settings):
        with process.uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("block")
        done.append("after it")

    with pytest.raises(SystemExit) as ended:
        process.run_script("a.py", main, None)
    assert (ended.value.code, done) == (143, ["block"])


def test_a_signal_that_the_process_ignores_stays_ignored():
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `nohup` and background jobs do
    try:
        process.run_script("a.py", lambda settings: os.kill(os.getpid(), signal.SIGINT), None)
    finally:
        signal.signal(signal.SIGINT, earlier)


@pytest.mark.slow
def test_a_host_such_as_ipython_survives_an_interrupt(small_data, tmp_path):
    """`%run mnist.py` runs the script as __main__ in a process that is not its own."""
    program = f"""if True:
        import os, pathlib, runpy, signal, sys, threading, time
        environment, handlers = dict(os.environ), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        def interrupt():
            while not pathlib.Path({str(tmp_path)!r}, "img_0", "cmap_4.png").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=interrupt, daemon=True).start()
        sys.argv = ["mnist.py", *sys.argv[1:]]
        try:
            runpy.run_path("mnist.py", run_name="__main__")
        except SystemExit as ended:
            print("exit code", ended.code)
        assert dict(os.environ) == environment
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            print("the host lives")
    """
    found = run("-c", program, "--data", small_data, "--out", tmp_path, "--steps", 5000, *SMALL)
    assert found.stdout.splitlines()[-2:] == ["exit code 130", "the host lives"], found.stderr


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_console_that_is_closed(small_data, tmp_path, closed):
    arguments = ["mnist.py", "--data", small_data, "--out", tmp_path / "out", "--steps", 1, *SMALL]
    command = ["sh", "-c", f'"$@" {closed}', "sh", sys.executable, *map(str, arguments)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "out" / "lenet.keras").exists()


@pytest.mark.slow
def test_a_console_of_another_encoding(tmp_path):
    """A name that the console cannot show."""
    found = run("show.py", tmp_path / "цифра.png", PYTHONIOENCODING="ascii")
    assert_one_line_error(found, r"\u0446\u0438\u0444\u0440\u0430.png is missing")

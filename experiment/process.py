"""How a script starts, is stopped, and ends. Importing this module changes nothing in the process."""

import contextlib
import io
import logging
import os
import signal
import sys
import time
import warnings
from unittest import mock

from experiment.files import UserError

START = time.monotonic()  # of the process, about
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what `kill` and a service manager send
RESUME = "stopped; run the same command again, without --fresh, to continue"


def start():
    """Makes the console usable in any state, and imports Keras quietly. Scripts call it before they import Keras."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:  # started without a console
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for names that the console cannot show
    try:
        # No log of TensorFlow but errors; a notebook's matplotlib backend would fail outside the notebook.
        with quiet_stderr(), mock.patch.dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3", MPLBACKEND="agg"):
            import keras

            from experiment import distribution

            distribution.connect()
            keras.config.set_image_data_format("channels_last")  # whatever keras.json says
            keras.config.set_floatx("float32")
            keras.ops.zeros(1)  # initializes the devices, and logs those that are missing
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except (ImportError, ValueError) as error:
        print(f"Keras cannot be imported ({error}); see requirements.txt and KERAS_BACKEND", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def quiet_stderr():
    """Sends file descriptor 2 to nowhere: TensorFlow 2.21 logs its start-up there whatever its settings are."""
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    sys.stderr.flush()
    try:
        with open(os.devnull, "w") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def run_script(name, main, settings, stopped="stopped"):
    """Runs `main(settings)` of the script `name`, and turns what ends it early into one line and an exit code.

    A `UserError` or `OSError` exits with code 2; Ctrl-C and SIGTERM print `stopped` and exit with 128 + the number of
    the signal. The signal handlers that the process had are restored in any case.
    """
    distribution = sys.modules.get("experiment.distribution")  # None for a script that does without Keras
    leave = distribution.leave if distribution else sys.exit
    logger = logging.getLogger("tensorflow")  # which warns of images of many sizes
    level = logger.level
    earlier = {number: signal.getsignal(number) or signal.SIG_DFL for number in STOP_SIGNALS}
    try:
        logger.setLevel(logging.ERROR)
        for number, handler in earlier.items():
            if handler is not signal.SIG_IGN:  # as with `nohup` or in the background
                signal.signal(number, stop)
        # TensorFlow reads the variable whenever it logs; Pillow warns of large images and of odd metadata.
        with mock.patch.dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            main(settings)
            if distribution:
                distribution.finish()
    except (UserError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        leave(2)
    except KeyboardInterrupt as interrupt:
        print(f"\n{stopped}", file=sys.stderr)
        leave(128 + (interrupt.args or (signal.SIGINT,))[0])
    except Exception as error:
        if not distribution or distribution.process_count() == 1:
            raise
        reason = " ".join(str(error).split())[:200]
        hint = "if another process has ended, run the same commands again, without --fresh"
        print(f"{name}: stopped ({reason}); {hint}", file=sys.stderr)
        leave(2)
    finally:
        logger.setLevel(level)
        for number, handler in earlier.items():
            signal.signal(number, handler)


def stop(number, frame):
    """The signal handler."""
    raise KeyboardInterrupt(number)

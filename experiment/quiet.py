"""Imports Keras quietly. Scripts import this module before anything else that imports Keras.

TensorFlow 2.21 logs its start-up whatever its settings are, so standard error is closed during the import.
"""

import os
import signal
import sys
from pathlib import Path

main = getattr(sys.modules["__main__"], "__file__", None)
if main and Path(main).resolve().parent == Path(__file__).resolve().parent.parent:  # a script of this project
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    os.environ["MPLBACKEND"] = "agg"  # scripts only write files; a notebook's backend would fail outside the notebook
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # the log after the start-up
sys.stderr.flush()
stderr = os.dup(2)
with open(os.devnull, "w") as devnull:
    os.dup2(devnull.fileno(), 2)
try:
    import keras

    keras.config.set_image_data_format("channels_last")  # whatever keras.json says
    keras.ops.zeros(1)  # initializes the devices, and logs those that are missing
except (ImportError, ValueError) as error:
    os.dup2(stderr, 2)
    print(f"Keras cannot be imported ({error}); see requirements.txt and KERAS_BACKEND", file=sys.stderr)
    sys.exit(2)
finally:
    os.dup2(stderr, 2)
    os.close(stderr)

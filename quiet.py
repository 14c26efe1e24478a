"""Imports Keras without TensorFlow's start-up log, which no setting of TensorFlow 2.21 turns off.

Import this module before anything that imports Keras.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # the log after the start-up
sys.stderr.flush()
terminal = os.dup(2)
with open(os.devnull, "w") as nowhere:
    os.dup2(nowhere.fileno(), 2)
try:
    import keras

    keras.ops.zeros(1)  # finds the devices, and complains about those that are not there
finally:
    os.dup2(terminal, 2)
    os.close(terminal)

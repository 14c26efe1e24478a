"""The command line of mnist.py: a flag for each setting."""

import argparse
import platform
import sys
from pathlib import Path

import keras


def has_bfloat16():
    """Whether the device that trains is known to compute with bfloat16 in hardware."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if gpus := tf.config.list_physical_devices("GPU"):
            return tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0)) >= (8, 0)
    flags = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def parse_settings(description, recipes):
    """Reads the settings of mnist.py from the command line.

    Args:
        description: Text for `--help`.
        recipes: For each recipe the default of what differs between recipes, by name.

    Returns:
        Namespace with a value for each setting; the precision is "float32" or "mixed_bfloat16".
    """

    def number(least, most=sys.maxsize, kind=int):
        def convert(text):
            value = kind(text)
            if not least <= value <= most:
                raise argparse.ArgumentTypeError(f"{text} is not in {least} to {most}")
            return value

        convert.__name__ = "whole number" if kind is int else "number"
        return convert

    def by_recipe(name):
        return f" ({', '.join(f'{recipe}: {recipes[recipe][name]}' for recipe in recipes if name in recipes[recipe])})"

    parser = argparse.ArgumentParser(
        prog="mnist.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"mnist.py: {message}; see --help\n")  # one line, without the usage
    flag = parser.add_argument
    flag("--data", default="data", type=Path, help="folder of the data set (default: data)")
    flag("--out", default="out", type=Path, help="folder to write to (default: out)")
    flag("--recipe", default="default", choices=recipes, help="how to train (default: default)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=number(1), help="batches to train on" + by_recipe("steps"))
    length.add_argument("--epochs", type=number(1), help="passes through the training images, instead of --steps")
    flag("--batch-size", type=number(1), help="images per step" + by_recipe("batch_size"))
    flag("--learning-rate", type=number(0, kind=float), help="step size, at its peak" + by_recipe("learning_rate"))
    flag("--warm-up", type=number(0, 1, float), help="share of the steps before the peak" + by_recipe("warm_up"))
    flag("--beta-2", type=number(0, 0.9999, float), help="of Adam" + by_recipe("beta_2"))
    flag("--label-smoothing", type=number(0, 0.9, float), help="of the loss" + by_recipe("label_smoothing"))
    flag("--rotation", type=number(0, 180, float), help="of training images, degrees" + by_recipe("rotation"))
    flag("--zoom", type=number(0, 1, float), help="of training images, share" + by_recipe("zoom"))
    flag("--bend", type=number(0, 100, float), help="of training images, pixels" + by_recipe("bend"))
    flag("--every", default=100, type=number(1), help="steps between heatmaps of an image (default: 100)")
    flag("--samples", default=50, type=number(1), help="test images to draw heatmaps of (default: 50)")
    flag("--seed", default=0, type=number(0, 2**32 - 1), help="random seed (default: 0)")
    flag(
        "--precision",
        choices=("auto", "float32", "mixed_bfloat16"),
        help="of the convolutions; auto is mixed_bfloat16 where the hardware has it" + by_recipe("precision"),
    )
    flag("--pooling", default="average", choices=("average", "max"), help="of the feature maps (default: average)")
    flag("--evaluate", type=Path, metavar="MODEL", help="only measure a saved model, or a checkpoint of the original")
    flag("--fresh", action="store_true", help="delete the earlier run in --out and start over")
    settings = parser.parse_args()
    for name in set().union(*recipes.values()) - set(recipes[settings.recipe]):
        if getattr(settings, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is no setting of --recipe {settings.recipe}")
    for name, value in recipes[settings.recipe].items():
        if getattr(settings, name) is None and not (name == "steps" and settings.epochs):
            setattr(settings, name, value)
    if settings.precision == "auto":
        settings.precision = "mixed_bfloat16" if has_bfloat16() else "float32"
    return settings

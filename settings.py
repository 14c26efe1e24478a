"""The command lines of mnist.py and caltech256.py: a flag for each setting."""

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


def mnist_settings(description, recipes):
    """Reads the settings of mnist.py from the command line; see `Flags`."""
    flags = Flags("mnist.py", description, recipes)
    flags.add("--data", default="data", type=Path, help="folder of the data set (default: data)")
    flags.add("--recipe", default="default", choices=recipes, help="how to train (default: default)")
    flags.add_common(out="out", every=100, samples=50)
    kinds = ("stratified", "shuffled", "file")
    flags.add_by_recipe("order", str, "of the training images", choices=kinds)
    flags.add_by_recipe("beta-2", number(0, 0.9999, float), "of Adam")
    flags.add_by_recipe("weight-decay", number(0, 1, float), "of Adam, but for biases")
    flags.add_by_recipe("rotation", number(0, 180, float), "of training images, degrees")
    flags.add_by_recipe("zoom", number(0, 1, float), "of training images, share")
    flags.add_by_recipe("bend", number(0, 100, float), "of training images, pixels")
    flags.add("--pooling", default="average", choices=("average", "max"), help="of the feature maps (default: average)")
    flags.add("--evaluate", type=Path, metavar="MODEL", help="only measure a saved model, or an original's checkpoint")
    settings = flags.parse_args()
    return flags.fill(settings, f"--recipe {settings.recipe}")


def caltech256_settings(description, recipes):
    """Reads the settings of caltech256.py from the command line; see `Flags`."""
    flags = Flags("caltech256.py", description, recipes)
    flags.add(
        "--data",
        default=Path("data/256_ObjectCategories.tar"),
        type=Path,
        help="archive of the photos, or the folder that it extracts to (default: %(default)s)",
    )
    flags.add(
        "--weights",
        default=Path("data/alexnet.npz"),
        type=Path,
        help="ImageNet weights of the convolutions, by torchvision's names (default: %(default)s), or none",
    )
    flags.add("--categories", nargs="+", metavar="NAME", help="take only these, such as coffee-mug (default: all)")
    flags.add_common(out="out/caltech256", every=50, samples=30)
    flags.add_by_recipe("old-rate", number(0, 1, float), "share of the rate for the weights from ImageNet")
    settings = flags.parse_args()
    settings.recipe = "scratch" if str(settings.weights) == "none" else "pretrained"
    return flags.fill(settings, f"--weights {settings.weights}")


def number(least, most=sys.maxsize, kind=int):
    """A type for argparse: a number in least..most."""

    def convert(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not in {least} to {most}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"
    return convert


class Flags(argparse.ArgumentParser):
    """A command line whose defaults depend on the recipe.

    Args:
        script: Name of the script.
        description: Text for `--help`.
        recipes: For each recipe the default of what differs between recipes, by name.
    """

    def __init__(self, script, description, recipes):
        super().__init__(prog=script, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.recipes, self.add = recipes, self.add_argument

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")  # one line, without the usage

    def add_by_recipe(self, flag, kind, text, group=None, **options):
        name = flag.replace("-", "_")
        known = ", ".join(f"{recipe}: {values[name]}" for recipe, values in self.recipes.items() if name in values)
        text += f" ({known})" if known else ""
        (group or self).add_argument(f"--{flag}", type=kind, help=text, **options)

    def add_common(self, out, every, samples):
        self.add("--out", default=out, type=Path, help=f"folder to write to (default: {out})")
        length = self.add_mutually_exclusive_group()
        self.add_by_recipe("steps", number(1), "batches to train on", length)
        self.add_by_recipe("epochs", number(1), "passes through the training images, instead of --steps", length)
        self.add_by_recipe("batch-size", number(1), "images per step")
        self.add_by_recipe("learning-rate", number(0, kind=float), "step size, at its peak")
        self.add_by_recipe("warm-up", number(0, 1, float), "share of the steps before the peak")
        self.add_by_recipe("label-smoothing", number(0, 0.9, float), "of the loss")
        self.add(
            "--every", default=every, type=number(1), help=f"steps between heatmaps of an image (default: {every})"
        )
        self.add("--samples", default=samples, type=number(1), help=f"test images to draw (default: {samples})")
        self.add("--seed", default=0, type=number(0, 2**32 - 1), help="random seed (default: 0)")
        text = "of the convolutions; auto is mixed_bfloat16 where the hardware has it"
        self.add_by_recipe("precision", str, text, choices=("auto", "float32", "mixed_bfloat16"))
        self.add("--fresh", action="store_true", help="delete the earlier run in --out and start over")

    def fill(self, settings, choice):
        """Gives the settings the defaults of their recipe, which came by the flag `choice`.

        The precision becomes "float32" or "mixed_bfloat16".
        """
        recipe = self.recipes[settings.recipe]
        for name in set().union(*self.recipes.values()) - set(recipe):
            if getattr(settings, name) is not None:
                self.error(f"--{name.replace('_', '-')} is no setting of {choice}")
        for name, value in recipe.items():
            length = {"steps": "epochs", "epochs": "steps"}.get(name)
            if getattr(settings, name) is None and not (length and getattr(settings, length)):
                setattr(settings, name, value)
        if settings.precision == "auto":
            settings.precision = "mixed_bfloat16" if has_bfloat16() else "float32"
        return settings

"""The command lines of the scripts: a flag for each setting of an experiment."""

import argparse
import sys
from pathlib import Path

from experiment.training import prefers_bfloat16


class ArgumentParser(argparse.ArgumentParser):
    """A command line that answers a mistake with one line, without the usage."""

    def __init__(self, script, description):
        super().__init__(script, None, description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def bounded(least, most=sys.maxsize, kind=int):
    """A type for argparse: a number in least..most."""

    def convert(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not in {least} to {most}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"
    return convert


# Type or choices, and help text, of every setting that an experiment can have.
FLAGS = {
    "data": (Path, "folder of the data set, or, for photos, a .tar of it"),
    "recipe": (("default", "original"), "how to train"),
    "network": (str, "alexnet, a name of keras.applications, or the file of a saved Keras network"),
    "weights": (Path, ".npz file of alexnet's ImageNet convolutions, by torchvision's names; none: random weights"),
    "out": (Path, "folder to write to"),
    "steps": (bounded(1), "training steps"),
    "epochs": (bounded(1), "passes through the training images, an alternative to --steps"),
    "batch_size": (bounded(1), "training images per step"),
    "order": (("shuffled", "file"), "order of the training images"),
    # A picture is read at up to 1,024 pixels (`images.MAX_PICTURE_SIDE`), so a photo of 4:3 has 768 on its short side.
    "short_side": (bounded(1, 768), "pixels of a photo's short side (default: as recorded beside the network, or 256)"),
    "learning_rate": (bounded(0, kind=float), "learning rate, at its peak"),
    "warmup": (bounded(0, 1, float), "share of the steps in which the learning rate rises"),
    "beta_2": (bounded(0, 0.9999, float), "Adam beta_2"),
    "weight_decay": (bounded(0, 1, float), "AdamW weight decay of the kernels"),
    "label_smoothing": (bounded(0, 0.9, float), "label smoothing of the loss"),
    "small_images": (bounded(0, 1, float), "initial share of the steps that trains on images scaled to 72%%"),
    "location_dropout": (bounded(0, 0.9, float), "share of the feature map locations hidden in training"),
    "pooling": (("average", "max"), "global pooling"),
    "precision": (
        ("auto", "float32", "mixed_bfloat16"),
        "precision of the convolutions; auto: bfloat16 where TensorFlow is faster with it",
    ),
    "eval_every": (bounded(1), "steps between two evaluations, each with a heatmap of every sample"),
    "samples": (bounded(1), "test images to draw heatmaps of"),
    "seed": (bounded(0, 2**32 - 1), "random seed"),
}


def make_parser(script, description, settings, recipes):
    """A command line with a flag for each setting.

    `settings` are the default values of the settings that all recipes share, `recipes` those of the others, by recipe.
    """
    parser = ArgumentParser(script, description)
    length = parser.add_mutually_exclusive_group()
    for name, (kind, text) in FLAGS.items():
        defaults = {recipe: values[name] for recipe, values in recipes.items() if name in values}
        if settings.get(name) is not None:
            text += f" (default: {settings[name]})"
        elif defaults:
            text += f" ({', '.join(f'{recipe}: {value}' for recipe, value in defaults.items())})"
        elif name not in ("steps", "epochs", *settings):
            continue
        options = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        flag = (length if name in ("steps", "epochs") else parser).add_argument
        flag(f"--{name.replace('_', '-')}", help=text, default=settings.get(name), **options)
    parser.add_argument("--fresh", action="store_true", help="delete the earlier run in --out and start over")
    return parser


def fill_in_recipe(parser, settings, recipe, recipes):
    """Fills in the defaults of a recipe, refuses settings that only others have, and resolves the precision "auto"."""
    settings.recipe, defaults = recipe, dict(recipes[recipe])
    if settings.steps or settings.epochs:  # the length is given, by one of the two
        defaults |= {"steps": None, "epochs": None}
    for name in sorted({name for values in recipes.values() for name in values}):
        if getattr(settings, name) is None:
            setattr(settings, name, defaults.get(name))
        elif name not in defaults:
            parser.error(f"--{name.replace('_', '-')} is not a setting of the {recipe} recipe")
    if settings.precision == "auto":
        settings.precision = "mixed_bfloat16" if prefers_bfloat16() else "float32"

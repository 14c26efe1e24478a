"""What benchmark.py measures: this project, and what one would do instead.

Each contestant is called in a process of its own, with the data folder, a temporary folder and arguments. It gets
ready, warms up, and returns a function without arguments that measures once: seconds, or several numbers.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from data.dataset import LABELS, TARBALL, load_dataset

ROOT = Path(__file__).resolve().parent.parent
MATRIX = 4096  # rows and columns of the matrices whose product is the limit of training and maps


def timed(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def per_image(function, number):
    """Calls a function of `number` images once, and returns how to measure seconds per image."""
    function()
    return lambda: timed(function) / number


def quiet_keras():
    """Keras, imported without TensorFlow's start-up log."""
    from experiment import process

    process.start()
    import keras

    return keras


def precisions():
    """The dtype policies to compare: float32, and mixed_bfloat16 where TensorFlow is faster with it."""
    quiet_keras()
    from experiment.training import prefers_bfloat16

    return ["float32", "mixed_bfloat16"] if prefers_bfloat16() else ["float32"]


# Training


def train_here(data, folder, precision, size, number):
    """Trains as the loop of mnist.py does, on images of full size."""
    quiet_keras()
    import mnist
    from experiment.training import batch_indices

    flags = ["--data", data, "--precision", precision, "--batch-size", str(size), "--steps", "5250"]
    settings = mnist.parse_arguments(flags)
    mnist.set_seed(settings.seed)
    train, _ = load_dataset(data)
    one_hot = np.eye(10, dtype=np.float32)[train.labels]
    model = mnist.lenet(1, 10, settings.precision, settings.pooling, settings.location_dropout)
    mnist.prepare_training(model, settings, train.images[:256])

    def run():
        for step in range(number // size):
            batch = batch_indices(step, size, len(one_hot), settings.order, settings.seed)
            model.train_on_batch(train.images[batch], one_hot[batch])

    return per_image(run, number)


def train_keras(data, folder, precision, size, number):
    """The network of 2017, as one writes it down in Keras."""
    keras = quiet_keras()
    from keras import layers

    keras.config.set_dtype_policy(precision)
    images, labels = float_images(data, number)
    model = keras.Sequential()
    for units in (32, 64):
        model.add(layers.Conv2D(units, 5, padding="same", activation="relu"))
        model.add(layers.MaxPooling2D())
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(10, use_bias=False, dtype="float32"))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.5), loss, metrics=["accuracy"])
    return per_image(lambda: model.fit(images, labels, batch_size=size, verbose=0), number)


def train_torch(data, folder, precision, size, number):
    import torch

    device, network, images, labels = torch_lenet(data, number)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)

    def run():
        for x, y in zip(images.split(size), labels.split(size), strict=True):
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=precision != "float32"):
                loss = torch.nn.functional.cross_entropy(network(x), y)
            loss.backward()
            optimizer.step()
            loss.item()

    return per_image(run, number)


def float_images(data, number):
    """The first training images, (number, H, W, 1) float32 in 0..1, and their labels (number,)."""
    images, labels = load_dataset(data)[0].first(number)[:2]
    return images / np.float32(255), labels


def torch_lenet(data, number):
    """Device, LeNet in PyTorch, images and labels, channels last."""
    import torch
    from torch import nn

    device = "cuda" if torch.cuda.is_available() else "cpu"
    first = nn.Conv2d(1, 32, 5, padding="same"), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(32, 64, 5, padding="same"), nn.ReLU(), nn.MaxPool2d(2)
    pooling = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    network = nn.Sequential(*first, *second, *pooling, nn.Linear(64, 10, bias=False))
    network = network.to(device, memory_format=torch.channels_last)
    images, labels = float_images(data, number)
    images = torch.from_numpy(images.transpose(0, 3, 1, 2)).to(device, memory_format=torch.channels_last)
    return device, network, images, torch.from_numpy(labels).to(device)


def multiply_matrices(data, folder, precision, backward):
    """As many floating-point operations as LeNet needs for an image, in one large matrix product."""
    keras = quiet_keras()
    _, height, width, _ = load_dataset(data)[0].images.shape
    conv1 = 2 * height * width * 32 * 25  # two operations for each weight and place; the rest hardly counts
    conv2 = 2 * height * width // 4 * 64 * 25 * 32
    operations = conv1 + conv2
    if backward:  # the gradients of the weights, and of the input of conv2
        operations += conv1 + 2 * conv2
    matrix = keras.random.normal((MATRIX, MATRIX), dtype=precision.removeprefix("mixed_"))
    return per_image(lambda: float(keras.ops.matmul(matrix, matrix)[0, 0]), 2 * MATRIX**3 / operations)


# Maps


def trained_lenet(precision="float32"):
    """The LeNet in data/."""
    keras = quiet_keras()
    from lenet import lenet

    model = lenet(precision=precision)
    model.set_weights(keras.models.load_model(ROOT / "data" / "lenet.keras", compile=False).get_weights())
    return model


def in_batches(function, number, size):
    """Measures `function` of a slice of the images, seconds per image."""
    slices = [slice(start, start + size) for start in range(0, number, size)]
    return per_image(lambda: [function(batch) for batch in slices], number)


def map_here(data, folder, precision, size, number, maps=True):
    """Logits and maps; or only logits, a plain forward pass."""
    model, images = trained_lenet(precision), load_dataset(data)[1].images
    if maps:
        from cam import class_activation_model

        model = class_activation_model(model)
    return in_batches(lambda batch: model.predict_on_batch(images[batch]), number, size)


def map_tf_keras_vis(data, folder, precision, size, number):
    model = trained_lenet(precision)

    from tf_keras_vis.gradcam import Gradcam
    from tf_keras_vis.utils.scores import CategoricalScore

    images, labels = load_dataset(data)[1].first(number)[:2]
    images = images.astype(np.float32)
    gradcam = Gradcam(model, clone=False)
    options = dict(penultimate_layer="feature_maps", seek_penultimate_conv_layer=False, expand_cam=False)

    def draw(batch):
        gradcam(CategoricalScore(labels[batch].tolist()), images[batch], **options)

    return in_batches(draw, number, size)


def map_torchcam(data, folder, precision, size, number):
    import torch
    from torchcam.methods import CAM

    device, network, images, labels = torch_lenet(data, number)
    extract = CAM(network.eval(), "5", "8")  # the last pooling, the linear layer

    def draw(batch):
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=precision != "float32"):
            scores = network(images[batch])
            extract(labels[batch].tolist(), scores)[0].float().cpu()

    return in_batches(draw, number, size)


# Heatmaps


def draw_heatmaps(data, folder, number, matplotlib=False):
    """From maps of the true classes to PNGs."""
    model = trained_lenet()

    from cam import class_activation_model, normalize, upsample
    from experiment.pictures import save_heatmaps

    images, labels = load_dataset(data)[1].first(number)[:2]
    _, class_maps = class_activation_model(model).predict(images, verbose=0)  # (N, h, w, C)
    class_maps = class_maps[np.arange(number), :, :, labels]
    for index in range(number):
        (Path(folder) / f"img_{index}").mkdir(exist_ok=True)

    def draw():
        heatmaps = normalize(upsample(class_maps, *images.shape[1:3]))
        if matplotlib:
            save_with_matplotlib(Path(folder), images, heatmaps)
        else:
            save_heatmaps(Path(folder), 0, images, heatmaps)

    return per_image(draw, number)


def save_with_matplotlib(folder, images, heatmaps):
    import matplotlib.pyplot as plt

    for image, heatmap in zip(images, heatmaps, strict=True):
        plt.imshow(255 - image, cmap="gray")
        plt.imshow(heatmap, cmap="jet", alpha=0.5)
        plt.savefig(folder / "cmap.png")
        plt.close()


# Reading


def read_here(data, folder):
    """Measures two starts: tarball to array, and array again."""

    def load(copy):
        for part in load_dataset(copy):
            part.images.copy()  # they are mapped from disk

    def measure():
        copy = Path(tempfile.mkdtemp(dir=folder))
        for name in (TARBALL, LABELS):
            shutil.copy(Path(data) / name, copy)
        return timed(load, copy), timed(load, copy)

    return measure


def read_skimage(data, folder):
    from skimage import io

    number = sum(len(part.labels) for part in load_dataset(data))
    extract = "tar", "xzf", (Path(data) / TARBALL).resolve(), "-C"

    def load(copy):
        np.array([io.imread(copy / f"img_{index}.png") for index in range(1, number + 1)])

    def measure():
        copy = Path(tempfile.mkdtemp(dir=folder))
        extracting, loading = timed(subprocess.check_call, (*extract, copy)), timed(load, copy)
        return extracting + loading, loading

    return measure


# Whole programs


def run_script(data, folder, script, *arguments):
    """Measures a script from start to end: seconds, peak memory in bytes, and the last accuracy that it prints.

    A new folder to write to is added to its arguments.
    """

    def measure():
        command = [sys.executable, ROOT / script, *arguments, tempfile.mkdtemp(dir=folder)]
        with tempfile.TemporaryFile("w+") as log:
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            log.seek(0)
            text = log.read()
        if status:
            raise RuntimeError(f"{script} failed: {text.strip()[-300:]}")
        accuracy = re.findall(r"^ *accuracy +([\d.]+)%", text, re.MULTILINE)[-1]
        return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), float(accuracy) / 100

    return measure

"""What benchmark.py measures: this project, and what one would do instead.

Each function is called in a process of its own, with the data folder, a temporary folder and arguments. It gets ready,
warms up, and returns a function without arguments that measures once.
"""

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
from tqdm import tqdm

from data.dataset import LABELS, TARBALL, load_dataset

MATRIX = 4096  # rows and columns of the matrices whose product is the limit of training and maps
SCALING_STEPS = 40


def timed(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def per_image(function, number):
    """Calls a function of `number` images once, and returns how to measure seconds per image."""
    function()
    return lambda: timed(function) / number


# Training


def quiet_keras():
    """Keras, imported without TensorFlow's start-up log."""
    from experiment import process

    process.start()
    import keras

    return keras


def settings_of(data, *flags):
    """The settings of `python mnist.py --data DATA FLAG ...`."""
    quiet_keras()
    import mnist

    return mnist.parse_arguments(["--data", str(data), *map(str, flags)])


def built(data, *flags):
    """The settings and the model that `python mnist.py --data DATA FLAG ...` trains with."""
    settings = settings_of(data, *flags)
    import mnist

    mnist.set_seed(settings.seed)
    train, _ = load_dataset(data)
    model = mnist.lenet(1, 10, settings.precision, settings.pooling, settings.location_dropout)
    mnist.prepare_training(model, settings, train.images[:256])
    return settings, model


def train_steps(data, settings, model):
    """Trains as the loop of mnist.py does, without evaluations."""
    from experiment.training import batch_indices

    train, _ = load_dataset(data)
    one_hot = np.eye(10, dtype=np.float32)[train.labels]
    for step in range(settings.steps):
        batch = batch_indices(step, settings.batch_size, len(one_hot), settings.order, settings.seed)
        model.train_on_batch(train.images[batch], one_hot[batch])


def train_here(data, folder, steps, *flags):
    settings, model = built(data, "--steps", steps, *flags)
    return per_image(lambda: train_steps(data, settings, model), steps * settings.batch_size)


def seconds_per_step(model, steps, **arguments):
    """Trains with Keras `fit`; the first fifth of the steps is not counted."""
    keras = quiet_keras()
    times = []
    clock = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: times.append(time.perf_counter()))
    model.fit(**{"verbose": 0} | arguments, shuffle=False, callbacks=[clock])
    return (times[-1] - times[steps // 5]) / (steps - 1 - steps // 5)


def train_keras(data, folder, steps, size=256):
    """The network and the input of 2017, as one writes them down in Keras."""
    keras = quiet_keras()
    from keras import layers

    images, labels = float_images(data, steps * size)
    images = images.repeat(3, axis=3)  # (N, H, W, 3)
    model = keras.Sequential(
        [
            *(layers.Conv2D(32, 5, padding="same", activation="relu"), layers.MaxPooling2D()),
            *(layers.Conv2D(64, 5, padding="same", activation="relu"), layers.MaxPooling2D()),
            *(layers.GlobalAveragePooling2D(), layers.Dense(10, use_bias=False)),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.5), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    seconds_per_step(model, steps, x=images, y=labels, batch_size=size)
    return lambda: seconds_per_step(model, steps, x=images, y=labels, batch_size=size) / size


def train_torch(data, folder, steps, bfloat16, size=256):
    import torch

    device, network, images, labels = torch_lenet(data, steps * size)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)

    def epoch():
        for x, y in zip(images.split(size), labels.split(size), strict=True):
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                loss = torch.nn.functional.cross_entropy(network(x), y)
            loss.backward()
            optimizer.step()
            loss.item()

    return per_image(epoch, len(labels))


def float_images(data, number):
    """Images (number, H, W, 1) float32 in 0..1, and labels (number,)."""
    train, _ = load_dataset(data)
    chosen = np.arange(number) % len(train.labels)
    return train.images[chosen] / np.float32(255), train.labels[chosen]


def torch_lenet(data, number):
    """Device, LeNet in PyTorch, images and labels, channels last."""
    import torch
    from torch import nn

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding="same"), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding="same"), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10, bias=False)),
    ).to(device, memory_format=torch.channels_last)
    images, labels = float_images(data, number)
    images = torch.from_numpy(images.transpose(0, 3, 1, 2)).to(device, memory_format=torch.channels_last)
    return device, network, images, torch.from_numpy(labels).to(device)


def multiply_matrices(data, folder, backward):
    """Measures seconds per floating-point operation in the run's precision; with operations per image, and bits."""
    keras = quiet_keras()
    from lenet import lenet

    precision = settings_of(data).precision.removeprefix("mixed_")
    matrix = keras.random.normal((MATRIX, MATRIX), dtype=precision)
    train, _ = load_dataset(data)
    count = operations(lenet(), train.images.shape[1:], backward)
    seconds = per_image(lambda: float(keras.ops.matmul(matrix, matrix)[0, 0]), 2 * MATRIX**3)
    return lambda: (seconds(), count, int(precision.lstrip("bfloat")))


def operations(model, shape, backward):
    """Floating-point operations of a LeNet for an image of a shape (H, W, 1): two per weight and place."""
    total, inputs, shape = 0, 0, (1, *shape)
    for layer in model.layers[1:]:
        shape = layer.compute_output_shape(shape)
        if layer.weights:
            forward = 2 * np.prod(shape) * np.prod(layer.kernel.shape[:-1])
            # Backward as many for the gradient of the weights, and of the layer's input, if that is not the image.
            total += forward * (1 + backward * (1 + inputs))
            inputs = 1
    return int(total)


# A whole run


def run_here(data, folder):
    """Measures, of the default run: the shares of steps and of evaluations with heatmaps, time, and peak memory."""

    def measure():
        start = time.perf_counter()  # before Keras is imported
        settings = settings_of(data, "--out", folder)
        import mnist

        steps, evaluations = [], []

        class TimedRun(mnist.RunFolder):
            def steps(self):
                for step in super().steps():
                    began = time.perf_counter()
                    yield step
                    (evaluations if self.is_due(step) else steps).append(time.perf_counter() - began)

        with mock.patch.object(mnist, "RunFolder", TimedRun):
            mnist.train_model(settings)
        whole = time.perf_counter() - start
        training = np.mean(steps) * (len(steps) + len(evaluations) - 1)  # a step that is evaluated is trained, too
        return training / whole, (sum(evaluations) + sum(steps) - training) / whole, whole, peak_memory()

    return measure


def peak_memory():
    """Of this process, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def load_rgb(data, folder, number=1000):
    """Measures the bytes of an image as float64 RGB."""
    from skimage import color
    from skimage import io as skimage_io

    def load(indices):
        paths = [Path(data) / "img" / f"img_{index + 1}.png" for index in indices]
        return [skimage_io.imread(path) for path in paths]

    def measure():
        before = peak_memory()
        images = [color.gray2rgb(image / 255) for image in load(range(number))]
        return (peak_memory() - before) / len(images)

    load(range(10))
    return measure


# Maps


def network(data, number=500, steps=0):
    """A run's LeNet after some steps; test images (number, H, W, 1) and labels; slices of a batch each."""
    settings, model = built(data, "--steps", steps or 1)
    if steps:
        train_steps(data, settings, model)
    images, labels, _ = load_dataset(data)[1].first(number)
    return model, images, labels, [slice(start, start + 125) for start in range(0, len(images), 125)]


def map_here(data, folder):
    from cam import class_activation_model

    model, images, *_, parts = network(data)
    cam_model = class_activation_model(model)
    return per_image(lambda: [cam_model.predict_on_batch(images[part]) for part in parts], len(images))


def forward(data, folder):
    model, images, *_, parts = network(data)
    return per_image(lambda: [model.predict_on_batch(images[part]) for part in parts], len(images))


def map_tf_keras_vis(data, folder):
    model, images, labels, parts = network(data)

    from tf_keras_vis.gradcam import Gradcam
    from tf_keras_vis.utils.scores import CategoricalScore

    gradcam = Gradcam(model, clone=False)
    options = dict(penultimate_layer="feature_maps", seek_penultimate_conv_layer=False, expand_cam=False)

    def run():
        for part in parts:
            gradcam(CategoricalScore(labels[part].tolist()), images[part].astype(np.float32), **options)

    return per_image(run, len(images))


def map_torchcam(data, folder, bfloat16, number=500, size=125):
    import torch
    from torchcam.methods import CAM

    device, network, images, labels = torch_lenet(data, number)
    extract = CAM(network.eval(), "5", "8")  # the last pooling, the linear layer

    def run():
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            for x, y in zip(images.split(size), labels.split(size), strict=True):
                scores = network(x)
                extract(y.tolist(), scores)[0].float().cpu()

    return per_image(run, number)


# Heatmaps


def true_class_maps(data, number):
    """Test images (number, H, W, 1) and the maps (number, h, w) of their true classes."""
    model, images, labels, *_ = network(data, number, steps=100)
    from cam import class_activation_model

    _, class_maps = class_activation_model(model).predict(images, verbose=0)
    return images, class_maps[np.arange(number), :, :, labels]


def draw_here(data, folder, number=50):
    images, class_maps = true_class_maps(data, number)

    from cam import normalize, upsample  # after what imports Keras quietly
    from experiment.pictures import save_heatmaps

    folder = Path(tempfile.mkdtemp(dir=folder))
    for index in range(number):
        (folder / f"img_{index}").mkdir()
    size = images.shape[1:3]
    return per_image(lambda: save_heatmaps(folder, 0, images, normalize(upsample(class_maps, *size))), number)


def compress(data, folder, number=50):
    """Only zlib on the same pictures, in as many threads."""
    from PIL import Image

    draw_here(data, folder, number)
    pictures = [np.asarray(Image.open(path)).tobytes() for path in sorted(Path(folder).glob("*/*/*.png"))[:number]]
    pool = ThreadPoolExecutor()
    return per_image(lambda: list(pool.map(lambda picture: zlib.compress(picture, 1), pictures)), number)


def draw_matplotlib(data, folder, number=10):
    import matplotlib.pyplot as plt

    from cam import normalize, upsample

    images, class_maps = true_class_maps(data, number)

    def draw():
        for image, heatmap in zip(images, normalize(upsample(class_maps, *images.shape[1:3])), strict=True):
            plt.imshow(255 - image, cmap="gray")
            plt.imshow(heatmap, cmap="jet", alpha=0.5)
            plt.savefig(Path(folder) / "cmap.png")
            plt.close()

    return per_image(draw, number)


# Reading


def read_here(data, folder):
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
    from skimage import io as skimage_io

    number = sum(len(part.labels) for part in load_dataset(data))

    def extract(copy):
        subprocess.run(["tar", "xzf", (Path(data) / TARBALL).resolve()], cwd=copy, check=True)

    def load(copy):
        np.array([skimage_io.imread(copy / f"img_{index}.png") for index in range(1, number + 1)])

    def measure():
        copy = Path(tempfile.mkdtemp(dir=folder))
        extracting, loading = timed(extract, copy), timed(load, copy)
        return extracting + loading, loading

    return measure


def write_and_copy(data, folder):
    """All pixels and PNGs to one file; all pixels from memory to memory."""
    pixels = np.concatenate([part.images for part in load_dataset(data)])
    pngs = bytes(sum(path.stat().st_size for path in (Path(data) / "img").glob("*.png")))
    target = np.zeros_like(pixels)

    def write():
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(pixels.data)
            file.write(pngs)

    return lambda: (timed(write), timed(np.copyto, target, pixels))


# Cost against work


def scale_here(data, folder, number, side):
    """Measures seconds from tarball to array, of an epoch, and of a step, for images of the data folder, repeated.

    The step is the best of three means over SCALING_STEPS, the epoch so many times that.
    """
    from PIL import Image

    parts = load_dataset(data)
    images, labels = parts[0].images, np.concatenate([part.labels for part in parts])
    folder = Path(folder)
    with tarfile.open(folder / TARBALL, "w:gz", compresslevel=1) as tarball, (folder / LABELS).open("w") as table:
        for index in tqdm(range(number), "writing a tarball", disable=None):
            member, source, file = tarfile.TarInfo(f"img_{index + 1}.png"), index % len(labels), io.BytesIO()
            path = Path(data) / "img" / f"img_{source + 1}.png"
            if side == images.shape[1]:
                file.write(path.read_bytes())
            else:
                Image.open(path).resize((side, side)).save(file, "PNG")
            member.size = file.tell()
            file.seek(0)
            tarball.addfile(member, file)
            table.write(f"{index + 1}\t{labels[source]}\n")

    def measure():
        reading = timed(load_dataset, folder)
        settings, model = built(folder, "--steps", SCALING_STEPS)
        train_steps(folder, settings, model)
        step = min(timed(train_steps, folder, settings, model) for _ in range(3)) / SCALING_STEPS
        return reading, step * number * 0.7 / settings.batch_size, step

    return measure

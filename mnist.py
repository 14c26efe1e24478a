"""Trains LeNet on cluttered MNIST, and shows where it looks as it learns.

    python mnist.py                      the default recipe: heatmaps in out/
    python mnist.py --recipe original    as in the repository of 2017: 100,000 steps of plain gradient descent

tarball -> arrays -> batches -> LeNet -> feature maps -> class activation maps -> heatmaps
"""

from experiment import process

if __name__ == "__main__":
    process.start()  # before TensorFlow is imported, which logs its start-up

from pathlib import Path

import keras
import numpy as np

import cam
from data.dataset import BOXES_TXT, CLASSES, load_dataset
from experiment.distribution import own_part, use_all_devices
from experiment.exact_maps import exact_cam_model
from experiment.figures import report_classes, save_figures
from experiment.files import UserError
from experiment.metrics import evaluate, format_metrics
from experiment.networks import check_model_fits_data, load_network
from experiment.pages import write_draw_page
from experiment.pictures import save_heatmaps, save_images
from experiment.preprocessing import Preprocessing
from experiment.run import RunFolder
from experiment.settings import fill_in_recipe, make_parser
from experiment.training import JIT_COMPILE, batch_indices, keep_zero_mean_over_classes, set_seed, shrink, warmup_cosine
from lenet import RECEPTIVE_FIELD, lenet, scale_to_unit_logits

# All settings; each is a flag, see `python mnist.py --help`.
SETTINGS = {
    "data": Path("data"),
    "recipe": "default",
    "pooling": "average",  # or "max", for the comparison in the paper's section 3.2
    "out": Path("out"),
    "eval_every": 100,  # steps between two evaluations, each with a heatmap of every sample
    "samples": 50,  # test images to draw heatmaps of, from the first
    "seed": 0,
}
RECIPES = {
    "default": {
        "steps": 5250,  # 84,000 images on any data set: 6 epochs of the 14,000 here
        "batch_size": 16,
        "order": "shuffled",
        "learning_rate": 0.03,  # of AdamW, at its peak
        "warmup": 0.1,  # share of the steps in which the rate rises to its peak; then it falls to 0 along a cosine
        "beta_2": 0.99,  # squared gradients averaged over about 100 steps, since a run has only a few thousand
        "weight_decay": 0.01,
        "label_smoothing": 0.03,
        "small_images": 0.6,  # ours: initial share of the steps that sees images scaled to 72%, for half the arithmetic
        "location_dropout": 0.3,  # ours, not the paper's: share of the locations hidden in a step, see `lenet`
        "precision": "auto",
    },
    "original": {
        "steps": 100_000,  # 366 epochs of 70,000 images
        "batch_size": 256,
        "order": "file",
        "learning_rate": 0.5,  # of plain gradient descent, constant
        "label_smoothing": 0.0,
        "small_images": 0.0,
        "location_dropout": 0.0,
        "precision": "float32",
    },
}
FIRST_TEST_IMAGES = 100  # evaluated during training; the final evaluation takes all
DRAW_STEPS = 8  # steps whose weights are kept, for out/draw.html


def train_model(settings):
    set_seed(settings.seed)
    use_all_devices(settings)  # with JAX, see docs/several-devices.md

    # Tarball -> arrays: images (N, 100, 100, 1) uint8, labels (N,), boxes (N, 4). Images of other sizes are padded to
    # multiples of LeNet's stride, so that a map covers its image exactly.
    train, test = load_dataset(settings.data, RECEPTIVE_FIELD["stride"])
    count, (height, width) = len(train.labels), train.images.shape[1:3]
    print(f"{settings.data}: {count:,} training images, {len(test.labels):,} test images", flush=True)
    if test.boxes is None:
        print(f"{settings.data / BOXES_TXT} is missing, so localization is not measured", flush=True)
    if settings.batch_size > count:
        raise UserError(f"--batch-size {settings.batch_size} is more than the {count} training images")
    settings.steps = settings.steps or settings.epochs * count // settings.batch_size
    one_hot = keras.utils.to_categorical(train.labels, CLASSES)  # (N, C)
    samples = test.first(settings.samples)  # the S images of the heatmaps
    names = [str(digit) for digit in range(CLASSES)]

    # Images -> feature maps f_k -> global average pooling F_k -> softmax weights w_k^c -> logits S_c
    model = lenet(1, CLASSES, settings.precision, settings.pooling, settings.location_dropout)
    prepare_training(model, settings, train.images[:256])
    # The same layers and weights: images -> S_c (N, C) and M_c, equation (2) (N, 25, 25, C). M_c is computed from all
    # locations: the feature maps are taken before the layer that hides some of them in training.
    cam_model = cam.class_activation_model(model)

    # Lock, checkpoint (restored into the model), history, page
    run = RunFolder(settings, model, (train, test), DRAW_STEPS)
    if run.finished:
        return
    print(f"{settings.steps:,} steps of {settings.batch_size} images, {settings.recipe} recipe, {settings.precision}")
    run.open_page(samples, names)
    save_images(settings.out, samples.images)

    for step in run.steps():  # step 0 evaluates the untrained model
        if step > 0:
            batch = batch_indices(step - 1, settings.batch_size, count, settings.order, settings.seed)  # (B,)
            batch = own_part(batch)  # all of it, unless several machines train
            images = train.images[batch]  # (B, 100, 100, 1)
            if step <= settings.small_images * settings.steps:
                images = shrink(images)  # (B, 72, 72, 1)
            run.add_loss(*model.train_on_batch(images, one_hot[batch]))

        if run.is_due(step):
            # The first test images, the samples among them; after the last step all
            test_images = test if step == settings.steps else test.first(max(FIRST_TEST_IMAGES, settings.samples))
            # Images -> logits S_c (N, C) and class activation maps M_c of the true classes (N, 25, 25)
            metrics, logits, maps = evaluate(cam_model, test_images)
            # Maps of the samples -> size of the images (S, 100, 100) -> heatmaps, 0..1 -> img_0/cmap_100.png ...
            upsampled = cam.upsample(np.stack(maps[: settings.samples]), height, width)
            save_heatmaps(settings.out, step, samples.images, cam.normalize(upsampled))
            # Boxes are found in the maps themselves: the threshold is a share of the maximum of M_c
            boxes = [cam.bounding_box(class_map) for class_map in upsampled]
            run.record(metrics, len(test_images.labels), logits.argmax(axis=1)[: settings.samples], boxes)

    # The same weights in float32 layers, for any machine
    float32_model = lenet(1, CLASSES, pooling=settings.pooling, location_dropout=settings.location_dropout)
    float32_model.set_weights(model.get_weights())
    run.save_model(float32_model, names, Preprocessing(digit=True, pixel_range=(0, 255)))
    save_figures(settings.out, float32_model, test, names, run.history, RECEPTIVE_FIELD)
    write_draw_page(settings.out, float32_model, samples)
    run.finish()


def prepare_training(model, settings, images):
    """Compiles a LeNet as its recipe wants; `images` (N, H, W, 1) set the scale of its initial weights."""
    if settings.recipe == "original":
        optimizer = keras.optimizers.SGD(settings.learning_rate)
    else:
        scale_to_unit_logits(model, images)
        keep_zero_mean_over_classes(model.get_layer("softmax_weights"))  # ours, not the paper's: see its docstring
        rate = warmup_cosine(settings.learning_rate, settings.steps, settings.warmup)
        optimizer = keras.optimizers.AdamW(rate, settings.weight_decay, beta_2=settings.beta_2)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=settings.label_smoothing)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=JIT_COMPILE)


def evaluate_model(settings):
    """Measures a trained model on all test images."""
    cam_model = exact_cam_model(load_network(settings.evaluate))
    any_size = cam_model.input_shape[1:3] == (None, None)
    _, test = load_dataset(settings.data, RECEPTIVE_FIELD["stride"] if any_size else 1)
    check_model_fits_data(settings.evaluate, cam_model, test.images.shape[1:], CLASSES)
    metrics, logits, _ = evaluate(cam_model, test, all_metrics=True)
    print(format_metrics(metrics, len(test.labels)))
    report_classes(settings.out, test.labels, logits.argmax(axis=1), [str(digit) for digit in range(CLASSES)])


def parse_arguments(arguments=None):
    """The settings of a command line: a list of arguments, by default those of the process."""
    parser = make_parser("mnist.py", __doc__, SETTINGS, RECIPES)
    text = "only measure a saved model, or a checkpoint of the repository of 2017"
    parser.add_argument("--evaluate", type=Path, metavar="MODEL", help=text)
    settings = parser.parse_args(arguments)
    fill_in_recipe(parser, settings, settings.recipe, RECIPES)
    return settings


def main(arguments=None):
    settings = parse_arguments(arguments)
    if settings.evaluate:
        process.run_script("mnist.py", evaluate_model, settings)
    else:
        process.run_script("mnist.py", train_model, settings, process.RESUME)


if __name__ == "__main__":
    main()

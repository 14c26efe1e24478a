"""Trains LeNet on cluttered MNIST, and shows where it looks while it learns.

    python mnist.py                      the default recipe: heatmaps in out/
    python mnist.py --recipe original    the training of 2017: 100,000 steps of plain gradient descent

tarball -> arrays -> batches -> LeNet -> feature maps -> class activation maps -> heatmaps
"""

from experiment.quiet import keras  # first, to keep TensorFlow's start-up log off the console

# isort: split
from pathlib import Path

import cam
from data.dataset import BOXES, CLASSES, load_dataset
from experiment.figures import report_classes, save_figures, save_heatmaps, save_images
from experiment.files import UserError
from experiment.metrics import evaluate, format_metrics, predict_class_maps
from experiment.networks import check_evaluated, load_network, to_cam_model
from experiment.pages import Page, write_draw_page
from experiment.run import RunFolder, run_main, set_seed
from experiment.schedule import batch_indices, warmup_cosine
from experiment.settings import fill_in_recipe, make_parser
from lenet import lenet, lsuv_init

# All settings; each is a flag, see `python mnist.py --help`.
SETTINGS = {
    "data": Path("data"),
    "recipe": "default",
    "pooling": "average",  # or "max", for the comparison in the paper's section 3.2
    "out": Path("out"),
    "every": 100,  # steps between two heatmaps of an image
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
        "location_dropout": 0.3,  # share of the feature map locations that are hidden in a training step
        "precision": "auto",
    },
    "original": {
        "steps": 100_000,  # 366 epochs of 70,000 images
        "batch_size": 256,
        "order": "file",
        "learning_rate": 0.5,  # of plain gradient descent, constant
        "label_smoothing": 0.0,
        "location_dropout": 0.0,
        "precision": "float32",
    },
}
TEST_IMAGES = 100  # evaluated during training; the final evaluation takes all
KEEP_WEIGHTS = 8  # steps whose weights are in out/draw.html


def main(settings):
    set_seed(settings.seed)

    # Tarball -> arrays: images (N, 100, 100, 1) uint8, labels (N,), boxes (N, 4)
    train, test = load_dataset(settings.data)
    count, (height, width) = len(train.labels), train.images.shape[1:3]
    print(f"{settings.data}: {count:,} training images, {len(test.labels):,} test images", flush=True)
    if test.boxes is None:
        print(f"{settings.data / BOXES} is missing, so localization is not measured", flush=True)
    if settings.batch_size > count:
        raise UserError(f"--batch-size {settings.batch_size} is more than the {count} training images")
    settings.steps = settings.steps or settings.epochs * count // settings.batch_size
    one_hot = keras.utils.to_categorical(train.labels, CLASSES)  # (N, C)

    # Images -> feature maps f_k -> global average pooling F_k -> softmax weights w_k^c -> logits S_c
    model = lenet(1, CLASSES, settings.precision, settings.pooling, settings.location_dropout)
    if settings.recipe == "original":
        optimizer = keras.optimizers.SGD(settings.learning_rate)
    else:
        lsuv_init(model, train.images[:256])  # logits of unit variance, so that it learns from the first step
        kernel = model.get_layer("softmax_weights").kernel  # w_k^c: (K, C)
        kernel.constraint = cam.zero_mean_over_classes  # M_c: evidence for c relative to the other classes
        kernel.assign(kernel.constraint(kernel))
        rate = warmup_cosine(settings.learning_rate, settings.steps, settings.warmup)
        optimizer = keras.optimizers.AdamW(rate, settings.weight_decay, beta_2=settings.beta_2)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=settings.label_smoothing)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=cam.JIT_COMPILE)

    # The same layers and weights: images -> S_c, equation (1) (N, C), and M_c, equation (2) (N, 25, 25, C)
    cam_model = cam.class_activation_model(model)

    # Lock, checkpoint (restored into the model), progress, history
    run = RunFolder(settings, model, (train, test), KEEP_WEIGHTS)
    if run.finished:
        return
    print(f"{settings.steps:,} steps of {settings.batch_size} images, {settings.recipe} recipe, {settings.precision}")
    print(f"follow the run in {settings.out / 'index.html'}", flush=True)
    samples = test.first(settings.samples)
    save_images(settings.out, samples.images)
    names = [str(digit) for digit in range(CLASSES)]
    page = Page(settings.out, samples, names)

    for step in run.steps():  # step 0 comes before training
        if step > 0:
            batch = batch_indices(step - 1, settings.batch_size, count, settings.order, settings.seed)  # (B,)
            run.add_loss(*model.train_on_batch(train.images[batch], one_hot[batch]))

        if run.is_due(step):
            tested = test if step == settings.steps else test.first(max(TEST_IMAGES, settings.samples))
            # Images -> logits (N, C) and class activation maps of the true classes (N, 25, 25)
            logits, maps = predict_class_maps(cam_model, tested.images, tested.labels)
            metrics = evaluate(logits, maps, tested)
            # Maps of the samples (S, 25, 25) -> heatmaps (S, 100, 100), 0..1 -> PNG
            sample_maps = maps[: settings.samples]
            heatmaps = cam.normalize(cam.upsample(sample_maps, height, width))
            save_heatmaps(settings.out, step, samples.images, heatmaps)  # img_0/cmap_100.png ...
            predicted = logits[: settings.samples].argmax(axis=1)
            run.record(metrics, len(tested.labels), predicted, sample_maps)
            page.renew(cam_model, run.history)

    # The same weights in float32 layers, for any machine
    trained = lenet(1, CLASSES, pooling=settings.pooling, location_dropout=settings.location_dropout)
    trained.set_weights(model.get_weights())
    cam_model = cam.class_activation_model(trained)
    save_figures(settings.out, cam_model, test, names, run.history)
    write_draw_page(settings.out, trained, samples, settings.steps)
    page.renew(cam_model, run.history, finished=True)
    run.finish(trained, names, images={"digit": True, "pixel_range": (0, 255)})


def evaluate_model(settings):
    """Measures a trained model on all test images."""
    _, test = load_dataset(settings.data)
    cam_model = to_cam_model(load_network(settings.evaluate))
    check_evaluated(settings.evaluate, cam_model, test.images.shape[1:], CLASSES)
    logits, maps = predict_class_maps(cam_model, test.images, test.labels)
    print(format_metrics(evaluate(logits, maps, test, all_metrics=True), len(test.labels)))
    report_classes(settings.out, test.labels, logits.argmax(axis=1), [str(digit) for digit in range(CLASSES)])


if __name__ == "__main__":
    parser = make_parser("mnist.py", __doc__, SETTINGS, RECIPES)
    text = "only measure a saved model, or a checkpoint of the original"
    parser.add_argument("--evaluate", type=Path, metavar="MODEL", help=text)
    settings = parser.parse_args()
    fill_in_recipe(parser, settings, settings.recipe, RECIPES)
    run_main("mnist.py", evaluate_model if settings.evaluate else main, settings)

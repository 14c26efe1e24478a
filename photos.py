"""Trains softmax weights on photos of your own, or of Caltech-256, and shows where the network looks as it learns.

    python photos.py --data photos                                     a folder photos/CLASS for each class
    python photos.py --data photos --network ResNet50                  another network of keras.applications
    python photos.py --data photos --network mine.keras                or any saved Keras network
    python photos.py --data photos --network alexnet --weights alexnet.npz

The linear recipe (section 4 of the paper) freezes a network that was trained on ImageNet, and trains only softmax
weights on its pooled features. The gap recipe (section 3), for alexnet, trains a new convolution, too.

archive -> photos -> network -> feature maps -> class activation maps -> heatmaps
"""

from experiment import process

if __name__ == "__main__":
    process.start()  # before TensorFlow is imported, which logs its start-up

from pathlib import Path

import keras
import numpy as np
from keras import layers

import cam
from alexnet import CONVOLUTIONS, CROP_SIDE, alexnet, set_convolutions
from data.photo_folders import load_all_photos, load_photos, make_split, read_photo
from experiment.distribution import own_part, use_all_devices
from experiment.features import load_pooled_features, prefetch
from experiment.figures import report_classes, save_figures
from experiment.files import UserError, checksum
from experiment.images import random_crop
from experiment.metrics import evaluate, format_metrics
from experiment.networks import load_features, load_torchvision_convolutions
from experiment.pictures import save_heatmaps, save_images
from experiment.predict import Network
from experiment.preprocessing import SHORT_SIDE, Preprocessing, complete_preprocessing
from experiment.run import RunFolder
from experiment.settings import bounded, fill_in_recipe, make_parser
from experiment.training import JIT_COMPILE, batch_indices, keep_zero_mean_over_classes, set_seed, warmup_cosine

# All settings; each is a flag, see `python photos.py --help`.
SETTINGS = {
    "data": Path("data/256_ObjectCategories.tar"),
    "network": "EfficientNetB0",
    "short_side": None,  # pixels to which a photo is scaled on its short side; SHORT_SIDE if no file says otherwise
    "label_smoothing": 0.0,
    "out": Path("out/photos"),
    "eval_every": 100,  # steps between two evaluations, each with a heatmap of every sample
    "samples": 30,  # test photos to draw heatmaps of, from the first
    "seed": 0,
}
RECIPES = {
    "linear": {  # section 4
        "epochs": 40,
        "batch_size": 64,
        "learning_rate": 1e-3,  # of Adam, constant
    },
    "gap": {  # section 3
        "weights": Path("data/alexnet.npz"),
        "epochs": 12,
        "batch_size": 32,
        "learning_rate": 1e-3,  # of Adam, at its peak
        "warmup": 0.1,  # share of the steps in which the rate rises to its peak; then it falls to 0 along a cosine
        "location_dropout": 0.3,  # ours, not the paper's: share of the locations hidden in a step, see `alexnet`
        "precision": "auto",
    },
}
FIRST_TEST_PHOTOS = 100  # evaluated during training; the final evaluation takes all


def train_model(settings):
    set_seed(settings.seed)

    out = settings.out.resolve()
    if settings.data.resolve() in (out, *out.parents):
        raise UserError(f"--out {settings.out} lies in --data; its heatmaps would become photos")
    if Path(settings.network).is_file() and out in Path(settings.network).resolve().parents:
        raise UserError(f"--network {settings.network} lies in --out, where it could be replaced; move one of them")

    # Archive -> photos, which stay in it until they are needed
    train, test, names, notes = load_photos(settings.data, settings.categories, settings.test_share, settings.fold)
    count = len(train.labels)
    print(f"{settings.data}: {count:,} training photos, {len(test.labels):,} test photos of {len(names)} classes")
    describe(test, notes)
    data = train.fingerprint(), test.fingerprint()
    settings.batch_size = min(settings.batch_size, count)
    settings.steps = settings.steps or settings.epochs * count // settings.batch_size
    use_all_devices(settings)

    # Photos -> feature maps f_k -> global average pooling F_k -> softmax weights w_k^c -> logits S_c
    recipe = Linear(settings, names) if settings.recipe == "linear" else Gap(settings, names)
    # The same layers and weights: S_c (N, C) and M_c, equation (2) (N, h, w, C)
    cam_model = cam.class_activation_model(recipe.classifier)

    # Test photos; the first ones are evaluated during training, and kept in memory
    first = max(FIRST_TEST_PHOTOS, len(names), settings.samples)  # the classes take turns, so each has one
    test = make_split(test, settings.short_side, recipe.prepare, first)
    samples = test.first(settings.samples)  # the S photos of the heatmaps
    photos = list(samples.images)  # (H, W, 3) uint8 each

    # Lock, checkpoint (restored into the model), history, page
    run = RunFolder(settings, recipe.trained, data)
    if run.finished:
        return
    print(f"{settings.steps:,} steps of {settings.batch_size} photos, {settings.recipe} recipe")
    run.open_page(samples, names)
    save_images(settings.out, photos)
    batches = recipe.batches(train, range(max(run.step, 0), settings.steps))

    for step in run.steps():  # step 0 evaluates the untrained model
        if step > 0:
            inputs, labels = map(own_part, next(batches))  # all of them, unless several machines train
            run.add_loss(*recipe.trained.train_on_batch(inputs, keras.utils.to_categorical(labels, len(names))))

        if run.is_due(step):
            # Photos -> logits S_c (N, C) and class activation maps M_c of the true classes, (h, w) each
            test_photos = test if step == settings.steps else test.first(first)
            metrics, logits, maps = evaluate(cam_model, test_photos)
            # Maps of the samples -> size of the photos -> heatmaps, 0..1 -> img_0/cmap_100.png ...
            upsampled = [cam.upsample(m[None], *photo.shape[:2])[0] for m, photo in zip(maps, photos, strict=False)]
            save_heatmaps(settings.out, step, photos, [cam.normalize(class_map) for class_map in upsampled])
            boxes = [cam.bounding_box(class_map) for class_map in upsampled]
            run.record(metrics, len(logits), logits.argmax(axis=1)[: settings.samples], boxes)

    network, classifier = recipe.finish()
    run.save_model(network, names, recipe.preprocessing)
    save_figures(settings.out, classifier, test, names, run.history)
    run.finish()
    print(f"maps of other photos: python show.py PHOTO --model {run.model_file}")


class Linear:
    """Section 4: a frozen network, and softmax weights that are trained on its pooled features F_k.

        network            photos -> f_k (N, h, w, K), frozen
        pooling            f_k -> F_k (N, K)
        softmax_weights    F_k -> S_c (N, C)

    Attributes:
        preprocessing: `Preprocessing` of the photos.
        classifier: Model from f_k, which `prepare` returns for a photo, to S_c: `pooling` and `softmax_weights`.
        trained: Model from F_k, which `batches` yields, to S_c: the same `softmax_weights` alone, compiled.
    """

    def __init__(self, settings, names):
        self.settings, path = settings, Path(settings.network)
        self.name = path.stem.lower()
        self.network, recorded = load_features(settings.network)
        self.preprocessing = complete_preprocessing(recorded, path, self.network.inputs, settings.short_side)
        self.input_shape = self.network.input_shape[1:]
        settings.short_side = self.preprocessing.short_side or SHORT_SIDE  # of the photos as they are shown
        source = path.read_bytes() if path.is_file() else (settings.network, keras.__version__)
        settings.pretrained_checksum = checksum([source, self.preprocessing])
        self.pooling = layers.GlobalAveragePooling2D(dtype="float32", name="gap")
        self.softmax_weights = layers.Dense(len(names), use_bias=False, dtype="float32", name="softmax_weights")

        feature_maps = keras.Input(self.network.output_shape[1:])
        self.classifier = self.build(feature_maps, feature_maps)
        pooled = keras.Input(self.network.output_shape[-1:])
        self.trained = keras.Model(pooled, self.softmax_weights(pooled), name=self.name)
        keep_zero_mean_over_classes(self.softmax_weights)  # ours, not the paper's: see its docstring
        compile_classifier(self.trained, keras.optimizers.Adam(settings.learning_rate), settings.label_smoothing)

    def build(self, images, feature_maps):
        """A model from `images`, of which `feature_maps` are computed, to S_c."""
        feature_maps = layers.Identity(name="feature_maps")(feature_maps)
        return keras.Model(images, self.softmax_weights(self.pooling(feature_maps)), name=self.name)

    def preprocess(self, photo):
        return self.preprocessing.apply(read_photo(photo).pixels, self.input_shape)

    def prepare(self, photo):
        return self.network.predict_on_batch(self.preprocess(photo)[None])[0]

    def batches(self, train, steps):
        """For each step F_k of photos, half of them mirrored, (B, K), and their labels (B,)."""
        settings, count = self.settings, len(train.files)

        def read(index):
            pixels = self.preprocess(train.files[index])
            return np.stack([pixels, pixels[:, ::-1]])

        def make_batch(step):
            batch = batch_indices(step, settings.batch_size, count, "shuffled", settings.seed)
            mirrored = np.random.default_rng((settings.seed, 1, step)).integers(2, size=len(batch))
            return pooled[batch, mirrored], train.labels[batch]

        to_pooled = keras.Sequential([self.network, self.pooling])
        key = *train.fingerprint()[0], settings.pretrained_checksum
        sizes = [(photo.height, photo.width) for photo in train.files]
        pooled = load_pooled_features(settings.out, to_pooled, read, sizes, key)  # (N, 2, K)
        return map(make_batch, steps)

    def finish(self):
        """The network to save, photos -> S_c, and the classifier to draw."""
        images = keras.Input(self.input_shape, name="images")
        return self.build(images, self.network(images, training=False)), self.classifier


class Gap:
    """Section 3: AlexNet with a new convolution before the pooling, trained on random crops; attributes as `Linear`."""

    def __init__(self, settings, names):
        self.settings, self.classes = settings, len(names)
        settings.short_side = settings.short_side or SHORT_SIDE
        self.preprocessing = Preprocessing(short_side=settings.short_side, pixel_range=(0, 255))
        weights = {} if str(settings.weights) == "none" else load_torchvision_convolutions(settings.weights)
        settings.pretrained_checksum = checksum(weights.values())
        self.trained = self.classifier = alexnet(self.classes, settings.precision, settings.location_dropout)
        if weights:
            set_convolutions(self.trained, weights)
            for name in CONVOLUTIONS:  # frozen, a step takes a third of the time
                self.trained.get_layer(name).trainable = False
        keep_zero_mean_over_classes(self.trained.get_layer("softmax_weights"))  # ours, not the paper's
        rate = warmup_cosine(settings.learning_rate, settings.steps, settings.warmup)
        compile_classifier(self.trained, keras.optimizers.Adam(rate), settings.label_smoothing)

    def prepare(self, photo):
        return self.preprocessing.apply(read_photo(photo).pixels, self.classifier.input_shape[1:])

    def batches(self, train, steps):
        """For each step random crops of photos, half of them mirrored, (B, 224, 224, 3), and their labels (B,)."""
        settings = self.settings

        def make_batch(step):
            batch = batch_indices(step, settings.batch_size, len(train.files), "shuffled", settings.seed)
            rng = np.random.default_rng((settings.seed, 1, step))
            photos = (read_photo(train.files[index]).pixels for index in batch)
            crops = [random_crop(photo, settings.short_side, CROP_SIDE, rng) for photo in photos]
            return np.stack(crops), train.labels[batch]

        return prefetch(make_batch, steps)

    def finish(self):
        """The network to save, in float32 layers for any machine; it is also the classifier to draw."""
        network = alexnet(self.classes, location_dropout=self.settings.location_dropout)
        network.set_weights(self.trained.get_weights())
        return network, network


def compile_classifier(model, optimizer, label_smoothing):
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=label_smoothing)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=JIT_COMPILE)


def evaluate_model(settings):
    """Measures any network on all photos of a folder or archive, as `show.py` reads them."""
    network = Network(settings.evaluate, short_side=settings.short_side)
    photos, notes = load_all_photos(settings.data, network.class_names, network.wordnet_ids)
    print(f"{settings.data}: {len(photos.labels):,} photos")
    describe(photos, notes)
    test = make_split(photos, SHORT_SIDE, lambda photo: network.preprocess(read_photo(photo).pixels))
    metrics, logits, _ = evaluate(network, test, all_metrics=True)
    print(format_metrics(metrics, len(photos.labels), "photos"))
    report_classes(settings.out, photos.labels, logits.argmax(axis=1), network.class_names)


def describe(photos, notes):
    """Prints how many test photos have boxes, and what was left out."""
    if photos.boxes is None:
        notes = [*notes, "no boxes.csv or .xml files with true boxes, so localization is not measured"]
    else:
        notes = [*notes, f"{sum(boxes is not None for boxes in photos.boxes):,} test photos with boxes"]
    print("".join(f"    {note}\n" for note in notes), end="", flush=True)


def parse_arguments(arguments=None):
    """The settings of a command line: a list of arguments, by default those of the process."""
    parser = make_parser("photos.py", __doc__, SETTINGS, RECIPES)
    text = "only measure a network, on all photos of --data: a file, or a name of keras.applications"
    parser.add_argument("--evaluate", metavar="NETWORK", help=text)
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="only these, such as coffee-mug (default: all)")
    text = "share of each class that is the test set (default: its last 10 photos)"
    parser.add_argument("--test-share", type=bounded(0.01, 0.9, float), help=text)
    text = "validate: test on this fifth of the training photos of each class, 1..5, and leave out the test photos"
    parser.add_argument("--fold", type=bounded(1, 5), help=text)
    settings = parser.parse_args(arguments)
    if settings.evaluate:
        for name, value in vars(settings).items():
            if name not in (*SETTINGS, "evaluate") and value not in (None, False):
                parser.error(f"--evaluate measures all photos of --data, without --{name.replace('_', '-')}")
        return settings
    fill_in_recipe(parser, settings, "gap" if settings.network == "alexnet" else "linear", RECIPES)
    if settings.recipe == "gap" and settings.short_side and settings.short_side < CROP_SIDE:
        parser.error(f"--short-side must be at least {CROP_SIDE} for alexnet")
    return settings


def main(arguments=None):
    settings = parse_arguments(arguments)
    if settings.evaluate:
        process.run_script("photos.py", evaluate_model, settings)
    else:
        process.run_script("photos.py", train_model, settings, process.RESUME)


if __name__ == "__main__":
    main()

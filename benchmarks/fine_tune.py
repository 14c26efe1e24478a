"""Transfer learning as in the tutorials of Keras and TensorFlow, for benchmark.py to compare with.

    python benchmarks/fine_tune.py ARCHIVE NETWORK.keras OUT

A frozen base, average pooling, dropout, a new Dense layer, and 10 epochs of `fit`, which reads the photos again in each
epoch. The last 10 photos of each class, by name, are the test set, as in photos.py. The network must take pixels of
0..255. The map is that of one test photo, equation (2) with the new weights.
"""

import shutil
import sys
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import tensorflow as tf
from keras import layers

SIZE, EPOCHS = (256, 256), 10


def main(archive, network, out):
    train, test = load(archive, Path(out))
    base = keras.models.load_model(network, compile=False)
    pooling = next(layer for layer in base.layers if isinstance(layer, layers.GlobalAveragePooling2D))
    base = keras.Model(base.input, pooling.input)
    base.trainable = False

    photos = keras.Input((*SIZE, 3))
    x = layers.RandomFlip("horizontal")(photos)
    x = base(x, training=False)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(0.2)(x)
    softmax_weights = layers.Dense(len(train.class_names))
    model = keras.Model(photos, softmax_weights(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    history = model.fit(train.prefetch(tf.data.AUTOTUNE), epochs=EPOCHS, validation_data=test, verbose=0).history
    print(f"accuracy {history['val_accuracy'][-1]:.2%}")

    photos, labels = next(iter(test))
    class_maps = base(photos[:1])[0] @ softmax_weights.kernel  # (h, w, C)
    plt.imshow(photos[0] / 255)
    plt.imshow(tf.image.resize(class_maps, SIZE)[:, :, labels[0]], cmap="jet", alpha=0.5)
    plt.savefig(Path(out) / "map.png")


def load(archive, folder):
    """Training and test photos as `tf.data` pipelines."""
    shutil.unpack_archive(archive, folder / "photos", filter="data")
    for source in sorted({path.parent for path in (folder / "photos").rglob("*.jp*g")}):
        photos = sorted(source.iterdir())
        for part, chosen in (("train", photos[:-10]), ("test", photos[-10:])):
            target = folder / part / source.name
            target.mkdir(parents=True)
            for photo in chosen:
                photo.rename(target / photo.name)
    read = keras.utils.image_dataset_from_directory
    options = dict(image_size=SIZE, batch_size=32, verbose=False)
    return read(folder / "train", **options), read(folder / "test", shuffle=False, **options)


if __name__ == "__main__":
    main(*sys.argv[1:])

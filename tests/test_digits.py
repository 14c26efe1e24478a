"""digits.py with photos of handwritten digits, made from test images of data/ under many conditions.

python tests/test_digits.py out/lenet.keras      how many of 60 digits a trained LeNet reads under each condition
"""

import io
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import filters, measure, morphology, transform

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.dataset import load_dataset
from experiment import digits
from experiment.files import UserError

SIZE = 450, 600
PAPER, PEN = (240, 238, 230), (40, 40, 60)


def cut_out_digits(count):
    """Digits (h, w) uint8 cut out of test images, those that no clutter touches, and their labels."""
    _, test = load_dataset(Path(__file__).parent.parent / "data")
    found = []
    for image, label, (x0, y0, x1, y1) in zip(test.images, test.labels, test.boxes, strict=True):
        digit = image[y0:y1, x0:x1, 0]
        around = np.pad(image[:, :, 0], 2)[y0 : y1 + 4, x0 : x1 + 4].astype(int)
        if around.sum() == digit.sum() and measure.label(digit > 100, connectivity=2).max() == 1:
            found.append((digit, label))
        if len(found) == count:
            return found
    raise AssertionError


def draw(digit, rng, size=SIZE, height=None, pen_width=None):
    """Coverage by ink (H, W), 0..1, of a digit at a random place."""
    height = height or round(rng.uniform(0.15, 0.6) * size[0])
    width = max(2, round(height * digit.shape[1] / digit.shape[0]))
    large = transform.resize(digit / 255, (height, width), order=3, anti_aliasing=True).clip(0, 1)
    if height > 60:  # the edges of ink are sharp
        large = ((large - 0.35) / 0.3).clip(0, 1)
    if pen_width:  # share of the height
        line = morphology.dilation(morphology.skeletonize(large > 0.5), morphology.disk(round(pen_width * height / 2)))
        large = filters.gaussian(line.astype(float), 1)
    ink, margin = np.zeros(size), size[0] // 16
    y, x = (rng.integers(margin, length - margin - side) for length, side in zip(size, large.shape, strict=True))
    ink[y : y + height, x : x + width] = large
    return ink


def photograph(ink, rng, paper=PAPER, pen=PEN, light=1.0, noise=2.0, blur=0.8, quality=85):
    """Photo (H, W, 3) uint8 of ink (H, W) on paper, a colour or an image of it, in a light (H, W)."""
    ink, light = np.asarray(ink)[:, :, None], np.atleast_3d(light)
    photo = (np.asarray(paper, float) * (1 - ink) + np.asarray(pen, float) * ink) * light
    photo = filters.gaussian(photo, blur, channel_axis=2, preserve_range=True)
    photo = (photo + rng.normal(0, noise, photo.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def coordinates(rng):
    """Across the picture at a random angle (H, W), 0..1, and the squared distance from its centre, 0..1."""
    y, x = np.mgrid[-1 : 1 : SIZE[0] * 1j, -1 : 1 : SIZE[1] * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    across = np.cos(angle) * x + np.sin(angle) * y
    return (across - across.min()) / np.ptp(across), (x**2 + y**2) / 2


def on_paper(digit, rng, fall=0.0, shadow=None, edge=0.004, vignette=0.0, rules=None, pen_width=None, **photo):
    """A digit on paper that fills the picture, in light that falls by a share, in a shadow, with lines or squares."""
    across, distance = coordinates(rng)
    light = (1 - fall * across) * (1 - vignette * distance)
    if shadow:
        light = light * (shadow + (1 - shadow) / (1 + np.exp((rng.uniform(0.3, 0.7) - across) / edge)))
    if rules:
        step, squares = rules
        rows, columns = np.indices(SIZE) % step < 2
        photo["paper"] = np.where((rows | (columns & squares))[:, :, None], (150, 170, 210), PAPER)
    return photograph(draw(digit, rng, pen_width=pen_width), rng, light=light, **photo)


def on_desk(digit, rng, desk=(60, 45, 35), texture=50, paper=PAPER, angle=0.0, **photo):
    """A digit on a sheet, which lies on a desk with a grain, turned by some degrees."""
    top, bottom, left, right = (rng.uniform(0.08, 0.2, 4) * np.repeat(SIZE, 2)).astype(int)
    inner = SIZE[0] - top - bottom, SIZE[1] - left - right
    sheet, ink = np.zeros(SIZE), np.zeros(SIZE)
    sheet[top:-bottom, left:-right] = 1
    ink[top:-bottom, left:-right] = draw(digit, rng, inner, round(rng.uniform(0.2, 0.5) * inner[0]))
    turn = partial(transform.rotate, angle=rng.uniform(-angle, angle))
    grain = filters.gaussian(rng.normal(0, 1, SIZE), (2, 12))[:, :, None]
    desk = (np.asarray(desk, float) + texture * grain).clip(0, 255)
    sheet = turn(sheet)[:, :, None]
    return photograph(turn(ink), rng, paper=np.asarray(paper) * sheet + desk * (1 - sheet), **photo)


def anywhere(digit, rng, desk=(60, 60, 60), share=(0.15, 0.5), turn=15, paper=PAPER, beside=0, off=False, **photo):
    """A digit, upright to 12 degrees, on a sheet that covers a share of the picture, or lies partly off it.

    `desk` is a colour or an image (H, W, 3), `beside` the number of things that lie on it, below the sheet.
    """
    height, width = (np.sqrt(rng.uniform(*share)) * np.array(SIZE)).astype(int)
    ink = draw(digit, rng, (height, 3 * width // 4), round(rng.uniform(0.2, 0.5) * 3 * height // 4))
    ink = np.pad(ink, ((0, 0), (width - ink.shape[1], 0)))
    angle = rng.uniform(-turn, turn)
    centre = np.mean(np.nonzero(ink > 0.5), axis=1)[::-1]
    ink = transform.rotate(ink, angle - np.clip(angle, -12, 12), center=centre)
    cos, sin = np.abs([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))])
    half = np.array([width * cos + height * sin, width * sin + height * cos]) / 2
    x, y = rng.uniform(half, np.maximum(half, np.array(SIZE[::-1]) - half))
    move = transform.EuclideanTransform
    place = move(translation=(-width / 2, -height / 2)) + move(rotation=np.deg2rad(angle))
    place += move(translation=(0.6 * half[0] if off else x, y))
    sheet, ink = (transform.warp(one, place.inverse, output_shape=SIZE) for one in (np.ones_like(ink), ink))
    desk = np.ones((*SIZE, 3)) * desk
    for _ in range(beside):
        (top, left), size = rng.integers(0, SIZE), rng.integers(20, 200, 2)
        desk[top : top + size[0], left : left + size[1]] = rng.integers(20, 250, 3)
    return photograph(ink, rng, paper=np.where(sheet[:, :, None] > 0.5, paper, desk), **photo)


def wood(rng):
    """An image (H, W, 3) of wood with a grain along it."""
    return (120, 80, 50) * (1 + 6 * filters.gaussian(rng.normal(0, 1, SIZE), (2, 40)))[:, :, None].clip(-1, 1)


def on_a_note(digit, rng):
    """A digit on a yellow note on a white sheet on a desk."""
    desk = np.full((*SIZE, 3), 60)
    desk[30:-30, 40:-40] = PAPER
    return anywhere(digit, rng, desk, (0.1, 0.25), paper=(245, 225, 110))


CHECKS = np.where((np.indices(SIZE) // 40).sum(axis=0)[:, :, None] % 2, (170, 40, 40), (225, 220, 215))


def plain(digit, rng, side, height, paper=255, pen=0, **photo):
    """A digit on an even ground, a scan or a drawing."""
    return photograph(draw(digit, rng, (side, side), height), rng, (paper,) * 3, (pen,) * 3, **photo)


def drawn(digit, rng, side, height, ground):
    """A digit drawn by a program: no noise, nothing lossy."""
    ink = np.rint(255 * draw(digit, rng, (side, side), height)).astype(np.uint8)
    return (ink if ground == 0 else ground - (ink * (ground / 255)).astype(np.uint8))[:, :, None].repeat(3, axis=2)


CONDITIONS = {
    "even light": on_paper,
    "light falls to 0.6": partial(on_paper, fall=0.4),
    "light falls to 0.35": partial(on_paper, fall=0.65),
    "hard shadow": partial(on_paper, shadow=0.45),
    "vignette": partial(on_paper, vignette=0.7),
    "sheet on a dark desk": on_desk,
    "squared paper": partial(on_paper, rules=(18, True)),
    "100 pixels, paper 235": partial(drawn, side=100, height=20, ground=235),
    "101 pixels, paper 235": partial(drawn, side=101, height=20, ground=235),
    "drawn, white on black": partial(drawn, side=300, height=150, ground=0),
    "drawn, black on white": partial(drawn, side=300, height=150, ground=255),
    "drawn, 100 pixels, 60 high": partial(drawn, side=100, height=60, ground=255),
    "scanned": partial(plain, side=700, height=200, paper=250, pen=30, noise=1),
    "ruled paper, light falls to 0.6": partial(on_paper, rules=(40, False), fall=0.4),
    "squared paper, vignette": partial(on_paper, rules=(30, True), vignette=0.6),
    "soft shadow": partial(on_paper, shadow=0.35, edge=0.03),
    "blue pen": partial(on_paper, pen=(60, 80, 190)),
    "red pen, light falls to 0.7": partial(on_paper, pen=(200, 50, 50), fall=0.3),
    "pencil": partial(on_paper, pen=(135, 135, 138), noise=4),
    "thin pen": partial(on_paper, pen_width=0.03, fall=0.4),
    "marker": partial(on_paper, pen_width=0.18, shadow=0.5),
    "out of focus": partial(on_paper, blur=3),
    "dim and noisy": partial(on_paper, fall=0.2, noise=12),
    "chalk on a blackboard": partial(on_paper, paper=(45, 60, 50), pen=(215, 215, 210), fall=0.5, noise=4),
    "yellow note on wood": partial(on_desk, desk=(140, 95, 60), paper=(245, 225, 110), angle=12),
    "light desk": partial(on_desk, desk=(190, 180, 165), texture=12, angle=5),
    "turned sheet, light falls": partial(on_desk, angle=15, light=np.linspace(1, 0.6, SIZE[1])[None, :, None]),
    "desk with a strong grain": partial(on_desk, desk=(120, 80, 50), texture=120),
    "small sheet": partial(anywhere, share=(0.12, 0.2)),
    "sheet turned by up to 45 degrees": partial(anywhere, share=(0.15, 0.35), turn=45),
    "sheet partly off the picture": partial(anywhere, off=True),
    "on wood": lambda digit, rng: anywhere(digit, rng, wood(rng), turn=30),
    "on a checked cloth": partial(anywhere, desk=CHECKS),
    "other things on the desk": partial(anywhere, beside=6),
    "on a note on a sheet": on_a_note,
    "60 pixels": partial(plain, side=60, height=24, paper=225, pen=50, noise=3, blur=0.4),
}


def photos(name, count):
    """Photos under a condition, the digits in them (h, w) and their labels."""
    for index, (digit, label) in enumerate(cut_out_digits(count)):
        yield CONDITIONS[name](digit, np.random.default_rng((index, zlib.crc32(name.encode())))), digit, label


def likeness(seen, digit):
    """Correlation of a preprocessed photo (h, w) with the digit's own pixels (h, w), both cut to their ink."""
    rows, columns = np.flatnonzero((seen > 80).any(axis=1)), np.flatnonzero((seen > 80).any(axis=0))
    if not len(rows):
        return 0
    seen = np.pad(seen[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(float), 5)
    turned = [transform.rotate(np.pad(digit.astype(float), 5), angle) for angle in (-12, -6, 0, 6, 12)]
    seen, *turned = (filters.gaussian(transform.resize(one, (24, 24)), 1.5).ravel() for one in (seen, *turned))
    return max(np.corrcoef(seen, one)[0, 1] for one in turned)


FAST = ("sheet on a dark desk", "drawn, 100 pixels, 60 high", "60 pixels")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CONDITIONS]
)
def test_a_photo_becomes_a_digit_of_mnist(name):
    found = []
    for photo, digit, _ in photos(name, 20):
        seen = digits.preprocess_digit(photo)
        assert seen.dtype == np.uint8
        assert abs(seen.shape[1] / seen.shape[0] - photo.shape[1] / photo.shape[0]) < 0.1  # all of the picture
        found.append(likeness(seen, digit))
    assert np.mean(np.array(found) > 0.8) >= 0.9, np.round(found, 2)


def test_images_of_mnist_and_of_a_run_stay_as_they_are():
    _, test = load_dataset(Path(__file__).parent.parent / "data")
    for image in test.images[:200]:
        np.testing.assert_array_equal(digits.preprocess_digit(image.repeat(3, axis=2)), image[:, :, 0])
        np.testing.assert_array_equal(digits.preprocess_digit(255 - image.repeat(3, axis=2)), image[:, :, 0])
    for times in (3, 4, 7):  # such as image_test.png, whose clutter is not to be taken for one large digit
        large = image.repeat(times, axis=0).repeat(times, axis=1).repeat(3, axis=2)
        np.testing.assert_array_equal(digits.preprocess_digit(large), image[:, :, 0])


def test_photos_of_a_sheet_on_a_desk(real_data):
    """600 x 600 pixels; digits are 150 to 220 pixels large, sheets more than 350."""
    for path in (real_data / "digits_on_a_desk").glob("*.jpg"):
        seen = digits.preprocess_digit(np.asarray(Image.open(path)))
        assert 50 <= seen.shape[0] <= 80, path.name


@pytest.mark.parametrize("value", [0, 100, 255])
@pytest.mark.parametrize("size", [(1, 1), (28, 28), (200, 300), (3, 1000)])
def test_nothing_is_found_in_an_empty_picture(size, value):
    with pytest.raises(UserError, match="no digit is found"):
        digits.preprocess_digit(np.full((*size, 3), value, np.uint8))


if __name__ == "__main__":
    from experiment.networks import load_network

    network, own = load_network(sys.argv[1]), 0
    for digit, label in cut_out_digits(60):
        image = np.pad(digit, 36)[None, :, :, None].astype(np.float32)
        own += np.argmax(network(image)) == label
    print(f"{'the pixels of the digits themselves, on black':<48}{own} of 60")
    for name in CONDITIONS:
        read = [np.argmax(network(digits.preprocess_digit(p)[None, :, :, None])) == c for p, _, c in photos(name, 60)]
        print(f"{name:<48}{sum(read)} of 60", flush=True)

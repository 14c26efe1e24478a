"""Photos of handwritten digits, as a network for MNIST wants them."""

import math

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage import color, filters, measure, morphology, segmentation, transform

from experiment.files import UserError
from lenet import RECEPTIVE_FIELD

DIGIT_SIDE = 20  # pixels: the longer side of an MNIST digit
MAX_CLUTTER_SIDE = 100  # pixels: the longer side of an image that may have clutter around the digit, as those of data/
STROKE = 0.1  # of that side: the width of a stroke, at least
MAX_STROKE = 0.4  # and at most; what is wider is no part of a digit
MIN_INK = 0.05  # what is fainter is noise of the paper
WORKING_SIDE = 400  # pixels: the longer side at which the ink is looked for
MAX_RESULT_SIDE = 1000  # pixels: the longer side of the result


def preprocess_digit(pixels):
    """A picture of one digit as LeNet expects it: light on black, 20 pixels high or wide.

    The whole picture is kept, and its sides become multiples of LeNet's stride, so that a map of it fits the picture.
    Drawn images of MNIST's size, and those of data/, stay as they are but for their colours; pixels that are repeated,
    as in a run's image_test.png, are taken once.

    Args:
        pixels: (H, W, 3) uint8: dark ink on light paper, in any light, or light ink on a dark ground.

    Returns:
        (h, w) uint8.

    Raises:
        UserError: There is no ink.
    """
    grey = without_repeats(np.asarray(Image.fromarray(pixels).convert("L")))
    drawn = grey if np.median(grey) <= 127 else 255 - grey
    if drawn.max() == 0:
        raise UserError("no digit is found")
    if np.median(drawn) == 0 and max(grey.shape) <= MAX_CLUTTER_SIDE and not is_large(drawn):
        return np.rint(resize_to_stride(drawn, drawn.shape)).astype(np.uint8)
    ink, sheet = find_ink(pixels)
    mask = find_digit(ink, sheet)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise UserError("no digit is found")
    side = max(rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1)
    scale = min(DIGIT_SIDE / side, MAX_RESULT_SIDE / max(ink.shape))
    width = mask.sum() / morphology.skeletonize(mask).sum()  # of the strokes
    thicken = morphology.disk(max(0, round((STROKE * side - width) / 2)))
    ink = morphology.dilation(ink * morphology.dilation(mask, morphology.disk(2)), thicken)
    digit = resize_to_stride(ink, np.multiply(ink.shape, scale))
    return np.rint(255 * (digit / digit.max()).clip(0, 1)).astype(np.uint8)


def resize_to_stride(image, shape):
    """Scales (H, W) to about that shape: to multiples of LeNet's stride, in proportions as near as these allow."""
    stride, longer = RECEPTIVE_FIELD["stride"], max(shape)
    scale = stride * round(longer / stride) / longer
    shape = tuple(stride * max(2, round(scale * length / stride)) for length in shape)
    if image.shape == shape:
        return image
    return transform.resize(image, shape, preserve_range=True, anti_aliasing=True)


def is_large(drawn):
    """Whether most ink of a drawn image (H, W) is one digit that is larger than MNIST's."""
    mask = drawn > drawn.max() / 2
    part = largest_part(mask)
    return max(part.image.shape) > 1.5 * DIGIT_SIDE and part.area > 0.8 * mask.sum()


def find_ink(pixels):
    """How dark the ink is against the paper around it, (h, w), 0..1, and a mask (h, w) of the sheet, or of all."""
    scale = min(1, WORKING_SIDE / max(pixels.shape[:2]))
    shape = [max(1, round(scale * length)) for length in pixels.shape[:2]]
    picture = transform.resize(pixels, shape, anti_aliasing=True)  # (h, w, 3), 0..1
    grey, lightest = color.rgb2gray(picture), picture.max(axis=2).round(6)
    ground = filter_by_square(ndimage.grey_opening, lightest, max(shape) // 4 | 1)
    middle = (lightest.max() + lightest.min()) / 2
    if ground.max() < middle and not is_sheet(lightest >= middle):  # light ink
        return (lightest - ground) / (1.2 - ground), np.ones(shape, bool)
    light = lightest >= filters.threshold_otsu(lightest)
    without_threads = morphology.isotropic_opening(light, max(shape) // 60)
    part = largest_part(without_threads if without_threads.any() else light)
    sheet = np.zeros(shape, bool)
    sheet[part.slice] = part.image_filled
    closed = filter_by_square(ndimage.grey_closing, grey, max(shape) // 6 | 1)
    paper = np.minimum(closed, fill(grey))
    # With the 0.2, the texture of a dark desk does not count as ink.
    return (paper - grey) / (paper + 0.2), sheet


def filter_by_square(function, image, side):
    """Opening or closing of (h, w) by a square, the image's edges repeated."""
    return function(np.pad(image, side, mode="edge"), side)[side:-side, side:-side]


def fill(image):
    """Fills what is dark and enclosed in (h, w), up to the level at which water would flow off the picture."""
    seed = np.full_like(image, image.max())
    seed[[0, -1]], seed[:, [0, -1]] = image[[0, -1]], image[:, [0, -1]]
    return morphology.reconstruction(seed, image, method="erosion")


def largest_part(mask):
    """The largest connected part of a mask (h, w), as scikit-image's `RegionProperties`."""
    return max(measure.regionprops(measure.label(mask)), key=lambda part: part.area)


def is_thin(mask):
    """Whether a mask (h, w) can be the strokes of a digit: no circle in it is wide."""
    return 2 * ndimage.distance_transform_edt(np.pad(mask, 1)).max() < MAX_STROKE * max(mask.shape)


def is_sheet(light):
    """Whether the largest light part of (h, w) is a sheet: wide, or around a digit. (The holes of an 8 are convex.)"""
    part = largest_part(light)
    holes = measure.regionprops(measure.label(part.image_filled & ~light[part.slice]))
    large = [hole for hole in holes if max(hole.image.shape) > 0.1 * max(part.image.shape)]
    return not is_thin(part.image) or any(hole.solidity < 0.75 for hole in large)


def find_digit(ink, sheet):
    """Where the digit is, (h, w): the strokes with most ink on the sheet, and those near them that are as dark.

    Strokes at the border of the picture count only if there are no others.
    """
    mask = ink > max(ink.max() / 2, MIN_INK)
    inside = segmentation.clear_border(mask)
    labels = measure.label(inside if inside.any() else mask)  # (h, w): 0 no ink, 1, 2 ...
    parts = measure.regionprops(labels, ink)
    parts = [part for part in parts if is_thin(part.image)] or parts
    if not parts:
        return mask
    on_sheet = np.where(sheet, 1, 0.2)  # in uneven light, the sheet is only the lighter part of the paper
    weights = np.bincount(labels.ravel(), (on_sheet * ink).ravel())
    main = max(parts, key=lambda part: weights[part.label])
    reach = max(main.image.shape) / 2
    low, high = np.subtract(main.bbox[:2], reach), np.add(main.bbox[2:], reach)
    found = [
        part.label
        for part in parts
        if weights[part.label] > 0.1 * weights[main.label]
        and part.intensity_mean > 0.75 * main.intensity_mean
        and ((low < part.centroid) & (part.centroid < high)).all()
    ]
    return np.isin(labels, found)


def without_repeats(grey):
    """Undoes an enlargement of an image (H, W) that repeated each pixel, but not to less than a digit."""
    side = math.gcd(*grey.shape)
    for times in range(min(side, max(grey.shape) // DIGIT_SIDE), 1, -1):
        if side % times == 0:
            small = grey[::times, ::times]
            if np.array_equal(small.repeat(times, axis=0).repeat(times, axis=1), grey):
                return small
    return grey

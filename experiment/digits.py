"""Photos of handwritten digits, as a network for MNIST wants them."""

import math

import numpy as np
from PIL import Image
from skimage import filters, measure, morphology, segmentation, transform

from experiment.files import UserError

DIGIT_SIDE = 20  # pixels: the longer side of an MNIST digit
MAX_CLUTTER_SIDE = 100  # pixels: the longer side of an image that may have clutter around the digit, as those of data/
STROKE = 0.1  # of that side: the width of a stroke, at least
MIN_INK = 0.05  # what is fainter is noise of the paper
WORKING_SIDE = 400  # pixels: the longer side at which the ink is looked for
MAX_RESULT_SIDE = 1000  # pixels: the longer side of the result


def preprocess_digit(pixels):
    """A picture of one digit as LeNet expects it: light on black, 20 pixels high or wide.

    The whole picture is kept, so that a map of it fits the picture. Drawn images of MNIST's size, and those of data/,
    stay as they are but for their colours; pixels that are repeated, as in a run's image_test.png, are taken once.

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
        return drawn
    ink, light = find_ink(pixels)
    mask = find_digit(ink, light)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise UserError("no digit is found")
    side = max(rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1)
    scale = min(DIGIT_SIDE / side, MAX_RESULT_SIDE / max(ink.shape))
    width = mask.sum() / morphology.skeletonize(mask).sum()  # of the strokes
    thicken = morphology.disk(max(0, round((STROKE * side - width) / 2)))
    ink = morphology.dilation(ink * morphology.dilation(mask, morphology.disk(2)), thicken)
    shape = [max(8, round(length * scale)) for length in ink.shape]
    digit = transform.resize(ink, shape, anti_aliasing=True)
    return np.rint(255 * (digit / digit.max()).clip(0, 1)).astype(np.uint8)


def is_large(drawn):
    """Whether most ink of a drawn image (H, W) is one digit that is larger than MNIST's."""
    regions = measure.regionprops(measure.label(drawn > drawn.max() / 2, connectivity=2))
    largest = max(regions, key=lambda region: region.area, default=None)
    if largest is None:
        return False
    height, width = largest.image.shape
    return max(height, width) > 1.5 * DIGIT_SIDE and largest.area > 0.8 * sum(region.area for region in regions)


def find_ink(pixels):
    """How dark the ink is against the paper around it, (h, w), 0..1, and a mask of the sheet (h, w), or of all."""
    scale = min(1, WORKING_SIDE / max(pixels.shape[:2]))
    shape = [max(1, round(scale * length)) for length in pixels.shape[:2]]
    picture = transform.resize(pixels, shape, anti_aliasing=True)  # (h, w, 3), 0..1
    darkest, lightest = picture.min(axis=2), picture.max(axis=2)  # of the colours: ink of any colour is dark
    side = max(3, max(shape) // 4 | 1)  # pixels, more than the width of a stroke
    ground = filter_by_square(morphology.opening, lightest, side)
    if ground.max() < (lightest.max() + lightest.min()) / 2:  # nothing light is wider than a stroke: light ink
        return (lightest - ground) / (1.2 - ground), np.ones(shape, bool)
    paper = filter_by_square(morphology.closing, darkest, side)
    # With the 0.2, the texture of a dark desk does not count as ink.
    return (paper - darkest) / (paper + 0.2), paper > filters.threshold_otsu(paper.round(6))


def filter_by_square(function, image, side):
    """Opening or closing of (h, w) by a square, the image's edges repeated."""
    padded = np.pad(image, side, mode="edge")
    footprint = morphology.footprint_rectangle((side, side), decomposition="separable")
    return function(padded, footprint)[side:-side, side:-side]


def find_digit(ink, light):
    """Where the digit is, (h, w): ink that is not at the border of the picture, is on the sheet, and is no speck."""
    labels = measure.label(ink > max(ink.max() / 2, MIN_INK), connectivity=2)  # (h, w): 0 no ink, 1, 2 ...
    sheets = measure.label(segmentation.clear_border(light))
    sizes = np.bincount(sheets[sheets > 0], minlength=1)
    sheet = sheets == sizes.argmax() if sizes.max() > 0.1 * ink.size else np.ones_like(light)
    for kept in (segmentation.clear_border(labels) > 0, np.isin(labels, np.unique(labels[sheet]))):
        if (labels[kept] > 0).any():
            labels = np.where(kept, labels, 0)
    sizes = np.bincount(labels[labels > 0], minlength=1)
    return (sizes > 0.1 * sizes.max())[labels]


def without_repeats(grey):
    """Undoes an enlargement of an image (H, W) that repeated each pixel, but not to less than a digit."""
    side = math.gcd(*grey.shape)
    for times in range(min(side, max(grey.shape) // DIGIT_SIDE), 1, -1):
        if side % times == 0:
            small = grey[::times, ::times]
            if np.array_equal(small.repeat(times, axis=0).repeat(times, axis=1), grey):
                return small
    return grey

"""Random distortions of training images: turned, zoomed and bent a little, a digit is the same digit."""

import numpy as np
from skimage import transform

KNOTS = 8  # along each side of an image: a displacement is random at each, smooth in between


def distort(images, rng, rotation, zoom, bend):
    """Turns and zooms each image about its centre, and bends it (elastic distortion, Simard et al. 2003).

    Args:
        images: (N, H, W, 1) uint8.
        rng: NumPy random generator.
        rotation: Largest angle, degrees.
        zoom: Largest logarithm of the factors by which width and height, each for itself, grow.
        bend: Standard deviation of the displacements at the knots, pixels.

    Returns:
        (N, H, W, 1) uint8: bilinear, and black where there was no image.
    """
    number, height, width, _ = images.shape
    angle = np.deg2rad(rng.uniform(-rotation, rotation, (number, 1, 1))).astype(np.float32)
    wider, higher = np.exp(rng.uniform(-zoom, zoom, (2, number, 1, 1))).astype(np.float32)
    knots = rng.normal(0, bend, (2, number, KNOTS, KNOTS)).astype(np.float32)
    bend_x, bend_y = smooth(height) @ knots @ smooth(width).T  # (N, H, W) each
    # Pixel (x, y) of the result, counted from the centre, is pixel (from_x, from_y) of the image.
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    x, y = np.arange(width, dtype=np.float32) - centre_x, np.arange(height, dtype=np.float32)[:, None] - centre_y
    from_x = centre_x + (np.cos(angle) * x - np.sin(angle) * y) / wider + bend_x
    from_y = centre_y + (np.sin(angle) * x + np.cos(angle) * y) / higher + bend_y

    # Bilinear: a mean of four pixels, by how near they are; of a black frame for what lies outside.
    framed = np.pad(images[:, :, :, 0], ((0, 0), (1, 2), (1, 2)))  # (N, H + 3, W + 3)
    row = width + 3
    from_x, from_y = from_x.clip(-1, width) + 1, from_y.clip(-1, height) + 1  # in the frame
    left, top = np.floor(from_x), np.floor(from_y)
    right_share, lower_share = from_x - left, from_y - top
    corner = np.arange(0, framed.size, row * (height + 3))[:, None, None] + top.astype(int) * row + left.astype(int)
    pixels = framed.ravel()
    upper = pixels[corner] * (1 - right_share) + pixels[corner + 1] * right_share
    lower = pixels[corner + row] * (1 - right_share) + pixels[corner + row + 1] * right_share
    return np.rint(upper * (1 - lower_share) + lower * lower_share).astype(np.uint8)[:, :, :, None]


def smooth(length):
    """Matrix (length, KNOTS) that takes values at the knots to values at pixels, by cubic interpolation."""
    return transform.resize(np.eye(KNOTS, dtype=np.float32), (length, KNOTS), order=3, mode="edge", clip=False)

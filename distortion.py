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
    angles = np.deg2rad(rng.uniform(-rotation, rotation, number)).astype(np.float32)
    wider, higher = np.exp(rng.uniform(-zoom, zoom, (2, number))).astype(np.float32)
    knots = rng.normal(0, bend, (2, number, KNOTS, KNOTS)).astype(np.float32)
    along_y, along_x = smooth(height), smooth(width)
    # Pixel (x, y) of the result, counted from the centre, is pixel (from_x, from_y) of the image.
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    x, y = np.arange(width, dtype=np.float32) - centre_x, np.arange(height, dtype=np.float32)[:, None] - centre_y
    results = np.empty_like(images)
    for i in range(number):  # one by one: arrays of one image stay in the processor's cache
        bend_x, bend_y = along_y @ knots[:, i] @ along_x.T  # (H, W) each
        from_x = centre_x + (np.cos(angles[i]) * x - np.sin(angles[i]) * y) / wider[i] + bend_x
        from_y = centre_y + (np.sin(angles[i]) * x + np.cos(angles[i]) * y) / higher[i] + bend_y
        results[i, :, :, 0] = sample(images[i, :, :, 0], from_x, from_y)
    return results


def sample(image, x, y):
    """Bilinear: at each (x, y) the mean of the four pixels of the image (H, W) around it, by how near they are."""
    height, width = image.shape
    framed = np.pad(image, ((1, 2), (1, 2)))  # black outside
    x, y = x.clip(-1, width) + 1, y.clip(-1, height) + 1  # in the frame
    left, top = x.astype(int), y.astype(int)
    right_share, lower_share = x - left.astype(np.float32), y - top.astype(np.float32)
    row = width + 3
    corner, pixels = top * row + left, framed.ravel()
    upper = pixels[corner] * (1 - right_share) + pixels[corner + 1] * right_share
    lower = pixels[corner + row] * (1 - right_share) + pixels[corner + row + 1] * right_share
    return np.rint(upper * (1 - lower_share) + lower * lower_share)


def smooth(length):
    """Matrix (length, KNOTS) that takes values at the knots to values at pixels, by cubic interpolation."""
    return transform.resize(np.eye(KNOTS, dtype=np.float32), (length, KNOTS), order=3, mode="edge", clip=False)

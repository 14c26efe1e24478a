"""distortion.py against scikit-image, and against what a distortion must keep."""

import numpy as np
import pytest
from skimage import transform

from distortion import KNOTS, distort, smooth


@pytest.fixture
def images():
    noise = np.random.default_rng(0).integers(0, 256, (5, 8, 9)).astype(float)
    return np.stack([transform.resize(picture, (30, 34)) for picture in noise]).astype(np.uint8)[..., None]


def test_nothing_changes_without_distortion(images):
    np.testing.assert_array_equal(distort(images, np.random.default_rng(0), 0, 0, 0), images)


@pytest.mark.parametrize(("rotation", "zoom", "bend"), [(30, 0, 0), (0, 0.5, 0), (0, 0, 2), (20, 0.3, 1)])
def test_pixels_are_those_that_scikit_image_finds(images, rotation, zoom, bend):
    """The same random numbers, drawn in the same order, with scikit-image's `warp` in place of the arithmetic."""
    rng = np.random.default_rng(7)
    angle = np.deg2rad(rng.uniform(-rotation, rotation, (5, 1, 1)))[:, 0, 0]
    wider, higher = np.exp(rng.uniform(-zoom, zoom, (2, 5, 1, 1)))[:, :, 0, 0]
    knots = rng.normal(0, bend, (2, 5, KNOTS, KNOTS))
    distorted = distort(images, np.random.default_rng(7), rotation, zoom, bend)
    assert distorted.shape == images.shape
    assert distorted.dtype == np.uint8
    y, x = np.mgrid[:30, :34] - np.array([14.5, 16.5])[:, None, None]
    for k, image in enumerate(images[..., 0]):
        bend_x, bend_y = (transform.resize(part[k], (30, 34), order=3, mode="edge", clip=False) for part in knots)
        from_x = (np.cos(angle[k]) * x - np.sin(angle[k]) * y) / wider[k] + bend_x + 16.5
        from_y = (np.sin(angle[k]) * x + np.cos(angle[k]) * y) / higher[k] + bend_y + 14.5
        expected = transform.warp(image.astype(float), np.stack([from_y, from_x]), order=1, mode="constant")
        difference = np.abs(distorted[k, :, :, 0] - expected)
        # 0.5 by rounding; scikit-image blends the last half pixel at the edge otherwise, so the frame is left out.
        inside = (from_x >= 0) & (from_x <= 33) & (from_y >= 0) & (from_y <= 29)
        assert difference[inside].max() < 0.51
        far = (from_x < -1) | (from_x > 34) | (from_y < -1) | (from_y > 30)
        assert not distorted[k, far].any()


def test_every_image_is_distorted_in_its_own_way():
    images = np.zeros((40, 21, 21, 1), np.uint8)
    images[:, 2:4, 9:12] = 200
    distorted = distort(images, np.random.default_rng(0), 10, 0.12, 1.5)
    assert len({picture.tobytes() for picture in distorted}) == 40


def test_knots_are_interpolated_smoothly():
    matrix = smooth(100)
    assert matrix.shape == (100, KNOTS)
    values = np.sin(np.arange(KNOTS) / 3)
    knots = (np.arange(KNOTS) + 0.5) * 100 / KNOTS - 0.5  # half-pixel centres
    inner = slice(round(knots[1]), round(knots[-2]))
    np.testing.assert_allclose(
        (matrix @ values)[inner], np.sin(((np.arange(100) + 0.5) * KNOTS / 100 - 0.5) / 3)[inner], atol=0.05
    )

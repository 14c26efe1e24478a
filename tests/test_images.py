"""images.py: image files of any format, orientation and bit depth, and arrays."""

import numpy as np
import pytest
from conftest import encoded
from PIL import Image

from experiment.files import UserError
from experiment.images import MAX_PICTURE_SIDE, read_picture


def test_transparent_pixels_become_white(tmp_path):
    ink = np.zeros((20, 30, 4), np.uint8)  # black everywhere, but only a stroke of it opaque
    ink[5:15, 10:12, 3] = 255
    expected = np.full((20, 30, 3), 255, np.uint8)
    expected[5:15, 10:12] = 0
    rgba = Image.fromarray(ink)
    rgba.save(tmp_path / "rgba.png")
    rgba.convert("LA").save(tmp_path / "la.png")
    rgba.save(tmp_path / "rgba.webp", lossless=True)
    palette = Image.fromarray((ink[:, :, 3] > 0).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 0, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(read_picture(path).pixels, expected, err_msg=path.name)
    np.testing.assert_array_equal(read_picture(ink).pixels, expected)


@pytest.mark.parametrize(
    ("values", "dtype", "suffix"),
    [
        ((0, 2048, 4095), np.uint16, "png"),  # 12 bits in 16
        ((30000, 45000, 60000), np.uint16, "tif"),
        ((-1000, 0, 1000), np.int32, "tif"),
        ((0, 0.25, 0.5), np.float32, "tif"),
    ],
)
def test_more_than_8_bits_are_scaled_by_their_own_range(tmp_path, values, dtype, suffix):
    image, path = np.tile(np.array(values, dtype), (4, 1)), tmp_path / f"deep.{suffix}"
    Image.fromarray(image).save(path)
    pixels = read_picture(path).pixels
    assert pixels.shape == (4, 3, 3)
    np.testing.assert_allclose(pixels[0, :, 0], [0, 127.5, 255], atol=1)
    np.testing.assert_array_equal(read_picture(image).pixels, pixels)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_a_photo_is_turned_upright(tmp_path, suffix):
    image = np.zeros((20, 30, 3), np.uint8)
    image[:10] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: its top is at the right
    Image.fromarray(image).save(tmp_path / f"photo.{suffix}", exif=exif)
    picture = read_picture(tmp_path / f"photo.{suffix}")
    assert (picture.height, picture.width) == (30, 20)
    np.testing.assert_allclose(picture.pixels, np.rot90(image, -1), atol=8)


def test_a_large_picture_is_scaled_down(tmp_path):
    ramp = np.linspace(0, 255, 4000).astype(np.uint8)[None, :, None].repeat(3000, axis=0).repeat(3, axis=2)
    for suffix, kind in (("jpg", "JPEG"), ("png", "PNG")):
        (tmp_path / f"photo.{suffix}").write_bytes(encoded(ramp, kind))
        picture = read_picture(tmp_path / f"photo.{suffix}")
        assert (picture.height, picture.width) == (3000, 4000)
        assert picture.pixels.shape == (MAX_PICTURE_SIDE * 3 // 4, MAX_PICTURE_SIDE, 3)
        np.testing.assert_allclose(picture.pixels[300, :, 1], np.linspace(0, 255, MAX_PICTURE_SIDE), atol=2)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_an_array_is_a_picture(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = image.reshape(5, 7, -1) * np.ones(3, np.uint8)
    np.testing.assert_array_equal(read_picture(image).pixels, expected)


def test_array_that_is_no_image_is_refused():
    shapes = np.zeros((5, 7, 2, 3), np.uint8), np.zeros((5, 7, 3)), np.zeros(5, np.uint8)
    for array in (*shapes, np.full((5, 7), np.nan, np.float32)):
        with pytest.raises(UserError, match="the array is not a readable image") as error:
            read_picture(array)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"text", encoded(np.zeros((50, 50, 3), np.uint8))[:400]])
def test_damaged_file_is_named(tmp_path, content):
    (tmp_path / "damaged.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.jpg is not a readable image"):
        read_picture(tmp_path / "damaged.jpg")

"""Pictures on disk: the test images and their heatmaps, and rows of pictures with titles."""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from cam import overlay, upsample
from experiment.files import atomic_write

PICTURE_SIDE = 400  # pixels, about: pictures are enlarged by a whole number
MIN_CELL = 64  # pixels, of a picture's place in a grid
GAP = 8  # pixels between two pictures
MAX_TITLE = 60  # characters
EVIDENCE_COLORMAP = "seismic"  # blue, white, red: also the colour-blind can tell its ends apart
load_default_font = lru_cache(ImageFont.load_default)


def save_images(out, images):
    """Writes `img_S/image_test.png` of each of the S test images (H, W, 1 or 3)."""
    for index, image in enumerate(images):
        (out / f"img_{index}").mkdir(parents=True, exist_ok=True)
        save_picture(to_image(enlarge(image)), out / f"img_{index}" / "image_test.png")


def save_heatmaps(out, step, images, heatmaps):
    """Writes `img_S/cmap_STEP.png`: S heatmaps (H, W), 0..1, over S images (H, W, 1 or 3)."""

    def save(index):
        picture = to_image(enlarge(overlay(images[index], heatmaps[index])))
        save_picture(picture, out / f"img_{index}" / f"cmap_{step}.png")

    with ThreadPoolExecutor() as pool:  # zlib releases the interpreter lock
        list(pool.map(save, range(len(images))))


def enlarge(picture, side=PICTURE_SIDE):
    """Repeats each pixel, so that the longer side has about `side`: (H, W, ...) -> (n H, n W, ...)."""
    times = max(1, round(side / max(picture.shape[:2])))
    return picture.repeat(times, axis=1).repeat(times, axis=0)


def save_picture(picture, path):
    """Writes a Pillow image as a PNG."""
    with atomic_write(path) as part:
        picture.save(part, compress_level=1)  # level 6 takes three times as long for a tenth less


def to_image(picture):
    """Pillow image of (H, W), (H, W, 1) or (H, W, 3) uint8."""
    return Image.fromarray(picture[:, :, 0] if picture.shape[2:] == (1,) else picture)


def fit(picture, side):
    """Scales a Pillow image so that its longer side has `side` pixels; enlarged pixels stay squares."""
    scale = side / max(picture.size)
    return picture.resize([max(1, round(scale * length)) for length in picture.size], Image.Resampling.BOX)


def draw_box(picture, box, width):
    """Draws a box, in pixels of an image of that width, on an enlarged Pillow image of it. None draws nothing."""
    if box:
        x0, y0, x1, y1 = (edge * picture.width / width for edge in box)
        box = x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)
        for color, line in (("black", 3), ("white", 2)):  # to be seen on any ground
            ImageDraw.Draw(picture).rectangle(box, outline=color, width=line)


def on_one_scale(image, maps, side, boxes=()):
    """Pillow images of an image (H, W, 1 or 3), of its maps (h, w, n) laid over it on one scale, and of that scale.

    Red is evidence for the class, blue evidence against it, and the stronger it is, the more it covers the image, which
    is grey. Each picture has `side` pixels on its longer side.
    """
    picture = fit(to_image(image), side)
    width, height = picture.size
    grey = np.asarray(picture.convert("L").convert("RGB"))
    if image.shape[2] == 1 and np.median(grey) < 32:  # digits, white on black, on which colors would not show
        grey = 255 - grey // 3
    limit = max(np.abs(maps).max(), np.finfo(np.float32).tiny)
    upsampled = upsample(maps[None], height, width)[0] / limit  # (H, W, n), -1..1
    pictures = [to_image(overlay_evidence(grey, upsampled[:, :, index])) for index in range(maps.shape[2])]
    for mapped, box in zip(pictures, boxes, strict=False):
        draw_box(mapped, box, image.shape[1])
    return [picture, *pictures, color_scale(limit, max(width, MIN_CELL), max(height, MIN_CELL))]


def overlay_evidence(grey, evidence):
    """Overlays a map (H, W), -1..1, on a grey image (H, W, 3) uint8; nothing is drawn where it is zero."""
    evidence = evidence.clip(-1, 1)
    return overlay(grey, (1 + evidence) / 2, EVIDENCE_COLORMAP, opacity=np.abs(evidence)[:, :, None])


def color_scale(limit, width, height):
    """A picture of the colors from -limit to limit."""
    values = np.linspace(1, -1, height)[:, None].repeat(width // 4, axis=1)
    bar = overlay_evidence(np.full((*values.shape, 3), 255, np.uint8), values)
    picture = Image.new("RGB", (width, height), "white")
    picture.paste(Image.fromarray(bar))
    draw, font = ImageDraw.Draw(picture), load_default_font(max(8, width // 8))
    for share, value in ((0.08, limit), (0.5, 0), (0.92, -limit)):
        draw.text((width * 0.3, height * share), f"{value:.4g}", "black", font, anchor="lm")
    return picture


def save_grid(path, rows):
    """Writes rows of (Pillow image, title, color of the title) as one picture."""
    rows = [[(picture, shorten(title), color) for picture, title, color in row] for row in rows]
    sizes = [picture.size for row in rows for picture, _, _ in row]
    width, height = (max(MIN_CELL, *lengths) for lengths in zip(*sizes, strict=True))  # room for all, and for titles
    size = min(28, width // 8, height // 3)
    longest = max(load_font(size, title).getlength(title) for row in rows for _, title, _ in row)
    title_size = min(size, 0.95 * size * width / longest)
    title_height = 2 * size  # pixels
    grid = Image.new("RGB", (max(map(len, rows)) * (width + GAP), len(rows) * (title_height + height)), "white")
    draw = ImageDraw.Draw(grid)
    for y, row in enumerate(rows):
        for x, (picture, title, color) in enumerate(row):
            left, top = x * (width + GAP), y * (title_height + height)
            grid.paste(picture, (left + (width - picture.width) // 2, top + title_height))
            middle = left + width // 2, top + title_height // 2
            draw.text(middle, title, color, load_font(title_size, title), anchor="mm")
    save_picture(grid, path)


def shorten(title):
    """A title of a length that can be read in a grid."""
    return title if len(title) <= MAX_TITLE else f"{title[: MAX_TITLE // 2 - 1]}...{title[2 - MAX_TITLE // 2 :]}"


def load_font(size, text):
    """Pillow's font, or for other scripts one of this machine that has them; what none has, is drawn as boxes."""
    characters = set(map(ord, text))
    if max(characters, default=0) < 0x80:
        return load_default_font(size)
    fonts = [font for font in font_manager.fontManager.ttflist if (font.style, font.weight) == ("normal", 400)]
    for font in sorted(fonts, key=lambda font: font.name != "DejaVu Sans"):
        if "Last Resort" not in font.name and characters <= font_manager.get_font(font.fname).get_charmap().keys():
            return ImageFont.truetype(font.fname, size)
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)

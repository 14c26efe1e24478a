"""The pictures of a run."""

from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from cam import overlay, upsample
from experiment.files import atomic_write
from experiment.metrics import METRIC_TITLES, SHOWN_METRICS
from experiment.page import write_page

SIDE = 400  # pixels, about: pictures are enlarged by a whole number
MIN_CELL = 64  # pixels, of a picture's place in a grid
STRIP_LENGTH = 6  # maps in a strip
MAX_CLASSES = 10  # in classes.png


def save_images(out, images):
    """Writes `img_S/image_test.png` of each of the test images (S, H, W, 1 or 3)."""
    for index, image in enumerate(images):
        (out / f"img_{index}").mkdir(parents=True, exist_ok=True)
        save_picture(enlarge(image), out / f"img_{index}" / "image_test.png")


def save_heatmaps(out, step, images, heatmaps):
    """Writes `img_S/cmap_STEP.png`: the heatmaps (S, H, W), 0..1, over the images (S, H, W, 1 or 3)."""

    def save(index):
        picture = enlarge(overlay(images[index], heatmaps[index]))
        save_picture(picture, out / f"img_{index}" / f"cmap_{step}.png")

    with ThreadPoolExecutor() as pool:  # zlib releases the interpreter lock
        list(pool.map(save, range(len(images))))


def enlarge(picture, side=SIDE):
    """Repeats each pixel, so that the longer side has about `side`: (H, W, ...) -> (n H, n W, ...)."""
    times = max(1, round(side / max(picture.shape[:2])))
    return picture.repeat(times, axis=1).repeat(times, axis=0)


def save_picture(picture, path):
    """Writes (H, W), (H, W, 1) or (H, W, 3) uint8 as a PNG."""
    with atomic_write(path) as part:
        to_image(picture).save(part, compress_level=1)  # level 6 takes three times as long for a tenth less


def to_image(picture):
    """Pillow image of (H, W), (H, W, 1) or (H, W, 3) uint8."""
    return Image.fromarray(picture[:, :, 0] if picture.shape[2:] == (1,) else picture)


def save_figures(out, cam_model, samples, class_names, history):
    """Writes the figures that sum up a run, and the page.

    img_S/evolution.png    some maps of test image S in one strip, with step and predicted class
    img_S/classes.png      its maps of all classes (of many, the top ten) on one scale about zero, with logits S_c
    overview.png           for each class one image, and its maps through the training
    accuracy.png           accuracy and localization on test images against training images seen

    Args:
        out: Folder of the run.
        cam_model: Model made by `class_activation_model` from the trained model.
        samples: The test images that heatmaps were drawn of, as a `Split`.
        class_names: Names of the C classes.
        history: `RunFolder.history`.
    """
    save_accuracy(out / "accuracy.png", history)
    # Most happens early: steps at about equal ratios, the first and the last among them.
    positions = np.unique(np.geomspace(1, len(history), STRIP_LENGTH).round().astype(int)) - 1
    rows = [history[position] for position in positions]
    first_of_class = np.unique(samples.labels, return_index=True)[1]
    strips = [strip(out, index, samples.labels[index], rows, class_names) for index in first_of_class]
    save_grid(out / "overview.png", strips, SIDE // 2)
    for index, (image, label) in enumerate(zip(samples.images, samples.labels, strict=True)):
        save_grid(out / f"img_{index}" / "evolution.png", [strip(out, index, label, rows, class_names)])
        logits, maps = (output[0] for output in cam_model.predict_on_batch(image[None]))  # S_c (C,), M_c (h, w, C)
        shown = np.argsort(-logits)[:MAX_CLASSES]
        if len(logits) <= MAX_CLASSES:
            shown.sort()
        titles = [(f"test image {index}: {class_names[label]}", "black")]
        for c in shown:
            color = "black" if c != logits.argmax() else "seagreen" if c == label else "firebrick"
            titles.append((f"{class_names[c]}: S = {logits[c]:z.1f}", color))
        save_class_maps(out / f"img_{index}" / "classes.png", image, maps[:, :, shown], titles)
    write_page(out, samples, class_names, history)


def strip(out, index, label, rows, class_names):
    """Pictures of test image `index`, for `save_grid`: itself, and its maps in some rows of the history."""
    folder = out / f"img_{index}"
    pictures = [(Image.open(folder / "image_test.png"), f"test image {index}: {class_names[label]}", "black")]
    for row in rows:
        predicted = row["predicted"][index]
        color = "black" if predicted == label else "firebrick"
        picture = Image.open(folder / f"cmap_{row['step']}.png")
        pictures.append((picture, f"step {row['step']:,}: {class_names[predicted]}", color))
    return pictures


def save_class_maps(path, image, maps, titles, boxes=()):
    """Writes an image, and over it its maps for several classes, all on one scale, symmetric about zero.

    So the middle colour means "no evidence", colours above it evidence for the class, and colours below it against.

    Args:
        path: File to write.
        image: (H, W, 1 or 3) uint8.
        maps: (h, w, K).
        titles: K + 1 pairs of title and color, the first for the image.
        boxes: A box of each map, in pixels of the image, or None.
    """
    picture = fit(to_image(image), min(max(*image.shape[:2], SIDE // 2), SIDE))
    width, height = picture.size
    limit = max(np.abs(maps).max(), np.finfo(np.float32).tiny)
    heatmaps = (upsample(maps[None], height, width)[0] / limit + 1) / 2  # (H, W, K): 0.5 where a map is zero
    heatmaps = np.moveaxis(heatmaps.clip(0, 1), 2, 0)
    pictures = [picture, *(to_image(overlay(np.asarray(picture), heatmap)) for heatmap in heatmaps)]
    for mapped, box in zip(pictures[1:], boxes, strict=False):
        if box:
            x0, y0, x1, y1 = (edge * width / image.shape[1] for edge in box)
            ImageDraw.Draw(mapped).rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline="white", width=2)
    row = [(one, title, color) for one, (title, color) in zip(pictures, titles, strict=True)]
    row.append((color_scale(limit, max(width, MIN_CELL), max(height, MIN_CELL)), "scale", "black"))
    save_grid(path, [row[start : start + 6] for start in range(0, len(row), 6)])


def fit(picture, side):
    """Scales a Pillow image so that its longer side has `side` pixels; enlarged pixels stay squares."""
    scale = side / max(picture.size)
    return picture.resize([max(1, round(scale * length)) for length in picture.size], Image.Resampling.BOX)


def color_scale(limit, width, height):
    """A picture of the colormap from -limit to limit."""
    values = np.linspace(1, 0, height)[:, None].repeat(width // 4, axis=1)
    bar = overlay(np.zeros(values.shape, np.uint8), values, opacity=1)
    picture = Image.new("RGB", (width, height), "white")
    picture.paste(Image.fromarray(bar))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=max(8, width // 8))
    for share, value in ((0.08, limit), (0.5, 0), (0.92, -limit)):
        draw.text((width * 0.3, height * share), f"{value:.4g}", "black", font, anchor="lm")
    return picture


def save_grid(path, rows, side=None):
    """Writes rows of pictures as one.

    Args:
        path: File to write.
        rows: Lists of (Pillow image, title, color of the title).
        side: Pixels of a picture's longer side in the grid; None for the size that the pictures have.
    """
    width, height = fit(rows[0][0][0], side or max(rows[0][0][0].size)).size
    width, height = max(width, MIN_CELL), max(height, MIN_CELL)  # room for the title of a very narrow picture
    size = min(28, width // 8)
    longest = max(load_font(size, title).getlength(title) for row in rows for _, title, _ in row)
    title_size = min(size, 0.95 * size * width / longest)
    title_height, gap = 2 * size, 8  # pixels
    grid = Image.new("RGB", (max(map(len, rows)) * (width + gap), len(rows) * (title_height + height)), "white")
    draw = ImageDraw.Draw(grid)
    for y, row in enumerate(rows):
        for x, (picture, title, color) in enumerate(row):
            left, top = x * (width + gap), y * (title_height + height)
            grid.paste(fit(picture, max(width, height)), (left, top + title_height))
            middle = left + width // 2, top + title_height // 2
            draw.text(middle, title, color, load_font(title_size, title), anchor="mm")
    save_picture(np.asarray(grid), path)


def load_font(size, text):
    """Pillow's font, or for other scripts one of this machine that has them; what none has, is drawn as boxes."""
    characters = set(map(ord, text))
    if max(characters, default=0) < 0x80:
        return ImageFont.load_default(size)
    fonts = [font for font in font_manager.fontManager.ttflist if (font.style, font.weight) == ("normal", 400)]
    for font in sorted(fonts, key=lambda font: font.name != "DejaVu Sans"):
        if "Last Resort" not in font.name and characters <= font_manager.get_font(font.fname).get_charmap().keys():
            return ImageFont.truetype(font.fname, size)
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def save_accuracy(path, history):
    """Plots accuracy and localization on test images against training images seen."""
    *earlier, last = history
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=120, layout="constrained")
    for name in SHOWN_METRICS:
        column, title = f"test_{name}", METRIC_TITLES[name]
        if column not in last:
            continue
        label = f"{title}, all {last['test_images']:,} images: {last[column]:.2%}"
        points = axes.plot(last["images"], 100 * last[column], "D", label=label)
        if earlier:
            images, values = zip(*((row["images"], 100 * row[column]) for row in earlier), strict=True)
            label = f"{title}, the first {earlier[0]['test_images']:,}"
            axes.plot(images, values, ".-", color=points[0].get_color(), label=label)
    axes.set(xlabel="training images seen", ylabel="test images (%)", ylim=(0, 100))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=5)  # so that millions do not run into each other
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with atomic_write(path) as part:
        figure.savefig(part)
    plt.close(figure)

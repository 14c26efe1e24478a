"""Reads the true boxes of photos: half-open, in pixels of the upright photo. A photo can have several.

boxes.csv      lines "file,x0,y0,x1,y1", with that header; `file` is relative to the folder of boxes.csv
any name.xml   Pascal VOC, for the photo of the same name, beside it or in a folder of annotations; xmin, ymin, xmax and
               ymax are taken as half-open
"""

import csv
import io
import posixpath
from collections import defaultdict
from xml.etree import ElementTree

import numpy as np

from data.archive import printable, read_bytes
from experiment.files import UserError

BOXES_CSV = "boxes.csv"
HEADER = ["file", "x0", "y0", "x1", "y1"]


def read_boxes(archive, tables, photos, used, class_names):
    """Reads all boxes of some photos.

    Args:
        archive: Path of the folder or archive, for messages.
        tables, photos: The files boxes.csv and .xml, and all photos, as `File`s.
        used: The photos to use, with their sizes.
        class_names: Class folder -> name of the class.

    Returns:
        Name of a photo -> its boxes, (n, 4) float64. Where objects in an .xml have a name of the photo's class, the
        others are left out. And the names of the boxes that belong to no photo, or not clearly to one.

    Raises:
        UserError: A table is broken, boxes are not in pixels, or no box belongs to a photo.
    """
    by_stem = defaultdict(list)
    for photo in photos:
        by_stem[stem(photo.name)].append(photo.name)
    rows = []
    for table in tables:
        source = f"{archive}: {printable(table.name)}"
        found = read_csv(source, table) if table.name.endswith(BOXES_CSV) else read_voc(source, table, by_stem)
        if found and all(0 <= value <= 1 for *_, corners in found for value in corners):
            raise UserError(f"{source}: all values are in 0..1; boxes are in pixels")
        rows += found
    known = {photo.name for photo in photos}
    strangers = [name for _, name, _, _ in rows if name not in known]
    if rows and len(strangers) == len(rows):
        names = f"there are boxes of {printable(strangers[0])}, and photos such as {printable(min(known))}"
        raise UserError(f"{archive}: no box belongs to a photo: {names}")
    objects, sizes = defaultdict(list), {photo.name: photo for photo in used}
    for where, name, kind, (x0, y0, x1, y1) in rows:
        if photo := sizes.get(name):
            if kind is not None and x1 <= photo.width + 1 and y1 <= photo.height + 1:
                x1, y1 = min(x1, photo.width), min(y1, photo.height)  # some tools count pixels from 1
            if not (0 <= x0 < x1 <= photo.width and 0 <= y0 < y1 <= photo.height):
                size = f"{photo.width} x {photo.height} pixels"
                raise UserError(f"{where}: no box in {printable(name)}, which has {size}")
            objects[photo].append((kind, [x0, y0, x1, y1]))
    boxes = {}
    for photo, found in objects.items():
        of_class = [corners for kind, corners in found if kind in (None, photo.folder, class_names[photo.folder])]
        boxes[photo.name] = np.array(of_class or [corners for _, corners in found])
    return boxes, strangers


def read_csv(source, table):
    """The boxes in a file boxes.csv: a list of (file and line, name of the photo, None, corners)."""
    folder, boxes = posixpath.dirname(table.name), []
    rows = csv.reader(io.TextIOWrapper(io.BytesIO(read_bytes(table)), "utf-8-sig", newline=""))
    try:
        if next(rows, None) != HEADER:
            raise ValueError(f"the header must be {','.join(HEADER)}")
        for row in filter(None, rows):
            if len(row) != 5:
                raise ValueError(f"{len(row)} values, not 5")
            name = posixpath.normpath(posixpath.join(folder, row[0].replace("\\", "/")))
            boxes.append((f"{source}, line {rows.line_num}", name, None, [float(value) for value in row[1:]]))
    except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{source}, line {max(rows.line_num, 1)}: {error}") from None
    return boxes


def read_voc(source, table, by_stem):
    """The boxes in a Pascal VOC annotation: a list of (file, name of the photo, name of the object, corners).

    The photo has the same stem; of several, it lies beside the annotation, or in a folder of the same name.
    """
    folder, name = posixpath.dirname(table.name), stem(table.name)
    names = by_stem.get(name, [])
    names = [name for name in names if posixpath.dirname(name) == folder] or names
    if len(names) > 1:
        last = posixpath.basename(folder)
        names = [name for name in names if posixpath.basename(posixpath.dirname(name)) == last]
    photo = names[0] if len(names) == 1 else table.name
    try:
        boxes = []
        for found in ElementTree.fromstring(read_bytes(table)).findall("object"):
            corners = [float(found.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax")]
            boxes.append((source, photo, found.findtext("name", "").strip(), corners))
        return boxes
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
        raise UserError(f"{source}: {error}") from None


def stem(name):
    return posixpath.splitext(posixpath.basename(name))[0]

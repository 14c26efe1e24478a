"""caltech256.py, run as a user runs it: on a small archive of coloured shapes, and a little on real photos."""

import csv
import json
import re
import shutil
import tarfile
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from conftest import assert_one_line_error, call, encoded, rows, run, write_tar
from PIL import Image
from skimage import data, draw

import caltech256
import show
from alexnet import alexnet
from cam import class_activation_model, normalize, overlay, upsample
from data.archive import File
from data.photos import load_photos
from experiment.predict import Network, predict_cams

SHAPES = {"001.disc": (220, 40, 40), "002.square": (40, 60, 220), "003.stripes": (30, 200, 60)}
SMALL = ["--weights", "none", "--batch-size", 4, "--eval-every", 2, "--samples", 4]


def shape(category, rng):
    """A photo of a shape somewhere on noise, of a size of its own, and the box of the shape."""
    height, width = rng.integers(60, 110, 2)
    pixels = rng.integers(90, 160, (height, width, 3)).astype(np.uint8)
    y, x, side = rng.integers(20, height - 20), rng.integers(20, width - 20), 14
    rows, columns = np.mgrid[y - side : y + side, x - side : x + side]
    if category == "001.disc":
        rows, columns = draw.disk((y, x), side)
    elif category == "003.stripes":
        rows, columns = rows[::4], columns[::4]
    pixels[rows, columns] = SHAPES[category]
    return pixels, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    rng = np.random.default_rng(0)
    files, lines = {}, ["file,x0,y0,x1,y1"]
    for category in SHAPES:
        for index in range(1, 15):
            name = f"{category}/{category[:3]}_{index:04}.jpg"
            pixels, box = shape(category, rng)
            files[f"256_ObjectCategories/{name}"] = encoded(pixels)
            if index % 4:  # some photos have no boxes, and some have two
                lines += [",".join(map(str, [name, *box]))] + index % 2 * [f"{name},1,1,9,9"]
    files["256_ObjectCategories/boxes.csv"] = "\n".join(lines).encode()
    return write_tar(tmp_path_factory.mktemp("photos") / "shapes.tar", files)


@pytest.fixture(scope="module")
def small_run(archive):
    out = archive.parent / "out"
    process = run("caltech256.py", "--data", archive, "--out", out, "--steps", 3, *SMALL)
    assert process.returncode == 0, process.stderr
    return out, process


@pytest.mark.slow
def test_what_a_run_writes(small_run, archive):
    out, process = small_run
    assert "12 training photos, 30 test photos of 3 classes, 24 test photos with boxes" in process.stdout
    assert "on all 30 test images" in process.stdout
    for sample in range(4):
        assert {path.name for path in (out / f"img_{sample}").glob("cmap_*")} == {f"cmap_{k}.png" for k in (0, 2, 3)}
    for name in "accuracy.png", "index.html", "overview.png", "patterns.png", "run.js", "units.png":
        assert (out / name).exists(), name
    assert (out / "alexnet_classes.txt").read_text() == "disc\nsquare\nstripes\n"
    history = rows(out / "history.csv")
    assert [row["step"] for row in history] == ["0", "2", "3"]
    assert [row["images"] for row in history] == ["0", "8", "12"]
    assert all(0 <= float(row["test_gt_known"]) <= 1 for row in history)
    assert "GT-known localization" in process.stdout
    page = json.loads((out / "run.js").read_text().removeprefix("run = ").removesuffix(";\n"))
    assert page["classes"] == ["disc", "square", "stripes"]
    assert page["labels"] == [0, 1, 2, 0]
    assert [len(boxes) for boxes in page["boxes"]] == [1, 2, 2, 1]  # of the second box of photo 0 the crop has nothing
    assert page["steps"][-1]["gt_known"] == float(history[-1]["test_gt_known"])
    # The picture is that of the photo, in colour, and the map over it is that of the saved model.
    _, test, _, _ = load_photos(archive)
    photo = caltech256.decode(test.files[1], 256, 224)
    picture = np.asarray(Image.open(out / "img_1" / "image_test.png"))
    np.testing.assert_array_equal(picture[::2, ::2], photo)
    _, found = class_activation_model(keras.models.load_model(out / "alexnet.keras")).predict(photo[None], verbose=0)
    heatmap = normalize(upsample(found[..., 1], 224, 224))[0]
    shown = np.asarray(Image.open(out / "img_1" / "cmap_3.png"))[::2, ::2]
    assert np.abs(overlay(photo, heatmap) - shown.astype(int)).mean() < 5  # the training may have been in bfloat16


@pytest.mark.slow
def test_a_model_is_measured_as_show_py_sees_the_photos(small_run, archive, tmp_path):
    """Against boxes that show.py finds for each photo, compared pixel by pixel with the true ones."""
    model = small_run[0] / "alexnet.keras"
    process = call(caltech256, "--evaluate", model, "--data", archive, "--out", tmp_path / "measured")
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "measured" / "confusion.png").exists()
    found = dict(re.findall(r"^ {4,}(\S.*?) +([\d.]+)%", process.stdout, re.MULTILINE))

    with tarfile.open(archive) as members:
        members.extractall(tmp_path, filter="data")
    boxes = {}
    for name, *box in list(csv.reader((tmp_path / "256_ObjectCategories" / "boxes.csv").open()))[1:]:
        boxes.setdefault(name, []).append(tuple(map(int, box)))
    network, correct, localized, top1 = Network(model), 0, 0, 0
    photos = sorted((tmp_path / "256_ObjectCategories").glob("*/*.jpg"))
    for path in photos:
        label = list(SHAPES).index(path.parent.name)
        crop = caltech256.decode(File(path.name, path, 0, path.stat().st_size), 256, 224)
        correct += network.predict(crop)[0].argmax() == label
        for true in [boxes.get(f"{path.parent.name}/{path.name}")]:
            if true is None:
                continue
            cams = predict_cams(path, network, classes=[label])
            x0, y0, x1, y1 = cams.boxes[0] or (0, 0, 0, 0)
            pixels = {(x, y) for x in range(x0, x1) for y in range(y0, y1)}
            others = [{(x, y) for x in range(b[0], b[2]) for y in range(b[1], b[3])} for b in true]
            hit = max(len(pixels & other) / len(pixels | other) for other in others) >= 0.5
            localized += hit
            top1 += hit and predict_cams(path, network, top=1).classes[0] == label
    assert len(photos) == 42
    assert len(boxes) == 33
    assert float(found["accuracy"]) == pytest.approx(100 * correct / 42, abs=0.01)
    assert float(found["GT-known localization"]) == pytest.approx(100 * localized / 33, abs=0.01)
    assert float(found["top-1 localization"]) == pytest.approx(100 * top1 / 33, abs=0.01)
    assert found["top-5 localization"] == found["GT-known localization"]  # of three classes
    assert {"mean IoU", "pointing game", "energy in the box", "MaxBoxAcc", "PxAP"} < set(found)


@pytest.mark.slow
def test_a_folder_of_photos_of_ones_own(tmp_path):
    """Any names, a test set of its own, no boxes; and a fifth of the training photos as validation set."""
    rng = np.random.default_rng(3)
    for part, count in (("train", 6), ("val", 2)):
        for name, category in (("discs", "001.disc"), ("squares", "002.square")):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                Image.fromarray(shape(category, rng)[0]).save(tmp_path / part / name / f"photo {index}.jpeg")
    process = call(caltech256, "--data", tmp_path, "--out", tmp_path / "out", "--steps", 1, *SMALL)
    assert process.returncode == 0, process.stderr
    assert "12 training photos, 4 test photos of 2 classes" in process.stdout
    assert "has no boxes.csv, so localization is not measured" in process.stdout
    assert "GT-known" not in process.stdout
    folded = call(caltech256, "--data", tmp_path, "--out", tmp_path / "out2", "--steps", 1, "--fold", 2, *SMALL)
    assert "10 training photos, 2 test photos of 2 classes" in folded.stdout, folded.stderr


@pytest.mark.slow
def test_a_finished_run_stays_as_it_is(small_run, archive):
    out, _ = small_run
    before = (out / "alexnet.keras").read_bytes()
    process = call(caltech256, "--data", archive, "--out", out, "--steps", 3, *SMALL)
    assert process.returncode == 0
    assert "finished; --fresh deletes it" in process.stdout
    assert (out / "alexnet.keras").read_bytes() == before


@pytest.mark.slow
def test_a_run_continues_bit_for_bit(small_run, archive, tmp_path):
    """Dropout, too: what it leaves out is random, and the state of the run says where that was."""
    out, copy = small_run[0], tmp_path / "out"
    shutil.copytree(out, copy)
    (copy / "alexnet.keras").unlink()
    (copy / "checkpoint.previous.npz").replace(copy / "checkpoint.npz")
    process = call(caltech256, "--data", archive, "--out", copy, "--steps", 3, *SMALL)
    assert "resuming after step 2" in process.stdout, process.stderr
    models = [keras.models.load_model(folder / "alexnet.keras") for folder in (out, copy)]
    for found, wanted in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.slow
def test_a_run_is_not_resumed_with_other_photos(small_run, archive, tmp_path):
    out, _ = small_run
    arguments = ["--out", out, "--steps", 3, *SMALL]
    assert_one_line_error(
        call(caltech256, *arguments, "--data", archive, "--test-share", 0.5), "--test-share None, not 0.5"
    )
    whole = archive.read_bytes()
    with tarfile.open(archive) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    try:
        del files["256_ObjectCategories/001.disc/001_0001.jpg"]
        write_tar(archive, files)
        process = call(caltech256, *arguments, "--data", archive)
        assert_one_line_error(process, f"{archive} has changed since {out} was begun", "--fresh")
    finally:
        archive.write_bytes(whole)


@pytest.mark.slow
def test_models_that_cannot_be_measured(small_run, archive, tmp_path):
    out, _ = small_run
    for name in "alexnet.keras", "alexnet_images.json":
        shutil.copy(out / name, tmp_path)
    names = tmp_path / "alexnet_classes.txt"

    def evaluate():
        return call(caltech256, "--evaluate", tmp_path / "alexnet.keras", "--data", archive, "--out", tmp_path)

    names.write_text("disc\nsquare\n")
    assert_one_line_error(evaluate(), f"{names} has 2 lines; the model has 3 classes")
    names.write_text("disc\nsquare\nstripes\n")
    (tmp_path / "alexnet_images.json").write_text('{"short_side": 300}')
    assert_one_line_error(evaluate(), "alexnet_images.json is not", '"short_side": 256}')


@pytest.mark.slow
def test_a_photo_in_maps_out(small_run, tmp_path):
    out, _ = small_run
    pixels, _ = shape("002.square", np.random.default_rng(1))
    pixels = pixels.repeat(8, axis=0).repeat(8, axis=1)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    model = out / "alexnet.keras"
    process = call(show, tmp_path / "photo.png", "--model", model, "--top", 3, "--npy", "--out", tmp_path)
    assert process.returncode == 0, process.stderr
    found = re.findall(r"^ +(\w+) +S = .*box (\d+) (\d+) (\d+) (\d+)$", process.stdout, re.MULTILINE)
    assert {name for name, *_ in found} <= {"disc", "square", "stripes"}
    boxes = np.array([box for _, *box in found], int)
    assert (boxes[:, 2] <= pixels.shape[1]).all()
    assert (boxes[:, 3] <= pixels.shape[0]).all()
    # The network saw all of the photo, at 256 pixels on its short side.
    short, long = sorted(pixels.shape[:2])
    cells = sorted(np.load(tmp_path / "cam_photo.npy").shape[1:])
    assert cells[0] == 15
    assert abs(cells[1] - 15 * long / short) <= 1


@pytest.mark.slow
def test_names_that_do_not_fit_the_model(small_run, tmp_path):
    out, _ = small_run
    names = out / "alexnet_classes.txt"
    text = names.read_text()
    try:
        names.write_text("disc\n")
        process = call(show, out / "img_0" / "image_test.png", "--model", out / "alexnet.keras", "--out", tmp_path)
        assert_one_line_error(process, "alexnet_classes.txt", "1 lines", "3 classes")
    finally:
        names.write_text(text)


def test_bad_input(archive, tmp_path):
    here = ["--out", tmp_path / "out", *SMALL]
    cases = [
        (["--data", tmp_path / "no.tar", *here], ["no.tar is missing"]),
        (["--data", archive, *here, "--weights", tmp_path / "no.npz"], ["no.npz is missing"]),
        (["--data", archive, *here, "--batch-size", 13], ["--batch-size 13", "12"]),
        (["--data", archive, *here, "--fold", 6], ["--fold", "6 is not in 1 to 5"]),
        (["--data", archive, *here, "--evaluate", tmp_path / "no.keras"], ["no.keras is missing"]),
        (["--data", archive, "--evaluate", "a.keras", "--fold", 1], ["all photos of --data, without --fold"]),
        (
            ["--data", archive, *here, "--pretrained-lr-scale", 0.5],
            ["--pretrained-lr-scale is not a setting of the scratch recipe"],
        ),
    ]
    for arguments, parts in cases:
        assert_one_line_error(call(caltech256, *arguments), *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_photo_that_vanishes_during_training(archive, tmp_path):
    with tarfile.open(archive) as members:
        members.extractall(tmp_path, filter="data")
    folder = tmp_path / "256_ObjectCategories"
    program = f"""if True:
        from experiment import process
        process.start()
        import caltech256, pathlib
        def make_batch(train, settings, step, make=caltech256.make_batch):
            if step == 8:  # made ahead, while step 4 is trained or later
                for photo in train.files:
                    (pathlib.Path({str(folder)!r}) / photo.name).unlink()
            return make(train, settings, step)
        caltech256.make_batch = make_batch
        caltech256.main()
    """
    process = run("-c", program, "--data", folder, "--out", tmp_path / "out", "--steps", 10, *SMALL)
    assert_one_line_error(process, "caltech256.py: ", ".jpg", "No such file")
    assert (tmp_path / "out" / "checkpoint.npz").exists()  # of step 2, from which the run can go on


def test_the_batch_of_a_step_depends_on_nothing_else(archive):
    train, _, _, _ = load_photos(archive)
    settings = SimpleNamespace(seed=3, batch_size=5)

    def make(step):
        return caltech256.make_batch(train, settings, step)

    photos, labels = make(7)
    make(2)
    assert photos.shape == (5, 224, 224, 3)
    for first, again in zip((photos, labels), make(7), strict=True):
        np.testing.assert_array_equal(first, again)
    # Four epochs: each photo as often as any other, at places of its own.
    labels = np.concatenate([make(step)[1] for step in range(12)])[:48]
    np.testing.assert_array_equal(np.bincount(labels), [16, 16, 16])
    assert np.abs(make(0)[0].astype(int) - make(12)[0]).max() > 0
    # Batches that are made ahead are the same, in order, and an error in one is raised.
    for step, (photos, labels) in zip(range(5, 15), caltech256.prefetch(make, range(5, 15)), strict=True):
        np.testing.assert_array_equal(photos, make(step)[0])
        np.testing.assert_array_equal(labels, make(step)[1])
    with pytest.raises(ZeroDivisionError):
        list(caltech256.prefetch(lambda step: 1 / (3 - step), range(9)))


def test_fine_tuning_takes_smaller_steps_with_the_old_weights():
    """Early steps of Adam have the size of the rate, whatever the gradient."""
    model = alexnet(3)
    before = model.get_weights()
    settings = SimpleNamespace(learning_rate=1e-3, pretrained_lr_scale=0.25, warmup=0.5, steps=4)
    optimizer = caltech256.make_optimizer(settings)
    model.compile(optimizer, keras.losses.CategoricalCrossentropy(from_logits=True))
    optimizer.build(model.trainable_variables)
    for each in optimizer.optimizers:
        each.iterations.assign(2)  # where the rate is at its peak
    photos = np.random.default_rng(0).integers(0, 256, (2, 100, 100, 3))
    model.train_on_batch(photos.astype(np.float32), np.eye(3)[:2])
    after = zip(model.weights, model.get_weights(), before, strict=True)
    steps = {variable.path: np.abs(now - then).max() for variable, now, then in after}
    assert len(steps) == 13
    for path, step in steps.items():
        share = 0.25 if re.match("conv[1-5]/", path) else 1
        assert step == pytest.approx(share * steps["softmax_weights/kernel"], rel=0.02)


@pytest.mark.slow
def test_it_learns_real_photos(real_data, tmp_path):
    """Three categories, 30 steps of 16 photos: chance is 33%."""
    process = run(
        *("caltech256.py", "--data", real_data / "256_ObjectCategories_10.tar", "--out", tmp_path / "out"),
        *("--weights", real_data / "alexnet_imagenet_conv.npz", "--categories", "coffee-mug", "touring-bike"),
        *("laptop-101", "--steps", 30, "--batch-size", 16, "--eval-every", 30, "--samples", 3),
    )
    assert process.returncode == 0, process.stderr
    assert float(rows(tmp_path / "out" / "history.csv")[-1]["test_accuracy"]) >= 0.8
    # The saved network is that network; and it takes another mug, from elsewhere, for one.
    Image.fromarray(data.coffee()).save(tmp_path / "mug.png")
    model = tmp_path / "out" / "alexnet.keras"
    process = call(show, tmp_path / "mug.png", "--model", model, "--top", 1, "--out", tmp_path)
    assert "coffee-mug" in process.stdout, process.stderr

"""The pages of a run, opened in headless Chromium."""

import base64
import json
import re

import keras
import numpy as np
import pytest
from browser import Browser, find_chromium
from conftest import ROOT

from cam import bounding_box, class_activation_model, normalize, overlay, upsample
from data.dataset import Split, load_dataset
from experiment.pages import MAX_STEPS, Page, write_draw_page
from lenet import lenet, lsuv_init

NAMES = ["zero", "one", "<!--<script>two</script>", "three"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not find_chromium():
        pytest.skip("no Chromium here to open the page in")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(params=[1, 3], ids=["grey", "rgb"])
def samples(request):
    images = np.random.default_rng(1).integers(0, 256, (4, 12, 16, request.param), dtype=np.uint8)
    return Split(images, np.array([3, 1, 3, 0]), np.tile([2, 3, 9, 8], (4, 1)))


@pytest.fixture
def cam_model(samples):
    """Maps of 3 x 4 locations, four classes."""
    keras.utils.set_random_seed(2)
    return class_activation_model(lenet(samples.images.shape[3], 4))


@pytest.fixture
def history(tmp_path):
    """Three evaluations, and their maps."""
    predicted = [[0, 0, 3, 0], [3, 1, 3, 1], [3, 1, 3, 0]]
    (tmp_path / "maps").mkdir()
    for step in (0, 100, 200):
        maps = np.random.default_rng(step).normal(size=(4, 3, 4)).astype(np.float32)
        np.save(tmp_path / "maps" / f"{step}.npy", maps)
    return [
        {"step": 100 * k, "images": 3200 * k, "test_accuracy": k / 2, "test_gt_known": k / 4, "predicted": predicted[k]}
        for k in range(3)
    ]


@pytest.fixture
def page(tmp_path, samples):
    return Page(tmp_path, samples, NAMES)


def content(path):
    """What a page holds."""
    return json.loads(re.search(r"^const run = (.*);$", path.read_text(), re.MULTILINE)[1])


def from_base64(text, dtype=np.uint8):
    return np.frombuffer(base64.b64decode(text), dtype)


def test_the_page_holds_the_run(page, cam_model, history, tmp_path):
    page.renew(cam_model, history, finished=True)
    run = content(tmp_path / "index.html")
    assert [step["step"] for step in run["steps"]] == [0, 100, 200]
    maps = upsample(np.load(tmp_path / "maps" / "200.npy"), 12, 16)
    for found, class_map in zip(run["steps"][2]["boxes"], maps, strict=True):
        assert found is None if bounding_box(class_map) is None else tuple(found) == bounding_box(class_map)
    assert "http" not in (tmp_path / "index.html").read_text()  # nothing is fetched


def test_the_page_holds_the_maps_of_all_classes_and_their_terms(page, samples, cam_model, history, tmp_path):
    page.renew(cam_model, history, finished=True)
    logits, maps = cam_model.predict(samples.images, verbose=0)
    for index, last in enumerate(content(tmp_path / "index.html")["last"]):
        label = samples.labels[index]
        assert last["classes"] == [0, 1, 2, 3]
        np.testing.assert_allclose(last["scores"], logits[index], rtol=1e-4, atol=1e-6)

        def decode(content):
            shades = from_base64(content["maps"]).reshape(-1, 3, 4)
            return content["limit"] * (shades / 127.5 - 1)

        step = maps[index].max() / 100
        np.testing.assert_allclose(decode(last["maps"]), maps[index].transpose(2, 0, 1), atol=np.abs(step))
        *terms, total = decode(last["terms"])
        assert len(terms) == 6
        np.testing.assert_allclose(total, maps[index][:, :, label], atol=last["terms"]["limit"] / 200)
        np.testing.assert_allclose(np.sum(terms, axis=0), total, atol=7 * last["terms"]["limit"] / 200)
        np.testing.assert_allclose(sum(last["parts"]), logits[index, label], rtol=1e-3, atol=1e-6)


def test_of_a_long_run_there_are_as_many_steps_as_fit(page, cam_model, history, tmp_path):
    rows, earlier = [], set()
    for count in (1, 60, 130, 500):
        rows = [history[0] | {"images": k, "step": k} for k in range(count)]
        page.map_file = lambda step: tmp_path / "maps" / "0.npy"
        page.renew(cam_model, rows, finished=True)
        images = [step["images"] for step in content(tmp_path / "index.html")["steps"]]
        assert min(count, MAX_STEPS / 2) <= len(images) <= MAX_STEPS + 1
        assert (images[0], images[-1]) == (0, count - 1)
        assert images == sorted(images)
        steps = set(images[:-1])
        assert not earlier or count < MAX_STEPS or steps & earlier  # thinned out, not chosen anew
        earlier = steps


def test_the_page_without_boxes(page, cam_model, history, tmp_path):
    page.samples = page.samples._replace(boxes=None)
    page.renew(cam_model, [{k: v for k, v in row.items() if k != "test_gt_known"} for row in history], finished=True)
    run = content(tmp_path / "index.html")
    assert {step["gt_known"] for step in run["steps"]} == {None}
    assert run["boxes"] is None


def test_the_page_takes_a_small_share_of_the_time(page, cam_model, history, tmp_path):
    path = tmp_path / "index.html"
    page.renew(cam_model, history[:1])  # the first time it is there at once
    assert len(content(path)["steps"]) == 1
    page.renew(cam_model, history[:2])  # comes too soon
    assert len(content(path)["steps"]) == 1
    page.next_renewal = 0
    page.renew(cam_model, history[:2])
    run = content(path)
    assert len(run["steps"]) == 2
    assert run["running"]["interval"] > 0
    page.renew(cam_model, history, finished=True)
    run = content(path)
    assert len(run["steps"]) == 3
    assert run["running"] is None


def canvas(browser, expression, height, width):
    """The pixels of a canvas, (H, W, 3)."""
    data = browser.evaluate(f"[...({expression}).getContext('2d').getImageData(0, 0, {width}, {height}).data]")
    pixels = np.array(data).reshape(height, width, 4)
    assert (pixels[:, :, 3] == 255).all()
    return pixels[:, :, :3]


def choose(browser, name, value):
    browser.evaluate(f"element({name!r}).value = {value!r}; element({name!r}).dispatchEvent(new Event('change'))")


def state(browser):
    expression = """({
        step: +slider.value, text: element("text").textContent, mark: element("mark").getAttribute("d"),
        shown: figures.map((figure, index) => figure.hidden ? null : index).filter(index => index !== null),
        captions: figures.map(figure => figure.lastChild.textContent + "|" + figure.lastChild.className),
    })"""
    return browser.evaluate(expression)


def test_the_page_in_a_browser(page, samples, cam_model, history, browser, tmp_path):
    page.renew(cam_model, history, finished=True)
    browser.open(tmp_path / "index.html")
    end = state(browser)
    assert end["text"] == "step 200: 6,400 training images seen, accuracy 100.0%, GT-known localization 50.0%"
    assert end["captions"][1] == "image 1: one, predicted one|"
    for _ in range(3):
        browser.press("ArrowLeft")
    start = state(browser)
    assert start["text"].startswith("step 0: 0 training images seen, accuracy 0.0%")
    assert start["captions"][1] == "image 1: one, predicted zero ✗|wrong"
    assert start["mark"] != end["mark"]
    assert start["shown"] == [0, 1, 2, 3]
    browser.click("#wrong")
    assert state(browser)["shown"] == [0, 1]
    browser.click("#wrong")
    choose(browser, "class", "3")
    assert state(browser)["shown"] == [0, 2]
    choose(browser, "class", "")

    browser.evaluate("frame = () => {}")  # the pictures without boxes
    browser.evaluate("document.activeElement.blur()")
    browser.press("ArrowRight")
    assert state(browser)["step"] == 1
    maps = normalize(np.load(tmp_path / "maps" / "100.npy"))[2:3]
    heatmap = normalize(upsample(np.rint(255 * maps), 12, 16)[0])  # the page has the maps in 256 shades
    for colors in ("jet", "viridis"):
        choose(browser, "colors", colors)
        drawn = canvas(browser, "figures[2].firstChild", 12, 16)
        expected = overlay(samples.images[2], heatmap, colors)
        assert np.abs(drawn - expected.astype(int)).max() <= 12  # a shade apart by rounding
    label = browser.evaluate("figures[2].firstChild.getAttribute('aria-label')")
    assert label == "class activation map of image 2, class three, after step 100"

    browser.press("ArrowLeft")
    browser.press(" ")
    assert browser.evaluate("element('play').textContent") == "Pause"
    browser.wait_for("+slider.value === 2 && element('play').textContent === 'Play'")
    browser.click("#play")  # which keeps the focus
    browser.click("#play")
    browser.evaluate("slider.value = 2; show()")
    browser.press("ArrowLeft")
    assert state(browser)["step"] == 1
    browser.press("ArrowLeft", control=True)
    assert state(browser)["step"] == 1
    browser.evaluate("figures[0].focus()")
    browser.press("Enter")
    assert browser.evaluate("large.open && opened === 0")
    assert browser.evaluate("slider.getAttribute('aria-valuetext')") == "step 100"
    browser.press("Escape")
    browser.press(" ")  # the focus is on the image again
    assert browser.evaluate("element('play').textContent") == "Pause"
    assert not browser.evaluate("large.open")


def test_an_image_large(page, samples, cam_model, history, browser, tmp_path):
    page.renew(cam_model, history, finished=True)
    browser.open(tmp_path / "index.html")
    browser.click("#grid figure:nth-of-type(2)")
    captions = "[...document.querySelectorAll('#{} figcaption')].map(caption => caption.textContent)"
    logits, maps = cam_model.predict(samples.images[1:2], verbose=0)
    strip = browser.evaluate(captions.format("strip"))
    assert strip == ["step 0: zero", "step 100: one", "step 200: one"]
    shown = browser.evaluate(captions.format("all"))
    assert [text.split(": ")[0] for text in shown] == [*NAMES, "scale"]
    limit = np.abs(maps).max()
    heatmap = upsample(np.rint(127.5 + 127.5 * maps[..., 3] / limit), 12, 16)[0] / 255
    drawn = canvas(browser, "document.querySelector('#all figure:nth-of-type(4) canvas')", 12, 16)
    assert np.abs(drawn - overlay(samples.images[1], heatmap).astype(int)).max() <= 12
    terms = browser.evaluate(captions.format("terms"))
    assert len(terms) == 8
    assert terms[5].startswith("all others: ")
    assert terms[6].startswith("= map of one: S = ")
    parts = [float(text.replace("\N{MINUS SIGN}", "-").split(": S ")[1]) for text in terms[:6]]
    assert abs(sum(parts) - logits[0, 1]) < 0.05
    browser.press("ArrowLeft")
    assert browser.evaluate("element('title').textContent") == "Image 1: one, after step 100"
    browser.click("#strip figure:nth-of-type(1)")
    assert browser.evaluate("element('title').textContent") == "Image 1: one, after step 0"
    browser.press("Escape")
    assert not browser.evaluate("large.open")


def test_the_page_on_a_telephone(page, cam_model, history, browser, tmp_path):
    page.renew(cam_model, history, finished=True)
    browser.resize(400, 700)
    try:
        browser.open(tmp_path / "index.html")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 400
        browser.click("#grid figure:nth-of-type(1)")
        assert browser.evaluate("large.scrollWidth <= large.clientWidth && large.offsetWidth <= 400")
    finally:
        browser.resize(1200, 900)


def test_an_open_page_follows_the_run(page, cam_model, history, browser, tmp_path):
    page.renew(cam_model, history[:1])
    browser.open(tmp_path / "index.html")
    assert state(browser)["text"].endswith("the run goes on")
    page.next_renewal = 0
    page.renew(cam_model, history[:2])
    browser.wait_for("steps.length === 2")
    assert state(browser)["step"] == 1  # it was at the end, and still is

    browser.press("ArrowLeft")
    browser.click("#wrong")
    choose(browser, "class", "3")
    choose(browser, "colors", "viridis")
    browser.evaluate("document.body.style.height = '3000px'; scrollTo(0, 70); open(2); large.scrollTop = 50")
    browser.evaluate("element('close').focus()")
    kept = "[+slider.value, element('wrong').checked, element('class').value, element('colors').value, opened]"
    before = browser.evaluate(kept)
    scrolled = browser.evaluate("[large.scrollTop]")
    page.renew(cam_model, history, finished=True)
    browser.wait_for("steps.length === 3")
    assert browser.evaluate(kept) == before == [0, True, "3", "viridis", 2]
    assert browser.evaluate("[large.scrollTop]") == scrolled
    assert browser.evaluate("large.open && run.running === null")
    assert browser.evaluate("document.activeElement.id") == "close"
    assert browser.evaluate("location.hash") == ""
    assert "goes on" not in state(browser)["text"]


@pytest.fixture(scope="module", params=["average", "max"])
def drawn_run(request, tmp_path_factory):
    """A run's kept weights at two steps, its test images, and the models: (folder, images, models)."""
    out = tmp_path_factory.mktemp(request.param)
    _, test = load_dataset(ROOT / "data")
    models = []
    (out / "weights").mkdir()
    for step in (0, 100):
        keras.utils.set_random_seed(step)
        model = lenet(pooling=request.param)
        lsuv_init(model, test.images[:32])
        rng = np.random.default_rng(step)
        for name in ("conv1", "conv2"):  # as after some training
            bias = model.get_layer(name).bias
            bias.assign(rng.normal(0, 0.1, bias.shape))
        np.savez(out / "weights" / f"{step}.npz", **{weight.path: np.asarray(weight) for weight in model.weights})
        models.append(model)
    write_draw_page(out, models[-1], test.first(30), 100)
    return out, test.images, models


@pytest.mark.parametrize("position", [0, 1])
def test_the_network_in_the_browser_is_that_of_keras(drawn_run, position, browser):
    out, images, models = drawn_run
    browser.open(out / "draw.html")
    logits, maps = class_activation_model(models[position]).predict(images[:20], verbose=0)
    maps = upsample(maps, *images.shape[1:3])
    for image, expected, class_maps in zip(images[:20], logits, maps, strict=True):
        content = base64.b64encode(image.tobytes()).decode()
        browser.evaluate(f"globalThis.found = forward(bytes({content!r}), networks[{position}])")
        np.testing.assert_allclose(browser.evaluate("found.logits"), expected, rtol=1e-3, atol=1e-5)
        boxes = browser.evaluate("found.maps.map(map => boundingBox(upsample(map)))")
        assert [box and tuple(box) for box in boxes] == [bounding_box(class_maps[..., c]) for c in range(10)]


def test_the_network_in_the_browser_on_images_of_odd_size(browser, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 30, 43, 1), dtype=np.uint8)
    model = lenet()
    write_draw_page(tmp_path, model, Split(images, np.arange(3), None), 7)  # no weights were kept
    browser.open(tmp_path / "draw.html")
    logits, maps = class_activation_model(model).predict(images[1:2], verbose=0)
    browser.evaluate("globalThis.found = forward(examples[1], networks[0])")
    np.testing.assert_allclose(browser.evaluate("found.logits"), logits[0], atol=1e-3 * np.abs(logits).max())
    found = browser.evaluate("found.maps.map(map => [...map])")
    np.testing.assert_allclose(found, maps[0].reshape(-1, 10).T, atol=1e-4 * np.abs(maps).max())


def test_a_digit_is_drawn_and_read(drawn_run, browser):
    out, _, models = drawn_run
    browser.open(out / "draw.html")
    assert "http" not in (out / "draw.html").read_text()
    browser.wait_for("answer !== null")
    browser.click("#clear")
    browser.wait_for("answer.image.every(value => value === 0)")
    x0, y0, width = browser.evaluate("(({x, y, width}) => [x, y, width])(paper.getBoundingClientRect())")

    def at(x, y):
        return x0 + x * width / 100, y0 + y * width / 100

    browser.drag(at(40.5, 40.5), at(40.5, 60.5))
    browser.wait_for("answer.image[50 * 100 + 40] === 255")
    image = np.array(browser.evaluate("[...answer.image]"), np.uint8).reshape(1, 100, 100, 1)
    columns, rows = np.flatnonzero(image[0, :, :, 0].any(axis=0)), np.flatnonzero(image[0, :, :, 0].any(axis=1))
    assert (columns[0], columns[-1], rows[0], rows[-1]) == (39, 41, 39, 61)
    np.testing.assert_allclose(
        browser.evaluate("answer.logits"), models[1].predict(image, verbose=0)[0], rtol=1e-3, atol=1e-3
    )
    latest = browser.evaluate("answer.logits")
    browser.evaluate("element('step').value = 0; element('step').oninput()")
    assert browser.evaluate("element('text').textContent") == "after step 0"
    assert browser.evaluate("answer.logits") != latest

    browser.click("[value=erase]")
    browser.drag(at(40.5, 60.5), at(40.5, 50.5))
    browser.wait_for("answer.image[50 * 100 + 40] === 0")
    assert browser.evaluate("answer.image[42 * 100 + 40]") == 255

    browser.click("[value=clutter]")
    browser.drag(at(80, 20))
    assert browser.evaluate("pieces.map(({x, y}) => [Math.round(x), Math.round(y)])") == [[76, 16]]
    browser.drag(at(82, 22), at(70, 30))
    assert browser.evaluate("pieces.map(({x, y}) => [Math.round(x), Math.round(y)])") == [[64, 24]]
    browser.click("[value=erase]")
    browser.drag(at(68, 28))
    assert browser.evaluate("pieces") == []

    shown = "buttons.findIndex(button => button.classList.contains('shown'))"
    predicted = browser.evaluate("answer.logits.indexOf(Math.max(...answer.logits))")
    browser.drag(at(99, 99))  # the pointer is on no class
    assert browser.evaluate(shown) == predicted
    browser.drag(at(50, 50), at(60, 60), button="right")
    assert browser.evaluate("ink[55 * 100 + 55]") == 0
    other = (predicted + 1) % 10
    browser.click(f"#scores button:nth-of-type({other + 1})")
    browser.drag(at(99, 99))
    assert browser.evaluate(shown) == other
    assert f"map of {other}" in browser.evaluate("element('map').getAttribute('aria-label')")

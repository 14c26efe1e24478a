"""The pages of a run, opened in headless Chromium."""

import contextlib
import functools
import http.server
import threading
import time

import keras
import numpy as np
import pytest
from browser import Browser, find_chromium
from conftest import ROOT
from PIL import Image

from cam import bounding_box, class_activation_model, upsample
from data.dataset import load_dataset
from experiment.pages import write_draw_page, write_page, write_run_js
from lenet import lenet, scale_to_unit_logits

HTML = "<!--<script>三\u2028"
SAMPLES = {"classes": ["zero", "o\"n'e", "two", HTML], "labels": [3, 1, 3, 0]}
SAMPLES |= {"boxes": [[[2, 3, 9, 8]], [], [[1, 1, 4, 4], [5.5, 6, 10, 12]], [[0, 0, 16, 12]]], "sizes": 4 * [[12, 16]]}
HISTORY = [
    {"step": 100 * k, "images": 3200 * k, "loss": 1.0, "test_accuracy": k / 2, "test_gt_known": k / 4, "test_pxap": 1}
    | {"predicted": predicted, "boxes": [[k, 2, 10, 9], None, [0, 0, 16, 12], [3, 3, 4, 4]]}
    for k, predicted in enumerate([[0, 0, 3, 0], [3, 1, 3, 1], [3, 1, 3, 0]])
]
STATE = """shown === null ? { step: null, text: element("text").textContent } : {
    step: shown === steps[slider.value] ? +slider.value : null,  // null while its pictures are loaded
    text: element("text").textContent, valuetext: slider.getAttribute("aria-valuetext"),
    mark: element("mark").getAttribute("d"), playing: element("play").textContent === "Pause",
    focus: document.activeElement.id || figures.indexOf(document.activeElement),
    visible: figures.flatMap((figure, index) => figure.hidden ? [] : [index]),
    none: element("none").checkVisibility(), following: element("following").checkVisibility(),
    files: figures.map(figure => figure.firstChild.getAttribute("src")),
    loaded: figures.every(figure => figure.firstChild.complete && figure.firstChild.naturalWidth > 0),
    captions: figures.map(figure => figure.lastChild.textContent + "|" + figure.lastChild.className),
    boxes: figures.map(figure => [...figure.querySelectorAll("svg > rect")].map(rect =>
        [rect.className.baseVal, ...["x", "y", "width", "height"].map(name => +rect.getAttribute(name))])),
    large: large.open ? element("title").textContent : null,
    large_files: [...large.querySelectorAll("img")].map(image => image.checkVisibility() && image.getAttribute("src")),
    kept: [scrollY, large.scrollTop, element("class").value, element("wrong").checked, globalThis.mark],
}"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not find_chromium():
        pytest.skip("no Chromium here to open the page in")
    with contextlib.closing(Browser(tmp_path_factory.mktemp("profile"))) as browser:
        yield browser


@pytest.fixture
def out(tmp_path):
    """The folder of a finished run."""
    for index in range(4):
        (tmp_path / f"img_{index}").mkdir()
        for name in ("image_test", "cmap_0", "cmap_100", "cmap_200", "evolution", "classes", "procedure"):
            Image.new("RGB", (64, 48), (60 * index, 200, 90)).save(tmp_path / f"img_{index}" / f"{name}.png")
    write_page(tmp_path)
    write_run_js(tmp_path, SAMPLES, HISTORY, finished=True)
    return tmp_path


@pytest.fixture
def address(out):
    """The address of a server that gives the run to those who have a token, and is slow to send pictures."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def send_head(self):
            time.sleep(0.3 if ".png" in self.path else 0)
            return super().send_head() if "?token=secret" in self.path else self.send_error(403)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=out)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def expect(browser, frame="self", **expected):
    """Waits until the page has the state, since pictures are loaded before they are shown; returns all of its state."""
    end = time.monotonic() + 15
    while True:
        state = browser.evaluate(f"{frame}.eval({STATE!r})")
        if state | expected == state:
            return state
        assert time.monotonic() < end, f"not {expected}: {state}"


def test_the_page_shows_the_files_of_a_step(out, browser):
    assert "http" not in (out / "index.html").read_text(encoding="utf-8")  # it needs nothing from elsewhere
    browser.open(out / "index.html")
    end = expect(browser, step=2, valuetext="step 200", visible=[0, 1, 2, 3], large=None, following=False)
    assert end["text"] == "step 200: 6,400 training images seen, accuracy 100.0%, GT-known localization 50.0%"
    assert end["captions"][:2] == [f"image 0: {HTML}, predicted {HTML}|", "image 1: o\"n'e, predicted o\"n'e|"]
    assert end["boxes"][0] == [["true", 2, 3, 7, 5], ["predicted", 2, 2, 8, 7]]
    assert end["boxes"][1] == []
    assert not browser.evaluate("element('draw').checkVisibility()")
    assert end["boxes"][2] == [["true", 1, 1, 3, 3], ["true", 5.5, 6, 4.5, 6], ["predicted", 0, 0, 16, 12]]
    places = "['img', '.predicted'].map(name => figures[0].querySelector(name).getBoundingClientRect().toJSON())"
    image, box = browser.evaluate(places)
    found = np.array([box["x"] - image["x"], box["y"] - image["y"], box["width"], box["height"]])
    np.testing.assert_allclose(found / image["width"] * 16, [2, 2, 8, 7], atol=0.2)  # pixels of the test image
    for step in (1, 0):
        browser.press("ArrowLeft")
        files = [f"img_{index}/cmap_{100 * step}.png" for index in range(4)]
        start = expect(browser, step=step, files=files, loaded=True)
    assert start["captions"][0] == f"image 0: {HTML}, predicted zero ✗|wrong"
    assert start["text"].startswith("step 0: 0 training images seen, accuracy 0.0%")
    assert start["mark"] != end["mark"]
    assert browser.evaluate("figures[3].firstChild.alt") == "class activation map of image 3, class zero, after step 0"


def test_filters(out, browser):
    browser.open(out / "index.html")
    expect(browser, step=2)
    assert browser.evaluate("[...element('class').options].map(option => option.text)")[2:] == ["o\"n'e", HTML]
    browser.click("#wrong")
    expect(browser, visible=[], none=True)
    browser.evaluate("slider.value = 1; slider.oninput()")
    expect(browser, visible=[3], none=False)
    browser.press(" ")  # the focus is on the checkbox
    expect(browser, visible=[0, 1, 2, 3], playing=False)
    browser.evaluate("element('class').focus()")
    for visible in ([3], [1], [0, 2]):
        browser.press("ArrowDown")
        expect(browser, visible=visible, focus="class")


def test_keyboard(out, browser):
    browser.open(out / "index.html")
    expect(browser, step=2)
    browser.evaluate("figures[1].focus()")
    for key, step in (("ArrowLeft", 1), ("ArrowRight", 2)):
        browser.press(key)
        expect(browser, step=step)
    for modifier, key in (("Control", "ArrowLeft"), ("Alt", " "), ("Meta", "Enter")):
        browser.press(key, modifier)
    expect(browser, step=2, playing=False, large=None)
    for playing, step in ((True, 0), (False, 0), (True, 0), (False, 2)):  # it stops at the end
        if step == 0:
            browser.press(" ")
        expect(browser, playing=playing, step=step, focus=1)
    browser.click("#play")  # which keeps the focus
    browser.press(" ")
    expect(browser, playing=False, step=0)
    for control, step, visible in (("step", 1, [0, 1, 2, 3]), ("class", 1, [3]), ("wrong", 1, [3]), ("play", 2, [3])):
        browser.evaluate(f"element({control!r}).focus()")
        browser.press("ArrowRight")
        expect(browser, step=step, focus=control, visible=visible)


def test_an_enlarged_image(out, browser):
    browser.open(out / "index.html")
    expect(browser, step=2)
    browser.evaluate("figures[0].focus()")
    browser.press("Enter")
    files = [f"img_0/{name}.png" for name in ("cmap_200", "image_test", "evolution", "classes", "procedure")]
    expect(browser, large=f"Image 0: {HTML}, after step 200", large_files=files)
    browser.press("ArrowLeft")
    expect(browser, large=f"Image 0: {HTML}, after step 100", large_files=["img_0/cmap_100.png", *files[1:]])
    browser.press("Escape")
    expect(browser, large=None, focus=0)
    bare = [{name: row[name] for name in ("step", "images", "predicted", "boxes")} for row in HISTORY[:2]]
    (out / "draw.html").touch()
    write_run_js(out, SAMPLES | {"boxes": []}, bare, finished=False)
    browser.open(out / "index.html")
    expect(browser, step=1, text="step 100: 3,200 training images seen; not finished")
    assert browser.evaluate("element('draw').checkVisibility() && element('draw').href.endsWith('/draw.html')")
    browser.click("#grid figure:nth-of-type(1)")
    expect(browser, large_files=["img_0/cmap_100.png", "img_0/image_test.png"])
    assert browser.evaluate("large.querySelectorAll('svg > rect').length") == 1
    browser.click("#close")
    expect(browser, large=None)


@pytest.mark.parametrize(("width", "height"), [(400, 700), (320, 256), (700, 660)])  # a telephone; a desktop at 400%
def test_a_small_window(width, height, out, browser):
    browser.open(out / "index.html", width, height)
    expect(browser, step=2)
    assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    browser.evaluate("element('grid').style.cssText = 'max-width: 18em; margin-bottom: 99em'")
    for index, top in enumerate((0, "figures[1].offsetTop", 9999, "figures[3].offsetTop")):
        browser.evaluate(f"scrollTo(0, {top}); figures[{index}].focus()")
        assert browser.evaluate("""(({x, y, right, bottom}) => [[x + 1, y + 1], [right - 1, bottom - 1]].map(point =>
            document.activeElement.contains(document.elementFromPoint(...point))
        ))(document.activeElement.getBoundingClientRect())""") == [True, True]
    browser.press("Enter")
    assert browser.evaluate(f"large.scrollWidth <= large.clientWidth && large.offsetWidth <= {width}")


@pytest.mark.slow
def test_an_open_page_follows_the_run(out, browser):
    write_run_js(out, SAMPLES, [], finished=False)
    browser.open(out / "index.html")
    for count in range(3):
        write_run_js(out, SAMPLES, HISTORY[:count], finished=False)
        state = expect(browser, step=[None, 0, 1][count])  # it was at the end, and still is
        assert state["text"].endswith("; not finished")
    browser.press("ArrowLeft")
    browser.click("#wrong")
    browser.click("#follow")
    browser.evaluate("element('class').value = 3; move(0)")
    browser.evaluate("document.body.style.height = '3000px'; scrollTo(0, 70); figures[0].focus({preventScroll: true})")
    browser.press("Enter")
    browser.evaluate("large.style.height = '200px'; large.scrollTop = 50; globalThis.mark = 1")
    before = expect(browser, step=0, visible=[0], kept=[70, 50, "3", True, 1])
    write_run_js(out, SAMPLES, HISTORY, finished=True)
    time.sleep(browser.evaluate("POLL") / 1000 + 0.5)
    assert expect(browser) == before  # paused
    browser.evaluate("element('follow').checked = true")
    after = expect(browser, text=before["text"].removesuffix("; not finished"), step=0)
    assert {name for name in after if after[name] != before[name]} == {"text", "following", "large_files"}
    assert after["large_files"][2:] == [f"img_0/{name}.png" for name in ("evolution", "classes", "procedure")]


@pytest.mark.slow
def test_the_page_in_a_frame_behind_a_token(out, address, browser):
    (out / "frame.html").write_text('<iframe src="index.html?token=secret"></iframe>')
    write_run_js(out, SAMPLES, HISTORY[:1], finished=False)
    browser.open(f"{address}/frame.html?token=secret")
    browser.wait_for("frames[0].eval('shown !== null')")
    for count, labels in ((2, [3, 1, 3, 0]), (3, [3, 1, 3, 0]), (1, [0, 0, 0, 0])):  # the last is another run
        write_run_js(out, SAMPLES | {"labels": labels}, HISTORY[:count], finished=False)
        state = f"frames[0].eval('steps.length === {count} && element(`class`).length === {len(set(labels)) + 1}')"
        browser.wait_for(state)
        expect(browser, "frames[0]", step=count - 1, loaded=True)


@pytest.mark.slow
def test_playing(address, browser):
    browser.open(f"{address}/index.html?token=secret")
    expect(browser, step=2)
    browser.evaluate(f"""
        globalThis.seen = []; globalThis.told = [];
        new MutationObserver(() => seen.push({STATE})).observe(element("grid"), {{ childList: true, subtree: true }});
        const status = document.querySelector("[role=status]");
        new MutationObserver(() => told.push(status.textContent)).observe(status, {{ childList: true }});
    """)
    browser.click("#play")
    browser.wait_for("told.length")
    states, told = browser.evaluate("[seen, told]")
    assert [(state["step"], state["loaded"]) for state in states][:3] == [(0, True), (1, True), (2, True)]
    assert [text.split(":")[0] for text in told] == ["step 200"]  # by screen readers, not each step


@pytest.fixture(scope="module")
def drawn_run(request, tmp_path_factory):
    """A run's kept weights at two steps, its test images, and the models: (folder, images, models)."""
    pooling, height, width = request.param
    out, models = tmp_path_factory.mktemp(pooling), []
    test = load_dataset(ROOT / "data")[1].first(32)
    test = test._replace(images=test.images[:, :height, :width])
    (out / "weights").mkdir()
    for step in (0, 100):
        keras.utils.set_random_seed(step)
        model = lenet(pooling=pooling)
        scale_to_unit_logits(model, test.images)
        for name, units in (("conv1", 32), ("conv2", 64)):
            model.get_layer(name).bias.assign(keras.random.normal([units], stddev=0.1))  # as after some training
        model.set_weights([weights.astype(np.float16) for weights in model.get_weights()])  # which the page has
        np.savez(out / "weights" / f"{step}.npz", **{weight.path: np.asarray(weight) for weight in model.weights})
        models.append(model)
    write_draw_page(out, models[-1], test)
    return out, test.images, models


@pytest.mark.slow
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("drawn_run", [("average", 100, 100), ("max", 71, 82)], indirect=True)
def test_the_network_in_the_browser_is_that_of_keras(drawn_run, position, browser):
    out, images, models = drawn_run
    browser.open(out / "draw.html")
    logits, maps = class_activation_model(models[position]).predict(images[:20], verbose=0)
    maps = upsample(maps, *images.shape[1:3])
    for image, expected, class_maps in zip(images[:20], logits, maps, strict=True):
        pixels = image.ravel().tolist()
        browser.evaluate(f"globalThis.found = forward(new Uint8Array({pixels}), networks[{position}])")
        np.testing.assert_allclose(browser.evaluate("found.logits"), expected, rtol=1e-3, atol=1e-5)
        boxes = browser.evaluate("found.maps.map(map => boundingBox(upsample(map)))")
        assert [box and tuple(box) for box in boxes] == [bounding_box(class_maps[..., c]) for c in range(10)]


@pytest.mark.parametrize("drawn_run", [("average", 100, 100)], indirect=True)
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
    latest = browser.evaluate("answer.logits")
    np.testing.assert_allclose(latest, models[1].predict(image, verbose=0)[0], rtol=1e-3, atol=1e-3)
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

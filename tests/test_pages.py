"""page.py in a real browser: headless Chromium, with a script at the end of the page in the place of a person."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from experiment.page import MAX_STEPS, write_page

from cam import bounding_box, normalize, overlay, upsample
from data.dataset import Split

HAND = """<script>
const report = {}, at = (step) => { slider.value = step; slider.dispatchEvent(new Event("input")); };
const state = () => ({
  text: element("text").textContent, mark: element("mark").getAttribute("d"),
  shown: figures.map((figure, index) => figure.hidden ? null : index).filter(index => index !== null),
  captions: figures.map(figure => figure.lastChild.textContent + "|" + figure.lastChild.className),
});
const pixels = index => [...figures[index].firstChild.getContext("2d").getImageData(0, 0, width, height).data];
const set = (id, property, value) => { element(id)[property] = value; element(id).dispatchEvent(new Event("change")); };
report.end = state();
at(0); report.start = state();
set("wrong", "checked", true); report.wrong = state();
set("wrong", "checked", false); set("class", "value", "3"); report.three = state();
set("class", "value", ""); frame = () => {}; at(1); report.pixels = pixels(2);
at(0); element("play").click(); report.playing = element("play").textContent;
setTimeout(() => {
  report.played = +slider.value; report.stopped = element("play").textContent;
  document.body.innerHTML = ""; document.body.textContent = JSON.stringify(report);
}, 1500);
</script>"""


@pytest.fixture
def run(tmp_path):
    """Three steps, four images of 12 x 16 pixels, maps of 3 x 4 locations: the arguments of `write_page`."""
    rng = np.random.default_rng(0)
    predicted = [[0, 0, 3, 0], [3, 1, 3, 1], [3, 1, 3, 0]]
    history = [
        {"step": 100 * k, "images": 3200 * k, "test_accuracy": k / 2, "test_gt_known": k / 4, "predicted": predicted[k]}
        for k in range(3)
    ]
    (tmp_path / "maps").mkdir()
    for row in history:
        np.save(tmp_path / "maps" / f"{row['step']}.npy", rng.normal(size=(4, 3, 4)).astype(np.float32))
    images = rng.integers(0, 256, (4, 12, 16, 1), dtype=np.uint8)
    samples = Split(images, np.array([3, 1, 3, 0]), np.tile([2, 3, 9, 8], (4, 1)))
    return {
        "out": tmp_path,
        "samples": samples,
        "class_names": ["zero", "one", "two</script>", "three"],
        "history": history,
    }


def content(path):
    return json.loads(re.search(r"^const run = (.*);$", path.read_text(), re.MULTILINE)[1])


def test_the_page_holds_the_run(run, tmp_path):
    write_page(**run)
    page = content(tmp_path / "index.html")
    assert [step["step"] for step in page["steps"]] == [0, 100, 200]
    maps = upsample(np.load(tmp_path / "maps" / "200.npy"), 12, 16)
    for found, class_map in zip(page["steps"][2]["boxes"], maps, strict=True):
        assert found is None if bounding_box(class_map) is None else tuple(found) == bounding_box(class_map)
    assert "http" not in (tmp_path / "index.html").read_text()  # nothing is fetched


def test_of_a_long_run_there_are_as_many_steps_as_fit(run, tmp_path):
    steps = 5 * MAX_STEPS
    run["history"] = [run["history"][0] | {"step": 0, "images": k} for k in range(steps)]
    write_page(**run)
    images = [step["images"] for step in content(tmp_path / "index.html")["steps"]]
    assert len(images) == MAX_STEPS
    assert (images[0], images[-1]) == (0, steps - 1)


def test_the_page_without_boxes(run, tmp_path):
    run["samples"] = run["samples"]._replace(boxes=None)
    run["history"] = [{name: value for name, value in row.items() if name != "test_gt_known"} for row in run["history"]]
    write_page(**run)
    page = content(tmp_path / "index.html")
    assert {step["gt_known"] for step in page["steps"]} == {None}
    assert page["boxes"] is None


@pytest.mark.parametrize("channels", [1, 3])
def test_the_page_in_a_browser(run, channels, tmp_path):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (4, 12, 16, channels), dtype=np.uint8)
    run["samples"] = run["samples"]._replace(images=images)
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium here to open the page in")
    path = tmp_path / "index.html"
    write_page(**run)
    path.write_text(path.read_text().replace("</html>", HAND + "</html>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    process = subprocess.run(
        [browser, *options, profile, "--virtual-time-budget=10000", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    report = json.loads(re.search(r"<body>(\{.*\})</body>", process.stdout, re.DOTALL)[1])
    assert report["end"]["text"] == (
        "step 200: 6,400 training images seen, accuracy 100.0%, GT-known localization 50.0%"
    )
    assert report["end"]["captions"][1] == "image 1: one, predicted one|"
    assert report["start"]["text"].startswith("step 0: 0 training images seen, accuracy 0.0%")
    assert report["start"]["captions"][1] == "image 1: one, predicted zero|wrong"
    assert report["start"]["mark"] != report["end"]["mark"]
    assert report["start"]["shown"] == [0, 1, 2, 3]
    assert report["wrong"]["shown"] == [0, 1]
    assert report["three"]["shown"] == [0, 2]
    assert report["playing"] == "Pause"
    assert (report["played"], report["stopped"]) == (2, "Play")
    drawn = np.array(report["pixels"]).reshape(12, 16, 4)
    # The page normalises before it upsamples, and in 256 shades.
    cells = normalize(np.load(tmp_path / "maps" / "100.npy"))[2:3]
    heatmap = upsample(np.rint(255 * cells) / 255, 12, 16)[0]
    expected = overlay(images[2], heatmap.clip(0, 1), invert=channels == 1)
    assert np.abs(drawn[:, :, :3].astype(int) - expected).max() <= 12  # a shade apart by rounding
    assert (drawn[:, :, 3] == 255).all()

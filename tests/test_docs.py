"""README.md and docs/: what they link to is there."""

import base64
import json
import re

import keras
import numpy as np
import pytest
from conftest import ROOT


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_links_lead_to_files(path):
    links = re.findall(r"\]\(([^)#]+)", path.read_text())
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing


def test_the_page_to_draw_on_is_todays_with_the_network_in_data():
    template = (ROOT / "experiment" / "draw.html").read_text(encoding="utf-8")
    before, after = template.split("/*RUN*/null")
    page = (ROOT / "docs" / "draw.html").read_text(encoding="utf-8")
    assert page.startswith(before)
    assert page.endswith(after)
    run = json.loads(page[len(before) : -len(after)])
    model = keras.models.load_model(ROOT / "data" / "lenet.keras")
    weights = np.concatenate([weight.ravel() for weight in model.get_weights()]).astype(np.float16)
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(run["steps"][-1]["weights"]), "<f2"), weights)
    assert len(page) < 1_300_000

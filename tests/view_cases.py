"""Scenes, predictions and a browser for the tests of ``wireframe view``."""

import json
import re
import shutil
from contextlib import contextmanager
from html.parser import HTMLParser

import numpy as np
import pytest

from scenes import random_scene
from wireframe.fusion import fuse_views
from wireframe.graph import Wireframe
from wireframe.samples import write_parquet, write_sample
from wireframe.sampling import sample_points

HOSTILE = "</script><script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">&lt;${1}"


def sampled(order_id, seed=0, points=256, **changes):
    """A sampled scene with random points around a unit square."""
    sample = sample_points(fuse_views(random_scene(seed, order_id=order_id), 50), points)
    return type(sample)(**{**vars(sample), **changes})


def without_truth(sample):
    empty = {
        "gt_vertices": np.zeros((0, 3), np.float32), "gt_edges": np.zeros((0, 2), np.int32),
        "gt_segments": np.zeros((0, 2, 3), np.float32), "gt_edge_classes": np.zeros(0, np.int64),
    }  # fmt: skip
    return type(sample)(**{**vars(sample), **empty})


def write_rows(path, samples):
    write_parquet([write_sample(sample) for sample in samples], path)
    return path


def wires(vertices, edges):
    return Wireframe(np.array(vertices, np.float32).reshape(-1, 3), np.array(edges, np.int64).reshape(-1, 2))


class Page(HTMLParser):
    """The data blocks of a page by id, its scripts and styles, the notice, and all tags."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.blocks, self.texts, self.open, self.policy = [], {}, {}, None, ""
        self.feed(path.read_text("utf-8"))
        self.index = json.loads(self.blocks.pop("index"))
        self.ids = [entry["id"] for entry in self.index["scenes"]]
        self.scenes = {
            entry["id"]: json.loads(self.blocks[f"scene-{entry['at']}"]) for entry in self.index["scenes"]
        }  # fmt: skip

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.open = values.get("id", tag)
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        if self.open is not None and self.tags[-1] == "script" and self.open != "script":
            self.blocks[self.open] = data
        else:
            self.texts[self.open] = self.texts.get(self.open, "") + data


CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Drawing without a GPU, and none of the browser's own requests.
ARGUMENTS = [
    "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--enable-unsafe-swiftshader",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run",
]  # fmt: skip


@contextmanager
def launched():
    """A headless Chromium; the test is skipped, and says so, where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = next((path for path in map(shutil.which, CHROMIUM) if path), None)
    if found is None:
        pytest.skip("no browser (chromium or google-chrome) is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def opened(browser, path, **options):
    """A tab with the page, and a list of what it said on the console, raised or asked for."""
    options = {"viewport": {"width": 1000, "height": 560}, "reduced_motion": "reduce", **options}
    context = browser.new_context(**options)
    tab, said = context.new_page(), []
    # What the driver says of drawing in software is not the page's.
    tab.on("console", lambda message: said.append(message.text) if "GL Driver Message" not in message.text else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: said.append(request.url) if not request.url.startswith("file:") else None)
    # Pictures are compared: they must not be coarse where this machine is slow.
    tab.add_init_script("onload = () => { if (typeof SLOW === 'object') SLOW.frames = 1e9; }")
    tab.goto(path.as_uri())
    yield tab, said
    context.close()


# Run before the page: as in a browser without WebGL 2.
NO_WEBGL = """
const given = HTMLCanvasElement.prototype.getContext;
HTMLCanvasElement.prototype.getContext = function (kind, ...options) {
  return kind === "webgl2" ? null : given.call(this, kind, ...options);
};
"""


def pixels(tab):
    """The picture as uint8 [H, W, 3], after what has changed is drawn, without what lies over it."""
    import io

    from PIL import Image

    tab.evaluate(
        """() => new Promise((done) => {
          for (const part of document.querySelectorAll(".float")) part.style.opacity = 0;
          requestAnimationFrame(() => requestAnimationFrame(() => requestAnimationFrame(done)));
        })"""
    )
    with Image.open(io.BytesIO(tab.locator("#view").screenshot())) as image:
        # Without the frame of the element that has the keys.
        return np.asarray(image.convert("RGB"))[8:-8, 8:-8]


def same(one, other):
    """Whether two pictures are equal but for how the browser dithers the background."""
    return int(np.abs(one.astype(int) - other.astype(int)).max()) <= 6


def amount(picture, color, near=24):
    """How many pixels have about that colour ("#rrggbb")."""
    wanted = np.array([int(part, 16) for part in re.findall("..", color[1:])])
    return int((np.abs(picture.astype(int) - wanted).max(axis=2) <= near).sum())

"""The page about a run: it says what the run's files say, in a browser too, whatever they hold."""

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from scenes import random_scene
from wireframe.errors import ConfigError
from wireframe.fusion import fuse_views
from wireframe.samples import write_parquet, write_sample
from wireframe.sampling import sample_points
from wireframe.train import checkpoints, report
from wireframe.train.config import parse_config
from wireframe.train.loop import train
from wireframe.train.report import write_report

SMALL_MODEL = {
    "hidden": 32, "ff": 48, "latent_tokens": 8, "latent_layers": 2, "decoder_layers": 1, "num_heads": 2,
    "kv_heads_cross": 1, "kv_heads_self": 1, "segments": 8,
}  # fmt: skip
STAGES = [
    {"name": "32", "points": 32, "steps": 6, "batch_size": 2, "lr": 1e-3, "warmup": 3},
    {"name": "endpoint", "points": 64, "steps": 4, "batch_size": 2, "lr": 1e-4, "endpoint_weight": 0.1},
]
HOSTILE = '"><script src="//x/"></script><img src=x onerror=alert(1)>&lt;$\\frac{'


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two stages with scores and pictures; its scenes and its description try to break out of the page."""
    pytest.importorskip("hoho2025")
    folder = tmp_path_factory.mktemp("report")
    for points in (32, 64):
        samples = [
            sample_points(fuse_views(random_scene(i, order_id=f"scene-{i}{HOSTILE}"), 50), points) for i in range(6)
        ]
        (folder / str(points)).mkdir()
        write_parquet([write_sample(sample) for sample in samples], folder / str(points) / "train-0.parquet")
    config = parse_config(
        {
            "model": SMALL_MODEL, "stages": STAGES, "log_every": 1, "save_every": 5, "dev_val": 3,
            "evaluation": {"thresholds": [0.2, 0.4, 0.6], "threshold_scenes": 2, "worst": 2},
            "description": f"A small run {HOSTILE}",
        }
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(config, [folder / "32", folder / "64"], folder / "run-1", device="cpu", progress=False)
    torch.set_num_threads(threads)
    return folder / "run-1"


@pytest.fixture
def run(finished, tmp_path):
    """A copy to take apart."""
    return Path(shutil.copytree(finished, tmp_path / "run-1"))


class Page(HTMLParser):
    """tags: names; texts: of every tag name; tables: by section, lists of lists of cells; attributes: all values."""

    def __init__(self, content):
        super().__init__()
        self.stack, self.tags, self.attributes, self.tables, self.section = [], [], [], {}, ""
        self.texts, self.pictures = {}, []
        self.feed(content)
        assert self.stack == [], "an element is not closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        values = dict(attributes)
        if tag == "section":
            self.section = values["id"]
        if tag == "img":
            self.pictures.append(values["src"])
        if tag == "table":
            self.tables.setdefault(self.section, []).append([])
        if tag == "tr":
            self.tables[self.section][-1].append([])
        if tag in ("td", "th"):
            self.tables[self.section][-1][-1].append("")
        if tag not in ("meta", "img"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        inside = self.stack[-1] if self.stack else ""
        self.texts[inside] = self.texts.get(inside, "") + data
        if inside in ("td", "th"):
            self.tables[self.section][-1][-1][-1] += data


def page_of(run):
    return Page(write_report(run).read_text())


def rows(page, section, number=0):
    head, *lines = page.tables[section][number]
    return [dict(zip(head, line)) for line in lines]


def log(run, *lines):
    (run / "log.jsonl").write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode()
                                               for line in lines))  # fmt: skip


def line(step, stage="32", **changes):
    terms = {"total": 0.5, "match": 0.4, "conf": 0.2, "endpoint": 0.0, "grad_norm": 2.0, "lr": 1e-3}
    return {"step": step, "stage": stage, **terms, "seconds_per_step": 0.5, "bad_steps": 0, **changes}


def charts(page_text):
    """Number of curves by the title of their figure."""
    figures = re.findall(r"<figure><figcaption>(.*?)<span>.*?</figcaption>(.*?)</figure>", page_text, re.DOTALL)
    return {title: len(re.findall(r'class="line', content)) for title, content in figures}


def test_training_ends_with_the_page(finished):
    page = Page((finished / "report.html").read_text())
    assert page.texts["title"].startswith("run-1: training run") and "finished" in page.texts["small"]


def test_the_page_says_what_the_files_say(run):
    page = page_of(run)
    table = rows(page, "stages")
    for position, (row, stage) in enumerate(zip(table, STAGES), 1):
        scores = json.loads((run / f"evaluation/{position}-{stage['name']}.json").read_text())
        summary = scores["summary"]
        assert row["Stage"] == f"{position}. {stage['name']}" and row["Points"] == str(stage["points"])
        assert row["HSS"] == f"{summary['hss']:.3f}" and row["F1"] == f"{summary['f1']:.3f}"
        assert row["95 %"] == f"{summary['hss_low']:.3f} to {summary['hss_high']:.3f}"
        assert row["Best threshold"].startswith(f"{max(at['hss'] for at in scores['at_thresholds']):.3f} at")
        assert [cells["Scene"] for cells in rows(page, "worst-scenes", 2 - position)] == scores["worst"]
    assert [row["Endpoint"] for row in table] == ["off", "0.1"] and [row["Rate"] for row in table] == ["0.001", "1e-4"]
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-2])
    assert last["step"] == 10 and table[1]["Loss at end"] == f"{last['total']:.4f}"
    assert len(page.pictures) == 2 and base64.b64decode(page.pictures[0].partition(",")[2]).startswith(b"\x89PNG")
    settings = {cells[0]: cells[1] for group in page.tables["settings"][1:] for cells in group}
    assert settings["seed"] == "353" and settings["hidden"] == "32" and settings["thresholds"] == "0.2, 0.4, 0.6"


def test_the_page_has_the_hashes_that_verify_prints(run):
    prints = {cells[0]: cells[1] for cells in page_of(run).tables["fingerprints"][0]}
    newest = checkpoints.latest(run)
    hashes = checkpoints.tensor_hashes(newest)
    assert prints[f"model, {newest.name}"] == prints["model scored after stage endpoint"] == hashes["model"]
    assert prints[f"optimizer, {newest.name}"] == hashes["optimizer"]
    assert prints["model scored after stage 32"] not in (hashes["model"], "")
    assert len(prints["rows of 64 points"]) == 64 and prints["torch"] == torch.__version__


def test_the_page_stands_alone_and_is_the_same_every_time(run, tmp_path):
    content = write_report(run).read_bytes()
    assert write_report(str(run), tmp_path / "other.html").read_bytes() == content
    page = Page(content.decode())
    assert not {"script", "iframe", "object", "embed", "link", "form", "a", "video", "base"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on") and name not in ("style", "srcset", "href", "xlink:href")
        assert name != "src" or value.startswith("data:image/png;base64,")
    assert not re.search(r"url\(|@import", page.texts["style"])
    assert page.tags.count("img") == 2 and HOSTILE in page.texts["p"] and HOSTILE in page.texts["td"]


def test_every_curve_is_there(run):
    assert charts(write_report(run).read_text()) == {
        "Loss": 1, "Matching": 1, "Confidence": 1, "Endpoint L1": 1, "Gradient norm": 1, "Learning rate": 1,
        "Steps a second": 1, "HSS by stage": 0, "HSS by threshold": 2,
    }  # fmt: skip


def test_a_run_that_has_just_begun(run):
    for folder in ("checkpoints", "evaluation", "stages", "model"):
        shutil.rmtree(run / folder)
    log(run, line(1))
    page = page_of(run)
    assert "There is no whole checkpoint" in page.texts["li"] and "There are no scores" in page.texts["li"]
    assert rows(page, "stages")[0]["Stage"] == "1. 32" and rows(page, "stages")[0]["Loss at end"] == "0.5000"
    assert charts(write_report(run).read_text())["Loss"] == 1
    assert "Switched off" in page.texts["p"] and "No values" not in page.texts["p"]
    log(run)
    page = page_of(run)
    assert "log.jsonl holds no step yet" in page.texts["li"] and not page.tables
    (run / "log.jsonl").unlink()
    with pytest.raises(ConfigError, match="no run"):
        write_report(run)
    with pytest.raises(ConfigError, match="no run"):
        write_report(run / "nowhere")


def test_a_run_without_scores(run):
    shutil.rmtree(run / "evaluation")
    (run / "evaluation").mkdir()
    (run / "evaluation" / "1-32.json.partial").write_text("{}")
    page = page_of(run)
    assert "The evaluation 1-32 is not finished." in page.texts["li"]
    assert [row["HSS"] for row in rows(page, "stages")] == ["", ""] and not page.pictures
    assert "HSS by stage" not in charts(write_report(run).read_text())


def test_lines_of_the_log_that_are_odd(run):
    log(
        run,
        line(1, total=None), b'{"step": 2, "stage": "32", "total": NaN, "match": Infinity, "lr": -Infinity}',
        line(3, total="x", match=[], grad_norm=True, seconds_per_step=0), line(4, total=10**400),
        b"\xff\xfe", b"null", b"[" * 5000, b'{"step": "7"}', b'{"step": -1}', b'{"step": 1e99}', b"",
        line(5, seconds_per_step=-1.0), {"step": 5, "event": HOSTILE, "scenes": ["a", {}, None, 1, 2, 3], "x": 1e-9},
        {"step": 5, "event": "bad step", "scenes": [HOSTILE]}, line(6, stage=[HOSTILE]), b'{"step": 6, "stage": "32',
    )  # fmt: skip
    content = write_report(run).read_text()
    page = Page(content)
    assert "8 lines of log.jsonl cannot be read" in page.texts["li"]
    assert not re.search(r"nan|inf", "".join(value for name, value in page.attributes if name == "d"))
    events = page.tables["events"][0]
    assert [cells[:2] for cells in events] == [["step 5", HOSTILE], ["step 5", "bad step"]]
    assert "and 2 more" in events[0][2] and content.count('class="bad"') == 4


def test_a_cut_off_last_line_is_said_and_the_rest_is_drawn(run):
    before = (run / "log.jsonl").read_bytes()
    (run / "log.jsonl").write_bytes(before[:-20])
    page = page_of(run)
    assert "1 line of log.jsonl cannot be read" in page.texts["li"]


@pytest.mark.parametrize(
    "name, content",
    [
        ("evaluation/1-32.json", b"{"),
        ("evaluation/1-32.json", b'{"summary": {"hss": 0.1}}'),
        ("evaluation/1-32.json", b'{"summary": [], "scenes": 3}'),
        ("evaluation/1-32.json", b"[" * 100_000),
        ("evaluation/1-32.png", b"no picture"),
        ("evaluation/1-32.png", b"\x89PNG\r\n\x1a\n and no more"),
        ("evaluation/2-endpoint.png", b""),
        ("checkpoints/step-00000010/state.json", b"{}"),
        ("checkpoints/step-00000010/model.safetensors", b"x"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_shown(run, name, content):
    (run / name).write_bytes(content)
    page = page_of(run)
    if content.startswith(b"\x89PNG"):
        # Only a browser can tell.
        assert len(page.pictures) == 2
    else:
        assert any(part in page.texts["li"] for part in (name, name.split("/")[1]))
    assert rows(page, "stages")[1]["HSS"] != ""


def test_strange_files_beside_the_scores_do_no_harm(run):
    for name in ("3-\u202e<script>.json", "x.json", "4-.json", "99999-a.json"):
        shutil.copy(run / "evaluation" / "1-32.json", run / "evaluation" / name)
    page = page_of(run)
    assert [row["Stage"] for row in rows(page, "stages")][2:] == ["3. \u202e<script>", "4. "]
    assert "script" not in page.tags


def test_a_page_that_cannot_be_written_leaves_the_old_one(run, monkeypatch):
    before = write_report(run).read_bytes()
    monkeypatch.setattr(report, "_page", lambda record: "\ud800" * 10)
    write_report(run, run / "half.html")
    assert (run / "half.html").read_bytes() == b"?" * 10
    monkeypatch.setattr(report, "_page", lambda record: None)
    with pytest.raises(AttributeError):
        write_report(run)
    with pytest.raises(OSError):
        write_report(run, run)
    assert (run / "report.html").read_bytes() == before


# What a reader's eye would see, measured by the browser in a frame of each width and scheme.
MEASURE = """
<script>
function luminance(color) {
  const part = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(
    v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
}
function background(element) {
  for (let at = element; at; at = at.parentElement) {
    const color = at.ownerDocument.defaultView.getComputedStyle(at).backgroundColor;
    if (color !== "rgba(0, 0, 0, 0)") return color;
  }
  return "rgb(255, 255, 255)";
}
function measure(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, found = {
    width: view.innerWidth, scroll: page.documentElement.scrollWidth, outside: [], contrast: 21, paths: 0,
    scheme: view.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light",
    tables: page.querySelectorAll("table").length, scripts: page.querySelectorAll("script").length,
    pictures: [...page.images].map(image => image.complete && image.naturalWidth),
    ran: page.title.includes("ran"), shown: page.body.innerText,
  };
  for (const svg of page.querySelectorAll("svg")) {
    const box = svg.viewBox.baseVal;
    for (const part of svg.querySelectorAll("path, text, rect, circle")) {
      const b = part.getBBox();
      found.paths += part.tagName === "path" && b.width + b.height > 0;
      const right = b.x + b.width <= box.width + 0.5, bottom = b.y + b.height <= box.height + 0.5;
      if (!(b.x >= -0.5 && b.y >= -0.5 && right && bottom)) found.outside.push(part.outerHTML);
    }
  }
  const written = "h1, h2, h3, p, small, span, strong, th, td, summary, figcaption, li, text, footer";
  for (const element of page.querySelectorAll(written)) {
    const style = view.getComputedStyle(element), paper = luminance(background(element));
    const ink = luminance(element.tagName === "text" ? style.fill : style.color);
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    found.contrast = Math.min(found.contrast, ratio);
  }
  return found;
}
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(measure);
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>
<pre id="found"></pre>
"""


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip("no browser (chromium or google-chrome) is installed")
    return found


def browse(browser, page, folder, *options):
    """Standard output and what the page said on the console."""
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        "--virtual-time-budget=10000", f"--user-data-dir={folder / 'profile'}", *options, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_shows_the_page_wide_and_narrow_light_and_dark(browser, run, tmp_path):
    content = html.escape(write_report(run).read_text().replace("<details>", "<details open>"))
    frames = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]
    style = "height: 900px; border: 0; width: {}px; color-scheme: {}"
    shown = "".join(f'<iframe style="{style.format(*frame)}" srcdoc="{content}"></iframe>' for frame in frames)
    page = tmp_path / "frames.html"
    page.write_text(f'<!DOCTYPE html><meta charset="utf-8">{shown}{MEASURE}')
    dom, console = browse(browser, page, tmp_path, "--dump-dom")
    assert console == []
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert [(frame["width"], frame["scheme"]) for frame in found] == frames
    for frame in found:
        assert frame["scroll"] <= frame["width"] and frame["outside"] == []
        assert len(frame["pictures"]) == 2 and min(frame["pictures"]) > 800
        assert frame["contrast"] > 4.5 and frame["scripts"] == 0 and not frame["ran"]
        assert frame["tables"] == sum(map(len, page_of(run).tables.values())) == 13 and frame["paths"] > 40
        assert HOSTILE in frame["shown"] and "finished" in frame["shown"]


def test_a_browser_asks_for_nothing_and_runs_nothing(browser, run, visits, tmp_path):
    port, asked = visits
    attack = (
        f'</title></style></td><script>fetch("http://127.0.0.1:{port}/a"); document.title = "ran"</script>'
        f'<img src="http://127.0.0.1:{port}/b" onerror="document.title = \'ran\'">'
        f'<link rel="stylesheet" href="http://127.0.0.1:{port}/c">'
    )
    log(run, line(1, stage=attack), {"step": 1, "event": attack, "x": attack}, line(2, stage="\"'" + attack))
    for scores in (run / "evaluation").glob("*.json"):
        content = json.loads(scores.read_text())
        content["worst"][0] = content["scenes"][0]["order_id"] = attack
        content["scenes"][0]["failure"] = content["model"] = attack
        content["not_scored"] = [[attack, attack]]
        content["summary"]["failures"] = {attack: 1}
        scores.write_text(json.dumps(content))
    shutil.rmtree(run / "checkpoints")
    page = write_report(run)
    dom, console = browse(browser, page, tmp_path, "--dump-dom")
    assert asked == [] and console == []
    assert "<title>run-1: training run</title>" in dom and "<script" not in dom and "<link" not in dom
    assert dom.count("&lt;script&gt;fetch(") >= 8
    # The same names do reach the server from a page that does not take care.
    (tmp_path / "careless.html").write_text(f"<!DOCTYPE html><title>x</title>{attack}")
    dom, console = browse(browser, tmp_path / "careless.html", tmp_path, "--dump-dom")
    assert {"/b", "/c"} <= set(asked) and console and "<title>ran</title>" in dom


def test_a_browser_draws_the_page(browser, run, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    picture = tmp_path / "page.png"
    browse(browser, write_report(run), tmp_path, f"--screenshot={picture}", "--window-size=1280,1400")
    with Image.open(picture) as image:
        assert image.size[0] == 1280
        colors = dict((color, count) for count, color in image.convert("RGB").getcolors(1 << 24))
    # The page, its cards, the curves, and ink.
    for color in ((0xF6, 0xF7, 0xF9), (255, 255, 255), (0x2F, 0x6F, 0xDE), (0x17, 0x20, 0x2C)):
        assert colors.get(color, 0) > 100, color

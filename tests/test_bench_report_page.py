"""The plots and the page of ``wireframe bench report``: they show what the rows say, whatever the rows hold."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser

import pytest
from bench_rows import HOSTILE, attention, every, growth, made, rows_of, steps, write

from view_cases import launched, opened
from wireframe.bench import report_bars, report_curves, report_page, report_plots
from wireframe.bench.report_rows import newest
from wireframe.bench.report_tables import TABLES, blocks
from wireframe.cli import main


def test_bars_are_as_long_as_the_ratios(tmp_path):
    with report_plots.style():
        (axes,) = report_bars.speed_up(rows_of(attention(), tmp_path)).axes
        # torch.compile, the faster of both kinds of eager, and what computes something else; what failed has none.
        assert [round(1 + bar.get_width(), 9) for bar in axes.patches] == [0.8, 2.5, 0.5]
        (axes,) = report_bars.determinism(rows_of(steps(), tmp_path)).axes
        assert [round(bar.get_width(), 3) for bar in axes.patches] == [round(1 / 0.98, 3), 1.25]
        (axes,) = report_bars.steps(rows_of(steps(), tmp_path)).axes
        assert [bar.get_width() for bar in axes.patches] == [8.0, 7.9, 16.0, 20.0]


def test_curves_go_through_the_rows(tmp_path):
    with report_plots.style():
        (axes,) = report_curves.growth(rows_of(growth(), tmp_path), ("points", "keys"), 3).axes
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        assert lines == {"ours": [[1024, 1], [4096, 4], [16384, 16]], "eager": [[1024, 2], [4096, 8], [16384, 32]]}
        assert report_curves.growth(rows_of(attention(), tmp_path), ("points", "keys"), 3) is None
        on_gpu = [made(device="NVIDIA H200", dtype="bfloat16", p50=0.1)]
        (axes,) = report_curves.roofline(rows_of(on_gpu, tmp_path)).axes
        # 4 GFLOP and 10 MB in 0.1 ms.
        assert axes.collections[0].get_offsets().tolist() == [[400.0, 40.0]]
        assert max(axes.lines[0].get_ydata()) == 989.0
        assert report_curves.roofline(rows_of(attention(), tmp_path)) is None


def test_plots_are_the_same_bytes_whatever_the_users_settings(tmp_path):
    import matplotlib

    rows = newest(rows_of([*attention(), *growth()], tmp_path))
    found, _ = report_plots.pictures(rows)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "savefig.bbox": "tight"}):
        assert report_plots.pictures(rows)[0] == found
    assert all(re.search(rb"tIME|Software|20\d\d-", picture.png) is None for picture in found)


def test_every_plot_that_has_rows_is_made_and_others_are_named(tmp_path):
    found, missing = report_plots.pictures(newest(rows_of(every(), tmp_path)))
    assert [picture.name for picture in found] == [
        "speedup-made-cpu.png", "step-nvidia-h200.png", "determinism-made-cpu.png", "determinism-nvidia-h200.png",
        "growth-points-made-cpu.png", "growth-batch-made-cpu.png", "growth-segments-made-cpu.png",
        "growth-threads-made-cpu.png",
    ]  # fmt: skip
    assert missing == ["no rows of attention on a device whose rates are known: not measured yet"]


def test_plots_have_an_opaque_sheet(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for picture in report_plots.pictures(newest(rows_of(attention(), tmp_path)))[0]:
        with Image.open(io.BytesIO(picture.png)) as image:
            pixels = image.convert("RGBA")
        assert pixels.getextrema()[3] == (255, 255) and pixels.getpixel((0, 0)) == (255, 255, 255, 255)


class Page(HTMLParser):
    """tags: their names; rows: cells of every table's lines; policy, texts by tag."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.rows, self.policy, self.texts, self._stack = [], [], "", {}, []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        if "content" in values and "http-equiv" in values:
            self.policy = values["content"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "link", "img"):
            self._stack.append(tag)

    def handle_endtag(self, tag):
        assert self._stack.pop() == tag

    def handle_data(self, data):
        inside = self._stack[-1] if self._stack else ""
        self.texts[inside] = self.texts.get(inside, "") + data
        if inside in ("td", "th"):
            self.rows[-1][-1] += data


# One pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def page_of(rows):
    """The page with two small pictures."""
    devices = ("Made CPU", "NVIDIA H200")
    pictures = [report_plots.Picture(f"Plot, {device}", device, "x.png", PNG) for device in devices]
    return report_page.page(rows, newest(rows), pictures, ["no rows of something"])


def test_the_page_has_tables_plots_and_every_row_with_its_commit(tmp_path):
    old = made(p50=77.0, commit="0ld0000", date="2026-11-01 10:00 UTC")
    rows = rows_of([*every(), old], tmp_path)
    page = Page(page_of(rows))
    head = page.rows.index(list(report_page._HEAD))
    shown = [dict(zip(report_page._HEAD, line)) for line in page.rows[head + 1 :]]
    assert [(line["provider"], line["commit"]) for line in shown] == [(row.provider, row.commit) for row in rows]
    assert shown[-1]["remark"] == "superseded" and shown[-1]["p50 ms"] == "77"
    assert [line["remark"] for line in shown].count("superseded") == 1
    # And the tables are those of the README.
    for table in TABLES.values():
        for block in blocks(table, newest(rows)):
            assert list(block.head) in page.rows and all(list(line.cells) in page.rows for line in block.lines)
    assert page.tags.count("img") == 2 and page.texts["li"] == "no rows of something"


def test_hostile_rows_stay_text(tmp_path, capsys):
    found = [
        {**row, **{name: HOSTILE for name in ("device", "commit", "torch", "whole", "command")},
         "provider": row["provider"] if row["provider"] == "ours" else f"_{HOSTILE}", "failed": None,
         "sizes": {**row["sizes"], HOSTILE: 1}, "date": f"2026 {HOSTILE}"}
        for row in [*every(), made("voxel_sample", shape=HOSTILE), made("voxel_sample", provider="x", shape=HOSTILE)]
    ]  # fmt: skip
    folder, path, page = write(tmp_path, found), tmp_path / "README.md", tmp_path / "page.html"
    path.write_text("<!-- bench:operations -->\n<!-- /bench -->\n<!-- bench:attention -->\n<!-- /bench -->\n")
    command = ["bench", "report", "--rows", str(folder)]
    assert main([*command, "--readme", str(path), "--out", str(page), "--plots", str(tmp_path / "plots")]) == 0
    assert main([*command, "--check", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    text = path.read_text()
    assert text.count("<!--") == 4 and "<script" not in text and "\x1b" not in text and "<img" not in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert len(list((tmp_path / "plots").iterdir())) == 7
    parsed = Page(page.read_text())
    assert parsed.tags.count("script") == 1 and parsed.tags.count("img") == 7
    assert parsed.texts["title"] == "wireframe: benchmarks"
    assert any(HOSTILE.replace("\x1b", "\\x1b") in cell for line in parsed.rows for cell in line)


def test_the_page_lets_nothing_run_but_its_own_script(tmp_path):
    page = Page(page_of(rows_of(attention(), tmp_path)))
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.texts[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in page.policy
    assert page.policy.startswith("default-src 'none'")


def test_a_browser_filters_by_device_and_operation(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page_of(rows_of([*every(), made("voxel_sample", HOSTILE, device=HOSTILE)], tmp_path)))
    count = "() => [...document.querySelectorAll('tbody tr')].filter(line => line.offsetParent).length"
    titles = "() => [...document.querySelectorAll('h2')].filter(t => t.offsetParent).map(t => t.innerText)"
    with launched() as browser:
        for scheme in ("light", "dark"):
            with opened(browser, path, color_scheme=scheme) as (tab, said):
                whole = tab.evaluate(count)
                assert whole == tab.locator("tbody tr").count() > len(every()) + 1
                tab.select_option("#device", "NVIDIA H200")
                assert tab.evaluate(titles) == [
                    "Steps of training", "The cost of determinism: steps", "Plots", "Every row",
                ]  # fmt: skip
                assert tab.evaluate(count) == 4 + 2 + 4
                tab.select_option("#op", "sinkhorn")
                assert tab.evaluate(count) == 0
                tab.select_option("#device", "")
                # Growth alone is in no table.
                assert tab.evaluate(count) == 3
                tab.select_option("#op", "")
                assert tab.evaluate(count) == whole and tab.title() == "wireframe: benchmarks"
                assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
                assert [line for line in said if not line.startswith("data:")] == []

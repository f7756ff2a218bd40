"""The page of ``wireframe view`` in a headless Chromium: it draws, its switches work, and nothing leaves it."""


import numpy as np
import pytest

from hash_pool import HashPool
from view_cases import (
    HOSTILE,
    NO_WEBGL,
    amount,
    launched,
    opened,
    pixels,
    same,
    sampled,
    wires,
    without_truth,
    write_rows,
)
from wireframe.shards import ShardWriter
from wireframe.synth import SynthConfig, make_scene
from wireframe.view import write as view
from wireframe.view.write import view_submission

# Of the light scheme, in style.css.
TRUTH, MISSED, RIGHT, EXTRA = "#7c8da3", "#c98a00", "#1763e0", "#d9480f"
TINY = SynthConfig(width=96, height=72, colmap_points=600, views_range=(4, 5), pose_only_prob=0.0)


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def quick_score():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view, "ScorePool", HashPool)
        patch.setattr(view, "require_hoho", lambda: None)
        yield


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def house(pages):
    """A page of one house with cameras: half of its edges predicted, and one beside it."""
    row = make_scene(0, 0, TINY)
    with ShardWriter(pages / "house.tar") as writer:
        writer.write(row)
    vertices = np.vstack([row["wf_vertices"], row["wf_vertices"][:2] + [0, 4, 0]])
    half = row["wf_edges"][: len(row["wf_edges"]) // 2]
    edges = np.vstack([half, [[len(vertices) - 2, len(vertices) - 1]]])
    predictions = {row["order_id"]: wires(vertices, edges)}
    view_submission(pages / "house.tar", pages / "house.html", predictions, progress=False)
    return pages / "house.html"


@pytest.fixture(scope="module")
def many(pages):
    """A page of three hundred scenes, some without truth, prediction or points, and some with names that attack."""
    scene = sampled("x", 1, points=64)
    samples = []
    for i in range(300):
        changed = {"order_id": f"scene-{i:03d}"}
        if i == 7:
            changed["order_id"] = HOSTILE
        if i == 9:
            changed["mask"] = np.zeros(64, bool)
        copy = type(scene)(**{**vars(scene), **changed})
        samples.append(without_truth(copy) if i in (8, 9) else copy)
    rows = write_rows(pages / "many.parquet", samples)
    edges = [[0, 1], [1, 2]]
    guesses = {s.order_id: wires([[0, 0, 0], [1, 0, i / 300], [0, 1, 0]], edges) for i, s in enumerate(samples)}
    del guesses["scene-009"], guesses["scene-010"]
    view_submission(rows, pages / "many.html", guesses, progress=False)
    return pages / "many.html"


def show_only(tab, *names):
    tab.evaluate(
        """(names) => {
          for (const box of document.querySelectorAll("#switches input")) {
            if (box.checked !== names.includes(box.id.slice(6))) box.click();
          }
        }""",
        names,
    )


@pytest.mark.parametrize("webgl", [True, False])
def test_every_layer_is_drawn_and_goes_when_switched_off(browser, house, webgl):
    with opened(browser, house, color_scheme="light") as (tab, said):
        if not webgl:
            tab.add_init_script(NO_WEBGL)
            tab.reload()
        assert tab.evaluate("canvas.getContext('webgl2') !== null") == webgl
        show_only(tab)
        nothing = pixels(tab)
        alone = {}
        for name in ("points", "cameras", "truth", "prediction", "ground"):
            show_only(tab, name)
            alone[name] = pixels(tab)
            assert (np.abs(alone[name].astype(int) - nothing).max(axis=2) > 12).sum() > 100, name
        colors = (TRUTH, MISSED, RIGHT, EXTRA)
        assert [amount(alone["truth"], c) > 30 for c in colors[1:]] == [True, False, False]
        assert [amount(alone["prediction"], c) > 30 for c in colors] == [False, False, True, True]
        # The same by mouse and by key; and what is off is off.
        show_only(tab)
        tab.get_by_text("Prediction").click()
        assert same(pixels(tab), alone["prediction"])
        tab.keyboard.press("4")
        assert same(pixels(tab), nothing) and said == []


def test_both_ways_of_drawing_put_lines_in_the_same_place(browser, house):
    found = []
    for script in ("", NO_WEBGL):
        with opened(browser, house, color_scheme="light") as (tab, _):
            tab.add_init_script(script)
            tab.reload()
            show_only(tab, "prediction")
            picture = pixels(tab).astype(int)
            found.append(picture.max(axis=2) - picture.min(axis=2) > 90)
    assert min(mask.sum() for mask in found) > 500
    # The rims of lines differ by a pixel.
    assert (found[0] ^ found[1]).sum() < 0.35 * found[0].sum()


def test_classes_of_points_are_switched_one_by_one(browser, house):
    with opened(browser, house, color_scheme="light") as (tab, said):
        show_only(tab, "points")
        every = pixels(tab)
        roof = tab.locator(".classes button", has_text="roof")
        roof.click()
        assert roof.get_attribute("aria-pressed") == "false"
        assert not same(pixels(tab), every)
        tab.get_by_role("button", name="Show none of the classes").click()
        gone = pixels(tab)
        roof.click()
        only = pixels(tab)
        assert amount(only, "#b08968", 40) > amount(gone, "#b08968", 40) + 20
        tab.get_by_role("button", name="Show all of the classes").click()
        assert same(pixels(tab), every) and said == []


def test_mouse_and_keys_move_the_view_and_reset_brings_it_back(browser, house):
    with opened(browser, house) as (tab, said):
        before = pixels(tab)
        box = tab.locator("#view").bounding_box()
        x, y = box["x"] + box["width"] / 3, box["y"] + box["height"] / 2
        for button, modifier in (("left", None), ("right", None), ("left", "Shift")):
            tab.mouse.move(x, y)
            if modifier:
                tab.keyboard.down(modifier)
            tab.mouse.down(button=button)
            tab.mouse.move(x + 90, y + 40, steps=3)
            tab.mouse.up(button=button)
            if modifier:
                tab.keyboard.up(modifier)
            assert not same(pixels(tab), before)
            tab.keyboard.press("r")
            assert same(pixels(tab), before)
        last = before
        for key in (None, "t", "+", "Shift+ArrowLeft", "Shift+ArrowUp"):
            if key is None:
                tab.mouse.wheel(0, 300)
                # A wheel's event comes when the browser likes.
                tab.wait_for_timeout(100)
            else:
                tab.keyboard.press(key)
            now = pixels(tab)
            assert not same(now, last), key
            last = now
        tab.locator("#reset").dispatch_event("click")
        assert same(pixels(tab), before)
        tab.keyboard.press("s")
        one = pixels(tab)
        assert not same(pixels(tab), one)
        tab.keyboard.press("s")
        assert said == []


def test_two_fingers_zoom(browser, house):
    with opened(browser, house, has_touch=True) as (tab, said):
        before = pixels(tab)
        tab.evaluate(
            """() => {
              const send = (kind, id, x) => canvas.dispatchEvent(new PointerEvent(kind, {
                pointerId: id, pointerType: "touch", clientX: x, clientY: 300, bubbles: true, buttons: 1 }));
              canvas.setPointerCapture = () => {};
              send("pointerdown", 11, 500); send("pointerdown", 12, 600);
              send("pointermove", 12, 800); send("pointerup", 11, 500); send("pointerup", 12, 800);
            }"""
        )
        assert not same(pixels(tab), before) and said == []


def test_the_picker_finds_sorts_and_steps(browser, many):
    with opened(browser, many) as (tab, said):
        rows, name = tab.locator("#scenes button"), tab.locator("#scene")
        assert rows.count() == 300
        values = rows.locator(".value").all_text_contents()
        scores = [float(value) for value in values if value != "–"]
        assert scores == sorted(scores) and values[298:] == ["–", "–"] and values[0] == "0.000"
        assert name.inner_text() == rows.first.get_attribute("title")
        tab.keyboard.press("ArrowLeft")
        assert name.inner_text() == "scene-009"
        tab.keyboard.press("ArrowRight")
        tab.keyboard.press("n")
        assert name.inner_text() == rows.nth(1).get_attribute("title")
        assert tab.evaluate("decodeURIComponent(location.hash)") == f"#{name.inner_text()}"
        tab.locator("#order").select_option("source")
        assert rows.nth(2).get_attribute("title") == "scene-002"
        tab.locator("#order").select_option("best")
        found = [float(value) for value in rows.locator(".value").all_text_contents() if value != "–"]
        assert found == scores[::-1]
        tab.locator("#filter").fill("NE-12")
        assert rows.count() == 10
        # Letters typed there are no commands.
        tab.locator("#filter").fill("")
        tab.locator("#filter").press_sequentially("prst1")
        assert tab.locator("#layer-points").is_checked() and tab.locator("#nothing").is_visible()
        tab.locator("#filter").fill("scene-123")
        rows.first.click()
        assert name.inner_text() == "scene-123" and rows.first.get_attribute("aria-current") == "true"
        tab.reload()
        assert name.inner_text() == "scene-123" and said == []


def test_scenes_that_lack_parts_are_shown_without_them(browser, many):
    with opened(browser, many) as (tab, said):
        tab.locator('#scenes button[title="scene-010"]').click()
        assert "no prediction" in tab.locator("#scored").inner_text()
        lacking = {"scene-008": ["cameras", "truth"], "scene-009": ["points", "cameras", "truth", "prediction"],
                   "scene-010": ["cameras", "prediction"]}  # fmt: skip
        for order_id, names in lacking.items():
            tab.locator(f'#scenes button[title="{order_id}"]').click()
            off = tab.locator("#switches input:disabled").evaluate_all("(boxes) => boxes.map((box) => box.id.slice(6))")
            assert tab.locator("#scene").inner_text() == order_id and off == names
            assert ("nothing to show" in tab.locator("#view").get_attribute("aria-label")) == (len(names) == 4)
            pixels(tab)
        assert said == []


def test_names_run_nothing_and_no_request_leaves(browser, many, visits, tmp_path):
    port, asked = visits
    ask = f"""() => Promise.allSettled([
        fetch("http://127.0.0.1:{port}/a", {{ mode: "no-cors" }}),
        new Promise((done) => {{ const image = new Image(); image.onload = image.onerror = done;
                                image.src = "http://127.0.0.1:{port}/b"; }}),
    ])"""
    with opened(browser, many) as (tab, said):
        title = tab.title()
        tab.locator("#filter").fill("ran")
        tab.locator("#scenes button").click()
        assert tab.locator("#scene").inner_text() == HOSTILE and tab.title() == title and "ran" not in title
        assert tab.locator("#scenes img, main img").count() == 0 and said == []
        tab.evaluate(ask)
        assert asked == [] and any("Content Security Policy" in line for line in said)
        assert tab.locator("#notice").is_visible()
    (tmp_path / "careless.html").write_text("<!DOCTYPE html><title>x</title>")
    with opened(browser, tmp_path / "careless.html") as (tab, _):
        tab.evaluate(ask)
        assert sorted(asked) == ["/a", "/b"]


CONTRAST = """() => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / (color.startsWith("color(") ? 1 : 255))
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (!/, 0\\)|\\/ 0\\)/.test(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  let worst = [21, ""];
  for (const element of document.querySelectorAll("h1, h2, p, span, strong, b, label, summary, button, option")) {
    if (!element.checkVisibility() || element.matches(":disabled, :disabled *")) continue;
    const [ink, back] = [light(getComputedStyle(element).color), light(paper(element))];
    const ratio = (Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.outerHTML.slice(0, 80)];
  }
  return worst;
}"""


@pytest.mark.parametrize("scheme, sky", [("light", "#ffffff"), ("dark", "#1b222c")])
def test_both_schemes_can_be_read_wide_and_narrow(browser, house, scheme, sky):
    with opened(browser, house, color_scheme=scheme) as (tab, said):
        ratio, where = tab.evaluate(CONTRAST)
        assert ratio > 4.5, where
        assert amount(pixels(tab), sky) > 20000
        tab.keyboard.press("d")
        assert amount(pixels(tab), sky) < 2000
        tab.set_viewport_size({"width": 390, "height": 760})
        assert tab.evaluate("document.documentElement.scrollWidth") == 390 and tab.locator("#side").is_hidden()
        tab.reload()
        assert not tab.evaluate("byId('layers').open")
        tab.locator("#menu").click()
        tab.locator("#scenes button").first.click()
        assert tab.evaluate("!byId('side').classList.contains('open')") and said == []


def test_everything_to_press_has_a_name(browser, house):
    with opened(browser, house) as (tab, _):
        nameless = tab.evaluate(
            """[...document.querySelectorAll("button, input, select, canvas")].filter((one) =>
              !(one.ariaLabel || one.textContent.trim() || one.labels?.length)).map((one) => one.outerHTML)"""
        )
        assert nameless == []


def test_a_lost_context_is_drawn_anew(browser, house):
    with opened(browser, house) as (tab, said):
        before = pixels(tab)
        tab.evaluate(
            """() => new Promise((done) => {
              const tool = canvas.getContext("webgl2").getExtension("WEBGL_lose_context");
              canvas.addEventListener("webglcontextrestored", done);
              canvas.addEventListener("webglcontextlost", () => setTimeout(() => tool.restoreContext(), 50));
              tool.loseContext();
            })"""
        )
        assert same(pixels(tab), before) and not [line for line in said if "rror" in line]


def test_a_picture_that_is_slow_is_coarse_while_it_moves_and_sharp_at_rest(browser, house):
    with opened(browser, house, reduced_motion="no-preference") as (tab, said):
        sharp = pixels(tab)
        width = tab.evaluate("canvas.width")
        tab.evaluate("(SLOW.frames = 0, spin(true))")
        pixels(tab)
        assert tab.evaluate("canvas.width") == round(width / 2)
        tab.evaluate("(spin(false), orbit.reset())")
        tab.wait_for_timeout(700)
        assert same(pixels(tab), sharp) and said == []

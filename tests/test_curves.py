"""Charts: every value in its place, whatever the values are."""

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from wireframe.train import curves
from wireframe.train.curves import Axis, Mark, Span, interval_chart, number, point_chart, step_chart

LEFT, RIGHT, TOP, BOTTOM = 46, 368, 18, 186


def parse(svg):
    root = ElementTree.fromstring(svg)
    assert root.get("viewBox") == f"0 0 {curves.WIDTH} {curves.HEIGHT}"
    return root


def points(path):
    return np.array([float(value) for value in re.findall(r"-?[\d.]+(?:e-?\d+)?", path)]).reshape(-1, 2)


def lines(svg, style="line"):
    return [points(p.get("d").replace("h0.01", "")) for p in parse(svg).iter("path") if p.get("class") == style]


def texts(svg):
    return [text.text for text in parse(svg).iter("text")]


def assert_inside(svg):
    for path in parse(svg).iter("path"):
        assert not re.search("nan|inf", path.get("d"))
        if path.get("class") in ("line", "band"):
            at = points(path.get("d").replace("h0.01", ""))
            assert (at[:, 0] >= LEFT).all() and (at[:, 0] <= RIGHT).all()
            assert (at[:, 1] >= TOP).all() and (at[:, 1] <= BOTTOM).all()
    for text in parse(svg).iter("text"):
        assert 0 <= float(text.get("x")) <= curves.WIDTH and 0 <= float(text.get("y")) <= curves.HEIGHT


def test_a_value_stands_where_its_axis_says():
    axis = Axis(0.0, 10.0, 100.0, 0.0)
    assert [axis.at(v) for v in (0, 5, 10, -3, 99)] == [100, 50, 0, 100, 0]
    log = Axis(1.0, 100.0, 0.0, 100.0, log=True)
    assert [log.at(v) for v in (1, 10, 100, 0, -5)] == pytest.approx([0, 50, 100, 0, 0])


@pytest.mark.parametrize("low, high", [(0, 1), (0.3, 0.8), (0, 170_000), (-3, 5), (1e-9, 3e-9), (99.9, 100.1)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = Axis(low, high, 0, 1).ticks()
    assert 2 <= len(ticks) <= 6 and low - 1e-12 <= ticks[0] and ticks[-1] <= high * (1 + 1e-12)
    assert all(len(re.sub(r"e-?\d+|[-.k0]", "", number(tick))) <= 4 for tick in ticks)


@pytest.mark.parametrize("low, high", [(0.1, 1), (0.013, 55), (1e-8, 1e3), (2.1, 18)])
def test_ticks_of_a_logarithmic_axis_are_few_and_inside(low, high):
    ticks = Axis(low, high, 0, 1, log=True).ticks()
    assert 1 <= len(ticks) <= 9 and all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)
    assert ticks == sorted(ticks)


def test_few_steps_are_drawn_one_by_one():
    steps, values = np.array([10.0, 20, 40]), np.array([1.0, 3, 2])
    (line,) = lines(step_chart("x", steps, values, log=False))
    assert line[:, 0].tolist() == [LEFT, round(LEFT + (RIGHT - LEFT) / 3, 1), RIGHT]
    assert line[1, 1] < line[2, 1] < line[0, 1]
    assert line[2, 1] == pytest.approx((line[0, 1] + line[1, 1]) / 2, abs=0.1)


def test_many_steps_become_columns_whose_band_reaches_the_extremes():
    steps = np.arange(1, 10_001, dtype=float)
    values = 2.0 + np.sin(steps / 500)
    values[5000] = 3.9
    values[7000] = 0.5
    chart = step_chart("x", steps, values, log=False)
    (line,), (band,) = lines(chart), lines(chart, "band")
    assert len(line) == curves.COLUMNS and len(band) == 2 * len(line)
    spike, dip = band[band[:, 1].argmin()], band[band[:, 1].argmax()]
    assert spike[0] == pytest.approx(LEFT + 0.5 * (RIGHT - LEFT), abs=3)
    assert dip[0] == pytest.approx(LEFT + 0.7 * (RIGHT - LEFT), abs=3)
    # The mean of a column hardly feels one value.
    assert line[:, 1].min() > spike[1] + 20 and line[:, 1].max() < dip[1] - 5


def test_a_line_is_broken_where_values_are_missing():
    steps = np.arange(10.0)
    values = np.ones(10)
    values[[3, 7, 8]] = math.nan, math.inf, -math.inf
    assert [len(line) for line in lines(step_chart("x", steps, values))] == [3, 3, 1]
    assert step_chart("x", steps, np.full(10, math.nan)) == ""
    assert step_chart("x", np.zeros(0), np.zeros(0)) == ""


@pytest.mark.parametrize("from_zero", [False, True])
@pytest.mark.parametrize("log", [None, True, False])
@pytest.mark.parametrize(
    "values",
    [
        [5.0], [0.0], [-2.0], [0.0, 0.0], [1e-300, 1e300, 1.0], [1e29, -1e29], [5e-324, 1.0], [-1e-12, 1e12],
        [1.0, 1.0 + 1e-15], [7e22, 7e22], [math.nan, 3.0], [math.inf, 1.0, math.nan],
        [10.0**e for e in range(-29, 29)],
    ],
)  # fmt: skip
def test_any_values_stay_in_the_chart(values, log, from_zero):
    steps = np.arange(len(values), dtype=float) * 1000
    chart = step_chart("x", steps, np.array(values), [Span("a", 0, 500)], log=log, from_zero=from_zero)
    if chart:
        assert_inside(chart)
    assert chart or not any(abs(v) < 1e29 for v in values)
    assert_inside(point_chart("x", [("a", list(zip(values, values[::-1])))]) or step_chart("x", steps, steps))


def test_random_values_stay_in_the_chart():
    rng = np.random.default_rng(0)
    for size in (1, 2, 151, 3000):
        steps = np.unique(rng.integers(1, 1 << 40, size=size)).astype(float)
        values = np.exp(rng.normal(scale=rng.uniform(0, 20), size=len(steps)))
        values[rng.random(len(steps)) < 0.1] = math.nan
        chart = step_chart("x", steps, values, [Span("a", 0, 1 << 39), Span("b", 1 << 39, 1 << 40)])
        assert chart == "" or not assert_inside(chart)


def test_stages_are_named_and_a_narrow_one_has_its_number():
    steps = np.arange(0.0, 1001, 10)
    spans = [Span("first <b>", 0, 800), Span("second", 800, 830), Span("third", 830, 1000), Span("fourth", 1000, 2000)]
    chart = step_chart("x", steps, steps + 1, spans, [Mark(500, "step 500: bad & <i>")])
    assert texts(chart)[:3] == ["first <b>", "2", "third"] and "fourth" not in chart
    assert "<b>" not in chart and "<i>" not in chart
    (mark,) = re.findall(r'class="bad" d="M([\d.]+) ', chart)
    assert float(mark) == pytest.approx(LEFT + (RIGHT - LEFT) / 2, abs=0.1)


def test_points_of_each_series_are_there():
    series = [("a<", [(0.1, 0.2), (0.5, 0.6)]), ("b", [(0.3, 0.4), (0.7, math.nan)]), ("c", [])]
    chart = point_chart("x", series, at=0.4)
    dots = [(c.get("class"), float(c.get("cx")), float(c.get("cy"))) for c in parse(chart).iter("circle")]
    assert [dot[0] for dot in dots] == ["dot s0", "dot s0", "dot s1"]
    assert dots[0][1] < dots[2][1] < dots[1][1] and dots[0][2] > dots[2][2] > dots[1][2]
    assert point_chart("x", []) == point_chart("x", [("a", [])], at=0.5) == ""
    assert next(title.text for title in parse(chart).iter("title")) == "a<: 0.2 at 0.1"


def test_bars_show_value_and_interval():
    chart = interval_chart("x", [("2048", 0.3, 0.25, 0.35), ("a very long name of a stage", 0.6, 0.5, 0.7)])
    widths = [float(bar.get("width")) for bar in parse(chart).iter("rect")]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2) and {"0.300", "0.600"} < set(texts(chart))
    assert any(text.endswith("…") for text in texts(chart)) and interval_chart("x", []) == ""
    assert_inside(interval_chart("x", [(str(i), 0.0, 0.0, 0.0) for i in range(12)]))


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (125_000, "125k"), (2_500_000, "2.5M"), (3e-5, "3e-5"), (0.1 + 0.2, "0.3"), (9_999, "9999"),
     (-1e-9, "-1e-9"), (math.nan, "not finite")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number(value) == text

"""Charts as inline SVG, drawn for a page that follows light and dark through CSS variables; no scripts.

Colours and type come from the classes ``grid``, ``tick``, ``stage``, ``band``, ``line``, ``bad`` and ``s0`` to ``s5``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 380, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 18, 24
SERIES_COLORS = 6
# As many columns as can be told apart; a column of several values shows their mean, lowest and highest.
COLUMNS = 150
# A span of values from which on a logarithmic axis shows more.
_LOG_SPAN = 8.0
_CHARACTER = 5.6
# No value of a run comes near; beyond it, and as far below 1, arithmetic on axes would leave the floats.
_HUGE = 1e30


class Axis(NamedTuple):
    """Maps values from ``low`` to ``high`` to pixels from ``start`` to ``end``, logarithmically or not."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value, kept within the axis."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            steps = [1.0] if last - first >= 2 else [1.0, 2.0, 5.0]
            every = max(1, math.ceil((last - first + 1) / 5))
            values = [s * 10.0**e for e in range(first - 1, last + 1) for s in steps if (e - first) % every == 0]
            return [v for v in values if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9)]
        size = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
        size *= next(s for s in (1, 2, 2.5, 5, 10) if (self.high - self.low) / (s * size) <= 5)
        first, last = math.ceil(self.low / size - 1e-9), math.floor(self.high / size + 1e-9)
        return [index * size for index in range(first, last + 1)]


class Span(NamedTuple):
    """A named part of the x axis."""

    name: str
    start: float
    end: float


class Mark(NamedTuple):
    """Something that happened at an x."""

    x: float
    what: str


def number(value: float) -> str:
    """A number in few characters."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def step_chart(
    label: str,
    steps: np.ndarray,  # [L], ascending
    values: np.ndarray,  # [L], not finite where there is none
    spans: Sequence[Span] = (),
    marks: Sequence[Mark] = (),
    *,
    log: bool | None = None,
    from_zero: bool = False,
) -> str:
    """A curve over steps, over the stages as bands; "" where no value is finite.

    Args:
        label: what it is, for readers that do not see it.
        marks: short red lines at the bottom.
        log: whether the axis of the values is logarithmic; None where their span asks for it.
        from_zero: the axis of the values begins at 0.
    """
    finite = np.abs(values) < _HUGE
    if not finite.any():
        return ""
    start = min([span.start for span in spans], default=float(steps[0]))
    end = max([float(steps[-1]), *(span.end for span in spans if span.start < steps[-1])])
    x = Axis(*_apart(start, end), _LEFT, WIDTH - _RIGHT)
    centre, mean, low, high = _columns(steps[finite], values[finite], x)
    y = _value_axis(low, high, log, from_zero)
    parts = [_stages(spans, x), _grid(x, y, number, number)]
    # Where a value is missing, the line is broken.
    gaps = steps[~finite]
    pieces = _pieces(centre, gaps)
    if len(mean) < finite.sum():
        parts += [f'<path class="band" d="{_area(x, y, centre[p], low[p], high[p])}"/>' for p in pieces]
    parts += [_line(x, y, centre[p], mean[p], "line") for p in pieces]
    bottom = HEIGHT - _BOTTOM
    for mark in marks:
        at = x.at(mark.x)
        parts.append(
            f'<path class="bad" d="M{at:.1f} {bottom}V{bottom - 9}"><title>{escape(mark.what)}</title></path>'
        )
    return _svg(label, parts)


def point_chart(
    label: str,
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    at: float | None = None,
) -> str:
    """Lines through (x, y) points, one for each named series; "" where there is none.

    Args:
        label: what it is, for readers that do not see it.
        at: an x to mark by a dashed line.
    """
    series = [(name, [p for p in points if all(abs(v) < _HUGE for v in p)]) for name, points in series]
    points = [point for _, some in series for point in some]
    if not points:
        return ""
    xs = [p[0] for p in points] + ([at] if at is not None else [])
    x = Axis(*_apart(min(xs), max(xs)), _LEFT + 8, WIDTH - _RIGHT - 8)
    heights = np.array([p[1] for p in points])
    y = _value_axis(heights, heights, False, False)
    parts = [_grid(x, y, number, number)]
    if at is not None:
        parts.append(f'<path class="used" d="M{x.at(at):.1f} {_TOP}V{HEIGHT - _BOTTOM}"/>')
    for index, (name, some) in enumerate(series):
        color = f"s{index % SERIES_COLORS}"
        if some:
            array = np.array(sorted(some))
            parts.append(_line(x, y, array[:, 0], array[:, 1], f"line {color}"))
        for px, py in some:
            text = escape(f"{name}: {number(py)} at {number(px)}")
            parts.append(
                f'<circle class="dot {color}" cx="{x.at(px):.1f}" cy="{y.at(py):.1f}" r="3.2">'
                f"<title>{text}</title></circle>"
            )
    return _svg(label, parts)


def interval_chart(label: str, rows: Sequence[tuple[str, float, float, float]]) -> str:
    """A bar for each (name, value, low, high) with its interval, values written out; "" where there is none."""
    if not rows:
        return ""
    left = min(max(_LEFT, 14 + _CHARACTER * max(len(row[0]) for row in rows)), 0.4 * WIDTH)
    x = Axis(0.0, max(0.1, *(row[3] for row in rows)) * 1.02, left, WIDTH - _RIGHT - 40)
    step = (HEIGHT - _TOP - _BOTTOM) / max(len(rows), 3)
    parts = []
    for index, (name, value, low, high) in enumerate(rows):
        middle, color = _TOP + (index + 0.5) * step, f"s{index % SERIES_COLORS}"
        thick = min(26.0, 0.56 * step)
        parts.append(
            f'<text class="tick" x="{left - 6:.1f}" y="{middle + 4:.1f}" text-anchor="end">'
            f'{escape(_fit(name, left - 8))}</text>'
            f'<rect class="bar {color}" x="{left:.1f}" y="{middle - thick / 2:.1f}" '
            f'width="{x.at(value) - left:.1f}" height="{thick:.1f}" rx="2"/>'
            f'<path class="whisker" d="M{x.at(low):.1f} {middle:.1f}H{x.at(high):.1f}M{x.at(low):.1f} '
            f'{middle - 4:.1f}v8M{x.at(high):.1f} {middle - 4:.1f}v8"/>'
            f'<text class="value" x="{x.at(high) + 7:.1f}" y="{middle + 4:.1f}">{value:.3f}</text>'
        )
    return _svg(label, parts)


def _value_axis(low: np.ndarray, high: np.ndarray, log: bool | None, from_zero: bool) -> Axis:
    bottom, top = float(low.min()), float(high.max())
    if log is None:
        log = bottom > 0 and top / bottom >= _LOG_SPAN
    if log and bottom > 1 / _HUGE:
        return Axis(bottom / 1.15, top * 1.15, HEIGHT - _BOTTOM, _TOP, log=True)
    if from_zero:
        bottom = min(bottom, 0.0)
    low_end, high_end = _apart(bottom, top)
    margin = 0.06 * (high_end - low_end)
    low_end = low_end if from_zero else low_end - margin
    # What is never negative gets no axis below 0.
    return Axis(max(low_end, 0.0) if bottom >= 0 else low_end, high_end + margin, HEIGHT - _BOTTOM, _TOP)


def _apart(low: float, high: float) -> tuple[float, float]:
    """The ends of an axis; around a constant, so that it lies in the middle."""
    size = max(abs(low), abs(high))
    if high - low > 1e-6 * size:
        return low, high
    margin = 0.1 * size or 1.0
    return low - margin, high + margin


def _columns(steps: np.ndarray, values: np.ndarray, x: Axis) -> tuple[np.ndarray, ...]:
    """Mean step, mean, lowest and highest value of each column of the chart that has some."""
    if len(steps) <= COLUMNS:
        return steps, values, values, values
    column = ((steps - x.low) / (x.high - x.low) * COLUMNS).astype(np.int64).clip(0, COLUMNS - 1)
    starts = np.flatnonzero(np.r_[True, column[1:] != column[:-1]])
    counts = np.diff(np.r_[starts, len(column)])
    return (
        np.add.reduceat(steps, starts) / counts,
        np.add.reduceat(values, starts) / counts,
        np.minimum.reduceat(values, starts),
        np.maximum.reduceat(values, starts),
    )


def _pieces(centre: np.ndarray, gaps: np.ndarray) -> list[slice]:
    """Runs of ``centre`` without a gap between two neighbours."""
    before = np.searchsorted(gaps, centre)
    cuts = [0, *(np.flatnonzero(np.diff(before)) + 1).tolist(), len(centre)]
    return [slice(a, b) for a, b in zip(cuts, cuts[1:]) if b > a]


def _line(x: Axis, y: Axis, xs: np.ndarray, ys: np.ndarray, style: str) -> str:
    points = " ".join(f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in zip(xs.tolist(), ys.tolist()))
    # A single point needs a second one to be seen: the line has round ends.
    return f'<path class="{style}" d="M{points}{"h0.01" if len(xs) == 1 else ""}"/>'


def _area(x: Axis, y: Axis, xs: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    there = [f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in zip(xs.tolist(), high.tolist())]
    back = [f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in zip(xs.tolist(), low.tolist())]
    return f"M{' '.join(there + back[::-1])}Z"


def _grid(x: Axis, y: Axis, x_text, y_text) -> str:
    parts = []
    for value in y.ticks():
        at = y.at(value)
        parts.append(
            f'<path class="grid" d="M{_LEFT} {at:.1f}H{WIDTH - _RIGHT}"/>'
            f'<text class="tick" x="{_LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{y_text(value)}</text>'
        )
    for value in x.ticks():
        parts.append(
            f'<text class="tick" x="{x.at(value):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{x_text(value)}</text>'
        )
    parts.append(f'<path class="axis" d="M{_LEFT} {HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>')
    return "".join(parts)


def _stages(spans: Sequence[Span], x: Axis) -> str:
    parts = []
    for index, span in enumerate(spans):
        left, right = x.at(span.start), x.at(span.end)
        if right <= left:
            continue
        if index % 2:
            parts.append(
                f'<rect class="stage" x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" '
                f'height="{HEIGHT - _TOP - _BOTTOM}"/>'
            )
        # A narrow stage has its number alone.
        name = span.name if len(span.name) * _CHARACTER < right - left - 4 else str(index + 1)
        parts.append(f'<text class="tick" x="{left + 2:.1f}" y="{_TOP - 6}">{escape(name)}</text>')
    return "".join(parts)


def _fit(text: str, width: float) -> str:
    """As much of the text as fits."""
    room = int(width / _CHARACTER)
    return text if len(text) <= room else text[: room - 1] + "…" if room > 2 else ""


def _svg(label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )

"""How rows of races become the lines of a table: the layouts that ``report_tables.TABLES`` chooses from.

A layout takes the races of one machine and gives a head and lines; cells are text, not escaped for anything yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from wireframe.bench.names import FIXED, FREE, OURS
from wireframe.bench.report_rows import Held, Row, time_ratio
from wireframe.bench.timing import milliseconds
from wireframe.errors import one_line

DIRTY_MARK, OTHER_RUN_MARK, HOST_MARK = "†", "‡", "§"


class Line(NamedTuple):
    """Cells, and the rows of one operation that they were made of."""

    rows: tuple[Row, ...]
    cells: tuple[str, ...]

    @property
    def op(self) -> str:
        return self.rows[0].op


Lines = tuple[tuple[str, ...], list[Line]]
Layout = Callable[[Sequence[Held]], Lines]


def _ms(row: Row | None) -> str:
    """The median as a cell, with its mark."""
    if row is None:
        return ""
    if row.p50_ms is None:
        return f"not timed: {one_line(row.failed or 'no reason given', 70)}"
    return milliseconds(row.p50_ms) + DIRTY_MARK * row.dirty + HOST_MARK * bool(row.host_bound)


def _spread(row: Row) -> str:
    low, high = row.p20_ms, row.p80_ms
    return "" if low is None or high is None else f"{milliseconds(low)}-{milliseconds(high)}"


def times_said(ratio: tuple[float, float | None, float | None]) -> str:
    middle, low, high = ratio
    return f"{times(middle)} x" + ("" if low is None else f" ({times(low)}-{times(high)})")


def times(value: float) -> str:
    """A ratio: two decimals, or three digits of large ones."""
    return f"{value:.2f}" if value < 10 else milliseconds(value)


def _against(row: Row | None, ours: Row | None) -> str:
    """A rival as a cell: milliseconds, and how often ours fits into them."""
    ratio = row and time_ratio(row, ours)
    if not ratio:
        return _ms(row)
    return f"{_ms(row)}, {_ratio_said(row, ours)}"


def _ratio_said(row: Row, ours: Row | None) -> str:
    """The ratio, marked where the two were measured in different runs; empty where there is none."""
    ratio = time_ratio(row, ours)
    if not ratio:
        return ""
    other = ours is not None and (row.date, row.commit) != (ours.date, ours.commit)
    return f"{times_said(ratio)}{OTHER_RUN_MARK if other else ''}"


def _name(race: Held, found: Sequence[Held]) -> str:
    """Operation, mode, dtype and cache, without what all races of the table share."""
    row = race.any
    several = {name: len({getattr(other.any, name) for other in found}) > 1 for name in ("op", "dtype", "cache")}
    cache = row.cache and several["cache"] and f"{row.cache} L2"
    named = (row.op if several["op"] else None, row.mode, row.dtype if several["dtype"] else None, cache)
    return ", ".join(filter(None, named)) or row.op


def _is_same(row: Row) -> bool:
    """False of what is timed and computes something else."""
    return row.exact or row.of_ours or row.failed is not None


def _named(row: Row, race: Held) -> str:
    return f"{row.provider}{'' if _is_same(row) else ' (not the same)'}: {_against(row, race.ours)}"


def _standing(race: Held) -> str:
    """Ours beside the fastest rival that computes the same: won, lost, or level where the interval holds 1.

    Of a single rival nobody knows whether it is the fastest. A row without an interval is level where its times and
    ours overlap, from p20 to p80.
    """
    timed = [(time_ratio(row, race.ours), row) for row in race.others if row.exact and not row.of_ours]
    timed = [(ratio, row) for ratio, row in timed if ratio]
    if not timed or race.ours is None or race.ours.p50_ms is None:
        return ""
    if len(timed) == 1:
        return "only one timed"
    (middle, low, high), row = min(timed, key=lambda item: item[0][0])
    if low is None:
        low, high = _overlap(row, race.ours) or (middle, middle)
    return f"{'won' if low > 1 else 'lost' if high < 1 else 'level'}, {times(middle)} x: {row.provider}"


def _overlap(row: Row, ours: Row) -> tuple[float, float] | None:
    """Least and largest ratio that p20 and p80 of both allow."""
    spread = (row.p20_ms, row.p80_ms, ours.p20_ms, ours.p80_ms)
    return None if None in spread else (row.p20_ms / ours.p80_ms, row.p80_ms / ours.p20_ms)


def rivals(named: tuple[str, ...], others: bool = True) -> Layout:
    """A line a race: ours, a column for each of the named rivals, who was fastest, and with ``others`` all the rest."""

    def layout(found: Sequence[Held]) -> Lines:
        lines = []
        for race in found:
            by_name = {row.provider: row for row in race.others}
            rest = [_named(row, race) for row in race.others if others and row.provider not in named]
            cells = (
                _name(race, found), race.any.shape, _ms(race.ours),
                *(_against(by_name.get(name), race.ours) for name in named), "; ".join(rest), _standing(race),
            )  # fmt: skip
            lines.append(Line(race.rows, cells))
        return _without_empty(("operation", "shape", OURS, *named, "other rivals", "beside the fastest"), lines)

    return layout


def _without_empty(head: tuple[str, ...], lines: list[Line]) -> Lines:
    kept = [i for i in range(len(head)) if any(line.cells[i] for line in lines)]
    return tuple(head[i] for i in kept), [Line(rows, tuple(cells[i] for i in kept)) for rows, cells in lines]


def parts(found: Sequence[Held]) -> Lines:
    """A line a part: ours, and its share of the whole that it is a part of, measured in turn."""
    lines = []
    for race in found:
        row, share = race.any, ""
        ratio = race.whole and time_ratio(race.whole, race.ours)
        if ratio:
            share = f"{100 / ratio[0]:.0f} % of {row.whole}"
        others = "; ".join(_named(other, race) for other in race.others)
        spread = _spread(race.ours) if race.ours else ""
        lines.append(Line(race.rows, (row.op, row.shape, _ms(race.ours), spread, share, others)))
    return _without_empty(("part", "shape", "median", "p20-p80", "share", "rivals"), lines)


def throughput(found: Sequence[Held]) -> Lines:
    """Scenes a second of every setting of ours."""
    lines = []
    for race in found:
        for row in race.rows:
            scenes = row.sizes.get("scenes")
            rate = f"{1e3 * scenes / row.p50_ms:.3g}" if scenes and row.p50_ms else ""
            ratio = "" if row is race.ours else _ratio_said(row, race.ours)
            lines.append(Line((row,), (row.provider, row.shape, rate, _ms(row), ratio)))
    return ("provider", "shape", "scenes/s", "ms", "time / ours"), lines


def steps(found: Sequence[Held]) -> Lines:
    """A line a provider: a step's time, and what the profiler said of it."""
    lines = []
    for race in found:
        for row in race.rows:
            ratio = "" if row is race.ours else _ratio_said(row, race.ours)
            mfu = "" if row.mfu is None else f"{row.mfu:.1%} of {row.mfu_of:g} TFLOP/s" if row.mfu_of else ""
            more = ("" if value is None else f"{value:g}" for value in (row.launches, row.peak_mib))
            launches, peak = more
            idle = "" if row.idle is None else f"{row.idle:.1%}"
            cells = (row.shape, row.provider, _ms(row), _spread(row), ratio, mfu, launches,
                     idle, peak)  # fmt: skip
            lines.append(Line((row,), cells))
    head = ("step", "provider", "ms a step", "p20-p80", "time / ours", "MFU", "launches", "idle", "peak MiB")
    return _without_empty(head, lines)


class Pair(NamedTuple):
    """Two rows of one race that differ in determinism alone. cost: time with it over time without, and interval."""

    race: Held
    provider: str
    free: Row
    fixed: Row
    cost: tuple[float, float | None, float | None]


def pairs(found: Sequence[Held]) -> Iterator[Pair]:
    """Of every race the rivals that ran with determinism and without."""
    for race in found:
        kinds: dict[tuple, dict[bool | None, Row]] = {}
        for row in race.rows:
            name = row.provider.removesuffix(FIXED).removesuffix(FREE)
            kinds.setdefault((name, row.dtype), {}).setdefault(row.deterministic, row)
        for (name, _), both in kinds.items():
            free, fixed = both.get(False), both.get(True)
            if free and fixed and free.p50_ms and fixed.p50_ms:
                yield Pair(race, name, free, fixed, _cost(race, free, fixed))


def _cost(race: Held, free: Row, fixed: Row) -> tuple[float, float | None, float | None]:
    if fixed is race.ours and free.ratio:
        middle, low, high = free.ratio
        return 1 / middle, high and 1 / high, low and 1 / low
    return fixed.p50_ms / free.p50_ms, None, None


def determinism(found: Sequence[Held]) -> Lines:
    """A line a pair, beside ours."""
    lines = []
    for race, provider, free, fixed, cost in pairs(found):
        cells = (_name(race, found), race.any.shape, provider, _ms(free), _ms(fixed), times_said(cost), _ms(race.ours))
        lines.append(Line(tuple(filter(None, (free, fixed, race.ours))), cells))
    return ("operation", "shape", "provider", "free", "deterministic", "cost", "ours, deterministic"), lines

"""The plots of bars: speed-up by operation, step time by provider, the cost of determinism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wireframe.bench.names import OURS
from wireframe.bench.report_draw import (
    COLORS,
    HATCHES,
    INK,
    OURS_COLOR,
    PAGE,
    label,
    new_figure,
    plain_log,
    tick_labels,
)
from wireframe.bench.report_layouts import pairs, times
from wireframe.bench.report_rows import Held, Row, races, time_ratio
from wireframe.bench.report_tables import TABLES
from wireframe.bench.timing import milliseconds

# What is beyond is not drawn; the tables have it.
MOST_BARS, _MOST_PANELS = 120, 12
_SHOWN_MODES = (None, "forward", "forward + backward")

_SAME_COMPILED, _SAME_EAGER, _SAME_OTHER, _ABOUT = _FAMILIES = (
    "torch.compile", "eager PyTorch or NumPy", "another implementation", "not quite the same work",
)  # fmt: skip


def _family(row: Row) -> str:
    if not row.exact:
        return _ABOUT
    if "compile" in row.provider:
        return _SAME_COMPILED
    return _SAME_EAGER if row.provider.startswith(("eager", "torch eager", "NumPy")) else _SAME_OTHER


def _fastest(race: Held) -> dict[str, tuple[float, float | None, float | None]]:
    """The ratio of the fastest rival of every family, in the order of families."""
    found: dict[str, tuple] = {}
    for row in race.others:
        ratio = None if row.of_ours else time_ratio(row, race.ours)
        if ratio and race.ours is not None:
            family = _family(row)
            found[family] = min(found.get(family, ratio), ratio, key=lambda r: r[0])
    return {family: found[family] for family in _FAMILIES if family in found}


def speed_up(rows: Sequence[Row]) -> Any:
    """Bars: time of the fastest rival of each family over ours; backward alone and graphs are left to the tables."""
    names = ("attention", "transport", "operations", "model")
    chosen = [row for row in rows if any(TABLES[name].holds(row) for name in names)]
    found = [(race, _fastest(race)) for race in races(chosen) if race.any.mode in _SHOWN_MODES]
    bars, count = [], 0
    for race, ratios in found:
        if ratios and count + len(ratios) <= MOST_BARS:
            bars.append((race, ratios))
            count += len(ratios)
    if not bars:
        return None
    figure, (axes,) = new_figure(1.5 + 0.17 * count + 0.14 * len(bars))
    position, places = 0.0, []
    for race, ratios in bars:
        first = position
        for family, ratio in ratios.items():
            _bar(axes, position, ratio, _FAMILIES.index(family))
            position -= 1.0
        places.append(((first + position + 1.0) / 2, race))
        position -= 0.8
    axes.set_xscale("log")
    axes.axvline(1.0, color=INK, linewidth=1.0)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.8), max(high, 1.25) * 1.35)
    axes.set_ylim(position + 0.6, 0.8)
    plain_log(axes.xaxis)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("time of the fastest rival / ours; left of 1 ours is slower")
    tick_labels(axes.yaxis, [place for place, _ in places], [_race_label(race) for _, race in places])
    _family_legend(figure, {family for _, ratios in bars for family in ratios})
    return figure


def _bar(axes: Any, position: float, ratio: tuple, style: int) -> None:
    middle, low, high = ratio
    axes.barh(position, middle - 1.0, left=1.0, height=0.82, color=COLORS[style + 1], hatch=HATCHES[style],
              edgecolor=PAGE, linewidth=0)  # fmt: skip
    if low is not None:
        axes.plot([low, high], [position, position], color=INK, linewidth=1.0, solid_capstyle="butt")
    end = max(middle, 1.0, high or 0.0)
    axes.annotate(times(middle), (end, position), (3, 0), textcoords="offset points", va="center", fontsize=7)


def _race_label(race: Held) -> str:
    row = race.any
    mode = "" if row.mode in (None, "forward") else f", {row.mode}"
    return f"{label(f'{row.op}{mode}', 48)}\n{label(row.shape, 48)}"


def _family_legend(figure: Any, present: set[str]) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=COLORS[i + 1], hatch=HATCHES[i], edgecolor=PAGE, linewidth=0, label=family)
        for i, family in enumerate(_FAMILIES)
        if family in present
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)


def steps(rows: Sequence[Row]) -> Any:
    """Bars: milliseconds of a step, a panel a shape."""
    found = [race for race in races([row for row in rows if TABLES["step"].holds(row)])]
    groups = [[row for row in race.rows if row.p50_ms] for race in found]
    groups = [group for group in groups if group][:_MOST_PANELS]
    if not groups:
        return None
    figure, panels = new_figure(0.7 + sum(0.55 + 0.27 * len(group) for group in groups), panels=len(groups))
    for axes, group in zip(panels, groups):
        for place, row in enumerate(group):
            axes.barh(place, row.p50_ms, height=0.7, color=OURS_COLOR if row.of_ours else COLORS[-1])
            if row.p20_ms and row.p80_ms:
                axes.plot([row.p20_ms, row.p80_ms], [place, place], color=INK, linewidth=1.0)
            text = f"{milliseconds(row.p50_ms)}{'†' if row.dirty else ''}"
            axes.annotate(text, (row.p80_ms or row.p50_ms, place), (3, 0), textcoords="offset points", va="center",
                          fontsize=7.5)  # fmt: skip
        axes.set_title(label(group[0].shape), loc="left", parse_math=False)
        axes.set_xlim(0, 1.12 * max(row.p80_ms or row.p50_ms for row in group))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        tick_labels(axes.yaxis, range(len(group)), [label(row.provider) for row in group])
    panels[-1].set_xlabel("ms a step, median and p20-p80; blue: ours")
    return figure


def determinism(rows: Sequence[Row]) -> Any:
    """Bars: time with determinism over time without, of everything that ran both ways."""
    names = ("determinism-kernels", "determinism-model", "determinism-step")
    found = list(pairs(races([row for row in rows if any(TABLES[name].holds(row) for name in names)])))[:MOST_BARS]
    if not found:
        return None
    figure, (axes,) = new_figure(1.1 + 0.34 * len(found))
    for place, pair in enumerate(found):
        middle, low, high = pair.cost
        color = OURS_COLOR if pair.provider == OURS else COLORS[1]
        axes.barh(place, middle, height=0.7, color=color)
        if low is not None:
            axes.plot([low, high], [place, place], color=INK, linewidth=1.0)
        axes.annotate(f"{times(middle)} x", (max(middle, high or 0.0, 1.0), place), (3, 0), textcoords="offset points",
                      va="center", fontsize=7.5)  # fmt: skip
    axes.axvline(1.0, color=INK, linewidth=1.0)
    axes.set_xlim(0, 1.12 * max(1.0, *(pair.cost[0] for pair in found)))
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("time with determinism / time without; blue: ours")
    labels = [f"{label(pair.provider, 40)}: {_race_label(pair.race)}" for pair in found]
    tick_labels(axes.yaxis, range(len(found)), labels)
    return figure

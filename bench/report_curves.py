"""The plots of points and lines: the roofline, and growth with points, scenes, segments and threads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from wireframe.bench.gpus import specified
from wireframe.bench.names import OURS
from wireframe.bench.report_draw import COLORS, INK, MARKERS, label, legend, new_figure, plain_log
from wireframe.bench.report_rows import Row
from wireframe.bench.report_tables import TABLES

# What is beyond is not drawn; the page has every row.
_MOST_PANELS, _MOST_LINES = 12, 7


def roofline(rows: Sequence[Row]) -> Any:
    """Points: products a second over products a byte, below the data sheet's roofs of the device."""
    chosen = [row for row in rows if row.flops and row.bytes and row.p50_ms and TABLES["attention"].holds(row)]
    gpu = specified(rows[0].device)
    if not chosen or gpu is None:
        return None
    figure, (axes,) = new_figure(5.2)
    ends = [min(row.flops / row.bytes for row in chosen) / 3, max(row.flops / row.bytes for row in chosen) * 3]
    half = any(row.dtype in ("bfloat16", "float16") for row in chosen)
    for peak, name in ((gpu.half, "half precision"), (gpu.single, "float32")):
        if half or peak == gpu.single:
            knee = peak / gpu.bandwidth
            x = sorted({*ends, *([knee] if ends[0] < knee < ends[1] else [])})
            axes.plot(x, [min(peak, gpu.bandwidth * at) for at in x], color=INK, linewidth=1.2,
                      linestyle="-" if peak == gpu.half else "--", label=f"roof, {name}: {peak:g} TFLOP/s")  # fmt: skip
    shown = dict.fromkeys(row.provider for row in chosen if row.exact or row.of_ours)
    for index, provider in enumerate(sorted(shown, key=lambda name: name != OURS)[:_MOST_LINES]):
        own = [row for row in chosen if row.provider == provider]
        ours = provider == OURS
        axes.scatter([row.flops / row.bytes for row in own], [row.flops / row.p50_ms / 1e9 for row in own], s=30,
                     marker=MARKERS[index], facecolor=COLORS[index] if ours else "none", edgecolor=COLORS[index],
                     zorder=3 if ours else 2, label=label(provider, 40))  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_log(axes.xaxis)
    plain_log(axes.yaxis)
    axes.set_xlabel(f"FLOP a byte of inputs and outputs; memory {gpu.bandwidth:g} TB/s")
    axes.set_ylabel("TFLOP/s")
    legend(figure, loc="outside lower center", ncols=3)
    return figure


def growth(rows: Sequence[Row], names: Sequence[str], least: int) -> Any:
    """Lines: milliseconds against one size, a panel an operation whose other sizes stay.

    Args:
        names: of the size, as operations call it. least: values of the size that make a line.
    """
    found = [panel for name in names for panel in _panels(rows, name, least)][:_MOST_PANELS]
    if not found:
        return None
    figure, panels = new_figure(0.5 + 2.9 * -(-len(found) // 2), columns=min(2, len(found)), panels=len(found))
    for axes, (title, name, lines) in zip(panels, found):
        in_order = sorted(lines.items(), key=lambda line: line[0] != OURS)[:_MOST_LINES]
        for index, (provider, by_size) in enumerate(in_order):
            sizes = sorted(by_size)
            own = [by_size[size] for size in sizes]
            axes.plot(sizes, [row.p50_ms for row in own], color=COLORS[index], marker=MARKERS[index], markersize=4,
                      linewidth=2.0 if provider == OURS else 1.2, label=label(provider, 32))  # fmt: skip
            low, high = ([getattr(row, name) or row.p50_ms for row in own] for name in ("p20_ms", "p80_ms"))
            axes.fill_between(sizes, low, high, color=COLORS[index], alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        every = sorted({size for by_size in lines.values() for size in by_size})
        axes.set_xticks(every, [f"{size:,}" for size in every])
        axes.minorticks_off()
        plain_log(axes.yaxis)
        axes.set_title(title, loc="left", parse_math=False)
        axes.set_xlabel(name)
        axes.set_ylabel("ms")
        legend(axes, fontsize=6.5)
    return figure


def _panels(rows: Sequence[Row], name: str, least: int) -> list[tuple[str, str, dict[str, dict[int, Row]]]]:
    """Title, name of the size, and by provider the row of every size."""
    groups: dict[tuple, dict[str, dict[int, Row]]] = {}
    for row in rows:
        if row.sizes.get(name, 0) > 0 and row.p50_ms:
            others = tuple(sorted(item for item in row.sizes.items() if item[0] != name))
            # Beside its sizes a shape may say what else differs: a key mask.
            kind = re.sub(r"\d+", "#", row.shape)
            key = (row.op, row.mode, row.dtype, row.cache, kind, others)
            groups.setdefault(key, {}).setdefault(row.provider, {})[row.sizes[name]] = row
    found = []
    for (op, mode, dtype, _, _, others), by_provider in groups.items():
        lines = {provider: line for provider, line in by_provider.items() if len(line) >= least}
        if OURS in lines:
            beside = ", ".join(f"{size} {value}" for size, value in others if name != "threads")
            mode = "" if mode in (None, "forward") else f", {mode}"
            found.append((f"{label(f'{op}{mode}', 44)}\n{label(beside or dtype or '', 52)}", name, lines))
    return found

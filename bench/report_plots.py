"""The plots of ``wireframe bench report``, as PNG: always the same bytes for the same rows and versions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from wireframe.bench.report_bars import determinism, speed_up, steps
from wireframe.bench.report_curves import growth, roofline
from wireframe.bench.report_draw import label, png, style
from wireframe.bench.report_rows import Row, machines
from wireframe.bench.report_tables import slug


class Plot(NamedTuple):
    """draw: puts rows of one machine into a figure; None where there are none of its kind. what: of which rows."""

    name: str
    title: str
    what: str
    draw: Callable[[Sequence[Row]], Any]


def _growth(name: str, title: str, names: tuple[str, ...], least: int = 3) -> Plot:
    draw = functools.partial(growth, names=names, least=least)
    return Plot(f"growth-{name}", f"Growth with {title}", f"growth with {title} (--grow)", draw)


PLOTS = (
    Plot("speedup", "Speed-up by operation", "operations and their rivals", speed_up),
    Plot("step", "Time of a training step", "wireframe bench step", steps),
    Plot("determinism", "The cost of determinism", "operations with and without determinism", determinism),
    Plot("roofline", "Attention under the roofline", "attention on a device whose rates are known", roofline),
    _growth("points", "points", ("points", "keys")),
    _growth("batch", "scenes", ("batch",)),
    _growth("segments", "segments", ("segments",)),
    # A machine with two cores has no third.
    _growth("threads", "threads", ("threads",), 2),
)


class Picture(NamedTuple):
    """name: of the file, without its folder."""

    title: str
    device: str
    name: str
    png: bytes


def pictures(rows: Sequence[Row]) -> tuple[list[Picture], list[str]]:
    """Every plot of every device that has rows for it, and lines about those that have none on any device.

    Of a device measured with several counts of threads the last count is drawn.

    Args:
        rows: the newest of each.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    found, missing = [], []
    with style():
        for plot in PLOTS:
            drawn: dict[str, Picture] = {}
            for device, threads in machines(rows):
                if device not in drawn:
                    figure = plot.draw([row for row in rows if (row.device, row.threads) == (device, threads)])
                    if figure is not None:
                        title = f"{plot.title}, {label(device)}"
                        figure.suptitle(title, parse_math=False)
                        drawn[device] = Picture(title, device, f"{plot.name}-{slug(device)}.png", png(figure))
            found += drawn.values()
            if not drawn:
                missing.append(f"no rows of {plot.what}: not measured yet")
    return found, missing

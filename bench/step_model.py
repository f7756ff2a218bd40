"""A model of the training step: what a GPU must do for it, and about how long that takes; nothing here has run.

``wireframe bench step --model`` traces the real step without a device (``step_trace``), gives every operation the time
of the largest of its products, its bytes and its launches on an RTX 4090 and an H200, and adds them up. Roofline times
are bounds; predictions multiply the peaks with the fractions of ``RATES``, each of which says where it comes from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from wireframe.bench import step_memory
from wireframe.bench.gpus import GPUS, Gpu, roofline_us
from wireframe.bench.step_aten import (
    ATTENTION,
    ELEMENTWISE,
    KINDS,
    MOVEMENT,
    OPTIMISER,
    PRODUCTS,
    REDUCTION,
    TRANSPORT,
)
from wireframe.bench.step_cases import Traced, traced
from wireframe.bench.step_fusion import fused
from wireframe.bench.step_trace import Row
from wireframe.bench.timing import append_rows
from wireframe.errors import WireframeError

# Milliseconds of a step wanted on an RTX 4090, by stage.
GOALS_MS = {1: 10.0, 2: 26.0, 3: 26.0}

# The published step there, under torch.compile.
PUBLISHED_MS = {1: 43.0, 2: 100.0, 3: 100.0}

# Least microseconds from the start of one kernel to the start of the next: in a CUDA graph, from what torch.compile
# makes, and from eager PyTorch with autograd. Assumed; "eager" is kind to slow hosts.
LAUNCH_US = {"graph": 2.0, "compiled": 5.0, "eager": 8.0}


class Rate(NamedTuple):
    """What a kind of operation reaches of a GPU's peak of products and of its bandwidth, and where that comes from."""

    products: float
    bandwidth: float
    source: str


_OURS = "results/nvidia-h200.jsonl: 77.3 GFLOP in 262 us, ours, 32 x 256 x 2048, key mask, forward + backward"
_RIVAL = "results/nvidia-h200.jsonl: 60.1 GFLOP in 363 us, torch.compile, the same"
_SINGLE = "NOTES.md: 29 ms of a step in float32 are our attention, 309 GFLOP"
_SMALL = "fitted: a step under bfloat16 autocast works 8.6 ms (NOTES.md); for large ones 785 of 790 TFLOP/s, 4.3 TB/s"

# By kind, on each GPU; attention of PyTorch and ours in float32 have rates of their own. For forward, loss and backward
# as they were when NOTES.md was written, an H200 gets 7.9 ms under autocast and 51 in float32; it took 8.6 and 46.
_OF_PYTORCH, _IN_SINGLE = f"{ATTENTION} of PyTorch", f"{ATTENTION} in float32"
RATES: dict[str, dict[str, Rate]] = {
    "RTX 4090": {
        PRODUCTS: Rate(0.70, 0.85, "assumed: 256 terms or columns"),
        ATTENTION: Rate(0.55, 0.85, "assumed: products weigh more against exponentials here than on an H200"),
        _OF_PYTORCH: Rate(0.45, 0.85, "assumed"),
        _IN_SINGLE: Rate(0.30, 0.85, "assumed"),
        ELEMENTWISE: Rate(0.50, 0.85, "assumed"),
        REDUCTION: Rate(0.50, 0.75, "assumed"),
        MOVEMENT: Rate(0.50, 0.80, "assumed"),
        TRANSPORT: Rate(0.50, 0.75, "assumed"),
        OPTIMISER: Rate(0.50, 0.80, "assumed"),
    },
    "H200": {
        PRODUCTS: Rate(0.45, 0.60, _SMALL),
        ATTENTION: Rate(77.3 / 262 / 790 * 1e3, 0.60, _OURS),
        _OF_PYTORCH: Rate(60.1 / 363 / 790 * 1e3, 0.60, _RIVAL),
        _IN_SINGLE: Rate(309 / 29 / 67, 0.60, _SINGLE),
        ELEMENTWISE: Rate(0.50, 0.50, _SMALL),
        REDUCTION: Rate(0.50, 0.45, _SMALL),
        MOVEMENT: Rate(0.50, 0.50, _SMALL),
        TRANSPORT: Rate(0.50, 0.45, _SMALL),
        OPTIMISER: Rate(0.50, 0.60, "assumed"),
    },
}  # fmt: skip

# Microseconds of kernels that wait for themselves, whatever the GPU does beside: one program a scene, iteration after
# iteration. In a CUDA graph on an H200, 64 problems (results/nvidia-h200.jsonl); other GPUs assumed equal.
LEAST_US = {
    "_segment_matching_fwd_kernel": 25.8,
    "_segment_matching_bwd_kernel": 33.8,
    "_sinkhorn_fwd_kernel": 21.0,
    "_sinkhorn_bwd_kernel": 19.0,
}


def bound_us(gpu: Gpu, row: Row) -> float:
    """Microseconds that no implementation of the operation by itself can beat."""
    return roofline_us(gpu, row.flops, row.moved, not row.half)


def predicted_us(name: str, row: Row, launch_us: float) -> float:
    """Microseconds of an operation on a GPU of ``GPUS``."""
    gpu, kind = GPUS[name], row.kind
    if kind == ATTENTION:
        kind = _OF_PYTORCH if not row.ours else kind if row.half else _IN_SINGLE
    rate = RATES[name][kind]
    scaled = Gpu(gpu.half * rate.products, gpu.single * rate.products, gpu.bandwidth * rate.bandwidth)
    return max(bound_us(scaled, row), LEAST_US.get(row.name, 0.0), row.launches * launch_us)


def run(of: str, stages: Sequence[int], every: bool, out: Path | None, half: bool = True) -> int:
    """Prints the model of a step for stages, and writes it to ``out``; 0.

    Args:
        of: one of ``step_cases.STEPS``. every: whether to list all operations.

    Raises:
        WireframeError: Triton, which plans our launches, is not installed.
    """
    from wireframe.kernels import dispatch

    if of == "ours" and dispatch.choose("qk_norm_attention", "auto", "meta") != "triton":
        raise WireframeError("our launches are planned by triton, which is not installed; run: pip install triton")
    reports = []
    for stage in stages:
        found = traced(of, stage, half)
        reports.append(report(found))
        print(text(found, every))
        if of == "ours":
            print(step_memory.text(stage, half), end="\n\n")
    if out:
        append_rows(out, reports)
    return 0


def ways(found: Traced) -> dict[str, tuple[Sequence[Row], float]]:
    """How a step may be run: rows, and the microseconds of a launch."""
    graph = {"in a CUDA graph": (found.rows, LAUNCH_US["graph"]), "eager": (found.rows, LAUNCH_US["eager"])}
    if found.of == "ours":
        return graph
    chains = fused(found.rows)
    return {
        "eager": (found.rows, LAUNCH_US["eager"]),
        "chains fused, from the host": (chains, LAUNCH_US["compiled"]),
        "chains fused, in a CUDA graph": (chains, LAUNCH_US["graph"]),
    }


def step_ms(name: str, rows: Iterable[Row], launch_us: float) -> float:
    """Milliseconds of a step on a GPU of ``GPUS``."""
    return sum(predicted_us(name, row, launch_us) for row in rows) / 1e3


def report(found: Traced) -> dict:
    """The model of a step as data: totals by way, classes, and every operation."""
    return {
        "of": found.of,
        "stage": found.stage,
        "batch": [found.scenes, found.points],
        "goal_ms": GOALS_MS[found.stage],
        "ways": {
            way: {
                "operations": len(rows),
                "launches": sum(row.launches for row in rows),
                "gflop": round(sum(row.flops for row in rows) / 1e9, 3),
                "mb": round(sum(row.moved for row in rows) / 1e6, 1),
                "bound_ms": {gpu: round(sum(bound_us(GPUS[gpu], row) for row in rows) / 1e3, 3) for gpu in GPUS},
                "predicted_ms": {gpu: round(step_ms(gpu, rows, launch), 3) for gpu in GPUS},
            }
            for way, (rows, launch) in ways(found).items()
        },
        "operations": [
            {"name": row.name, "class": row.part, "phase": row.phase, "shapes": row.shapes, "launches": row.launches,
             "flops": row.flops, "bytes": row.moved,
             "bound_us": {gpu: round(bound_us(GPUS[gpu], row), 2) for gpu in GPUS}}
            for row in found.rows
        ],
    }  # fmt: skip


def text(found: Traced, every: bool = False, most: int = 15) -> str:
    """The model of a step for people."""
    parts = []
    shown = dict(list(ways(found).items())[: 1 if found.of == "ours" else 2])
    for way, (rows, launch) in shown.items():
        step = f"{found.of}, stage {found.stage}: {found.scenes} x {found.points} points"
        parts += [f"{step}, {way}, {launch:g} us a launch", _classes(rows, launch), ""]
        parts += [f"the largest {most}, by operation and shapes", _largest(rows, launch, most), ""]
    if every:
        parts += ["every operation", _table([_HEADING, *(_cells(row, 1) for row in found.rows)]), ""]
    parts += ["a step, ms", _totals(found)]
    return "\n".join(parts) + "\n"


_BOUNDS = tuple(f"bound us {gpu}" for gpu in GPUS)
_PREDICTED = tuple(f"predicted us {gpu}" for gpu in GPUS)
_HEADING = ("phase", "class", "operation", "x", "launches", "GFLOP", "MB", *_BOUNDS, "shapes")


def _cells(row: Row, times: int) -> tuple[str, ...]:
    return (
        row.phase, row.part, row.name, str(times), str(times * row.launches), f"{times * row.flops / 1e9:.2f}",
        f"{times * row.moved / 1e6:.1f}", *(f"{times * bound_us(gpu, row):.1f}" for gpu in GPUS.values()), row.shapes,
    )  # fmt: skip


def _classes(rows: Sequence[Row], launch_us: float) -> str:
    groups: dict[str, list[Row]] = {kind: [row for row in rows if row.part == kind] for kind in KINDS}
    lines = [("class", "operations", "launches", "GFLOP", "MB", *_BOUNDS, *_PREDICTED)]
    for kind, group in [*groups.items(), ("all", list(rows))]:
        lines.append((
            kind, str(len(group)), str(sum(row.launches for row in group)),
            f"{sum(row.flops for row in group) / 1e9:.1f}", f"{sum(row.moved for row in group) / 1e6:.0f}",
            *(f"{sum(bound_us(gpu, row) for row in group):.0f}" for gpu in GPUS.values()),
            *(f"{1e3 * step_ms(gpu, group, launch_us):.0f}" for gpu in GPUS),
        ))  # fmt: skip
    return _table(lines)


def _largest(rows: Sequence[Row], launch_us: float, most: int) -> str:
    """Operations alike are one line; those that take an RTX 4090 longest first."""
    alike: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        alike[row.name, row.part, row.phase, row.shapes].append(row)
    groups = sorted(alike.values(), key=lambda group: -step_ms("RTX 4090", group, launch_us))
    lines = [(*_HEADING[:-1], *_PREDICTED, _HEADING[-1])]
    for group in groups[:most]:
        *cells, shapes = _cells(group[0], len(group))
        lines.append((*cells, *(f"{1e3 * step_ms(gpu, group, launch_us):.0f}" for gpu in GPUS), shapes))
    return _table(lines)


def _totals(found: Traced) -> str:
    lines = [("way", "launches", *(f"bound {gpu}" for gpu in GPUS), *(f"predicted {gpu}" for gpu in GPUS))]
    for way, (rows, launch) in ways(found).items():
        lines.append((
            way, str(sum(row.launches for row in rows)),
            *(f"{sum(bound_us(gpu, row) for row in rows) / 1e3:.2f}" for gpu in GPUS.values()),
            *(f"{step_ms(gpu, rows, launch):.2f}" for gpu in GPUS),
        ))  # fmt: skip
    goal, published = GOALS_MS[found.stage], PUBLISHED_MS[found.stage]
    return f"{_table(lines)}\nwanted on an RTX 4090: {goal:g}; published there: {published:g} (torch.compile)"


def _table(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)

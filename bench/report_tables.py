"""The tables of ``wireframe bench report``: definitions, and the blocks that rows make of them.

A table is data: its name in the README's markers, which rows it takes, and its layout. It has a block for every machine
(device and threads) with rows of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from wireframe.bench.report_layouts import (
    DIRTY_MARK,
    HOST_MARK,
    OTHER_RUN_MARK,
    Layout,
    Line,
    determinism,
    parts,
    rivals,
    steps,
    throughput,
)
from wireframe.bench.report_rows import Row, machines, races
from wireframe.bench.timing import slug

_NOTES = {
    DIRTY_MARK: "measured with changes that no commit holds",
    OTHER_RUN_MARK: "against ours of another run than the one beside it",
    HOST_MARK: "with launches that took the host longer than any pause hides",
}
_VERSIONS = {"torch": "torch", "triton": "triton", "numpy": "NumPy", "cuda": "CUDA", "driver": "driver"}


class Block(NamedTuple):
    """A table of one machine. caption: where its rows come from; commands: what measured them; notes: of marks."""

    device: str
    caption: str
    commands: tuple[str, ...]
    head: tuple[str, ...]
    lines: list[Line]
    notes: tuple[str, ...]


class Table(NamedTuple):
    """ops: by operation, the shapes that count (regular expression). part: of the bench. layout: lines of races."""

    name: str
    title: str
    part: str
    ops: dict[str, str]
    layout: Layout
    said: str = ""

    def holds(self, row: Row) -> bool:
        return row.part == self.part and row.op in self.ops and bool(re.fullmatch(self.ops[row.op], row.shape))


def blocks(table: Table, rows: Sequence[Row], device: str | None = None) -> list[Block]:
    """The blocks of a table, of all devices or of those whose name or ``slug`` is ``device``; none without rows.

    Args:
        rows: the newest of each.
    """
    chosen = [row for row in rows if table.holds(row) and device in (None, row.device, slug(row.device))]
    found = []
    for name, threads in machines(chosen):
        own = [row for row in chosen if (row.device, row.threads) == (name, threads)]
        head, lines = table.layout(races(own))
        if lines:
            found.append(_block(table, name, threads, head, lines))
    return found


def _block(table: Table, device: str, threads: int | None, head: tuple[str, ...], lines: list[Line]) -> Block:
    rows = [row for line in lines for row in line.rows]
    versions = [
        f"{title} {', '.join(dict.fromkeys(value for row in rows if (value := getattr(row, name))))}"
        for name, title in _VERSIONS.items()
        if any(getattr(row, name) for row in rows)
    ]
    loads = [row.load for row in rows if row.load is not None]
    days = sorted({row.date.split(" ")[0] for row in rows})
    commits = list(dict.fromkeys(row.commit for row in rows))
    about = [
        device, f"threads {'unknown' if threads is None else threads}", *versions,
        f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}",
        days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}",
    ]  # fmt: skip
    if loads:
        about.append(f"load {min(loads):g} to {max(loads):g}")
    text = "; ".join(about) + (f". {table.said}" if table.said else "")
    written = "".join(cell for line in lines for cell in line.cells)
    notes = tuple(f"{mark} {note}" for mark, note in _NOTES.items() if mark in written)
    return Block(device, text, tuple(dict.fromkeys(row.measured_by for row in rows)), head, lines, notes)


_ANY = ".*"
_ATTENTION = {
    "qk_norm_attention": "(32|64) x .*|1 x 4/2 x 256 x (256|4096) x 64.*|4 x 4/2 x 256 x 2048 x 64.*",
}
_TRANSPORT = dict.fromkeys(("sinkhorn", "segment_matching"), "64 x 64 x 64, .*")
_MODEL = {"perceiver": "1 x 4096", "perceiver with loss": _ANY}
_OPERATIONS = {
    **dict.fromkeys(
        ("sample_scenes", "house_mask", "clip_limits", "depth_points", "vote_labels", "point_tiers", "centre_and_scale",
         "priority_sample", "colors_to_ids", "parse_points3d", "voxel_sample"), _ANY,
    ),
    "farthest_point_sample": ".* -> 4096", "merge_vertices": "64 segments",
}  # fmt: skip
# Without the lines of growth with threads.
_PIPELINE = dict.fromkeys(
    ("raw bytes -> wireframe", "decoded scene -> wireframe", "read_scene", "read_points3d",
     "fuse_views + sample_points", "predict_segments", "wireframe_of", "make_scene"), "(?!.* threads$).*",
)  # fmt: skip
_PREPARING = dict.fromkeys(
    ("prepare one scene", "prepare: row", "prepare: PNG decode", "prepare: colours to ids", "prepare: COLMAP unzip",
     "prepare: points3D", "prepare: fusion", "prepare: sampling", "prepare: npz"), _ANY,
)  # fmt: skip
_STEP = {"training step": _ANY}

_IN_X = "Medians in ms; x: time of the rival / ours, in brackets its 95 % interval; below 1 ours is slower."
_PREPARED = "Medians in ms; ours alone has as many workers as threads."
_COST = "Medians in ms; cost: time with determinism / time without."
_TORCH = ("eager", "eager, deterministic", "torch.compile", "torch.compile, deterministic")
TABLES = {
    table.name: table
    for table in (
        Table("attention", "Attention", "kernels", _ATTENTION,
              rivals(("eager, float32", *_TORCH, "torch.compile, keys repeated, deterministic"), others=False), _IN_X),
        Table("transport", "Transport", "kernels", _TRANSPORT, rivals(_TORCH), _IN_X),
        Table("operations", "Native operations", "kernels", _OPERATIONS,
              rivals(("ours, 1 thread", "NumPy reference")), _IN_X),
        Table("model", "Model", "pipeline", _MODEL, rivals(_TORCH), _IN_X),
        Table("pipeline", "From a scene to its wireframe", "pipeline", _PIPELINE, parts, _IN_X),
        Table("prepare", "wireframe prepare", "pipeline", {"prepare": _ANY}, throughput, _PREPARED),
        Table("prepare-parts", "wireframe prepare, a scene", "pipeline", _PREPARING, parts, _IN_X),
        Table("step", "Steps of training", "step", _STEP, steps, _IN_X),
        Table("determinism-kernels", "The cost of determinism: kernels", "kernels", {**_ATTENTION, **_TRANSPORT},
              determinism, _COST),
        Table("determinism-model", "The cost of determinism: model", "pipeline", _MODEL, determinism, _COST),
        Table("determinism-step", "The cost of determinism: steps", "step", _STEP, determinism, _COST),
    )
}  # fmt: skip

"""Times fusion, sampling and graph building against their references and rivals: ``python -m wireframe.bench.fusion``.

Scene: 6 usable views of 768 x 576 with depth in all of them, 40k COLMAP points, 20k depth points a view. All
providers of a part run in turn on the same input, so a ratio compares neighbours in time. On ``--device cuda`` whole
batches of scenes run on the GPU, against the native CPU implementation.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from wireframe.batched import sample_scenes
from wireframe.bench.gpu_timing import CudaClock
from wireframe.bench.pipeline import BARS, FUSE, MERGE, SMALL, Setup, noisy_segments
from wireframe.bench.timing import (
    Case,
    append_rows,
    describe_machine,
    heading,
    measure,
    milliseconds,
    result,
    wall_ms,
)
from wireframe.classes import GESTALT_NAMES, ids_to_colors
from wireframe.fusion import fuse_views
from wireframe.graph import GraphConfig
from wireframe.kernels import native, ops
from wireframe.sampling import sample_points
from wireframe.scene import Scene, read_scene
from wireframe.scene_batch import SceneBatch
from wireframe.synth import make_scene

_SEED, _INDEX = 0, 9
GPU = "native, cuda"

# Bars against a rival; those in milliseconds are pipeline.BARS.
RATIOS = {"farthest_point_sample": "<= fpsample", "parse_points3d": "<= np.loadtxt / 10"}


class _Rivals:
    """The providers of a part: native with all threads and with one, then the reference."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def call(self, part: str, shape: str, run: Callable) -> list[Case]:
        """``run`` takes the keywords impl and threads."""
        settings = [(f"native, {self._threads} threads", "native", self._threads), ("native, 1 thread", "native", 1),
                    ("reference", "reference", None)]  # fmt: skip
        return [
            Case(part, provider, shape, lambda impl=impl, threads=threads: run(impl=impl, threads=threads))
            for provider, impl, threads in settings
        ]

    def op(self, name: str, shape: str, *arguments: object) -> list[Case]:
        return self.call(name, shape, lambda **how: getattr(ops, name)(*arguments, **how))


def cpu_groups(scene: Scene, setup: Setup, threads: int) -> Iterator[list[Case]]:
    """The rivals of each part, in the order of the chain."""
    rivals = _Rivals(threads)
    count, num_points = setup.depth_points_per_view, setup.model.num_points
    maps = f"{len(scene.views)} x {scene.views[0].ade.shape[1]} x {scene.views[0].ade.shape[0]}"
    yield rivals.call(
        FUSE, maps, lambda **how: sample_points(fuse_views(scene, count, **how), num_points, **how)
    )
    batch = SceneBatch.from_scenes([scene])
    mask, limits = ops.house_mask(batch), ops.clip_limits(batch)
    yield rivals.op("house_mask", maps, batch)
    yield rivals.op("clip_limits", maps, batch)
    yield rivals.op("depth_points", f"{maps} -> {count} a view", batch, mask, limits, count)
    xyz = torch.cat([batch.points, ops.depth_points(batch, mask, limits, count)[0].flatten(0, 1)])
    offsets = torch.tensor([0, len(xyz)])
    cloud = f"{len(xyz)} points"
    yield rivals.op("vote_labels", f"{cloud} x {len(scene.views)} views", batch, xyz, offsets)
    votes = ops.vote_labels(batch, xyz, offsets)
    labels = (votes.visible_src, votes.visible_id, votes.behind)
    yield rivals.op("point_tiers", cloud, *labels)
    group_id, _ = ops.point_tiers(*labels)
    source = (torch.arange(len(xyz)) >= len(scene.points)).to(torch.uint8)
    ragged = (votes.n_views_voted > 0, offsets, batch.keys)
    yield rivals.op("centre_and_scale", cloud, xyz, source, *ragged)
    yield rivals.op("priority_sample", f"{cloud} -> {num_points}", source, group_id, *ragged, num_points)
    yield from _reading_groups(scene, rivals)
    yield from _subset_groups(xyz, num_points, rivals)


def _reading_groups(scene: Scene, rivals: _Rivals) -> Iterator[list[Case]]:
    gestalt = scene.views[0].gestalt
    image = torch.from_numpy(ids_to_colors(np.minimum(gestalt, len(GESTALT_NAMES) - 1), "gestalt"))
    yield rivals.op("colors_to_ids", f"{image.shape[1]} x {image.shape[0]}", image, "gestalt")
    for digits in (17, 7):
        text, shape = points3d_text(scene.points, digits), f"{len(scene.points)} lines, {digits} digits"

        def loadtxt(text: bytes = text) -> np.ndarray:
            return np.loadtxt(io.BytesIO(text), usecols=(1, 2, 3), dtype=np.float64)

        yield [*rivals.op("parse_points3d", shape, text), Case("parse_points3d", "np.loadtxt", shape, loadtxt)]


def _subset_groups(xyz: torch.Tensor, num_points: int, rivals: _Rivals) -> Iterator[list[Case]]:
    order = torch.randperm(len(xyz), generator=torch.Generator().manual_seed(0))
    cloud = xyz[order[:50_000]].contiguous()
    part, shape = "farthest_point_sample", f"{len(cloud)} -> {num_points}"
    # The plain reference takes seconds at this size.
    group = [Case(part, "native, 1 thread", shape,
                  lambda: ops.farthest_point_sample(cloud, num_points, impl="native", threads=1))]  # fmt: skip
    if importlib.util.find_spec("fpsample"):
        from fpsample import bucket_fps_kdline_sampling

        points = cloud.numpy()
        rival = lambda: bucket_fps_kdline_sampling(points, num_points, h=7)  # noqa: E731
        group.append(Case(part, "fpsample kdline h=7", shape, rival))
    yield group
    yield rivals.op("voxel_sample", f"{len(cloud)} points at 0.05", cloud, 0.05)


def merge_group(scene: Scene, count: int) -> list[Case]:
    """Merging the vertices of ``count`` noisy segments."""
    vertices = torch.from_numpy(noisy_segments(scene, count).reshape(-1, 3).astype(np.float64))
    edges = torch.arange(2 * count).reshape(-1, 2)
    thresholds = GraphConfig().merge_thresholds
    return [
        Case(MERGE, impl, f"{count} segments",
             lambda impl=impl: ops.merge_vertices(vertices, edges, thresholds, impl=impl))
        for impl in ("native", "reference")
    ]  # fmt: skip


def points3d_text(points: np.ndarray, digits: int) -> bytes:
    """points3D.txt with a track of three images a point; COLMAP writes 17 digits, ``make_scene`` about 7."""
    lines = ["# 3D point list with one line of data per point:"]
    lines += [
        f"{i} {x:.{digits}g} {y:.{digits}g} {z:.{digits}g} 120 96 80 0.7312 {i % 7} {i} {i % 5} {i + 1} 3 {i + 2}"
        for i, (x, y, z) in enumerate(points.astype(np.float64).tolist())
    ]
    return "\n".join(lines).encode()


def cuda_groups(scenes: list[Scene], setup: Setup, threads: int) -> Iterator[list[Case]]:
    """Whole batches on the GPU, the native CPU implementation on the same batch, then each operation on the GPU."""
    count, num_points = setup.depth_points_per_view, setup.model.num_points
    how = {"num_points": num_points, "depth_points_per_view": count, "impl": "native"}
    for size in (1, 8, 32):
        batch = SceneBatch.from_scenes([scenes[i % len(scenes)] for i in range(size)])
        gpu = batch.to("cuda")
        yield [
            Case("sample_scenes", GPU, f"{size} scenes", lambda b=gpu: sample_scenes(b, **how)),
            Case("sample_scenes", f"native, cpu, {threads} threads", f"{size} scenes",
                 lambda b=batch: sample_scenes(b, **how, threads=threads)),
        ]  # fmt: skip
    mask, limits = ops.house_mask(gpu), ops.clip_limits(gpu)
    drawn, _ = ops.depth_points(gpu, mask, limits, count)
    offsets, xyz = drawn.shape[1] * gpu.view_offsets, drawn.flatten(0, 1)
    votes = ops.vote_labels(gpu, xyz, offsets)
    labels = (votes.visible_src, votes.visible_id, votes.behind)
    group_id, _ = ops.point_tiers(*labels)
    source = torch.ones(len(xyz), dtype=torch.uint8, device="cuda")
    ragged = (votes.n_views_voted > 0, offsets, gpu.keys)
    for name, *arguments in (
        ("house_mask", gpu), ("clip_limits", gpu), ("depth_points", gpu, mask, limits, count),
        ("vote_labels", gpu, xyz, offsets), ("point_tiers", *labels), ("centre_and_scale", xyz, source, *ragged),
        ("priority_sample", source, group_id, *ragged, num_points),
    ):  # fmt: skip
        shape = f"{len(gpu)} scenes, {len(xyz)} points"
        yield [Case(name, GPU, shape, lambda name=name, a=arguments: getattr(ops, name)(*a, impl="native"))]


def extra_memory_mb(run: Callable[[], object]) -> float | None:
    """How far the resident memory of the process rises above where it was while ``run`` runs once; Linux alone."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        before = _status_kb("VmRSS")
        # Writing 5 resets the high-water mark (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")
        kept = run()
        peak = _status_kb("VmHWM")
        del kept
    except (OSError, AttributeError, StopIteration):
        return None
    return (peak - before) / 1024


def _status_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def format_table(rows: list[dict]) -> str:
    """Markdown; the ratio is how many times the first provider of a part is faster."""
    columns = ("part", "shape", "provider", "median ms", "p20-p80", "first is faster by", "bar")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    first: dict = {}
    for row in rows:
        key = (row["op"], row["shape"])
        base = first.setdefault(key, row)
        low, middle, high = (milliseconds(row[f"{name}_ms"]) for name in ("p20", "p50", "p80"))
        ratio = "" if row is base else f"{row['p50_ms'] / base['p50_ms']:.2g} x"
        bar = RATIOS.get(row["op"]) or (f"<= {BARS[row['op']]:g} ms" if row["op"] in BARS else "")
        bar = bar if row is base else ""
        cells = (row["op"], row["shape"], row["provider"], middle, f"{low}-{high}", ratio, bar)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the table and appends the rows to ``--out``."""
    parser = argparse.ArgumentParser(prog="python -m wireframe.bench.fusion", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of each part (default 9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of the native CPU code")
    parser.add_argument("--small", action="store_true", help="a small scene, to see that it runs")
    parser.add_argument("--out", metavar="FILE", help="append one JSON line a provider to this file")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return 0
    setup = SMALL if arguments.small else Setup()
    machine = describe_machine(arguments.device)
    print(heading(machine), flush=True)
    problem = native.problem("_C" if arguments.device == "cpu" else "_C_cuda")
    if problem is not None:
        print(f"nothing to measure: {problem}")
        return 1
    if arguments.device == "cuda":
        scenes = [read_scene(make_scene(_SEED, index, setup.scene)) for index in range(4)]
        groups, clocks = cuda_groups(scenes, setup, arguments.threads), {GPU: CudaClock()}
    else:
        scene = read_scene(make_scene(_SEED, _INDEX, setup.scene))
        _print_memory(scene, setup, arguments.threads)
        groups, clocks = cpu_groups(scene, setup, arguments.threads), {}
        groups = [*groups, merge_group(scene, 64)]
    rows = []
    for group in groups:
        clock = clocks.get(group[0].provider, wall_ms)
        for case, times in zip(group, measure(group, arguments.repeats, clock)):
            rows.append(result(case, times, machine))
            if arguments.out:
                append_rows(arguments.out, rows[-1:])
    print(f"\n{format_table(rows)}")
    return 0


def _print_memory(scene: Scene, setup: Setup, threads: int) -> None:
    fuse_views(scene, 10)
    extra = extra_memory_mb(
        lambda: sample_points(
            fuse_views(scene, setup.depth_points_per_view, threads=threads), setup.model.num_points, threads=threads
        )
    )
    text = "not measured on this system" if extra is None else f"{extra:.1f} MB"
    print(f"extra memory of {FUSE}: {text} (bar <= 40 MB)")


if __name__ == "__main__":
    raise SystemExit(main())

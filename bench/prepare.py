"""Times ``wireframe prepare`` and the parts of one scene: ``python -m wireframe.bench.prepare``.

Raw scenes are made in a temporary folder. For every number of workers the whole command runs on them, several times in
turn: scenes a second, and CPU seconds a second of wall time, which is how many cores were busy. Then one thread goes
through the parts of single scenes, to see what bounds it.
"""

from __future__ import annotations

import argparse
import io
import itertools
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from wireframe.bench.timing import Case, append_rows, describe_machine, heading, measure, milliseconds, result
from wireframe.classes import colors_to_ids
from wireframe.fusion import fuse_views
from wireframe.images import depth_millimetres, label_rgb
from wireframe.kernels import dispatch, ops
from wireframe.prepare import PrepareConfig, prepare
from wireframe.raw_rows import build_row
from wireframe.samples import read_sample, write_parquet, write_sample
from wireframe.sampling import sample_points
from wireframe.scene import read_scene
from wireframe.shards import RawSample, iter_samples
from wireframe.synth import SynthConfig, write_shards

# "training": COLMAP points as the demo model was trained with; "full": as in the real data.
SIZES = {
    "full": SynthConfig(),
    "training": SynthConfig(colmap_points=8000),
    "small": SynthConfig(width=96, height=72, colmap_points=600, views_range=(4, 5)),
}
PARTS = (
    "tar", "row", "PNG decode", "colours to ids", "COLMAP unzip", "points3D", "fusion", "sampling", "npz", "Parquet",
)
# The parts that have several implementations, by an operation of theirs.
CHOICES = {
    "colours to ids": "colors_to_ids", "points3D": "parse_points3d", "fusion": "vote_labels",
    "sampling": "priority_sample",
}  # fmt: skip
_SEED = 0


def throughput_rows(size: str, raw: Path, scenes: int, workers: list[int], repeats: int, machine: dict) -> list[dict]:
    """A row for each number of workers: the whole of ``prepare``, from the tar to the Parquet file."""
    cases, busy = [], {}
    for count in workers:
        cpu = busy[count] = []
        run = _whole_run(raw, count, scenes, cpu)
        cases.append(Case("prepare", f"{count} workers", f"{scenes} scenes, {size} size", run))
    rows = []
    for case, count, times in zip(cases, workers, measure(cases, repeats, warmup=1)):
        cpu_ms, wall_ms = np.array(busy[count][-len(times) :]), np.array(times)
        rates = {
            "scenes_per_s": round(scenes / float(np.median(wall_ms)) * 1e3, 3),
            "cores_busy": round(float(np.median(cpu_ms / wall_ms)), 3),
            "cpu_ms_per_scene": round(float(np.median(cpu_ms)) / scenes, 3),
        }
        rows.append(result(case, times, machine, size=size, workers=count, **rates))
    return rows


def _whole_run(raw: Path, workers: int, scenes: int, cpu: list[float]) -> Callable[[], None]:
    def run() -> None:
        with tempfile.TemporaryDirectory() as out:
            start = time.process_time()
            report = prepare(raw, out, PrepareConfig(keep_all=True), workers=workers, progress=False)
            cpu.append((time.process_time() - start) * 1e3)
        if report.rows != scenes:
            raise RuntimeError(f"{report.rows} of {scenes} scenes were prepared")

    return run


def part_rows(size: str, raw: Path, scenes: int, impls: list[str], machine: dict) -> list[dict]:
    """A row for each part and implementation: milliseconds a scene, one scene after another in one thread."""
    start = time.perf_counter()
    samples = list(itertools.islice(iter_samples(raw), scenes))
    tar_ms = (time.perf_counter() - start) * 1e3 / len(samples)
    rows = []
    for impl in impls:
        # The first scene warms up.
        scene_parts(samples[0], impl, defaultdict(list))
        times: dict[str, list[float]] = defaultdict(list, tar=[tar_ms])
        prepared = [scene_parts(sample, impl, times) for sample in samples]
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            write_parquet(prepared, Path(folder) / "a.parquet")
            times["Parquet"] = [(time.perf_counter() - start) * 1e3 / len(samples)]
        for part in PARTS:
            provider = dispatch.choose(CHOICES[part], impl) if part in CHOICES else "shared"
            if impl == impls[0] or part in CHOICES:
                case = Case(part, provider, f"{len(samples)} scenes, {size} size", scene_parts)
                mean = round(float(np.mean(times[part])), 5)
                rows.append(result(case, times[part], machine, size=size, mean_ms=mean))
    return rows


def scene_parts(sample: RawSample, impl: str, times: dict[str, list[float]]) -> dict:
    """One scene from its raw members to its row, in one thread; appends the milliseconds of each part to ``times``."""
    spent: dict[str, float] = defaultdict(float)

    def timed(part: str, run: Callable, *arguments: object, **keywords: object):
        start = time.perf_counter()
        value = run(*arguments, **keywords)
        spent[part] += (time.perf_counter() - start) * 1e3
        return value

    config, how = PrepareConfig(), {"impl": impl, "threads": 1}
    scene = read_scene(build_row(sample.key, sample.members))
    row = timed("row", build_row, sample.key, sample.members)
    for view in scene.views:
        for table in ("ade", "gestalt"):
            colours = timed("PNG decode", label_rgb, row[table][view.index])
            timed("colours to ids", colors_to_ids, colours, table, **how)
        if view.depth is not None:
            timed("PNG decode", depth_millimetres, row["depth"][view.index])
    archive = timed("COLMAP unzip", zipfile.ZipFile, io.BytesIO(row["colmap"]))
    text = timed("COLMAP unzip", archive.read, "points3D.txt")
    timed("points3D", ops.parse_points3d, text, **how)
    points = timed("fusion", fuse_views, scene, config.depth_points_per_view, **how)
    sampled = timed("sampling", sample_points, points, config.num_points, **how)
    written = timed("npz", write_sample, sampled)
    timed("npz", read_sample, written)
    for part, ms in spent.items():
        times[part].append(ms)
    return written


def format_throughput(rows: list[dict]) -> str:
    """The whole command as a Markdown table."""
    lines = [
        "| prepare | workers | scenes/s | cores busy | CPU ms a scene | against the first |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        first = next(other for other in rows if other["size"] == row["size"])
        ratio = row["scenes_per_s"] / first["scenes_per_s"]
        lines.append(
            f"| {row['shape']} | {row['workers']} | {row['scenes_per_s']:.2f} | {row['cores_busy']:.2f} "
            f"| {row['cpu_ms_per_scene']:.1f} | {ratio:.2f} x |"
        )
    return "\n".join(lines)


def format_parts(rows: list[dict]) -> str:
    """One scene's parts as a Markdown table: mean milliseconds, share, and how much slower the reference is."""
    ours = [row for row in rows if row["provider"] != "reference"] or rows
    lines = [
        f"| part of one scene, {ours[0]['shape']} | by | mean ms | share | reference ms | reference / ours |",
        "|---|---|---|---|---|---|",
    ]
    total = sum(row["mean_ms"] for row in ours)
    for row in ours:
        rival = [r["mean_ms"] for r in rows if r["op"] == row["op"] and r["provider"] == "reference" and r is not row]
        theirs = f"{milliseconds(rival[0])} | {rival[0] / row['mean_ms']:.1f} x" if rival else "|"
        share = 100 * row["mean_ms"] / total
        lines.append(f"| {row['op']} | {row['provider']} | {milliseconds(row['mean_ms'])} | {share:.0f} % | {theirs} |")
    slowest = max(ours, key=lambda row: row["mean_ms"])
    return "\n".join([*lines, f"| sum | | {milliseconds(total)} | bound by {slowest['op']} | | |"])


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the tables and appends the rows to ``--out``."""
    parser = argparse.ArgumentParser(prog="python -m wireframe.bench.prepare", description=__doc__.split("\n")[0])
    parser.add_argument("--scenes", type=int, default=64, help="scenes of each size (default 64)")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["full"], help="default full")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers to compare (default 1 2)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--part-scenes", type=int, default=16, help="scenes for the parts (default 16)")
    parser.add_argument("--reference", action="store_true", help="the parts by the NumPy reference too (slow)")
    parser.add_argument("--out", metavar="FILE", help="append one JSON line a measurement to this file")
    arguments = parser.parse_args(argv)
    machine = describe_machine()
    for size in arguments.size:
        with tempfile.TemporaryDirectory() as folder:
            raw, scenes = Path(folder), arguments.scenes
            write_shards(raw, _SEED, 0, scenes, SIZES[size], shard_size=scenes, workers=max(arguments.workers))
            print(heading(machine), flush=True)
            whole = throughput_rows(size, raw, scenes, arguments.workers, arguments.repeats, machine)
            print(f"\n{format_throughput(whole)}\n", flush=True)
            impls = ["auto", "reference"] if arguments.reference else ["auto"]
            parts = part_rows(size, raw, arguments.part_scenes, impls, machine)
            print(f"{format_parts(parts)}\n", flush=True)
        if arguments.out:
            append_rows(arguments.out, whole + parts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

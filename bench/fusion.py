"""Races of fusion, sampling, reading and graph building against their NumPy references and other packages.

The scene is that of ``bench/pipeline.py``. On a GPU whole batches of scenes run there, beside the native code on the
CPU. Rivals that do about the same work, and not the same, are named by what they do.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wireframe.batched import sample_scenes
from wireframe.bench.pipeline import SEED, Setup, decoded, noisy_segments, own_rivals, setup_of
from wireframe.bench.race import Bar, How, Race, Rival, Work, package
from wireframe.classes import GESTALT_NAMES, ids_to_colors
from wireframe.graph import GraphConfig
from wireframe.kernels import ops
from wireframe.merging import unique_edges
from wireframe.scene import read_scene
from wireframe.scene_batch import SceneBatch
from wireframe.synth import make_scene

_SUBSET = 50_000
_VOXEL = 0.05


class Stage(NamedTuple):
    """Batch and points of the scenes, and what each operation gives to the next."""

    batch: SceneBatch
    mask: Tensor
    limits: Tensor
    xyz: Tensor  # [P, 3]
    offsets: Tensor
    source: Tensor
    votes: Any
    group_id: Tensor


@functools.lru_cache(maxsize=1)
def _stage(setup: Setup) -> Stage:
    scene = decoded(setup)
    batch = SceneBatch.from_scenes([scene])
    mask, limits = ops.house_mask(batch), ops.clip_limits(batch)
    drawn = ops.depth_points(batch, mask, limits, setup.depth_points_per_view)[0].flatten(0, 1)
    xyz = torch.cat([batch.points, drawn])
    if len(xyz) != setup.candidates:
        raise ValueError(f"{len(xyz)} points, not the {setup.candidates} that are stated")
    offsets = torch.tensor([0, len(xyz)])
    source = (torch.arange(len(xyz)) >= len(batch.points)).to(torch.uint8)
    votes = ops.vote_labels(batch, xyz, offsets)
    return Stage(batch, mask, limits, xyz, offsets, source, votes, ops.point_tiers(*_labels(votes))[0])


def _labels(votes: Any) -> tuple[Tensor, Tensor, Tensor]:
    return votes.visible_src, votes.visible_id, votes.behind


def _arguments(setup: Setup) -> dict[str, Callable[[Stage], tuple]]:
    """By operation, its arguments; in the order of the chain."""

    def ragged(s: Stage) -> tuple:
        return s.votes.n_views_voted > 0, s.offsets, s.batch.keys

    count, points = setup.depth_points_per_view, setup.model.num_points
    return {
        "house_mask": lambda s: (s.batch,),
        "clip_limits": lambda s: (s.batch,),
        "depth_points": lambda s: (s.batch, s.mask, s.limits, count),
        "vote_labels": lambda s: (s.batch, s.xyz, s.offsets),
        "point_tiers": lambda s: _labels(s.votes),
        "centre_and_scale": lambda s: (s.xyz, s.source, *ragged(s)),
        "priority_sample": lambda s: (s.source, s.group_id, *ragged(s), points),
    }


def races(how: How) -> Iterator[Race]:
    """On a GPU batches and operations there; on a CPU every operation from the files to the graph."""
    setup = setup_of(how)
    if how.device == "cuda":
        yield from _cuda_races(setup, how)
        return
    more = {
        "depth_points": [Rival("cv2.depthTo3d, all pixels, per camera", lambda: _depth_to_3d(setup), exact=False)],
        "vote_labels": [Rival("cv2.projectPoints + bincount, gestalt alone", _project_points, exact=False)],
    }
    for op, arguments in _arguments(setup).items():
        on_maps = op in ("house_mask", "clip_limits", "depth_points")
        shape = setup.maps if on_maps else f"{setup.candidates} points, {setup.scene.views_range[1]} views"
        make = functools.partial(_operation, op, arguments, setup, more.get(op, []))
        yield Race(op, "forward", shape, setup.sizes, "float32", make)
    yield from _reading_races(setup, how)
    yield from _subset_races(setup, how)
    for count in (64, 128, 256) if how.grow else (64,):
        make = functools.partial(_merging, setup, count)
        bars = () if how.small or count > 64 else (Bar(0.2),)
        yield Race("merge_vertices", "forward", f"{count} segments", {"segments": count}, "float64", make, bars=bars)


def _run(op: str) -> Callable:
    return getattr(ops, op)


def _operation(op: str, arguments: Callable[[Stage], tuple], setup: Setup, more: list[Rival]) -> Work:
    return Work([arguments(_stage(setup))], [*own_rivals(_run(op)), *more])


def _depth_to_3d(setup: Setup) -> Callable:
    cv2 = package("cv2", "opencv-python-headless")
    views = decoded(setup).views

    def run(*_: object) -> list[np.ndarray]:
        return [cv2.depthTo3d(view.depth, view.K.astype(np.float64)) for view in views]

    return run


def _project_points() -> Callable:
    cv2 = package("cv2", "opencv-python-headless")

    def run(batch: SceneBatch, xyz: Tensor, offsets: Tensor) -> np.ndarray:
        points, classes = xyz.numpy(), len(GESTALT_NAMES)
        keys = []
        for (_, _, height, width, start, *_), K, R, t in zip(batch.views.tolist(), batch.K, batch.R, batch.t):
            rotation = cv2.Rodrigues(R.numpy().astype(np.float64))[0]
            camera = (t.numpy().astype(np.float64), K.numpy().astype(np.float64))
            pixels, _ = cv2.projectPoints(points, rotation, *camera, None)
            x, y = np.rint(pixels[:, 0]).T
            ahead = points @ R[2].numpy() + float(t[2]) > 0
            seen = np.flatnonzero(ahead & (x >= 0) & (x < width) & (y >= 0) & (y < height))
            place = start + y[seen].astype(np.int64) * width + x[seen].astype(np.int64)
            label = np.minimum(batch.gestalt.numpy()[place], classes - 1)
            keys.append(seen * classes + label)
        votes = np.bincount(np.concatenate(keys), minlength=len(points) * classes).reshape(-1, classes)
        return votes.argmax(1)

    return run


def _reading_races(setup: Setup, how: How) -> Iterator[Race]:
    width, height, points = setup.scene.width, setup.scene.height, setup.scene.colmap_points
    sizes = {"width": width, "height": height}
    yield Race("colors_to_ids", "forward", f"{width} x {height}", sizes, "uint8", functools.partial(_colours, setup))
    for digits in (17, 7):
        shape, make = f"{points} lines, {digits} digits", functools.partial(_parsing, setup, digits)
        bars = () if how.small else (Bar(10.0, "np.loadtxt"),)
        yield Race("parse_points3d", "forward", shape, {"points": points}, "float32", make, bars=bars)


def _colours(setup: Setup) -> Work:
    ids = [np.minimum(view.gestalt, len(GESTALT_NAMES) - 1) for view in decoded(setup).views[:5]]
    inputs = [(torch.from_numpy(ids_to_colors(i, "gestalt")), "gestalt") for i in ids]
    return Work(inputs, own_rivals(ops.colors_to_ids))


def _parsing(setup: Setup, digits: int) -> Work:
    def loadtxt(text: bytes) -> np.ndarray:
        return np.loadtxt(io.BytesIO(text), usecols=(1, 2, 3), dtype=np.float64)

    rivals = [*own_rivals(ops.parse_points3d), Rival("np.loadtxt", lambda: loadtxt, budget=1e-7)]
    return Work([(points3d_text(decoded(setup).points, digits),)], rivals)


def points3d_text(points: np.ndarray, digits: int) -> bytes:
    """points3D.txt with a track of three images a point; COLMAP writes 17 digits, ``make_scene`` about 7."""
    lines = ["# 3D point list with one line of data per point:"]
    lines += [
        f"{i} {x:.{digits}g} {y:.{digits}g} {z:.{digits}g} 120 96 80 0.7312 {i % 7} {i} {i % 5} {i + 1} 3 {i + 2}"
        for i, (x, y, z) in enumerate(points.astype(np.float64).tolist())
    ]
    return "\n".join(lines).encode()


def _subset_races(setup: Setup, how: How) -> Iterator[Race]:
    count, points = min(_SUBSET, setup.candidates), setup.model.num_points
    bars = () if how.small else (Bar(1.0, "fpsample"),)
    for size in (1024, 2048, 4096, 8192, 16384) if how.grow else (points,):
        make = functools.partial(_farthest, setup, size, how.small)
        sizes = {"points": size}
        yield Race("farthest_point_sample", "forward", f"{count} -> {size}", sizes, "float32", make,
                   bars=bars if size == points else ())  # fmt: skip
    make = functools.partial(_voxels, setup)
    yield Race("voxel_sample", "forward", f"{count} points at {_VOXEL}", {"points": count}, "float32", make)


def _subset(setup: Setup) -> Tensor:
    xyz = _stage(setup).xyz
    return xyz[torch.randperm(len(xyz), generator=torch.Generator().manual_seed(0))[:_SUBSET]].contiguous()


def _farthest(setup: Setup, count: int, small: bool) -> Work:
    cloud = _subset(setup)

    def fpsample() -> Callable:
        sample = package("fpsample", "fpsample").bucket_fps_kdline_sampling
        points = cloud.numpy()
        return lambda *_: sample(points, count, h=7, start_idx=0)

    # One thread: every choice needs the one before. At the full size the reference takes a hundred times as long as
    # ours, 2.7 s: once it is what ours must equal, in turns it would only wait.
    reference, ours, _ = own_rivals(ops.farthest_point_sample)
    rivals = [
        Rival("fpsample kdline h=7", fpsample, exact=False),
        Rival("Open3D", lambda: _open3d(cloud, lambda c: c.farthest_point_down_sample(count)), exact=False),
    ]
    if small:
        return Work([(cloud, count)], [reference, ours, *rivals])
    return Work([(cloud, count)], [ours, *rivals], reference=reference.build())


def _voxels(setup: Setup) -> Work:
    cloud = _subset(setup)
    rival = Rival("Open3D, means", lambda: _open3d(cloud, lambda c: c.voxel_down_sample(_VOXEL)), exact=False)
    return Work([(cloud, _VOXEL)], [*own_rivals(ops.voxel_sample), rival])


def _open3d(xyz: Tensor, sample: Callable) -> Callable:
    o3d = package("open3d", "open3d")
    cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(xyz.double().numpy()))
    return lambda *_: sample(cloud)


def _merging(setup: Setup, count: int) -> Work:
    """Merging the vertices of ``count`` noisy segments."""
    vertices = torch.from_numpy(noisy_segments(decoded(setup), count).reshape(-1, 3).astype(np.float64))
    edges = torch.arange(2 * count).reshape(-1, 2)

    def run(*inputs: Any, impl: str = "auto", threads: int | None = None) -> tuple[Tensor, Tensor]:
        return ops.merge_vertices(*inputs, impl=impl)

    own = [rival for rival in own_rivals(run) if rival.provider != "ours, 1 thread"]
    rivals = [*own, Rival("SciPy", _scipy_merging, budget=1e-12)]
    return Work([(vertices, edges, GraphConfig().merge_thresholds)], rivals)


def _scipy_merging() -> Callable:
    """The same passes by a tree of SciPy and its components."""
    tree, graph, sparse = (package(f"scipy.{name}", "scipy") for name in ("spatial", "sparse.csgraph", "sparse"))

    def merge(vertices: Tensor, edges: Tensor, thresholds: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
        points, pairs = vertices.numpy(), edges.numpy()
        for threshold in thresholds:
            near = tree.cKDTree(points).query_pairs(threshold, output_type="ndarray")
            linked = sparse.coo_matrix((np.ones(len(near)), near.T), shape=2 * (len(points),))
            clusters, label = graph.connected_components(linked, directed=False)
            sums = np.zeros((clusters, 3))
            np.add.at(sums, label, points)
            points, pairs = sums / np.bincount(label)[:, None], label[pairs]
        return points, unique_edges(pairs)

    return merge


def _cuda_races(setup: Setup, how: How) -> Iterator[Race]:
    for batch in (1, 8, 32):
        make = functools.partial(_batches, setup, batch, how.threads)
        sizes = {**setup.sizes, "batch": batch}
        yield Race("sample_scenes", "forward", f"{batch} scenes, {setup.maps}", sizes, "float32", make, host=True,
                   cache="cold")  # fmt: skip
    for op, arguments in _arguments(setup).items():
        make = functools.partial(_on_cuda, op, arguments, setup)
        yield Race(op, "forward", f"8 scenes, {setup.maps}", {**setup.sizes, "batch": 8}, "float32", make, host=True,
                   cache="cold")  # fmt: skip


@functools.lru_cache(maxsize=1)
def _batch(setup: Setup, size: int) -> SceneBatch:
    scenes = [read_scene(make_scene(SEED, index, setup.scene)) for index in range(min(size, 4))]
    return SceneBatch.from_scenes([scenes[i % len(scenes)] for i in range(size)])


def _batches(setup: Setup, size: int, threads: int) -> Work:
    batch = _batch(setup, size)
    how = {"num_points": setup.model.num_points, "depth_points_per_view": setup.depth_points_per_view, "impl": "native"}
    rivals = [
        Rival(f"ours, CPU, {threads} threads", lambda: lambda gpu, cpu: sample_scenes(cpu, **how, threads=threads)),
        Rival("ours", lambda: lambda gpu, cpu: sample_scenes(gpu, **how)),
    ]
    return Work([(batch.to("cuda"), batch)], [rival._replace(deterministic=True, budget=0.0) for rival in rivals])


@functools.lru_cache(maxsize=1)
def _stages(setup: Setup) -> tuple[Stage, Stage]:
    """Eight scenes on the GPU and on the CPU."""
    return tuple(_depth_stage(setup, batch) for batch in (_batch(setup, 8).to("cuda"), _batch(setup, 8)))


def _depth_stage(setup: Setup, batch: SceneBatch) -> Stage:
    mask, limits = ops.house_mask(batch), ops.clip_limits(batch)
    drawn, _ = ops.depth_points(batch, mask, limits, setup.depth_points_per_view)
    offsets, xyz = drawn.shape[1] * batch.view_offsets, drawn.flatten(0, 1)
    source = torch.ones(len(xyz), dtype=torch.uint8, device=xyz.device)
    votes = ops.vote_labels(batch, xyz, offsets)
    return Stage(batch, mask, limits, xyz, offsets, source, votes, ops.point_tiers(*_labels(votes))[0])


def _on_cuda(op: str, arguments: Callable[[Stage], tuple], setup: Setup) -> Work:
    rivals = [
        Rival("ours, CPU", lambda: lambda gpu, cpu: _run(op)(*cpu, impl="native")),
        Rival("ours", lambda: lambda gpu, cpu: _run(op)(*gpu, impl="native")),
    ]
    inputs = tuple(map(arguments, _stages(setup)))
    return Work([inputs], [rival._replace(deterministic=True, budget=0.0) for rival in rivals])

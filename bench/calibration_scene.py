"""What ``wireframe.bench.calibration`` measures of one scene, in a process of its own."""

from __future__ import annotations

import dataclasses
import io
import signal
import time
import zipfile
from types import SimpleNamespace

import numpy as np

from wireframe.classes import EDGE_NAMES, GESTALT_ID, GESTALT_NAMES, POINT_CLASSES, colors_to_ids
from wireframe.colmap import read_points3d
from wireframe.fusion import SOURCE_COLMAP, fuse_views
from wireframe.graph import Wireframe, segments_to_wireframe
from wireframe.rivals import Dummies, try_handcrafted
from wireframe.sampling import sample_points
from wireframe.scene import read_scene
from wireframe.synth import Building, SynthConfig, make_scene

CELL = 0.6
_DEPTH_POINTS = 8000
_NUM_POINTS = 4096
_SMALL = {"width": 320, "height": 240, "colmap_points": 12000}
_STEP = 0.1
# So many are made a second time, small, to see how long that takes.
_TIMED_SCENES = 24
# The structural classes, which say where the roof is.
_ROOF = POINT_CLASSES.index("roof")


@dataclasses.dataclass(frozen=True)
class Measured:
    """One scene: its truth, the wireframes of the methods by name, and counts.

    ``votes``: mean number of views that voted for a sampled point; ``depth_scales`` [n]: of each view with depth, the
    median of its depth over that of the COLMAP points that it sees; ``cells``, ``empty_cells``: of 0.6 m that the true
    edges pass through, and those without a COLMAP point; ``seconds``, ``small_seconds``: CPU time to make the scene,
    and to make it with 320 x 240 pixels and 12,000 COLMAP points, None where that was not tried.
    """

    order_id: str
    truth: Wireframe
    predicted: dict[str, Wireframe]
    failure: str | None
    views: int
    depth_missing: int
    blank: int
    votes: float
    depth_scales: np.ndarray
    points: int
    cells: int
    empty_cells: int
    vertices: int
    edges: int
    seconds: float
    small_seconds: float | None

    def as_json(self) -> dict:
        """The numbers, without wireframes."""
        row = dataclasses.asdict(self)
        del row["truth"], row["predicted"]
        return {**row, "depth_scales": self.depth_scales.tolist()}


def one_thread() -> None:
    """For a worker process: one thread, and Ctrl-C left to the parent."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def measure_scene(seed: int, index: int, *, config: SynthConfig, dummies: Dummies, rival: bool = True) -> Measured:
    """Makes a scene and measures it; without ``rival`` the handcrafted one, which can kill the process, is left out."""
    start = time.process_time()
    row = make_scene(seed, index, config)
    seconds = time.process_time() - start
    small_seconds = None
    if index < _TIMED_SCENES:
        start = time.process_time()
        make_scene(seed, index, dataclasses.replace(config, **_SMALL))
        small_seconds = time.process_time() - start
    scene = read_scene(row)
    sampled = sample_points(fuse_views(scene, _DEPTH_POINTS), _NUM_POINTS)
    truth = Wireframe(scene.vertices, scene.edges)
    points, class_id = sampled.world_points()
    segments = sampled.gt_segments * sampled.scale + sampled.center
    predicted = {"truth": segments_to_wireframe(segments, points, class_id)}
    query = roof_sample(points[sampled.source[sampled.mask] == SOURCE_COLMAP],
                        class_id[sampled.source[sampled.mask] == SOURCE_COLMAP])
    predicted["nearest"], predicted["mean"] = dummies.nearest.predict(query), dummies.mean.predict(query)
    failure: str | None = "its process died"
    if rival:
        predicted["handcrafted"], failure = try_handcrafted(row)
    cloud = read_points3d(row["colmap"])
    cells, empty = edge_cells(scene.vertices, scene.edges, cloud)
    unclassified = GESTALT_ID["unclassified"]
    return Measured(
        order_id=scene.order_id, truth=truth, predicted=predicted, failure=failure,
        views=len(row["image_ids"]), depth_missing=sum(image is None for image in row["depth"]),
        blank=sum((colors_to_ids(np.asarray(image), "gestalt") == unclassified).all() for image in row["gestalt"]),
        votes=float(sampled.n_views_voted[sampled.mask].mean()), depth_scales=depth_scales(row),
        points=len(cloud), cells=cells, empty_cells=empty, vertices=len(scene.vertices), edges=len(scene.edges),
        seconds=seconds, small_seconds=small_seconds,
    )  # fmt: skip


def edge_cells(vertices: np.ndarray, edges: np.ndarray, cloud: np.ndarray) -> tuple[int, int]:
    """How many cells of a 0.6 m grid the edges pass through, and how many of these hold no point [P, 3]."""
    passed: set[tuple] = set()
    for start, end in vertices[edges].astype(np.float64):
        steps = np.linspace(0, 1, 2 + int(np.linalg.norm(end - start) / _STEP))[:, None]
        passed |= set(map(tuple, np.floor((start + steps * (end - start)) / CELL).astype(np.int64).tolist()))
    held = set(map(tuple, np.floor(cloud.astype(np.float64) / CELL).astype(np.int64).tolist()))
    return len(passed), len(passed - held)


def depth_scales(row: dict) -> np.ndarray:
    """float [n]: of each view with a camera, a depth map and COLMAP points, the median ratio of the two depths."""
    cloud = read_points3d(row["colmap"]).astype(np.float64)
    lines = zipfile.ZipFile(io.BytesIO(row["colmap"])).read("images.txt").decode().splitlines()
    tracks = [line for line in lines if not line.startswith("#")]
    scales = []
    for view, depth in enumerate(row["depth"]):
        R, t, K = (np.asarray(row[name][view], dtype=np.float64) for name in ("R", "t", "K"))
        seen = np.array(tracks[2 * view + 1].split()[2::3], dtype=np.int64) - 1
        if depth is None or not K.any() or not len(seen):
            continue
        image = np.asarray(depth) / 1000.0
        camera = cloud[seen] @ R.T + t
        z = camera[:, 2]
        u, v = (np.rint(camera[:, k] / np.maximum(z, 1e-6) * K[k, k] + K[k, 2]).astype(np.int64) for k in (0, 1))
        inside = (z > 0.5) & (z < 40) & (u >= 0) & (u < image.shape[1]) & (v >= 0) & (v < image.shape[0])
        ratio = image[v[inside], u[inside]] / z[inside]
        if (ratio > 0).any():
            scales.append(float(np.median(ratio[ratio > 0])))
    return np.array(scales)


def roof_sample(points: np.ndarray, class_id: np.ndarray) -> SimpleNamespace:
    """Points [P, 3] of the structural classes in the box around them: what ``rivals`` read of a sampled scene."""
    kept = class_id <= _ROOF
    points, class_id = (points[kept], class_id[kept]) if kept.any() else (np.zeros((1, 3)), np.zeros(1, dtype=np.int64))
    low, high = np.percentile(points, (2.5, 97.5), axis=0)
    center, scale = (low + high) / 2, max(float(np.linalg.norm(high - low)), 1e-6)
    return SimpleNamespace(xyz_norm=(points - center) / scale, class_id=class_id, mask=np.ones(len(points), dtype=bool),
                           center=center, scale=scale)


def wireframe_sample(building: Building) -> SimpleNamespace:
    """What ``roof_sample`` gives for points set on a known wireframe: on its edges and around its corners."""
    points, classes = [building.vertices], [[POINT_CLASSES.index(GESTALT_NAMES[k]) for k in building.vertex_classes]]
    for (start, end), kind in zip(building.vertices[building.edges], building.edge_classes):
        steps = np.linspace(0, 1, 2 + int(np.linalg.norm(end - start) / _STEP))[:, None]
        points.append(start + steps * (end - start))
        classes.append([POINT_CLASSES.index(EDGE_NAMES[kind])] * len(steps))
    sample = roof_sample(np.concatenate(points), np.concatenate(classes))
    return SimpleNamespace(**vars(sample), gt_vertices=building.vertices, gt_edges=building.edges)

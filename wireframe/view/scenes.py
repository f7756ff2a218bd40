"""What the page of ``wireframe view`` holds of a scene: points, cameras, truth and prediction, marked and packed."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping

import numpy as np

from wireframe import hashing
from wireframe.classes import POINT_CLASSES
from wireframe.graph import Wireframe
from wireframe.sampling import SampledScene
from wireframe.scene import Scene
from wireframe.scoring import VERTEX_THRESHOLD

# What ``synth.make_scene`` calls its scenes.
# COLMAP's strays lie kilometres away; points beyond so many box diagonals from the centre are left out.
_FAR = 4.0
# A vertex this many radii away cannot be drawn beside the building.
_UNDRAWN = 1000.0
# Pairs of vertices beyond which nothing is marked: no building has that many.
_MOST_PAIRS = 1 << 22


@dataclasses.dataclass(frozen=True)
class ViewScene:
    """One scene to look at.

    Attributes:
        order_id: its id.
        points: float32 [n, 3] world metres; class_id: uint8 [n].
        far: how many points were left out for being far away.
        centre: float64 [3] and radius: of the building, or else of the points, in metres.
        cameras: float64 [c, 5, 3]: the centre, and from there the image's corners (from the top left, clockwise) at
            depth 1, in world axes.
        truth, predicted: wireframes in world metres, None where there is none.
    """

    order_id: str
    points: np.ndarray
    class_id: np.ndarray
    far: int
    centre: np.ndarray
    radius: float
    cameras: np.ndarray
    truth: Wireframe | None
    predicted: Wireframe | None


def view_scene(
    sample: SampledScene, predicted: Wireframe | None, cameras: np.ndarray | None = None, num_points: int = 4096
) -> ViewScene:
    """The scene of a sampled row; of more than ``num_points`` points those of the smallest hashes."""
    points, class_id = sample.world_points()
    near = np.abs(sample.xyz_norm[sample.mask]).max(axis=1, initial=0.0) <= _FAR
    far = int((~near).sum())
    points, class_id = points[near], class_id[near]
    if len(points) > num_points:
        hashes = hashing.hash64(0, hashing.scene_key(sample.order_id), hashing.SAMPLING, np.arange(len(points)))
        chosen = hashing.smallest(hashes, num_points)
        points, class_id = points[chosen], class_id[chosen]
    truth = Wireframe(sample.gt_vertices, sample.gt_edges.astype(np.int64)) if len(sample.gt_edges) else None
    centre, radius = _extent(sample, truth)
    cameras = np.zeros((0, 5, 3)) if cameras is None else cameras
    return ViewScene(sample.order_id, points, class_id, far, centre, radius, cameras, truth, predicted)


def _extent(sample: SampledScene, truth: Wireframe | None) -> tuple[np.ndarray, float]:
    if truth is not None:
        low, high = (bound(truth.vertices.astype(np.float64), axis=0) for bound in (np.min, np.max))
        return (low + high) / 2, max(float(np.linalg.norm(high - low)) / 2, 0.5)
    return sample.center.astype(np.float64), max(float(sample.scale) / 2, 0.5)


def cameras_of(scene: Scene) -> np.ndarray:
    """float64 [c, 5, 3], as ``ViewScene.cameras``: centre = -R^T t, corner = R^T K^-1 (u, v, 1), without skew."""
    found = np.zeros((len(scene.views), 5, 3))
    for row, view in zip(found, scene.views):
        k, r, t = (array.astype(np.float64) for array in (view.K, view.R, view.t))
        height, width = view.ade.shape
        u, v = np.array([0.0, width, width, 0]), np.array([0.0, 0, height, height])
        rays = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones(4)], axis=1)
        row[0], row[1:] = -t @ r, rays @ r
    return found


def match_vertices(predicted: np.ndarray, truth: np.ndarray, radius: float = VERTEX_THRESHOLD) -> np.ndarray:
    """int64 [P]: for each predicted vertex the true one it is paired with, -1 for none.

    The closest pair first, each vertex once, none farther apart than ``radius``; ties by position. (The score's F1
    takes the assignment of the smallest sum, which rarely pairs others.)
    """
    partner = np.full(len(predicted), -1, dtype=np.int64)
    if not len(predicted) or not len(truth):
        return partner
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.linalg.norm(predicted[:, None].astype(np.float64) - truth[None].astype(np.float64), axis=2)
        near_predicted, near_true = np.nonzero(gaps <= radius)
    taken = np.zeros(len(truth), dtype=bool)
    for pair in np.argsort(gaps[near_predicted, near_true], kind="stable"):
        i, j = near_predicted[pair], near_true[pair]
        if partner[i] < 0 and not taken[j]:
            partner[i], taken[j] = j, True
    return partner


def pack_scene(scene: ViewScene) -> dict:
    """Plain JSON values of a scene, as ``assets/view/scene.js`` reads them.

    Points are sorted by class and lie on a grid of 16 bits an axis over their bounding box: little-endian uint16
    [n, 3] in base64; a coordinate is low + step x number, at most half a step off. Wires and cameras are in
    millimetres.
    """
    order = np.argsort(scene.class_id, kind="stable")
    points = scene.points[order].astype(np.float64)
    low = points.min(axis=0) if len(points) else np.zeros(3)
    step = float((points - low).max(initial=0.0)) / 65535 or 1.0
    grid = np.rint((points - low) / step).astype("<u2")
    truth, predicted = _drawable(scene.truth, scene), _drawable(scene.predicted, scene)
    if truth and predicted:
        _mark(truth, predicted)
    return {
        "centre": _rounded(scene.centre),
        "radius": round(scene.radius, 3),
        "floor": round(_floor(scene), 3),
        "low": low.tolist(),
        "step": step,
        "counts": np.bincount(scene.class_id, minlength=len(POINT_CLASSES)).tolist(),
        "points": base64.b64encode(grid.tobytes()).decode(),
        "far": scene.far,
        "cameras": [_rounded(camera, 4) for camera in scene.cameras.reshape(-1, 15)],
        "truth": truth,
        "prediction": predicted,
    }


def _floor(scene: ViewScene) -> float:
    """The height of the ground: the lowest true vertex, or that below which 2 % of the points lie."""
    if scene.truth is not None:
        return float(scene.truth.vertices[:, 1].min())
    return float(np.percentile(scene.points[:, 1], 2)) if len(scene.points) else float(scene.centre[1])


def _rounded(values: np.ndarray, digits: int = 3) -> list:
    return np.round(np.asarray(values, dtype=np.float64), digits).tolist()


def _drawable(wireframe: Wireframe | None, scene: ViewScene) -> dict | None:
    """Vertices and edges that can be drawn, and how many edges cannot; a prediction may hold anything."""
    if wireframe is None:
        return None
    vertices, edges = wireframe.vertices.reshape(-1, 3).astype(np.float64), wireframe.edges.reshape(-1, 2)
    with np.errstate(invalid="ignore", over="ignore"):
        good = np.linalg.norm(vertices - scene.centre, axis=1) <= _UNDRAWN * scene.radius
    real = ((edges >= 0) & (edges < len(vertices))).all(axis=1)
    kept = edges[real][good[edges[real]].all(axis=1)]
    number = np.cumsum(good) - 1
    return {
        "vertices": _rounded(vertices[good]),
        "edges": number[kept].tolist(),
        "undrawn": len(edges) - len(kept),
    }


def _mark(truth: Mapping, predicted: Mapping) -> None:
    """Adds which vertices have a partner, and which edges join two whose partners are joined: 1 or 0 each."""
    if len(truth["vertices"]) * len(predicted["vertices"]) > _MOST_PAIRS:
        return
    partner = match_vertices(np.reshape(predicted["vertices"], (-1, 3)), np.reshape(truth["vertices"], (-1, 3)))
    there = {frozenset(edge) for edge in truth["edges"]}
    right = [frozenset(int(partner[vertex]) for vertex in edge) for edge in predicted["edges"]]
    found = {edge for edge in right if edge in there}
    met = set(partner.tolist())
    predicted["vertexFound"] = [int(other >= 0) for other in partner]
    predicted["edgeFound"] = [int(edge in found) for edge in right]
    truth["vertexFound"] = [int(vertex in met) for vertex in range(len(truth["vertices"]))]
    truth["edgeFound"] = [int(frozenset(edge) in found) for edge in truth["edges"]]

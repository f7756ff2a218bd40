"""A COLMAP reconstruction of a synthetic scene: points on what the views see, their tracks, the text."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass

import numpy as np

from wireframe.classes import GESTALT_ID
from wireframe.synth.building import Building
from wireframe.synth.cameras import Camera
from wireframe.synth.config import SynthConfig
from wireframe.synth.patches import add_tails, backdrop, thin
from wireframe.synth.render import Maps

# More candidates than points, for some are seen by one view only or hidden by their noise; scenes with few
# views need another round.
_SURPLUS = 1.5
_ROUNDS = 3
_MAX_DEPTH = 80.0


@dataclass(frozen=True)
class PointCloud:
    """``xyz`` float64 [P, 3]; ``colors`` uint8 [P, 3]; ``seen`` bool [views, P], at least two True a point;
    ``uv`` float64 [views, P, 2] observed pixels; ``error`` float64 [P] mean reprojection error, pixels."""

    xyz: np.ndarray
    colors: np.ndarray
    seen: np.ndarray
    uv: np.ndarray
    error: np.ndarray


def draw_points(rng: np.random.Generator, cameras: list[Camera], maps: list[Maps], building: Building,
                config: SynthConfig, cells: int = 0) -> PointCloud:
    """About ``config.colmap_points`` points, at most that many, each with the views that see it.

    Args:
        cells: what keys the cells of the world that hold many points, few or none.
    """
    rounds, missing, yielded = [], config.colmap_points, 1 / _SURPLUS
    for _ in range(_ROUNDS):
        candidates = int(min(missing / yielded * 1.05, 4 * config.colmap_points)) + 1
        rounds.append(_draw_round(rng, cameras, maps, building, candidates, config, cells))
        found = rounds[-1][0].shape[0]
        missing, yielded = missing - found, max(found / candidates, 0.05)
        if missing <= 0:
            break
    xyz, color = (np.concatenate([part[k] for part in rounds]) for k in (0, 1))
    seen, uv = (np.concatenate([part[k] for part in rounds], axis=1) for k in (2, 3))
    kept = rng.permutation(len(xyz))[: config.colmap_points]
    tint = rng.integers(-20, 21, size=(len(kept), 3))
    noise = config.colmap_pixel_sigma * rng.standard_normal((len(cameras), len(kept), 2))
    seen = seen[:, kept]
    distance = np.sqrt((noise * noise).sum(axis=-1))
    error = (distance * seen).sum(axis=0) / seen.sum(axis=0)
    shade = np.clip(color[kept].astype(np.int64) + tint, 0, 255).astype(np.uint8)
    # Text keeps six decimals: round here, so that the tracks belong to the points a reader gets.
    return PointCloud(np.round(xyz[kept], 6), shade, seen, uv[:, kept] + noise, error)


def _draw_round(rng: np.random.Generator, cameras: list[Camera], maps: list[Maps], building: Building,
                count: int, config: SynthConfig, cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """xyz, colours, seen and uv of those of ``count`` candidates that two views see."""
    parts = [_sample_view(rng, camera, view, -(-count // len(cameras)), config)
             for camera, view in zip(cameras, maps)]
    parts.append(_sample_corners(rng, building, int(count * config.colmap_corner_share)))
    xyz, color = (np.concatenate([part[k] for part in parts]) for k in (0, 1))
    if config.colmap_hole_share or config.colmap_clump_sigma:
        kept = thin(rng, xyz, cells, config)
        xyz, color = xyz[kept], color[kept]
    surface = len(xyz)
    if config.colmap_backdrop_share:
        far = backdrop(rng, building, int(surface * config.colmap_backdrop_share))
        xyz, color = np.concatenate([xyz, far[0]]), np.concatenate([color, far[1]])
    xyz = xyz + config.colmap_sigma * rng.standard_normal(xyz.shape)
    stray = rng.random(len(xyz)) < config.colmap_outlier_share
    xyz[stray] = building.centre + building.radius * rng.standard_normal((int(stray.sum()), 3))
    is_far = np.arange(len(xyz)) >= surface
    seen, uv = _tracks(rng, cameras, maps, xyz, stray, is_far, config)
    if config.colmap_tail_share:
        # Only now: the views saw the point on its surface, the error came with its depth.
        xyz = add_tails(rng, xyz, config)
    kept = np.flatnonzero(seen.sum(axis=0) >= 2)
    return xyz[kept], color[kept], seen[:, kept], uv[:, kept]


def _sample_view(rng: np.random.Generator, camera: Camera, view: Maps, count: int,
                 config: SynthConfig) -> tuple[np.ndarray, np.ndarray]:
    surface = (view.depth > 0) & (view.depth < _MAX_DEPTH)
    lines = (view.gestalt >= GESTALT_ID["apex"]) & (view.gestalt <= GESTALT_ID["valley"])
    background = int(count * config.colmap_background_share)
    edges = int((count - background) * config.colmap_edge_share)
    pixels = []
    for mask, number in ((view.seen_house & lines, edges), (view.seen_house, count - background - edges),
                         (surface & ~view.seen_house, background)):
        candidates = np.flatnonzero(mask)
        if len(candidates):
            pixels.append(candidates[rng.integers(len(candidates), size=number)])
    flat = np.concatenate(pixels) if pixels else np.zeros(0, dtype=np.int64)
    row, col = np.divmod(flat, view.depth.shape[1])
    z = view.depth.reshape(-1)[flat].astype(np.float64)
    grey = 90 + 5 * view.ade.reshape(-1)[flat].astype(np.int64) % 120
    color = np.stack([grey, grey + 10, grey - 10], axis=1)
    return camera.to_world(col.astype(np.float64), row.astype(np.float64), z), color


def _sample_corners(rng: np.random.Generator, building: Building, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints on the roof's corners, where feature detectors fire most."""
    vertices = building.vertices[rng.integers(len(building.vertices), size=count)].astype(np.float64)
    return vertices, np.full((count, 3), 120)


def _tracks(rng: np.random.Generator, cameras: list[Camera], maps: list[Maps], xyz: np.ndarray,
            stray: np.ndarray, is_far: np.ndarray, config: SynthConfig) -> tuple[np.ndarray, np.ndarray]:
    """Which views see which points (bool [views, P]) and where (float64 [views, P, 2])."""
    seen = np.zeros((len(cameras), len(xyz)), dtype=bool)
    uv = np.zeros((len(cameras), len(xyz), 2))
    for k, (camera, view) in enumerate(zip(cameras, maps)):
        u, v, z = camera.project(xyz)
        height, width = view.depth.shape
        framed = (z > 0.2) & (u >= 0) & (u <= width - 1) & (v >= 0) & (v <= height - 1)
        col, row = (np.rint(np.where(framed, x, 0)).astype(np.int64) for x in (u, v))
        surface = view.depth[row, col]
        near = np.abs(z - surface) < 0.15 + 4 * config.colmap_sigma + 0.01 * z
        # A wrong match hangs anywhere: strays are taken as seen wherever they project.
        # What stands behind the scene is seen through the sky, and before the far ground.
        free = is_far & ((surface == 0) | (z < surface))
        seen[k] = framed & (near | stray | free)
        uv[k, :, 0], uv[k, :, 1] = np.where(framed, u, 0), np.where(framed, v, 0)
    dropped = rng.random(seen.shape) < config.track_drop_prob
    thinned = seen & ~dropped
    # A point that lost all but one view by chance keeps all of them.
    return np.where(thinned.sum(axis=0) >= 2, thinned, seen), uv


def colmap_zip(cameras: list[Camera], image_ids: list[str], cloud: PointCloud, config: SynthConfig) -> bytes:
    """The text model as a ZIP (cameras.txt, images.txt, points3D.txt), the same bytes for the same input."""
    texts = {
        "cameras.txt": _cameras_text(cameras, config),
        "images.txt": _images_text(cameras, image_ids, cloud),
        "points3D.txt": _points_text(cloud),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in texts.items():
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type, info.create_system = zipfile.ZIP_DEFLATED, 3
            archive.writestr(info, text, compresslevel=1)
    return buffer.getvalue()


def _cameras_text(cameras: list[Camera], config: SynthConfig) -> str:
    lines = ["# Camera list: CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]\n"]
    for k, camera in enumerate(cameras, 1):
        fx, fy, cx, cy = (float(camera.K[i]) for i in ((0, 0), (1, 1), (0, 2), (1, 2)))
        lines.append(f"{k} PINHOLE {config.width} {config.height} {fx!r} {fy!r} {cx!r} {cy!r}\n")
    return "".join(lines)


def _images_text(cameras: list[Camera], image_ids: list[str], cloud: PointCloud) -> str:
    lines = ["# Image list, two lines each: IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME\n"
             "#   POINTS2D[] as (X, Y, POINT3D_ID)\n"]
    for k, (camera, image_id) in enumerate(zip(cameras, image_ids), 1):
        pose = " ".join(repr(x) for x in [*quaternion(camera.R), *(float(x) for x in camera.t)])
        points = np.flatnonzero(cloud.seen[k - 1])
        columns = [*(cloud.uv[k - 1, points, i].tolist() for i in (0, 1)), (points + 1).tolist()]
        lines.append(f"{k} {pose} {k} {image_id}.jpg\n{_table('%.2f %.2f %d', columns, ' ')}\n")
    return "".join(lines)


def _table(row: str, columns: list[list], between: str) -> str:
    """Columns of equal length, formatted row by row in one go."""
    width, count = len(columns), len(columns[0])
    flat: list = [None] * (width * count)
    for k, column in enumerate(columns):
        flat[k::width] = column
    return between.join([row] * count) % tuple(flat)


def _points_text(cloud: PointCloud) -> str:
    # POINT2D_IDX is the rank of the point among those its image sees.
    rank = np.cumsum(cloud.seen, axis=1) - 1
    lengths = cloud.seen.sum(axis=0)
    point, view = np.nonzero(cloud.seen.T)
    pairs = np.stack([view + 1, rank[view, point]], axis=1)
    starts = np.cumsum(lengths) - lengths
    lines = np.empty(len(lengths), dtype=object)
    # Points of equally long tracks share one format.
    for length in np.unique(lengths):
        some = np.flatnonzero(lengths == length)
        tracks = pairs[starts[some][:, None] + np.arange(length)].reshape(len(some), -1)
        columns = [(some + 1).tolist(), *cloud.xyz[some].T.tolist(), *cloud.colors[some].T.tolist(),
                   cloud.error[some].tolist(), *tracks.T.tolist()]
        row = "%d %.6f %.6f %.6f %d %d %d %.3f" + " %d %d" * int(length)
        lines[some] = _table(row, columns, "\n").split("\n")
    head = "# 3D point list: POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[] as (IMAGE_ID, POINT2D_IDX)"
    return "\n".join([head, *lines, ""])


def quaternion(R: np.ndarray) -> tuple[float, float, float, float]:
    """(w, x, y, z), w >= 0, of a rotation matrix [3, 3] (Shepperd's method)."""
    m = R.astype(np.float64)
    diagonal = [m[0, 0] + m[1, 1] + m[2, 2], m[0, 0], m[1, 1], m[2, 2]]
    k = int(np.argmax(diagonal))
    skew = (m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1])
    if k == 0:
        q = [1 + diagonal[0], *skew]
    else:
        i, j, n = k - 1, k % 3, (k + 1) % 3
        q = [skew[i], 0.0, 0.0, 0.0]
        q[1 + i] = 1 + m[i, i] - m[j, j] - m[n, n]
        q[1 + j], q[1 + n] = m[i, j] + m[j, i], m[i, n] + m[n, i]
    size = float(np.sqrt(sum(x * x for x in q))) * (1.0 if q[0] >= 0 else -1.0)
    return tuple(float(x) / size for x in q)

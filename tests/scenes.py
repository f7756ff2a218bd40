"""Small hand-made scenes for the tests: random label maps and random cameras that look at the origin."""

from __future__ import annotations

import numpy as np

from wireframe.classes import ADE_NAMES, GESTALT_NAMES, UNKNOWN
from wireframe.scene import Scene, View


def random_camera(rng: np.random.Generator, width: int, height: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """K, R, t (float32) of a camera some metres from the origin that looks at it."""
    eye = rng.normal(size=3) * 3 + [0, 2, 12]
    forward = -eye / np.linalg.norm(eye)
    right = np.cross(forward, [0.05, 1.0, 0.02])
    right /= np.linalg.norm(right)
    R = np.stack([right, np.cross(forward, right), forward])
    focal = width * rng.uniform(0.7, 1.2)
    K = np.array([[focal, 0, width / 2 + 1.3], [0, focal * 1.02, height / 2 - 0.7], [0, 0, 1]])
    return K.astype(np.float32), R.astype(np.float32), (-R @ eye).astype(np.float32)


def random_view(rng: np.random.Generator, index: int, width: int = 40, height: int = 30, depth=True) -> View:
    """A view whose label maps are blocks of random classes, some of them outside the tables."""
    K, R, t = random_camera(rng, width, height)

    def blocks(names, few):
        ids = rng.integers(0, len(names), size=(height // 5 + 1, width // 5 + 1))
        ids = np.where(rng.random(ids.shape) < 0.6, rng.choice(few, size=ids.shape), ids)
        ids = np.where(rng.random(ids.shape) < 0.05, UNKNOWN, ids)
        return np.kron(ids, np.ones((5, 5), dtype=int))[:height, :width].astype(np.uint8)

    gestalt = blocks(GESTALT_NAMES, [GESTALT_NAMES.index(n) for n in ("roof", "apex", "ridge", "eave", "unclassified")])
    ade = blocks(ADE_NAMES, [ADE_NAMES.index(n) for n in ("house", "building;edifice", "tree", "sky")])
    depth_map = None
    if depth:
        depth_map = rng.integers(3000, 20000, size=(height, width)).astype(np.uint16)
        depth_map[rng.random(depth_map.shape) < 0.2] = 0
    return View(f"view_{index:03d}", index, K, R, t, ade, gestalt, depth_map)


def random_scene(seed: int, views: int = 5, points: int = 400, order_id: str | None = None) -> Scene:
    """A scene with noise for labels and a unit square for ground truth."""
    rng = np.random.default_rng(seed)
    return Scene(
        order_id=order_id or f"random-{seed}",
        views=tuple(random_view(rng, i, depth=i % 3 != 2) for i in range(views)),
        points=(rng.normal(size=(points, 3)) * 3).astype(np.float32),
        vertices=np.array([[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 1]], dtype=np.float32),
        edges=np.array([[0, 1], [1, 2], [2, 3], [0, 3]]),
        edge_classes=np.array([2, 2, 6, 2]),
        dropped=(),
    )

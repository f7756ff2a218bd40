"""From a depth map to world points, in NumPy: house mask, cleaning, choice of pixels, unprojection.

The readable reference of ``wireframe.kernels.ops.house_mask``, ``clip_limits`` and ``depth_points`` (rules: S23DR 2026
learned baseline). float64 and elementwise throughout, in the order written, so that a native version gives the same
bits.
"""

from __future__ import annotations

import numpy as np

from wireframe import hashing
from wireframe.classes import GESTALT_ID, GESTALT_INVALID
from wireframe.scene import View

MASK_RADIUS = 5
CLIP_QUANTILE = 0.995
METRES_PER_UNIT = 0.001

# A colour outside the table is not one of the three invalid classes, so it counts as house (as in the baseline).
IN_HOUSE = np.ones(256, dtype=bool)
IN_HOUSE[[GESTALT_ID[name] for name in GESTALT_INVALID]] = False


def house_mask(gestalt: np.ndarray, radius: int = MASK_RADIUS) -> np.ndarray:
    """Pixels of the house, dilated by a box.

    Args:
        gestalt: uint8 [H, W] gestalt ids.
        radius: half side of the box in pixels; the box is (2 radius + 1) wide.

    Returns:
        bool [H, W].
    """
    mask = IN_HOUSE[gestalt]
    for axis in (0, 1):
        # Beyond the map's own size a larger box changes nothing.
        mask = _dilate_line(mask, min(radius, mask.shape[axis]), axis)
    return mask


def _dilate_line(mask: np.ndarray, radius: int, axis: int) -> np.ndarray:
    pad = [(0, 0), (0, 0)]
    pad[axis] = (radius, radius)
    out = np.pad(mask, pad)
    window = 1
    # Windows double (1, 2, 4, 8, ...) until one last overlapping step reaches 2 radius + 1.
    while window < 2 * radius + 1:
        step = min(window, 2 * radius + 1 - window)
        if axis == 0:
            out = out[:-step] | out[step:]
        else:
            out = out[:, :-step] | out[:, step:]
        window += step
    return out


def clip_limit(depth: np.ndarray) -> float:
    """The 99.5th percentile of the positive depths, in millimetres, by linear interpolation (NumPy's default).

    Args:
        depth: uint16 [H, W] millimetres, 0 = none.

    Returns:
        float64, 0.0 when there is no positive depth.
    """
    counts = np.bincount(depth.ravel(), minlength=2)
    counts[0] = 0
    below = np.cumsum(counts)
    n = int(below[-1])
    if n == 0:
        return 0.0
    position = CLIP_QUANTILE * (n - 1)
    low = int(position)
    a = int(np.searchsorted(below, low, side="right"))
    b = int(np.searchsorted(below, min(low + 1, n - 1), side="right"))
    t = position - low
    # NumPy interpolates from the nearer side, which fixes the last bit.
    return b - (b - a) * (1 - t) if t >= 0.5 else a + (b - a) * t


def depth_points(view: View, mask: np.ndarray, limit: float, count: int, seed: int, scene: int) -> np.ndarray:
    """World points of up to ``count`` depth pixels of the house in one view.

    Args:
        view: a view with a depth map; the depth map may have another size than the label maps.
        mask: bool [H, W], of the label maps' size (``house_mask``).
        limit: millimetres at which depths are clamped (``clip_limit``).
        count: how many pixels at most; the ``count`` smallest hashes win.
        seed, scene: the random key (``hashing.scene_key(order_id)``).

    Returns:
        float32 [n, 3] world metres, in row-major order of the pixels.
    """
    depth = view.depth
    height, width = depth.shape
    label_height, label_width = mask.shape
    if (height, width) != (label_height, label_width):
        rows = _nearest(height, label_height)
        cols = _nearest(width, label_width)
        mask = mask[rows[:, None], cols]
    pixels = np.flatnonzero(mask & (depth > 0))
    hashes = hashing.hash64(seed, scene, hashing.depth_pixels(view.index), pixels)
    pixels = pixels[hashing.smallest(hashes, count)]
    z = np.minimum(depth.ravel()[pixels].astype(np.float64), limit) * METRES_PER_UNIT
    v, u = np.divmod(pixels, width)
    K = view.K.astype(np.float64)
    fx, cx = (value * width / label_width for value in (K[0, 0], K[0, 2]))
    fy, cy = (value * height / label_height for value in (K[1, 1], K[1, 2]))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return _to_world((u - cx) * z / fx, (v - cy) * z / fy, z, view)


def _nearest(size: int, label_size: int) -> np.ndarray:
    """For every pixel of a depth axis, the nearest pixel of the label axis."""
    position = np.rint(np.arange(size, dtype=np.float64) * label_size / size).astype(np.int64)
    return np.minimum(position, label_size - 1)


def _to_world(x: np.ndarray, y: np.ndarray, z: np.ndarray, view: View) -> np.ndarray:
    R, t = view.R.astype(np.float64), view.t.astype(np.float64)
    d0, d1, d2 = x - t[0], y - t[1], z - t[2]
    world = np.empty((x.shape[0], 3), dtype=np.float32)
    for i in range(3):
        world[:, i] = (R[0, i] * d0 + R[1, i] * d1) + R[2, i] * d2
    return world

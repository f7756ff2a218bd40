"""Cameras around a house: camera = R @ world + t with z forward and image v downwards."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from wireframe.synth.building import Building
from wireframe.synth.config import SynthConfig


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: K, R float32 [3, 3], t float32 [3] as stored; ``centre`` float64 [3] in the world."""

    K: np.ndarray
    R: np.ndarray
    t: np.ndarray
    centre: np.ndarray

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(u, v, z) float64 [n] of world points [n, 3]; u and v mean nothing where z <= 0."""
        camera = self.to_camera(points)
        z = camera[:, 2]
        safe = np.where(np.abs(z) < 1e-9, 1e-9, z)
        u = self.K[0, 0].astype(np.float64) * (camera[:, 0] / safe) + self.K[0, 2]
        v = self.K[1, 1].astype(np.float64) * (camera[:, 1] / safe) + self.K[1, 2]
        return u, v, z

    def to_camera(self, points: np.ndarray) -> np.ndarray:
        """Camera coordinates float64 [n, 3] of world points [n, 3]."""
        R, t = self.R.astype(np.float64), self.t.astype(np.float64)
        x, y, z = points[:, 0], points[:, 1], points[:, 2]
        return np.stack([((R[i, 0] * x + R[i, 1] * y) + R[i, 2] * z) + t[i] for i in range(3)], axis=1)

    def to_world(self, u: np.ndarray, v: np.ndarray, z: np.ndarray) -> np.ndarray:
        """World points float64 [n, 3] at pixels (u, v) and depths z, all [n]."""
        K, R, t = (array.astype(np.float64) for array in (self.K, self.R, self.t))
        d = [(u - K[0, 2]) / K[0, 0] * z - t[0], (v - K[1, 2]) / K[1, 1] * z - t[1], z - t[2]]
        return np.stack([(R[0, i] * d[0] + R[1, i] * d[1]) + R[2, i] * d[2] for i in range(3)], axis=1)


def draw_cameras(rng: np.random.Generator, building: Building, count: int,
                 config: SynthConfig) -> list[Camera]:
    """``count`` cameras on a ring around the house, some at eye level and some lifted, all looking at it."""
    cameras = []
    start = float(rng.uniform(0, 2 * math.pi))
    ring = 2 * math.pi
    if config.ring_range != (1.0, 1.0):
        ring *= float(rng.uniform(*config.ring_range))
    for number in range(count):
        azimuth = start + ring * (number + float(rng.uniform(-0.3, 0.3))) / count
        focal = float(rng.uniform(*config.focal_range))
        eye = rng.random() < config.eye_level_share
        height = float(rng.uniform(1.5, 2.0) if eye else rng.uniform(*config.lifted_height_range))
        # The half angle that the house must fit into is the narrower of the image's two.
        half = min(1.0, 1.25 * config.height / config.width) / (2 * focal)
        distance = building.radius / half * float(rng.uniform(*config.distance_range))
        distance = max(distance, building.radius + 3.0)
        foot = building.centre + distance * np.array([math.cos(azimuth), 0.0, math.sin(azimuth)])
        centre = np.array([foot[0], height, foot[2]])
        target = building.centre + config.aim_sigma * rng.standard_normal(3)
        roll = config.roll_sigma * float(rng.standard_normal())
        shift = rng.uniform(-0.02, 0.02, size=2)
        cameras.append(_look_at(centre, target, roll, focal, shift, config))
    return cameras


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.sqrt((vector * vector).sum())


def _cross(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.array([p[1] * q[2] - p[2] * q[1], p[2] * q[0] - p[0] * q[2], p[0] * q[1] - p[1] * q[0]])


def _look_at(centre: np.ndarray, target: np.ndarray, roll: float, focal: float, shift: np.ndarray,
             config: SynthConfig) -> Camera:
    forward = _unit(target - centre)
    right = _unit(_cross(forward, np.array([0.0, 1.0, 0.0])))
    down = _cross(forward, right)
    c, s = math.cos(roll), math.sin(roll)
    R = np.stack([c * right + s * down, c * down - s * right, forward])
    t = -np.array([(row * centre).sum() for row in R])
    f = focal * config.width
    cx = (config.width - 1) / 2 + shift[0] * config.width
    cy = (config.height - 1) / 2 + shift[1] * config.height
    K = np.array([[f, 0, cx], [0, f, cy], [0, 0, 1]])
    return Camera(K.astype(np.float32), R.astype(np.float32), t.astype(np.float32), centre)

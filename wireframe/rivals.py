"""Rivals to compare with: the handcrafted one of hoho2025, and two that know only the training scenes.

The dummies answer what a score is worth. ``MeanWireframe`` gives every scene one average house, fitted into
the box of its points; ``NearestWireframe`` gives it the house of the training scene with the most similar
points.
"""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from wireframe.errors import MissingPackageError, SampleError, one_line
from wireframe.files import atomic_write
from wireframe.graph import Wireframe, empty_wireframe
from wireframe.images import open_image, pil_image
from wireframe.scene import is_true

_CELLS = 8
# Corners, edges, roof, everything else: the position of each of classes.POINT_CLASSES.
_CLASS_GROUP = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 3, 3])
_GROUPS = 4
_DESCRIPTOR_SIZE = _GROUPS * _CELLS**3
_CHUNK = 1024
_MAX_FILE_BYTES = 2 << 30


def handcrafted(row: Mapping) -> Wireframe:
    """The wireframe of ``hoho2025.example_solutions.predict_wireframe``; see ``try_handcrafted``."""
    return try_handcrafted(row)[0]


def try_handcrafted(row: Mapping) -> tuple[Wireframe, str | None]:
    """The handcrafted rival's wireframe of a raw row, and the reason where it failed (empty solution).

    Views without a camera (``pose_only_in_colmap``, or K of zeros) are left out, and a missing depth map is
    replaced by zeros of the label map's size. What the rival prints is swallowed. Takes 1-2 s a scene; native
    code under it may kill the process, so a run over many scenes belongs in processes of its own.

    Args:
        row: a raw scene; images as PIL images or arrays (depth in millimetres).

    Raises:
        MissingPackageError: hoho2025 is not installed.
    """
    try:
        from hoho2025.example_solutions import predict_wireframe
    except ImportError as error:
        raise MissingPackageError(f"the rival needs hoho2025 ({error}): pip install hoho2025") from error
    try:
        entry = _handcrafted_entry(row)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            vertices, edges = predict_wireframe(entry)
        vertices = np.asarray(vertices, dtype=np.float32).reshape(-1, 3)
        edges = np.asarray(edges, dtype=np.int64).reshape(-1, 2)
    except Exception as error:
        return empty_wireframe(), f"raised {type(error).__name__}: {one_line(error)}"
    if not np.isfinite(vertices).all():
        return empty_wireframe(), "a vertex is not finite"
    return Wireframe(vertices, edges), None


def _handcrafted_entry(row: Mapping) -> dict:
    """The columns the rival reads, for the views it can use."""
    views = [view for view in range(len(row["image_ids"])) if _has_camera(row, view)]
    if not views:
        raise ValueError("no view has a camera")
    depths = row.get("depth")
    entry = {"order_id": str(row.get("order_id", "")), "image_ids": [], "gestalt": [], "ade": [], "depth": []}
    for view in views:
        gestalt = _image(row["gestalt"][view])
        depth = depths[view] if depths is not None and view < len(depths) else None
        if depth is None:
            depth = np.zeros(gestalt.size[::-1], dtype=np.uint16)
        entry["image_ids"].append(row["image_ids"][view])
        entry["gestalt"].append(gestalt)
        entry["ade"].append(_image(row["ade"][view]))
        entry["depth"].append(_image(depth))
    entry["colmap"] = bytes(row["colmap"] if "colmap" in row else row["colmap_binary"])
    return entry


def _has_camera(row: Mapping, view: int) -> bool:
    flags = row.get("pose_only_in_colmap")
    if flags is not None and view < len(flags) and is_true(flags[view]):
        return False
    return bool(np.asarray(row["K"][view], dtype=np.float64).any())


def _image(value):
    if isinstance(value, np.ndarray):
        # 16-bit depth may arrive as wider integers, which PIL would keep as such.
        return pil_image().fromarray(value.astype(np.uint16 if value.ndim == 2 else np.uint8))
    return open_image(value) if isinstance(value, bytes) else value


def to_world(wireframe: Wireframe, center: np.ndarray, scale: float) -> Wireframe:
    """The wireframe in world metres: normalised coordinates x scale + center [3]."""
    vertices = np.asarray(wireframe.vertices, np.float32) * np.float32(scale) + np.asarray(center, np.float32)
    return Wireframe(vertices, wireframe.edges)


def mean_wireframe(training: Sequence[Wireframe]) -> Wireframe:
    """The average of the normalised wireframes that share the most common topology.

    Two wireframes share it when they have as many vertices and the same edges between the same vertex ids. Of
    equally common ones the first seen counts.

    Raises:
        SampleError: no wireframe is given.
    """
    groups: dict[tuple, list[np.ndarray]] = {}
    for vertices, edges in training:
        edges = np.unique(np.sort(np.asarray(edges, dtype=np.int64).reshape(-1, 2), axis=1), axis=0)
        groups.setdefault((len(vertices), edges.tobytes()), []).append(np.asarray(vertices, dtype=np.float64))
    if not groups:
        raise SampleError("a mean wireframe needs at least one training scene with a ground truth")
    key = max(groups, key=lambda item: len(groups[item]))
    mean = np.stack(groups[key]).mean(axis=0).astype(np.float32)
    return Wireframe(mean, np.frombuffer(key[1], dtype=np.int64).reshape(-1, 2).copy())


class MeanWireframe:
    """One normalised wireframe for every scene, placed by the scene's centre and scale."""

    def __init__(self, wireframe: Wireframe) -> None:
        self.wireframe = wireframe

    def predict(self, scene) -> Wireframe:
        """World wireframe for a sampled scene; reads ``center`` and ``scale``."""
        return to_world(self.wireframe, scene.center, scene.scale)


class NearestWireframe:
    """The normalised wireframe of the training scene whose points are most alike.

    Args:
        descriptors: uint8 [N, D], one row of ``descriptor`` per training scene.
        wireframes: the N normalised wireframes.
    """

    def __init__(self, descriptors: np.ndarray, wireframes: Sequence[Wireframe]) -> None:
        if len(wireframes) == 0 or descriptors.shape != (len(wireframes), _DESCRIPTOR_SIZE):
            raise SampleError("a nearest wireframe needs training scenes, with one descriptor each")
        self.descriptors = descriptors
        self.wireframes = list(wireframes)

    def predict(self, scene) -> Wireframe:
        """World wireframe for a sampled scene; reads its points, classes, ``mask``, ``center``, ``scale``."""
        found = self.nearest(descriptor(scene.xyz_norm, scene.class_id, scene.mask))
        return to_world(self.wireframes[found], scene.center, scene.scale)

    def nearest(self, query: np.ndarray) -> int:
        """Position of the descriptor nearest to ``query`` [D] (Euclidean); the first of equal ones."""
        query = query.astype(np.float64)
        distance = np.empty(len(self.descriptors))
        for start in range(0, len(self.descriptors), _CHUNK):
            # Whole numbers far below 2^53: exact in any order of summation.
            chunk = self.descriptors[start : start + _CHUNK].astype(np.float64)
            distance[start : start + _CHUNK] = np.square(chunk).sum(axis=1) - 2.0 * (chunk @ query)
        return int(distance.argmin())


def descriptor(xyz_norm: np.ndarray, class_id: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Where a scene's points lie, by coarse class.

    The cube [-0.5, 0.5]^3 of normalised space has 8 x 8 x 8 cells, to which points outside are clamped. Each
    group of classes (corners, edges, roof, the rest) has a histogram; its entries are the square roots of the
    shares, in 255ths.

    Args:
        xyz_norm: float [T, 3]; class_id: integer [T]; mask: bool [T], False for padding.

    Returns:
        uint8 [2048].
    """
    keep = np.asarray(mask, dtype=bool) & np.isfinite(xyz_norm).all(axis=1)
    xyz = np.asarray(xyz_norm, dtype=np.float64)[keep]
    group = _CLASS_GROUP[np.minimum(np.asarray(class_id)[keep].astype(np.int64), len(_CLASS_GROUP) - 1)]
    cell = np.clip(np.floor((xyz + 0.5) * _CELLS), 0, _CELLS - 1).astype(np.int64)
    index = ((group * _CELLS + cell[:, 0]) * _CELLS + cell[:, 1]) * _CELLS + cell[:, 2]
    counts = np.bincount(index, minlength=_DESCRIPTOR_SIZE).reshape(_GROUPS, -1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return np.rint(255.0 * np.sqrt(shares)).astype(np.uint8).reshape(-1)


class Dummies(NamedTuple):
    """Both dummies of one training set; each has ``predict(scene) -> Wireframe``."""

    mean: MeanWireframe
    nearest: NearestWireframe


def fit_dummies(scenes: Iterable) -> Dummies:
    """The dummies of training scenes (sampled scenes; those without ground truth are passed over).

    Raises:
        SampleError: no scene has a ground truth.
    """
    descriptors, wireframes = [], []
    for scene in scenes:
        if scene.gt_vertices is None or len(scene.gt_vertices) == 0 or len(scene.gt_edges) == 0:
            continue
        centred = np.asarray(scene.gt_vertices, dtype=np.float64) - np.asarray(scene.center, dtype=np.float64)
        vertices = (centred / float(scene.scale)).astype(np.float32)
        wireframes.append(Wireframe(vertices, np.asarray(scene.gt_edges, dtype=np.int64)))
        descriptors.append(descriptor(scene.xyz_norm, scene.class_id, scene.mask))
    mean = MeanWireframe(mean_wireframe(wireframes))
    return Dummies(mean, NearestWireframe(np.stack(descriptors), wireframes))


def save_dummies(path: str | os.PathLike, scenes: Iterable) -> Dummies:
    """Fits the dummies to training scenes and writes them as one .npz, the same bytes for the same scenes.

    Raises:
        SampleError: no scene has a ground truth.
    """
    dummies = fit_dummies(scenes)
    everything = [dummies.mean.wireframe, *dummies.nearest.wireframes]
    arrays = {
        "descriptors": dummies.nearest.descriptors,
        "vertices": np.concatenate([vertices for vertices, _ in everything]),
        "edges": np.concatenate([edges for _, edges in everything]).astype(np.int32),
        "vertex_counts": np.array([len(vertices) for vertices, _ in everything], dtype=np.int32),
        "edge_counts": np.array([len(edges) for _, edges in everything], dtype=np.int32),
    }
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)
    return dummies


def load_dummies(path: str | os.PathLike) -> Dummies:
    """Reads what ``save_dummies`` wrote; nothing is unpickled.

    Raises:
        SampleError: the file is missing or holds something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > _MAX_FILE_BYTES:
                raise SampleError(f"{path}: not a file of dummies (over {_MAX_FILE_BYTES >> 30} GB)")
        with np.load(path, allow_pickle=False) as archive:
            vertices = _split(archive["vertices"], archive["vertex_counts"], 3, np.float32)
            edges = _split(archive["edges"], archive["edge_counts"], 2, np.int64)
            descriptors = np.asarray(archive["descriptors"], dtype=np.uint8)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        if isinstance(error, SampleError):
            raise
        raise SampleError(f"{path}: not a file of dummies ({one_line(error)})") from error
    everything = [Wireframe(*pair) for pair in zip(vertices, edges)]
    for wireframe in everything:
        ids = wireframe.edges
        if ids.size and not 0 <= ids.min() <= ids.max() < len(wireframe.vertices):
            raise SampleError(f"{path}: an edge names a vertex that is not there; write the file again")
    if len(vertices) != len(edges) or not everything:
        raise SampleError(f"{path}: the counts of vertices and edges do not match; write the file again")
    return Dummies(MeanWireframe(everything[0]), NearestWireframe(descriptors, everything[1:]))


def _split(rows: np.ndarray, counts: np.ndarray, width: int, dtype: type) -> list[np.ndarray]:
    """Rows [sum of counts, width] cut into pieces of the given lengths."""
    if rows.ndim != 2 or rows.shape[1] != width or counts.ndim != 1 or counts.dtype.kind != "i":
        raise ValueError(f"arrays of shape {rows.shape} and {counts.shape}")
    if counts.size == 0 or counts.min() < 0 or counts.sum() != len(rows):
        raise ValueError(f"the counts do not add up to {len(rows)} rows")
    return np.split(rows.astype(dtype), np.cumsum(counts)[:-1])

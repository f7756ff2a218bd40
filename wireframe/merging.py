"""Vertex merging by single linkage, and the small graph helpers that it shares with ``wireframe.graph``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wireframe.kernels import dispatch, native

# Squares and sums of coordinates below this stay finite; csrc/cpu/merge.cpp has the same bound.
MAX_COORDINATE = 1e150


def merge_vertices(
    vertices: np.ndarray,  # [V, 3]
    edges: np.ndarray,  # [E, 2]
    thresholds: Sequence[float],
    *,
    impl: str = "auto",
) -> tuple[np.ndarray, np.ndarray]:
    """Single-linkage merging, one pass per threshold, each on the cluster means of the pass before.

    Single linkage follows chains: a row of vertices each within the threshold of the next becomes one vertex.
    ``wireframe.kernels.ops.merge_vertices`` does the same on tensors.

    Args:
        vertices: numbers [V, 3], finite and at most ``MAX_COORDINATE``; taken as float64.
        edges: integers [E, 2], ids of vertices.
        thresholds: metres; vertices at most this far apart (inclusive) are linked.
        impl: "auto", "reference" or "native"; all give the same bits.

    Returns:
        Vertices float64 [V', 3], in the order of the first vertex of each cluster, also those that lost their
        last edge; edges int64 [E', 2], i < j, ascending, each once, no self-loops.

    Raises:
        ValueError: an argument of another shape or kind, a coordinate or threshold out of its range, an edge that
            names no vertex, or an unknown ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.
    """
    vertices, edges, thresholds = _checked(vertices, edges, thresholds)
    if dispatch.choose("merge_vertices", impl) == "reference":
        return merge_vertices_reference(vertices, edges, thresholds)
    merged, kept = np.empty_like(vertices), np.empty_like(edges)
    vertex_count, edge_count = native.module().merge_vertices(vertices, edges, thresholds, merged, kept)
    return merged[:vertex_count], kept[:edge_count]


def merge_vertices_reference(
    vertices: np.ndarray,  # float64 [V, 3]
    edges: np.ndarray,  # int64 [E, 2]
    thresholds: Sequence[float],
) -> tuple[np.ndarray, np.ndarray]:
    """What ``merge_vertices`` computes, on arguments it has checked; memory grows with the square of V.

    Vertices are linked where (dx dx + dy dy) + dz dz <= threshold threshold; a mean is the sum in row order,
    divided once. A pass that links nothing leaves the vertices as they are.
    """
    vertices = vertices.copy()
    for threshold in thresholds:
        labels = components(near_pairs(vertices, vertices, threshold))
        roots, label = np.unique(labels, return_inverse=True)
        if roots.size < labels.size:
            vertices = cluster_means(vertices, label, roots.size)
            edges = label[edges]
    return vertices, unique_edges(edges)


def _checked(
    vertices: np.ndarray, edges: np.ndarray, thresholds: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Contiguous float64 [V, 3] and int64 [E, 2], and the thresholds as floats."""
    vertices = _rows("vertices", vertices, 3, "fiu", np.float64)
    if not np.abs(vertices).max(initial=0.0) <= MAX_COORDINATE:
        raise ValueError(f"merge_vertices: vertices must be finite and at most {MAX_COORDINATE:g} in size")
    edges = _rows("edges", edges, 2, "iu", np.int64)
    if edges.size and (edges.min() < 0 or edges.max() >= len(vertices)):
        raise ValueError(f"merge_vertices: edges must name vertices 0 to {len(vertices) - 1}, "
                         f"got {edges.min()} to {edges.max()}")
    return vertices, edges, checked_thresholds(thresholds)


def checked_thresholds(thresholds: Sequence[float]) -> list[float]:
    """The thresholds as floats.

    Raises:
        ValueError: one is not a number, not finite or negative.
    """
    try:
        lengths = list(map(float, thresholds))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"merge_vertices: thresholds must be a list of numbers, got {thresholds!r}") from None
    if not all(0.0 <= length < float("inf") for length in lengths):
        raise ValueError(f"merge_vertices: thresholds must be finite and not negative, got {lengths}")
    return lengths


def _rows(name: str, value: np.ndarray, width: int, kinds: str, dtype: type) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError:  # rows of unequal lengths
        raise ValueError(f"merge_vertices: {name} must be an array [N, {width}]") from None
    if array.size == 0 and array.ndim <= 2:
        return np.zeros((0, width), dtype)
    if array.ndim != 2 or array.shape[1] != width or array.dtype.kind not in kinds:
        kind = "integers" if dtype is np.int64 else "numbers"
        raise ValueError(f"merge_vertices: {name} must be {kind} [N, {width}], "
                         f"got {array.dtype} {list(array.shape)}")
    return np.ascontiguousarray(array, dtype)


def near_pairs(a: np.ndarray, b: np.ndarray, radius: float) -> np.ndarray:
    """bool [len(a), len(b)]: pairs of points [N, 3] at most ``radius`` apart."""
    squared = np.square(a[:, None, 0] - b[None, :, 0])
    squared += np.square(a[:, None, 1] - b[None, :, 1])
    squared += np.square(a[:, None, 2] - b[None, :, 2])
    return squared <= radius * radius


def components(linked: np.ndarray) -> np.ndarray:
    """The smallest member of each vertex's component; linked: bool [V, V], symmetric, its diagonal True."""
    count = len(linked)
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    label = linked.argmax(axis=1)
    while True:
        # Taking the smallest neighbouring label moves one link at a time; jumping doubles the stride.
        smallest = np.where(linked, label, count).min(axis=1)
        smallest = smallest[smallest]
        if np.array_equal(smallest, label):
            return label
        label = smallest


def cluster_means(values: np.ndarray, label: np.ndarray, count: int) -> np.ndarray:
    """Mean of the rows [N, D] of each label; summed in row order, so the bits do not depend on a BLAS."""
    size = np.bincount(label, minlength=count)
    sums = [np.bincount(label, weights=column, minlength=count) for column in values.T]
    return np.stack(sums, axis=1) / np.maximum(size, 1)[:, None]


def unique_edges(edges: np.ndarray) -> np.ndarray:
    """The edges int [E, 2] as (i, j) with i < j, ascending, each once, without self-loops."""
    edges = np.sort(edges[edges[:, 0] != edges[:, 1]], axis=1)
    return np.unique(edges, axis=0)

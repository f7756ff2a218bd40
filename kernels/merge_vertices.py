"""Vertex merging by single linkage, on tensors (``wireframe.merging.merge_vertices`` is the same on arrays)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wireframe import merging
from wireframe.kernels import dispatch
from wireframe.kernels.checks import check_devices, check_tensor

# Written out, so that no version of torch has to infer it from Sequence.
_SCHEMA = "(Tensor vertices, Tensor edges, float[] thresholds, str impl) -> (Tensor, Tensor)"


@torch.library.custom_op("wireframe::merge_vertices", mutates_args=(), schema=_SCHEMA)
def _merge_vertices(
    vertices: Tensor, edges: Tensor, thresholds: Sequence[float], impl: str
) -> tuple[Tensor, Tensor]:
    arrays = (tensor.detach().cpu().numpy() for tensor in (vertices, edges))
    merged, kept = merging.merge_vertices(*arrays, thresholds, impl=impl)
    return torch.from_numpy(merged).to(vertices.device), torch.from_numpy(kept).to(vertices.device)


@_merge_vertices.register_fake
def _(vertices: Tensor, edges: Tensor, thresholds: Sequence[float], impl: str) -> tuple[Tensor, Tensor]:
    # How many are left depends on the data.
    context = torch.library.get_ctx()
    return (
        vertices.new_empty((context.new_dynamic_size(), 3)),
        edges.new_empty((context.new_dynamic_size(), 2)),
    )


def merge_vertices(
    vertices: Tensor,  # [V, 3]
    edges: Tensor,  # [E, 2]
    thresholds: Sequence[float],
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Single-linkage merging, one pass per threshold, each on the cluster means of the pass before.

    See ``wireframe.merging.merge_vertices`` for what is linked and in which order things come. Not differentiable.

    Args:
        vertices: float64 [V, 3], finite. The work is done on the CPU wherever the tensors lie.
        edges: int64 [E, 2], ids of vertices.
        thresholds: metres, finite and not negative.
        impl: "auto", "reference" or "native"; all give the same bits.

    Returns:
        Vertices float64 [V', 3] and edges int64 [E', 2], on their device.

    Raises:
        TypeError: vertices or edges are not a tensor.
        ValueError: an argument of another shape or dtype, a coordinate or threshold out of its range, an edge that
            names no vertex, or an unknown ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.
    """
    vertices = check_tensor("merge_vertices", "vertices", vertices, torch.float64, ("V", 3))
    edges = check_tensor("merge_vertices", "edges", edges, torch.int64, ("E", 2))
    device = check_devices("merge_vertices", vertices=vertices, edges=edges)
    chosen = dispatch.choose("merge_vertices", impl, device)
    return _merge_vertices(vertices, edges, merging.checked_thresholds(thresholds), chosen)

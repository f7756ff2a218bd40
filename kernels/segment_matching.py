"""Cost between 3D segments, and the transport loss built on it."""

from __future__ import annotations

import torch
from torch import Tensor

from wireframe.kernels import dispatch
from wireframe.kernels.reference import segment_cost_reference, segment_matching_reference
from wireframe.kernels.sinkhorn import check_sinkhorn_parameters

Weights = tuple[float, float, float]


def _check_segments(op: str, pred: Tensor, target: Tensor) -> None:
    for name, x in (("pred", pred), ("target", target)):
        if x.dim() != 4 or x.shape[2:] != (2, 3):
            raise ValueError(f"{op}: {name} must be [B, segments, 2, 3], got {list(x.shape)}")
    if pred.shape[0] != target.shape[0]:
        raise ValueError(f"{op}: pred holds {pred.shape[0]} scenes and target {target.shape[0]}")


def segment_cost(
    pred: Tensor,  # [B, N, 2, 3]
    target: Tensor,  # [B, M, 2, 3]
    *,
    weights: Weights = (1.0, 1.0, 1.0),
    impl: str = "auto",
) -> Tensor:
    """C_ij = w_mid |m_i - m_j|_2 + w_dir (1 - |d_i . d_j|) + w_len |l_i - l_j|.

    m is a segment's midpoint, l its length, d = (q - p) / max(l, 1e-6) for endpoints p, q; the order of the
    endpoints does not matter.

    Args:
        pred: [B, N, 2, 3], any floating dtype, usually normalised coordinates.
        target: [B, M, 2, 3], in the same units.
        weights: (w_mid, w_dir, w_len).
        impl: "auto", "reference", "native" or "triton".

    Returns:
        float32 (float64 for float64) [B, N, M].

    Raises:
        ValueError: shapes that do not fit, or an unknown ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.
    """
    _check_segments("segment_cost", pred, target)
    run = {"reference": segment_cost_reference}[dispatch.choose("segment_cost", impl)]
    return run(pred, target, weights)


def segment_matching(
    pred: Tensor,  # [B, N, 2, 3]
    target: Tensor,  # [B, M, 2, 3]
    target_mask: Tensor,  # [B, M] bool
    *,
    weights: Weights = (1.0, 1.0, 1.0),
    eps: float = 0.1,
    iters: int = 20,
    dustbin: float = 0.3,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The transport loss of each scene and the plan it was taken under.

    loss = sum over rows and real columns of plan x cost, where cost is ``segment_cost`` and plan the exponential
    of ``sinkhorn`` without its dustbins; gradients run through both.

    Args:
        pred: [B, N, 2, 3], any floating dtype.
        target: [B, M, 2, 3]; masked segments may hold anything, NaN too.
        target_mask: bool [B, M], True = real segment.
        weights: (w_mid, w_dir, w_len) of ``segment_cost``.
        eps, iters, dustbin: as in ``sinkhorn``.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        (loss [B], plan [B, N, M]), float32 (float64 for float64); the plan is detached, and 0 in masked columns.

    Raises:
        ValueError: shapes that do not fit, eps <= 0, iters < 1, or an unknown ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.
    """
    _check_segments("segment_matching", pred, target)
    if target_mask.shape != target.shape[:2] or target_mask.dtype != torch.bool:
        raise ValueError(
            f"segment_matching: target_mask must be bool {list(target.shape[:2])}, "
            f"got {target_mask.dtype} {list(target_mask.shape)}"
        )
    check_sinkhorn_parameters("segment_matching", eps, iters)
    run = {"reference": segment_matching_reference}[dispatch.choose("segment_matching", impl)]
    return run(pred, target, target_mask, weights, eps, iters, dustbin)

"""Optimal transport between rows and columns with a dustbin, by log-domain Sinkhorn iterations."""

from __future__ import annotations

import torch
from torch import Tensor

from wireframe.kernels import dispatch
from wireframe.kernels.reference import sinkhorn_reference


def check_sinkhorn_parameters(op: str, eps: float, iters: int) -> None:
    """Raise ValueError for an ``eps`` or ``iters`` that no implementation can use."""
    if not eps > 0:
        raise ValueError(f"{op}: eps must be positive, got {eps}")
    if iters < 1:
        raise ValueError(f"{op}: iters must be at least 1, got {iters}")


def sinkhorn(
    cost: Tensor,  # [B, N, M]
    col_mask: Tensor,  # [B, M] bool
    *,
    eps: float = 0.1,
    iters: int = 20,
    dustbin: float = 0.3,
    impl: str = "auto",
) -> Tensor:
    """log_plan [B, N + 1, M + 1] of the entropic transport between N rows and the real columns.

    The cost gets a dustbin row and column of cost ``dustbin`` (corner 0). Masses: 1 for each row and each real
    column, N for the dustbin column, the number of real columns for the dustbin row, 0 for a masked column, whose
    cost is never read and whose log_plan is -inf. Each of ``iters`` iterations updates the row potentials, then
    the column potentials (see ``sinkhorn_reference`` for the equations); gradients are those of the unrolled loop.

    Args:
        cost: [B, N, M], any floating dtype; the computation is in float32 (float64 for float64).
        col_mask: bool [B, M], True = real column. Without one (M = 0 too) all mass is in the dustbin.
        eps, dustbin: entropic regularisation, and the cost of staying unmatched, in units of cost.
        iters: number of iterations.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        float32 (float64 for float64) [B, N + 1, M + 1]; the last row and column are the dustbins.

    Raises:
        ValueError: shapes that do not fit, eps <= 0, iters < 1, or an unknown ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.
    """
    if cost.dim() != 3:
        raise ValueError(f"sinkhorn: cost must be [B, N, M], got {list(cost.shape)}")
    if col_mask.shape != (cost.shape[0], cost.shape[2]) or col_mask.dtype != torch.bool:
        raise ValueError(
            f"sinkhorn: col_mask must be bool {[cost.shape[0], cost.shape[2]]}, "
            f"got {col_mask.dtype} {list(col_mask.shape)}"
        )
    check_sinkhorn_parameters("sinkhorn", eps, iters)
    run = {"reference": sinkhorn_reference}[dispatch.choose("sinkhorn", impl)]
    return run(cost, col_mask, eps, iters, dustbin)

"""Optimal transport between rows and columns with a dustbin, by log-domain Sinkhorn iterations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wireframe.kernels import dispatch
from wireframe.kernels.checks import check_devices, check_floating
from wireframe.kernels.reference import sinkhorn_reference
from wireframe.kernels.tensors import KERNEL_DTYPES

# How far, in natural units, the scores of a problem may lie apart for the scaling form; see ``sinkhorn_scaling``.
_SCALING_RANGE = 64.0
# Rows or columns of the largest problem that the Triton kernels take.
_TRITON_SIDE = 256


def check_sinkhorn_parameters(op: str, eps: float, iters: int, dustbin: float) -> None:
    """Raise TypeError or ValueError for parameters that no implementation can use."""
    for name, value in (("eps", eps), ("dustbin", dustbin)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{op}: {name} must be a number, not {type(value).__name__}")
    if not isinstance(iters, int):
        raise TypeError(f"{op}: iters must be an integer, not {type(iters).__name__}")
    if not 0 < eps < math.inf:
        raise ValueError(f"{op}: eps must be positive and finite, got {eps}")
    if not -math.inf < dustbin < math.inf:
        raise ValueError(f"{op}: dustbin must be finite, got {dustbin}")
    if iters < 1:
        raise ValueError(f"{op}: iters must be at least 1, got {iters}")


def lowest_cost(eps: float, dustbin: float) -> float:
    """The smallest cost that the scaling form takes: any below 0 goes to the account of the range; inf for none."""
    lowest = 2.0 * max(dustbin, 0.0) - _SCALING_RANGE * eps
    return lowest if lowest <= 0 else math.inf


def triton_limit(rows: int, columns: int, *dtypes: torch.dtype) -> str | None:
    """Why a problem is beyond the Triton kernels of Sinkhorn, None where it is not."""
    if any(dtype not in KERNEL_DTYPES for dtype in dtypes):
        return "its kernels take float16, bfloat16 and float32"
    if max(rows, columns) > _TRITON_SIDE:
        return f"its kernels take at most {_TRITON_SIDE} rows and columns, got {rows} and {columns}"
    return None


def potentials(cost: Tensor, columns: int, iters: int) -> tuple[Tensor, Tensor]:
    """Memory for the potentials u [B, iters, N + 1] and v [B, iters, M + 1] of a [B, N, ...] tensor's problems."""
    batch, rows = cost.shape[:2]
    u = cost.new_empty((batch, iters, rows + 1), dtype=torch.float32)
    return u, cost.new_empty((batch, iters, columns + 1), dtype=torch.float32)


def _without_entries(cost: Tensor, col_mask: Tensor) -> Tensor:
    # With no row or no column all mass lies in the dustbins, whatever the iterations.
    batch, rows, columns = cost.shape
    log_plan = cost.new_full((batch, rows + 1, columns + 1), -math.inf, dtype=torch.float32)
    log_plan[:, :rows, columns] = 0.0
    log_plan[:, rows, :columns].masked_fill_(col_mask, 0.0)
    return log_plan


@torch.library.custom_op("wireframe::sinkhorn", mutates_args=())
def _sinkhorn(
    cost: Tensor, col_mask: Tensor, eps: float, iters: int, dustbin: float, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """log_plan and, if they are to be saved, the potentials of every iteration."""
    batch, rows, columns = cost.shape
    u, v = potentials(cost, columns, iters if save else 0)
    if rows == 0 or columns == 0:
        return _without_entries(cost, col_mask), u.zero_(), v.zero_()
    from wireframe.kernels import launch, sinkhorn_triton

    log_plan = cost.new_empty((batch, rows + 1, columns + 1), dtype=torch.float32)
    launch.run(
        sinkhorn_triton.plan_forward(
            cost.contiguous(), col_mask.contiguous(), log_plan, u, v, eps=eps, iters=iters, dustbin=dustbin,
            lowest=lowest_cost(eps, dustbin),
        )
    )  # fmt: skip
    return log_plan, u, v


@_sinkhorn.register_fake
def _(cost, col_mask, eps, iters, dustbin, save):
    batch, rows, columns = cost.shape
    log_plan = cost.new_empty((batch, rows + 1, columns + 1), dtype=torch.float32)
    return log_plan, *potentials(cost, columns, iters if save else 0)


@torch.library.custom_op("wireframe::sinkhorn_backward", mutates_args=())
def _sinkhorn_backward(
    grad: Tensor, cost: Tensor, col_mask: Tensor, u: Tensor, v: Tensor, eps: float, dustbin: float
) -> Tensor:
    """dcost, float32."""
    dcost = torch.empty_like(cost, dtype=torch.float32, memory_format=torch.contiguous_format)
    if dcost.numel() == 0:
        return dcost
    from wireframe.kernels import launch, sinkhorn_triton

    launch.run(
        sinkhorn_triton.plan_backward(
            cost.contiguous(), col_mask.contiguous(), grad.contiguous(), u, v, dcost,
            torch.empty_like(v), torch.empty_like(u), eps=eps, dustbin=dustbin,
            lowest=lowest_cost(eps, dustbin),
        )
    )  # fmt: skip
    return dcost


@_sinkhorn_backward.register_fake
def _(grad, cost, col_mask, u, v, eps, dustbin):
    return torch.empty_like(cost, dtype=torch.float32, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output):
    cost, col_mask, ctx.eps, _, ctx.dustbin, _ = inputs
    # Or the potentials would cost tensors of zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cost, col_mask, *output[1:])


def _differentiate(ctx, grad, grad_u, grad_v):
    if grad is None:
        return (None,) * 6
    cost, col_mask, u, v = ctx.saved_tensors
    dcost = _sinkhorn_backward(grad.float(), cost, col_mask, u, v, ctx.eps, ctx.dustbin)
    return dcost.to(cost.dtype), None, None, None, None, None


_sinkhorn.register_autograd(_differentiate, setup_context=_keep)


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
        impl: "auto", "reference", "native" or "triton" (N and M up to 256, no float64).

    Returns:
        float32 (float64 for float64) [B, N + 1, M + 1]; the last row and column are the dustbins.

    Raises:
        TypeError, ValueError: arguments that do not fit, eps <= 0, iters < 1, or an unknown ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.

    The Triton kernels have first derivatives in reverse mode; forward mode and ``torch.func`` need the reference.
    """
    check_floating("sinkhorn", cost=cost)
    if cost.dim() != 3:
        raise ValueError(f"sinkhorn: cost must be [B, N, M], got {list(cost.shape)}")
    if col_mask.shape != (cost.shape[0], cost.shape[2]) or col_mask.dtype != torch.bool:
        raise ValueError(
            f"sinkhorn: col_mask must be bool {[cost.shape[0], cost.shape[2]]}, "
            f"got {col_mask.dtype} {list(col_mask.shape)}"
        )
    check_devices("sinkhorn", cost=cost, col_mask=col_mask)
    check_sinkhorn_parameters("sinkhorn", eps, iters, dustbin)
    limit = triton_limit(cost.shape[1], cost.shape[2], cost.dtype)
    if dispatch.choose("sinkhorn", impl, cost.device.type, limit) == "reference":
        return sinkhorn_reference(cost, col_mask, eps, iters, dustbin)
    save = cost.requires_grad and torch.is_grad_enabled()
    return _sinkhorn(cost, col_mask, float(eps), iters, float(dustbin), save)[0]

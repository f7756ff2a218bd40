"""The transport loss built on the cost between 3D segments."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from wireframe.kernels import dispatch
from wireframe.kernels.checks import check_devices
from wireframe.kernels.reference import segment_matching_reference
from wireframe.kernels.segment_cost import Weights, check_segments, check_weights, gradient_like, segment_cost
from wireframe.kernels.sinkhorn import (
    check_sinkhorn_parameters,
    lowest_cost,
    potentials,
    sinkhorn,
    triton_limit,
)

# Segments on either side up to which cost, iterations and loss are one kernel.
_FUSED_SIDE = 128


@torch.library.custom_op("wireframe::segment_matching", mutates_args=())
def _segment_matching(
    pred: Tensor, target: Tensor, target_mask: Tensor, w_mid: float, w_dir: float, w_len: float,
    eps: float, iters: int, dustbin: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, plan and, if they are to be saved, the potentials of every iteration."""
    loss, plan, u, v = _outputs(pred, target, iters if save else 0)
    if plan.numel() == 0:
        # Also where there are scenes, but no rows or no columns.
        return loss.zero_(), plan, u.zero_(), v.zero_()
    from wireframe.kernels import launch, segment_matching_triton

    launch.run(
        segment_matching_triton.plan_forward(
            pred.contiguous(), target.contiguous(), target_mask.contiguous(), loss, plan,
            pred.new_empty(pred.shape[:2], dtype=torch.float32), u, v, weights=(w_mid, w_dir, w_len), eps=eps,
            iters=iters, dustbin=dustbin,
        )
    )  # fmt: skip
    return loss, plan, u, v


def _outputs(pred: Tensor, target: Tensor, saved: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, rows, columns = pred.shape[0], pred.shape[1], target.shape[1]
    loss = pred.new_empty(batch, dtype=torch.float32)
    plan = pred.new_empty((batch, rows, columns), dtype=torch.float32)
    return loss, plan, *potentials(pred, columns, saved)


@_segment_matching.register_fake
def _(pred, target, target_mask, w_mid, w_dir, w_len, eps, iters, dustbin, save):
    return _outputs(pred, target, iters if save else 0)


@torch.library.custom_op("wireframe::segment_matching_backward", mutates_args=())
def _segment_matching_backward(
    grad: Tensor, pred: Tensor, target: Tensor, target_mask: Tensor, u: Tensor, v: Tensor,
    w_mid: float, w_dir: float, w_len: float, eps: float, dustbin: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dpred and dtarget, float32."""
    dpred, dtarget = gradient_like(pred), gradient_like(target)
    if dpred.numel() == 0 or dtarget.numel() == 0:
        return dpred.zero_(), dtarget.zero_()
    from wireframe.kernels import launch, segment_matching_triton

    launch.run(
        segment_matching_triton.plan_backward(
            grad, pred.contiguous(), target.contiguous(), target_mask.contiguous(), u, v, dpred, dtarget,
            pred.new_empty((pred.shape[0], pred.shape[1], target.shape[1]), dtype=torch.float32),
            weights=(w_mid, w_dir, w_len), eps=eps, dustbin=dustbin,
        )
    )  # fmt: skip
    return dpred, dtarget


@_segment_matching_backward.register_fake
def _(grad, pred, target, target_mask, u, v, w_mid, w_dir, w_len, eps, dustbin):
    return gradient_like(pred), gradient_like(target)


def _keep(ctx, inputs, output):
    pred, target, target_mask, w_mid, w_dir, w_len, eps, _, dustbin, _ = inputs
    ctx.parameters = (w_mid, w_dir, w_len, eps, dustbin)
    ctx.save_for_backward(pred, target, target_mask, *output[2:])
    ctx.mark_non_differentiable(*output[1:])
    # Or what is not differentiable would cost tensors of zeros.
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, grad_plan, grad_u, grad_v):
    if grad is None:
        return (None,) * 10
    pred, target, target_mask, u, v = ctx.saved_tensors
    dpred, dtarget = _segment_matching_backward(grad.float(), pred, target, target_mask, u, v, *ctx.parameters)
    wants_pred, wants_target = ctx.needs_input_grad[:2]
    return (
        dpred.to(pred.dtype) if wants_pred else None, dtarget.to(target.dtype) if wants_target else None, *[None] * 8
    )  # fmt: skip


_segment_matching.register_autograd(_differentiate, setup_context=_keep)


def _composed(
    pred: Tensor, target: Tensor, target_mask: Tensor, weights: Weights, eps: float, iters: int, dustbin: float
) -> tuple[Tensor, Tensor]:
    target = torch.where(target_mask[:, :, None, None], target, 0.0)
    cost = segment_cost(pred, target, weights=weights, impl="triton")
    log_plan = sinkhorn(cost, target_mask, eps=eps, iters=iters, dustbin=dustbin, impl="triton")
    plan = log_plan[:, :-1, :-1].exp()
    return _sum_of_each((plan * cost).flatten(1)), plan.detach()


def _sum_of_each(x: Tensor) -> Tensor:
    """Sums [B] of [B, n] by halves: torch.sum chooses its order by the number of rows too."""
    if x.shape[1] == 0:
        return x.sum(1)
    while x.shape[1] > 1:
        x = F.pad(x, (0, x.shape[1] % 2))
        x = x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :]
    return x.squeeze(1)


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
    of ``sinkhorn`` without its dustbins; gradients run through both. Up to 128 segments on either side, with weights
    >= 0 and dustbin <= 32 eps, Triton takes one launch for each direction, else several.

    Args:
        pred: [B, N, 2, 3], any floating dtype.
        target: [B, M, 2, 3]; masked segments may hold anything, NaN too.
        target_mask: bool [B, M], True = real segment.
        weights: (w_mid, w_dir, w_len) of ``segment_cost``.
        eps, iters, dustbin: as in ``sinkhorn``.
        impl: "auto", "reference", "native" or "triton" (N and M up to 256, no float64).

    Returns:
        (loss [B], plan [B, N, M]), float32 (float64 for float64); the plan is detached, and 0 in masked columns.

    Raises:
        TypeError, ValueError: arguments that do not fit, eps <= 0, iters < 1, or an unknown ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.

    The Triton kernels have first derivatives in reverse mode; forward mode and ``torch.func`` need the reference.
    """
    check_segments("segment_matching", pred, target)
    if target_mask.shape != target.shape[:2] or target_mask.dtype != torch.bool:
        raise ValueError(
            f"segment_matching: target_mask must be bool {list(target.shape[:2])}, "
            f"got {target_mask.dtype} {list(target_mask.shape)}"
        )
    check_devices("segment_matching", pred=pred, target_mask=target_mask)
    check_weights("segment_matching", weights)
    check_sinkhorn_parameters("segment_matching", eps, iters, dustbin)
    rows, columns = pred.shape[1], target.shape[1]
    limit = triton_limit(rows, columns, pred.dtype, target.dtype)
    if dispatch.choose("segment_matching", impl, pred.device.type, limit) == "reference":
        return segment_matching_reference(pred, target, target_mask, weights, eps, iters, dustbin)
    # Costs are then >= 0, and the scaling form is known to hold without a look at them.
    safe = min(weights) >= 0 and lowest_cost(eps, dustbin) < math.inf
    if max(rows, columns) > _FUSED_SIDE or not safe:
        return _composed(pred, target, target_mask, weights, eps, iters, dustbin)
    save = torch.is_grad_enabled() and (pred.requires_grad or target.requires_grad)
    w_mid, w_dir, w_len = (float(weight) for weight in weights)
    loss, plan, _, _ = _segment_matching(
        pred, target, target_mask, w_mid, w_dir, w_len, float(eps), iters, float(dustbin), save
    )
    return loss, plan.detach()

"""Clipping by global norm, AdamW and the half-precision copy of the weights, over flat buffers."""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from wireframe.kernels import dispatch
from wireframe.kernels.adamw_step_reference import adamw_step_reference
from wireframe.kernels.checks import check_devices, check_floating, check_integer

_HALVES = (torch.bfloat16, torch.float16)
# Triton's interpreter does not round to bfloat16.
_INTERPRETED_DTYPES = (torch.float16,)
# The kernels count elements in 32 bits.
_MOST_ELEMENTS = (1 << 31) - (1 << 16)


def _check(tensors: dict[str, Tensor], scalars: dict[str, Tensor], healthy: Tensor, half: Tensor | None) -> None:
    op = "adamw_step"
    check_floating(op, **tensors, **scalars, **({} if half is None else {"half": half}))
    weights = tensors["weights"]
    if weights.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: weights must be float32 or float64, got {weights.dtype}")
    for name, tensor in tensors.items():
        if tensor.shape != weights.shape or tensor.dim() != 1 or tensor.dtype != weights.dtype:
            raise ValueError(
                f"{op}: {name} must be {weights.dtype} [P] as weights, got {tensor.dtype} {list(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous")
    for name, scalar in scalars.items():
        if scalar.dim() or scalar.dtype != weights.dtype:
            raise ValueError(f"{op}: {name} must be {weights.dtype} [], got {scalar.dtype} {list(scalar.shape)}")
    if not isinstance(healthy, Tensor) or healthy.dim() or healthy.dtype != torch.bool:
        raise ValueError(f"{op}: healthy must be a bool tensor []")
    if half is not None and (half.dtype not in _HALVES or half.shape != weights.shape or not half.is_contiguous()):
        raise ValueError(
            f"{op}: half must be contiguous bfloat16 or float16 {list(weights.shape)}, "
            f"got {half.dtype} {list(half.shape)}"
        )
    check_devices(op, **tensors, **scalars, healthy=healthy, **({} if half is None else {"half": half}))


def _check_numbers(betas: tuple[float, float], grad_clip: float, eps: float, **decays: float) -> None:
    op = "adamw_step"
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{op}: betas must be two numbers, got {betas!r}")
    numbers = {"grad_clip": grad_clip, "betas[0]": betas[0], "betas[1]": betas[1], "eps": eps, **decays}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{op}: {name} must be a number, not {type(value).__name__}")
    if not grad_clip > 0:
        raise ValueError(f"{op}: grad_clip must be positive, got {grad_clip}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{op}: betas must be in [0, 1), got {betas[0]} and {betas[1]}")
    for name, value in {"eps": eps, **decays}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{op}: {name} must be finite and not negative, got {value}")


def _check_late_from(late_from: int, size: int) -> int:
    if check_integer("adamw_step", "late_from", late_from, 0) > size:
        raise ValueError(f"adamw_step: late_from must be from 0 to {size}, got {late_from}")
    return int(late_from)


def _triton_limit(weights: Tensor, half: Tensor | None) -> str | None:
    """Why the Triton kernels do not take these inputs, None where they do."""
    if weights.dtype != torch.float32:
        return f"its kernels take float32 weights, got {weights.dtype}"
    if weights.numel() > _MOST_ELEMENTS:
        return f"its kernels take at most {_MOST_ELEMENTS} weights, got {weights.numel()}"
    if half is not None and weights.device.type == "cpu" and half.dtype not in _INTERPRETED_DTYPES:
        return "Triton's interpreter cannot round to bfloat16"
    return None


# The schema is inferred from the annotations, and torch < 2.9 knows Optional alone.
@torch.library.custom_op(
    "wireframe::adamw_step", mutates_args=("weights", "exp_avg", "exp_avg_sq", "count", "half")
)
def _adamw_step(
    weights: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, count: Tensor, lr: Tensor,
    healthy: Tensor, half: Optional[Tensor], grad_clip: float, beta1: float, beta2: float, eps: float,  # noqa: UP045
    weight_decay: float, late_weight_decay: float, late_from: int,
) -> Tensor:  # fmt: skip
    """norm"""
    from wireframe.kernels import adamw_step_triton, launch

    norm = torch.empty((), dtype=torch.float32, device=weights.device)
    launch.run(
        adamw_step_triton.plan(
            weights, gradient, exp_avg, exp_avg_sq, count, lr, healthy, half, norm, grad_clip=grad_clip,
            betas=(beta1, beta2), eps=eps, decays=(weight_decay, late_weight_decay), late_from=late_from,
        )
    )  # fmt: skip
    return norm


@_adamw_step.register_fake
def _(weights, *_):
    return torch.empty((), dtype=torch.float32, device=weights.device)


def adamw_step(
    weights: Tensor,  # [P]
    gradient: Tensor,  # [P]
    exp_avg: Tensor,  # [P]
    exp_avg_sq: Tensor,  # [P]
    count: Tensor,  # []
    lr: Tensor,  # []
    healthy: Tensor,  # [] bool
    *,
    grad_clip: float,
    betas: tuple[float, float],
    eps: float = 1e-8,
    weight_decay: float,
    late_weight_decay: float | None = None,
    late_from: int | None = None,
    half: Tensor | None = None,  # [P]
    impl: str = "auto",
) -> Tensor:
    """One step of AdamW in place, or none: nothing changes unless ``healthy`` and the gradient's norm is finite.

    With norm = |gradient|_2, g = gradient min(1, grad_clip / (norm + 1e-6)) and t = count + 1 (Loshchilov and Hutter,
    "Decoupled Weight Decay Regularization"; clipping as in ``torch.nn.utils.clip_grad_norm_``):

        w <- w (1 - lr decay)      m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2
        w <- w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)      count <- t      half <- w, rounded

    Nothing waits for the device, so the step can be part of a graph, and nothing is differentiated. Sums are in a fixed
    order, for the reference on the CPU one that belongs to a number of threads.

    Args:
        weights, gradient, exp_avg, exp_avg_sq: float32 (float64) [P], contiguous; all but the gradient change.
        count: [] of that dtype, updates so far; changes. lr: [] of that dtype. healthy: bool [].
        grad_clip: positive. betas: in [0, 1). eps, weight_decay: not negative.
        late_weight_decay: the decay of the elements from ``late_from`` on; None = as the others.
        half: bfloat16 or float16 [P], or None; not touched where the step is skipped.
        impl: "auto", "reference", "native" or "triton" (float32).

    Returns:
        norm, before clipping: [].

    Raises:
        TypeError, ValueError: arguments that do not fit, or an unknown ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.
    """
    tensors = {"weights": weights, "gradient": gradient, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    _check(tensors, {"count": count, "lr": lr}, healthy, half)
    if late_weight_decay is not None and late_from is None:
        raise ValueError("adamw_step: late_weight_decay needs late_from, the place where it begins")
    late_weight_decay = weight_decay if late_weight_decay is None else late_weight_decay
    _check_numbers(betas, grad_clip, eps, weight_decay=weight_decay, late_weight_decay=late_weight_decay)
    size = weights.numel()
    late_from = size if late_from is None else _check_late_from(late_from, size)
    state = weights, gradient, exp_avg, exp_avg_sq, count, lr, healthy, half
    limit = _triton_limit(weights, half)
    if dispatch.choose("adamw_step", impl, weights.device.type, limit) == "reference":
        decays = weight_decay, late_weight_decay
        return adamw_step_reference(*state, grad_clip, betas, eps, decays, late_from)
    # A norm with a history would keep its graph alive.
    with torch.no_grad():
        return _adamw_step(*state, *map(float, (grad_clip, *betas, eps, weight_decay, late_weight_decay)), late_from)

"""PyTorch reference of AdamW over flat buffers; also what training on a CPU runs."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def adamw_step_reference(
    weights: Tensor,  # [P]
    gradient: Tensor,  # [P]
    exp_avg: Tensor,  # [P]
    exp_avg_sq: Tensor,  # [P]
    count: Tensor,  # []
    lr: Tensor,  # []
    healthy: Tensor,  # [] bool
    half: Tensor | None,  # [P]
    grad_clip: float,
    betas: tuple[float, float],
    eps: float,
    decays: tuple[float, float],
    late_from: int,
) -> Tensor:
    """In place, as ``adamw_step`` says; the norm. A skipped step multiplies by 1 and adds 0, so no bit changes."""
    norm = torch.linalg.vector_norm(gradient)
    applied = healthy & torch.isfinite(norm)
    on = applied.to(weights.dtype)
    count += on
    # Chosen, not multiplied: 0 times what is not finite would be NaN.
    clip = torch.where(applied, (grad_clip / (norm + 1e-6)).clamp(max=1.0), 0.0)
    gradient = torch.where(applied, gradient, 0.0).mul_(clip)
    exp_avg.lerp_(gradient, (1 - betas[0]) * on)
    exp_avg_sq.lerp_(gradient.square_(), (1 - betas[1]) * on)
    # Of no update yet there is no correction; then nothing is applied either.
    rest = [(1 - beta ** count.double().clamp(min=1)) for beta in betas]
    update = exp_avg_sq.sqrt().mul_(rest[1].rsqrt().to(weights.dtype)).add_(eps)
    torch.div(exp_avg, update, out=update).mul_((on * lr / rest[0]).to(weights.dtype))
    for part, decay in ((weights[:late_from], decays[0]), (weights[late_from:], decays[1])):
        part.mul_(1 - on * lr * decay)
    weights.sub_(update)
    if half is not None:
        half.copy_(torch.where(applied, weights, half.to(weights.dtype)))
    return norm

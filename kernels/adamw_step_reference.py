"""PyTorch reference of AdamW over flat buffers; also what training on a CPU runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements at a time on a CPU: what one pass writes is still in its cache when the next one reads it.
_CHUNK = 1 << 17


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
    """In place, as ``adamw_step`` says; the norm.

    Everything is computed and then chosen, never multiplied by 0, which would keep what is not finite: so are the
    corrections of no update, 1 / 0.
    """
    norm = torch.linalg.vector_norm(gradient)
    applied = healthy & norm.isfinite()
    clip = (grad_clip / (norm + 1e-6)).clamp(max=1.0)
    count.add_(applied)
    steps = count.double()
    rate = (lr / (1 - betas[0] ** steps)).to(lr.dtype)
    correction = (1 - betas[1] ** steps).rsqrt().to(lr.dtype)
    for part, decay in _parts(weights, decays, late_from):
        w, m, v = weights[part], exp_avg[part], exp_avg_sq[part]
        g = gradient[part] * clip
        new_m = torch.lerp(m, g, 1 - betas[0])
        new_v = torch.lerp(v, g.square_(), 1 - betas[1])
        update = torch.sqrt(new_v, out=g).mul_(correction).add_(eps)
        torch.div(new_m, update, out=update).mul_(rate)
        new_w = (w * (1 - lr * decay)).sub_(update)
        for old, new in ((w, new_w), (m, new_m), (v, new_v)):
            torch.where(applied, new, old, out=old)
        if half is not None:
            torch.where(applied, new_w.to(half.dtype), half[part], out=half[part])
    return norm


def _parts(weights: Tensor, decays: tuple[float, float], late_from: int) -> Iterator[tuple[slice, float]]:
    """Pieces of the buffers, each with its weight decay."""
    whole = weights.device.type != "cpu" or torch.compiler.is_compiling()
    for start, end, decay in ((0, late_from, decays[0]), (late_from, weights.numel(), decays[1])):
        step = max(end - start, 1) if whole else _CHUNK
        for first in range(start, end, step):
            yield slice(first, min(first + step, end)), decay

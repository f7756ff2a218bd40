"""Segments as the head of the model gives them, as endpoints, and in world space.

The seven numbers of a segment are midpoint (3), direction (3, any length) and length before softplus
(S23DR 2026 baseline, ``midpoint_dir_len``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Length of a segment in normalised units per unit of softplus.
LENGTH_SCALE = 0.1


def decode_segments(
    head: Tensor,  # [..., 7]
    offset: Tensor | None = None,  # [..., 3]
) -> Tensor:
    """Endpoints [..., 2, 3] of the head's numbers [..., 7], float32 (float64 for float64).

    midpoint = head[0:3] + offset, direction = head[3:6] / max(its norm, 1e-12), length = 0.1 softplus(head[6]);
    endpoints = midpoint -/+ direction length / 2.
    """
    head = head if head.dtype == torch.float64 else head.float()
    midpoint = head[..., :3] if offset is None else head[..., :3] + offset
    direction = head[..., 3:6]
    direction = direction * torch.rsqrt(direction.square().sum(-1, keepdim=True).clamp_min(1e-24))
    half = direction * (F.softplus(head[..., 6:7]) * (LENGTH_SCALE / 2))
    return torch.stack([midpoint - half, midpoint + half], dim=-2)


def encode_segments(segments: Tensor) -> Tensor:
    """The inverse of ``decode_segments`` without offset: [..., 2, 3] of positive length to [..., 7]."""
    p, q = segments[..., 0, :], segments[..., 1, :]
    length = (q - p).norm(dim=-1, keepdim=True)
    ratio = length / LENGTH_SCALE
    # log(exp(x) - 1), written so that a long segment does not overflow.
    raw = ratio + torch.log(-torch.expm1(-ratio))
    return torch.cat([(p + q) / 2, (q - p) / length, raw], dim=-1)


def denormalise(
    segments: Tensor,  # [B, S, 2, 3] or [S, 2, 3]
    center: Tensor,  # [B, 3] or [3]
    scale: Tensor,  # [B] or []
) -> Tensor:
    """World coordinates (metres) of normalised segments: x * scale + center, per scene; the shape is kept."""
    center = center.to(segments)[..., None, None, :]
    scale = scale.to(segments)[..., None, None, None]
    return segments * scale + center

"""What the first linear map reads of labelled points: the columns, and the PyTorch reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Mean and spread of the vote features over the training scenes.
VIEWS_MEAN, VIEWS_STD = 2.7, 1.0
FRACTION_MEAN, FRACTION_STD = 0.5, 0.25

# Columns between the Fourier features and the labels: xyz, the two vote features, and a one.
PLAIN = 6

# Rows of a multiple of so many elements are whole cache lines in half precision, and whole steps of a product's sums.
_MULTIPLE = 64


def feature_width(bands: int, labels: tuple[int, int, int]) -> int:
    """Columns altogether: 128 for 32 bands, 13 classes, 2 sources and 29 labels behind."""
    return -(-(2 * bands + PLAIN + sum(labels)) // _MULTIPLE) * _MULTIPLE


def point_features_reference(
    xyz: Tensor,  # [B, T, 3]
    class_id: Tensor,  # [B, T]
    source: Tensor,  # [B, T]
    behind: Tensor,  # [B, T]
    n_views_voted: Tensor,  # [B, T]
    vote_frac: Tensor,  # [B, T]
    mask: Tensor,  # [B, T] bool
    frequencies: Tensor,  # [F, 3]
    labels: tuple[int, int, int],
    dtype: torch.dtype,
) -> Tensor:
    """[B, T, ``feature_width``] in ``dtype``; in float32, in float64 where xyz or frequencies are float64.

    Differentiable in xyz, vote_frac and frequencies; what a masked point holds has gradients of zero.
    """
    working = torch.promote_types(torch.float32, torch.promote_types(xyz.dtype, frequencies.dtype))
    bands, seen = frequencies.shape[0], mask.to(working)
    # Before anything is computed of it: behind a NaN even a gradient of zero would be NaN.
    xyz = torch.where(mask[..., None], xyz.to(working), 0.0)
    fraction = torch.where(mask, vote_frac.to(working), FRACTION_MEAN)
    x, b = xyz * (2.0 * math.pi), frequencies.to(working)
    # Written out instead of a matrix product: TF32 or autocast would ruin arguments of hundreds of radians.
    angle = x[..., 0:1] * b[:, 0] + x[..., 1:2] * b[:, 1] + x[..., 2:3] * b[:, 2]
    out = xyz.new_zeros(*mask.shape, feature_width(bands, labels))
    out[..., :bands] = angle.sin()
    out[..., bands : 2 * bands] = angle.cos() * seen[..., None]
    first = 2 * bands
    out[..., first : first + 3] = xyz
    out[..., first + 3] = (n_views_voted.to(working) - VIEWS_MEAN) / VIEWS_STD * seen
    out[..., first + 4] = (fraction - FRACTION_MEAN) / FRACTION_STD
    out[..., first + 5] = seen
    first += PLAIN
    for label, size in zip((class_id, source, behind.clamp_min(0)), labels):
        known = seen * ((label >= 0) & (label < size))
        out.scatter_(2, first + label.long().clamp(0, size - 1)[..., None], known[..., None])
        first += size
    return out.to(dtype)

"""PyTorch references of the operations: the oracle of the tests, and the path of CPU training and inference.

Computation is in float32, or in float64 when an input is float64; autocast does not reach inside.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from wireframe.kernels.tensors import without_autocast

# Stands for log 0 inside Sinkhorn: exp of it is exactly 0, and no inf - inf can arise.
_LOG_ZERO = -1e30


def _working_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _unit(x: Tensor) -> Tensor:
    # x / max(|x|, 1e-12) without a square root of zero in the backward pass.
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True).clamp_min(1e-24))


def zero_where_masked(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, N, H, D] with zeros where mask [B, N] is False, whatever stands there."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # A copy and the few masked rows: a quarter of the time of a choice for every number.
        masked = (~mask).flatten().nonzero().squeeze(1)
        return x.flatten(0, 1).index_fill(0, masked, 0.0).view(x.shape)
    return torch.where(mask[:, :, None, None], x, 0.0)


def qk_norm_attention_reference(
    q: Tensor,  # [B, Nq, H, D]
    k: Tensor,  # [B, Nk, Hkv, D]
    v: Tensor,  # [B, Nk, Hkv, D]
    log_scale: Tensor,  # [H]
    key_mask: Tensor | None = None,  # [B, Nk] bool, True = valid
) -> Tensor:
    """softmax(exp(log_scale_h) q^ . k^) v with q^, k^ of unit length; query head h reads kv head h // (H // Hkv).

    Returns [B, Nq, H, D] in q.dtype. A scene without a valid key gives zeros and zero gradients; what masked
    keys and values hold (NaN too) reaches neither the output nor a gradient.
    """
    dtype, out_dtype = _working_dtype(q, k, v), q.dtype
    with without_autocast(q.device.type):
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if k.shape[1] == 0:
            # One zero key of value zero: zeros out, and q keeps a (zero) gradient.
            k, v = F.pad(k, (0, 0, 0, 0, 0, 1)), F.pad(v, (0, 0, 0, 0, 0, 1))
            key_mask = None
        if key_mask is not None:
            k = zero_where_masked(k, key_mask)
        return attend(_unit(q) * log_scale.to(dtype).exp()[:, None], _unit(k), v, key_mask).to(out_dtype)


def attend(
    q: Tensor,  # [B, Nq, H, D]
    k: Tensor,  # [B, Nk, Hkv, D]
    v: Tensor,  # [B, Nk, Hkv, D]
    key_mask: Tensor | None,  # [B, Nk] bool
) -> Tensor:
    """softmax(q . k) v over the keys of the mask, whose others are zeros; [B, Nq, H, D].

    A scene without a valid key gives zeros; what masked values hold is never used.
    """
    bias = None
    if key_mask is not None:
        v = zero_where_masked(v, key_mask)
        # Without a valid key every (zeroed) key is admitted: the output is an average of zeros.
        seen = key_mask | ~key_mask.any(1, keepdim=True)
        bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -math.inf)
        bias = bias[:, None, None, :]
    # A branch, because the comparison is symbolic where torch.compile takes shapes as dynamic.
    grouped = True if q.shape[2] != k.shape[2] else False  # noqa: SIM210
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0, enable_gqa=grouped).transpose(1, 2)


def sinkhorn_reference(
    cost: Tensor,  # [B, N, M]
    col_mask: Tensor,  # [B, M] bool, True = real column
    eps: float = 0.1,
    iters: int = 20,
    dustbin: float = 0.3,
) -> Tensor:
    """Log-domain Sinkhorn with a dustbin row and column; returns log_plan [B, N + 1, M + 1].

    C is ``cost`` with a dustbin row and column of cost ``dustbin`` and corner 0. Masses a: 1 for each row, the
    number of real columns for the dustbin row; b: 1 for each real column, 0 for a masked one, N for the dustbin
    column. From f = g = 0, each iteration sets f = eps (log a - lse_columns((g - C) / eps)), then g likewise
    over rows; log_plan = (f + g - C) / eps. It is -inf where a mass is 0; a masked column is never read.
    """
    batch, rows, _ = cost.shape
    dtype = _working_dtype(cost)
    with without_autocast(cost.device.type):
        real = torch.where(col_mask[:, None, :], cost.to(dtype), 0.0)
        # scores = -C / eps, and below u = f / eps, v = g / eps.
        scores = F.pad(real, (0, 1, 0, 1), value=dustbin) * (-1.0 / eps)
        corner = torch.zeros_like(scores, dtype=torch.bool)
        corner[:, -1, -1] = True
        scores = scores.masked_fill(corner, 0.0)
        columns = col_mask.sum(1, keepdim=True).to(dtype)
        a = torch.cat([columns.new_ones(batch, rows), columns], 1)[:, :, None]
        b = torch.cat([col_mask.to(dtype), columns.new_full((batch, 1), rows)], 1)[:, None, :]
        log_a = torch.where(a > 0, a, 1.0).log()
        log_b = torch.where(b > 0, b, 1.0).log()
        u = torch.zeros_like(log_a)
        v = torch.zeros_like(log_b).masked_fill(b == 0, _LOG_ZERO)
        for _ in range(iters):
            u = (log_a - torch.logsumexp(scores + v, 2, keepdim=True)).masked_fill(a == 0, _LOG_ZERO)
            v = (log_b - torch.logsumexp(scores + u, 1, keepdim=True)).masked_fill(b == 0, _LOG_ZERO)
        return (u + v + scores).masked_fill((a == 0) | (b == 0), -math.inf)


def _length(x: Tensor) -> Tensor:
    # |x| whose gradient at x = 0 is 0 instead of NaN.
    square = x.square().sum(-1)
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def _midpoint_direction_length(segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p, q = segments[..., 0, :], segments[..., 1, :]
    length = _length(q - p)
    return (p + q) / 2, (q - p) / length.clamp_min(1e-6)[..., None], length


def segment_cost_reference(
    pred: Tensor,  # [B, N, 2, 3]
    target: Tensor,  # [B, M, 2, 3]
    weights: tuple[float, float, float],
) -> Tensor:
    """w_mid |m_i - m_j|_2 + w_dir (1 - |d_i . d_j|) + w_len |l_i - l_j|, [B, N, M] float32 (or float64).

    m is the midpoint, l the length and d = (q - p) / max(l, 1e-6) of a segment p, q; the order of a segment's
    endpoints does not matter. Segments of length zero and equal midpoints have finite gradients.
    """
    dtype = _working_dtype(pred, target)
    w_mid, w_dir, w_len = weights
    with without_autocast(pred.device.type):
        mid_i, dir_i, len_i = _midpoint_direction_length(pred.to(dtype)[:, :, None])
        mid_j, dir_j, len_j = _midpoint_direction_length(target.to(dtype)[:, None, :])
        cosine = (dir_i * dir_j).sum(-1)
        return w_mid * _length(mid_i - mid_j) + w_dir * (1.0 - cosine.abs()) + w_len * (len_i - len_j).abs()


def segment_matching_reference(
    pred: Tensor,  # [B, N, 2, 3]
    target: Tensor,  # [B, M, 2, 3]
    target_mask: Tensor,  # [B, M] bool, True = real segment
    weights: tuple[float, float, float],
    eps: float = 0.1,
    iters: int = 20,
    dustbin: float = 0.3,
) -> tuple[Tensor, Tensor]:
    """Transport loss [B] = sum over real columns of plan x cost, and the detached plan [B, N, M].

    Gradients run through the cost and through the plan. Masked targets may hold anything, NaN too.
    """
    target = torch.where(target_mask[:, :, None, None], target, 0.0)
    cost = segment_cost_reference(pred, target, weights)
    plan = sinkhorn_reference(cost, target_mask, eps, iters, dustbin)[:, :-1, :-1].exp()
    return (plan * cost).sum((1, 2)), plan.detach()

"""Attention with L2-normalised queries and keys and a learned scale per head (S23DR 2026 baseline)."""

from __future__ import annotations

import torch
from torch import Tensor

from wireframe.kernels import dispatch
from wireframe.kernels.reference import qk_norm_attention_reference


def _check(q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor, key_mask: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"qk_norm_attention: q must be [B, Nq, H, D] and k [B, Nk, Hkv, D], "
            f"got {list(q.shape)} and {list(k.shape)}"
        )
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"qk_norm_attention: k and v must share one shape, and B and D with q; "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    heads, kv_heads = q.shape[2], k.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"qk_norm_attention: {heads} query heads are no multiple of {kv_heads} key heads")
    if log_scale.shape != (heads,):
        raise ValueError(f"qk_norm_attention: log_scale must be [{heads}], got {list(log_scale.shape)}")
    if key_mask is not None and (key_mask.shape != k.shape[:2] or key_mask.dtype != torch.bool):
        raise ValueError(
            f"qk_norm_attention: key_mask must be bool {list(k.shape[:2])}, "
            f"got {key_mask.dtype} {list(key_mask.shape)}"
        )


def qk_norm_attention(
    q: Tensor,  # [B, Nq, H, D]
    k: Tensor,  # [B, Nk, Hkv, D]
    v: Tensor,  # [B, Nk, Hkv, D]
    log_scale: Tensor,  # [H]
    key_mask: Tensor | None = None,  # [B, Nk] bool
    *,
    impl: str = "auto",
) -> Tensor:
    """out = softmax(exp(log_scale_h) q^ . k^) v, with q^ = q / max(|q|, 1e-12) and k^ likewise.

    Args:
        q: [B, Nq, H, D], any floating dtype; norms and softmax are in float32 (float64 for float64).
        k, v: [B, Nk, Hkv, D]; query head h reads key/value head h // (H // Hkv).
        log_scale: [H], natural logarithm of each head's logit scale.
        key_mask: bool [B, Nk], True = valid; None = all valid. What masked keys and values hold is never used.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        [B, Nq, H, D] in q.dtype; zeros (and zero gradients) for a scene without a valid key.

    Raises:
        ValueError: shapes that do not fit, or an unknown ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.
    """
    _check(q, k, v, log_scale, key_mask)
    run = {"reference": qk_norm_attention_reference}[dispatch.choose("qk_norm_attention", impl)]
    return run(q, k, v, log_scale, key_mask)

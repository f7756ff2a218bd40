"""Attention with L2-normalised queries and keys and a learned scale per head (S23DR 2026 baseline)."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from wireframe.kernels import dispatch
from wireframe.kernels.checks import check_devices, check_floating
from wireframe.kernels.reference import qk_norm_attention_reference

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_HEAD_DIMS = (32, 64, 128)
# Triton's interpreter multiplies the bits of bfloat16 as integers.
_INTERPRETED_DTYPES = (torch.float16, torch.float32)


def _check(q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor, key_mask: Tensor | None) -> None:
    check_floating("qk_norm_attention", q=q, k=k, v=v, log_scale=log_scale)
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
    check_devices("qk_norm_attention", q=q, k=k, v=v, log_scale=log_scale)
    if key_mask is not None:
        check_devices("qk_norm_attention", q=q, key_mask=key_mask)


def _triton_limit(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the Triton kernels do not take these inputs, None where they do."""
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v must share bfloat16, float16 or float32, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.device.type == "cpu" and q.dtype not in _INTERPRETED_DTYPES:
        return f"Triton's interpreter cannot compute in {q.dtype}; use float32 on the CPU"
    if q.shape[3] not in _HEAD_DIMS:
        return f"the head dimension must be 32, 64 or 128, got {q.shape[3]}"
    return None


# The schema is inferred from the annotations, and torch < 2.9 knows Optional alone.
@torch.library.custom_op("wireframe::qk_norm_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor, key_mask: Optional[Tensor]  # noqa: UP045
) -> tuple[Tensor, Tensor]:
    """(out [B, Nq, H, D], log-sum-exp in base 2, float32 [B, Hkv, Nq * G]) by the Triton kernels."""
    from wireframe.kernels.launch import architecture, run
    from wireframe.kernels.qk_norm_attention_forward import plan_forward

    out, lse = _empty_outputs(q, k)
    if k.shape[1] == 0:
        return out.zero_(), lse.zero_()
    run(plan_forward(_rows(q), _rows(k), _rows(v), _scales(log_scale), key_mask, out, lse, architecture(q.device)))
    return out, lse


def _empty_outputs(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    kv_heads = k.shape[2]
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(batch, kv_heads, queries * (heads // kv_heads), dtype=torch.float32, device=q.device),
    )


def _rows(x: Tensor) -> Tensor:
    """x with head vectors in one piece and aligned as fresh memory is: start at 16 bytes, strides at 16 elements.

    Alignment chooses the layout of a kernel and with it the order of its sums; so bits depend on values and shapes.
    Inside a scene the kernels count elements in 32 bits.
    """
    aligned = x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in x.stride()[:3])
    span = sum((length - 1) * stride for length, stride in zip(x.shape[1:], x.stride()[1:]))
    if x.stride(3) == 1 and aligned and span < 1 << 31:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _scales(log_scale: Tensor) -> Tensor:
    return log_scale.detach().float().contiguous()


@_forward.register_fake
def _(q, k, v, log_scale, key_mask):
    return _empty_outputs(q, k)


@torch.library.custom_op("wireframe::qk_norm_attention_backward", mutates_args=())
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor, key_mask: Optional[Tensor],  # noqa: UP045
    out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dlog_scale) by the Triton kernels."""
    from wireframe.kernels.launch import architecture, run
    from wireframe.kernels.qk_norm_attention_backward import plan_backward

    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dlog_scale = torch.empty(log_scale.shape, dtype=torch.float32, device=q.device)
    if q.shape[0] * q.shape[1] * k.shape[1] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dlog_scale.zero_().to(log_scale.dtype)
    forward = _rows(q), _rows(k), _rows(v), _scales(log_scale), key_mask, out, lse
    run(plan_backward(_rows(do), *forward, dq, dk, dv, dlog_scale, architecture(q.device)))
    return dq, dk, dv, dlog_scale.to(log_scale.dtype)


@_backward.register_fake
def _(do, q, k, v, log_scale, key_mask, out, lse):
    # Not empty_like: that keeps the strides of a view, and the kernels write contiguous tensors.
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, log_scale))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    # Or lse would cost a tensor of zeros.
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do: Tensor | None, _) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 5
    return *_backward(do, *ctx.saved_tensors), None


_forward.register_autograd(_differentiate, setup_context=_save)


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
        log_scale: [H], natural logarithm of each head's logit scale; logits are rounded to float32, so that a
            scale of 1e4 is about the largest of use.
        key_mask: bool [B, Nk], True = valid; None = all valid. What masked keys and values hold is never used.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        [B, Nq, H, D] in q.dtype; zeros (and zero gradients) for a scene without a valid key.

    Raises:
        TypeError: not tensors. ValueError: shapes, dtypes or devices that do not fit, or an unknown ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.

    The Triton kernels have first derivatives in reverse mode; forward mode and ``torch.func`` need the reference.
    """
    _check(q, k, v, log_scale, key_mask)
    if dispatch.choose("qk_norm_attention", impl, q.device.type, _triton_limit(q, k, v)) == "triton":
        return _forward(q, k, v, log_scale, key_mask)[0]
    return qk_norm_attention_reference(q, k, v, log_scale, key_mask)

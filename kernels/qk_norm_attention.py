"""Attention with L2-normalised queries and keys and a learned scale per head (S23DR 2026 baseline)."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from wireframe.kernels import dispatch
from wireframe.kernels.checks import check_devices, check_floating
from wireframe.kernels.norms_native import native_limit, unit_heads
from wireframe.kernels.reference import attend, qk_norm_attention_reference
from wireframe.kernels.tensors import KERNEL_DTYPES, fresh

_HEAD_DIMS = (32, 64, 128)
# Triton's interpreter multiplies the bits of bfloat16 as integers.
_INTERPRETED_DTYPES = (torch.float16, torch.float32)


def _check(q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor, key_mask: Tensor | None) -> None:
    op = "qk_norm_attention"
    check_floating(op, q=q, k=k, v=v, log_scale=log_scale)
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"{op}: q must be [B, Nq, H, D] and k [B, Nk, Hkv, D], got {list(q.shape)} and {list(k.shape)}"
        )
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"{op}: k and v must share one shape, and B and D with q; "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    check_devices(op, q=q, k=k, v=v, log_scale=log_scale)
    _check_heads(op, q, *k.shape[1:3], log_scale, key_mask)


def _check_kvpacked(q: Tensor, kv: Tensor, log_scale: Tensor, key_mask: Tensor | None) -> None:
    op = "qk_norm_attention_kvpacked"
    check_floating(op, q=q, kv=kv, log_scale=log_scale)
    if q.dim() != 4 or kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(
            f"{op}: q must be [B, Nq, H, D] and kv [B, Nk, 2, Hkv, D], got {list(q.shape)} and {list(kv.shape)}"
        )
    if kv.shape[0] != q.shape[0] or kv.shape[4] != q.shape[3]:
        raise ValueError(f"{op}: kv must share B and D with q, got q {list(q.shape)}, kv {list(kv.shape)}")
    check_devices(op, q=q, kv=kv, log_scale=log_scale)
    _check_heads(op, q, kv.shape[1], kv.shape[3], log_scale, key_mask)


def _check_heads(op: str, q: Tensor, keys: int, kv_heads: int, log_scale: Tensor, key_mask: Tensor | None) -> None:
    batch, _, heads, _ = q.shape
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: {heads} query heads are no multiple of {kv_heads} key heads")
    if log_scale.shape != (heads,):
        raise ValueError(f"{op}: log_scale must be [{heads}], got {list(log_scale.shape)}")
    if key_mask is not None:
        if key_mask.shape != (batch, keys) or key_mask.dtype != torch.bool:
            raise ValueError(
                f"{op}: key_mask must be bool {[batch, keys]}, got {key_mask.dtype} {list(key_mask.shape)}"
            )
        check_devices(op, q=q, key_mask=key_mask)


def _triton_limit(q: Tensor, **keys: Tensor) -> str | None:
    """Why the Triton kernels do not take these inputs, None where they do; keys: k and v, or kv."""
    if q.dtype not in KERNEL_DTYPES or any(x.dtype != q.dtype for x in keys.values()):
        found = ", ".join(str(x.dtype) for x in (q, *keys.values()))
        return f"{', '.join(['q', *keys])} must share bfloat16, float16 or float32, got {found}"
    if q.device.type == "cpu" and q.dtype not in _INTERPRETED_DTYPES:
        return f"Triton's interpreter cannot compute in {q.dtype}; use float32 on the CPU"
    if q.shape[3] not in _HEAD_DIMS:
        return f"the head dimension must be 32, 64 or 128, got {q.shape[3]}"
    return None


def _native_limit(*tensors: Tensor, keys: int) -> str | None:
    """Why the C++ code does not take these inputs, None where it does."""
    return native_limit(*tensors) or ("there must be a key" if keys == 0 else None)


def _attend_natively(q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor, key_mask: Tensor | None) -> Tensor:
    """Unit vectors by the C++ code, attention by torch."""
    if key_mask is not None and key_mask.all():
        # The same bits, without copies of keys and values.
        key_mask = None
    return attend(unit_heads(q, log_scale), unit_heads(k, mask=key_mask), v, key_mask)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the forward returns, by the Triton kernels."""
    from wireframe.kernels.launch import architecture, run
    from wireframe.kernels.qk_norm_attention_forward import plan_forward

    out, lse, *saved = _empty_outputs(q, k)
    if k.shape[1] == 0:
        return out.zero_(), lse.zero_(), *saved
    inputs = _rows(q), _rows(k), _rows(v), _scales(log_scale), key_mask
    run(plan_forward(*inputs, out, lse, architecture(q.device), saved=tuple(saved)))
    return out, lse, *saved


def _empty_outputs(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [B, Nq, H, D], the log-sum-exp in base 2, float32 [B, Hkv, Nq * G], and ``empty_keys``."""
    from wireframe.kernels.qk_norm_attention_keys import empty_keys

    batch, queries, heads, _ = q.shape
    kv_heads = k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, kv_heads, queries * (heads // kv_heads), dtype=torch.float32, device=q.device)
    return out, lse, *empty_keys(k)


def _differentiate(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor,
    factors: Tensor, bits: Tensor, dk: Tensor, dv: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fills dk and dv; (dq, dlog_scale), all by the Triton kernels."""
    from wireframe.kernels.launch import architecture, run
    from wireframe.kernels.qk_norm_attention_backward import plan_backward

    dq = fresh(q)
    dlog_scale = torch.empty(log_scale.shape, dtype=torch.float32, device=q.device)
    if q.shape[0] * q.shape[1] * k.shape[1] == 0:
        for x in (dq, dk, dv, dlog_scale):
            x.zero_()
    else:
        forward = _rows(q), _rows(k), _rows(v), _scales(log_scale), key_mask, out, lse
        grads = dq, dk, dv, dlog_scale
        run(plan_backward(_rows(do), *forward, *grads, architecture(q.device), saved=(factors, bits)))
    return dq, dlog_scale.to(log_scale.dtype)


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


def _halves(kv: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Nk, Hkv, D] as views of both [B, Nk, 2, Hkv, D]."""
    return kv[:, :, 0], kv[:, :, 1]


# The schemas are inferred from the annotations, and torch < 2.9 knows Optional alone.
@torch.library.custom_op("wireframe::qk_norm_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor, key_mask: Optional[Tensor]  # noqa: UP045
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _attend(q, k, v, log_scale, key_mask)


@torch.library.custom_op("wireframe::qk_norm_attention_kvpacked", mutates_args=())
def _forward_kvpacked(
    q: Tensor, kv: Tensor, log_scale: Tensor, key_mask: Optional[Tensor]  # noqa: UP045
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _attend(q, *_halves(kv), log_scale, key_mask)


@_forward.register_fake
def _(q, k, v, log_scale, key_mask):
    return _empty_outputs(q, k)


@_forward_kvpacked.register_fake
def _(q, kv, log_scale, key_mask):
    return _empty_outputs(q, kv[:, :, 0])


@torch.library.custom_op("wireframe::qk_norm_attention_backward", mutates_args=())
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor, key_mask: Optional[Tensor],  # noqa: UP045
    out: Tensor, lse: Tensor, factors: Tensor, bits: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dlog_scale)."""
    dk, dv = fresh(k), fresh(v)
    dq, dlog_scale = _differentiate(do, q, k, v, log_scale, key_mask, out, lse, factors, bits, dk, dv)
    return dq, dk, dv, dlog_scale


@torch.library.custom_op("wireframe::qk_norm_attention_kvpacked_backward", mutates_args=())
def _backward_kvpacked(
    do: Tensor, q: Tensor, kv: Tensor, log_scale: Tensor, key_mask: Optional[Tensor],  # noqa: UP045
    out: Tensor, lse: Tensor, factors: Tensor, bits: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dkv, dlog_scale)."""
    dkv = fresh(kv)
    inputs = q, *_halves(kv), log_scale, key_mask
    dq, dlog_scale = _differentiate(do, *inputs, out, lse, factors, bits, *_halves(dkv))
    return dq, dkv, dlog_scale


@_backward.register_fake
def _(do, q, k, v, log_scale, *_):
    return tuple(map(fresh, (q, k, v, log_scale)))


@_backward_kvpacked.register_fake
def _(do, q, kv, log_scale, *_):
    return tuple(map(fresh, (q, kv, log_scale)))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(*output[1:])
    # Or each of those would cost a tensor of zeros.
    ctx.set_materialize_grads(False)


def _register_autograd(forward, backward) -> None:
    def differentiate(ctx, do: Tensor | None, *_) -> tuple[Tensor | None, ...]:
        # The mask is the last input.
        grads = (None,) * (len(ctx.needs_input_grad) - 1) if do is None else backward(do, *ctx.saved_tensors)
        return *grads, None

    forward.register_autograd(differentiate, setup_context=_save)


_register_autograd(_forward, _backward)
_register_autograd(_forward_kvpacked, _backward_kvpacked)


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
        impl: "auto", "reference", "native" (float32 on the CPU; the attention itself by torch) or "triton".

    Returns:
        [B, Nq, H, D] in q.dtype; zeros (and zero gradients) for a scene without a valid key.

    Raises:
        TypeError: not tensors. ValueError: shapes, dtypes or devices that do not fit, or an unknown ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.

    The kernels and the C++ code have first derivatives in reverse mode; forward mode and ``torch.func`` need the
    reference.
    """
    _check(q, k, v, log_scale, key_mask)
    limits = _triton_limit(q, k=k, v=v), _native_limit(q, k, v, log_scale, keys=k.shape[1])
    chosen = dispatch.choose("qk_norm_attention", impl, q.device.type, *limits)
    if chosen == "triton":
        return _forward(q, k, v, log_scale, key_mask)[0]
    attend_by = _attend_natively if chosen == "native" else qk_norm_attention_reference
    return attend_by(q, k, v, log_scale, key_mask)


def qk_norm_attention_kvpacked(
    q: Tensor,  # [B, Nq, H, D]
    kv: Tensor,  # [B, Nk, 2, Hkv, D]
    log_scale: Tensor,  # [H]
    key_mask: Tensor | None = None,  # [B, Nk] bool
    *,
    impl: str = "auto",
) -> Tensor:
    """``qk_norm_attention`` of keys kv[:, :, 0] and values kv[:, :, 1], with the same bits.

    One projection makes both, and the Triton kernels return their gradient in one piece, contiguous: nothing is copied
    between the product that makes kv and the products that take its gradient. Arguments, results, errors and
    derivatives as there.
    """
    _check_kvpacked(q, kv, log_scale, key_mask)
    limits = _triton_limit(q, kv=kv), _native_limit(q, kv, log_scale, keys=kv.shape[1])
    chosen = dispatch.choose("qk_norm_attention_kvpacked", impl, q.device.type, *limits)
    if chosen == "triton":
        return _forward_kvpacked(q, kv, log_scale, key_mask)[0]
    attend_by = _attend_natively if chosen == "native" else qk_norm_attention_reference
    return attend_by(q, *kv.unbind(2), log_scale, key_mask)

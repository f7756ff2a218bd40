"""Norms on CPU tensors by ``wireframe._C`` with first derivatives: one pass over each row, on the calling thread.

Composed of operations of torch, as in the references, each of them takes several passes over fresh memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wireframe.kernels import native
from wireframe.kernels.dropout_reference import dropout_add_reference


def native_limit(*tensors: Tensor, dtype: torch.dtype | None = torch.float32) -> str | None:
    """Why the functions here do not take these inputs and this dtype of the result, None where they do."""
    for found in (*(x.dtype for x in tensors), dtype):
        if found != torch.float32:
            return f"it computes in float32, got {found}"
    return "torch.compile fuses the reference instead" if torch.compiler.is_compiling() else None


def rms_norm_native(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``ops.rms_norm`` in float32."""
    return _RMSNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _norm(x, weight, eps)


def residual_norm_native(
    x: Tensor, branch: Tensor, weight: Tensor, keys: Tensor | None, site: int, p: float, eps: float
) -> tuple[Tensor, Tensor]:
    """total and normed of ``ops.residual_norm`` in float32."""
    if keys is None:
        compute = _ResidualNorm.apply if torch.is_grad_enabled() else _sum_and_norm
        return compute(x, branch, weight, eps)
    total = dropout_add_reference(x, branch, keys, site, p)
    return total, rms_norm_native(total, weight, eps)


def unit_heads(
    x: Tensor,  # [B, N, H, D]
    log_scale: Tensor | None = None,  # [H]
    mask: Tensor | None = None,  # [B, N] bool
) -> Tensor:
    """x / max(|x|, 1e-12) exp(log_scale) for each head vector, zeros where the mask is False, whatever stands there."""
    if torch.is_grad_enabled():
        return _UnitHeads.apply(x, log_scale, mask)
    return _unit_heads(None, x, None if log_scale is None else log_scale.exp(), mask, None)


# The work itself; the classes behind it keep what the gradients need, which takes torch longer than a short row.


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed = torch.empty(x.shape)
    native.module().rms_norm(_rows(x), None, _buffer(weight), eps, None, _buffer(normed))
    return normed


def _sum_and_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total, normed = torch.empty(x.shape), torch.empty(x.shape)
    native.module().rms_norm(_rows(x), _rows(branch), _buffer(weight), eps, _buffer(total), _buffer(normed))
    return total, normed


def _norm_backward(
    dtotal: Tensor | None, dnormed: Tensor, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    dx, dweight = torch.empty(total.shape), torch.empty(weight.shape)
    inputs = None if dtotal is None else _rows(dtotal), _rows(dnormed), _rows(total), _buffer(weight), eps
    native.module().rms_norm_backward(*inputs, _buffer(dx), _buffer(dweight))
    return dx, dweight


def _unit_heads(
    dout: Tensor | None, x: Tensor, scales: Tensor | None, mask: Tensor | None, dscales: Tensor | None
) -> Tensor:
    """Of x, or where there is a dout the gradient of x, with that of the logarithms of the scales in dscales."""
    out, (heads, dim) = torch.empty(x.shape), x.shape[2:]
    given = None if dout is None else _rows(dout, axes=2)
    optional = (None if t is None else _buffer(t.contiguous()) for t in (scales, mask))
    outputs = _buffer(out), None if dscales is None else _buffer(dscales)
    native.module().unit_heads(given, _rows(x, axes=2), heads, dim, *optional, *outputs)
    return out


def _rows(x: Tensor, axes: int = 1):
    """The buffer of x, or of x as [R, C] with the last ``axes`` of its axes as C; a copy only where they are apart."""
    if not x.is_contiguous():
        x = x.reshape(-1, math.prod(x.shape[-axes:]))
        x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    return _buffer(x)


def _buffer(x: Tensor):
    # detach is a node that only a tensor with a gradient needs.
    return (x.detach() if x.requires_grad else x).numpy()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dnormed: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_norm_backward(None, dnormed, *ctx.saved_tensors, ctx.eps), None


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, normed = _sum_and_norm(x, branch, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        # Or an output that nobody uses would cost a tensor of zeros.
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal: Tensor | None, dnormed: Tensor | None) -> tuple[Tensor | None, ...]:
        if dnormed is None:
            return dtotal, dtotal, None, None
        dx, dweight = _norm_backward(dtotal, dnormed, *ctx.saved_tensors, ctx.eps)
        return dx, dx, dweight, None


class _UnitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, log_scale: Tensor | None, mask: Tensor | None) -> Tensor:
        scales = None if log_scale is None else log_scale.exp()
        ctx.save_for_backward(x, scales, mask)
        return _unit_heads(None, x, scales, mask, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, scales, mask = ctx.saved_tensors
        dlog_scale = None if scales is None else torch.empty(scales.shape)
        return _unit_heads(dout, x, scales, mask, dlog_scale), dlog_scale, None

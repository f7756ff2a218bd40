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
    return _RMSNorm.apply(x, weight, eps)


def residual_norm_native(
    x: Tensor, branch: Tensor, weight: Tensor, keys: Tensor | None, site: int, p: float, eps: float
) -> tuple[Tensor, Tensor]:
    """total and normed of ``ops.residual_norm`` in float32."""
    if keys is None:
        return _ResidualNorm.apply(x, branch, weight, eps)
    total = dropout_add_reference(x, branch, keys, site, p)
    return total, _RMSNorm.apply(total, weight, eps)


def unit_heads(
    x: Tensor,  # [B, N, H, D]
    log_scale: Tensor | None = None,  # [H]
    mask: Tensor | None = None,  # [B, N] bool
) -> Tensor:
    """x / max(|x|, 1e-12) exp(log_scale) for each head vector, zeros where the mask is False, whatever stands there."""
    return _UnitHeads.apply(x, log_scale, mask)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, normed = _rows(x), torch.empty(x.shape)
        native.module().rms_norm(_buffer(rows), None, _buffer(weight), eps, None, _buffer(_flat(normed)))
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx, dnormed: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_norm_backward(None, dnormed, *ctx.saved_tensors, ctx.eps), None


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, normed = torch.empty(x.shape), torch.empty(x.shape)
        outputs = _buffer(_flat(total)), _buffer(_flat(normed))
        native.module().rms_norm(_buffer(_rows(x)), _buffer(_rows(branch)), _buffer(weight), eps, *outputs)
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


def _norm_backward(
    dtotal: Tensor | None, dnormed: Tensor, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    dx, dweight = torch.empty(total.shape), torch.empty(weight.shape)
    given = None if dtotal is None else _buffer(_rows(dtotal))
    inputs = given, _buffer(_rows(dnormed)), _buffer(_rows(total)), _buffer(weight), eps
    native.module().rms_norm_backward(*inputs, _buffer(_flat(dx)), _buffer(dweight))
    return dx, dweight


class _UnitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, log_scale: Tensor | None, mask: Tensor | None) -> Tensor:
        scales = None if log_scale is None else log_scale.exp()
        out = torch.empty(x.shape)
        _unit_heads(None, x, scales, mask, out, None)
        ctx.save_for_backward(x, scales, mask)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, scales, mask = ctx.saved_tensors
        dx, dlog_scale = torch.empty(x.shape), None if scales is None else torch.empty(scales.shape)
        _unit_heads(dout, x, scales, mask, dx, dlog_scale)
        return dx, dlog_scale, None


def _unit_heads(
    dout: Tensor | None, x: Tensor, scales: Tensor | None, mask: Tensor | None, out: Tensor, dscales: Tensor | None
) -> None:
    heads, dim = x.shape[2:]
    given, rows = (None if t is None else _buffer(_rows(t, axes=2)) for t in (dout, x))
    optional = (None if t is None else _buffer(t.reshape(-1)) for t in (scales, mask))
    outputs = _buffer(out.view(-1, heads * dim)), None if dscales is None else _buffer(dscales)
    native.module().unit_heads(given, rows, heads, dim, *optional, *outputs)


def _rows(x: Tensor, axes: int = 1) -> Tensor:
    """x as [R, C], the last ``axes`` of its axes in one piece; a copy only where they are not."""
    rows = x.reshape(-1, math.prod(x.shape[-axes:])) if x.numel() else x.new_empty(0, math.prod(x.shape[-axes:]))
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _flat(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1]) if x.shape[-1] else x.view(0, 0)


def _buffer(x: Tensor):
    return x.detach().numpy()

"""A linear map and exact GELU behind it as one operation, whose pre-activation never reaches memory."""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from wireframe.kernels import dispatch
from wireframe.kernels.checks import check_devices, check_floating
from wireframe.kernels.linear_gelu_reference import linear_gelu_reference
from wireframe.kernels.tensors import KERNEL_DTYPES, aligned, aligned_or_none, without_autocast

# Triton's interpreter multiplies the bits of bfloat16 as integers.
_INTERPRETED_DTYPES = (torch.float16, torch.float32)
# Of a product; in longer ones GELU is a small part, and those of cuBLAS are faster.
_MOST_TERMS = 1024


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    op, tensors = "linear_gelu", {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_floating(op, **tensors)
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: weight must be [N, K] for x [..., K], got {list(weight.shape)} for {list(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be [{len(weight)}], got {list(bias.shape)}")
    if x.dtype != weight.dtype:
        raise ValueError(f"{op}: x and weight must share one dtype, got {x.dtype} and {weight.dtype}")
    check_devices(op, **tensors)


def _triton_limit(x: Tensor, bias: Tensor | None) -> str | None:
    """Why the Triton kernels do not take these inputs, None where they do; weight has the dtype of x."""
    for dtype in {x.dtype, x.dtype if bias is None else bias.dtype}:
        if dtype not in KERNEL_DTYPES:
            return f"its kernels take bfloat16, float16 and float32, got {dtype}"
        if x.device.type == "cpu" and dtype not in _INTERPRETED_DTYPES:
            return f"Triton's interpreter cannot compute in {dtype}; use float32 on the CPU"
    if not 1 <= x.shape[-1] <= _MOST_TERMS:
        return f"its kernels take rows of 1 to {_MOST_TERMS} numbers, got {x.shape[-1]}"
    return None


def _rows(x: Tensor) -> Tensor:
    """x [..., K] as [M, K], aligned as fresh memory of that width is: start at 16 bytes, rows at 16 elements or K.

    Alignment chooses the layout of a kernel and with it the order of its sums; so bits depend on values and shapes.
    """
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    apart = rows.stride(0) == width or (rows.stride(0) % 16 == 0 and width % 16 == 0)
    if rows.stride(1) == 1 and apart and rows.data_ptr() % 16 == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def _output(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype, device=x.device)


# The schemas are inferred from the annotations, and torch < 2.9 knows Optional alone.
@torch.library.custom_op("wireframe::linear_gelu", mutates_args=())
def _linear_gelu(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:  # noqa: UP045
    from wireframe.kernels.launch import architecture, run
    from wireframe.kernels.linear_gelu_triton import plan_forward

    out = _output(x, weight)
    if out.numel():
        rows = out.view(-1, len(weight))
        run(plan_forward(_rows(x), aligned(weight), aligned_or_none(bias), rows, architecture(x.device)))
    return out


@_linear_gelu.register_fake
def _(x, weight, bias):
    return _output(x, weight)


@torch.library.custom_op("wireframe::linear_gelu_backward", mutates_args=())
def _backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor], wants_dbias: bool  # noqa: UP045
) -> tuple[Tensor, Tensor]:
    """The gradient of x weight^T + bias [M, N], and dbias, float32 [N] or without elements."""
    from wireframe.kernels.launch import architecture, run
    from wireframe.kernels.linear_gelu_triton import plan_backward

    dy, dbias = _gradients(dout, weight, wants_dbias)
    if dy.numel() == 0:
        return dy, dbias.zero_()
    inputs = _rows(dout), _rows(x), aligned(weight), aligned_or_none(bias)
    run(plan_backward(*inputs, dy, dbias if wants_dbias else None, architecture(x.device)))
    return dy, dbias


def _gradients(dout: Tensor, weight: Tensor, wants_dbias: bool) -> tuple[Tensor, Tensor]:
    dy = torch.empty(math.prod(dout.shape[:-1]), len(weight), dtype=dout.dtype, device=dout.device)
    return dy, torch.empty(len(weight) if wants_dbias else 0, dtype=torch.float32, device=dout.device)


@_backward.register_fake
def _(dout, x, weight, bias, wants_dbias):
    return _gradients(dout, weight, wants_dbias)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    wants_dx, wants_dweight, wants_dbias = ctx.needs_input_grad
    dy, dbias = _backward(dout, x, weight, bias, wants_dbias)
    with without_autocast(x.device.type):
        dx = (dy @ weight).view(x.shape) if wants_dx else None
        dweight = dy.T @ x.reshape(-1, x.shape[-1]) if wants_dweight else None
    return dx, dweight, dbias.to(bias.dtype) if wants_dbias else None


_linear_gelu.register_autograd(_differentiate, setup_context=_keep)


def linear_gelu(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None = None,  # [N]
    *,
    impl: str = "auto",
) -> Tensor:
    """y / 2 (1 + erf(y / sqrt 2)) with y = x weight^T + bias: a linear map and exact GELU.

    Sums, GELU and its derivative are in float32 and rounded once; y is neither kept nor rounded, but computed again for
    the gradient. A row's result does not depend on the rows beside it. Autocast does not reach inside.

    Args:
        x: [..., K], any floating dtype.
        weight: [N, K] in the dtype of x.
        bias: [N], any floating dtype, or None.
        impl: "auto", "reference", "native" or "triton" (no float64, K from 1 to 1024).

    Returns:
        [..., N] in x.dtype.

    Raises:
        TypeError, ValueError: arguments that do not fit, or an unknown ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.

    Derivatives are in reverse mode: the first of the Triton kernels, those of any order of the reference, which on a
    GPU rounds y.
    """
    _check(x, weight, bias)
    if dispatch.choose("linear_gelu", impl, x.device.type, _triton_limit(x, bias)) == "reference":
        return linear_gelu_reference(x, weight, bias)
    return _linear_gelu(x, weight, bias)

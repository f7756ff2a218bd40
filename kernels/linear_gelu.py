"""A linear map with exact GELU behind it, whose pre-activation never reaches memory."""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from wireframe.kernels import dispatch
from wireframe.kernels.checks import check_devices, check_floating
from wireframe.kernels.linear_gelu_reference import linear_gelu_reference

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Triton's interpreter multiplies the bits of bfloat16 as integers.
_INTERPRETED_DTYPES = (torch.float16, torch.float32)
# Sums over more than that are better left to a library, whose tiles follow the size.
_MOST_INPUTS = 1024


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    op = "linear_gelu"
    given = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_floating(op, **given)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: weight must be [N, K] for x [..., K], got {list(weight.shape)} for {list(x.shape)}"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"{op}: x and weight must share one dtype, got {x.dtype} and {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    check_devices(op, **given)


def _triton_limit(x: Tensor, weight: Tensor) -> str | None:
    """Why the Triton kernels do not take these inputs, None where they do."""
    if x.dtype not in _DTYPES:
        return f"its kernels take bfloat16, float16 and float32, got {x.dtype}"
    if x.device.type == "cpu" and x.dtype not in _INTERPRETED_DTYPES:
        return f"Triton's interpreter cannot compute in {x.dtype}; use float32 on the CPU"
    if weight.shape[1] > _MOST_INPUTS:
        return f"its kernels sum over at most {_MOST_INPUTS} inputs, got {weight.shape[1]}"
    return None


def _rows(x: Tensor) -> Tensor:
    """x as contiguous [M, K] at an address at which fresh memory may begin; so bits depend on values and shapes."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _outputs(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


# The schemas are inferred from the annotations, and torch < 2.9 knows Optional alone.
@torch.library.custom_op("wireframe::linear_gelu", mutates_args=())
def _linear_gelu(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:  # noqa: UP045
    from wireframe.kernels import launch, linear_gelu_triton

    out = _outputs(x, weight)
    if out.numel():
        flat = out.view(-1, weight.shape[0])
        launch.run(linear_gelu_triton.plan_forward(_rows(x), _rows(weight), bias, flat))
    return out


@_linear_gelu.register_fake
def _(x, weight, bias):
    return _outputs(x, weight)


@torch.library.custom_op("wireframe::linear_gelu_backward", mutates_args=())
def _backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor], wants_dbias: bool  # noqa: UP045
) -> tuple[Tensor, Tensor]:
    """The gradient of the pre-activation [M, N] in the dtype of x, and dbias, float32 [N] or without elements."""
    from wireframe.kernels import launch, linear_gelu_triton

    dy, dbias = _gradients(dout, wants_dbias)
    if dy.numel() == 0:
        return dy, dbias.zero_()
    given = _rows(dout), _rows(x), _rows(weight), bias
    launch.run(linear_gelu_triton.plan_backward(*given, dy, dbias if wants_dbias else None))
    return dy, dbias


def _gradients(dout: Tensor, wants_dbias: bool) -> tuple[Tensor, Tensor]:
    outputs = dout.shape[-1]
    dy = torch.empty((math.prod(dout.shape[:-1]), outputs), dtype=dout.dtype, device=dout.device)
    return dy, torch.empty(outputs if wants_dbias else 0, dtype=torch.float32, device=dout.device)


@_backward.register_fake
def _(dout, x, weight, bias, wants_dbias):
    return _gradients(dout, wants_dbias)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad
    dy, dbias = _backward(dout, x, weight, bias, wants_bias)
    # Products that any library does as well.
    dx = (dy @ weight).view(x.shape) if wants_x else None
    dweight = dy.t() @ x.reshape(dy.shape[0], weight.shape[1]) if wants_weight else None
    return dx, dweight, dbias.to(bias.dtype) if wants_bias else None


_linear_gelu.register_autograd(_differentiate, setup_context=_keep)


def linear_gelu(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None = None,  # [N]
    *,
    impl: str = "auto",
) -> Tensor:
    """gelu(x weight^T + bias), with the exact GELU y / 2 (1 + erf(y / sqrt 2)) (Hendrycks and Gimpel, 2016).

    The Triton kernels keep the pre-activation in registers, in float32, and form it anew in the backward pass. A row's
    result does not depend on the others.

    Args:
        x: [..., K]; weight: [N, K], of the dtype of x, any floating one; bias: [N], floating, or None.
        impl: "auto", "reference", "native" or "triton" (no float64, K at most 1024).

    Returns:
        [..., N] in the dtype of x.

    Raises:
        TypeError, ValueError: arguments that do not fit, or an unknown ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.

    Derivatives are in reverse mode: the first of the Triton kernels, those of any order of the reference.
    """
    _check(x, weight, bias)
    if dispatch.choose("linear_gelu", impl, x.device.type, _triton_limit(x, weight)) == "reference":
        return linear_gelu_reference(x, weight, bias)
    return _linear_gelu(x, weight, bias)

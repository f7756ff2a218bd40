"""Residual connection with dropout: the mask is a function of keys, and nobody's random state is read or written."""

from __future__ import annotations

import torch
from torch import Tensor

from wireframe.kernels import dispatch
from wireframe.kernels.checks import check_devices, check_floating
from wireframe.kernels.dropout_reference import drop_threshold, dropout_add_reference
from wireframe.kernels.tensors import KERNEL_DTYPES, fresh

# Triton's interpreter does not round to bfloat16.
_INTERPRETED_DTYPES = (torch.float16, torch.float32)


def check_branch(op: str, x: Tensor, branch: Tensor, site: int, p: float) -> None:
    """Refuse a residual connection that no implementation can make: TypeError or ValueError."""
    check_floating(op, x=x, branch=branch)
    if x.shape != branch.shape or x.dim() == 0:
        raise ValueError(
            f"{op}: x and branch must share one shape [B, ...], got {list(x.shape)} and {list(branch.shape)}"
        )
    check_devices(op, x=x, branch=branch)
    if isinstance(site, bool) or not isinstance(site, int):
        raise TypeError(f"{op}: site must be an integer, not {type(site).__name__}")
    if not 0 <= site < 1 << 31:
        raise ValueError(f"{op}: site must be in [0, 2^31), got {site}")
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{op}: p must be a number, not {type(p).__name__}")
    if not 0 <= p < 1:
        raise ValueError(f"{op}: p must be in [0, 1), got {p}")


def check_keys(op: str, x: Tensor, keys: Tensor) -> None:
    """Refuse what is no key for each scene of x [B, ...]: TypeError or ValueError."""
    if not isinstance(keys, Tensor):
        raise TypeError(f"{op}: keys must be a tensor, not {type(keys).__name__}")
    if keys.dtype != torch.int64 or keys.shape != x.shape[:1]:
        raise ValueError(
            f"{op}: keys must be int64 {list(x.shape[:1])}, one for each scene, got {keys.dtype} {list(keys.shape)}"
        )
    check_devices(op, x=x, keys=keys)


def _triton_limit(x: Tensor, branch: Tensor) -> str | None:
    """Why the Triton kernels do not take these inputs, None where they do."""
    if x.dtype not in KERNEL_DTYPES or branch.dtype not in KERNEL_DTYPES:
        return f"its kernels take bfloat16, float16 and float32, got {x.dtype} and {branch.dtype}"
    if x.device.type == "cpu" and not {x.dtype, branch.dtype} <= set(_INTERPRETED_DTYPES):
        return "Triton's interpreter cannot round to bfloat16; use float32 on the CPU"
    return None


@torch.library.custom_op("wireframe::dropout_add", mutates_args=())
def _dropout_add(x: Tensor, branch: Tensor, keys: Tensor, site: int, threshold: int) -> Tensor:
    from wireframe.kernels import dropout_triton, launch

    out = fresh(x, torch.promote_types(x.dtype, branch.dtype))
    launch.run(
        dropout_triton.plan_forward(
            _scenes(x), _scenes(branch), keys.contiguous(), out, site=site, threshold=threshold
        )
    )
    return out


def _scenes(x: Tensor) -> Tensor:
    """x with each scene in one piece; scenes may lie anywhere, all in one place too."""
    return x if x.numel() == 0 or x[0].is_contiguous() else x.contiguous()


@_dropout_add.register_fake
def _(x, branch, keys, site, threshold):
    return fresh(x, torch.promote_types(x.dtype, branch.dtype))


@torch.library.custom_op("wireframe::dropout_add_backward", mutates_args=())
def _dropout_add_backward(grad: Tensor, keys: Tensor, site: int, threshold: int, dtype: torch.dtype) -> Tensor:
    """dbranch, in its dtype."""
    from wireframe.kernels import dropout_triton, launch

    dbranch = fresh(grad, dtype)
    launch.run(
        dropout_triton.plan_backward(_scenes(grad), keys.contiguous(), dbranch, site=site, threshold=threshold)
    )
    return dbranch


@_dropout_add_backward.register_fake
def _(grad, keys, site, threshold, dtype):
    return fresh(grad, dtype)


def _keep(ctx, inputs, output):
    x, branch, keys, *ctx.where = inputs
    ctx.dtypes = x.dtype, branch.dtype
    ctx.save_for_backward(keys)


def _differentiate(ctx, grad):
    (keys,) = ctx.saved_tensors
    dx = grad.to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
    dbranch = _dropout_add_backward(grad, keys, *ctx.where, ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
    return dx, dbranch, None, None, None


_dropout_add.register_autograd(_differentiate, setup_context=_keep)


def dropout_add(
    x: Tensor,  # [B, ...]
    branch: Tensor,  # [B, ...]
    keys: Tensor,  # [B] int64
    *,
    site: int,
    p: float,
    impl: str = "auto",
) -> Tensor:
    """x + branch * keep / (1 - p'), where keep of element i of a scene is a function of (key, site, i) alone.

    Dropped where 16 bits of the hash are below round(65536 p), so with probability p' = round(65536 p) / 65536 (at
    most 65535 / 65536). 1 / (1 - p') is rounded to float32; the product and the sum are rounded to float32 one after
    the other, and the sum to the result's dtype (float64 inputs: in float64). Every implementation gives these bits,
    in the gradients too, so a scene's do not depend on the batch or on its place there. p = 0 is x + branch.

    Args:
        x, branch: [B, ...] of one shape, any floating dtypes; i counts a scene's elements in C order.
        keys: int64 [B], for example of ``step_keys``: equal keys at one site drop out equally.
        site: in [0, 2^31): which of a model's dropouts this is.
        p: in [0, 1).
        impl: "auto", "reference", "native" or "triton" (no float64).

    Returns:
        [B, ...] in the dtype of x + branch.

    Raises:
        TypeError, ValueError: arguments that do not fit, or an unknown ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.

    Derivatives are in reverse mode: the first of the Triton kernels, those of any order of the reference.
    """
    check_branch("dropout_add", x, branch, site, p)
    check_keys("dropout_add", x, keys)
    if dispatch.choose("dropout_add", impl, x.device.type, _triton_limit(x, branch)) == "reference":
        return dropout_add_reference(x, branch, keys, site, p)
    return _dropout_add(x, branch, keys, site, drop_threshold(p))

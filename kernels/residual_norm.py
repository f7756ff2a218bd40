"""Residual connection with dropout and the RMS norm behind it as one operation, and the norm alone."""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from wireframe.kernels import dispatch
from wireframe.kernels.checks import check_devices, check_floating
from wireframe.kernels.dropout import check_branch, check_keys
from wireframe.kernels.dropout_reference import drop_threshold
from wireframe.kernels.norms_native import native_limit, residual_norm_native, rms_norm_native
from wireframe.kernels.residual_norm_reference import residual_norm_reference, rms_norm_reference
from wireframe.kernels.tensors import KERNEL_DTYPES, aligned, aligned_or_none, fresh

# The longest row that one tile holds.
_MOST_CHANNELS = 1024
# Triton's interpreter does not round to bfloat16.
_INTERPRETED_DTYPES = (torch.float16, torch.float32)

# That of float32, which nn.RMSNorm takes for such inputs.
_EPS = 1.1920928955078125e-07


class Residual(NamedTuple):
    """total: the sum. normed: its norm. copy: the sum in the dtype of normed, total itself where that is its own."""

    total: Tensor  # [B, ..., C]
    normed: Tensor  # [B, ..., C]
    copy: Tensor | None  # [B, ..., C]


def _check_norm(op: str, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None) -> None:
    check_floating(op, x=x, weight=weight)
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: weight must be [C] for x [..., C], got {list(weight.shape)} for {list(x.shape)}")
    check_devices(op, x=x, weight=weight)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a number, not {type(eps).__name__}")
    if not 0 < eps < math.inf:
        raise ValueError(f"{op}: eps must be positive and finite, got {eps}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"{op}: dtype must be a dtype, not {type(dtype).__name__}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"{op}: dtype must be floating, got {dtype}")


def _triton_limit(channels: int, device: str, *dtypes: torch.dtype) -> str | None:
    """Why the Triton kernels do not take such inputs, None where they do."""
    for dtype in dtypes:
        if dtype not in KERNEL_DTYPES:
            return f"its kernels take bfloat16, float16 and float32, got {dtype}"
        if device == "cpu" and dtype not in _INTERPRETED_DTYPES:
            return "Triton's interpreter cannot round to bfloat16; use float32 on the CPU"
    if channels > _MOST_CHANNELS:
        return f"its kernels take at most {_MOST_CHANNELS} channels, got {channels}"
    return None


def _scenes(x: Tensor) -> Tensor:
    """As ``aligned``, but scenes may lie anywhere whole rows apart, all in one place too."""
    in_place = x.numel() > 0 and x[0].is_contiguous() and x.stride(0) % x.shape[-1] == 0 and x.data_ptr() % 16 == 0
    return x if in_place else aligned(x)


# The schemas are inferred from the annotations, and torch < 2.9 knows Optional alone.
@torch.library.custom_op("wireframe::residual_norm", mutates_args=())
def _residual_norm(
    x: Tensor, branch: Tensor, weight: Tensor, keys: Optional[Tensor], site: int, threshold: int, eps: float,  # noqa: UP045
    dtype: torch.dtype, copy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """total, normed and copy, which is without elements if it is not asked for."""
    from wireframe.kernels import launch, residual_norm_triton

    total, normed, second = _outputs(x, branch, dtype, copy)
    if total.numel():
        launch.run(
            residual_norm_triton.plan_forward(
                _scenes(x), _scenes(branch), aligned(weight), aligned_or_none(keys), total, normed,
                second if copy else None, site=site, threshold=threshold, eps=eps,
            )
        )  # fmt: skip
    return total, normed, second


def _outputs(x: Tensor, branch: Tensor, dtype: torch.dtype, copy: bool) -> tuple[Tensor, Tensor, Tensor]:
    nothing = torch.empty(0, dtype=dtype, device=x.device)
    total = fresh(x, torch.promote_types(x.dtype, branch.dtype))
    return total, fresh(x, dtype), fresh(x, dtype) if copy else nothing


@_residual_norm.register_fake
def _(x, branch, weight, keys, site, threshold, eps, dtype, copy):
    return _outputs(x, branch, dtype, copy)


@torch.library.custom_op("wireframe::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    from wireframe.kernels import launch, residual_norm_triton

    normed = fresh(x, dtype)
    if normed.numel():
        launch.run(
            residual_norm_triton.plan_forward(
                aligned(x), None, aligned(weight), None, None, normed, None, site=0, threshold=0, eps=eps
            )
        )
    return normed


@_rms_norm.register_fake
def _(x, weight, eps, dtype):
    return fresh(x, dtype)


@torch.library.custom_op("wireframe::residual_norm_backward", mutates_args=())
def _backward(
    dtotal: Optional[Tensor], dnormed: Optional[Tensor], dcopy: Optional[Tensor], total: Tensor, weight: Tensor,  # noqa: UP045
    keys: Optional[Tensor], site: int, threshold: int, eps: float,  # noqa: UP045
    x_dtype: Optional[torch.dtype], branch_dtype: Optional[torch.dtype], wants_dweight: bool,  # noqa: UP045
) -> list[Tensor]:  # fmt: skip
    """Of dx, dbranch and dweight (float32) those that are wanted: those with a dtype, and the last if dnormed is."""
    from wireframe.kernels import launch, residual_norm_triton

    gradients = _gradients(total, weight, x_dtype, branch_dtype, wants_dweight)
    wanted = [x for x in gradients if x is not None]
    if total.numel() == 0:
        return [x.zero_() for x in wanted]
    given = aligned_or_none(dtotal), aligned_or_none(dnormed), aligned_or_none(dcopy)
    launch.run(
        residual_norm_triton.plan_backward(
            aligned(total), aligned(weight), aligned_or_none(keys), *given, *gradients,
            site=site, threshold=threshold, eps=eps,
        )
    )  # fmt: skip
    return wanted


def _gradients(
    total: Tensor, weight: Tensor, x_dtype: torch.dtype | None, branch_dtype: torch.dtype | None, wants_dweight: bool
) -> tuple[Tensor | None, ...]:
    dx, dbranch = (None if dtype is None else fresh(total, dtype) for dtype in (x_dtype, branch_dtype))
    return dx, dbranch, fresh(weight, torch.float32) if wants_dweight else None


@_backward.register_fake
def _(dtotal, dnormed, dcopy, total, weight, keys, site, threshold, eps, x_dtype, branch_dtype, wants_dweight):
    found = _gradients(total, weight, x_dtype, branch_dtype, wants_dweight)
    return [x for x in found if x is not None]


def _through_both(ctx, grads: tuple[Tensor | None, ...], needs: tuple[bool, bool, bool], dtypes, where):
    """(dx, dbranch, dweight) for the gradients of total, normed and copy; None for what is not wanted."""
    total, weight, keys = ctx.saved_tensors
    if all(grad is None for grad in grads):
        return None, None, None
    wanted = [needs[0], needs[1], needs[2] and grads[1] is not None]
    x_dtype, branch_dtype = (dtype if want else None for dtype, want in zip(dtypes, wanted))
    found = iter(_backward(*grads, total, weight, keys, *where, x_dtype, branch_dtype, wanted[2]))
    dx, dbranch, dweight = (next(found) if want else None for want in wanted)
    return dx, dbranch, None if dweight is None else dweight.to(weight.dtype)


def _keep_residual(ctx, inputs, output) -> None:
    x, branch, weight, keys, *where = inputs
    ctx.dtypes, ctx.where, ctx.copied = (x.dtype, branch.dtype), where[:3], where[4]
    ctx.save_for_backward(output[0], weight, keys)
    if not ctx.copied:
        ctx.mark_non_differentiable(output[2])
    # Or an output that nobody uses would cost a tensor of zeros.
    ctx.set_materialize_grads(False)


def _differentiate_residual(
    ctx, dtotal: Tensor | None, dnormed: Tensor | None, dcopy: Tensor | None
) -> tuple[Tensor | None, ...]:
    grads = dtotal, dnormed, dcopy if ctx.copied else None
    return *_through_both(ctx, grads, ctx.needs_input_grad[:3], ctx.dtypes, ctx.where), *[None] * 6


_residual_norm.register_autograd(_differentiate_residual, setup_context=_keep_residual)


def _keep_norm(ctx, inputs, output) -> None:
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight, None)
    ctx.set_materialize_grads(False)


def _differentiate_norm(ctx, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    dtype = ctx.saved_tensors[0].dtype
    dx, _, dweight = _through_both(
        ctx, (None, grad, None), (needs[0], False, needs[1]), (dtype, None), (0, 0, ctx.eps)
    )
    return dx, dweight, None, None


_rms_norm.register_autograd(_differentiate_norm, setup_context=_keep_norm)


def residual_norm(
    x: Tensor,  # [B, ..., C]
    branch: Tensor,  # [B, ..., C]
    weight: Tensor,  # [C]
    keys: Tensor | None = None,  # [B] int64
    *,
    site: int = 0,
    p: float = 0.0,
    eps: float = _EPS,
    dtype: torch.dtype | None = None,
    copy: bool = True,
    impl: str = "auto",
) -> Residual:
    """total = x + branch * keep / (1 - p'), and normed = total / sqrt(mean(total^2) + eps) * weight over the last axis.

    total has the bits of ``dropout_add``, whose arguments these are; keys None or p = 0: x + branch. The norm is
    computed in float32 (float64 for float64) from total as it is returned, and rounded once. A row's results, and its
    gradients of x and branch, depend on neither the batch nor its place there.

    Args:
        x, branch: [B, ..., C] of one shape, any floating dtypes. x may be one scene expanded to all.
        weight: [C], in the product float32.
        keys: int64 [B], for example of ``step_keys``: equal keys at one site drop out equally.
        site: in [0, 2^31): which of a model's dropouts this is. p: in [0, 1). eps: positive.
        dtype: of normed and copy; None = that of total.
        copy: whether the sum is wanted in ``dtype`` too; where that is its own, copy is total itself.
        impl: "auto", "reference", "native" (float32 on the CPU) or "triton" (no float64, at most 1024 channels).

    Returns:
        Residual(total, normed, copy or None), [B, ..., C]; total in the dtype of x + branch.

    Raises:
        TypeError, ValueError: arguments that do not fit, or an unknown ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.

    Derivatives are in reverse mode: the first of the kernels and of the C++ code, those of any order of the reference.
    """
    check_branch("residual_norm", x, branch, site, p)
    _check_norm("residual_norm", x, weight, eps, dtype)
    if keys is not None:
        check_keys("residual_norm", x, keys)
    if not isinstance(copy, bool):
        raise TypeError(f"residual_norm: copy must be a bool, not {type(copy).__name__}")
    own = torch.promote_types(x.dtype, branch.dtype)
    dtype = own if dtype is None else dtype
    limit = _triton_limit(x.shape[-1], x.device.type, x.dtype, branch.dtype, weight.dtype, dtype)
    chosen = dispatch.choose(
        "residual_norm", impl, x.device.type, limit, native_limit(x, branch, weight, dtype=dtype)
    )
    if chosen == "reference":
        return Residual(*residual_norm_reference(x, branch, weight, keys, site, p, eps, dtype, copy))
    threshold = 0 if keys is None else drop_threshold(p)
    keys = keys if threshold else None
    if chosen == "native":
        total, normed = residual_norm_native(x, branch, weight, keys, site, p, eps)
        return Residual(total, normed, total if copy else None)
    total, normed, rounded = _residual_norm(
        x, branch, weight, keys, site, threshold, eps, dtype, copy and dtype != own
    )
    return Residual(total, normed, None if not copy else total if dtype == own else rounded)


def rms_norm(
    x: Tensor,  # [..., C]
    weight: Tensor,  # [C]
    *,
    eps: float = _EPS,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (float64 for float64), rounded once.

    Args:
        x: [..., C], any floating dtype.
        weight: [C], in the product float32.
        eps: positive.
        dtype: of the result; None = that of x.
        impl: "auto", "reference", "native" (float32 on the CPU) or "triton" (no float64, at most 1024 channels).

    Returns:
        [..., C] in ``dtype``.

    Raises:
        TypeError, ValueError: arguments that do not fit, or an unknown ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.

    Derivatives are in reverse mode: the first of the kernels and of the C++ code, those of any order of the reference.
    """
    _check_norm("rms_norm", x, weight, eps, dtype)
    dtype = x.dtype if dtype is None else dtype
    limit = _triton_limit(x.shape[-1], x.device.type, x.dtype, weight.dtype, dtype)
    chosen = dispatch.choose("rms_norm", impl, x.device.type, limit, native_limit(x, weight, dtype=dtype))
    if chosen == "reference":
        return rms_norm_reference(x, weight, eps, dtype)
    return rms_norm_native(x, weight, eps) if chosen == "native" else _rms_norm(x, weight, eps, dtype)

"""Cost between 3D segments."""

from __future__ import annotations

import torch
from torch import Tensor

from wireframe.kernels import dispatch
from wireframe.kernels.checks import check_devices, check_floating
from wireframe.kernels.reference import segment_cost_reference
from wireframe.kernels.tensors import KERNEL_DTYPES

Weights = tuple[float, float, float]


def check_segments(op: str, pred: Tensor, target: Tensor) -> None:
    """Raise ValueError for segments that no implementation can use."""
    check_floating(op, pred=pred, target=target)
    check_devices(op, pred=pred, target=target)
    for name, x in (("pred", pred), ("target", target)):
        if x.dim() != 4 or x.shape[2:] != (2, 3):
            raise ValueError(f"{op}: {name} must be [B, segments, 2, 3], got {list(x.shape)}")
    if pred.shape[0] != target.shape[0]:
        raise ValueError(f"{op}: pred holds {pred.shape[0]} scenes and target {target.shape[0]}")


def check_weights(op: str, weights: Weights) -> None:
    """Raise ValueError for anything but three numbers."""
    if not isinstance(weights, (tuple, list)) or len(weights) != 3:
        raise ValueError(f"{op}: weights must be (w_mid, w_dir, w_len), got {weights}")


def gradient_like(segments: Tensor) -> Tensor:
    """Memory for the gradient of segments: float32, contiguous."""
    return torch.empty_like(segments, dtype=torch.float32, memory_format=torch.contiguous_format)


@torch.library.custom_op("wireframe::segment_cost", mutates_args=())
def _segment_cost(pred: Tensor, target: Tensor, w_mid: float, w_dir: float, w_len: float) -> Tensor:
    from wireframe.kernels import launch, segment_cost_triton

    cost = pred.new_empty((pred.shape[0], pred.shape[1], target.shape[1]), dtype=torch.float32)
    launch.run(
        segment_cost_triton.plan_forward(
            pred.contiguous(), target.contiguous(), cost, weights=(w_mid, w_dir, w_len),
        )
    )  # fmt: skip
    return cost


@_segment_cost.register_fake
def _(pred, target, w_mid, w_dir, w_len):
    return pred.new_empty((pred.shape[0], pred.shape[1], target.shape[1]), dtype=torch.float32)


@torch.library.custom_op("wireframe::segment_cost_backward", mutates_args=())
def _segment_cost_backward(
    grad: Tensor, pred: Tensor, target: Tensor, w_mid: float, w_dir: float, w_len: float, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """dpred and dtarget, float32; empty where not wanted."""
    from wireframe.kernels import launch, segment_cost_triton

    dpred, dtarget = _wanted_gradients(pred, target, wanted)
    launch.run(
        segment_cost_triton.plan_backward(
            pred.contiguous(), target.contiguous(), grad.contiguous(),
            dpred if wanted[0] else None, dtarget if wanted[1] else None,
            weights=(w_mid, w_dir, w_len),
        )
    )  # fmt: skip
    return dpred, dtarget


@_segment_cost_backward.register_fake
def _(grad, pred, target, w_mid, w_dir, w_len, wanted):
    return _wanted_gradients(pred, target, wanted)


def _wanted_gradients(pred: Tensor, target: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    dpred, dtarget = (
        gradient_like(x) if wants else x.new_empty(0, dtype=torch.float32) for x, wants in zip((pred, target), wanted)
    )
    return dpred, dtarget


def _keep(ctx, inputs, output):
    pred, target, *ctx.weights = inputs
    ctx.save_for_backward(pred, target)


def _differentiate(ctx, grad):
    pred, target = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:2])
    dpred, dtarget = _segment_cost_backward(grad.float(), pred, target, *ctx.weights, wanted)
    return (
        dpred.to(pred.dtype) if wanted[0] else None, dtarget.to(target.dtype) if wanted[1] else None, None, None, None
    )  # fmt: skip


_segment_cost.register_autograd(_differentiate, setup_context=_keep)


def segment_cost(
    pred: Tensor,  # [B, N, 2, 3]
    target: Tensor,  # [B, M, 2, 3]
    *,
    weights: Weights = (1.0, 1.0, 1.0),
    impl: str = "auto",
) -> Tensor:
    """C_ij = w_mid |m_i - m_j|_2 + w_dir (1 - |d_i . d_j|) + w_len |l_i - l_j|.

    m is a segment's midpoint, l its length, d = (q - p) / max(l, 1e-6) for endpoints p, q; the order of the
    endpoints does not matter.

    Args:
        pred: [B, N, 2, 3], any floating dtype, usually normalised coordinates.
        target: [B, M, 2, 3], in the same units.
        weights: (w_mid, w_dir, w_len).
        impl: "auto", "reference", "native" or "triton" (no float64).

    Returns:
        float32 (float64 for float64) [B, N, M].

    Raises:
        ValueError: shapes that do not fit, or an unknown ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.

    The Triton kernels have first derivatives in reverse mode; forward mode and ``torch.func`` need the reference.
    """
    check_segments("segment_cost", pred, target)
    check_weights("segment_cost", weights)
    limit = None
    if pred.dtype not in KERNEL_DTYPES or target.dtype not in KERNEL_DTYPES:
        limit = "its kernels take float16, bfloat16 and float32"
    if dispatch.choose("segment_cost", impl, pred.device.type, limit) == "reference":
        return segment_cost_reference(pred, target, weights)
    w_mid, w_dir, w_len = weights
    return _segment_cost(pred, target, float(w_mid), float(w_dir), float(w_len))

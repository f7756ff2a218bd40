"""What the first linear map reads of labelled points, as one operation: position, waves, votes and one-hot labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wireframe.kernels import dispatch
from wireframe.kernels.checks import check_devices, check_floating
from wireframe.kernels.point_features_reference import feature_width, point_features_reference
from wireframe.kernels.tensors import KERNEL_DTYPES

_LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
# A tile holds all frequencies, another one all other columns.
_MOST_BANDS, _MOST_REST = 64, 256
# Triton's interpreter does not round to bfloat16.
_INTERPRETED_DTYPES = (torch.float16, torch.float32)


def _check(points: dict[str, Tensor], frequencies: Tensor, labels: Sequence[int], dtype: torch.dtype) -> None:
    """points: xyz first. TypeError or ValueError."""
    op, xyz = "point_features", points["xyz"]
    check_floating(op, xyz=xyz, vote_frac=points["vote_frac"], frequencies=frequencies)
    if xyz.dim() != 3 or xyz.shape[2] != 3:
        raise ValueError(f"{op}: xyz must be [B, T, 3], got {list(xyz.shape)}")
    for name, values in points.items():
        if not isinstance(values, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, not {type(values).__name__}")
        if name != "xyz" and values.shape != xyz.shape[:2]:
            raise ValueError(f"{op}: {name} must be {list(xyz.shape[:2])}, got {list(values.shape)}")
        if name not in ("xyz", "vote_frac", "mask") and values.dtype not in _LABEL_DTYPES:
            raise ValueError(f"{op}: {name} must be of integers, uint8 to int64, got {values.dtype}")
    if points["mask"].dtype != torch.bool:
        raise ValueError(f"{op}: mask must be bool, got {points['mask'].dtype}")
    if frequencies.dim() != 2 or frequencies.shape[1] != 3 or len(frequencies) == 0:
        raise ValueError(f"{op}: frequencies must be [F, 3], got {list(frequencies.shape)}")
    check_devices(op, **points, frequencies=frequencies)
    if len(labels) != 3 or not all(isinstance(size, int) and size > 0 for size in labels):
        raise ValueError(f"{op}: labels must be three positive integers, got {labels!r}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{op}: dtype must be a dtype, not {type(dtype).__name__}")
    if not dtype.is_floating_point:
        raise ValueError(f"{op}: dtype must be floating, got {dtype}")


def _triton_limit(xyz: Tensor, vote_frac: Tensor, frequencies: Tensor, width: int, dtype: torch.dtype) -> str | None:
    """Why the Triton kernel does not take these inputs, None where it does."""
    inputs, bands = (xyz, vote_frac, frequencies), frequencies.shape[0]
    if any(x.dtype != torch.float32 for x in inputs):
        found = ", ".join(str(x.dtype) for x in inputs)
        return f"its kernel takes xyz, vote_frac and frequencies in float32, got {found}"
    if dtype not in KERNEL_DTYPES:
        return f"its kernel gives bfloat16, float16 and float32, not {dtype}"
    if xyz.device.type == "cpu" and dtype not in _INTERPRETED_DTYPES:
        return "Triton's interpreter cannot round to bfloat16; use float32 on the CPU"
    if bands & (bands - 1) or bands > _MOST_BANDS or width - 2 * bands > _MOST_REST:
        return f"its kernel takes up to {_MOST_BANDS} frequencies, a power of two, and {_MOST_REST} other columns"
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return "its kernel has no gradients"
    return None


@torch.library.custom_op("wireframe::point_features", mutates_args=())
def _point_features(
    xyz: Tensor, class_id: Tensor, source: Tensor, behind: Tensor, n_views_voted: Tensor, vote_frac: Tensor,
    mask: Tensor, frequencies: Tensor, labels: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    from wireframe.kernels import launch, point_features_triton

    out = _output(xyz, frequencies, labels, dtype)
    inputs = xyz, class_id, source, behind, n_views_voted, vote_frac, mask, frequencies
    launch.run(point_features_triton.plan_forward(*(x.contiguous() for x in inputs), out, labels=tuple(labels)))
    return out


def _output(xyz: Tensor, frequencies: Tensor, labels: Sequence[int], dtype: torch.dtype) -> Tensor:
    width = feature_width(frequencies.shape[0], tuple(labels))
    return torch.empty(*xyz.shape[:2], width, dtype=dtype, device=xyz.device)


@_point_features.register_fake
def _(xyz, class_id, source, behind, n_views_voted, vote_frac, mask, frequencies, labels, dtype):
    return _output(xyz, frequencies, labels, dtype)


def point_features(
    xyz: Tensor,  # [B, T, 3]
    class_id: Tensor,  # [B, T]
    source: Tensor,  # [B, T]
    behind: Tensor,  # [B, T]
    n_views_voted: Tensor,  # [B, T]
    vote_frac: Tensor,  # [B, T]
    mask: Tensor,  # [B, T] bool
    frequencies: Tensor,  # [F, 3]
    *,
    labels: Sequence[int],
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """Rows that a linear map multiplies in place of [xyz | waves | embeddings of the labels | votes] and its bias.

    An embedding is a one-hot row times a table, so the product of a weight with it is that of a weight folded with the
    table (``wireframe.tokens.Tokenizer.fold``) with the one-hot row. Nothing here depends on parameters. Columns:

        sin(2 pi x . b_f)              F     in float32, rounded one operation after the other: arguments reach hundreds
        cos(2 pi x . b_f)              F
        xyz                            3
        n_views_voted - 2.7            1     both vote features have mean 0 and spread 1 over the training scenes
        (vote_frac - 0.5) / 0.25       1
        1                              1     reads the bias
        one-hot class_id               C     all zeros for a label outside its table
        one-hot source                 S
        one-hot max(behind, 0)         L     -1, nothing behind, is label 0
        zeros                                to a multiple of 64 columns

    The row of a masked point is zeros, whatever the point holds. A point's row depends on that point alone.

    Args:
        xyz: [B, T, 3], vote_frac: [B, T], frequencies: [F, 3], any floating dtypes; computed in float32 (in float64
            where xyz or frequencies are float64) and rounded once.
        class_id, source, behind, n_views_voted: [B, T] of uint8, int16, int32 or int64.
        mask: bool [B, T], False for points that are not there.
        labels: (C, S, L).
        dtype: of the result.
        impl: "auto", "reference", "native" or "triton" (float32 inputs of which no gradient is wanted, F a power of
            two up to 64).

    Returns:
        [B, T, W] in ``dtype``, contiguous; W is 128 for F = 32 and labels (13, 2, 29).

    Raises:
        TypeError, ValueError: arguments that do not fit, or an unknown ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.

    The reference is differentiable in xyz, vote_frac and frequencies, and "auto" takes it where that is wanted.
    """
    points = {
        "xyz": xyz, "class_id": class_id, "source": source, "behind": behind, "n_views_voted": n_views_voted,
        "vote_frac": vote_frac, "mask": mask,
    }  # fmt: skip
    _check(points, frequencies, labels, dtype)
    sizes = (labels[0], labels[1], labels[2])
    limit = _triton_limit(xyz, vote_frac, frequencies, feature_width(frequencies.shape[0], sizes), dtype)
    if dispatch.choose("point_features", impl, xyz.device.type, limit) == "reference":
        return point_features_reference(*points.values(), frequencies, sizes, dtype)
    return _point_features(*points.values(), frequencies, sizes, dtype)

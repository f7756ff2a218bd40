"""Residual connection with dropout: the mask is a function of keys, and nobody's random state is read or written."""

from __future__ import annotations

import torch
from torch import Tensor

from wireframe.kernels import dispatch
from wireframe.kernels.checks import check_devices, check_floating
from wireframe.kernels.dropout_reference import dropout_add_reference


def _check(x: Tensor, branch: Tensor, keys: Tensor, site: int, p: float) -> None:
    check_floating("dropout_add", x=x, branch=branch)
    if x.shape != branch.shape or x.dim() == 0:
        raise ValueError(
            f"dropout_add: x and branch must share one shape [B, ...], got {list(x.shape)} and {list(branch.shape)}"
        )
    if not isinstance(keys, Tensor):
        raise TypeError(f"dropout_add: keys must be a tensor, not {type(keys).__name__}")
    if keys.dtype != torch.int64 or keys.shape != x.shape[:1]:
        raise ValueError(
            f"dropout_add: keys must be int64 {list(x.shape[:1])}, one for each scene, "
            f"got {keys.dtype} {list(keys.shape)}"
        )
    check_devices("dropout_add", x=x, branch=branch, keys=keys)
    if isinstance(site, bool) or not isinstance(site, int):
        raise TypeError(f"dropout_add: site must be an integer, not {type(site).__name__}")
    if not 0 <= site < 1 << 31:
        raise ValueError(f"dropout_add: site must be in [0, 2^31), got {site}")
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"dropout_add: p must be a number, not {type(p).__name__}")
    if not 0 <= p < 1:
        raise ValueError(f"dropout_add: p must be in [0, 1), got {p}")


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

    Both implementations have derivatives in reverse mode, and the reference those of any order.
    """
    _check(x, branch, keys, site, p)
    dispatch.choose("dropout_add", impl, x.device.type)
    return dropout_add_reference(x, branch, keys, site, float(p))

"""Whether two results of an operation agree: the error among all arrays that they hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def relative_error(found: Any, expected: Any) -> float:
    """The largest error by norm among arrays, relative to the expected one; inf for other shapes, infinities or NaNs.

    Without arrays that are expected it is inf as well: nothing would have been compared.
    """
    pairs = list(zip(found := list(_arrays(found)), expected := list(_arrays(expected))))
    if not expected or len(found) != len(expected) or any(a.shape != b.shape for a, b in pairs):
        return math.inf
    worst = 0.0
    for a, b in pairs:
        a, b = a.to(b.device), b
        finite = b.isfinite()
        if not ((a == b) | (a.isnan() & b.isnan()))[~finite].all():
            return math.inf
        a, b = a[finite].double(), b[finite].double()
        error = ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
        worst = max(worst, math.inf if math.isnan(error) else error)
    return float(f"{worst:.3g}")


def off_the_reference(error: float, budget: float) -> str:
    """Why a rival is not timed."""
    return f"off the reference by {error:.2g}, budget {budget:g}"


def _arrays(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        # A copy: torch warns of arrays that may not be written to.
        yield torch.from_numpy(value.copy())
    elif isinstance(value, (int, float)):
        yield torch.tensor(value, dtype=torch.float64)
    elif isinstance(value, Mapping):
        for name in sorted(value):
            yield from _arrays(value[name])
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _arrays(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _arrays(getattr(value, field.name))

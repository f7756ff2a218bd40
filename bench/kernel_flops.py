"""Floating-point operations of the products in a launch of ours, by the name of its kernel and from its arguments.

A kernel that is not named has no products worth counting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from wireframe.kernels.launch import Launch


def kernel_flops(launch: Launch) -> float:
    """Two for each multiply-add."""
    formula = _FORMULAS.get(launch.kernel.fn.__name__)
    return float(formula(launch.arguments)) if formula else 0.0


def _attention(products: int) -> Callable[[Mapping[str, Any]], float]:
    """So many products of queries x keys x width for each head of the queries."""
    return lambda a: 2.0 * products * math.prod(a["p_q"].shape) * a["num_keys"]


def _iterations(products: int) -> Callable[[Mapping[str, Any]], float]:
    """So many products of the matrix of a transport problem with a vector, in each iteration.

    Two forwards; backwards two more, and an update of rank two, which is worth as much.
    """
    return lambda a: 2.0 * products * a["p_mask"].shape[0] * a["rows"] * a["columns"] * a["iters"]


_FORMULAS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "_qk_norm_attention_keys_kernel": lambda a: 2.0 * math.prod(a["p_k"].shape),
    "_qk_norm_attention_fwd_kernel": _attention(2),
    "_qk_norm_attention_dq_kernel": _attention(3),
    "_qk_norm_attention_dkv_kernel": _attention(4),
    "_atomic_attention_bwd_kernel": _attention(5),
    "_sinkhorn_fwd_kernel": _iterations(2),
    "_sinkhorn_bwd_kernel": _iterations(4),
    "_sinkhorn_streamed_fwd_kernel": _iterations(2),
    "_sinkhorn_streamed_bwd_kernel": _iterations(4),
    "_segment_matching_fwd_kernel": _iterations(2),
    "_segment_matching_bwd_kernel": _iterations(4),
    # The differences of midpoints squared, and the cosines: two products of three terms a pair.
    "_segment_cost_fwd_kernel": lambda a: 2.0 * 6 * math.prod(a["p_cost"].shape),
    "_linear_gelu_fwd_kernel": lambda a: 2.0 * math.prod(a["p_x"].shape) * a["N"],
    "_linear_gelu_bwd_kernel": lambda a: 2.0 * math.prod(a["p_x"].shape) * a["N"],
    # One product and one sum an element.
    "_dropout_add_fwd_kernel": lambda a: 2.0 * math.prod(a["p_out"].shape),
    "_dropout_add_bwd_kernel": lambda a: 1.0 * math.prod(a["p_dbranch"].shape),
}

"""What is known of ATen's operations on a CUDA device: their kind, and how many kernels each of them launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

PRODUCTS, ATTENTION, ELEMENTWISE, REDUCTION, MOVEMENT, TRANSPORT, OPTIMISER, DATA = KINDS = (
    "products", "attention", "elementwise and norms", "reductions", "gather, cat, copy", "loss", "clip and optimiser",
    "batch and script",
)  # fmt: skip

# ATen operations by kind; those not named here are elementwise.
_KINDS = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "addbmm", "_addmm_activation"), PRODUCTS),
    **dict.fromkeys(
        ("sum", "mean", "amax", "amin", "max", "min", "prod", "any", "all", "linalg_vector_norm", "logsumexp",
         "native_layer_norm_backward", "_fused_rms_norm_backward", "count_nonzero", "argmax", "norm"), REDUCTION
    ),
    **dict.fromkeys(
        ("cat", "stack", "clone", "copy_", "_to_copy", "index", "index_select", "gather", "scatter",
         "embedding", "embedding_dense_backward", "index_add", "index_put", "index_put_", "flip", "constant_pad_nd",
         "slice_backward", "select_backward", "repeat", "zeros", "zeros_like", "new_zeros", "full", "full_like", "ones",
         "ones_like", "zero_", "fill_", "_foreach_copy_", "slice_scatter", "select_scatter"), MOVEMENT
    ),
}  # fmt: skip

# No kernel: memory alone, or a look at what describes a tensor. Views are known by their schema.
FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "resize_", "set_",
    "is_same_size", "_local_scalar_dense",
}  # fmt: skip

# Operations of several kernels (ATen's CUDA sources): launches, and how often more than once the largest tensor moves.
SEVERAL = {
    # amax, abs, eq, masked_fill, sub, exp, sum, log, add
    "logsumexp": (9, 4),
    # 1 - target, product, log sigmoid, difference
    "binary_cross_entropy_with_logits": (4, 6),
    # a copy, then the change in place
    "masked_fill": (2, 2),
    # filled, then copied into
    "constant_pad_nd": (2, 1),
    "slice_backward": (2, 1),
    "select_backward": (2, 1),
    # indices are sorted by radix, and rows of equal indices added
    "embedding_dense_backward": (10, 1),
    # rows, then columns
    "native_layer_norm_backward": (2, 1),
    # row sums of grad x out first; flash also turns its sums of dq into bfloat16
    "_scaled_dot_product_efficient_attention_backward": (2, 0),
    "_scaled_dot_product_flash_attention_backward": (3, 0),
}

# The argument that they change is not read.
OVERWRITES = {"copy_", "fill_", "zero_", "uniform_", "normal_", "random_", "_foreach_copy_", "_foreach_zero_"}

# Read as many elements as they write, whatever the size of the table.
LOOKS_UP = {"embedding", "index", "index_select", "gather"}

# Tensors in one launch of a foreach operation by the number of lists, blocks in one, and elements in a block
# (ATen/native/cuda/MultiTensorApply.cuh).
_FOREACH_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_FOREACH_BLOCKS, _FOREACH_BLOCK = 320, 65536


def kind(name: str) -> str:
    """One of ``KINDS``, of an operation by its name without ``aten::``."""
    if "_attention" in name:
        return ATTENTION
    if name.startswith(("_foreach", "_fused_adam")) and name != "_foreach_copy_":
        return OPTIMISER
    return _KINDS.get(name, ELEMENTWISE)


def is_view(function) -> bool:
    """Whether the operation only looks at its input otherwise, by its schema."""
    return any(x.alias_info is not None and not x.alias_info.is_write for x in function._schema.returns)


def changed(function, arguments: tuple, keywords: dict) -> list[Tensor]:
    """The tensors among the arguments that the operation writes to."""
    found = []
    for i, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = arguments[i] if i < len(arguments) else keywords.get(argument.name)
            found += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return found


def reduced(name: str, arguments: tuple, keywords: dict) -> tuple | None:
    """Shape and axes of a reduction."""
    if kind(name) != REDUCTION:
        return None
    x = next(a for a in arguments if isinstance(a, Tensor))
    if "norm_backward" in name:
        # What is given are the lengths of the last axes.
        lengths = next(a for a in arguments if isinstance(a, (list, tuple)))
        return tuple(x.shape), tuple(range(x.dim() - len(lengths), x.dim()))
    axes = next((a for a in arguments[1:] if isinstance(a, (list, tuple, int))), keywords.get("dim"))
    axes = range(x.dim()) if axes is None or axes == [] else [axes] if isinstance(axes, int) else axes
    return tuple(x.shape), tuple(sorted(a % max(x.dim(), 1) for a in axes))


def foreach_launches(name: str, arguments: tuple, out: Any) -> int:
    """Launches of an operation on lists of tensors."""
    lists = [a for a in (*arguments, out) if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    if not lists:
        return 1
    given = lists[:-1] if lists[-1] is out else lists
    if name.startswith("_foreach") and not _many_at_once(given, other_dtypes=name == "_foreach_copy_"):
        return len(lists[0])
    blocks = sum(-(-x.numel() // _FOREACH_BLOCK) for x in lists[0])
    most = _FOREACH_TENSORS[min(len(lists), 5)]
    return max(-(-len(lists[0]) // most), -(-blocks // _FOREACH_BLOCKS), 1)


def _many_at_once(lists: list[Sequence[Tensor]], other_dtypes: bool) -> bool:
    """Whether ATen takes many tensors a launch, and not one after another (``ATen/native/ForeachUtils.h``).

    Every list has to be of one dtype (all of the same, unless ``other_dtypes``) and dense, and every tensor of the
    first must lie as its partners in the others do: one pair that does not costs all of them.
    """
    every = [x for found in lists for x in found]
    return (
        all(len({x.dtype for x in found}) == 1 for found in (lists if other_dtypes else [every]))
        and all(map(torch.ops.aten.is_non_overlapping_and_dense.default, every))
        and all(_lies(x) == _lies(first) for found in lists[1:] for first, x in zip(lists[0], found))
    )


def _lies(tensor: Tensor) -> list[tuple[int, int]]:
    """Lengths and strides; of an axis of one element the stride says nothing."""
    return [(length, stride if length > 1 else 0) for length, stride in zip(tensor.shape, tensor.stride())]

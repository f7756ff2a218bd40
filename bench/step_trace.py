"""What a step asks of a GPU, seen without one: every operation with its launches, products and bytes.

The step runs for real, autograd included, but on ``meta`` tensors, which have shapes and no memory. Every ATen
operation passes through ``Trace``; of a ``wireframe::`` operation the Python that plans its launches is called, and
the launches are noted in place of being run.

Bytes are a bound: every input read once and every output written once, whatever a cache may hold.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from wireframe.bench.kernel_flops import kernel_flops
from wireframe.bench.static import bytes_moved, kernel_name
from wireframe.kernels import launch as launching
from wireframe.kernels.launch import Launch

PRODUCTS, ATTENTION, ELEMENTWISE, REDUCTION, MOVEMENT, TRANSPORT, OPTIMISER = KINDS = (
    "products", "attention", "elementwise and norms", "reductions", "gather, cat, copy", "loss", "clip and optimiser",
)  # fmt: skip

FORWARD, LOSS, BACKWARD, UPDATE = PHASES = ("forward", "loss", "backward", "update")

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
_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "resize_", "set_",
    "is_same_size", "_local_scalar_dense",
}  # fmt: skip

# Operations of several kernels (ATen's CUDA sources): launches, and how often more than once the largest tensor moves.
_SEVERAL = {
    # amax, abs, eq, masked_fill, sub, exp, sum, log, add
    "logsumexp": (9, 4),
    # 1 - target, product, log sigmoid, difference
    "binary_cross_entropy_with_logits": (4, 6),
    # a copy, then the change in place
    "masked_fill": (2, 2),
    # filled, then copied into
    "constant_pad_nd": (2, 1), "slice_backward": (2, 1), "select_backward": (2, 1),
    # indices are sorted by radix, and rows of equal indices added
    "embedding_dense_backward": (10, 1),
    # rows, then columns
    "native_layer_norm_backward": (2, 1),
    # row sums of grad x out first; flash also turns its sums of dq into bfloat16
    "_scaled_dot_product_efficient_attention_backward": (2, 0),
    "_scaled_dot_product_flash_attention_backward": (3, 0),
}

# The argument that they change is not read.
_OVERWRITES = {"copy_", "fill_", "zero_", "uniform_", "normal_", "random_", "_foreach_copy_", "_foreach_zero_"}

# Read as many elements as they write, whatever the size of the table.
_LOOKS_UP = {"embedding", "index", "index_select", "gather"}

# Tensors in one launch of a foreach operation by the number of lists, blocks in one, and elements in a block
# (ATen/native/cuda/MultiTensorApply.cuh).
_FOREACH_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_FOREACH_BLOCKS, _FOREACH_BLOCK = 320, 65536

# Kernels of ours by what their names begin with; the others are elementwise.
_OUR_KINDS = {
    "_qk_norm_attention": ATTENTION, "_linear_gelu": PRODUCTS, "_sinkhorn": TRANSPORT, "_segment": TRANSPORT,
    "_adamw": OPTIMISER,
}  # fmt: skip


class Row(NamedTuple):
    """One operation, or one launch of an operation of ours.

    kind: by what it does. phase: of the step; the backward pass of the loss is of the loss. shapes: of its tensors.
    half: whether products are of 16 bits. flops, moved (bytes) and launches: of all its kernels. reads, writes:
    storages, by number, and the bytes of each. over: what a reduction runs over. ours: a Triton kernel.
    """

    name: str
    kind: str
    phase: str
    shapes: str
    half: bool
    flops: float
    moved: int
    launches: int
    reads: dict[int, int]
    writes: dict[int, int]
    over: tuple | None = None
    ours: bool = False

    @property
    def part(self) -> str:
        """The class under which it is reported."""
        if self.phase == UPDATE:
            return OPTIMISER
        return TRANSPORT if self.phase == LOSS else self.kind


class Trace(TorchDispatchMode):
    """Notes the operations on tensors of one device while it is active; ``rows`` holds them in order.

    Args:
        device: type of the device. With "meta" nothing is computed; of another, ATen's operations alone are seen.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.rows: list[Row] = []
        self._device = device
        self._phase, self._loss_starts, self._loss_ends = FORWARD, math.inf, math.inf
        # One for each time it is entered; it enters itself to look into operations of ours.
        self._recordings: list[contextlib.ExitStack] = []
        # Kept, so that no number is given twice.
        self._storages: dict[int, tuple[int, Any]] = {}

    def of_loss(self, function: Callable) -> Callable:
        """The function, so that its operations and their backward pass count as the loss."""

        def noted(*arguments, **keywords):
            self._loss_starts, before, self._phase = torch._C._autograd._get_sequence_nr(), self._phase, LOSS
            try:
                return function(*arguments, **keywords)
            finally:
                self._loss_ends, self._phase = torch._C._autograd._get_sequence_nr(), before

        return noted

    def __enter__(self) -> Trace:
        recording = contextlib.ExitStack()
        if self._device == "meta":
            # Operations look it up when they are called.
            recording.enter_context(mock.patch.object(launching, "run", self._launched))
        self._recordings.append(recording)
        return super().__enter__()

    def __exit__(self, *problem) -> None:
        self._recordings.pop().close()
        super().__exit__(*problem)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function.namespace == "wireframe" and self._device == "meta":
            self._plan(function, arguments, keywords)
            return function(*arguments, **keywords)
        # Below autograd, what is made of other operations comes whole.
        with self:
            out = function.decompose(*arguments, **keywords)
        if out is not NotImplemented:
            return out
        out = function(*arguments, **keywords)
        if function.namespace == "aten":
            self._note(function, arguments, keywords, out)
        return out

    def _plan(self, function, arguments: tuple, keywords: dict) -> None:
        """Calls the Python behind an operation of ours; what it launches, and what it does in ATen, is noted."""
        definition = torch._library.custom_ops.OPDEFS[function._schema.name]
        # Autograd lies above and has no business here.
        with self, torch.no_grad():
            definition._init_fn(*arguments, **keywords)

    def _launched(self, launches: Iterable[Launch]) -> None:
        for found in launches:
            if not all(found.grid):
                continue
            name = kernel_name(found)
            tensors = {id(x): x for x in found.arguments.values() if isinstance(x, Tensor)}.values()
            kind = next((kind for start, kind in _OUR_KINDS.items() if name.startswith(start)), ELEMENTWISE)
            # Which of them are written the launch does not say.
            storages = self._sizes(tensors)
            self.rows.append(Row(
                name, kind, self._current_phase(), _shapes(tensors), _is_half(tensors), kernel_flops(found),
                bytes_moved(found), 1, storages, storages, ours=True,
            ))  # fmt: skip

    def _note(self, function, arguments: tuple, keywords: dict, out: Any) -> None:
        name = function._schema.name.split("::")[1]
        inputs = [x for x in tree_leaves((arguments, keywords)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if name in _FREE or _is_view(function) or all(x.device.type != self._device for x in (*inputs, *outputs)):
            return
        changed = _changed(function, arguments, keywords)
        fresh = [x for x in outputs if all(x is not y for y in changed)]
        overwritten = changed if name in _OVERWRITES else []
        read = [x for x in inputs if all(x is not y for y in overwritten)]
        reads, writes = self._sizes(read), self._sizes([*changed, *fresh])
        if name in _LOOKS_UP:
            table = self._number(inputs[0])
            reads[table] = min(reads[table], sum(map(_bytes, outputs)))
        launches, passes = _SEVERAL.get(name, (1, 0))
        if name.startswith(("_foreach", "_fused_adam")):
            launches = _foreach_launches(arguments, out)
        largest = max(map(_bytes, (*inputs, *outputs)), default=0)
        formula = flop_registry.get(function.overloadpacket)
        self.rows.append(Row(
            name, _kind(name), self._current_phase(), _shapes(inputs), _is_half(inputs),
            float(formula(*arguments, **keywords, out_val=out)) if formula else 0.0,
            sum(reads.values()) + sum(writes.values()) + passes * largest, launches, reads, writes,
            _reduced(name, arguments, keywords),
        ))  # fmt: skip

    def _current_phase(self) -> str:
        if torch._C._current_graph_task_id() == -1:
            # After a backward pass comes the update.
            return UPDATE if self._phase == BACKWARD else self._phase
        self._phase = BACKWARD
        node = torch._C._current_autograd_node()
        born = node._sequence_nr() if node is not None else -1
        return LOSS if self._loss_starts <= born < self._loss_ends else BACKWARD

    def _sizes(self, tensors: Iterable[Tensor]) -> dict[int, int]:
        """Bytes of each storage among the tensors; several tensors of one count together, up to all of it."""
        sizes: dict[int, int] = {}
        for tensor in {id(x): x for x in tensors}.values():
            number = self._number(tensor)
            whole = max(tensor.untyped_storage().nbytes(), _bytes(tensor))
            sizes[number] = min(sizes.get(number, 0) + _bytes(tensor), whole)
        return sizes

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        return self._storages.setdefault(storage._cdata, (len(self._storages), storage))[0]


def _kind(name: str) -> str:
    if "_attention" in name:
        return ATTENTION
    if name.startswith(("_foreach", "_fused_adam")) and name != "_foreach_copy_":
        return OPTIMISER
    return _KINDS.get(name, ELEMENTWISE)


def _is_view(function) -> bool:
    return any(x.alias_info is not None and not x.alias_info.is_write for x in function._schema.returns)


def _changed(function, arguments: tuple, keywords: dict) -> list[Tensor]:
    """The tensors among the arguments that the operation writes to."""
    found = []
    for i, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = arguments[i] if i < len(arguments) else keywords.get(argument.name)
            found += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return found


def _bytes(tensor: Tensor) -> int:
    """Of the elements that lie in memory: an expanded axis counts as one."""
    steps = zip(tensor.shape, tensor.stride())
    return tensor.element_size() * math.prod(length if stride or not length else 1 for length, stride in steps)


def _is_half(tensors: Iterable[Tensor]) -> bool:
    return any(x.is_floating_point() and x.element_size() == 2 for x in tensors)


def _shapes(tensors: Iterable[Tensor]) -> str:
    """The shapes of at most four tensors, of more the largest; lists of parameters are only counted."""
    tensors = list(tensors)
    if len(tensors) > 30:
        return f"{len(tensors)} tensors, {sum(x.numel() for x in tensors)} elements"
    shown = sorted(tensors, key=lambda x: -x.numel())[:4] if len(tensors) > 4 else tensors
    return ", ".join(f"{_DTYPES.get(x.dtype, str(x.dtype)[6:])}{list(x.shape)}".replace(" ", "") for x in shown)


_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "", torch.int64: "i64", torch.bool: "bool"}


def _reduced(name: str, arguments: tuple, keywords: dict) -> tuple | None:
    """Shape and axes of a reduction."""
    if _kind(name) != REDUCTION:
        return None
    x = next(a for a in arguments if isinstance(a, Tensor))
    axes = next((a for a in arguments[1:] if isinstance(a, (list, tuple, int))), keywords.get("dim"))
    axes = range(x.dim()) if axes is None or axes == [] else [axes] if isinstance(axes, int) else axes
    return tuple(x.shape), tuple(sorted(a % max(x.dim(), 1) for a in axes))


def _foreach_launches(arguments: tuple, out: Any) -> int:
    lists = [a for a in (*arguments, out) if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    if not lists:
        return 1
    blocks = sum(-(-x.numel() // _FOREACH_BLOCK) for x in lists[0])
    most = _FOREACH_TENSORS[min(len(lists), 5)]
    return max(-(-len(lists[0]) // most), -(-blocks // _FOREACH_BLOCKS), 1)

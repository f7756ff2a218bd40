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
from wireframe.bench.step_aten import (
    ATTENTION,
    DATA,
    ELEMENTWISE,
    FREE,
    LOOKS_UP,
    OPTIMISER,
    OVERWRITES,
    PRODUCTS,
    SEVERAL,
    TRANSPORT,
    changed,
    foreach_launches,
    is_view,
    kind,
    reduced,
)
from wireframe.kernels import launch as launching
from wireframe.kernels.launch import Launch

# Around a step: the batch is gathered and turned, and what the step tells is put away.
AROUND, FORWARD, LOSS, BACKWARD, UPDATE = PHASES = ("around", "forward", "loss", "backward", "update")

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
        if self.phase in (UPDATE, AROUND):
            return OPTIMISER if self.phase == UPDATE else DATA
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

    def of_step(self, function: Callable) -> Callable:
        """The function, so that its operations are the step's, and what is done before and after it is around it."""
        self._phase = AROUND

        def noted(*arguments, **keywords):
            self._phase = FORWARD
            try:
                return function(*arguments, **keywords)
            finally:
                self._phase = AROUND

        return noted

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
            does = next((does for start, does in _OUR_KINDS.items() if name.startswith(start)), ELEMENTWISE)
            # Which of them are written the launch does not say.
            storages = self._sizes(tensors)
            self.rows.append(Row(
                name, does, self._current_phase(), _shapes(tensors), _is_half(tensors), kernel_flops(found),
                bytes_moved(found), 1, storages, storages, ours=True,
            ))  # fmt: skip

    def _note(self, function, arguments: tuple, keywords: dict, out: Any) -> None:
        name = function._schema.name.split("::")[1]
        inputs = [x for x in tree_leaves((arguments, keywords)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if name in FREE or is_view(function) or all(x.device.type != self._device for x in (*inputs, *outputs)):
            return
        written = changed(function, arguments, keywords)
        fresh = [x for x in outputs if all(x is not y for y in written)]
        overwritten = written if name in OVERWRITES else []
        read = [x for x in inputs if all(x is not y for y in overwritten)]
        reads, writes = self._sizes(read), self._sizes([*written, *fresh])
        if name in LOOKS_UP:
            table = self._number(inputs[0])
            reads[table] = min(reads[table], sum(map(_bytes, outputs)))
        launches, passes = SEVERAL.get(name, (1, 0))
        if name.startswith(("_foreach", "_fused_adam")):
            launches = foreach_launches(name, arguments, out)
        largest = max(map(_bytes, (*inputs, *outputs)), default=0)
        formula = flop_registry.get(function.overloadpacket)
        self.rows.append(Row(
            name, kind(name), self._current_phase(), _shapes(inputs), _is_half(inputs),
            float(formula(*arguments, **keywords, out_val=out)) if formula else 0.0,
            sum(reads.values()) + sum(writes.values()) + passes * largest, launches, reads, writes,
            reduced(name, arguments, keywords),
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

"""What a training step keeps in memory, counted without a GPU: the real step on meta tensors, and the run's buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from wireframe.bench.step_cases import meta_batch, meta_optimizer, meta_stage
from wireframe.kernels import ops
from wireframe.train.config import BASE_CONFIG, load_config
from wireframe.train.loss import scene_losses
from wireframe.train.rows import RowLayout

# Rows of the published training sets, by points (model card of usm3d/learned-baseline-2026).
PUBLISHED_ROWS = {2048: 16_508, 4096: 15_892}


class _Kept:
    """Counts the memory of tensors that autograd keeps for the backward pass, each storage once."""

    def __init__(self, apart: Iterator[Tensor]) -> None:
        self._apart = {tensor.untyped_storage()._cdata for tensor in apart}
        # Held, so that no other storage takes the address of one that is gone.
        self._storages: dict[int, torch.UntypedStorage] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._apart:
            self._storages[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


def memory(stage: int, half: bool = True) -> dict[str, int]:
    """Bytes by purpose, of a stage (from 1) of the published recipe with its published rows on the device.

    The transient of the backward pass, a few of the largest tensors, and what libraries keep come on top.
    """
    config = load_config(BASE_CONFIG)
    settings = config.stages[stage - 1]
    optimizer, batch = meta_optimizer(config, half), meta_batch(meta_stage(config, stage - 1))
    kept = _Kept(iter([optimizer.master, *optimizer.parameters(), *batch.inputs.values(), *batch[1:]]))
    keys = ops.step_keys(batch.scene_keys, config.seed, 0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor))
        # Its graph must live while what it keeps is counted.
        losses = scene_losses(
            optimizer.compute(batch.inputs, dropout_keys=keys), batch.target, batch.target_mask, config.loss,
            settings.endpoint_weight, settings.conf_target,
        )  # fmt: skip
    numbers = optimizer.master.numel()
    found = {
        "weights, moments, gradient (float32)": 16 * numbers,
        "weights for the products (bfloat16)": 2 * numbers if half else 0,
        f"{PUBLISHED_ROWS[settings.points]} rows": PUBLISHED_ROWS[settings.points]
        * RowLayout(settings.points, config.model.segments).bytes,
        "kept for the backward pass": kept.bytes,
    }
    del losses
    return found


def text(stage: int, half: bool = True) -> str:
    """The table of a stage, and its sum beside the 24 GB of an RTX 4090."""
    found = memory(stage, half)
    lines = [f"{name:40}{size / 1e6:10.0f} MB" for name, size in found.items()]
    return "\n".join([*lines, f"{'together, of 24,000 MB on an RTX 4090':40}{sum(found.values()) / 1e6:10.0f} MB"])

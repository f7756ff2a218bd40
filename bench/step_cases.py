"""The steps that ``bench/step_model.py`` looks at, on meta tensors at the published sizes.

"ours" is what a graph of ``train.steps.ScriptedSteps`` holds, from the line of the script to what the step tells.
"plain" is ``plain_model.plain_step`` behind the same gather and turn of its batch, as it would run on a CUDA device
under bfloat16 autocast: meta tensors know neither autocast nor the kernels of a device, so ``OnCuda`` puts the casts
of autocast in front of functions, and gives attention, dropout and RMSNorm the one kernel that CUDA has for each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._pytree import tree_map

from wireframe.bench import plain_model
from wireframe.bench.step_trace import Row, Trace
from wireframe.perceiver import Perceiver
from wireframe.train import step as one_step
from wireframe.train import steps as many_steps
from wireframe.train.config import BASE_CONFIG, TrainConfig, load_config
from wireframe.train.data import Batch, TrainingSet
from wireframe.train.made_rows import made_rows
from wireframe.train.optimizer import FlatAdamW
from wireframe.train.ranks import Ranks
from wireframe.train.steps import ScriptedSteps, Stage

STEPS = ("ours", "plain")

# Functions that autocast computes in 16 bits, and in float32, as far as models use them (ATen/autocast_mode.h).
_IN_HALF = {
    F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.bmm, torch.addmm, torch.baddbmm,
    F.scaled_dot_product_attention,
}  # fmt: skip
_IN_SINGLE = {
    torch.exp, Tensor.exp, torch.log, Tensor.log, torch.rsqrt, Tensor.rsqrt, torch.pow, Tensor.pow, F.softplus,
    torch.logsumexp, Tensor.logsumexp, F.rms_norm, F.layer_norm,
}  # fmt: skip


class OnCuda(TorchFunctionMode):
    """Meta tensors behave as on CUDA under autocast while it is active.

    The kernels: attention with a mask takes the memory-efficient one and without it flash, dropout is one kernel, and
    RMSNorm (fused from torch 2.9 on) is LayerNorm's, which moves the same and takes as many launches.

    Args:
        half: the dtype of autocast, None for none. Weights are cast once a step, as autocast does.
    """

    def __init__(self, half: torch.dtype | None) -> None:
        super().__init__()
        self._half = half
        self._cast: dict[int, Tensor] = {}

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if self._half is not None and function in _IN_HALF:
            arguments, keywords = tree_map(self._to_half, (arguments, keywords))
        elif self._half is not None and function in _IN_SINGLE:
            arguments, keywords = tree_map(_to_single, (arguments, keywords))
        return _KERNELS.get(function, function)(*arguments, **keywords)

    def _to_half(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(self._half)
        if id(x) not in self._cast:
            self._cast[id(x)] = x.to(self._half)
        return self._cast[id(x)]


def _to_single(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    if attn_mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, scale=scale)[0]


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def _rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
    return torch.native_layer_norm(x, shape, weight, None, eps)[0]


def _normalize(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    # Autocast takes the norm in float32 without a copy of x; what is divided by it becomes float32.
    return x / torch.linalg.vector_norm(x, p, dim, True, dtype=torch.float32).clamp_min(eps).expand_as(x)


_KERNELS = {
    F.scaled_dot_product_attention: _attention, F.dropout: _dropout, F.rms_norm: _rms_norm, F.normalize: _normalize,
}  # fmt: skip


class Traced(NamedTuple):
    """Rows of a step, and whose batch they are."""

    rows: list[Row]
    of: str
    stage: int
    scenes: int
    points: int


def traced(of: str, stage: int, half: bool = True) -> Traced:
    """The rows of one of ``STEPS`` at the sizes of a stage (from 1) of the published recipe.

    Args:
        half: products in bfloat16; in float32 where False.
    """
    config = load_config(BASE_CONFIG)
    settings = config.stages[stage - 1]
    run = _plain if of == "plain" else _ours
    return Traced(run(config, stage - 1, half), of, stage, settings.batch_size, settings.points)


def meta_stage(config: TrainConfig, index: int, optimizer: FlatAdamW | None = None) -> Stage:
    """Stage ``index``, from 0, of a run whose rows lie on the meta device: as many as a batch has scenes."""
    settings, device = config.stages[index], torch.device("meta")
    rows = TrainingSet.from_scenes(made_rows(settings.points, settings.batch_size), config.model.segments, device)
    stage = Stage(config, index, rows, optimizer, Ranks(device))
    # The first batch brings the tables of places and keys to the device.
    meta_batch(stage)
    return stage


def meta_batch(stage: Stage) -> Batch:
    """A batch of a stage as its steps make it, without memory."""
    config, settings, device = stage.config, stage.settings, stage.rows.device
    step, scenes = (torch.empty(shape, dtype=torch.int64, device=device) for shape in ((), (settings.batch_size,)))
    turns = torch.empty(settings.batch_size, 4, device=device)
    return stage.rows.batch_on_device(config.seed, step, scenes, turns, config.augment, settings.points)


class _OnCuda(torch.nn.Module):
    """A model whose forward pass is under ``OnCuda``."""

    def __init__(self, model: torch.nn.Module, half: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.half = model, half

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with OnCuda(self.half):
            return self.model(batch)


def _plain(config: TrainConfig, index: int, half: bool) -> list[Row]:
    stage, seen = meta_stage(config, index), Trace()
    with torch.device("meta"):
        model = _OnCuda(plain_model.PlainPerceiver(config.model), torch.bfloat16 if half else None)
    with _meta_as_cuda():
        optimizer = plain_model.plain_optimizer(model, config.optimizer)
        _begin(model, optimizer)
        step = seen.of_step(plain_model.plain_step)
        with seen:
            batch = meta_batch(stage)
            step(
                model, optimizer, batch.inputs, batch.target, batch.target_mask, config.loss,
                grad_clip=config.optimizer.grad_clip, endpoint_weight=stage.settings.endpoint_weight,
                conf_target=stage.settings.conf_target, loss=seen.of_loss(plain_model.plain_loss),
            )  # fmt: skip
    return seen.rows


def _begin(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The optimiser's first step, which makes its moments."""
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()


@contextlib.contextmanager
def _meta_as_cuda() -> Iterator[None]:
    """torch launches many tensors of meta at once, as it does of CUDA, and may be told to leave autocast off there."""
    with (
        mock.patch.object(_foreach_utils, "_get_foreach_kernels_supported_devices", lambda: ["cuda", "meta"]),
        mock.patch.object(torch, "autocast", lambda device, enabled: contextlib.nullcontext()),
    ):
        yield


def meta_optimizer(config: TrainConfig, half: bool) -> FlatAdamW:
    """The optimiser of a run, without memory."""
    with torch.device("meta"):
        model = Perceiver(config.model)
    # The frequencies of the Fourier features are made on the CPU.
    return FlatAdamW(model.to("meta").train(), config.optimizer, torch.bfloat16 if half else torch.float32)


def _ours(config: TrainConfig, index: int, half: bool) -> list[Row]:
    steps = ScriptedSteps(meta_stage(config, index, meta_optimizer(config, half)), config.log_every)
    seen = Trace()
    with (
        mock.patch.object(one_step, "scene_losses", seen.of_loss(one_step.scene_losses)),
        mock.patch.object(many_steps, "train_step", seen.of_step(many_steps.train_step)),
        seen,
    ):
        # What a GPU captures and replays.
        steps._one()
    return seen.rows

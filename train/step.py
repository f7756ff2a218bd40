"""One step of training as device work alone: gradients of the micro-batches, their sum in a fixed order, the update.

On one rank nothing here waits for the device or asks it anything, so the same function runs eagerly and inside a CUDA
graph (``train/steps.py``), and between ranks, whose exchange may wait; the bits are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from wireframe.kernels import ops
from wireframe.train.config import StageConfig, TrainConfig
from wireframe.train.loss import Losses, scene_losses
from wireframe.train.optimizer import FlatAdamW
from wireframe.train.ranks import Ranks, tree_sum

if TYPE_CHECKING:
    from wireframe.train.data import Batch

# What the last row of ``train_step`` says: the gradient's norm before clipping, whether the step was applied, whether
# some process was asked to stop.
_NORM, _APPLIED, _STOP = range(3)


class StepResult(NamedTuple):
    """losses: float32 [B, 4] of every scene of the batch, columns as ``Losses``; grad_norm before clipping.

    ``applied`` is False where a loss or the gradient was not finite: then nothing was changed. ``stop``: some process
    was asked to stop.
    """

    losses: Tensor
    grad_norm: float
    applied: bool
    stop: bool

    @classmethod
    def read(cls, told: Tensor) -> StepResult:
        """What ``train_step`` tells, on the host."""
        last = told[-1].tolist()
        return cls(told[:-1], last[_NORM], bool(last[_APPLIED]), bool(last[_STOP]))

    def means(self) -> dict[str, float]:
        """The mean of every term, by name."""
        return dict(zip(Losses._fields, self.losses.mean(0).tolist()))


def train_step(
    optimizer: FlatAdamW,
    batches: list[Batch],
    config: TrainConfig,
    stage: StageConfig,
    step: int | Tensor,
    lr: Tensor,
    ranks: Ranks,
    stop: bool = False,
    armed: Tensor | None = None,
) -> Tensor:
    """One step of this process among the ranks; all of them end with the same weights.

    Args:
        batches: this process's micro-batches, in order.
        step: global step, the key of dropout; int64 [] on the device where a graph is to advance it.
        lr: learning rate, float32 [] on the device.
        stop: whether this process was asked to stop; every process learns of it here, so that all stop at one step.
        armed: bool []; False computes everything and changes nothing. None: True.

    Returns:
        float32 [B + 1, 4] on the device: what ``StepResult.read`` takes.
    """
    told = []
    for index, batch in enumerate(batches):
        losses = _gradient(optimizer, index, batch, config, stage, step)
        told.append(torch.cat([losses, torch.full_like(losses[:1], float(stop))]))
    gradient = tree_sum(ranks.gather(optimizer.gradients))
    # [micro-batches, scenes + 1, terms]: the last row says whether to stop.
    gathered = ranks.gather(torch.stack(told))
    losses, stopping = gathered[:, :-1].flatten(0, 1), gathered[:, -1, 0].amax()
    healthy = torch.isfinite(losses).all()
    if armed is not None:
        healthy = healthy & armed
    norm = optimizer.step(gradient, lr, healthy)
    applied = (healthy & torch.isfinite(norm)).to(norm.dtype)
    return torch.cat([losses, torch.stack([norm, applied, stopping, torch.zeros_like(norm)])[None]])


def _gradient(
    optimizer: FlatAdamW, index: int, batch: Batch, config: TrainConfig, stage: StageConfig, step: int | Tensor
) -> Tensor:
    """Puts the gradient of a micro-batch's share of the mean over the batch in its place; its losses [b, 4]."""
    keys = ops.step_keys(batch.scene_keys, config.seed, step)
    losses = scene_losses(
        optimizer.compute(batch.inputs, dropout_keys=keys),
        batch.target,
        batch.target_mask,
        config.loss,
        stage.endpoint_weight,
        stage.conf_target,
    )
    share = losses.total.sum() / stage.batch_size
    optimizer.collect(index, torch.autograd.grad(share, optimizer.parameters(), materialize_grads=True))
    return torch.stack([term.detach() for term in losses], 1)

"""One step of training: gradients of the micro-batches, their sum in a fixed order, and the update."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from wireframe.kernels import ops
from wireframe.perceiver import Perceiver
from wireframe.train.config import OptimizerConfig, StageConfig, TrainConfig
from wireframe.train.loss import Losses, scene_losses
from wireframe.train.ranks import Ranks, tree_sum

if TYPE_CHECKING:
    from wireframe.train.data import Batch


class StepResult(NamedTuple):
    """losses: float32 [B, 4] of every scene of the batch, columns as ``Losses``; grad_norm before clipping.

    ``applied`` is False where a loss or the gradient was not finite: then nothing was changed. ``stop``: some process
    was asked to stop.
    """

    losses: Tensor
    grad_norm: float
    applied: bool
    stop: bool

    def means(self) -> dict[str, float]:
        """The mean of every term, by name."""
        return dict(zip(Losses._fields, self.losses.mean(0).tolist()))


def make_optimizer(model: Perceiver, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with the confidence head's own weight decay."""
    head = [p for name, p in model.named_parameters() if ".conf_head." in name]
    rest = [p for name, p in model.named_parameters() if ".conf_head." not in name]
    groups = [
        {"params": rest, "weight_decay": config.weight_decay},
        {"params": head, "weight_decay": config.conf_head_weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), foreach=True)


def train_step(
    model: Perceiver,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    config: TrainConfig,
    stage: StageConfig,
    step: int,
    lr: float,
    ranks: Ranks,
    stop: bool = False,
) -> StepResult:
    """One step of this process among the ranks; all of them end with the same weights.

    Args:
        batches: this process's micro-batches, in order.
        step: global step, the key of dropout.
        lr: learning rate.
        stop: whether this process was asked to stop; every process learns of it here, so that all stop at one step.
    """
    found = [_gradient(model, batch, config, stage, step) for batch in batches]
    gradients = ranks.gather(torch.stack([gradient for gradient, _ in found]))
    # [micro-batches, scenes + 1, terms]: the last row says whether to stop.
    told = torch.stack([torch.cat([losses, torch.full_like(losses[:1], float(stop))]) for _, losses in found])
    told = ranks.gather(told)
    gradient = tree_sum(gradients)
    norm = torch.linalg.vector_norm(gradient)
    # One wait for the device a step.
    host = torch.cat([told.flatten(), norm.reshape(1)]).cpu()
    told, grad_norm = host[:-1].view(told.shape), host[-1].item()
    losses, stop = told[:, :-1].flatten(0, 1), bool(told[:, -1].any())
    applied = bool(torch.isfinite(host).all())
    if applied:
        limit = config.optimizer.grad_clip
        _apply(model, optimizer, gradient * (limit / (norm + 1e-6)).clamp(max=1.0), lr)
    return StepResult(losses, grad_norm, applied, stop)


def _gradient(
    model: Perceiver, batch: Batch, config: TrainConfig, stage: StageConfig, step: int
) -> tuple[Tensor, Tensor]:
    """The gradient [P] of a micro-batch's share of the mean over the batch, and its losses [b, 4]."""
    keys = ops.step_keys(batch.scene_keys, config.seed, step)
    losses = scene_losses(
        model(batch.inputs, dropout_keys=keys),
        batch.target,
        batch.target_mask,
        config.loss,
        stage.endpoint_weight,
        stage.conf_target,
    )
    share = losses.total.sum() / stage.batch_size
    gradients = torch.autograd.grad(share, list(model.parameters()), materialize_grads=True)
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    return flat, torch.stack([term.detach() for term in losses], 1)


def _apply(model: Perceiver, optimizer: torch.optim.Optimizer, gradient: Tensor, lr: float) -> None:
    start = 0
    for parameter in model.parameters():
        parameter.grad = gradient[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

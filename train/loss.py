"""The training loss: Sinkhorn matching, confidence, and the endpoint L1 of the last stage.

Published (S23DR 2026 baseline): Sinkhorn eps 0.1, 20 iterations, dustbin 0.3; confidence weight 0.1 with a target from
the transport plan; symmetric endpoint L1 against the detached plan. Ours: the cost weights, the form of the target.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wireframe.kernels import ops
from wireframe.perceiver import Prediction
from wireframe.train.config import LossConfig


class Losses(NamedTuple):
    """Scalars, means over the scenes of the batch; ``total`` carries the gradient."""

    total: Tensor
    match: Tensor
    conf: Tensor
    endpoint: Tensor


def training_loss(
    prediction: Prediction,
    target: Tensor,  # [B, M, 2, 3]
    target_mask: Tensor,  # [B, M]
    config: LossConfig,
    endpoint_weight: float,
) -> Losses:
    """The loss of a batch.

    Args:
        prediction: segments float32 [B, S, 2, 3] and logits [B, S].
        target: float32 [B, M, 2, 3] normalised ground-truth segments; masked ones are never read.
        target_mask: bool [B, M], True = real.
        config: weights and Sinkhorn settings.
        endpoint_weight: 0 switches the endpoint term off.
    """
    match, plan = ops.segment_matching(
        prediction.segments,
        target,
        target_mask,
        weights=config.weights,
        eps=config.eps,
        iters=config.iters,
        dustbin=config.dustbin,
    )
    per_target = target_mask.sum(1).clamp(min=1)
    match = (match / per_target).mean()
    conf = confidence_loss(prediction.conf, plan, target_mask).mean()
    endpoint = match.new_zeros(())
    if endpoint_weight > 0:
        endpoint = (endpoint_loss(prediction.segments, target, target_mask, plan) / per_target).mean()
    total = match + config.conf_weight * conf + endpoint_weight * endpoint
    return Losses(total, match.detach(), conf.detach(), endpoint.detach())


def confidence_loss(conf: Tensor, plan: Tensor, target_mask: Tensor) -> Tensor:
    """Binary cross-entropy [B] of the logits [B, S] against the mass each query sends to real targets."""
    mass = plan.masked_fill(~target_mask[:, None, :], 0.0).sum(2).clamp(0.0, 1.0)
    return F.binary_cross_entropy_with_logits(conf, mass, reduction="none").mean(1)


def endpoint_loss(pred: Tensor, target: Tensor, target_mask: Tensor, plan: Tensor) -> Tensor:
    """Symmetric endpoint L1 [B]: over real targets, plan x the smaller of the two ways to pair the endpoints."""
    target = target.masked_fill(~target_mask[:, :, None, None], 0.0)
    straight = (pred[:, :, None] - target[:, None]).abs().sum((-1, -2))
    swapped = (pred[:, :, None] - target[:, None].flip(3)).abs().sum((-1, -2))
    distance = torch.minimum(straight, swapped)
    return (plan.masked_fill(~target_mask[:, None, :], 0.0) * distance).sum((1, 2))

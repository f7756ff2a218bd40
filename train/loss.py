"""The training loss: matching, confidence, and the endpoint L1 of the last stage.

Published (S23DR 2026 baseline): Sinkhorn eps 0.1, 20 iterations, dustbin 0.3; confidence weight 0.1 with a target from
the transport plan; symmetric endpoint L1 against the detached plan. Ours: the cost weights, the form of the target, and
how the plan becomes a loss. The plan x cost of ``segment_matching`` is not minimised as it stands: once a prediction
costs more than the dustbin, the gradient through the plan pushes it away, and plan x cost falls to 0 at infinity. Here
each target shares one unit of pull among the queries in proportion to the detached plan, so that none can escape.
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
    """One value a scene [B]; ``total`` carries the gradient, the others are for the log."""

    total: Tensor
    match: Tensor
    conf: Tensor
    endpoint: Tensor


def scene_losses(
    prediction: Prediction,
    target: Tensor,  # [B, M, 2, 3]
    target_mask: Tensor,  # [B, M]
    config: LossConfig,
    endpoint_weight: float,
    conf_target: str = "mass",
) -> Losses:
    """The loss of every scene by itself: none depends on the others of the batch.

    Another matcher takes the place of ``sinkhorn_plan``, another confidence loss that of ``confidence_loss``.

    Args:
        prediction: segments float32 [B, S, 2, 3] and logits [B, S].
        target: float32 [B, M, 2, 3] normalised ground-truth segments; masked ones are never read.
        target_mask: bool [B, M], True = real.
        config: weights and Sinkhorn settings.
        endpoint_weight: 0 switches the endpoint term off.
        conf_target: "mass" or "rank", see ``confidence_target``.
    """
    plan = sinkhorn_plan(prediction.segments, target, target_mask, config)
    per_target = target_mask.sum(1).clamp(min=1)
    match = match_loss(prediction.segments, target, target_mask, plan, config.weights) / per_target
    conf = confidence_loss(prediction.conf, plan, target_mask, conf_target)
    endpoint = torch.zeros_like(match)
    if endpoint_weight > 0:
        endpoint = endpoint_loss(prediction.segments, target, target_mask, plan) / per_target
    total = match + config.conf_weight * conf + endpoint_weight * endpoint
    return Losses(total, match.detach(), conf.detach(), endpoint.detach())


def sinkhorn_plan(pred: Tensor, target: Tensor, target_mask: Tensor, config: LossConfig) -> Tensor:
    """Which query answers for which target: the transport plan [B, S, M], without gradient."""
    _, plan = ops.segment_matching(
        pred.detach(),
        target,
        target_mask,
        weights=config.weights,
        eps=config.eps,
        iters=config.iters,
        dustbin=config.dustbin,
    )
    return plan


def match_loss(
    pred: Tensor,  # [B, S, 2, 3]
    target: Tensor,  # [B, M, 2, 3]
    target_mask: Tensor,  # [B, M]
    plan: Tensor,  # [B, S, M]
    weights: tuple[float, float, float],
) -> Tensor:
    """Cost [B] of all real targets, each averaged over the queries with the column of the plan as weights."""
    cost = ops.segment_cost(pred, target.masked_fill(~target_mask[:, :, None, None], 0.0), weights=weights)
    # Far from every query the mass is tiny but its shares still say who is nearest.
    share = plan / plan.sum(1, keepdim=True).clamp(min=1e-30)
    return (share * cost).masked_fill(~target_mask[:, None, :], 0.0).sum((1, 2))


def confidence_loss(logits: Tensor, plan: Tensor, target_mask: Tensor, kind: str) -> Tensor:
    """Binary cross-entropy [B] of the logits [B, S] against ``confidence_target``, the mean over the queries."""
    wanted = confidence_target(plan, target_mask, kind)
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)


def confidence_target(
    plan: Tensor,  # [B, S, M]
    target_mask: Tensor,  # [B, M]
    kind: str,
) -> Tensor:
    """What the confidence of each query should be, [B, S] in [0, 1].

    "mass": the mass the query sends to real targets. "rank": over the targets, the query's mass relative to the best
    query's, times the target's matched mass.
    """
    plan = plan.masked_fill(~target_mask[:, None, :], 0.0)
    if kind == "mass":
        return plan.sum(2).clamp(0.0, 1.0)
    best = plan.amax(1, keepdim=True).clamp(min=1e-30)
    return (plan / best * plan.sum(1, keepdim=True)).amax(2).clamp(0.0, 1.0)


def endpoint_loss(pred: Tensor, target: Tensor, target_mask: Tensor, plan: Tensor) -> Tensor:
    """Symmetric endpoint L1 [B]: over real targets, plan x the smaller of the two ways to pair the endpoints."""
    target = target.masked_fill(~target_mask[:, :, None, None], 0.0)
    straight = (pred[:, :, None] - target[:, None]).abs().sum((-1, -2))
    swapped = (pred[:, :, None] - target[:, None].flip(3)).abs().sum((-1, -2))
    distance = torch.minimum(straight, swapped)
    return (plan.masked_fill(~target_mask[:, None, :], 0.0) * distance).sum((1, 2))

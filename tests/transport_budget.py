"""Scales of rounding for the gradients of the transport operations, for the budgets of ``kernel_budget``.

With s = -C / eps and R_t, Q_t the plans after the row step and the column step of iteration t, each divided by its row
or column masses, the gradient of the unrolled iterations is

    ds = G - sum_t (dv_t Q_t + du_t R_t),    du_t = [t last] G 1 - Q_t dv_t,    dv_{t-1} = -R_t^T du_t.

An entry of a plan is an exponential whose exponent has terms of sum |s| + |u| + |v|, so its rounding counts
w = 1 + |s| + |u| + |v| times: (wQ) is that product. Each sum counts the absolute values of its terms,

    A_u = [t last] |G| 1 + (wQ) |dv|,    A_v = (wR)^T |du| of the iteration after,
    scale = |G| + sum_t (|dv| (wQ) + A_v Q + |du| (wR) + A_u R),

with du, dv exact: their rounding counts in what they go into next and, since iterations contract, not for ever. In the
same way log_plan = s + u + v itself has the scale |s| + L_u + L_v, where a logarithm of a sum of exponentials is as
inexact as their average exponent: L_u = |u| + R (|s| + |v|), L_v = |v| + Q^T (|s| + L_u).

Rounding has a fixed spacing below the smallest normal number of float32, so no scale but 0 is smaller than that. The
same holds for the kernel matrix K_ij = exp(s_ij) / sum_j exp(s_ij): where it is smaller, the terms of ds_ij, which are
multiples of it, count as if it were not.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wireframe.kernels.reference import segment_cost_reference, sinkhorn_reference

_TINY = torch.finfo(torch.float32).smallest_normal


class _Iterations(NamedTuple):
    """What the iterations leave: all [B, N + 1, M + 1] but for their last u, v; plans in order, see ``_plan``."""

    s: Tensor
    u: Tensor
    v: Tensor
    plans: list[tuple[Tensor, ...]]


def _iterate(cost: Tensor, mask: Tensor, eps: float, iters: int, dustbin: float) -> _Iterations:
    batch, rows, _ = cost.shape
    s = torch.nn.functional.pad(torch.where(mask[:, None, :], cost.double(), 0.0), (0, 1, 0, 1), value=dustbin) / -eps
    s[:, -1, -1] = 0.0
    a = torch.ones(batch, rows + 1, 1, dtype=torch.float64)
    a[:, -1, 0] = mask.sum(1)
    b = torch.cat([mask.double(), torch.full((batch, 1), float(rows))], 1)[:, None, :]
    v = torch.where(b > 0, 0.0, -torch.inf)
    plans = []
    for _ in range(iters):
        u = a.log() - torch.logsumexp(s + v, 2, keepdim=True)
        row_plan = _plan(s, u, v, a)
        v = b.log() - torch.logsumexp(s + u, 1, keepdim=True)
        plans.append((*row_plan, *_plan(s, u, v, b)))
    return _Iterations(s, u, v, plans)


def _plan(s: Tensor, u: Tensor, v: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """The plan divided by its masses, and that weighted with the rounding of its exponents."""
    exponent = s + u + v
    real = exponent > -torch.inf
    plan = torch.where(real, exponent.exp() / mass, 0.0)
    return plan, torch.where(real, plan * (1 + s.abs() + u.abs() + v.abs()), 0.0)


def log_plan_scale(cost: Tensor, mask: Tensor, *, eps=0.1, iters=20, dustbin=0.3) -> Tensor:
    """Scale [B, N + 1, M + 1] of log_plan, 0 where that is -inf."""
    s, u, v, plans = _iterate(cost, mask, eps, iters, dustbin)
    row_plan, _, column_plan, _ = plans[-1]
    real = s + u + v > -torch.inf
    s, u, v = s.abs(), *(torch.where(x.isfinite(), x.abs(), 0.0) for x in (u, v))
    of_u = u + (row_plan * (s + v)).sum(2, keepdim=True)
    of_v = v + (column_plan * (s + of_u)).sum(1, keepdim=True)
    return torch.where(real, s + of_u + of_v, 0.0)


def sinkhorn_scale(
    cost: Tensor, mask: Tensor, grad: Tensor, grad_scale: Tensor | None = None, *, eps=0.1, iters=20, dustbin=0.3
) -> Tensor:
    """Scale [B, N, M] of dcost for the gradient [B, N + 1, M + 1] of log_plan, itself exact or with a scale."""
    s, *_, plans = _iterate(cost, mask, eps, iters, dustbin)
    grad_scale = (grad.double() if grad_scale is None else grad_scale).abs()
    terms = torch.zeros_like(grad_scale)
    of_dv, dv = grad_scale.sum(1, keepdim=True), grad.double().sum(1, keepdim=True)
    of_du, du = grad_scale.sum(2, keepdim=True), grad.double().sum(2, keepdim=True)
    for row_plan, row_weighted, column_plan, column_weighted in reversed(plans):
        terms += dv.abs() * column_weighted + of_dv * column_plan
        of_du = of_du + (dv.abs() * column_weighted).sum(2, keepdim=True)
        du = du - (dv * column_plan).sum(2, keepdim=True)
        terms += du.abs() * row_weighted + of_du * row_plan
        of_dv = (du.abs() * row_weighted).sum(1, keepdim=True)
        dv = -(du * row_plan).sum(1, keepdim=True)
        of_du, du = torch.zeros_like(of_du), torch.zeros_like(du)
    kernel = s[:, :-1].softmax(2)[:, :, :-1]
    scale = grad_scale[:, :-1, :-1] + terms[:, :-1, :-1] * torch.where(kernel > 0, _TINY / kernel, 1.0).clamp(min=1.0)
    scale = scale * mask[:, None, :]
    return torch.where(scale > 0, scale.clamp(min=_TINY), 0.0) / eps


def _pairs(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return pred.double()[:, :, None], target.double()[:, None]


def _sizes(mine: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each pair: length and direction (absolute values) of mine, and the rounding of both directions.

    A direction is as inexact as the ends of the segment that it is the difference of.
    """
    lengths = [(x[..., 1, :] - x[..., 0, :]).norm(dim=-1, keepdim=True) for x in (mine, other)]
    unit = (mine[..., 1, :] - mine[..., 0, :]).abs() / lengths[0]
    ends = [x.norm(dim=-1).sum(-1, keepdim=True) for x in (mine, other)]
    return lengths[0], unit, 1 + ends[0] / lengths[0] + ends[1] / lengths[1]


def cost_scale(pred: Tensor, target: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Scale [B, N, M] of the cost; no segment has length 0."""
    w_mid, w_dir, w_len = weights
    mine, other = _pairs(pred, target)
    ends = mine.norm(dim=-1).sum(-1) + other.norm(dim=-1).sum(-1)
    spread = _sizes(mine, other)[2][..., 0]
    return abs(w_mid) * ends / 2 + abs(w_dir) * (1 + spread) + abs(w_len) * ends


def cost_scales(pred: Tensor, target: Tensor, dcost: Tensor, weights: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Scales of dpred and dtarget for that of the gradient of the cost, dcost [B, N, M]; no segment has length 0."""
    mine, other = _pairs(pred, target)
    dcost = dcost.double().abs()[..., None, None]
    return (
        (_one_side(mine, other, weights) * dcost).sum(2),
        (_one_side(other, mine, weights) * dcost).sum(1),
    )


def _one_side(mine: Tensor, other: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Scale [B, N, M, 2, 3] of the gradient of each pair to the ends of mine."""
    w_mid, w_dir, w_len = (abs(weight) for weight in weights)
    distance = (mine.mean(-2) - other.mean(-2)).norm(dim=-1, keepdim=True)
    middle = (mine.abs().sum(-2) + other.abs().sum(-2)) / 2 / distance
    length, unit, spread = _sizes(mine, other)
    other_unit = _sizes(other, mine)[1]
    turn = (other_unit + unit * (unit * other_unit).sum(-1, keepdim=True)) / length
    one_end = w_mid * middle / 2 + spread * (w_dir * turn + w_len * unit)
    return torch.stack([one_end, one_end], -2)


class MatchingScales(NamedTuple):
    loss: Tensor
    plan: Tensor
    dpred: Tensor
    dtarget: Tensor


def matching_scales(
    pred: Tensor, target: Tensor, mask: Tensor, grad: Tensor, weights: tuple[float, ...], *,
    eps=0.1, iters=20, dustbin=0.3,
) -> MatchingScales:  # fmt: skip
    """Scales of the loss, the plan and the gradients, for the gradient [B] of the loss; masked targets are finite.

    The cost counts with its own value: it is the scores made of it that its rounding moves.
    """
    settings = {"eps": eps, "iters": iters, "dustbin": dustbin}
    cost = segment_cost_reference(pred.double(), target.double(), weights)
    log_plan = sinkhorn_reference(cost, mask, **settings)
    plan = log_plan.exp()[:, :-1, :-1]
    of_plan = plan * (1 + log_plan_scale(cost, mask, **settings)[:, :-1, :-1])
    grad = grad.double()[:, None, None]
    grad_plan, of_grad_plan = torch.zeros_like(log_plan), torch.zeros_like(log_plan)
    grad_plan[:, :-1, :-1] = grad * plan * cost
    of_grad_plan[:, :-1, :-1] = grad.abs() * of_plan * cost.abs()
    dcost = grad.abs() * of_plan + sinkhorn_scale(cost, mask, grad_plan, of_grad_plan, **settings)
    of_plan = torch.where(plan > 0, of_plan.clamp(min=_TINY), 0.0)
    dcost = torch.where(mask[:, None, :], dcost, 0.0)
    return MatchingScales((of_plan * cost.abs()).sum((1, 2)), of_plan, *cost_scales(pred, target, dcost, weights))

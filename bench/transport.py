"""Races of Sinkhorn and segment matching, alone and in CUDA graphs, against PyTorch, POT and geomloss.

POT's iterations are the same ones, and must give the same plan. geomloss anneals, by other iterations, and at its own
defaults stops far from the plan; its backward is that of the last iteration. Inside a graph no launch of the host
counts, and all calls find a warm L2 cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wireframe.bench.race import (
    BACKWARD,
    BOTH,
    FORWARD,
    GRAPH,
    Bar,
    How,
    Race,
    Rival,
    Work,
    compiled,
    compiled_deterministically,
    package,
    randn,
)
from wireframe.kernels import ops
from wireframe.kernels.determinism import deterministic
from wireframe.kernels.reference import segment_matching_reference, sinkhorn_reference
from wireframe.train.config import LossConfig

# The loss of the published recipe.
_EPS, _DUSTBIN = 0.1, 0.3
_BARS = {FORWARD: 5.0, BACKWARD: 5.0, BOTH: 5.0}
_GRAPH_BARS = {FORWARD + GRAPH: 0.012, BACKWARD + GRAPH: 0.016}


class Sizes(NamedTuple):
    """Scenes, segments a side, iterations."""

    batch: int = 64
    segments: int = 64
    iters: int = 20

    @property
    def text(self) -> str:
        return f"{self.batch} x {self.segments} x {self.segments}, {self.iters} iterations"


_SETS = 3
_SMALL = Sizes(2, 6, 3)
_GROWTH = (*(Sizes(batch) for batch in (1, 4, 16, 128)), *(Sizes(8, segments) for segments in (64, 128, 256)))


def races(how: How) -> Iterator[Race]:
    """Sinkhorn down to the plan, and segment matching from the endpoints down to the loss."""
    sizes, gpu = _SMALL if how.small else Sizes(), how.device == "cuda"
    for op in _WORKS:
        for mode in how.modes:
            bars = ()
            if gpu and op == "sinkhorn":
                bars = (Bar(_BARS[mode], "torch.compile"),) if mode in _BARS else (Bar(_GRAPH_BARS[mode]),)
            yield _race(op, mode, sizes, how, bars)
    for sizes in _GROWTH if how.grow else ():
        for op in _WORKS:
            yield _race(op, BOTH, sizes, how, compiling=False)


def _race(op: str, mode: str, sizes: Sizes, how: How, bars: tuple = (), compiling: bool = True) -> Race:
    cache = None if how.device == "cpu" else "warm" if mode.endswith(GRAPH) else "cold"
    budget = 1e-4
    return Race(
        op, mode, sizes.text, sizes._asdict(), "float32", functools.partial(_WORKS[op], sizes, how, compiling), budget,
        cache=cache, bars=() if how.small else bars,
    )  # fmt: skip


class _Set(NamedTuple):
    pred: Tensor  # [B, N, 2, 3]
    target: Tensor  # [B, N, 2, 3]
    mask: Tensor  # [B, N]


def _sets(sizes: Sizes, device: str) -> list[_Set]:
    # A third of the targets, and up to another third, is real.
    third = max(sizes.segments // 3, 1)
    real = third + torch.arange(sizes.batch, device=device) % third
    mask = torch.arange(sizes.segments, device=device) < real[:, None]
    shape = (sizes.batch, sizes.segments, 2, 3)
    return [
        _Set(*(0.3 * randn(device, *shape, seed=2 * number + i) for i in range(2)), mask.roll(number, 0))
        for number in range(_SETS)
    ]


@functools.lru_cache(maxsize=1)
def _sinkhorn(sizes: Sizes, how: How, compiling: bool) -> Work:
    weights, inputs, gradients = LossConfig().weights, [], []
    for number, (pred, target, mask) in enumerate(_sets(sizes, how.device)):
        cost = ops.segment_cost(pred, target, weights=weights, impl="reference")
        inputs.append((cost.detach().requires_grad_(), mask))
        gradient = randn(how.device, sizes.batch, sizes.segments + 1, sizes.segments + 1, seed=100 + number)
        # Of a masked column's entries, which are -inf, nothing may be asked.
        seen = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        gradients.append(torch.where(seen[:, None, :], gradient, 0.0))

    def ours(cost: Tensor, mask: Tensor) -> Tensor:
        return ops.sinkhorn(cost, mask, iters=sizes.iters, impl=_impl(how))

    def plain(cost: Tensor, mask: Tensor) -> Tensor:
        return sinkhorn_reference(cost, mask, _EPS, sizes.iters, _DUSTBIN)

    return Work(inputs, [*_rivals(ours, plain, how, compiling), *_libraries(sizes.iters)], gradients)


@functools.lru_cache(maxsize=1)
def _matching(sizes: Sizes, how: How, compiling: bool) -> Work:
    weights = LossConfig().weights

    def ours(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return ops.segment_matching(pred, target, mask, weights=weights, iters=sizes.iters, impl=_impl(how))[0]

    def plain(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return segment_matching_reference(pred, target, mask, weights, _EPS, sizes.iters, _DUSTBIN)[0]

    inputs = [(pred.requires_grad_(), target, mask) for pred, target, mask in _sets(sizes, how.device)]
    gradients = [randn(how.device, sizes.batch, seed=100 + number) for number in range(_SETS)]
    return Work(inputs, list(_rivals(ours, plain, how, compiling)), gradients)


def _impl(how: How) -> str:
    """On a GPU nothing else may stand in for the kernels."""
    return "triton" if how.device == "cuda" else "auto"


_WORKS: dict[str, Callable[[Sizes, How, bool], Work]] = {"sinkhorn": _sinkhorn, "segment_matching": _matching}


def _rivals(ours: Callable, plain: Callable, how: How, compiling: bool) -> Iterator[Rival]:
    # On a CPU ours is the same code as eager.
    yield Rival("eager", lambda: plain)
    yield Rival("ours", lambda: ours, deterministic=True)
    fixed = functools.partial(deterministic, how.device)
    yield Rival("eager, deterministic", lambda: plain, deterministic=True, settings=fixed)
    if not compiling:
        return
    yield Rival("torch.compile", lambda: compiled(plain, how), slow=True)
    yield compiled_deterministically("torch.compile", plain, how)


def _with_dustbins(cost: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cost [B, N + 1, M + 1] and the masses of its rows and columns, as ``sinkhorn_reference`` defines them."""
    full = F.pad(cost, (0, 1, 0, 1), value=_DUSTBIN)
    corner = torch.zeros_like(full[0], dtype=torch.bool)
    corner[-1, -1] = True
    # Libraries start with potentials of 0 everywhere: at such a cost a masked column has no part in their first sum.
    full = torch.where(F.pad(~mask, (0, 1))[:, None, :], 1e4, full.masked_fill(corner, 0.0))
    columns, rows = mask.sum(1, keepdim=True).to(cost), cost.shape[1]
    a = torch.cat([columns.new_ones(len(cost), rows), columns], 1)
    b = torch.cat([mask.to(cost), torch.full_like(columns, rows)], 1)
    return full, a, b


def _libraries(iters: int) -> Iterator[Rival]:
    def pot() -> Callable:
        batch = package("ot.batch", "POT")

        def solve(cost: Tensor, mask: Tensor) -> Tensor:
            full, a, b = _with_dustbins(cost, mask)
            # Tolerance 0: as many iterations as ours.
            found = batch.solve_batch(
                full, _EPS, a, b, max_iter=iters, tol=0.0, method="log_sinkhorn", grad="autodiff"
            )
            u, v = found.potentials
            plan = u[:, :, None] + v[:, None, :] - full / _EPS
            return plan.masked_fill(F.pad(~mask, (0, 1))[:, None, :], -torch.inf)

        return solve

    def geomloss() -> Callable:
        samples_loss = package("geomloss", "geomloss").SamplesLoss

        def solve(cost: Tensor, mask: Tensor) -> Tensor:
            full, a, b = _with_dustbins(cost, mask)
            # Of points it takes the cost alone, which is given.
            points = [cost.new_zeros(*mass.shape, 1) for mass in (a, b)]
            loss = samples_loss(
                "sinkhorn", p=1, blur=_EPS, cost=lambda x, y: full, debias=False, potentials=True, diameter=2.0,
                backend="tensorized",
            )  # fmt: skip
            f, g = loss(a, points[0], b, points[1])
            return (f[:, :, None] + g[:, None, :] - full) / _EPS + a.log()[:, :, None] + b.log()[:, None, :]

        return solve

    yield Rival("POT solve_batch", pot)
    yield Rival("geomloss, annealed, not converged", geomloss, exact=False)

"""Times Sinkhorn and segment matching against their rivals: ``python -m wireframe.bench.transport``.

Times are those of the device alone. Inside a graph, sixteen calls are captured one after another on one stream and one
replay is timed, so that no launch of the host counts at all; all but the first of them find a warm L2 cache. The
reference is the eager rival and what torch.compile gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from wireframe.bench import gpu_timing
from wireframe.bench.gpu_timing import GRAPH_MODES, MODES, OURS, Problem, Rival, best, compiled, goal, randn, ratio
from wireframe.kernels import dispatch, ops
from wireframe.kernels.reference import segment_matching_reference, sinkhorn_reference
from wireframe.train.config import LossConfig

# Scenes, segments a side, iterations: the loss of the published recipe.
_SIZES, _SMALL = (64, 64, 20), (2, 6, 3)


def _shape(scenes: int, segments: int, iters: int) -> str:
    return f"{scenes} x {segments} x {segments}, {iters} iterations, fp32"


def problems(device: str, small: bool, backend: str) -> Iterator[Problem]:
    """Sinkhorn down to the cost, and segment matching down to the endpoints."""
    scenes, segments, iters = sizes = _SMALL if small else _SIZES
    modes = MODES if device == "cpu" else (*MODES, *GRAPH_MODES)
    weights = LossConfig().weights
    pred = (0.3 * randn(device, scenes, segments, 2, 3)).requires_grad_()
    target = 0.3 * randn(device, scenes, segments, 2, 3, seed=1)
    # A third of the targets, and up to another third, is real.
    real = segments // 3 + torch.arange(scenes, device=device) % max(segments // 3, 1)
    mask = torch.arange(segments, device=device) < real[:, None]
    cost = ops.segment_cost(pred, target, weights=weights, impl="reference").detach().requires_grad_()

    def transport(impl: str) -> Tensor:
        return ops.sinkhorn(cost, mask, iters=iters, impl=impl)

    def match(impl: str) -> Tensor:
        return ops.segment_matching(pred, target, mask, weights=weights, iters=iters, impl=impl)[0]

    def matching_reference(pred: Tensor) -> Tensor:
        return segment_matching_reference(pred, target, mask, weights, 0.1, iters)[0]

    gradient = randn(device, scenes, segments + 1, segments + 1, seed=2)
    # Of a masked column's entries, which are -inf, nothing may be asked.
    seen = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    gradient = torch.where(seen[:, None, :], gradient, 0.0)
    rivals = list(_rivals(transport, lambda c: sinkhorn_reference(c, mask, 0.1, iters), cost, device, backend))
    yield Problem("sinkhorn", _shape(*sizes), [cost], gradient, rivals, modes)
    rivals = list(_rivals(match, matching_reference, pred, device, backend))
    yield Problem("segment_matching", _shape(*sizes), [pred], randn(device, scenes, seed=3), rivals, modes)


def _rivals(
    function: Callable[[str], Tensor], reference: Callable[[Tensor], Tensor], given: Tensor, device: str, backend: str
) -> Iterator[Rival]:
    # Compiled deterministically too it would take twice the time, and neither form has an atomic to give up.
    yield Rival("reference", lambda: lambda: function("reference"))
    if device == "cuda" or dispatch.INTERPRETED:
        yield Rival(OURS, lambda: lambda: function("triton"), deterministic=True)

    def build() -> Callable[[], Tensor]:
        call = compiled(reference, backend)
        return lambda: call(given)

    yield Rival("torch.compile", build, settings=gpu_timing.repeatable_backward, slow=True)


def goals(rows: list[dict]) -> list[str]:
    """The goals of Sinkhorn, each beside what was measured."""
    shape = _shape(*_SIZES)
    lines = []
    for mode in MODES:
        op = f"sinkhorn {mode}"
        speed = ratio(best(rows, op, shape, "torch.compile"), best(rows, op, shape, OURS))
        lines.append(goal(f"{op}, {shape}, speed / torch.compile", speed, 5, " x"))
    for mode, bound in zip(GRAPH_MODES, (12, 16)):
        found = best(rows, f"sinkhorn {mode}", shape, OURS)
        found = None if found is None else found * 1e3
        lines.append(goal(f"sinkhorn {mode}, {shape}", found, bound, " us", at_least=False))
    return lines


def main(argv: list[str] | None = None) -> int:
    """Measures; without CUDA it says so and returns 0."""
    return gpu_timing.main("transport", __doc__, problems, goals, argv)


if __name__ == "__main__":
    raise SystemExit(main())

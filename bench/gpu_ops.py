"""Times the operations and the model on a CUDA device: ``python -m wireframe.bench.gpu_ops``.

Every implementation that is built for an operation runs on the same inputs in turn with its rivals. A call is
timed by CUDA events behind a write of 256 MiB, so it starts from a cold L2 cache; launches of the host count
where they are slower than the device.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wireframe.bench.timing import (
    Case,
    append_rows,
    describe_machine,
    heading,
    measure,
    milliseconds,
    result,
    wall_ms,
)
from wireframe.kernels import dispatch, ops
from wireframe.perceiver import Perceiver, PerceiverConfig
from wireframe.train.config import LossConfig
from wireframe.train.loss import training_loss

_WARMUP = 5


class Sizes(NamedTuple):
    """Shapes; the defaults are those of the published recipe and of inference."""

    attention: tuple[tuple[int, int, int], ...] = ((1, 256, 4096), (32, 256, 2048))
    scenes: int = 64
    segments: int = 64
    model: PerceiverConfig = PerceiverConfig()
    inference: tuple[int, int] = (1, 4096)
    training: tuple[int, int] = (32, 2048)


SMALL = Sizes(
    ((2, 8, 33),), 2, 8,
    PerceiverConfig(hidden=32, ff=48, latent_tokens=8, latent_layers=2, decoder_layers=1, segments=8),
    (1, 64), (2, 32),
)  # fmt: skip


class CudaClock:
    """Milliseconds of one call by CUDA events, from a cold L2 cache."""

    def __init__(self) -> None:
        self._flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")

    def __call__(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def groups(device: str, sizes: Sizes) -> Iterator[list[Case]]:
    """Rivals of one operation, mode and shape."""
    for shape in sizes.attention:
        yield from _attention(device, *shape)
    yield from _transport(device, sizes.scenes, sizes.segments)
    yield from _model(device, sizes)


def _randn(device: str, *shape: int, seed: int = 0) -> Tensor:
    # Drawn on the CPU, so that every device gets the same numbers.
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _third(device: str, scenes: int, segments: int) -> Tensor:
    """bool [scenes, segments]: the first third is real, the rest is padding."""
    return torch.arange(segments, device=device).expand(scenes, -1) < max(segments // 3, 1)


def _both_modes(
    op: str, shape: str, inputs: list[Tensor], calls: dict[str, Callable]
) -> Iterator[list[Case]]:
    """Forward without a graph, then forward and backward to ``inputs``, each with all implementations."""

    def forward(call: Callable) -> None:
        with torch.no_grad():
            call()

    def backward(call: Callable) -> None:
        call().sum().backward(inputs=inputs)
        for tensor in inputs:
            tensor.grad = None

    for mode, run in (("forward", forward), ("forward + backward", backward)):
        yield [Case(f"{op} {mode}", name, shape, lambda r=run, c=call: r(c)) for name, call in calls.items()]


def _attention(device: str, batch: int, queries: int, keys: int) -> Iterator[list[Case]]:
    heads, kv_heads, dim = 4, 2, 64
    q = _randn(device, batch, queries, heads, dim).requires_grad_()
    k, v = (_randn(device, batch, keys, kv_heads, dim, seed=seed).requires_grad_() for seed in (1, 2))
    log_scale = torch.full((heads,), 2.0, device=device, requires_grad=True)
    mask = _randn(device, batch, keys, seed=3) < 1.5

    def call(impl: str) -> Tensor:
        return ops.qk_norm_attention(q, k, v, log_scale, mask, impl=impl)

    calls = {impl: (lambda i=impl: call(i)) for impl in dispatch.BUILT["qk_norm_attention"]}
    shape = f"{batch} x {heads}/{kv_heads} x {queries} x {keys} x {dim}, mask, fp32"
    yield from _both_modes("qk_norm_attention", shape, [q, k, v, log_scale], calls)


def _transport(device: str, scenes: int, segments: int) -> Iterator[list[Case]]:
    pred = (0.3 * _randn(device, scenes, segments, 2, 3)).requires_grad_()
    target = 0.3 * _randn(device, scenes, segments, 2, 3, seed=1)
    mask = _third(device, scenes, segments)
    weights = LossConfig().weights
    cost = ops.segment_cost(pred, target, weights=weights).detach().requires_grad_()
    shape = f"{scenes} x {segments} x {segments}, 20 iterations, fp32"

    def plan(impl: str) -> Tensor:
        return ops.sinkhorn(cost, mask, impl=impl).exp()

    def loss(impl: str) -> Tensor:
        return ops.segment_matching(pred, target, mask, weights=weights, impl=impl)[0]

    for op, inputs, call in (("sinkhorn", [cost], plan), ("segment_matching", [pred], loss)):
        calls = {impl: (lambda c=call, i=impl: c(i)) for impl in dispatch.BUILT[op]}
        yield from _both_modes(op, shape, inputs, calls)


def _model(device: str, sizes: Sizes) -> Iterator[list[Case]]:
    model = Perceiver(sizes.model).to(device)
    small, large = (random_points(device, *shape) for shape in (sizes.inference, sizes.training))
    scenes, segments = sizes.training[0], sizes.model.segments
    target = 0.3 * _randn(device, scenes, segments, 2, 3, seed=1)
    mask = _third(device, scenes, segments)

    def forward() -> None:
        with torch.inference_mode():
            model.eval()(small)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        training_loss(model.train()(large), target, mask, LossConfig(), 0.1).total.backward()

    one, many = (f"{scenes} x {points}, fp32" for scenes, points in (sizes.inference, sizes.training))
    yield [Case("Perceiver forward", "torch eager", one, forward)]
    yield [Case("Perceiver forward + backward", "torch eager", f"{many}, with the loss", step)]


def random_points(device: str, scenes: int, points: int) -> dict[str, Tensor]:
    """A batch of points with random labels."""
    g = torch.Generator().manual_seed(0)
    shape = (scenes, points)
    batch = {
        "xyz_norm": 0.3 * torch.randn(*shape, 3, generator=g),
        "class_id": torch.randint(0, 13, shape, generator=g).to(torch.uint8),
        "source": torch.randint(0, 2, shape, generator=g).to(torch.uint8),
        "mask": torch.rand(shape, generator=g) < 0.95,
        "behind": torch.randint(-1, 28, shape, generator=g).to(torch.int16),
        "n_views_voted": torch.randint(1, 9, shape, generator=g).to(torch.uint8),
        "vote_frac": torch.rand(shape, generator=g),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def peak_mib(run: Callable[[], object], device: str) -> float | None:
    """Memory that one call adds at its peak, MiB; None on the CPU."""
    if device == "cpu":
        return None
    # The first call also allocates what libraries keep.
    run()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints a line a case, appends the rows to ``--out``; without CUDA says so and returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m wireframe.bench.gpu_ops", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--repeats", type=int, default=20, help="rounds of each part (default 20)")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu: wall clock, to try it out"
    )
    parser.add_argument("--small", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--out", metavar="FILE", help="append one JSON line a case to this file")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return 0
    clock = wall_ms if arguments.device == "cpu" else CudaClock()
    machine = describe_machine(arguments.device)
    print(heading(machine), flush=True)
    for rivals in groups(arguments.device, SMALL if arguments.small else Sizes()):
        peaks = [peak_mib(case.run, arguments.device) for case in rivals]
        for case, peak, times in zip(rivals, peaks, measure(rivals, arguments.repeats, clock, _WARMUP)):
            deterministic = torch.are_deterministic_algorithms_enabled()
            row = result(case, times, machine, peak_mib=peak, deterministic=deterministic)
            if arguments.out:
                append_rows(arguments.out, [row])
            low, middle, high = (milliseconds(row[f"{name}_ms"]) for name in ("p20", "p50", "p80"))
            memory = "" if peak is None else f", {peak} MiB"
            print(f"{case.op}, {case.provider}, {case.shape}: {middle} ms ({low}-{high}){memory}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

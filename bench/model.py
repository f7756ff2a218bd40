"""Times the model on a CUDA device: ``python -m wireframe.bench.model``.

Forward at inference and forward + backward with the loss, with the operations that ``impl="auto"`` takes. A call is
timed by CUDA events behind a write of 256 MiB, so it starts from a cold L2 cache; launches of the host count where they
are slower than the device. The operations have benchmarks of their own: ``attention.py`` and ``transport.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wireframe.bench.gpu_timing import clock, peak_mib, randn, rounds
from wireframe.bench.timing import (
    Case,
    append_rows,
    describe_machine,
    heading,
    measure,
    milliseconds,
    result,
)
from wireframe.kernels.determinism import prepare_process
from wireframe.perceiver import Perceiver, PerceiverConfig
from wireframe.train.config import LossConfig
from wireframe.train.loss import scene_losses


class Sizes(NamedTuple):
    """The model, and (scenes, points) of inference and of a training step; the defaults are the published ones."""

    model: PerceiverConfig = PerceiverConfig()
    inference: tuple[int, int] = (1, 4096)
    training: tuple[int, int] = (32, 2048)


SMALL = Sizes(
    PerceiverConfig(hidden=32, ff=48, latent_tokens=8, latent_layers=2, decoder_layers=1, segments=8),
    (1, 64), (2, 32),
)  # fmt: skip


def cases(device: str, sizes: Sizes) -> Iterator[Case]:
    """Inference on one scene, then a training step without the optimiser."""
    model = Perceiver(sizes.model).to(device)
    small, large = (random_points(device, *shape) for shape in (sizes.inference, sizes.training))
    scenes, segments = sizes.training[0], sizes.model.segments
    target = 0.3 * randn(device, scenes, segments, 2, 3, seed=1)
    # The first third is real, the rest is padding.
    mask = torch.arange(segments, device=device).expand(scenes, -1) < max(segments // 3, 1)

    def forward() -> None:
        with torch.inference_mode():
            model.eval()(small)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        scene_losses(model.train()(large), target, mask, LossConfig(), 0.1).total.mean().backward()

    one, many = (f"{scenes} x {points}, fp32" for scenes, points in (sizes.inference, sizes.training))
    yield Case("Perceiver forward", "torch eager", one, forward)
    yield Case("Perceiver forward + backward", "torch eager", f"{many}, with the loss", step)


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


def main(argv: list[str] | None = None) -> int:
    """Measures, prints a line a case, appends the rows to ``--out``; without CUDA says so and returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m wireframe.bench.model", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--repeats", type=int, default=20, help="rounds of each part (default 20)")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu: wall clock, to try it out"
    )
    parser.add_argument("--small", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--out", metavar="FILE", help="append one JSON line a case to this file")
    arguments = parser.parse_args(argv)
    prepare_process()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return 0
    machine = describe_machine(arguments.device)
    print(heading(machine), flush=True)
    ticks = clock(arguments.device)
    for case in cases(arguments.device, SMALL if arguments.small else Sizes()):
        peak = peak_mib(case.run, arguments.device)
        (times,) = measure([case], arguments.repeats, ticks, **rounds(arguments.small))
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

"""Times the model at inference on a CUDA device: ``python -m wireframe.bench.model``.

In float32, as ``predict`` runs it, with the operations that ``impl="auto"`` takes: our Triton kernels, called one by
one. A call is timed by CUDA events behind a write of 256 MiB, so it starts from a cold L2 cache; launches of the host
count where they are slower than the device. The operations have benchmarks of their own, ``attention.py`` and
``transport.py``, and so have the steps of training: ``wireframe bench step``.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor

from wireframe.bench.gpu_timing import clock, peak_mib, rounds
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


class Sizes(NamedTuple):
    """The model and the points of its scene; the defaults are the published ones."""

    model: PerceiverConfig = PerceiverConfig()
    points: int = 4096


SMALL = Sizes(
    PerceiverConfig(hidden=32, ff=48, latent_tokens=8, latent_layers=2, decoder_layers=1, segments=8), 64
)  # fmt: skip


def inference(device: str, sizes: Sizes) -> Case:
    """One scene at inference."""
    model, points = Perceiver(sizes.model).to(device).eval(), random_points(device, sizes.points)

    def forward() -> None:
        with torch.inference_mode():
            model(points)

    return Case("Perceiver forward", "ours, eager, fp32", f"1 x {sizes.points}", forward)


def random_points(device: str, points: int) -> dict[str, Tensor]:
    """A scene of points with random labels."""
    g = torch.Generator().manual_seed(0)
    shape = (1, points)
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
    """Measures, prints a line, appends the row to ``--out``; without CUDA says so and returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m wireframe.bench.model", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--repeats", type=int, default=20, help="rounds (default 20)")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu: wall clock, to try it out"
    )
    parser.add_argument("--small", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--out", metavar="FILE", help="append a JSON line to this file")
    arguments = parser.parse_args(argv)
    prepare_process()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return 0
    machine = describe_machine(arguments.device)
    print(heading(machine), flush=True)
    case = inference(arguments.device, SMALL if arguments.small else Sizes())
    peak = peak_mib(case.run, arguments.device)
    (times,) = measure([case], arguments.repeats, clock(arguments.device), **rounds(arguments.small))
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

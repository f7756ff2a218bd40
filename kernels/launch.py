"""What a Triton kernel is launched with, as data: the same record is run on a device and compiled ahead of time.

An operation plans its launches from shapes alone (``meta`` tensors will do) and the architecture of the device;
``run`` executes them in order on the current stream. ``bench/static.py`` compiles the same records without a GPU.
Nothing is tuned, measured or chosen at run time: equal shapes on equal devices launch equal kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

# Compute capabilities that have a column of their own in the tile tables.
ARCHITECTURES = (80, 86, 89, 90)


class Launch(NamedTuple):
    """One launch.

    arguments: every parameter of the kernel by name, tensors, numbers, None and constexprs alike. fp_fusion: whether
    a product and a sum may be rounded as one, which the CPU and other kernels need not repeat. max_registers: of a
    thread, where the compiler would take more and leave room for fewer warps.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int = 1
    fp_fusion: bool = True
    max_registers: int | None = None


def run(launches: Iterable[Launch]) -> None:
    """Launches in order, on the device that holds their tensors and its current stream."""
    for launch in launches:
        # A grid without programs has nothing to do, and CUDA refuses it.
        if not all(launch.grid):
            continue
        tensor = next(value for value in launch.arguments.values() if isinstance(value, torch.Tensor))
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        if not launch.fp_fusion:
            options["enable_fp_fusion"] = False
        if launch.max_registers is not None:
            options["maxnreg"] = launch.max_registers
        with torch.cuda.device_of(tensor):
            launch.kernel[launch.grid](**launch.arguments, **options)


def architecture(device: torch.device) -> int:
    """The column of the tile tables for a device: 80, 86, 89 or 90.

    A device without a column takes that of the largest one whose tiles fit its shared memory: datacentre parts after
    Hopper that of sm_90, all others that of sm_89. Interpreted kernels on the CPU take sm_89.
    """
    if device.type != "cuda":
        return 89
    major, minor = torch.cuda.get_device_capability(device)
    number = 10 * major + minor
    if number in ARCHITECTURES:
        return number
    return 90 if number in (100, 101, 103) else 89

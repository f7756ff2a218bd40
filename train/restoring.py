"""Between a checkpoint and what it is loaded into: tensors of model and optimiser, architecture, data, machine."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import wireframe
from wireframe.errors import CheckpointError, one_line
from wireframe.perceiver import PerceiverConfig
from wireframe.train.config import TrainConfig
from wireframe.train.data import set_for
from wireframe.train.optimizer import FlatAdamW

# Settings that change what is written down, kept or scored, not what is computed.
_FREE_KEYS = (
    "description", "log_every", "save_every", "keep_checkpoints", "keep_every", "max_bad_steps", "graph", "evaluation",
)  # fmt: skip

# Settings of a model that its weights do not show.
_NOT_ARCHITECTURE = ("dropout", "num_points", "cross_attn_interval")


def check_config(label: str, theirs: dict, config: TrainConfig) -> None:
    """A CheckpointError that names the first settings in which a checkpoint's run computed something else."""
    a, b = ({k: v for k, v in values.items() if k not in _FREE_KEYS} for values in (theirs, config.to_dict()))
    differing = [f"{name} is {x}, here {y}" for name, x, y in differences(a, b)]
    if differing:
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise CheckpointError(
            one_line(f"{label} was trained with another configuration ({'; '.join(differing[:4])}{more}", 900)
            + "); choose another --out"
        )


def check_data(label: str, theirs: dict, ours: Mapping[str, str], config: TrainConfig, step: int) -> None:
    """A CheckpointError where the run would go on with other rows than it began with.

    A set that is missing on one side is none of its business, unless the stage at ``step`` has begun with it: stages
    may be run one after the other, each with its own data.

    Args:
        theirs, ours: fingerprints by number of points.
    """
    differing = [points for points in ours if points in theirs and theirs[points] != ours[points]]
    if step < config.steps:
        index, local = config.stage_at(step)
        wanted = config.stages[index].points
        used, before = (set_for(wanted, _numbers(data), config.augment.resample) for data in (ours, theirs))
        if local and used != before:
            differing.append(str(used or wanted))
    if differing:
        raise CheckpointError(
            f"{label} was trained on other data (rows of {differing[0]} points); choose another --out"
        )


def _numbers(data: Mapping[str, str]) -> list[int]:
    """Numbers of points of the sets in a checkpoint's file; keys that are none are no set."""
    return [int(key) for key in data if key.isascii() and key.isdigit() and len(key) < 10]


def restore(optimizer: FlatAdamW, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], label: str) -> None:
    """Fills the model and its optimiser, on their device; with a CheckpointError neither is touched.

    Args:
        moments: what ``FlatAdamW.state`` gave; empty for an optimiser that begins anew.
    """
    _check_names(weights, optimizer.model.state_dict(), f"{label} does not fit the model")
    if moments:
        _check_names(moments, optimizer.state(), f"{label} does not fit the optimiser")
    optimizer.load(weights, moments)


def _check_names(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], problem: str) -> None:
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected or not _alike(found[name], expected[name]):
            raise CheckpointError(one_line(f"{problem}: {name}", 600))


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def check_architecture(label: str, theirs: PerceiverConfig, ours: PerceiverConfig) -> None:
    """A CheckpointError that names each size that differs; the interval counts by the layers it gives."""
    a, b = ({k: v for k, v in c.to_dict().items() if k not in _NOT_ARCHITECTURE} for c in (theirs, ours))
    differing = [f"{name} {x}, the configuration model.{name} {y}" for name, x, y in differences(a, b)]
    if theirs.latent_layers == ours.latent_layers:
        reading = [[i for i in range(c.latent_layers) if c.reads_points(i)] for c in (theirs, ours)]
        if reading[0] != reading[1]:
            name = "cross_attn_interval"
            differing.append(f"{name} {getattr(theirs, name)}, the configuration model.{name} {getattr(ours, name)}")
    if differing:
        raise CheckpointError(f"{label} is of another architecture: it has {'; '.join(differing)}")


def differences(a: Any, b: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value in a, value in b) of everything that differs between two values read from JSON."""
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        a, b = ({str(i): value for i, value in enumerate(values)} for values in (a, b))
    if not (isinstance(a, dict) and isinstance(b, dict)):
        if isinstance(a, bool) is not isinstance(b, bool) or a != b:
            yield prefix.removesuffix("."), _shown(a), _shown(b)
        return
    for name in [*b, *(name for name in a if name not in b)]:
        yield from differences(a.get(name), b.get(name), f"{prefix}{name}.")


def _shown(value: Any) -> str:
    return one_line(json.dumps(value), 60)


def environment(optimizer: FlatAdamW) -> dict:
    """Versions, device, threads and precision: what the bits depend on besides configuration and data."""
    device = optimizer.master.device
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "wireframe": wireframe.__version__,
        "torch": torch.__version__,
        "triton": triton,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "precision": str(optimizer.dtype).removeprefix("torch."),
    }


def environment_changes(theirs: dict, optimizer: FlatAdamW) -> list[str]:
    """What of another environment, read from a checkpoint, is not as here and may change bits; one text each."""
    # Python computes nothing of it, and with the model on a GPU the CPU's threads share no sum.
    free = ("python", "threads") if optimizer.master.is_cuda else ("python",)
    a, b = ({k: v for k, v in values.items() if k not in free} for values in (theirs, environment(optimizer)))
    return [f"{name} {x} (here {y})" for name, x, y in differences(a, b)]


def _processor() -> str:
    """The CPU by name, with the instructions torch uses on it."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            name = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"

"""Checkpoints of a run: one folder a step, complete or not there; nothing is ever unpickled.

``OUT/checkpoints/step-00001000/`` holds ``model.safetensors``, ``optimizer.safetensors`` and ``state.json`` (step,
configuration, versions, SHA-256 of the two tensor files).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from wireframe.errors import CheckpointError
from wireframe.files import sha256
from wireframe.perceiver import Perceiver
from wireframe.train.config import TrainConfig

_TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")


def save(
    out: Path,
    step: int,
    model: Perceiver,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    data: dict[str, str],
) -> Path:
    """Writes the checkpoint of ``step`` and drops those beyond ``config.keep_checkpoints``."""
    from safetensors.torch import save_file

    folder = out / "checkpoints"
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, temporary / _TENSOR_FILES[0])
        save_file(_optimizer_tensors(model, optimizer), temporary / _TENSOR_FILES[1])
        state = {
            "step": step,
            "config": config.to_dict(),
            "data": data,
            "environment": _environment(),
            "sha256": {name: sha256(temporary / name) for name in _TENSOR_FILES},
        }
        (temporary / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True))
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _checkpoints(out)[: -config.keep_checkpoints]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def latest(out: Path, warn: Callable[[str], None] = _warn) -> Path | None:
    """The newest checkpoint whose hashes hold; broken ones are reported through ``warn`` and passed over."""
    for path in reversed(_checkpoints(out)):
        try:
            hashes = json.loads((path / "state.json").read_text())["sha256"]
            if all(hashes[name] == sha256(path / name) for name in _TENSOR_FILES):
                return path
            warn(f"checkpoint {path} is corrupt (its SHA-256 differs); passing it over")
        except (OSError, ValueError, KeyError, TypeError) as problem:
            warn(f"checkpoint {path} is incomplete ({problem}); passing it over")
    return None


def load(
    path: Path,
    model: Perceiver,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    data: dict[str, str],
    warn: Callable[[str], None] = _warn,
) -> int:
    """Restores model and optimiser in place; returns the number of finished steps.

    Another torch, NumPy or thread count is reported through ``warn``: training goes on, with other bits than an
    uninterrupted run.

    Args:
        data: fingerprint of the training set by number of points.

    Raises:
        CheckpointError: the checkpoint belongs to another configuration or other data.
    """
    from safetensors.torch import load_file

    state = json.loads((path / "state.json").read_text())
    ours = json.loads(json.dumps(config.to_dict()))
    differing = [key for key in ours if key not in _FREE_KEYS and state["config"].get(key) != ours[key]]
    if differing:
        raise CheckpointError(
            f"{path} was trained with another configuration ({', '.join(differing)}); choose another --out"
        )
    if state["data"] != data:
        raise CheckpointError(f"{path} was trained on other data; choose another --out")
    if state["environment"] != _environment():
        warn(f"{path} was made with {state['environment']}, this is {_environment()}: the bits will differ")
    model.load_state_dict(load_file(path / _TENSOR_FILES[0]))
    tensors = load_file(path / _TENSOR_FILES[1])
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            key: tensors[f"{key}:{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}:{name}" in tensors
        }
    return int(state["step"])


def _environment() -> dict:
    return {"torch": torch.__version__, "numpy": np.__version__, "threads": torch.get_num_threads()}


# Settings that change what is written down, not what is computed.
_FREE_KEYS = ("description", "log_every", "save_every", "keep_checkpoints")


def _optimizer_tensors(model: Perceiver, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{key}:{name}": tensor.contiguous()
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }


def _checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints of a run: one folder a step, complete or not there; nothing is ever unpickled.

``OUT/checkpoints/step-00001000/`` holds ``model.safetensors``, ``optimizer.safetensors`` (the count of updates ``step``
and AdamW's moments as ``exp_avg:NAME`` and so on), ``state.json`` (step, configuration, fingerprints of the data,
versions) and ``SHA256SUMS``, which ``sha256sum -c`` reads too. A checkpoint is written beside its place and renamed
when it is on the disk, and older ones are dropped only then: whatever happens, those that were there stay whole.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from wireframe.checkpoint import fit_state, read_checkpoint, tensor_sha256
from wireframe.errors import CheckpointError, ConfigError, one_line
from wireframe.files import sync
from wireframe.hub import is_hub
from wireframe.perceiver import Perceiver, PerceiverConfig
from wireframe.pretrained import WEIGHTS, export_model, read_weights
from wireframe.train.checkpoint_files import (
    MODEL,
    OPTIMIZER,
    STATE,
    check_files,
    holds,
    is_checkpoint,
    read_files,
    write_files,
)
from wireframe.train.config import TrainConfig
from wireframe.train.optimizer import FlatAdamW
from wireframe.train.restoring import (
    check_architecture,
    check_config,
    check_data,
    environment,
    environment_changes,
    restore,
)

_NAME = re.compile(r"step-(\d{8,18})", re.ASCII)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_STRAY = re.compile(r"\.step-\d+\.(new|old)", re.ASCII)


class State(NamedTuple):
    """Where a run stands besides its tensors.

    step: finished steps. bad_steps: how many steps in a row, up to now, were skipped. start: what the run began from,
    as ``start_from`` gives it; None for new weights.
    """

    step: int
    bad_steps: int
    start: dict | None


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def folder(out: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` stands in the run ``out``, there or not."""
    return Path(out) / "checkpoints" / f"step-{step:08d}"


def save(
    out: Path,
    state: State,
    optimizer: FlatAdamW,
    config: TrainConfig,
    data: Mapping[str, str],
) -> Path:
    """Writes the checkpoint of ``state.step``, unless an equal one is there, and drops those not to keep.

    One of that step with other contents is replaced: it may be of another history, passed over when the run was
    resumed. Kept are the newest ``config.keep_checkpoints`` valid ones up to this step, every one at a multiple of
    ``config.keep_every``, and the last one of each stage; all while steps are being skipped.

    Args:
        data: fingerprint of the training set by number of points.

    Raises:
        CheckpointError: it cannot be written (a full disk); the older ones are as they were.
    """
    final = folder(out, state.step)
    try:
        _make_parent(final.parent)
        contents = {
            MODEL: _encode(optimizer.model.state_dict()),
            OPTIMIZER: _encode(optimizer.state()),
            STATE: _encode_state(state, config, data, environment(optimizer)),
        }
        if not holds(final, contents):
            _put(final, contents)
    except OSError as problem:
        advice = "make room" if problem.errno in _NO_ROOM else "mend that"
        raise CheckpointError(
            f"cannot save step {state.step} in {final.parent}: {problem.strerror}; the older checkpoints are as they "
            f"were: {advice} and run the same command again"
        ) from None
    # What made the last steps not finite may be older than they are: the way back stays until one is good again.
    if not state.bad_steps:
        _drop_old(Path(out), state.step, config)
    return final


def latest(out: Path, warn: Callable[[str], None] = _warn) -> Path | None:
    """The newest checkpoint of a run whose files agree with their SHA-256; others are reported and passed over.

    Args:
        warn: gets one line for every checkpoint passed over.
    """
    for _, path in reversed(_checkpoints(Path(out))):
        problem = _problem(path)
        if problem is None:
            return path
        warn(f"{problem}; passing it over")
    return None


def load(
    path: Path,
    optimizer: FlatAdamW,
    config: TrainConfig,
    data: Mapping[str, str],
    warn: Callable[[str], None] = _warn,
) -> State:
    """Restores model and optimiser in place, on the model's device, and says where the run stands.

    Other versions, another device or thread count are reported through ``warn``: training goes on, with other bits
    than an uninterrupted run.

    Args:
        data: fingerprint of the training set by number of points.

    Raises:
        CheckpointError: the checkpoint is corrupt, does not fit the model, or belongs to another configuration or
            other data. Model and optimiser are then as they were.
    """
    state, weights, moments = read_files(path)
    check_config(str(path), state["config"], config)
    check_data(str(path), state["data"], data, config, state["step"])
    restore(optimizer, weights, moments, f"checkpoint {path}")
    changed = environment_changes(state["environment"], optimizer)
    if changed:
        warn(one_line(f"{path} was made with {', '.join(changed)}: the bits will differ", 600))
    return State(state["step"], state["bad_steps"], state["start"])


def start_from(source: str | os.PathLike, optimizer: FlatAdamW) -> dict:
    """Puts the weights of ``source`` into the model and, from a run's checkpoint, the state of its optimiser too.

    Args:
        source: a checkpoint folder of a run or the run itself (its newest valid one), a model folder, a published
            ``.pt``, or ``hf://owner/repo/file.pt``.

    Returns:
        {"source": its name without folders, "sha256": of the weights (``tensor_sha256``), "optimizer": whether the
        optimiser's state was there}.

    Raises:
        CheckpointError: it cannot be read, or its architecture is not the model's; both values are named.
    """
    path = source if is_hub(os.fspath(source)) else _newest(Path(source))
    name = os.fspath(source) if is_hub(os.fspath(source)) else Path(path).name
    label = f"checkpoint {os.fspath(path)}"
    moments: dict[str, Tensor] | None = None
    if isinstance(path, Path) and is_checkpoint(path):
        state, weights, moments = read_files(path)
        try:
            architecture = PerceiverConfig.from_dict(state["config"].get("model"))
        except ConfigError as problem:
            raise CheckpointError(one_line(f"{label}: {problem}", 600)) from None
    else:
        loaded = Perceiver.from_checkpoint(path)
        architecture, weights = loaded.config, loaded.state_dict()
    model = optimizer.model
    check_architecture(label, architecture, model.config)
    weights = fit_state(weights, model.state_dict(), label)
    infinite = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if infinite:
        raise CheckpointError(f"{label} holds values that are not finite, first in {infinite[0]}; take another one")
    restore(optimizer, weights, moments or {}, label)
    return {"source": name, "sha256": tensor_sha256(weights), "optimizer": moments is not None}


def export(model: Perceiver, folder: str | os.PathLike, config: TrainConfig, step: int) -> None:
    """Writes ``model.safetensors`` and ``config.json``, and ``checkpoint.pt`` in the published naming, atomically.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    export_model(model, Path(folder), {"seed": config.seed, "step": step})


class Stored(NamedTuple):
    """A checkpoint as it lies on the disk.

    path: where. state: what ``state.json`` says; None where there is none. tensors: "model", and "optimizer" where it
    has one: name to tensor, on the CPU, in the stored dtypes.
    """

    path: Path
    state: dict | None
    tensors: dict[str, dict[str, Tensor]]


def read(source: str | os.PathLike, warn: Callable[[str], None] = _warn) -> Stored:
    """All tensors of a checkpoint on this machine.

    Args:
        source: a checkpoint folder of a run or the run itself (its newest valid one), a model folder, a safetensors
            file or a published ``.pt``.

    Raises:
        CheckpointError: nothing there can be read as a checkpoint.
    """
    path = _newest(Path(source), warn)
    if is_checkpoint(path):
        state, weights, moments = read_files(path)
        return Stored(path, state, {"model": weights, "optimizer": moments})
    if path.is_dir():
        if not (path / WEIGHTS).is_file():
            raise CheckpointError(f"{path} holds no checkpoint: there is neither {STATE} nor {WEIGHTS} in it")
        return Stored(path, None, {"model": read_weights(path / WEIGHTS)})
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    weights = read_weights(path) if path.suffix == ".safetensors" else read_checkpoint(path).state
    return Stored(path, None, {"model": weights})


def tensor_hashes(source: str | os.PathLike) -> dict[str, str]:
    """SHA-256 of the tensors of ``source`` ("model", and "optimizer" where it has one), see ``tensor_sha256``.

    Neither clock nor host, path or file format is part of them.
    """
    return {section: tensor_sha256(tensors) for section, tensors in read(source).tensors.items()}


def _newest(path: Path, warn: Callable[[str], None] = _warn) -> Path:
    """The newest valid checkpoint where ``path`` is a run, else ``path``."""
    if is_checkpoint(path) or not (path / "checkpoints").is_dir():
        return path
    found = latest(path, warn)
    if found is None:
        raise CheckpointError(f"the run {path} holds no valid checkpoint")
    return found


def _checkpoints(out: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything named like a checkpoint, by step."""
    parent = out / "checkpoints"
    try:
        names = os.listdir(parent)
    except FileNotFoundError:
        return []
    except OSError as problem:
        raise CheckpointError(f"{parent} cannot be read: {problem.strerror}") from None
    found = ((_NAME.fullmatch(name), parent / name) for name in names)
    return sorted((int(match.group(1)), path) for match, path in found if match)


def _problem(path: Path) -> str | None:
    """Why the folder is not the whole checkpoint of the step in its name; None where it is."""
    try:
        step = check_files(path)["step"]
    except CheckpointError as problem:
        return str(problem)
    return None if path.name == f"step-{step:08d}" else f"checkpoint {path} is corrupt: it is that of step {step}"


def _make_parent(parent: Path) -> None:
    """The folder of checkpoints, rid of what a save that was killed had left."""
    if not parent.is_dir():
        parent.mkdir(parents=True, exist_ok=True)
        sync(parent.parent)
    for name in os.listdir(parent):
        if _STRAY.fullmatch(name):
            _remove(parent / name)


def _put(final: Path, contents: dict[str, bytes]) -> None:
    new, old = (final.with_name(f".{final.name}.{kind}") for kind in ("new", "old"))
    try:
        new.mkdir()
        write_files(new, contents)
        if os.path.lexists(final):
            # Corrupt, or of another history: a folder with files in it cannot be renamed over.
            os.rename(final, old)
        os.rename(new, final)
        sync(final.parent)
    finally:
        _remove(new)
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _drop_old(out: Path, step: int, config: TrainConfig) -> None:
    ends = {config.stage_start(index + 1) for index in range(len(config.stages))}
    newest = 0
    for number, path in reversed(_checkpoints(out)):
        if number > step:
            # Passed over when the run was resumed; training comes there again.
            continue
        if newest < config.keep_checkpoints and (number == step or _problem(path) is None):
            newest += 1
        elif number not in ends and not (config.keep_every and number % config.keep_every == 0):
            # Out of sight first: a kill in the middle must not leave half a checkpoint under its name.
            stray = path.with_name(f".{path.name}.old")
            try:
                os.rename(path, stray)
                _remove(stray)
            except OSError:
                # The next save comes by again.
                continue


def _encode(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save as encode

    return encode({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()})


def _encode_state(state: State, config: TrainConfig, data: Mapping[str, str], environment: dict) -> bytes:
    content = {**state._asdict(), "config": config.to_dict(), "data": dict(data), "environment": environment}
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()

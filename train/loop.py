"""The training loop: every step is a function of (configuration, data, seed, step), so a resumed run equals an
uninterrupted one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from wireframe import hashing
from wireframe.errors import ConfigError, WireframeError
from wireframe.files import atomic_write
from wireframe.kernels.determinism import deterministic
from wireframe.perceiver import Perceiver
from wireframe.train import checkpoints
from wireframe.train.config import OptimizerConfig, StageConfig, TrainConfig
from wireframe.train.data import TrainingSet, load_training_set
from wireframe.train.loss import training_loss


def train(
    config: TrainConfig,
    data: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    progress: bool = True,
    stop_after: int | None = None,
) -> Path:
    """Trains all stages, resuming from the newest valid checkpoint in ``out``.

    Args:
        config: the run.
        data: sampled sets (Parquet files, folders, ``hf://``); each stage takes the one with its number of points.
        out: folder of ``checkpoints/``, ``log.jsonl`` and, at the end, ``model/`` (safetensors + config.json).
        progress: whether to show a progress bar on stderr.
        stop_after: end early, after this many steps of the whole run, with a checkpoint (for tests and time slots).

    Returns:
        The folder of the final model, or of the last checkpoint when ended early.

    Raises:
        ConfigError: no set has a stage's number of points. CheckpointError: ``out`` belongs to another configuration.
        WireframeError: the loss is not finite.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    sets: dict[int, TrainingSet] = {}
    for source in data:
        found = load_training_set(source, config.model.segments)
        if found.points in sets:
            raise ConfigError(f"two --data have rows of {found.points} points; give one set for each number of points")
        sets[found.points] = found
    fingerprints = {str(points): found.fingerprint() for points, found in sorted(sets.items())}
    for stage in config.stages:
        if stage.points not in sets:
            raise ConfigError(f"stage {stage.name} wants rows of {stage.points} points; --data has {sorted(sets)}")
    # Dropout draws from torch's generator; the caller's is given back as it was.
    with deterministic("cpu"), torch.random.fork_rng(devices=[]):
        model, optimizer = _start(config)
        found = checkpoints.latest(out)
        step = checkpoints.load(found, model, optimizer, config, fingerprints) if found else 0
        last = min(config.steps, stop_after or config.steps)
        with _Log(out / "log.jsonl", step, config, last, progress) as log:
            while step < last:
                losses = _step(config, sets, model, optimizer, step)
                step += 1
                log.write(step, losses)
                if step % config.save_every == 0 or step == last:
                    found = checkpoints.save(out, step, model, optimizer, config, fingerprints)
    if step < config.steps:
        return found
    model.eval().save_pretrained(out / "model")
    return out / "model"


def _start(config: TrainConfig) -> tuple[Perceiver, torch.optim.Optimizer]:
    model = Perceiver(config.model, seed=config.seed).train()
    return model, make_optimizer(model, config.optimizer)


def make_optimizer(model: Perceiver, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with the confidence head's own weight decay."""
    head = [p for name, p in model.named_parameters() if ".conf_head." in name]
    rest = [p for name, p in model.named_parameters() if ".conf_head." not in name]
    groups = [
        {"params": rest, "weight_decay": config.weight_decay},
        {"params": head, "weight_decay": config.conf_head_weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), foreach=True)


def _step(
    config: TrainConfig,
    sets: dict[int, TrainingSet],
    model: Perceiver,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> dict[str, float]:
    index, local = config.stage_at(step)
    stage = config.stages[index]
    inputs, target, target_mask = sets[stage.points].batch(
        config.seed, index, step, local * stage.batch_size, stage.batch_size, config.augment
    )
    # Dropout masks are a function of (seed, step), whatever ran before in this process.
    torch.manual_seed(int(hashing.hash64(config.seed, 0, hashing.DROPOUT, torch.tensor([step]).numpy())[0] >> 1))
    losses = training_loss(model(inputs), target, target_mask, config.loss, stage.endpoint_weight, stage.conf_target)
    if not torch.isfinite(losses.total):
        raise WireframeError(f"the loss of step {step} is not finite; use another --out and a lower stages.{index}.lr")
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = stage.lr_at(local)
    optimizer.step()
    return {**{k: v.item() for k, v in losses._asdict().items()}, "grad_norm": norm.item(), **_where(stage, local)}


def _where(stage: StageConfig, local: int) -> dict:
    return {"stage": stage.name, "lr": stage.lr_at(local)}


class _Log:
    """One JSON line every ``log_every`` steps, and the progress bar."""

    def __init__(self, path: Path, step: int, config: TrainConfig, last: int, progress: bool):
        from tqdm import tqdm

        kept = []
        if path.exists():
            # Lines behind the checkpoint we resume from will be written again.
            kept = [line for line in path.read_text().splitlines() if _line_step(line) <= step]
        with atomic_write(path) as file:
            file.writelines(line.encode() + b"\n" for line in kept)
        self._file = open(path, "a", encoding="utf-8")
        self._every, self._last = config.log_every, last
        self._bar = tqdm(total=last, initial=step, disable=not progress, desc="train", unit="step")
        self._clock, self._clock_step = time.perf_counter(), step

    def write(self, step: int, losses: dict) -> None:
        self._bar.update()
        if step % self._every and step != self._last:
            return
        now = time.perf_counter()
        pace = (now - self._clock) / max(step - self._clock_step, 1)
        self._clock, self._clock_step = now, step
        line = {"step": step, **losses, "seconds_per_step": round(pace, 5)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._bar.set_postfix(loss=f"{losses['total']:.4f}", match=f"{losses['match']:.4f}")

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
        self._file.close()


def _line_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")

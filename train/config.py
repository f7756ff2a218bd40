"""Typed settings of a training run, read from one JSON file; unknown keys are errors."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from wireframe.errors import ConfigError
from wireframe.graph import GraphConfig
from wireframe.perceiver import PerceiverConfig

CONF_TARGETS = ("mass", "rank")

# The published recipe.
BASE_CONFIG = Path(__file__).parent / "configs" / "base.json"
# The recipe of the shipped demo model, with the threshold tuned for it.
DEMO_CONFIG = Path(__file__).parent / "configs" / "demo.json"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. ``conf_head_weight_decay`` is that of the confidence head; gradients are clipped by global norm."""

    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.01
    conf_head_weight_decay: float = 0.1
    grad_clip: float = 1.0


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Sinkhorn matching as published (eps, iters, dustbin); the cost weights are ours."""

    eps: float = 0.1
    iters: int = 20
    dustbin: float = 0.3
    w_mid: float = 3.0
    w_dir: float = 0.3
    w_len: float = 1.5
    conf_weight: float = 0.1

    @property
    def weights(self) -> tuple[float, float, float]:
        return self.w_mid, self.w_dir, self.w_len


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Rotation about y by any angle, and a flip of x with probability one half."""

    rotate: bool = True
    flip: bool = True


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage: ``steps`` optimiser steps on rows of ``points`` points.

    The learning rate rises linearly over ``warmup`` steps, stays at ``lr`` and falls linearly to 0 over the last
    ``cooldown`` steps. ``endpoint_weight`` weighs the symmetric endpoint L1 against the detached plan. ``conf_target``
    is "mass", the share of a query that the plan sends to real targets, or "rank", how close a query comes to the best
    one of its target: near-duplicates, which the graph merges, then all count as found.
    """

    name: str
    points: int
    steps: int
    batch_size: int
    lr: float
    warmup: int = 0
    cooldown: int = 0
    endpoint_weight: float = 0.0
    conf_target: str = "mass"

    def lr_at(self, step: int) -> float:
        """Learning rate of the ``step``-th step of this stage, from 0."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = min(1.0, (self.steps - step) / self.cooldown) if self.cooldown else 1.0
        return self.lr * rise * fall


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run. ``description`` is for the reader alone."""

    stages: tuple[StageConfig, ...]
    model: PerceiverConfig = PerceiverConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()
    graph: GraphConfig = GraphConfig()
    seed: int = 353
    log_every: int = 50
    save_every: int = 1000
    keep_checkpoints: int = 2
    description: str = ""

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, int]:
        """(index of the stage, step within it) of the global ``step``."""
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return index, step
            step -= stage.steps
        raise IndexError("step lies behind the last stage")

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


_SECTIONS = {
    "model": PerceiverConfig,
    "optimizer": OptimizerConfig,
    "loss": LossConfig,
    "augment": AugmentConfig,
    "graph": GraphConfig,
}


def load_config(path: str | os.PathLike, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Reads a configuration file and applies ``a.b=value`` overrides (values in JSON, else plain strings).

    Raises:
        ConfigError: no such file, not JSON, an unknown key, or a value that cannot be.
    """
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except OSError as problem:
        raise ConfigError(f"cannot read the configuration {os.fspath(path)}: {problem.strerror}") from None
    except ValueError as problem:
        raise ConfigError(f"{os.fspath(path)} is not JSON: {problem}") from None
    for override in overrides:
        _override(data, override)
    return parse_config(data)


def parse_config(data: Any) -> TrainConfig:
    """A TrainConfig from its dictionary."""
    data = _mapping(data, "the configuration")
    fields = dict(data)
    for name, section in _SECTIONS.items():
        if name in fields:
            fields[name] = _build(section, _mapping(fields[name], name), name)
    stages = fields.get("stages")
    if not isinstance(stages, (list, tuple)) or not stages:
        raise ConfigError("stages must be a list with at least one stage")
    fields["stages"] = tuple(
        _build(StageConfig, _mapping(stage, f"stages[{i}]"), f"stages[{i}]") for i, stage in enumerate(stages)
    )
    config = _build(TrainConfig, fields, "")
    _check(config)
    return config


def _mapping(value: Any, name: str) -> dict:
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a JSON object")
    return value


def _build(cls, values: dict, where: str):
    known = {field.name: field for field in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"unknown key {prefix}{key}; known: {', '.join(known)}")
        kind = str(known[key].type)
        if kind in _SCALARS and not _SCALARS[kind](value):
            raise ConfigError(f"{prefix}{key} must be of type {kind}, got {value!r}")
    required = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in values]
    if required:
        raise ConfigError(f"missing key {prefix}{required[0]}")
    return cls(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_SCALARS = {
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "float": _is_number,
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
}


def _check(config: TrainConfig) -> None:
    for i, stage in enumerate(config.stages):
        for name in ("points", "steps", "batch_size", "lr"):
            if getattr(stage, name) <= 0:
                raise ConfigError(f"stages[{i}].{name} must be positive, got {getattr(stage, name)}")
        if stage.conf_target not in CONF_TARGETS:
            raise ConfigError(f"stages[{i}].conf_target must be one of {', '.join(CONF_TARGETS)}")
        for name in ("warmup", "cooldown", "endpoint_weight"):
            if getattr(stage, name) < 0:
                raise ConfigError(f"stages[{i}].{name} must not be negative, got {getattr(stage, name)}")
    for name in ("eps", "iters", "dustbin"):
        if getattr(config.loss, name) <= 0:
            raise ConfigError(f"loss.{name} must be positive, got {getattr(config.loss, name)}")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(config.optimizer, name) < 1:
            raise ConfigError(f"optimizer.{name} must be in [0, 1), got {getattr(config.optimizer, name)}")
    for name in ("weight_decay", "conf_head_weight_decay"):
        if getattr(config.optimizer, name) < 0:
            raise ConfigError(f"optimizer.{name} must not be negative, got {getattr(config.optimizer, name)}")
    if config.optimizer.grad_clip <= 0:
        raise ConfigError(f"optimizer.grad_clip must be positive, got {config.optimizer.grad_clip}")
    for name in ("w_mid", "w_dir", "w_len", "conf_weight"):
        if getattr(config.loss, name) < 0:
            raise ConfigError(f"loss.{name} must not be negative, got {getattr(config.loss, name)}")
    for name in ("log_every", "save_every", "keep_checkpoints"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(config, name)}")


def _override(data: dict, override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"--set takes a.b=value, got {override!r}")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    *parents, last = path.split(".")
    node: Any = data
    for part in parents:
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"--set {path}: there is no element {part}")
            node = node[int(part)]
        else:
            node = _mapping(node, path).setdefault(part, {})
    _mapping(node, path)[last] = value

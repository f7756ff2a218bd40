"""Typed settings of a training run, read from one JSON file; unknown keys are errors."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from wireframe.errors import ConfigError
from wireframe.graph import GraphConfig
from wireframe.perceiver import PerceiverConfig

CONF_TARGETS = ("mass", "rank")
PRECISIONS = ("auto", "float32", "bfloat16")

_FOLDER = Path(__file__).parent / "configs"
# The published recipe.
BASE_CONFIG = _FOLDER / "base.json"
# The same stages in small, for a CPU.
SMOKE_CONFIG = _FOLDER / "smoke.json"
# The recipe of the shipped demo model, with the threshold tuned for it.
DEMO_CONFIG = _FOLDER / "demo.json"
# The recipe of the model for scenes as hard as real ones.
REAL_CONFIG = _FOLDER / "real.json"
# The published stages on a small model, for choices on synthetic scenes.
SMALL_CONFIG = _FOLDER / "small.json"
_OURS = {path.stem: path for path in (BASE_CONFIG, SMOKE_CONFIG, DEMO_CONFIG, REAL_CONFIG, SMALL_CONFIG)}


def _is_number(value: Any) -> bool:
    # Beyond that float32 overflows; a comparison, for an integer without end is no float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 <= value <= 1e30


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
    """Rotation about y by any angle, a flip of x with probability one half, and a new draw of points at every access.

    ``resample`` lets a stage take rows of more points than it has: each access draws the stage's number from them.
    """

    rotate: bool = True
    flip: bool = True
    resample: bool = False


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """HSS at the end of every stage: also at ``thresholds`` of the confidence, on the first ``threshold_scenes``."""

    thresholds: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    threshold_scenes: int = 128
    worst: int = 20

    def __post_init__(self) -> None:
        values = self.thresholds
        few = isinstance(values, (list, tuple)) and len(values) <= 32
        if not few or not all(_is_number(v) and 0 <= v <= 1 for v in values):
            raise ConfigError(f"evaluation.thresholds must be a list of at most 32 probabilities, got {values!r:.200}")
        object.__setattr__(self, "thresholds", tuple(values))


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
    """A whole run. ``description`` is for the reader alone.

    ``micro_batches``: parts of a batch whose gradients are computed apart and added in a fixed tree; part of the bits,
    and what 1, 2 or more ranks share out. ``precision``: of the large products, with float32 weights behind them;
    "auto" is bfloat16 where the device has instructions for it, else float32. ``dev_val``: that many last rows of each
    set's train split are held out. ``max_bad_steps``: so many steps in a row may be skipped for a loss or gradient that
    is not finite. The last ``keep_checkpoints`` checkpoints are kept, and every one at a multiple of ``keep_every``
    (0: none).
    """

    stages: tuple[StageConfig, ...]
    model: PerceiverConfig = PerceiverConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()
    graph: GraphConfig = GraphConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = 353
    micro_batches: int = 1
    precision: str = "auto"
    dev_val: int = 0
    max_bad_steps: int = 10
    log_every: int = 50
    save_every: int = 1000
    keep_checkpoints: int = 2
    keep_every: int = 0
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

    def stage_start(self, index: int) -> int:
        """The global step at which stage ``index``, from 0, begins."""
        return sum(stage.steps for stage in self.stages[:index])

    def to_dict(self) -> dict:
        """Plain values as JSON gives them back; ``parse_config`` reverses it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


_SECTIONS = {
    "model": PerceiverConfig,
    "optimizer": OptimizerConfig,
    "loss": LossConfig,
    "augment": AugmentConfig,
    "graph": GraphConfig,
    "evaluation": EvaluationConfig,
}


def load_config(path: str | os.PathLike, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Reads a configuration file and applies ``a.b=value`` overrides (values in JSON, else plain strings).

    Args:
        path: a JSON file, or the name of one of ours: "base", "small", "smoke", "demo", "real".
        overrides: settings to change.

    Raises:
        ConfigError: no such file, not JSON, an unknown key, or a value that cannot be.
    """
    if os.fspath(path) in _OURS and not os.path.isfile(path):
        path = _OURS[os.fspath(path)]
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except OSError as problem:
        raise ConfigError(f"cannot read the configuration {os.fspath(path)}: {problem.strerror}") from None
    except (ValueError, RecursionError) as problem:
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
            advice = f"; as text: '{prefix}{key}=\"{value}\"'" if kind == "str" and _is_number(value) else ""
            raise ConfigError(f"{prefix}{key} must be of type {kind}{_LIMITS.get(kind, '')}, got {value!r:.60}{advice}")
    required = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in values]
    if required:
        raise ConfigError(f"missing key {prefix}{required[0]}")
    return cls(**values)


_SCALARS = {
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "float": _is_number,
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str) and len(value) <= 10_000,
}
_LIMITS = {"float": ", at most 1e30 either way", "str": ", at most 10,000 characters"}


# Steps are the low half of the streams of random numbers; sizes beyond these only exhaust the memory.
MAX_STEPS = (1 << 31) - 1
MAX_SIZE = 1 << 16

# What a number must be: in the words of the message, and a test.
_POSITIVE = ("must be positive", lambda value: value > 0)
_NOT_NEGATIVE = ("must not be negative", lambda value: value >= 0)
_AT_LEAST_1 = ("must be at least 1", lambda value: value >= 1)
_BELOW_1 = ("must be in [0, 1)", lambda value: 0 <= value < 1)
_STEPS = (f"must be at most {MAX_STEPS}", lambda value: value <= MAX_STEPS)
_SIZE = (f"must be at most {MAX_SIZE}", lambda value: value <= MAX_SIZE)
_PICTURES = ("must be from 0 to 200", lambda value: 0 <= value <= 200)
_INT64 = ("must fit into 64 bits", lambda value: -(1 << 63) <= value < 1 << 63)
_RULES = {
    "loss": {
        _POSITIVE: ("eps", "iters", "dustbin"),
        _SIZE: ("iters",),
        _NOT_NEGATIVE: ("w_mid", "w_dir", "w_len", "conf_weight"),
    },
    "optimizer": {
        _BELOW_1: ("beta1", "beta2"),
        _NOT_NEGATIVE: ("weight_decay", "conf_head_weight_decay"),
        _POSITIVE: ("grad_clip",),
    },
    "evaluation": {_AT_LEAST_1: ("threshold_scenes",), _STEPS: ("threshold_scenes",), _PICTURES: ("worst",)},
}
_STAGE_RULES = {
    _POSITIVE: ("points", "steps", "batch_size", "lr"),
    _NOT_NEGATIVE: ("warmup", "cooldown", "endpoint_weight"),
    _SIZE: ("points", "batch_size"),
    _STEPS: ("steps", "warmup", "cooldown"),
}
_RUN_RULES = {
    _AT_LEAST_1: ("micro_batches", "log_every", "save_every", "keep_checkpoints"),
    _NOT_NEGATIVE: ("dev_val", "max_bad_steps", "keep_every"),
    _SIZE: ("micro_batches",),
    _STEPS: ("steps", "log_every", "save_every", "keep_checkpoints", "dev_val", "max_bad_steps", "keep_every"),
    _INT64: ("seed",),
}


def _check(config: TrainConfig) -> None:
    for section, rules in _RULES.items():
        _obey(getattr(config, section), rules, f"{section}.")
    for i, stage in enumerate(config.stages):
        _obey(stage, _STAGE_RULES, f"stages[{i}].")
        # It names a folder, and has to be read in a table.
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", stage.name, re.ASCII):
            raise ConfigError(f"stages[{i}].name must be of 1 to 40 letters, digits, _ . or -, got {stage.name!r}")
        if stage.conf_target not in CONF_TARGETS:
            raise ConfigError(f"stages[{i}].conf_target must be one of {', '.join(CONF_TARGETS)}")
        if stage.batch_size % max(config.micro_batches, 1):
            raise ConfigError(
                f"stages[{i}].batch_size {stage.batch_size} is no multiple of micro_batches {config.micro_batches}"
            )
    if config.precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {config.precision!r:.40}")
    _obey(config, _RUN_RULES, "")


def _obey(section: Any, rules: dict, where: str) -> None:
    for (words, holds), names in rules.items():
        for name in names:
            if not holds(getattr(section, name)):
                # Of a number without end the first digits will do.
                raise ConfigError(f"{where}{name} {words}, got {getattr(section, name)!r:.40}")


def _override(data: dict, override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"--set takes a.b=value, got {override!r}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    *parents, last = path.split(".")
    node: Any = data
    for part in parents:
        if isinstance(node, list):
            if not (part.isascii() and part.isdecimal()) or int(part[:9]) >= len(node):
                raise ConfigError(f"--set {path}: there is no element {part}")
            node = node[int(part[:9])]
        else:
            node = _mapping(node, path).setdefault(part, {})
    _mapping(node, path)[last] = value

"""What a run's folder says about it: log, configuration, scores, hashes.

Nothing in it is trusted; what cannot be used is noted, not raised.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from wireframe.checkpoint import tensor_sha256
from wireframe.errors import ConfigError, WireframeError, one_line
from wireframe.train.config import StageConfig, TrainConfig, parse_config

LOSSES = ("total", "match", "conf", "endpoint")
_NUMBERS = (*LOSSES, "grad_norm", "lr", "seconds_per_step")

_MAX_LOG_BYTES = 512 << 20
_MAX_LINE_BYTES = 1 << 20
_MAX_EVENTS = 10_000
_MAX_JSON_BYTES = 64 << 20
_MAX_PNG_BYTES = 64 << 20
_PNG = b"\x89PNG\r\n\x1a\n"

Value = TypeVar("Value")


class Steps(NamedTuple):
    """The lines of the log that are steps: ``step`` float64 [L], names of their stages, and float64 [L] by term, NaN
    where a line has no such number."""

    step: np.ndarray
    stage: list[str]
    terms: dict[str, np.ndarray]


class Stage(NamedTuple):
    """A stage and its first and last finished steps; settings where they are known."""

    name: str
    start: int
    end: int
    settings: StageConfig | None


class Event(NamedTuple):
    """A line of the log that is no step."""

    step: int
    name: str
    details: str


class SceneRow(NamedTuple):
    """A scored scene."""

    order_id: str
    hss: float
    f1: float
    iou: float
    failure: str | None


class StageScores(NamedTuple):
    """What ``evaluation/POSITION-NAME.json`` holds; ``sheet`` are the bytes of the PNG beside it.

    ``summary`` has ``scenes``, ``hss``, ``hss_low``, ``hss_high``, ``f1``, ``iou``; ``thresholds`` are (confidence,
    HSS, scenes).
    """

    position: int
    name: str
    summary: dict[str, float]
    failures: dict[str, int]
    thresholds: list[tuple[float, float, int]]
    confidence: float | None
    worst: list[SceneRow]
    not_scored: list[tuple[str, str]]
    model: str | None
    sheet: bytes | None


class RunRecord(NamedTuple):
    """config, data, environment: of the newest whole checkpoint, None or empty without one. step: finished steps as far
    as known. hashes: SHA-256 of its tensors by section. notes: what is missing or cannot be used."""

    name: str
    config: TrainConfig | None
    step: int
    checkpoint: str | None
    data: dict[str, str]
    environment: dict[str, Any]
    start: dict[str, Any] | None
    hashes: dict[str, str]
    steps: Steps
    events: list[Event]
    scores: list[StageScores]
    notes: list[str]


def read_run(run: Path) -> RunRecord:
    """Reads what there is.

    Raises:
        ConfigError: it is no folder of a run.
    """
    parts = ("log.jsonl", "checkpoints", "evaluation")
    if not run.is_dir() or not any((run / part).exists() for part in parts):
        raise ConfigError(f"{run} is no run: it holds none of {', '.join(parts)}; give the --out of `wireframe train`")
    notes: list[str] = []
    steps, events = _read_log(run / "log.jsonl", notes)
    path, state, hashes = _read_checkpoint(run, notes)
    config = _attempt(lambda: parse_config(state["config"]), "its configuration", notes) if state else None
    scores = _read_scores(run / "evaluation", notes)
    step = max([int(steps.step[-1])] if len(steps.step) else [0])
    return RunRecord(
        run.resolve().name,
        config,
        max(step, int(state["step"]) if state else 0),
        path,
        _strings(state.get("data")),
        state["environment"] if isinstance(state.get("environment"), dict) else {},
        state["start"] if isinstance(state.get("start"), dict) else None,
        hashes,
        steps,
        events,
        scores,
        notes,
    )


def stages_of(record: RunRecord) -> list[Stage]:
    """The stages of the configuration, else those that the log names."""
    config = record.config
    if config is not None:
        starts = [config.stage_start(i) for i in range(len(config.stages))]
        return [Stage(s.name, start, start + s.steps, s) for s, start in zip(config.stages, starts)]
    found: list[Stage] = []
    for step, name in zip(record.steps.step.astype(int).tolist(), record.steps.stage):
        if found and found[-1].name == name:
            found[-1] = found[-1]._replace(end=step)
        else:
            found.append(Stage(name, found[-1].end if found else 0, step, None))
    return found


def _read_log(path: Path, notes: list[str]) -> tuple[Steps, list[Event]]:
    lines: list[dict] = []
    events: list[Event] = []
    damaged = 0
    if not path.is_file():
        notes.append("There is no log.jsonl: no curves.")
    else:
        with open(path, "rb") as file:
            while (line := file.readline(_MAX_LINE_BYTES)) and file.tell() < _MAX_LOG_BYTES:
                found = _log_line(line)
                if isinstance(found, dict):
                    lines.append(found)
                elif isinstance(found, Event):
                    events.append(found)
                else:
                    damaged += 1
        if damaged:
            what = "1 line" if damaged == 1 else f"{damaged} lines"
            notes.append(f"{what} of log.jsonl cannot be read (a last one may have been cut off).")
        if not lines:
            notes.append("log.jsonl holds no step yet: no curves.")
    lines.sort(key=lambda line: line["step"])
    step = np.array([line["step"] for line in lines], dtype=np.float64)
    terms = {name: np.array([_number(line.get(name)) for line in lines]) for name in _NUMBERS}
    return Steps(step, [str(line.get("stage", "")) for line in lines], terms), events[-_MAX_EVENTS:]


def _log_line(line: bytes) -> dict | Event | None:
    try:
        values = json.loads(line)
        step = values["step"]
        if type(step) is not int or not 0 <= step < 1 << 40:
            return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if "event" not in values:
        return values
    details = ", ".join(f"{name} {_short(value)}" for name, value in values.items() if name not in ("step", "event"))
    return Event(step, str(values["event"]), details)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and len(value) > 4:
        return f"{', '.join(map(str, value[:4]))} and {len(value) - 4} more"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: Any) -> float:
    """The number, infinite ones too; NaN for everything else."""
    try:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def _read_checkpoint(run: Path, notes: list[str]) -> tuple[str | None, dict, dict[str, str]]:
    """Path, state and hashes of the newest checkpoint that is whole."""
    from wireframe.train import checkpoints

    def report(text: str) -> None:
        notes.append(one_line(text))

    path = _attempt(lambda: checkpoints.latest(run, report), "checkpoints", notes)
    if path is None:
        notes.append("There is no whole checkpoint: settings, step and hashes are not known.")
        return None, {}, {}
    stored = _attempt(lambda: checkpoints.read(path), path.name, notes)
    if stored is None:
        return path.name, {}, {}
    hashes = {section: tensor_sha256(tensors) for section, tensors in stored.tensors.items()}
    return path.name, stored.state, hashes


def _read_scores(folder: Path, notes: list[str]) -> list[StageScores]:
    found = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        named = re.fullmatch(r"(\d{1,4})-(.*)", path.stem, re.ASCII | re.DOTALL)
        if named:
            scores = _attempt(
                lambda path=path, named=named: _stage_scores(path, int(named[1]), named[2], notes),
                f"evaluation/{path.name}",
                notes,
            )
            if scores is not None:
                found.append(scores)
    for path in sorted(folder.glob("*.partial")) if folder.is_dir() else []:
        notes.append(f"The evaluation {path.name.removesuffix('.json.partial')} is not finished.")
    if not found:
        notes.append("There are no scores in evaluation/: no HSS, thresholds or worst scenes.")
    return sorted(found, key=lambda scores: scores.position)


def _stage_scores(path: Path, position: int, name: str, notes: list[str]) -> StageScores:
    content = _json(path)
    summary, graph = content["summary"], content.get("graph") or {}
    numbers = {key: float(summary[key]) for key in ("scenes", "hss", "hss_low", "hss_high", "f1", "iou")}
    if not all(map(math.isfinite, numbers.values())):
        raise ValueError("a mean score is no number")
    scenes: dict[str, SceneRow] = {}
    for scene in content["scenes"]:
        row = SceneRow(str(scene["order_id"]), *(float(scene[k]) for k in ("hss", "f1", "iou")), scene.get("failure"))
        scenes[row.order_id] = row
    sheet = path.with_suffix(".png")
    picture = _attempt(lambda: _png(sheet), f"evaluation/{sheet.name}", notes) if sheet.is_file() else None
    confidence = graph.get("confidence")
    return StageScores(
        position,
        name,
        numbers,
        {str(reason): int(count) for reason, count in (summary.get("failures") or {}).items()},
        [(float(at["confidence"]), float(at["hss"]), int(at["scenes"])) for at in content.get("at_thresholds") or []],
        float(confidence) if confidence is not None else None,
        [scenes[str(order_id)] for order_id in content.get("worst") or [] if str(order_id) in scenes],
        [(str(order_id), str(reason)) for order_id, reason in content.get("not_scored") or []],
        str(content["model"]) if content.get("model") is not None else None,
        picture,
    )


def _json(path: Path) -> Any:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"larger than {_MAX_JSON_BYTES >> 20} MiB")
    return json.loads(path.read_bytes())


def _png(path: Path) -> bytes:
    if path.stat().st_size > _MAX_PNG_BYTES:
        raise ValueError(f"larger than {_MAX_PNG_BYTES >> 20} MiB")
    content = path.read_bytes()
    if not content.startswith(_PNG):
        raise ValueError("no PNG")
    return content


def _strings(values: Any) -> dict[str, str]:
    return {str(name): str(value) for name, value in values.items()} if isinstance(values, dict) else {}


def _attempt(read: Callable[[], Value], what: str, notes: list[str]) -> Value | None:
    """What ``read`` gives, or None and a note: the folder may hold anything."""
    try:
        return read()
    except (OSError, WireframeError, ValueError, LookupError, TypeError, AttributeError, OverflowError,
            RecursionError) as problem:  # fmt: skip
        notes.append(f"{what} cannot be used: {one_line(problem)}.")
        return None

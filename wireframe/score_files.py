"""Scores of many scenes: what an evaluation gives, its file, its summary, and two of them compared scene by scene."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wireframe.errors import Failure, ScoreError, one_line, printable
from wireframe.files import atomic_write, read_at_most
from wireframe.scoring import Outcome, Score, bootstrap_interval, summarise

# A scene takes some 150 bytes.
_MAX_FILE_BYTES = 256 << 20


class Threshold(NamedTuple):
    """Mean scores of ``scenes`` scenes where segments of a confidence above ``confidence`` count."""

    confidence: float
    hss: float
    f1: float
    iou: float
    scenes: int


class Evaluation(NamedTuple):
    """order_ids and outcomes of the scored scenes, in order; failures: scenes without a prediction or a truth;
    worst: ids of the scenes of the lowest HSS, the lowest first, as far as asked for; of: what was scored, in words.
    """

    order_ids: list[str]
    outcomes: list[Outcome]
    failures: list[Failure]
    thresholds: tuple[Threshold, ...] = ()
    worst: tuple[str, ...] = ()
    of: str = ""


def format_summary(result: Evaluation) -> str:
    """The mean scores with their bootstrap intervals, the scenes that score 0 for a reason, thresholds, the worst."""
    summary = summarise(result.outcomes)
    scores = (
        f"{title} {summary[name]:.4f} (95 % {summary[f'{name}_low']:.4f}-{summary[f'{name}_high']:.4f})"
        for name, title in (("hss", "HSS"), ("f1", "F1"), ("iou", "IoU"))
    )
    of = f" of {printable(result.of)}" if result.of else ""
    lines = [f"{summary['scenes']} scenes{of}: {', '.join(scores)}"]
    lines += [f"  scored 0: {count} x {reason}" for reason, count in summary["failures"].items()]
    lines += [
        f"  threshold {t.confidence:.2f}: HSS {t.hss:.4f}, F1 {t.f1:.4f}, IoU {t.iou:.4f} on {t.scenes} scenes"
        for t in result.thresholds
    ]
    if result.worst:
        lines.append(f"  worst: {', '.join(map(printable, result.worst))}")
    return "\n".join(lines)


def write_scores(path: str | os.PathLike, about: Mapping, result: Evaluation) -> None:
    """The scores of every scene as JSON behind ``about`` (plain values: what they are of), whole or not at all."""
    scenes = [
        {"order_id": order_id, **outcome.score._asdict(), "failure": outcome.failure}
        for order_id, outcome in zip(result.order_ids, result.outcomes)
    ]
    content = {
        **about,
        "summary": summarise(result.outcomes),
        "at_thresholds": [threshold._asdict() for threshold in result.thresholds],
        "worst": list(result.worst),
        "scenes": scenes,
        "not_scored": [list(failure) for failure in result.failures],
    }
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def read_scores(path: str | os.PathLike) -> dict[str, Score]:
    """Scores by order_id out of a file of ``write_scores``.

    Raises:
        ScoreError: it is no such file. OSError: it cannot be read.
    """
    path = Path(path)
    try:
        data = read_at_most(path, _MAX_FILE_BYTES)
        if data is None:
            raise ValueError("too large")
        scenes = json.loads(data)["scenes"]
        found = {scene["order_id"]: Score(*(float(scene[name]) for name in Score._fields)) for scene in scenes}
        if not np.isfinite(list(found.values())).all() or not all(isinstance(name, str) for name in found):
            raise ValueError("a score is not finite")
    except (ValueError, LookupError, TypeError, RecursionError) as problem:
        raise ScoreError(f"{path}: no scores of `wireframe eval --out` ({one_line(problem)})") from None
    return found


def compare(ours: Mapping[str, Score], others: Mapping[str, Score]) -> str:
    """Differences (ours - others) of the means over the scenes that both have, paired by scene, with intervals.

    Raises:
        ScoreError: no scene has both.
    """
    common = [order_id for order_id in ours if order_id in others]
    if not common:
        raise ScoreError("the two have no scene in common: score the same scenes")
    first, second = (np.array([scores[order_id] for order_id in common], dtype=np.float64) for scores in (ours, others))
    parts = []
    for column, title in enumerate(("HSS", "F1", "IoU")):
        difference = first[:, column] - second[:, column]
        low, high = bootstrap_interval(difference)
        parts.append(f"{title} {difference.mean():+.4f} (95 % {low:+.4f} to {high:+.4f})")
    better, worse = (int((sign * (first[:, 0] - second[:, 0]) > 0).sum()) for sign in (1, -1))
    left = len(ours) + len(others) - 2 * len(common)
    alone = f"; {left} scenes of one alone left out" if left else ""
    return f"difference on {len(common)} scenes: {', '.join(parts)}; higher HSS on {better}, lower on {worse}{alone}"


def group_means(scores: Mapping[str, Score], groups: Mapping[str, str]) -> dict[str, tuple[int, Score]]:
    """Number of scenes and their mean scores by group, groups in ascending order; ``groups``: order_id -> group."""
    by_group: dict[str, list[Score]] = {}
    for order_id, found in scores.items():
        if order_id in groups:
            by_group.setdefault(groups[order_id], []).append(found)
    return {name: (len(rows), Score(*map(float, np.mean(rows, axis=0)))) for name, rows in sorted(by_group.items())}

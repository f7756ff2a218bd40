"""Choosing how segments become a graph: confidence, merging, snapping, one after the other, on scenes kept for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from wireframe.errors import ScoreError
from wireframe.graph import GraphConfig, Wireframe
from wireframe.predict import PredictedScene
from wireframe.scoring import Score, require_hoho
from wireframe.scoring_pool import ScorePool
from wireframe.segment_files import SegmentSource, check_snapping

CONFIDENCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Of the last merging pass, metres; the passes before it widen as the published ones do.
MERGE_DISTANCES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
SNAP_RADII = (0.0, 0.3, 0.5, 0.7, 0.9)
# Around the best of CONFIDENCES.
_FINER = (-0.05, 0.05)


class Trial(NamedTuple):
    """Settings that were tried, and their mean scores over the scenes."""

    graph: GraphConfig
    score: Score


def tune(source: SegmentSource, *, progress: bool = True) -> tuple[GraphConfig, list[Trial]]:
    """The settings of the highest mean HSS among those tried, and all trials in their order.

    The first trial is what the file of segments says. Then one setting after the other takes each of its values, the
    others being the best so far: confidence, merging distance, snap radius, and confidence again, in finer steps. A
    value must be better than what there is to take its place. Scores of the winner on these scenes flatter it.

    Args:
        source: scenes without ground truth are left out. The result does not depend on its workers, which score.
        progress: whether to show a progress bar on stderr.

    Raises:
        ScoreError: no scene with a truth. ConfigError: as ``check_snapping``. MissingPackageError: no hoho2025.
    """
    from tqdm import tqdm

    require_hoho()
    check_snapping(source.graph)
    scenes = [scene for _, scene in source.read() if len(scene.truth.edges)]
    if not scenes:
        raise ScoreError(f"{source.name}: no scene has a ground truth to tune on")
    trials: list[Trial] = []
    with (
        ScorePool(workers=source.workers) as pool,
        tqdm(desc="tune", unit="trial", disable=not progress) as bar,
    ):
        scored = _Scored(scenes, pool)

        def attempt(graph: GraphConfig) -> Trial:
            known = next((trial for trial in trials if trial.graph == graph), None)
            if known is None:
                known = Trial(graph, scored.mean(graph))
                trials.append(known)
                bar.update()
            return known

        best = attempt(source.graph)
        for change, values in _steps():
            for value in values(best.graph):
                trial = attempt(change(best.graph, value))
                if trial.score.hss > best.score.hss:
                    best = trial
    return best.graph, trials


def widening(distance: float) -> tuple[float, ...]:
    """Five merging distances up to the given one in the published proportions: 0.15, 0.2625, 0.375, 0.4875, 0.6."""
    published = GraphConfig().merge_thresholds
    return tuple(round(step * distance / published[-1], 6) for step in published)


def format_trials(trials: Sequence[Trial]) -> str:
    """Markdown: every trial, the best in bold."""
    best = max(range(len(trials)), key=lambda i: (trials[i].score.hss, -i))
    lines = ["| confidence | merge, m | snap, m | HSS | F1 | IoU |", "|---|---|---|---|---|---|"]
    for i, (graph, score) in enumerate(trials):
        cells = [f"{graph.confidence:g}", f"{max(graph.merge_thresholds, default=0.0):g}", f"{graph.snap_radius:g}"]
        cells += [f"{value:.4f}" for value in score]
        lines.append("| " + " | ".join(f"**{cell}**" if i == best else cell for cell in cells) + " |")
    return "\n".join(lines)


def _steps() -> list[tuple[Callable[[GraphConfig, float], GraphConfig], Callable[[GraphConfig], Sequence[float]]]]:
    def confidence(graph: GraphConfig, value: float) -> GraphConfig:
        return dataclasses.replace(graph, confidence=value)

    def merging(graph: GraphConfig, value: float) -> GraphConfig:
        return dataclasses.replace(graph, merge_thresholds=widening(value))

    def snapping(graph: GraphConfig, value: float) -> GraphConfig:
        return dataclasses.replace(graph, snap_radius=value)

    def finer(graph: GraphConfig) -> list[float]:
        return [min(max(round(graph.confidence + step, 6), 0.0), 1.0) for step in _FINER]

    return [
        (confidence, lambda _: CONFIDENCES), (merging, lambda _: MERGE_DISTANCES), (snapping, lambda _: SNAP_RADII),
        (confidence, finer),
    ]  # fmt: skip


class _Scored:
    """Mean scores over scenes; a wireframe that a scene has had before is not scored again."""

    def __init__(self, scenes: list[PredictedScene], pool: ScorePool) -> None:
        self._scenes, self._pool = scenes, pool
        self._known: list[dict] = [{} for _ in scenes]

    def mean(self, graph: GraphConfig) -> Score:
        awaited = []
        for scene, known in zip(self._scenes, self._known):
            found = scene.wireframe(graph)
            key = _key(found)
            if key not in known:
                known[key] = self._pool.submit(found, scene.truth)
            awaited.append(known[key])
        table = np.array([future.result().score for future in awaited], dtype=np.float64)
        return Score(*map(float, table.mean(axis=0)))


def _key(found: Wireframe) -> bytes:
    return len(found.vertices).to_bytes(4, "little") + found.vertices.tobytes() + found.edges.tobytes()

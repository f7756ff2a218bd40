"""Predicting and scoring scene by scene: processes score while the model runs, and what is scored is written down."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field

from wireframe.graph import GraphConfig, Wireframe
from wireframe.partial_scores import PartialScores, ScoredScene
from wireframe.perceiver import Perceiver
from wireframe.predict import predict_segments, wireframe_of
from wireframe.sampling import SampledScene
from wireframe.scene_source import Failure, SceneSource
from wireframe.scoring_pool import ScorePool

# Scenes whose scores are awaited, for each process: enough to keep it busy, few enough that little is lost by a kill.
_AWAITED_PER_WORKER = 4


@dataclass
class SceneScores:
    """Scenes of a source, scored; the worst of them with their points, as far as they were read.

    Attributes:
        scenes: in the order of the source.
        failures: scenes that could not be read or have no truth, in order.
        samples: by index, at least those of the ``keep`` worst scenes that this call has predicted.
    """

    keep: int
    scenes: list[ScoredScene] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    samples: dict[int, SampledScene] = field(default_factory=dict)

    def worst(self) -> list[ScoredScene]:
        """The ``keep`` scenes of the lowest HSS, the lowest first; of equal ones the first in the source."""
        return sorted(self.scenes, key=lambda scene: (scene.outcome.score.hss, scene.index))[: self.keep]

    def _add(self, scene: ScoredScene, sample: SampledScene | None) -> None:
        self.scenes.append(scene)
        if self.keep and sample is not None:
            self.samples[scene.index] = sample
        if len(self.samples) > 4 * self.keep:
            wanted = {scene.index for scene in self.worst()}
            self.samples = {index: sample for index, sample in self.samples.items() if index in wanted}


def score_scenes(
    source: SceneSource,
    model: Perceiver,
    graph: GraphConfig,
    thresholds: tuple[float, ...],
    threshold_scenes: int,
    partial: PartialScores,
    *,
    keep: int = 0,
    progress: bool = True,
) -> SceneScores:
    """Scores the scenes of ``source`` that ``partial`` does not hold yet, adds them to it, and gives them all.

    Args:
        model: in eval mode.
        thresholds: other confidences at which the scenes of the first ``threshold_scenes`` rows are scored.
        keep: of how many of the worst scenes the points are wanted.
        progress: whether to show a progress bar on stderr.
    """
    from tqdm import tqdm

    found = SceneScores(keep)
    with (
        tqdm(total=source.expected(), disable=not progress, desc="evaluate", unit="scene") as bar,
        ScorePool(workers=source.workers) as pool,
        closing(_scored(source, model, graph, thresholds, threshold_scenes, partial, pool)) as results,
    ):
        for result, sample in results:
            if isinstance(result, Failure):
                found.failures.append(result)
            else:
                partial.add(result)
                found._add(result, sample)
            bar.update()
    return found


def _scored(
    source: SceneSource,
    model: Perceiver,
    graph: GraphConfig,
    thresholds: tuple[float, ...],
    threshold_scenes: int,
    partial: PartialScores,
    pool: ScorePool,
) -> Iterator[tuple[ScoredScene | Failure, SampledScene | None]]:
    """Results in order, each with the points of its scene where they were read; some scenes ahead of the caller."""

    def known(index: int, row: dict) -> ScoredScene | None:
        scene = partial.scenes.get(index)
        return scene if scene is not None and scene.order_id == row.get("order_id") else None

    awaited: deque[tuple[Callable[[], ScoredScene | Failure], SampledScene | None]] = deque()
    with closing(source.read(known)) as pairs:
        for index, scene in pairs:
            if isinstance(scene, SampledScene) and len(scene.gt_edges) == 0:
                scene = Failure(scene.order_id, "no ground truth")
            if isinstance(scene, SampledScene):
                at = thresholds if index < threshold_scenes else ()
                awaited.append((_submit(pool, index, scene, model, graph, at), scene))
            else:
                awaited.append((functools.partial(_same, scene), None))
            while len(awaited) > _AWAITED_PER_WORKER * source.workers:
                result, sample = awaited.popleft()
                yield result(), sample
    for result, sample in awaited:
        yield result(), sample


def _same(result: ScoredScene | Failure) -> ScoredScene | Failure:
    return result


def _submit(
    pool: ScorePool, index: int, sample: SampledScene, model: Perceiver, graph: GraphConfig, at: tuple[float, ...]
) -> Callable[[], ScoredScene]:
    """Predicts a scene and has it scored; the result can be called for."""
    found = predict_segments(sample, model)
    truth = Wireframe(sample.gt_vertices, sample.gt_edges.astype("int64"))
    submitted: dict[bytes, tuple[Wireframe, Future]] = {}

    def scored_at(threshold: float) -> tuple[Wireframe, Future]:
        # The same segments above it make the same wireframe.
        confident = (found.probability > threshold).tobytes()
        if confident not in submitted:
            predicted = wireframe_of(found, sample, threshold=threshold, graph=graph)
            submitted[confident] = predicted, pool.submit(predicted, truth)
        return submitted[confident]

    predicted, outcome = scored_at(graph.confidence)
    others = [scored_at(threshold)[1] for threshold in at]

    def result() -> ScoredScene:
        scores = tuple(other.result().score.hss for other in others)
        return ScoredScene(index, sample.order_id, outcome.result(), predicted, scores)

    return result


def mean_at(scenes: list[ScoredScene], position: int) -> tuple[float, int]:
    """Mean HSS at the threshold of that position, and of how many scenes."""
    values = [scene.at[position] for scene in scenes if scene.at]
    return math.fsum(values) / len(values) if values else math.nan, len(values)

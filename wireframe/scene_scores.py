"""Predicting and scoring scene by scene: processes score while the model runs, and what is scored is written down."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from wireframe.errors import Failure
from wireframe.graph import GraphConfig, Wireframe, empty_wireframe
from wireframe.partial_scores import PartialScores, ScoredScene
from wireframe.perceiver import Perceiver
from wireframe.predict import PredictedScene, predict_segments, with_truth
from wireframe.sampling import SampledScene
from wireframe.scoring import ZERO, Outcome, Score
from wireframe.scoring_pool import ScorePool

# Why a scene without wireframes scores 0.
NO_PREDICTION = "no prediction"

# Scenes whose scores are awaited, for each process: enough to keep it busy, few enough that little is lost by a kill.
_AWAITED_PER_WORKER = 4


class Candidate(NamedTuple):
    """What is scored of a scene: wireframes at the threshold of the graph, then at each of the others asked for; none
    where nothing was predicted, which scores 0."""

    order_id: str
    truth: Wireframe
    wireframes: list[Wireframe]


class Source(Protocol):
    """Scenes by position, as ``scene_source.SceneSource`` gives them."""

    workers: int

    def expected(self) -> int | None: ...

    def read(self, known: Callable[[int, dict], object] = ...) -> Iterator[tuple[int | None, object]]: ...


# (scene, thresholds) -> what is scored of it.
Predict = Callable[[object, tuple[float, ...]], Candidate]


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


def by_model(model: Perceiver, graph: GraphConfig) -> Predict:
    """Scenes of points, predicted by a model in eval mode."""

    def predict(sample: SampledScene, thresholds: tuple[float, ...]) -> Candidate:
        return graphs_at(with_truth(predict_segments(sample, model), sample), graph, thresholds)

    return predict


def graphs_at(scene: PredictedScene, graph: GraphConfig, thresholds: tuple[float, ...]) -> Candidate:
    """The scene's graphs at the graph's own and at other thresholds; the same segments give the same object."""
    made: dict[bytes, Wireframe] = {}

    def at(threshold: float) -> Wireframe:
        confident = (scene.found.probability > threshold).tobytes()
        if confident not in made:
            made[confident] = scene.wireframe(dataclasses.replace(graph, confidence=threshold))
        return made[confident]

    return Candidate(scene.order_id, scene.truth, [at(threshold) for threshold in (graph.confidence, *thresholds)])


def score_scenes(
    source: Source,
    predict: Predict,
    thresholds: tuple[float, ...],
    threshold_scenes: int | None,
    partial: PartialScores,
    *,
    keep: int = 0,
    progress: bool = True,
) -> SceneScores:
    """Scores the scenes of ``source`` that ``partial`` does not hold yet, adds them to it, and gives them all.

    Args:
        thresholds: other confidences at which the scenes of the first ``threshold_scenes`` rows are scored; None: all.
        keep: of how many of the worst scenes the points are wanted.
        progress: whether to show a progress bar on stderr.
    """
    from tqdm import tqdm

    found = SceneScores(keep)
    with (
        tqdm(total=source.expected(), disable=not progress, desc="evaluate", unit="scene") as bar,
        ScorePool(workers=source.workers) as pool,
        closing(_scored(source, predict, thresholds, threshold_scenes, partial, pool)) as results,
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
    source: Source,
    predict: Predict,
    thresholds: tuple[float, ...],
    threshold_scenes: int | None,
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
            if isinstance(scene, (ScoredScene, Failure)):
                awaited.append((functools.partial(_same, scene), None))
            elif not _has_truth(scene):
                awaited.append((functools.partial(_same, Failure(scene.order_id, "no ground truth")), None))
            else:
                at = thresholds if threshold_scenes is None or index < threshold_scenes else ()
                sample = scene if isinstance(scene, SampledScene) else None
                awaited.append((_submit(pool, index, predict(scene, at)), sample))
            while len(awaited) > _AWAITED_PER_WORKER * source.workers:
                result, sample = awaited.popleft()
                yield result(), sample
    for result, sample in awaited:
        yield result(), sample


def _has_truth(scene: SampledScene | PredictedScene | Candidate) -> bool:
    return len(scene.gt_edges if isinstance(scene, SampledScene) else scene.truth.edges) > 0


def _same(result: ScoredScene | Failure) -> ScoredScene | Failure:
    return result


def _submit(pool: ScorePool, index: int, scene: Candidate) -> Callable[[], ScoredScene]:
    """Has a scene scored; the result can be called for."""
    if not scene.wireframes:
        missing = Outcome(ZERO, NO_PREDICTION)
        return functools.partial(_same, ScoredScene(index, scene.order_id, missing, empty_wireframe(), ()))
    futures = {id(found): pool.submit(found, scene.truth) for found in {id(w): w for w in scene.wireframes}.values()}
    first, *others = (futures[id(found)] for found in scene.wireframes)

    def result() -> ScoredScene:
        scores = tuple(other.result().score for other in others)
        return ScoredScene(index, scene.order_id, first.result(), scene.wireframes[0], scores)

    return result


def mean_at(scenes: Sequence[ScoredScene], position: int) -> tuple[Score, int]:
    """Mean scores at the threshold of that position, and of how many scenes; NaN where there is none."""
    scores = np.array([scene.at[position] for scene in scenes if scene.at], dtype=np.float64).reshape(-1, 3)
    if not len(scores):
        return Score(*[float("nan")] * 3), 0
    return Score(*map(float, scores.mean(axis=0))), len(scores)

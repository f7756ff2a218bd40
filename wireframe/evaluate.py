"""Scoring whole data sets: a model's predictions, a file of segments, or anybody's submission."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch

import wireframe
from wireframe.checkpoint import tensor_sha256
from wireframe.errors import ConfigError, Failure, ScoreError
from wireframe.files import check_target
from wireframe.graph import GraphConfig, Wireframe
from wireframe.partial_scores import PartialScores
from wireframe.perceiver import Perceiver
from wireframe.plots import SheetItem, contact_sheet, require_matplotlib
from wireframe.predict import eval_mode
from wireframe.samples import read_sample
from wireframe.sampling import SampledScene
from wireframe.scene import read_ground_truth
from wireframe.scene_scores import Candidate, Predict, SceneScores, by_model, graphs_at, mean_at, score_scenes
from wireframe.scene_source import SceneSource
from wireframe.score_files import Evaluation, Threshold, write_scores
from wireframe.scoring import require_hoho
from wireframe.segment_files import SegmentSource, check_snapping
from wireframe.splits import DEV_VAL
from wireframe.submissions import read_submission


def evaluate(
    source: str | os.PathLike,
    model: Perceiver,
    graph: GraphConfig = GraphConfig(),
    *,
    split: str | None = None,
    dev_val: int = DEV_VAL,
    limit: int | None = None,
    workers: int = 1,
    out: str | os.PathLike | None = None,
    progress: bool = True,
    thresholds: Sequence[float] = (),
    threshold_scenes: int | None = 128,
    sheet: str | os.PathLike | None = None,
    worst: int = 20,
    whole: bool = False,
) -> Evaluation:
    """Predicts and scores every scene of ``source`` (raw tars, or Parquet shards of sampled rows).

    A scene that cannot be read, or has no ground truth, is counted as a failure and not scored; so is the rest of a
    shard that breaks off. With ``out``, scenes scored so far stand in ``out`` + ".partial" until all are: an evaluation
    that was killed neither predicts nor scores them again where model, settings, source and software are the same.
    Neither that nor the number of workers changes the result. No global random generator is touched.

    Args:
        source, graph, limit, progress: as in ``predict_files.predict_file``.
        model: on any device and in any mode; it runs in eval mode and gets its own back.
        split: of sampled rows: "train", "validation", "test" or "dev-val"; None for all rows.
        dev_val: how many rows at the end of the train split are "dev-val".
        workers: threads that read ahead, and processes that score meanwhile.
        out: JSON file for the scores of every scene, None for none.
        thresholds: confidences at which the scenes of the first ``threshold_scenes`` rows (None: all) are scored too.
        sheet: PNG file for a picture of the ``worst`` scenes, None for none.
        whole: all scenes or no result: where a shard breaks off that is raised, and ``out`` + ".partial" stays.

    Raises:
        ShardError: the source holds no shard, or none of the split, or is not ``whole``. ScoreError: no scene can be
            scored. ConfigError: a threshold is no probability, or a split of raw scenes. MissingPackageError: no
            hoho2025, or no matplotlib for the sheet. OSError: a file cannot be written.
    """
    _check(out, thresholds, sheet)
    reading = SceneSource(
        source, model.config.num_points, split=split, dev_val=dev_val, limit=limit, workers=workers, whole=whole
    )
    settings = _settings(model, graph, thresholds, threshold_scenes)
    with eval_mode(model):
        return _evaluate(
            reading, by_model(model, graph), settings, out=out, thresholds=thresholds,
            threshold_scenes=threshold_scenes, sheet=sheet, worst=worst, progress=progress,
        )  # fmt: skip


def evaluate_segments(
    path: str | os.PathLike,
    graph: GraphConfig | None = None,
    *,
    threshold: float | None = None,
    limit: int | None = None,
    workers: int = 1,
    out: str | os.PathLike | None = None,
    progress: bool = True,
    thresholds: Sequence[float] = (),
) -> Evaluation:
    """Scores the graphs of the segments in a file of ``predict_files.predict_segments_file``; no model is needed.

    Args:
        graph: None: what the file says. threshold: None: the graph's confidence.
        workers: processes that score. Others as in ``evaluate``; every scene is scored at every threshold.

    Raises:
        SampleError: no such file. ScoreError, ConfigError, MissingPackageError, OSError: as ``evaluate``.
    """
    _check(out, thresholds)
    reading = SegmentSource(path, limit=limit, workers=workers)
    graph = reading.graph if graph is None else graph
    if threshold is not None:
        graph = dataclasses.replace(graph, confidence=threshold)
    check_snapping(graph)
    settings = {"graph": _plain(dataclasses.asdict(graph)), "thresholds": list(thresholds), "software": _versions()}

    def predict(scene, thresholds: tuple[float, ...]) -> Candidate:
        return graphs_at(scene, graph, thresholds)

    return _evaluate(reading, predict, settings, out=out, thresholds=thresholds, progress=progress)


def evaluate_submission(
    source: str | os.PathLike,
    submission: str | os.PathLike,
    *,
    split: str | None = None,
    dev_val: int = DEV_VAL,
    limit: int | None = None,
    workers: int = 1,
    out: str | os.PathLike | None = None,
    progress: bool = True,
) -> Evaluation:
    """Scores anybody's predictions of the scenes of ``source``, which are read for their ground truth alone.

    A scene without a prediction, or with an ill-formed one, scores 0 and says why; a prediction of a scene that is not
    there is a failure, unless only a split is looked at.

    Args:
        submission: a JSON file as ``submissions.read_submission`` takes it. Others as in ``evaluate``.

    Raises:
        SubmissionError: the file does not follow the schema. Others as ``evaluate``.
    """
    _check(out)
    predictions = read_submission(submission)

    def judged(row: Mapping) -> Candidate:
        if reading.sampled:
            sample = read_sample(row)
            truth = Wireframe(sample.gt_vertices, sample.gt_edges.astype("int64"))
        else:
            truth = Wireframe(*read_ground_truth(row)[:2])
        order_id = str(row.get("order_id"))
        return Candidate(order_id, truth, [predictions[order_id]] if order_id in predictions else [])

    reading = SceneSource(source, 0, split=split, dev_val=dev_val, limit=limit, workers=workers, convert=judged)
    settings = {"submission": _wireframes_sha256(predictions), "software": _versions()}
    return _evaluate(
        reading, lambda scene, thresholds: scene, settings, out=out, progress=progress,
        # Predictions of other splits are nobody's fault.
        expected=list(predictions) if split is None else (),
    )  # fmt: skip


def _check(
    out: str | os.PathLike | None, thresholds: Sequence[float] = (), sheet: str | os.PathLike | None = None
) -> None:
    """What can be refused before anything is read."""
    require_hoho()
    if sheet is not None:
        require_matplotlib()
    for threshold in thresholds:
        if not 0 <= threshold <= 1:
            raise ConfigError(f"a threshold must be a probability from 0 to 1, got {threshold}")
    for path in (out, sheet):
        if path is not None:
            check_target(path).parent.mkdir(parents=True, exist_ok=True)


def _evaluate(
    reading: SceneSource | SegmentSource,
    predict: Predict,
    settings: dict,
    *,
    out: str | os.PathLike | None,
    thresholds: Sequence[float] = (),
    threshold_scenes: int | None = None,
    sheet: str | os.PathLike | None = None,
    worst: int = 0,
    progress: bool = True,
    expected: Sequence[str] = (),
) -> Evaluation:
    """What the public functions share: scores scene by scene, written down on the way, then as a whole.

    ``expected``: ids of scenes that ought to be there; one that is not is a failure, unless not all were looked at.
    """
    about = {**settings, "source": reading.identity()}
    with PartialScores(None if out is None else Path(f"{os.fspath(out)}.partial"), about) as partial:
        found = score_scenes(
            reading, predict, tuple(thresholds), threshold_scenes, partial,
            keep=worst if sheet is not None else 0, progress=progress,
        )  # fmt: skip
        if not found.scenes:
            partial.finish()
        seen = {scene.order_id for scene in (*found.scenes, *found.failures)}
        if reading.limit is None and reading.name not in seen:
            missing = (order_id for order_id in expected if order_id not in seen)
            found.failures += [Failure(order_id, "predicted, but no such scene is there") for order_id in missing]
        result = _result(reading, found, thresholds)
        # The scores come last: where they stand, the rest does too.
        items = _sheet_items(reading, found)
        if items:
            contact_sheet(items, sheet)
        if out is not None:
            write_scores(out, {**settings, "source": reading.describe()}, result)
        partial.finish()
    return result


def scored_with(
    source: str | os.PathLike,
    model: Perceiver,
    graph: GraphConfig = GraphConfig(),
    *,
    split: str | None = None,
    dev_val: int = DEV_VAL,
    thresholds: Sequence[float] = (),
    threshold_scenes: int | None = 128,
) -> dict:
    """What such an evaluation's ``out`` says its scores are of: scores under other values are of something else.

    Plain JSON values: "model" (``tensor_sha256``), "graph", "thresholds", "threshold_scenes", "software", "source".
    Arguments and errors are those of ``evaluate``.
    """
    reading = SceneSource(source, model.config.num_points, split=split, dev_val=dev_val)
    return {**_settings(model, graph, thresholds, threshold_scenes), "source": reading.describe()}


def _settings(model: Perceiver, graph: GraphConfig, thresholds: Sequence[float], threshold_scenes: int) -> dict:
    return {
        "model": tensor_sha256(model.state_dict()),
        "graph": _plain(dataclasses.asdict(graph)),
        "thresholds": list(thresholds),
        "threshold_scenes": threshold_scenes,
        "software": _software(model),
    }


def _software(model: Perceiver) -> dict:
    """What a prediction's bits and its score depend on besides the model and the scene."""
    device = next(model.parameters()).device
    return {
        **_versions(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def _wireframes_sha256(predictions: Mapping[str, Wireframe]) -> str:
    digest = hashlib.sha256()
    for order_id, found in predictions.items():
        digest.update(repr((order_id, found.vertices.shape, found.edges.shape)).encode())
        digest.update(found.vertices.tobytes() + found.edges.tobytes())
    return digest.hexdigest()


def _versions() -> dict:
    try:
        hoho = importlib.metadata.version("hoho2025")
    except importlib.metadata.PackageNotFoundError:
        hoho = "unknown"
    return {"wireframe": wireframe.__version__, "hoho2025": hoho}


def _plain(values: dict) -> dict:
    """As JSON gives it back."""
    return json.loads(json.dumps(values))


def _result(reading: SceneSource | SegmentSource, found: SceneScores, thresholds: Sequence[float]) -> Evaluation:
    if not found.scenes:
        reason = found.failures[0].reason if found.failures else "the source is empty"
        raise ScoreError(f"no scene of {reading.name} can be scored: {reason}")
    return Evaluation(
        [scene.order_id for scene in found.scenes],
        [scene.outcome for scene in found.scenes],
        found.failures,
        tuple(_threshold(value, found, i) for i, value in enumerate(thresholds)),
        tuple(scene.order_id for scene in found.worst()),
        reading.title(),
    )


def _threshold(confidence: float, found: SceneScores, position: int) -> Threshold:
    score, scenes = mean_at(found.scenes, position)
    return Threshold(float(confidence), *score, scenes)


def _sheet_items(reading: SceneSource | SegmentSource, found: SceneScores) -> list[SheetItem]:
    """The worst scenes; points that an earlier call had read are read again."""
    worst = {scene.index: scene for scene in found.worst()}
    samples = {index: sample for index, sample in found.samples.items() if index in worst}
    missing = worst.keys() - samples.keys()
    with closing(reading.read(lambda index, row: None if index in missing else index)) as pairs:
        while missing - samples.keys():
            index, sample = next(pairs, (None, None))
            if index is None:
                break
            if isinstance(sample, SampledScene):
                samples[index] = sample
    items = []
    for index, scene in worst.items():
        if index in samples:
            sample = samples[index]
            truth = Wireframe(sample.gt_vertices, sample.gt_edges)
            items.append(
                SheetItem(scene.order_id, *sample.world_points(), truth, scene.predicted, scene.outcome.score)
            )
    return items

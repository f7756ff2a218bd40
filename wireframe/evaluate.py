"""Predicting and scoring whole data sets, raw or sampled."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

import wireframe
from wireframe.checkpoint import tensor_sha256
from wireframe.errors import ConfigError, ScoreError, ShardError, printable
from wireframe.files import atomic_write, check_target
from wireframe.graph import GraphConfig, Wireframe, empty_wireframe
from wireframe.partial_scores import PartialScores
from wireframe.perceiver import Perceiver
from wireframe.plots import SheetItem, contact_sheet, require_matplotlib
from wireframe.predict import predict_segments, wireframe_of
from wireframe.sampling import SampledScene
from wireframe.scene_scores import SceneScores, mean_at, score_scenes
from wireframe.scene_source import Failure, SceneSource
from wireframe.scoring import Outcome, require_hoho, summarise
from wireframe.splits import DEV_VAL

__all__ = ["Evaluation", "Failure", "Threshold", "evaluate", "format_summary", "predict_file", "scored_with"]


class Threshold(NamedTuple):
    """Mean HSS of ``scenes`` scenes where segments of a confidence above ``confidence`` count."""

    confidence: float
    hss: float
    scenes: int


class Evaluation(NamedTuple):
    """order_ids and outcomes of the scored scenes, in order; failures: scenes without a prediction or a truth;
    worst: ids of the scenes of the lowest HSS, the lowest first, as far as asked for."""

    order_ids: list[str]
    outcomes: list[Outcome]
    failures: list[Failure]
    thresholds: tuple[Threshold, ...] = ()
    worst: tuple[str, ...] = ()


def predict_file(
    source: str | os.PathLike,
    out: str | os.PathLike,
    model: Perceiver,
    graph: GraphConfig = GraphConfig(),
    *,
    limit: int | None = None,
    workers: int = 1,
    progress: bool = True,
) -> tuple[int, list[Failure]]:
    """Predicts every raw scene of ``source`` into one JSON file, written whole or not at all.

    The file is a list of ``{"order_id", "wf_vertices" [V][3] metres, "wf_edges" [E][2]}``. A scene that cannot be read
    gets the empty solution and is reported; where a tar breaks off, that is one more failure and the scenes before it
    are kept.

    Args:
        source: a tar, a folder or glob of tars, or ``hf://...``.
        out: the file to write.
        model, graph: what to predict with.
        limit: only the first so many scenes.
        workers: threads that read, fuse and sample the next scenes while the model runs; with 1 nothing runs ahead.
            The predictions do not depend on it.
        progress: whether to show a progress bar on stderr.

    Returns:
        How many scenes there are, and the failures.

    Raises:
        ShardError: the source holds no tar, or no scene. OSError: ``out`` cannot be written.
    """
    from tqdm import tqdm

    reading = SceneSource(source, model.config.num_points, sampled=False, limit=limit, workers=workers)
    check_target(out).parent.mkdir(parents=True, exist_ok=True)
    entries, failures = [], []
    for index, sample in tqdm(reading.read(), disable=not progress, desc="predict", unit="scene"):
        if isinstance(sample, Failure):
            failures.append(sample)
            predicted = empty_wireframe()
        else:
            predicted = wireframe_of(predict_segments(sample, model), sample, graph=graph)
        if index is not None:
            vertices, edges = predicted.vertices.tolist(), predicted.edges.tolist()
            entries.append({"order_id": sample.order_id, "wf_vertices": vertices, "wf_edges": edges})
    if not entries:
        raise ShardError(failures[0].reason if failures else f"{os.fspath(source)} holds no scene")
    with atomic_write(out) as file:
        file.write(json.dumps(entries).encode())
    return len(entries), failures


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
    threshold_scenes: int = 128,
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
        source, graph, limit, progress: as in ``predict_file``.
        model: on any device and in any mode; it runs in eval mode and gets its own back.
        split: of sampled rows: "train", "validation", "test" or "dev-val"; None for all rows.
        dev_val: how many rows at the end of the train split are "dev-val".
        workers: threads that read ahead, and processes that score meanwhile.
        out: JSON file for the scores of every scene, None for none.
        thresholds: confidences at which the scenes of the first ``threshold_scenes`` rows are scored too.
        sheet: PNG file for a picture of the ``worst`` scenes, None for none.
        whole: all scenes or no result: where a shard breaks off that is raised, and ``out`` + ".partial" stays.

    Raises:
        ShardError: the source holds no shard, or none of the split, or is not ``whole``. ScoreError: no scene can be
            scored. ConfigError: a threshold is no probability, or a split of raw scenes. MissingPackageError: no
            hoho2025, or no matplotlib for the sheet. OSError: a file cannot be written.
    """
    require_hoho()
    if sheet is not None:
        require_matplotlib()
    for threshold in thresholds:
        if not 0 <= threshold <= 1:
            raise ConfigError(f"a threshold must be a probability from 0 to 1, got {threshold}")
    for path in (out, sheet):
        if path is not None:
            check_target(path).parent.mkdir(parents=True, exist_ok=True)
    reading = SceneSource(
        source, model.config.num_points, split=split, dev_val=dev_val, limit=limit, workers=workers, whole=whole
    )
    settings = _settings(model, graph, thresholds, threshold_scenes)
    about = {**settings, "source": reading.identity()}
    with PartialScores(None if out is None else Path(f"{os.fspath(out)}.partial"), about) as partial:
        with _eval_mode(model):
            found = score_scenes(
                reading, model, graph, tuple(thresholds), threshold_scenes, partial,
                keep=worst if sheet is not None else 0, progress=progress,
            )  # fmt: skip
        if not found.scenes:
            partial.finish()
        result = _result(reading, found, thresholds)
        # The scores come last: where they stand, the rest does too.
        items = _sheet_items(reading, found)
        if items:
            contact_sheet(items, sheet)
        if out is not None:
            with atomic_write(out) as file:
                head = {**settings, "source": reading.describe()}
                file.write(json.dumps({**head, **_as_json(result)}, indent=1).encode())
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
    threshold_scenes: int = 128,
) -> dict:
    """What such an evaluation's ``out`` says its scores are of: scores under other values are of something else.

    Plain JSON values: "model" (``tensor_sha256``), "graph", "thresholds", "threshold_scenes", "software", "source".
    Arguments and errors are those of ``evaluate``.
    """
    reading = SceneSource(source, model.config.num_points, split=split, dev_val=dev_val)
    return {**_settings(model, graph, thresholds, threshold_scenes), "source": reading.describe()}


def format_summary(result: Evaluation) -> str:
    """The mean scores with their bootstrap interval, the scenes that score 0 for a reason, thresholds, the worst."""
    summary = summarise(result.outcomes)
    lines = [
        f"{summary['scenes']} scenes: HSS {summary['hss']:.4f} (95 % {summary['hss_low']:.4f}-"
        f"{summary['hss_high']:.4f}), F1 {summary['f1']:.4f}, IoU {summary['iou']:.4f}"
    ]
    lines += [f"  scored 0: {count} x {reason}" for reason, count in summary["failures"].items()]
    lines += [f"  threshold {t.confidence:.2f}: HSS {t.hss:.4f} on {t.scenes} scenes" for t in result.thresholds]
    if result.worst:
        lines.append(f"  worst: {', '.join(map(printable, result.worst))}")
    return "\n".join(lines)


def _settings(model: Perceiver, graph: GraphConfig, thresholds: Sequence[float], threshold_scenes: int) -> dict:
    return {
        "model": tensor_sha256(model.state_dict()),
        "graph": _plain(dataclasses.asdict(graph)),
        "thresholds": list(thresholds),
        "threshold_scenes": threshold_scenes,
        "software": _software(model),
    }


@contextmanager
def _eval_mode(model: Perceiver) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _software(model: Perceiver) -> dict:
    """What a prediction's bits and its score depend on besides the model and the scene."""
    device = next(model.parameters()).device
    return {
        "wireframe": wireframe.__version__,
        "torch": torch.__version__,
        "hoho2025": _version("hoho2025"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _plain(values: dict) -> dict:
    """As JSON gives it back."""
    return json.loads(json.dumps(values))


def _result(reading: SceneSource, found: SceneScores, thresholds: Sequence[float]) -> Evaluation:
    if not found.scenes:
        reason = found.failures[0].reason if found.failures else "the source is empty"
        raise ScoreError(f"no scene of {reading.name} can be scored: {reason}")
    return Evaluation(
        [scene.order_id for scene in found.scenes],
        [scene.outcome for scene in found.scenes],
        found.failures,
        tuple(Threshold(float(value), *mean_at(found.scenes, i)) for i, value in enumerate(thresholds)),
        tuple(scene.order_id for scene in found.worst()),
    )


def _sheet_items(reading: SceneSource, found: SceneScores) -> list[SheetItem]:
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


def _as_json(result: Evaluation) -> dict:
    scenes = [
        {"order_id": order_id, **outcome.score._asdict(), "failure": outcome.failure}
        for order_id, outcome in zip(result.order_ids, result.outcomes)
    ]
    return {
        "summary": summarise(result.outcomes),
        "at_thresholds": [threshold._asdict() for threshold in result.thresholds],
        "worst": list(result.worst),
        "scenes": scenes,
        "not_scored": [list(failure) for failure in result.failures],
    }

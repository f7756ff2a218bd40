"""Predicting and scoring whole data sets, raw or sampled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import NamedTuple

from wireframe.errors import ScoreError, ShardError, WireframeError
from wireframe.files import atomic_write, check_target
from wireframe.fusion import fuse_views
from wireframe.graph import GraphConfig, Wireframe, empty_wireframe
from wireframe.perceiver import Perceiver
from wireframe.predict import predict_segments, predict_wireframe, wireframe_of
from wireframe.samples import is_sampled, iter_sample_rows, list_parquet, read_sample
from wireframe.sampling import SampledScene, sample_points
from wireframe.scene import read_scene
from wireframe.scoring import Outcome, require_hoho, score_many, summarise
from wireframe.shards import iter_rows, list_shards


class Failure(NamedTuple):
    """A scene that could not be predicted; it gets the empty solution."""

    order_id: str
    reason: str


class Evaluation(NamedTuple):
    """order_ids and outcomes of the scored scenes, in order; failures: scenes without a prediction or a truth."""

    order_ids: list[str]
    outcomes: list[Outcome]
    failures: list[Failure]


def predict_file(
    source: str | os.PathLike,
    out: str | os.PathLike,
    model: Perceiver,
    graph: GraphConfig = GraphConfig(),
    *,
    limit: int | None = None,
    progress: bool = True,
) -> tuple[int, list[Failure]]:
    """Predicts every raw scene of ``source`` into one JSON file, written whole or not at all.

    The file is a list of ``{"order_id", "wf_vertices" [V][3] metres, "wf_edges" [E][2]}``. A scene that cannot be read
    gets the empty solution and is reported; where a tar breaks off, that is one more failure and the scenes before it
    are kept.

    Returns:
        How many scenes there are, and the failures.

    Raises:
        ShardError: the source holds no tar, or no scene. OSError: ``out`` cannot be written.
    """
    from tqdm import tqdm

    list_shards(source)
    check_target(out).parent.mkdir(parents=True, exist_ok=True)
    entries, failures = [], []
    rows = _whole_rows(iter_rows(source, limit), source, failures)
    for row in tqdm(rows, disable=not progress, desc="predict", unit="scene"):
        try:
            predicted = predict_wireframe(row, model, graph=graph)
        except WireframeError as problem:
            failures.append(Failure(row["order_id"], str(problem)))
            predicted = empty_wireframe()
        entries.append(
            {
                "order_id": row["order_id"],
                "wf_vertices": predicted.vertices.tolist(),
                "wf_edges": predicted.edges.tolist(),
            }
        )
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
    limit: int | None = None,
    workers: int = 1,
    out: str | os.PathLike | None = None,
    progress: bool = True,
) -> Evaluation:
    """Predicts and scores every scene of ``source`` (raw tars, or Parquet shards of sampled rows).

    A scene that cannot be read, or has no ground truth, is counted as a failure and not scored; so is the rest of a
    shard that breaks off.

    Raises:
        ShardError: the source holds no shard. ScoreError: no scene can be scored. MissingPackageError: no hoho2025.
    """
    from tqdm import tqdm

    require_hoho()
    if out is not None:
        check_target(out).parent.mkdir(parents=True, exist_ok=True)
    order_ids, pairs, failures = [], [], []
    samples = _samples(source, model.config.num_points, limit, failures)
    for sample in tqdm(samples, disable=not progress, desc="predict", unit="scene"):
        predicted = wireframe_of(predict_segments(sample, model), sample, graph=graph)
        order_ids.append(sample.order_id)
        pairs.append((predicted, Wireframe(sample.gt_vertices, sample.gt_edges.astype("int64"))))
    if not pairs:
        reason = failures[0].reason if failures else "the source is empty"
        raise ScoreError(f"no scene of {os.fspath(source)} can be scored: {reason}")
    with tqdm(total=len(pairs), disable=not progress, desc="score", unit="scene") as bar:
        outcomes = score_many(pairs, workers=workers, progress=lambda done, _: bar.update(done - bar.n))
    result = Evaluation(order_ids, outcomes, failures)
    if out is not None:
        with atomic_write(out) as file:
            file.write(json.dumps(_as_json(result), indent=1).encode())
    return result


def format_summary(result: Evaluation) -> str:
    """The mean scores with their bootstrap interval, and the scenes that score 0 for a reason."""
    summary = summarise(result.outcomes)
    lines = [
        f"{summary['scenes']} scenes: HSS {summary['hss']:.4f} (95 % {summary['hss_low']:.4f}-"
        f"{summary['hss_high']:.4f}), F1 {summary['f1']:.4f}, IoU {summary['iou']:.4f}"
    ]
    lines += [f"  scored 0: {count} x {reason}" for reason, count in summary["failures"].items()]
    return "\n".join(lines)


def _samples(
    source: str | os.PathLike, num_points: int, limit: int | None, failures: list[Failure]
) -> Iterator[SampledScene]:
    """Sampled scenes with ground truth; the others go to ``failures``."""
    if is_sampled(source):
        list_parquet(source)
        read, rows = _read_sampled, iter_sample_rows(source)
    else:
        list_shards(source)
        read, rows = _read_raw, iter_rows(source)
    for count, row in enumerate(_whole_rows(rows, source, failures)):
        if count == limit:
            return
        try:
            sample = read(row, num_points)
        except WireframeError as problem:
            failures.append(Failure(str(row.get("order_id")), str(problem)))
            continue
        if len(sample.gt_edges) == 0:
            failures.append(Failure(sample.order_id, "no ground truth"))
            continue
        yield sample


def _read_sampled(row: dict, _num_points: int) -> SampledScene:
    return read_sample(row)


def _read_raw(row: dict, num_points: int) -> SampledScene:
    return sample_points(fuse_views(read_scene(row)), num_points)


def _whole_rows(rows: Iterator[dict], source: str | os.PathLike, failures: list[Failure]) -> Iterator[dict]:
    """The rows up to where the source breaks off; the break itself goes to ``failures``."""
    try:
        yield from rows
    except ShardError as problem:
        failures.append(Failure(os.fspath(source), str(problem)))


def _as_json(result: Evaluation) -> dict:
    scenes = [
        {"order_id": order_id, **outcome.score._asdict(), "failure": outcome.failure}
        for order_id, outcome in zip(result.order_ids, result.outcomes)
    ]
    return {"summary": summarise(result.outcomes), "scenes": scenes, "not_scored": [list(f) for f in result.failures]}

"""Predicting and scoring whole data sets, raw or sampled."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from wireframe.ahead import in_order
from wireframe.errors import ScoreError, ShardError, WireframeError
from wireframe.files import atomic_write, check_target
from wireframe.fusion import fuse_views
from wireframe.graph import GraphConfig, Wireframe, empty_wireframe
from wireframe.perceiver import Perceiver
from wireframe.predict import predict_segments, wireframe_of
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

    list_shards(source)
    check_target(out).parent.mkdir(parents=True, exist_ok=True)
    entries, failures = [], []
    samples = _read_all(_raw_reader(model, workers), iter_rows(source, limit), source, workers, failures)
    for sample in tqdm(samples, disable=not progress, desc="predict", unit="scene"):
        if isinstance(sample, Failure):
            failures.append(sample)
            predicted = empty_wireframe()
        else:
            predicted = wireframe_of(predict_segments(sample, model), sample, graph=graph)
        entries.append(
            {
                "order_id": sample.order_id,
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

    Args:
        source, model, graph, limit, progress: as in ``predict_file``.
        workers: threads that read ahead, as in ``predict_file``, and then processes that score.
        out: JSON file for the scores of every scene, None for none.

    Raises:
        ShardError: the source holds no shard. ScoreError: no scene can be scored. MissingPackageError: no hoho2025.
    """
    from tqdm import tqdm

    require_hoho()
    if out is not None:
        check_target(out).parent.mkdir(parents=True, exist_ok=True)
    order_ids, pairs, failures = [], [], []
    samples = _scenes_with_truth(source, model, limit, workers, failures)
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


def _scenes_with_truth(
    source: str | os.PathLike, model: Perceiver, limit: int | None, workers: int, failures: list[Failure]
) -> Iterator[SampledScene]:
    """Sampled scenes with ground truth; the others go to ``failures``."""
    if is_sampled(source):
        list_parquet(source)
        read, rows = read_sample, iter_sample_rows(source)
    else:
        list_shards(source)
        read, rows = _raw_reader(model, workers), iter_rows(source)
    for sample in _read_all(read, islice(rows, limit), source, workers, failures):
        if isinstance(sample, Failure):
            failures.append(sample)
        elif len(sample.gt_edges) == 0:
            failures.append(Failure(sample.order_id, "no ground truth"))
        else:
            yield sample


def _raw_reader(model: Perceiver, workers: int) -> Callable[[dict], SampledScene]:
    # Several workers have a core each; one has those that the model does not use at that moment.
    threads = None if workers == 1 else 1
    return functools.partial(_read_raw, num_points=model.config.num_points, threads=threads)


def _read_raw(row: dict, num_points: int, threads: int | None) -> SampledScene:
    return sample_points(fuse_views(read_scene(row), threads=threads), num_points, threads=threads)


def _read_all(
    read: Callable[[dict], SampledScene],
    rows: Iterable[dict],
    source: str | os.PathLike,
    workers: int,
    failures: list[Failure],
) -> Iterator[SampledScene | Failure]:
    """What each row holds, or why it cannot be read; where the source breaks off, that goes to ``failures``."""

    def attempt(row: dict) -> SampledScene | Failure:
        try:
            return read(row)
        except WireframeError as problem:
            return Failure(str(row.get("order_id")), str(problem))

    try:
        yield from in_order(attempt, rows, workers)
    except ShardError as problem:
        failures.append(Failure(os.fspath(source), str(problem)))


def _as_json(result: Evaluation) -> dict:
    scenes = [
        {"order_id": order_id, **outcome.score._asdict(), "failure": outcome.failure}
        for order_id, outcome in zip(result.order_ids, result.outcomes)
    ]
    return {"summary": summarise(result.outcomes), "scenes": scenes, "not_scored": [list(f) for f in result.failures]}

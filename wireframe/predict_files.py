"""Predicting whole data sets into one file: wireframes as JSON, or all segments for scoring and tuning."""

from __future__ import annotations

import dataclasses
import os

from wireframe.checkpoint import tensor_sha256
from wireframe.errors import Failure, ShardError
from wireframe.files import check_target
from wireframe.graph import GraphConfig, Wireframe, empty_wireframe
from wireframe.perceiver import Perceiver
from wireframe.predict import PredictedScene, eval_mode, predict_segments, wireframe_of, with_truth
from wireframe.scene_source import SceneSource
from wireframe.segment_files import write_segments
from wireframe.splits import DEV_VAL
from wireframe.submissions import write_submission


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
    are kept. Where an order_id comes again, its first scene counts, and the other one is reported.

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
    found: dict[str, Wireframe] = {}
    failures = []
    with eval_mode(model):
        for index, sample in tqdm(reading.read(), disable=not progress, desc="predict", unit="scene"):
            if index is not None and sample.order_id in found:
                failures.append(Failure(sample.order_id, "it is there twice; the first one was predicted"))
                continue
            if isinstance(sample, Failure):
                failures.append(sample)
                predicted = empty_wireframe()
            else:
                predicted = wireframe_of(predict_segments(sample, model), sample, graph=graph)
            if index is not None:
                found[sample.order_id] = predicted
    if not found:
        raise ShardError(failures[0].reason if failures else f"{os.fspath(source)} holds no scene")
    write_submission(out, found.items())
    return len(found), failures


def predict_segments_file(
    source: str | os.PathLike,
    out: str | os.PathLike,
    model: Perceiver,
    graph: GraphConfig = GraphConfig(),
    *,
    split: str | None = None,
    dev_val: int = DEV_VAL,
    limit: int | None = None,
    workers: int = 1,
    progress: bool = True,
) -> tuple[int, list[Failure]]:
    """All segments of every scene, with points and truth as far as graphs and scores need them, into one .npz file.

    ``evaluate.evaluate_segments`` and ``tuning.tune`` read it, without the model. Arguments, result and errors are
    those of ``predict_file``; the source may hold sampled rows too, of which ``split`` and ``dev_val`` choose as in
    ``evaluate``. The graph is what the file is scored with where nothing else is asked for. A scene that cannot be read
    is left out and reported.
    """
    from tqdm import tqdm

    reading = SceneSource(source, model.config.num_points, split=split, dev_val=dev_val, limit=limit, workers=workers)
    check_target(out).parent.mkdir(parents=True, exist_ok=True)
    scenes: list[PredictedScene] = []
    failures = []
    with eval_mode(model):
        for _, sample in tqdm(
            reading.read(), total=reading.expected(), disable=not progress, desc="predict", unit="scene"
        ):
            if isinstance(sample, Failure):
                failures.append(sample)
            else:
                scenes.append(with_truth(predict_segments(sample, model), sample))
    if not scenes:
        raise ShardError(failures[0].reason if failures else f"{os.fspath(source)} holds no scene")
    about = {"model": tensor_sha256(model.state_dict()), "source": reading.describe(), "title": reading.title()}
    write_segments(out, scenes, {**about, "graph": dataclasses.asdict(graph)})
    return len(scenes), failures

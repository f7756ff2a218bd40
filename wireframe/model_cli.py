"""The commands ``wireframe predict``, ``eval`` and ``tune``: their arguments, and what they call."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from wireframe import sharing
from wireframe.arguments import (
    add_workers,
    model_arguments,
    non_negative,
    path,
    positive,
    probability,
    refuse,
    share_cores,
    split_arguments,
)
from wireframe.errors import ConfigError, Failure, print_failures

_FORMATS = ("json", "obj", "ply", "segments")


def predict_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="raw scenes: a tar, a folder or glob of tars, or hf://...")
    command.add_argument("out", type=path, help="JSON file: a list of {order_id, wf_vertices, wf_edges}; else a folder")
    model_arguments(command)
    command.add_argument(
        "--format", choices=_FORMATS, default="json",
        help="obj, ply: also a mesh a scene (trimesh); segments: all segments as .npz, of sampled rows too, for eval",
    )  # fmt: skip
    split_arguments(command)
    add_workers(command, "threads that read ahead")


def predict(arguments: argparse.Namespace) -> int:
    if arguments.format == "segments":
        return _predict_segments(arguments)
    refuse([(arguments.split, "--split", "wireframes are predicted of raw scenes; it goes with --format segments")])
    share_cores(arguments)
    from wireframe.mesh_formats import require_trimesh
    from wireframe.predict_files import predict_file

    meshes = arguments.format != "json"
    if meshes:
        require_trimesh()
    out = arguments.out / "wireframes.json" if meshes else arguments.out
    count, failures = predict_file(
        arguments.source, out, *_model(arguments),
        limit=arguments.limit, workers=arguments.workers, progress=not arguments.quiet,
    )  # fmt: skip
    print_failures("failed:", failures)
    print(f"{count} scenes in {out}; {len(failures)} could not be read")
    if meshes:
        _write_meshes(out, arguments.format)
    return 0 if count > len(failures) and not broke_off(failures, arguments.source) else 1


def _write_meshes(predictions: Path, file_format: str) -> None:
    from wireframe.mesh_formats import write_meshes
    from wireframe.submissions import read_submission

    written = write_meshes(predictions.parent, read_submission(predictions).items(), file_format)
    none = f"; {len(written.empty)} scenes have no wireframe and no mesh" if written.empty else ""
    print(f"{len(written.files)} meshes (.{file_format}) beside it{none}")


def _predict_segments(arguments: argparse.Namespace) -> int:
    if arguments.out.suffix != ".npz":
        raise ConfigError(f"a file of segments ends in .npz, by which eval knows it; {arguments.out} does not")
    _share_cores_if_raw(arguments)
    from wireframe.predict_files import predict_segments_file

    count, failures = predict_segments_file(
        arguments.source, arguments.out, *_model(arguments), split=arguments.split, dev_val=arguments.dev_val,
        limit=arguments.limit, workers=arguments.workers, progress=not arguments.quiet,
    )  # fmt: skip
    print_failures("left out:", failures)
    print(f"all segments of {count} scenes in {arguments.out}")
    return 1 if broke_off(failures, arguments.source) else 0


def broke_off(failures: Sequence[Failure], source: str) -> bool:
    """Whether a shard of the source ended before its time."""
    return any(failure.order_id == source for failure in failures)


def eval_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "source", help="scenes with ground truth: raw tars, sampled Parquet shards, or a file of segments (.npz)"
    )
    model_arguments(command)
    command.add_argument("--pred", type=path, help="score the predictions in this JSON file instead of a model's")
    command.add_argument("--thresholds", type=probability, nargs="+", default=[], help="confidences to score at too")
    command.add_argument("--out", type=path, help="JSON file for the scores of every scene; goes on where it stopped")
    command.add_argument("--against", type=path, help="compare, scene by scene, with the scores in this --out file")
    split_arguments(command)
    command.add_argument("--worst", type=non_negative, default=0, help="draw so many of the worst scenes beside --out")
    add_workers(command, "threads that read ahead, then processes that score")


def evaluate(arguments: argparse.Namespace) -> int:
    if arguments.worst and not arguments.out:
        raise ConfigError("--worst draws its picture beside --out; give one")
    from wireframe.scene_scores import NO_PREDICTION
    from wireframe.score_files import compare, format_summary, read_scores

    others = read_scores(arguments.against) if arguments.against else None
    sheet = arguments.out.with_suffix(".worst.png") if arguments.worst else None
    result = _evaluation(arguments, sheet)
    print(format_summary(result))
    if others is not None:
        ours = {order_id: outcome.score for order_id, outcome in zip(result.order_ids, result.outcomes)}
        print(f"these less {arguments.against}: {compare(ours, others)}")
    if sheet:
        print(f"worst scenes: {sheet}")
        sharing.warn(sheet, sharing.count_guarded(result.worst))
    print_failures("not scored:", result.failures)
    if all(outcome.failure == NO_PREDICTION for outcome in result.outcomes):
        print(f"there is a prediction for none of the {len(result.outcomes)} scenes", file=sys.stderr)
        return 1
    return 1 if broke_off(result.failures, arguments.source) else 0


def _evaluation(arguments: argparse.Namespace, sheet: Path | None):
    """Of a file of segments, of a file of predictions, or of a model."""
    shared = {"limit": arguments.limit, "workers": arguments.workers, "out": arguments.out}
    shared["progress"] = not arguments.quiet
    if arguments.source.endswith(".npz"):
        refuse([
            (arguments.model, "--model", "the segments in the file are a model's already"),
            (arguments.pred, "--pred", "a file of segments is no data set; give the scenes"),
            (arguments.split, "--split", "it is chosen when a file of segments is written"),
            (sheet, "--worst", "the picture needs the scenes and the model"),
        ])  # fmt: skip
        from wireframe.evaluate import evaluate_segments
        from wireframe.pretrained import graph_settings

        graph = graph_settings(None, arguments.config) if arguments.config else None
        shared |= {"thresholds": arguments.thresholds, "threshold": arguments.threshold}
        return evaluate_segments(arguments.source, graph, **shared)
    _share_cores_if_raw(arguments)
    shared |= {"split": arguments.split, "dev_val": arguments.dev_val}
    if arguments.pred:
        refuse_with_predictions(arguments)
        refuse([
            (arguments.thresholds, "--thresholds", "--pred holds no confidences"),
            (sheet, "--worst", "the picture needs a model; `wireframe view --pred` shows predictions"),
        ])  # fmt: skip
        from wireframe.evaluate import evaluate_submission

        return evaluate_submission(arguments.source, arguments.pred, **shared)
    from wireframe.evaluate import evaluate

    return evaluate(
        arguments.source, *_model(arguments), **shared, thresholds=arguments.thresholds, threshold_scenes=None,
        sheet=sheet, worst=arguments.worst,
    )  # fmt: skip


def refuse_with_predictions(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for what a file of predictions cannot answer."""
    refuse([
        (arguments.model, "--model", "--pred holds the predictions"),
        (arguments.config, "--config", "--pred holds finished graphs"),
        (arguments.threshold is not None, "--threshold", "--pred holds no confidences"),
    ])  # fmt: skip


def _share_cores_if_raw(arguments: argparse.Namespace) -> None:
    from wireframe.samples import is_sampled

    # Sampled rows are read in no time: there the model has all cores.
    if is_sampled(arguments.source):
        return
    refuse([(arguments.split, "--split", "raw tars have no splits, sampled rows (Parquet) do")])
    share_cores(arguments)


def _model(arguments: argparse.Namespace):
    from wireframe.pretrained import load_model

    return load_model(arguments.model, arguments.config, arguments.threshold)


def tune_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", type=path, help="file of segments of scenes kept for tuning")
    command.add_argument("model", type=path, help="folder of the model, to put graph.json into")
    command.add_argument("--limit", type=positive, help="only the first scenes")
    add_workers(command, "processes that score")


def tune(arguments: argparse.Namespace) -> int:
    from wireframe.checkpoint import tensor_sha256
    from wireframe.perceiver import Perceiver
    from wireframe.pretrained import save_graph
    from wireframe.segment_files import SegmentSource
    from wireframe.tuning import format_trials
    from wireframe.tuning import tune as choose

    if not arguments.model.is_dir():
        raise ConfigError(f"{arguments.model} is no folder: give that of the model, where graph.json belongs")
    source = SegmentSource(arguments.source, limit=arguments.limit, workers=arguments.workers)
    if source.about.get("model") != tensor_sha256(Perceiver.from_checkpoint(arguments.model).state_dict()):
        raise ConfigError(f"the segments in {arguments.source} are of another model than {arguments.model}")
    graph, trials = choose(source, progress=not arguments.quiet)
    print(format_trials(trials))
    if not any(trial.score.hss > 0 for trial in trials):
        print(f"no setting scores above 0: there is nothing to choose, and {arguments.model} stays as it is",
              file=sys.stderr)  # fmt: skip
        return 1
    save_graph(graph, arguments.model)
    print(f"\nthe best is in {arguments.model / 'graph.json'}; score it on other scenes than these")
    return 0

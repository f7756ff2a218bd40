"""The command ``wireframe``: doctor, synth, prepare, train, predict, eval, view, report, verify, bench, demo.

Exit status: 0 done, 1 done but nothing came of it (every scene failed), a shard broke off or a check failed, 2 wrong
input, 3 a fault of ours, 4 training or a submission stopped by a signal and saved, 5 training gave up on losses that
are not finite, 130 interrupted. Errors are one line on stderr; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import wireframe
from wireframe.arguments import add_workers, fraction, non_negative, nonempty, path, positive, probability, size
from wireframe.bench import cli as benching
from wireframe.errors import ConfigError, WireframeError, one_line
from wireframe.submit import cli as submitting
from wireframe.train import cli as training


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        print(f"wireframe {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (a pager, head): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (WireframeError, OSError) as problem:
        if arguments.debug:
            raise
        text = str(problem)
        if isinstance(problem, OSError) and problem.filename is not None:
            text = f"{problem.filename}: {problem.strerror}"
        print(f"wireframe {arguments.command}: {one_line(text, 2000)}", file=sys.stderr)
        return getattr(problem, "exit_status", 2)
    except Exception as problem:
        if arguments.debug:
            raise
        fault = f"{type(problem).__name__}: {one_line(problem)}"
        print(f"wireframe {arguments.command}: a fault of ours, {fault}; --debug shows where", file=sys.stderr)
        return 3


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    shared.add_argument("--quiet", action="store_true", help="no progress bars")
    parser = argparse.ArgumentParser(prog="wireframe", description="3D building wireframes from multi-view scans")
    parser.add_argument("--version", action="version", version=f"wireframe {wireframe.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_arguments, run, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, parents=[shared])
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


def _doctor_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("data", nargs="?", help="a tar, folder, glob or hf:// path whose first sample to describe")


def _doctor(arguments: argparse.Namespace) -> int:
    from wireframe.doctor import describe_machine

    print(describe_machine())
    if arguments.data:
        from wireframe.inspect_data import describe_data

        print()
        print(describe_data(arguments.data))
    return 0


def _synth_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("out", type=path, help="folder for the tars")
    command.add_argument("--count", type=positive, default=100, help="scenes (default 100)")
    command.add_argument("--start", type=non_negative, default=0, help="index of the first scene (default 0)")
    command.add_argument("--seed", type=non_negative, default=0)
    command.add_argument("--size", type=size, help="label maps, default 768x576")
    command.add_argument("--preset", choices=("default", "training"), default="default", help="training: small, fast")
    command.add_argument("--shard-size", type=positive, default=100, help="scenes a tar (default 100)")
    command.add_argument("--set", action="append", default=[], metavar="key=value", help="a setting of SynthConfig")
    add_workers(command)


def _synth(arguments: argparse.Namespace) -> int:
    from wireframe.synth import SynthConfig, write_shards

    changes = dict(zip(("width", "height"), arguments.size or ()))
    preset = SynthConfig.training() if arguments.preset == "training" else SynthConfig()
    config = preset.changed(arguments.set, **changes)
    paths = write_shards(
        arguments.out,
        seed=arguments.seed,
        start=arguments.start,
        count=arguments.count,
        config=config,
        shard_size=arguments.shard_size,
        workers=arguments.workers,
        progress=not arguments.quiet,
    )
    print(f"{arguments.count} scenes in {len(paths)} tars in {arguments.out}")
    return 0


def _prepare_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="raw scenes: a tar, a folder or glob of tars, or hf://...")
    command.add_argument("out", type=path, help="folder for the Parquet shards")
    command.add_argument("--points", type=positive, default=4096, help="points a scene (default 4096)")
    command.add_argument("--depth-points", type=positive, default=8000, help="depth pixels a view (default 8000)")
    command.add_argument("--seed", type=non_negative, default=0)
    command.add_argument("--shard", type=fraction, default=(0, 1), metavar="i/n", help="every n-th tar from the i-th")
    command.add_argument("--keep-all", action="store_true", help="also scenes without ground truth or with > 64 edges")
    samplers = ("priority", "fps", "voxel")
    command.add_argument("--sampler", choices=samplers, default="priority", help="which points (default priority)")
    add_workers(command, "threads")


def _prepare(arguments: argparse.Namespace) -> int:
    from wireframe.prepare import PrepareConfig, prepare

    config = PrepareConfig(
        arguments.points, arguments.depth_points, arguments.seed, arguments.keep_all, arguments.sampler
    )
    report = prepare(
        arguments.source,
        arguments.out,
        config,
        workers=arguments.workers,
        shard=arguments.shard,
        progress=not arguments.quiet,
    )
    resumed = f" ({report.resumed} were already there)" if report.resumed else ""
    print(f"{report.rows} rows in {report.shards + report.resumed} shards{resumed} in {arguments.out}")
    _print_failures("left out", report.skipped)
    _print_failures("broke off:", report.damaged)
    if not report.rows and not report.skipped and not report.damaged:
        print(f"{arguments.source}: no scene in the tars of this share", file=sys.stderr)
    worked = report.rows > 0 or not (report.shards + report.resumed)
    return 0 if worked and not report.damaged else 1


def _print_failures(what: str, failures) -> None:
    for scene in failures[:20]:
        print(one_line(f"{what} {scene.order_id}: {scene.reason}"), file=sys.stderr)
    if len(failures) > 20:
        print(f"... and {len(failures) - 20} more", file=sys.stderr)


def _model_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", type=nonempty, help="folder, published .pt or hf://... (default: the shipped demo model)"
    )
    command.add_argument(
        "--config", type=Path,
        help="JSON whose graph section counts (default: graph.json beside the model, else base; demo for the shipped)",
    )  # fmt: skip
    command.add_argument("--threshold", type=probability, help="confidence to exceed (default: that of the graph)")
    command.add_argument("--limit", type=positive, help="only the first scenes")


def _load_model(arguments: argparse.Namespace):
    """The model, and the graph's settings with the threshold asked for."""
    from wireframe.assets import DEMO_MODEL
    from wireframe.perceiver import Perceiver

    return Perceiver.from_checkpoint(arguments.model or DEMO_MODEL), _graph(arguments)


def _graph(arguments: argparse.Namespace):
    import dataclasses

    from wireframe.pretrained import read_graph
    from wireframe.train.config import BASE_CONFIG, DEMO_CONFIG, load_config

    graph = read_graph(arguments.model) if arguments.model and not arguments.config else None
    if graph is None:
        graph = load_config(arguments.config or (BASE_CONFIG if arguments.model else DEMO_CONFIG)).graph
    if arguments.threshold is not None:
        graph = dataclasses.replace(graph, confidence=arguments.threshold)
    return graph


def _predict_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="raw scenes: a tar, a folder or glob of tars, or hf://...")
    command.add_argument("out", type=path, help="JSON file: a list of {order_id, wf_vertices, wf_edges}; else a folder")
    formats = ("json", "obj", "ply", "segments")
    command.add_argument(
        "--format", choices=formats, default="json",
        help="obj, ply: also a mesh a scene (trimesh); segments: all segments as .npz, of sampled rows too, for eval",
    )  # fmt: skip
    _split_arguments(command)
    _model_arguments(command)
    add_workers(command, "threads that read ahead")


def _split_arguments(command: argparse.ArgumentParser) -> None:
    splits = ("train", "validation", "test", "dev-val")
    command.add_argument("--split", choices=splits, help="of sampled rows; dev-val: the last rows of train")
    command.add_argument("--dev-val", type=positive, default=1024, help="how many rows dev-val is (default 1024)")


def _share_cores(arguments: argparse.Namespace) -> None:
    """While scenes are read ahead, threads of the model that wait must sleep, not spin on a core that a reader needs.

    OpenMP reads this when torch loads it. (Measured: predict with the demo model, 2 cores: 17 scenes/s, spinning 11.)
    """
    if arguments.workers > 1:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _predict(arguments: argparse.Namespace) -> int:
    _share_cores(arguments)
    if arguments.format == "segments":
        return _predict_segments(arguments)
    if arguments.split:
        raise ConfigError("--split goes with --format segments alone: wireframes are predicted of raw scenes")
    from wireframe.mesh_formats import require_trimesh
    from wireframe.predict_files import predict_file

    meshes = arguments.format != "json"
    if meshes:
        require_trimesh()
    out = arguments.out / "wireframes.json" if meshes else arguments.out
    count, failures = predict_file(
        arguments.source,
        out,
        *_load_model(arguments),
        limit=arguments.limit,
        workers=arguments.workers,
        progress=not arguments.quiet,
    )
    _print_failures("failed:", failures)
    print(f"{count} scenes in {out}; {len(failures)} could not be read")
    if meshes:
        _write_meshes(out, arguments.format)
    return 0 if count > len(failures) and not _broke_off(failures, arguments.source) else 1


def _predict_segments(arguments: argparse.Namespace) -> int:
    from wireframe.predict_files import predict_segments_file

    if arguments.out.suffix != ".npz":
        raise ConfigError(f"a file of segments ends in .npz, by which eval knows it; {arguments.out} does not")
    count, failures = predict_segments_file(
        arguments.source, arguments.out, *_load_model(arguments), split=arguments.split, dev_val=arguments.dev_val,
        limit=arguments.limit, workers=arguments.workers, progress=not arguments.quiet,
    )  # fmt: skip
    _print_failures("left out:", failures)
    print(f"all segments of {count} scenes in {arguments.out}")
    return 1 if _broke_off(failures, arguments.source) else 0


def _write_meshes(predictions: Path, file_format: str) -> None:
    from wireframe.mesh_formats import write_meshes
    from wireframe.submissions import read_submission

    written = write_meshes(predictions.parent, read_submission(predictions).items(), file_format)
    none = f"; {len(written.empty)} scenes have no wireframe and no mesh" if written.empty else ""
    print(f"{len(written.files)} meshes (.{file_format}) beside it{none}")


def _broke_off(failures, source: str) -> bool:
    return any(failure.order_id == source for failure in failures)


def _eval_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="scenes with ground truth: raw tars or sampled Parquet; or a file of segments")
    _model_arguments(command)
    command.add_argument("--pred", type=Path, help="score the predictions in this JSON file instead of a model's")
    command.add_argument("--thresholds", type=probability, nargs="+", default=[], help="confidences to score at too")
    command.add_argument("--out", type=path, help="JSON file for the scores of every scene; goes on where it stopped")
    command.add_argument("--against", type=Path, help="compare, scene by scene, with the scores in this --out file")
    _split_arguments(command)
    command.add_argument("--worst", type=non_negative, default=0, help="draw so many of the worst scenes beside --out")
    add_workers(command, "threads that read ahead, then processes that score")


def _eval(arguments: argparse.Namespace) -> int:
    if arguments.worst and not arguments.out:
        raise ConfigError("--worst draws its picture beside --out; give one")
    from wireframe.score_files import compare, format_summary, read_scores

    others = read_scores(arguments.against) if arguments.against else None
    sheet = arguments.out.with_suffix(".worst.png") if arguments.worst else None
    result = _evaluation(arguments, sheet)
    print(format_summary(result))
    if others is not None:
        ours = {order_id: outcome.score for order_id, outcome in zip(result.order_ids, result.outcomes)}
        print(f"against {arguments.against}: {compare(ours, others)}")
    if sheet:
        print(f"worst scenes: {sheet}")
    _print_failures("not scored:", result.failures)
    return 1 if _broke_off(result.failures, arguments.source) else 0


def _evaluation(arguments: argparse.Namespace, sheet: Path | None):
    """Of a file of segments, of a file of predictions, or of a model."""
    segments = arguments.source.endswith(".npz")
    for given, name, reason in (
        (segments and arguments.model, "--model", "the segments in the file are a model's already"),
        (segments and arguments.pred, "--pred", "a file of segments is no data set; give the scenes"),
        (segments and arguments.split, "--split", "a file of segments has none; choose when it is written"),
        (arguments.pred and arguments.model, "--model", "--pred holds the predictions"),
        (arguments.pred and arguments.thresholds, "--thresholds", "--pred holds no confidences"),
        (arguments.pred and arguments.threshold is not None, "--threshold", "--pred holds no confidences"),
        ((segments or arguments.pred) and sheet, "--worst", "the picture needs the scenes and the model"),
    ):
        if given:
            raise ConfigError(f"{name} does not go with {arguments.source if segments else '--pred'}: {reason}")
    shared = {"limit": arguments.limit, "workers": arguments.workers, "out": arguments.out}
    shared["progress"] = not arguments.quiet
    if segments:
        from wireframe.evaluate import evaluate_segments

        shared |= {"thresholds": arguments.thresholds, "threshold": arguments.threshold}
        return evaluate_segments(arguments.source, _graph(arguments) if arguments.config else None, **shared)
    from wireframe.samples import is_sampled

    # Sampled rows are read in no time: there the model has all cores.
    if not is_sampled(arguments.source):
        if arguments.split:
            raise ConfigError("--split wants sampled rows (Parquet); raw tars have no splits")
        _share_cores(arguments)
    from wireframe.evaluate import evaluate, evaluate_submission

    shared |= {"split": arguments.split, "dev_val": arguments.dev_val}
    if arguments.pred:
        return evaluate_submission(arguments.source, arguments.pred, **shared)
    return evaluate(
        arguments.source, *_load_model(arguments), **shared, thresholds=arguments.thresholds, threshold_scenes=None,
        sheet=sheet, worst=arguments.worst,
    )  # fmt: skip


def _tune_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", type=path, help="file of segments of scenes kept for tuning")
    command.add_argument("out", type=path, help="folder of the model, to put graph.json beside it")
    command.add_argument("--limit", type=positive, help="only the first scenes")
    add_workers(command, "processes that score")


def _tune(arguments: argparse.Namespace) -> int:
    from wireframe.pretrained import save_graph
    from wireframe.tuning import format_trials, tune

    if not arguments.out.is_dir():
        raise ConfigError(f"{arguments.out} is no folder: give that of the model, where graph.json belongs")
    graph, trials = tune(
        arguments.source, limit=arguments.limit, workers=arguments.workers, progress=not arguments.quiet
    )
    save_graph(graph, arguments.out)
    print(format_trials(trials))
    print(f"\nthe best is in {arguments.out / 'graph.json'}; score it on other scenes than these")
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    if not arguments.bundle:
        return submitting.submit(arguments)
    submitting.refuse_run_options(arguments)
    from wireframe.submit.bundle import write_bundle

    files = write_bundle(arguments.bundle, *_load_model(arguments))
    print(f"{len(files)} files in {arguments.bundle}; python script.py answers there")
    return 0


def _view_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="raw tars, or sampled Parquet shards (which have no cameras)")
    command.add_argument("out", type=path, help="HTML file, which needs nothing beside it")
    _model_arguments(command)
    command.add_argument("--pred", type=Path, help="show the predictions in this JSON file instead of a model's")
    command.add_argument("--points", type=positive, default=4096, help="at most so many points a scene (default 4096)")
    _split_arguments(command)
    command.add_argument("--worst", type=positive, help="only so many scenes, those of the lowest scores")
    add_workers(command, "threads that read ahead, and processes that score")


def _view(arguments: argparse.Namespace) -> int:
    for given, name in ((arguments.model, "--model"), (arguments.config, "--config")):
        if arguments.pred and given:
            raise ConfigError(f"{name} does not go with --pred, which holds the predictions")
    if arguments.pred and arguments.threshold is not None:
        raise ConfigError("--threshold does not go with --pred, which holds no confidences")
    _share_cores(arguments)
    from wireframe.view.write import view_model, view_submission

    names = ("points", "split", "dev_val", "limit", "worst", "workers")
    options = {name: getattr(arguments, name) for name in names} | {"progress": not arguments.quiet}
    if arguments.pred:
        from wireframe.submissions import read_submission

        predictions, options["label"] = read_submission(arguments.pred), f"predictions of {arguments.pred.name}"
        view = view_submission(arguments.source, arguments.out, predictions, **options)
    else:
        options["label"] = f"predicted by {os.path.basename(os.path.abspath(arguments.model or 'the shipped model'))}"
        view = view_model(arguments.source, arguments.out, *_load_model(arguments), **options)
    scored = f"mean HSS {view.hss:.3f}" if view.hss is not None else view.unscored
    print(f"{view.scenes} scenes, {scored}: {arguments.out} ({view.size / 1e6:.1f} MB)")
    if view.guarded:
        guarded = f"{view.guarded} of its scenes are not known to be synthetic"
        terms = "scenes of the challenge, and pages made from them, may not be redistributed (see NOTICE)"
        print(f"do not share {arguments.out}: {guarded}; {terms}", file=sys.stderr)
    _print_failures("not shown:", view.failures)
    return 1 if _broke_off(view.failures, arguments.source) else 0


def _demo_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=path, default=Path("out/demo"), help="folder (default out/demo)")
    command.add_argument("--scenes", type=positive, default=100, help="held-out synthetic scenes (default 100)")
    add_workers(command)


def _demo(arguments: argparse.Namespace) -> int:
    from wireframe.demo import run_demo

    print(run_demo(arguments.out, arguments.scenes, workers=arguments.workers, progress=not arguments.quiet))
    return 0


_COMMANDS = {
    "doctor": (_doctor_arguments, _doctor, "what is installed, which implementations run here, what a data set holds"),
    "synth": (_synth_arguments, _synth, "write synthetic raw scenes as tars"),
    "prepare": (_prepare_arguments, _prepare, "fuse and sample raw scenes into Parquet shards"),
    "train": (training.train_arguments, training.train, "train a model on sampled rows, or go on where it stopped"),
    "predict": (_predict_arguments, _predict, "predict wireframes of raw scenes into a JSON file"),
    "eval": (_eval_arguments, _eval, "predict and score scenes with ground truth"),
    "submit": (submitting.submit_arguments, _submit, "answer every scene of the challenge in its time limit"),
    "tune": (_tune_arguments, _tune, "choose confidence, merging and snapping on scenes kept for it"),
    "view": (_view_arguments, _view, "write a page to look at scenes, predictions and scores in a browser"),
    "report": (training.report_arguments, training.report, "write a training run's curves, scores and worst scenes"),
    "verify": (training.verify_arguments, training.verify, "compare two checkpoints bit by bit, or train twice and do"),
    "bench": (benching.bench_arguments, benching.bench, "compile and check every kernel; time or model a step"),
    "demo": (_demo_arguments, _demo, "predict, score and draw held-out synthetic scenes with the shipped model"),
}

"""The command ``wireframe`` and its subcommands: doctor, synth, prepare, demo; the others stand where their work does.

Exit status: 0 done, 1 done but nothing came of it (every scene failed), a shard broke off or a check failed, 2 wrong
input, 3 a fault of ours, 4 training stopped by a signal and saved, 5 training gave up on losses that are not finite,
130 interrupted. Errors are one line on stderr; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import wireframe
from wireframe import model_cli as modelling
from wireframe.arguments import add_workers, fraction, non_negative, path, positive, shared_arguments, size
from wireframe.bench import cli as benching
from wireframe.errors import WireframeError, one_line, print_failures
from wireframe.submit import cli as submitting
from wireframe.train import cli as training
from wireframe.view import cli as viewing


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
    parser = argparse.ArgumentParser(prog="wireframe", description="3D building wireframes from multi-view scans")
    parser.add_argument("--version", action="version", version=f"wireframe {wireframe.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_arguments, run, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, parents=[shared_arguments()])
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
    presets = ("default", "training", "real")
    help = "training: small, fast; real: as hard as the challenge's scenes (default: default)"
    command.add_argument("--preset", choices=presets, default="default", help=help)
    command.add_argument("--shard-size", type=positive, default=100, help="scenes a tar (default 100)")
    command.add_argument("--set", action="append", default=[], metavar="key=value", help="a setting of SynthConfig")
    add_workers(command)


def _synth(arguments: argparse.Namespace) -> int:
    from wireframe.synth import SynthConfig, write_shards

    changes = dict(zip(("width", "height"), arguments.size or ()))
    presets = {"default": SynthConfig, "training": SynthConfig.training, "real": SynthConfig.real}
    config = presets[arguments.preset]().changed(arguments.set, **changes)
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
    print_failures("left out", report.skipped)
    print_failures("broke off:", report.damaged)
    if not report.rows and not report.skipped and not report.damaged:
        print(f"{arguments.source}: no scene in the tars of this share", file=sys.stderr)
    worked = report.rows > 0 or not (report.shards + report.resumed)
    return 0 if worked and not report.damaged else 1


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
    "predict": (modelling.predict_arguments, modelling.predict, "predict wireframes of raw scenes into a JSON file"),
    "eval": (modelling.eval_arguments, modelling.evaluate, "predict and score scenes with ground truth"),
    "submit": (submitting.submit_arguments, submitting.submit, "answer every scene of the challenge in time"),
    "tune": (modelling.tune_arguments, modelling.tune, "choose confidence, merging, snapping on scenes kept for it"),
    "view": (viewing.view_arguments, viewing.view, "write one page to look at scenes, predictions and scores"),
    "report": (training.report_arguments, training.report, "write a training run's curves, scores and worst scenes"),
    "verify": (training.verify_arguments, training.verify, "compare two checkpoints bit by bit, or train twice and do"),
    "bench": (benching.bench_arguments, benching.bench, "time kernels, pipeline and steps beside rivals; report them"),
    "demo": (_demo_arguments, _demo, "predict, score and draw held-out synthetic scenes with the shipped model"),
}

"""The commands ``wireframe train``, ``report`` and ``verify``: their arguments, and what they call."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from wireframe.arguments import nonempty, path, positive, stage_range, threads
from wireframe.errors import ConfigError

# Scenes of the rows that stand in where no data are given: enough for a batch and what is held out.
_MADE_SCENES = 24


def train_arguments(command: argparse.ArgumentParser) -> None:
    _config_arguments(command)
    command.add_argument("--data", action="append", help="sampled rows; repeat for other point counts")
    command.add_argument("--out", type=path, required=True, help="folder for checkpoints, log, model; resumes there")
    command.add_argument("--stages", type=stage_range, metavar="2-3", help="which stages to run (default: all)")
    command.add_argument(
        "--init", type=nonempty,
        help="start from this checkpoint: of a run, a model folder, a published .pt, hf://",
    )  # fmt: skip
    command.add_argument("--exclude", type=path, help="text file with ids of scenes to leave out, one a line")
    command.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, default=None,
        help="rows on disk, read ahead, or resident on the device (default: resident where they fit)",
    )  # fmt: skip
    command.add_argument(
        "--stop-after", type=positive, metavar="STEP",
        help="end early, with a checkpoint, after this step of the whole run",
    )
    command.add_argument("--no-eval", action="store_true", help="do not score the held-out rows at stage ends")


def train(arguments: argparse.Namespace) -> int:
    config = _prepare(arguments)
    from wireframe.splits import read_exclusions
    from wireframe.train.log import SteadyStream
    from wireframe.train.loop import train
    from wireframe.train.memory import keep_freed_memory

    if arguments.stages and arguments.stages[1] >= len(config.stages):
        raise ConfigError(f"--stages reaches stage {arguments.stages[1] + 1}; there are {len(config.stages)}")
    keep_freed_memory()
    # Hours of work must not end because nobody reads along any more.
    stdout, stderr = SteadyStream(sys.stdout), SteadyStream(sys.stderr)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        result = train(
            config,
            _data(arguments, config),
            arguments.out,
            stages=arguments.stages,
            init=arguments.init,
            exclude=read_exclusions(arguments.exclude) if arguments.exclude else frozenset(),
            device=arguments.device,
            stream=arguments.stream,
            evaluate=not arguments.no_eval,
            progress=not arguments.quiet,
            stop_after=arguments.stop_after,
        )
        print(result)
    return 0


def report_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=path, metavar="RUN", help="folder of a training run")
    command.add_argument("--out", type=path, help="HTML file (default: report.html in the run)")


def report(arguments: argparse.Namespace) -> int:
    from wireframe.train.report import write_report

    print(write_report(arguments.folder, arguments.out))
    return 0


def verify_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("a", nargs="?", help="a checkpoint: of a run, a run, a model folder, a published .pt")
    command.add_argument("b", nargs="?", help="what to compare it with")
    command.add_argument(
        "--rerun", type=Path, metavar="CONFIG", help="train this configuration twice in fresh processes and compare"
    )
    command.add_argument("--steps", type=positive, default=10, help="steps of every stage with --rerun (default 10)")
    command.add_argument("--data", action="append", help="sampled rows for --rerun (default: rows made of hashes)")
    command.add_argument("--ranks", type=positive, default=1, help="processes of a run with --rerun (default 1)")
    _setting_arguments(command)


def verify(arguments: argparse.Namespace) -> int:
    if bool(arguments.rerun) == bool(arguments.a) or bool(arguments.a) != bool(arguments.b):
        raise ConfigError("give two checkpoints to compare, or --rerun CONFIG")
    if not arguments.rerun:
        from wireframe.train.verify import compare, format_comparison

        comparison = compare(arguments.a, arguments.b)
        print(format_comparison(comparison))
        return 0 if comparison.equal else 1
    from wireframe.train.rerun import format_rerun, rerun

    result = rerun(
        arguments.rerun,
        arguments.set,
        arguments.steps,
        data=arguments.data,
        device=arguments.device,
        threads=arguments.threads,
        ranks=arguments.ranks,
    )
    print(format_rerun(result))
    return 0 if result.equal else 1


def _config_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", type=Path, help="JSON configuration, or one of ours: base (published; default), small, demo, real"
    )
    command.add_argument("--smoke", action="store_true", help="the recipe in small, for a CPU, without --data too")
    _setting_arguments(command)


def _setting_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--set", action="append", default=[], metavar="a.b=value", help="override a setting")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there")
    command.add_argument("--threads", type=threads, help="CPU threads; part of what the bits depend on")


def _prepare(arguments: argparse.Namespace):
    """The configuration, in a process that is ready to give equal bits."""
    from wireframe.kernels.determinism import prepare_process

    # Before anything can start CUDA.
    prepare_process()
    import torch

    from wireframe.train.config import BASE_CONFIG, SMOKE_CONFIG, load_config

    if arguments.smoke and arguments.config:
        raise ConfigError("--smoke is a configuration of its own; leave out --config")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return load_config(arguments.config or (SMOKE_CONFIG if arguments.smoke else BASE_CONFIG), arguments.set)


def _data(arguments: argparse.Namespace, config) -> list:
    if arguments.data:
        return arguments.data
    if not arguments.smoke:
        raise ConfigError("--data is missing: give sampled rows, made by `wireframe prepare` or published")
    from wireframe.train.made_rows import MadeRows

    print("no --data: rows made of hashes stand in, which hold no houses", file=sys.stderr)
    return [MadeRows(points, _MADE_SCENES) for points in sorted({stage.points for stage in config.stages})]

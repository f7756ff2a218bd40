"""The command ``wireframe bench``: its parts with the arguments of each, and what they call."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from wireframe.arguments import add_workers, path, positive, refuse, shared_arguments, threads
from wireframe.errors import WireframeError
from wireframe.files import check_target


def bench_arguments(command: argparse.ArgumentParser) -> None:
    parts = command.add_subparsers(dest="part", required=True)
    for name, (add_arguments, run, summary) in _PARTS.items():
        # What stands before the part counts too.
        shared = shared_arguments(default=argparse.SUPPRESS)
        part = parts.add_parser(name, help=summary, description=summary, parents=[shared])
        add_arguments(part)
        part.set_defaults(run_part=run)


def bench(arguments: argparse.Namespace) -> int:
    # Minutes before they would be written.
    for name in ("out", "json"):
        target = getattr(arguments, name, None)
        if target and not check_target(target).parent.is_dir():
            raise WireframeError(f"{target.parent} is no folder; make it, or give another --{name}")
    return arguments.run_part(arguments)


def _timed_arguments(part: argparse.ArgumentParser) -> None:
    part.add_argument(
        "--out", type=path,
        help="file for the rows; rows that are there stay in it (default: bench/results/DEVICE.jsonl of a checkout)",
    )  # fmt: skip
    part.add_argument("--small", action="store_true", help="small shapes, to see that it runs; kept with --out alone")
    part.add_argument("--seconds", type=_seconds_argument, help="after this time compile no further rival")
    part.add_argument("--backend", default="inductor", help="backend of torch.compile (inductor)")


def _suite_arguments(part: argparse.ArgumentParser) -> None:
    _timed_arguments(part)
    part.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda, or cpu without a GPU")
    part.add_argument("-k", metavar="EXPR", help="only these, as pytest -k takes it: 'sinkhorn and not graph'")
    part.add_argument("--repeats", type=positive, help="rounds; more of short calls, fewer of long ones (default 9)")
    part.add_argument("--threads", type=threads, help="of the CPU (default: torch's own choice)")
    part.add_argument("--grow", action="store_true", help="also growth with points, scenes, segments, threads")
    part.add_argument("--json", type=path, metavar="FILE", help="pytest-benchmark's own report")


def _suite(arguments: argparse.Namespace) -> int:
    from wireframe.bench import runner

    json, out = arguments.json, arguments.out
    if json and (json.suffix == ".jsonl" or (out and json.resolve() == out.resolve())):
        raise WireframeError(f"--json {json} would replace a file of rows; give another")
    _refuse_other_than_rows(out)
    return runner.run(arguments)


def _refuse_other_than_rows(out: Path | None) -> None:
    """Rows are appended, so the file must hold nothing else."""
    if out and out.exists() and out.stat().st_size:
        from wireframe.bench.report_rows import read_rows

        read_rows([out])


def _seconds_argument(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds from 0, got {text}")
    return seconds


def _step_arguments(part: argparse.ArgumentParser) -> None:
    _timed_arguments(part)
    part.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    part.add_argument("--stage", type=int, nargs="+", choices=(1, 2, 3), default=(1, 3), help="of the recipe (1 3)")
    part.add_argument("--rounds", type=positive, default=9, help="turns of each provider (default 9)")
    part.add_argument("--steps", type=positive, default=20, help="steps of a turn (default 20)")
    model = part.add_argument_group("the model of a step, which runs nothing; with --stage and --out alone")
    model.add_argument("--model", action="store_true", help="no GPU: launches, products, bytes, times to expect")
    model.add_argument("--of", choices=("ours", "plain"), default="ours", help="ours, or the model in plain PyTorch")
    model.add_argument("--list", action="store_true", help="every operation")


def _step(arguments: argparse.Namespace) -> int:
    if arguments.model:
        refuse(
            (getattr(arguments, name) != value, f"--{name}", "--model runs nothing")
            for name, value in (
                ("small", False), ("seconds", None), ("device", "cuda"), ("rounds", 9), ("steps", 20),
                ("backend", "inductor"),
            )
        )
        from wireframe.bench import step_model

        return step_model.run(arguments.of, arguments.stage, arguments.list, arguments.out)
    refuse([(arguments.of != "ours", "--of", "without --model"), (arguments.list, "--list", "without --model")])
    from wireframe.bench import step

    _refuse_other_than_rows(arguments.out)
    return step.run(arguments)


def _static_arguments(part: argparse.ArgumentParser) -> None:
    # What wireframe.kernels.launch plans for, and no import for --help.
    architectures = (80, 86, 89, 90)
    part.add_argument("--arch", type=int, nargs="+", choices=architectures, help="of GPUs (default: all)")
    report = part.add_mutually_exclusive_group()
    report.add_argument("--out", type=path, help="file for the report; rows of other architectures stay in it")
    report.add_argument("--check", type=path, metavar="REPORT", help="compile what may have changed, and compare")
    report.add_argument(
        "--table", action="store_true", help="compile nothing: the committed report's main kernels, as Markdown"
    )
    add_workers(part)


def _static(arguments: argparse.Namespace) -> int:
    whole = arguments.check or arguments.table
    refuse([(arguments.arch and whole, "--arch", "--check and --table are of the whole report")])
    if arguments.table:
        from wireframe.bench import static_table

        return static_table.run()
    from wireframe.bench import static

    how = {"workers": arguments.workers, "progress": not arguments.quiet}
    if arguments.check:
        return static.check(arguments.check, **how)
    return static.run(arguments.arch or static.ARCHITECTURES, arguments.out, **how)


def _report_arguments(part: argparse.ArgumentParser) -> None:
    part.add_argument("--rows", type=path, nargs="+", help="files or folders of rows (those of the checkout)")
    part.add_argument("--out", type=path, help="HTML page (with the checkout's rows bench/results/report.html)")
    part.add_argument("--plots", type=path, metavar="FOLDER", help="for PNG files (with those rows docs/bench)")
    part.add_argument("--readme", type=path, metavar="FILE", help="Markdown whose tables <!-- bench:NAME --> to make")
    part.add_argument(
        "--check", type=path, metavar="FILE", help="write nothing: whether the tables of this Markdown are as rows say"
    )


def _report(arguments: argparse.Namespace) -> int:
    from wireframe.bench import report

    return report.run(arguments)


_PARTS = {
    "kernels": (_suite_arguments, _suite, "time every operation beside its rivals"),
    "pipeline": (_suite_arguments, _suite, "time the way from a scene to its wireframe, the model, prepare"),
    "step": (_step_arguments, _step, "time whole steps of training on a GPU, or with --model say what they ask of one"),
    "static": (_static_arguments, _static, "compile every kernel without a GPU, report and hold it to its limits"),
    "report": (_report_arguments, _report, "make tables, plots and a page of what was measured"),
}

"""The command ``wireframe bench``: its arguments, and what it calls."""

from __future__ import annotations

import argparse

from wireframe.arguments import add_workers, path, positive, threads
from wireframe.errors import ConfigError, WireframeError
from wireframe.files import check_target

_SUITE, _TIMED = ("kernels", "pipeline"), ("kernels", "pipeline", "step")
# The parts that an option goes with, by its name; --out goes with all.
_PARTS = {
    **dict.fromkeys(("device", "small", "seconds", "backend"), _TIMED),
    **dict.fromkeys(("k", "repeats", "threads", "grow", "json"), _SUITE),
    **dict.fromkeys(("arch", "table", "workers"), ("static",)),
    **dict.fromkeys(("stage", "rounds", "steps", "model", "of", "list"), ("step",)),
    **dict.fromkeys(("readme", "rows", "plots"), ("report",)),
    "check": ("static", "report"),
}


def bench_arguments(command: argparse.ArgumentParser) -> None:
    # What wireframe.kernels.launch plans for, and no import for --help.
    architectures = (80, 86, 89, 90)
    command.add_argument(
        "part", choices=("kernels", "pipeline", "step", "static", "report"),
        help="kernels: every operation beside its rivals; pipeline: from a scene to its wireframe, the model, prepare; "
        "step: whole steps of training on a GPU, or with --model say what they ask of one; static: compile every "
        "kernel without a GPU and report; report: tables, plots and a page of what was measured",
    )  # fmt: skip
    command.add_argument(
        "--out", type=path,
        help="file for the report or the rows; rows that are there stay in it (kernels, pipeline, "
        "step: bench/results/DEVICE.jsonl of a checkout; report: its HTML page, bench/results/report.html)",
    )  # fmt: skip
    timed = command.add_argument_group("kernels, pipeline, step")
    timed.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda (kernels, pipeline: cpu without a GPU)")
    timed.add_argument("--small", action="store_true", help="small shapes, to see that it runs; kept with --out alone")
    timed.add_argument("--seconds", type=float, help="after this time compile no further rival")
    timed.add_argument("--backend", default="inductor", help="backend of torch.compile (inductor)")
    suite = command.add_argument_group("kernels, pipeline")
    suite.add_argument("-k", metavar="EXPR", help="only these, as pytest -k takes it: 'sinkhorn and not graph'")
    suite.add_argument("--repeats", type=positive, help="rounds; more of short calls, fewer of long ones (default 9)")
    suite.add_argument("--threads", type=threads, help="of the CPU (default: torch's own choice)")
    suite.add_argument("--grow", action="store_true", help="also growth with points, scenes, segments, threads")
    suite.add_argument("--json", type=path, metavar="FILE", help="pytest-benchmark's own report")
    static = command.add_argument_group("static")
    static.add_argument(
        "--arch", type=int, nargs="+", choices=architectures, default=architectures, help="of GPUs (default: all)"
    )
    static.add_argument(
        "--check", type=path, metavar="REPORT",
        help="compile what may have changed, and compare (report: whether the tables in this Markdown are as rows say)",
    )  # fmt: skip
    static.add_argument(
        "--table", action="store_true", help="compile nothing: the committed report's main kernels, as Markdown"
    )
    add_workers(static)
    step = command.add_argument_group("step")
    step.add_argument("--stage", type=int, nargs="+", choices=(1, 2, 3), default=(1, 3), help="of the recipe (1 3)")
    step.add_argument("--rounds", type=positive, default=9, help="turns of each provider (default 9)")
    step.add_argument("--steps", type=positive, default=20, help="steps of a turn (default 20)")
    model = command.add_argument_group("step --model")
    model.add_argument("--model", action="store_true", help="no GPU: launches, products, bytes, times to expect")
    model.add_argument("--of", choices=("ours", "plain"), default="ours", help="ours, or the model in plain PyTorch")
    model.add_argument("--list", action="store_true", help="every operation")
    report = command.add_argument_group("report")
    report.add_argument("--readme", type=path, metavar="FILE", help="Markdown whose tables <!-- bench:NAME --> to make")
    report.add_argument("--rows", type=path, nargs="+", help="files or folders of rows (those of the checkout)")
    report.add_argument("--plots", type=path, metavar="FOLDER", help="for PNG files (docs/bench of the checkout)")
    command.set_defaults(defaults={name: command.get_default(name) for name in _PARTS})


def _refuse_foreign(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for an option that the part would not look at."""
    for name, parts in _PARTS.items():
        if arguments.part not in parts and getattr(arguments, name) != arguments.defaults[name]:
            flag = f"{'-' if len(name) == 1 else '--'}{name}"
            raise ConfigError(f"{flag} goes with {', '.join(parts)}, not with {arguments.part}")


def bench(arguments: argparse.Namespace) -> int:
    _refuse_foreign(arguments)
    out = arguments.out
    # Minutes before it would be written.
    if out and not check_target(out).parent.is_dir():
        raise WireframeError(f"{out.parent} is no folder; make it, or give another --out")
    if arguments.part in ("kernels", "pipeline"):
        from wireframe.bench import runner

        return runner.run(arguments)
    if arguments.part == "report":
        from wireframe.bench import report

        return report.run(arguments)
    arguments.device = arguments.device or "cuda"
    if arguments.part == "step":
        if arguments.model:
            if arguments.small or arguments.device != "cuda":
                raise ConfigError("--small and --device do not go with --model, which runs nothing")
            from wireframe.bench import step_model

            return step_model.run(arguments.of, arguments.stage, arguments.list, out)
        from wireframe.bench import step

        return step.run(arguments)
    if arguments.table:
        from wireframe.bench import static_table

        if arguments.check or out:
            raise ConfigError("--table prints the committed report and takes neither --check nor --out")
        return static_table.run()
    from wireframe.bench import static

    if arguments.check and out:
        raise ConfigError("--check compares with a report and --out writes one: choose")
    how = {"workers": arguments.workers, "progress": not arguments.quiet}
    if arguments.check:
        return static.check(arguments.check, **how)
    return static.run(arguments.arch, out, **how)

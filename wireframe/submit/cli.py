"""The command ``submit``, and the same arguments for a bundle's ``script.py``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wireframe.arguments import add_workers, nonempty, path, probability
from wireframe.errors import ConfigError, one_line, printable

if TYPE_CHECKING:
    from wireframe.submit.supervisor import Submitted

PARAMS = Path("params.json")
TIME_LIMIT = 7200.0
_SHOWN = 20


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


# argparse names the type of a bad value by this.
seconds.__name__ = "number of seconds"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of ``run``."""
    command.add_argument("--params", type=path, help=f"the harness's parameters (default {PARAMS}, if it is there)")
    command.add_argument(
        "--data", type=path,
        help="folder with tars in folders *public*, *private*; or a tar (default: data in the temporary directory)",
    )  # fmt: skip
    command.add_argument("--out", type=path, help="the file to write (default submission.json in output_path)")
    command.add_argument(
        "--budget", type=seconds, metavar="SECONDS",
        help=f"from the start of the process to its end (default: time_limit, else {TIME_LIMIT:.0f})",
    )  # fmt: skip
    add_workers(command, "threads that read ahead")


def submit_arguments(command: argparse.ArgumentParser) -> None:
    add_arguments(command)
    command.add_argument(
        "--model", type=nonempty, help="folder, published .pt or hf://... (default: the shipped demo model)"
    )
    command.add_argument("--config", type=Path, help="JSON whose graph section counts (default: as for predict)")
    command.add_argument("--threshold", type=probability, help="confidence to exceed (default: that of the graph)")
    command.add_argument("--bundle", type=path, metavar="DIR", help="write a folder with script.py instead")


def submit(arguments: argparse.Namespace) -> int:
    if arguments.bundle:
        refuse_run_options(arguments)
        from wireframe.pretrained import load_model
        from wireframe.submit.bundle import write_bundle

        model = load_model(arguments.model, arguments.config, arguments.threshold)
        files = write_bundle(arguments.bundle, *model)
        print(f"{len(files)} files in {arguments.bundle}; python script.py answers there")
        return 0
    choice = {name: getattr(arguments, name) for name in ("model", "config", "threshold")}
    result = run(arguments, progress=not arguments.quiet, **choice)
    if result.stopped:
        return 4
    return 0 if len(result.failures) < result.scenes and not result.damage else 1


def refuse_run_options(arguments: argparse.Namespace) -> None:
    """Raises ConfigError where a bundle is wanted and an option of a run is given."""
    for name in ("params", "data", "out", "budget"):
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--{name} does not go with --bundle: give it to the bundle's script.py")


def run(arguments: argparse.Namespace, *, progress: bool = False, **choice: Any) -> Submitted:
    """One submission as the arguments and ``params.json`` say; prints what came of it.

    Args:
        arguments: of ``add_arguments``.
        progress: whether to show a progress bar on stderr, which needs tqdm.
        choice: model, config and threshold, as ``submit`` takes them.

    Raises:
        as ``read_params``, ``download`` and ``submit``.
    """
    from wireframe.submit.harness import (
        Params,
        default_data,
        download,
        find_tars,
        has_tars,
        output_file,
        process_started,
        read_params,
    )
    from wireframe.submit.supervisor import submit

    started = process_started()
    params = Params()
    if arguments.params or PARAMS.exists():
        params = read_params(arguments.params or PARAMS)
    data = arguments.data or default_data()
    if params.dataset and not arguments.data and not has_tars(data):
        download(params.dataset, data)
    tars = find_tars(data)
    out = arguments.out or output_file(params.output_path)
    budget = arguments.budget or params.time_limit or TIME_LIMIT
    report, close = _bar() if progress else (None, lambda: None)
    try:
        result = submit(
            tars, out, budget=budget, started=started, workers=arguments.workers, progress=report, **choice
        )
    finally:
        close()
    _describe(result, out, time.monotonic() - started)
    return result


def _bar():
    from tqdm import tqdm

    bar = tqdm(desc="submit", unit="scene")

    def report(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return report, bar.close


def _describe(result: Submitted, out: Path, passed: float) -> None:
    for line in result.damage:
        print(one_line(line, 600), file=sys.stderr)
    for scene in result.failures[:_SHOWN]:
        print(one_line(f"fall-back for {scene.order_id}: {scene.reason}"), file=sys.stderr)
    if len(result.failures) > _SHOWN:
        print(f"... and {len(result.failures) - _SHOWN} more", file=sys.stderr)
    if result.repeated:
        print(f"{result.repeated} scenes have an order_id that was there before", file=sys.stderr)
    stopped = ", stopped by a signal" if result.stopped else ""
    print(f"{result.scenes} scenes in {printable(str(out))} after {passed:.0f} s; "
          f"{len(result.failures)} have the fall-back{stopped}", flush=True)

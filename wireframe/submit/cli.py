"""The command ``submit``, and the same arguments for a bundle's ``script.py``."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wireframe.arguments import add_workers, nonempty, path, probability, refuse
from wireframe.errors import ShardError, one_line, print_failures, printable
from wireframe.submit.harness import Params, download, find_tars, output_file, read_params, seconds

if TYPE_CHECKING:
    from wireframe.submit.supervisor import Submitted

PARAMS = Path("params.json")
TIME_LIMIT = 7200.0


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
        "--model", type=nonempty, help="folder, published .pt or hf://... (default: the shipped model)"
    )
    command.add_argument("--config", type=path, help="JSON whose graph section counts (default: as for predict)")
    command.add_argument("--threshold", type=probability, help="confidence to exceed (default: that of the graph)")
    command.add_argument("--bundle", type=path, metavar="DIR", help="write a folder with script.py instead")


def submit(arguments: argparse.Namespace) -> int:
    if arguments.bundle:
        return _bundle(arguments)
    choice = {name: getattr(arguments, name) for name in ("model", "config", "threshold")}
    result = run(arguments, progress=not arguments.quiet, **choice)
    return 0 if len(result.failures) < result.scenes and not result.damage else 1


def _bundle(arguments: argparse.Namespace) -> int:
    names = ("params", "data", "out", "budget")
    refuse((getattr(arguments, n) is not None, f"--{n}", "give it to the bundle's script.py") for n in names)
    from wireframe.pretrained import load_model
    from wireframe.submit.bundle import write_bundle

    files = write_bundle(arguments.bundle, *load_model(arguments.model, arguments.config, arguments.threshold))
    print(f"{len(files)} files in {arguments.bundle}; python script.py answers there")
    return 0


def run(arguments: argparse.Namespace, *, progress: bool = False, **choice: Any) -> Submitted:
    """One submission as the arguments (of ``add_arguments``) and ``params.json`` say; prints what came of it.

    The budget counts from here; its reserve covers what the interpreter took to come so far, a tenth of a second.
    ``progress`` shows a bar, which needs tqdm; ``choice`` is the model, config and threshold of ``submit``. Raises as
    ``read_params``, ``download`` and ``submit``.
    """
    started = time.monotonic()
    from wireframe.submit.supervisor import submit

    wanted = arguments.params or PARAMS
    params = read_params(wanted) if arguments.params or wanted.exists() else Params()
    budget = arguments.budget or params.time_limit or TIME_LIMIT
    tars = _tars(arguments.data, params.dataset, budget / 2)
    out = arguments.out or output_file(params.output_path)
    report, close = _bar() if progress else (None, lambda: None)
    try:
        result = submit(tars, out, budget=budget, started=started, workers=arguments.workers, progress=report, **choice)
    finally:
        close()
    for line in result.damage:
        print(one_line(line, 600), file=sys.stderr)
    print_failures("fall-back for", result.failures)
    print(f"{result.scenes} scenes in {printable(str(out))} after {time.monotonic() - started:.0f} s; "
          f"{len(result.failures)} have the fall-back", flush=True)
    return result


def _tars(data: Path | None, dataset: str | None, limit: float) -> list[str]:
    """Those of the folder asked for, else of the harness's, which is filled where it has none."""
    if data:
        return find_tars(data)
    data = Path(tempfile.gettempdir()) / "data"
    try:
        return find_tars(data)
    except ShardError:
        if not dataset:
            raise
    download(dataset, data, limit)
    return find_tars(data)


def _bar():
    from tqdm import tqdm

    bar = tqdm(desc="submit", unit="scene")

    def report(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return report, bar.close

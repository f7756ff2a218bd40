"""``wireframe bench kernels`` and ``pipeline``: run ``bench/suite`` under pytest-benchmark, in this process.

The suite has a test a race. ``Suite`` is the plugin that carries the options to the tests and the rows from them:
every race is printed and appended to the file as soon as it is over. By hand, ``pytest bench/suite`` runs small races.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

from wireframe.bench import standings, timing
from wireframe.bench.holding import hold
from wireframe.bench.names import is_ours
from wireframe.bench.race import How, Race
from wireframe.errors import ConfigError, MissingPackageError

SUITE = Path(__file__).resolve().parent / "suite"
PARTS = ("kernels", "pipeline")
NAME = "wireframe-bench"


def races(part: str, how: How) -> Iterator[Race]:
    """The races of a part, those with bars first; of growth those alone that are not there without it."""
    from wireframe.bench import attention, fusion, model, pipeline, prepare, transport

    subjects = (attention, transport, fusion) if part == "kernels" else (pipeline, model, prepare)
    titles: set[str] = set()
    for race in itertools.chain.from_iterable(subject.races(how) for subject in subjects):
        if race.title not in titles:
            titles.add(race.title)
            yield race


class Suite:
    """The plugin of pytest. Without arguments: small races on the CPU, nothing written."""

    def __init__(
        self, how: How | None = None, out: Path | None = None, say: Callable[[str], object] = print,
        command: str = "pytest bench/suite",
    ) -> None:  # fmt: skip
        self.how, self.out, self._say, self._command = how or How(), out, say, command
        self.rows: list[dict] = []
        self._described: dict = {}
        self._group = None

    def machine(self) -> dict:
        """The machine with the load of this moment."""
        if not self._described:
            self._described = timing.describe_machine(self.how.device)
            self._say(timing.heading(self._described))
        return {**self._described, "load": timing.load(), "command": self._command}

    def run(self, part: str, race: Race, benchmark) -> None:
        """One test: holds a race, says and keeps its rows.

        Raises:
            AssertionError: an implementation of ours failed or computes something else.
        """
        machine = self.machine()
        entries = hold(race, benchmark, self.how)
        found = standings.rows(part, race, entries, machine)
        benchmark.extra_info["rows"] = found
        if self.out:
            timing.append_rows(self.out, found)
        self.rows += found
        lines = [f"\n{race.title}\n", standings.TABLE_HEAD, *map(standings.table_line, found)]
        self._say("\n".join([*lines, *(f"\n{line}" for line in standings.bar_lines(race, found))]))
        failed = (row for row in found if "failed" in row and is_ours(row["provider"]))
        ours = [f"{row['provider']}: {row['failed']}" for row in failed]
        assert not ours, f"{race.title}: {'; '.join(ours)}"


class _NoDots:
    """Between the tables there is no progress to show."""

    def pytest_report_teststatus(self, report):
        return ("", "", "") if report.passed else None


def run(options: argparse.Namespace) -> int:
    """The command. 1: an implementation of ours failed.

    Raises:
        MissingPackageError: pytest or pytest-benchmark is not installed. ConfigError: no race has such a name.
    """
    import torch

    from wireframe.kernels import native
    from wireframe.kernels.determinism import prepare_process

    prepare_process()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    start, seconds = time.monotonic(), options.seconds
    how = How(
        device, options.small, options.repeats or (1 if options.small else 9), torch.get_num_threads(), options.grow,
        options.backend, lambda: seconds is not None and time.monotonic() - start > seconds,
    )  # fmt: skip
    # An error in them would be one of collecting tests, whose status is that of Ctrl-C.
    held = list(races(options.part, how))
    if device == "cpu":
        # Or the reference would be timed under the name of ours.
        native.module()
    if device == "cuda" and not torch.cuda.is_available():
        for race in held:
            print(*standings.bar_lines(race, []), sep="\n", end="\n" if race.bars else "")
        print("skipped: no CUDA device")
        return 0
    threads = how.threads if options.threads or device == "cpu" else None
    command = timing.command(
        options.part, device=options.device, threads=threads, grow=options.grow, small=options.small,
        repeats=options.repeats, backend=None if options.backend == "inductor" else options.backend, k=options.k,
        seconds=seconds,
    )  # fmt: skip
    out = options.out or timing.default_out(timing.device_name(device), how.small)
    if out is None and not how.small:
        print("rows are not kept: this is no checkout; give a file by --out")
    suite = Suite(how, out, lambda line: print(line, flush=True), command)
    status = _pytest(suite, options.part, options.k, options.json, getattr(options, "debug", False))
    if status == 5:
        raise ConfigError(f"no race of {options.part} matches -k {options.k!r}")
    if status == 4:
        raise ConfigError("pytest refused its arguments (above); -k takes names with and, or, not and brackets")
    if status == 2:
        raise KeyboardInterrupt
    print("", *standings.share_lines(suite.rows), sep="\n")
    if suite.out:
        print(f"{len(suite.rows)} rows: {suite.out}")
    return int(status != 0)


def _pytest(suite: Suite, part: str, expression: str | None, json: Path | None, debug: bool) -> int:
    for module, name in (("pytest", "pytest"), ("pytest_benchmark", "pytest-benchmark")):
        if importlib.util.find_spec(module) is None:
            raise MissingPackageError(f"benchmarks run under {name}, which is not installed; run: pip install {name}")
    import pytest

    # Of the user's plugins and settings none may come between the calls.
    arguments = [
        str(SUITE / f"test_{part}.py"), f"--rootdir={SUITE}", "-c", str(SUITE / "pytest.ini"), "-qq", "-s",
        f"--tb={'short' if debug else 'line'}", "--no-header", "--disable-warnings", "-p", "no:cacheprovider",
        "-p", "pytest_benchmark.plugin",
        "--benchmark-quiet",
        *(("-k", expression) if expression else ()), *((f"--benchmark-json={json}",) if json else ()),
    ]  # fmt: skip
    # Packages of rivals with pools of their own read their size when they are imported, all but OpenCV.
    threads = str(suite.how.threads)
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(suite.how.threads)
    with mock.patch.dict(
        os.environ, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", PYTEST_ADDOPTS="", OMP_NUM_THREADS=threads
    ):  # fmt: skip
        return int(pytest.main(arguments, plugins=[suite, _NoDots()]))


def parametrize(metafunc, part: str) -> None:
    """A test a race: what ``pytest_generate_tests`` of the suite's files calls."""
    import pytest

    from wireframe.bench import clocks

    how = suite_of(metafunc.config).how

    def mark(race: Race):
        return pytest.mark.benchmark(group=race.op, timer=clocks.timer(how.device, race.host))

    metafunc.parametrize("race", [pytest.param(race, id=race.title, marks=mark(race)) for race in races(part, how)])


def suite_of(config) -> Suite:
    """The plugin that the command registered, else one for small races."""
    plugins: Sequence = [plugin for plugin in config.pluginmanager.get_plugins() if isinstance(plugin, Suite)]
    if not plugins:
        config.pluginmanager.register(Suite(), NAME)
        return suite_of(config)
    return plugins[0]

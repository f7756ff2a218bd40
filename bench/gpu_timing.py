"""Clocks and rounds of the benchmarks of the model's operations: rivals on equal inputs, in turn, in one run."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wireframe.bench.timing import (
    Case,
    append_rows,
    describe_machine,
    heading,
    measure,
    milliseconds,
    result,
    wall_ms,
)
from wireframe.errors import one_line
from wireframe.kernels.determinism import prepare_process

OURS = "triton"
MODES = ("forward", "backward", "forward + backward")
GRAPH_MODES = ("forward in a graph", "backward in a graph")

# Calls in one captured graph, one after another: the time between two graphs is not part of a call.
_GRAPH_CALLS = 16
# Three milliseconds: twice what a host beside an H200 took to launch forward and backward of a call of ours.
_PAUSE_CYCLES = 6_000_000


class CudaClock:
    """Milliseconds of one call by CUDA events, from a cold L2 cache.

    With ``pause`` the device first waits until the host is ahead, so that the time is the device's own; without it
    launches count where they are slower than the device.
    """

    def __init__(self, pause: bool = False) -> None:
        self._flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
        self._pause = pause

    def __call__(self, run: Callable[[], object]) -> float:
        _prepare(run)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        if self._pause:
            torch.cuda._sleep(_PAUSE_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / getattr(run, "calls", 1)


def clock(device: str, pause: bool = False) -> Callable[[Callable[[], object]], float]:
    """The clock of a device; on the CPU the one on the wall."""
    if device != "cpu":
        return CudaClock(pause)

    def prepared_wall_ms(run: Callable[[], object]) -> float:
        _prepare(run)
        return wall_ms(run)

    return prepared_wall_ms


def rounds(quick: bool) -> dict:
    """Arguments of ``measure``: as many rounds as short calls need, or no more than are asked for."""
    return {"warmup": 0, "least_ms": 0.0} if quick else {"warmup": 3}


def _prepare(run: Callable[[], object]) -> None:
    getattr(run, "prepare", lambda: None)()


def peak_mib(run: Callable[[], object], device: str) -> float | None:
    """Memory that one call adds at its peak, MiB; None on the CPU."""
    if device == "cpu":
        return None
    # The first call also allocates what libraries keep.
    _prepare(run)
    run()
    _prepare(run)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def randn(device: str, *shape: int, seed: int = 0) -> Tensor:
    """Normal numbers drawn on the CPU, so that every device gets the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


class Rival(NamedTuple):
    """One way to compute an operation.

    build: gives the function that returns the output; what it raises is the reason why the rival has no times.
    exact: whether it computes this operation, and its results are compared. settings: what its calls run under.
    slow: whether it takes seconds to compile, and is left out when the time is over.
    """

    provider: str
    build: Callable[[], Callable[[], Tensor]]
    exact: bool = True
    deterministic: bool = False
    settings: Callable[[], Any] = contextlib.nullcontext
    slow: bool = False


class Problem(NamedTuple):
    """An operation on its inputs with the gradient of its output; the first rival is the reference of the others."""

    op: str
    shape: str
    inputs: Sequence[Tensor]
    gradient: Tensor
    rivals: Sequence[Rival]
    modes: Sequence[str] = MODES


class _Call:
    """One call in one mode; ``prepare`` does what is not to be timed."""

    def __init__(self, function: Callable[[], Tensor], mode: str, problem: Problem, rival: Rival) -> None:
        self._function, self._mode, self._problem, self._settings = function, mode, problem, rival.settings
        self._output = None

    def prepare(self) -> None:
        if self._mode == "backward":
            with self._settings():
                self._output = self._function()

    def __call__(self) -> tuple[Tensor | None, ...]:
        with self._settings():
            if self._mode == "forward":
                with torch.no_grad():
                    return (self._function(),)
            output, self._output = self._output, None
            output = self._function() if output is None else output
            return _gradients(output, self._problem)


class _Replay:
    """Replays a CUDA graph of several equal calls."""

    calls = _GRAPH_CALLS

    def __init__(self, function: Callable[[], Tensor], mode: str, problem: Problem, rival: Rival) -> None:
        forward = mode == "forward in a graph"
        self._graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with rival.settings(), torch.set_grad_enabled(not forward):
            with torch.cuda.stream(stream):
                # The replays read what the forward saved.
                self._output = function()
                for _ in range(3):
                    function() if forward else _gradients(self._output, problem, retain_graph=True)
            with torch.cuda.graph(self._graph, stream=stream):
                for _ in range(self.calls):
                    found = (function(),) if forward else _gradients(self._output, problem, retain_graph=True)
        self._found = found

    def __call__(self) -> tuple[Tensor | None, ...]:
        self._graph.replay()
        return self._found


def _gradients(output: Tensor, problem: Problem, retain_graph: bool = False) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(
        output, problem.inputs, problem.gradient, allow_unused=True, retain_graph=retain_graph
    )


def compare(
    problem: Problem, machine: dict, device: str, repeats: int, quick: bool,
    late: Callable[[], bool] = lambda: False,
) -> Iterator[dict]:  # fmt: skip
    """A row a rival and mode. Where a rival fails, its row has no times, and the reason under ``failed``.

    What fails in one mode, say for want of memory, is tried in the next one; what cannot be built is out of all.
    ``first_s`` is what the first call took in seconds, compilation and all.

    Args:
        quick: no more than ``repeats`` rounds and none to warm up, however short the calls.
        late: whether the time is over, so that no further slow rival is compiled.
    """
    ticks = clock(device, pause=True)
    functions, unbuilt = {}, {}
    for rival in problem.rivals:
        try:
            functions[rival.provider] = rival.build()
        except Exception as failure:
            unbuilt[rival.provider] = one_line(failure)
    for mode in problem.modes:
        cases, more, expected = [], [], None
        for rival in problem.rivals:
            reason = unbuilt.get(rival.provider)
            if reason is None and rival.slow and late():
                reason = "left out, the time is over"
            if reason is None:
                try:
                    start = time.monotonic()
                    run, found, peak = _first_calls(functions[rival.provider], mode, problem, rival, device)
                    first = round(time.monotonic() - start, 2)
                    expected = found if expected is None and rival.exact else expected
                    error = relative_error(found, expected) if rival.exact else None
                    details = {"error": error, "peak_mib": peak, "deterministic": rival.deterministic}
                    more.append({**details, "first_s": first})
                    cases.append(Case(f"{problem.op} {mode}", rival.provider, problem.shape, run))
                except Exception as failure:
                    reason = one_line(failure)
            if reason is not None:
                yield {
                    "op": f"{problem.op} {mode}", "provider": rival.provider, "shape": problem.shape,
                    "p20_ms": None, "p50_ms": None, "p80_ms": None, "failed": reason, **machine,
                }  # fmt: skip
        for case, details, times in zip(cases, more, measure(cases, repeats, ticks, **rounds(quick))):
            yield result(case, times, machine, **details)


def _first_calls(
    function: Callable[[], Tensor], mode: str, problem: Problem, rival: Rival, device: str
) -> tuple[_Call | _Replay, tuple[Tensor | None, ...], float | None]:
    """The run of a rival in a mode, what it gives, and ``peak_mib``. Here, so that a failed one holds no memory."""
    run = (_Replay if mode in GRAPH_MODES else _Call)(function, mode, problem, rival)
    _prepare(run)
    return run, run(), peak_mib(run, device)


def relative_error(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """The largest error by norm among tensors, relative to the expected one, where that is finite."""
    errors = [torch.zeros(())]
    for a, b in zip(found, expected):
        if a is not None and b is not None:
            finite = b.isfinite()
            a, b = a[finite].double(), b[finite].double()
            errors.append(((a - b).norm() / b.norm().clamp_min(1e-30)).float().cpu())
    return float(f"{torch.stack(errors).max().item():.3g}")


def compiled(function: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    """``torch.compile`` for one shape; nothing of it is shared with an earlier shape."""
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)


@contextlib.contextmanager
def repeatable_backward() -> Iterator[None]:
    """Compiled inside, the backward of one forward may run several times, as it does in a graph."""
    from torch._functorch import config

    with config.patch(donated_buffer=False):
        yield


def require_deterministic_compile() -> None:
    """Raises where torch.compile cannot be made deterministic."""
    from torch._inductor import config

    if not hasattr(config, "deterministic"):
        raise RuntimeError(f"torch {torch.__version__} has no torch._inductor.config.deterministic")


def describe(row: dict, ours: float | None = None) -> str:
    """A row as a line; ours: the median of our own row, which the line is compared with."""
    name = f"{row['op']}, {row['provider']}, {row['shape']}"
    if "failed" in row:
        return f"{name}: not measured: {row['failed']}"
    # One unit for all three.
    factor, unit = (1e3, "us") if row["p50_ms"] < 0.1 else (1, "ms")
    low, middle, high = (milliseconds(row[f"{key}_ms"] * factor) for key in ("p20", "p50", "p80"))
    parts = [f"{name}: {middle} {unit} ({low}-{high})"]
    if ours:
        parts.append(f"{row['p50_ms'] / ours:.2f} x our time")
    if row.get("peak_mib") is not None:
        parts.append(f"{row['peak_mib']} MiB")
    if row.get("error") is not None:
        parts.append(f"error {row['error']:.2g}")
    return ", ".join(parts)


def best(rows: Iterable[dict], op: str, shape: str, *providers: str) -> float | None:
    """The smallest median among providers whose names begin so, ms; None where none of them was measured."""
    found = [
        row["p50_ms"]
        for row in rows
        if (row["op"], row["shape"]) == (op, shape) and row["p50_ms"] and row["provider"].startswith(providers)
    ]
    return min(found, default=None)


def goal(name: str, value: float | None, bound: float, unit: str, at_least: bool = True) -> str:
    """A line with a goal and what was measured."""
    wanted = f"{name}: goal {'>=' if at_least else '<='} {bound:g}{unit}"
    if value is None:
        return f"{wanted}, not measured yet"
    met = value >= bound if at_least else value <= bound
    return f"{wanted}, measured {value:.3g}{unit}: {'met' if met else 'missed'}"


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or denominator is None else numerator / denominator


def main(
    name: str,
    about: str,
    problems: Callable[[str, bool, str], Iterator[Problem]],
    goals: Callable[[list[dict]], list[str]],
    argv: list[str] | None,
) -> int:
    """The command line of a benchmark: measures, prints a line a case and the goals, appends rows to ``--out``.

    Args:
        problems: gives the problems of (device, small, backend of torch.compile), the most important ones first.
        goals: gives lines from all rows.

    Returns:
        1 where our own implementation failed, else 0.
    """
    parser = argparse.ArgumentParser(prog=f"python -m wireframe.bench.{name}", description=about.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="rounds; twenty times as many for short calls (5)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: wall clock, to try it out")
    parser.add_argument("--small", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--seconds", type=float, help="after this time compile no further rival")
    parser.add_argument("--backend", default="inductor", help="backend of torch.compile (inductor)")
    parser.add_argument("--out", metavar="FILE", help="append one JSON line a case to this file")
    arguments = parser.parse_args(argv)
    prepare_process()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        for line in (*goals([]), "skipped: no CUDA device"):
            print(line)
        return 0
    machine = describe_machine(arguments.device)
    print(heading(machine), flush=True)
    rows, start = [], time.monotonic()

    def late() -> bool:
        return arguments.seconds is not None and time.monotonic() - start > arguments.seconds

    for problem in problems(arguments.device, arguments.small, arguments.backend):
        torch._dynamo.reset()
        found = compare(problem, machine, arguments.device, arguments.repeats, arguments.small, late)
        for mode_rows in _by_op(found):
            ours = next((row["p50_ms"] for row in mode_rows if row["provider"] == OURS), None)
            print(*(describe(row, ours) for row in mode_rows), sep="\n", flush=True)
            if arguments.out:
                append_rows(arguments.out, mode_rows)
            rows += mode_rows
    for line in goals(rows if arguments.device == "cuda" else []):
        print(line)
    return int(any("failed" in row and row["provider"] == OURS for row in rows))


def _by_op(rows: Iterable[dict]) -> Iterator[list[dict]]:
    group: list[dict] = []
    for row in rows:
        if group and group[0]["op"] != row["op"]:
            yield group
            group = []
        group.append(row)
    if group:
        yield group

"""Times whole steps of training, ours beside rivals, on a CUDA device: ``wireframe bench step``.

Before it is timed, a provider takes one step of what all must agree on, ``Bench.comparable``; one whose losses or norm
of the gradient are off those of ours is not timed. Ours is built first and stays; every rival is built, timed in turns
with ours, and dropped before the next one. So a ratio is of times of one stretch, memory is a rival's own, and a row is
whole as soon as it is there. A turn is several steps, timed from before the first until the device has done the last,
so that a host that is late counts. Launches and the share of time without a kernel come from torch.profiler, over steps
of their own.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from wireframe.bench.agreement import off_the_reference, relative_error
from wireframe.bench.gpus import specified
from wireframe.bench.names import FIXED, LEFT_OUT, OURS, is_ours
from wireframe.bench.plain_model import Told
from wireframe.bench.step_rivals import (
    COMPILED,
    FREE,
    GRAPHED,
    PROVIDERS,
    PUBLISHED,
    Bench,
    Provider,
    Run,
    make_bench,
)
from wireframe.bench.timing import (
    append_rows,
    command,
    default_out,
    describe_machine,
    heading,
    milliseconds,
    paired_ratio,
    percentiles,
)
from wireframe.errors import one_line
from wireframe.kernels.determinism import prepare_process

# Multiply-adds of the forward pass of a scene, by points, of the published model; training takes three times that.
FORWARD_MACS = {2048: 3817e6, 4096: 5761e6}

# What a step of ours may take at most, in shares of the rivals' time.
_GOALS = ((GRAPHED, 0.9), (COMPILED + FIXED, 0.5), (PUBLISHED, 0.4))
_MFU_GOAL, _DETERMINISM_GOAL = 0.45, 1.02

_PROFILED = 3

# Of losses and the gradient's norm relative to ours, by the precision of the products. bfloat16: four of its units;
# plain PyTorch under autocast is off by up to 0.009 on a CPU, with ReLU in place of GELU by 0.1. float32: as in the
# races of kernels; sums in another order are off by up to 2e-5, five iterations of Sinkhorn for twenty by 3e-4.
_BUDGETS = {"bfloat16": 4 * torch.finfo(torch.bfloat16).eps, "float32": 1e-4}


def measure_steps(
    bench: Bench, machine: dict, rounds: int, steps: int, late: Callable[[], bool] = lambda: False
) -> Iterator[dict]:
    """A row a provider, as soon as it is timed; where one cannot be run or is off the reference, why under ``failed``.

    Of a row: milliseconds a step, ``ours_ms``, the median of ours in the same turns, model FLOP utilisation against the
    data sheet's peak, launches, idle share, peak memory, and ``error``, how far its first step is off the reference:
    that of ours, or of the first provider that runs.

    Args:
        rounds: how often each provider takes ``steps`` steps, in turn with ours.
        late: whether the time is over, so that no further slow provider is built.
    """
    ours: list[tuple[Provider, Run]] = []
    reference, budget = None, _BUDGETS[bench.config.precision]
    for provider in PROVIDERS:
        row = {**_names(provider, bench), **percentiles(()), **machine}
        try:
            _require_time(provider, late)
            told, row["first_s"] = _first_step(provider, bench)
            if reference is None:
                reference = told
            else:
                row["error"] = relative_error(told, reference)
                if not row["error"] <= budget:
                    raise ValueError(off_the_reference(row["error"], budget))
            # What it steps on is another model, and is compiled as such.
            _require_time(provider, late)
            found, run = _measured(provider, ours, bench, machine, rounds, steps)
            row |= found
            if provider.name == OURS:
                ours.append((provider, run))
            del run
        except Exception as failure:
            row["failed"] = one_line(failure)
        yield row
        _forget(provider, bench.device)


def _require_time(provider: Provider, late: Callable[[], bool]) -> None:
    if provider.slow and late():
        raise TimeoutError(LEFT_OUT)


def _first_step(provider: Provider, bench: Bench) -> tuple[Told, float]:
    """What the first step of the comparable form told, on the host, and the seconds until it did."""
    start = time.monotonic()
    with provider.settings(bench.device):
        told = provider.build(bench.comparable())(1)
        found = Told(told.losses.float().cpu(), float(told.grad_norm))
    taken = round(time.monotonic() - start, 1)
    del told
    _forget(provider, bench.device)
    return found, taken


def _measured(
    provider: Provider, ours: list[tuple[Provider, Run]], bench: Bench, machine: dict, rounds: int, steps: int
) -> tuple[dict, Run]:
    """What a row says of times, and what runs the provider."""
    with provider.settings(bench.device):
        run, peak = _built(provider, bench)
        details = {"peak_mib": peak, **_profile(run, bench.device)}
    times, *beside = _in_turns([(provider, run), *ours], rounds, steps, bench.device)
    found = {**percentiles(times), **details}
    return {
        **found, **_utilisation(found["p50_ms"], bench, machine["device"]), "steps": steps,
        "ours_ms": round(float(np.median(beside[0])), 5) if beside else None,
        "ratio": paired_ratio(times, beside[0]) if beside else None,
    }, run  # fmt: skip


def _names(provider: Provider, bench: Bench) -> dict:
    """What a row says of what was run, timed or not."""
    stage = bench.config.stages[bench.index]
    return {
        "part": "step", "op": "training step", "provider": provider.name, "mode": "forward + backward + update",
        "shape": _shape(bench), "sizes": {"batch": stage.batch_size, "points": stage.points},
        "dtype": bench.config.precision, "deterministic": provider.deterministic, "ratio": None, "cache": None,
        "error": None, "flops": 6 * FORWARD_MACS.get(stage.points, 0) * stage.batch_size or None, "bytes": None,
        "first_s": None, "peak_mib": None,
    }  # fmt: skip


def _in_turns(taking: list[tuple[Provider, Run]], rounds: int, steps: int, device: torch.device) -> list[list[float]]:
    """Milliseconds a step of every round of each; the first round does not count."""
    times: list[list[float]] = [[] for _ in taking]
    for _ in range(rounds + 1):
        for (provider, run), own in zip(taking, times):
            with provider.settings(device):
                own.append(_clock(run, steps, device) / steps)
    return [own[1:] for own in times]


def _forget(provider: Provider, device: torch.device) -> None:
    """Gives back what a provider held that nobody refers to any more."""
    if provider.slow:
        torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _built(provider: Provider, bench: Bench) -> tuple[Run, float | None]:
    """The provider after its first steps, and the memory that it takes beside the rows, MiB."""
    on_gpu = bench.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    run = provider.build(bench)
    run(2)
    if not on_gpu:
        return run, None
    torch.cuda.synchronize()
    return run, round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def _clock(run: Run, steps: int, device: torch.device) -> float:
    """Milliseconds from before the first step until the device has done the last."""
    _wait(device)
    start = time.perf_counter()
    run(steps)
    _wait(device)
    return (time.perf_counter() - start) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _profile(run: Run, device: torch.device) -> dict[str, Any]:
    """Kernels and copies of one step, and which share of the time there is none."""
    if device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    _wait(device)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run(_PROFILED)
        _wait(device)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in found.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    if not spans:
        return {"launches": None, "idle": None}
    busy, reached = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    whole = reached - spans[0][0]
    return {"launches": round(len(spans) / _PROFILED), "idle": round(1 - busy / whole, 4)}


def _utilisation(step_ms: float, bench: Bench, device: str) -> dict[str, float | None]:
    """mfu: the model's FLOP/s as a share of ``mfu_of`` TFLOP/s, those of bfloat16 on the device's data sheet."""
    flops = 6 * FORWARD_MACS.get(bench.rows.points, 0) * bench.config.stages[bench.index].batch_size
    sheet = specified(device)
    if not flops or sheet is None:
        return {"mfu": None, "mfu_of": None}
    return {"mfu": round(flops / (step_ms * 1e-3) / (sheet.half * 1e12), 4), "mfu_of": sheet.half}


def _shape(bench: Bench) -> str:
    stage = bench.config.stages[bench.index]
    return f"{stage.batch_size} x {stage.points}, {bench.config.precision}"


def table_head(device: str) -> str:
    """The first two lines of the Markdown table of a stage, measured on a device."""
    sheet = specified(device)
    mfu = "MFU" if sheet is None else f"MFU, of {sheet.half:g} TFLOP/s"
    columns = ("provider", "ms a step", "p20-p80", "ours beside it", mfu, "launches", "idle", "peak MiB")
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def table_line(row: dict) -> str:
    """The line of a row below ``table_head``."""
    if "failed" in row:
        return f"| {row['provider']} | not measured: {row['failed']} |{' |' * 6}"
    low, middle, high = (milliseconds(row[f"{name}_ms"]) for name in ("p20", "p50", "p80"))
    ours = "" if row["ours_ms"] is None else milliseconds(row["ours_ms"])
    mfu, idle = ("" if row.get(name) is None else f"{row[name]:.1%}" for name in ("mfu", "idle"))
    cells = (
        row["provider"], middle, f"{low}-{high}", ours, mfu, row.get("launches") or "", idle, row["peak_mib"] or "",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def goals(rows: list[dict]) -> list[str]:
    """The goals of one stage, each beside what was measured."""
    found = {row["provider"]: row for row in rows}
    wanted = [(f"ours / {rival}", rival, bound) for rival, bound in _GOALS]
    wanted.append(("ours / without torch's determinism", FREE, _DETERMINISM_GOAL))
    shares = [(name, _share(found.get(rival, {})), bound) for name, rival, bound in wanted]
    lines = [_goal(name, share, bound, share is not None and share <= bound, "<=") for name, share, bound in shares]
    mfu = found.get(OURS, {}).get("mfu")
    return [*lines, _goal("MFU", mfu, _MFU_GOAL, mfu is not None and mfu >= _MFU_GOAL, ">=")]


def _share(row: dict) -> float | None:
    """Time of ours in a rival's, of the same turns."""
    return row["ours_ms"] / row["p50_ms"] if row.get("ours_ms") else None


def _goal(name: str, value: float | None, bound: float, met: bool, sign: str) -> str:
    said = "not measured yet" if value is None else f"measured {value:.3g}: {'met' if met else 'missed'}"
    return f"{name}: goal {sign} {bound:g}, {said}"


def run(options: argparse.Namespace) -> int:
    """Measures and prints a table and the goals of every stage; without CUDA it says so. 1: a step of ours failed."""
    prepare_process()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(*goals([]), "skipped: no CUDA device", sep="\n")
        return 0
    machine, start = describe_machine(options.device), time.monotonic()
    out = options.out or default_out(machine["device"], options.small)
    print(heading(machine), flush=True)
    failed = False
    for stage in options.stage:
        bench = make_bench(stage - 1, options.device, options.small, options.backend)
        machine["command"] = command(
            "step", stage=stage, rounds=options.rounds, steps=options.steps, small=options.small,
            device=None if options.device == "cuda" else options.device,
            backend=None if options.backend == "inductor" else options.backend, seconds=options.seconds,
        )  # fmt: skip
        print(f"stage {stage}, {_shape(bench)}", table_head(machine["device"]), sep="\n", flush=True)
        rows = []
        for row in measure_steps(
            bench, machine, options.rounds, options.steps,
            lambda: options.seconds is not None and time.monotonic() - start > options.seconds,
        ):  # fmt: skip
            if out:
                append_rows(out, [row])
            print(table_line(row), flush=True)
            rows.append(row)
        # What a CPU takes says nothing about the goals.
        print(*goals(rows if options.device == "cuda" else []), sep="\n", flush=True)
        failed |= any("failed" in row for row in rows if is_ours(row["provider"]))
    return int(failed)

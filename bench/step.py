"""Times whole steps of training, ours beside rivals, on a CUDA device: ``wireframe bench step``.

Every provider takes the same made rows, the published model, bfloat16 products and AdamW; what a step includes is the
same too, from the choice of scenes to the update. Providers take turns in rounds of several steps, timed from the first
launch to the end of the last, so that a host that is late counts. Launches and the share of time without a kernel come
from torch.profiler, over steps of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wireframe.bench.gpus import GPUS
from wireframe.bench.plain_model import PlainPerceiver, plain_loss, plain_optimizer, plain_step
from wireframe.bench.timing import Case, append_rows, describe_machine, heading, milliseconds, result
from wireframe.errors import one_line
from wireframe.kernels.determinism import deterministic, prepare_process
from wireframe.perceiver import Perceiver
from wireframe.train.config import BASE_CONFIG, SMOKE_CONFIG, TrainConfig, load_config
from wireframe.train.data import Batch, TrainingSet
from wireframe.train.made_rows import made_rows
from wireframe.train.optimizer import FlatAdamW
from wireframe.train.ranks import Ranks
from wireframe.train.steps import EagerSteps, ScriptedSteps, Stage

OURS = "ours"
FREE = "ours, torch's determinism off"
PLAIN = "torch eager"
COMPILED = "torch.compile"
GRAPHED = "torch.compile in a CUDA graph"
PUBLISHED = "published style: host loader, torch.compile"
_FIXED = ", deterministic"

# Multiply-adds of the forward pass of a scene, by points, of the published model; training takes three times that.
FORWARD_MACS = {2048: 3817e6, 4096: 5761e6}

# What a step of ours may take at most, in shares of the rivals' time.
_GOALS = ((GRAPHED, 0.9), (COMPILED + _FIXED, 0.5), (PUBLISHED, 0.4))
_MFU_GOAL, _DETERMINISM_GOAL = 0.45, 1.02

_SCENES = 96
_PROFILED = 3

Run = Callable[[int], object]


class Bench(NamedTuple):
    """What all providers share: a stage of a run whose rows lie on the device."""

    config: TrainConfig
    index: int
    rows: TrainingSet
    device: torch.device
    backend: str

    def stage(self) -> Stage:
        """The stage with weights of its own."""
        config = self.config
        model = Perceiver(config.model, seed=config.seed).train().to(self.device)
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        optimizer = FlatAdamW(model, config.optimizer, dtype, config.micro_batches)
        return Stage(config, self.index, self.rows, optimizer, Ranks(self.device))

    def batches(self, stage: Stage) -> Iterator[Batch]:
        """Batch after batch of resident rows, laid out by the host."""
        config, steps = self.config, itertools.count(stage.begin)
        requests = ((step, rows) for step in steps for rows in stage.micro_batches(step))
        return stage.rows.batches(requests, config.seed, config.augment, stage.settings.points)


class Provider(NamedTuple):
    """One way to take steps. build: gives the function that takes so many, under ``settings``. slow: to compile."""

    name: str
    build: Callable[[Bench], Run]
    deterministic: bool = False
    slow: bool = False

    def settings(self, device: torch.device) -> contextlib.AbstractContextManager:
        return deterministic(device.type) if self.deterministic else contextlib.nullcontext()


def _scripted(bench: Bench) -> Run:
    stage = bench.stage()
    steps, at = ScriptedSteps(stage, 20), itertools.count(stage.begin, 20)

    def run(count: int) -> None:
        for start in range(0, count, 20):
            begin = next(at)
            steps.start(begin, begin + min(20, count - start), False)

    return run


def _one_by_one(bench: Bench) -> Run:
    stage = bench.stage()
    steps, at = EagerSteps(stage, bench.batches(stage)), itertools.count(stage.begin)

    def run(count: int) -> None:
        for begin in itertools.islice(at, count):
            steps.start(begin, begin + 1, False)

    return run


class _Plain:
    """The model in plain PyTorch with its optimiser; ``step`` takes a batch."""

    def __init__(self, bench: Bench, compiled: bool, fused: bool = False) -> None:
        config, stage = bench.config, bench.config.stages[bench.index]
        plain = PlainPerceiver(config.model).train()
        plain.load_state_dict(Perceiver(config.model, seed=config.seed).state_dict())
        self.model = plain.to(bench.device)
        self._optimizer = plain_optimizer(self.model, config.optimizer, fused)
        self._call, self._loss = self.model, plain_loss
        if compiled:
            self._call, self._loss = (
                torch.compile(f, backend=bench.backend, dynamic=False) for f in (self.model, plain_loss)
            )
        self._how = {
            "grad_clip": config.optimizer.grad_clip, "endpoint_weight": stage.endpoint_weight,
            "conf_target": stage.conf_target, "loss": self._loss,
            "autocast": torch.bfloat16 if config.precision == "bfloat16" else None,
        }  # fmt: skip
        self._config = config.loss

    def step(self, batch: Batch) -> Tensor:
        return plain_step(
            self._call, self._optimizer, batch.inputs, batch.target, batch.target_mask, self._config, **self._how
        )


def _plain(bench: Bench, compiled: bool) -> Run:
    plain, batches = _Plain(bench, compiled), bench.batches(bench.stage())

    def run(count: int) -> None:
        for batch in itertools.islice(batches, count):
            plain.step(batch)

    return run


def _compiled_graph(bench: Bench) -> Run:
    """A compiled step and fused AdamW in one graph, with a batch that lies where the graph reads it."""
    plain, batches = _Plain(bench, compiled=True, fused=True), bench.batches(bench.stage())
    if bench.device.type != "cuda":
        raise RuntimeError("there are no graphs on a CPU")
    static = next(batches)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            plain.step(static)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        plain.step(static)

    def run(count: int) -> None:
        for batch in itertools.islice(batches, count):
            for name, tensor in batch.inputs.items():
                static.inputs[name].copy_(tensor)
            for old, new in zip(static[1:], batch[1:]):
                old.copy_(new)
            graph.replay()

    return run


class _Files(torch.utils.data.Dataset):
    """Rows as a data set of files gives them: decoded when they are asked for, by the workers of a loader."""

    def __init__(self, points: int) -> None:
        from wireframe.samples import write_sample

        self._rows = [write_sample(scene) for scene in made_rows(points, _SCENES)]

    def __len__(self) -> int:
        # Workers start anew with every epoch: let there be one.
        return 1 << 20

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        from wireframe.samples import read_sample
        from wireframe.tokens import MODEL_INPUTS

        scene = read_sample(self._rows[index % _SCENES])
        found = {name: torch.from_numpy(getattr(scene, name).copy()) for name in MODEL_INPUTS}
        target = torch.zeros(64, 2, 3)
        target[: len(scene.gt_segments)] = torch.from_numpy(scene.gt_segments)
        return {**found, "target": target, "target_mask": torch.arange(64) < len(scene.gt_segments)}


def _published(bench: Bench) -> Run:
    stage = bench.config.stages[bench.index]
    plain = _Plain(bench, compiled=True)
    pinned = bench.device.type == "cuda"
    loader = torch.utils.data.DataLoader(
        _Files(stage.points), stage.batch_size, shuffle=True, num_workers=8 if pinned else 1, pin_memory=pinned
    )
    batches = iter(loader)

    def run(count: int) -> None:
        for host in itertools.islice(batches, count):
            found = {name: tensor.to(bench.device, non_blocking=True) for name, tensor in host.items()}
            target, mask = found.pop("target"), found.pop("target_mask")
            # A loop as it is published reads its loss.
            plain.step(Batch(found, target, mask, mask)).mean().item()

    return run


PROVIDERS = (
    Provider(OURS, _scripted, deterministic=True),
    Provider(FREE, _scripted),
    Provider(f"{OURS}, without a graph", _one_by_one, deterministic=True),
    Provider(PLAIN, lambda bench: _plain(bench, False)),
    Provider(COMPILED, lambda bench: _plain(bench, True), slow=True),
    Provider(GRAPHED, _compiled_graph, slow=True),
    Provider(PUBLISHED, _published, slow=True),
    Provider(PLAIN + _FIXED, lambda bench: _plain(bench, False), deterministic=True),
    Provider(COMPILED + _FIXED, lambda bench: _plain(bench, True), deterministic=True, slow=True),
)


def measure_steps(
    bench: Bench, machine: dict, rounds: int, steps: int, late: Callable[[], bool] = lambda: False
) -> Iterator[dict]:
    """A row a provider: milliseconds a step, model FLOP utilisation, launches, idle share, peak memory.

    Args:
        rounds: how often each provider takes ``steps`` steps, in turn.
        late: whether the time is over, so that no further slow provider is built.
    """
    built: list[tuple[Provider, Run, dict]] = []
    for provider in PROVIDERS:
        names = {"op": "training step", "provider": provider.name, "shape": _shape(bench)}
        if provider.slow and late():
            yield {**names, "failed": "left out, the time is over", **machine}
            continue
        try:
            with provider.settings(bench.device):
                start = time.monotonic()
                run, peak = _built(provider, bench)
                first = round(time.monotonic() - start, 1)
                built.append((provider, run, {"peak_mib": peak, "first_s": first, **_profile(run, bench.device)}))
        except Exception as failure:
            yield {**names, "failed": one_line(failure), **machine}
    times: list[list[float]] = [[] for _ in built]
    # The first turn does not count.
    for _ in range(rounds + 1):
        for (provider, run, _), own in zip(built, times):
            with provider.settings(bench.device):
                own.append(_clock(run, steps, bench.device) / steps)
    times = [own[1:] for own in times]
    flops = 6 * FORWARD_MACS.get(bench.rows.points, 0) * bench.config.stages[bench.index].batch_size
    for (provider, run, details), own in zip(built, times):
        row = result(Case("training step", provider.name, _shape(bench), run), own, machine, **details)
        peak = _peak_flops(machine["device"])
        share = flops / (row["p50_ms"] * 1e-3) / peak if flops and peak else None
        yield {**row, "deterministic": provider.deterministic, "steps": steps, "mfu": share and round(share, 4)}


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


def _shape(bench: Bench) -> str:
    stage = bench.config.stages[bench.index]
    return f"{stage.batch_size} x {stage.points}, {bench.config.precision}"


def _peak_flops(name: str) -> float | None:
    """FLOP/s of half precision products of a device, where it is known."""
    return next((gpu.half * 1e12 for known, gpu in GPUS.items() if known in name), None)


def table(rows: list[dict]) -> str:
    """Markdown of the rows of one stage."""
    lines = ["| provider | ms a step | p20-p80 | MFU | launches | idle | peak MiB |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['provider']} | not measured: {row['failed']} | | | | | |")
            continue
        low, middle, high = (milliseconds(row[f"{name}_ms"]) for name in ("p20", "p50", "p80"))
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        idle = "" if row.get("idle") is None else f"{row['idle']:.1%}"
        cells = (row["provider"], middle, f"{low}-{high}", mfu, row.get("launches") or "", idle, row["peak_mib"] or "")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def goals(rows: list[dict]) -> list[str]:
    """The goals of one stage, each beside what was measured."""
    times = {row["provider"]: row.get("p50_ms") for row in rows}
    ours = times.get(OURS)
    found = [(f"ours / {rival}", _ratio(ours, times.get(rival)), bound) for rival, bound in _GOALS]
    found.append(("ours / without torch's determinism", _ratio(ours, times.get(FREE)), _DETERMINISM_GOAL))
    lines = [_goal(name, value, bound, value is not None and value <= bound, "<=") for name, value, bound in found]
    mfu = next((row.get("mfu") for row in rows if row["provider"] == OURS), None)
    return [*lines, _goal("MFU", mfu, _MFU_GOAL, mfu is not None and mfu >= _MFU_GOAL, ">=")]


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _goal(name: str, value: float | None, bound: float, met: bool, sign: str) -> str:
    said = "not measured yet" if value is None else f"measured {value:.3g}: {'met' if met else 'missed'}"
    return f"{name}: goal {sign} {bound:g}, {said}"


def make_bench(stage: int, device: str, small: bool = False, backend: str = "inductor") -> Bench:
    """Stage ``stage``, from 0, of the published recipe, or with ``small`` of the smoke recipe, on made rows."""
    config = load_config(SMOKE_CONFIG if small else BASE_CONFIG)
    config = dataclasses.replace(config, precision="float32" if small else "bfloat16", micro_batches=1)
    scenes = made_rows(config.stages[stage].points, _SCENES)
    rows = TrainingSet.from_scenes(scenes, config.model.segments, device)
    return Bench(config, stage, rows, torch.device(device), backend)


def run(options: argparse.Namespace) -> int:
    """Measures and prints a table and the goals of every stage; without CUDA it says so. 1: a step of ours failed."""
    prepare_process()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(*goals([]), "skipped: no CUDA device", sep="\n")
        return 0
    machine, start = describe_machine(options.device), time.monotonic()
    print(heading(machine), flush=True)
    failed = False
    for stage in options.stage:
        bench = make_bench(stage - 1, options.device, options.small, options.backend)
        rows = list(
            measure_steps(
                bench, machine, options.rounds, options.steps,
                lambda: options.seconds is not None and time.monotonic() - start > options.seconds,
            )
        )  # fmt: skip
        if options.out:
            append_rows(options.out, rows)
        # What a CPU takes says nothing about the goals.
        found = goals(rows if options.device == "cuda" else [])
        print(f"stage {stage}, {_shape(bench)}", table(rows), *found, sep="\n", flush=True)
        failed |= any("failed" in row for row in rows if row["provider"].startswith(OURS))
    return int(failed)

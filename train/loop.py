"""The training loop: every step is a function of (configuration, data, seed, step), so a resumed run equals an
uninterrupted one, and any number of processes gives the same weights."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wireframe.checkpoint import tensor_sha256
from wireframe.errors import CheckpointError, ConfigError
from wireframe.files import atomic_write, sole_process
from wireframe.kernels.determinism import deterministic, prepare_process
from wireframe.perceiver import Perceiver
from wireframe.train import checkpoints
from wireframe.train.checkpoints import State
from wireframe.train.config import StageConfig, TrainConfig
from wireframe.train.data import TrainingSet, load_training_sets, set_for
from wireframe.train.log import RunLog
from wireframe.train.made_rows import MadeRows
from wireframe.train.optimizer import FlatAdamW, product_dtype
from wireframe.train.ranks import Ranks, join_ranks
from wireframe.train.stage_end import finish_stage
from wireframe.train.step import StepResult
from wireframe.train.steps import Stage, Told, steps_of
from wireframe.train.stopping import GaveUp, Stopped, StopRequest


class Run(NamedTuple):
    """What a run is made of and where it stands apart from its step."""

    config: TrainConfig
    sets: dict[int, TrainingSet]
    fingerprints: dict[str, str]
    out: Path
    optimizer: FlatAdamW
    ranks: Ranks
    request: StopRequest
    log: RunLog
    evaluate: bool
    progress: bool

    @property
    def model(self) -> Perceiver:
        """The model with its float32 weights."""
        return self.optimizer.model

    def set_of(self, stage: StageConfig) -> TrainingSet:
        return self.sets[_set_of(stage, self.sets, self.config)]

    def save(self, state: State) -> None:
        """Writes a checkpoint; every process comes here, the first one writes."""
        if self.ranks.is_first:
            checkpoints.save(self.out, state, self.optimizer, self.config, self.fingerprints)
        self.ranks.wait()

    def stage(self, index: int) -> Stage:
        return Stage(self.config, index, self.set_of(self.config.stages[index]), self.optimizer, self.ranks)


def train(
    config: TrainConfig,
    data: Sequence[str | os.PathLike | MadeRows],
    out: str | os.PathLike,
    *,
    stages: tuple[int, int] | None = None,
    init: str | os.PathLike | None = None,
    exclude: frozenset[str] = frozenset(),
    device: str = "auto",
    stream: bool | None = None,
    evaluate: bool = True,
    progress: bool = True,
    stop_after: int | None = None,
) -> Path:
    """Trains stages, going on from the newest valid checkpoint in ``out``.

    In a process started by ``torchrun`` the micro-batches are shared out among the ranks; the weights do not depend on
    how many there are.

    Args:
        config: the run.
        data: sampled sets (Parquet files, folders, ``hf://``); each stage takes the one with its number of points.
        out: folder of ``checkpoints/``, ``log.jsonl``, ``stages/``, ``evaluation/``, ``report.html`` and ``model/``.
        stages: first and last stage to run, from 0; None for all. A later first stage goes on in ``out`` or from
            ``init``.
        init: what the first step starts from: a run's checkpoint (weights and optimiser), a model folder or published
            ``.pt`` (weights alone), ``hf://...``; None for new weights.
        exclude: ids of scenes to leave out.
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        stream: keep the sets on disk and read ahead (True), on the device (False), or as they fit (None).
        evaluate: whether to score the held-out rows at the end of every stage.
        progress: whether to show progress bars on stderr.
        stop_after: end early, after this many steps of the whole run, with a checkpoint (for tests and time slots).

    Returns:
        The folder of the model of the last stage, or of the last checkpoint when ended early.

    Raises:
        ConfigError: settings, data and ``out`` do not fit together. CheckpointError: ``out`` belongs to another run, or
        cannot be written. Stopped: SIGTERM or SIGINT came, and the state is saved. GaveUp: too many steps in a row were
        not finite; ``bad-steps.json`` names their scenes.
    """
    out = Path(out)
    if os.path.lexists(out) and not out.is_dir():
        raise ConfigError(f"--out {out} is no folder; give another name")
    out.mkdir(parents=True, exist_ok=True)
    if device != "cpu":
        prepare_process()
    with contextlib.ExitStack() as held:
        ranks = held.enter_context(join_ranks(device))
        if ranks.is_first:
            held.enter_context(sole_process(out / ".lock", f"trains into {out}"))
        request = held.enter_context(StopRequest())
        held.enter_context(deterministic(ranks.device.type))
        ranks.share(config.micro_batches)
        say = _say if ranks.is_first else lambda line: None
        first, last = stages or (0, len(config.stages) - 1)
        options = {"exclude": exclude, "device": ranks.device, "stream": stream, "spool": out / "spool", "say": say}
        # What the first rank decodes onto the disk, the others find there.
        sets = ranks.in_turn(lambda: load_training_sets(data, config, **options))
        for stage in config.stages[first : last + 1]:
            _set_of(stage, sets, config)
            if max(stage.warmup, stage.cooldown) > stage.steps:
                say(
                    f"stage {stage.name}: a warm-up of {stage.warmup} and a cooldown of {stage.cooldown} steps for "
                    f"{stage.steps}; its learning rate never reaches lr"
                )
        model = Perceiver(config.model, seed=config.seed).train().to(ranks.device)
        dtype, mine = product_dtype(config.precision, ranks.device), len(ranks.share(config.micro_batches))
        optimizer = FlatAdamW(model, config.optimizer, dtype, mine)
        fingerprints = {str(points): found.fingerprint() for points, found in sorted(sets.items())}
        state = _begin(config, out, first, init, optimizer, fingerprints, say)
        if ranks.size > 1:
            tensors = [model.state_dict(), optimizer.state()]
            # The dtype too: "auto" may mean another one on another card.
            same = [state, fingerprints, config.to_dict(), str(dtype), *map(tensor_sha256, tensors)]
            ranks.agree(json.dumps(same))
        end = config.stage_start(last + 1)
        path = out / "log.jsonl" if ranks.is_first else None
        with RunLog(path, state.step, end, config.log_every, progress) as log:
            run = Run(config, sets, fingerprints, out, optimizer, ranks, request, log, evaluate, progress)
            if state.step > config.stage_start(first):
                log.event(state.step, "resumed")
            if stop_after is not None and stop_after <= config.stage_start(first):
                raise ConfigError(
                    f"--stop-after {stop_after} lies before stage {first + 1}, which begins at step {state.step}; it "
                    "counts the steps of the whole run"
                )
            return _run_stages(run, state, range(first, last + 1), min(end, stop_after or end))


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _set_of(stage: StageConfig, sets: dict[int, TrainingSet], config: TrainConfig) -> int:
    """How many points the rows have that a stage is trained on."""
    found = set_for(stage.points, sets, config.augment.resample)
    if found is None:
        larger = set_for(stage.points, sets, resample=True)
        raise ConfigError(
            f"stage {stage.name} wants rows of {stage.points} points; --data has {sorted(sets)}"
            + ("; augment.resample=true would draw them from larger rows" if larger else "")
        )
    return found


def _begin(
    config: TrainConfig,
    out: Path,
    first: int,
    init: str | os.PathLike | None,
    optimizer: FlatAdamW,
    data: dict[str, str],
    say: Callable[[str], None],
) -> State:
    """Weights, optimiser and step to go on from."""
    begin = config.stage_start(first)
    given = checkpoints.start_from(init, optimizer) if init is not None else None
    found = checkpoints.latest(out, say)
    if found is None:
        if any((out / "checkpoints").glob("step-*")):
            raise CheckpointError(
                f"no checkpoint in {out} is whole; move them away to begin anew, or give another --out"
            )
        if first and given is None:
            raise ConfigError(f"stage {first + 1} goes on from a checkpoint, and {out} holds none; give --init")
        return State(begin, 0, given)
    state = checkpoints.load(found, optimizer, config, data, say)
    if given is not None and given["sha256"] != (state.start or {}).get("sha256"):
        raise CheckpointError(f"{found} did not begin with --init {os.fspath(init)}; choose another --out")
    if state.step < begin:
        raise ConfigError(f"{out} stands at step {state.step}, before stage {first + 1} at {begin}; finish that first")
    return state


def _run_stages(run: Run, state: State, stages: range, last: int) -> Path:
    for index in stages:
        end = run.config.stage_start(index + 1)
        if state.step < end:
            state = _run_stage(run, state, index, min(end, last))
        if state.step == end:
            finish_stage(run, index)
            run.log.restart_clock(end)
        if last <= end:
            break
    if state.step < run.config.stage_start(stages[-1] + 1):
        return checkpoints.folder(run.out, state.step)
    return run.out / "model"


def _run_stage(run: Run, state: State, index: int, last: int) -> State:
    """Steps until ``last`` finished ones, within stage ``index``."""
    end = run.config.stage_start(index + 1)
    bad: dict[int, StepResult] = {}
    # A span that runs while the one before it is read.
    waiting: Told | None = None
    started = state.step
    with steps_of(run.stage(index), state.step, last) as steps:
        # What was compiled and captured is no step's time.
        run.log.restart_clock(state.step)
        while state.step < last:
            stop = run.request.asked
            told, waiting = waiting, None
            # Several ranks learn of a signal by a step, so one more is begun where none is under way.
            if started < last and not (stop and (told or run.ranks.size == 1)):
                span = _span_end(run, started, min(last, started + steps.longest))
                waiting, started = steps.start(started, span, stop), span
            if told:
                state, _ = _record(run, index, state, told, bad)
            saving = started % run.config.save_every == 0 or started in (end, last) or stop
            if waiting and (saving or not steps.ahead):
                state, agreed = _record(run, index, state, waiting, bad)
                waiting, stop = None, stop if run.ranks.size == 1 else agreed
            if state.step == started and (saving or stop):
                run.save(state)
                if stop and state.step < end:
                    raise _stopped(run, state)
    return state


def _span_end(run: Run, begin: int, most: int) -> int:
    """The end of the span that begins at a step: the next line of the log or checkpoint, or ``most``."""
    return min(most, *((begin // every + 1) * every for every in (run.config.log_every, run.config.save_every)))


def _record(run: Run, index: int, state: State, told: Told, bad: dict[int, StepResult]) -> tuple[State, bool]:
    """Logs what finished steps told and counts bad ones; the state behind them, and whether some rank wants to stop.

    Raises:
        GaveUp: too many were bad in a row.
    """
    config, stage = run.config, run.config.stages[index]
    for result in told.results():
        step = state.step
        state = State(step + 1, 0 if result.applied else state.bad_steps + 1, state.start)
        lr = stage.lr_at(step - config.stage_start(index))
        fields = {"stage": stage.name, **result.means(), "grad_norm": result.grad_norm, "lr": lr}
        run.log.step(state.step, {**fields, "bad_steps": state.bad_steps})
        if not result.applied:
            bad[step] = result
            run.log.event(state.step, "bad step", scenes=_scenes_of(run, step))
            if state.bad_steps > config.max_bad_steps:
                raise _gave_up(run, state, bad)
    return state, result.stop


def _stopped(run: Run, state: State) -> Stopped:
    folder = checkpoints.folder(run.out, state.step)
    return Stopped(f"stopped after step {state.step}, saved in {folder}; the same command goes on from there")


def _scenes_of(run: Run, step: int) -> list[str]:
    """The ids of the scenes of a step's batch."""
    stage = run.stage(run.config.stage_at(step)[0])
    return [stage.rows.order_ids[row] for row in stage.scenes(step)]


def _gave_up(run: Run, state: State, known: dict[int, StepResult]) -> GaveUp:
    """Writes which scenes the skipped steps had, with their losses where this process knows them."""
    path = run.out / "bad-steps.json"
    if run.ranks.is_first:
        with atomic_write(path) as file:
            steps = range(state.step - state.bad_steps, state.step)
            file.write(json.dumps([_describe(run, step, known.get(step)) for step in steps], indent=1).encode())
    return GaveUp(
        f"{state.bad_steps} steps in a row up to step {state.step} had a loss or gradient that is not finite; {path} "
        "names their scenes; leave them out (--exclude) or lower the learning rate, with another --out and --init from "
        "an older checkpoint (its stage then begins anew)"
    )


def _describe(run: Run, step: int, result: StepResult | None) -> dict:
    """A skipped step; what is not finite stands as text."""
    stage = run.config.stages[run.config.stage_at(step)[0]]
    about = {"step": step, "stage": stage.name, "scenes": _scenes_of(run, step)}
    if result is None:
        return about
    losses = [value if np.isfinite(value) else str(value) for value in result.losses[:, 0].tolist()]
    return {**about, "losses": losses, "grad_norm": str(result.grad_norm)}

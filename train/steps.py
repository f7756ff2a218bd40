"""Steps of a stage, some at a time: what they need is laid out beforehand, what they tell is read behind them.

On a GPU with the rows on it a step is one CUDA graph that holds everything from the gather of the batch to AdamW and
reads scenes, turns, step and learning rate from a script on the device; the host only replays it and reads the last
span's losses while the next one runs. On a CPU the same steps run without a graph. Rows on disk, or several ranks:
eagerly, batch by batch. The bits are the same in all three.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from wireframe.train.config import TrainConfig
from wireframe.train.data import Batch, TrainingSet
from wireframe.train.optimizer import FlatAdamW
from wireframe.train.ranks import Ranks
from wireframe.train.resident import moved
from wireframe.train.step import StepResult, train_step

# Steps of a span on a GPU: long enough that the host is never waited for, short enough that a signal is answered soon.
_LONGEST = 50

# Calls before the capture of a graph: kernels are compiled, libraries allocate what they keep.
_WARM_UP = 3


class Told:
    """What some steps have to tell, on its way from the device."""

    def __init__(self, told: Tensor) -> None:
        """told: [n, B + 1, 4] of ``train_step``; may be written again once this returns."""
        self._ready = None
        if told.device.type == "cuda":
            host = torch.empty(told.shape, dtype=told.dtype, pin_memory=True)
            self._told = host.copy_(told, non_blocking=True)
            self._ready = torch.cuda.current_stream(told.device).record_event()
        else:
            self._told = told.clone()

    def results(self) -> list[StepResult]:
        """One of each step; waits until the device has done the last of them."""
        if self._ready is not None:
            self._ready.synchronize()
        return [StepResult.read(told) for told in self._told]


class Steps(Protocol):
    """Steps of one stage, in order; ``longest``: how many may be started at once, ``ahead``: before others are read."""

    longest: int
    ahead: bool

    def start(self, begin: int, end: int, stop: bool) -> Told:
        """Starts the global steps ``begin .. end - 1``; ``stop``: whether this process was asked to stop."""
        ...


class Stage(NamedTuple):
    """One stage of a run: what its steps are made of."""

    config: TrainConfig
    index: int
    rows: TrainingSet
    optimizer: FlatAdamW
    ranks: Ranks

    @property
    def settings(self):
        return self.config.stages[self.index]

    @property
    def begin(self) -> int:
        return self.config.stage_start(self.index)

    def scenes(self, step: int) -> np.ndarray:
        """The rows int64 [B] of a global step."""
        size = self.settings.batch_size
        return self.rows.order(self.config.seed, self.index, (step - self.begin) * size, size)

    def micro_batches(self, step: int) -> Iterator[np.ndarray]:
        """The rows of every micro-batch of this process."""
        part = self.settings.batch_size // self.config.micro_batches
        for micro in self.ranks.share(self.config.micro_batches):
            yield self.scenes(step)[micro * part : (micro + 1) * part]


@contextlib.contextmanager
def steps_of(stage: Stage, first: int, last: int) -> Iterator[Steps]:
    """The steps ``first .. last - 1`` of a stage, as fits where its rows are and how many ranks there are."""
    if stage.rows.resident and stage.ranks.size == 1:
        yield ScriptedSteps(stage)
        return
    requests = ((step, rows) for step in range(first, last) for rows in stage.micro_batches(step))
    config = stage.config
    with contextlib.closing(
        stage.rows.batches(requests, config.seed, config.augment, stage.settings.points)
    ) as batches:
        yield EagerSteps(stage, batches)


class EagerSteps:
    """Steps whose batches come from an iterator."""

    longest = 1

    def __init__(self, stage: Stage, batches: Iterator[Batch]) -> None:
        self._stage, self._batches = stage, batches
        # Ranks agree on every step whether to stop.
        self.ahead = stage.ranks.size == 1 and stage.rows.device.type == "cuda"

    def start(self, begin: int, end: int, stop: bool) -> Told:
        stage, told = self._stage, []
        for step in range(begin, end):
            batches = [next(self._batches) for _ in stage.ranks.share(stage.config.micro_batches)]
            lr = moved(torch.tensor(stage.settings.lr_at(step - stage.begin)), stage.ranks.device)
            told.append(
                train_step(stage.optimizer, batches, stage.config, stage.settings, step, lr, stage.ranks, stop)
            )
        return Told(torch.stack(told))


class Script(NamedTuple):
    """What a span of S steps reads: global step int64 [S], learning rate float32 [S], scenes int64 [S, B], turns
    float32 [S, B, 4] (nothing of them where there are none)."""

    step: Tensor
    lr: Tensor
    scenes: Tensor
    turns: Tensor


class ScriptedSteps:
    """Steps on resident rows that read all they need from the device; on a GPU replays of one graph.

    longest: by default as many as lie between two lines of the log on a GPU, at most 50, and 1 on a CPU.
    """

    def __init__(self, stage: Stage, longest: int | None = None) -> None:
        self._stage, device = stage, stage.rows.device
        on_gpu = device.type == "cuda"
        self.longest = longest or (min(stage.config.log_every, _LONGEST) if on_gpu else 1)
        self.ahead = on_gpu
        size = stage.settings.batch_size
        augment = stage.config.augment
        self._turned = augment.rotate or augment.flip
        self._script = Script(
            torch.zeros(self.longest, dtype=torch.int64, device=device),
            torch.zeros(self.longest, device=device),
            torch.zeros(self.longest, size, dtype=torch.int64, device=device),
            torch.zeros(self.longest, size if self._turned else 0, 4, device=device),
        )
        self._slots = torch.arange(self.longest, device=device)[:, None, None]
        # Which line of the script is next, and whether steps count; both advance on the device.
        self._line = torch.zeros(1, dtype=torch.int64, device=device)
        self._armed = torch.zeros((), dtype=torch.bool, device=device)
        self._told = torch.zeros(self.longest, size + 1, 4, device=device)
        self._graph = self._captured() if on_gpu else None
        self._armed.fill_(True)

    def start(self, begin: int, end: int, stop: bool) -> Told:
        self._write(begin, end)
        for _ in range(begin, end):
            if self._graph is None:
                self._one()
            else:
                self._graph.replay()
        return Told(self._told[: end - begin])

    def _write(self, begin: int, end: int) -> None:
        """The script of some steps, behind what is still being done by the last one."""
        stage, steps = self._stage, range(begin, end)
        scenes = [stage.scenes(step) for step in steps]
        lines = [
            torch.tensor(list(steps), dtype=torch.int64),
            torch.tensor([stage.settings.lr_at(step - stage.begin) for step in steps]),
            torch.from_numpy(np.stack(scenes)),
        ]
        if self._turned:
            seed, augment = stage.config.seed, stage.config.augment
            lines.append(torch.stack([stage.rows.turns(seed, at, rows, augment) for at, rows in zip(steps, scenes)]))
        for buffer, line in zip(self._script, lines):
            buffer[: len(line)].copy_(moved(line, buffer.device))
        self._line.zero_()

    def _one(self) -> None:
        """The step of the present line; changes nothing of the weights unless armed."""
        stage, config = self._stage, self._stage.config
        step, lr, scenes, turns = (buffer.index_select(0, self._line).squeeze(0) for buffer in self._script)
        parts = [part.chunk(config.micro_batches) for part in (scenes, turns)]
        batches = [
            stage.rows.batch_on_device(
                config.seed, step, rows, turned if self._turned else None, config.augment, stage.settings.points
            )
            for rows, turned in zip(*parts)
        ]
        told = train_step(
            stage.optimizer, batches, config, stage.settings, step, lr, stage.ranks, armed=self._armed
        )
        self._told.copy_(torch.where(self._slots == self._line, told, self._told))
        self._line.add_(1)

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The graph of ``_one``; to warm up and to capture advances nothing, since nothing is armed yet."""
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._line.zero_()
                self._one()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            self._one()
        return graph

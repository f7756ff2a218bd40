"""Ways to take steps of training on made rows, ours and rivals, for ``bench/step.py`` to time.

All of them take the same rows in the same order, the published model, bfloat16 products and AdamW, and a step of each
includes the same, from the choice of scenes to the update. What the last step of a run told comes with it, so that
``bench/step.py`` can hold the first ones against each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wireframe.bench import names
from wireframe.bench.names import FIXED, OURS
from wireframe.bench.plain_model import PlainPerceiver, Told, plain_loss, plain_optimizer, plain_step
from wireframe.kernels.determinism import deterministic
from wireframe.perceiver import Perceiver
from wireframe.train.config import BASE_CONFIG, SMOKE_CONFIG, TrainConfig, load_config
from wireframe.train.data import Batch, TrainingSet
from wireframe.train.loss import Losses
from wireframe.train.made_rows import made_rows
from wireframe.train.optimizer import FlatAdamW
from wireframe.train.ranks import Ranks
from wireframe.train.steps import EagerSteps, ScriptedSteps, Stage, Steps

FREE = OURS + names.FREE
PLAIN = "torch eager"
COMPILED = "torch.compile"
GRAPHED = "torch.compile in a CUDA graph"
PUBLISHED = "published style: host loader, torch.compile"

_SCENES = 96

# Steps that ours lays out at once. Training lays out 50 while the device is busy with those before; here every turn
# begins on an idle device, which waits for the first span: of 20 steps 5, not all of them, and a turn stays short for
# rivals whose steps take a tenth of a second.
_SPAN = 5

# Of what is compared: segments stay near the scene, and the matching has something to decide.
_HEAD_SCALE = 0.03


# Takes so many steps; what the last of them told.
Run = Callable[[int], Told]


class Bench(NamedTuple):
    """What all providers share: a stage of a run whose rows lie on the device.

    drawn: whether weights are such that every one of them shows in a loss.
    """

    config: TrainConfig
    index: int
    rows: TrainingSet
    device: torch.device
    backend: str
    drawn: bool = False

    def comparable(self) -> Bench:
        """The same for a step that all must agree on.

        Without dropout, whose masks are each one's own, and turns, which rows of files do not have; all weights show.
        """
        config = dataclasses.replace(
            self.config,
            model=dataclasses.replace(self.config.model, dropout=0.0),
            augment=dataclasses.replace(self.config.augment, rotate=False, flip=False),
        )
        return self._replace(config=config, drawn=True)

    def weights(self) -> Perceiver:
        """The model as training begins with it, on the CPU."""
        model = Perceiver(self.config.model, seed=self.config.seed).train()
        if self.drawn:
            _draw(model)
        return model

    def stage(self) -> Stage:
        """The stage with weights of its own."""
        config, model = self.config, self.weights().to(self.device)
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        return self._stage(FlatAdamW(model, config.optimizer, dtype, config.micro_batches))

    def batches(self) -> Iterator[Batch]:
        """Batch after batch of resident rows, laid out by the host."""
        # Weights that nobody trains would count as memory of whoever takes the batches.
        config, stage = self.config, self._stage(None)
        requests = ((step, rows) for step in itertools.count(stage.begin) for rows in stage.micro_batches(step))
        return self.rows.batches(requests, config.seed, config.augment, stage.settings.points)

    def scenes(self) -> Iterator[int]:
        """Places of the rows of all batches, one after another."""
        stage = self._stage(None)
        for step in itertools.count(stage.begin):
            yield from stage.scenes(step).tolist()

    def _stage(self, optimizer: FlatAdamW | None) -> Stage:
        return Stage(self.config, self.index, self.rows, optimizer, Ranks(self.device))


def _draw(model: Perceiver) -> None:
    """Draws all matrices. In a new model every branch ends in zeros, and the heads hardly show what is before them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                scale = _HEAD_SCALE if "_head." in name else 1.0
                weight.normal_(0.0, scale * weight.shape[1] ** -0.5, generator=generator)


def make_bench(stage: int, device: str, small: bool = False, backend: str = "inductor") -> Bench:
    """Stage ``stage``, from 0, of the published recipe, or with ``small`` of the smoke recipe, on made rows."""
    config = load_config(SMOKE_CONFIG if small else BASE_CONFIG)
    config = dataclasses.replace(config, precision="float32" if small else "bfloat16", micro_batches=1)
    scenes = made_rows(config.stages[stage].points, _SCENES)
    rows = TrainingSet.from_scenes(scenes, config.model.segments, device)
    return Bench(config, stage, rows, torch.device(device), backend)


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
    return _in_spans(ScriptedSteps(stage, _SPAN), stage.begin, _SPAN)


def _one_by_one(bench: Bench) -> Run:
    stage = bench.stage()
    return _in_spans(EagerSteps(stage, bench.batches()), stage.begin, 1)


def _in_spans(steps: Steps, begin: int, span: int) -> Run:
    """Takes steps as training does: what a span has to tell is read while the next one runs."""

    def run(count: int) -> Told:
        nonlocal begin
        end, waiting = begin + count, None
        while begin < end:
            told = steps.start(begin, min(begin + span, end), False)
            begin = min(begin + span, end)
            if waiting:
                waiting.results()
            waiting = told
        last = waiting.results()[-1]
        return Told(last.losses[:, Losses._fields.index("total")], last.grad_norm)

    return run


class _Plain:
    """The model in plain PyTorch with its optimiser; ``step`` takes a batch."""

    def __init__(self, bench: Bench, compiled: bool, fused: bool = False) -> None:
        config, stage = bench.config, bench.config.stages[bench.index]
        plain = PlainPerceiver(config.model).train()
        plain.load_state_dict(bench.weights().state_dict())
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

    def step(self, batch: Batch) -> Told:
        return plain_step(
            self._call, self._optimizer, batch.inputs, batch.target, batch.target_mask, self._config, **self._how
        )


def _plain(bench: Bench, compiled: bool) -> Run:
    plain, batches = _Plain(bench, compiled), bench.batches()

    def run(count: int) -> Told:
        for batch in itertools.islice(batches, count):
            told = plain.step(batch)
        return told

    return run


def _compiled_graph(bench: Bench) -> Run:
    """A compiled step and fused AdamW in one graph, with a batch that lies where the graph reads it."""
    if bench.device.type != "cuda":
        raise RuntimeError("there are no graphs on a CPU")
    plain, batches = _Plain(bench, compiled=True, fused=True), bench.batches()
    static = next(batches)
    weights = {name: tensor.clone() for name, tensor in plain.model.state_dict().items()}
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            plain.step(static)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        told = plain.step(static)
    # Those were steps too, and all begin with the same weights and batch.
    plain.model.load_state_dict(weights)
    batches = itertools.chain([static], batches)

    def run(count: int) -> Told:
        for batch in itertools.islice(batches, count):
            for name, tensor in batch.inputs.items():
                static.inputs[name].copy_(tensor)
            for old, new in zip(static[1:], batch[1:]):
                old.copy_(new)
            graph.replay()
        return told

    return run


class _Files(torch.utils.data.Dataset):
    """Rows as a data set of files gives them: decoded when they are asked for, by the workers of a loader.

    Their places are those of a TrainingSet: by the order of ids.
    """

    def __init__(self, points: int) -> None:
        from wireframe.samples import write_sample

        scenes = sorted(made_rows(points, _SCENES), key=lambda scene: scene.order_id)
        self._rows = [write_sample(scene) for scene in scenes]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        from wireframe.samples import read_sample
        from wireframe.tokens import MODEL_INPUTS

        scene = read_sample(self._rows[index])
        found = {name: torch.from_numpy(getattr(scene, name).copy()) for name in MODEL_INPUTS}
        target = torch.zeros(64, 2, 3)
        target[: len(scene.gt_segments)] = torch.from_numpy(scene.gt_segments)
        return {**found, "target": target, "target_mask": torch.arange(64) < len(scene.gt_segments)}


def _published(bench: Bench) -> Run:
    """Workers may decode between turns too, so where they are the slowest part, turns of few steps flatter it."""
    stage = bench.config.stages[bench.index]
    plain = _Plain(bench, compiled=True)
    pinned = bench.device.type == "cuda"
    # Shuffled as ours are, without an end: workers start anew with every epoch.
    loader = torch.utils.data.DataLoader(
        _Files(stage.points), stage.batch_size, sampler=bench.scenes(), num_workers=8 if pinned else 1,
        pin_memory=pinned,
    )  # fmt: skip
    batches = iter(loader)

    def run(count: int) -> Told:
        for host in itertools.islice(batches, count):
            found = {name: tensor.to(bench.device, non_blocking=True) for name, tensor in host.items()}
            target, mask = found.pop("target"), found.pop("target_mask")
            # A loop as it is published reads its loss.
            told = plain.step(Batch(found, target, mask, mask))
            told.losses.mean().item()
        return told

    return run


# Ours first, then what a goal is held against: whoever stops it early has those.
PROVIDERS = (
    Provider(OURS, _scripted, deterministic=True),
    Provider(FREE, _scripted),
    Provider(f"{OURS}, without a graph", _one_by_one, deterministic=True),
    Provider(GRAPHED, _compiled_graph, slow=True),
    Provider(COMPILED + FIXED, lambda bench: _plain(bench, True), deterministic=True, slow=True),
    Provider(PUBLISHED, _published, slow=True),
    Provider(PLAIN, lambda bench: _plain(bench, False)),
    Provider(COMPILED, lambda bench: _plain(bench, True), slow=True),
    Provider(PLAIN + FIXED, lambda bench: _plain(bench, False), deterministic=True),
)

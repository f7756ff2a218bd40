"""Races of the Perceiver: one scene at inference, and on a CPU forward, loss and backward of a batch.

The rival is the same architecture in plain PyTorch with the same weights, eager and compiled. Weights that a new model
has at zero are drawn, so that every branch counts in what is compared. Without dropout, whose masks would differ. Whole
steps of training on a GPU have a benchmark of their own, ``wireframe bench step``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from wireframe.bench.pipeline import Setup, sampled, setup_of
from wireframe.bench.plain_model import PlainPerceiver, plain_loss
from wireframe.bench.race import BOTH, FORWARD, Bar, How, Race, Rival, Work, require_deterministic_compile
from wireframe.kernels.cpu_products import has_bfloat16_products
from wireframe.kernels.determinism import deterministic
from wireframe.layers import Linear
from wireframe.perceiver import Perceiver, PerceiverConfig
from wireframe.train.config import AugmentConfig, LossConfig
from wireframe.train.data import Batch, TrainingSet
from wireframe.train.loss import scene_losses

_SETS = 3
# What products of 8 bits may do to an output or a gradient.
_HALF_BUDGET = 0.1


def races(how: How) -> Iterator[Race]:
    """Inference; on a CPU with loss and backward too; then growth with points and with scenes."""
    setup, gpu = setup_of(how), how.device == "cuda"
    bars = () if how.small or gpu else (Bar(60.0), Bar(1.0, "torch.compile"))
    yield _forward(setup, how, 1, setup.model.num_points, bars)
    if not gpu:
        scenes, points = setup.training_scenes, setup.training_points
        yield Race(
            "perceiver with loss", BOTH, f"{scenes} x {points}, no dropout", {"batch": scenes, "points": points},
            "float32", functools.partial(_step, setup, how), budget=1e-3, bars=bars[1:],
        )  # fmt: skip
    for points in (1024, 2048, 4096, 8192, 16384) if how.grow else ():
        yield _forward(setup, how, 1, points, compiling=False)
    for batch in (4, 16, 64, 128) if how.grow else ():
        yield _forward(setup, how, batch, setup.training_points, compiling=False)


def _forward(setup: Setup, how: How, batch: int, points: int, bars: tuple = (), compiling: bool = True) -> Race:
    return Race(
        "perceiver", FORWARD, f"{batch} x {points}", {"batch": batch, "points": points}, "float32",
        functools.partial(_inference, setup.model, batch, points, how, compiling), budget=1e-3, host=True,
        cache="cold" if how.device == "cuda" else None, bars=bars,
    )  # fmt: skip


def _inference(config: PerceiverConfig, batch: int, points: int, how: How, compiling: bool) -> Work:
    ours, plain = (model.to(how.device).eval() for model in _models(config))
    inputs = [(random_points(how.device, batch, points, number),) for number in range(_SETS)]

    def call(model: Callable, half: bool = False) -> Callable:
        def run(given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            with torch.inference_mode(), torch.autocast(how.device, torch.bfloat16, enabled=half):
                found = model(given)
            return tuple(found)[:2]

        return run

    return Work(inputs, list(_rivals(ours, plain, call, how, compiling)))


def _rivals(ours: nn.Module, plain: nn.Module, call: Callable, how: How, compiling: bool) -> Iterator[Rival]:
    """call: gives from a model, and whether its products are bfloat16, the function of a set."""

    def compiled_plain() -> Callable:
        return torch.compile(plain, backend=how.backend, dynamic=False)

    def fixed_plain() -> Callable:
        require_deterministic_compile()
        return call(compiled_plain())

    def half_ours() -> Callable:
        return call(_halved(ours))

    fixed = functools.partial(deterministic, how.device)
    yield Rival("eager", lambda: call(plain))
    yield Rival("ours", lambda: call(ours), deterministic=True)
    if not compiling:
        return
    yield Rival("eager, deterministic", lambda: call(plain), deterministic=True, settings=fixed)
    emulated = how.device == "cpu" and not has_bfloat16_products()
    half = {"budget": _HALF_BUDGET, "dtype": "bfloat16"}
    yield Rival(f"ours, bfloat16{', emulated' if emulated else ''}", half_ours, deterministic=True, **half)
    yield Rival("torch.compile", lambda: call(compiled_plain()), slow=True)
    yield Rival("torch.compile, deterministic", fixed_plain, deterministic=True, settings=fixed, slow=True)
    if not emulated:
        yield Rival("torch.compile, bfloat16", lambda: call(compiled_plain(), True), slow=True, **half)


def _halved(model: Perceiver) -> Perceiver:
    """The model with the weights of its large products in bfloat16, all else in float32: as training computes it."""
    twin = Perceiver(model.config).train(model.training)
    twin.load_state_dict(model.state_dict())
    for module in twin.modules():
        if isinstance(module, Linear):
            module.to(torch.bfloat16)
    return twin.to(next(model.parameters()).device)


def _models(config: PerceiverConfig) -> tuple[Perceiver, PlainPerceiver]:
    """Ours and the plain one, with equal weights, none of them zero, and without dropout."""
    config = dataclasses.replace(config, dropout=0.0)
    ours, plain = Perceiver(config), PlainPerceiver(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in ours.parameters():
            if weight.ndim > 1 and not weight.any():
                weight.normal_(0.0, 0.02, generator=generator)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def random_points(device: str, batch: int, points: int, seed: int = 0) -> dict[str, Tensor]:
    """Scenes of points with random labels."""
    g = torch.Generator().manual_seed(seed)
    shape = (batch, points)
    found = {
        "xyz_norm": 0.3 * torch.randn(*shape, 3, generator=g),
        "class_id": torch.randint(0, 13, shape, generator=g).to(torch.uint8),
        "source": torch.randint(0, 2, shape, generator=g).to(torch.uint8),
        "mask": torch.rand(shape, generator=g) < 0.95,
        "behind": torch.randint(-1, 28, shape, generator=g).to(torch.int16),
        "n_views_voted": torch.randint(1, 9, shape, generator=g).to(torch.uint8),
        "vote_frac": torch.rand(shape, generator=g),
    }
    return {name: tensor.to(device) for name, tensor in found.items()}


def _step(setup: Setup, how: How) -> Work:
    ours, plain = (model.train() for model in _models(setup.model))
    samples = [sampled(setup, setup.training_points, seed) for seed in range(setup.training_scenes)]
    data = TrainingSet.from_scenes(samples, max(setup.model.segments, len(samples[0].gt_segments)))
    batch = data.batch(0, 0, np.arange(len(data)), AugmentConfig(rotate=False, flip=False))
    config = LossConfig()

    def call(model: Callable, half: bool = False) -> Callable:
        parameters = list(model.parameters())
        loss_of = plain_loss if model is plain else torch.compile(plain_loss, backend=how.backend, dynamic=False)

        def run(batch: Batch) -> list[Tensor]:
            with torch.autocast(how.device, torch.bfloat16, enabled=half):
                found = model(batch.inputs)
            if isinstance(model, Perceiver):
                losses = scene_losses(found, batch.target, batch.target_mask, config, 0.1).total
            else:
                losses = loss_of(found, batch.target, batch.target_mask, config, 0.1)
            gradients = torch.autograd.grad(losses.mean(), parameters, allow_unused=True)
            # One array: a weight whose gradient is near nothing would have any relative error.
            return [losses.detach(), torch.cat([g.flatten().float() for g in gradients if g is not None])]

        return run

    return Work([(batch,)], list(_rivals(ours, plain, call, how, compiling=True)))

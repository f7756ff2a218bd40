"""Training sets of made rows for the tests: how they are written, loaded and compared."""

import threading

import torch

from wireframe.samples import write_parquet, write_sample
from wireframe.train.config import AugmentConfig, parse_config
from wireframe.train.data import load_training_sets

POINTS = 32
RESAMPLED = AugmentConfig(resample=True)


def settings(**changes):
    stage = {"name": "a", "points": POINTS, "steps": 4, "batch_size": 3, "lr": 1e-3}
    return parse_config({"stages": [stage], **changes})


def write(path, scenes):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet([write_sample(scene) for scene in scenes], path)


def write_two(folder, scenes):
    """The scenes in two shards of a folder, which it gives back."""
    write(folder / "a.parquet", scenes[:7])
    write(folder / "b.parquet", scenes[7:])
    return folder


def load(*sources, config=None, **how):
    """The sets, and the lines that were said."""
    said = []
    return load_training_sets(sources, config or settings(), say=said.append, **how), said


def load_one(source, config=None, **how):
    (found,) = load(source, config=config, **how)[0].values()
    return found


def assert_same(a, b):
    assert a.inputs.keys() == b.inputs.keys()
    pairs = [(a.inputs[name], b.inputs[name]) for name in a.inputs]
    for x, y in [*pairs, *zip(a[1:], b[1:])]:
        assert x.dtype == y.dtype and torch.equal(x.cpu(), y.cpu())


def rows_of(batch, index):
    """The scenes ``index`` of a batch."""
    inputs = {name: tensor[index] for name, tensor in batch.inputs.items()}
    return type(batch)(inputs, *(tensor[index] for tensor in batch[1:]))


def requests_of(training, size, steps, stage=0):
    return [(step, training.order(353, stage, step * size, size)) for step in range(steps)]


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("wireframe-rows")]

"""A small run to save and load, and a program that saves while it is killed or its disk is full.

``python -m checkpoint_cases killed FOLDER`` and ``... full FOLDER`` exit with 0 where every promise held.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from wireframe.errors import CheckpointError
from wireframe.perceiver import Perceiver
from wireframe.train import checkpoint_files, checkpoints
from wireframe.train.checkpoint_files import FILES, SUMS
from wireframe.train.config import OptimizerConfig, parse_config
from wireframe.train.optimizer import FlatAdamW

SMALL_MODEL = {
    "hidden": 16, "ff": 24, "latent_tokens": 4, "latent_layers": 2, "decoder_layers": 1, "num_heads": 2,
    "kv_heads_cross": 1, "kv_heads_self": 1, "segments": 4,
}  # fmt: skip
STAGES = (
    {"name": "a", "points": 32, "steps": 4, "batch_size": 2, "lr": 1e-3},
    {"name": "b", "points": 64, "steps": 6, "batch_size": 2, "lr": 1e-3},
)
DATA = {"32": "ab" * 32, "64": "cd" * 32}


def settings(**changes):
    return parse_config({"model": SMALL_MODEL, "stages": list(STAGES), "keep_checkpoints": 3, **changes})


def small_run(seed=0, device="cpu", dtype=torch.float32, **changes):
    """A model whose weights are all its own, and its optimiser."""
    model = Perceiver({**SMALL_MODEL, **changes}, seed=seed).train().to(device)
    return FlatAdamW(model, OptimizerConfig(grad_clip=1e9), dtype)


def advance(optimizer, step):
    """A step with made-up gradients that are a function of ``step``."""
    g = torch.Generator().manual_seed(step)
    parameters = optimizer.parameters()
    optimizer.collect(0, [torch.randn(p.shape, generator=g).to(p) for p in parameters])
    device = optimizer.master.device
    optimizer.step(optimizer.gradients[0], torch.tensor(1e-3, device=device), torch.tensor(True, device=device))


def save(out, step, optimizer, config=None):
    config = config or settings()
    return checkpoints.save(out, checkpoints.State(step, 0, None), optimizer, config, DATA)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_state(a, b):
    """Whether the models and optimisers a and b have the same bits."""
    pairs = [(a.model.state_dict(), b.model.state_dict()), (a.state(), b.state())]
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)


def resealed(folder):
    """The manifest made to agree with what is there."""
    lines = (f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in FILES)
    (folder / SUMS).write_text("".join(lines))
    return folder


def refused(call, word):
    with pytest.raises(CheckpointError, match=word) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and text.isprintable() and len(text) < 1000
    return text


@contextlib.contextmanager
def file_size_limit(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def killed(out: Path) -> None:
    """Saves that die at each of their acts on the disk, one after the other, then at random moments."""
    # A thread pool does not survive a fork.
    torch.set_num_threads(1)
    optimizer = small_run()
    advance(optimizer, 0)
    save(out, 1, optimizer, _config())
    strays = 0
    # The third one drops the first.
    for step in (2, 6, 9):
        act = 1
        while _dies(lambda step=step, act=act: _die_at(act, lambda: save(out, step, optimizer, _config()))):
            strays += _check(out)
            act += 1
        assert act > 12, f"a save did {act} things to the disk"
    random.seed(7)
    for _ in range(20):
        _dies(lambda: _save_on_and_on(out, optimizer), 0.002 + 0.05 * random.random())
        strays += _check(out)
    assert strays > 40, f"only {strays} saves were caught in the act"
    save(out, 10**6, optimizer, _config())
    assert not _hidden(out), _hidden(out)
    assert len(os.listdir(out / "checkpoints")) == 2


def _config():
    return settings(stages=[{**STAGES[0], "steps": 100}], keep_checkpoints=2)


def _hidden(out):
    return [name for name in os.listdir(out / "checkpoints") if not name.startswith("step-")]


def _check(out) -> int:
    """A checkpoint is there, without a word of warning, and loads; how many folders a kill has left."""
    said = []
    found = checkpoints.latest(out, said.append)
    assert found is not None and not said, said
    checkpoints.load(found, small_run(1), _config(), DATA, said.append)
    assert not said, said
    # Older ones too are whole or out of sight.
    for folder in (out / "checkpoints").glob("step-*"):
        checkpoint_files.check_files(folder)
    return len(_hidden(out))


def _dies(work, after: float | None = None) -> bool:
    """Runs ``work`` in a child that is killed after so many seconds; whether it did not end by itself."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as problem:
            print(f"the child failed: {problem!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert not (os.WIFEXITED(status) and os.WEXITSTATUS(status)), "the child failed"
    return os.WIFSIGNALED(status)


def _save_on_and_on(out, optimizer):
    step = checkpoint_files.check_files(checkpoints.latest(out))["step"]
    while True:
        step += 1
        save(out, step, optimizer, _config())


def _die_at(act: int, work) -> None:
    """Kills this process just before the ``act``-th thing that ``work`` does to the disk; writes count half way."""
    left = act

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    def half_written(path, data):
        Path(path).write_bytes(data[: len(data) // 2])
        counted(lambda: None)()
        write(path, data)

    write = checkpoint_files.write_synced
    checkpoint_files.write_synced = half_written
    for module, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "unlink"), (os, "rmdir")):
        setattr(module, name, counted(getattr(module, name)))
    work()


def full(out: Path) -> None:
    """Saves on a small disk, with less and less room."""
    optimizer = small_run()
    for step in (1, 2):
        advance(optimizer, step)
        save(out, step, optimizer)
    before = {path.name: contents(path) for path in (out / "checkpoints").iterdir()}
    filler = out / "filler"
    room = shutil.disk_usage(out).free
    needed = sum(map(len, before["step-00000002"].values()))
    assert needed < room, "the disk is too small for the test"
    said = []
    for share in range(10):
        filler.write_bytes(b"x" * (room - needed * share // 10))
        try:
            save(out, 3, optimizer)
        except CheckpointError as problem:
            said.append(str(problem))
        assert {path.name: contents(path) for path in (out / "checkpoints").iterdir()} == before
        filler.unlink()
    assert len(said) == 10 and all("No space left" in line and "\n" not in line for line in said), said
    save(out, 3, optimizer)
    assert checkpoints.latest(out).name == "step-00000003"
    print(said[0])


def three_checkpoints(out):
    """A run with the checkpoints of steps 1, 2 and 3."""
    optimizer = small_run()
    for step in (1, 2, 3):
        advance(optimizer, step)
        save(out, step, optimizer)
    return out


if __name__ == "__main__":
    {"killed": killed, "full": full}[sys.argv[1]](Path(sys.argv[2]))

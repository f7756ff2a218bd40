"""A loop that starts a span before it has read the one before, as on a GPU, does what one that reads each step does."""

import contextlib
import json
import os
import signal

import pytest
import torch

from wireframe.train import checkpoints, loop
from wireframe.train.config import parse_config
from wireframe.train.made_rows import MadeRows
from wireframe.train.steps import ScriptedSteps
from wireframe.train.stopping import GaveUp, Stopped

MODEL = {
    "hidden": 32, "ff": 32, "latent_tokens": 8, "latent_layers": 1, "decoder_layers": 1, "num_heads": 2,
    "kv_heads_cross": 1, "kv_heads_self": 1, "segments": 24,
}  # fmt: skip
# Ends of stages, lines of the log and checkpoints lie at steps that no length of a span divides.
STAGES = [
    {"name": "a", "points": 64, "steps": 11, "batch_size": 4, "lr": 1e-3},
    {"name": "b", "points": 64, "steps": 9, "batch_size": 4, "lr": 1e-3, "endpoint_weight": 0.1},
]
END = 20


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ahead(monkeypatch):
    """Spans of up to four steps, each started before the last one is read; the list of those started."""
    begun = []

    class Recorded(ScriptedSteps):
        def start(self, begin, end, stop):
            begun.append((begin, end))
            return super().start(begin, end, stop)

    @contextlib.contextmanager
    def steps_of(stage, first, last):
        steps = Recorded(stage, 4)
        steps.ahead = True
        yield steps

    monkeypatch.setattr(loop, "steps_of", steps_of)
    return begun


def run(out, **options):
    changes = options.pop("changes", {})
    config = parse_config({"model": MODEL, "stages": STAGES, "log_every": 4, "save_every": 6, "dev_val": 0, **changes})
    loop.train(config, [MadeRows(64, 7)], out, device="cpu", evaluate=False, progress=False, **options)


def left(out):
    """Hashes of the last checkpoint, names of all, and the log without its clock."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    log = [{key: value for key, value in line.items() if key != "seconds_per_step"} for line in lines]
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    return checkpoints.tensor_hashes(checkpoints.latest(out, print)), names, log


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    out = tmp_path_factory.mktemp("plain")
    run(out)
    return left(out)


def test_weights_log_and_checkpoints_are_those_of_single_steps(plain, tmp_path, ahead):
    run(tmp_path)
    assert left(tmp_path) == plain
    # Cut where a line of the log or a checkpoint is due, and at the end of a stage.
    assert ahead == [(0, 4), (4, 6), (6, 8), (8, 11), (11, 12), (12, 16), (16, 18), (18, 20)]


@pytest.mark.parametrize("stops", [(5, 13), (1, 11), (END - 1,)])
def test_stopped_at_any_step_and_resumed_is_uninterrupted(plain, tmp_path, ahead, stops):
    for stop in stops:
        run(tmp_path, stop_after=stop)
        assert checkpoints.latest(tmp_path, print).name == f"step-{stop:08d}"
    run(tmp_path)
    assert left(tmp_path)[0] == plain[0]


def test_a_signal_while_a_span_is_under_way_loses_nothing(plain, tmp_path, ahead, monkeypatch):
    start = ScriptedSteps.start

    def signalled(self, begin, end, stop):
        if begin == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return start(self, begin, end, stop)

    with monkeypatch.context() as patch:
        patch.setattr(ScriptedSteps, "start", signalled)
        with pytest.raises(Stopped, match="step 6"):
            run(tmp_path)
    # What was started is finished, read and saved; nothing more is begun.
    assert ahead == [(0, 4), (4, 6)]
    run(tmp_path)
    assert left(tmp_path)[0] == plain[0]


def test_too_many_bad_steps_in_the_middle_of_a_span_end_the_run_and_are_named(tmp_path, ahead):
    # The first update throws the weights to where no loss is finite.
    wild = [{**stage, "lr": 1e30} for stage in STAGES]
    with pytest.raises(GaveUp):
        run(tmp_path, changes={"stages": wild, "max_bad_steps": 3})
    named = [entry["step"] for entry in json.loads((tmp_path / "bad-steps.json").read_text())]
    assert named == [1, 2, 3, 4] and ahead == [(0, 4), (4, 6)]



"""Steps read from a script on the device, in one graph on a GPU, are those taken one by one."""

import numpy as np
import pytest
import torch

from batches import randomise
from wireframe.kernels.determinism import deterministic
from wireframe.perceiver import Perceiver
from wireframe.train.config import parse_config
from wireframe.train.data import TrainingSet
from wireframe.train.made_rows import made_rows
from wireframe.train.optimizer import FlatAdamW
from wireframe.train.ranks import Ranks
from wireframe.train.steps import EagerSteps, ScriptedSteps, Stage, steps_of

MODEL = {
    "hidden": 64, "ff": 48, "latent_tokens": 8, "latent_layers": 2, "decoder_layers": 1, "num_heads": 2,
    "kv_heads_cross": 1, "kv_heads_self": 1, "segments": 24,
}  # fmt: skip
# Two stages, so that global steps and steps of the stage differ.
BEGIN, STEPS = 3, 9


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    with deterministic(request.param):
        yield torch.device(request.param)


def settings(**changes):
    stages = [
        {"name": "a", "points": 64, "steps": BEGIN, "batch_size": 4, "lr": 1e-3},
        {
            "name": "b", "points": 32, "steps": STEPS, "batch_size": 4, "lr": 1e-3, "warmup": 3, "cooldown": 4,
            "endpoint_weight": 0.1, "conf_target": "rank",
        },
    ]
    augment = {"resample": True}
    return parse_config({"model": MODEL, "stages": stages, "augment": augment, "log_every": 4, **changes})


def stage_of(device, scenes=None, dtype=torch.float32, **changes):
    config = settings(**changes)
    model = Perceiver(config.model).train()
    randomise(model)
    optimizer = FlatAdamW(model.to(device), config.optimizer, dtype, config.micro_batches)
    rows = TrainingSet.from_scenes(scenes or made_rows(64, 7), config.model.segments, device)
    return Stage(config, 1, rows, optimizer, Ranks(device))


def eager(stage):
    """All steps one by one, as from rows on disk."""
    requests = ((step, rows) for step in range(BEGIN, BEGIN + STEPS) for rows in stage.micro_batches(step))
    batches = stage.rows.batches(requests, stage.config.seed, stage.config.augment, stage.settings.points)
    steps = EagerSteps(stage, batches)
    return [r for at in range(BEGIN, BEGIN + STEPS) for r in steps.start(at, at + 1, False).results()]


def scripted(stage, longest):
    """All steps in spans, each started before the one before it is read."""
    steps, told = ScriptedSteps(stage, longest), []
    for begin in range(BEGIN, BEGIN + STEPS, longest):
        told.append(steps.start(begin, min(begin + longest, BEGIN + STEPS), False))
    return [result for span in told for result in span.results()]


def assert_same(a, b, results):
    for name, tensor in a.optimizer.state().items():
        assert torch.equal(tensor, b.optimizer.state()[name]), name
    assert torch.equal(a.optimizer.master, b.optimizer.master)
    for x, y in zip(*results, strict=True):
        assert torch.equal(x.losses, y.losses) and x[1:] == y[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"micro_batches": 2}, {"augment": {"rotate": False, "flip": False}}])
def test_a_script_gives_the_bits_of_steps_one_by_one(device, dtype, changes):
    changes = {**changes, "augment": {"resample": True, **changes.get("augment", {})}}
    one, other = (stage_of(device, dtype=dtype, **changes) for _ in range(2))
    before = one.optimizer.master.clone()
    assert_same(one, other, [eager(one), scripted(other, 4)])
    assert not torch.equal(one.optimizer.master, before) and one.optimizer.count == STEPS


@pytest.mark.parametrize("longest", [1, 2, STEPS])
def test_how_many_steps_are_started_at_once_does_not_matter(device, longest):
    one, other = (stage_of(device) for _ in range(2))
    assert_same(one, other, [scripted(one, 4), scripted(other, longest)])


def test_to_prepare_steps_advances_nothing(device):
    stage = stage_of(device)
    optimizer = stage.optimizer
    before = {name: tensor.clone() for name, tensor in (*optimizer.state().items(), ("weights", optimizer.master))}
    steps = ScriptedSteps(stage, 2)
    # On a GPU the graph has been warmed up and captured; here the step is taken as it would be there.
    steps._armed.zero_()
    steps.start(BEGIN, BEGIN + 1, False)
    for name, tensor in (*optimizer.state().items(), ("weights", optimizer.master)):
        assert torch.equal(tensor, before[name]), name
    # Armed, the same step changes all of it.
    steps._armed.fill_(True)
    steps.start(BEGIN, BEGIN + 1, False)
    assert optimizer.count == 1 and not torch.equal(optimizer.master, before["weights"])


def test_a_step_that_is_not_finite_is_skipped_on_the_device_and_told(device):
    scenes = made_rows(64, 7)
    # One of seven scenes: some batches of four have it.
    scenes[2].xyz_norm[:] = np.nan
    one, other = (stage_of(device, scenes) for _ in range(2))
    found = scripted(one, STEPS)
    applied = [result.applied for result in found]
    bad = one.rows.order_ids.index(scenes[2].order_id)
    assert applied == [bad not in one.scenes(step) for step in range(BEGIN, BEGIN + STEPS)]
    assert 0 < sum(applied) < STEPS and one.optimizer.count == sum(applied)
    assert one.optimizer.master.isfinite().all() and one.optimizer.exp_avg_sq.isfinite().all()
    assert [result.applied for result in eager(other)] == applied
    assert torch.equal(one.optimizer.master, other.optimizer.master)


def test_what_was_told_is_not_overwritten_by_later_steps(device):
    stage = stage_of(device)
    steps = ScriptedSteps(stage, 2)
    first = steps.start(BEGIN, BEGIN + 2, False)
    steps.start(BEGIN + 2, BEGIN + 4, False)
    late = [result.losses for result in first.results()]
    again = stage_of(device)
    now = [result.losses for result in ScriptedSteps(again, 2).start(BEGIN, BEGIN + 2, False).results()]
    assert all(torch.equal(a, b) for a, b in zip(late, now))


def test_rows_on_the_device_are_scripted_and_others_come_batch_by_batch(device):
    stage = stage_of(device)
    with steps_of(stage, BEGIN, BEGIN + 1) as steps:
        assert isinstance(steps, ScriptedSteps)
        assert (steps.longest, steps.ahead) == ((4, True) if device.type == "cuda" else (1, False))
    with steps_of(stage._replace(ranks=Ranks(device, 0, 2)), BEGIN, BEGIN + 1) as steps:
        assert isinstance(steps, EagerSteps) and not steps.ahead


@pytest.mark.gpu
def test_a_model_beyond_the_kernels_is_captured_too():
    """Heads of 16 are the reference's."""
    with deterministic("cuda"):
        one, other = (stage_of(torch.device("cuda"), model={**MODEL, "num_heads": 4}) for _ in range(2))
        assert_same(one, other, [eager(one), scripted(other, 4)])


@pytest.mark.gpu
def test_steps_one_by_one_wait_for_nothing_either():
    with deterministic("cuda"):
        stage = stage_of(torch.device("cuda"))
        requests = ((step, rows) for step in range(BEGIN, BEGIN + 4) for rows in stage.micro_batches(step))
        batches = stage.rows.batches(requests, stage.config.seed, stage.config.augment, stage.settings.points)
        steps = EagerSteps(stage, batches)
        steps.start(BEGIN, BEGIN + 2, False).results()
        torch.cuda.set_sync_debug_mode("error")
        try:
            told = steps.start(BEGIN + 2, BEGIN + 4, False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(result.applied for result in told.results())


@pytest.mark.gpu
def test_a_graph_waits_for_nothing():
    """Replays queue up behind a device that is busy: the host comes back at once."""
    import time

    with deterministic("cuda"):
        steps = ScriptedSteps(stage_of(torch.device("cuda")), 4)
        steps.start(BEGIN, BEGIN + 4, False).results()
        torch.cuda._sleep(2_000_000_000)
        begin = time.perf_counter()
        told = steps.start(BEGIN + 4, BEGIN + 8, False)
        queued = time.perf_counter() - begin
        told.results()
        assert queued < 0.5 * (time.perf_counter() - begin)

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scenes import random_scene
from wireframe.errors import CheckpointError, ConfigError
from wireframe.files import sole_process
from wireframe.fusion import fuse_views
from wireframe.perceiver import Perceiver
from wireframe.samples import write_parquet, write_sample
from wireframe.sampling import sample_points
from wireframe.train import checkpoints
from wireframe.train import steps as steps_module
from wireframe.train.config import parse_config
from wireframe.train.data import load_training_sets
from wireframe.train.loop import train
from wireframe.train.ranks import Ranks, tree_sum
from wireframe.train.stopping import GaveUp

SMALL_MODEL = {
    "hidden": 32, "ff": 48, "latent_tokens": 8, "latent_layers": 2, "decoder_layers": 1, "num_heads": 2,
    "kv_heads_cross": 1, "kv_heads_self": 1, "segments": 8,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These models are too small for two: beside other work threads that wait for each other take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(**changes):
    stages = [
        {"name": "a", "points": 32, "steps": 4, "batch_size": 3, "lr": 1e-3, "warmup": 2},
        {"name": "b", "points": 64, "steps": 4, "batch_size": 2, "lr": 1e-3, "cooldown": 2, "endpoint_weight": 0.1},
    ]
    return parse_config({"model": SMALL_MODEL, "stages": stages, "save_every": 3, "log_every": 1, **changes})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    paths = []
    for points in (32, 64):
        (folder / str(points)).mkdir()
        rows = [write_sample(sample_points(fuse_views(random_scene(i), 50), points)) for i in range(5)]
        write_parquet(rows[:3], folder / str(points) / "a.parquet")
        write_parquet(rows[3:], folder / str(points) / "b.parquet")
        paths.append(folder / str(points))
    return paths


def weights(model_folder):
    return load_file(model_folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return train(settings(), data, out, progress=False)


def test_training_twice_gives_the_same_bits(data, finished, tmp_path):
    torch.rand(17)
    assert same(weights(train(settings(), data, tmp_path, progress=False)), weights(finished))


def test_dropout_and_augmentation_change_the_bits_when_their_seed_changes(data, finished, tmp_path):
    assert not same(weights(train(settings(seed=354), data, tmp_path, progress=False)), weights(finished))


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_stopped_and_resumed_equals_uninterrupted(data, finished, tmp_path, stop):
    train(settings(), data, tmp_path, progress=False, stop_after=stop)
    assert same(weights(train(settings(), data, tmp_path, progress=False)), weights(finished))
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 9))
    assert [line["step"] for line in lines(tmp_path, "resumed")] == [stop]


def test_logging_and_saving_less_often_does_not_change_the_bits(data, finished, tmp_path):
    other = settings(save_every=100, log_every=100)
    assert same(weights(train(other, data, tmp_path, progress=False)), weights(finished))


def test_a_corrupt_checkpoint_is_reported_and_passed_over(data, finished, tmp_path):
    train(settings(), data, tmp_path, progress=False, stop_after=6)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    path = newest / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    said = []
    assert checkpoints.latest(tmp_path, said.append).name == "step-00000004"
    assert "corrupt" in said[0]
    assert same(weights(train(settings(), data, tmp_path, progress=False)), weights(finished))


def test_what_is_missing_at_the_end_is_made_by_the_same_command(data, finished, tmp_path):
    train(settings(), data, tmp_path, progress=False)
    before = checkpoints.tensor_hashes(tmp_path / "model")
    for gone in ("model", "stages/2-b"):
        shutil.rmtree(tmp_path / gone)
    train(settings(), data, tmp_path, progress=False)
    assert checkpoints.tensor_hashes(tmp_path / "model") == before
    assert (tmp_path / "stages" / "2-b" / "checkpoint.pt").exists()


def test_a_run_whose_checkpoints_are_all_broken_does_not_begin_anew_in_silence(data, tmp_path):
    train(settings(), data, tmp_path, progress=False, stop_after=3)
    for state in tmp_path.glob("checkpoints/*/state.json"):
        state.write_text("{")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole; move them away"):
        train(settings(), data, tmp_path, progress=False)


def test_another_configuration_does_not_resume(data, finished):
    with pytest.raises(CheckpointError, match="another configuration"):
        train(settings(seed=1), data, finished.parent, progress=False)


def test_other_data_does_not_resume(data, finished, tmp_path):
    rows = [write_sample(sample_points(fuse_views(random_scene(i), 50), 32)) for i in range(5, 9)]
    write_parquet(rows, tmp_path / "other.parquet")
    with pytest.raises(CheckpointError, match="other data"):
        train(settings(), [tmp_path / "other.parquet", data[1]], finished.parent, progress=False)


def test_another_thread_count_is_reported(data, tmp_path, capsys):
    train(settings(), data, tmp_path, progress=False, stop_after=3)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        train(settings(), data, tmp_path, progress=False, stop_after=4)
    finally:
        torch.set_num_threads(before)
    assert "the bits will differ" in capsys.readouterr().err


def test_training_gives_the_callers_random_state_back(data, tmp_path):
    before = torch.get_rng_state()
    train(settings(), data, tmp_path, progress=False, stop_after=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_two_sets_of_one_size_are_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="two --data have rows of 32 points"):
        train(settings(), [data[0], data[0], data[1]], tmp_path, progress=False)


def test_training_lowers_the_loss(data, tmp_path):
    stage = {"name": "a", "points": 64, "steps": 60, "batch_size": 5, "lr": 3e-3}
    config = settings(stages=[stage], log_every=1, augment={"rotate": False, "flip": False})
    train(config, data, tmp_path, progress=False)
    losses = [line["match"] for line in lines(tmp_path)]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])


def test_a_stage_without_rows_of_its_size_is_named(data, tmp_path):
    with pytest.raises(ConfigError, match="stage b wants rows of 64 points"):
        train(settings(), data[:1], tmp_path, progress=False)


def lines(out, event=None):
    found = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in found if line.get("event") == event]


def test_steps_that_are_not_finite_are_skipped_counted_and_then_given_up(data, tmp_path):
    stage = {"name": "a", "points": 32, "steps": 50, "batch_size": 5, "lr": 1e30}
    config = settings(stages=[stage], max_bad_steps=3)
    with pytest.raises(GaveUp, match=r"4 steps in a row .* not finite; .*bad-steps\.json") as problem:
        train(config, data, tmp_path, progress=False)
    assert problem.value.exit_status == 5 and "\n" not in str(problem.value)
    dumped = json.loads((tmp_path / "bad-steps.json").read_text())
    ids = set(load_training_sets(data[:1], config)[32].order_ids)
    assert len(dumped) == 4 and all(set(step["scenes"]) == ids and len(step["losses"]) == 5 for step in dumped)
    assert [line["bad_steps"] for line in lines(tmp_path)][-4:] == [1, 2, 3, 4]


def bad_batches(monkeypatch, steps):
    """From now on the losses of these steps are NaN."""
    real = steps_module.train_step

    def train_step(optimizer, batches, config, stage, step, *arguments, **more):
        if int(step) in steps:
            for batch in batches:
                batch.inputs["xyz_norm"][0, 0] = torch.nan
        return real(optimizer, batches, config, stage, step, *arguments, **more)

    monkeypatch.setattr(steps_module, "train_step", train_step)


def test_a_single_bad_step_changes_nothing_and_the_next_one_goes_on(data, finished, tmp_path, monkeypatch):
    bad_batches(monkeypatch, {2, 5})
    train(settings(), data, tmp_path, progress=False, stop_after=2)
    before = checkpoints.tensor_hashes(checkpoints.latest(tmp_path))
    train(settings(), data, tmp_path, progress=False, stop_after=3)
    assert checkpoints.tensor_hashes(checkpoints.latest(tmp_path)) == before
    model = train(settings(), data, tmp_path, progress=False)
    assert all(tensor.isfinite().all() for tensor in weights(model).values())
    assert [line["step"] for line in lines(tmp_path, "bad step")] == [3, 6]
    # Stopped between them or not, it comes to the same.
    assert same(weights(train(settings(), data, tmp_path / "whole", progress=False)), weights(model))
    assert not same(weights(model), weights(finished))


def test_the_count_of_bad_steps_survives_a_restart(data, tmp_path, monkeypatch):
    bad_batches(monkeypatch, range(2, 8))
    config = settings(max_bad_steps=3)
    train(config, data, tmp_path, progress=False, stop_after=4)
    with pytest.raises(GaveUp, match="4 steps in a row up to step 6"):
        train(config, data, tmp_path, progress=False)
    # The losses before the restart are gone; whose they were is not.
    dumped = json.loads((tmp_path / "bad-steps.json").read_text())
    assert [(step["step"], step["stage"]) for step in dumped] == [(2, "a"), (3, "a"), (4, "b"), (5, "b")]
    assert [len(step["scenes"]) for step in dumped] == [3, 3, 2, 2]
    assert ["losses" in step for step in dumped] == [False, False, True, True]


def test_stages_one_by_one_equal_all_at_once(data, finished, tmp_path):
    first = train(settings(), data, tmp_path / "one", progress=False, stages=(0, 0))
    assert first == tmp_path / "one" / "model"
    start = checkpoints.latest(tmp_path / "one")
    second = train(settings(), data, tmp_path / "two", progress=False, stages=(1, 1), init=start)
    assert same(weights(second), weights(finished))
    # Or in the same folder.
    assert same(weights(train(settings(), data, tmp_path / "one", progress=False, stages=(1, 1))), weights(finished))


def test_a_later_stage_starts_from_weights_alone_too(data, finished, tmp_path):
    published = finished.parent / "stages" / "1-a" / "checkpoint.pt"
    a, b = (
        train(settings(), data, tmp_path / str(i), progress=False, stages=(1, 1), init=source)
        for i, source in enumerate((published, published.parent))
    )
    assert same(weights(a), weights(b)) and not same(weights(a), weights(finished))
    with pytest.raises(CheckpointError, match="did not begin with --init"):
        train(settings(), data, tmp_path / "0", progress=False, stages=(1, 1), init=finished)


def test_stopping_before_the_first_step_is_refused(data, finished, tmp_path):
    start = finished.parent / "stages" / "1-a"
    with pytest.raises(ConfigError, match="--stop-after 3 lies before stage 2, which begins at step 4"):
        train(settings(), data, tmp_path, progress=False, stages=(1, 1), init=start, stop_after=3)


def test_a_stage_without_the_one_before_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match=r"stage 2 goes on from a checkpoint.*--init"):
        train(settings(), data, tmp_path, progress=False, stages=(1, 1))
    train(settings(), data, tmp_path, progress=False, stop_after=3)
    with pytest.raises(ConfigError, match="stands at step 3, before stage 2 at 4"):
        train(settings(), data, tmp_path, progress=False, stages=(1, 1))


def test_every_stage_leaves_a_model_in_both_formats(data, finished):
    run = finished.parent
    assert sorted(folder.name for folder in (run / "stages").iterdir()) == ["1-a", "2-b"]
    ours, published = run / "stages" / "2-b", run / "stages" / "2-b" / "checkpoint.pt"
    states = [Perceiver.from_checkpoint(source).state_dict() for source in (finished, ours, published)]
    assert same(states[0], states[1]) and same(states[0], states[2])
    assert (run / "report.html").exists()


def test_micro_batches_change_the_rounding_but_not_the_gradient(data, tmp_path):
    stage = {"name": "a", "points": 32, "steps": 1, "batch_size": 4, "lr": 1e-3}
    runs = []
    for parts in (1, 2, 4):
        config = settings(stages=[stage], micro_batches=parts)
        train(config, data, tmp_path / str(parts), progress=False)
        runs.append(lines(tmp_path / str(parts))[0])
    for term in ("total", "match", "conf", "grad_norm"):
        values = [run[term] for run in runs]
        assert values == pytest.approx([values[0]] * 3, rel=1e-5) and values[0] > 0


def test_a_sum_is_a_tree_over_neighbours():
    parts = torch.tensor([1e8, 1.0, -1e8, 1.0, 0.5])
    a, b, c, d, e = parts
    assert torch.equal(tree_sum(parts), ((a + b) + (c + d)) + e)
    assert torch.equal(tree_sum(parts[:1]), a)


def test_ranks_share_micro_batches_equally_or_say_so():
    assert [list(Ranks(torch.device("cpu"), rank, 2).share(4)) for rank in (0, 1)] == [[0, 1], [2, 3]]
    with pytest.raises(ConfigError, match="micro_batches 3 cannot be shared by 2 ranks"):
        Ranks(torch.device("cpu"), 0, 2).share(3)


def test_points_are_drawn_anew_from_larger_rows(data, tmp_path):
    stage = {"name": "a", "points": 32, "steps": 3, "batch_size": 2, "lr": 1e-3}
    with pytest.raises(ConfigError, match=r"augment\.resample=true would draw them"):
        train(settings(stages=[stage]), data[1:], tmp_path, progress=False)
    config = settings(stages=[stage], augment={"resample": True})
    a, b = (train(config, data[1:], tmp_path / name, progress=False) for name in "ab")
    assert same(weights(a), weights(b))


def test_a_cooldown_longer_than_its_stage_is_said(data, tmp_path, capsys):
    changes = {"stages": [{"name": "a", "points": 32, "steps": 2, "batch_size": 3, "lr": 1e-3, "cooldown": 9}]}
    train(settings(**changes), data, tmp_path, progress=False)
    assert "cooldown of 9 steps for 2" in capsys.readouterr().err


def test_excluded_scenes_are_not_trained_on(data, finished, tmp_path):
    scene = load_training_sets(data[:1], settings())[32].order_ids[0]
    model = train(settings(), data, tmp_path, progress=False, exclude=frozenset([scene]))
    assert not same(weights(model), weights(finished))
    with pytest.raises(CheckpointError, match="other data"):
        train(settings(), data, tmp_path, progress=False)


def test_a_second_process_in_the_same_folder_is_refused(data, tmp_path):
    with sole_process(tmp_path / ".lock", "tests"), pytest.raises(ConfigError, match=r"another process trains into .*"):
        train(settings(), data, tmp_path, progress=False)
    train(settings(), data, tmp_path, progress=False, stop_after=1)


def test_no_cuda_device_is_one_line(data, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        train(settings(), data, tmp_path, progress=False, device="cuda")


def test_the_trained_model_loads_and_predicts(finished, data):
    model = Perceiver.from_pretrained(finished)
    rows = load_training_sets(data[:1], settings())[32]
    with torch.no_grad():
        assert torch.isfinite(model(rows.batch(0, 0, np.arange(2), settings().augment).inputs).segments).all()

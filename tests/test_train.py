import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scenes import random_scene
from wireframe.errors import CheckpointError, ConfigError, SampleError, WireframeError
from wireframe.fusion import fuse_views
from wireframe.perceiver import Perceiver, PerceiverConfig
from wireframe.samples import write_parquet, write_sample
from wireframe.sampling import sample_points
from wireframe.train import checkpoints
from wireframe.train.config import BASE_CONFIG, AugmentConfig, StageConfig, load_config, parse_config
from wireframe.train.data import TrainingSet, load_training_set
from wireframe.train.loop import train
from wireframe.train.loss import confidence_target, endpoint_loss, match_loss

SMALL_MODEL = {
    "hidden": 32, "ff": 48, "latent_tokens": 8, "latent_layers": 2, "decoder_layers": 1, "num_heads": 2,
    "kv_heads_cross": 1, "kv_heads_self": 1, "segments": 8,
}  # fmt: skip


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
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


def test_logging_and_saving_less_often_does_not_change_the_bits(data, finished, tmp_path):
    other = settings(save_every=100, log_every=100)
    assert same(weights(train(other, data, tmp_path, progress=False)), weights(finished))


def test_the_order_of_files_and_rows_does_not_matter(data, finished, tmp_path):
    sets = [load_training_set(path, 8) for path in data]
    assert sets[0].order_ids == sorted(sets[0].order_ids)
    rows = [write_sample(sample_points(fuse_views(random_scene(i), 50), 32)) for i in (4, 1, 0, 3, 2)]
    write_parquet(rows, tmp_path / "z.parquet")
    again = load_training_set(tmp_path, 8)
    assert all(torch.equal(again.inputs[name], tensor) for name, tensor in sets[0].inputs.items())


def test_a_corrupt_checkpoint_is_reported_and_passed_over(data, finished, tmp_path):
    train(settings(), data, tmp_path, progress=False, stop_after=6)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    path = newest / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    said = []
    assert checkpoints.latest(tmp_path, said.append).name == "step-00000003"
    assert "corrupt" in said[0]
    assert same(weights(train(settings(), data, tmp_path, progress=False)), weights(finished))


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
    losses = [json.loads(line)["match"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])


def test_a_stage_without_rows_of_its_size_is_named(data, tmp_path):
    with pytest.raises(ConfigError, match="stage b wants rows of 64 points"):
        train(settings(), data[:1], tmp_path, progress=False)


def test_a_loss_that_is_not_finite_stops_with_one_line(data, tmp_path):
    stage = {"name": "a", "points": 32, "steps": 50, "batch_size": 5, "lr": 1e30}
    with pytest.raises(WireframeError, match="not finite"):
        train(settings(stages=[stage]), data, tmp_path, progress=False)


def test_rows_of_different_sizes_are_refused():
    scenes = [sample_points(fuse_views(random_scene(i), 50), 16 * (i + 1)) for i in range(2)]
    with pytest.raises(SampleError, match="one number of points"):
        TrainingSet(scenes, 8)


def test_every_epoch_is_a_permutation_and_a_batch_depends_on_seed_and_step_alone(data):
    training = load_training_set(data[0], 8)
    order = np.concatenate([training._order(353, 0, start, 3).numpy() for start in range(0, 15, 3)])
    assert all(sorted(order[i : i + 5]) == list(range(5)) for i in (0, 5, 10))
    assert len({tuple(order[i : i + 5]) for i in (0, 5, 10)}) > 1
    first = training.batch(353, 0, 7, 21, 3, AugmentConfig())
    again = training.batch(353, 0, 7, 21, 3, AugmentConfig())
    assert torch.equal(first[0]["xyz_norm"], again[0]["xyz_norm"]) and torch.equal(first[1], again[1])


def test_augmentation_turns_points_and_segments_alike_about_y(data):
    training = load_training_set(data[0], 8)
    plain, segments, mask = training.batch(353, 0, 3, 0, 5, AugmentConfig(rotate=False, flip=False))
    turned, moved, _ = training.batch(353, 0, 3, 0, 5, AugmentConfig())
    assert torch.equal(plain["xyz_norm"][..., 1], turned["xyz_norm"][..., 1])
    # Distances between points and segment ends do not change when both are moved alike.
    before = torch.cdist(plain["xyz_norm"], segments.flatten(1, 2))
    after = torch.cdist(turned["xyz_norm"], moved.flatten(1, 2))
    assert torch.allclose(before, after, atol=1e-5) and not torch.allclose(segments, moved)
    assert mask.sum() == 20


def test_flip_alone_mirrors_about_half_the_scenes(data):
    training = load_training_set(data[0], 8)
    turns = torch.cat([training._turns(1, step, np.arange(5), AugmentConfig(rotate=False)) for step in range(40)])
    mirrored = turns[:, 0, 0] < 0
    assert 60 < mirrored.sum() < 140
    assert torch.allclose(torch.linalg.det(turns), torch.where(mirrored, -1.0, 1.0))


def test_learning_rate_rises_stays_and_falls():
    stage = StageConfig("s", 1, 100, 1, 2.0, warmup=10, cooldown=20)
    assert stage.lr_at(0) == pytest.approx(0.2) and stage.lr_at(9) == 2.0 and stage.lr_at(80) == 2.0
    assert stage.lr_at(90) == pytest.approx(1.0) and stage.lr_at(99) == pytest.approx(0.1)


def test_confidence_by_mass_is_what_a_query_sends_to_real_targets():
    plan = torch.tensor([[[0.9, 0.3], [0.0, 0.5]]])
    assert confidence_target(plan, torch.tensor([[True, False]]), "mass").tolist() == [[pytest.approx(0.9), 0.0]]


def test_confidence_by_rank_counts_duplicates_as_found_and_distant_queries_as_not():
    plan = torch.tensor([[[0.3, 0.0], [0.3, 0.0], [0.3, 0.0], [0.03, 0.0], [0.0, 0.01]]])
    found = confidence_target(plan, torch.tensor([[True, True]]), "rank")[0]
    assert torch.allclose(found, torch.tensor([0.93, 0.93, 0.93, 0.093, 0.01]), atol=1e-6)


def test_match_loss_pulls_every_target_with_weight_one_however_far_it_is():
    target = torch.tensor([[[[0.0, 0, 0], [1, 0, 0]], [[torch.nan] * 3] * 2]])
    mask = torch.tensor([[True, False]])
    for distance in (0.1, 2.0):
        pred = target[:, :1] + torch.tensor([0.0, distance, 0.0])
        pred = torch.cat([pred, pred + 5], 1).requires_grad_()
        plan = torch.tensor([[[1e-20, 0.0], [1e-26, 0.0]]])
        loss = match_loss(pred, target, mask, plan, (3.0, 0.0, 0.0))
        assert torch.allclose(loss, torch.tensor([3.0 * distance]), rtol=1e-4)
        (gradient,) = torch.autograd.grad(loss, pred)
        # Half of the pull on the midpoint goes to each end, towards the target.
        assert torch.allclose(gradient[0, 0, :, 1], torch.tensor(1.5), rtol=1e-4)


def test_endpoint_loss_does_not_care_which_end_is_first():
    pred = torch.tensor([[[[0.0, 0, 0], [1, 0, 0]]]])
    target = torch.tensor([[[[1.0, 0, 0.5], [0, 0, 0]], [[torch.nan] * 3] * 2]])
    mask = torch.tensor([[True, False]])
    loss = endpoint_loss(pred, target, mask, torch.tensor([[[0.5, 0.5]]]))
    assert loss.tolist() == [0.25]


def test_base_configuration_states_the_published_architecture_and_recipe():
    config = load_config(BASE_CONFIG)
    assert config.model == PerceiverConfig() and config.steps == 170_000 and config.seed == 353
    assert [(s.points, s.batch_size, s.lr, s.endpoint_weight) for s in config.stages] == [
        (2048, 32, 3e-4, 0.0), (4096, 64, 3e-5, 0.0), (4096, 64, 3e-5, 0.1),
    ]  # fmt: skip
    stated = json.loads(BASE_CONFIG.read_text())
    ours = json.loads(json.dumps(config.to_dict()))
    assert {key: stated[key] for key in ("model", "optimizer", "loss", "augment", "graph")} == {
        key: ours[key] for key in ("model", "optimizer", "loss", "augment", "graph")
    }


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.hiden=3", "unknown key"),
        ("sead=3", "unknown key sead"),
        ("stages.0.lr=-1", r"stages\[0\].lr must be positive"),
        ("stages.0.conf_target=luck", "conf_target must be one of mass, rank"),
        ("stages.7.lr=1", "no element 7"),
        ("model.hidden=true", "hidden"),
        ("loss.eps=0", "loss.eps must be positive"),
        ("log_every=0", "log_every"),
        ("optimizer.beta1=2", "optimizer.beta1"),
        ("optimizer.grad_clip=-1", "optimizer.grad_clip"),
        ("loss.w_mid=-1", "loss.w_mid"),
        ("seed=abc", "seed must be of type int"),
        ("nonsense", "takes a.b=value"),
    ],
)
def test_wrong_settings_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(BASE_CONFIG, [override])


def test_overrides_reach_every_level():
    config = load_config(BASE_CONFIG, ["stages.1.steps=7", "model.dropout=0.0", "description=short", "seed=9"])
    assert (config.stages[1].steps, config.model.dropout, config.description, config.seed) == (7, 0.0, "short", 9)


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ConfigError, match=r"a\.json is not JSON"):
        load_config(tmp_path / "a.json")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "missing.json")


def test_the_trained_model_loads_and_predicts(finished, data):
    model = Perceiver.from_pretrained(finished)
    inputs, _, _ = load_training_set(data[0], 8).batch(0, 0, 0, 0, 2, AugmentConfig())
    with torch.no_grad():
        assert torch.isfinite(model(inputs).segments).all()

import json

import pytest

from wireframe.errors import ConfigError
from wireframe.perceiver import PerceiverConfig
from wireframe.train.config import (
    BASE_CONFIG,
    DEMO_CONFIG,
    REAL_CONFIG,
    SMALL_CONFIG,
    SMOKE_CONFIG,
    StageConfig,
    load_config,
    parse_config,
)


def test_learning_rate_rises_stays_and_falls():
    stage = StageConfig("s", 1, 100, 1, 2.0, warmup=10, cooldown=20)
    assert stage.lr_at(0) == pytest.approx(0.2) and stage.lr_at(9) == 2.0 and stage.lr_at(80) == 2.0
    assert stage.lr_at(90) == pytest.approx(1.0) and stage.lr_at(99) == pytest.approx(0.1)


def test_base_configuration_states_the_published_architecture_and_recipe():
    config = load_config(BASE_CONFIG)
    assert config.model == PerceiverConfig() and config.steps == 170_000 and config.seed == 353
    assert [(s.points, s.batch_size, s.lr, s.endpoint_weight) for s in config.stages] == [
        (2048, 32, 3e-4, 0.0), (4096, 64, 3e-5, 0.0), (4096, 64, 3e-5, 0.1),
    ]  # fmt: skip
    stated = json.loads(BASE_CONFIG.read_text())
    ours = json.loads(json.dumps(config.to_dict()))
    sections = ("model", "optimizer", "loss", "augment", "graph", "evaluation")
    assert {key: stated[key] for key in sections} == {key: ours[key] for key in sections}
    assert config.dev_val == 1024 and config.micro_batches == 1


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
        ("micro_batches=3", r"batch_size 32 is no multiple of micro_batches 3"),
        ("micro_batches=0", "micro_batches must be at least 1"),
        ("dev_val=-1", "dev_val must not be negative"),
        ("stages.0.name=../a", r"stages\[0\].name must be of 1 to 40 letters"),
        ("evaluation.thresholds=[2]", "evaluation.thresholds must be a list of at most 32 probabilities"),
        ("stages.0.steps=1e30", r"stages\[0\].steps must be of type int"),
        ("stages.0.steps=3000000000", r"stages\[0\].steps must be at most"),
        ("stages.0.points=70000", r"stages\[0\].points must be at most 65536"),
        ("save_every=1" + "0" * 400, "save_every must be at most"),
        ("stages.0.lr=1" + "0" * 400, r"stages\[0\].lr must be of type float, at most 1e30"),
        ("stages.\u00b2.lr=1", "there is no element"),
        ("seed=1" + "0" * 30, "seed must fit into 64 bits"),
        ("evaluation.worst=1000", "evaluation.worst must be from 0 to 200"),
        ("augment.resample=1", "augment.resample must be of type bool"),
        ("precision=16", "as text: 'precision=\"16\"'"),
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
    (tmp_path / "a.json").write_text("[" * 200_000)
    with pytest.raises(ConfigError, match=r"a\.json is not JSON"):
        load_config(tmp_path / "a.json")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "missing.json")


@pytest.mark.parametrize("path", [BASE_CONFIG, DEMO_CONFIG, REAL_CONFIG, SMALL_CONFIG, SMOKE_CONFIG])
def test_our_configurations_survive_the_way_through_json_and_have_short_names(path):
    config = load_config(path)
    assert parse_config(config.to_dict()) == config
    assert load_config(path.stem) == config


def test_the_small_recipe_keeps_what_the_published_one_has():
    base, smoke = load_config("base"), load_config("smoke")
    assert smoke.model.dropout == base.model.dropout > 0 and smoke.micro_batches == 4 and smoke.dev_val
    assert [stage.name for stage in smoke.stages][2] == base.stages[2].name
    for ours, published in zip(smoke.stages, base.stages):
        assert (ours.endpoint_weight, bool(ours.warmup), bool(ours.cooldown)) == (
            published.endpoint_weight, bool(published.warmup), bool(published.cooldown),
        )  # fmt: skip
    assert smoke.stages[0].points < smoke.stages[1].points == smoke.stages[2].points


def test_stages_begin_where_the_one_before_ends():
    config = load_config("base")
    assert [config.stage_start(i) for i in range(4)] == [0, 125_000, 135_000, 170_000]
    assert config.stage_at(125_000) == (1, 0) and config.stage_at(169_999) == (2, 34_999)

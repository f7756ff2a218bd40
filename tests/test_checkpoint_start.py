import json
import os
import shutil

import pytest
import torch
from checkpoint_cases import (
    DATA,
    SMALL_MODEL,
    STAGES,
    advance,
    contents,
    file_size_limit,
    refused,
    resealed,
    same_state,
    save,
    settings,
    small_run,
    three_checkpoints,
)
from safetensors.torch import save as encode

from wireframe.checkpoint import read_checkpoint
from wireframe.perceiver import Perceiver
from wireframe.train import checkpoints
from wireframe.train.checkpoint_files import MODEL, OPTIMIZER, STATE
from wireframe.train.checkpoints import State


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with the checkpoints of steps 1, 2 and 3; never altered."""
    return three_checkpoints(tmp_path_factory.mktemp("run"))


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "name, change",
    [
        (MODEL, lambda t: t.pop("segmenter.conf_head.bias")),
        (MODEL, lambda t: t.update(extra=torch.zeros(2))),
        (MODEL, lambda t: t.update({"segmenter.conf_head.bias": torch.zeros(2)})),
        (OPTIMIZER, lambda t: t.pop("exp_avg_sq:segmenter.conf_head.bias")),
        (OPTIMIZER, lambda t: t.update({"momentum:segmenter.conf_head.bias": torch.zeros(1)})),
        (OPTIMIZER, lambda t: t.update({"exp_avg:nothing": torch.zeros(1)})),
        (OPTIMIZER, lambda t: t.update({"exp_avg:segmenter.conf_head.bias": torch.zeros(1, dtype=torch.float64)})),
        (OPTIMIZER, lambda t: t.update(step=torch.zeros(1))),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_touched(run, name, change):
    folder = run / "checkpoints" / "step-00000003"
    stored = checkpoints.read(folder).tensors["model" if name == MODEL else "optimizer"]
    change(stored)
    (folder / name).write_bytes(encode(stored))
    resealed(folder)
    ours, untouched = small_run(1), small_run(1)
    for pair in (ours, untouched):
        advance(pair, 5)
    word = "does not fit the (model|optimiser): .*(conf_head.bias|extra|exp_avg:nothing|step)"
    refused(lambda: checkpoints.load(folder, ours, settings(), DATA), word)
    refused(lambda: checkpoints.start_from(folder, ours), word)
    assert same_state(ours, untouched)


def test_another_configuration_is_named_with_both_values(made):
    path = made / "checkpoints" / "step-00000003"
    for change, word in [
        ({"seed": 1}, "seed is 353, here 1"),
        ({"micro_batches": 2}, "micro_batches is 1, here 2"),
        ({"stages": [STAGES[0], {**STAGES[1], "lr": 0.5}]}, "stages.1.lr is 0.001, here 0.5"),
        ({"stages": [STAGES[0]]}, "stages is "),
        ({"model": {**SMALL_MODEL, "ff": 25}}, "model.ff is 24, here 25"),
    ]:
        text = refused(lambda change=change: checkpoints.load(path, small_run(), settings(**change), DATA), word)
        assert "another configuration" in text and "--out" in text
    free = {"description": "x", "log_every": 1, "save_every": 7, "keep_checkpoints": 9, "keep_every": 2,
            "max_bad_steps": 3, "graph": {"confidence": 0.4}, "evaluation": {"worst": 3}}  # fmt: skip
    assert checkpoints.load(path, small_run(), settings(**free), DATA).step == 3


def test_other_data_is_refused_but_a_set_no_longer_needed_may_be_missing(run):
    def load(step, data):
        return checkpoints.load(run / "checkpoints" / f"step-{step:08d}", small_run(), settings(), data).step

    refused(lambda: load(3, {**DATA, "64": "ee"}), r"other data \(rows of 64 points\)")
    optimizer = small_run()
    for step in (4, 5):
        save(run, step, optimizer)
    # Stage a ends with step 4: there its rows may be left out, and within stage b; within stage a they may not.
    assert load(4, {"64": DATA["64"]}) == 4 and load(5, {"64": DATA["64"]}) == 5
    refused(lambda: load(3, {"64": DATA["64"]}), "other data")
    refused(lambda: load(5, {"64": DATA["64"], "32": "ff"}), "other data")
    # A run of stage a alone, whose end stage b goes on from with its own rows.
    state, config = State(4, 0, None), settings()
    path = checkpoints.save(run / "b", state, optimizer, config, {"32": DATA["32"]})
    assert checkpoints.load(path, small_run(), config, {"64": DATA["64"]}) == state


@pytest.mark.parametrize("resample", [True, False])
def test_a_larger_set_counts_for_a_stage_only_where_it_draws_from_it(tmp_path, resample):
    config, now = settings(augment={"resample": resample}), {"32": DATA["32"], "48": "ee"}
    checkpoints.save(tmp_path, State(2, 0, None), small_run(), config, {**now, "99999999999": "x", "a": "y"})
    path = tmp_path / "checkpoints" / "step-00000002"
    # Stage a, of 32 points, has begun with its own rows, whatever else there was.
    assert checkpoints.load(path, small_run(), config, {"32": DATA["32"]}).step == 2
    refused(lambda: checkpoints.load(path, small_run(), config, {"48": "ee"}), "other data")
    checkpoints.save(tmp_path, State(2, 0, None), small_run(), config, {"48": "ee", "64": DATA["64"]})
    text = refused(lambda: checkpoints.load(path, small_run(), config, now), r"other data \(rows of 32 points\)")
    assert "choose another --out" in text
    if resample:
        assert checkpoints.load(path, small_run(), config, {"48": "ee"}).step == 2
        refused(lambda: checkpoints.load(path, small_run(), config, {"64": DATA["64"]}), "rows of 64 points")
    else:
        # Neither is used, and training says so.
        assert checkpoints.load(path, small_run(), config, {"64": DATA["64"]}).step == 2


def test_another_environment_is_reported_with_what_differs(made, monkeypatch):
    said = []
    path = made / "checkpoints" / "step-00000003"
    checkpoints.load(path, small_run(), settings(), DATA, said.append)
    assert not said
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        checkpoints.load(path, small_run(), settings(), DATA, said.append)
    finally:
        torch.set_num_threads(before)
    assert said == [f"{path} was made with threads {before} (here {before + 1}): the bits will differ"]
    said.clear()
    monkeypatch.setattr("numpy.__version__", "9.9\n")
    monkeypatch.setattr("platform.python_version", lambda: "9.9.9")
    checkpoints.load(path, small_run(), settings(), DATA, said.append)
    assert len(said) == 1 and '(here "9.9\\n"): the bits will differ' in said[0] and "python" not in said[0]


def sources(made, tmp_path):
    """Every kind of thing to start from, all of the same weights, and whether it has the optimiser."""
    folder = made / "checkpoints" / "step-00000003"
    optimizer = small_run()
    checkpoints.load(folder, optimizer, settings(), DATA)
    checkpoints.export(optimizer.model, tmp_path / "model", settings(), 3)
    return [(folder, True), (made, True), (tmp_path / "model", False), (tmp_path / "model" / "checkpoint.pt", False)]


def test_every_kind_of_checkpoint_starts_a_run(made, tmp_path, monkeypatch):
    kinds = sources(made, tmp_path)
    asked = []

    def hf_hub_download(repo, filename, revision=None):
        asked.append((repo, filename, revision))
        return str(tmp_path / "model" / "checkpoint.pt")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    kinds.append(("hf://owner/repo/last.pt", False))
    expected = small_run()
    checkpoints.load(kinds[0][0], expected, settings(), DATA)
    digest = checkpoints.tensor_hashes(made)["model"]
    names = ["step-00000003", "step-00000003", "model", "checkpoint.pt", "hf://owner/repo/last.pt"]
    for (source, has_optimizer), name in zip(kinds, names):
        for spelled in (source, str(source)):
            ours = small_run(1, dropout=0.3)
            advance(ours, 7)
            start = checkpoints.start_from(spelled, ours)
            assert start == {"source": name, "sha256": digest, "optimizer": has_optimizer}
            assert ours.model.training and ours.model.config.dropout == 0.3
            if has_optimizer:
                assert same_state(ours, expected)
            else:
                assert not any(tensor.any() for tensor in ours.state().values())
                assert torch.equal(ours.master, expected.master)
    assert asked == [("owner/repo", "last.pt", None)] * 2


@pytest.mark.parametrize("change, word", [
    ({"hidden": 32}, "hidden 16, the configuration model.hidden 32"),
    ({"latent_layers": 4}, "latent_layers 2, the configuration model.latent_layers 4"),
    ({"num_heads": 4, "kv_heads_self": 2}, "num_heads 2, the configuration model.num_heads 4; kv_heads_self 1"),
    ({"segments": 5}, "segments 4, the configuration model.segments 5"),
])  # fmt: skip
def test_another_architecture_is_named_with_both_values(made, tmp_path, change, word):
    for source, _ in sources(made, tmp_path):
        text = refused(lambda source=source: checkpoints.start_from(source, small_run(1, **change)), word)
        assert "another architecture" in text


def test_the_interval_counts_by_the_layers_it_gives(tmp_path):
    optimizer = small_run(latent_layers=5, cross_attn_interval=2)
    save(tmp_path, 1, optimizer, settings(model={**SMALL_MODEL, "latent_layers": 5, "cross_attn_interval": 2}))
    refused(
        lambda: checkpoints.start_from(tmp_path, small_run(latent_layers=5, cross_attn_interval=4)),
        "cross_attn_interval 2, the configuration model.cross_attn_interval 4",
    )
    optimizer = small_run(latent_layers=2, cross_attn_interval=1)
    checkpoints.start_from(tmp_path, small_run(latent_layers=5, cross_attn_interval=2))
    save(tmp_path / "b", 1, optimizer, settings(model={**SMALL_MODEL, "cross_attn_interval": 1}))
    assert checkpoints.start_from(tmp_path / "b", small_run(cross_attn_interval=4))["optimizer"]


def test_weights_that_are_not_finite_are_no_start(made, tmp_path):
    model = small_run().model
    with torch.no_grad():
        model.segmenter.conf_head.bias.fill_(torch.nan)
    checkpoints.export(model, tmp_path / "model", settings(), 3)
    refused(lambda: checkpoints.start_from(tmp_path / "model", small_run()), "not finite, first in .*conf_head.bias")


def test_what_is_no_checkpoint_is_no_start(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for source, word in [
        (tmp_path / "absent", "there is no checkpoint"), (tmp_path / "empty", "model.safetensors"),
        ("hf://only-an-owner", "hf://owner/repo/file.pt"),
    ]:  # fmt: skip
        refused(lambda source=source: checkpoints.start_from(source, small_run()), word)
    for folder in (run / "checkpoints").iterdir():
        (folder / MODEL).unlink()
    refused(lambda: checkpoints.start_from(run, small_run()), "holds no valid checkpoint")
    refused(lambda: checkpoints.start_from(run / "checkpoints" / "step-00000003", small_run()), f"there is no {MODEL}")


def test_an_export_is_read_by_torch_and_by_our_reader(tmp_path):
    model = small_run(dropout=0.25, num_points=128).model
    checkpoints.export(model, tmp_path / "stages" / "1-a", settings(seed=4), 17)
    folder = tmp_path / "stages" / "1-a"
    assert sorted(contents(folder)) == ["checkpoint.pt", "config.json", "model.safetensors"]
    theirs = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert theirs.keys() == {"model", "args"} and theirs["model"].keys() == model.state_dict().keys()
    assert "segmenter.latent_layers.0.cross.attn.log_scale" in theirs["model"]
    assert all(torch.equal(theirs["model"][name], tensor) for name, tensor in model.state_dict().items())
    told = {"seed": 4, "step": 17, "segment_param": "midpoint_dir_len", "hidden": 16, "dropout": 0.25}
    assert theirs["args"].items() >= told.items()
    assert read_checkpoint(folder / "checkpoint.pt").args == theirs["args"]
    loaded = Perceiver.from_checkpoint(folder / "checkpoint.pt")
    assert loaded.config == model.config == Perceiver.from_pretrained(folder).config
    paths = (folder, folder / "checkpoint.pt", folder / MODEL)
    assert len({str(checkpoints.tensor_hashes(path)) for path in paths}) == 1


def test_an_export_replaces_an_older_one_and_clears_what_was_left(tmp_path):
    (tmp_path / ".1-a.0123456789ab.tmp").mkdir()
    (tmp_path / ".2-b.0123456789ab.tmp").mkdir()
    for seed in (0, 1):
        model = small_run(seed).model
        checkpoints.export(model, tmp_path / "1-a", settings(), 4)
    assert sorted(os.listdir(tmp_path)) == [".2-b.0123456789ab.tmp", "1-a"]
    assert checkpoints.tensor_hashes(tmp_path / "1-a")["model"] == checkpoints.tensor_sha256(model.state_dict())
    before = contents(tmp_path / "1-a")
    for limit in (0, 1000):
        with file_size_limit(limit):
            other = small_run(2).model
            refused(lambda other=other: checkpoints.export(other, tmp_path / "1-a", settings(), 4), "cannot write the")
    assert contents(tmp_path / "1-a") == before and len(os.listdir(tmp_path)) == 2


def test_hashes_are_of_names_types_shapes_and_bytes_alone(made, tmp_path):
    shutil.copytree(made / "checkpoints" / "step-00000003", tmp_path / "elsewhere")
    state = json.loads((tmp_path / "elsewhere" / STATE).read_text())
    (tmp_path / "elsewhere" / STATE).write_text(json.dumps({**state, "environment": {"torch": "1"}}))
    hashes = checkpoints.tensor_hashes(resealed(tmp_path / "elsewhere"))
    assert hashes == checkpoints.tensor_hashes(made) and hashes.keys() == {"model", "optimizer"}
    digest = checkpoints.tensor_sha256
    x = torch.arange(6.0)
    others = [{"x": x}, {"y": x}, {"x": x.reshape(2, 3)}, {"x": x.double()}, {"x": x.view(torch.int32)}, {"x": x + 1},
              {"x": x[:5]}, {"x": x, "z": torch.zeros(0)}, {"x": torch.tensor(0.0)}, {}]  # fmt: skip
    assert len({digest(tensors) for tensors in others}) == len(others)
    assert digest({"a": x, "b": x + 1}) == digest({"b": x + 1, "a": x.clone()})
    assert digest({"x": x.reshape(2, 3).t()}) == digest({"x": x.reshape(2, 3).t().contiguous()})

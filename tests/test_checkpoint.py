import argparse
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path, PosixPath

import pytest
import torch

from batches import TINY, random_batch, randomise
from wireframe import Perceiver, PerceiverConfig
from wireframe.checkpoint import read_checkpoint
from wireframe.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def model():
    model = Perceiver(TINY).eval()
    randomise(model)
    return model


def published(model, dtype=None):
    state = OrderedDict(
        (name.replace("segmenter.", "segmenter._orig_mod."), tensor if dtype is None else tensor.to(dtype))
        for name, tensor in model.state_dict().items())
    state._metadata = {"": {"version": 1}}
    return state


def saved(path, value, **options):
    torch.save(value, path, **options)
    return path


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(path, word):
    with pytest.raises(CheckpointError, match=word) as caught:
        Perceiver.from_checkpoint(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


class Command:
    """A pickle that makes a file when it is executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("args", [
    argparse.Namespace(dropout=0.25, data=PosixPath("/data/x"), cross_attn_interval=2),
    {"dropout": 0.25, "data": PosixPath("/data/x"), "nested": {"out": PosixPath("y")}, "cross_attn_interval": 2},
])
def test_a_compiled_checkpoint_with_paths_among_its_arguments_loads(model, tmp_path, args):
    path = saved(tmp_path / "a.pt", {"model": published(model), "args": args, "step": 170000})
    loaded = Perceiver.from_checkpoint(path)
    assert same_weights(loaded, model)
    assert loaded.config == PerceiverConfig(**{**TINY, "dropout": 0.25})
    assert not loaded.training and all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    assert isinstance(read_checkpoint(path).args["data"], str)
    batch = random_batch()
    assert torch.equal(loaded(batch).segments, model(batch).segments)


def test_the_architecture_is_read_off_the_tensors(tmp_path):
    for change in ({"cross_attn_interval": 1}, {"cross_attn_interval": 3, "latent_layers": 5}, {"num_heads": 2},
                   {"kv_heads_cross": 4}, {"latent_layers": 1}, {"behind_emb_dim": 3, "ff": 20}):
        model = Perceiver({**TINY, **change})
        loaded = Perceiver.from_checkpoint(saved(tmp_path / "a.pt", {"model": model.state_dict()}))
        assert same_weights(loaded, model), change
        assert all(getattr(loaded.config, name) == value for name, value in change.items()
                   if name != "cross_attn_interval"), change


def test_a_training_checkpoint_with_optimiser_state_and_parameters_loads(model, tmp_path):
    optimiser = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    state = {name: torch.nn.Parameter(t) for name, t in model.state_dict().items()}
    path = saved(tmp_path / "a.pt", {"model": state, "optimizer": optimiser.state_dict(), "args": {}})
    assert same_weights(Perceiver.from_checkpoint(path), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(model, tmp_path, dtype):
    path = saved(tmp_path / "a.pt", {"model": published(model, dtype), "args": {}})
    state = Perceiver.from_checkpoint(path).state_dict()
    assert all(t.dtype == torch.float32 and torch.equal(t, model.state_dict()[n].to(dtype).float())
               for n, t in state.items())


def test_views_and_shared_storages_are_read_where_they_lie(model, tmp_path):
    state = dict(model.state_dict())
    name = "segmenter.input_proj.2.weight"
    big = torch.zeros(200, 100)
    view = big[3:3 + state[name].shape[1], 5:5 + state[name].shape[0]].t()
    view.copy_(state[name])
    assert not view.is_contiguous()
    loaded = Perceiver.from_checkpoint(saved(tmp_path / "a.pt", {"model": {**state, name: view}, "args": {}}))
    assert same_weights(loaded, model) and loaded.state_dict()[name].is_contiguous()


@pytest.mark.parametrize("place", ["args", "model", "optimizer", "key", "root"])
def test_nothing_in_a_pickle_is_executed(model, tmp_path, place):
    mark = tmp_path / "executed"
    root = {"model": published(model), "args": {"lr": 1.0}}
    if place == "key":
        root[(1, Command(mark))] = 1
    elif place == "root":
        root = Command(mark)
    else:
        root.setdefault(place, {})["evil"] = Command(mark)
    path = saved(tmp_path / "a.pt", root)
    if place == "args":
        assert same_weights(Perceiver.from_checkpoint(path), model)
        assert read_checkpoint(path).args == {"lr": 1.0, "evil": "<posix.system>"}
    else:
        refused(path, "posix.system")
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the file of this test would not have done anything"


@pytest.mark.parametrize("value", [PosixPath("x"), argparse.Namespace(a=1), [{"deep": (PosixPath("x"),)}], PosixPath])
def test_unknown_classes_outside_args_are_named(model, tmp_path, value):
    for place in ("model", "extra"):
        root = {"model": published(model), "args": {}}
        root.setdefault(place, {})["thing"] = value
        refused(saved(tmp_path / "a.pt", root), "PosixPath|Namespace")


def rewritten(path, name, data):
    """The file of torch.save at ``path`` with one entry replaced (callable: of the old bytes)."""
    with zipfile.ZipFile(path) as archive:
        entries = {e.filename: archive.read(e) for e in archive.infolist()}
    key = next(k for k in entries if k.endswith(name))
    entries[key] = data(entries[key]) if callable(data) else data
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    return path


class Rebuild:
    """A tensor of one stored float that announces another size, stride or offset."""

    def __init__(self, offset, size, stride, numel=1):
        self.args = offset, size, stride, numel


class AnnouncingPickler(pickle.Pickler):
    def persistent_id(self, value):
        return ("storage", torch.FloatStorage, "0", "cpu", value[1]) if isinstance(value, tuple) and value[:1] == (
            "the storage",) else None

    def reducer_override(self, value):
        if isinstance(value, Rebuild):
            offset, size, stride, numel = value.args
            return torch._utils._rebuild_tensor_v2, (
                ("the storage", numel), offset, size, stride, False, OrderedDict())
        return NotImplemented


@pytest.mark.parametrize("offset, size, stride, numel", [
    (0, (1 << 50,), (0,), 1), (0, (1 << 50,), (1,), 1 << 50), (0, (2,), (1,), 1), (1, (1,), (1,), 1),
    (-1, (1,), (1,), 1), (0, (1,), (-1,), 1), (0, (1, 1), (1,), 1), (0, (2, 2), (1 << 61, 1), 4),
    (0, (1 << 40, 0), (1, 1), 1 << 63), (0, (True,), (1,), 1), (0, [1], [1], 1), (0, (1,) * 70, (1,) * 70, 1),
])
def test_a_tensor_that_reaches_past_its_bytes_is_refused(tmp_path, offset, size, stride, numel):
    path = saved(tmp_path / "a.pt", {"model": {"x": torch.zeros(1)}})
    buffer = io.BytesIO()
    AnnouncingPickler(buffer, protocol=2).dump({"model": {"x": Rebuild(offset, size, stride, numel)}})
    refused(rewritten(path, "data.pkl", buffer.getvalue()), "tensor|storage|persistent")


@pytest.mark.parametrize("program, word", [
    # A list under a memo index of two thousand million: no memory is reserved for it.
    (b"\x80\x02]r\xff\xff\xff\x7f.", "found a list"),
    # A string, and a buffer, of far more bytes than the file.
    (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged"),
    (b"\x80\x05\x96\xff\xff\xff\xff\x07\x00\x00\x00.", "damaged"),
    # An extension code, a persistent id that is no storage, nothing at all, marks without end.
    (b"\x80\x02\x82\x01.", "damaged"),
    (b"\x80\x02X\x01\x00\x00\x00aQ.", "persistent id"),
    (b"", "damaged"),
    (b"(" * 100000 + b".", "damaged"),
    # State for the function that rebuilds tensors, and for a class that the whole process uses.
    (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__Ns\x86b.", "may not alter"),
    (b"\x80\x02ccollections\nOrderedDict\nN}X\x04\x00\x00\x00evilNs\x86b.", "damaged"),
])
def test_hostile_pickle_programs_are_refused(tmp_path, program, word):
    path = saved(tmp_path / "a.pt", {"model": {"x": torch.zeros(1)}})
    refused(rewritten(path, "data.pkl", program), word)
    assert not hasattr(OrderedDict, "evil")


def test_truncated_and_foreign_files_are_refused(model, tmp_path):
    path = saved(tmp_path / "a.pt", {"model": published(model), "args": {}})
    data = path.read_bytes()
    for keep in (0, 1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        refused(path, "zip format|damaged")
    path.write_bytes(bytes(data[:5000]) + bytes(byte ^ 0x55 for byte in data[5000:5200]) + data[5200:])
    refused(path, "damaged|unsafe|no entry")
    refused(saved(tmp_path / "old.pt", {"model": {}}, _use_new_zipfile_serialization=False), "zip format")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    refused(tmp_path / "other.pt", "data.pkl")
    refused(tmp_path / "absent.pt", "no checkpoint")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "model.safetensors")
    refused("hf://only-an-owner", "hf://owner/repo/file.pt")


def test_compressed_big_endian_and_short_entries_are_refused(model, tmp_path):
    path = saved(tmp_path / "a.pt", {"model": published(model), "args": {}})
    original = path.read_bytes()
    refused(rewritten(path, "byteorder", b"big"), "big-endian")
    path.write_bytes(original)
    refused(rewritten(path, "data/3", lambda old: old[:-4]), "announced")
    path.write_bytes(original)
    with zipfile.ZipFile(path) as archive:
        entries = {e.filename: archive.read(e) for e in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    refused(path, "compressed")


def test_what_does_not_fit_is_listed_in_one_line(model, tmp_path):
    state = dict(model.state_dict())
    del state["segmenter.conf_head.bias"]
    state["segmenter.extra"] = torch.zeros(3)
    state["segmenter.segment_head.weight"] = torch.zeros(8, 32)
    message = refused(saved(tmp_path / "a.pt", {"model": state}), "1 missing: segmenter.conf_head.bias")
    assert "1 unexpected: segmenter.extra" in message and "segment_head.weight [8, 32]" in message
    message = refused(saved(tmp_path / "a.pt", {"model": {"x": torch.zeros(1)}}), "and 158 more")
    assert "1 unexpected: x" in message
    refused(saved(tmp_path / "a.pt", {"model": {"x": 3}}), "not a tensor")
    refused(saved(tmp_path / "a.pt", {"model": {"a._orig_mod.x": torch.zeros(1), "a.x": torch.zeros(1)}}), "twice")
    refused(saved(tmp_path / "a.pt", {"state": {}}), "'model'")
    other = {"model": model.state_dict(), "args": {"segment_param": "endpoints"}}
    refused(saved(tmp_path / "a.pt", other), "endpoints")


def test_a_directory_round_trips_and_is_written_whole(model, tmp_path):
    target = tmp_path / "deep" / "model"
    model.save_pretrained(target)
    assert sorted(p.name for p in target.iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in target.parent.iterdir()] == ["model"]
    first = (target / "model.safetensors").read_bytes()
    (target / "README.md").write_text("kept")
    model.save_pretrained(target)
    assert (target / "README.md").exists() and (target / "model.safetensors").read_bytes() == first
    for loaded in (Perceiver.from_pretrained(target), Perceiver.from_checkpoint(str(target))):
        assert same_weights(loaded, model) and loaded.config == model.config and not loaded.training


def test_half_precision_storage_keeps_the_frequencies_exact(model, tmp_path):
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / d / "model.safetensors").stat().st_size for d in ("full", "half")]
    assert sizes[1] < 0.75 * sizes[0]
    state = Perceiver.from_pretrained(tmp_path / "half").state_dict()
    assert all(t.dtype == torch.float32 for t in state.values())
    assert torch.equal(state["tokenizer.pos_enc.B"], model.state_dict()["tokenizer.pos_enc.B"])
    name = "segmenter.input_proj.0.weight"
    assert torch.equal(state[name], model.state_dict()[name].half().float())
    with pytest.raises(CheckpointError, match="int8"):
        model.save_pretrained(tmp_path / "int", dtype=torch.int8)


def test_damaged_directories_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    config, weights = tmp_path / "m" / "config.json", tmp_path / "m" / "model.safetensors"
    text, data = config.read_text(), weights.read_bytes()
    config.write_text(json.dumps({**json.loads(text), "width": 3}))
    with pytest.raises(ConfigError, match="width"):
        Perceiver.from_pretrained(tmp_path / "m")
    config.write_text(json.dumps({**json.loads(text), "hidden": 1 << 20}))
    with pytest.raises(ConfigError, match="hidden"):
        Perceiver.from_pretrained(tmp_path / "m")
    config.write_text(json.dumps({**json.loads(text), "hidden": 1 << 16}))
    refused(tmp_path / "m", "ill-shaped")
    config.write_text("{")
    refused(tmp_path / "m", "JSON")
    config.unlink()
    assert same_weights(Perceiver.from_pretrained(tmp_path / "m"), model)
    weights.write_bytes(data[: len(data) // 2])
    refused(tmp_path / "m", "safetensors")
    with pytest.raises(CheckpointError, match="neither a directory"):
        Perceiver.from_pretrained(str(tmp_path / "absent" / "model"))


def test_the_hub_mixin_and_this_package_read_one_another(model, tmp_path):
    from huggingface_hub import PyTorchModelHubMixin

    class Hub(PyTorchModelHubMixin, Perceiver):
        pass

    model.save_pretrained(tmp_path / "ours", dtype=torch.float16)
    theirs = Hub.from_pretrained(str(tmp_path / "ours"))
    assert theirs.config == model.config
    assert same_weights(theirs, Perceiver.from_pretrained(tmp_path / "ours"))
    for i, config in enumerate((PerceiverConfig(**TINY), TINY)):
        hub = Hub(config)
        hub.save_pretrained(tmp_path / f"theirs{i}")
        loaded = Perceiver.from_pretrained(tmp_path / f"theirs{i}")
        assert same_weights(loaded, hub) and loaded.config == hub.config
    hub = Hub()
    hub.save_pretrained(tmp_path / "default")
    assert Perceiver.from_pretrained(Path(tmp_path / "default")).config == PerceiverConfig()

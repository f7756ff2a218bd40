import math
import os
import shutil

import pytest
import torch
from checkpoint_cases import advance, refused, save, settings, small_run
from safetensors.torch import save_file

from wireframe import cli
from wireframe.train import checkpoints
from wireframe.train.verify import compare, format_comparison


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two equal runs, each of steps 1 and 2, with the export of the last."""
    place = tmp_path_factory.mktemp("runs")
    for name in ("a", "b"):
        optimizer = small_run()
        for step in (1, 2):
            advance(optimizer, step)
            save(place / name, step, optimizer)
        checkpoints.export(optimizer.model, place / name / "model", settings(), 2)
    return place


def stored(made):
    return checkpoints.read(made / "a").tensors["model"]


def pair(tmp_path, change, tensors):
    """Two safetensors files; ``change`` alters the second one's tensors in place."""
    save_file(tensors, tmp_path / "a.safetensors")
    other = {name: tensor.clone() for name, tensor in tensors.items()}
    change(other)
    save_file(other, tmp_path / "b.safetensors")
    return compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_equal_runs_are_equal_however_they_are_named(made):
    step = "checkpoints/step-00000002"
    for a, b in [("a", "b"), (f"a/{step}", "b"), (f"a/{step}", f"b/{step}")]:
        found = compare(made / a, made / b)
        assert found.equal and found.hashes_a == found.hashes_b == checkpoints.tensor_hashes(made / "a")
        parameters = len(small_run().parameters())
        # The optimiser keeps two moments of a parameter and one count; the frequencies are no parameter.
        assert found.compared == {"model": parameters + 1, "optimizer": 2 * parameters + 1} and not found.uncompared
        text = format_comparison(found)
        assert f"equal bit for bit: tensors compared: {parameters + 1} of the model" in text
        assert text.count(found.hashes_a["optimizer"]) == 2


def test_every_form_of_the_same_weights_is_equal(made):
    forms = ["a", "b/model", "b/model/checkpoint.pt", "b/model/model.safetensors"]
    for a in forms:
        for b in forms:
            found = compare(made / a, made / b)
            assert found.equal and found.hashes_a["model"] == found.hashes_b["model"]
            one_sided = (a == "a") != (b == "a")
            assert len(found.uncompared) == one_sided
            assert ("tensors of the optimizer: not compared" in format_comparison(found)) == one_sided


def test_one_bit_in_one_tensor_is_found_and_named(made, tmp_path):
    tensors = stored(made)
    name = "segmenter.input_proj.0.weight"
    value = tensors[name][3, 5].item()

    def one_ulp(other):
        other[name][3, 5] = torch.nextafter(other[name][3, 5], torch.tensor(math.inf))

    found = pair(tmp_path, one_ulp, tensors)
    assert not found.equal and [difference.name for difference in found.differing] == [f"model {name}"]
    (difference,) = found.differing
    distance = abs(torch.nextafter(torch.tensor(value), torch.tensor(math.inf)).item() - value)
    assert difference.largest == distance > 0
    total = tensors[name].numel()
    assert f"1 of {total} values differ, by up to {distance:.3g} at [3, 5]: {value!r} against " in difference.what
    text = format_comparison(found)
    assert "DIFFERENT in 1 places" in text and f"first: model {name}" in text
    assert found.hashes_a["model"] != found.hashes_b["model"] and found.hashes_b["model"] in text


def test_the_largest_difference_is_found_wherever_it_is(tmp_path):
    tensors = {name: torch.zeros(4, 3) for name in "abcd"}

    def change(other):
        other["b"][1, 1] = 1e-6
        other["c"][0, 2], other["c"][3, 0] = -0.25, 2.5
        other["d"][0, 0] = 2.5

    found = pair(tmp_path, change, tensors)
    assert [(d.name, d.largest) for d in found.differing] == [
        ("model b", pytest.approx(1e-6)), ("model c", 2.5), ("model d", 2.5),
    ]  # fmt: skip
    text = format_comparison(found)
    assert "largest: model c: 2 of 12 values differ, by up to 2.5 at [3, 0]: 0.0 against 2.5" in text
    assert "first: model b" in text


@pytest.mark.parametrize(
    "a, b, equal, largest",
    [
        (0x7FC00000, 0x7FC00000, True, None), (0x7F800000, 0x7F800000, True, None),
        (0x7FC00000, 0x7FC00001, False, 0.0), (0x00000000, 0x80000000, False, 0.0),
        (0x7FC00000, 0x3F800000, False, math.inf), (0x7F800000, 0x3F800000, False, math.inf),
        (0x7F800000, 0xFF800000, False, math.inf), (0x3F800000, 0x40000000, False, 1.0),
    ],
)  # fmt: skip
def test_values_are_compared_by_their_bits(tmp_path, a, b, equal, largest):
    def floats(bits):
        return torch.tensor([0x3F800000, bits], dtype=torch.int64).to(torch.int32).view(torch.float32)

    found = pair(tmp_path, lambda other: other.update(x=floats(b)), {"x": floats(a)})
    assert found.equal == equal
    assert [difference.largest for difference in found.differing] == ([] if equal else [largest])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float64])
def test_other_types_are_compared_too(tmp_path, dtype):
    tensors = {"x": torch.tensor([[1, 0]], dtype=dtype), "scalar": torch.tensor(1, dtype=dtype)}

    def change(other):
        other["scalar"].zero_()

    assert pair(tmp_path, lambda other: None, tensors).equal
    found = pair(tmp_path, change, tensors)
    assert [(d.name, d.largest) for d in found.differing] == [("model scalar", 1.0)]
    assert "at []" in found.differing[0].what


def test_missing_extra_retyped_and_reshaped_tensors_are_named(tmp_path):
    tensors = {name: torch.ones(2, 3) for name in ("gone", "shaped", "typed", "same")}

    def change(other):
        del other["gone"]
        other["new"] = torch.ones(1)
        other["shaped"] = torch.ones(3, 2)
        other["typed"] = torch.ones(2, 3, dtype=torch.bfloat16)

    found = pair(tmp_path, change, tensors)
    assert [(d.name, d.what) for d in found.differing] == [
        ("model gone", "only in A"), ("model new", "only in B"),
        ("model shaped", "shape [2, 3] against [3, 2]"), ("model typed", "float32 against bfloat16"),
    ]  # fmt: skip
    assert found.compared == {"model": 3} and "largest" not in format_comparison(found)


def test_many_differences_are_counted_and_not_all_listed(tmp_path):
    tensors = {f"t{i:02}": torch.zeros(1) for i in range(30)}
    found = pair(tmp_path, lambda other: [tensor.add_(1) for tensor in other.values()], tensors)
    text = format_comparison(found)
    assert len(found.differing) == 30 and "and 22 more" in text and len(text.splitlines()) < 20


def test_names_out_of_a_strangers_file_cannot_steer_the_terminal(tmp_path):
    found = pair(tmp_path, lambda other: other["a\x1b[2J\nb"].add_(1), {"a\x1b[2J\nb": torch.zeros(1)})
    text = format_comparison(found)
    assert "\x1b" not in text and all(line.isprintable() for line in text.splitlines())


def test_a_difference_in_the_optimiser_or_in_the_steps_alone_counts(made, tmp_path):
    optimizer = small_run()
    for step in (1, 2):
        advance(optimizer, step)
    optimizer.exp_avg[0] += 1
    save(tmp_path / "c", 2, optimizer)
    found = compare(made / "a", tmp_path / "c")
    assert len(found.differing) == 1 and found.differing[0].name.startswith("optimizer exp_avg:")
    assert found.hashes_a["model"] == found.hashes_b["model"]
    assert found.hashes_a["optimizer"] != found.hashes_b["optimizer"]
    optimizer = small_run()
    for step in (0, 1):
        checkpoints.save(
            tmp_path / "d", checkpoints.State(step, step, None), optimizer, settings(), {"32": "a"}
        )
    found = compare(*(tmp_path / "d" / "checkpoints" / f"step-0000000{i}" for i in (0, 1)))
    assert [d.name for d in found.differing] == ["state step", "state bad_steps"]
    assert {d.what for d in found.differing} == {"0 against 1"}


def test_a_corrupt_checkpoint_is_refused_and_within_a_run_passed_over(made, tmp_path, capsys):
    shutil.copytree(made / "a", tmp_path / "a")
    newest = tmp_path / "a" / "checkpoints" / "step-00000002"
    (newest / "model.safetensors").write_bytes(b"x")
    refused(lambda: compare(newest, made / "b"), "corrupt")
    found = compare(tmp_path / "a", made / "b")
    assert found.a.endswith("step-00000001") and found.differing[0].name == "state step"
    assert "passing it over" in capsys.readouterr().err
    for nothing in (tmp_path / "absent", tmp_path / "absent.safetensors"):
        refused(lambda nothing=nothing: compare(nothing, made / "b"), "there is no checkpoint at")
    refused(lambda: compare(tmp_path, made / "b"), "holds no checkpoint")
    (tmp_path / "x.safetensors").write_bytes(os.urandom(100))
    refused(lambda: compare(tmp_path / "x.safetensors", made / "b"), "not a readable safetensors file")
    (tmp_path / "x.pt").write_bytes(os.urandom(100))
    refused(lambda: compare(tmp_path / "x.pt", made / "b"), "zip format")


def test_the_command_says_it_by_its_exit_status(made, capsys):
    assert cli.main(["verify", str(made / "a"), str(made / "b")]) == 0
    assert "equal bit for bit" in capsys.readouterr().out
    first = made / "a" / "checkpoints" / "step-00000001"
    assert cli.main(["verify", str(first), str(made / "b")]) == 1
    assert "first: state step: 1 against 2" in capsys.readouterr().out
    assert cli.main(["verify", str(first), str(made / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("wireframe verify: there is no checkpoint at")

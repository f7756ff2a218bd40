"""Features of points: every column written out in double precision, waves of large arguments, and what is masked."""

import math

import pytest
import torch

from interpreter_bf16 import interpreted_bfloat16
from point_cases import INTEGERS, LABELS, budget, double, features, random_points, rounded_angles, same
from poisoned_memory import guarded, poisoned_memory
from wireframe.kernels import dispatch, ops, point_features
from wireframe.kernels.dispatch import ImplementationError
from wireframe.kernels.point_features_reference import feature_width

interpreted = pytest.mark.skipif(
    not dispatch.INTERPRETED, reason="needs TRITON_INTERPRET=1; see test_gpu_point_features.py"
)
each_impl = pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=interpreted)])


@pytest.fixture(autouse=True, scope="module")
def _bfloat16():
    with interpreted_bfloat16():
        yield


@each_impl
@pytest.mark.parametrize("points", [1, 31, 63, 65])
def test_every_column_is_the_documented_one(points, impl):
    inputs = random_points(points=points)
    inputs["mask"][0, 0] = True
    with poisoned_memory():
        found = features({name: guarded(x) for name, x in inputs.items()}, impl)
    assert found.shape == (2, points, 128) and found.dtype == torch.float32 and found.is_contiguous()
    b = inputs["frequencies"].double()
    for scene in range(2):
        for i in range(points):
            point = {name: x[scene, i] for name, x in inputs.items() if name != "frequencies"}
            row = found[scene, i].double()
            if not point["mask"]:
                assert not row.any()
                continue
            angle = 2 * math.pi * b @ point["xyz"].double()
            torch.testing.assert_close(row[:64], torch.cat([angle.sin(), angle.cos()]), rtol=0, atol=3e-5)
            ones = {69, 70 + int(point["class_id"]), 83 + int(point["source"]), 85 + max(int(point["behind"]), 0)}
            assert set((row[69:] == 1).nonzero().flatten().add(69).tolist()) == ones and row[69:].sum() == 4
            votes = [point["n_views_voted"].float() - 2.7, (point["vote_frac"] - 0.5) / 0.25]
            assert torch.equal(row[64:69].float(), torch.stack([*point["xyz"], *votes]))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_lies_within_the_budget_and_copies_exactly(dtype):
    inputs = random_points(3, 63)
    with poisoned_memory():
        found = features({name: guarded(x) for name, x in inputs.items()}, dtype=dtype)
    assert found.dtype == dtype
    budget(inputs, found)
    expected = features(inputs, "reference", dtype=dtype)
    assert torch.equal(found[..., 64:], expected[..., 64:])
    # Waves are equal but where rounding to the dtype falls the other way.
    assert (found != expected).double().mean() < {torch.float32: 0.5, torch.float16: 0.01, torch.bfloat16: 0.001}[dtype]


@each_impl
@pytest.mark.parametrize("spread", [1e-3, 0.3, 5.0, 20.0])
def test_waves_are_those_of_the_rounded_angle(spread, impl):
    inputs = random_points(2, 65, spread=spread)
    # Multiples of quarters of a circle, where one of the two is nearly zero and the quarter changes.
    inputs["xyz"][0, :40, 1:], inputs["frequencies"][0] = 0.0, torch.tensor([1.0, 0.0, 0.0])
    inputs["xyz"][0, :40, 0], inputs["mask"][0, :40] = torch.arange(-20, 20) / 4, True
    angle, mask = rounded_angles(inputs).double(), inputs["mask"][..., None]
    assert angle.abs().max() < 1.2e4
    found = features(inputs, impl)[..., :64].double()
    expected = torch.where(mask, torch.cat([angle.sin(), angle.cos()], -1), 0.0)
    assert (found - expected).abs().max() < 1.2e-7


@pytest.mark.filterwarnings("ignore:invalid value")
@each_impl
def test_waves_of_absurd_arguments_are_bounded_and_not_hidden(impl):
    inputs = random_points(1, 63)
    inputs["mask"][:] = True
    inputs["xyz"][0, :30] = 10.0 ** torch.arange(4, 34)[:, None]
    inputs["xyz"][0, 30:33, 0] = torch.tensor([math.nan, math.inf, -math.inf])
    found = features(inputs, impl)[0]
    assert found[:30, :64].abs().max() <= 1.0 + 1e-6
    assert found[30:33, :64].isnan().all() and found[33:].isfinite().all()
    assert torch.equal(found[:, 64:67].nan_to_num(7.0), inputs["xyz"][0].nan_to_num(7.0))


@each_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_masked_point_holds_reaches_nothing(dtype, impl):
    inputs = random_points()
    expected, gone = features(inputs, impl, dtype=dtype), ~inputs["mask"]
    inputs["xyz"][gone], inputs["vote_frac"][gone] = math.nan, math.inf
    for name, value in zip(INTEGERS, (255, 255, -32768, 255)):
        inputs[name][gone] = value
    assert gone.any() and not expected[gone].any()
    assert same(features(inputs, impl, dtype=dtype), expected)
    inputs["mask"][:] = False
    assert not features(inputs, impl, dtype=dtype).any()


@each_impl
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_a_label_outside_its_table_is_no_label(dtype, impl):
    inputs = random_points(1, 9)
    inputs["mask"][:] = True
    for name in INTEGERS:
        inputs[name] = inputs[name].clamp_min(0).to(dtype)
    inside = features(inputs, impl)
    assert same(features({**inputs, "n_views_voted": inputs["n_views_voted"].long()}, impl), inside)
    # Of int64 those whose lower half is a label too.
    beyond = {torch.uint8: 255, torch.int16: 32767, torch.int32: 2**31 - 1, torch.int64: 2**32 + 1}[dtype]
    for name, first, size in (("class_id", 70, 13), ("source", 83, 2), ("behind", 85, 29)):
        for label in (size, beyond, *([-1] if dtype.is_signed and name != "behind" else [])):
            values = inputs[name].clone()
            values[0, 4] = label
            expected = inside.clone()
            expected[0, 4, first : first + size] = 0.0
            assert same(features({**inputs, name: values}, impl), expected), (name, label)


@each_impl
@pytest.mark.parametrize("bands, labels, width", [
    (32, LABELS, 128), (16, LABELS, 128), (64, (40, 1, 70), 256), (32, (13, 2, 43), 128), (32, (13, 2, 44), 192),
    (2, (1, 1, 1), 64),
])  # fmt: skip
def test_other_sizes_have_other_widths(bands, labels, width, impl):
    inputs = random_points(2, 33, bands, labels)
    with poisoned_memory():
        found = features(inputs, impl, labels)
    assert found.shape == (2, 33, width) and feature_width(bands, labels) == width
    budget(inputs, found, labels)
    hot = found[..., 2 * bands + 6 :]
    assert torch.equal(hot.sum(-1), 3.0 * inputs["mask"]) and not hot[..., sum(labels) :].any()


@each_impl
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_gives_nothing(shape, impl):
    assert features(random_points(*shape), impl, dtype=torch.float16).shape == (*shape, 128)


@each_impl
def test_views_give_what_their_copies_give(impl):
    whole = random_points(4, 130)
    batch = {name: x for name, x in whole.items() if name != "frequencies"}
    b = whole["frequencies"]
    for view in (
        {name: x[1::2, 3:70] for name, x in batch.items()},
        {name: x[:1].expand(3, *x.shape[1:]) for name, x in batch.items()},
        {name: x.transpose(0, 1) for name, x in batch.items()},
    ):
        inputs = {**view, "frequencies": torch.cat([b, b], 1)[:, 2:5]}
        assert not inputs["xyz"].is_contiguous() and not inputs["frequencies"].is_contiguous()
        copies = {name: x.clone(memory_format=torch.contiguous_format) for name, x in inputs.items()}
        with poisoned_memory():
            found = features(inputs, impl)
        assert found.is_contiguous() and same(found, features(copies, impl))


@each_impl
def test_a_point_has_its_row_in_any_batch_and_place_and_again(impl):
    inputs = random_points(5, 65)
    whole = features(inputs, impl)
    assert same(features(inputs, impl), whole)
    b = {"frequencies": inputs.pop("frequencies")}
    for order in ([3], [4, 0], [2, 3, 1, 0, 4]):
        assert same(features({name: x[order] for name, x in inputs.items()} | b, impl), whole[order])
    assert same(features({name: x[:, 17:] for name, x in inputs.items()} | b, impl), whole[:, 17:])


def test_gradients_of_positions_votes_and_frequencies_are_those_of_the_reference():
    inputs = double(random_points(1, 5, 2))
    inputs["mask"][0] = torch.tensor([True, True, False, True, True])
    leaves = [inputs.pop(name).requires_grad_() for name in ("xyz", "vote_frac", "frequencies")]

    def function(xyz, vote_frac, frequencies):
        return ops.point_features(
            xyz, **inputs, vote_frac=vote_frac, frequencies=frequencies, labels=LABELS, dtype=torch.float64
        )

    assert torch.autograd.gradcheck(function, leaves)
    with torch.no_grad():
        leaves[0][0, 2] = leaves[1][0, 2] = math.nan
    dxyz, dvotes, db = torch.autograd.grad(function(*leaves).sum(), leaves)
    assert not dxyz[0, 2].any() and not dvotes[0, 2].any() and all(g.isfinite().all() for g in (dxyz, dvotes, db))


def test_in_double_precision_it_is_computed_in_double_precision():
    inputs = random_points()
    assert same(features(inputs, "auto", dtype=torch.float64).float(), features(inputs, "reference"))
    mask = inputs["mask"][..., None]
    found = features({**inputs, "xyz": inputs["xyz"].double()}, "auto", dtype=torch.float64)
    exact = 2 * math.pi * torch.where(mask, inputs["xyz"].double(), 0.0) @ inputs["frequencies"].double().T
    torch.testing.assert_close(found[..., :32], exact.sin(), rtol=0, atol=1e-12)


def test_what_the_kernel_does_not_take_is_refused_or_left_to_the_reference(monkeypatch):
    inputs = random_points(1, 3)
    with pytest.raises(ImplementationError, match="not built"):
        features(inputs, "native")
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    wanted = {**inputs, "xyz": inputs["xyz"].clone().requires_grad_()}
    for changed, dtype, said in (
        (double(inputs), torch.float32, "got torch.float64, torch.float64, torch.float64"),
        (inputs, torch.float64, "not torch.float64"),
        (random_points(1, 3, 33), torch.float32, "a power of two"),
        (random_points(1, 3, 128), torch.float32, "up to 64"),
        (wanted, torch.float32, "no gradients"),
    ):
        with pytest.raises(ImplementationError, match=said):
            features(changed, dtype=dtype)
        assert features(changed, "auto", dtype=dtype).dtype == dtype
    with torch.no_grad():
        assert same(features(wanted), features(inputs))
    monkeypatch.setattr(point_features, "_INTERPRETED_DTYPES", (torch.float32,))
    with pytest.raises(ImplementationError, match="bfloat16"):
        features(inputs, dtype=torch.bfloat16)
    # On the device whose choice of "auto" is Triton.
    seen = []
    monkeypatch.setattr(point_features, "point_features_reference", lambda *x: seen.append(x))
    meta = {name: x.to("meta") for name, x in inputs.items()}
    assert features(meta, "auto").shape == (1, 3, 128) and not seen
    features({**meta, "xyz": meta["xyz"].requires_grad_()}, "auto")
    assert len(seen) == 1


@pytest.mark.parametrize("change, said", [
    ({"xyz": [0.0]}, "xyz must be a tensor, not list"),
    ({"xyz": torch.zeros(2, 4, 3).long()}, "xyz must be floating, got int64"),
    ({"xyz": torch.zeros(2, 4)}, r"xyz must be \[B, T, 3\], got \[2, 4\]"),
    ({"vote_frac": torch.zeros(2, 4).long()}, "vote_frac must be floating"),
    ({"vote_frac": torch.zeros(2, 5)}, r"vote_frac must be \[2, 4\], got \[2, 5\]"),
    ({"class_id": None}, "class_id must be a tensor, not NoneType"),
    ({"source": torch.zeros(2, 4)}, "source must be of integers, uint8 to int64, got torch.float32"),
    ({"behind": torch.zeros(4, 2).short()}, r"behind must be \[2, 4\], got \[4, 2\]"),
    ({"n_views_voted": torch.zeros(2, 4).bool()}, "n_views_voted must be of integers"),
    ({"mask": torch.ones(2, 4).byte()}, "mask must be bool, got torch.uint8"),
    ({"frequencies": torch.zeros(32, 2)}, r"frequencies must be \[F, 3\], got \[32, 2\]"),
    ({"frequencies": torch.zeros(0, 3)}, "frequencies must be"),
    ({"mask": torch.ones(2, 4, device="meta").bool()}, "mask is on meta, xyz on cpu"),
    ({"labels": (13, 2)}, "labels must be three positive integers"),
    ({"labels": (13, 2, 0)}, "labels must be three positive integers"),
    ({"dtype": "float32"}, "dtype must be a dtype, not str"),
    ({"dtype": torch.int32}, "dtype must be floating, got torch.int32"),
    ({"impl": "fast"}, "unknown impl 'fast'"),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_in_one_line(change, said):
    with pytest.raises((TypeError, ValueError), match=f"^point_features: .*{said}") as error:
        ops.point_features(**{**random_points(2, 4), "labels": LABELS, **change})
    assert "\n" not in str(error.value)


@interpreted
@pytest.mark.parametrize("shape", [(2, 33), (0, 4)])
def test_the_registered_operator_passes_opcheck(shape):
    arguments = (*random_points(*shape).values(), list(LABELS), torch.float16)
    torch.library.opcheck(torch.ops.wireframe.point_features.default, arguments)


@each_impl
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_call_is_one_graph_with_the_same_bits(impl, backend):
    torch.compiler.reset()
    inputs = random_points()

    def function(inputs):
        return 2 * features(inputs, impl)

    assert same(torch.compile(function, fullgraph=True, backend=backend)(inputs), function(inputs))


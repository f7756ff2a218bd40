"""AdamW with clipping over flat buffers: kernels against float64, against torch, and what a skipped step leaves."""

import pytest
import torch

from adamw_budget import SETTINGS, STATE, after, check_step, doubled, problem, same_bits
from interpreter_bf16 import interpreted_bfloat16
from poisoned_memory import poisoned_memory
from wireframe.kernels import adamw_step, adamw_step_reference, dispatch, ops
from wireframe.kernels.dispatch import ImplementationError

interpreted = pytest.mark.skipif(
    not dispatch.INTERPRETED, reason="needs TRITON_INTERPRET=1; see test_gpu_adamw_step.py"
)
each_impl = pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=interpreted)])


@pytest.fixture(autouse=True, scope="module")
def _bfloat16():
    with interpreted_bfloat16():
        yield


def bounded(values):
    """Copies between guards, inside poisoned_memory."""
    return {name: torch.empty(x.shape, dtype=x.dtype).copy_(x) for name, x in values.items()}


# One element, one program and several of each launch, none of them full.
@each_impl
@pytest.mark.parametrize("size", [1, 63, 65, 1000, 9001])
@pytest.mark.parametrize("steps", [0, 1, 9, 170_000])
def test_a_step_lies_within_the_rounding_of_float32(size, steps, impl):
    values = problem(size, steps)
    late_from = size // 3
    with poisoned_memory():
        copies = bounded(values)
        norm = ops.adamw_step(**copies, **SETTINGS, late_from=late_from, impl=impl)
    check_step({name: copies[name] for name in STATE} | {"norm": norm}, values)
    assert all(torch.equal(copies[name], values[name]) for name in ("gradient", "lr", "healthy"))


@each_impl
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
@pytest.mark.parametrize("settings", [
    # Not clipped; clipped where the 1e-6 counts; without memory; with much of it; without eps, and with eps alone.
    {"grad_clip": 10.0}, {"grad_clip": 1e-6, "norm": 2e-6}, {"betas": (0.0, 0.0)}, {"betas": (0.5, 0.99999)},
    {"eps": 0.0}, {"eps": 10.0}, {"weight_decay": 0.0, "late_weight_decay": 9.0},
])  # fmt: skip
def test_settings_are_obeyed_within_the_rounding(settings, impl):
    settings = dict(settings)
    values = problem(1000, steps=2, norm=settings.pop("norm", 1.0))
    if settings.get("eps") == 0.0:
        # Not 0 / 0.
        values["exp_avg_sq"].clamp_(min=1e-30)
    check_step(after(values, impl, **settings), values, **settings)


def torch_steps(values, dtype, settings, late_from, gradients):
    """weights, exp_avg, exp_avg_sq and norms of torch.optim.AdamW and clip_grad_norm_."""
    weights = values["weights"].to(dtype)
    parts = [part.clone().requires_grad_() for part in (weights[:late_from], weights[late_from:])]
    decays = settings["weight_decay"], settings["late_weight_decay"]
    groups = [{"params": [part], "weight_decay": decay} for part, decay in zip(parts, decays)]
    adamw = torch.optim.AdamW(groups, lr=values["lr"].item(), betas=settings["betas"], foreach=False)
    norms = []
    for gradient in gradients:
        for part, g in zip(parts, (gradient[:late_from], gradient[late_from:])):
            part.grad = g.clone().to(dtype)
        norms.append(torch.nn.utils.clip_grad_norm_(parts, settings["grad_clip"], foreach=False))
        adamw.step()
    moments = [torch.cat([adamw.state[part][name] for part in parts]) for name in STATE[1:3]]
    return [torch.cat(parts).detach(), *moments, torch.stack(norms)]


def our_steps(values, dtype, settings, late_from, gradients, impl):
    values = {name: x.to(dtype) if x.is_floating_point() else x.clone() for name, x in values.items()}
    values = {name: x.clone() for name, x in values.items()}
    norms = []
    for gradient in gradients:
        values["gradient"].copy_(gradient)
        norms.append(ops.adamw_step(**values, **settings, late_from=late_from, impl=impl))
    return [*(values[name] for name in STATE[:3]), torch.stack(norms)]


def ten_steps():
    """Some of them clipped; lr is a float32 number, so that torch takes the same."""
    values = problem(300) | {"lr": torch.tensor(2.0**-7)}
    return values, [problem(300, seed=step, norm=0.2 * (step + 1))["gradient"] for step in range(10)]


@pytest.mark.parametrize("late_from", [0, 101, 300])
def test_in_double_precision_steps_are_those_of_torch(late_from):
    values, gradients = ten_steps()
    theirs = torch_steps(values, torch.float64, SETTINGS, late_from, gradients)
    ours = our_steps(values, torch.float64, SETTINGS, late_from, gradients, "reference")
    for found, wanted in zip(ours, theirs):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


@each_impl
def test_in_single_precision_steps_are_as_close_as_those_of_torch(impl):
    values, gradients = ten_steps()
    exact = torch_steps(values, torch.float64, SETTINGS, 101, gradients)
    theirs = torch_steps(values, torch.float32, SETTINGS, 101, gradients)
    ours = our_steps(values, torch.float32, SETTINGS, 101, gradients, impl)
    for found, eager, wanted in zip(ours, theirs, exact):
        allowed = 2 * (eager.double() - wanted).norm() + torch.finfo(torch.float32).eps * wanted.norm()
        assert (found.double() - wanted).norm() <= allowed


@each_impl
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply", "ignore:divide by zero")
@pytest.mark.parametrize("bad", ["nan", "inf", "overflow", "unhealthy"])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_bad_step_leaves_every_bit(bad, steps, impl):
    values = problem(1100, steps)
    # What 0 times something, or a sum with 0, would change.
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        values[name][:4] = torch.tensor([-0.0, torch.inf, torch.nan, 1e-42])
    if bad == "unhealthy":
        values |= {"healthy": torch.tensor(False), "lr": torch.tensor(torch.nan)}
    else:
        values["gradient"][1037] = {"nan": torch.nan, "inf": -torch.inf, "overflow": 1e30}[bad]
    # Not the weights rounded: a copy that is written anew shows.
    half = torch.randn(1100, generator=torch.Generator().manual_seed(1)).bfloat16()
    copies = {name: x.clone() for name, x in values.items()} | {"half": half.clone()}
    norm = ops.adamw_step(**copies, **SETTINGS, late_from=500, impl=impl)
    assert same_bits(copies, values | {"half": half})
    assert bool(norm.isfinite()) == (bad == "unhealthy")


@each_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_copy_is_the_weights_rounded(dtype, impl):
    values = problem(1500, steps=2)
    with poisoned_memory():
        copies = bounded(values | {"half": torch.zeros(1500, dtype=dtype)})
        ops.adamw_step(**copies, **SETTINGS, late_from=7, impl=impl)
    assert torch.equal(copies["half"], copies["weights"].to(dtype)) and copies["half"].any()
    # And the weights are what they are without a copy.
    assert torch.equal(copies["weights"], after(values, impl, late_from=7)["weights"])


@each_impl
@pytest.mark.parametrize("late_from", [0, 1, 64, 1023, 1025, 1499, 1500])
def test_the_late_decay_begins_where_it_is_told(late_from, impl):
    values = problem(1500) | {"lr": torch.tensor(0.5)}
    values["gradient"].zero_()
    found = after(values, impl, late_from=late_from)["weights"]
    decay = torch.where(torch.arange(1500) < late_from, SETTINGS["weight_decay"], SETTINGS["late_weight_decay"])
    torch.testing.assert_close(found, values["weights"] * (1 - 0.5 * decay), rtol=2e-7, atol=0)


@each_impl
def test_one_decay_is_for_all(impl):
    values = problem(100)
    alike = after(values, impl, late_weight_decay=SETTINGS["weight_decay"])
    for late_from in (None, 40):
        assert same_bits(after(values, impl, late_weight_decay=None, late_from=late_from), alike)


@each_impl
def test_a_rate_of_zero_moves_the_moments_alone(impl):
    values = problem(100, steps=1) | {"lr": torch.tensor(0.0)}
    found = after(values, impl)
    assert torch.equal(found["weights"], values["weights"]) and found["count"] == 2
    assert not torch.equal(found["exp_avg"], values["exp_avg"])
    assert not torch.equal(found["exp_avg_sq"], values["exp_avg_sq"])


@each_impl
def test_nothing_is_a_step_too(impl):
    found = after(problem(0), impl)
    assert found["count"] == 1 and found["norm"] == 0 and found["weights"].shape == (0,)


@interpreted
def test_partial_sums_of_any_number_are_added(monkeypatch):
    # As of a buffer a thousand times as long, the last part not full.
    from wireframe.kernels import adamw_step_triton

    values = problem(2900, steps=1)
    monkeypatch.setattr(adamw_step_triton, "_SUMMED", 64)
    monkeypatch.setattr(adamw_step_triton, "_PARTS", 16)
    check_step(after(values, "triton"), values)


def test_chunks_of_the_reference_do_not_show(monkeypatch):
    values = problem(2900, steps=1)
    whole = after(values, "reference")
    monkeypatch.setattr(adamw_step_reference, "_CHUNK", 64)
    assert same_bits(after(values, "reference"), whole)


@each_impl
def test_views_and_numbers_that_want_gradients_are_plain_numbers(impl):
    values = problem(1000, steps=2)
    wanted = after(values, impl)
    # From an odd address.
    views = {name: torch.cat([x[:1], x])[1:] if x.dim() else x.clone() for name, x in values.items()}
    views["gradient"].requires_grad_()
    norm = ops.adamw_step(**views, **SETTINGS, late_from=333, impl=impl)
    assert same_bits({name: views[name] for name in STATE} | {"norm": norm}, wanted)
    assert not norm.requires_grad and not views["weights"].requires_grad


@interpreted
def test_repeats_are_equal_and_the_operator_is_sound():
    values = problem(5000, steps=4)
    assert same_bits(after(values, "triton"), after(values, "triton"))
    tensors = [values[n] for n in ("weights", "gradient", "exp_avg", "exp_avg_sq", "count", "lr", "healthy")]
    numbers = (0.7, 0.9, 0.95, 1e-8, 0.02, 0.3, 1000)
    for half in (None, torch.zeros(5000, dtype=torch.float16)):
        torch.library.opcheck(torch.ops.wireframe.adamw_step, (*tensors, half, *numbers))


@pytest.mark.parametrize("change, said", [
    ({"weights": [0.0]}, "weights must be a tensor, not list"),
    ({"weights": torch.zeros(10).half()}, "weights must be float32 or float64, got torch.float16"),
    ({"weights": torch.zeros(20)[::2]}, "weights must be contiguous"),
    ({"gradient": torch.zeros(9)}, r"gradient must be torch.float32 \[P\] as weights, got torch.float32 \[9\]"),
    ({"exp_avg": torch.zeros(10).double()}, "exp_avg must be torch.float32"),
    ({"exp_avg_sq": torch.zeros(10, 1)}, r"exp_avg_sq must be torch.float32 \[P\]"),
    ({"exp_avg_sq": torch.zeros(10).long()}, "exp_avg_sq must be floating"),
    ({"count": 3.0}, "count must be a tensor, not float"),
    ({"lr": torch.zeros(1)}, r"lr must be torch.float32 \[\]"),
    ({"lr": torch.zeros((), device="meta")}, "lr is on meta, weights on cpu"),
    ({"healthy": torch.tensor(1)}, "healthy must be a bool tensor"),
    ({"healthy": True}, "healthy must be a bool tensor"),
    ({"half": torch.zeros(10)}, "half must be contiguous bfloat16 or float16"),
    ({"half": torch.zeros(20).half()[::2]}, "half must be contiguous"),
    ({"half": torch.zeros(9).half()}, r"half must be .* \[10\], got torch.float16 \[9\]"),
    ({"grad_clip": 0.0}, "grad_clip must be positive"),
    ({"grad_clip": float("nan")}, "grad_clip must be positive"),
    ({"grad_clip": torch.ones(())}, "grad_clip must be a number, not Tensor"),
    ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got 0.9 and 1.0"),
    ({"betas": 0.9}, "betas must be two numbers, got 0.9"),
    ({"betas": ("a", 0.9)}, r"betas\[0\] must be a number, not str"),
    ({"eps": -1.0}, "eps must be finite and not negative"),
    ({"weight_decay": -1.0}, "weight_decay must be finite"),
    ({"late_weight_decay": float("inf"), "late_from": 3}, "late_weight_decay must be finite"),
    ({"late_weight_decay": 0.1, "late_from": None}, "late_weight_decay needs late_from"),
    ({"late_from": 11}, "late_from must be from 0 to 10, got 11"),
    ({"late_from": -1}, "late_from must be at least 0, got -1"),
    ({"late_from": 1.5}, "late_from must be an integer, not float"),
    ({"impl": "best"}, "unknown impl 'best'"),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_in_one_line(change, said):
    values = problem(10, steps=1)
    arguments = {**values, **SETTINGS, "late_from": 5, **change}
    before = {name: values[name].clone() for name in STATE}
    with pytest.raises((TypeError, ValueError), match=f"^adamw_step: .*{said}") as error:
        ops.adamw_step(**arguments)
    assert "\n" not in str(error.value) and same_bits({name: values[name] for name in STATE}, before)


def test_what_the_kernels_do_not_take_is_refused_or_left_to_the_reference(monkeypatch):
    values = problem(10)
    with pytest.raises(ImplementationError, match="not built"):
        after(values, "native")
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    with pytest.raises(ImplementationError, match="float64"):
        after(doubled(values), "triton")
    monkeypatch.setattr(adamw_step, "_INTERPRETED_DTYPES", (torch.float16,))
    with pytest.raises(ImplementationError, match="bfloat16"):
        after(values, "triton", half=torch.zeros(10).bfloat16())
    # The interpreter is there to test kernels, not to compute with.
    assert same_bits(after(values, "auto"), after(values, "reference"))

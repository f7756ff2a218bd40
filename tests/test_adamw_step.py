"""AdamW with clipping over flat buffers: kernels against float64, against torch, and what a skipped step leaves."""

import pytest
import torch
from interpreter_bf16 import interpreted_bfloat16
from poisoned_memory import poisoned_memory

from kernel_budget import check
from wireframe.kernels import dispatch, ops

pytest.importorskip("triton")

EPS = torch.finfo(torch.float32).eps
HOW = {"grad_clip": 0.7, "betas": (0.9, 0.95), "weight_decay": 0.02, "late_weight_decay": 0.3}
IMPLS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not dispatch.INTERPRETED, reason="interpreter"))]
STATE = ("weights", "exp_avg", "exp_avg_sq", "count")


def problem(size, seed=0, steps=0.0, scale=1.0, dtype=torch.float32, device="cpu"):
    """Values that float32 represents, as after some steps."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda: torch.randn(size, generator=g)  # noqa: E731
    moments = (0.1 * randn(), 0.01 * randn().square()) if steps else (torch.zeros(size), torch.zeros(size))
    values = {
        "weights": randn(), "gradient": scale * randn(), "exp_avg": moments[0], "exp_avg_sq": moments[1],
        "count": torch.tensor(float(steps)), "lr": torch.tensor(3e-4),
    }  # fmt: skip
    return {name: x.to(device, dtype) for name, x in values.items()} | {"healthy": torch.tensor(True, device=device)}


def run(values, impl, late_from=None, **how):
    """The state after a step from copies of the values, and the norm."""
    copies = {name: x.clone() for name, x in values.items()}
    late_from = values["weights"].numel() // 3 if late_from is None else late_from
    norm = ops.adamw_step(**copies, **{**HOW, **how}, late_from=late_from, impl=impl)
    return {name: copies[name] for name in STATE} | {"norm": norm}


def doubled(values):
    return {name: x.double() if x.is_floating_point() else x for name, x in values.items()}


def scales(values, exact):
    """Sums of absolute terms: what a relative rounding error of 1 in every operation could move each result by."""
    clip = min(1.0, HOW["grad_clip"] / exact["norm"].item())
    g, m, v = values["gradient"].abs() * clip, values["exp_avg"].abs(), values["exp_avg_sq"]
    scale_m, scale_v = m + g, v + g.square()
    rest = [1 - beta ** exact["count"].item() for beta in HOW["betas"]]
    root = exact["exp_avg_sq"].sqrt() / rest[1] ** 0.5 + 1e-8
    # m / sqrt(v): the error of m as it is, and that of v, which the root halves.
    update = values["lr"] / rest[0] * (scale_m + exact["exp_avg"].abs() * scale_v / exact["exp_avg_sq"]) / root
    return {"exp_avg": scale_m, "exp_avg_sq": scale_v, "weights": values["weights"].abs() + update}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1, 63, 65, 1000, 20000])
@pytest.mark.parametrize("steps", [0, 1, 9, 170_000])
def test_a_step_lies_within_the_rounding_of_float32(impl, size, steps):
    values = problem(size, steps=steps)
    exact = run(doubled(values), "reference")
    eager = run(values, "reference")
    with poisoned_memory():
        found = run(values, impl)
    double = doubled(values)
    assert found["count"] == steps + 1 and torch.isclose(found["norm"].double(), exact["norm"], rtol=4 * EPS)
    for name, scale in scales(double, exact).items():
        check(name, found[name], exact[name], eager[name], scale, EPS)


@pytest.mark.parametrize("impl", IMPLS)
def test_steps_are_those_of_torch(impl):
    values, size = problem(300, scale=0.05), 300
    decays = (HOW["weight_decay"], HOW["late_weight_decay"])
    parts = [values["weights"][:100].double().requires_grad_(), values["weights"][100:].double().requires_grad_()]
    groups = [{"params": [part], "weight_decay": decay} for part, decay in zip(parts, decays)]
    adamw = torch.optim.AdamW(groups, lr=3e-4, betas=HOW["betas"])
    for step in range(6):
        values["gradient"] = problem(size, seed=step, scale=(step + 1) * 0.02)["gradient"]
        for part, g in zip(parts, (values["gradient"][:100], values["gradient"][100:])):
            part.grad = g.double()
        torch.nn.utils.clip_grad_norm_(parts, HOW["grad_clip"])
        adamw.step()
        values |= {name: x for name, x in run(values, impl, late_from=100).items() if name in STATE}
    torch.testing.assert_close(values["weights"].double(), torch.cat(parts).detach(), rtol=4 * EPS, atol=4 * EPS)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", ["nan", "inf", "overflow", "unhealthy"])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_bad_step_leaves_every_bit(impl, bad, steps):
    values = problem(100, steps=steps)
    half = values["weights"].half()
    if bad == "unhealthy":
        values["healthy"] = torch.tensor(False)
    else:
        values["gradient"][37] = {"nan": torch.nan, "inf": -torch.inf, "overflow": 1e30}[bad]
    before = half.clone()
    copies = {name: x.clone() for name, x in values.items()}
    norm = ops.adamw_step(**copies, **HOW, half=half, impl=impl)
    assert all(torch.equal(copies[name], values[name]) for name in STATE) and torch.equal(half, before)
    assert (bad == "unhealthy") == bool(norm.isfinite())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_copy_is_the_weights_rounded(impl, dtype):
    values, half = problem(1500, steps=2), torch.zeros(1500, dtype=dtype)
    with interpreted_bfloat16():
        ops.adamw_step(**values, **HOW, half=half, impl=impl)
    assert torch.equal(half, values["weights"].to(dtype)) and half.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("late_from", [0, 1, 64, 99, 100])
def test_the_late_decay_begins_where_it_is_told(impl, late_from):
    values = problem(100) | {"lr": torch.tensor(0.5)}
    values["gradient"].zero_()
    found = run(values, impl, late_from=late_from)["weights"]
    decay = torch.where(torch.arange(100) < late_from, HOW["weight_decay"], HOW["late_weight_decay"])
    torch.testing.assert_close(found, values["weights"] * (1 - 0.5 * decay), rtol=2 * EPS, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_rate_of_zero_moves_the_moments_alone(impl):
    values = problem(100, steps=1) | {"lr": torch.tensor(0.0)}
    found = run(values, impl)
    assert torch.equal(found["weights"], values["weights"]) and found["count"] == 2
    assert not torch.equal(found["exp_avg"], values["exp_avg"])


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="interpreter")
def test_repeats_are_equal_and_the_operator_is_sound():
    values = problem(5000, steps=4)
    a, b = run(values, "triton"), run(values, "triton")
    assert all(torch.equal(a[name], b[name]) for name in a)
    tensors = [values[n] for n in ("weights", "gradient", "exp_avg", "exp_avg_sq", "count", "lr", "healthy")]
    numbers = (0.7, 0.9, 0.95, 1e-8, 0.02, 0.3, 1000)
    for half in (None, torch.zeros(5000, dtype=torch.float16)):
        torch.library.opcheck(torch.ops.wireframe.adamw_step, (*tensors, half, *numbers))


@pytest.mark.parametrize(
    "change, text",
    [
        ({"gradient": torch.zeros(9)}, "gradient must be torch.float32 .P. as weights, got torch.float32 .9."),
        ({"exp_avg": torch.zeros(10, dtype=torch.float64)}, "exp_avg must be torch.float32"),
        ({"weights": torch.zeros(20)[::2]}, "weights must be contiguous"),
        ({"lr": torch.zeros(1)}, r"lr must be torch.float32 \[\]"),
        ({"healthy": torch.tensor(1)}, "healthy must be a bool tensor"),
        ({"half": torch.zeros(10)}, "half must be contiguous bfloat16 or float16"),
        ({"grad_clip": 0.0}, "grad_clip must be positive"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ({"eps": -1.0}, "eps must not be negative"),
        ({"weight_decay": -1.0}, "weight decays must not be negative"),
        ({"late_from": 11}, "late_from must be from 0 to 10, got 11"),
        ({"impl": "best"}, "unknown impl"),
    ],
)
def test_what_does_not_fit_is_refused(change, text):
    values = problem(10)
    before = values["weights"].clone()
    with pytest.raises(ValueError, match=text) as problem_:
        ops.adamw_step(**{**values, **HOW, **change})
    assert "\n" not in str(problem_.value) and torch.equal(values["weights"], before)

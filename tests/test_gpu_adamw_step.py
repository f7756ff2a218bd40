"""AdamW over flat buffers on a CUDA device (marker ``gpu``): within the budget, the same bits again and in a graph."""

import pytest
import torch

from adamw_budget import SETTINGS, STATE, after, check_step, doubled, problem, same_bits
from gpu_cases import poisoned
from wireframe.kernels import ops
from wireframe.kernels.determinism import prepare_process

# Before the tests start CUDA.
prepare_process()

pytestmark = pytest.mark.gpu

# Of the published model; an odd number of elements, whose rows of four are never whole; less than a program.
SIZES = [8_855_104, 300_001, 1000, 1]


def results(values, impl="triton"):
    """The state after a step, the norm and the copy, which was 0 before."""
    half = torch.zeros_like(values["weights"], dtype=torch.bfloat16)
    return after(values, impl, half=half) | {"half": half}


def rounded(found):
    """Whether the copy is the weights rounded."""
    return same_bits({"half": found["half"]}, {"half": found["weights"].to(found["half"].dtype)})


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("steps", [0, 1, 170_000])
@pytest.mark.parametrize("size", SIZES)
def test_a_step_lies_within_the_rounding_of_float32(size, steps, impl):
    values = problem(size, steps, device="cuda")
    with poisoned():
        found = results(values, impl)
    print(size, steps, impl, check_step(found, values))
    assert rounded(found)


def test_the_kernels_are_what_is_taken_and_what_the_host_never_waits_for():
    values = problem(10_000, 3, device="cuda")
    wanted = results(values)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = results(values, "auto")
        results(values, "reference")
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert same_bits(found, wanted)


def test_addresses_of_any_alignment_do():
    values = problem(100_003, 3, device="cuda")
    views = {name: torch.cat([x[:1], x])[1:] if x.dim() else x.clone() for name, x in values.items()}
    views["half"] = torch.zeros(100_004, dtype=torch.float16, device="cuda")[1:]
    norm = ops.adamw_step(**views, **SETTINGS, late_from=100_003 // 3)
    check_step(views | {"norm": norm}, values)
    assert rounded(views)


def test_subnormal_squares_have_their_root():
    values = problem(4096, 5, device="cuda")
    values["gradient"].mul_(1e-20)
    values["exp_avg"].mul_(1e-20)
    values["exp_avg_sq"] = values["exp_avg_sq"].mul_(1e-38).clamp_(min=1e-40)
    exact = after(doubled(values), "reference", eps=0.0)["weights"]
    found = after(values, "triton", eps=0.0)["weights"]
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-6)


def test_a_hundred_steps_from_one_state_give_the_same_bits():
    values = problem(SIZES[0], 7, device="cuda")
    first = results(values)
    assert all(same_bits(first, results(values)) for _ in range(100))


@pytest.mark.parametrize("bad", ["nan", "inf", "overflow", "unhealthy"])
def test_a_bad_step_leaves_every_bit(bad):
    values = problem(300_001, 3, device="cuda")
    values["exp_avg"][:3] = torch.tensor([-0.0, torch.inf, torch.nan])
    if bad == "unhealthy":
        values["healthy"].fill_(False)
    else:
        values["gradient"][299_999] = {"nan": torch.nan, "inf": -torch.inf, "overflow": 1e30}[bad]
    for impl in ("triton", "reference"):
        found = results(values, impl)
        assert same_bits({name: found[name] for name in STATE}, {name: values[name] for name in STATE})
        assert not found["half"].any() and bool(found["norm"].isfinite()) == (bad == "unhealthy")


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_replays_of_a_graph_have_the_bits_of_eager_steps(impl):
    start = problem(300_032, 2, device="cuda")
    start["half"] = start["weights"].bfloat16()
    graphed, eager = ({name: x.clone() for name, x in start.items()} for _ in range(2))

    def step(values):
        return ops.adamw_step(**values, **SETTINGS, late_from=1001, impl=impl)

    # Warm up beside the buffers, which neither this nor the capture may change.
    step({name: x.clone() for name, x in start.items()})
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = step(graphed)
    assert same_bits(graphed, start)
    gradients = [problem(300_032, seed=seed, device="cuda")["gradient"] for seed in range(3)]
    applied = 0
    # lr, healthy and count of each step; the fourth has a gradient that is no number.
    for number, (lr, healthy, count) in enumerate(
        [(0.1, True, 2), (0.03, True, 3), (0.03, False, 4), (0.02, True, 4), (0.01, True, 4), (0.5, True, 170_000)]
    ):
        gradient = gradients[number % 3].clone()
        if number == 3:
            gradient[1234] = torch.nan
        for values in (graphed, eager):
            values["gradient"].copy_(gradient)
            values["lr"].fill_(lr)
            values["healthy"].fill_(healthy)
            values["count"].fill_(count)
        before = graphed["weights"].clone()
        graph.replay()
        wanted = step(eager)
        assert same_bits(graphed | {"norm": norm}, eager | {"norm": wanted})
        moved = not torch.equal(before, graphed["weights"])
        assert moved == (healthy and number != 3) == bool(graphed["count"] == count + 1)
        applied += moved
    assert applied == 4 and rounded(graphed)

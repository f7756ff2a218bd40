"""The Triton kernels of sinkhorn, interpreted on the CPU: budgets, branches, masks, memory, bits, compilers."""

import pytest
import torch

pytest.importorskip("triton")
from transport_budget import log_plan_scale, sinkhorn_scale

from interpreter_bf16 import interpreted_bfloat16
from kernel_budget import check
from poisoned_memory import guarded, poisoned_memory
from wireframe.kernels import dispatch, ops
from wireframe.kernels.sinkhorn import lowest_cost

pytestmark = [
    pytest.mark.skipif(not dispatch.INTERPRETED, reason="needs TRITON_INTERPRET=1; see test_gpu_kernels.py"),
    # NumPy warns where a kernel divides by or takes the logarithm of the zero mass of a masked entry.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True, scope="module")
def _bfloat16():
    with interpreted_bfloat16():
        yield


def problem(batch, rows, columns, lowest=0.0, highest=10.0, real="some", seed=0):
    """cost, col_mask and a gradient of log_plan, which is NaN where log_plan is -inf."""
    g = torch.Generator().manual_seed(seed)
    cost = torch.rand(batch, rows, columns, generator=g) * (highest - lowest) + lowest
    mask = torch.rand(batch, columns, generator=g) < {"some": 0.7, "none": 0.0, "all": 1.1}[real]
    if real == "some":
        mask[:, 0] = True
        cost[:, 0, 0] = lowest
    grad = torch.randn(batch, rows + 1, columns + 1, generator=g)
    grad[:, :, :-1] = torch.where(mask[:, None, :], grad[:, :, :-1], torch.nan)
    grad[:, -1] = torch.where(mask.any(1, keepdim=True), grad[:, -1], torch.nan)
    return cost, mask, grad


def results(cost, mask, grad, impl="triton", **settings):
    """log_plan, and dcost of two gradients of log_plan: grad, and grad times the plan."""
    cost = cost.detach().requires_grad_()
    log_plan = ops.sinkhorn(cost, mask, impl=impl, **settings)
    grad = grad.to(log_plan.dtype)
    if impl == "reference":
        # It ignores these too, but not in the product below.
        grad = torch.where(log_plan.isfinite(), grad, 0.0)
    plan = log_plan.detach().exp()
    gradients = [torch.autograd.grad(log_plan, cost, x, retain_graph=True)[0] for x in (grad, grad * plan)]
    return log_plan.detach(), *gradients


def poisoned_results(cost, mask, grad, **settings):
    """Of the kernels, with every allocation poisoned and guarded."""
    with poisoned_memory() as given:
        found = results(guarded(cost), guarded(mask), guarded(grad), **settings)
    assert given
    return found


def check_results(cost, mask, grad, found, **settings):
    exact = results(cost.double(), mask, grad, "reference", **settings)
    eager = results(cost.float(), mask, grad, "reference", **settings)
    assert all(x.dtype == torch.float32 for x in found)
    finite = exact[0].isfinite()
    assert torch.equal(found[0] == -torch.inf, ~finite)
    # -inf is right, and no number.
    log_plans = [torch.where(finite, x[0], 0.0) for x in (found, exact, eager)]
    scale = log_plan_scale(cost, mask, **settings)
    check("log_plan", *log_plans, scale, EPS)
    grad = torch.where(finite, grad, 0.0).double()
    plan = grad * exact[0].exp()
    # The second gradient is as inexact as the plan that it is made of.
    upstream = {"dcost": (grad, grad), "dcost of the plan": (plan, plan * (1 + scale))}
    for (name, gradient), *found_gradients in zip(upstream.items(), found[1:], exact[1:], eager[1:]):
        check(name, *found_gradients, sinkhorn_scale(cost, mask, *gradient, **settings), EPS)
    return exact[0]


def check_plan(log_plan, exact):
    """To 5e-6, or to that share of what is larger than 1."""
    finite = exact.isfinite()
    error = (log_plan.double() - exact).abs()[finite] / exact[finite].abs().clamp(min=1)
    assert (error <= 5e-6).all(), error.max()
    error = (log_plan.double().exp() - exact.exp()).abs() / exact.exp().clamp(min=1)
    assert (error <= 5e-6).all(), error.max()


# (B, N, M), settings of ``problem`` and of the operation. Tiles have sides of 32, 64, 128; above is streamed.
CASES = {
    "one_by_one": ((3, 1, 1), {"real": "all"}, {}),
    "one_row": ((2, 1, 7), {}, {}),
    "one_column": ((2, 9, 1), {}, {}),
    "whole_small_tile": ((1, 32, 32), {"highest": 1.0, "real": "all"}, {}),
    "just_above_a_tile": ((1, 33, 20), {"highest": 2.0}, {}),
    "whole_tile": ((1, 64, 64), {}, {}),
    "whole_tile_close": ((1, 64, 64), {"highest": 1.0, "real": "all"}, {}),
    "odd_sides": ((1, 63, 65), {"highest": 2.0}, {"iters": 7}),
    "largest_resident": ((1, 128, 128), {"highest": 1.0}, {"iters": 5}),
    "streamed_rows": ((1, 130, 20), {"highest": 1.0}, {"iters": 4}),
    "streamed_columns": ((1, 5, 129), {}, {"iters": 4}),
    "largest": ((1, 256, 256), {"highest": 2.0}, {"iters": 1}),
    "one_iteration": ((2, 20, 30), {"highest": 2.0}, {"iters": 1}),
    "two_iterations": ((2, 20, 30), {"highest": 2.0}, {"iters": 2}),
    "one_iteration_streamed": ((1, 5, 4), {"lowest": -20.0}, {"iters": 1}),
    "no_real_column": ((2, 10, 7), {"real": "none"}, {}),
    "no_real_column_streamed": ((1, 130, 3), {"real": "none"}, {"iters": 2}),
    "negative": ((2, 20, 30), {"lowest": -5.0}, {}),
    "small_eps": ((2, 10, 9), {"highest": 1.0}, {"eps": 0.01}),
    "large_dustbin": ((1, 20, 9), {}, {"dustbin": 3.1}),
    "cheap_dustbin": ((1, 5, 9), {"highest": 1.0}, {"dustbin": -1.0}),
    "far_below_zero": ((2, 20, 30), {"lowest": -20.0}, {}),
    "many_iterations": ((1, 5, 4), {}, {"iters": 61, "dustbin": 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_results_lie_within_the_budget(case):
    sizes, data, settings = CASES[case]
    inputs = problem(*sizes, **data)
    found = poisoned_results(*inputs, **settings)
    exact = check_results(*inputs, found, **settings)
    # At -20, scores lie so far apart that no float32 gets there.
    if data.get("lowest", 0.0) > -20:
        check_plan(found[0], exact)
    assert all(x.isfinite().all() for x in found[1:])


# The smallest cost, the dustbin, and whether the scaling form holds: 2 max(dustbin, 0) + max(-cost, 0) <= 6.4.
GUARD = [
    (-6.39, 0.0, True), (-6.41, 0.0, False), (-5.79, 0.3, True), (-5.81, 0.3, False), (-6.39, -2.0, True),
    (0.0, 3.19, True), (0.0, 3.21, False), (4.0, 3.21, False),
]  # fmt: skip


@pytest.mark.parametrize("lowest, dustbin, scaling", GUARD)
def test_both_sides_of_the_guard_lie_within_the_budget(lowest, dustbin, scaling):
    inputs = problem(1, 12, 9, lowest=lowest, highest=8.0, seed=3)
    assert not inputs[1].all()
    found = poisoned_results(*inputs, dustbin=dustbin)
    check_plan(found[0], check_results(*inputs, found, dustbin=dustbin))
    *_, v = torch.ops.wireframe.sinkhorn(*inputs[:2], 0.1, 2, dustbin, True)
    # In scaling form a masked column's scaling is 0, otherwise its logarithm is -inf.
    assert (v[:, :, :-1][:, :, ~inputs[1][0]] == (0.0 if scaling else -torch.inf)).all()
    assert (lowest >= lowest_cost(0.1, dustbin)) == scaling


def test_the_smallest_cost_of_the_real_columns_alone_decides():
    cost, mask, _ = problem(2, 6, 5, real="all")
    mask[:, 2] = False
    cost[:, :, 2] = -100.0
    cost[1, 3, 3] = -7.0
    *_, v = torch.ops.wireframe.sinkhorn(cost, mask, 0.1, 2, 0.3, True)
    assert (v[0, :, 2] == 0).all() and (v[1, :, 2] == -torch.inf).all()


@pytest.mark.parametrize("rows, iters", [(9, 20), (130, 2)])
def test_infinite_costs_forbid_a_pair(rows, iters):
    cost, mask, grad = problem(1, rows, 6, real="all")
    cost[0, 2, 3] = torch.inf
    found = poisoned_results(cost, mask, grad, iters=iters)
    assert found[0][0, 2, 3] == -torch.inf
    # An infinite log_plan has no finite product with its plan; to float32 a cost of 1e4 forbids as much.
    cost[0, 2, 3], found[2][0, 2, 3] = 1e4, 0.0
    found[0][0, 2, 3] = results(cost.double(), mask, grad, "reference", iters=iters)[0][0, 2, 3]
    check_results(cost, mask, grad, found, iters=iters)


@pytest.mark.parametrize("rows, lowest, poison", [(9, 0.0, torch.nan), (9, -20.0, torch.nan), (9, 0.0, -torch.inf),
                                                  (130, 0.0, torch.nan)])  # fmt: skip
def test_what_masked_columns_and_their_gradients_hold_changes_no_bit(rows, lowest, poison):
    cost, mask, grad = problem(2, rows, 5, lowest=lowest)
    mask[1] = False
    spoilt = torch.where(mask[:, None, :], cost, poison)
    seen = torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], 1)[:, None, :].expand(-1, rows + 1, -1).clone()
    seen[1, -1] = False
    clean = results(torch.where(mask[:, None, :], cost, 1.0), mask, torch.where(seen, grad, 0.0), iters=2)
    dirty = results(spoilt, mask, torch.where(seen, grad, poison), iters=2)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty))
    # Exactly: all mass of the second problem is in the dustbin, and its gradient is 0.
    assert (dirty[0][1, :-1, -1] == 0).all() and not dirty[1][1].any() and dirty[1].isfinite().all()
    assert not dirty[1].transpose(1, 2)[~mask].any() and dirty[1][0].any()


@pytest.mark.parametrize("batch, rows, columns", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0)])
def test_problems_without_entries_are_those_of_the_reference(batch, rows, columns):
    cost, mask = torch.zeros(batch, rows, columns, requires_grad=True), torch.ones(batch, columns, dtype=torch.bool)
    mask[1:] = False
    with poisoned_memory():
        found = ops.sinkhorn(cost, mask, impl="triton")
        (dcost,) = torch.autograd.grad(found.sum(), cost)
    torch.testing.assert_close(found, ops.sinkhorn(cost, mask, impl="reference"))
    assert dcost.shape == cost.shape and not dcost.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_costs_are_computed_in_float32(dtype):
    cost, mask, grad = problem(2, 9, 7, lowest=-1.0)
    for low in (0.0, -20.0):
        half = (cost + low).to(dtype)
        found, expected = (results(x, mask, grad, iters=3) for x in (half, half.float()))
        assert torch.equal(found[0], expected[0]) and found[0].dtype == torch.float32
        assert all(a.dtype == dtype and torch.equal(a, b.to(dtype)) for a, b in zip(found[1:], expected[1:]))


def test_strides_change_no_bit():
    cost, mask, grad = problem(2, 9, 7)
    expected = results(cost, mask, grad, iters=3)
    apart = torch.full((2, 9, 7, 2), torch.nan)
    apart[..., 0] = cost
    forms = (
        (cost.transpose(1, 2).contiguous().transpose(1, 2), mask, grad),
        (apart[..., 0], torch.stack([mask, ~mask], 2)[..., 0], torch.stack([grad, grad], 3)[..., 1]),
    )
    for form in forms:
        assert not form[0].is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(results(*form, iters=3), expected))


def test_expanded_costs_and_gradients_give_the_bits_of_their_copies():
    cost, mask, _ = problem(1, 9, 7)
    inputs = cost.expand(3, -1, -1), mask.expand(3, -1), torch.ones(1).expand(3, 10, 8)
    copies = (x.contiguous() for x in inputs)
    found = results(*inputs, iters=3)
    assert all(torch.equal(a, b) for a, b in zip(found, results(*copies, iters=3)))
    assert torch.equal(found[0][0], found[0][2])


@pytest.mark.parametrize("rows, batch", [(9, 3), (130, 2)])
def test_bits_do_not_depend_on_the_call_nor_on_the_batch(rows, batch):
    cost, mask, grad = problem(batch, rows, 7)
    # One of the problems is beyond the guard.
    cost[1] -= 9.0
    together = results(cost, mask, grad, iters=2)
    assert all(torch.equal(a, b) for a, b in zip(together, results(cost, mask, grad, iters=2)))
    for i in range(batch):
        alone = results(cost[i : i + 1], mask[i : i + 1], grad[i : i + 1], iters=2)
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone))


@pytest.mark.parametrize("rows, lowest", [(9, 0.0), (9, -20.0), (130, 0.0)])
def test_nothing_is_saved_where_no_gradient_is_wanted(rows, lowest):
    cost, mask, grad = problem(2, rows, 7, lowest=lowest)
    expected = results(cost, mask, grad, iters=3)[0]
    with poisoned_memory():
        log_plan, u, v = torch.ops.wireframe.sinkhorn(cost, mask, 0.1, 3, 0.3, False)
    assert u.shape == (2, 0, rows + 1) and v.shape == (2, 0, 8) and torch.equal(log_plan, expected)
    with torch.no_grad():
        assert torch.equal(ops.sinkhorn(cost.requires_grad_(), mask, iters=3, impl="triton"), expected)


def test_autocast_changes_no_bit():
    inputs = problem(2, 9, 7)
    expected = results(*inputs, iters=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(results(*inputs, iters=3), expected))


@pytest.mark.parametrize("sizes, dtype, word", [
    ((1, 257, 3), torch.float32, "256"), ((1, 3, 257), torch.float32, "257"), ((1, 3, 4), torch.float64, "float32"),
])  # fmt: skip
def test_what_is_beyond_the_kernels_is_refused_and_left_to_the_reference_by_auto(sizes, dtype, word):
    cost, mask = torch.ones(sizes, dtype=dtype), torch.ones(sizes[0], sizes[2], dtype=torch.bool)
    with pytest.raises(dispatch.ImplementationError, match=word):
        ops.sinkhorn(cost, mask, iters=1, impl="triton")
    assert torch.equal(ops.sinkhorn(cost, mask, iters=1), ops.sinkhorn(cost, mask, iters=1, impl="reference"))


@pytest.mark.parametrize("sizes", [(2, 5, 4), (2, 3, 0)])
def test_the_registered_operators_pass_opcheck(sizes):
    cost, mask, grad = problem(*sizes, real="all")
    arguments = (mask, 0.1, 2, 0.3, True)
    torch.library.opcheck(torch.ops.wireframe.sinkhorn.default, (cost.clone().requires_grad_(), *arguments))
    _, u, v = torch.ops.wireframe.sinkhorn(cost, *arguments)
    torch.library.opcheck(torch.ops.wireframe.sinkhorn_backward.default, (grad, cost, mask, u, v, 0.1, 0.3))


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_a_compiled_call_is_one_graph_with_the_same_bits(impl):
    cost, mask, grad = problem(2, 9, 7, real="all")
    torch.compiler.reset()
    compiled = torch.compile(
        lambda c, m: ops.sinkhorn(c, m, iters=3, impl=impl), fullgraph=True, backend="aot_eager"
    )
    found = []
    for function in (compiled, lambda c, m: ops.sinkhorn(c, m, iters=3, impl=impl)):
        leaf = cost.clone().requires_grad_()
        log_plan = function(leaf, mask)
        found.append((log_plan.detach(), *torch.autograd.grad(log_plan, leaf, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*found))

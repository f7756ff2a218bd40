"""The Triton kernels of segment_cost and segment_matching, interpreted on the CPU: budgets, branches, masks, bits."""

import pytest
import torch

pytest.importorskip("triton")
from transport_budget import cost_scale, cost_scales, matching_scales

from interpreter_bf16 import interpreted_bfloat16
from kernel_budget import check
from poisoned_memory import guarded, poisoned_memory
from wireframe.kernels import dispatch, launch, ops

pytestmark = [
    pytest.mark.skipif(not dispatch.INTERPRETED, reason="needs TRITON_INTERPRET=1; see test_gpu_kernels.py"),
    # NumPy warns where a kernel divides by or takes the logarithm of the zero mass of a masked entry.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
EPS = torch.finfo(torch.float32).eps
WEIGHTS = (1.0, 0.5, 0.7)


@pytest.fixture(autouse=True, scope="module")
def _bfloat16():
    with interpreted_bfloat16():
        yield


@pytest.fixture
def launched(monkeypatch):
    """The number of kernels of each launch.run."""
    counts, run = [], launch.run

    def counting(launches):
        launches = list(launches)
        counts.append(len(launches))
        run(launches)

    monkeypatch.setattr(launch, "run", counting)
    return counts


def segments(batch, rows, columns, seed=0):
    """pred, target, target_mask: no two segments alike, none short."""
    g = torch.Generator().manual_seed(seed)
    pred, target = (0.3 * torch.randn(batch, count, 2, 3, generator=g) for count in (rows, columns))
    for x in (pred, target):
        x[:, :, 1] += 0.4 * torch.sign(x[:, :, 1] - x[:, :, 0])
    mask = torch.rand(batch, columns, generator=g) < 0.7
    mask[:1, :1] = True
    return pred, target, mask


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def cost_results(pred, target, grad, impl="triton", weights=WEIGHTS):
    inputs = [x.detach().requires_grad_() for x in (pred, target)]
    cost = ops.segment_cost(*inputs, weights=weights, impl=impl)
    return cost.detach(), *torch.autograd.grad(cost, inputs, grad.to(cost.dtype))


def matching_results(pred, target, mask, grad, impl="triton", weights=WEIGHTS, **settings):
    inputs = [x.detach().requires_grad_() for x in (pred, target)]
    loss, plan = ops.segment_matching(*inputs, mask, weights=weights, impl=impl, **settings)
    assert not plan.requires_grad
    return loss.detach(), plan, *torch.autograd.grad(loss, inputs, grad.to(loss.dtype))


def poisoned(function, *inputs, **settings):
    """The kernels' results with every allocation poisoned and guarded."""
    with poisoned_memory() as given:
        found = function(*(guarded(x) for x in inputs), **settings)
    assert given
    return found


def same(first, second):
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("sizes", [(2, 1, 1), (2, 5, 4), (1, 64, 64), (1, 33, 65), (1, 130, 3), (1, 1, 70)])
def test_cost_and_its_gradients_lie_within_the_budget(sizes):
    pred, target, _ = segments(*sizes)
    grad = randn(*sizes)
    found = poisoned(cost_results, pred, target, grad)
    exact = cost_results(pred.double(), target.double(), grad, "reference")
    eager = cost_results(pred, target, grad, "reference")
    scales = (cost_scale(pred, target, WEIGHTS), *cost_scales(pred, target, grad, WEIGHTS))
    for name, *tensors in zip(("cost", "dpred", "dtarget"), found, exact, eager, scales):
        check(name, *tensors, EPS)


# Numbers that float32 holds, and all results of which it holds or nearly.
POINT, SHORT = [[0.5, 0, 0], [0.5, 0, 0]], [[0.5, 0, 0], [0.5, 0, 2.0**-21]]
SHORTER, LONG = [[0, 0.25, 0], [2.0**-22, 0.25, 0]], [[0.25, 0, 0], [0.75, 0, 0]]
ACROSS, ALONG = [[0, 0.25, 0], [0, 0.75, 0]], [[-0.5, 0, 0], [1.5, 0, 0]]


def test_degenerate_segments_follow_the_conventions_of_the_reference():
    # Length 0 and below 1e-6, equal midpoints, lengths and directions, right angles.
    pred = torch.tensor([[POINT, SHORT, SHORTER, LONG, ACROSS, ALONG]])
    grad = torch.arange(1, 37).reshape(1, 6, 6).float()
    found = cost_results(pred, pred.clone(), grad)
    exact = cost_results(pred.double(), pred.double(), grad, "reference")
    for a, b in zip(found, exact):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
    assert found[0][0, 0, 0] == WEIGHTS[1]
    mask = torch.tensor([[True, True, False, True, True, True]])
    found = matching_results(pred, pred.clone(), mask, torch.ones(1), iters=3)
    exact = matching_results(pred.double(), pred.double(), mask, torch.ones(1), "reference", iters=3)
    for a, b in zip(found, exact):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_one_side_alone_is_one_launch(launched):
    pred, target, _ = segments(2, 5, 4)
    expected = cost_results(pred, target, torch.ones(2, 5, 4))
    del launched[:]
    for side in (0, 1):
        inputs = [pred.clone(), target.clone()]
        inputs[side].requires_grad_()
        ops.segment_cost(*inputs, weights=WEIGHTS, impl="triton").sum().backward()
        assert torch.equal(inputs[side].grad, expected[1 + side]) and inputs[1 - side].grad is None
    assert launched == [1, 1, 1, 1]


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_without_segments_on_one_side_nothing_is_pulled(sizes):
    pred, target, mask = segments(*sizes)
    found = poisoned(cost_results, pred, target, torch.ones(sizes))
    assert found[0].shape == sizes and not found[1].any() and not found[2].any()
    found = poisoned(matching_results, pred, target, mask, torch.ones(sizes[0]))
    assert [x.shape for x in found] == [sizes[:1], sizes, pred.shape, target.shape] and not any(x.any() for x in found)


# Sizes, settings, and whether cost, iterations and loss are one kernel.
CASES = {
    "one_by_one": ((2, 1, 1), {}, True),
    "small": ((2, 9, 7), {}, True),
    "whole_tile": ((1, 64, 64), {"iters": 7}, True),
    "odd_sides": ((1, 63, 65), {"iters": 3}, True),
    "largest_fused": ((1, 128, 100), {"iters": 2}, True),
    "one_iteration": ((2, 9, 7), {"iters": 1}, True),
    "two_iterations": ((2, 9, 7), {"iters": 2}, True),
    "small_eps": ((1, 9, 7), {"eps": 0.01}, True),
    "dustbin_at_the_guard": ((1, 9, 7), {"dustbin": 3.19}, True),
    "dustbin_above_the_guard": ((1, 9, 7), {"dustbin": 3.21}, False),
    "a_weight_of_0": ((1, 9, 7), {"weights": (1.0, 0.0, 0.5)}, True),
    "a_weight_below_0": ((1, 9, 7), {"weights": (1.0, -0.2, 0.5)}, False),
    "more_rows": ((1, 130, 7), {"iters": 2}, False),
    "more_columns": ((1, 7, 129), {"iters": 2}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_matching_lies_within_the_budget(case, launched):
    sizes, settings, fused = CASES[case]
    pred, target, mask = segments(*sizes)
    settings = {"weights": WEIGHTS, **settings}
    grad = randn(sizes[0])
    found = poisoned(matching_results, pred, target, mask, grad, **settings)
    # Forward and backward: the cost, and the iterations, or both in one kernel.
    assert launched == ([1, 1] if fused else [1, 1, 1, 2])
    exact = matching_results(pred.double(), target.double(), mask, grad, "reference", **settings)
    eager = matching_results(pred, target, mask, grad, "reference", **settings)
    scales = matching_scales(pred, target, mask, grad, **settings)
    for (name, scale), *tensors in zip(scales._asdict().items(), found, exact, eager):
        check(name, *tensors, scale, EPS)
    # The terms of the gradients cancel to a thousandth, and the budget with them; float32 does better than it must.
    for a, b, c in zip(found, exact, eager):
        assert (a - b).norm() <= 2 * (c - b).norm() + 5e-6 * b.norm()
    assert (found[1].double() - exact[1]).abs().max() <= 5e-6
    assert not found[1].transpose(1, 2)[~mask].any() and not found[3][~mask].any()
    assert all(x.dtype == torch.float32 for x in found)


def test_matching_without_a_real_target_is_zero():
    pred, target, mask = segments(2, 5, 4)
    mask[1] = False
    for columns in (mask, torch.zeros_like(mask)):
        found = poisoned(matching_results, pred, torch.full_like(target, torch.nan), columns, torch.ones(2), iters=3)
        empty = slice(1, None) if columns is mask else slice(None)
        assert not any(x[empty].any() for x in found)


@pytest.mark.parametrize("rows, settings", [(9, {"iters": 3}), (9, {"dustbin": 4.0, "iters": 3}), (130, {"iters": 1})])
def test_what_masked_targets_hold_changes_no_bit(rows, settings):
    pred, target, mask = segments(2, rows, 7)
    expected = matching_results(pred, target, mask, torch.ones(2), **settings)
    for poison in (torch.nan, torch.inf):
        spoilt = torch.where(mask[:, :, None, None], target, poison)
        found = matching_results(pred, spoilt, mask, torch.ones(2), **settings)
        assert same(found, expected) and all(x.isfinite().all() for x in found)


def test_the_plan_keeps_the_shares_of_targets_far_from_all_rows():
    pred, target, mask = segments(1, 9, 3)
    mask[:] = True
    # Its costs are about 8 and its plan some 1e-36, which no float32 product of scalings and K holds exactly.
    target[0, 1] += 4.7
    _, plan = ops.segment_matching(pred, target, mask, weights=WEIGHTS, impl="triton")
    exact = ops.segment_matching(pred.double(), target.double(), mask, weights=WEIGHTS)[1]
    assert 1.2e-38 < exact[0, :, 1].min() < 1e-35
    torch.testing.assert_close(plan.double(), exact, rtol=1e-4, atol=1e-44)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_segments_are_computed_in_float32(dtype):
    pred, target, mask = segments(2, 9, 7)
    pred, target = pred.to(dtype), target.to(dtype)

    def run(*inputs):
        found = cost_results(*inputs, torch.ones(2, 9, 7))
        return *found, *matching_results(*inputs, mask, torch.ones(2), iters=3)

    found, expected = run(pred, target), run(pred.float(), target.float())
    dtypes = [torch.float32, dtype, dtype, torch.float32, torch.float32, dtype, dtype]
    assert same(found, [x.to(given) for x, given in zip(expected, dtypes)])


def test_strides_change_no_bit():
    pred, target, mask = segments(2, 9, 7)
    grads = randn(2, 9, 7), randn(2)
    expected = (*cost_results(pred, target, grads[0]), *matching_results(pred, target, mask, grads[1], iters=3))
    forms = [torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0] for x in (pred, target, *grads)]
    forms[0] = pred.permute(1, 3, 2, 0).contiguous().permute(3, 0, 2, 1)
    other = torch.stack([mask, ~mask], 2)[..., 0]
    assert not any(x.is_contiguous() for x in (*forms, other))
    found = (*cost_results(*forms[:3]), *matching_results(*forms[:2], other, forms[3], iters=3))
    assert same(found, expected)


def test_expanded_segments_and_a_sum_of_losses_give_the_bits_of_copies():
    pred, target, mask = (x.expand(3, *x.shape[1:]) for x in segments(1, 9, 7))
    one = torch.ones(1)
    found = cost_results(pred, target, one.expand(3, 9, 7))
    found += matching_results(pred, target, mask, one.expand(3), iters=3)
    pred, target, mask = (x.contiguous() for x in (pred, target, mask))
    expected = cost_results(pred, target, torch.ones(3, 9, 7))
    assert same(found, expected + matching_results(pred, target, mask, torch.ones(3), iters=3))


@pytest.mark.parametrize("rows", [9, 130])
def test_bits_do_not_depend_on_the_call_nor_on_the_batch(rows):
    pred, target, mask = segments(2, rows, 5)
    grads = randn(2, rows, 5), randn(2)

    def run(part):
        inputs = pred[part], target[part]
        return *cost_results(*inputs, grads[0][part]), *matching_results(*inputs, mask[part], grads[1][part], iters=1)

    together = run(slice(None))
    assert same(together, run(slice(None)))
    for i in range(2):
        assert same([x[i : i + 1] for x in together], run(slice(i, i + 1)))


def test_nothing_is_saved_where_no_gradient_is_wanted():
    pred, target, mask = segments(2, 9, 7)
    expected = matching_results(pred, target, mask, torch.ones(2), iters=3)[:2]
    with poisoned_memory():
        loss, plan, u, v = torch.ops.wireframe.segment_matching(pred, target, mask, *WEIGHTS, 0.1, 3, 0.3, False)
    assert u.shape == (2, 0, 10) and v.shape == (2, 0, 8) and same((loss, plan), expected)
    with torch.no_grad():
        found = ops.segment_matching(pred.requires_grad_(), target, mask, weights=WEIGHTS, iters=3, impl="triton")
    assert same(found, expected)


def test_autocast_changes_no_bit():
    pred, target, mask = segments(2, 9, 7)

    def run():
        found = cost_results(pred, target, torch.ones(2, 9, 7))
        return *found, *matching_results(pred, target, mask, torch.ones(2), iters=3)

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(run(), expected)


def test_what_is_beyond_the_kernels_is_refused_and_left_to_the_reference_by_auto():
    for sizes, dtype, word in (((1, 257, 1), torch.float32, "257"), ((1, 2, 3), torch.float64, "float32")):
        pred, target, mask = segments(*sizes)
        inputs = pred.to(dtype), target, mask
        with pytest.raises(dispatch.ImplementationError, match=word):
            ops.segment_matching(*inputs, iters=1, impl="triton")
        assert same(ops.segment_matching(*inputs, iters=1), ops.segment_matching(*inputs, iters=1, impl="reference"))
        if dtype == torch.float64:
            with pytest.raises(dispatch.ImplementationError, match=word):
                ops.segment_cost(*inputs[:2], impl="triton")
            assert torch.equal(ops.segment_cost(*inputs[:2]), ops.segment_cost(*inputs[:2], impl="reference"))


@pytest.mark.parametrize("sizes", [(2, 5, 4), (2, 3, 0)])
def test_the_registered_operators_pass_opcheck(sizes):
    pred, target, mask = segments(*sizes)
    operators, grads = torch.ops.wireframe, (torch.ones(sizes), torch.ones(2))
    leaves = pred.clone().requires_grad_(), target.clone().requires_grad_()
    torch.library.opcheck(operators.segment_cost.default, (*leaves, *WEIGHTS))
    torch.library.opcheck(operators.segment_cost_backward.default, (grads[0], pred, target, *WEIGHTS, [True, False]))
    settings = (*WEIGHTS, 0.1, 2, 0.3, True)
    torch.library.opcheck(operators.segment_matching.default, (*leaves, mask, *settings))
    *_, u, v = operators.segment_matching(pred, target, mask, *settings)
    arguments = (grads[1], pred, target, mask, u, v, *WEIGHTS, 0.1, 0.3)
    torch.library.opcheck(operators.segment_matching_backward.default, arguments)


@pytest.mark.parametrize("rows, impl", [(9, "triton"), (130, "triton"), (9, "auto")])
def test_a_compiled_call_is_one_graph_with_the_same_bits(rows, impl):
    pred, target, mask = segments(1, rows, 5)
    torch.compiler.reset()

    def both(pred, target, mask):
        loss, plan = ops.segment_matching(pred, target, mask, weights=WEIGHTS, iters=2, impl=impl)
        return loss, plan, ops.segment_cost(pred, target, weights=WEIGHTS, impl=impl)

    found = []
    for function in (torch.compile(both, fullgraph=True, backend="aot_eager"), both):
        leaves = [x.clone().requires_grad_() for x in (pred, target)]
        loss, plan, cost = function(*leaves, mask)
        grads = torch.autograd.grad(loss.sum() + cost.square().sum(), leaves)
        found.append([x.detach() for x in (loss, plan, cost, *grads)])
    assert same(*found)

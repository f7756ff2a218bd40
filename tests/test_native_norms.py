"""The model's operations by wireframe._C on the CPU: budgets, memory, masks, what they leave to the reference."""

import pytest
import torch

from kernel_budget import AttentionProblem, attention_budget, attention_problem, run_attention
from norm_budget import check_budget, make_problem, run
from wireframe.kernels import dispatch, native, norms_native, ops
from wireframe.kernels.dispatch import ImplementationError

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(native.problem() is not None, reason="needs wireframe._C"),
]

FLOATS = (torch.float32,) * 3
# Rows of one number, shorter than eight lanes, of no multiple of eight; more rows than are added in float; no rows.
SHAPES = [(1, 1), (2, 3, 3), (3, 2, 3, 65), (2, 8, 256), (1, 70, 20), (1, 3, 1024), (3, 130, 128)]
# (B, Nq, Nk, H, Hkv, D) and whether keys are masked.
ATTENTION = [
    ((1, 1, 1, 1, 1, 32), False), ((2, 5, 7, 4, 2, 32), True), ((2, 63, 65, 3, 1, 20), True),
    ((1, 64, 512, 4, 2, 64), True), ((2, 9, 31, 4, 4, 128), False),
]  # fmt: skip


def native_attention(*inputs):
    return ops.qk_norm_attention(*inputs, impl="native")


def same_bits(first, second):
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("given", ["total normed", "normed", "total", "normed copy"])
@pytest.mark.parametrize("dropout", [False, True])
def test_residual_norm_lies_within_the_budget(shape, given, dropout):
    problem = make_problem(*shape, dtypes=FLOATS, given=given, dropout=dropout)
    check_budget(problem, run(problem, "native"))


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_lies_within_the_budget(shape):
    problem = make_problem(*shape, dtypes=FLOATS, branch=False, dropout=False, given="normed")
    check_budget(problem, run(problem, "native"))


@pytest.mark.parametrize("shape, masked", ATTENTION)
def test_attention_lies_within_the_budget(shape, masked):
    problem = attention_problem(*shape, mask=masked)
    attention_budget(problem).check(run_attention(native_attention, problem))


def test_short_vectors_and_overflowing_ones_are_those_of_the_reference():
    q, k, v, log_scale = attention_problem(1, 4, 4, 2, 1, 32)[:4]
    for factor in (0.0, 1e-30, 1e-13, 1e25):
        changed = AttentionProblem(q * factor, k * factor, v, log_scale, None, torch.ones_like(q))
        found, expected = (
            run_attention(lambda *x, i=impl: ops.qk_norm_attention(*x, impl=i), changed)
            for impl in ("native", "reference")
        )
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_masked_keys_hold_changes_no_bit(poison):
    problem = attention_problem(3, 5, 40, 4, 2, 32, mask=True)
    problem.key_mask[1] = False
    mask = problem.key_mask[..., None, None]
    poisoned = problem._replace(
        k=torch.where(mask, problem.k, poison), v=torch.where(mask, problem.v, poison)
    )
    clean, found = (run_attention(native_attention, x) for x in (problem, poisoned))
    assert same_bits(clean, found)
    assert not found.out[1].any() and not any(x[1].any() for x in (found.dq, found.dk, found.dv))


def test_a_mask_that_leaves_nothing_out_and_neighbours_that_have_one_change_no_bit():
    problem = attention_problem(2, 16, 96, 4, 2, 32)
    none, ones = (run_attention(native_attention, problem._replace(key_mask=x)) for x in (None, torch.ones(2, 96) > 0))
    assert same_bits(none, ones)
    mixed = problem._replace(key_mask=torch.stack([torch.ones(96) > 0, torch.arange(96) % 3 > 0]))
    beside = run_attention(native_attention, mixed)
    first = ("out", "dq", "dk", "dv")
    assert same_bits([getattr(beside, x)[0] for x in first], [getattr(none, x)[0] for x in first])


@pytest.mark.parametrize("view", [
    lambda x: x.expand(2, *x.shape[1:]), lambda x: x.flip(1), lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x[..., ::2],
])  # fmt: skip
def test_views_give_what_their_copies_give(view):
    x, weight = torch.randn(1, 6, 16), torch.rand(16)
    seen = view(x)
    weight = weight[: seen.shape[-1]]
    heads = view(torch.randn(1, 6, 3, 16))
    for tensor, call in (
        (seen, lambda t: ops.residual_norm(t, t, weight, impl="native")[:2]),
        (seen, lambda t: [ops.rms_norm(t, weight, impl="native")]),
        (heads, lambda t: [norms_native.unit_heads(t)]),
    ):
        assert same_bits(call(tensor), call(tensor.clone(memory_format=torch.contiguous_format)))


def test_a_row_has_its_bits_beside_any_others():
    problem = make_problem(4, 20, 64, dtypes=FLOATS, dropout=False)
    whole, some = run(problem, "native"), run(problem.scenes([2, 0]), "native")
    for name in ("total", "normed", "dx", "dbranch"):
        assert same_bits([whole[name][[2, 0]]], [some[name]])


def test_nothing_gives_nothing():
    x, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    gradients = torch.autograd.grad(ops.residual_norm(x, x, weight, impl="native").normed.sum(), [x, weight])
    assert [g.shape for g in gradients] == [(0, 4), (4,)] and not gradients[1].any()
    assert ops.rms_norm(torch.zeros(3, 0), torch.zeros(0), impl="native").shape == (3, 0)
    assert native_attention(torch.zeros(0, 2, 2, 32), *[torch.zeros(0, 3, 1, 32)] * 2, torch.zeros(2)).shape[0] == 0


def test_auto_takes_it_for_float32_and_leaves_the_rest_to_the_reference(monkeypatch):
    x, weight = torch.randn(3, 4, 32), torch.ones(32)
    heads, log_scale = torch.randn(1, 3, 2, 32), torch.zeros(2)
    calls = {
        "rms_norm": lambda t, **how: ops.rms_norm(t, weight, **how),
        "residual_norm": lambda t, **how: ops.residual_norm(t, t, weight, **how).normed,
        "qk_norm_attention": lambda t, **how: ops.qk_norm_attention(*[heads.to(t.dtype)] * 3, log_scale, **how),
        "qk_norm_attention_kvpacked": lambda t, **how: ops.qk_norm_attention_kvpacked(
            heads.to(t.dtype), torch.stack([heads.to(t.dtype)] * 2, 2), log_scale, **how
        ),
    }
    assert set(calls) == {op for op in dispatch.MODEL_OPS if "native" in dispatch.BUILT[op]}
    for op, call in calls.items():
        assert same_bits([call(x)], [call(x, impl="native")])
        for dtype in (torch.float64, torch.bfloat16):
            assert torch.equal(call(x.to(dtype)), call(x.to(dtype), impl="reference"))
            with pytest.raises(ImplementationError, match=f"{op}: impl 'native' cannot run: it computes in float32"):
                call(x.to(dtype), impl="native")
        assert torch.equal(
            torch.compile(call, backend="eager", fullgraph=True)(x), call(x, impl="reference")
        ), "compiled code has the reference to fuse"
    with monkeypatch.context() as patch:
        patch.setattr(native, "problem", lambda name="_C": "it is not built")
        for call in calls.values():
            assert torch.equal(call(x), call(x, impl="reference"))
            with pytest.raises(ImplementationError, match="it is not built"):
                call(x, impl="native")
    with pytest.raises(ImplementationError, match="no native implementation for meta tensors"):
        ops.rms_norm(x.to("meta"), weight.to("meta"), impl="native")


def test_a_second_derivative_is_refused():
    x = torch.randn(2, 8, requires_grad=True)
    (first,) = torch.autograd.grad(ops.rms_norm(x, torch.ones(8), impl="native").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_buffers_that_do_not_fit_are_refused_before_anything_is_written():
    module, x = native.module(), torch.zeros(3, 4).numpy()
    weight, out = torch.zeros(4).numpy(), torch.ones(3, 4).numpy()
    for arguments, word in (
        ((x[:, ::2], None, weight[:2], 1e-6, None, out[:, :2].copy()), "rows in one piece"),
        ((x, x[:2], weight, 1e-6, out, out), "branch does not have the rows"),
        ((x.astype("float64"), None, weight, 1e-6, None, out), "x must be float32"),
        ((x, None, weight, 1e-6, None, out[:2]), "normed does not have the rows"),
        ((x, None, weight[:3], 1e-6, None, out), "x must have rows of 3"),
    ):
        with pytest.raises((TypeError, ValueError), match=word):
            module.rms_norm(*arguments)
    with pytest.raises(ValueError, match="mask does not have the rows"):
        module.unit_heads(None, x, 2, 2, None, torch.ones(2).bool().numpy(), out, None)
    assert (out == 1).all()

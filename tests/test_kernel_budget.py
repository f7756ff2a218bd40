import pytest
import torch
import torch.nn.functional as F

from kernel_budget import attention_budget, attention_problem, check, run_attention
from poisoned_memory import guarded, poisoned_memory
from wireframe.kernels.reference import qk_norm_attention_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rounding_attention(q, k, v, log_scale, key_mask, project=True):
    """Attention that rounds its weights to the dtype; without ``project`` the gradient is not projected off q^."""
    group = q.shape[2] // k.shape[2]
    if project:
        unit_q = F.normalize(q.float(), dim=-1, eps=1e-12)
    else:
        unit_q = q.float() / q.detach().float().norm(dim=-1, keepdim=True)
    unit_k, values = (x.repeat_interleave(group, 2) for x in (F.normalize(k.float(), dim=-1, eps=1e-12), v))
    logits = torch.einsum("bnhd,bmhd->bhnm", unit_q * log_scale.exp()[:, None], unit_k)
    logits = logits.masked_fill(~key_mask[:, None, None], -torch.inf)
    return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1).to(q.dtype), values)


@pytest.fixture(params=DTYPES, ids=str)
def problem(request):
    return attention_problem(2, 7, 50, 4, 2, 32, dtype=request.param, mask=True)


def test_implementations_that_round_pass(problem):
    budget = attention_budget(problem)
    for function in (qk_norm_attention_reference, rounding_attention):
        usage = budget.check(run_attention(function, problem))
        assert all(0 < max(u) < 0.5 for u in usage.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gradient_that_is_not_projected_fails(dtype):
    problem = attention_problem(2, 7, 50, 4, 2, 32, dtype=dtype, mask=True)
    wrong = run_attention(lambda *inputs: rounding_attention(*inputs, project=False), problem)
    with pytest.raises(AssertionError, match=r"^dq"):
        attention_budget(problem).check(wrong)


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
def test_zeros_and_a_single_wrong_or_missing_element_fail(problem, name):
    budget = attention_budget(problem)
    exact = getattr(budget.exact, name)
    scale = getattr(budget.scale, name)
    place = tuple(int(i) for i in torch.unravel_index(scale.argmax(), scale.shape))
    moved, missing = exact.clone(), exact.clone()
    moved[place] += 12.01 * budget.eps * scale[place]
    missing[place] = torch.nan
    for wrong in (torch.zeros_like(exact), moved, missing):
        with pytest.raises(AssertionError, match=rf"^{name}"):
            budget.check(budget.exact._replace(**{name: wrong}))
    with pytest.raises(AssertionError, match=rf"^{name}"):
        check(name, exact[:1], exact, exact, scale, budget.eps)


def test_a_masked_key_demands_zeros(problem):
    budget = attention_budget(problem)
    for name in ("dk", "dv"):
        wrong = getattr(budget.exact, name).clone()
        assert not wrong[~problem.key_mask].any()
        wrong[~problem.key_mask] = 1e-30
        with pytest.raises(AssertionError, match=rf"^{name}"):
            budget.check(budget.exact._replace(**{name: wrong}))


def test_the_scale_of_one_key_is_its_value_and_the_share_of_its_logit():
    problem = attention_problem(1, 1, 1, 1, 1, 32)
    scale, weight = attention_budget(problem).scale, 1 + problem.log_scale.double().exp()
    torch.testing.assert_close(scale.out, weight * problem.v.double().abs())
    torch.testing.assert_close(scale.dv, weight * problem.dout.double().abs())
    # dP = Delta = |do| . |v|, so dS = 2 (1 + s) |do| . |v|, and dlog_scale = s dS |q^| . |k^|.
    unit_q, unit_k = (F.normalize(x.double(), dim=-1).abs() for x in problem[:2])
    ds = 2 * weight * (problem.dout.double().abs() * problem.v.double().abs()).sum()
    torch.testing.assert_close(scale.dlog_scale, (weight - 1) * ds * (unit_q * unit_k).sum())
    torch.testing.assert_close(
        scale.dk, (weight - 1) * ds * (unit_q + unit_k * (unit_q * unit_k).sum()) / problem.k.double().norm())


def test_the_scale_is_at_least_the_result_and_does_not_depend_on_the_chunks(problem, monkeypatch):
    whole = attention_budget(problem)
    assert all((scale >= exact.abs()).all() for scale, exact in zip(whole.scale, whole.exact))
    monkeypatch.setattr("kernel_budget._CHUNK_ELEMENTS", 1)
    for one, other in zip(whole[:3], attention_budget(problem)[:3]):
        for a, b in zip(one, other):
            torch.testing.assert_close(a.double(), b.double())


def test_poisoned_memory_shows_what_is_not_written_and_what_is_written_beyond_it():
    before = torch.empty, torch.empty_like, torch.Tensor.new_empty
    with poisoned_memory():
        x, y = torch.empty(2, 3), torch.empty((2,), dtype=torch.int32)
        assert x.isnan().all() and (y == -1).all() and x.is_contiguous() and x.data_ptr() % 16 == 0
        assert torch.empty_like(y).tolist() == [-1, -1] and x.new_empty((2,), dtype=torch.int64).tolist() == [-1, -1]
        x.zero_()
    assert (torch.empty, torch.empty_like, torch.Tensor.new_empty) == before
    for offset in (-1, 6):
        with pytest.raises(AssertionError, match=r"\[2, 3\]"), poisoned_memory():
            x = torch.empty(2, 3)
            torch.as_strided(x, (1,), (1,), x.storage_offset() + offset).zero_()
    assert torch.empty is before[0]


def test_a_guarded_tensor_has_nan_around_it():
    x = guarded(torch.arange(6.0).reshape(2, 3).T)
    assert x.tolist() == [[0, 3], [1, 4], [2, 5]]
    around = torch.as_strided(x, (8,), (1,), x.storage_offset() - 1)
    assert around[[0, -1]].isnan().all() and not around[1:-1].isnan().any()

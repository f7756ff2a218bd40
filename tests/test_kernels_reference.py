import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from wireframe.kernels import dispatch, native, ops

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = (1.0, 0.5, 0.7)


def attention_inputs(nq=5, nk=7, heads=4, kv_heads=2, dim=6, batch=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(batch, nq, heads, dim, generator=g, dtype=torch.float64).to(dtype)
    k, v = (torch.randn(batch, nk, kv_heads, dim, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    log_scale = torch.randn(heads, generator=g, dtype=torch.float64).to(dtype) + 1
    mask = torch.rand(batch, nk, generator=g) < 0.6
    mask[:, :1] = True
    return [x.requires_grad_() for x in (q, k, v, log_scale)], mask


def segment_inputs(rows=5, columns=4, batch=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    pred = torch.randn(batch, rows, 2, 3, generator=g, dtype=dtype) * 0.3
    target = torch.randn(batch, columns, 2, 3, generator=g, dtype=dtype) * 0.3
    mask = torch.ones(batch, columns, dtype=torch.bool)
    mask[0, 1:3] = False
    return pred.requires_grad_(), target, mask


def sinkhorn_written_out(cost, real, eps, iters, dustbin):
    """One scene, real columns only, with the issue's equations entry by entry in float64."""
    rows, columns = cost.shape[0], int(real.sum())
    c = torch.full((rows + 1, columns + 1), dustbin, dtype=torch.float64)
    c[:rows, :columns] = cost[:, real].double()
    c[rows, columns] = 0
    a = torch.tensor([1.0] * rows + [columns], dtype=torch.float64)
    b = torch.tensor([1.0] * columns + [rows], dtype=torch.float64)
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(iters):
        f = eps * (a.log() - ((g[None] - c) / eps).exp().sum(1).log())
        g = eps * (b.log() - ((f[:, None] - c) / eps).exp().sum(0).log())
    return (f[:, None] + g[None] - c) / eps


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_torch_attention_on_normalised_inputs(kv_heads, masked):
    (q, k, v, log_scale), mask = attention_inputs(kv_heads=kv_heads)
    out = ops.qk_norm_attention(q, k, v, log_scale, mask if masked else None)
    repeat = 4 // kv_heads
    full = [x.repeat_interleave(repeat, 2).transpose(1, 2) for x in (F.normalize(k, dim=-1, eps=1e-12), v)]
    query = F.normalize(q, dim=-1, eps=1e-12).transpose(1, 2) * log_scale.exp()[:, None, None]
    expected = F.scaled_dot_product_attention(
        query, *full, attn_mask=mask[:, None, None] if masked else None, scale=1.0).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v, log_scale))
    for ours, theirs in zip(grads, torch.autograd.grad(expected.square().sum(), (q, k, v, log_scale))):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_passes_gradcheck(masked):
    inputs, mask = attention_inputs()
    mask[1] = False
    assert gradcheck(lambda *x: ops.qk_norm_attention(*x, mask if masked else None), inputs)


def test_nan_in_masked_keys_spreads_nowhere():
    (q, k, v, log_scale), mask = attention_inputs()
    mask[1] = False
    results = []
    for value in (0.0, float("nan"), float("inf")):
        kk, vv = (torch.where(mask[:, :, None, None], x.detach(), value).requires_grad_() for x in (k, v))
        out = ops.qk_norm_attention(q, kk, vv, log_scale, mask)
        results.append([out, *torch.autograd.grad(out.square().sum() + out.sum(), (q, kk, vv, log_scale))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    out, dq, dk, dv, _ = results[0]
    assert not out[1].any() and not dq[1].any() and not dk[1].any() and not dv[1].any()
    assert out[0].any() and not dk[0][~mask[0]].any()


@pytest.mark.parametrize("nq, nk, batch", [(3, 0, 2), (0, 3, 2), (3, 1, 1), (1, 65, 1), (3, 4, 0)])
def test_attention_takes_any_length(nq, nk, batch):
    inputs, mask = attention_inputs(nq=nq, nk=nk, batch=batch, dtype=torch.float32)
    for key_mask in (None, mask):
        out = ops.qk_norm_attention(*inputs, key_mask)
        assert out.shape == (batch, nq, 4, 6) and out.isfinite().all()
        grads = torch.autograd.grad(out.sum(), inputs, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_attention_computes_in_float32(dtype):
    inputs, mask = attention_inputs(dtype=dtype)
    with torch.no_grad():
        inputs[0][0, 0] = 0
        inputs[1][0, 0] = 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.qk_norm_attention(*inputs, mask)
    exact = ops.qk_norm_attention(*(x.detach().double() for x in inputs), mask)
    assert out.dtype == dtype and torch.equal(out, ops.qk_norm_attention(*(x.float() for x in inputs), mask).to(dtype))
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    # The gradient of a zero vector is 1e12 times that of its unit vector, beyond float16.
    assert all(g[1:].isfinite().all() for g in torch.autograd.grad(out.float().sum(), inputs[:3]))


def test_strided_and_expanded_inputs_give_the_same_attention():
    (q, k, v, log_scale), mask = attention_inputs(dtype=torch.float32)
    first = q[:1].expand(2, -1, -1, -1)
    expected = ops.qk_norm_attention(first.contiguous(), k, v, log_scale, mask)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    torch.testing.assert_close(ops.qk_norm_attention(first, *strided, log_scale, mask), expected)


@pytest.mark.parametrize("change, word", [
    (lambda q, k, v, s, m: (q, k[..., :3], v, s, m), "share one shape"),
    (lambda q, k, v, s, m: (q[0], k, v, s, m), "q must"),
    (lambda q, k, v, s, m: (q[:, :, :3], k, v, s[:3], m), "multiple"),
    (lambda q, k, v, s, m: (q, k, v, s[:2], m), "log_scale"),
    (lambda q, k, v, s, m: (q, k, v, s, m.float()), "key_mask"),
    (lambda q, k, v, s, m: (q, k, v, s, m[:, :2]), "key_mask"),
])
def test_attention_names_the_argument_that_does_not_fit(change, word):
    inputs, mask = attention_inputs()
    with pytest.raises(ValueError, match=word):
        ops.qk_norm_attention(*change(*inputs, mask))


@pytest.mark.parametrize("iters", [1, 20])
def test_sinkhorn_equals_the_written_out_iterations_and_their_gradient(iters):
    g = torch.Generator().manual_seed(2)
    cost = torch.rand(2, 5, 4, generator=g, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 4, [True, False, True, False]])
    log_plan = ops.sinkhorn(cost, mask, iters=iters)
    assert log_plan.dtype == torch.float64 and log_plan.shape == (2, 6, 5)
    weight = torch.rand(2, 6, 5, generator=g, dtype=torch.float64)
    seen = torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], 1)
    grad, = torch.autograd.grad(sum((weight[i] * log_plan[i].exp())[:, seen[i]].sum() for i in range(2)), cost)
    expected = [sinkhorn_written_out(cost[i], mask[i], 0.1, iters, 0.3) for i in range(2)]
    other, = torch.autograd.grad(sum((weight[i][:, seen[i]] * expected[i].exp()).sum() for i in range(2)), cost)
    for i in range(2):
        torch.testing.assert_close(log_plan[i][:, seen[i]], expected[i])
        assert (log_plan[i][:, ~seen[i]] == -torch.inf).all()
    torch.testing.assert_close(grad, other)
    single = ops.sinkhorn(cost.detach().float(), mask, iters=iters)
    torch.testing.assert_close(single.exp().double(), log_plan.detach().exp(), rtol=0, atol=1e-5)


def test_the_plan_has_the_stated_marginals():
    cost = torch.rand(3, 8, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 2:] = False
    plan = ops.sinkhorn(cost, mask, iters=400).exp()
    columns = mask.sum(1).double()
    torch.testing.assert_close(plan.sum(2)[:, :-1], torch.ones(3, 8, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(plan.sum(2)[:, -1], columns, rtol=0, atol=1e-6)
    torch.testing.assert_close(plan.sum(1)[:, :-1], mask.double())
    torch.testing.assert_close(plan.sum(1)[:, -1], torch.full((3,), 8.0, dtype=torch.float64))


@pytest.mark.parametrize("rows, columns", [(4, 3), (4, 0), (0, 3), (0, 0), (1, 1)])
def test_without_a_real_column_all_mass_is_in_the_dustbin(rows, columns):
    cost = torch.full((2, rows, columns), float("nan"), requires_grad=True)
    log_plan = ops.sinkhorn(cost, torch.zeros(2, columns, dtype=torch.bool))
    expected = torch.zeros(2, rows + 1, columns + 1)
    expected[:, :rows, columns] = 1
    torch.testing.assert_close(log_plan.exp(), expected)
    assert (log_plan[:, -1, -1] == -torch.inf).all()
    grad, = torch.autograd.grad(log_plan.exp().sum(), cost)
    assert not grad.any()


def test_the_cost_of_a_masked_column_is_never_read():
    cost = torch.rand(1, 4, 3, generator=torch.Generator().manual_seed(4))
    mask = torch.tensor([[True, False, True]])
    results = []
    for value in (0.0, float("nan"), -1e30):
        case = cost.clone()
        case[:, :, 1] = value
        case.requires_grad_()
        log_plan = ops.sinkhorn(case, mask)
        results.append((log_plan, *torch.autograd.grad(log_plan[:, :, [0, 2, 3]].sum(), case)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    assert results[0][1].isfinite().all() and not results[0][1][:, :, 1].any()


def test_sinkhorn_passes_gradcheck():
    cost = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, True], [False] * 4])
    assert gradcheck(lambda c: ops.sinkhorn(c, mask, iters=5).exp(), (cost,))


def test_segment_cost_is_the_stated_sum_and_ignores_the_order_of_endpoints():
    pred, target, _ = segment_inputs()
    cost = ops.segment_cost(pred, target, weights=WEIGHTS)
    for b, i, j in ((0, 0, 0), (1, 4, 3)):
        (p, q), (r, s) = pred[b, i].detach(), target[b, j]
        lengths = [(q - p).norm(), (s - r).norm()]
        cosine = ((q - p) / lengths[0]) @ ((s - r) / lengths[1])
        expected = ((p + q) / 2 - (r + s) / 2).norm() + 0.5 * (1 - cosine.abs()) + 0.7 * (lengths[0] - lengths[1]).abs()
        torch.testing.assert_close(cost[b, i, j].detach(), expected)
    torch.testing.assert_close(ops.segment_cost(pred.flip(2), target, weights=WEIGHTS), cost)
    assert gradcheck(lambda x, y: ops.segment_cost(x, y, weights=WEIGHTS), (pred, target.requires_grad_()))


def test_points_and_coincident_segments_have_finite_gradients():
    pred = torch.zeros(1, 3, 2, 3)
    pred[0, 1] = torch.tensor([[0.0, 0, 0], [1, 0, 0]])
    pred.requires_grad_()
    loss, _ = ops.segment_matching(pred, pred.detach().clone(), torch.ones(1, 3, dtype=torch.bool), weights=WEIGHTS)
    loss.sum().backward()
    assert pred.grad.isfinite().all() and loss.isfinite().all()


def test_matching_is_plan_times_cost_over_real_columns_and_differentiates_both():
    pred, target, mask = segment_inputs()
    with torch.no_grad():
        target[~mask] = float("nan")
    loss, plan = ops.segment_matching(pred, target, mask, weights=WEIGHTS)
    clean = torch.where(mask[:, :, None, None], target, 1.0)
    cost = ops.segment_cost(pred, clean, weights=WEIGHTS)
    soft = ops.sinkhorn(cost, mask).exp()[:, :-1, :-1]
    torch.testing.assert_close(loss, (soft * cost).sum((1, 2)))
    torch.testing.assert_close(plan, soft)
    assert not plan.requires_grad and not plan[0][:, ~mask[0]].any()
    grad, = torch.autograd.grad(loss.sum(), pred)
    torch.testing.assert_close(grad, torch.autograd.grad((soft * cost).sum(), pred)[0])
    assert gradcheck(lambda x: ops.segment_matching(x, target, mask, weights=WEIGHTS, iters=5)[0], (pred,))


def test_matching_without_targets_is_zero():
    pred, _, _ = segment_inputs()
    for columns in (0, 3):
        loss, plan = ops.segment_matching(
            pred, torch.full((2, columns, 2, 3), float("nan")).double(), torch.zeros(2, columns, dtype=torch.bool))
        assert not loss.any() and not plan.any() and plan.shape == (2, 5, columns)
        assert not torch.autograd.grad(loss.sum(), pred)[0].any()


def test_matching_and_sinkhorn_name_the_argument_that_does_not_fit():
    pred, target, mask = segment_inputs()
    for call, word in (
        (lambda: ops.segment_matching(pred, target, mask.float()), "target_mask"),
        (lambda: ops.segment_matching(pred[0], target, mask), "pred"),
        (lambda: ops.segment_cost(pred[:1], target), "scenes"),
        (lambda: ops.segment_matching(pred, target, mask, eps=0.0), "eps"),
        (lambda: ops.sinkhorn(pred[..., 0], mask), "col_mask"),
        (lambda: ops.sinkhorn(torch.zeros(2, 5, 4), mask, iters=0), "iters"),
    ):
        with pytest.raises(ValueError, match=word):
            call()


def test_an_implementation_is_obeyed_or_refused():
    # float64 is beyond every Triton kernel, wherever the tests run.
    (q, k, v, log_scale), mask = attention_inputs()
    pred, target, target_mask = segment_inputs()
    cost, keys = torch.zeros(2, 3, 4, dtype=torch.float64), torch.arange(len(q))
    calls = {
        "qk_norm_attention": lambda impl: ops.qk_norm_attention(q, k, v, log_scale, mask, impl=impl),
        "qk_norm_attention_kvpacked": lambda impl: ops.qk_norm_attention_kvpacked(
            q, torch.stack([k, v], 2), log_scale, mask, impl=impl
        ),
        "sinkhorn": lambda impl: ops.sinkhorn(cost, target_mask, impl=impl),
        "segment_cost": lambda impl: ops.segment_cost(pred, target, weights=WEIGHTS, impl=impl),
        "segment_matching": lambda impl: ops.segment_matching(pred, target, target_mask, weights=WEIGHTS, impl=impl)[0],
        "linear_gelu": lambda impl: ops.linear_gelu(q, q[0, :, 0], impl=impl),
        "adamw_step": lambda impl: ops.adamw_step(
            *torch.ones(4, 3).to(q).unbind(), *torch.ones(2).to(q).unbind(), torch.tensor(True), grad_clip=1.0,
            betas=(0.9, 0.9), weight_decay=0.0, impl=impl,
        ),
        "dropout_add": lambda impl: ops.dropout_add(q, q, keys, site=0, p=0.5, impl=impl),
        "residual_norm": lambda impl: ops.residual_norm(q, q, q[0, 0, 0], keys, p=0.5, impl=impl).normed,
        "rms_norm": lambda impl: ops.rms_norm(q, q[0, 0, 0], impl=impl),
        "point_features": lambda impl: ops.point_features(
            pred[:, :, 0], *[keys[:1].expand(pred.shape[:2])] * 4, pred[:, :, 0, 0], torch.ones(pred.shape[:2]) > 0,
            pred[0, :, 0], labels=(13, 2, 29), impl=impl,
        ),
    }
    chosen = {name for name in ops.__all__ if "impl" in inspect.signature(getattr(ops, name)).parameters}
    assert chosen == set(dispatch.BUILT) and set(ops.__all__) - chosen == {"step_keys"}
    assert set(calls) == set(dispatch.MODEL_OPS)
    for op, call in calls.items():
        assert torch.equal(call("auto"), call("reference"))
        with pytest.raises(ValueError, match="cuda"):
            call("cuda")
        assert dispatch.BUILT[op][0] == "triton" and dispatch.BUILT[op][-1] == "reference"
        for impl in ("native", "triton"):
            with pytest.raises(dispatch.ImplementationError, match=impl):
                call(impl)


@pytest.mark.parametrize("change, problem, words", [
    ({"cost": "[2, 3]"}, TypeError, "cost must be a tensor, not str"),
    ({"cost": torch.zeros(2, 3, 4, dtype=torch.int64)}, ValueError, "cost must be floating, got int64"),
    ({"cost": torch.zeros(2, 3, 4, dtype=torch.complex64)}, ValueError, "cost must be floating, got complex64"),
    ({"cost": torch.zeros(2, 3, 4, device="meta")}, ValueError, "col_mask is on cpu, cost on meta"),
    ({"eps": float("inf")}, ValueError, "eps must be positive and finite, got inf"),
    ({"eps": float("nan")}, ValueError, "eps must be positive and finite, got nan"),
    ({"eps": "0.1"}, TypeError, "eps must be a number, not str"),
    ({"dustbin": float("-inf")}, ValueError, "dustbin must be finite, got -inf"),
    ({"dustbin": torch.ones((), requires_grad=True)}, TypeError, "dustbin must be a number, not Tensor"),
    ({"iters": 2.5}, TypeError, "iters must be an integer, not float"),
])
def test_sinkhorn_names_what_no_implementation_can_use(change, problem, words):
    arguments = {"cost": torch.zeros(2, 3, 4), "col_mask": torch.ones(2, 4, dtype=torch.bool)} | change
    with pytest.raises(problem, match=f"^sinkhorn: {words}$"):
        ops.sinkhorn(**arguments)


def test_attention_and_segments_name_what_no_implementation_can_use():
    q, k = torch.zeros(1, 2, 4, 32), torch.zeros(1, 3, 2, 32)
    for arguments, words in (
        ((q.int(), k.int(), k.int(), torch.zeros(4)), "q must be floating, got int32"),
        ((q, k.to("meta"), k.to("meta"), torch.zeros(4)), "k is on meta, q on cpu"),
        ((q, k, k, torch.zeros(4), torch.ones(1, 3, dtype=torch.bool, device="meta")), "key_mask is on meta, q on cpu"),
    ):
        with pytest.raises(ValueError, match=f"^qk_norm_attention: {words}$"):
            ops.qk_norm_attention(*arguments)
    pred, target, mask = segment_inputs()
    for weights in ((1.0, 1.0), 1.0):
        with pytest.raises(ValueError, match="segment_cost: weights must"):
            ops.segment_cost(pred, target, weights=weights)
        with pytest.raises(ValueError, match="segment_matching: weights must be"):
            ops.segment_matching(pred, target, mask, weights=weights)
    with pytest.raises(ValueError, match="segment_cost: pred must be floating, got int64"):
        ops.segment_cost(pred.long(), target)


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_the_interpreter_is_not_asked_for_bfloat16():
    q, k = torch.zeros(1, 2, 4, 32).bfloat16(), torch.zeros(1, 3, 2, 32).bfloat16()
    with pytest.raises(dispatch.ImplementationError, match="interpreter cannot compute in torch\\.bfloat16"):
        ops.qk_norm_attention(q, k, k, torch.zeros(4), impl="triton")


def test_the_reference_compiles_with_dynamic_shapes():
    compiled = torch.compile(ops.qk_norm_attention, fullgraph=True, dynamic=True, backend="eager")
    (q, k, v, log_scale), mask = attention_inputs()
    for keys in (7, 5):
        inputs = q, k[:, :keys], v[:, :keys], log_scale, mask[:, :keys]
        assert torch.equal(compiled(*inputs), ops.qk_norm_attention(*inputs))


@pytest.mark.skipif(native.problem() is not None, reason="needs wireframe._C")
def test_why_says_which_of_the_models_operations_are_native(monkeypatch):
    assert dispatch.why("rms_norm")[0].startswith("rms_norm: native (C++); also runs: reference")
    monkeypatch.setattr(native, "problem", lambda name="_C": "it is not built")
    (line,) = dispatch.why("rms_norm")
    assert line.startswith("rms_norm: reference (PyTorch)") and line.endswith("; not native: it is not built")


def test_why_says_what_runs_on_each_device(monkeypatch):
    on_cpu = "also runs: triton (interpreted)" if dispatch.INTERPRETED else "triton takes CUDA tensors"
    problems = {"cpu": dispatch._triton_problem("cpu"), "cuda": "the GPU is too old"}
    monkeypatch.setattr(dispatch, "_triton_problem", problems.get)
    found = dispatch.why("sinkhorn", ("cpu", "cuda"))
    assert found == [
        f"sinkhorn: reference (PyTorch); {on_cpu}",
        "sinkhorn on cuda tensors: reference (PyTorch); not triton: the GPU is too old",
    ]
    problems["cuda"] = None
    assert dispatch.why("sinkhorn", ("cuda",)) == ["sinkhorn on cuda tensors: triton"]


def test_the_folder_cannot_be_imported_under_its_bare_name():
    run = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0 and "ImportError" in run.stderr and "wireframe.kernels" in run.stderr


def test_the_reference_maps_over_what_shares_a_mask():
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 3, 2, 5, 2, 8, generator=g)
    mask = torch.rand(2, 5, generator=g) < 0.6
    scale = torch.zeros(2)
    v = torch.where(mask[..., None, None], v, torch.nan)

    def function(*x):
        return ops.qk_norm_attention(*x, scale, mask, impl="reference")

    expected = torch.stack([function(*x) for x in zip(q, k, v)])
    assert torch.allclose(torch.func.vmap(function)(q, k, v), expected, atol=1e-6)

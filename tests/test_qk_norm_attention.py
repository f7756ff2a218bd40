"""The Triton kernels of qk_norm_attention, interpreted on the CPU: budget, branches, masks, memory, bits, compilers."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
from interpreter_bf16 import interpreted_bfloat16
from kernel_budget import (
    AttentionProblem,
    AttentionResults,
    attention_budget,
    attention_problem,
    check,
    run_attention,
)
from poisoned_memory import guarded, poisoned_memory
from wireframe.kernels import dispatch, ops
from wireframe.kernels import qk_norm_attention as op_module

pytestmark = pytest.mark.skipif(not dispatch.INTERPRETED, reason="needs TRITON_INTERPRET=1; see test_gpu_kernels.py")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# float16 has ways of its own: always a running maximum, and products with unit vectors.
each_way = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)

# (B, Nq, Nk, H, Hkv, D) and whether keys are masked. Tiles have 32 to 128 rows or keys, chunks 512 keys.
SHAPES = {
    "one_query_one_key": ((2, 1, 1, 2, 1, 32), False),
    "one_key": ((2, 5, 1, 4, 2, 32), False),
    "one_query": ((2, 1, 65, 4, 1, 128), True),
    "whole_tiles": ((1, 64, 128, 2, 2, 64), False),
    "just_below_a_tile": ((2, 63, 63, 2, 1, 32), False),
    "just_above_a_tile": ((1, 65, 65, 3, 1, 64), True),
    "several_row_blocks": ((1, 130, 33, 2, 1, 32), False),
    "several_blocks_both_ways": ((1, 256, 256, 1, 1, 32), True),
    "a_head_for_each_key_head": ((1, 9, 31, 3, 3, 128), True),
    "one_whole_chunk": ((1, 3, 512, 1, 1, 32), False),
    "a_chunk_and_a_bit": ((1, 3, 520, 2, 1, 32), False),
    "three_chunks_masked": ((1, 3, 1030, 2, 1, 32), True),
    "two_whole_chunks": ((2, 2, 1024, 1, 1, 32), False),
    "4096_keys": ((1, 1, 4096, 1, 1, 32), False),
    "8192_keys": ((1, 1, 8192, 1, 1, 32), True),
    "4096_queries": ((1, 4096, 1, 1, 1, 32), False),
}


@pytest.fixture(autouse=True, scope="module")
def _bfloat16():
    with interpreted_bfloat16():
        yield


def triton_attention(*inputs):
    return ops.qk_norm_attention(*inputs, impl="triton")


def triton_results(problem: AttentionProblem) -> AttentionResults:
    """Results of the kernels, with every allocation poisoned and guarded."""
    with poisoned_memory() as given:
        results = run_attention(triton_attention, problem)
    assert given or not results.out.numel()
    return results


def between_guards(problem: AttentionProblem) -> AttentionProblem:
    return AttentionProblem(*(x if x is None else guarded(x) for x in problem))


def bits(x):
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


def assert_same_bits(first, second):
    for name, a, b in zip(AttentionResults._fields, first, second):
        assert a.dtype == b.dtype and torch.equal(bits(a), bits(b)), name


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_results_lie_within_the_budget(shape, dtype):
    sizes, mask = SHAPES[shape]
    problem = between_guards(attention_problem(*sizes, dtype=dtype, mask=mask))
    results = triton_results(problem)
    assert all(x.is_contiguous() for x in results)
    attention_budget(problem).check(results)


@each_dtype
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_scales_on_both_sides_of_the_guard_lie_within_the_budget(kv_heads, dtype):
    problem = attention_problem(2, 9, 70, 4, kv_heads, 32, dtype=dtype, mask=True)
    problem = problem._replace(log_scale=torch.tensor([39.9, 40.1, 0.5, 100.0]).log())
    attention_budget(problem).check(triton_results(problem))


@each_dtype
def test_keys_opposite_to_the_query_lie_within_the_budget(dtype):
    # All logits are -s, or nearly so: under a fixed shift all weights are exp(-2 s), which is 0 from s = 52 on.
    problem = attention_problem(1, 3, 40, 3, 3, 32, dtype=dtype)
    k = (-problem.q[:, :1] + 0.01 * problem.k).to(dtype)
    q = problem.q[:, :1].expand(-1, 3, -1, -1)
    problem = problem._replace(q=q, k=k, log_scale=torch.tensor([39.9, 52.0, 100.0]).log())
    attention_budget(problem).check(triton_results(problem))


@each_dtype
def test_vectors_of_any_length_lie_within_the_budget(dtype):
    problem = attention_problem(2, 8, 72, 2, 1, 32, dtype=torch.float32)
    # float16 can hold neither the gradient of a zero vector nor that of a short one.
    lengths = [1e-3, 1.0, 30.0, 3e4] if dtype == torch.float16 else [0.0, 1e-13, 1e-11, 1e-6, 1.0, 1e3, 1e6, 1e12]
    lengths = torch.tensor(lengths)[:, None, None]
    q, k = (x * lengths.repeat(x.shape[1] // len(lengths), 1, 1) / x.norm(dim=-1, keepdim=True) for x in problem[:2])
    # Gradients so small that float16 loses them where they are divided by the length of a long vector.
    changed = {"q": q, "k": k, "v": problem.v, "dout": 0.01 * problem.dout}
    problem = problem._replace(**{name: x.to(dtype) for name, x in changed.items()})
    attention_budget(problem).check(triton_results(problem))


@each_dtype
def test_a_log_scale_in_the_dtype_of_the_inputs_gets_its_gradient_in_it(dtype):
    problem = attention_problem(2, 5, 20, 2, 1, 32, dtype=dtype)
    problem = problem._replace(log_scale=problem.log_scale.to(dtype))
    results = triton_results(problem)
    assert results.dlog_scale.dtype == dtype
    attention_budget(problem).check(results)


def scene_masks(keys):
    """No key, only the last, all but the last, the first half, one in the middle, all."""
    mask = torch.zeros(6, keys, dtype=torch.bool)
    mask[1, -1] = True
    mask[2, :-1] = True
    mask[3, : keys // 2] = True
    mask[4, keys // 2] = True
    mask[5] = True
    return mask


@each_dtype
def test_masked_scenes_lie_within_the_budget_and_give_zeros_without_a_key(dtype):
    problem = attention_problem(6, 3, 65, 2, 1, 32, dtype=dtype)._replace(key_mask=scene_masks(65))
    results = triton_results(problem)
    attention_budget(problem).check(results)
    masked = ~problem.key_mask
    assert not results.out[0].any() and not results.dq[0].any()
    assert not results.dk[masked].any() and not results.dv[masked].any()


@each_way
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_masked_keys_hold_changes_no_bit(poison, dtype):
    problem = attention_problem(6, 3, 65, 2, 1, 32, dtype=dtype)._replace(key_mask=scene_masks(65))
    valid = problem.key_mask[:, :, None, None]
    k, v = (torch.where(valid, x, torch.tensor(poison, dtype=dtype)) for x in (problem.k, problem.v))
    assert_same_bits(triton_results(problem), triton_results(problem._replace(k=k, v=v)))


@each_dtype
@pytest.mark.parametrize("batch, queries, keys", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 0, 0)])
def test_nothing_to_attend_gives_zeros(batch, queries, keys, dtype):
    for mask in (False, True):
        problem = attention_problem(batch, queries, keys, 2, 1, 32, dtype=dtype, mask=mask)
        results = triton_results(problem)
        assert all(x.shape == y.shape and not x.any() for x, y in zip(results, (problem.q, *problem[:4])))


def strided_forms(problem: AttentionProblem):
    """The problem with the same values in other memory layouts, by name."""

    def heads_first(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def every_second(x):
        return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]

    q, k, v, _, mask, dout = problem
    keys_values = torch.stack([k, v], 2)
    yield "heads_first", problem._replace(q=heads_first(q), k=heads_first(k), v=heads_first(v), dout=heads_first(dout))
    yield "packed_keys_and_values", problem._replace(k=keys_values[:, :, 0], v=keys_values[:, :, 1])
    yield "elements_apart", problem._replace(
        q=every_second(q), k=every_second(k), v=every_second(v), dout=every_second(dout)
    )
    yield "strided_mask", problem._replace(key_mask=torch.stack([mask, ~mask], 2)[:, :, 0])
    yield "mask_of_keys_first", problem._replace(key_mask=mask.T.contiguous().T)


@each_way
def test_strides_change_no_bit(dtype):
    problem = attention_problem(2, 5, 33, 4, 2, 32, dtype=dtype, mask=True)
    expected = triton_results(problem)
    for name, strided in strided_forms(problem):
        assert any(x is not None and not x.is_contiguous() for x in strided), name
        results = triton_results(strided)
        assert all(x.is_contiguous() for x in results), name
        assert_same_bits(results, expected)


@each_way
def test_expanded_inputs_give_the_bits_of_their_copies(dtype):
    # Every input is one scene for all, as the latents of the model are.
    one = attention_problem(1, 5, 70, 4, 2, 32, dtype=dtype, mask=True)
    expanded = AttentionProblem(*(x if x.dim() == 1 else x.expand(3, *x.shape[1:]) for x in one))
    copied = AttentionProblem(*(x.contiguous() for x in expanded))
    results = triton_results(expanded)
    assert_same_bits(results, triton_results(copied))
    attention_budget(expanded).check(results)


@each_way
def test_a_sum_of_the_output_differentiates(dtype):
    problem = attention_problem(2, 5, 33, 2, 1, 64, dtype=dtype)
    inputs = [x.detach().requires_grad_() for x in problem[:4]]
    # The gradient of a sum is one number, expanded.
    grads = torch.autograd.grad(triton_attention(*inputs).sum(), inputs)
    expected = triton_results(problem._replace(dout=torch.ones_like(problem.dout)))
    assert_same_bits((expected.out, *grads), expected)


@each_dtype
@pytest.mark.parametrize("mask", [False, True])
def test_chunks_give_the_same_bits_in_one_program_and_in_many(mask, dtype):
    from wireframe.kernels.launch import run
    from wireframe.kernels.qk_norm_attention_forward import plan_forward

    # Three chunks, of which two could be added in any order; a fixed shift, and a running maximum.
    problem = attention_problem(2, 3, 1030, 2, 2, 32, dtype=dtype, mask=mask)
    problem = problem._replace(log_scale=torch.tensor([12.0, 60.0]).log())
    if mask:
        # The first chunk of one scene is without a key, and all of the other.
        problem.key_mask[0, :512] = False
        problem.key_mask[1] = False
    found = []
    for split in (False, True):
        with poisoned_memory():
            out, lse = torch.empty(problem.q.shape, dtype=dtype), torch.empty(2, 2, 3)
            launches = plan_forward(*problem[:5], out, lse, architecture=89, split=split)
            run(launches)
        found.append((len(launches), out, lse))
    assert found[1][0] == found[0][0] + 1
    for one, many in zip(found[0][1:], found[1][1:]):
        assert torch.equal(bits(one), bits(many))
    budget = attention_budget(problem)
    check("out", found[0][1], budget.exact.out, budget.eager.out, budget.scale.out, budget.eps)


@each_way
@pytest.mark.parametrize("keys", [70, 520])
def test_a_scene_does_not_depend_on_its_batch(monkeypatch, keys, dtype):
    from wireframe.kernels import qk_norm_attention_forward

    # With two chunks of keys one scene gets a program for each, and three scenes do not.
    monkeypatch.setattr(qk_norm_attention_forward, "_FEW_PROGRAMS", 3)
    problem = attention_problem(3, 5, keys, 2, 1, 32, dtype=dtype, mask=True)
    batch = triton_results(problem)
    for scene in range(3):
        alone = triton_results(problem.scenes(scene, scene + 1))
        pairs = [(x[scene : scene + 1], y) for x, y in zip(batch[:4], alone[:4])]
        assert_same_bits(*zip(*pairs))


@each_way
def test_equal_calls_give_equal_bits(dtype):
    problem = attention_problem(1, 9, 70, 4, 2, 32, dtype=dtype, mask=True)
    first = run_attention(triton_attention, problem)
    assert_same_bits(first, run_attention(triton_attention, problem))


@pytest.mark.parametrize("change, word", [
    (lambda q, k, v, s: (q[..., :24], k[..., :24], v[..., :24], s), "24"),
    (lambda q, k, v, s: (q.double(), k.double(), v.double(), s), "float64"),
    (lambda q, k, v, s: (q, k.half(), v.half(), s), "float16"),
    (lambda q, k, v, s: (q, k, v.bfloat16(), s), "bfloat16"),
])  # fmt: skip
def test_inputs_beyond_the_kernels_are_refused_by_name_and_left_to_others_by_auto(change, word):
    inputs = change(*attention_problem(1, 3, 5)[:4])
    with pytest.raises(dispatch.ImplementationError, match=word):
        ops.qk_norm_attention(*inputs, impl="triton")
    torch.testing.assert_close(ops.qk_norm_attention(*inputs), ops.qk_norm_attention(*inputs, impl="reference"))


def test_auto_interprets_nothing(monkeypatch):
    monkeypatch.setattr(op_module, "_forward", None)
    inputs = attention_problem(1, 3, 5)[:4]
    found = ops.qk_norm_attention(*inputs)
    assert any(torch.equal(found, ops.qk_norm_attention(*inputs, impl=impl)) for impl in ("native", "reference"))
    with pytest.raises(TypeError):
        ops.qk_norm_attention(*inputs, impl="triton")


def test_cpu_tensors_are_refused_where_nothing_is_interpreted(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(dispatch.ImplementationError, match="TRITON_INTERPRET"):
        ops.qk_norm_attention(*attention_problem(1, 3, 5)[:4], impl="triton")


def test_the_operations_are_imported_and_used_without_triton():
    code = (
        "import sys, torch; from wireframe.kernels import ops; q = torch.ones(1, 2, 1, 32);"
        "ops.qk_norm_attention(q, q, q, torch.zeros(1)); assert 'triton' not in sys.modules, 'triton was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@each_way
def test_autocast_changes_no_bit(dtype):
    problem = attention_problem(2, 5, 33, 2, 1, 32, dtype=dtype, mask=True)
    expected = run_attention(triton_attention, problem)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    with torch.autocast("cpu", dtype=other):
        assert_same_bits(run_attention(triton_attention, problem), expected)


@pytest.mark.parametrize("queries, keys, mask", [(3, 5, False), (3, 5, True), (0, 5, True), (3, 0, False)])
def test_the_registered_operators_pass_opcheck(queries, keys, mask):
    problem = attention_problem(2, queries, keys, 4, 2, 32, mask=mask)
    inputs = [x.detach().requires_grad_() for x in problem[:4]]
    torch.library.opcheck(torch.ops.wireframe.qk_norm_attention.default, (*inputs, problem.key_mask))
    with torch.no_grad():
        results = torch.ops.wireframe.qk_norm_attention(*problem[:5])
    arguments = (problem.dout, *problem[:5], *results)
    torch.library.opcheck(torch.ops.wireframe.qk_norm_attention_backward.default, arguments)


@pytest.mark.parametrize("impl", ["triton", "reference", "auto"])
@pytest.mark.parametrize("mask", [False, True])
def test_a_compiled_call_is_one_graph_and_gives_the_same_results(impl, mask):
    problem = attention_problem(2, 5, 33, 4, 2, 32, mask=mask)
    torch.compiler.reset()

    def function(q, k, v, log_scale, key_mask):
        return 2 * ops.qk_norm_attention(q, k, v, log_scale, key_mask, impl=impl)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, found = run_attention(function, problem), run_attention(compiled, problem)
    if impl == "triton":
        assert_same_bits(found, expected)
    else:
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b)


def test_only_the_first_derivative_is_there():
    inputs = [x.detach().requires_grad_() for x in attention_problem(1, 3, 5)[:4]]
    grads = torch.autograd.grad(triton_attention(*inputs).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(grads[0].sum(), inputs)


def test_kernels_get_aligned_rows_whatever_the_input_is():
    # Alignment chooses a kernel's layout, so the bits: an odd view becomes what fresh memory is, others stay.
    fresh = torch.randn(2, 9, 2, 32)
    odd = torch.cat([fresh.new_zeros(1), fresh.flatten()])[1:].view_as(fresh)
    narrow = torch.randn(2, 9, 2, 33)[..., :32]
    # A stride of 36 elements is a multiple of 16 bytes, but Triton asks for 16 elements.
    padded = torch.randn(2, 9, 2, 36)[..., :32]
    for view in (odd, narrow, padded, fresh.transpose(2, 3).contiguous().transpose(2, 3)):
        rows = op_module._rows(view)
        assert torch.equal(rows, view) and rows.is_contiguous() and rows.data_ptr() % 16 == 0
    for view in (fresh, fresh[:, 1:], fresh.transpose(1, 2), fresh[:1].expand(3, -1, -1, -1)):
        assert op_module._rows(view) is view


def test_float16_gradients_of_loss_scaling_do_not_overflow():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, heads, 32, generator=g).half() for heads in (4, 2, 2))
    inputs = [x.requires_grad_() for x in (q, k, v, torch.full((4,), 100.0).log())]
    dout = 500 * torch.randn(1, 6, 4, 32, generator=g).half()
    found, expected = (
        torch.autograd.grad(ops.qk_norm_attention(*inputs, impl=impl), inputs, dout) for impl in ("triton", "reference")
    )
    assert all(a.isfinite().all() for a in found)
    # Not of log_scale, whose terms cancel.
    for a, b in zip(found[:3], expected):
        assert (a.float() - b.float()).norm() <= 0.02 * b.float().norm()


@pytest.mark.parametrize("keys", [4, 32])
def test_a_key_whose_square_overflows_still_takes_part(keys):
    q, k, v = (torch.randn(1, n, 1, 32, generator=torch.Generator().manual_seed(n)) for n in (3, keys, keys + 1))
    v = v[:, :keys]
    k[0, 1] = 1e20
    out = ops.qk_norm_attention(q, k, v, torch.ones(1), impl="triton")
    expected = ops.qk_norm_attention(q, k, v, torch.ones(1), impl="reference")
    torch.testing.assert_close(out, expected)

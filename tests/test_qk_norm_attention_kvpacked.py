"""Attention on packed keys and values: the bits of qk_norm_attention, a gradient in one piece, no copy on the way."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from interpreter_bf16 import interpreted_bfloat16
from kernel_budget import AttentionProblem, AttentionResults, attention_budget, attention_problem, run_attention
from poisoned_memory import guarded, poisoned_memory
from wireframe.kernels import dispatch, launch, ops
from wireframe.kernels import qk_norm_attention as op_module

pytestmark = pytest.mark.skipif(not dispatch.INTERPRETED, reason="needs TRITON_INTERPRET=1; see test_gpu_kvpacked.py")

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)

# (B, Nq, Nk, H, Hkv, D) and whether keys are masked.
SHAPES = {
    "one_key": ((2, 5, 1, 4, 2, 32), False),
    "just_below_a_tile": ((2, 3, 63, 2, 1, 32), False),
    "just_above_a_tile": ((2, 5, 65, 4, 2, 64), True),
    "whole_tiles": ((1, 32, 128, 2, 2, 64), False),
    "wide_heads": ((2, 5, 33, 3, 3, 128), True),
    "two_chunks": ((1, 3, 520, 2, 1, 32), True),
}


@pytest.fixture(autouse=True, scope="module")
def _bfloat16():
    with interpreted_bfloat16():
        yield


def triton_attention(*inputs):
    return ops.qk_norm_attention(*inputs, impl="triton")


def packed_attention(*inputs):
    return ops.qk_norm_attention_kvpacked(*inputs, impl="triton")


def pack(problem: AttentionProblem) -> Tensor:
    return torch.stack([problem.k, problem.v], 2)


def run_packed(problem: AttentionProblem, kv: Tensor, function=packed_attention) -> list[Tensor]:
    """out, dq, dkv and dlog_scale."""
    inputs = [x.detach().requires_grad_() for x in (problem.q, kv, problem.log_scale)]
    out = function(*inputs, problem.key_mask)
    return [out.detach(), *torch.autograd.grad(out, inputs, problem.dout)]


def poisoned_packed(problem: AttentionProblem, kv: Tensor) -> AttentionResults:
    """Results with every allocation poisoned and guarded, the gradient of kv taken apart."""
    with poisoned_memory():
        out, dq, dkv, dlog_scale = run_packed(problem, kv)
    assert dkv.shape == kv.shape and dkv.is_contiguous() and dkv._base is None
    return AttentionResults(out, dq, *dkv.unbind(2), dlog_scale)


def assert_same_bits(found, expected):
    for name, a, b in zip(AttentionResults._fields, found, expected, strict=True):
        a, b = (x.contiguous().view(torch.uint8) for x in (a, b))
        assert torch.equal(a, b), name


@pytest.mark.parametrize("shape, dtype", [
    *((shape, torch.bfloat16) for shape in SHAPES),
    *(("just_above_a_tile", dtype) for dtype in (torch.float32, torch.float16)),
], ids=str)  # fmt: skip
def test_results_have_the_bits_of_separate_keys_and_values(shape, dtype):
    sizes, mask = SHAPES[shape]
    problem = attention_problem(*sizes, dtype=dtype, mask=mask)
    found = poisoned_packed(problem, guarded(pack(problem)))
    assert_same_bits(found, run_attention(triton_attention, problem))
    assert found.out.any()


def test_results_lie_within_the_budget():
    problem = attention_problem(2, 9, 70, 4, 2, 64, dtype=torch.bfloat16, mask=True)
    attention_budget(problem).check(poisoned_packed(problem, guarded(pack(problem))))


@pytest.mark.parametrize("batch, queries, keys", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_nothing_to_attend_gives_zeros(batch, queries, keys):
    for mask in (False, True):
        problem = attention_problem(batch, queries, keys, 4, 2, 32, mask=mask)
        assert not any(x.any() for x in poisoned_packed(problem, pack(problem)))


def test_what_masked_keys_hold_changes_no_bit_and_gets_zeros():
    problem = attention_problem(3, 3, 65, 4, 2, 32, mask=True)
    problem.key_mask[1] = False
    kv = pack(problem)
    spoilt = torch.where(problem.key_mask[:, :, None, None, None], kv, torch.nan)
    found = poisoned_packed(problem, spoilt)
    assert_same_bits(found, poisoned_packed(problem, kv))
    assert not found.dk[~problem.key_mask].any() and not found.dv[~problem.key_mask].any()


def views(kv: Tensor):
    """The same values in other memory layouts, by name."""
    yield "of_a_wider_projection", torch.cat([torch.full_like(kv[:, :, :1], torch.nan), kv], 2)[:, :, 1:]
    yield "apart", kv.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)
    yield "in_wider_rows", F.pad(kv, (0, 0, 0, 3))[:, :, :, : kv.shape[3]]
    yield "not_aligned", torch.cat([kv.new_zeros(1), kv.flatten()])[1:].view_as(kv)
    yield "elements_apart", torch.stack([kv, torch.full_like(kv, torch.nan)], -1).flatten(-2)[..., ::2]


def test_strides_change_no_bit():
    problem = attention_problem(2, 5, 33, 4, 2, 32, dtype=torch.bfloat16, mask=True)
    expected = poisoned_packed(problem, pack(problem))
    for name, kv in views(pack(problem)):
        assert torch.equal(kv, pack(problem)), name
        assert_same_bits(poisoned_packed(problem, kv), expected)


def test_expanded_keys_and_values_give_the_bits_of_their_copies():
    problem = attention_problem(3, 5, 33, 4, 2, 32)
    kv = pack(problem)[:1].expand(3, -1, -1, -1, -1)
    assert_same_bits(poisoned_packed(problem, kv), poisoned_packed(problem, kv.contiguous()))


@pytest.mark.parametrize("kv_heads, dim", [(1, 32), (2, 64), (1, 128)])
def test_packed_rows_are_read_where_they_are(kv_heads, dim):
    for dtype in (torch.float32, torch.bfloat16):
        for part in op_module._halves(torch.empty(2, 4096, 2, kv_heads, dim, dtype=dtype)):
            assert op_module._rows(part) is part


class _Operators(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(function.name())
        return function(*arguments, **(keywords or {}))


def test_nothing_is_copied_between_the_projection_and_the_attention():
    generator = torch.Generator().manual_seed(0)
    q, memory, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 3, 4, 32), (2, 40, 16), (128, 16)))
    memory.requires_grad_()
    weight.requires_grad_()
    with _Operators() as operators:
        kv = F.linear(memory, weight).unflatten(-1, (2, 2, 32))
        out = packed_attention(q, kv, torch.zeros(4))
        torch.autograd.grad(out, [memory, weight], torch.ones_like(out))
    found = {name.removeprefix("aten::").removeprefix("wireframe::").partition(".")[0] for name in operators.names}
    assert {"qk_norm_attention_kvpacked", "qk_norm_attention_kvpacked_backward"} <= found
    views_and_products = {"t", "view", "_unsafe_view", "mm", "bmm", "addmm", "linear", "transpose", "detach", "alias"}
    allowed = {*views_and_products, "zeros", "ones_like", "qk_norm_attention_kvpacked"}
    # What the operators do inside is not seen here; see the test of rows.
    assert found - allowed == {"qk_norm_attention_kvpacked_backward"}


@pytest.mark.parametrize("packed", [False, True])
def test_the_backward_takes_the_keys_factors_from_the_forward(packed, monkeypatch):
    names, run = [], launch.run

    def recording(launches):
        names.extend(x.kernel.fn.__name__ for x in launches)
        run(launches)

    monkeypatch.setattr(launch, "run", recording)
    problem = attention_problem(2, 5, 33, 4, 2, 32, mask=True)
    if packed:
        run_packed(problem, pack(problem))
    else:
        run_attention(triton_attention, problem)
    kernels = [f"_qk_norm_attention_{name}_kernel" for name in ("keys", "fwd", "dq", "dkv", "dlog_scale")]
    assert names == kernels


@each_dtype
def test_a_backward_that_prepares_the_keys_itself_has_the_same_bits(dtype):
    from wireframe.kernels.qk_norm_attention_backward import plan_backward
    from wireframe.kernels.qk_norm_attention_forward import plan_forward
    from wireframe.kernels.qk_norm_attention_keys import empty_keys

    problem = attention_problem(2, 5, 70, 4, 2, 32, dtype=dtype, mask=True)
    inputs = problem[:5]
    out, lse, saved = torch.empty_like(problem.q), torch.empty(2, 2, 10), empty_keys(problem.k)
    launch.run(plan_forward(*inputs, out, lse, 89, saved=saved))
    results = []
    for given in (saved, None):
        grads = *(torch.empty_like(x) for x in problem[:3]), torch.empty(4)
        launches = plan_backward(problem.dout, *inputs, out, lse, *grads, 89, saved=given)
        assert len(launches) == (3 if given else 4)
        launch.run(launches)
        results.append([out, *grads])
    assert_same_bits(*results)
    assert_same_bits(results[0], run_attention(triton_attention, problem))


def test_equal_calls_give_equal_bits_and_a_scene_does_not_depend_on_its_batch(monkeypatch):
    from wireframe.kernels import qk_norm_attention_forward

    # Alone, a scene gets a program for each chunk of keys.
    monkeypatch.setattr(qk_norm_attention_forward, "_FEW_PROGRAMS", 3)
    monkeypatch.setattr(qk_norm_attention_forward, "CHUNK", 32)
    problem = attention_problem(3, 3, 40, 2, 1, 32, mask=True)
    batch = run_packed(problem, pack(problem))
    assert_same_bits([*batch, batch[0]], [*run_packed(problem, pack(problem)), batch[0]])
    for i in range(3):
        scene = problem.scenes(i, i + 1)
        alone = run_packed(scene, pack(scene))
        assert all(torch.equal(x[i : i + 1], y) for x, y in zip(batch[:3], alone[:3]))


@pytest.mark.parametrize("queries, keys, mask", [(3, 5, True), (3, 0, False)])
def test_the_registered_operators_pass_opcheck(queries, keys, mask):
    problem = attention_problem(2, queries, keys, 4, 2, 32, mask=mask)
    inputs = problem.q, pack(problem), problem.log_scale
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.wireframe.qk_norm_attention_kvpacked.default, (*leaves, problem.key_mask))
    with torch.no_grad():
        results = torch.ops.wireframe.qk_norm_attention_kvpacked(*inputs, problem.key_mask)
    arguments = (problem.dout, *inputs, problem.key_mask, *results)
    torch.library.opcheck(torch.ops.wireframe.qk_norm_attention_kvpacked_backward.default, arguments)


@pytest.mark.parametrize("impl, dynamic", [("triton", False), ("triton", True), ("reference", False)])
def test_a_compiled_call_is_one_graph_and_gives_the_same_results(impl, dynamic):
    problem = attention_problem(2, 5, 33, 4, 2, 32, mask=True)
    torch.compiler.reset()

    def function(q, kv, log_scale, key_mask):
        return 2 * ops.qk_norm_attention_kvpacked(q, kv, log_scale, key_mask, impl=impl)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for a, b in zip(run_packed(problem, pack(problem), compiled), run_packed(problem, pack(problem), function)):
        torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 0} if impl == "triton" else {}))


def test_only_the_first_derivative_is_there():
    problem = attention_problem(1, 3, 5)
    inputs = [x.requires_grad_() for x in (problem.q, pack(problem), problem.log_scale)]
    grads = torch.autograd.grad(packed_attention(*inputs).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"kvpacked_backward.* no autograd formula"):
        torch.autograd.grad(grads[1].sum(), inputs)


def test_the_reference_is_that_of_separate_keys_and_values_and_auto_on_the_cpu(monkeypatch):
    monkeypatch.setattr(op_module, "_forward_kvpacked", None)
    problem = attention_problem(2, 3, 5, 4, 2, 24, mask=True)
    inputs = problem.q.double(), pack(problem).double(), problem.log_scale.double()
    expected = ops.qk_norm_attention(problem.q.double(), *inputs[1].unbind(2), inputs[2], problem.key_mask)
    for impl in ("auto", "reference"):
        assert torch.equal(ops.qk_norm_attention_kvpacked(*inputs, problem.key_mask, impl=impl), expected)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: ops.qk_norm_attention_kvpacked(*x, problem.key_mask), leaves)


@pytest.mark.parametrize("change, error, words", [
    ({"kv": "[2, 5, 2, 2, 32]"}, TypeError, "kv must be a tensor, not str"),
    ({"kv": torch.zeros(2, 5, 2, 2, 32, dtype=torch.int64)}, ValueError, "kv must be floating, got int64"),
    ({"kv": torch.zeros(2, 5, 2, 32)}, ValueError, r"kv \[B, Nk, 2, Hkv, D\], got .* and \[2, 5, 2, 32\]"),
    ({"kv": torch.zeros(2, 5, 3, 2, 32)}, ValueError, r"kv \[B, Nk, 2, Hkv, D\]"),
    ({"kv": torch.zeros(1, 5, 2, 2, 32)}, ValueError, "kv must share B and D with q"),
    ({"kv": torch.zeros(2, 5, 2, 2, 64)}, ValueError, "kv must share B and D with q"),
    ({"kv": torch.zeros(2, 5, 2, 3, 32)}, ValueError, "4 query heads are no multiple of 3 key heads"),
    ({"kv": torch.zeros(2, 5, 2, 2, 32, device="meta")}, ValueError, "kv is on meta, q on cpu"),
    ({"log_scale": torch.zeros(2)}, ValueError, r"log_scale must be \[4\], got \[2\]"),
    ({"key_mask": torch.ones(2, 5)}, ValueError, r"key_mask must be bool \[2, 5\], got torch.float32"),
    ({"key_mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, r"key_mask must be bool \[2, 5\]"),
    ({"kv": torch.zeros(2, 5, 2, 2, 32).half()}, dispatch.ImplementationError, "q, kv must share .*float16"),
    ({"q": torch.zeros(2, 3, 4, 24), "kv": torch.zeros(2, 5, 2, 2, 24)}, dispatch.ImplementationError, "got 24"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(change, error, words):
    arguments = {"q": torch.zeros(2, 3, 4, 32), "kv": torch.zeros(2, 5, 2, 2, 32), "log_scale": torch.zeros(4)}
    with pytest.raises(error, match=f"^qk_norm_attention_kvpacked: .*{words}"):
        ops.qk_norm_attention_kvpacked(**{**arguments, **change}, impl="triton")

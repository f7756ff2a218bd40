"""Residual connection and norm: the kernels against float64 within the rounding budget, and bit by bit."""

import pytest
import torch
import torch.nn.functional as F

from interpreter_bf16 import interpreted_bfloat16
from norm_budget import NORM_EPS, SITE, check_budget, make_problem, run, same_bits
from poisoned_memory import guarded, poisoned_memory
from wireframe.kernels import dispatch, launch, ops, partial_sums, residual_norm, residual_norm_triton
from wireframe.kernels.dispatch import ImplementationError

interpreted = pytest.mark.skipif(
    not dispatch.INTERPRETED, reason="needs TRITON_INTERPRET=1; see test_gpu_residual_norm.py"
)
each_impl = pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=interpreted)])

FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
# Of x, branch and normed; the first is the product's.
DTYPES = [(FLOAT, BFLOAT, BFLOAT), (FLOAT, FLOAT, FLOAT), (HALF, HALF, HALF), (BFLOAT, BFLOAT, FLOAT)]
# One number; rows without a scene's axis; hashes that serve two rows; rows of three, of a tile, of no power of two and
# of the most channels; scenes that end inside a tile, and whole tiles.
SHAPES = [(1, 1), (5, 64), (2, 63, 3), (3, 2, 3, 65), (2, 65, 64), (2, 8, 256), (2, 3, 260), (1, 3, 1024)]


@pytest.fixture(autouse=True, scope="module")
def _bfloat16():
    with interpreted_bfloat16():
        yield


@pytest.fixture
def few_programs(monkeypatch):
    """Several tiles a program, and several reads of their sums."""
    monkeypatch.setattr(residual_norm_triton, "_MOST_PROGRAMS", 3)
    monkeypatch.setattr(partial_sums, "_ROWS", 2)


@pytest.fixture
def launched(monkeypatch):
    """The launches that were run."""
    found, execute = [], launch.run

    def recording(launches):
        found.extend(launches)
        execute(launches)

    monkeypatch.setattr(launch, "run", recording)
    return found


def absent(item):
    return {name for name, value in item.arguments.items() if value is None}


@interpreted
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_norm_lies_within_the_budget(shape, dtypes):
    problem = make_problem(*shape, dtypes=dtypes)
    tensors = {name: guarded(x) for name, x in problem._asdict().items() if isinstance(x, torch.Tensor)}
    with poisoned_memory():
        found = run(problem._replace(**tensors), "triton")
    check_budget(problem, found)
    expected = ops.dropout_add(problem.x, problem.branch, problem.keys, site=SITE, p=problem.p)
    assert same_bits({"total": found["total"]}, {"total": expected})
    assert same_bits({"copy": found["copy"]}, {"copy": expected.to(problem.dtype)})


@interpreted
@pytest.mark.parametrize("dtypes", [(BFLOAT, None, BFLOAT), (FLOAT, None, BFLOAT), (FLOAT, None, FLOAT)])
@pytest.mark.parametrize("shape", [(1,), (65,), *SHAPES])
def test_rms_norm_lies_within_the_budget(shape, dtypes):
    problem = make_problem(*shape, dtypes=dtypes, branch=False, dropout=False, given="normed")
    with poisoned_memory():
        found = run(problem._replace(x=guarded(problem.x), weight=guarded(problem.weight)), "triton")
    check_budget(problem, found)
    assert found.keys() == {"normed", "dx", "dweight"}


@interpreted
@pytest.mark.parametrize("shape", [(3, 33, 64), (7, 11, 260), (2, 5, 63, 3)])
def test_programs_that_go_over_several_tiles_lie_within_the_budget(shape, few_programs):
    problem = make_problem(*shape)
    with poisoned_memory():
        check_budget(problem, run(problem, "triton"))


@interpreted
@pytest.mark.parametrize("given", ["total", "normed", "copy", "total copy", "normed copy"])
@pytest.mark.parametrize("dropout", [True, False])
def test_results_that_nobody_uses_have_no_gradient_not_even_of_zeros(given, dropout, launched):
    problem = make_problem(2, 5, 64, given=given, dropout=dropout)
    with poisoned_memory():
        found = run(problem, "triton")
    check_budget(problem, found)
    assert ("dweight" in found) == ("normed" in given) and ("copy" in found) == ("copy" in given)
    assert len(launched) == (3 if "normed" in given else 2)
    missing = {f"p_d{name}" for name in ("total", "normed", "copy") if name not in given.split()}
    assert absent(launched[1]) == missing | ({"p_keys"} if not dropout else set()) | (
        {"p_partial"} if "normed" not in given else set()
    )
    if given == "total" and dropout:
        # Nothing is added to the gradient: the bits are those of the sum alone.
        leaves = problem.x.clone().requires_grad_(), problem.branch.clone().requires_grad_()
        out = ops.dropout_add(*leaves, problem.keys, site=SITE, p=problem.p)
        expected = dict(zip(("dx", "dbranch"), torch.autograd.grad(out, leaves, problem.dtotal)))
        assert same_bits({name: found[name] for name in expected}, expected)


@each_impl
def test_a_copy_in_its_own_dtype_is_the_total_itself(impl):
    problem = make_problem(2, 5, 64, dtypes=(FLOAT, FLOAT, FLOAT))
    arguments = problem.x, problem.branch, problem.weight, problem.keys
    result = ops.residual_norm(*arguments, p=0.1, impl=impl)
    assert result.copy is result.total and result.normed.dtype == FLOAT
    assert ops.residual_norm(*arguments, p=0.1, copy=False, impl=impl).copy is None
    assert ops.residual_norm(*arguments, p=0.1, dtype=HALF, copy=False, impl=impl).copy is None


@each_impl
def test_without_keys_or_with_p_of_zero_it_is_the_plain_sum(impl):
    problem = make_problem(2, 5, 63, dtypes=(FLOAT, HALF, HALF))
    problem.x[0, 0], problem.branch[0, 0] = -0.0, -0.0
    for changed in (problem._replace(keys=None), problem._replace(p=0.0)):
        found = run(changed, impl)
        assert same_bits({"total": found["total"]}, {"total": problem.x + problem.branch})
        assert same_bits(found, run(problem._replace(keys=None, p=0.0), impl))


def test_the_reference_is_the_norm_of_torch():
    problem = make_problem(3, 5, 64, dtypes=(FLOAT, FLOAT, FLOAT), dropout=False)
    result = ops.residual_norm(problem.x, problem.branch, problem.weight, dtype=FLOAT, impl="reference")
    expected = F.rms_norm(problem.x + problem.branch, (64,), problem.weight, NORM_EPS)
    torch.testing.assert_close(result.normed, expected)
    assert torch.equal(ops.rms_norm(result.total, problem.weight, impl="reference"), result.normed)


def test_gradients_of_the_reference_in_float64():
    problem = make_problem(2, 3, 5, dtypes=(FLOAT, FLOAT, FLOAT)).double()
    leaves = [x.requires_grad_() for x in problem[:3]]

    def function(x, branch, weight):
        return ops.residual_norm(x, branch, weight, problem.keys, site=SITE, p=0.4, impl="reference")

    assert function(*leaves).normed.dtype == torch.float64
    assert torch.autograd.gradcheck(function, leaves) and torch.autograd.gradgradcheck(function, leaves)
    assert torch.autograd.gradcheck(lambda x, weight: ops.rms_norm(x, weight, eps=1e-3), leaves[::2])


def views():
    """Name, and what makes a view of a contiguous [4, 5, 64] or of one like it."""
    yield "one for all scenes", lambda x: x[:1].expand(4, -1, -1)
    yield "transposed", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)
    yield "every other number", lambda x: x.repeat_interleave(2, -1)[..., ::2]
    yield "rows of longer scenes", lambda x: F.pad(x, (0, 0, 2, 1))[:, 2:-1]
    yield "scenes no whole rows apart", lambda x: F.pad(x.flatten(1), (0, 3))[:, :-3].view(x.shape)
    yield "from an odd address", lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape)


@interpreted
@pytest.mark.parametrize("view", [pytest.param(view, id=name) for name, view in views()])
def test_views_give_what_their_copies_give(view, launched):
    problem = make_problem(4, 5, 64)
    viewed = problem._replace(**{
        name: view(getattr(problem, name)) for name in ("x", "branch", "dtotal", "dnormed", "dcopy")
    })  # fmt: skip
    copies = viewed._replace(**{
        name: x.clone(memory_format=torch.contiguous_format)
        for name, x in viewed._asdict().items() if isinstance(x, torch.Tensor)
    })  # fmt: skip
    with poisoned_memory():
        found = run(viewed, "triton")
    assert same_bits(found, run(copies, "triton"))
    assert all(x.is_contiguous() for x in found.values())
    # Or a compiled kernel would add up rows in another order.
    assert all(x.data_ptr() % 16 == 0 for item in launched for x in item.arguments.values() if hasattr(x, "data_ptr"))
    viewed, copies = (part._replace(branch=None, keys=None, dtotal=None, dcopy=None) for part in (viewed, copies))
    assert same_bits(run(viewed, "triton"), run(copies, "triton"))


@interpreted
def test_an_embedding_of_all_scenes_is_read_in_place_and_gets_the_sum_of_their_gradients(monkeypatch):
    problem, read = make_problem(3, 5, 8), []
    embedding = problem.x[0].clone().requires_grad_()
    plan = residual_norm_triton.plan_forward
    monkeypatch.setattr(residual_norm_triton, "plan_forward", lambda x, *a, **k: (read.append(x), plan(x, *a, **k))[1])
    result = ops.residual_norm(
        embedding.expand(3, -1, -1), problem.branch, problem.weight, problem.keys, p=0.1, impl="triton"
    )
    assert read[0].data_ptr() == embedding.data_ptr() and read[0].stride(0) == 0
    dembedding, = torch.autograd.grad(result.total, embedding, problem.dtotal)
    assert torch.equal(dembedding, problem.dtotal.sum(0))


@interpreted
@pytest.mark.parametrize("shape", [(5, 3, 64), (5, 9, 63), (5, 8, 256)])
def test_repeated_calls_give_equal_bits_and_a_scene_has_its_own_in_any_batch(shape, few_programs):
    problem = make_problem(*shape)
    whole = run(problem, "triton")
    assert same_bits(whole, run(problem, "triton"))
    # A sum over all scenes.
    del whole["dweight"]
    for order in ([2], [4, 0], [3, 1, 2, 0, 4]):
        part = run(problem.scenes(order), "triton")
        del part["dweight"]
        assert same_bits(part, {name: x[order] for name, x in whole.items()})


@interpreted
def test_only_what_is_wanted_is_launched_and_kept(launched):
    problem = make_problem(2, 5, 64)
    x, branch, weight, keys = problem[:4]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        leaves = [t.clone().requires_grad_() for t in (x, branch, weight)]
        result = ops.residual_norm(*leaves, keys, p=0.1, dtype=BFLOAT, impl="triton")
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (result.total, leaves[2], keys)}
    result.normed.backward(problem.dnormed)
    assert [item.kernel.fn.__name__ for item in launched] == [
        "_residual_norm_fwd_kernel", "_residual_norm_bwd_kernel", "_column_sums_kernel",
    ]  # fmt: skip
    for wanted, unwanted in (
        (0, {"p_dbranch", "p_partial"}), (1, {"p_dx", "p_partial"}), (2, {"p_dx", "p_dbranch"}),
    ):  # fmt: skip
        del launched[:]
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, branch, weight))]
        result = ops.residual_norm(*leaves, keys, p=0.1, dtype=BFLOAT, impl="triton")
        torch.autograd.backward(result, problem[5:8])
        assert absent(launched[1]) == unwanted and len(launched) == (3 if wanted == 2 else 2)
    # Weight has no part in the total.
    weight = weight.clone().requires_grad_()
    ops.residual_norm(x.clone().requires_grad_(), branch, weight, keys, p=0.1, impl="triton").total.sum().backward()
    assert weight.grad is None
    del launched[:]
    ops.rms_norm(x.clone().requires_grad_(), weight, impl="triton").sum().backward()
    assert absent(launched[1]) == {"p_keys", "p_dtotal", "p_dcopy", "p_dbranch"} and len(launched) == 3


@interpreted
def test_weights_of_other_dtypes_get_gradients_of_their_own():
    problem = make_problem(2, 5, 64)
    weight = problem.weight.half().requires_grad_()
    ops.rms_norm(problem.x, weight, impl="triton").sum().backward()
    expected = (problem.x * torch.rsqrt(problem.x.square().mean(-1, keepdim=True))).sum((0, 1))
    assert weight.grad.dtype == HALF
    torch.testing.assert_close(weight.grad, expected.half(), rtol=2e-3, atol=2e-2)


@each_impl
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 5, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_gives_nothing(shape, impl):
    problem = make_problem(*shape, dtypes=(FLOAT, FLOAT, HALF))
    found = run(problem, impl)
    alone = run(problem._replace(branch=None, keys=None, dtotal=None, dcopy=None), impl)
    for results in (found, alone):
        assert all(x.shape == (shape[-1:] if name == "dweight" else shape) for name, x in results.items())
        assert not results["dweight"].any()


X, W, KEYS = torch.zeros(2, 3), torch.ones(3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("change, said", [
    ({"x": [0.0]}, "x must be a tensor, not list"),
    ({"branch": X.long()}, "branch must be floating, got int64"),
    ({"branch": X[:1]}, r"share one shape \[B, ...\], got \[2, 3\] and \[1, 3\]"),
    ({"branch": X.to("meta")}, "branch is on meta, x on cpu"),
    ({"weight": None}, "weight must be a tensor, not NoneType"),
    ({"weight": W[:2]}, r"weight must be \[C\] for x \[..., C\], got \[2\] for \[2, 3\]"),
    ({"weight": W.to("meta")}, "weight is on meta, x on cpu"),
    ({"keys": KEYS[:1]}, r"keys must be int64 \[2\], one for each scene, got torch.int64 \[1\]"),
    ({"keys": KEYS.to("meta")}, "keys is on meta, x on cpu"),
    ({"site": 1 << 31}, r"site must be in \[0, 2\^31\), got 2147483648"),
    ({"p": 1.0}, r"p must be in \[0, 1\), got 1.0"),
    ({"eps": "a"}, "eps must be a number, not str"),
    ({"eps": 0.0}, "eps must be positive and finite, got 0.0"),
    ({"dtype": "half"}, "dtype must be a dtype, not str"),
    ({"dtype": torch.int64}, "dtype must be floating, got torch.int64"),
    ({"copy": 1}, "copy must be a bool, not int"),
    ({"impl": "fast"}, "unknown impl 'fast'"),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_in_one_line(change, said):
    arguments = {"x": X, "branch": X, "weight": W, "keys": KEYS} | change
    with pytest.raises((TypeError, ValueError), match=f"^residual_norm: .*{said}") as error:
        ops.residual_norm(**arguments)
    assert "\n" not in str(error.value)
    if not change.keys() & {"branch", "keys", "site", "p", "copy"}:
        arguments = {"x": X, "weight": W} | change
        with pytest.raises((TypeError, ValueError), match=f"^rms_norm: {said}"):
            ops.rms_norm(**arguments)


def test_what_the_kernels_do_not_take_is_refused_or_left_to_the_reference(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    long, weight = torch.ones(2, 1025), torch.ones(1025)
    for call in (
        lambda x, weight, **options: ops.rms_norm(x, weight, **options),
        lambda x, weight, **options: ops.residual_norm(x, x, weight, **options).normed,
    ):
        with pytest.raises(ImplementationError, match="float64"):
            call(X.double(), W, impl="triton")
        with pytest.raises(ImplementationError, match="float64"):
            call(X, W, dtype=torch.float64, impl="triton")
        with pytest.raises(ImplementationError, match="at most 1024 channels, got 1025"):
            call(long, weight, impl="triton")
        torch.testing.assert_close(call(long, weight), long)
        assert call(X.double(), W).dtype == torch.float64
        with monkeypatch.context() as patch:
            patch.setattr(residual_norm, "_INTERPRETED_DTYPES", (torch.float32,))
            with pytest.raises(ImplementationError, match="bfloat16"):
                call(X, W, dtype=BFLOAT, impl="triton")
    assert {"residual_norm", "rms_norm"} <= set(dispatch.MODEL_OPS)


def test_tensors_without_memory_take_the_kernels_and_get_shapes():
    x, branch = torch.empty(2, 3, 8, device="meta"), torch.empty(2, 3, 8, dtype=BFLOAT, device="meta")
    found = ops.residual_norm(x, branch, torch.empty(8, device="meta"), dtype=BFLOAT)
    assert [(a.shape, a.dtype) for a in found] == [(x.shape, FLOAT), (x.shape, BFLOAT), (x.shape, BFLOAT)]


@interpreted
@pytest.mark.parametrize("shape, copy", [((3, 5, 8), True), ((0, 4), False)])
def test_the_registered_operators_pass_opcheck(shape, copy):
    x, branch, weight, keys, _, dtotal, dnormed, _, _ = make_problem(*shape, dtypes=(FLOAT, FLOAT, HALF))
    x, branch, weight = (t.requires_grad_() for t in (x, branch, weight))
    torch.library.opcheck(
        torch.ops.wireframe.residual_norm.default,
        (x, branch, weight, keys if copy else None, 3, 6554, 1e-6, HALF, copy),
    )
    torch.library.opcheck(torch.ops.wireframe.rms_norm.default, (x, weight, 1e-6, HALF))
    x, weight = x.detach(), weight.detach()
    torch.library.opcheck(
        torch.ops.wireframe.residual_norm_backward.default,
        (dtotal, dnormed, None, x, weight, keys, 3, 6554, 1e-6, FLOAT if copy else None, HALF, copy),
    )


@each_impl
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_call_is_one_graph_with_the_same_bits(impl, backend):
    problem = make_problem(3, 5, 8, dtypes=(FLOAT, FLOAT, HALF))
    torch.compiler.reset()

    def function(x, branch, weight, keys):
        total, normed, copy = ops.residual_norm(x, branch, weight, keys, site=3, p=0.1, dtype=HALF, impl=impl)
        return total + ops.rms_norm(2 * normed, weight, impl=impl) * copy

    found = []
    for call in (torch.compile(function, fullgraph=True, backend=backend), function):
        leaves = [t.clone().requires_grad_() for t in problem[:3]]
        out = call(*leaves, problem.keys)
        found.append(dict(enumerate([out.detach(), *torch.autograd.grad(out, leaves, problem.dtotal)])))
    assert same_bits(*found)

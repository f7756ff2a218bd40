"""A linear map and GELU as one operation: the kernels against float64 within the rounding budget, and bit by bit."""

import pytest
import torch
import torch.nn.functional as F

from gelu_budget import check_budget, make_problem, run, same_bits
from interpreter_bf16 import interpreted_bfloat16
from poisoned_memory import guarded, poisoned_memory
from wireframe.kernels import cpu_products, dispatch, launch, linear_gelu, linear_gelu_triton, ops, partial_sums
from wireframe.kernels.dispatch import ImplementationError

interpreted = pytest.mark.skipif(
    not dispatch.INTERPRETED, reason="needs TRITON_INTERPRET=1; see test_gpu_linear_gelu.py"
)
each_impl = pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=interpreted)])

FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
DTYPES = [FLOAT, HALF, BFLOAT]
# Rows, columns, terms: one of each; less than a tile and more than one in every direction; whole tiles; the longest.
SHAPES = [((1,), 1, 1), ((5,), 3, 7), ((63,), 65, 33), ((2, 65), 200, 129), ((128,), 64, 128), ((9,), 17, 1024)]


@pytest.fixture(autouse=True, scope="module")
def _bfloat16():
    with interpreted_bfloat16():
        yield


@pytest.fixture
def launched(monkeypatch):
    """The launches that were run."""
    found, execute = [], launch.run

    def recording(launches):
        found.extend(launches)
        execute(launches)

    monkeypatch.setattr(launch, "run", recording)
    return found


def names(launches):
    return [item.kernel.fn.__name__.removeprefix("_linear_gelu") for item in launches]


@interpreted
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns, terms", SHAPES)
def test_results_lie_within_the_budget(rows, columns, terms, dtype, bias):
    problem = make_problem(*rows, columns=columns, terms=terms, dtype=dtype, bias=bias)
    with poisoned_memory():
        found = run(problem.change(guarded), "triton")
    check_budget(problem, found)
    assert found.keys() == {"out", "dx", "dweight"} | ({"dbias"} if bias else set())


@interpreted
@pytest.mark.parametrize("dtypes", [(BFLOAT, FLOAT), (HALF, BFLOAT), (FLOAT, HALF)])
def test_a_bias_of_another_dtype_gets_a_gradient_of_its_own(dtypes):
    problem = make_problem(33, columns=20, terms=40, dtype=dtypes[0], bias_dtype=dtypes[1])
    found = run(problem, "triton")
    assert found["dbias"].dtype == dtypes[1]
    check_budget(problem, found)


@interpreted
def test_sums_of_many_row_blocks_lie_within_the_budget(monkeypatch):
    monkeypatch.setattr(partial_sums, "_ROWS", 2)
    problem = make_problem(300, columns=40, terms=16)
    with poisoned_memory():
        check_budget(problem, run(problem, "triton"))


def curve(values, dtype=FLOAT):
    """GELU and its derivative at values, by a product with 1."""
    x = values.to(dtype)[:, None].requires_grad_()
    out = ops.linear_gelu(x, torch.ones(1, 1, dtype=dtype), impl="triton")
    slope, = torch.autograd.grad(out, x, torch.ones_like(out))
    return out.detach()[:, 0], slope[:, 0]


@interpreted
@pytest.mark.filterwarnings("ignore:.* encountered in multiply")
def test_gelu_and_its_derivative_are_exact_to_float32():
    y = torch.cat([torch.linspace(-18, 18, 4001), torch.tensor([0.0, -0.0, 1e-30, 1e4, -1e4, 3e38, -3e38])])
    out, slope = curve(y)
    wide = y.double()
    cdf, density = torch.special.ndtr(wide), torch.exp(-wide.square() / 2) * (2 * torch.pi) ** -0.5
    rounding = 6e-8
    assert ((out - wide * cdf).abs() <= rounding * (wide.abs().clamp_max(6) + (wide * cdf).abs())).all()
    assert ((slope - cdf - wide * density).abs() <= 4 * rounding).all()
    # No worse than torch, which takes erf; by the approximation with tanh both would be.
    assert (out - wide * cdf).abs().max() <= (F.gelu(y) - wide * cdf).abs().max()
    out, slope = curve(torch.tensor([torch.inf, -torch.inf, torch.nan]))
    assert out[0] == torch.inf and out[1] == 0 and out[2].isnan() and slope[2].isnan()


@interpreted
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
def test_half_precision_is_rounded_once(dtype):
    problem = make_problem(65, columns=70, terms=100, dtype=dtype)
    wide = problem.change(lambda x: x.double())
    leaf = F.linear(wide.x, wide.weight, wide.bias).requires_grad_()
    exact = F.gelu(leaf)
    dy, = torch.autograd.grad(exact, leaf, wide.dout)
    found = ops.linear_gelu(*problem[:3], impl="triton")
    found_dy, dbias = torch.ops.wireframe.linear_gelu_backward(problem.dout, *problem[:3], True)
    half_a_step = torch.finfo(dtype).eps / 2
    for result, expected in ((found, exact), (found_dy, dy), (dbias, dy.sum(0))):
        # Beside it what float32 and the smallest step of float16 leave.
        assert ((result - expected).abs() <= half_a_step * expected.abs() + 2e-5).all()


@interpreted
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
def test_a_row_has_its_bits_beside_any_others(dtype):
    # Sums of such numbers are exact: NumPy, which multiplies here, has an order of its own for the last rows of a tile.
    problem = make_problem(200, columns=65, terms=70, dtype=dtype).change(lambda x: (8 * x).round() / 8)

    def rows(problem):
        dy, _ = torch.ops.wireframe.linear_gelu_backward(problem.dout, *problem[:3], True)
        return {"out": ops.linear_gelu(*problem[:3], impl="triton"), "dy": dy}

    whole = rows(problem)
    for order in (slice(0, 200), slice(7, 8), slice(150, 200), [199, 3, 64], list(range(129))):
        assert same_bits(rows(problem.rows(order)), {name: x[order] for name, x in whole.items()})
    # Not even by numbers that are none; the last row is also read in place of those behind it.
    others = list(range(199))
    problem.x[199] = torch.nan
    found = rows(problem)
    assert same_bits({name: x[others] for name, x in found.items()}, {name: x[others] for name, x in whole.items()})
    assert found["out"][199].isnan().all() and found["dy"][199].isnan().all()


@interpreted
def test_repeated_calls_give_equal_bits():
    problem = make_problem(140, columns=65, terms=70)
    first = run(problem, "triton")
    assert all(same_bits(first, run(problem, "triton")) for _ in range(2))


def views():
    """Name, and what makes a view of a contiguous [6, 32, 64] or of one like it, its rows 64 or another number long."""
    yield "rows of longer ones", lambda x: F.pad(x, (0, 16))[..., :-16]
    yield "rows a little apart", lambda x: F.pad(x, (0, 3))[..., :-3]
    yield "every other number", lambda x: x.repeat_interleave(2, -1)[..., ::2]
    yield "transposed", lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)
    yield "one for all", lambda x: x[:1].expand_as(x)
    yield "from an odd address", lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape)


@interpreted
@pytest.mark.parametrize("width", [64, 33])
@pytest.mark.parametrize("view", [pytest.param(view, id=name) for name, view in views()])
def test_views_give_what_their_copies_give(view, width, launched):
    problem = make_problem(6, 32, columns=width, terms=width).change(view)
    with poisoned_memory():
        found = run(problem, "triton")
    copies = problem.change(lambda x: x.clone(memory_format=torch.contiguous_format))
    assert same_bits(found, run(copies, "triton"))
    assert all(x.is_contiguous() for x in found.values())
    # Or a compiled kernel could lay out its tiles, and so its sums, in another way.
    addresses = [x.data_ptr() for item in launched for x in item.arguments.values() if hasattr(x, "data_ptr")]
    assert not any(address % 16 for address in addresses)
    apart = {value for item in launched for name, value in item.arguments.items() if name.endswith("_stride")}
    assert apart <= {64, 80} if width == 64 else apart == {33}


@interpreted
def test_rows_in_pieces_are_read_where_they_are(launched):
    x = torch.randn(5, 9, 128)[..., :64]
    ops.linear_gelu(x, torch.randn(8, 64), impl="triton")
    assert launched[0].arguments["p_x"].data_ptr() == x.data_ptr() and launched[0].arguments["x_stride"] == 128


@interpreted
def test_only_what_is_wanted_is_launched_and_kept(launched, monkeypatch):
    problem, kept, products = make_problem(7, columns=8, terms=16), [], []
    x, weight, bias = problem[:3]
    with torch.no_grad():
        ops.linear_gelu(x.clone().requires_grad_(), weight, bias, impl="triton")
    assert names(launched) == ["_fwd_kernel"]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        leaf = x.clone().requires_grad_()
        ops.linear_gelu(leaf, weight, bias, impl="triton")
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (leaf, weight, bias)]
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (products.append((a, b)), matmul(a, b))[1])
    for wanted, kernels, count in (
        ("x weight bias", ["_fwd_kernel", "_bwd_kernel", "_column_sums_kernel"], 2),
        ("weight", ["_fwd_kernel", "_bwd_kernel"], 1), ("x", ["_fwd_kernel", "_bwd_kernel"], 1),
        ("bias", ["_fwd_kernel", "_bwd_kernel", "_column_sums_kernel"], 0),
    ):  # fmt: skip
        del launched[:], products[:]
        run(problem, "triton", wanted)
        assert names(launched) == kernels and len(products) == count
        assert (launched[1].arguments["p_partial"] is None) == ("bias" not in wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_depend_on_architecture_and_dtype_alone(dtype):
    def constants(rows, architecture):
        x, out, dy = (torch.empty(rows, n, dtype=dtype, device="meta") for n in (32, 24, 24))
        weight, bias = torch.empty(24, 32, dtype=dtype, device="meta"), torch.empty(24, dtype=dtype, device="meta")
        planned = linear_gelu_triton.plan_forward(x, weight, bias, out, architecture)
        planned += linear_gelu_triton.plan_backward(out, x, weight, bias, dy, bias, architecture)
        return [
            ({name: value for name, value in item.arguments.items() if name.isupper()}, item.num_warps, item.num_stages)
            for item in planned
        ]

    for architecture in launch.ARCHITECTURES:
        assert constants(1, architecture) == constants(100_000, architecture)
        forward, backward, _ = constants(1, architecture)
        # The same y again.
        assert forward == backward


def test_the_reference_is_what_torch_computes():
    x, weight, bias, _ = make_problem(3, 5, columns=17, terms=33)
    assert torch.equal(ops.linear_gelu(x, weight, bias, impl="reference"), F.gelu(F.linear(x, weight, bias)))
    assert torch.equal(ops.linear_gelu(x, weight), F.gelu(F.linear(x, weight)))
    assert torch.equal(ops.linear_gelu(x.half(), weight.half()), F.gelu(F.linear(x.half(), weight.half())))


@pytest.mark.parametrize("native", [True, False])
def test_where_a_cpu_cannot_multiply_bfloat16_it_is_rounded_once(native, monkeypatch):
    monkeypatch.setattr(cpu_products, "has_bfloat16_products", lambda: native)
    x, weight, bias, _ = make_problem(9, columns=17, terms=33, dtype=BFLOAT)
    once = F.gelu(F.linear(x.float(), weight.float(), bias.float())).to(BFLOAT)
    twice = F.gelu(F.linear(x, weight, bias))
    assert torch.equal(ops.linear_gelu(x, weight, bias), twice if native else once) and not torch.equal(once, twice)


def test_gradients_of_the_reference_in_float64():
    leaves = [x.double().requires_grad_() for x in make_problem(2, 3, columns=4, terms=5)[:3]]
    assert ops.linear_gelu(*leaves).dtype == torch.float64
    assert torch.autograd.gradcheck(ops.linear_gelu, leaves) and torch.autograd.gradgradcheck(ops.linear_gelu, leaves)


@each_impl
@pytest.mark.parametrize("rows, columns", [((0,), 3), ((2, 0), 3), ((2,), 0), ((0, 4), 0)])
def test_nothing_gives_nothing(rows, columns, impl):
    problem = make_problem(*rows, columns=columns, terms=4)
    found = run(problem, impl)
    assert {name: x.shape for name, x in found.items()} == {
        "out": (*rows, columns), "dx": problem.x.shape, "dweight": (columns, 4), "dbias": (columns,)
    }  # fmt: skip
    assert not any(x.any() for x in found.values())


def test_without_terms_it_is_gelu_of_the_bias():
    problem = make_problem(2, columns=3, terms=0)
    assert torch.equal(run(problem, "auto")["out"], F.gelu(problem.bias).expand(2, 3))


@each_impl
def test_autocast_does_not_reach_inside(impl):
    problem = make_problem(5, columns=8, terms=16)
    # What autograd makes of the reference is no part of it.
    expected = run(problem, impl, "x weight bias" if impl == "triton" else "")
    with torch.autocast("cpu", BFLOAT):
        found = run(problem, impl, "x weight bias" if impl == "triton" else "")
    assert same_bits(found, expected)


X, W, B = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4)


@pytest.mark.parametrize("change, said", [
    ({"x": [0.0]}, "x must be a tensor, not list"),
    ({"x": torch.zeros(())}, r"weight must be \[N, K\] for x \[..., K\], got \[4, 3\] for \[\]"),
    ({"x": X.long()}, "x must be floating, got int64"),
    ({"weight": W[0]}, r"weight must be \[N, K\] for x \[..., K\], got \[3\] for \[2, 3\]"),
    ({"weight": W[:, :2]}, r"weight must be \[N, K\] for x \[..., K\], got \[4, 2\] for \[2, 3\]"),
    ({"weight": W.half()}, "x and weight must share one dtype, got torch.float32 and torch.float16"),
    ({"weight": W.to("meta")}, "weight is on meta, x on cpu"),
    ({"bias": 1.0}, "bias must be a tensor, not float"),
    ({"bias": B[:3]}, r"bias must be \[4\], got \[3\]"),
    ({"bias": B.long()}, "bias must be floating, got int64"),
    ({"bias": B.to("meta")}, "bias is on meta, x on cpu"),
    ({"impl": "fast"}, "unknown impl 'fast'"),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_in_one_line(change, said):
    with pytest.raises((TypeError, ValueError), match=f"^linear_gelu: {said}") as error:
        ops.linear_gelu(**({"x": X, "weight": W, "bias": B} | change))
    assert "\n" not in str(error.value)


def test_what_the_kernels_do_not_take_is_refused_or_left_to_the_reference(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    with pytest.raises(ImplementationError, match="not built"):
        ops.linear_gelu(X, W, impl="native")
    for x, weight, bias, said in (
        (X.double(), W.double(), None, "got torch.float64"), (X, W, B.double(), "got torch.float64"),
        (torch.zeros(2, 1025), torch.zeros(4, 1025), None, "rows of 1 to 1024 numbers, got 1025"),
        (X[:, :0], W[:, :0], None, "rows of 1 to 1024 numbers, got 0"),
    ):  # fmt: skip
        with pytest.raises(ImplementationError, match=said):
            ops.linear_gelu(x, weight, bias, impl="triton")
        assert ops.linear_gelu(x, weight, bias).dtype == x.dtype
    monkeypatch.setattr(linear_gelu, "_INTERPRETED_DTYPES", (FLOAT,))
    with pytest.raises(ImplementationError, match="bfloat16"):
        ops.linear_gelu(X.to(BFLOAT), W.to(BFLOAT), impl="triton")
    assert "linear_gelu" in dispatch.MODEL_OPS


def test_tensors_without_memory_take_the_kernels_and_get_shapes():
    x, weight, bias = (torch.empty(*shape, dtype=BFLOAT, device="meta") for shape in ((2, 3, 8), (5, 8), (5,)))
    out = ops.linear_gelu(x, weight.requires_grad_(), bias)
    assert out.shape == (2, 3, 5) and out.dtype == BFLOAT
    out.backward(torch.empty_like(out))
    assert weight.grad.shape == (5, 8)


@interpreted
@pytest.mark.parametrize("rows, bias", [((3, 5), True), ((4,), False), ((0,), True)])
def test_the_registered_operators_pass_opcheck(rows, bias):
    x, weight, bias, dout = make_problem(*rows, columns=8, terms=16, bias=bias, bias_dtype=HALF)
    leaves = [None if a is None else a.clone().requires_grad_() for a in (x, weight, bias)]
    torch.library.opcheck(torch.ops.wireframe.linear_gelu.default, leaves)
    for wants_dbias in {False, bias is not None}:
        torch.library.opcheck(
            torch.ops.wireframe.linear_gelu_backward.default, (dout, x, weight, bias, wants_dbias)
        )


@each_impl
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_call_is_one_graph_with_the_same_bits(impl, backend):
    problem = make_problem(3, 5, columns=16, terms=16)
    torch.compiler.reset()

    def function(x, weight, bias):
        return ops.linear_gelu(2 * ops.linear_gelu(x, weight, bias, impl=impl), weight, impl=impl)

    found = []
    for call in (torch.compile(function, fullgraph=True, backend=backend), function):
        leaves = [t.clone().requires_grad_() for t in problem[:3]]
        out = call(*leaves)
        found.append(dict(enumerate([out.detach(), *torch.autograd.grad(out, leaves, problem.dout)])))
    assert same_bits(*found)

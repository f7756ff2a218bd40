"""A linear map with GELU: the kernels against float64 within the rounding of their dtype."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from interpreter_bf16 import interpreted_bfloat16
from poisoned_memory import poisoned_memory

from kernel_budget import check
from wireframe.kernels import cpu_products, dispatch, ops

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_interpreter = pytest.mark.skipif(not dispatch.INTERPRETED, reason="needs TRITON_INTERPRET=1")
# (M, K, N): one row, sizes around the tiles, and no multiples of anything.
SIZES = [(1, 128, 64), (63, 64, 65), (130, 96, 130), (65, 33, 7), (5, 1, 3)]


def problem(rows, inputs, outputs, dtype=torch.float32, bias=True, seed=0):
    """x, weight, bias and the gradient of the output, representable in the dtype."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(rows, inputs), (outputs, inputs), (outputs,), (rows, outputs)]
    x, weight, shift, dout = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    return x, (weight * inputs**-0.5).to(dtype), shift if bias else None, dout


def results(x, weight, bias, dout, impl):
    """out, dx, dweight and, with a bias, dbias."""
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = ops.linear_gelu(*inputs, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def interpreted(dtype):
    return interpreted_bfloat16() if dtype == torch.bfloat16 else contextlib.nullcontext()


def scales(x, weight, bias, dout, exact, eps):
    """Sums of absolute terms. y is in float32, and moves by r = eps(float32) / eps of its terms; |gelu'| < 1.13 and
    |gelu''| < 0.8. What is stored or enters a product again is rounded to the dtype."""
    r = torch.finfo(torch.float32).eps / eps
    y = x.abs() @ weight.abs().T + (0 if bias is None else bias.abs())
    slope = torch.func.vmap(torch.func.grad(F.gelu))
    pre = F.linear(x, weight, bias)
    slopes = slope(pre.reshape(-1)).reshape(pre.shape).abs()
    dy = dout.abs() * (slopes + r * (1 + 0.8 * y))
    found = [exact[0].abs() + r * (pre.abs() + 1.13 * y), dy @ weight.abs(), dy.T @ x.abs(), dy.sum(0)]
    # Below its smallest normal number float16 rounds to a fixed spacing.
    least = 6.1e-5 if eps == torch.finfo(torch.float16).eps else 0.0
    return [scale.clamp_min(least) for scale in found[: len(exact)]]


@needs_interpreter
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_lie_within_the_rounding_of_their_dtype(dtype, size, bias):
    given = problem(*size, dtype, bias)
    double = [None if t is None else t.double() for t in given]
    exact, eager = results(*double, "reference"), results(*given, "reference")
    with interpreted(dtype), poisoned_memory():
        found = results(*given, "triton")
    eps = torch.finfo(dtype).eps
    names = ("out", "dx", "dweight", "dbias")
    for name, a, b, c, scale in zip(names, found, exact, eager, scales(*double, exact, eps)):
        assert a.dtype == dtype
        check(name, a, b, c, scale, eps)


@needs_interpreter
def test_features_want_no_gradient_and_get_none():
    x, weight, _, dout = problem(70, 64, 40, bias=False)
    leaf = weight.requires_grad_()
    out = ops.linear_gelu(x, leaf, impl="triton")
    (dweight,) = torch.autograd.grad(out, leaf, dout)
    exact = results(x.double(), weight.double(), None, dout.double(), "reference")[2]
    torch.testing.assert_close(dweight.double(), exact, rtol=0, atol=2e-6 * exact.abs().max().item() * 8)


@needs_interpreter
def test_a_row_does_not_depend_on_the_others_and_repeats_are_equal():
    x, weight, bias, dout = problem(200, 64, 70)
    whole = results(x, weight, bias, dout, "triton")
    again = results(x, weight, bias, dout, "triton")
    assert all(torch.equal(a, b) for a, b in zip(whole, again))
    # Blocks of rows: within one NumPy's products, which the interpreter takes, depend on the place.
    for start, end in ((0, 64), (64, 192), (128, 200)):
        part = results(x[start:end], weight, bias, dout[start:end], "triton")
        assert torch.equal(part[0], whole[0][start:end])


@needs_interpreter
def test_any_shape_and_any_strides():
    x, weight, bias, dout = problem(30, 16, 24)
    flat = results(x, weight, bias, dout, "triton")
    shaped = results(x.view(2, 3, 5, 16), weight, bias, dout.view(2, 3, 5, 24), "triton")
    assert shaped[0].shape == (2, 3, 5, 24) and torch.equal(shaped[0].view(30, 24), flat[0])
    assert torch.equal(shaped[1].view(30, 16), flat[1]) and torch.equal(shaped[2], flat[2])
    wide = torch.randn(30, 50)
    wide[:, 3:19] = x
    strided = results(wide[:, 3:19], weight.t().contiguous().t(), bias, dout.t().contiguous().t(), "triton")
    assert all(torch.equal(a, b) for a, b in zip(strided, flat))
    empty = results(x[:0], weight, bias, dout[:0], "triton")
    assert empty[0].shape == (0, 24) and not empty[2].any() and not empty[3].any()


@needs_interpreter
def test_the_operators_are_sound():
    x, weight, bias, dout = problem(9, 16, 8)
    for shift in (bias, None):
        inputs = [x.requires_grad_(), weight.requires_grad_(), None if shift is None else shift.requires_grad_()]
        torch.library.opcheck(torch.ops.wireframe.linear_gelu, tuple(inputs))
        arguments = (dout, x.detach(), weight.detach(), shift if shift is None else shift.detach())
        torch.library.opcheck(torch.ops.wireframe.linear_gelu_backward, (*arguments, shift is not None))


def test_the_reference_has_derivatives_and_is_what_torch_computes():
    x, weight, bias, _ = (t.double() for t in problem(4, 5, 3))
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *i: ops.linear_gelu(*i, impl="reference"), inputs)
    assert torch.equal(ops.linear_gelu(*inputs), F.gelu(F.linear(*inputs)))


def test_without_instructions_bfloat16_is_rounded_once(monkeypatch):
    x, weight, bias, _ = problem(20, 64, 30, torch.bfloat16)
    monkeypatch.setattr(cpu_products, "has_bfloat16_products", lambda: False)
    found = ops.linear_gelu(x, weight, bias)
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    assert found.dtype == torch.bfloat16
    # One rounding of 2^-8, and a little for the sums in float32.
    assert ((found.double() - exact).abs() <= 2.0**-7.99 * exact.abs() + 1e-5).all()


def test_autocast_does_not_reach_inside():
    x, weight, bias, _ = problem(20, 64, 30)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.linear_gelu(x, weight, bias, impl="triton" if dispatch.INTERPRETED else "reference")
    assert not dispatch.INTERPRETED or torch.equal(found, ops.linear_gelu(x, weight, bias, impl="triton"))


@pytest.mark.parametrize(
    "x, weight, bias, text",
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), None, r"weight must be \[N, K\] for x"),
        (torch.zeros(2, 3), torch.zeros(3), None, r"weight must be \[N, K\]"),
        (torch.zeros(2, 3), torch.zeros(4, 3).half(), None, "share one dtype"),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3), r"bias must be \[4\], got \[3\]"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 3), None, "x must be floating"),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, bias, text):
    with pytest.raises(ValueError, match=text):
        ops.linear_gelu(x, weight, bias)


@needs_interpreter
def test_what_the_kernels_do_not_take_is_refused_or_left_to_the_reference():
    x, weight = torch.zeros(2, 1025), torch.zeros(3, 1025)
    with pytest.raises(dispatch.ImplementationError, match="at most 1024 inputs"):
        ops.linear_gelu(x, weight, impl="triton")
    assert ops.linear_gelu(x, weight).shape == (2, 3)

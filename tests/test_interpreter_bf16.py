import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from interpreter_bf16 import interpreted_bfloat16
from wireframe.kernels import dispatch

pytestmark = pytest.mark.skipif(not dispatch.INTERPRETED, reason="needs TRITON_INTERPRET=1")


@triton.jit
def _cast_kernel(p_from, p_to, size, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # The last element is masked and reads 1.5.
    x = tl.load(p_from + o, mask=o < size - 1, other=1.5)
    tl.store(p_to + o, x, mask=o < size)


@triton.jit
def _product_kernel(p_a, p_b, p_out, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    b_a = tl.load(p_a + o)
    b_b = tl.load(p_b + o)
    # The double of a, rounded, then the product of it and b to the accumulator 1.
    b_a = (b_a.to(tl.float32) * 2).to(b_a.dtype)
    tl.store(p_out + o, tl.dot(b_a, tl.trans(b_b), tl.full((N, N), 1.0, tl.float32), input_precision="ieee"))


@triton.jit
def _sum_kernel(p_x, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_x + o, tl.load(p_x + o) + tl.load(p_x + o))


@triton.jit
def _count_kernel(p_x, size):
    for i in range(0, size):
        tl.store(p_x + i, i)


def cast(x, dtype):
    out = torch.empty_like(x, dtype=dtype)
    with interpreted_bfloat16():
        _cast_kernel[(triton.cdiv(x.numel(), 4096),)](x, out, x.numel(), BLOCK=4096)
    expected = x.clone()
    expected[-1] = 1.5
    return out, expected.to(dtype)


def test_every_bfloat16_is_read_exactly():
    patterns = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    out, expected = cast(patterns, torch.float32)
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32))


def test_float32_is_rounded_to_the_nearest_even_bfloat16():
    g = torch.Generator().manual_seed(0)
    upper = torch.randint(-(1 << 15), 1 << 15, (20000,), generator=g) << 16
    # Random lower halves, then ties and their neighbours.
    lower = torch.randint(0, 1 << 16, (20000,), generator=g)
    lower[10000:] = 0x8000 + torch.randint(-1, 2, (10000,), generator=g)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 0.0, -0.0, 1e-40])
    x = torch.cat([(upper + lower).to(torch.int32).view(torch.float32), special, torch.zeros(1)])
    out, expected = cast(x, torch.bfloat16)
    nan = expected.isnan()
    assert torch.equal(out.isnan(), nan) and 50 < nan.sum() < 500
    assert torch.equal(out[~nan].view(torch.int16), expected[~nan].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_product_of_matrices_is_that_of_their_values(dtype):
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(32, 32, generator=g).to(dtype) for _ in range(2))
    out = torch.empty(32, 32)
    with interpreted_bfloat16():
        _product_kernel[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out.double(), 1 + 2 * a.double() @ b.double().T, rtol=1e-5, atol=1e-5)


def test_arithmetic_on_bit_patterns_is_refused():
    x = torch.ones(16, dtype=torch.bfloat16)
    with interpreted_bfloat16(), pytest.raises(Exception, match="convert to float32 first"):
        _sum_kernel[(1,)](x, N=16)


def test_a_loop_may_end_at_a_run_time_argument():
    x = torch.zeros(5, dtype=torch.int32)
    with interpreted_bfloat16():
        _count_kernel[(1,)](x, 4)
    assert x.tolist() == [0, 1, 2, 3, 0]


def test_the_interpreter_is_itself_again_afterwards():
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(ZeroDivisionError), interpreted_bfloat16():
        raise ZeroDivisionError
    _sum_kernel[(1,)](x, N=16)
    assert not torch.equal(x, torch.full_like(x, 2.0))

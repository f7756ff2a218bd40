"""A product with bias and GELU behind it, and what of its gradient is no plain product.

With y = x weight^T + bias and Phi the normal distribution, GELU is exact, not the approximation by tanh:

    out = y Phi(y)    dy = dout (Phi(y) + y phi(y))    dbias = sum over rows of dy    dx = dy weight    dweight = dy^T x

out and dy are rounded once, from float32. y never reaches memory: the backward computes it again, by the tiles and in
the order of the forward, so it is the same y. dx and dweight are products of dy, which the operation leaves to cuBLAS.

Phi(-a) for a >= 0 is 2^Q(a) with a polynomial Q of degree 8, Q(0) = -1, whose coefficients minimise the largest error
of 2^Q: 8e-9 (Lawson's weighted least squares on [0, 6], where beyond it falls faster than Phi). In float32 it comes to
4e-8, less than the rounding of 1 + erf, and to half of the instructions: on an H200 those of erf took longer than the
memory does.

What it saves, at peak rates (RTX 4090: 165 TFLOP/s, 1.008 TB/s, L2 72 MB; H200: 790, 4.3), bfloat16, in us:

                                           input projection 65536 x 128     feed-forward 8192 x 256, to 1024 both
                                           RTX 4090     H200                RTX 4090     H200
    forward   product                      104          22                  26           5
              memory, one kernel           150          35                  21           5
              memory, product then GELU    416          98                  55           13
    backward  memory, y again              283          66                  38           9
              memory, y kept               400          94                  50, 67       12, 16

(the second number with the sum for dbias as a third kernel). The input projection waits for memory, and both halves
pay. At the feed-forward all but y stay in the L2 of an RTX 4090 from one kernel to the next, so elementwise kernels cost
less than listed there; the epilogue still spares two launches and y. Whether its backward pays is a draw: 26 us of
products against writing and reading y, 33 us where it does not stay in the L2 until then, which of ten layers it does
not. There it saves 17 MB a layer above all.

Deterministic: a program owns its tile and adds over K in order; row blocks leave partial sums for dbias, whose number is
a function of the number of rows, added in order by a second launch. No atomics. Tiles are a function of architecture and
dtype, so a row has its bits in any batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wireframe.kernels.launch import Launch


class Tile(NamedTuple):
    """Rows, columns, and terms of the product at a time: powers of two, at least 16."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Chosen from ahead-of-time compiles: no spills, and room for several blocks on a multiprocessor, of which one can
# multiply while others apply GELU or wait for memory; on a GPU not measured yet. 128 columns would halve the traffic
# from the L2, which is no limit here, and leave room for half of the warps.
_HALF = Tile(128, 64, 64, 8, 3)
_SINGLE = Tile(64, 64, 32, 8, 3)
_COLUMN = {torch.bfloat16: _HALF, torch.float16: _HALF, torch.float32: _SINGLE}
TILES = {80: _COLUMN, 86: _COLUMN, 89: _COLUMN, 90: _COLUMN}

# Columns of a program that adds row blocks, how many it reads at a time, and its warps.
_SUM_COLUMNS, _SUM_PARTS, _SUM_WARPS = 16, 64, 4


@triton.jit
def _tail(b_a):
    """Phi(-a), a from 0 to 16."""
    b_q = -2.83491283e-06 * b_a + 3.93776916e-05
    b_q = b_q * b_a - 0.000186180243
    b_q = b_q * b_a - 0.000136936364
    b_q = b_q * b_a + 0.00706342012
    b_q = b_q * b_a - 0.0524961783
    b_q = b_q * b_a - 0.459208197
    b_q = b_q * b_a - 1.15110521
    return tl.exp2(b_q * b_a - 1.0)


@triton.jit
def _gelu(b_y):
    """y Phi(y) = max(y, 0) - |y| Phi(-|y|)"""
    # Where it is cut off the tail is 0, and infinity would be 0 times infinity.
    b_a = tl.minimum(tl.abs(b_y), 16.0)
    return tl.maximum(b_y, 0.0, propagate_nan=tl.PropagateNan.ALL) - b_a * _tail(b_a)


@triton.jit
def _gelu_slope(b_y):
    """Phi(y) + y phi(y)"""
    b_tail = _tail(tl.minimum(tl.abs(b_y), 16.0))
    # exp(-y^2 / 2) / sqrt(2 pi) as a power of 2
    b_density = tl.exp2(b_y * b_y * -0.7213475204444817 - 1.3257480647361593)
    return tl.where(b_y > 0, 1.0 - b_tail, b_tail) + b_y * b_density


@triton.jit
def _place(BM: tl.constexpr, BN: tl.constexpr, N: tl.constexpr):
    """First row and column of this program; those of neighbours share rows of x, and the weight stays in the L2."""
    columns = tl.cdiv(N, BN)
    return tl.program_id(0) // columns * BM, tl.program_id(0) % columns * BN


@triton.jit
def _product(
    p_x, p_weight, p_bias, start_m, start_n, rows, x_stride, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """float32 [BM, BN] of x weight^T + bias; beyond the last row and column those again."""
    o_m = tl.minimum(start_m + tl.arange(0, BM), rows - 1).to(tl.int64)
    o_n = start_n + tl.arange(0, BN)
    if N % BN:
        o_n = tl.minimum(o_n, N - 1)
    o_k = tl.arange(0, BK)
    p_x += o_m[:, None] * x_stride + o_k[None, :]
    p_weight += o_n[None, :].to(tl.int64) * K + o_k[:, None]
    b_y = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        if K % BK:
            m_k = start + o_k < K
            # [BM, BK]
            b_x = tl.load(p_x + start, mask=m_k[None, :], other=0.0)
            # [BK, BN]
            b_weight = tl.load(p_weight + start, mask=m_k[:, None], other=0.0)
        else:
            b_x = tl.load(p_x + start)
            b_weight = tl.load(p_weight + start)
        b_y = tl.dot(b_x, b_weight, b_y, input_precision="ieee")
    if p_bias is not None:
        # [BN]
        b_y += tl.load(p_bias + o_n).to(tl.float32)[None, :]
    return b_y


@triton.jit(do_not_specialize=["rows"])
def _linear_gelu_fwd_kernel(
    p_x, p_weight, p_bias, p_out, rows, x_stride, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of out [rows, N]. Rows of x lie x_stride apart; all else is contiguous. p_bias: None without one."""
    start_m, start_n = _place(BM, BN, N)
    b_y = _product(p_x, p_weight, p_bias, start_m, start_n, rows, x_stride, N, K, BM, BN, BK)
    o_m, o_n = start_m + tl.arange(0, BM)[:, None], start_n + tl.arange(0, BN)[None, :]
    m = (o_m < rows) & (o_n < N)
    tl.store(p_out + o_m.to(tl.int64) * N + o_n, _gelu(b_y).to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["rows"])
def _linear_gelu_bwd_kernel(
    p_dout, p_x, p_weight, p_bias, p_dy, p_partial, rows, dout_stride, x_stride, N: tl.constexpr, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of dy [rows, N], and its sums over rows, before they are rounded, for p_partial [row blocks, N] or None."""
    start_m, start_n = _place(BM, BN, N)
    b_y = _product(p_x, p_weight, p_bias, start_m, start_n, rows, x_stride, N, K, BM, BN, BK)
    o_m, o_n = start_m + tl.arange(0, BM)[:, None], start_n + tl.arange(0, BN)[None, :]
    m = (o_m < rows) & (o_n < N)
    # [BM, BN]
    b_dout = tl.load(p_dout + o_m.to(tl.int64) * dout_stride + o_n, mask=m, other=0.0).to(tl.float32)
    b_dy = b_dout * _gelu_slope(b_y)
    if p_partial is not None:
        o_sum = start_n + tl.arange(0, BN)
        p_partial += (start_m // BM).to(tl.int64) * N
        tl.store(p_partial + o_sum, tl.sum(b_dy, 0), mask=o_sum < N)
    tl.store(p_dy + o_m.to(tl.int64) * N + o_n, b_dy.to(p_dy.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["parts"])
def _linear_gelu_dbias_kernel(p_partial, p_dbias, parts, N: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr):
    """[parts, N] -> [N], BN columns a program."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
    b_sum = tl.zeros((PARTS, BN), tl.float32)
    for start in range(0, parts, PARTS):
        o_part = start + tl.arange(0, PARTS)[:, None]
        # [PARTS, BN]
        b_sum += tl.load(p_partial + o_part.to(tl.int64) * N + o_n, mask=(o_part < parts) & (o_n < N), other=0.0)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(p_dbias + o_n, tl.sum(b_sum, 0).to(p_dbias.dtype.element_ty), mask=o_n < N)


def plan_forward(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    out: Tensor,  # [M, N]
    architecture: int,
) -> list[Launch]:
    """One launch. Of x rows may lie apart; all else contiguous, addresses aligned."""
    tile = TILES[architecture][x.dtype]
    arguments = {"p_x": x, "p_weight": weight, "p_bias": bias, "p_out": out}
    return [_launch(_linear_gelu_fwd_kernel, tile, arguments, x, weight)]


def plan_backward(
    dout: Tensor,  # [M, N]
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    dy: Tensor,  # [M, N]
    dbias: Tensor | None,  # [N]
    architecture: int,
) -> list[Launch]:
    """One launch, and one for dbias. Of dout and x rows may lie apart; all else contiguous, addresses aligned."""
    tile = TILES[architecture][x.dtype]
    columns, partial = len(weight), None
    if dbias is not None:
        partial = torch.empty(triton.cdiv(len(x), tile.block_m), columns, dtype=torch.float32, device=x.device)
    arguments = {
        "p_dout": dout, "p_x": x, "p_weight": weight, "p_bias": bias, "p_dy": dy, "p_partial": partial,
        "dout_stride": dout.stride(0),
    }  # fmt: skip
    launches = [_launch(_linear_gelu_bwd_kernel, tile, arguments, x, weight)]
    if dbias is not None:
        arguments = {
            "p_partial": partial, "p_dbias": dbias, "parts": len(partial), "N": columns, "PARTS": _SUM_PARTS,
            "BN": _SUM_COLUMNS,
        }  # fmt: skip
        grid = (triton.cdiv(columns, _SUM_COLUMNS),)
        launches.append(Launch(_linear_gelu_dbias_kernel, grid, arguments, _SUM_WARPS))
    return launches


def _launch(kernel, tile: Tile, arguments: dict, x: Tensor, weight: Tensor) -> Launch:
    columns, terms = weight.shape
    grid = (triton.cdiv(len(x), tile.block_m) * triton.cdiv(columns, tile.block_n),)
    arguments = {
        **arguments, "rows": len(x), "x_stride": x.stride(0), "N": columns, "K": terms, "BM": tile.block_m,
        "BN": tile.block_n, "BK": tile.block_k,
    }  # fmt: skip
    return Launch(kernel, grid, arguments, tile.num_warps, tile.num_stages)

"""A product with bias and GELU behind it, and what of its gradient is no plain product.

With y = x weight^T + bias, Phi the normal distribution and phi its density:

    out = y Phi(y)    dy = dout (Phi(y) + y phi(y))    dbias = sum over rows of dy    dx = dy weight    dweight = dy^T x

out and dy are rounded once, from float32. y never reaches memory: the backward computes it again, by the tiles and in
the order of the forward, so it is the same y. dx and dweight are products of dy, which the operation leaves to cuBLAS.

Phi(-a) of a >= 0 is 2^Q(a), Q a polynomial of degree 8 with Q(0) = -1 whose coefficients minimise the largest error of
2^Q: 8e-9 (least squares on [0, 6] after Lawson, reweighted until the errors are level; behind 6 it falls faster than
Phi). Rounding in float32 makes 4e-8 of it, and a GPU's approximate power of 2 less than 2e-7. It takes half of the
instructions of erf, which on an H200, by their count, would take longer than the memory.

Lower bounds in us, bfloat16, to 1024 columns (RTX 4090: 165 TFLOP/s, 1.008 TB/s; H200: 790, 4.3), of the product and
of all bytes in memory; without fusion, cuBLAS and elementwise kernels behind it, memory and product do not overlap:

                                               65536 x 128, input projection    8192 x 256, feed-forward
                                               RTX 4090        H200             RTX 4090       H200
    product                                    104             22               26             5
    forward: memory                            150             35               21             5
             memory without fusion             150 + 266       35 + 62          21 + 33        5 + 8
    dy: memory, and the product again          283             66               38             9
        memory, from a y that was kept         399             94               50             12
    dbias as a kernel of its own                                                17             4

The input projection waits for memory, so both fusions pay, about 0.4 ms a step on an RTX 4090, and 134 MB are not kept.
The feed-forward fits its L2 (72 MB), where elementwise kernels take a fraction of the above: there the forward gains
little, and the second product, 26 us at best, may well cost more than reading a kept y in the L2. It is a draw where y
has left the L2 before the backward, as that of ten layers has (33 us to write and read it), and 17 MB a layer are not
kept. So one way serves both sizes.

Deterministic: a program owns its tile and adds over K in order. Row blocks leave partial sums for dbias, whose number
is a function of the number of rows; a second launch adds them in order. No atomics. Tiles are a function of
architecture and dtype, so a row has its bits beside any others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wireframe.kernels.launch import Launch
from wireframe.kernels.partial_sums import plan_column_sums


class Tile(NamedTuple):
    """Rows, columns, and terms of the product at a time: powers of two, at least 16."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Chosen from ahead-of-time compiles: no spills, and room for several blocks on a multiprocessor, of which one can
# multiply while others apply GELU or wait for memory; on a GPU not measured yet. 128 columns would read a third less
# from the L2, which by its bandwidth is no limit here, and take up to 166 registers.
_HALF = Tile(128, 64, 64, 8, 3)
_SINGLE = Tile(64, 64, 32, 8, 3)
_COLUMN = {torch.bfloat16: _HALF, torch.float16: _HALF, torch.float32: _SINGLE}
TILES = {80: _COLUMN, 86: _COLUMN, 89: _COLUMN, 90: _COLUMN}


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
    """A tile of dy [rows, N], and its sums over rows before it is rounded, for p_partial [row blocks, N] or None."""
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
    dbias: Tensor | None,  # [N] float32
    architecture: int,
) -> list[Launch]:
    """One launch, and one for dbias. Of dout and x rows may lie apart; all else contiguous, addresses aligned."""
    tile = TILES[architecture][x.dtype]
    partial = None
    if dbias is not None:
        blocks = triton.cdiv(len(x), tile.block_m)
        partial = torch.empty(blocks, len(weight), dtype=torch.float32, device=x.device)
    arguments = {
        "p_dout": dout, "p_x": x, "p_weight": weight, "p_bias": bias, "p_dy": dy, "p_partial": partial,
        "dout_stride": dout.stride(0),
    }  # fmt: skip
    launches = [_launch(_linear_gelu_bwd_kernel, tile, arguments, x, weight)]
    if dbias is not None:
        launches.append(plan_column_sums(partial, dbias))
    return launches


def _launch(kernel, tile: Tile, arguments: dict, x: Tensor, weight: Tensor) -> Launch:
    columns, terms = weight.shape
    grid = (triton.cdiv(len(x), tile.block_m) * triton.cdiv(columns, tile.block_n),)
    arguments = {
        **arguments, "rows": len(x), "x_stride": x.stride(0), "N": columns, "K": terms, "BM": tile.block_m,
        "BN": tile.block_n, "BK": tile.block_k,
    }  # fmt: skip
    return Launch(kernel, grid, arguments, tile.num_warps, tile.num_stages)

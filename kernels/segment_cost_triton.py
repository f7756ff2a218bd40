"""Cost between all pairs of segments, forward and backward.

pred [B, N, 2, 3], target [B, M, 2, 3] -> cost [B, N, M]; equations in ``segment_pairs``. Forward: one program a tile.
Backward: one program a block of the segments of one side, which goes over the blocks of the other side and sums in
registers; the cost is symmetric in its sides, so that one kernel with exchanged arguments serves both.

Deterministic: blocks follow each other in one order, tiles have one size. No atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from wireframe.kernels.launch import Launch
from wireframe.kernels.segment_pairs import load_segments, pair_cost, pair_gradient, store_endpoint_gradients

# Segments of a block on either side of a tile.
_BLOCK_I, _BLOCK_J = 32, 32
_WARPS = 4


@triton.jit(do_not_specialize=["count_i", "count_j"])
def _segment_cost_fwd_kernel(
    p_i, p_j, p_cost, count_i, count_j, w_mid, w_dir, w_len, BI: tl.constexpr, BJ: tl.constexpr
):
    """p_i [B, count_i, 2, 3], p_j [B, count_j, 2, 3] -> cost [B, count_i, count_j], contiguous all."""
    blocks_i, blocks_j = tl.cdiv(count_i, BI), tl.cdiv(count_j, BJ)
    tile = tl.program_id(0)
    batch = (tile // (blocks_i * blocks_j)).to(tl.int64)
    o_i = (tile // blocks_j % blocks_i) * BI + tl.arange(0, BI)[:, None]
    o_j = (tile % blocks_j) * BJ + tl.arange(0, BJ)[None, :]
    # [BI, 1] and [1, BJ]
    a = load_segments(p_i + batch * count_i * 6, o_i, o_i < count_i)
    b = load_segments(p_j + batch * count_j * 6, o_j, o_j < count_j)
    p_cost += batch * count_i * count_j
    b_cost = pair_cost(a, b, w_mid, w_dir, w_len)
    tl.store(p_cost + o_i.to(tl.int64) * count_j + o_j, b_cost, mask=(o_i < count_i) & (o_j < count_j))


@triton.jit(do_not_specialize=["count_i", "count_j", "stride_i", "stride_j"])
def _segment_cost_bwd_kernel(
    p_i, p_j, p_grad, p_di, count_i, count_j, stride_i, stride_j, w_mid, w_dir, w_len,
    BI: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """Gradient [B, count_i, 2, 3] of the segments i from that of the cost, grad [B, ...] with the strides given."""
    blocks_i = tl.cdiv(count_i, BI)
    batch = (tl.program_id(0) // blocks_i).to(tl.int64)
    o_i = (tl.program_id(0) % blocks_i) * BI + tl.arange(0, BI)[:, None]
    m_i = o_i < count_i
    a = load_segments(p_i + batch * count_i * 6, o_i, m_i)
    p_j += batch * count_j * 6
    p_grad += batch * count_i * count_j
    # [BI, BJ], summed over j at the end: one exchange between threads instead of one a block.
    gmx, gmy, gmz = tl.zeros((BI, BJ), tl.float32), tl.zeros((BI, BJ), tl.float32), tl.zeros((BI, BJ), tl.float32)
    gdx, gdy, gdz = tl.zeros((BI, BJ), tl.float32), tl.zeros((BI, BJ), tl.float32), tl.zeros((BI, BJ), tl.float32)
    gl = tl.zeros((BI, BJ), tl.float32)
    for start in range(0, count_j, BJ):
        o_j = start + tl.arange(0, BJ)[None, :]
        m_j = o_j < count_j
        b = load_segments(p_j, o_j, m_j)
        # [BI, BJ]
        o_grad = o_i.to(tl.int64) * stride_i + o_j.to(tl.int64) * stride_j
        b_grad = tl.load(p_grad + o_grad, mask=m_i & m_j, other=0.0)
        middle, direction, length = pair_gradient(a, b, b_grad, w_mid, w_dir, w_len)
        gmx += middle * (a[0] - b[0])
        gmy += middle * (a[1] - b[1])
        gmz += middle * (a[2] - b[2])
        gdx += direction * b[3]
        gdy += direction * b[4]
        gdz += direction * b[5]
        gl += length
    store_endpoint_gradients(
        p_di + batch * count_i * 6, o_i, m_i, a,
        tl.sum(gmx, 1, keep_dims=True), tl.sum(gmy, 1, keep_dims=True), tl.sum(gmz, 1, keep_dims=True),
        tl.sum(gdx, 1, keep_dims=True), tl.sum(gdy, 1, keep_dims=True), tl.sum(gdz, 1, keep_dims=True),
        tl.sum(gl, 1, keep_dims=True),
    )  # fmt: skip


def weight_arguments(weights: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("w_mid", "w_dir", "w_len"), weights))


def plan_forward(
    pred: Tensor,  # [B, N, 2, 3]
    target: Tensor,  # [B, M, 2, 3]
    cost: Tensor,  # [B, N, M]
    *,
    weights: tuple[float, float, float],
) -> list[Launch]:
    """One launch. Contiguous all; cost float32."""
    batch, rows, columns = cost.shape
    arguments = {
        "p_i": pred, "p_j": target, "p_cost": cost, "count_i": rows, "count_j": columns,
        **weight_arguments(weights), "BI": _BLOCK_I, "BJ": _BLOCK_J,
    }  # fmt: skip
    tiles = triton.cdiv(rows, _BLOCK_I) * triton.cdiv(columns, _BLOCK_J)
    return [Launch(_segment_cost_fwd_kernel, (batch * tiles,), arguments, _WARPS)]


def plan_backward(
    pred: Tensor,  # [B, N, 2, 3]
    target: Tensor,  # [B, M, 2, 3]
    grad: Tensor,  # [B, N, M]
    dpred: Tensor | None,  # [B, N, 2, 3]
    dtarget: Tensor | None,  # [B, M, 2, 3]
    *,
    weights: tuple[float, float, float],
) -> list[Launch]:
    """One launch for each gradient that is wanted. Contiguous all; gradients float32."""
    batch, rows, columns = grad.shape
    sides = ((pred, target, dpred, rows, columns, columns, 1), (target, pred, dtarget, columns, rows, 1, columns))
    launches = []
    for mine, other, gradient, count_i, count_j, stride_i, stride_j in sides:
        if gradient is None:
            continue
        arguments = {
            "p_i": mine, "p_j": other, "p_grad": grad, "p_di": gradient, "count_i": count_i, "count_j": count_j,
            "stride_i": stride_i, "stride_j": stride_j, **weight_arguments(weights), "BI": _BLOCK_I, "BJ": _BLOCK_J,
        }  # fmt: skip
        grid = (batch * triton.cdiv(count_i, _BLOCK_I),)
        launches.append(Launch(_segment_cost_bwd_kernel, grid, arguments, _WARPS))
    return launches

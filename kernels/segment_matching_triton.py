"""Transport loss between predicted and target segments, forward and backward: one program a problem, one launch each.

pred [B, N, 2, 3], target [B, M, 2, 3], target_mask [B, M] -> loss [B], plan [B, N, M], N and M up to 128. The cost
(``segment_pairs``) is computed into registers and goes through the iterations of ``sinkhorn_scaling`` there; it must be
known beforehand that these suffice: weights >= 0, and a dustbin within their range. What masked targets hold is never
read.

loss = sum over real columns of P C, with P = exp(log_plan). For an upstream gradient g of the loss, the one of log_plan
is G = g C P; from the ds that the adjoint of the iterations makes of it, dC = g P - ds / eps, which goes on to the
endpoints of both sides.

Deterministic: each program sums in an order that its tile fixes, and its tile depends on (N, M) alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from wireframe.kernels.launch import Launch
from wireframe.kernels.segment_cost_triton import weight_arguments
from wireframe.kernels.segment_pairs import load_segments, pair_cost, pair_gradient, store_endpoint_gradients
from wireframe.kernels.sinkhorn_scaling import (
    BACKWARD_TILES,
    FORWARD_TILES,
    by_column,
    by_row,
    column_offsets,
    dustbin_row,
    first_row_step,
    kernel_matrix,
    load_scaling,
    load_tile,
    scaling_adjoint,
    scaling_iterations,
    store_tile,
    sum_columns,
    sum_rows,
    tile_arguments,
    total,
)
from wireframe.kernels.sinkhorn_triton import scores

# Rows of a block, where a problem is gone through in blocks.
_BLOCK_ROWS = 16


@triton.jit
def _rows_of(a):
    """[side] -> [1, side, 1], all parts of the segments."""
    return by_row(a[0]), by_row(a[1]), by_row(a[2]), by_row(a[3]), by_row(a[4]), by_row(a[5]), by_row(a[6])


@triton.jit
def _columns_of(b):
    """[C, L] -> [C, 1, L], all parts of the segments."""
    return (
        by_column(b[0]), by_column(b[1]), by_column(b[2]), by_column(b[3]), by_column(b[4]), by_column(b[5]),
        by_column(b[6]),
    )  # fmt: skip


@triton.jit
def _load_pairs(p_mask, o_col, rows, columns, SIDE: tl.constexpr):
    """Which entries of the tile are pairs. A load, because it is loads that give a tile the layout meant."""
    return load_tile(p_mask, o_col, o_col < columns, 0, rows, 0, SIDE) > 0


@triton.jit
def _plan_blocks(
    p_pred, p_target, p_log_u, p_plan, b_log_v, m_real, o_col, rows, columns, w_mid, w_dir, w_len, scale,
    BR: tl.constexpr,
):  # fmt: skip
    """The plan, stored, and the loss. The cost is made once more, instead of held through all iterations."""
    b_loss = tl.zeros_like(b_log_v)
    for start in range(0, rows, BR):
        o_row = start + tl.arange(0, BR)
        m_row = o_row < rows
        a, b = load_segments(p_pred, o_row, m_row), load_segments(p_target, o_col, m_real)
        b_cost = pair_cost(_rows_of(a), _columns_of(b), w_mid, w_dir, w_len)
        b_log_u = tl.load(p_log_u + o_row, mask=m_row, other=float("-inf"))
        # From logarithms, so that the plan keeps entries whose K was lost to underflow; 0 where there is no pair.
        b_plan = tl.exp2(by_row(b_log_u) - b_cost * scale + by_column(b_log_v))
        b_loss += sum_rows(b_plan * b_cost)
        store_tile(p_plan + start * columns, b_plan, o_col, columns, rows - start, columns, BR)
    return total(b_loss)


@triton.jit(do_not_specialize=["rows", "columns", "iters"])
def _segment_matching_fwd_kernel(
    p_pred, p_target, p_mask, p_loss, p_plan, p_log_u, p_u, p_v, rows, columns, w_mid, w_dir, w_len, scale, score_bin,
    iters, SAVE: tl.constexpr, SIDE: tl.constexpr, LANES: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """u [B, iters, rows + 1] and v [B, iters, columns + 1] as for Sinkhorn; log_u [B, rows]: scratch."""
    batch = tl.program_id(0).to(tl.int64)
    o_row, o_col = tl.arange(0, SIDE), column_offsets(SIDE, LANES)
    m_row = o_row < rows
    p_mask += batch * columns
    m_real = tl.load(p_mask + o_col, mask=o_col < columns, other=0) != 0
    mass_bin = total(m_real.to(tl.float32))
    a = load_segments(p_pred + batch * rows * 6, o_row, m_row)
    b = load_segments(p_target + batch * columns * 6, o_col, m_real)
    b_cost = pair_cost(_rows_of(a), _columns_of(b), w_mid, w_dir, w_len)
    b_cost = tl.where(_load_pairs(p_mask, o_col, rows, columns, SIDE), b_cost, float("inf"))
    b_first = first_row_step(b_cost, scale, score_bin)
    first_bin, k_row, k_corner = dustbin_row(score_bin, mass_bin)
    b_k = kernel_matrix(b_cost, b_first, scale)
    b_kbin = tl.where(m_row, tl.exp2(score_bin + b_first), 0.0)
    b_u, _, b_v, _ = scaling_iterations(
        b_k, b_kbin, k_row, k_corner, b_first, first_bin, m_row, m_real, rows * 1.0, mass_bin,
        p_u + batch * iters * (rows + 1), p_v + batch * iters * (columns + 1), o_row, o_col, rows, columns, iters,
        SAVE=SAVE, SIDE=SIDE,
    )  # fmt: skip
    # Through memory, so that the plan can be made block by block.
    tl.store(p_log_u + batch * rows + o_row, b_first + tl.log2(b_u), mask=m_row)
    tl.debug_barrier()
    loss = _plan_blocks(
        p_pred + batch * rows * 6, p_target + batch * columns * 6, p_log_u + batch * rows,
        p_plan + batch * rows * columns, tl.log2(b_v), m_real, o_col, rows, columns, w_mid, w_dir, w_len, scale, BR=BR,
    )  # fmt: skip
    tl.store(p_loss + batch, loss)


@triton.jit
def _endpoint_gradients(
    p_pred, p_target, p_terms, p_dpred, p_dtarget, p_u, p_v, m_real, o_col, rows, columns, grad,
    w_mid, w_dir, w_len, scale, inverse_eps, iters, BR: tl.constexpr,
):  # fmt: skip
    """From the terms K W of the iterations, block by block of rows; plan and cost are made once more."""
    b_v, _ = load_scaling(p_v + (iters - 1) * (columns + 1), o_col, m_real, columns, iters > 0)
    b_v *= grad
    bmx, bmy, bmz = tl.zeros_like(b_v), tl.zeros_like(b_v), tl.zeros_like(b_v)
    bdx, bdy, bdz, bl = tl.zeros_like(b_v), tl.zeros_like(b_v), tl.zeros_like(b_v), tl.zeros_like(b_v)
    for start in range(0, rows, BR):
        o_row = start + tl.arange(0, BR)
        m_row = o_row < rows
        # [C, BR, L]
        b_terms = load_tile(p_terms + start * columns, o_col, m_real, columns, rows - start, 0.0, BR)
        b_first = tl.load(p_u + o_row, mask=m_row, other=0.0)
        b_u, _ = load_scaling(p_u + (iters - 1) * (rows + 1), o_row, m_row, rows, iters > 1)
        a, b = load_segments(p_pred, o_row, m_row), load_segments(p_target, o_col, m_real)
        ai, bj = _rows_of(a), _columns_of(b)
        b_cost = pair_cost(ai, bj, w_mid, w_dir, w_len)
        b_plan = kernel_matrix(b_cost, b_first, scale) * by_row(b_u) * by_column(b_v)
        b_dcost = b_plan + (b_terms - b_plan * b_cost) * inverse_eps
        middle, turn, longer = pair_gradient(ai, bj, b_dcost, w_mid, w_dir, w_len)
        x, y, z = middle * (ai[0] - bj[0]), middle * (ai[1] - bj[1]), middle * (ai[2] - bj[2])
        store_endpoint_gradients(
            p_dpred, o_row, m_row, a, sum_columns(x), sum_columns(y), sum_columns(z), sum_columns(turn * bj[3]),
            sum_columns(turn * bj[4]), sum_columns(turn * bj[5]), sum_columns(longer),
        )  # fmt: skip
        bmx, bmy, bmz = bmx - sum_rows(x), bmy - sum_rows(y), bmz - sum_rows(z)
        bdx, bdy, bdz = bdx + sum_rows(turn * ai[3]), bdy + sum_rows(turn * ai[4]), bdz + sum_rows(turn * ai[5])
        bl -= sum_rows(longer)
    b = load_segments(p_target, o_col, m_real)
    store_endpoint_gradients(p_dtarget, o_col, o_col < columns, b, bmx, bmy, bmz, bdx, bdy, bdz, bl)


@triton.jit(do_not_specialize=["rows", "columns", "iters", "grad_stride"])
def _segment_matching_bwd_kernel(
    p_pred, p_target, p_mask, p_grad, p_terms, p_dpred, p_dtarget, p_u, p_v, rows, columns, grad_stride,
    w_mid, w_dir, w_len, scale, score_bin, inverse_eps, iters,
    SIDE: tl.constexpr, LANES: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """grad [B] of the loss -> dpred [B, rows, 2, 3], dtarget [B, columns, 2, 3]; terms [B, rows, columns]: scratch."""
    batch = tl.program_id(0).to(tl.int64)
    p_pred += batch * rows * 6
    p_target += batch * columns * 6
    p_mask += batch * columns
    p_terms += batch * rows * columns
    p_u += batch * iters * (rows + 1)
    p_v += batch * iters * (columns + 1)
    o_row, o_col = tl.arange(0, SIDE), column_offsets(SIDE, LANES)
    m_row = o_row < rows
    m_real = tl.load(p_mask + o_col, mask=o_col < columns, other=0) != 0
    mass_bin = total(m_real.to(tl.float32))
    grad = tl.load(p_grad + batch * grad_stride).to(tl.float32)
    m_pairs = _load_pairs(p_mask, o_col, rows, columns, SIDE)
    a, b = load_segments(p_pred, o_row, m_row), load_segments(p_target, o_col, m_real)
    b_cost = tl.where(m_pairs, pair_cost(_rows_of(a), _columns_of(b), w_mid, w_dir, w_len), float("inf"))
    b_first = tl.load(p_u + o_row, mask=m_row, other=0.0)
    _, k_row, k_corner = dustbin_row(score_bin, mass_bin)
    b_k = kernel_matrix(b_cost, b_first, scale)
    b_kbin = tl.where(m_row, tl.exp2(score_bin + b_first), 0.0)
    b_u, _ = load_scaling(p_u + (iters - 1) * (rows + 1), o_row, m_row, rows, iters > 1)
    b_v, _ = load_scaling(p_v + (iters - 1) * (columns + 1), o_col, m_real, columns, iters > 0)
    # The gradient of log_plan is this times g u_i v_j; K is 0 where the cost is inf.
    b_weighted = tl.where(b_k > 0, b_k * b_cost, 0.0)
    b_du = sum_columns(b_weighted * by_column(b_v)) * b_u * grad
    b_dv = sum_rows(b_weighted * by_row(b_u)) * b_v * grad
    zero = tl.full((), 0.0, tl.float32)
    b_w = scaling_adjoint(
        b_k, b_kbin, k_row, k_corner, b_du, zero, b_dv, zero,
        m_row, m_real, rows * 1.0, mass_bin, p_u, p_v, o_row, o_col, rows, columns, iters,
    )  # fmt: skip
    # Through memory, because the sums over both sides need the registers.
    store_tile(p_terms, b_k * b_w, o_col, columns, rows, columns, SIDE)
    tl.debug_barrier()
    _endpoint_gradients(
        p_pred, p_target, p_terms, p_dpred + batch * rows * 6, p_dtarget + batch * columns * 6, p_u, p_v, m_real,
        o_col, rows, columns, grad, w_mid, w_dir, w_len, scale, inverse_eps, iters, BR=BR,
    )  # fmt: skip


def plan_forward(
    pred: Tensor,  # [B, N, 2, 3]
    target: Tensor,  # [B, M, 2, 3]
    target_mask: Tensor,  # [B, M]
    loss: Tensor,  # [B]
    plan: Tensor,  # [B, N, M]
    log_u: Tensor,  # [B, N]
    u: Tensor,  # [B, iters or 0, N + 1]
    v: Tensor,  # [B, iters or 0, M + 1]
    *,
    weights: tuple[float, float, float],
    eps: float,
    iters: int,
    dustbin: float,
) -> list[Launch]:
    """One launch. Contiguous all, N and M in 1..128; no potentials are saved where u is empty.

    The outputs and the scratch log_u are float32. The same tiles serve every architecture.
    """
    _, rows, columns = plan.shape
    tile, warps = tile_arguments(FORWARD_TILES, rows, columns)
    arguments = {
        "p_pred": pred, "p_target": target, "p_mask": target_mask, "p_loss": loss, "p_plan": plan,
        "p_log_u": log_u, "p_u": u, "p_v": v,
        **weight_arguments(weights), **scores(eps, dustbin), "rows": rows, "columns": columns, "iters": iters,
        "SAVE": u.shape[1] > 0, **tile, "BR": _BLOCK_ROWS,
    }  # fmt: skip
    return [Launch(_segment_matching_fwd_kernel, (plan.shape[0],), arguments, warps)]


def plan_backward(
    grad: Tensor,  # [B]
    pred: Tensor,  # [B, N, 2, 3]
    target: Tensor,  # [B, M, 2, 3]
    target_mask: Tensor,  # [B, M]
    u: Tensor,  # [B, iters, N + 1]
    v: Tensor,  # [B, iters, M + 1]
    dpred: Tensor,  # [B, N, 2, 3]
    dtarget: Tensor,  # [B, M, 2, 3]
    terms: Tensor,  # [B, N, M]
    *,
    weights: tuple[float, float, float],
    eps: float,
    dustbin: float,
) -> list[Launch]:
    """One launch. Contiguous all but grad, which may be expanded; gradients and the scratch terms are float32."""
    rows, columns = pred.shape[1], target.shape[1]
    tile, warps = tile_arguments(BACKWARD_TILES, rows, columns)
    arguments = {
        "p_pred": pred, "p_target": target, "p_mask": target_mask, "p_grad": grad, "p_terms": terms,
        "p_dpred": dpred, "p_dtarget": dtarget, "p_u": u, "p_v": v, "grad_stride": grad.stride(0),
        **weight_arguments(weights), **scores(eps, dustbin), "rows": rows, "columns": columns,
        "inverse_eps": 1.0 / eps, "iters": u.shape[1], **tile, "BR": _BLOCK_ROWS,
    }  # fmt: skip
    return [Launch(_segment_matching_bwd_kernel, (pred.shape[0],), arguments, warps)]

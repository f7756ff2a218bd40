"""Device helpers of the Sinkhorn kernels: the iterations in the log domain, reading the cost in blocks of rows.

For problems whose tile does not fit the registers, and for costs beyond the range of the scaling form. With scores
s = -C / eps, each iteration is one pass over the blocks:
    u_i = log a_i - lse_j (s_ij + v_j),    v_j = log b_j - lse_i (s_ij + u_i),
the sums over rows carried from block to block with their running maximum. Logarithms are to base 2 throughout; a masked
column holds s = v = -inf, a row beyond the problem u = -inf, and neither meets another inf.

The adjoint of an iteration, from the gradients du, dv of u_t, v_t, where V is v of the iteration before:
    du_i -= sum_j dv_j exp(s_ij + u_i + v_j) / b_j,    dv_j = -sum_i (du_i / a_i) exp(s_ij + u_i + V_j),    du = 0;
ds takes the terms of both sums from a last pass, so that no block of ds is read back.
Blocks follow each other in one program: the order of every sum is fixed by the shape. No atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Rows of a block.
BLOCK_ROWS = 16


@triton.jit
def load_columns(p_mask, o_col, columns):
    """Which columns are real; any shape."""
    return tl.load(p_mask + o_col, mask=o_col < columns, other=0) != 0


@triton.jit
def _load_scores(p_cost, p_mask, o_row, o_col, rows, columns, scale):
    # [BR, side]. The mask is loaded for each block: triton 3.6 cannot compile one load for the loop and its start.
    m_tile = (o_row < rows)[:, None] & load_columns(p_mask, o_col, columns)[None, :]
    b_cost = tl.load(p_cost + o_row[:, None] * columns + o_col[None, :], mask=m_tile, other=float("inf"))
    return -b_cost.to(tl.float32) * scale


@triton.jit
def _row_block(b_scores, b_v, score_bin, v_bin, m_row):
    """u of a block of rows."""
    b_entries = b_scores + b_v[None, :]
    bin_entry = score_bin + v_bin
    b_top = tl.maximum(tl.max(b_entries, 1), bin_entry)
    total = tl.sum(tl.exp2(b_entries - b_top[:, None]), 1) + tl.exp2(bin_entry - b_top)
    return tl.where(m_row, -(b_top + tl.log2(total)), float("-inf"))


@triton.jit
def _bin_row(b_v, v_bin, score_bin, mass_bin):
    """u of the dustbin row; -inf without mass."""
    top = tl.maximum(tl.max(b_v, 0) + score_bin, v_bin)
    total = tl.sum(tl.exp2(b_v + score_bin - top), 0) + tl.exp2(v_bin - top)
    return tl.where(mass_bin > 0, tl.log2(mass_bin) - top - tl.log2(total), float("-inf"))


@triton.jit
def _iteration(
    p_cost, p_mask, b_v, v_bin, m_real, o_col, rows, columns, scale, score_bin, mass_rows, mass_bin, p_u,
    SAVE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """v of the next iteration; u goes to p_u [rows + 1] if saved."""
    u_bin = _bin_row(b_v, v_bin, score_bin, mass_bin)
    # Running maximum and sum of the columns, from the dustbin row on. Without mass no column is real.
    b_top, b_total = tl.where(m_real, score_bin + u_bin, 0.0), tl.where(m_real, 1.0, 0.0)
    # Of the dustbin column: the corner holds no more than its row, so it can wait for the end.
    bin_top, bin_total = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, rows, BR):
        o_row = start + tl.arange(0, BR)
        b_scores = _load_scores(p_cost, p_mask, o_row, o_col, rows, columns, scale)
        b_u = _row_block(b_scores, b_v, score_bin, v_bin, o_row < rows)
        b_entries = b_scores + b_u[:, None]
        b_higher = tl.maximum(b_top, tl.max(b_entries, 0))
        b_total = b_total * tl.exp2(b_top - b_higher) + tl.sum(tl.exp2(b_entries - b_higher[None, :]), 0)
        b_top = b_higher
        bin_higher = tl.maximum(bin_top, score_bin + tl.max(b_u, 0))
        bin_total = bin_total * tl.exp2(bin_top - bin_higher) + tl.sum(tl.exp2(score_bin + b_u - bin_higher), 0)
        bin_top = bin_higher
        if SAVE:
            tl.store(p_u + o_row, b_u, mask=o_row < rows)
    if SAVE:
        tl.store(p_u + rows, u_bin)
    bin_higher = tl.maximum(bin_top, u_bin)
    bin_total = bin_total * tl.exp2(bin_top - bin_higher) + tl.exp2(u_bin - bin_higher)
    b_v = tl.where(m_real, -(b_top + tl.log2(b_total)), float("-inf"))
    return b_v, tl.log2(mass_rows) - bin_higher - tl.log2(bin_total)


@triton.jit
def streaming_forward(
    p_cost, p_mask, p_out, p_u, p_v, rows, columns, scale, score_bin, iters,
    SAVE: tl.constexpr, SIDE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """log_plan of one problem. Potentials saved, [iters, rows + 1] and [iters, columns + 1]: log2 u and log2 v."""
    o_col = tl.arange(0, SIDE)
    m_real = load_columns(p_mask, o_col, columns)
    mass_rows, mass_bin = rows * 1.0, tl.sum(m_real.to(tl.float32), 0)
    b_v, v_bin = tl.where(m_real, 0.0, float("-inf")), tl.full((), 0.0, tl.float32)
    # Values of their own, though never read: the compiler takes a name that begins and ends a turn on equal terms with
    # b_v for one that the loop leaves alone. (The interpreter does not.)
    b_past, past_bin = tl.zeros_like(b_v), tl.full((), 0.0, tl.float32)
    for _ in range(iters):
        b_past, past_bin = b_v, v_bin
        b_v, v_bin = _iteration(
            p_cost, p_mask, b_past, past_bin, m_real, o_col, rows, columns, scale, score_bin, mass_rows, mass_bin,
            p_u, SAVE=SAVE, BR=BR,
        )  # fmt: skip
        if SAVE:
            tl.store(p_v + o_col, b_v, mask=o_col < columns)
            tl.store(p_v + columns, v_bin)
            p_u += rows + 1
            p_v += columns + 1
    ln2 = 0.6931471805599453
    stride = columns + 1
    # u of the last iteration once more, from v before it: nothing is read that this launch wrote.
    for start in range(0, rows, BR):
        o_row = start + tl.arange(0, BR)
        m_row = o_row < rows
        b_scores = _load_scores(p_cost, p_mask, o_row, o_col, rows, columns, scale)
        b_u = _row_block(b_scores, b_past, score_bin, past_bin, m_row)
        b_out = (b_scores + b_u[:, None] + b_v[None, :]) * ln2
        m_tile = m_row[:, None] & (o_col < columns)[None, :]
        tl.store(p_out + o_row[:, None] * stride + o_col[None, :], b_out, mask=m_tile)
        tl.store(p_out + o_row * stride + columns, (score_bin + b_u + v_bin) * ln2, mask=m_row)
    u_bin = _bin_row(b_past, past_bin, score_bin, mass_bin)
    tl.store(p_out + rows * stride + o_col, (score_bin + u_bin + b_v) * ln2, mask=o_col < columns)
    tl.store(p_out + rows * stride + columns, (u_bin + v_bin) * ln2)


@triton.jit
def _load_gradient(p_grad, o_row, o_col, m_real, rows, columns):
    # [BR, side]
    m_tile = (o_row < rows)[:, None] & m_real[None, :]
    return tl.load(p_grad + o_row[:, None] * (columns + 1) + o_col[None, :], mask=m_tile, other=0.0)


@triton.jit
def _load_bin_gradient(p_grad, o_col, m_real, rows, columns, mass_bin):
    """Upstream gradient of the dustbin row: [side] and the corner; never read where log_plan is -inf."""
    p_grad += rows * (columns + 1)
    b_row = tl.load(p_grad + o_col, mask=m_real, other=0.0)
    return b_row, tl.load(p_grad + columns, mask=mass_bin > 0, other=0.0)


@triton.jit
def _adjoint_iteration(
    p_cost, p_mask, p_grad, p_u, p_y, b_v, v_bin, b_past, past_bin, b_dv, dv_bin, du_bin, o_col, rows,
    columns, scale, score_bin, mass_rows, mass_bin, last, m_real, BR: tl.constexpr,
):  # fmt: skip
    """dv of the iteration before; y = du / a goes to p_y [rows + 1]. last: u is the one that log_plan was made of."""
    x_bin = dv_bin / mass_rows
    u_bin = tl.load(p_u + rows)
    # The dustbin row, -inf without mass.
    du_bin -= tl.sum(b_dv * tl.exp2(score_bin + u_bin + b_v), 0) + x_bin * tl.exp2(u_bin + v_bin)
    y_bin = tl.where(mass_bin > 0, du_bin / mass_bin, 0.0)
    tl.store(p_y + rows, y_bin)
    b_total = y_bin * tl.exp2(score_bin + u_bin + b_past)
    total_bin = y_bin * tl.exp2(u_bin + past_bin)
    for start in range(0, rows, BR):
        o_row = start + tl.arange(0, BR)
        m_row = o_row < rows
        b_scores = _load_scores(p_cost, p_mask, o_row, o_col, rows, columns, scale)
        b_u = tl.load(p_u + o_row, mask=m_row, other=float("-inf"))
        b_scores += b_u[:, None]
        b_y = -tl.sum(b_dv[None, :] * tl.exp2(b_scores + b_v[None, :]), 1)
        b_y -= x_bin * tl.exp2(score_bin + b_u + v_bin)
        if last:
            b_y += tl.sum(_load_gradient(p_grad, o_row, o_col, m_real, rows, columns), 1)
            b_y += tl.load(p_grad + o_row * (columns + 1) + columns, mask=m_row, other=0.0)
        tl.store(p_y + o_row, b_y, mask=m_row)
        b_total += tl.sum(b_y[:, None] * tl.exp2(b_scores + b_past[None, :]), 0)
        total_bin += tl.sum(b_y * tl.exp2(score_bin + b_u + past_bin), 0)
    return -b_total, -total_bin


@triton.jit
def _load_log_scaling(p_v, o_col, m_real, columns, later):
    """log v of one iteration, 0 for the start of the iterations."""
    b_v = tl.load(p_v + o_col, mask=m_real & later, other=0.0)
    return tl.where(m_real, b_v, float("-inf")), tl.load(p_v + columns, mask=later, other=0.0)


@triton.jit
def _gradient_sums(p_grad, o_col, m_real, rows, columns, mass_bin, BR: tl.constexpr):
    """Upstream gradient summed over the columns' rows: [side], the dustbin column's, and the dustbin row's sum."""
    b_dv, corner = _load_bin_gradient(p_grad, o_col, m_real, rows, columns, mass_bin)
    du_bin, dv_bin = tl.sum(b_dv, 0) + corner, corner
    for start in range(0, rows, BR):
        o_row = start + tl.arange(0, BR)
        b_dv += tl.sum(_load_gradient(p_grad, o_row, o_col, m_real, rows, columns), 0)
        dv_bin += tl.sum(tl.load(p_grad + o_row * (columns + 1) + columns, mask=o_row < rows, other=0.0), 0)
    return b_dv, dv_bin, du_bin


@triton.jit
def streaming_backward(
    p_cost, p_mask, p_grad, p_dcost, p_u, p_v, p_x, p_y, rows, columns, scale, score_bin, grad_scale, iters,
    SIDE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dcost [rows, columns] of one problem; scratch p_x [iters, columns + 1] and p_y [iters, rows + 1]."""
    o_col = tl.arange(0, SIDE)
    m_real = load_columns(p_mask, o_col, columns)
    mass_rows, mass_bin = rows * 1.0, tl.sum(m_real.to(tl.float32), 0)
    b_dv, dv_bin, du_bin = _gradient_sums(p_grad, o_col, m_real, rows, columns, mass_bin, BR=BR)
    for turn in range(iters):
        t = iters - 1 - turn
        b_v, v_bin = _load_log_scaling(p_v + t * (columns + 1), o_col, m_real, columns, t >= 0)
        b_past, past_bin = _load_log_scaling(p_v + (t - 1) * (columns + 1), o_col, m_real, columns, t > 0)
        tl.store(p_x + t * (columns + 1) + o_col, b_dv, mask=o_col < columns)
        b_dv, dv_bin = _adjoint_iteration(
            p_cost, p_mask, p_grad, p_u + t * (rows + 1), p_y + t * (rows + 1), b_v, v_bin, b_past, past_bin,
            b_dv, dv_bin, tl.where(turn == 0, du_bin, 0.0), o_col, rows, columns, scale, score_bin, mass_rows, mass_bin,
            turn == 0, m_real, BR=BR,
        )  # fmt: skip
    # The last pass reads what other threads of this program have written.
    tl.debug_barrier()
    for start in range(0, rows, BR):
        o_row = start + tl.arange(0, BR)
        m_row = o_row < rows
        b_scores = _load_scores(p_cost, p_mask, o_row, o_col, rows, columns, scale)
        b_ds = _load_gradient(p_grad, o_row, o_col, m_real, rows, columns)
        for t in range(iters):
            b_u = tl.load(p_u + t * (rows + 1) + o_row, mask=m_row, other=float("-inf"))
            b_y = tl.load(p_y + t * (rows + 1) + o_row, mask=m_row, other=0.0)
            b_x = tl.load(p_x + t * (columns + 1) + o_col, mask=m_real, other=0.0)
            b_v, _ = _load_log_scaling(p_v + t * (columns + 1), o_col, m_real, columns, t >= 0)
            b_past, _ = _load_log_scaling(p_v + (t - 1) * (columns + 1), o_col, m_real, columns, t > 0)
            b_entries = b_scores + b_u[:, None]
            b_ds -= b_x[None, :] * tl.exp2(b_entries + b_v[None, :])
            b_ds -= b_y[:, None] * tl.exp2(b_entries + b_past[None, :])
        m_tile = m_row[:, None] & (o_col < columns)[None, :]
        tl.store(p_dcost + o_row[:, None] * columns + o_col[None, :], b_ds * grad_scale, mask=m_tile)

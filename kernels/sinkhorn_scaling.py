"""Device helpers of the Sinkhorn kernels: the iterations in scaling form on a tile that stays in registers.

With scores s = -C / eps, the first row step is taken in the log domain and kept in the kernel matrix,
    f_i = log a_i - lse_j s_ij,    K_ij = exp(s_ij + f_i) <= a_i,
and what follows multiplies and adds:
    v_j = b_j / sum_i K_ij u_i,    u_i = a_i / sum_j K_ij v_j,    u = 1 at first,
    log_plan_ij = s_ij + f_i + log u_i + log v_j.
Logarithms are to base 2 throughout. The dustbin row and column are vectors beside the tile; every real column of the
dustbin row holds the same score, so that the row is one number. K is 0 where an entry of the tile is not real.

The form holds while 2 max(dustbin, 0) + max(-min C, 0) <= 64 eps. K of the dustbin column is then e^-64 or more, over
the number of columns, with what its potential may lag behind those of other columns taken off; so an entry that is lost
to underflow, K < e^-87, would be about e^-18 of its row in any plan. And the scalings stay within e^64 times the number
of entries, since no step moves them further than the fixed point lies. Costs that are large, or inf, only underflow.

The adjoint of an iteration, from the gradients du, dv of log u_t, log v_t, where V is v of the iteration before:
    x_j = v_j dv_j / b_j,    du_i -= u_i sum_j K_ij x_j,    y_i = u_i du_i / a_i,    dv_j = -V_j sum_i K_ij y_i,
    ds_ij -= K_ij (u_i x_j + y_i V_j),    du = 0.

A tile [C, side, L] holds column c L + l of the problem at [c, :, l]: Triton's own layout then gives each thread a block
of rows and columns, in which both sums need few exchanges, whatever the alignment of the memory that the tile comes
from. So the order of all sums is fixed by the side alone; no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Warps of a problem and columns L side by side, by the side of its tile: those that compile without spills everywhere.
FORWARD_TILES = {32: (2, 8), 64: (4, 16), 128: (8, 16)}
BACKWARD_TILES = {32: (1, 8), 64: (4, 16), 128: (8, 16)}


def tile_arguments(tiles: dict[int, tuple[int, int]], rows: int, columns: int) -> tuple[dict[str, int], int]:
    """The constants of the smallest tile that holds a problem of at most 128 x 128, and its warps."""
    side = next(side for side in tiles if max(rows, columns) <= side)
    warps, lanes = tiles[side]
    return {"SIDE": side, "LANES": lanes}, warps


@triton.jit
def column_offsets(SIDE: tl.constexpr, LANES: tl.constexpr):
    # [C, L]
    return tl.arange(0, SIDE // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def by_row(b_x):
    """[side] -> [1, side, 1]."""
    return b_x[:, None][None, :, :]


@triton.jit
def by_column(b_x):
    """[C, L] -> [C, 1, L]."""
    return b_x[:, None, :]


@triton.jit
def sum_columns(b_tile):
    """[C, side, L] -> [side]."""
    return tl.sum(tl.sum(b_tile, 0), 1)


@triton.jit
def sum_rows(b_tile):
    """[C, side, L] -> [C, L]."""
    return tl.sum(b_tile, 1)


@triton.jit
def total(b_x):
    """The sum of [C, L]."""
    return tl.sum(tl.sum(b_x, 0), 0)


@triton.jit
def first_row_step(b_cost, scale, score_bin):
    """log2 of the first row scaling, a = 1. b_cost: inf where no real entry is."""
    b_top = tl.maximum(-tl.min(tl.min(b_cost, 0), 1) * scale, score_bin)
    b_sum = sum_columns(tl.exp2(-b_cost * scale - by_row(b_top))) + tl.exp2(score_bin - b_top)
    return -(b_top + tl.log2(b_sum))


@triton.jit
def dustbin_row(score_bin, mass_bin):
    """The dustbin row after its first step: log2 scaling, K in a real column, K in the corner; 0 without mass."""
    top = tl.maximum(score_bin, 0.0)
    column, corner = tl.exp2(score_bin - top), tl.exp2(-top)
    row_sum = mass_bin * column + corner
    first = tl.log2(tl.maximum(mass_bin, 1.0)) - top - tl.log2(row_sum)
    return first, mass_bin * column / row_sum, mass_bin * corner / row_sum


@triton.jit
def kernel_matrix(b_cost, b_first, scale):
    return tl.exp2(by_row(b_first) - b_cost * scale)


@triton.jit
def column_step(b_k, b_kbin, k_row, k_corner, b_u, u_bin, m_real, mass_rows):
    b_sum = sum_rows(b_k * by_row(b_u)) + k_row * u_bin
    v_bin = mass_rows / (tl.sum(b_kbin * b_u, 0) + k_corner * u_bin)
    return tl.where(m_real, 1.0 / b_sum, 0.0), v_bin


@triton.jit
def row_step(b_k, b_kbin, k_row, k_corner, b_v, v_bin, m_row, mass_bin):
    b_sum = sum_columns(b_k * by_column(b_v)) + b_kbin * v_bin
    u_bin = mass_bin / (k_row * total(b_v) + k_corner * v_bin)
    return tl.where(m_row, 1.0 / b_sum, 0.0), tl.where(mass_bin > 0, u_bin, 0.0)


@triton.jit
def load_tile(p_tile, o_col, m_col, stride, rows, other, SIDE: tl.constexpr):
    """A matrix as a tile [C, side, L] in float32."""
    p_entries, m_entries = _entries(p_tile, o_col, m_col, stride, rows, SIDE)
    b_tile = tl.load(p_entries, mask=m_entries, other=other).to(tl.float32)
    return tl.reshape(b_tile, (o_col.shape[0], SIDE, o_col.shape[1]))


@triton.jit
def store_tile(p_tile, b_tile, o_col, stride, rows, columns, SIDE: tl.constexpr):
    p_entries, m_entries = _entries(p_tile, o_col, o_col < columns, stride, rows, SIDE)
    tl.store(p_entries, _flat(b_tile, o_col, SIDE), mask=m_entries)


@triton.jit
def _flat(b_tile, o_col, SIDE: tl.constexpr):
    """Anything that broadcasts to a tile -> [C side, L]."""
    b_tile = tl.broadcast_to(b_tile, (o_col.shape[0], SIDE, o_col.shape[1]))
    return tl.reshape(b_tile, (o_col.shape[0] * SIDE, o_col.shape[1]))


@triton.jit
def _entries(p_tile, o_col, m_col, stride, rows, SIDE: tl.constexpr):
    """Pointers and mask of a tile [C side, L]: with two axes all versions of Triton choose the layout meant above."""
    o_flat, o_lane = tl.arange(0, o_col.shape[0] * SIDE), tl.arange(0, o_col.shape[1])
    o_row = o_flat % SIDE
    p_entries = (p_tile + o_row * stride)[:, None] + ((o_flat // SIDE * o_col.shape[1])[:, None] + o_lane[None, :])
    return p_entries, (o_row < rows)[:, None] & _flat(by_column(m_col), o_col, SIDE)


@triton.jit
def _store_potentials(p_u, p_v, b_u, u_bin, b_v, v_bin, o_row, o_col, rows, columns, SIDE: tl.constexpr):
    # As tiles of which one column, or one row, is written: in the layout of the sums, without an exchange.
    m_u = by_row(o_row < rows) & by_column(o_col == 0)
    tl.store(_flat(p_u + by_row(o_row), o_col, SIDE), _flat(by_row(b_u), o_col, SIDE), mask=_flat(m_u, o_col, SIDE))
    p_entries, m_entries = _entries(p_v, o_col, o_col < columns, 0, 1, SIDE)
    tl.store(p_entries, _flat(by_column(b_v), o_col, SIDE), mask=m_entries)
    tl.store(p_u + rows, u_bin)
    tl.store(p_v + columns, v_bin)


@triton.jit
def load_scaling(p_scaling, o_entry, m_entry, length, later):
    """Scalings of one iteration and the dustbin's; 1 for the start of the iterations, where not ``later``."""
    b_value = tl.load(p_scaling + o_entry, mask=m_entry & later, other=1.0)
    return tl.where(m_entry, b_value, 0.0), tl.load(p_scaling + length, mask=later, other=1.0)


@triton.jit
def scaling_iterations(
    b_k, b_kbin, k_row, k_corner, b_first, first_bin, m_row, m_real, mass_rows, mass_bin,
    p_u, p_v, o_row, o_col, rows, columns, iters, SAVE: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """All iterations after the first row step; returns u [side], u_bin, v [C, L], v_bin.

    Potentials saved, [iters, rows + 1] and [iters, columns + 1]: the scalings, but log2 of the first row step in u[0].
    """
    b_u, u_bin = tl.where(m_row, 1.0, 0.0), tl.where(mass_bin > 0, 1.0, 0.0)
    b_v, v_bin = column_step(b_k, b_kbin, k_row, k_corner, b_u, u_bin, m_real, mass_rows)
    if SAVE:
        _store_potentials(p_u, p_v, b_first, first_bin, b_v, v_bin, o_row, o_col, rows, columns, SIDE)
    for _ in range(1, iters):
        b_u, u_bin = row_step(b_k, b_kbin, k_row, k_corner, b_v, v_bin, m_row, mass_bin)
        b_v, v_bin = column_step(b_k, b_kbin, k_row, k_corner, b_u, u_bin, m_real, mass_rows)
        if SAVE:
            p_u += rows + 1
            p_v += columns + 1
            _store_potentials(p_u, p_v, b_u, u_bin, b_v, v_bin, o_row, o_col, rows, columns, SIDE)
    return b_u, u_bin, b_v, v_bin


@triton.jit
def _adjoint_step(
    b_k, b_kbin, k_row, k_corner, b_w, b_du, du_bin, b_dv, dv_bin, b_u, u_bin, b_v, v_bin, b_past, past_bin,
    share_rows, share_bin,
):  # fmt: skip
    """One iteration back: W with its terms, and dv of the iteration before."""
    b_x, x_bin = b_v * b_dv, v_bin * dv_bin * share_rows
    b_du -= b_u * (sum_columns(b_k * by_column(b_x)) + b_kbin * x_bin)
    du_bin -= u_bin * (k_row * total(b_x) + k_corner * x_bin)
    b_y, y_bin = b_u * b_du, u_bin * du_bin * share_bin
    b_w += by_row(b_u) * by_column(b_x) + by_row(b_y) * by_column(b_past)
    b_dv = -b_past * (sum_rows(b_k * by_row(b_y)) + k_row * y_bin)
    dv_bin = -past_bin * (tl.sum(b_kbin * b_y, 0) + k_corner * y_bin)
    return b_w, b_dv, dv_bin


@triton.jit
def scaling_adjoint(
    b_k, b_kbin, k_row, k_corner, b_du, du_bin, b_dv, dv_bin, m_row, m_real, mass_rows, mass_bin,
    p_u, p_v, o_row, o_col, rows, columns, iters,
):  # fmt: skip
    """W [C, side, L] with ds = (gradient of log_plan) - K W; du, dv are the gradients of the last log u, log v."""
    share_rows, share_bin = 1.0 / mass_rows, tl.where(mass_bin > 0, 1.0 / mass_bin, 0.0)
    p_u += (iters - 1) * (rows + 1)
    p_v += (iters - 1) * (columns + 1)
    b_u, u_bin = load_scaling(p_u, o_row, m_row, rows, iters > 1)
    b_v, v_bin = load_scaling(p_v, o_col, m_real, columns, iters > 0)
    b_past, past_bin = load_scaling(p_v - (columns + 1), o_col, m_real, columns, iters > 1)
    b_unext, unext_bin = load_scaling(p_u - (rows + 1), o_row, m_row, rows, iters > 2)
    b_vnext, vnext_bin = load_scaling(p_v - 2 * (columns + 1), o_col, m_real, columns, iters > 2)
    b_w, b_dv, dv_bin = _adjoint_step(
        b_k, b_kbin, k_row, k_corner, tl.zeros_like(b_k), b_du, du_bin, b_dv, dv_bin, b_u, u_bin, b_v, v_bin,
        b_past, past_bin, share_rows, share_bin,
    )  # fmt: skip
    # log_plan saw the last row step alone: from here on du starts from 0.
    for t in range(1, iters):
        b_u, u_bin, b_v, v_bin, b_past, past_bin = b_unext, unext_bin, b_past, past_bin, b_vnext, vnext_bin
        # What the next turn needs is asked for now, so that its latency hides behind this turn's sums.
        p_u -= rows + 1
        p_v -= columns + 1
        b_unext, unext_bin = load_scaling(p_u - (rows + 1), o_row, m_row, rows, t + 2 < iters)
        b_vnext, vnext_bin = load_scaling(p_v - 2 * (columns + 1), o_col, m_real, columns, t + 2 < iters)
        b_w, b_dv, dv_bin = _adjoint_step(
            b_k, b_kbin, k_row, k_corner, b_w, tl.zeros_like(b_du), tl.full((), 0.0, tl.float32), b_dv, dv_bin,
            b_u, u_bin, b_v, v_bin, b_past, past_bin, share_rows, share_bin,
        )  # fmt: skip
    return b_w

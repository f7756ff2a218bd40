"""Sinkhorn with a dustbin, forward and backward: one program a problem.

cost [B, N, M], col_mask [B, M] -> log_plan [B, N + 1, M + 1]; equations in ``sinkhorn_reference``. Up to 128 x 128 the
problem stays in registers, in scaling form (``sinkhorn_scaling``) where its costs allow it and else in the log domain
(``sinkhorn_streaming``); up to 256 x 256 always in the log domain. The program itself looks at its smallest cost, the
same way in both directions: no host waits.

The forward saves the potentials of every iteration, u [B, iters, N + 1] and v [B, iters, M + 1], if a gradient is
wanted; the backward rebuilds the plans from them and gives the exact gradient of the iterations. Where log_plan is -inf
for want of mass, neither cost nor upstream gradient is read, and dcost is 0.

Deterministic: each program sums in an order that its tile fixes, and its tile depends on (N, M) alone.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from wireframe.kernels.launch import Launch
from wireframe.kernels.sinkhorn_scaling import (
    BACKWARD_TILES,
    FORWARD_TILES,
    by_column,
    by_row,
    column_offsets,
    dustbin_row,
    first_row_step,
    kernel_matrix,
    load_tile,
    scaling_adjoint,
    scaling_iterations,
    store_tile,
    sum_columns,
    sum_rows,
    tile_arguments,
    total,
)
from wireframe.kernels.sinkhorn_streaming import BLOCK_ROWS, load_columns, streaming_backward, streaming_forward

# A problem above the largest of the tiles is streamed.
_STREAMED_SIDE, _STREAMED_WARPS = 256, 8


@triton.jit
def _scaling_forward(
    b_cost, p_cost, p_out, p_u, p_v, m_real, o_row, o_col, rows, columns, scale, score_bin, mass_bin, iters,
    SAVE: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    m_row = o_row < rows
    b_first = first_row_step(b_cost, scale, score_bin)
    first_bin, k_row, k_corner = dustbin_row(score_bin, mass_bin)
    b_k = kernel_matrix(b_cost, b_first, scale)
    b_kbin = tl.where(m_row, tl.exp2(score_bin + b_first), 0.0)
    b_u, u_bin, b_v, v_bin = scaling_iterations(
        b_k, b_kbin, k_row, k_corner, b_first, first_bin, m_row, m_real, rows * 1.0, mass_bin,
        p_u, p_v, o_row, o_col, rows, columns, iters, SAVE=SAVE, SIDE=SIDE,
    )  # fmt: skip
    ln2 = 0.6931471805599453
    stride = columns + 1
    b_u, u_bin = b_first + tl.log2(b_u), first_bin + tl.log2(u_bin)
    b_v, v_bin = tl.log2(b_v), tl.log2(v_bin)
    if SIDE > 64:
        # The cost once more, instead of through all iterations in registers; the barrier keeps the two loads apart.
        tl.debug_barrier()
        b_cost = load_tile(p_cost, o_col, m_real, columns, rows, float("inf"), SIDE)
    b_out = (by_row(b_u) - b_cost * scale + by_column(b_v)) * ln2
    store_tile(p_out, b_out, o_col, stride, rows, columns, SIDE)
    tl.store(p_out + o_row * stride + columns, (score_bin + b_u + v_bin) * ln2, mask=m_row)
    tl.store(p_out + rows * stride + o_col, (score_bin + u_bin + b_v) * ln2, mask=o_col < columns)
    tl.store(p_out + rows * stride + columns, (u_bin + v_bin) * ln2)


@triton.jit(do_not_specialize=["rows", "columns", "iters"])
def _sinkhorn_fwd_kernel(
    p_cost, p_mask, p_out, p_u, p_v, rows, columns, scale, score_bin, lowest, iters,
    SAVE: tl.constexpr, SIDE: tl.constexpr, LANES: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """cost [B, rows, columns], mask [B, columns] -> out [B, rows + 1, columns + 1]; rows, columns <= SIDE."""
    batch = tl.program_id(0).to(tl.int64)
    p_cost += batch * rows * columns
    p_mask += batch * columns
    p_out += batch * (rows + 1) * (columns + 1)
    p_u += batch * iters * (rows + 1)
    p_v += batch * iters * (columns + 1)
    o_row, o_col = tl.arange(0, SIDE), column_offsets(SIDE, LANES)
    m_real = load_columns(p_mask, o_col, columns)
    b_cost = load_tile(p_cost, o_col, m_real, columns, rows, float("inf"), SIDE)
    if tl.min(tl.min(tl.min(b_cost, 0), 0), 0) >= lowest:
        _scaling_forward(
            b_cost, p_cost, p_out, p_u, p_v, m_real, o_row, o_col, rows, columns, scale, score_bin,
            total(m_real.to(tl.float32)), iters, SAVE=SAVE, SIDE=SIDE,
        )  # fmt: skip
    else:
        streaming_forward(
            p_cost, p_mask, p_out, p_u, p_v, rows, columns, scale, score_bin, iters, SAVE=SAVE, SIDE=SIDE, BR=BR,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "columns", "iters"])
def _sinkhorn_streamed_fwd_kernel(
    p_cost, p_mask, p_out, p_u, p_v, rows, columns, scale, score_bin, iters,
    SAVE: tl.constexpr, SIDE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """As ``_sinkhorn_fwd_kernel``, for problems too large for the registers."""
    batch = tl.program_id(0).to(tl.int64)
    streaming_forward(
        p_cost + batch * rows * columns, p_mask + batch * columns, p_out + batch * (rows + 1) * (columns + 1),
        p_u + batch * iters * (rows + 1), p_v + batch * iters * (columns + 1),
        rows, columns, scale, score_bin, iters, SAVE=SAVE, SIDE=SIDE, BR=BR,
    )  # fmt: skip


@triton.jit
def _scaling_backward(
    b_cost, p_grad, p_dcost, p_u, p_v, m_real, o_row, o_col, rows, columns, scale, score_bin, grad_scale, mass_bin,
    iters, SIDE: tl.constexpr,
):  # fmt: skip
    m_row = o_row < rows
    stride = columns + 1
    b_first = tl.load(p_u + o_row, mask=m_row, other=0.0)
    _, k_row, k_corner = dustbin_row(score_bin, mass_bin)
    b_k = kernel_matrix(b_cost, b_first, scale)
    b_kbin = tl.where(m_row, tl.exp2(score_bin + b_first), 0.0)
    b_grad = load_tile(p_grad, o_col, m_real, stride, rows, 0.0, SIDE)
    # The dustbin column, row and corner; the last two exist where there is a real column.
    b_gcol = tl.load(p_grad + o_row * stride + columns, mask=m_row, other=0.0)
    b_grow = tl.load(p_grad + rows * stride + o_col, mask=m_real, other=0.0)
    corner = tl.load(p_grad + rows * stride + columns, mask=mass_bin > 0, other=0.0)
    b_w = scaling_adjoint(
        b_k, b_kbin, k_row, k_corner, sum_columns(b_grad) + b_gcol, total(b_grow) + corner,
        sum_rows(b_grad) + b_grow, tl.sum(b_gcol, 0) + corner, m_row, m_real, rows * 1.0, mass_bin,
        p_u, p_v, o_row, o_col, rows, columns, iters,
    )  # fmt: skip
    b_ds = b_k * b_w
    # Upstream once more, instead of through all iterations in registers; the barrier keeps the two loads apart.
    tl.debug_barrier()
    b_ds = load_tile(p_grad, o_col, m_real, stride, rows, 0.0, SIDE) - b_ds
    store_tile(p_dcost, b_ds * grad_scale, o_col, columns, rows, columns, SIDE)


@triton.jit(do_not_specialize=["rows", "columns", "iters"])
def _sinkhorn_bwd_kernel(
    p_cost, p_mask, p_grad, p_dcost, p_u, p_v, p_x, p_y, rows, columns, scale, score_bin, lowest, grad_scale, iters,
    SIDE: tl.constexpr, LANES: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """grad [B, rows + 1, columns + 1] of log_plan -> dcost [B, rows, columns]; x and y are scratch, as v and u."""
    batch = tl.program_id(0).to(tl.int64)
    p_cost += batch * rows * columns
    p_mask += batch * columns
    p_dcost += batch * rows * columns
    p_grad += batch * (rows + 1) * (columns + 1)
    p_u += batch * iters * (rows + 1)
    p_v += batch * iters * (columns + 1)
    o_row, o_col = tl.arange(0, SIDE), column_offsets(SIDE, LANES)
    m_real = load_columns(p_mask, o_col, columns)
    b_cost = load_tile(p_cost, o_col, m_real, columns, rows, float("inf"), SIDE)
    # The same question as in the forward, so that the potentials are read as they were written.
    if tl.min(tl.min(tl.min(b_cost, 0), 0), 0) >= lowest:
        _scaling_backward(
            b_cost, p_grad, p_dcost, p_u, p_v, m_real, o_row, o_col, rows, columns, scale, score_bin, grad_scale,
            total(m_real.to(tl.float32)), iters, SIDE=SIDE,
        )  # fmt: skip
    else:
        streaming_backward(
            p_cost, p_mask, p_grad, p_dcost, p_u, p_v,
            p_x + batch * iters * (columns + 1), p_y + batch * iters * (rows + 1),
            rows, columns, scale, score_bin, grad_scale, iters, SIDE=SIDE, BR=BR,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "columns", "iters"])
def _sinkhorn_streamed_bwd_kernel(
    p_cost, p_mask, p_grad, p_dcost, p_u, p_v, p_x, p_y, rows, columns, scale, score_bin, grad_scale, iters,
    SIDE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """As ``_sinkhorn_bwd_kernel``, for problems too large for the registers."""
    batch = tl.program_id(0).to(tl.int64)
    streaming_backward(
        p_cost + batch * rows * columns, p_mask + batch * columns,
        p_grad + batch * (rows + 1) * (columns + 1), p_dcost + batch * rows * columns,
        p_u + batch * iters * (rows + 1), p_v + batch * iters * (columns + 1),
        p_x + batch * iters * (columns + 1), p_y + batch * iters * (rows + 1),
        rows, columns, scale, score_bin, grad_scale, iters, SIDE=SIDE, BR=BR,
    )  # fmt: skip


def scores(eps: float, dustbin: float) -> dict[str, float]:
    """What turns costs into scores to base 2: the factor, and the dustbin's score."""
    scale = math.log2(math.e) / eps
    return {"scale": scale, "score_bin": -dustbin * scale}


def _launch(
    kernel: Any, streamed: Any, tiles: dict[int, tuple[int, int]], cost: Tensor, lowest: float,
    arguments: dict[str, Any],
) -> list[Launch]:  # fmt: skip
    batch, rows, columns = cost.shape
    arguments = {**arguments, "rows": rows, "columns": columns, "BR": BLOCK_ROWS}
    if max(rows, columns) > max(tiles):
        return [Launch(streamed, (batch,), {**arguments, "SIDE": _STREAMED_SIDE}, _STREAMED_WARPS)]
    tile, warps = tile_arguments(tiles, rows, columns)
    return [Launch(kernel, (batch,), {**arguments, **tile, "lowest": lowest}, warps)]


def plan_forward(
    cost: Tensor,  # [B, N, M]
    col_mask: Tensor,  # [B, M]
    log_plan: Tensor,  # [B, N + 1, M + 1]
    u: Tensor,  # [B, iters or 0, N + 1]
    v: Tensor,  # [B, iters or 0, M + 1]
    *,
    eps: float,
    iters: int,
    dustbin: float,
    lowest: float,
) -> list[Launch]:
    """One launch. Contiguous all, N and M in 1..256, outputs float32; no potentials are saved where u is empty.

    lowest: the smallest cost that the scaling form takes. The same tiles serve every architecture.
    """
    arguments = {
        "p_cost": cost, "p_mask": col_mask, "p_out": log_plan, "p_u": u, "p_v": v,
        **scores(eps, dustbin), "iters": iters, "SAVE": u.shape[1] > 0,
    }  # fmt: skip
    return _launch(_sinkhorn_fwd_kernel, _sinkhorn_streamed_fwd_kernel, FORWARD_TILES, cost, lowest, arguments)


def plan_backward(
    cost: Tensor,  # [B, N, M]
    col_mask: Tensor,  # [B, M]
    grad: Tensor,  # [B, N + 1, M + 1]
    u: Tensor,  # [B, iters, N + 1]
    v: Tensor,  # [B, iters, M + 1]
    dcost: Tensor,  # [B, N, M]
    x: Tensor,  # [B, iters, M + 1]
    y: Tensor,  # [B, iters, N + 1]
    *,
    eps: float,
    dustbin: float,
    lowest: float,
) -> list[Launch]:
    """One launch. Contiguous all, as for the forward; grad, dcost and the scratch x, y are float32."""
    arguments = {
        "p_cost": cost, "p_mask": col_mask, "p_grad": grad, "p_dcost": dcost, "p_u": u, "p_v": v, "p_x": x, "p_y": y,
        **scores(eps, dustbin), "grad_scale": -1.0 / eps, "iters": u.shape[1],
    }  # fmt: skip
    return _launch(_sinkhorn_bwd_kernel, _sinkhorn_streamed_bwd_kernel, BACKWARD_TILES, cost, lowest, arguments)

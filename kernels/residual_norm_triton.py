"""Residual connection with dropout and the norm behind it, forward and backward; and the norm alone.

With f the factors of dropout (``dropout_triton``), t = x + branch f and r = 1 / sqrt(mean(t^2) + eps) of a row of C:

    total = t        normed = t r weight        copy = t, rounded to the dtype of normed

and with u = t r and s = dnormed weight in the backward pass:

    g = dtotal + dcopy + r (s - u mean(s u))    dx = g    dbranch = g f    dweight = sum over rows of dnormed u

Of the forward only total is kept: its rows are read for u anyway, and r of a row in registers costs less than r of a
launch before, which would be written, read and kept.

Deterministic: a row belongs to a few threads of one warp or block, whose sums follow the layout of a tile; that layout
is a function of C and the dtypes, since addresses are aligned and no number is specialised. A program of the backward
adds dweight over its rows in order; the sums of the programs, whose number is a function of the number of rows, are
added in order by a second launch. No atomics.

total has the bits of ``dropout_add``: product and sum are rounded one after the other. Therefore the forward forbids
fused multiply-adds.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from wireframe.kernels.dropout_reference import keep_scale
from wireframe.kernels.dropout_triton import factors_of, hash_words, site_key, skip_words
from wireframe.kernels.launch import Launch
from wireframe.kernels.partial_sums import plan_column_sums

# Elements of a tile: 16 of a thread, so that much is on its way from memory at once. 256 channels are a warp's. Half of
# that where each element takes a hash of its own, and registers for it.
_ELEMENTS, _WARPS = 2048, 4

# Programs of the backward, each of which leaves a row of partial sums: at most four on each multiprocessor of a large
# GPU, where they all fit at once. Fewest tiles of one, or that row costs more than they do.
_MOST_PROGRAMS, _LEAST_BLOCKS = 512, 2


@triton.jit
def _row_factors(p_keys, o_scene, o_start, site, threshold, scale, C: tl.constexpr, BC: tl.constexpr):
    """[BR, BC] for rows that start at the elements ``o_start`` [BR, 1] of their scenes, o_scene [BR, 1] or one."""
    b_key = site_key(tl.load(p_keys + o_scene), site)
    if C % 4 == 0:
        # [BR, BC / 4]
        b_hash = hash_words(skip_words(b_key, o_start // 4), tl.arange(0, BC // 4)[None, :])
        b_even = tl.interleave(factors_of(b_hash, threshold, scale), factors_of(b_hash >> 32, threshold, scale))
        b_odd = tl.interleave(factors_of(b_hash >> 16, threshold, scale), factors_of(b_hash >> 48, threshold, scale))
        b_factors = tl.interleave(b_even, b_odd)
    else:
        # A hash may serve two rows.
        o = o_start + tl.arange(0, BC)[None, :]
        b_factors = factors_of(hash_words(b_key, o // 4) >> (16 * (o % 4)).to(tl.uint64), threshold, scale)
    return b_factors


@triton.jit(do_not_specialize=["rows", "count", "x_rows", "branch_rows", "site", "threshold"])
def _residual_norm_fwd_kernel(
    p_x, p_branch, p_weight, p_keys, p_total, p_normed, p_copy, rows, count, x_rows, branch_rows, site, threshold,
    scale, eps, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Rows of B scenes of ``count`` each; of x and branch, scenes begin x_rows and branch_rows apart.

    Without p_branch the norm of x alone. p_keys, p_total, p_copy: None where they are not needed. WHOLE: whether BR
    rows always belong to one scene.
    """
    o_row = tl.program_id(0) * BR + tl.arange(0, BR)[:, None]
    o_c = tl.arange(0, BC)[None, :]
    m = (o_row < rows) & (o_c < C)
    # Of rows that are not there, those of the last.
    o_row = tl.minimum(o_row, rows - 1)
    o = o_row.to(tl.int64) * C + o_c
    b_weight = tl.load(p_weight + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    # [BR, BC]
    if p_branch is None:
        b_total = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    else:
        # One for all rows, or for each.
        o_scene = tl.program_id(0) * BR // count if WHOLE else o_row // count
        o_in_scene = o_row - o_scene * count
        o_x = (o_scene.to(tl.int64) * x_rows + o_in_scene) * C + o_c
        o_branch = (o_scene.to(tl.int64) * branch_rows + o_in_scene) * C + o_c
        b_x = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)
        b_branch = tl.load(p_branch + o_branch, mask=m, other=0.0).to(tl.float32)
        if p_keys is not None:
            b_branch *= _row_factors(p_keys, o_scene, o_in_scene.to(tl.int64) * C, site, threshold, scale, C, BC)
        b_rounded = (b_x + b_branch).to(p_total.dtype.element_ty)
        tl.store(p_total + o, b_rounded, mask=m)
        b_total = b_rounded.to(tl.float32)
    b_rstd = tl.rsqrt(tl.sum(b_total * b_total, 1, keep_dims=True) / C + eps)
    tl.store(p_normed + o, (b_total * b_rstd * b_weight).to(p_normed.dtype.element_ty), mask=m)
    if p_copy is not None:
        tl.store(p_copy + o, b_total.to(p_copy.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["rows", "count", "blocks", "site", "threshold"])
def _residual_norm_bwd_kernel(
    p_total, p_weight, p_keys, p_dtotal, p_dnormed, p_dcopy, p_dx, p_dbranch, p_partial, rows, count, blocks, site,
    threshold, scale, eps, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """As above, contiguous all. Gradients that are not there or not wanted: None.

    A program goes over every so many blocks of BR rows and leaves its sums for dweight, p_partial [programs, C].
    """
    o_c = tl.arange(0, BC)[None, :]
    b_dweight = tl.zeros((BR, BC), tl.float32)
    if p_dnormed is not None:
        b_weight = tl.load(p_weight + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        o_row = block * BR + tl.arange(0, BR)[:, None]
        m = (o_row < rows) & (o_c < C)
        o_row = tl.minimum(o_row, rows - 1)
        o = o_row.to(tl.int64) * C + o_c
        # [BR, BC], all before the first sum waits for one of them.
        b_grad = tl.zeros((BR, BC), tl.float32)
        if p_dtotal is not None:
            b_grad += tl.load(p_dtotal + o, mask=m, other=0.0).to(tl.float32)
        if p_dcopy is not None:
            b_grad += tl.load(p_dcopy + o, mask=m, other=0.0).to(tl.float32)
        if p_dnormed is not None:
            b_total = tl.load(p_total + o, mask=m, other=0.0).to(tl.float32)
            b_dnormed = tl.load(p_dnormed + o, mask=m, other=0.0).to(tl.float32)
            b_rstd = tl.rsqrt(tl.sum(b_total * b_total, 1, keep_dims=True) / C + eps)
            b_unit = b_total * b_rstd
            b_scaled = b_dnormed * b_weight
            b_mean = tl.sum(b_scaled * b_unit, 1, keep_dims=True) / C
            b_grad += (b_scaled - b_unit * b_mean) * b_rstd
            b_dweight += b_dnormed * b_unit
        if p_dx is not None:
            tl.store(p_dx + o, b_grad.to(p_dx.dtype.element_ty), mask=m)
        if p_dbranch is not None:
            if p_keys is not None:
                o_scene = block * BR // count if WHOLE else o_row // count
                o_start = (o_row - o_scene * count).to(tl.int64) * C
                b_grad *= _row_factors(p_keys, o_scene, o_start, site, threshold, scale, C, BC)
            tl.store(p_dbranch + o, b_grad.to(p_dbranch.dtype.element_ty), mask=m)
    if p_partial is not None:
        o = tl.program_id(0) * C + tl.arange(0, BC)
        tl.store(p_partial + o, tl.sum(b_dweight, 0), mask=tl.arange(0, BC) < C)


def plan_forward(
    x: Tensor,  # [B, ..., C]
    branch: Tensor | None,  # [B, ..., C]
    weight: Tensor,  # [C]
    keys: Tensor | None,  # [B]
    total: Tensor | None,  # [B, ..., C]
    normed: Tensor,  # [B, ..., C]
    copy: Tensor | None,  # [B, ..., C]
    *,
    site: int,
    threshold: int,
    eps: float,
) -> list[Launch]:
    """One launch. Contiguous all, but of x and branch only the scenes, which lie whole rows apart; addresses aligned.

    Without branch the norm of x, contiguous. keys, total and copy are None where they are not needed.
    """
    rows, count, channels = _sizes(normed)
    width, height = _tile(channels)
    arguments = {
        "p_x": x, "p_branch": branch, "p_weight": weight, "p_keys": keys, "p_total": total, "p_normed": normed,
        "p_copy": copy, "rows": rows, "count": count, "x_rows": _rows_apart(x), "branch_rows": _rows_apart(branch),
        "site": site, "threshold": threshold, "scale": keep_scale(threshold), "eps": eps, "C": channels,
        "BR": height, "BC": width, "WHOLE": count % height == 0,
    }  # fmt: skip
    grid = (triton.cdiv(rows, height),)
    return [Launch(_residual_norm_fwd_kernel, grid, arguments, _WARPS, fp_fusion=False)]


def plan_backward(
    total: Tensor,  # [B, ..., C]
    weight: Tensor,  # [C]
    keys: Tensor | None,  # [B]
    dtotal: Tensor | None,  # [B, ..., C]
    dnormed: Tensor | None,  # [B, ..., C]
    dcopy: Tensor | None,  # [B, ..., C]
    dx: Tensor | None,  # [B, ..., C]
    dbranch: Tensor | None,  # [B, ..., C]
    dweight: Tensor | None,  # [C]
    *,
    site: int,
    threshold: int,
    eps: float,
) -> list[Launch]:
    """One launch, and one for dweight, float32, which needs dnormed. Contiguous all, addresses aligned."""
    rows, count, channels = _sizes(total)
    width, height = _tile(channels)
    blocks = triton.cdiv(rows, height)
    programs = min(triton.cdiv(blocks, _LEAST_BLOCKS), _MOST_PROGRAMS)
    partial = None
    if dweight is not None:
        partial = torch.empty(programs, channels, dtype=torch.float32, device=total.device)
    arguments = {
        "p_total": total, "p_weight": weight, "p_keys": keys, "p_dtotal": dtotal, "p_dnormed": dnormed,
        "p_dcopy": dcopy, "p_dx": dx, "p_dbranch": dbranch, "p_partial": partial, "rows": rows, "count": count,
        "blocks": blocks, "site": site, "threshold": threshold, "scale": keep_scale(threshold), "eps": eps,
        "C": channels, "BR": height, "BC": width, "WHOLE": count % height == 0,
    }  # fmt: skip
    launches = [Launch(_residual_norm_bwd_kernel, (programs,), arguments, _WARPS)]
    if dweight is not None:
        launches.append(plan_column_sums(partial, dweight))
    return launches


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Rows altogether, of a scene, and their channels."""
    return math.prod(x.shape[:-1]), math.prod(x.shape[1:-1]), x.shape[-1]


def _tile(channels: int) -> tuple[int, int]:
    """(width, height)"""
    width = triton.next_power_of_2(channels)
    return width, (_ELEMENTS if channels % 4 == 0 else _ELEMENTS // 2) // width


def _rows_apart(x: Tensor | None) -> int:
    """Rows from scene to scene; the kernel then knows from C alone how addresses are aligned."""
    return 0 if x is None else x.stride(0) // x.shape[-1]

"""The rival that prices order: a backward of the same attention in one kernel that adds to dq by float atomics.

Key blocks are outermost, dk and dv stay in registers, and each tile of dq^ is added to float32 memory as it comes:
5 products instead of the 7 of ``wireframe.kernels``, and bits that change from call to call, since the order in which
programs arrive does. It exists here alone and serves nothing but the benchmark; equations and shapes as in
``kernels/qk_norm_attention_backward.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wireframe.kernels.launch import Launch, architecture, run
from wireframe.kernels.qk_norm_attention_backward import _through_norm
from wireframe.kernels.qk_norm_attention_forward import plan_forward
from wireframe.kernels.qk_norm_attention_keys import (
    admitted,
    load_words,
    masked,
    plan_keys,
    scale_of,
    scaled_logits,
    strides,
    unit_factor,
)
from wireframe.kernels.tiles import Tile

# Tiles worth a try, 16 bit and 32 bit: the benchmark takes the fastest, so that the rival is no straw man.
TILES = (Tile(32, 64, 4, 2), Tile(32, 128, 8, 2), Tile(64, 64, 8, 2))
TILES_FP32 = (Tile(32, 64, 8, 2),)

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _atomic_attention_rows_kernel(
    p_q, p_log_scale, p_out, p_do, p_row, p_delta, p_dunit,
    num_queries, kv_heads, row_blocks, stride_qb, stride_qn, stride_qh, stride_dob, stride_don, stride_doh,
    G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    # The factors of the rows, and zeros where the next kernel adds.
    pid = tl.program_id(0)
    b_hkv = pid // row_blocks
    b, hkv = (b_hkv // kv_heads).to(tl.int64), b_hkv % kv_heads
    rows = num_queries * G
    o_r = (pid % row_blocks) * BM + tl.arange(0, BM)
    m_r = o_r < rows
    o_query, o_h, o_d = o_r // G, hkv * G + o_r % G, tl.arange(0, D)
    o_row = b_hkv.to(tl.int64) * rows + o_r
    # [BM, D]
    o_q = o_query[:, None] * stride_qn + o_h[:, None] * stride_qh + o_d[None, :]
    b_q = tl.load(p_q + b * stride_qb + o_q, mask=m_r[:, None], other=0.0)
    o_do = o_query[:, None] * stride_don + o_h[:, None] * stride_doh + o_d[None, :]
    b_do = tl.load(p_do + b * stride_dob + o_do, mask=m_r[:, None], other=0.0)
    o_out = (((b * num_queries + o_query) * kv_heads * G + o_h) * D)[:, None] + o_d[None, :]
    b_out = tl.load(p_out + o_out, mask=m_r[:, None], other=0.0)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(p_row + o_row, unit_factor(b_q) * (scale_of(p_log_scale, o_h) * _LOG2E), mask=m_r)
    tl.store(p_delta + o_row, b_delta, mask=m_r)
    tl.store(p_dunit + o_row[:, None] * D + o_d[None, :], tl.zeros([BM, D], tl.float32), mask=m_r[:, None])


@triton.jit
def _atomic_attention_bwd_kernel(
    p_q, p_k, p_v, p_log_scale, p_key, p_words, p_lse, p_do, p_row, p_delta, p_dunit, p_dk, p_dv,
    num_queries, num_keys, kv_heads, key_blocks, words_per_scene,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_dob, stride_don, stride_doh,
    G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
    UNIT_TILES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b_hkv = pid // key_blocks
    b, hkv = (b_hkv // kv_heads).to(tl.int64), b_hkv % kv_heads
    rows = num_queries * G
    n = (pid % key_blocks) * BN
    o_n, o_d = tl.arange(0, BN), tl.arange(0, D)
    w0, w1, w2, w3 = load_words(p_words + b * words_per_scene, n, True, MASKED, BN)
    m_n = admitted(w0, w1, w2, w3, o_n, MASKED, BN)
    # [BN, D]
    o_k = (n + o_n)[:, None] * stride_kn + o_d[None, :]
    b_k = tl.load(p_k + b * stride_kb + hkv * stride_kh + o_k, mask=m_n[:, None], other=0.0)
    o_v = (n + o_n)[:, None] * stride_vn + o_d[None, :]
    b_v = tl.load(p_v + b * stride_vb + hkv * stride_vh + o_v, mask=m_n[:, None], other=0.0)
    b_key = tl.load(p_key + b_hkv.to(tl.int64) * words_per_scene * 32 + n + o_n)
    # float16 cannot hold 1 / |k|.
    b_right = (b_k.to(tl.float32) * b_key[:, None]).to(b_k.dtype) if UNIT_TILES else b_k
    p_q += b * stride_qb
    p_do += b * stride_dob
    o_row = b_hkv.to(tl.int64) * rows
    b_dunit = tl.zeros([BN, D], tl.float32)
    b_dv = tl.zeros([BN, D], tl.float32)
    for r in range(0, rows, BM):
        o_r = r + tl.arange(0, BM)
        m_r = o_r < rows
        o_query, o_h = o_r // G, hkv * G + o_r % G
        # [BM, D]
        o_q = o_query[:, None] * stride_qn + o_h[:, None] * stride_qh + o_d[None, :]
        b_q = tl.load(p_q + o_q, mask=m_r[:, None], other=0.0)
        o_do = o_query[:, None] * stride_don + o_h[:, None] * stride_doh + o_d[None, :]
        b_do = tl.load(p_do + o_do, mask=m_r[:, None], other=0.0)
        b_row = tl.load(p_row + o_row + o_r, mask=m_r, other=1.0)
        b_lse = tl.load(p_lse + o_row + o_r, mask=m_r, other=0.0)
        b_delta = tl.load(p_delta + o_row + o_r, mask=m_r, other=0.0)
        # [BN, BM]
        b_s = scaled_logits(tl.dot(b_k, tl.trans(b_q), input_precision="ieee"), b_key[:, None], MASKED)
        b_p = tl.exp2(tl.fma(b_s, b_row[None, :], -b_lse[None, :]))
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_ds = b_p * (tl.dot(b_v, tl.trans(b_do), input_precision="ieee") - b_delta[None, :])
        if UNIT_TILES:
            b_left = b_ds.to(b_k.dtype)
            b_scale = scale_of(p_log_scale, o_h) * _LOG2E
            b_unit = (b_q.to(tl.float32) * (unit_factor(b_q) * b_scale)[:, None]).to(b_q.dtype)
            b_dunit = tl.dot(b_ds.to(b_q.dtype), b_unit, b_dunit, input_precision="ieee")
        else:
            b_left = (b_ds * b_key[:, None]).to(b_k.dtype)
            b_dunit = tl.dot((b_ds * b_row[None, :]).to(b_q.dtype), b_q, b_dunit, input_precision="ieee")
        # [BM, D]
        b_part = tl.dot(tl.trans(b_left), b_right, input_precision="ieee")
        o_part = (o_row + o_r)[:, None] * D + o_d[None, :]
        tl.atomic_add(p_dunit + o_part, b_part, mask=m_r[:, None], sem="relaxed")
    b_dk, _ = _through_norm(b_k, b_dunit * _LN2, b_key)
    m_store = (n + o_n < num_keys)[:, None]
    o = (((b * num_keys + n + o_n) * kv_heads + hkv) * D)[:, None] + o_d[None, :]
    tl.store(p_dk + o, tl.where(m_n[:, None], b_dk, 0.0).to(p_dk.dtype.element_ty), mask=m_store)
    tl.store(p_dv + o, b_dv.to(p_dv.dtype.element_ty), mask=m_store)


@triton.jit
def _atomic_attention_dq_kernel(
    p_q, p_log_scale, p_dunit, p_dq, p_dlog_scale,
    num_queries, kv_heads, row_blocks, stride_qb, stride_qn, stride_qh,
    G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b_hkv = pid // row_blocks
    b, hkv = (b_hkv // kv_heads).to(tl.int64), b_hkv % kv_heads
    rows = num_queries * G
    o_r = (pid % row_blocks) * BM + tl.arange(0, BM)
    m_r = o_r < rows
    o_query, o_h, o_d = o_r // G, hkv * G + o_r % G, tl.arange(0, D)
    # [BM, D]
    o_q = o_query[:, None] * stride_qn + o_h[:, None] * stride_qh + o_d[None, :]
    b_q = tl.load(p_q + b * stride_qb + o_q, mask=m_r[:, None], other=0.0)
    o_dunit = (b_hkv.to(tl.int64) * rows + o_r)[:, None] * D + o_d[None, :]
    b_dunit = tl.load(p_dunit + o_dunit, mask=m_r[:, None], other=0.0)
    b_dq, b_dot = _through_norm(b_q, b_dunit * scale_of(p_log_scale, o_h)[:, None], unit_factor(b_q))
    o_dq = (((b * num_queries + o_query) * kv_heads * G + o_h) * D)[:, None] + o_d[None, :]
    tl.store(p_dq + o_dq, b_dq.to(p_dq.dtype.element_ty), mask=m_r[:, None])
    for g in tl.static_range(G):
        part = tl.sum(tl.where(m_r & (o_r % G == g), b_dot, 0.0), 0)
        tl.atomic_add(p_dlog_scale + hkv * G + g, part, sem="relaxed")


def plan_atomic_backward(
    do: Tensor,  # [B, Nq, H, D]
    q: Tensor,  # [B, Nq, H, D]
    k: Tensor,  # [B, Nk, Hkv, D]
    v: Tensor,  # [B, Nk, Hkv, D]
    log_scale: Tensor,  # [H]
    key_mask: Tensor | None,  # [B, Nk] bool
    out: Tensor,  # [B, Nq, H, D]
    lse: Tensor,  # [B, Hkv, Nq * G]
    dq: Tensor,  # [B, Nq, H, D]
    dk: Tensor,  # [B, Nk, Hkv, D]
    dv: Tensor,  # [B, Nk, Hkv, D]
    dlog_scale: Tensor,  # [H], zeros
    tile: Tile,
) -> list[Launch]:
    """The launches of the backward; arguments as of ``plan_backward``, but ``dlog_scale`` must hold zeros."""
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    rows = queries * group
    row_blocks, key_blocks = triton.cdiv(rows, 64), triton.cdiv(keys, tile.block_n)
    prepared = plan_keys(k, key_mask)
    row, delta = (torch.empty(batch, kv_heads, rows, dtype=torch.float32, device=q.device) for _ in range(2))
    dunit = torch.empty(batch, kv_heads, rows, dim, dtype=torch.float32, device=q.device)
    of_rows = {
        "p_q": q, "p_log_scale": log_scale, "p_dunit": dunit, "num_queries": queries, "kv_heads": kv_heads,
        "row_blocks": row_blocks, **strides("q", q), "G": group, "D": dim, "BM": 64,
    }  # fmt: skip
    row_grid = (batch * kv_heads * row_blocks,)
    arguments = {**of_rows, "p_out": out, "p_do": do, "p_row": row, "p_delta": delta, **strides("do", do)}
    rows_launch = Launch(_atomic_attention_rows_kernel, row_grid, arguments, num_warps=4)
    arguments = {
        **prepared.arguments, "p_q": q, "p_k": k, "p_v": v, "p_log_scale": log_scale, "p_lse": lse, "p_do": do,
        "p_row": row, "p_delta": delta, "p_dunit": dunit, "p_dk": dk, "p_dv": dv,
        "num_queries": queries, "num_keys": keys, "kv_heads": kv_heads, "key_blocks": key_blocks,
        **strides("q", q), **strides("k", k), **strides("v", v), **strides("do", do), "G": group, "D": dim,
        "BM": tile.block_m, "BN": tile.block_n, "MASKED": masked(key_mask, keys, tile.block_n),
        "UNIT_TILES": q.dtype == torch.float16,
    }  # fmt: skip
    grid = (batch * kv_heads * key_blocks,)
    main_launch = Launch(_atomic_attention_bwd_kernel, grid, arguments, tile.num_warps, tile.num_stages)
    arguments = {**of_rows, "p_dq": dq, "p_dlog_scale": dlog_scale}
    return [
        prepared.launch, rows_launch, main_launch,
        Launch(_atomic_attention_dq_kernel, row_grid, arguments, num_warps=4),
    ]  # fmt: skip


class _AtomicAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_scale, key_mask, tile):
        heads, kv_heads = q.shape[2], k.shape[2]
        rows = q.shape[1] * (heads // kv_heads)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[0], kv_heads, rows, dtype=torch.float32, device=q.device)
        run(plan_forward(q, k, v, log_scale, key_mask, out, lse, architecture(q.device)))
        ctx.save_for_backward(q, k, v, log_scale, key_mask, out, lse)
        ctx.tile = tile
        return out

    @staticmethod
    def backward(ctx, do):
        q, k, v, log_scale, key_mask, out, lse = ctx.saved_tensors
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        dlog_scale = torch.zeros_like(log_scale)
        run(plan_atomic_backward(do, q, k, v, log_scale, key_mask, out, lse, *grads, dlog_scale, ctx.tile))
        return *grads, dlog_scale, None, None


def atomic_attention(
    q: Tensor,  # [B, Nq, H, D]
    k: Tensor,  # [B, Nk, Hkv, D]
    v: Tensor,  # [B, Nk, Hkv, D]
    log_scale: Tensor,  # [H] float32
    key_mask: Tensor | None,  # [B, Nk] bool
    tile: Tile,
) -> Tensor:
    """``qk_norm_attention`` with the forward of ``wireframe.kernels`` and the atomic backward; no empty inputs."""
    return _AtomicAttention.apply(q, k, v, log_scale, key_mask, tile)

"""Backward Triton kernels of attention with L2-normalised queries and keys.

With P_ij = exp(S_ij - lse_i), Delta_i = dO_i . out_i and dS_ij = P_ij (dO_i . v_j - Delta_i):

    dv_j = sum_i P_ij dO_i      dq^_i = s_h sum_j dS_ij k^_j      dk^_j = sum_i s_h dS_ij q^_i
    dq = (dq^ - q^ (q^ . dq^)) / |q|, or dq^ / 1e-12 where |q| < 1e-12; dk likewise; dlog_scale_h = sum q^ . dq^

Two kernels: one owns BM packed rows (see the forward) and goes over the keys for dq, the other owns BN keys and goes
over the packed rows of their group for dk and dv. Together they form 7 products where one kernel could do with 5; but
that one has to add to dq of other programs. Without atomics it reads and writes private partial sums of dq, [Nq * G, D]
in float32, once a key block: at 256 x 4096 with blocks of 128 keys that is 8 MB a scene and key head, against 1.5 MB
that all inputs take. On an RTX 4090 (5 TB/s of L2) 64 x 4 x 256 x 4096 would spend 0.2 ms on it to save two products of
0.2 ms each, one of which its lower occupancy costs again (estimates). On an NVIDIA H200 one kernel of 5 products with
float atomics takes 292 us where these take 199 (bf16, 32 x 4 x 256 x 2048; ``bench/atomic_attention.py``).

Deterministic by construction: every sum belongs to one program and runs in order of its tiles; dlog_scale goes through
one partial sum a program, added in order by the last launch.

Shapes as in the forward; ``row`` and ``delta`` float32 [B, Hkv, Nq * G] pass the rows' factors from the first kernel to
the second. float16 cannot hold dS / |k| and s dS / |q|, so there the two last products take k^ and s q^, rounded once
more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wireframe.kernels import tiles
from wireframe.kernels.launch import Launch
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

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _through_norm(b_x, b_dunit, b_factor):
    """(dx [N, D], x^ . dx^ [N]) of x^ = x / max(|x|, 1e-12), given dx^ and 1 / max(|x|, 1e-12)."""
    b_x = b_x.to(tl.float32)
    b_dot = tl.sum(b_x * b_dunit, 1) * b_factor
    # At the clamp the factor is a constant and nothing is to be projected out; the margin is for an inexact rsqrt.
    b_project = tl.where(b_factor < 9.99999e11, b_dot * b_factor, 0.0)
    return (b_dunit - b_x * b_project[:, None]) * b_factor[:, None], b_dot


@triton.jit
def _qk_norm_attention_dq_kernel(
    p_q, p_k, p_v, p_log_scale, p_key, p_words, p_out, p_lse, p_do, p_dq, p_row, p_delta, p_partial,
    num_queries, num_keys, kv_heads, row_blocks, words_per_scene,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_dob, stride_don, stride_doh,
    G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
    UNIT_TILES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b_hkv = pid // row_blocks
    b, hkv = (b_hkv // kv_heads).to(tl.int64), b_hkv % kv_heads
    rows = num_queries * G
    o_r = (pid % row_blocks) * BM + tl.arange(0, BM)
    m_r = o_r < rows
    o_n, o_d = tl.arange(0, BN), tl.arange(0, D)
    o_query, o_h = o_r // G, hkv * G + o_r % G
    o_row = b_hkv.to(tl.int64) * rows + o_r
    # [BM, D]
    o_q = o_query[:, None] * stride_qn + o_h[:, None] * stride_qh + o_d[None, :]
    b_q = tl.load(p_q + b * stride_qb + o_q, mask=m_r[:, None], other=0.0)
    o_do = o_query[:, None] * stride_don + o_h[:, None] * stride_doh + o_d[None, :]
    b_do = tl.load(p_do + b * stride_dob + o_do, mask=m_r[:, None], other=0.0)
    o_out = (((b * num_queries + o_query) * kv_heads * G + o_h) * D)[:, None] + o_d[None, :]
    b_out = tl.load(p_out + o_out, mask=m_r[:, None], other=0.0)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    b_scale = scale_of(p_log_scale, o_h)
    b_factor = unit_factor(b_q)
    b_row = b_factor * (b_scale * _LOG2E)
    tl.store(p_row + o_row, b_row, mask=m_r)
    tl.store(p_delta + o_row, b_delta, mask=m_r)
    b_lse = tl.load(p_lse + o_row, mask=m_r, other=0.0)
    p_k += b * stride_kb + hkv * stride_kh
    p_v += b * stride_vb + hkv * stride_vh
    p_key += b_hkv.to(tl.int64) * words_per_scene * 32
    p_words += b * words_per_scene
    b_dunit = tl.zeros([BM, D], tl.float32)
    w0, w1, w2, w3 = load_words(p_words, 0, True, MASKED, BN)
    for n in range(0, num_keys, BN):
        m_n = admitted(w0, w1, w2, w3, o_n, MASKED, BN)
        # [BN, D]
        o_k = (n + o_n)[:, None] * stride_kn + o_d[None, :]
        b_k = tl.load(p_k + o_k, mask=m_n[:, None], other=0.0) if MASKED else tl.load(p_k + o_k)
        o_v = (n + o_n)[:, None] * stride_vn + o_d[None, :]
        b_v = tl.load(p_v + o_v, mask=m_n[:, None], other=0.0) if MASKED else tl.load(p_v + o_v)
        b_key = tl.load(p_key + n + o_n)
        # [BM, BN]
        b_s = scaled_logits(tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), b_key[None, :], MASKED)
        b_p = tl.exp2(tl.fma(b_s, b_row[:, None], -b_lse[:, None]))
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None])
        if UNIT_TILES:
            b_unit = (b_k.to(tl.float32) * b_key[:, None]).to(b_k.dtype)
            b_dunit = tl.dot(b_ds.to(b_k.dtype), b_unit, b_dunit, input_precision="ieee")
        else:
            b_dunit = tl.dot((b_ds * b_key[None, :]).to(b_k.dtype), b_k, b_dunit, input_precision="ieee")
        # See the forward.
        w0, w1, w2, w3 = load_words(p_words, n + BN, n + BN < num_keys, MASKED, BN)
    b_dq, b_dot = _through_norm(b_q, b_dunit * b_scale[:, None], b_factor)
    o_dq = (((b * num_queries + o_query) * kv_heads * G + o_h) * D)[:, None] + o_d[None, :]
    tl.store(p_dq + o_dq, b_dq.to(p_dq.dtype.element_ty), mask=m_r[:, None])
    for g in tl.static_range(G):
        part = tl.sum(tl.where(m_r & (o_r % G == g), b_dot, 0.0), 0)
        tl.store(p_partial + pid.to(tl.int64) * G + g, part)


@triton.jit
def _load_rows(p_rows, m_rows, other, WHOLE: tl.constexpr):
    # Where the tiles divide the rows, nothing is masked and an eighth of the loop's instructions goes.
    return tl.load(p_rows) if WHOLE else tl.load(p_rows, mask=m_rows, other=other)


@triton.jit
def _qk_norm_attention_dkv_kernel(
    p_q, p_k, p_v, p_log_scale, p_key, p_words, p_lse, p_do, p_row, p_delta, p_dk, p_dv,
    num_queries, num_keys, kv_heads, key_blocks, words_per_scene,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_dob, stride_don, stride_doh, stride_dkb, stride_dkn, stride_dkh,
    G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
    UNIT_TILES: tl.constexpr, WHOLE: tl.constexpr,
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
        b_q = _load_rows(p_q + o_q, m_r[:, None], 0.0, WHOLE)
        o_do = o_query[:, None] * stride_don + o_h[:, None] * stride_doh + o_d[None, :]
        b_do = _load_rows(p_do + o_do, m_r[:, None], 0.0, WHOLE)
        b_row = _load_rows(p_row + o_row + o_r, m_r, 1.0, WHOLE)
        b_lse = _load_rows(p_lse + o_row + o_r, m_r, 0.0, WHOLE)
        b_delta = _load_rows(p_delta + o_row + o_r, m_r, 0.0, WHOLE)
        # [BN, BM]
        b_s = scaled_logits(tl.dot(b_k, tl.trans(b_q), input_precision="ieee"), b_key[:, None], MASKED)
        b_p = tl.exp2(tl.fma(b_s, b_row[None, :], -b_lse[None, :]))
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[None, :])
        if UNIT_TILES:
            b_scale = scale_of(p_log_scale, o_h) * _LOG2E
            b_unit = (b_q.to(tl.float32) * (unit_factor(b_q) * b_scale)[:, None]).to(b_q.dtype)
            b_dunit = tl.dot(b_ds.to(b_q.dtype), b_unit, b_dunit, input_precision="ieee")
        else:
            b_dunit = tl.dot((b_ds * b_row[None, :]).to(b_q.dtype), b_q, b_dunit, input_precision="ieee")
    b_dk, _ = _through_norm(b_k, b_dunit * _LN2, b_key)
    # Masked keys are written too, as zeros; keys beyond the last are not there.
    m_store = (n + o_n < num_keys)[:, None]
    # [BN, D], of both: dv has the strides of dk.
    o = b * stride_dkb + n.to(tl.int64) * stride_dkn + hkv * stride_dkh + o_n[:, None] * stride_dkn + o_d[None, :]
    tl.store(p_dk + o, tl.where(m_n[:, None], b_dk, 0.0).to(p_dk.dtype.element_ty), mask=m_store)
    tl.store(p_dv + o, b_dv.to(p_dv.dtype.element_ty), mask=m_store)


@triton.jit
def _qk_norm_attention_dlog_scale_kernel(
    p_partial, p_dlog_scale, parts, row_blocks, kv_heads,
    G: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # One head a program; its parts lie at [b, hkv, row block, g].
    h = tl.program_id(0)
    hkv, g = h // G, h % G
    b_sum = tl.zeros([PARTS], tl.float32)
    for start in range(0, parts, PARTS):
        o_part = start + tl.arange(0, PARTS)
        o_b, o_block = o_part // row_blocks, o_part % row_blocks
        o = ((o_b * kv_heads + hkv) * row_blocks + o_block).to(tl.int64) * G + g
        b_sum += tl.load(p_partial + o, mask=o_part < parts, other=0.0)
    tl.store(p_dlog_scale + h, tl.sum(b_sum, 0))


def plan_backward(
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
    dlog_scale: Tensor,  # [H]
    architecture: int,
    saved: tuple[Tensor, Tensor] | None = None,
) -> list[Launch]:
    """The launches that fill ``dq``, ``dk``, ``dv`` and ``dlog_scale`` from what ``plan_forward`` left.

    Args:
        do: as q, any strides but the last; q, k, v, log_scale, key_mask, out, lse: those of the forward.
        dq, dk, dv: the dtype of q; dq contiguous; dk and dv of the same strides, the last one 1. dlog_scale: float32.
        architecture: column of the tile table.
        saved: what the forward left of its keys (``empty_keys``); None: a launch more prepares them again.
    """
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    rows = queries * group
    found = tiles.lookup(architecture, q.dtype, dim)
    row_tile, key_tile = found.dq, found.dkv
    row_blocks, key_blocks = triton.cdiv(rows, row_tile.block_m), triton.cdiv(keys, key_tile.block_n)
    prepared = plan_keys(k, key_mask, saved)
    row, delta = (torch.empty(batch, kv_heads, rows, dtype=torch.float32, device=q.device) for _ in range(2))
    partial = torch.empty(batch, kv_heads, row_blocks, group, dtype=torch.float32, device=q.device)
    shared = {
        **prepared.arguments, "p_q": q, "p_k": k, "p_v": v, "p_log_scale": log_scale, "p_lse": lse, "p_do": do,
        "p_row": row, "p_delta": delta, "num_queries": queries, "num_keys": keys, "kv_heads": kv_heads,
        **strides("q", q), **strides("k", k), **strides("v", v), **strides("do", do), "G": group, "D": dim,
        "UNIT_TILES": q.dtype == torch.float16,
    }  # fmt: skip

    def tiled(tile: tiles.Tile) -> dict:
        return {"BM": tile.block_m, "BN": tile.block_n, "MASKED": masked(key_mask, keys, tile.block_n)}

    arguments = {
        **shared, **tiled(row_tile), "p_out": out, "p_dq": dq, "p_partial": partial, "row_blocks": row_blocks,
    }  # fmt: skip
    grid = (batch * kv_heads * row_blocks,)
    rows_launch = Launch(_qk_norm_attention_dq_kernel, grid, arguments, **tiles.options(row_tile))
    arguments = {
        **shared, **tiled(key_tile), "p_dk": dk, "p_dv": dv, **strides("dk", dk), "key_blocks": key_blocks,
        "WHOLE": rows % key_tile.block_m == 0,
    }  # fmt: skip
    grid = (batch * kv_heads * key_blocks,)
    keys_launch = Launch(_qk_norm_attention_dkv_kernel, grid, arguments, **tiles.options(key_tile))
    arguments = {
        "p_partial": partial, "p_dlog_scale": dlog_scale, "parts": batch * row_blocks, "row_blocks": row_blocks,
        "kv_heads": kv_heads, "G": group, "PARTS": 256,
    }  # fmt: skip
    scale_launch = Launch(_qk_norm_attention_dlog_scale_kernel, (heads,), arguments, num_warps=4)
    launches = [rows_launch, keys_launch, scale_launch]
    return launches if saved else [prepared.launch, *launches]

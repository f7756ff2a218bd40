"""Forward Triton kernels of attention with L2-normalised queries and keys.

With q^ = q / max(|q|, 1e-12), k^ likewise, s_h = exp(log_scale_h) and keys j that are valid:

    S_ij = s_h q^_i . k^_j        lse_i = log sum_j exp(S_ij)        out_i = sum_j exp(S_ij - lse_i) v_j

A program owns BM *packed rows* of one scene and one key/value head: row r is query r // G of head r % G of the group
of G heads that share the keys, so that one load of k and v serves the whole group. q and k enter the product as they
are; logits are multiplied by s_h / |q| along rows and 1 / |k| along columns, which spares a second rounding of q and k.
A small launch before writes 1 / |k| (``qk_norm_attention_keys``).

|S_ij| <= s_h, so s_h itself is subtracted instead of a running maximum while 2 s_h fits the range of float32; above
that (``_SHIFT_LIMIT``) and for float16, whose weights would underflow, the running maximum is kept.

Deterministic by construction: keys are taken in chunks of ``CHUNK``, each chunk summed from zero in order of its tiles,
and chunks added in order. One program may do all chunks, or many programs one each with the sum in a second launch: the
operations and their order are the same, so are the bits, and the batch size may decide between them.

Shapes: q, out [B, Nq, H, D]; k, v [B, Nk, Hkv, D]; log_scale float32 [H]; lse float32 [B, Hkv, Nq * G], in base 2.
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

# Keys of one partial sum. Part of the bits.
CHUNK = 512

# Below this many programs most of a GPU is idle, and chunks are worth a program each. Not part of the bits.
_FEW_PROGRAMS = 96

# Rows of a program of the launch that adds the chunks.
_ADDED_ROWS = 16

_LOG2E = tl.constexpr(1.4426950408889634)
_SHIFT_LIMIT = tl.constexpr(40.0)


@triton.jit
def _largest_scale(p_log_scale, first, G: tl.constexpr):
    """The largest exp(log_scale) of a group of heads."""
    found = tl.exp(tl.load(p_log_scale + first))
    for g in tl.static_range(1, G):
        found = tl.maximum(found, tl.exp(tl.load(p_log_scale + first + g)))
    return found


@triton.jit
def _attend_chunk(
    b_q, b_row, b_shift, p_k, p_v, p_key, p_words, start, end, stride_kn, stride_vn,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, RUNNING_MAX: tl.constexpr,
):  # fmt: skip
    """Keys start..end: sum of weights x values [BM, D], sum of weights [BM], and what was subtracted [BM]."""
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, D)
    b_acc = tl.zeros([BM, D], tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_max = tl.full([BM], float("-inf"), tl.float32) if RUNNING_MAX else b_shift
    w0, w1, w2, w3 = load_words(p_words, start, True, MASKED, BN)
    for n in range(start, end, BN):
        m_n = admitted(w0, w1, w2, w3, o_n, MASKED, BN)
        # [D, BN]
        o_k = (n + o_n)[None, :] * stride_kn + o_d[:, None]
        b_k = tl.load(p_k + o_k, mask=m_n[None, :], other=0.0) if MASKED else tl.load(p_k + o_k)
        b_s = scaled_logits(tl.dot(b_q, b_k, input_precision="ieee"), tl.load(p_key + n + o_n)[None, :], MASKED)
        if RUNNING_MAX:
            b_s = b_s * b_row[:, None]
            b_new = tl.maximum(b_max, tl.max(b_s, 1))
            b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_keep = tl.exp2(b_max - b_safe)
            b_p = tl.exp2(b_s - b_safe[:, None])
            b_sum = tl.fma(b_sum, b_keep, tl.sum(b_p, 1))
            b_acc = b_acc * b_keep[:, None]
            b_max = b_new
        else:
            b_p = tl.exp2(tl.fma(b_s, b_row[:, None], -b_shift[:, None]))
            b_sum += tl.sum(b_p, 1)
        # [BN, D]
        o_v = (n + o_n)[:, None] * stride_vn + o_d[None, :]
        b_v = tl.load(p_v + o_v, mask=m_n[:, None], other=0.0) if MASKED else tl.load(p_v + o_v)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
        # A turn ahead: copies of keys and values that waited for a load of this turn could not run ahead of it.
        w0, w1, w2, w3 = load_words(p_words, n + BN, n + BN < end, MASKED, BN)
    return b_acc, b_sum, b_max


@triton.jit
def _nothing(D: tl.constexpr, BM: tl.constexpr):
    """The sums over no keys at all."""
    return tl.zeros([BM, D], tl.float32), tl.zeros([BM], tl.float32), tl.full([BM], float("-inf"), tl.float32)


@triton.jit
def _merge(b_acc, b_sum, b_max, b_acc2, b_sum2, b_max2, RUNNING_MAX: tl.constexpr):
    """Two partial sums as one. No product here is free to be contracted: both launch forms give the same bits."""
    if RUNNING_MAX:
        b_new = tl.maximum(b_max, b_max2)
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_keep, b_keep2 = tl.exp2(b_max - b_safe), tl.exp2(b_max2 - b_safe)
        b_acc = tl.fma(b_acc, b_keep[:, None], b_acc2 * b_keep2[:, None])
        b_sum = tl.fma(b_sum, b_keep, b_sum2 * b_keep2)
        return b_acc, b_sum, b_new
    else:
        return b_acc + b_acc2, b_sum + b_sum2, b_max2


@triton.jit
def _store_rows(b_acc, b_sum, b_max, p_out, o_out, p_lse, o_lse, m_r, D: tl.constexpr):
    # A row without a valid key: zeros, and an lse that keeps the backward finite.
    b_some = b_sum > 0
    b_out = b_acc / tl.where(b_some, b_sum, 1.0)[:, None]
    b_lse = tl.where(b_some, b_max + tl.log2(tl.where(b_some, b_sum, 1.0)), 0.0)
    # [BM, D]
    p = p_out + o_out[:, None] + tl.arange(0, D)[None, :]
    tl.store(p, b_out.to(p_out.dtype.element_ty), mask=m_r[:, None])
    tl.store(p_lse + o_lse, b_lse, mask=m_r)


@triton.jit
def _attend(
    b_q, b_row, b_shift, p_k, p_v, p_key, p_words, num_keys, stride_kn, stride_vn, first, last,
    p_out, o_out, p_lse, o_lse, p_sum, p_max, m_r,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    SPLIT: tl.constexpr, ONE_CHUNK: tl.constexpr, RUNNING_MAX: tl.constexpr,
):  # fmt: skip
    """Chunks first..last of KEYS keys, finished and stored; under SPLIT the partial sums of the one chunk."""
    if SPLIT or ONE_CHUNK:
        b_acc, b_sum, b_max = _attend_chunk(
            b_q, b_row, b_shift, p_k, p_v, p_key, p_words, first * KEYS, tl.minimum(last * KEYS, num_keys),
            stride_kn, stride_vn, D, BM, BN, MASKED, RUNNING_MAX,
        )  # fmt: skip
    else:
        b_acc, b_sum, b_max = _nothing(D, BM)
        for chunk in range(first, last):
            b_acc2, b_sum2, b_max2 = _attend_chunk(
                b_q, b_row, b_shift, p_k, p_v, p_key, p_words, chunk * KEYS, tl.minimum((chunk + 1) * KEYS, num_keys),
                stride_kn, stride_vn, D, BM, BN, MASKED, RUNNING_MAX,
            )  # fmt: skip
            b_acc, b_sum, b_max = _merge(b_acc, b_sum, b_max, b_acc2, b_sum2, b_max2, RUNNING_MAX)
    if SPLIT:
        # [BM, D]
        tl.store(p_out + o_out[:, None] + tl.arange(0, D)[None, :], b_acc, mask=m_r[:, None])
        tl.store(p_sum + o_lse, b_sum, mask=m_r)
        tl.store(p_max + o_lse, b_max, mask=m_r)
    else:
        _store_rows(b_acc, b_sum, b_max, p_out, o_out, p_lse, o_lse, m_r, D)


@triton.jit
def _qk_norm_attention_fwd_kernel(
    p_q, p_k, p_v, p_log_scale, p_key, p_words, p_out, p_lse, p_sum, p_max,
    num_queries, num_keys, kv_heads, row_blocks, chunks, words_per_scene,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    SPLIT: tl.constexpr, ONE_CHUNK: tl.constexpr, ALWAYS_RUNNING_MAX: tl.constexpr,
):  # fmt: skip
    # Row blocks of one scene and head are neighbours: they read the same keys.
    pid = tl.program_id(0)
    b_hkv = pid // row_blocks
    b, hkv = (b_hkv // kv_heads).to(tl.int64), b_hkv % kv_heads
    rows = num_queries * G
    o_r = (pid % row_blocks) * BM + tl.arange(0, BM)
    m_r = o_r < rows
    o_n, o_h = o_r // G, hkv * G + o_r % G
    # [BM, D]
    o_q = o_n[:, None] * stride_qn + o_h[:, None] * stride_qh + tl.arange(0, D)[None, :]
    b_q = tl.load(p_q + b * stride_qb + o_q, mask=m_r[:, None], other=0.0)
    b_shift = scale_of(p_log_scale, o_h) * _LOG2E
    b_row = unit_factor(b_q) * b_shift
    p_k += b * stride_kb + hkv * stride_kh
    p_v += b * stride_vb + hkv * stride_vh
    p_key += b_hkv.to(tl.int64) * words_per_scene * 32
    p_words += b * words_per_scene
    if SPLIT:
        first = tl.program_id(1)
        last = first + 1
        o_lse = (b_hkv.to(tl.int64) * chunks + first) * rows + o_r
        o_out = o_lse * D
    else:
        first = 0
        last = chunks
        o_lse = b_hkv.to(tl.int64) * rows + o_r
        o_out = ((b * num_queries + o_n) * kv_heads * G + o_h) * D
    if ALWAYS_RUNNING_MAX:
        _attend(
            b_q, b_row, b_shift, p_k, p_v, p_key, p_words, num_keys, stride_kn, stride_vn, first, last,
            p_out, o_out, p_lse, o_lse, p_sum, p_max, m_r, D, BM, BN, KEYS, MASKED, SPLIT, ONE_CHUNK, True,
        )  # fmt: skip
    elif _largest_scale(p_log_scale, hkv * G, G) <= _SHIFT_LIMIT:
        _attend(
            b_q, b_row, b_shift, p_k, p_v, p_key, p_words, num_keys, stride_kn, stride_vn, first, last,
            p_out, o_out, p_lse, o_lse, p_sum, p_max, m_r, D, BM, BN, KEYS, MASKED, SPLIT, ONE_CHUNK, False,
        )  # fmt: skip
    else:
        _attend(
            b_q, b_row, b_shift, p_k, p_v, p_key, p_words, num_keys, stride_kn, stride_vn, first, last,
            p_out, o_out, p_lse, o_lse, p_sum, p_max, m_r, D, BM, BN, KEYS, MASKED, SPLIT, ONE_CHUNK, True,
        )  # fmt: skip


@triton.jit
def _add_chunks(
    p_acc, p_sum, p_max, o_chunk, rows, chunks, o_r, m_r, D: tl.constexpr, BM: tl.constexpr, RUNNING_MAX: tl.constexpr,
):  # fmt: skip
    """The partial sums of all chunks, added in the order of ``_attend``."""
    o_d = tl.arange(0, D)
    o = o_chunk + o_r
    b_acc, b_sum, b_max = _nothing(D, BM)
    for _ in range(chunks):
        # [BM, D]
        b_acc2 = tl.load(p_acc + o[:, None] * D + o_d[None, :], mask=m_r[:, None], other=0.0)
        b_sum2 = tl.load(p_sum + o, mask=m_r, other=0.0)
        b_max2 = tl.load(p_max + o, mask=m_r, other=0.0)
        b_acc, b_sum, b_max = _merge(b_acc, b_sum, b_max, b_acc2, b_sum2, b_max2, RUNNING_MAX)
        o += rows
    return b_acc, b_sum, b_max


@triton.jit
def _qk_norm_attention_chunks_kernel(
    p_acc, p_sum, p_max, p_log_scale, p_out, p_lse, num_queries, kv_heads, row_blocks, chunks,
    G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, ALWAYS_RUNNING_MAX: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b_hkv = pid // row_blocks
    b, hkv = (b_hkv // kv_heads).to(tl.int64), b_hkv % kv_heads
    rows = num_queries * G
    o_r = (pid % row_blocks) * BM + tl.arange(0, BM)
    m_r = o_r < rows
    o_chunk = b_hkv.to(tl.int64) * chunks * rows
    o_lse = b_hkv.to(tl.int64) * rows + o_r
    o_out = ((b * num_queries + o_r // G) * kv_heads * G + hkv * G + o_r % G) * D
    if ALWAYS_RUNNING_MAX:
        b_acc, b_sum, b_max = _add_chunks(p_acc, p_sum, p_max, o_chunk, rows, chunks, o_r, m_r, D, BM, True)
        _store_rows(b_acc, b_sum, b_max, p_out, o_out, p_lse, o_lse, m_r, D)
    elif _largest_scale(p_log_scale, hkv * G, G) <= _SHIFT_LIMIT:
        b_acc, b_sum, b_max = _add_chunks(p_acc, p_sum, p_max, o_chunk, rows, chunks, o_r, m_r, D, BM, False)
        _store_rows(b_acc, b_sum, b_max, p_out, o_out, p_lse, o_lse, m_r, D)
    else:
        b_acc, b_sum, b_max = _add_chunks(p_acc, p_sum, p_max, o_chunk, rows, chunks, o_r, m_r, D, BM, True)
        _store_rows(b_acc, b_sum, b_max, p_out, o_out, p_lse, o_lse, m_r, D)


def plan_forward(
    q: Tensor,  # [B, Nq, H, D]
    k: Tensor,  # [B, Nk, Hkv, D]
    v: Tensor,  # [B, Nk, Hkv, D]
    log_scale: Tensor,  # [H]
    key_mask: Tensor | None,  # [B, Nk] bool
    out: Tensor,  # [B, Nq, H, D]
    lse: Tensor,  # [B, Hkv, Nq * G]
    architecture: int,
    split: bool | None = None,
    saved: tuple[Tensor, Tensor] | None = None,
) -> list[Launch]:
    """The launches that fill ``out`` and ``lse``.

    Args:
        q, k, v: one dtype of bfloat16, float16, float32; D 32, 64 or 128 with stride 1; other strides are free.
        log_scale: float32, contiguous.
        out, lse: contiguous; lse float32.
        architecture: column of the tile table.
        split: whether each chunk of keys gets programs of its own; None: where the grid would be small otherwise.
        saved: ``empty_keys`` that the launches fill for the backward; None: new ones.
    """
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    chunks = triton.cdiv(keys, CHUNK)
    found = tiles.lookup(architecture, q.dtype, dim)
    tile = found.one_chunk if chunks == 1 else found.chunks
    row_blocks = triton.cdiv(queries * group, tile.block_m)
    programs = batch * kv_heads * row_blocks
    if split is None:
        split = programs < _FEW_PROGRAMS
    split = split and chunks > 1
    prepared = plan_keys(k, key_mask, saved)
    shared = {
        "p_log_scale": log_scale, "p_lse": lse, "num_queries": queries, "kv_heads": kv_heads, "chunks": chunks,
        "G": group, "D": dim, "ALWAYS_RUNNING_MAX": q.dtype == torch.float16,
    }  # fmt: skip
    sums = maxima = lse
    partial = out
    if split:
        partial = torch.empty(batch, kv_heads, chunks, queries * group, dim, dtype=torch.float32, device=q.device)
        sums, maxima = (torch.empty(partial.shape[:-1], dtype=torch.float32, device=q.device) for _ in range(2))
    arguments = {
        **shared, **prepared.arguments, "p_q": q, "p_k": k, "p_v": v, "p_out": partial, "p_sum": sums,
        "p_max": maxima, "num_keys": keys, **strides("q", q), **strides("k", k), **strides("v", v),
        "row_blocks": row_blocks, "BM": tile.block_m, "BN": tile.block_n, "KEYS": CHUNK,
        "MASKED": masked(key_mask, keys, tile.block_n), "SPLIT": split, "ONE_CHUNK": chunks == 1,
    }  # fmt: skip
    grid = (programs, chunks) if split else (programs,)
    main = Launch(_qk_norm_attention_fwd_kernel, grid, arguments, **tiles.options(tile))
    launches = [prepared.launch, main]
    if split:
        row_blocks = triton.cdiv(queries * group, _ADDED_ROWS)
        arguments = {
            **shared, "p_acc": partial, "p_sum": sums, "p_max": maxima, "p_out": out, "row_blocks": row_blocks,
            "BM": _ADDED_ROWS,
        }  # fmt: skip
        grid = (batch * kv_heads * row_blocks,)
        launches.append(Launch(_qk_norm_attention_chunks_kernel, grid, arguments, num_warps=4))
    return launches

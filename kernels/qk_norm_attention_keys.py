"""What the forward and the backward of attention need of the keys: 1 / |k|, and which keys take part.

One small launch writes both: inside the loops over keys the sum of squares, its reduction across threads and the change
of layout are a large part of the instructions. 1 / max(|k|, 1e-12) is float32 [B, Hkv, keys], keys padded to the widest
tile, 0 for a key that takes no part; admission is one bit a key, int32 [B, words], because a scalar needs no change of
layout. The forward keeps both for the backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wireframe.kernels import tiles
from wireframe.kernels.launch import Launch

# Keys of a program.
_PREPARED = 64


@triton.jit
def unit_factor(b_x):
    """1 / max(|x|, 1e-12) of each row of [N, D], float32."""
    b_x = b_x.to(tl.float32)
    return tl.rsqrt(tl.maximum(tl.sum(b_x * b_x, 1), 1e-24))


@triton.jit
def scale_of(p_log_scale, o_h):
    """exp(log_scale) of heads, kept off zero so that -inf times it stays -inf."""
    return tl.maximum(tl.exp(tl.load(p_log_scale + o_h)), 1e-30)


@triton.jit
def load_words(p_words, n, m, MASKED: tl.constexpr, BN: tl.constexpr):
    """The bits of the keys n, n + 1, ... as four scalars, of which BN keys need BN / 32; 0 where ``m`` is false."""
    w0 = 0
    w1 = 0
    w2 = 0
    w3 = 0
    if MASKED:
        w0 = tl.load(p_words + n // 32, mask=m, other=0)
        if BN >= 64:
            w1 = tl.load(p_words + n // 32 + 1, mask=m, other=0)
        if BN >= 128:
            w2 = tl.load(p_words + n // 32 + 2, mask=m, other=0)
            w3 = tl.load(p_words + n // 32 + 3, mask=m, other=0)
    return w0, w1, w2, w3


@triton.jit
def admitted(w0, w1, w2, w3, o_n, MASKED: tl.constexpr, BN: tl.constexpr):
    """bool [BN]: which of BN keys take part, by their words."""
    if MASKED:
        # Words are scalars and their bits are taken in registers: no layout of a loaded vector is ever converted.
        b_words = tl.zeros([BN], tl.int32) + w0
        if BN >= 64:
            b_words = tl.where(o_n // 32 == 1, w1, b_words)
        if BN >= 128:
            b_words = tl.where(o_n // 32 == 2, w2, b_words)
            b_words = tl.where(o_n // 32 == 3, w3, b_words)
        return ((b_words >> (o_n % 32)) & 1) != 0
    else:
        return o_n >= 0


@triton.jit
def scaled_logits(b_s, b_key, MASKED: tl.constexpr):
    """Products times 1 / |k|; -inf for a key that takes no part, in the same instruction."""
    if MASKED:
        return tl.fma(b_s, b_key, tl.where(b_key == 0, float("-inf"), 0.0))
    else:
        return b_s * b_key


@triton.jit
def _qk_norm_attention_keys_kernel(
    p_k, p_mask, p_key, p_words, num_keys, kv_heads, words_per_scene, stride_kb, stride_kn, stride_kh,
    stride_mb, stride_mn, D: tl.constexpr, KEYS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    # 1 / |k|, or 0 where the key is masked or beyond the last; and one bit a key, 32 keys an int32.
    pid = tl.program_id(0)
    key_blocks = words_per_scene * 32 // KEYS
    b_hkv = pid // key_blocks
    b, hkv = (b_hkv // kv_heads).to(tl.int64), b_hkv % kv_heads
    block = pid % key_blocks
    o_n, o_d = block * KEYS + tl.arange(0, KEYS), tl.arange(0, D)
    m_n = o_n < num_keys
    if HAS_MASK:
        m_n = m_n & (tl.load(p_mask + b * stride_mb + o_n * stride_mn, mask=m_n, other=0) != 0)
    # [KEYS, D]
    o_k = o_n[:, None] * stride_kn + o_d[None, :]
    b_k = tl.load(p_k + b * stride_kb + hkv * stride_kh + o_k, mask=m_n[:, None], other=0.0)
    # Not 0 for a key whose square overflows: 0 says that it takes no part.
    b_key = tl.where(m_n, tl.maximum(unit_factor(b_k), 1.2e-38), 0.0)
    tl.store(p_key + b_hkv.to(tl.int64) * words_per_scene * 32 + o_n, b_key)
    if hkv == 0:
        # Each bit is there once, so the sum is their union.
        b_bits = tl.reshape(m_n.to(tl.int32) << (o_n % 32), (KEYS // 32, 32))
        o_word = block * (KEYS // 32) + tl.arange(0, KEYS // 32)
        tl.store(p_words + b * words_per_scene + o_word, tl.sum(b_bits, 1))


class Keys(NamedTuple):
    """What the loops over keys need beside k and v, and the launch that writes it."""

    arguments: dict
    launch: Launch


def empty_keys(k: Tensor) -> tuple[Tensor, Tensor]:
    """Factors float32 [B, Hkv, words * 32] and admission bits int32 [B, words], whole words for the widest tile."""
    batch, keys, kv_heads, _ = k.shape
    # Not triton.cdiv: torch.compile asks for symbolic shapes.
    words = tiles.WIDEST // 32 * ((keys + tiles.WIDEST - 1) // tiles.WIDEST)
    factors = torch.empty(batch, kv_heads, words * 32, dtype=torch.float32, device=k.device)
    return factors, torch.empty(batch, words, dtype=torch.int32, device=k.device)


def plan_keys(k: Tensor, key_mask: Tensor | None, saved: tuple[Tensor, Tensor] | None = None) -> Keys:
    """The launch that fills ``saved``, by default new ``empty_keys``."""
    batch, keys, kv_heads, dim = k.shape
    factors, bits = saved or empty_keys(k)
    words = bits.shape[1]
    shared = {"p_key": factors, "p_words": bits, "words_per_scene": words}
    mask = bits if key_mask is None else key_mask.view(torch.uint8)
    arguments = {
        **shared, "p_k": k, "p_mask": mask, "num_keys": keys, "kv_heads": kv_heads, **strides("k", k),
        "stride_mb": mask.stride(0), "stride_mn": mask.stride(1), "D": dim, "KEYS": _PREPARED,
        "HAS_MASK": key_mask is not None,
    }  # fmt: skip
    grid = (batch * kv_heads * words * 32 // _PREPARED,)
    return Keys(shared, Launch(_qk_norm_attention_keys_kernel, grid, arguments, num_warps=4))


def masked(key_mask: Tensor | None, keys: int, block_n: int) -> bool:
    """Whether a kernel has to leave out keys: masked ones, or those that the last tile has beyond the last key."""
    return key_mask is not None or keys % block_n != 0


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Strides of a tensor [B, N, H, D] as arguments of a kernel."""
    return {f"stride_{name}{axis}": x.stride(i) for i, axis in enumerate("bnh")}

"""Blocks of the Perceiver: attention with normalised queries and keys, feed-forward, and a layer of both.

Source: S23DR 2026 baseline. Every block is pre-norm with a residual and dropout on its branch, and the norm is on
the query side only: keys and values are projected from the un-normed memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from wireframe.kernels import ops

# The default of nn.RMSNorm for float32; stated because that default follows the dtype of the input.
NORM_EPS = 1.1920928955078125e-07


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight in the dtype of the weight (float32 under autocast)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Table(nn.Embedding):
    """An embedding table N(0, 1); on the meta device it draws nothing (there normal_ costs a second of imports)."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class QKNormAttention(nn.Module):
    """Multi-head attention with L2-normalised q and k, grouped key/value heads and no biases."""

    def __init__(self, hidden: int, num_heads: int, kv_heads: int) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = num_heads, kv_heads, hidden // num_heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(hidden, hidden, bias=False)
        self.log_scale = nn.Parameter(torch.full((num_heads,), math.log(math.sqrt(self.head_dim))))
        nn.init.zeros_(self.out_proj.weight)

    def forward(
        self,
        x: Tensor,  # [B, Nq, hidden]
        memory: Tensor,  # [B, Nk, hidden]
        key_mask: Tensor | None = None,  # [B, Nk] bool
    ) -> Tensor:
        """[B, Nq, hidden]; zeros for a scene whose keys are all masked."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(memory).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.v_proj(memory).unflatten(-1, (self.kv_heads, self.head_dim))
        return self.out_proj(ops.qk_norm_attention(q, k, v, self.log_scale, key_mask).flatten(-2))


class AttentionBlock(nn.Module):
    """x + dropout(attention(norm(x), memory))."""

    def __init__(self, hidden: int, num_heads: int, kv_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden)
        self.attn = QKNormAttention(hidden, num_heads, kv_heads)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return x + self.dropout(self.attn(self.norm(x), memory, key_mask))


class FeedForward(nn.Module):
    """Linear, GELU, Linear; the second one starts at zero."""

    def __init__(self, hidden: int, ff: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(hidden, ff)
        self.act = nn.GELU()
        self.linear2 = nn.Linear(ff, hidden)
        nn.init.zeros_(self.linear2.weight)
        nn.init.zeros_(self.linear2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.act(self.linear1(x)))


class FeedForwardBlock(nn.Module):
    """x + dropout(feed-forward(norm(x)))."""

    def __init__(self, hidden: int, ff: int, dropout: float) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden)
        self.ffn = FeedForward(hidden, ff)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.ffn(self.norm(x)))


class Layer(nn.Module):
    """Cross-attention to a memory (where ``cross``), self-attention, feed-forward."""

    def __init__(
        self, hidden: int, ff: int, num_heads: int, kv_heads_cross: int, kv_heads_self: int, dropout: float, *,
        cross: bool,
    ) -> None:
        super().__init__()
        self.cross = AttentionBlock(hidden, num_heads, kv_heads_cross, dropout) if cross else None
        self.self_attn = AttentionBlock(hidden, num_heads, kv_heads_self, dropout)
        self.ffn = FeedForwardBlock(hidden, ff, dropout)

    def forward(self, x: Tensor, memory: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """x [B, N, hidden], memory [B, Nk, hidden], key_mask bool [B, Nk] of the memory."""
        if self.cross is not None:
            x = self.cross(x, memory, key_mask)
        return self.ffn(self.self_attn(x, x))

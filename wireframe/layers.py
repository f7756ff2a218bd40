"""Blocks of the Perceiver: attention with normalised queries and keys, feed-forward, and a layer of both.

Source: S23DR 2026 baseline. Every block is pre-norm with a residual and dropout on its branch, and the norm is on
the query side only: keys and values are projected from the un-normed memory. Dropout masks are a function of keys
given by the caller, one for each scene, and of the number of the block (its site).
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


class DropoutAdd(nn.Module):
    """x + dropout(branch); dropout acts in training only, and wants keys [B] there.

    site: the number of this block, another one for each block of a model.
    """

    def __init__(self, p: float, site: int) -> None:
        super().__init__()
        self.p, self.site = p, site

    def forward(self, x: Tensor, branch: Tensor, keys: Tensor | None) -> Tensor:
        if self.training and self.p > 0:
            return ops.dropout_add(x, branch, keys, site=self.site, p=self.p)
        return x + branch

    def extra_repr(self) -> str:
        return f"p={self.p}, site={self.site}"


class AttentionBlock(nn.Module):
    """x + dropout(attention(norm(x), memory))."""

    def __init__(self, hidden: int, num_heads: int, kv_heads: int, dropout: float, site: int) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden)
        self.attn = QKNormAttention(hidden, num_heads, kv_heads)
        self.dropout = DropoutAdd(dropout, site)

    def forward(
        self, x: Tensor, memory: Tensor, key_mask: Tensor | None = None, dropout_keys: Tensor | None = None
    ) -> Tensor:
        return self.dropout(x, self.attn(self.norm(x), memory, key_mask), dropout_keys)


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

    def __init__(self, hidden: int, ff: int, dropout: float, site: int) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden)
        self.ffn = FeedForward(hidden, ff)
        self.dropout = DropoutAdd(dropout, site)

    def forward(self, x: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        return self.dropout(x, self.ffn(self.norm(x)), dropout_keys)


class Layer(nn.Module):
    """Cross-attention to a memory (where ``cross``), self-attention, feed-forward.

    index: of the layer in its model; its blocks are sites 3 index, 3 index + 1 and 3 index + 2 of dropout.
    """

    def __init__(
        self, hidden: int, ff: int, num_heads: int, kv_heads_cross: int, kv_heads_self: int, dropout: float, *,
        cross: bool, index: int,
    ) -> None:
        super().__init__()
        site = 3 * index
        self.cross = AttentionBlock(hidden, num_heads, kv_heads_cross, dropout, site) if cross else None
        self.self_attn = AttentionBlock(hidden, num_heads, kv_heads_self, dropout, site + 1)
        self.ffn = FeedForwardBlock(hidden, ff, dropout, site + 2)

    def forward(
        self,
        x: Tensor,  # [B, N, hidden]
        memory: Tensor,  # [B, Nk, hidden]
        key_mask: Tensor | None = None,  # [B, Nk] bool, of the memory
        dropout_keys: Tensor | None = None,  # [B] int64, for training with dropout
    ) -> Tensor:
        """[B, N, hidden]"""
        if self.cross is not None:
            x = self.cross(x, memory, key_mask, dropout_keys)
        return self.ffn(self.self_attn(x, x, None, dropout_keys), dropout_keys)

"""Blocks of the Perceiver: attention with normalised queries and keys, feed-forward, and a layer of both.

Source: S23DR 2026 baseline. Every block is pre-norm with a residual and dropout on its branch, and the norm is on
the query side only: keys and values are projected from the un-normed memory. Dropout masks are a function of keys
given by the caller, one for each scene, and of the number of the block (its site).

The residual stream is float32. What a block reads of it (``Stream``) is made together with the sum before it, in the
dtype of the weights of the products: float32, or bfloat16 where training made them so (``wireframe.train.optimizer``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wireframe.kernels import ops
from wireframe.kernels.cpu_products import linear

# The default of nn.RMSNorm for float32; stated because that default follows the dtype of the input.
NORM_EPS = 1.1920928955078125e-07


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """In ``dtype``, by default that of x."""
        return ops.rms_norm(x, self.weight, eps=NORM_EPS, dtype=dtype)


class Linear(nn.Linear):
    """A linear map whose weights may be kept in half precision for training; x is rounded to their dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.to(self.weight.dtype), self.weight, self.bias)


class Table(nn.Embedding):
    """An embedding table N(0, 1); on the meta device it draws nothing (there normal_ costs a second of imports)."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Stream(NamedTuple):
    """The residual stream between two blocks.

    total: float32 [B, N, hidden], the sum of all branches. normed: its norm by the weight of the next block, in the
    dtype of the products; at the beginning of a stack [1, N, hidden], the same for all scenes. copy: the sum in that
    dtype. None: what the next block does not read.
    """

    total: Tensor
    normed: Tensor | None
    copy: Tensor | None


class QKNormAttention(nn.Module):
    """Multi-head attention with L2-normalised q and k, grouped key/value heads and no biases."""

    def __init__(self, hidden: int, num_heads: int, kv_heads: int) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = num_heads, kv_heads, hidden // num_heads
        self.q_proj = Linear(hidden, hidden, bias=False)
        self.k_proj = Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.v_proj = Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.out_proj = Linear(hidden, hidden, bias=False)
        self.log_scale = nn.Parameter(torch.full((num_heads,), math.log(math.sqrt(self.head_dim))))
        nn.init.zeros_(self.out_proj.weight)

    def forward(
        self,
        x: Tensor,  # [B or 1, Nq, hidden]
        memory: Tensor,  # [B, Nk, hidden]
        key_mask: Tensor | None = None,  # [B, Nk] bool
    ) -> Tensor:
        """[B, Nq, hidden]; zeros for a scene whose keys are all masked."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).expand(len(memory), -1, -1, -1)
        # One product for both, whose gradient comes in one piece.
        kv = linear(memory, torch.cat([self.k_proj.weight, self.v_proj.weight]))
        kv = kv.unflatten(-1, (2, self.kv_heads, self.head_dim))
        return self.out_proj(ops.qk_norm_attention_kvpacked(q, kv, self.log_scale, key_mask).flatten(-2))


class Block(nn.Module):
    """A branch of the residual stream: x + dropout(branch(norm(x))).

    site: the number of this block, another one for each block of a model; the key of its dropout.
    """

    # Whether the branch reads the sum itself beside its norm.
    reads_copy = False

    def __init__(self, hidden: int, dropout: float, site: int) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden)
        self.p, self.site = dropout, site

    def branch(self, stream: Stream, memory: Tensor | None, key_mask: Tensor | None) -> Tensor:
        """[B, N, hidden] in the dtype of the products."""
        raise NotImplementedError

    def join(
        self, total: Tensor, branch: Tensor, keys: Tensor | None, following: Block | None, dtype: torch.dtype
    ) -> Stream:
        """The stream behind this block, as ``following`` reads it in ``dtype``; dropout in training needs keys [B]."""
        p = self.p if self.training else 0.0
        if following is None:
            total = ops.dropout_add(total, branch, keys, site=self.site, p=p) if p else total + branch
            return Stream(total, None, None)
        return Stream(*ops.residual_norm(
            total, branch, following.norm.weight, keys if p else None, site=self.site, p=p, eps=NORM_EPS,
            dtype=dtype, copy=following.reads_copy,
        ))  # fmt: skip

    def extra_repr(self) -> str:
        return f"p={self.p}, site={self.site}"


class CrossAttention(Block):
    """Queries from the stream, keys and values from a memory."""

    def __init__(self, hidden: int, num_heads: int, kv_heads: int, dropout: float, site: int) -> None:
        super().__init__(hidden, dropout, site)
        self.attn = QKNormAttention(hidden, num_heads, kv_heads)

    def branch(self, stream: Stream, memory: Tensor | None, key_mask: Tensor | None) -> Tensor:
        return self.attn(stream.normed, memory, key_mask)


class SelfAttention(CrossAttention):
    """Queries from the normed stream, keys and values from the stream itself."""

    reads_copy = True

    def branch(self, stream: Stream, memory: Tensor | None, key_mask: Tensor | None) -> Tensor:
        return self.attn(stream.normed, stream.copy)


class FeedForward(nn.Module):
    """Linear, GELU, Linear; the second one starts at zero."""

    def __init__(self, hidden: int, ff: int) -> None:
        super().__init__()
        self.linear1 = Linear(hidden, ff)
        self.linear2 = Linear(ff, hidden)
        nn.init.zeros_(self.linear2.weight)
        nn.init.zeros_(self.linear2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(ops.linear_gelu(x, self.linear1.weight, self.linear1.bias))


class FeedForwardBlock(Block):
    """The feed-forward of every position by itself."""

    def __init__(self, hidden: int, ff: int, dropout: float, site: int) -> None:
        super().__init__(hidden, dropout, site)
        self.ffn = FeedForward(hidden, ff)

    def branch(self, stream: Stream, memory: Tensor | None, key_mask: Tensor | None) -> Tensor:
        return self.ffn(stream.normed)


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
        self.cross = CrossAttention(hidden, num_heads, kv_heads_cross, dropout, site) if cross else None
        self.self_attn = SelfAttention(hidden, num_heads, kv_heads_self, dropout, site + 1)
        self.ffn = FeedForwardBlock(hidden, ff, dropout, site + 2)

    def blocks(self) -> Iterator[Block]:
        if self.cross is not None:
            yield self.cross
        yield self.self_attn
        yield self.ffn


def run_layers(
    layers: Sequence[Layer],
    x: Tensor,  # [N, hidden]
    memory: Tensor,  # [B, Nk, hidden]
    key_mask: Tensor | None = None,  # [B, Nk] bool, of the memory
    dropout_keys: Tensor | None = None,  # [B] int64, for training with dropout
) -> Tensor:
    """What a stack of layers makes of an embedding, the same for all scenes, and a memory: float32 [B, N, hidden].

    The first layer has cross-attention. The memory is in the dtype of the products.
    """
    blocks = [block for layer in layers for block in layer.blocks()]
    normed = blocks[0].norm(x, memory.dtype)
    stream = Stream(x.expand(len(memory), -1, -1), normed[None], None)
    for block, following in zip(blocks, [*blocks[1:], None]):
        branch = block.branch(stream, memory, key_mask)
        stream = block.join(stream.total, branch, dropout_keys, following, memory.dtype)
    return stream.total

"""The published architecture and its training step as people write them: plain PyTorch, no operation of ours.

The rival of ``bench/step_model.py`` and of timings on a device, eager or under torch.compile, and an oracle of the
tests. Parameters have the names of ``wireframe.Perceiver``, whose state dict loads strictly. Dropout draws from
torch's own generator, so only without it are the two models comparable.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wireframe.classes import GESTALT_NAMES, POINT_CLASSES
from wireframe.kernels.reference import segment_cost_reference, sinkhorn_reference
from wireframe.perceiver import PerceiverConfig
from wireframe.train.config import LossConfig, OptimizerConfig

NORM_EPS = 1.1920928955078125e-07
BANDS = 32


class Fourier(nn.Module):
    """sin and cos of 2 pi x B^T, [..., 3] to [..., 64], in float32 whatever autocast says."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("B", 10.0 * torch.randn(BANDS, 3))

    def forward(self, xyz: Tensor) -> Tensor:
        x, b = 2 * math.pi * xyz, self.B
        # No product of matrices: under autocast it would round angles of hundreds of radians to bfloat16.
        angle = x[..., 0:1] * b[:, 0] + x[..., 1:2] * b[:, 1] + x[..., 2:] * b[:, 2]
        return torch.cat([angle.sin(), angle.cos()], -1)


class Tokenizer(nn.Module):
    """Tokens [B, T, 95] of a batch of points, as ``wireframe.tokens`` defines them."""

    def __init__(self, behind_emb_dim: int) -> None:
        super().__init__()
        self.pos_enc = Fourier()
        self.label_emb = nn.Embedding(len(POINT_CLASSES), 16)
        self.src_emb = nn.Embedding(2, 2)
        self.behind_emb = nn.Embedding(len(GESTALT_NAMES) + 1, behind_emb_dim)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([
            batch["xyz_norm"],
            self.pos_enc(batch["xyz_norm"]),
            self.label_emb(batch["class_id"].long()),
            self.src_emb(batch["source"].long()),
            self.behind_emb(batch["behind"].clamp_min(0).long()),
            ((batch["n_views_voted"].float() - 2.7) / 1.0)[..., None],
            ((batch["vote_frac"] - 0.5) / 0.25)[..., None],
        ], -1)


class Attention(nn.Module):
    """softmax(exp(log_scale) q^ . k^) v with q^, k^ of unit length and grouped heads."""

    def __init__(self, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, dim = heads, kv_heads, hidden // heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * dim, bias=False)
        self.out_proj = nn.Linear(hidden, hidden, bias=False)
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(math.sqrt(dim))))

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k_proj(memory).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        v = self.v_proj(memory).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        q = F.normalize(q, dim=-1, eps=1e-12) * self.log_scale.exp()[:, None, None]
        k = F.normalize(k, dim=-1, eps=1e-12)
        # The fused kernels that take a mask want as many heads of keys as of queries.
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, dim=1) for y in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.out_proj(out.transpose(1, 2).flatten(-2))


class AttentionBlock(nn.Module):
    """x + dropout(attention(norm(x), memory))."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=NORM_EPS)
        self.attn = Attention(hidden, heads, kv_heads)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None = None) -> Tensor:
        return x + self.drop(self.attn(self.norm(x), memory, bias))


class FeedForward(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, hidden: int, ff: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(hidden, ff), nn.Linear(ff, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(x)))


class FeedForwardBlock(nn.Module):
    """x + dropout(feed-forward(norm(x)))."""

    def __init__(self, hidden: int, ff: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=NORM_EPS)
        self.ffn = FeedForward(hidden, ff)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.ffn(self.norm(x)))


class Layer(nn.Module):
    """Cross-attention to a memory (where ``cross``), self-attention, feed-forward."""

    def __init__(self, config: PerceiverConfig, cross: bool) -> None:
        super().__init__()
        c = config
        self.cross = AttentionBlock(c.hidden, c.num_heads, c.kv_heads_cross, c.dropout) if cross else None
        self.self_attn = AttentionBlock(c.hidden, c.num_heads, c.kv_heads_self, c.dropout)
        self.ffn = FeedForwardBlock(c.hidden, c.ff, c.dropout)

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.cross is not None:
            x = self.cross(x, memory, bias)
        return self.ffn(self.self_attn(x, x))


class Segmenter(nn.Module):
    """Tokens to (segments [B, S, 2, 3], confidence logits [B, S]); every scene needs a point."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.input_proj = nn.Sequential(
            nn.Linear(2 * BANDS + 23 + config.behind_emb_dim, config.ff), nn.GELU(), nn.Linear(config.ff, hidden),
            nn.RMSNorm(hidden, eps=NORM_EPS),
        )  # fmt: skip
        self.latent_embed = nn.Embedding(config.latent_tokens, hidden)
        self.latent_layers = nn.ModuleList(Layer(config, config.reads_points(i)) for i in range(config.latent_layers))
        self.query_embed = nn.Embedding(config.segments, hidden)
        self.decoder_layers = nn.ModuleList(Layer(config, True) for _ in range(config.decoder_layers))
        self.segment_head = nn.Linear(hidden, 7)
        self.query_offsets = nn.Parameter(0.05 * torch.randn(config.segments, 2, 3))
        self.conf_head = nn.Linear(hidden, 1)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        points = self.input_proj(tokens)
        bias = torch.zeros(mask.shape, dtype=points.dtype, device=mask.device).masked_fill(~mask, -math.inf)
        bias = bias[:, None, None, :]
        x = self.latent_embed.weight.expand(len(tokens), -1, -1)
        for layer in self.latent_layers:
            x = layer(x, points, bias)
        queries = self.query_embed.weight.expand(len(tokens), -1, -1)
        for layer in self.decoder_layers:
            queries = layer(queries, x)
        head = self.segment_head(queries).float()
        middle = head[..., :3] + self.query_offsets[:, 0]
        half = F.normalize(head[..., 3:6], dim=-1, eps=1e-12) * (0.05 * F.softplus(head[..., 6:]))
        return torch.stack([middle - half, middle + half], -2), self.conf_head(queries).squeeze(-1).float()


class PlainPerceiver(nn.Module):
    """A batch as ``wireframe.Perceiver`` takes it to (segments [B, S, 2, 3], confidence logits [B, S]), float32.

    The weights are torch's own initial ones; load those of a Perceiver.
    """

    def __init__(self, config: PerceiverConfig | None = None) -> None:
        super().__init__()
        config = config or PerceiverConfig()
        self.tokenizer = Tokenizer(config.behind_emb_dim)
        self.segmenter = Segmenter(config)

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.segmenter(self.tokenizer(batch), batch["mask"])


def plain_loss(
    prediction: tuple[Tensor, Tensor],
    target: Tensor,  # [B, M, 2, 3]
    target_mask: Tensor,  # [B, M]
    config: LossConfig,
    endpoint_weight: float = 0.0,
    conf_target: str = "mass",
) -> Tensor:
    """The total [B] of ``train.loss.scene_losses``, with the iterations of Sinkhorn written out one after another."""
    segments, logits = prediction
    real = target_mask[:, None, :]
    target = torch.where(target_mask[:, :, None, None], target, 0.0)
    cost = segment_cost_reference(segments, target, config.weights)
    with torch.no_grad():
        log_plan = sinkhorn_reference(cost, target_mask, config.eps, config.iters, config.dustbin)
        plan = log_plan[:, :-1, :-1].exp()
        mass = plan.sum(1, keepdim=True)
        if conf_target == "mass":
            wanted = plan.sum(2).clamp(0.0, 1.0)
        else:
            wanted = (plan / plan.amax(1, keepdim=True).clamp(min=1e-30) * mass).amax(2).clamp(0.0, 1.0)
    per_target = target_mask.sum(1).clamp(min=1)
    match = torch.where(real, plan / mass.clamp(min=1e-30) * cost, 0.0).sum((1, 2)) / per_target
    conf = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)
    total = match + config.conf_weight * conf
    if endpoint_weight > 0:
        straight = (segments[:, :, None] - target[:, None]).abs().sum((-1, -2))
        swapped = (segments[:, :, None] - target[:, None].flip(3)).abs().sum((-1, -2))
        endpoint = (plan * torch.minimum(straight, swapped)).sum((1, 2)) / per_target
        total = total + endpoint_weight * endpoint
    return total


def plain_optimizer(model: nn.Module, config: OptimizerConfig, fused: bool = False) -> torch.optim.AdamW:
    """AdamW of torch, its list of parameters in launches of many (foreach) or in one (fused, fit for a CUDA graph)."""
    head = [p for name, p in model.named_parameters() if ".conf_head." in name]
    rest = [p for name, p in model.named_parameters() if ".conf_head." not in name]
    groups = [
        {"params": rest, "weight_decay": config.weight_decay},
        {"params": head, "weight_decay": config.conf_head_weight_decay},
    ]
    how = {"fused": True, "capturable": True} if fused else {"foreach": True}
    return torch.optim.AdamW(groups, lr=3e-4, betas=(config.beta1, config.beta2), **how)


class Told(NamedTuple):
    """Of one step the losses float32 [B] of its scenes, detached, and the gradient's norm before clipping."""

    losses: Tensor
    grad_norm: Tensor | float


def plain_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Tensor],
    target: Tensor,  # [B, M, 2, 3]
    target_mask: Tensor,  # [B, M]
    config: LossConfig,
    *,
    grad_clip: float = 1.0,
    endpoint_weight: float = 0.0,
    conf_target: str = "mass",
    autocast: torch.dtype | None = None,
    loss: Callable[..., Tensor] = plain_loss,
) -> Told:
    """Forward, loss, backward, clip and update.

    Args:
        model: a PlainPerceiver, or torch.compile of one.
        autocast: dtype of the products of the forward pass; None for float32.
        loss: ``plain_loss``, or torch.compile of it.
    """
    optimizer.zero_grad(set_to_none=True)
    half = torch.autocast(target.device.type, autocast) if autocast else contextlib.nullcontext()
    with half:
        prediction = model(batch)
    losses = loss(prediction, target, target_mask, config, endpoint_weight, conf_target)
    losses.mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    return Told(losses.detach(), norm)

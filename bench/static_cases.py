"""What ``wireframe bench static`` compiles: every operation at the shapes of the product, on each architecture.

The planners are those of the operations, so a case cannot differ from what is launched. Cases that come to the same
binary are compiled once. Attention has all four shapes of the model at its own head dimension; at the others, what
reaches every entry of the tile table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from wireframe.bench import atomic_attention
from wireframe.bench.kernel_flops import kernel_flops
from wireframe.kernels import (
    adamw_step_triton,
    dropout_triton,
    linear_gelu_triton,
    point_features_triton,
    qk_norm_attention_backward,
    qk_norm_attention_forward,
    residual_norm_triton,
    segment_cost_triton,
    segment_matching_triton,
    sinkhorn,
    sinkhorn_triton,
)
from wireframe.kernels.dropout_reference import drop_threshold
from wireframe.kernels.launch import Launch
from wireframe.kernels.point_features_reference import feature_width

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Of the published model: 4 query heads of 64 share 2 key/value heads; scenes of a training step.
HEADS, KV_HEADS, HEAD_DIM, BATCH = 4, 2, 64, 32

# Numbers of all its parameters, zeros between them.
WEIGHTS_NUMBER = 8_855_104

# Of its blocks.
HIDDEN, FF, DROPOUT = 256, 1024, 0.1

# Of the published loss; the weights are no part of a binary. Transport problems of a training step.
EPS, ITERS, DUSTBIN, WEIGHTS = 0.1, 20, 0.3, (1.0, 1.0, 1.0)
PROBLEMS = 64


# Fewest warps on a multiprocessor that a kernel may come down to, on any architecture; others by dtype and dimension.
# Raised when a kernel gets leaner, never lowered to let a report pass.
LEAST_WARPS = {
    "_qk_norm_attention_keys_kernel": {"all": 48, "fp32 128": 32},
    "_qk_norm_attention_fwd_kernel": {"all": 8, "bf16 32": 12, "fp16 32": 12, "fp32 32": 16},
    "_qk_norm_attention_chunks_kernel": {"all": 36, "fp32 128": 28},
    "_qk_norm_attention_dq_kernel": {"all": 8, "bf16 32": 12, "fp16 32": 12, "fp32 32": 16, "fp32 128": 4},
    "_qk_norm_attention_dkv_kernel": {"all": 8, "bf16 32": 12, "fp32 32": 16, "fp32 128": 4},
    "_qk_norm_attention_dlog_scale_kernel": {"all": 48},
    "_atomic_attention_rows_kernel": {"all": 40},
    "_atomic_attention_bwd_kernel": {"all": 8},
    "_atomic_attention_dq_kernel": {"all": 28},
    "_sinkhorn_fwd_kernel": {"all": 12, "fp32 128": 8},
    "_sinkhorn_bwd_kernel": {"all": 8},
    "_sinkhorn_streamed_fwd_kernel": {"all": 16},
    "_sinkhorn_streamed_bwd_kernel": {"all": 8},
    "_segment_matching_fwd_kernel": {"all": 8, "fp32 64": 12},
    "_segment_matching_bwd_kernel": {"all": 8},
    "_segment_cost_fwd_kernel": {"all": 24},
    "_segment_cost_bwd_kernel": {"all": 8},
    "_dropout_add_fwd_kernel": {"all": 48},
    "_dropout_add_bwd_kernel": {"all": 48},
    "_point_features_fwd_kernel": {"all": 32, "bf16 128": 36},
    "_column_sums_kernel": {"all": 32},
    "_linear_gelu_fwd_kernel": {"all": 16, "fp32 256": 24},
    "_linear_gelu_bwd_kernel": {"all": 16, "fp32 256": 24},
    "_adamw_step_squares_kernel": {"all": 48},
    "_adamw_step_factors_kernel": {"all": 48},
    "_adamw_step_update_kernel": {"all": 48},
    "_residual_norm_fwd_kernel": {"all": 36},
    "_residual_norm_bwd_kernel": {"all": 20, "fp32 256": 16},
}


class Case(NamedTuple):
    """One call of an operation, or of its gradient.

    dim: head dimension, side of a transport problem, or width of the model. plan: launches on an architecture. flops:
    gives those of the products of a launch.
    """

    name: str
    dtype: str
    dim: int
    plan: Callable[[int], list[Launch]]
    flops: Callable[[Launch], float] = kernel_flops


def minimum_warps(kernel: str, dtype: str, dim: int) -> int:
    least = LEAST_WARPS[kernel]
    return least.get(f"{dtype} {dim}", least["all"])


def cases() -> list[Case]:
    return [
        *_attention_cases(), *_transport_cases(), *_dropout_cases(), *_point_features_cases(),
        *_residual_norm_cases(),
        *_adamw_step_cases(),
        *_linear_gelu_cases(),
    ]  # fmt: skip


def _attention_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        attention = functools.partial(_attention, dtype)
        yield from attention("cross", HEAD_DIM, BATCH, 256, 4096, masked=True)
        yield from attention("one scene", HEAD_DIM, 1, 256, 4096, masked=True, backward=False)
        yield from attention("latent", HEAD_DIM, BATCH, 256, 256, masked=False)
        for dim in (32, 128):
            yield from attention("cross", dim, BATCH, 256, 4096, masked=True)
            if dtype != "fp16":
                yield from attention("one scene", dim, 1, 256, 4096, masked=True, backward=False)
            yield from attention("one chunk", dim, BATCH, 256, 512, masked=True, backward=False)
    # As the model calls it: strides of another size, and the same binaries.
    yield from _attention("bf16", "packed cross", HEAD_DIM, BATCH, 256, 4096, masked=True, packed=True)
    yield from _attention("bf16", "decoder", HEAD_DIM, BATCH, 64, 256, masked=False)
    yield from _attention("bf16", "cross", HEAD_DIM, BATCH, 256, 2048, masked=False, backward=False)
    yield _atomic_attention(atomic_attention.TILES[0])


class _Attention:
    """Tensors of one call, as the operation allocates them, without memory."""

    def __init__(
        self, dtype: str, dim: int, batch: int, queries: int, keys: int, masked: bool, packed: bool = False
    ) -> None:
        q, out, do, dq = (_empty(batch, queries, HEADS, dim, dtype=DTYPES[dtype]) for _ in range(4))
        if packed:
            kv, dkv = (_empty(batch, keys, 2, KV_HEADS, dim, dtype=DTYPES[dtype]) for _ in range(2))
            k, v, dk, dv = *kv.unbind(2), *dkv.unbind(2)
        else:
            k, v, dk, dv = (_empty(batch, keys, KV_HEADS, dim, dtype=DTYPES[dtype]) for _ in range(4))
        log_scale, dlog_scale = (_empty(HEADS) for _ in range(2))
        lse = _empty(batch, KV_HEADS, queries * HEADS // KV_HEADS)
        mask = _empty(batch, keys, dtype=torch.bool) if masked else None
        self.forward = (q, k, v, log_scale, mask, out, lse)
        self.backward = (do, *self.forward, dq, dk, dv, dlog_scale)


def _attention(
    dtype: str, name: str, dim: int, batch: int, queries: int, keys: int, *, masked: bool, backward: bool = True,
    packed: bool = False,
) -> Iterator[Case]:  # fmt: skip
    tensors = _Attention(dtype, dim, batch, queries, keys, masked, packed)
    name = f"{name} {batch}x{HEADS}x{queries}x{keys}{' masked' if masked else ''}"

    def plan_forward(architecture: int) -> list[Launch]:
        return qk_norm_attention_forward.plan_forward(*tensors.forward, architecture)

    def plan_backward(architecture: int) -> list[Launch]:
        return qk_norm_attention_backward.plan_backward(*tensors.backward, architecture)

    yield Case(name, dtype, dim, plan_forward)
    if backward:
        yield Case(name, dtype, dim, plan_backward)


def _atomic_attention(tile: atomic_attention.Tile) -> Case:
    tensors = _Attention("bf16", HEAD_DIM, BATCH, 256, 4096, masked=True)
    plan = functools.partial(atomic_attention.plan_atomic_backward, *tensors.backward, tile)
    return Case(f"atomic {BATCH}x{HEADS}x256x4096 masked", "bf16", HEAD_DIM, lambda architecture: plan())


def _transport_cases() -> Iterator[Case]:
    for side in (64, 32, 128, 256):
        yield from _sinkhorn(side)
    for side in (64, 32, 128):
        yield from _segment_matching(side)
    yield from _segment_cost(64)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _sinkhorn(side: int) -> Iterator[Case]:
    cost, dcost = (_empty(PROBLEMS, side, side) for _ in range(2))
    log_plan, grad = (_empty(PROBLEMS, side + 1, side + 1) for _ in range(2))
    u, v, x, y = (_empty(PROBLEMS, ITERS, side + 1) for _ in range(4))
    mask = _empty(PROBLEMS, side, dtype=torch.bool)
    settings = {"eps": EPS, "dustbin": DUSTBIN, "lowest": sinkhorn.lowest_cost(EPS, DUSTBIN)}
    plan_forward = functools.partial(sinkhorn_triton.plan_forward, cost, mask, log_plan, iters=ITERS, **settings)
    plan_backward = functools.partial(sinkhorn_triton.plan_backward, cost, mask, grad, u, v, dcost, x, y, **settings)
    name = f"sinkhorn {PROBLEMS}x{side}x{side}"
    yield Case(name, "fp32", side, lambda _: plan_forward(u, v))
    yield Case(name, "fp32", side, lambda _: plan_backward())
    if side == 64:
        # Nothing is saved where no gradient is wanted.
        nothing = _empty(PROBLEMS, 0, side + 1)
        name = f"{name} without gradient"
        yield Case(name, "fp32", side, lambda _: plan_forward(nothing, nothing))


def _segment_matching(side: int) -> Iterator[Case]:
    pred, target, dpred, dtarget = (_empty(PROBLEMS, side, 2, 3) for _ in range(4))
    u, v = (_empty(PROBLEMS, ITERS, side + 1) for _ in range(2))
    mask, loss, log_u = _empty(PROBLEMS, side, dtype=torch.bool), _empty(PROBLEMS), _empty(PROBLEMS, side)
    plan, terms = (_empty(PROBLEMS, side, side) for _ in range(2))
    settings = {"weights": WEIGHTS, "eps": EPS, "dustbin": DUSTBIN}
    plan_forward = functools.partial(
        segment_matching_triton.plan_forward, pred, target, mask, loss, plan, log_u, u, v, iters=ITERS, **settings
    )
    # Of the mean over scenes: one number for all.
    grad = _empty(1).expand(PROBLEMS)
    plan_backward = functools.partial(
        segment_matching_triton.plan_backward, grad, pred, target, mask, u, v, dpred, dtarget, terms, **settings
    )
    name = f"segment_matching {PROBLEMS}x{side}x{side}"
    yield Case(name, "fp32", side, lambda _: plan_forward())
    yield Case(name, "fp32", side, lambda _: plan_backward())


def _segment_cost(side: int) -> Iterator[Case]:
    pred, target, dpred, dtarget = (_empty(PROBLEMS, side, 2, 3) for _ in range(4))
    cost, grad = (_empty(PROBLEMS, side, side) for _ in range(2))
    plan_forward = functools.partial(segment_cost_triton.plan_forward, pred, target, cost, weights=WEIGHTS)
    plan_backward = functools.partial(
        segment_cost_triton.plan_backward, pred, target, grad, dpred, dtarget, weights=WEIGHTS
    )
    name = f"segment_cost {PROBLEMS}x{side}x{side}"
    yield Case(name, "fp32", side, lambda _: plan_forward())
    yield Case(name, "fp32", side, lambda _: plan_backward())


def _dropout_cases() -> Iterator[Case]:
    """The residual is float32, as it is under autocast; the embedding of the latents is one for all scenes."""
    settings = {"site": 0, "threshold": drop_threshold(DROPOUT)}
    keys = _empty(BATCH, dtype=torch.int64)
    x, out, grad = (_empty(BATCH, 256, HIDDEN) for _ in range(3))
    name = f"dropout_add {BATCH}x256x{HIDDEN}"
    for dtype in DTYPES:
        branch, dbranch = (_empty(BATCH, 256, HIDDEN, dtype=DTYPES[dtype]) for _ in range(2))
        forward = functools.partial(dropout_triton.plan_forward, x, branch, keys, out, **settings)
        backward = functools.partial(dropout_triton.plan_backward, grad, keys, dbranch, **settings)
        yield Case(name, dtype, HIDDEN, lambda _, plan=forward: plan())
        yield Case(name, dtype, HIDDEN, lambda _, plan=backward: plan())


def _point_features_cases() -> Iterator[Case]:
    """Points of a training step with the published tables."""
    shape, labels, bands = (BATCH, 2048), (13, 2, 29), 32
    xyz, fraction, frequencies = _empty(*shape, 3), _empty(*shape), _empty(bands, 3)
    class_id, source, views = (_empty(*shape, dtype=torch.uint8) for _ in range(3))
    behind, mask = _empty(*shape, dtype=torch.int16), _empty(*shape, dtype=torch.bool)
    for dtype in ("bf16", "fp32"):
        out = _empty(*shape, feature_width(bands, labels), dtype=DTYPES[dtype])
        tensors = (xyz, class_id, source, behind, views, fraction, mask, frequencies, out)
        plan = functools.partial(point_features_triton.plan_forward, *tensors, labels=labels)
        yield Case(f"point_features {BATCH}x2048", dtype, out.shape[-1], lambda _, plan=plan: plan())


def _residual_norm_cases() -> Iterator[Case]:
    """As above, with the norm of the next block; then that of the projected points, in the dtype of the products."""
    settings = {"site": 0, "threshold": drop_threshold(DROPOUT), "eps": 1.2e-7}
    keys = _empty(BATCH, dtype=torch.int64)
    weight, dweight = _empty(HIDDEN), _empty(HIDDEN)
    x, total, dx, dtotal = (_empty(BATCH, 256, HIDDEN) for _ in range(4))

    def case(name: str, dtype: str, planner: Callable, *tensors: torch.Tensor | None, **settings) -> Case:
        return Case(name, dtype, HIDDEN, lambda _: planner(*tensors, **settings))

    forward, backward = residual_norm_triton.plan_forward, residual_norm_triton.plan_backward
    for dtype in ("bf16", "fp32"):
        branch, normed, copy = (_empty(BATCH, 256, HIDDEN, dtype=DTYPES[dtype]) for _ in range(3))
        name = f"residual_norm {BATCH}x256x{HIDDEN}"
        yield case(name, dtype, forward, x, branch, weight, keys, total, normed, None, **settings)
        yield case(name, dtype, backward, total, weight, keys, dtotal, normed, None, dx, branch, dweight, **settings)
        if dtype == "bf16":
            name += " with copy"
            yield case(name, dtype, forward, x, branch, weight, keys, total, normed, copy, **settings)
            yield case(
                name, dtype, backward, total, weight, keys, dtotal, normed, copy, dx, branch, dweight, **settings
            )
    points, normed, grad, dpoints = (_empty(BATCH * 2048, HIDDEN, dtype=torch.bfloat16) for _ in range(4))
    settings = {"site": 0, "threshold": 0, "eps": 1.2e-7}
    name = f"rms_norm {BATCH * 2048}x{HIDDEN}"
    yield case(name, "bf16", forward, points, None, weight, None, None, normed, None, **settings)
    yield case(name, "bf16", backward, points, weight, None, None, grad, None, dpoints, None, dweight, **settings)


def _adamw_step_cases() -> Iterator[Case]:
    """All parameters of the published model, each at a multiple of 64."""
    weights, gradient, exp_avg, exp_avg_sq = (_empty(WEIGHTS_NUMBER) for _ in range(4))
    count, lr, norm = (_empty() for _ in range(3))
    healthy, half = _empty(dtype=torch.bool), _empty(WEIGHTS_NUMBER, dtype=torch.bfloat16)
    settings = {"grad_clip": 1.0, "betas": (0.9, 0.95), "eps": 1e-8, "decays": (0.01, 0.1), "late_from": 0}
    state = weights, gradient, exp_avg, exp_avg_sq, count, lr, healthy, half, norm
    plan = functools.partial(adamw_step_triton.plan, *state, **settings)
    yield Case(f"adamw_step {WEIGHTS_NUMBER}", "bf16", HIDDEN, lambda _: plan())


def _linear_gelu_cases() -> Iterator[Case]:
    """The first map of the points, whose bias is a column of ones, and that of a feed-forward."""
    for dtype in ("bf16", "fp32"):
        for rows, inputs, biased in ((BATCH * 2048, 128, False), (BATCH * 256, HIDDEN, True)):
            if dtype == "fp32" and not biased:
                continue
            x, weight = (_empty(size, inputs, dtype=DTYPES[dtype]) for size in (rows, FF))
            out, dout, dy = (_empty(rows, FF, dtype=DTYPES[dtype]) for _ in range(3))
            bias, dbias = (_empty(FF, dtype=DTYPES[dtype]), _empty(FF)) if biased else (None, None)
            forward = functools.partial(linear_gelu_triton.plan_forward, x, weight, bias, out)
            backward = functools.partial(linear_gelu_triton.plan_backward, dout, x, weight, bias, dy, dbias)
            name = f"linear_gelu {rows}x{inputs}x{FF}"
            yield Case(name, dtype, inputs, forward)
            yield Case(name, dtype, inputs, backward)

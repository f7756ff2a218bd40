"""Races of attention with normalised queries and keys against what PyTorch and other packages have.

The rivals get what a user would write: normalised in float32, rounded to the inputs' dtype, then
``scaled_dot_product_attention`` or FlexAttention; faster than compiling the reference, which attends in float32. With a
key mask flash is closed to ``scaled_dot_product_attention`` on a GPU. Flash and cuDNN without norm and mask compute
something else: they are the speed limit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wireframe.bench.race import (
    BACKWARD,
    BOTH,
    FORWARD,
    GRAPH,
    MODES,
    Bar,
    How,
    Race,
    Rival,
    Work,
    compiled,
    compiled_deterministically,
    package,
    randn,
)
from wireframe.kernels import ops
from wireframe.kernels.determinism import deterministic

_SETS = 3
_FLASH = "flash, no norm, no mask"
_LIMITS = {_FLASH: SDPBackend.FLASH_ATTENTION, "cuDNN, no norm, no mask": SDPBackend.CUDNN_ATTENTION}
# Products of [Nq, D] x [D, Nk] size.
_PRODUCTS = {FORWARD: 2, BACKWARD: 5, BOTH: 7}


class Shape(NamedTuple):
    """modes: what is measured, on a GPU from a cold cache; warm: those also from a warm one. everything: all rivals, or
    the quickest to compile alone. bars: whether the goals are of this shape."""

    batch: int
    queries: int
    keys: int
    mask: bool
    modes: tuple[str, ...] = MODES
    warm: tuple[str, ...] = ()
    everything: bool = False
    bars: bool = False
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64

    @property
    def text(self) -> str:
        sizes = f"{self.batch} x {self.heads}/{self.kv_heads} x {self.queries} x {self.keys} x {self.dim}"
        return f"{sizes}{', key mask' if self.mask else ''}"


_GRAPHS = (FORWARD + GRAPH, BACKWARD + GRAPH)
# Training cross-attention of the published recipe, whose goals are stated; then inference and the other layers.
_ON_GPU = (
    *(Shape(32, 256, 2048, mask, warm=(FORWARD, BOTH), everything=True, bars=True) for mask in (True, False)),
    *(Shape(64, 256, 4096, mask, bars=True) for mask in (True, False)),
    Shape(1, 256, 4096, True, (FORWARD, FORWARD + GRAPH)),
    Shape(32, 256, 256, False),
    Shape(32, 64, 256, False, (*MODES, *_GRAPHS)),
)
_ON_CPU = (
    Shape(1, 256, 4096, True, (FORWARD,), everything=True),
    Shape(1, 256, 256, False, (FORWARD,), everything=True),
    Shape(4, 256, 2048, True, everything=True),
)
_SMALL = (
    Shape(1, 3, 7, True, everything=True, heads=2, kv_heads=1, dim=32),
    Shape(1, 3, 7, False, (FORWARD,), heads=2, kv_heads=1, dim=32),
)
# On the shape of a training step: points, then scenes.
_GROWTH = (
    *(Shape(4, 256, points, True, (BOTH,)) for points in (1024, 2048, 4096, 8192, 16384)),
    *(Shape(batch, 256, 2048, True, (BOTH,)) for batch in (1, 8, 32, 128)),
)


def races(how: How) -> Iterator[Race]:
    """float32 on the CPU, where half precision is no contest, else bfloat16."""
    gpu = how.device == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    for shape in _SMALL if how.small else _ON_GPU if gpu else _ON_CPU:
        for mode in shape.modes:
            cache = None if not gpu else "warm" if mode.endswith(GRAPH) else "cold"
            yield _race(shape, mode, dtype, how, cache)
        for mode in shape.warm if gpu else ():
            yield _race(shape, mode, dtype, how, "warm")
    for shape in _GROWTH if how.grow else ():
        yield _race(shape, BOTH, dtype, how, "cold" if gpu else None)


def _race(shape: Shape, mode: str, dtype: torch.dtype, how: How, cache: str | None) -> Race:
    sizes = {"batch": shape.batch, "queries": shape.queries, "keys": shape.keys}
    work = functools.partial(_work, shape, dtype, how)
    base = mode.removesuffix(GRAPH)
    flops = 2 * _PRODUCTS[base] * shape.batch * shape.heads * shape.queries * shape.keys * shape.dim
    return Race(
        "qk_norm_attention", mode, shape.text, sizes, str(dtype).removeprefix("torch."), work,
        1e-4 if dtype == torch.float32 else 0.03, cache=cache, bars=_bars(shape, mode, cache), flops=flops,
        bytes=_bytes(shape, base, dtype),
    )  # fmt: skip


def _bars(shape: Shape, mode: str, cache: str | None) -> tuple[Bar, ...]:
    """The goals, on a GPU."""
    if not shape.bars or cache != "cold":
        return ()
    if mode == FORWARD:
        return (Bar(0.9, _FLASH),)
    if mode != BOTH:
        return ()
    bars = (Bar(1.3 if shape.mask else 1.0, "torch.compile"), Bar(0.75, _FLASH))
    return (*bars, Bar(1 / 1.05, "atomic")) if shape.everything else bars


def _bytes(shape: Shape, mode: str, dtype: torch.dtype) -> int:
    """Every input read once and every output written once; a backward reads the output too."""
    queries = shape.batch * shape.queries * shape.heads * shape.dim
    keys = 2 * shape.batch * shape.keys * shape.kv_heads * shape.dim
    forward, backward = 2 * queries + keys, 4 * queries + 2 * keys
    return dtype.itemsize * {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[mode]


@functools.lru_cache(maxsize=1)
def _work(shape: Shape, dtype: torch.dtype, how: How) -> Work:
    device = how.device
    q = randn(device, shape.batch, shape.queries, shape.heads, shape.dim).to(dtype)
    k, v = (randn(device, shape.batch, shape.keys, shape.kv_heads, shape.dim, seed=i).to(dtype) for i in (1, 2))
    gradient = randn(device, *q.shape, seed=4).to(dtype)
    mask = randn(device, shape.batch, shape.keys, seed=3) < 1.5 if shape.mask else None
    if mask is not None:
        mask[:, 0] = True
    log_scale = torch.full((shape.heads,), 2.0, device=device)
    # Other memory and another order; drawing anew would take longer than the race.
    inputs = [
        (*(x.roll(number, 1).requires_grad_() for x in (q, k, v)), log_scale.clone().requires_grad_(), mask)
        for number in range(_SETS)
    ]
    return Work(inputs, list(_rivals(shape, dtype, mask, how)), [gradient.roll(i, 1) for i in range(_SETS)])


def _rivals(shape: Shape, dtype: torch.dtype, mask: Tensor | None, how: How) -> Iterator[Rival]:
    gpu, fixed = how.device == "cuda", functools.partial(deterministic, how.device)
    if dtype != torch.float32:
        yield Rival("eager, float32", lambda: functools.partial(ops.qk_norm_attention, impl="reference"))
    else:
        yield Rival("eager", lambda: _sdpa_attention)
    # On a GPU nothing else may stand in for the kernel.
    impl = "triton" if gpu else "auto"
    yield Rival("ours", lambda: functools.partial(ops.qk_norm_attention, impl=impl), deterministic=True)
    if dtype != torch.float32:
        yield Rival("eager", lambda: _sdpa_attention)
    yield Rival("eager, deterministic", lambda: _sdpa_attention, deterministic=True, settings=fixed)
    if gpu:
        for name, kernel in _LIMITS.items():
            settings = functools.partial(sdpa_kernel, kernel)
            yield Rival(name, lambda: _plain_attention, exact=False, settings=settings)
        yield Rival("xformers", _xformers)
        if mask is None:
            yield Rival("flash-attn", _flash_attn)
    else:
        for name, kernel in (("SDPA math", SDPBackend.MATH), ("SDPA flash", SDPBackend.FLASH_ATTENTION)):
            yield Rival(name, lambda: _sdpa_attention, settings=functools.partial(sdpa_kernel, kernel))
    forms = {"torch.compile": _sdpa_attention}
    if gpu and mask is not None:
        # What admits grouped heads and a mask is slow on most devices, and copying keys and values is the way around.
        forms["torch.compile, keys repeated"] = _repeated_attention
    for name, function in forms.items():
        yield Rival(name, lambda f=function: compiled(f, how), slow=True)
    if not shape.everything:
        return
    yield Rival("FlexAttention", lambda: _flex_attention(shape, mask, how), slow=True)
    for name, function in forms.items():
        yield compiled_deterministically(name, function, how)
    if gpu:
        yield from _atomic_rivals(dtype)


def _atomic_rivals(dtype: torch.dtype) -> Iterator[Rival]:
    from wireframe.bench.atomic_attention import TILES, TILES_FP32, atomic_attention

    # Forward it is our own kernel, whose sums need no atomics.
    modes = (BACKWARD, BOTH)
    for tile in TILES_FP32 if dtype == torch.float32 else TILES:
        name = f"atomic, {tile.block_m} x {tile.block_n}"
        yield Rival(name, lambda tile=tile: lambda *given: atomic_attention(*given, tile), slow=True, modes=modes)


def _heads_first(x: Tensor, group: int = 1) -> Tensor:
    # repeat_interleave copies even where it repeats nothing.
    return (x if group == 1 else x.repeat_interleave(group, 2)).transpose(1, 2)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1, eps=1e-12)


def _normalised(q: Tensor, k: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    return (_unit(q) * log_scale.exp()[:, None]).to(q.dtype), _unit(k).to(k.dtype)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor, key_mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(*map(_heads_first, (q, k, v)), enable_gqa=True).transpose(1, 2)


def _sdpa_attention(q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor, key_mask: Tensor | None) -> Tensor:
    unit_q, unit_k = _normalised(q, k, log_scale)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    out = F.scaled_dot_product_attention(
        *map(_heads_first, (unit_q, unit_k, v)), attn_mask=mask, scale=1.0, enable_gqa=True
    )
    return out.transpose(1, 2)


def _repeated_attention(q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor, key_mask: Tensor) -> Tensor:
    unit_q, unit_k = _normalised(q, k, log_scale)
    group = q.shape[2] // k.shape[2]
    keys, values = _heads_first(unit_k, group), _heads_first(v, group)
    mask = key_mask[:, None, None, :].expand(-1, q.shape[2], q.shape[1], -1)
    return F.scaled_dot_product_attention(
        _heads_first(unit_q), keys, values, attn_mask=mask, scale=1.0
    ).transpose(1, 2)


def _flex_attention(shape: Shape, key_mask: Tensor | None, how: How) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if key_mask is not None:
        block_mask = create_block_mask(
            lambda b, h, i, j: key_mask[b, j], shape.batch, None, shape.queries, shape.keys, device=how.device
        )

    def attend(q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor, _: Tensor | None) -> Tensor:
        unit_q, unit_k = _normalised(q, k, log_scale)
        heads_first = map(_heads_first, (unit_q, unit_k, v))
        return flex_attention(*heads_first, block_mask=block_mask, scale=1.0, enable_gqa=True).transpose(1, 2)

    return compiled(attend, how)


def _flash_attn() -> Callable[..., Tensor]:
    attend = package("flash_attn", "flash-attn").flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor, _: None) -> Tensor:
        return attend(*_normalised(q, k, log_scale), v, softmax_scale=1.0)

    return run


def _xformers() -> Callable[..., Tensor]:
    attend = package("xformers.ops", "xformers").memory_efficient_attention

    def run(q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor, key_mask: Tensor | None) -> Tensor:
        unit_q, unit_k = _normalised(q, k, log_scale)
        group = q.shape[2] // k.shape[2]
        bias = None
        if key_mask is not None:
            bias = torch.zeros(key_mask.shape, dtype=q.dtype, device=q.device).masked_fill(~key_mask, -torch.inf)
            bias = bias[:, None, None, :].expand(-1, q.shape[2], q.shape[1], -1)
        keys, values = (x.repeat_interleave(group, 2) for x in (unit_k, v))
        return attend(unit_q, keys, values, attn_bias=bias, scale=1.0)

    return run

"""Times attention with normalised queries and keys against its rivals: ``python -m wireframe.bench.attention``.

Times are those of the device alone, from a cold L2 cache. The rivals get what a user would write in half precision:
normalised in float32, rounded, then ``scaled_dot_product_attention`` or FlexAttention; that is faster than compiling
the reference, which attends in float32. With a key mask flash is closed to ``scaled_dot_product_attention``. The rows
of flash and cuDNN without norm and mask compute something else: they are the speed limit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wireframe.bench import gpu_timing
from wireframe.bench.gpu_timing import MODES, OURS, Problem, Rival, best, compiled, goal, randn, ratio
from wireframe.kernels import dispatch, ops
from wireframe.kernels.determinism import deterministic

_OP = "qk_norm_attention"
_FLASH = "flash, no norm, no mask"
_PLAIN = {_FLASH: SDPBackend.FLASH_ATTENTION, "cuDNN, no norm, no mask": SDPBackend.CUDNN_ATTENTION}


class Shape(NamedTuple):
    """modes: what is measured; all_rivals: against which, all or the quickest to compile."""

    batch: int
    queries: int
    keys: int
    mask: bool
    modes: tuple[str, ...] = MODES
    all_rivals: bool = True
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64

    def text(self, dtype: torch.dtype) -> str:
        sizes = f"{self.batch} x {self.heads}/{self.kv_heads} x {self.queries} x {self.keys} x {self.dim}"
        return f"{sizes}, {str(dtype).removeprefix('torch.')}{', key mask' if self.mask else ''}"


# Training cross-attention of the published recipe, whose goals are stated; then inference and the other layers.
_GOALS = ((32, 256, 2048), (64, 256, 4096))
_SHAPES = (
    *(Shape(*sizes, mask, all_rivals=sizes == _GOALS[0]) for sizes in _GOALS for mask in (True, False)),
    Shape(1, 256, 4096, True, ("forward",), False),
    Shape(32, 256, 256, False, MODES, False),
    Shape(32, 64, 256, False, MODES, False),
)
_SMALL = (
    Shape(1, 3, 7, True, heads=2, kv_heads=1, dim=32),
    Shape(1, 3, 7, False, ("forward",), False, heads=2, kv_heads=1, dim=32),
)


class Inputs(NamedTuple):
    q: Tensor  # [B, Nq, H, D]
    k: Tensor  # [B, Nk, Hkv, D]
    v: Tensor  # [B, Nk, Hkv, D]
    log_scale: Tensor  # [H] float32
    key_mask: Tensor | None  # [B, Nk] bool


def problems(device: str, small: bool, backend: str) -> Iterator[Problem]:
    """One problem a shape; float32 on the CPU, where half precision is no contest."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for shape in _SMALL if small else _SHAPES:
        q = randn(device, shape.batch, shape.queries, shape.heads, shape.dim).to(dtype)
        k, v = (
            randn(device, shape.batch, shape.keys, shape.kv_heads, shape.dim, seed=seed).to(dtype) for seed in (1, 2)
        )
        log_scale = torch.full((shape.heads,), 2.0, device=device)
        mask = randn(device, shape.batch, shape.keys, seed=3) < 1.5 if shape.mask else None
        if mask is not None:
            mask[:, 0] = True
        inputs = Inputs(*(x.requires_grad_() for x in (q, k, v, log_scale)), mask)
        gradient = randn(device, *q.shape, seed=4).to(dtype)
        rivals = list(_rivals(inputs, device, backend, shape.all_rivals))
        yield Problem(_OP, shape.text(dtype), inputs[:4], gradient, rivals, shape.modes)


def _rivals(inputs: Inputs, device: str, backend: str, everything: bool) -> Iterator[Rival]:
    def on(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: function(*inputs)

    def ours(impl: str) -> Callable[[], Callable[[], Tensor]]:
        return lambda: on(lambda *given: ops.qk_norm_attention(*given, impl=impl))

    yield Rival("reference", ours("reference"))
    interpreted = device == "cpu" and dispatch.INTERPRETED
    if device == "cuda" or interpreted:
        yield Rival(OURS, ours("triton"), deterministic=True)
    for name, kernel in _PLAIN.items():
        settings = functools.partial(sdpa_kernel, kernel)
        yield Rival(name, lambda: on(_plain_attention), exact=False, settings=settings)
    forms = {"torch.compile": _sdpa_attention}
    if inputs.key_mask is not None:
        # What admits grouped heads and a mask is slow on most devices, and copying keys and values is the way around.
        forms["torch.compile, keys repeated"] = _repeated_attention
    for name, function in forms.items():
        yield Rival(name, lambda f=function: on(compiled(f, backend)), slow=True)
    if everything:
        yield Rival("FlexAttention", lambda: on(_flex_attention(inputs, backend)), slow=True)
        yield Rival(
            "deterministic torch.compile", lambda: on(_compiled_deterministically(function, backend)),
            deterministic=True, settings=deterministic, slow=True,
        )  # fmt: skip
        if device == "cuda" or interpreted:
            yield from _atomic_rivals(on, inputs.q.dtype)


def _atomic_rivals(on: Callable, dtype: torch.dtype) -> Iterator[Rival]:
    from wireframe.bench.atomic_attention import TILES, TILES_FP32, atomic_attention

    for tile in TILES_FP32 if dtype == torch.float32 else TILES:
        name = f"atomic, {tile.block_m} x {tile.block_n}"
        yield Rival(name, lambda tile=tile: on(lambda *given: atomic_attention(*given, tile)), slow=True)


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


def _flex_attention(inputs: Inputs, backend: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if inputs.key_mask is not None:
        key_mask = inputs.key_mask
        batch, keys = key_mask.shape
        block_mask = create_block_mask(
            lambda b, h, i, j: key_mask[b, j], batch, None, inputs.q.shape[1], keys, device=key_mask.device.type
        )

    def attend(q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor, _: Tensor | None) -> Tensor:
        unit_q, unit_k = _normalised(q, k, log_scale)
        heads_first = map(_heads_first, (unit_q, unit_k, v))
        return flex_attention(*heads_first, block_mask=block_mask, scale=1.0, enable_gqa=True).transpose(1, 2)

    return compiled(attend, backend)


def _compiled_deterministically(function: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    gpu_timing.require_deterministic_compile()
    return compiled(function, backend)


def goals(rows: list[dict]) -> list[str]:
    """The goals, each beside what was measured; of several forms of a rival the fastest counts."""
    lines = []
    both, forward = f"{_OP} forward + backward", f"{_OP} forward"
    for sizes in _GOALS:
        masked, plain = (Shape(*sizes, mask).text(torch.bfloat16) for mask in (True, False))

        def speed(op: str, shape: str, rival: str, rival_shape: str | None = None) -> float | None:
            return ratio(best(rows, op, rival_shape or shape, rival), best(rows, op, shape, OURS))

        for shape, bound in ((masked, 1.3), (plain, 1.0)):
            value = speed(both, shape, "torch.compile")
            lines.append(goal(f"{both}, {shape}, speed / torch.compile", value, bound, " x"))
        for op, bound in ((forward, 0.9), (both, 0.75)):
            for shape in (plain, masked):
                value = speed(op, shape, _FLASH, plain)
                lines.append(goal(f"{op}, {shape}, speed / flash without norm and mask", value, bound, " x"))
        # Atomics are a rival where all are.
        for shape in (plain, masked) if sizes == _GOALS[0] else ():
            value = ratio(best(rows, both, shape, OURS), best(rows, both, shape, "atomic"))
            lines.append(goal(f"{both}, {shape}, time / atomic", value, 1.05, " x", at_least=False))
    return lines


def main(argv: list[str] | None = None) -> int:
    """Measures; without CUDA it says so and returns 0."""
    return gpu_timing.main("attention", __doc__, problems, goals, argv)


if __name__ == "__main__":
    raise SystemExit(main())

"""Small kernels that ``test_static.py`` compiles ahead of time in place of the product's."""

import torch
import triton
import triton.language as tl

from wireframe.bench.static_cases import Case
from wireframe.kernels.launch import Launch

FACTOR = tl.constexpr(2.0)


@triton.jit
def scaled(b_x):
    return b_x * FACTOR


@triton.jit
def _toy_dot_kernel(
    p_x, p_y, p_out, p_none, n, one, shift: tl.float32, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    b_acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, n, BK):
        # [BM, BK]
        b_x = tl.load(p_x + o_m[:, None] * n + (k + o_k)[None, :])
        # [BK, BN]
        b_y = tl.load(p_y + (k + o_k)[:, None] * BN + o_n[None, :])
        b_acc = tl.dot(b_x, b_y, b_acc)
    tl.store(p_out + o_m[:, None] * BN * one + o_n[None, :], scaled(b_acc) + shift)


@triton.jit
def _toy_spilling_kernel(p_x, p_out, BM: tl.constexpr, BN: tl.constexpr):
    # More numbers than one warp has registers, all needed until the end.
    o = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    b_x = tl.load(p_x + o)
    tl.store(p_out + o, b_x / tl.sum(b_x))


@triton.jit
def _toy_broken_kernel(p_x, BM: tl.constexpr):
    tl.static_assert(BM == 0, "broken on purpose")


@triton.jit(do_not_specialize=["plain"])
def _toy_arguments_kernel(p_x, p_odd, none, one, sixteen, odd, long, plain, number, truth, SIZE: tl.constexpr):
    tl.store(p_x + one, number + sixteen + odd + long + plain + tl.load(p_odd) + SIZE)


def dot_launch(device="meta", offset=0, length=256, warps=4):
    """A product [64, length] x [length, 64] of float16; x begins ``offset`` elements behind an aligned address."""
    x = torch.empty(64 * length + offset, dtype=torch.float16, device=device)[offset:].view(64, length)
    y = torch.empty(length, 64, dtype=torch.float16, device=device)
    out = torch.empty(64, 64, dtype=torch.float32, device=device)
    arguments = {
        "p_x": x, "p_y": y, "p_out": out, "p_none": None, "n": length, "one": 1, "shift": 0.5,
        "BM": 64, "BN": 64, "BK": 32,
    }  # fmt: skip
    return Launch(_toy_dot_kernel, (1,), arguments, num_warps=warps, num_stages=3)


def spilling_launch():
    x, out = (torch.empty(128, 128, dtype=torch.float32, device="meta") for _ in range(2))
    arguments = {"p_x": x, "p_out": out, "BM": 128, "BN": 128}
    return Launch(_toy_spilling_kernel, (1,), arguments, num_warps=1)


def broken_launch():
    x = torch.empty(128, dtype=torch.float32, device="meta")
    return Launch(_toy_broken_kernel, (1,), {"p_x": x, "BM": 128}, num_warps=1)


def argument_launch(device="meta"):
    x = torch.empty(64, dtype=torch.float32, device=device)
    arguments = {
        "p_x": x, "p_odd": x[1:], "none": None, "one": 1, "sixteen": 48, "odd": 7, "long": 1 << 40, "plain": 1,
        "number": 0.25, "truth": True, "SIZE": 64,
    }  # fmt: skip
    return Launch(_toy_arguments_kernel, (1,), arguments, num_warps=2)


def cases():
    return [
        Case("short", "fp16", 64, lambda arch: [dot_launch()], lambda launch: 2.0 * 64 * 64 * launch.arguments["n"]),
        Case("long", "fp16", 64, lambda arch: [dot_launch(length=512)]),
        Case("wide", "fp32", 64, lambda arch: [dot_launch(warps=8)]),
    ]


def minimum_warps(kernel, dtype, dim):
    return 4

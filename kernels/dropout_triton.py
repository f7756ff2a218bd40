"""Residual connection with dropout, forward and backward: one launch each, elementwise.

x, branch [B, ...] and keys [B] -> x + branch * f, with f = 1 / (1 - p') where the element is kept and 0 where it is
dropped; which of them is a function of (key, site, place in the scene), see ``dropout_reference.dropout_factors``. The
gradient of x is that of the sum, the one of branch is it times f, so only keys need to be kept between the two.

Same bits as the reference: hashes are integers, and product and sum are rounded one after the other. Therefore the
launches forbid fused multiply-adds.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from wireframe.kernels.dropout_reference import keep_scale
from wireframe.kernels.launch import Launch

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)

# Hashes of a program; each serves four elements, which one thread reads and writes together.
_WORDS = 256
_WARPS = 4


@triton.jit
def _mix(x):
    """``hashing._mix_int`` of uint64."""
    x = (x ^ (x >> 30)) * _FIRST
    x = (x ^ (x >> 27)) * _SECOND
    return x ^ (x >> 31)


@triton.jit
def _place(count, W: tl.constexpr):
    """Scene and hashes [W] of this program."""
    blocks = tl.cdiv(count, 4 * W)
    start = (tl.program_id(0) % blocks).to(tl.int64) * W
    return (tl.program_id(0) // blocks).to(tl.int64), start + tl.arange(0, W)


@triton.jit
def site_key(b_key, site):
    """The keys int64 of scenes with the site folded in, uint64."""
    return _mix((b_key.to(tl.uint64) ^ site.to(tl.uint64)) + _GOLDEN)


@triton.jit
def skip_words(b_key, words):
    """The key whose hashes are those of ``b_key`` from position ``words`` on."""
    return b_key + words.to(tl.uint64) * _GOLDEN


@triton.jit
def hash_words(b_key, o_word):
    """Hashes at the positions ``o_word`` of ``site_key``; each holds the bits of four elements."""
    return _mix(skip_words(b_key, o_word + 1))


@triton.jit
def factors_of(b_bits, threshold, scale):
    """What elements are multiplied by; the lowest 16 bits of each uint64 decide."""
    return tl.where((b_bits & 0xFFFF).to(tl.int32) >= threshold, scale, 0.0)


@triton.jit
def _factors(p_keys, scene, site, o_word, threshold, scale):
    """[W, 4]"""
    # [W]
    b_hash = hash_words(site_key(tl.load(p_keys + scene), site), o_word)
    return factors_of(b_hash[:, None] >> (16 * tl.arange(0, 4))[None, :].to(tl.uint64), threshold, scale)


@triton.jit(do_not_specialize=["site", "threshold"])
def _dropout_add_fwd_kernel(
    p_x, p_branch, p_keys, p_out, x_stride, branch_stride, count, site, threshold, scale, W: tl.constexpr
):
    """Strides are those of scenes, whose elements are contiguous; out is contiguous."""
    scene, o_word = _place(count, W)
    # [W, 4]
    o = o_word[:, None] * 4 + tl.arange(0, 4)[None, :]
    m = o < count
    b_x = tl.load(p_x + scene * x_stride + o, mask=m, other=0.0).to(tl.float32)
    b_branch = tl.load(p_branch + scene * branch_stride + o, mask=m, other=0.0).to(tl.float32)
    b_out = b_x + b_branch * _factors(p_keys, scene, site, o_word, threshold, scale)
    tl.store(p_out + scene * count + o, b_out.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["site", "threshold"])
def _dropout_add_bwd_kernel(
    p_grad, p_keys, p_dbranch, grad_stride, count, site, threshold, scale, W: tl.constexpr
):
    """As above: the gradient of the sum -> that of branch, contiguous."""
    scene, o_word = _place(count, W)
    # [W, 4]
    o = o_word[:, None] * 4 + tl.arange(0, 4)[None, :]
    m = o < count
    b_grad = tl.load(p_grad + scene * grad_stride + o, mask=m, other=0.0).to(tl.float32)
    b_dbranch = b_grad * _factors(p_keys, scene, site, o_word, threshold, scale)
    tl.store(p_dbranch + scene * count + o, b_dbranch.to(p_dbranch.dtype.element_ty), mask=m)


def plan_forward(
    x: Tensor,  # [B, ...]
    branch: Tensor,  # [B, ...]
    keys: Tensor,  # [B]
    out: Tensor,  # [B, ...]
    *,
    site: int,
    threshold: int,
) -> list[Launch]:
    """One launch. keys and out contiguous, of x and branch the scenes; the same tiles serve every architecture."""
    arguments = {"p_x": x, "p_branch": branch, "x_stride": x.stride(0), "branch_stride": branch.stride(0)}
    return [_launch(_dropout_add_fwd_kernel, arguments | {"p_keys": keys, "p_out": out}, out, site, threshold)]


def plan_backward(
    grad: Tensor,  # [B, ...]
    keys: Tensor,  # [B]
    dbranch: Tensor,  # [B, ...]
    *,
    site: int,
    threshold: int,
) -> list[Launch]:
    """One launch. keys and dbranch contiguous, of grad the scenes."""
    arguments = {"p_grad": grad, "grad_stride": grad.stride(0), "p_keys": keys, "p_dbranch": dbranch}
    return [_launch(_dropout_add_bwd_kernel, arguments, dbranch, site, threshold)]


def _launch(kernel, arguments: dict, written: Tensor, site: int, threshold: int) -> Launch:
    count = math.prod(written.shape[1:])
    grid = (written.shape[0] * triton.cdiv(count, 4 * _WORDS),)
    arguments = {
        **arguments, "count": count, "site": site, "threshold": threshold, "scale": keep_scale(threshold), "W": _WORDS,
    }  # fmt: skip
    return Launch(kernel, grid, arguments, _WARPS, fp_fusion=False)

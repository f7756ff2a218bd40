"""Features of labelled points in one launch: every point read once, every row written once, 16 bytes a thread.

A program has ``_ROWS`` points. With F frequencies b_f and x' = 2 pi x, in float32 and rounded one operation after the
other, as in the reference (so the launch fuses only what is written as such here):

    angle_f = x'_0 b_f0 + x'_1 b_f1 + x'_2 b_f2        columns f and F + f: sin(angle_f), cos(angle_f)

Angles reach hundreds of radians. The fast sine of the hardware is wrong there, and the accurate one of the library
keeps a table in memory for arguments that do not occur. Here both are polynomials of what remains of the angle after k
quarters of a circle, k pi/2 being subtracted in three parts. Sines and cosines are within 1e-7 of those of the rounded
angle up to 10^6 radians, where rounding the angle itself costs 0.03; beyond they are those of some other angle.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from wireframe.kernels import point_features_reference as columns
from wireframe.kernels.launch import Launch

# Points of a program.
_ROWS = 32
_WARPS = 4

_TURN = tl.constexpr(2.0 * math.pi)
_QUARTERS = tl.constexpr(2.0 / math.pi)
# Numbers of this size are integers, and it is a multiple of 4: the last two bits of a sum with k are those of k.
_INTEGERS = tl.constexpr(1.5 * 2**23)
# pi/2 as a sum of 8 bits, 11 bits and the rest: unfused too, what k <= 2^13 times the first two is has no rounding.
_PI_2_HIGH = tl.constexpr(1.5703125)
_PI_2_MIDDLE = tl.constexpr(0.0004837512969970703125)
_PI_2_LOW = tl.constexpr(math.pi / 2 - 1.5703125 - 0.0004837512969970703125)
# sin(r) = r + r^3 (s0 + s1 r^2 + s2 r^4) and cos(r) = 1 - r^2 / 2 + r^4 (c0 + c1 r^2 + c2 r^4): least largest errors
# for |r| <= 0.8, relative 4e-9 and absolute 1e-10.
_S0, _S1, _S2 = tl.constexpr(-0.16666653752), tl.constexpr(0.008332083002), tl.constexpr(-0.00019504316115)
_C0, _C1, _C2 = tl.constexpr(0.041666645557), tl.constexpr(-0.0013887243113), tl.constexpr(2.4423887226e-05)

# Spreads are powers of two: multiplying by their inverse is dividing, without a division's rounding of the hardware.
_VIEWS_MEAN, _VIEWS_SCALE = tl.constexpr(columns.VIEWS_MEAN), tl.constexpr(1.0 / columns.VIEWS_STD)
_FRACTION_MEAN, _FRACTION_SCALE = tl.constexpr(columns.FRACTION_MEAN), tl.constexpr(1.0 / columns.FRACTION_STD)
_PLAIN = tl.constexpr(columns.PLAIN)


@triton.jit
def _sin_cos(b_angle):
    """Sine and cosine of float32; NaN of what is not finite."""
    b_shifted = tl.fma(b_angle, _QUARTERS, _INTEGERS)
    b_k = b_shifted - _INTEGERS
    b_r = tl.fma(b_k, -_PI_2_LOW, tl.fma(b_k, -_PI_2_MIDDLE, tl.fma(b_k, -_PI_2_HIGH, b_angle)))
    # Beyond _INTEGERS it would be anything; a NaN stays.
    b_r = tl.where(tl.abs(b_r) > 1.0, 0.0, b_r)
    b_r2 = b_r * b_r
    b_sin = tl.fma(b_r * b_r2, tl.fma(b_r2, tl.fma(b_r2, _S2, _S1), _S0), b_r)
    b_cos = tl.fma(b_r2 * b_r2, tl.fma(b_r2, tl.fma(b_r2, _C2, _C1), _C0), tl.fma(b_r2, -0.5, 1.0))
    b_quarter = b_shifted.to(tl.int32, bitcast=True)
    m_swapped = (b_quarter & 1) != 0
    b_first, b_second = tl.where(m_swapped, b_cos, b_sin), tl.where(m_swapped, b_sin, b_cos)
    m_sin, m_cos = (b_quarter & 2) != 0, ((b_quarter + 1) & 2) != 0
    return tl.where(m_sin, -b_first, b_first), tl.where(m_cos, -b_second, b_second)


@triton.jit
def _column(b_label, m_seen, SIZE: tl.constexpr, FIRST: tl.constexpr):
    """The column that is one, -1 where there is none."""
    return tl.where(m_seen & (b_label >= 0) & (b_label < SIZE), b_label.to(tl.int32) + FIRST, -1)


@triton.jit
def _point_features_fwd_kernel(
    p_xyz,
    p_class,
    p_source,
    p_behind,
    p_views,
    p_fraction,
    p_mask,
    p_frequencies,
    p_out,
    count,
    CLASSES: tl.constexpr,
    SOURCES: tl.constexpr,
    BEHIND: tl.constexpr,
    F: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    BM: tl.constexpr,
):
    """Everything contiguous; count: points. REST: a power of two, at least WIDTH - 2 F."""
    start = tl.program_id(0).to(tl.int64) * BM
    o_m = tl.arange(0, BM)
    m_m = start + o_m < count
    o_point = start + o_m
    # [BM]; of a masked point nothing else is read.
    m_seen = (tl.load(p_mask + o_point, mask=m_m, other=0) != 0) & m_m
    b_x = tl.load(p_xyz + o_point * 3, mask=m_seen, other=0.0)
    b_y = tl.load(p_xyz + o_point * 3 + 1, mask=m_seen, other=0.0)
    b_z = tl.load(p_xyz + o_point * 3 + 2, mask=m_seen, other=0.0)
    o_f = tl.arange(0, F)
    # [F]
    b_f0 = tl.load(p_frequencies + o_f * 3)
    b_f1 = tl.load(p_frequencies + o_f * 3 + 1)
    b_f2 = tl.load(p_frequencies + o_f * 3 + 2)
    # [BM, F]
    b_angle = (b_x * _TURN)[:, None] * b_f0[None, :] + (b_y * _TURN)[:, None] * b_f1[None, :]
    b_sin, b_cos = _sin_cos(b_angle + (b_z * _TURN)[:, None] * b_f2[None, :])
    b_sin, b_cos = tl.where(m_seen[:, None], b_sin, 0.0), tl.where(m_seen[:, None], b_cos, 0.0)
    p_row = p_out + start * WIDTH + o_m[:, None] * WIDTH
    tl.store(p_row + o_f[None, :], b_sin.to(p_out.dtype.element_ty), mask=m_m[:, None])
    tl.store(p_row + F + o_f[None, :], b_cos.to(p_out.dtype.element_ty), mask=m_m[:, None])
    # [BM]
    b_views = (tl.load(p_views + o_point, mask=m_seen, other=0).to(tl.float32) - _VIEWS_MEAN) * _VIEWS_SCALE
    b_fraction = (tl.load(p_fraction + o_point, mask=m_seen, other=0.0) - _FRACTION_MEAN) * _FRACTION_SCALE
    b_class = _column(tl.load(p_class + o_point, mask=m_seen, other=0), m_seen, CLASSES, _PLAIN)
    b_source = _column(tl.load(p_source + o_point, mask=m_seen, other=0), m_seen, SOURCES, _PLAIN + CLASSES)
    b_behind = tl.load(p_behind + o_point, mask=m_seen, other=0)
    b_behind = tl.where(b_behind < 0, 0, b_behind)
    b_behind = _column(b_behind, m_seen, BEHIND, _PLAIN + CLASSES + SOURCES)
    b_one = tl.where(m_seen, 5, -1)
    b_views, b_fraction = tl.where(m_seen, b_views, 0.0), tl.where(m_seen, b_fraction, 0.0)
    # [BM, REST]
    o_c = tl.arange(0, REST)[None, :]
    b_rest = tl.where(o_c == 3, b_views[:, None], tl.where(o_c == 4, b_fraction[:, None], 0.0))
    b_rest = tl.where(o_c == 1, b_y[:, None], tl.where(o_c == 2, b_z[:, None], b_rest))
    b_rest = tl.where(o_c == 0, b_x[:, None], b_rest)
    m_one = (o_c == b_class[:, None]) | (o_c == b_source[:, None]) | (o_c == b_behind[:, None])
    b_rest = tl.where(m_one | (o_c == b_one[:, None]), 1.0, b_rest)
    m_rest = m_m[:, None] & (o_c < WIDTH - 2 * F)
    tl.store(p_row + 2 * F + o_c, b_rest.to(p_out.dtype.element_ty), mask=m_rest)


def plan_forward(
    xyz: Tensor,  # [B, T, 3]
    class_id: Tensor,  # [B, T]
    source: Tensor,  # [B, T]
    behind: Tensor,  # [B, T]
    n_views_voted: Tensor,  # [B, T]
    vote_frac: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    frequencies: Tensor,  # [F, 3]
    out: Tensor,  # [B, T, W]
    *,
    labels: tuple[int, int, int],
) -> list[Launch]:
    """One launch. All contiguous, F a power of two; the same tiles serve every architecture."""
    (classes, sources, labels_behind), (bands, width) = labels, (frequencies.shape[0], out.shape[-1])
    count = mask.numel()
    arguments = {
        "p_xyz": xyz, "p_class": class_id, "p_source": source, "p_behind": behind, "p_views": n_views_voted,
        "p_fraction": vote_frac, "p_mask": mask, "p_frequencies": frequencies, "p_out": out, "count": count,
        "CLASSES": classes, "SOURCES": sources, "BEHIND": labels_behind, "F": bands, "WIDTH": width,
        "REST": triton.next_power_of_2(width - 2 * bands), "BM": _ROWS,
    }  # fmt: skip
    return [Launch(_point_features_fwd_kernel, (triton.cdiv(count, _ROWS),), arguments, _WARPS, fp_fusion=False)]

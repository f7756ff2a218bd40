"""Device helpers of the segment kernels: cost of a tile of segment pairs, and its gradient down to the endpoints.

A segment p, q is the tuple (m_x, m_y, m_z, d_x, d_y, d_z, l): midpoint, direction (q - p) / max(l, 1e-6), length.
    C = w_mid |m_i - m_j| + w_dir (1 - |d_i . d_j|) + w_len |l_i - l_j|
Segments i and j have shapes that broadcast to their tile of pairs. Where a length, a distance of midpoints or the
argument of an absolute value is 0, its gradient is 0, as in ``segment_cost_reference``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_segments(p_segments, o_segment, m_segment):
    """Segments at o_segment of a contiguous [segments, 2, 3]; zeros where not m_segment. Any shape."""
    p_segments += o_segment * 6
    px = tl.load(p_segments, mask=m_segment, other=0.0).to(tl.float32)
    py = tl.load(p_segments + 1, mask=m_segment, other=0.0).to(tl.float32)
    pz = tl.load(p_segments + 2, mask=m_segment, other=0.0).to(tl.float32)
    qx = tl.load(p_segments + 3, mask=m_segment, other=0.0).to(tl.float32)
    qy = tl.load(p_segments + 4, mask=m_segment, other=0.0).to(tl.float32)
    qz = tl.load(p_segments + 5, mask=m_segment, other=0.0).to(tl.float32)
    ex, ey, ez = qx - px, qy - py, qz - pz
    length = tl.sqrt(ex * ex + ey * ey + ez * ez)
    inverse = 1.0 / tl.maximum(length, 1e-6)
    mx, my, mz = (px + qx) * 0.5, (py + qy) * 0.5, (pz + qz) * 0.5
    return mx, my, mz, ex * inverse, ey * inverse, ez * inverse, length


@triton.jit
def pair_cost(a, b, w_mid, w_dir, w_len):
    x, y, z = a[0] - b[0], a[1] - b[1], a[2] - b[2]
    cosine = a[3] * b[3] + a[4] * b[4] + a[5] * b[5]
    return w_mid * tl.sqrt(x * x + y * y + z * z) + w_dir * (1.0 - tl.abs(cosine)) + w_len * tl.abs(a[6] - b[6])


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def pair_gradient(a, b, b_dcost, w_mid, w_dir, w_len):
    """Gradients of m_i / (m_i - m_j), of d_i . d_j and of l_i, for each pair; those of m_j, l_j are the negatives."""
    x, y, z = a[0] - b[0], a[1] - b[1], a[2] - b[2]
    distance = tl.sqrt(x * x + y * y + z * z)
    middle = tl.where(distance > 0, w_mid * b_dcost / distance, 0.0)
    cosine = a[3] * b[3] + a[4] * b[4] + a[5] * b[5]
    return middle, -w_dir * b_dcost * sign(cosine), w_len * b_dcost * sign(a[6] - b[6])


@triton.jit
def store_endpoint_gradients(p_gradient, o_segment, m_segment, a, gmx, gmy, gmz, gdx, gdy, gdz, gl):
    """Gradients of midpoint, direction and length to those of the endpoints, [segments, 2, 3] float32."""
    length = tl.maximum(a[6], 1e-6)
    inverse = 1.0 / length
    # Of the length inside the direction, which the clamp cuts off.
    gl -= tl.where(a[6] >= 1e-6, (gdx * a[3] + gdy * a[4] + gdz * a[5]) * inverse, 0.0)
    along = tl.where(a[6] > 0, gl * length / a[6], 0.0)
    ex, ey, ez = gdx * inverse + along * a[3], gdy * inverse + along * a[4], gdz * inverse + along * a[5]
    p_gradient += o_segment * 6
    tl.store(p_gradient, gmx * 0.5 - ex, mask=m_segment)
    tl.store(p_gradient + 1, gmy * 0.5 - ey, mask=m_segment)
    tl.store(p_gradient + 2, gmz * 0.5 - ez, mask=m_segment)
    tl.store(p_gradient + 3, gmx * 0.5 + ex, mask=m_segment)
    tl.store(p_gradient + 4, gmy * 0.5 + ey, mask=m_segment)
    tl.store(p_gradient + 5, gmz * 0.5 + ez, mask=m_segment)

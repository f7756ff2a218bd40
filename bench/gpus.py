"""What a multiprocessor holds, and what GPUs reach: the limits that static figures and whole steps are held against.

Multiprocessors: CUDA C++ Programming Guide, "Compute Capabilities", tables "Technical Specifications per Compute
Capability"; the allocation of registers follows NVIDIA's occupancy calculator (``cuda_occupancy.h``).
"""

from __future__ import annotations

from typing import NamedTuple


class Multiprocessor(NamedTuple):
    """Resident warps and blocks, bytes of shared memory altogether, and the most that one block may have of them."""

    warps: int
    blocks: int
    shared: int
    block_shared: int


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 << 10, 163 << 10),
    86: Multiprocessor(48, 16, 100 << 10, 99 << 10),
    89: Multiprocessor(48, 24, 100 << 10, 99 << 10),
    90: Multiprocessor(64, 32, 228 << 10, 227 << 10),
}

# The same on all four.
_REGISTERS = 65536
_PARTITIONS = 4
_REGISTERS_AT_A_TIME = 256
_SHARED_AT_A_TIME = 128
_RESERVED_A_BLOCK = 1024


class Gpu(NamedTuple):
    """TFLOP/s of dense bfloat16 and float16 products with float32 sums, of float32 products; TB/s of memory."""

    half: float
    single: float
    bandwidth: float


# By NVIDIA's data sheets, under what the name that CUDA gives the device ends in. Of the H100 the SXM form with HBM3.
SPECIFIED = {
    "RTX 4090": Gpu(165.0, 82.6, 1.008),
    "H100 80GB HBM3": Gpu(989.0, 67.0, 3.35),
    "H200": Gpu(989.0, 67.0, 4.8),
}  # fmt: skip

# What bounds and predictions count with. Of the H200 half and bandwidth are as measured with large products and copies.
GPUS = {"RTX 4090": SPECIFIED["RTX 4090"], "H200": Gpu(790.0, 67.0, 4.3)}


def specified(device: str) -> Gpu | None:
    """The data sheet's figures of a device by the name that CUDA gives it; None for one that is not listed.

    Other forms of a card have names with more behind, and other figures: a laptop's, a PCIe card's, a part of one.
    """
    return next((gpu for name, gpu in SPECIFIED.items() if device.endswith(f" {name}")), None)


def resident_warps(architecture: int, registers: int, shared: int, warps: int) -> int:
    """Warps of a kernel that fit on one multiprocessor at once; 0 where not even one block does.

    Args:
        registers: a thread. shared: bytes a block, static and dynamic. warps: a block.
    """
    limits = MULTIPROCESSORS[architecture]
    a_warp = _up(32 * registers, _REGISTERS_AT_A_TIME)
    by_registers = _REGISTERS // _PARTITIONS // a_warp * _PARTITIONS // warps if registers else limits.blocks
    by_shared = limits.shared // _up(shared + _RESERVED_A_BLOCK, _SHARED_AT_A_TIME)
    return warps * min(by_registers, by_shared, limits.warps // warps, limits.blocks)


def roofline_us(gpu: Gpu, flops: float, moved: float, single: bool) -> float:
    """Microseconds no kernel can beat: all products at the peak, or all bytes at the bandwidth.

    Args:
        moved: bytes. single: whether the products are of float32.
    """
    return max(flops / (gpu.single if single else gpu.half), moved / gpu.bandwidth) * 1e-6


def _up(value: int, step: int) -> int:
    return -(-value // step) * step

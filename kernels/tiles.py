"""Tile sizes of the attention kernels: a fixed table, so that bits never depend on what was measured when.

Keyed by architecture, dtype, head dimension and, in the forward, whether the keys fill one chunk or several; the batch
size has no part in it. ``bench/tune_tiles.py`` proposes entries. Those of sm_90, bfloat16 and head dimension 64 are the
fastest of an NVIDIA H200 (``bench/NOTES.md``). The others were chosen from ahead-of-time compiles (no spills, fits the
shared memory, few instructions a logit, warps left to hide latency); on a GPU: not measured yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """block_m: packed query rows a tile, at least 16; block_n: keys a tile, a multiple of 32 up to ``WIDEST``.

    max_registers: as in ``launch.Launch``.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


class Tiles(NamedTuple):
    """Tiles of one architecture, dtype and head dimension: forward over one or several chunks of keys, backward."""

    one_chunk: Tile
    chunks: Tile
    dq: Tile
    dkv: Tile


# The widest tile of keys of any entry: what is prepared for the keys is padded to it.
WIDEST = 128

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32

_ADA = {
    (_BF16, 32): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 3), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    (_BF16, 64): Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    (_BF16, 128): Tiles(Tile(128, 32, 8, 2), Tile(32, 32, 4, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    (_FP16, 32): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    (_FP16, 64): Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(16, 64, 4, 2)),
    (_FP16, 128): Tiles(Tile(128, 32, 8, 2), Tile(32, 32, 4, 2), Tile(64, 32, 8, 2), Tile(64, 64, 8, 2)),
    (_FP32, 32): Tiles(Tile(32, 32, 4, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
    (_FP32, 64): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
    (_FP32, 128): Tiles(Tile(16, 32, 8, 2), Tile(16, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
}  # fmt: skip

# 128 registers leave room for 16 warps. The sums of earlier chunks no longer fit beside a chunk's and wait in memory.
_HOPPER = {
    (_BF16, 32): Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 1)),
    (_BF16, 64): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3, 128), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    (_BF16, 128): Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(32, 128, 8, 1)),
    (_FP16, 32): Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 1)),
    (_FP16, 64): Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 1)),
    (_FP16, 128): Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(16, 64, 4, 1)),
    (_FP32, 32): Tiles(Tile(32, 32, 4, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
    (_FP32, 64): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
    (_FP32, 128): Tiles(Tile(16, 32, 8, 2), Tile(16, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
}  # fmt: skip

# Where sm_80 would spill: its larger shared memory admits more warps, and so fewer registers each.
_A100 = {
    **_ADA,
    (_FP32, 64): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
    (_FP32, 128): Tiles(Tile(16, 32, 8, 2), Tile(16, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
}  # fmt: skip

TABLE = {80: _A100, 86: _ADA, 89: _ADA, 90: _HOPPER}


def options(tile: Tile) -> dict[str, int | None]:
    """What a tile says of its launch beside the sizes."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "max_registers": tile.max_registers}


def lookup(architecture: int, dtype: torch.dtype, head_dim: int) -> Tiles:
    """The tiles for one of ``launch.ARCHITECTURES``, a dtype of bfloat16, float16, float32 and head_dim 32, 64, 128."""
    return TABLE[architecture][dtype, head_dim]

"""Tile sizes of the attention kernels: a fixed table, so that bits never depend on what was measured when.

Keyed by kernel, dtype, head dimension, architecture and shape class; the batch size has no part in it. Made by
``bench/tune_tiles.py``: every entry compiles without spills and fits the shared memory of its architecture.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """block_m: packed query rows a tile; block_n: keys a tile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# The widest tile of keys of any entry: packed masks are padded to it.
WIDEST = 128


def forward(architecture: int, dtype: torch.dtype, dim: int, rows: int, keys: int) -> Tile:
    if dtype == torch.float32:
        return Tile(64, 32, 8, 2)
    return Tile(128, 32, 8 if dim == 128 else 4, 2)


def dq(architecture: int, dtype: torch.dtype, dim: int, rows: int, keys: int) -> Tile:
    if dtype == torch.float32:
        return Tile(64, 32, 8, 2)
    return Tile(64, 64, 8, 2) if dim == 128 else Tile(128, 32, 8, 2)


def dkv(architecture: int, dtype: torch.dtype, dim: int, rows: int, keys: int) -> Tile:
    if dtype == torch.float32:
        return Tile(32, 64, 8, 2)
    return Tile(32, 128, 8, 1)

"""Packed rows in the memory of a device, and whether they fit there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from wireframe.errors import ConfigError
from wireframe.train.rows import RowLayout
from wireframe.train.sources import PackedRow

Item = TypeVar("Item")

# Rows copied to a device at a time while a set is loaded.
_CHUNK_ROWS = 256


class Resident:
    """Packed rows in the memory of a device."""

    resident = True

    def __init__(self, packed: Iterable[PackedRow], count: int, layout: RowLayout, device: torch.device):
        """Takes at most ``count`` rows.

        Raises:
            ConfigError: the device has no room for them.
        """
        self.device = device
        self.order_ids: list[str] = []
        self.digests: list[bytes] = []
        # As int64, which a device gathers faster than bytes.
        words = layout.bytes // 8
        try:
            self._rows = torch.empty(count, words, dtype=torch.int64, device=device)
        except (RuntimeError, MemoryError):
            raise ConfigError(
                f"{count * layout.bytes / 1e9:.2f} GB of rows do not fit on {device}; keep them on disk with --stream"
            ) from None
        chunk = torch.empty(min(count, _CHUNK_ROWS), words, dtype=torch.int64)
        view, filled = chunk.numpy().view(np.uint8), 0
        for order_id, digest, row in packed:
            view[filled] = row
            filled += 1
            self.order_ids.append(order_id)
            self.digests.append(digest)
            if filled == len(chunk):
                self._keep(chunk)
                filled = 0
        self._keep(chunk[:filled])

    def _keep(self, rows: Tensor) -> None:
        end = len(self.order_ids)
        self._rows[end - len(rows) : end] = rows.to(self.device)

    def fetch(self, index: np.ndarray) -> Tensor:
        """Rows int64 [B] as uint8 [B, R]."""
        return self.gather(moved(torch.from_numpy(index), self.device))

    def gather(self, index: Tensor) -> Tensor:
        """``fetch`` of an index on the device."""
        return self._rows.index_select(0, index).view(torch.uint8)

    def fetch_all(self, requests: Iterable[Item], index: Callable[[Item], np.ndarray]) -> Iterator[tuple[Item, Tensor]]:
        """Every request with its rows, in order."""
        for request in requests:
            yield request, self.fetch(index(request))


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on a device, without waiting for what the device does."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; on the CPU what the system can hand out without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            facts = dict(line.split(":", 1) for line in file if ":" in line)
        return int(facts["MemAvailable"].split()[0]) << 10
    except (OSError, ValueError, KeyError):
        # Not Linux: half of what there is, for want of a better number.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

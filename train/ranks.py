"""The processes of one run: alone, or started by ``torchrun``; what they exchange, and in which order it is added.

Gradients are gathered and added in a fixed tree, never reduced by the network: the sum then has the same bits whatever
the number of ranks. Between ranks that have a GPU each NCCL carries the bytes, else gloo, through host memory.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from wireframe.errors import ConfigError

Result = TypeVar("Result")

# A rank waits while the first one evaluates.
_PATIENCE = datetime.timedelta(hours=6)


class Ranks:
    """This process among ``size`` ones; ``device`` is where it computes."""

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1) -> None:
        self.device, self.rank, self.size = device, rank, size

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of ``count`` things are this process's: an equal, contiguous part.

        Raises:
            ConfigError: they cannot be shared out equally.
        """
        if count % self.size:
            raise ConfigError(
                f"micro_batches {count} cannot be shared by {self.size} ranks; choose a multiple, --set micro_batches="
            )
        part = count // self.size
        return range(self.rank * part, (self.rank + 1) * part)

    def gather(self, mine: Tensor) -> Tensor:
        """Everyone's tensors of one shape [n, ...] as [size x n, ...], by rank, on this process's device."""
        if self.size == 1:
            return mine
        staged = mine if dist.get_backend() == "nccl" else mine.cpu()
        parts = [torch.empty_like(staged) for _ in range(self.size)]
        dist.all_gather(parts, staged.contiguous())
        return torch.cat(parts).to(self.device)

    def agree(self, begun: str) -> None:
        """Makes sure that every process begins with the same.

        Args:
            begun: what this one begins with, as text.

        Raises:
            ConfigError: another process's differs.
        """
        digest = hashlib.sha256(begun.encode()).digest()[:8]
        mine = torch.tensor([int.from_bytes(digest, "big", signed=True)], device=self.device)
        if (self.gather(mine) != mine).any():
            raise ConfigError(
                "the ranks do not begin alike: they need one --out, --data and --init that all of them see, and a "
                "newest checkpoint that all of them can read"
            )

    def in_turn(self, work: Callable[[], Result]) -> Result:
        """``work()`` of every process, one after the other."""
        for rank in range(self.size):
            if rank == self.rank:
                result = work()
            self.wait()
        return result

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """This process's place in the run, from the environment that ``torchrun`` sets.

    Args:
        device: "auto" (CUDA where there is one), "cpu" or "cuda".

    Raises:
        ConfigError: there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch sees no CUDA device; `wireframe doctor` says what is there")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    place = torch.device(device)
    own_gpu = device == "cuda" and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "cuda":
        place = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(place)
    if size == 1:
        yield Ranks(place)
        return
    dist.init_process_group("nccl" if own_gpu else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks(place, rank, size)
    finally:
        dist.destroy_process_group()


def tree_sum(parts: Tensor) -> Tensor:
    """The sum [...] of [n, ...] by neighbours: ((0 + 1) + (2 + 3)) + ...; the order depends on n alone."""
    while len(parts) > 1:
        paired = parts[0 : len(parts) // 2 * 2 : 2] + parts[1::2]
        parts = torch.cat([paired, parts[-1:]]) if len(parts) % 2 else paired
    return parts[0]

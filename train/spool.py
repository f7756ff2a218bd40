"""Packed rows on disk: written once, whole or not there, found again by what they were made from, read ahead."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from wireframe.errors import ShardError, WireframeError, one_line
from wireframe.files import only_process, sync, write_synced
from wireframe.train.rows import RowLayout, row_digest
from wireframe.train.sources import PackedRow

Item = TypeVar("Item")
Result = TypeVar("Result")

# Batches read beyond the one that is used.
_AHEAD = 4
_ROWS, _INDEX = "rows.npy", "index.json"
_FORMAT = 1


class Moved(NamedTuple):
    """Rows uint8 [B, R] on a device, and what a stream has to wait for before it reads them (None: nothing)."""

    rows: Tensor
    ready: Any


class Spool:
    """The rows of a training set in one file ``rows.npy``, uint8 [N, R], beside ``index.json``.

    Attributes:
        order_ids, digests: of the rows, in the order of the file; every row read is checked against its digest.
        device: where ``fetch`` puts rows.
    """

    resident = False

    def __init__(self, folder: Path, key: str, layout: RowLayout, device: torch.device):
        """Opens a written spool.

        Raises:
            ShardError: it is not whole, or was made from something else.
        """
        self.device, self._bytes, self._folder = device, layout.bytes, folder
        try:
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            if (index["format"], index["key"]) != (_FORMAT, key):
                raise ValueError("it was made from something else")
            self.order_ids = [str(order_id) for order_id in index["order_ids"]]
            self.digests = [bytes.fromhex(digest) for digest in index["digests"]]
            self._file = os.open(folder / _ROWS, os.O_RDONLY)
            # Not in __del__: that would miss the interpreter's end.
            weakref.finalize(self, os.close, self._file)
            self._offset = self._check(len(self.order_ids))
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise ShardError(f"{folder} is no whole spool ({one_line(problem)})") from None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _check(self, count: int) -> int:
        """Where the rows begin, after a look at the header and the length of the file."""
        with open(os.dup(self._file), "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
            size = os.fstat(self._file).st_size
        if dtype != np.uint8 or shape[1:] != (self._bytes,) or not count <= shape[0]:
            raise ValueError(f"{_ROWS} holds {dtype} {list(shape)}")
        if size != offset + shape[0] * self._bytes or len(self.digests) != count:
            raise ValueError(f"{_ROWS} has {size} bytes")
        return offset

    def fetch(self, index: np.ndarray) -> Tensor:
        """Rows int64 [B] of the file as uint8 [B, R] on the device; for CUDA through pinned memory, without waiting.

        Raises:
            ShardError: they cannot be read, or are not what was written.
        """
        host = torch.empty(len(index), self._bytes, dtype=torch.uint8, pin_memory=self._stream is not None)
        file, advice = self._folder / _ROWS, f"delete {self._folder} to write it again"
        try:
            for row, position in zip(host.numpy(), index.tolist()):
                # Not a memory map: there a disk that fails ends the process without a word.
                read = os.preadv(self._file, [row], self._offset + position * self._bytes)
                if read != self._bytes:
                    raise OSError(errno.EIO, f"it ends within row {position}")
        except OSError as problem:
            raise ShardError(f"{file}: cannot be read ({problem.strerror}); {advice}") from None
        for row, position in zip(host.numpy(), index.tolist()):
            # Files lie for weeks and disks flip bits: trained on, those would change the run without a word.
            if row_digest(self.order_ids[position], row) != self.digests[position]:
                raise ShardError(f"{file}: row {position} is not what was written (its SHA-256 differs); {advice}")
        return host.to(self.device, non_blocking=True)

    def fetch_all(self, requests: Iterable[Item], index: Callable[[Item], np.ndarray]) -> Iterator[tuple[Item, Tensor]]:
        """Every request with its rows, in order; a thread reads and moves some ahead until the iterator is closed.

        Raises:
            WireframeError: reading ahead failed, at the request it failed for.
        """

        def move(request: Item) -> Moved:
            if self._stream is None:
                return Moved(self.fetch(index(request)), None)
            with torch.cuda.stream(self._stream):
                return Moved(self.fetch(index(request)), self._stream.record_event())

        # Closed with this generator, so that the thread ends at once and not when memory is collected.
        with contextlib.closing(_read_ahead(move, requests)) as ahead:
            for request, moved in ahead:
                if moved.ready is not None:
                    current = torch.cuda.current_stream(self.device)
                    current.wait_event(moved.ready)
                    # Its memory was allocated for the copying stream and is now read by another.
                    moved.rows.record_stream(current)
                yield request, moved.rows


def _read_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Items with their results, in order; one thread works ahead while the caller is busy."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="wireframe-rows")
    waiting: deque[tuple[Item, Future]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > _AHEAD:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _result(item: Item, future: Future) -> tuple[Item, Any]:
    try:
        return item, future.result()
    except WireframeError:
        raise
    except Exception as problem:
        raise WireframeError(f"reading rows ahead failed ({type(problem).__name__}: {one_line(problem)})") from problem


def open_spool(
    folder: Path,
    key: str,
    layout: RowLayout,
    count: int,
    packed: Callable[[], Iterator[PackedRow]],
    name: str,
    device: torch.device,
    say: Callable[[str], None],
) -> Spool:
    """The spool of ``key`` in ``folder``: the one that is there, or else written now; another one of ``name`` goes.

    Processes that want it at the same time wait for the one that writes.

    Args:
        folder: holds one folder for each spool.
        key: of what the rows are made from.
        layout, count: R, and the most rows there can be.
        packed: gives the rows; called only to write them.
        name: of the source.
        device: where rows go later.
        say: told when a spool is not usable and written again.

    Raises:
        ShardError: it cannot be written. And what ``packed`` raises; then nothing is left behind.
    """
    target = folder / f"rows-{key[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with only_process(folder / ".lock"):
            if target.exists():
                try:
                    return Spool(target, key, layout, device)
                except ShardError as problem:
                    say(f"{problem}; it is written again")
                    shutil.rmtree(target)
            _write(target, key, layout, count, packed, name)
    except OSError as problem:
        raise ShardError(
            f"{folder}: the spool of {name} cannot be written ({one_line(problem.strerror or problem)}); "
            f"it takes {count * layout.bytes / 1e9:.2f} GB"
        ) from None
    return Spool(target, key, layout, device)


def _write(
    target: Path, key: str, layout: RowLayout, count: int, packed: Callable[[], Iterator[PackedRow]], name: str
) -> None:
    _remove_old(target, name)
    free = shutil.disk_usage(target.parent).free
    if free < count * layout.bytes:
        raise OSError(errno.ENOSPC, f"{free / 1e9:.2f} GB are free there")
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.mkdir()
    try:
        order_ids, digests = [], []
        with open(temporary / _ROWS, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, layout.bytes)}
            np.lib.format.write_array_header_1_0(file, header)
            offset = file.tell()
            with contextlib.closing(packed()) as rows:
                for order_id, digest, row in rows:
                    file.write(row)
                    order_ids.append(order_id)
                    digests.append(digest.hex())
            # Rows that were not to be trained on leave the file's end empty: it takes no room.
            file.flush()
            file.truncate(offset + count * layout.bytes)
            os.fsync(file.fileno())
        index = {"format": _FORMAT, "key": key, "source": name, "order_ids": order_ids, "digests": digests}
        write_synced(temporary / _INDEX, json.dumps(index).encode())
        sync(temporary)
        temporary.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_old(target: Path, name: str) -> None:
    """Removes spools of the same source as it was before, and what a killed process left."""
    for folder in target.parent.glob(".rows-*.tmp"):
        shutil.rmtree(folder)
    for folder in target.parent.glob("rows-*"):
        try:
            theirs = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["source"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if theirs == name:
            shutil.rmtree(folder)

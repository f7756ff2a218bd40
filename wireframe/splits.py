"""Splits of sampled rows: by name as on the hub, "dev-val" out of the train split, and lists of scenes to leave out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from wireframe.errors import ConfigError, SampleError, printable
from wireframe.files import read_at_most
from wireframe.samples import iter_sample_rows, list_parquet, open_sampled

# The published dev val: the last rows of the sampled train split.
DEV_VAL = 1024

DEV_VAL_SPLIT = "dev-val"

# The published list has 156 ids.
_MAX_LIST_BYTES = 16 << 20
_ID_ROWS = 4096


def split_ids(source: str | os.PathLike, split: str | None = "train") -> list[str]:
    """The order_ids of a split, in file order; the arrays are not read.

    Raises:
        ShardError: as ``wireframe.samples.iter_sample_rows``. SampleError: an id is no text.
    """
    return [order_id for path in list_parquet(source, split) for order_id in _ids(path, 0)]


def dev_val_ids(source: str | os.PathLike, count: int = DEV_VAL) -> list[str]:
    """The order_ids of the last ``count`` rows of the train split: shards by name, rows within; all where it has fewer.

    Raises:
        ShardError, SampleError: as ``split_ids``.
    """
    return [order_id for path, skip in _last_rows(source, count) for order_id in _ids(path, skip)]


def iter_split_rows(source: str | os.PathLike, split: str | None, dev_val: int = DEV_VAL) -> Iterator[dict]:
    """Rows ``{"order_id", "data"}`` of one split, in file order; only shards and row groups that hold some are read.

    Args:
        source: as ``wireframe.samples.list_parquet``.
        split: None for all rows; "train" (dev val included), "validation", "test"; or "dev-val", the last ``dev_val``
            rows of the train split.
        dev_val: how many rows dev val has.

    Raises:
        ShardError: as ``wireframe.samples.iter_sample_rows``.
    """
    if split != DEV_VAL_SPLIT:
        yield from iter_sample_rows(source, split=split)
        return
    for path, skip in _last_rows(source, dev_val):
        for batch in _batches_after(path, skip, ["order_id", "data"], 64):
            yield from batch.to_pylist()


def _last_rows(source: str | os.PathLike, count: int) -> list[tuple[str, int]]:
    """(shard, how many of its rows to skip) of the last ``count`` rows of the train split, in file order."""
    found: list[tuple[str, int]] = []
    for path in reversed(list_parquet(source, "train")):
        if count <= 0:
            break
        with open_sampled(path) as file:
            rows = file.metadata.num_rows
        found.append((path, max(rows - count, 0)))
        count -= rows
    return found[::-1]


def _ids(path: str, skip: int) -> Iterator[str]:
    for batch in _batches_after(path, skip, ["order_id"], _ID_ROWS):
        for order_id in batch.column(0).to_pylist():
            if not isinstance(order_id, str):
                raise SampleError(f"{path}: order_id {printable(repr(order_id))[:100]} is no text; leave this row out")
            yield order_id


def _batches_after(path: str, skip: int, columns: list[str], batch_rows: int) -> Iterator:
    """Arrow batches of the rows behind the first ``skip``; row groups that end before are not read."""
    with open_sampled(path) as file:
        groups = list(range(file.metadata.num_row_groups))
        while groups and (size := file.metadata.row_group(groups[0]).num_rows) <= skip:
            skip -= size
            groups.pop(0)
        if not groups:
            return
        for batch in file.iter_batches(batch_rows, row_groups=groups, columns=columns):
            kept = batch.slice(min(skip, len(batch)))
            skip -= len(batch) - len(kept)
            if len(kept):
                yield kept


def read_exclusions(path: str | os.PathLike) -> frozenset[str]:
    """The order_ids in a text file: one a line; blank lines and what stands behind a ``#`` do not count.

    Raises:
        ConfigError: the file cannot be read, is larger than 16 MiB, is not UTF-8, or a line is no id (several words,
            unprintable characters).
    """
    name = printable(os.fspath(path))
    try:
        data = read_at_most(path, _MAX_LIST_BYTES)
    except OSError as problem:
        raise ConfigError(f"cannot read the list of excluded scenes {name}: {problem.strerror}") from None
    if data is None:
        raise ConfigError(f"{name} is larger than {_MAX_LIST_BYTES >> 20} MiB; a list of scenes has one id a line")
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is not UTF-8 text; a list of scenes has one id a line") from None
    found = set()
    for number, line in enumerate(lines, 1):
        order_id = re.split(r"(?:^|\s)#", line.removesuffix("\r"))[0].strip(" \t")
        if not order_id:
            continue
        if not order_id.isprintable() or len(order_id.split()) > 1:
            raise ConfigError(f"{name}, line {number}: {printable(order_id)[:80]!r} is no scene id; give one id a line")
        found.add(order_id)
    return frozenset(found)

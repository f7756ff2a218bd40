"""Where training rows come from: Parquet shards of sampled rows, or rows made of hashes."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import re
from collections.abc import Iterator, Set
from typing import Any, NamedTuple

import numpy as np

from wireframe.errors import SampleError, ShardError, one_line, printable
from wireframe.hub import hub_files, is_hub
from wireframe.samples import iter_sample_rows, list_parquet, read_sample
from wireframe.sampling import SampledScene
from wireframe.splits import dev_val_ids, split_ids
from wireframe.train.made_rows import MadeRows, made_id, made_row
from wireframe.train.rows import RowLayout, row_digest

# Bytes at the end of a shard, where Parquet keeps the sizes and places of everything.
_END_BYTES = 1 << 16
_HUB_FACTS = ("size", "blob_id", "lfs", "etag")


class PackedRow(NamedTuple):
    """A scene to train on: its packed row uint8 [R] and the digest of id and row."""

    order_id: str
    digest: bytes
    row: np.ndarray


class ParquetSource:
    """The train split of Parquet shards.

    Attributes:
        name: for messages; path: what ``wireframe.evaluate`` takes.
        ids: list of the order_ids of all its rows, in file order.

    Raises:
        ShardError, SampleError: as ``wireframe.splits.split_ids``, or a scene is there twice.
    """

    def __init__(self, source: str | os.PathLike):
        self.path = os.fspath(source)
        self.name = printable(self.path)
        self.ids = split_ids(source)
        scene, count = collections.Counter(self.ids).most_common(1)[0] if self.ids else ("", 0)
        if count > 1:
            raise SampleError(
                f"{self.name} holds the scene {printable(scene)} {count} times; are the rows of two runs in one folder?"
            )

    def scenes(self, wanted: Set[str]) -> Iterator[SampledScene]:
        """The scenes whose ids are wanted, in file order; others are not decoded."""
        # No threads: decoding is Python's own work, and two threads were slower than one.
        return (read_sample(row) for row in iter_sample_rows(self.path, split="train") if row["order_id"] in wanted)

    def dev_val_ids(self, count: int) -> list[str]:
        """The order_ids of the last ``count`` rows, those that ``wireframe.evaluate`` scores as dev val."""
        return dev_val_ids(self.path, count)

    def key(self) -> Any:
        """What changes when the shards do: their names, sizes, times and ends; plain values."""
        shards = list_parquet(self.path, "train")
        return [[os.path.basename(path), *(_hub_facts(path) if is_hub(path) else _file_facts(path))] for path in shards]

    def missing_shards(self) -> str:
        """The gap in shards named ``...-00000-of-00012...``, as text; empty where there is none."""
        numbered = collections.defaultdict(set)
        for path in list_parquet(self.path, "train"):
            if found := re.search(r"(.*)-(\d{5})-of-(\d{5})", path):
                numbered[found[1], int(found[3])].add(int(found[2]))
        for (stem, total), there in numbered.items():
            lacking = [number for number in range(min(total, 99_999)) if number not in there]
            # Somebody who names one file wants that file.
            if lacking and self.path != f"{stem}-{min(there):05d}-of-{total:05d}.parquet":
                return f"{printable(stem)}-{lacking[0]:05d}-of-{total:05d}" + (
                    f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
                )
        return ""


class MadeSource:
    """Rows made of hashes, as a source; attributes and methods of ``ParquetSource``."""

    path = None

    def __init__(self, source: MadeRows):
        self._made = source
        self.name = f"made rows of {source.points} points"
        self.ids = [made_id(index, source.seed) for index in range(source.count)]

    def scenes(self, wanted: Set[str]) -> Iterator[SampledScene]:
        chosen = [index for index, order_id in enumerate(self.ids) if order_id in wanted]
        return (made_row(self._made.points, index, self._made.seed) for index in chosen)

    def dev_val_ids(self, count: int) -> list[str]:
        return self.ids[max(len(self.ids) - count, 0) :]

    def key(self) -> Any:
        return ["made", self._made.points, self._made.count, self._made.seed]

    def missing_shards(self) -> str:
        return ""


def open_source(source: str | os.PathLike | MadeRows) -> ParquetSource | MadeSource:
    """The train split of a source.

    Raises:
        ShardError, SampleError: as ``ParquetSource``.
    """
    return MadeSource(source) if isinstance(source, MadeRows) else ParquetSource(source)


def packed_rows(source: ParquetSource | MadeSource, wanted: Set[str], layout: RowLayout) -> Iterator[PackedRow]:
    """Packed rows of the wanted scenes that have 1 to ``layout.segments`` edges, in file order.

    Raises:
        ShardError, SampleError: a shard or row cannot be read, or rows have different numbers of points.
    """
    for scene in source.scenes(wanted):
        if 0 < len(scene.gt_segments) <= layout.segments:
            row = layout.pack(scene)
            yield PackedRow(scene.order_id, row_digest(scene.order_id, row), row)


def source_key(source: ParquetSource | MadeSource, wanted: Set[str], layout: RowLayout) -> str:
    """SHA-256 of what the packed rows of a source depend on."""
    facts = [source.key(), sorted(wanted), layout.points, layout.segments]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _file_facts(path: str) -> list:
    try:
        found = os.stat(path)
        with open(path, "rb") as file:
            file.seek(max(found.st_size - _END_BYTES, 0))
            return [found.st_size, found.st_mtime_ns, hashlib.sha256(file.read()).hexdigest()]
    except OSError as problem:
        raise ShardError(f"{printable(path)}: cannot be read ({problem.strerror}); fetch or write it again") from None


def _hub_facts(path: str) -> list:
    try:
        found = hub_files().info(path)
    except Exception as problem:  # The hub's client raises HTTP errors of several packages.
        raise ShardError(f"{path}: cannot be looked up ({one_line(problem)})") from None
    return [str(found.get(name)) for name in _HUB_FACTS]

"""The scenes of a source, raw tars or Parquet shards of sampled rows, read by threads that work ahead of the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import TypeVar

from wireframe.ahead import in_order
from wireframe.errors import ConfigError, Failure, ShardError, WireframeError
from wireframe.fusion import fuse_views
from wireframe.hub import is_hub
from wireframe.samples import is_sampled, list_parquet, read_sample
from wireframe.sampling import SampledScene, sample_points
from wireframe.scene import read_scene
from wireframe.shards import iter_rows, list_shards
from wireframe.splits import DEV_VAL, DEV_VAL_SPLIT, iter_split_rows

Known = TypeVar("Known")


class SceneSource:
    """Where scenes come from.

    Args:
        source: raw tars or Parquet shards: a file, folder, glob or ``hf://...``.
        num_points: how many points a raw scene is sampled to.
        sampled: whether it holds sampled rows; None to see by the names of its files.
        split, dev_val: of sampled rows, as ``splits.iter_split_rows`` takes them.
        limit: only the first so many scenes.
        workers: threads that read ahead; with 1 nothing runs ahead.
        whole: raise where the source breaks off, rather than give its end as a failure.
        convert: what a row becomes; default: the ``SampledScene`` of a sampled or a raw row.

    Raises:
        ShardError: the source holds no shard, or none of the split. ConfigError: a split of raw scenes.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        num_points: int,
        *,
        sampled: bool | None = None,
        split: str | None = None,
        dev_val: int = DEV_VAL,
        limit: int | None = None,
        workers: int = 1,
        whole: bool = False,
        convert: Callable[[dict], object] | None = None,
    ) -> None:
        self.name = os.fspath(source)
        self.sampled = is_sampled(source) if sampled is None else sampled
        if split is not None and not self.sampled:
            raise ConfigError(f"{self.name} holds raw scenes, which have no split {split!r}: leave it out")
        of = "train" if split == DEV_VAL_SPLIT else split
        self.shards = list_parquet(source, of) if self.sampled else list_shards(source)
        self.split, self.dev_val, self.limit, self.workers, self.whole = split, dev_val, limit, workers, whole
        self._num_points = num_points
        self._convert = convert or (read_sample if self.sampled else self._read_raw)
        # Several workers have a core each; one has those that the model does not use at that moment.
        self._threads = None if workers == 1 else 1

    def identity(self) -> dict:
        """What tells this source from another one, and from itself with other files, in plain JSON values."""
        return {**self.describe(), "shards": [_identity(path) for path in self.shards]}

    def describe(self) -> dict:
        """Its name and split, in plain JSON values."""
        split = {} if self.split is None else {"split": self.split}
        return {"name": self.name, **split, **({"dev_val": self.dev_val} if self.split == DEV_VAL_SPLIT else {})}

    def title(self) -> str:
        """The split in words, so that the official validation split and dev val are not taken for each other."""
        if self.split is None:
            return ""
        if self.split == DEV_VAL_SPLIT:
            return f"dev val (the last {self.dev_val} rows of the train split) of {self.name}"
        return f"the {'official ' if self.split == 'validation' else ''}{self.split} split of {self.name}"

    def expected(self) -> int | None:
        """At most how many scenes there are, where that is known."""
        known = [self.limit, self.dev_val if self.split == DEV_VAL_SPLIT else None]
        return min((count for count in known if count is not None), default=None)

    def read(
        self, known: Callable[[int, dict], Known | None] = lambda index, row: None
    ) -> Iterator[tuple[int | None, SampledScene | Failure | Known]]:
        """The scenes by the position of their row, in order, or why one cannot be read.

        Where the source breaks off, the last pair is None and the reason.

        Args:
            known: what it gives, unless None, stands in for the scene of (position, row), which is not read then.

        Raises:
            ShardError: the source breaks off, and was wanted whole.
        """

        def attempt(pair: tuple[int, dict]) -> tuple[int, SampledScene | Failure | Known]:
            index, row = pair
            found = known(index, row)
            if found is not None:
                return index, found
            try:
                return index, self._convert(row)
            except WireframeError as problem:
                return index, Failure(str(row.get("order_id")), str(problem))

        try:
            with closing(in_order(attempt, enumerate(self._rows()), self.workers)) as pairs:
                yield from pairs
        except ShardError as problem:
            if self.whole:
                raise
            yield None, Failure(self.name, str(problem))

    def _rows(self) -> Iterable[dict]:
        if not self.sampled:
            return iter_rows(self.name, self.limit)
        return islice(iter_split_rows(self.name, self.split, self.dev_val), self.limit)

    def _read_raw(self, row: dict) -> SampledScene:
        return sample_points(
            fuse_views(read_scene(row), threads=self._threads), self._num_points, threads=self._threads
        )


def _identity(path: str) -> list:
    if is_hub(path):
        return [path]
    status = os.stat(path)
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]

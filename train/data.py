"""Training sets, resident on the device or on disk, and batches that are functions of (seed, step, scene) alone."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wireframe import hashing
from wireframe.errors import ConfigError, SampleError
from wireframe.sampling import SampledScene
from wireframe.train.augment import draw_points, turn, turns
from wireframe.train.config import AugmentConfig, TrainConfig
from wireframe.train.made_rows import MadeRows
from wireframe.train.resident import Resident, free_bytes, moved
from wireframe.train.rows import RowLayout, row_digest
from wireframe.train.sources import MadeSource, PackedRow, ParquetSource, open_source, packed_rows, source_key
from wireframe.train.spool import Spool, open_spool

# Epochs whose order is kept: a batch lies in two at most, and the caller asks ahead.
_EPOCHS_KEPT = 4


class Batch(NamedTuple):
    """Scenes for one gradient, all on the set's device.

    Attributes:
        inputs: name -> [b, T, ...], what the model takes.
        target: float32 [b, S, 2, 3], normalised segments, zeros behind the real ones; target_mask: bool [b, S].
        scene_keys: int64 [b], ``hashing.key_bits`` of the scenes.
    """

    inputs: dict[str, Tensor]
    target: Tensor
    target_mask: Tensor
    scene_keys: Tensor


def set_for(stage_points: int, available: Iterable[int], resample: bool) -> int | None:
    """Which set a stage of ``stage_points`` points is trained on.

    Args:
        available: numbers of points of the sets that are there.
        resample: ``augment.resample``, whether points may be drawn from larger rows.

    Returns:
        The set's number of points: the stage's own, else with ``resample`` the next larger; None where there is none.
    """
    found = min((points for points in available if points >= stage_points), default=None)
    return found if resample or found == stage_points else None


class TrainingSet:
    """Sampled scenes to train on, addressed by their place in the sorted list of ids.

    Attributes:
        order_ids: list of N scene ids, sorted, so that the order of files on disk does not matter.
        points: T of the rows.
        source: where they come from, as ``wireframe.evaluate`` takes it; None for rows without files.
        device: where batches come; resident: whether the rows are there, or on disk.
    """

    def __init__(self, store: Resident | Spool, layout: RowLayout, source: str | None = None):
        self._store, self._layout, self.source = store, layout, source
        self.points, self.device, self.resident = layout.points, store.device, store.resident
        places = sorted(range(len(store.order_ids)), key=store.order_ids.__getitem__)
        self._places = np.array(places, dtype=np.int64)
        self.order_ids = [store.order_ids[place] for place in places]
        self._keys = hashing.key_bits(self.order_ids)
        self._fingerprint = hashlib.sha256(b"".join(store.digests[place] for place in places)).hexdigest()
        self._epochs: dict[tuple[int, int, int], np.ndarray] = {}
        # Places and keys as tensors, once they are asked for.
        self._on_device: tuple[Tensor, ...] | None = None

    @classmethod
    def from_scenes(
        cls, scenes: Sequence[SampledScene], max_segments: int, device: str | torch.device = "cpu"
    ) -> TrainingSet:
        """A resident set of scenes in memory.

        Raises:
            SampleError: no scene, a scene with more than ``max_segments`` segments, or different numbers of points.
        """
        if not scenes:
            raise SampleError("a training set needs a scene")
        layout = RowLayout(len(scenes[0].mask), max_segments)
        packed = ((scene.order_id, layout.pack(scene)) for scene in scenes)
        rows = (PackedRow(order_id, row_digest(order_id, row), row) for order_id, row in packed)
        return cls(Resident(rows, len(scenes), layout, torch.device(device)), layout)

    def __len__(self) -> int:
        return len(self.order_ids)

    def fingerprint(self) -> str:
        """SHA-256 over the digests of the scenes (id, inputs, targets) in the order of their ids."""
        return self._fingerprint

    def order(self, seed: int, stage: int, start: int, size: int) -> np.ndarray:
        """int64 [size]: scenes ``start .. start + size`` of a stage's endless sequence of shuffled epochs.

        Within an epoch a scene's place among others does not depend on which further scenes the set has.
        """
        positions = np.arange(start, start + size)
        index = np.empty(size, dtype=np.int64)
        for epoch in np.unique(positions // len(self)).tolist():
            here = positions // len(self) == epoch
            index[here] = self._epoch(seed, stage, epoch)[positions[here] % len(self)]
        return index

    def _epoch(self, seed: int, stage: int, epoch: int) -> np.ndarray:
        key = (seed, stage, epoch)
        if key not in self._epochs:
            while len(self._epochs) >= _EPOCHS_KEPT:
                del self._epochs[next(iter(self._epochs))]
            hashes = hashing.hash64(seed, epoch, hashing.EPOCH_ORDER + stage, self._keys.view(np.uint64))
            self._epochs[key] = np.argsort(hashes, kind="stable")
        return self._epochs[key]

    def batch(self, seed: int, step: int, rows: np.ndarray, augment: AugmentConfig, points: int | None = None) -> Batch:
        """The scenes ``rows``, augmented: a function of (seed, step, scene) alone for each of them.

        Args:
            seed, step: with the scene, the key of the augmentation.
            rows: int64 [b], places in ``order_ids``.
            augment: which augmentations to use.
            points: T of the batch; fewer than the rows have only with ``augment.resample``. None: all.

        Raises:
            ConfigError: the rows do not have that many points. ShardError: rows on disk cannot be read.
        """
        drawn = self._drawn(augment, points)
        return self._finish(seed, step, rows, self._store.fetch(self._places[rows]), augment, drawn)

    def batches(
        self,
        requests: Iterable[tuple[int, np.ndarray]],
        seed: int,
        augment: AugmentConfig,
        points: int | None = None,
    ) -> Iterator[Batch]:
        """``batch`` of every (step, rows), in order; rows on disk are read ahead by a thread until it is closed.

        Raises:
            ConfigError, at once, and ShardError, at the request: as ``batch``. WireframeError: reading ahead failed.
        """
        drawn = self._drawn(augment, points)

        def finished() -> Iterator[Batch]:
            fetched = self._store.fetch_all(requests, lambda request: self._places[request[1]])
            try:
                for (step, rows), packed in fetched:
                    yield self._finish(seed, step, rows, packed, augment, drawn)
            finally:
                fetched.close()

        return finished()

    def _drawn(self, augment: AugmentConfig, points: int | None) -> int | None:
        """How many points to draw from every row, None for all."""
        if points is None or points == self.points:
            return None
        if set_for(points, (self.points,), augment.resample) is not None:
            return points
        advice = "; augment.resample=true would draw them" if points < self.points else ""
        raise ConfigError(f"a stage of {points} points cannot use rows of {self.points}{advice}")

    def _finish(
        self, seed: int, step: int, rows: np.ndarray, packed: Tensor, augment: AugmentConfig, drawn: int | None
    ) -> Batch:
        keys = moved(torch.from_numpy(self._keys[rows]), self.device)
        coefficients = self.turns(seed, step, rows, augment)
        if coefficients is not None:
            coefficients = moved(coefficients, self.device)
        return self._made(seed, step, keys, packed, coefficients, drawn)

    def turns(self, seed: int, step: int, rows: np.ndarray, augment: AugmentConfig) -> Tensor | None:
        """Coefficients float32 [b, 4] on the CPU of the turns of the scenes ``rows``; None where nothing is turned."""
        return turns(seed, step, self._keys[rows], augment) if augment.rotate or augment.flip else None

    def batch_on_device(
        self, seed: int, step: Tensor, rows: Tensor, coefficients: Tensor | None, augment: AugmentConfig, points: int
    ) -> Batch:
        """``batch`` of a resident set by operations of the device alone, as a graph can hold them.

        Args:
            step: int64 []. rows: int64 [b]. coefficients: float32 [b, 4] of ``turns``. All on the device.
        """
        if self._on_device is None:
            tables = (torch.from_numpy(self._places), torch.from_numpy(self._keys))
            self._on_device = tuple(table.to(self.device) for table in tables)
        places, keys = (table.index_select(0, rows) for table in self._on_device)
        return self._made(seed, step, keys, self._store.gather(places), coefficients, self._drawn(augment, points))

    def _made(
        self, seed: int, step: int | Tensor, keys: Tensor, packed: Tensor, coefficients: Tensor | None,
        drawn: int | None,
    ) -> Batch:  # fmt: skip
        inputs = self._layout.unpack(packed)
        target, target_mask = inputs.pop("segments"), inputs.pop("segment_mask")
        if drawn is not None:
            index, kept = draw_points(seed, step, keys, inputs["mask"], drawn)
            inputs = {name: tensor.gather(1, _like(index, tensor)) for name, tensor in inputs.items()}
            inputs["mask"] = kept
        if coefficients is not None:
            inputs["xyz_norm"] = turn(inputs["xyz_norm"], coefficients)
            target = turn(target, coefficients)
        return Batch(inputs, target, target_mask, keys)


def _like(index: Tensor, tensor: Tensor) -> Tensor:
    """The index [B, T] for a gather from [B, P] or [B, P, 3]."""
    return index if tensor.dim() == 2 else index[..., None].expand(-1, -1, tensor.shape[2])


def load_training_sets(
    sources: Sequence[str | os.PathLike | MadeRows],
    config: TrainConfig,
    *,
    exclude: Set[str] = frozenset(),
    device: str | torch.device = "cpu",
    stream: bool | None = None,
    spool: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[int, TrainingSet]:
    """The train split of every source, by its number of points: scenes with 1 to ``config.model.segments`` edges.

    The last ``config.dev_val`` rows of each source's train split are left out of all of them. A set lies on ``device``
    when it takes at most half of what is free there, else on disk; the order and the bits of batches are the same.

    Args:
        sources: sampled rows in Parquet (files, folders, globs, ``hf://``), or made rows.
        config: of the run.
        exclude: ids of scenes not to train on; dev val keeps them.
        device: where batches are wanted.
        stream: True for all sets on disk, False for none, None as they fit.
        spool: folder for sets on disk, which the next start finds again.
        say: told in one line each what was held out, left out and loaded; None writes to stderr.

    Raises:
        ShardError, SampleError: shards or rows cannot be read, hold a scene twice or different numbers of points, or no
            scene is left. ConfigError: two sources have one number of points, or a set fits nowhere.
    """
    say = say or _to_stderr
    opened = [open_source(source) for source in sources]
    held_out = [source.dev_val_ids(config.dev_val) for source in opened]
    left_out = _say_left_out(opened, held_out, exclude, config.dev_val, say)
    sets: dict[int, TrainingSet] = {}
    layouts: dict[int, RowLayout] = {}
    wanted = [frozenset(source.ids) - left_out for source in opened]
    for source, ids in zip(opened, wanted):
        layout = RowLayout(_points(source, ids, left_out - exclude), config.model.segments)
        if layout.points in layouts:
            raise ConfigError(f"two --data have rows of {layout.points} points; give one set for each number of points")
        layouts[layout.points] = layout
    for source, ids, layout in zip(opened, wanted, layouts.values()):
        if gap := source.missing_shards():
            say(f"warning: {source.name} lacks the shard {gap}; a whole download has other rows and another dev val")
        store = _store(source, ids, layout, torch.device(device), stream, spool, say)
        if not store.order_ids:
            raise SampleError(
                f"{source.name} has no scene to train on: none of {len(ids)} has 1 to {layout.segments} edges; "
                "raise model.segments"
            )
        found = sets[layout.points] = TrainingSet(store, layout, source.path)
        place = f"on {found.device}" if found.resident else f"on disk in {spool}"
        unfit = len(ids) - len(found)
        say(
            f"{source.name}: {len(found)} scenes of {found.points} points {place} "
            f"({len(found) * layout.bytes / 1e9:.2f} GB)"
            + (f"; {unfit} more do not have 1 to {layout.segments} edges" if unfit else "")
        )
    return sets


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _say_left_out(
    sources: list[ParquetSource | MadeSource],
    held_out: list[list[str]],
    exclude: Set[str],
    dev_val: int,
    say: Callable[[str], None],
) -> frozenset[str]:
    """Ids that no set may train on; says how many there are and where they come from."""
    held = [frozenset(ids) for ids in held_out]
    both = frozenset().union(*held)
    if dev_val and sources:
        parts = " and ".join(
            f"the last {len(ids)} of {len(source.ids)} rows of {source.name}" for source, ids in zip(sources, held)
        )
        common = len(frozenset.intersection(*held))
        shared = f"; {common} scenes in common, {len(both)} left out of every set" if len(sources) > 1 else ""
        say(f"dev-val: {parts}{shared}")
    if exclude:
        found = exclude & frozenset(order_id for source in sources for order_id in source.ids)
        say(f"excluded: {len(found)} of the {len(exclude)} listed scenes are in the data")
    return both | frozenset(exclude)


def _points(source: ParquetSource | MadeSource, wanted: Set[str], held: Set[str]) -> int:
    """The number of points of a source's rows, from the first of them that is wanted."""
    if not source.ids:
        raise SampleError(f"{source.name} has no rows; make some with `wireframe prepare`")
    if not wanted:
        count = len(held.intersection(source.ids))
        raise SampleError(
            f"{source.name} has no scene left to train on: of {len(source.ids)} rows {count} are dev-val and "
            f"{len(source.ids) - count} excluded; lower dev_val"
        )
    first = next(order_id for order_id in source.ids if order_id in wanted)
    with contextlib.closing(source.scenes({first})) as scenes:
        return len(next(scenes).mask)


def _store(
    source: ParquetSource | MadeSource,
    wanted: Set[str],
    layout: RowLayout,
    device: torch.device,
    stream: bool | None,
    spool: Path | None,
    say: Callable[[str], None],
) -> Resident | Spool:
    """The packed rows of a source: on the device or on disk."""

    def packed() -> Iterator[PackedRow]:
        return packed_rows(source, wanted, layout)

    size = len(wanted) * layout.bytes
    if stream is None:
        stream = size > free_bytes(device) // 2
    if not stream:
        with contextlib.closing(packed()) as rows:
            return Resident(rows, len(wanted), layout, device)
    if spool is None:
        raise ConfigError(f"{source.name} takes {size / 1e9:.2f} GB, too much for {device}; name a folder to spool it")
    return open_spool(
        Path(spool), source_key(source, wanted, layout), layout, len(wanted), packed, source.name, device, say
    )

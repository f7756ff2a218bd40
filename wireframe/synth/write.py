"""Writes synthetic scenes to .tar shards with a pool of processes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from wireframe.errors import ConfigError, ShardError
from wireframe.files import atomic_write, sha256
from wireframe.images import encode_png
from wireframe.synth.config import SynthConfig
from wireframe.synth.scene import make_scene


def write_shards(out_dir: str | os.PathLike, seed: int, start: int = 0, count: int = 100,
                 config: SynthConfig = SynthConfig(), shard_size: int = 64, workers: int = 1,
                 progress: bool = False) -> list[str]:
    """Writes scenes ``start`` to ``start + count - 1`` as ``synth-{seed}-{first:06d}.tar`` shards.

    Every shard gets a note beside it (``.tar.json``) of what it was made from and its SHA-256; a finished
    shard whose note and bytes still agree is kept. The bytes of a shard do not depend on ``workers``.

    Args:
        shard_size: scenes a shard, the last one may hold fewer.
        workers: processes; 1 makes the scenes in this one.
        progress: whether to show a progress bar on stderr.

    Returns:
        The shards' paths, in order.

    Raises:
        ConfigError: a count below 1 or a negative start, or an impossible configuration.
        ShardError: the folder or a shard cannot be written.
    """
    for name, value in (("count", count), ("shard_size", shard_size), ("workers", workers)):
        if value < 1:
            raise ConfigError(f"{name} is {value}: must be 1 or more")
    if start < 0:
        raise ConfigError(f"start is {start}: must be 0 or more")
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShardError(f"cannot make the folder {folder}: {error.strerror}") from None
    from tqdm import tqdm

    paths = []
    with _Rows(seed, config, workers) as rows, tqdm(total=count, disable=not progress, unit="scene") as bar:
        for first in range(start, start + count, shard_size):
            indices = range(first, min(first + shard_size, start + count))
            path = folder / f"synth-{seed}-{first:06d}.tar"
            _write_shard(path, indices, rows, _recipe(seed, indices, config), bar.update)
            paths.append(str(path))
    return paths


def encoded_scene(seed: int, index: int, config: SynthConfig) -> dict:
    """``make_scene`` with the images as PNG bytes, which is how scenes travel between processes."""
    row = make_scene(seed, index, config)
    for column in ("ade", "gestalt", "depth"):
        row[column] = [None if image is None else encode_png(image) for image in row[column]]
    return row


class _Rows:
    """Encoded scenes in order, made here or by a pool that is started on first use."""

    def __init__(self, seed: int, config: SynthConfig, workers: int) -> None:
        self._make = functools.partial(_encoded_at, seed, config)
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def over(self, indices: range) -> Iterator[dict]:
        if self._workers == 1:
            return map(self._make, indices)
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self._workers, mp_context=multiprocessing.get_context("spawn"))
        return self._pool.map(self._make, indices)


def _encoded_at(seed: int, config: SynthConfig, index: int) -> dict:
    return encoded_scene(seed, index, config)


def _write_shard(path: Path, indices: range, rows: _Rows, recipe: dict,
                 report: Callable[[int], object]) -> None:
    from wireframe.shards import ShardWriter

    note = path.with_name(path.name + ".json")
    if _is_finished(path, note, recipe):
        report(len(indices))
        return
    try:
        note.unlink(missing_ok=True)
        with ShardWriter(path) as writer:
            for row in rows.over(indices):
                writer.write(row)
                report(1)
        text = json.dumps({**recipe, "sha256": sha256(path)}, indent=1, sort_keys=True)
        with atomic_write(note) as file:
            file.write(text.encode() + b"\n")
    except BrokenProcessPool:
        raise ShardError(f"{path} is not written: a worker process died; try fewer workers") from None
    except OSError as error:
        raise ShardError(f"cannot write {path}: {error.strerror}") from None


def _recipe(seed: int, indices: range, config: SynthConfig) -> dict:
    """All that a shard's bytes depend on."""
    import numpy
    import PIL

    versions = {"numpy": numpy.__version__, "pillow": PIL.__version__, "zlib": zlib.ZLIB_RUNTIME_VERSION}
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    return {"seed": seed, "start": indices.start, "count": len(indices), "config": settings,
            "generator": _generator_hash(), "versions": versions}


@functools.lru_cache(maxsize=1)
def _generator_hash() -> str:
    """SHA-256 of the source that a shard's bytes come from, so that shards of an older generator are made anew."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    shared = [folder.parent / name for name in ("classes.py", "hashing.py", "images.py", "shard_writer.py")]
    for path in [*sorted(folder.glob("*.py")), *shared]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _is_finished(path: Path, note: Path, recipe: dict) -> bool:
    try:
        written = json.loads(note.read_text())
        return written == {**recipe, "sha256": sha256(path)}
    except (OSError, ValueError):
        return False

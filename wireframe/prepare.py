"""Raw shards to sampled Parquet shards: one Parquet file for each tar, resumable, the same bytes for any worker count.

``manifest.json`` in the output folder lists the finished shards with their SHA-256, the settings, and every scene that
was left out with its reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from wireframe.errors import ConfigError, ShardError, WireframeError
from wireframe.files import atomic_write
from wireframe.fusion import fuse_views
from wireframe.raw_rows import build_row
from wireframe.samples import write_parquet, write_sample
from wireframe.sampling import sample_points
from wireframe.scene import read_scene
from wireframe.shards import RawSample, iter_samples, list_shards

MANIFEST = "manifest.json"
MAX_EDGES = 64
# Raw samples waiting for each worker: enough to keep it busy, few enough to bound memory.
_WAITING_PER_WORKER = 4


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What a sampled row depends on. Rows with no ground truth, or more than 64 edges, are left out unless
    ``keep_all``."""

    num_points: int = 4096
    depth_points_per_view: int = 8000
    seed: int = 0
    keep_all: bool = False


class Skipped(NamedTuple):
    """A scene that gave no row."""

    order_id: str
    reason: str


class Report(NamedTuple):
    """Counts of one run of ``prepare``: shards written and found finished, rows, and the scenes left out."""

    shards: int
    resumed: int
    rows: int
    skipped: list[Skipped]


def prepare(
    source: str | os.PathLike,
    out: str | os.PathLike,
    config: PrepareConfig = PrepareConfig(),
    *,
    workers: int = 1,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> Report:
    """Fuses and samples every raw scene of ``source``.

    Args:
        source: a tar, a folder or glob of tars, or ``hf://...``.
        out: folder for the Parquet shards, one for each tar and named after it.
        config: what the rows depend on.
        workers: processes; 1 works in this one. The bytes do not depend on it.
        shard: (i, n) takes every n-th tar from the i-th, so that n machines can share the work.
        progress: whether to show a progress bar on stderr.

    Raises:
        ConfigError: ``out`` was prepared with other settings. ShardError: ``source`` holds no tar.
    """
    from tqdm import tqdm

    index, count = shard
    if not 0 <= index < count:
        raise ConfigError(f"--shard takes i/n with 0 <= i < n, got {index}/{count}")
    tars = list_shards(source)
    names = [_parquet_name(tar) for tar in tars]
    if len(set(names)) != len(names):
        raise ConfigError(f"two tars of {os.fspath(source)} have the same file name; prepare their folders apart")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    manifest = _Manifest(out, config)
    totals = Report(0, 0, 0, [])
    with _pool(workers) as pool, tqdm(disable=not progress, desc="prepare", unit="scene") as bar:
        for tar, name in list(zip(tars, names))[index::count]:
            finished = manifest.finished(name)
            if finished is not None:
                totals = totals._replace(resumed=totals.resumed + 1, rows=totals.rows + finished["rows"])
                continue
            rows, skipped = _prepare_tar(tar, config, pool, workers, bar)
            write_parquet(rows, out / name)
            manifest.add(name, len(rows), skipped)
            totals = Report(totals.shards + 1, totals.resumed, totals.rows + len(rows), totals.skipped + skipped)
    return totals


def prepare_scene(sample: RawSample, config: PrepareConfig) -> dict | Skipped:
    """The sampled row of one raw sample, or why it has none."""
    row = build_row(sample.key, sample.members)
    if row is None:
        return Skipped(sample.key, f"no member is a column of a raw scene (the first is {sample.paths[0]!r})")
    try:
        scene = read_scene(row)
    except WireframeError as problem:
        return Skipped(sample.key, str(problem))
    edges = len(scene.edges)
    if not config.keep_all and not 0 < edges <= MAX_EDGES:
        return Skipped(scene.order_id, f"{edges} ground-truth edges, expected 1 to {MAX_EDGES}")
    points = fuse_views(scene, config.depth_points_per_view, config.seed)
    return write_sample(sample_points(points, config.num_points, config.seed))


def _prepare_tar(tar, config, pool, workers, bar) -> tuple[list[dict], list[Skipped]]:
    rows: list[dict] = []
    skipped: list[Skipped] = []
    try:
        for result in _in_order(iter_samples(tar), config, pool, workers):
            (skipped if isinstance(result, Skipped) else rows).append(result)
            bar.update()
    except ShardError as problem:
        # What came before the damage is good; the damage is reported like a bad scene.
        skipped.append(Skipped(os.path.basename(tar), str(problem)))
    return rows, skipped


def _in_order(samples: Iterator[RawSample], config: PrepareConfig, pool, workers: int) -> Iterator[dict | Skipped]:
    if pool is None:
        for sample in samples:
            yield prepare_scene(sample, config)
        return
    waiting: list[Future] = []
    damage: ShardError | None = None
    try:
        for sample in samples:
            waiting.append(pool.submit(prepare_scene, sample, config))
            if len(waiting) > workers * _WAITING_PER_WORKER:
                yield waiting.pop(0).result()
    except ShardError as problem:
        damage = problem
    for future in waiting:
        yield future.result()
    if damage is not None:
        raise damage


class _NoPool:
    def __enter__(self):
        return None

    def __exit__(self, *_):
        pass


def _pool(workers: int):
    # Spawned, not forked: a forked child of a process that has run torch can hang.
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 else _NoPool()


def _parquet_name(tar: str) -> str:
    name = os.path.basename(tar)
    for suffix in (".gz", ".tgz", ".tar"):
        name = name.removesuffix(suffix)
    return f"{name}.parquet"


class _Manifest:
    """The finished shards of an output folder and the settings they were made with."""

    def __init__(self, out: Path, config: PrepareConfig):
        self._out, self._path = out, out / MANIFEST
        self._data = {"config": dataclasses.asdict(config), "shards": {}}
        try:
            found = json.loads(self._path.read_text())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as problem:
            raise ConfigError(f"{self._path} is not readable ({problem}); choose another output folder") from None
        if not isinstance(found, dict) or found.get("config") != self._data["config"]:
            raise ConfigError(f"{out} was prepared with other settings; choose another output folder")
        self._data = found

    def finished(self, name: str) -> dict | None:
        """The entry of a shard that is complete on disk."""
        entry = self._data["shards"].get(name)
        path = self._out / name
        if entry is None or not path.is_file() or _sha256(path) != entry["sha256"]:
            return None
        return entry

    def add(self, name: str, rows: int, skipped: list[Skipped]) -> None:
        self._data["shards"][name] = {
            "rows": rows,
            "sha256": _sha256(self._out / name),
            "skipped": [list(scene) for scene in skipped],
        }
        with atomic_write(self._path) as file:
            file.write(json.dumps(self._data, indent=1, sort_keys=True).encode())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

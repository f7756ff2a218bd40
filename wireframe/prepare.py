"""Raw shards to sampled Parquet shards: one Parquet file for each tar, resumable, the same bytes for any worker count.

The manifest is a note for each finished shard, ``.manifest/NAME.json``: its SHA-256, the settings, the size of the tar,
and every scene that was left out with its reason. One note a shard, so that several machines can share a folder; the
leading dot keeps ``load_dataset`` from reading the notes as data.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Here, before there are threads: those that import modules of one circle at the same time can meet them half made.
import wireframe.kernels.ops  # noqa: F401
from wireframe.ahead import in_order
from wireframe.errors import ConfigError, ShardError, WireframeError
from wireframe.files import atomic_write, sha256
from wireframe.fusion import fuse_views
from wireframe.raw_rows import build_row
from wireframe.samples import read_sample, write_parquet, write_sample
from wireframe.sampling import SAMPLERS, sample_points
from wireframe.scene import read_scene
from wireframe.shards import RawSample, iter_samples, list_shards

MANIFEST = ".manifest"
MAX_EDGES = 64
MAX_POINTS = 1 << 16


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What a sampled row depends on. Rows with no ground truth, or more than 64 edges, are left out unless
    ``keep_all``; ``sampler`` is one of ``sampling.SAMPLERS``."""

    num_points: int = 4096
    depth_points_per_view: int = 8000
    seed: int = 0
    keep_all: bool = False
    sampler: str = "priority"


class Skipped(NamedTuple):
    """A scene that gave no row."""

    order_id: str
    reason: str


class Report(NamedTuple):
    """Counts of one run of ``prepare``: shards written and found finished, their rows, and the scenes left out.

    ``damaged``: tars that broke off; what came before is prepared, and the next run tries them again.
    """

    shards: int = 0
    resumed: int = 0
    rows: int = 0
    skipped: tuple[Skipped, ...] = ()
    damaged: tuple[Skipped, ...] = ()


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
        workers: threads, each on a scene of its own, from the decoding on; 1 works in this one. The bytes do not
            depend on it.
        shard: (i, n) takes every n-th tar from the i-th, so that n machines can share the work.
        progress: whether to show a progress bar on stderr.

    Raises:
        ConfigError: ``out`` was prepared with other settings, or an impossible setting. ShardError: ``source`` holds
            no tar.
    """
    from tqdm import tqdm

    if config.sampler not in SAMPLERS:
        raise ConfigError(f"unknown sampler {config.sampler!r}; choose one of {', '.join(SAMPLERS)}")
    if config.num_points > MAX_POINTS:
        raise ConfigError(f"--points is {config.num_points}, above the cap of {MAX_POINTS}")
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
    totals = Report()
    with tqdm(disable=not progress, desc="prepare", unit="scene") as bar:
        for tar, name in list(zip(tars, names))[index::count]:
            note = manifest.finished(name, tar)
            if note is None:
                rows, skipped, damage = _prepare_tar(tar, config, workers, bar)
                if damage is not None and not rows:
                    totals = totals._replace(damaged=(*totals.damaged, Skipped(os.path.basename(tar), damage)))
                    continue
                write_parquet(rows, out / name)
                note = manifest.add(name, tar, len(rows), skipped, damage)
                totals = totals._replace(shards=totals.shards + 1)
            else:
                totals = totals._replace(resumed=totals.resumed + 1)
            totals = _counted(totals, note)
    return totals


def _counted(totals: Report, note: dict) -> Report:
    damage = () if note["damage"] is None else (Skipped(note["tar"], note["damage"]),)
    return totals._replace(
        rows=totals.rows + note["rows"],
        skipped=totals.skipped + tuple(Skipped(*scene) for scene in note["skipped"]),
        damaged=totals.damaged + damage,
    )


def prepare_scene(sample: RawSample, config: PrepareConfig) -> dict | Skipped:
    """The sampled row of one raw sample, or why it has none; the work of one thread."""
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
    points = fuse_views(scene, config.depth_points_per_view, config.seed, threads=1)
    with np.errstate(over="ignore", invalid="ignore"):
        sample = sample_points(points, config.num_points, config.seed, sampler=config.sampler, threads=1)
        row = write_sample(sample)
    try:
        # What no reader would take (a vertex at 1e38, say) is not written either.
        read_sample(row)
    except WireframeError as problem:
        return Skipped(scene.order_id, str(problem))
    return row


def _prepare_tar(tar, config, workers, bar) -> tuple[list[dict], list[Skipped], str | None]:
    """Rows, scenes left out, and how the tar broke off (None = it was whole)."""
    rows: list[dict] = []
    skipped: list[Skipped] = []
    try:
        for result in in_order(functools.partial(prepare_scene, config=config), iter_samples(tar), workers):
            (skipped if isinstance(result, Skipped) else rows).append(result)
            bar.update()
    except ShardError as problem:
        return rows, skipped, str(problem)
    return rows, skipped, None


def _parquet_name(tar: str) -> str:
    name = os.path.basename(tar)
    for suffix in (".gz", ".tgz", ".tar"):
        name = name.removesuffix(suffix)
    return f"{name}.parquet"


class _Manifest:
    """The notes of the finished shards in an output folder."""

    def __init__(self, out: Path, config: PrepareConfig):
        self._out, self._folder = out, out / MANIFEST
        self._config = dataclasses.asdict(config)
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._folder.glob("*.json")):
            note = _read_note(path)
            if note is not None and note.get("config") != self._config:
                raise ConfigError(f"{out} was prepared with other settings; choose another output folder")

    def finished(self, name: str, tar: str) -> dict | None:
        """The note of a shard that is whole on disk and was made from a whole tar of this size."""
        note, path = _read_note(self._note(name)), self._out / name
        if note is None or not path.is_file():
            return None
        whole = note.get("damage") is None and note.get("tar_bytes") == _size(tar)
        return note if whole and note.get("sha256") == sha256(path) else None

    def add(self, name: str, tar: str, rows: int, skipped: list[Skipped], damage: str | None) -> dict:
        note = {
            "config": self._config,
            "tar": os.path.basename(tar),
            "tar_bytes": _size(tar),
            "rows": rows,
            "sha256": sha256(self._out / name),
            "skipped": [list(scene) for scene in skipped],
            "damage": damage,
        }
        with atomic_write(self._note(name)) as file:
            file.write(json.dumps(note, indent=1, sort_keys=True).encode())
        return note

    def _note(self, name: str) -> Path:
        return self._folder / f"{name}.json"


def _read_note(path: Path) -> dict | None:
    """A note, or None where there is none or it is unreadable: its shard is then made again."""
    try:
        note = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) and {"rows", "skipped", "damage", "tar"} <= note.keys() else None


def _size(tar: str) -> int | None:
    return os.path.getsize(tar) if os.path.isfile(tar) else None

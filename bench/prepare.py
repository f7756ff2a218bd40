"""Races of ``wireframe prepare``: whole runs with one worker and with all cores, and one scene part by part.

Raw scenes are made in a temporary folder. The parts run in one thread, on scene after scene, and their shares say what
bounds it. Sizes: scenes as in the real data, or as the demo model was trained with (``--grow``: both).
"""

from __future__ import annotations

import functools
import io
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from wireframe.bench.pipeline import beside_the_whole, own_rivals
from wireframe.bench.race import How, Race, Rival, Work
from wireframe.classes import colors_to_ids
from wireframe.fusion import fuse_views
from wireframe.images import depth_millimetres, label_rgb
from wireframe.kernels import ops
from wireframe.prepare import PrepareConfig, prepare
from wireframe.raw_rows import build_row
from wireframe.samples import read_sample, write_sample
from wireframe.sampling import sample_points
from wireframe.scene import Scene, read_scene
from wireframe.shards import RawSample, iter_samples
from wireframe.synth import SynthConfig, write_shards

SIZES = {
    "full": SynthConfig(),
    "training": SynthConfig(colmap_points=8000),
    "small": SynthConfig(width=96, height=72, colmap_points=600, views_range=(4, 5)),
}
SCENE = "prepare one scene"
_SEED = 0


def races(how: How) -> Iterator[Race]:
    """The whole command, then one scene and its parts, all of them on a CPU: nothing where a GPU is to be measured."""
    if how.device != "cpu":
        return
    for size in ("small",) if how.small else ("full", "training") if how.grow else ("full",):
        scenes = 3 if how.small else 48
        sizes = {"scenes": scenes, "width": SIZES[size].width, "height": SIZES[size].height,
                 "points": SIZES[size].colmap_points}  # fmt: skip
        at = functools.partial(Race, mode="forward", dtype="float32")
        make = functools.partial(_whole, size, scenes, how.threads)
        yield at("prepare", shape=f"{scenes} scenes, {size} size", sizes=sizes, make=make)
        for op, part in PARTS.items():
            whole = None if op == SCENE else SCENE
            make = functools.partial(_part, part, size, 3 if how.small else 15, whole)
            yield at(op, shape=f"one scene, {size} size", sizes={**sizes, "scenes": 1}, make=make, whole=whole)


@functools.lru_cache(maxsize=1)
def _raw(size: str, scenes: int) -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory()
    write_shards(Path(folder.name), _SEED, 0, scenes, SIZES[size], shard_size=scenes, workers=1)
    return folder


def _whole(size: str, scenes: int, cores: int) -> Work:
    def run(workers: int, raw: tempfile.TemporaryDirectory) -> int:
        with tempfile.TemporaryDirectory() as out:
            report = prepare(raw.name, out, PrepareConfig(keep_all=True), workers=workers, progress=False)
        if report.rows != scenes:
            raise RuntimeError(f"{report.rows} of {scenes} scenes were prepared")
        return report.rows

    rivals = {"ours": cores, "ours, 1 worker": 1}
    return Work(
        [(_raw(size, scenes),)],
        [Rival(name, lambda n=n: functools.partial(run, n), deterministic=True) for name, n in rivals.items()],
    )


def _row(sample: RawSample) -> dict:
    return build_row(sample.key, sample.members)


def _decode(sample: RawSample, scene: Scene) -> list:
    """Every PNG of the views that are used; of a new row, whose images are not decoded yet."""
    row = _row(sample)
    labels = [label_rgb(row[table][view.index]) for view in scene.views for table in ("ade", "gestalt")]
    return labels + [depth_millimetres(row["depth"][view.index]) for view in scene.views if view.depth is not None]


def _unzip(row: dict) -> bytes:
    return zipfile.ZipFile(io.BytesIO(row["colmap"])).read("points3D.txt")


def _colours(images: list[np.ndarray], **how) -> list[np.ndarray]:
    return [colors_to_ids(image, table, **how) for image, table in zip(images, len(images) * ("ade", "gestalt"))]


def _fuse(scene: Scene, **how):
    return fuse_views(scene, PrepareConfig().depth_points_per_view, **how)


def _sample(points, **how):
    return sample_points(points, PrepareConfig().num_points, **how)


def _npz(sampled) -> dict:
    written = write_sample(sampled)
    read_sample(written)
    return written


def _scene(sample: RawSample) -> dict:
    return _npz(_sample(_fuse(read_scene(_row(sample)), threads=1), threads=1))


# By part: the function, what it takes of a raw sample, and whether it has implementations to choose from.
PARTS: dict[str, tuple[Callable, Callable[[RawSample], tuple], bool]] = {
    SCENE: (_scene, lambda raw: (raw,), False),
    "prepare: row": (_row, lambda raw: (raw,), False),
    "prepare: PNG decode": (_decode, lambda raw: (raw, read_scene(_row(raw))), False),
    "prepare: colours to ids": (
        _colours, lambda raw: (_decode(raw, read_scene(_row(raw)))[: 2 * _views(raw)],),
        True,
    ),
    "prepare: COLMAP unzip": (_unzip, lambda raw: (_row(raw),), False),
    "prepare: points3D": (ops.parse_points3d, lambda raw: (_unzip(_row(raw)),), True),
    "prepare: fusion": (_fuse, lambda raw: (read_scene(_row(raw)),), True),
    "prepare: sampling": (_sample, lambda raw: (_fuse(read_scene(_row(raw))),), True),
    "prepare: npz": (_npz, lambda raw: (_sample(_fuse(read_scene(_row(raw)))),), False),
}


def _views(raw: RawSample) -> int:
    return len(read_scene(_row(raw)).views)


def _part(part: tuple, size: str, scenes: int, whole: str | None) -> Work:
    function, arguments, chosen = part
    samples = list(iter_samples(Path(_raw(size, scenes).name)))

    def run(_: RawSample, *inputs, **how):
        return function(*inputs, **how)

    rivals = [Rival("ours", lambda: run, deterministic=True)]
    if chosen:
        # In one thread, as a worker runs it.
        reference, ours, one_thread = own_rivals(run)
        rivals = [reference, one_thread._replace(provider=ours.provider)]
    work = Work([(sample, *arguments(sample)) for sample in samples], rivals)
    return work if whole is None else beside_the_whole(work, whole, lambda sample, *_: _scene(sample))

"""``wireframe view``: scenes, predictions and scores as one HTML page to look at, offline."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from wireframe.errors import ConfigError, Failure, MissingPackageError, ShardError
from wireframe.files import atomic_write, check_target
from wireframe.fusion import fuse_views
from wireframe.graph import GraphConfig, Wireframe
from wireframe.hub import is_hub
from wireframe.samples import read_sample
from wireframe.sampling import SampledScene, sample_points
from wireframe.scene import read_scene
from wireframe.scene_source import SceneSource
from wireframe.scoring import ZERO, Outcome, require_hoho
from wireframe.scoring_pool import ScorePool
from wireframe.sharing import count_guarded
from wireframe.splits import DEV_VAL
from wireframe.view.page import PageEntry, data_block, page_parts
from wireframe.view.scenes import ViewScene, cameras_of, pack_scene, view_scene

if TYPE_CHECKING:
    from wireframe.perceiver import Perceiver


class View(NamedTuple):
    """What a page holds.

    Attributes:
        scenes: how many it shows, of the ``read`` ones; size: bytes of the page.
        hss: mean of all that were scored, shown or not; None where none was.
        unscored: why nothing is scored, None where scenes are.
        guarded: scenes that are not known to be synthetic: a page with any must not be handed on.
        failures: scenes that could not be read.
    """

    scenes: int
    read: int
    size: int
    hss: float | None
    unscored: str | None
    guarded: int
    failures: list[Failure]


class _Read(NamedTuple):
    """Points to predict from, points to show, and cameras."""

    sample: SampledScene
    shown: SampledScene
    cameras: np.ndarray | None

    @property
    def order_id(self) -> str:
        return self.sample.order_id


class _Packed(NamedTuple):
    """A scene as the page holds it, and its score, None where there is none."""

    order_id: str
    block: str
    outcome: Outcome | None


# A scene -> its prediction, None where there is none.
Predict = Callable[[SampledScene], Wireframe | None]


def view_model(
    source: str | os.PathLike, out: str | os.PathLike, model: Perceiver, graph: GraphConfig = GraphConfig(), **options
) -> View:
    """``write_view`` of a model's predictions; the model keeps its mode. ``options`` are those of ``write_view``."""
    from wireframe.predict import eval_mode, predict_segments, wireframe_of

    def predict(sample: SampledScene) -> Wireframe:
        return wireframe_of(predict_segments(sample, model), sample, graph=graph)

    with eval_mode(model):
        return write_view(source, out, predict, model_points=model.config.num_points, **options)


def view_submission(
    source: str | os.PathLike, out: str | os.PathLike, predictions: Mapping[str, Wireframe], **options
) -> View:
    """``write_view`` of predictions by order_id; a scene that has none scores 0.

    Raises:
        ConfigError: none of the scenes has one.
    """
    return write_view(source, out, lambda sample: predictions.get(sample.order_id), **options)


def write_view(
    source: str | os.PathLike,
    out: str | os.PathLike,
    predict: Predict,
    *,
    model_points: int | None = None,
    points: int = 4096,
    label: str = "",
    split: str | None = None,
    dev_val: int = DEV_VAL,
    limit: int | None = None,
    worst: int | None = None,
    workers: int = 1,
    progress: bool = True,
) -> View:
    """Writes the page, whole or not at all; its bytes do not depend on ``workers``.

    Scenes with ground truth are scored where hoho2025 is installed, and listed worst first, then those without a
    score in the order of the source.

    Args:
        source: raw tars or Parquet shards of sampled rows: a file, folder, glob or ``hf://...``.
        out: the HTML file.
        predict: gets the scene's points: ``model_points`` of a raw scene, all of a sampled row.
        model_points: None where ``predict`` does not look at them.
        points: at most how many of a scene's points the page shows.
        label: what predicted, for the page.
        split, dev_val: of sampled rows, as ``evaluate`` takes them.
        limit: only the first so many scenes. worst: of these only so many of the lowest scores.
        workers: threads that read ahead, and processes that score.
        progress: whether to show a progress bar on stderr.

    Raises:
        ShardError: the source holds no shard, or no scene. ConfigError: a split of raw scenes, no scene has a
            prediction, or the worst are wanted where nothing is scored. OSError: the page cannot be written.
    """
    convert = _reader(source, model_points, points, 1 if workers > 1 else None)
    reading = SceneSource(
        source, points, split=split, dev_val=dev_val, limit=limit, workers=workers, convert=convert
    )  # fmt: skip
    check_target(out).parent.mkdir(parents=True, exist_ok=True)
    packed, failures, unscored = _pack(reading, predict, points, progress)
    if worst and unscored:
        raise ConfigError(f"the worst scenes are those of the lowest scores ({unscored}); leave out --worst")
    entries = _entries(packed, worst)
    blocks = {position: packed[position].block for position in sorted(entry.position for entry in entries)}
    guarded = count_guarded(entry.order_id for entry in entries)
    shown = f"the {len(entries)} worst of {len(packed)} scenes" if len(entries) < len(packed) else ""
    unread = f"{len(failures)} not read" if failures else ""
    about = [note for note in (label, shown, unscored, unread) if note]
    size = 0
    with atomic_write(out) as file:
        for part in page_parts(_title(reading), about, entries, blocks, warn=guarded > 0):
            size += file.write(part.encode("utf-8", "replace"))
    scores = [scene.outcome.score.hss for scene in packed if scene.outcome is not None]
    mean = sum(scores) / len(scores) if scores else None
    return View(len(entries), len(packed), size, mean, unscored, guarded, failures)


def _reader(
    source: str | os.PathLike, model_points: int | None, points: int, threads: int | None
) -> Callable[[dict], _Read]:
    """What reads a row, raw or sampled; the row itself tells which."""

    def read(row: dict) -> _Read:
        if "data" in row:
            sample = read_sample(row)
            return _Read(sample, sample, None)
        scene = read_scene(row)
        fused = fuse_views(scene, threads=threads)
        shown = sample_points(fused, points, threads=threads)
        same = model_points in (None, points)
        sample = shown if same else sample_points(fused, model_points, threads=threads)
        return _Read(sample, shown, cameras_of(scene))

    return read


def _pack(
    reading: SceneSource, predict: Predict, points: int, progress: bool
) -> tuple[list[_Packed], list[Failure], str | None]:
    """All scenes, failures, and why nothing is scored."""
    from tqdm import tqdm

    scenes: list[tuple[str, str, Future | None]] = []
    failures, predicted, truths = [], 0, 0
    with contextlib.ExitStack() as stack:
        pool, unscored = _pool(stack, reading.workers)
        pairs = stack.enter_context(contextlib.closing(reading.read()))
        for _, read in tqdm(pairs, total=reading.expected(), disable=not progress, desc="view", unit="scene"):
            if isinstance(read, Failure):
                failures.append(read)
                continue
            scene = view_scene(read.shown, predict(read.sample), read.cameras, points)
            predicted += scene.predicted is not None
            truths += scene.truth is not None
            scenes.append((scene.order_id, data_block(pack_scene(scene)), _submit(pool, scene)))
        packed = [_Packed(name, block, future and future.result()) for name, block, future in scenes]
    if not packed:
        raise ShardError(failures[0].reason if failures else f"{reading.name} holds no scene")
    if not predicted:
        raise ConfigError(f"there is a prediction for none of the {len(packed)} scenes of {reading.name}")
    return packed, failures, unscored or (None if truths else "no ground truth to score with")


def _pool(stack: contextlib.ExitStack, workers: int) -> tuple[ScorePool | None, str | None]:
    try:
        require_hoho()
    except MissingPackageError:
        return None, "not scored: hoho2025 is not installed"
    return stack.enter_context(ScorePool(workers=workers)), None


def _submit(pool: ScorePool | None, scene: ViewScene) -> Future | None:
    if pool is None or scene.truth is None:
        return None
    if scene.predicted is not None:
        return pool.submit(scene.predicted, scene.truth)
    missing: Future = Future()
    missing.set_result(Outcome(ZERO, "no prediction"))
    return missing


def _entries(packed: list[_Packed], worst: int | None) -> list[PageEntry]:
    """Scored scenes, the lowest HSS first, then the others; of equal ones the first in the source."""
    entries = [
        PageEntry(scene.order_id, position, *(scene.outcome or Outcome(None, None)))
        for position, scene in enumerate(packed)
    ]
    entries.sort(key=lambda entry: (entry.score is None, entry.score.hss if entry.score else 0.0))
    return entries[:worst]


def _title(reading: SceneSource) -> str:
    """What the scenes are, without the folders of the machine that wrote the page."""
    name = reading.name if is_hub(reading.name) else os.path.basename(os.path.abspath(reading.name))
    return (reading.title() or reading.name).replace(reading.name, name)

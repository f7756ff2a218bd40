"""The challenge's score, HSS: in this process, or for many scenes in workers that may crash.

HSS is the harmonic mean of the F1 of vertices (matched within 0.5 m) and the IoU of edges (cylinders of 0.5
m), as ``hoho2025.metric_helper.hss`` computes it. Its boolean unions can kill the process, so a run over a
data set belongs in ``score_many`` or a ``ScorePool``; ``score`` is for single scenes.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from wireframe.errors import MissingPackageError, ScoreError, one_line
from wireframe.graph import Wireframe

VERTEX_THRESHOLD = 0.5
EDGE_RADIUS = 0.5

_BOOTSTRAP_KEY = 353
_BOOTSTRAP_DRAWS = 2000


class Score(NamedTuple):
    """Harmonic mean, F1 of the vertices and IoU of the edges, each from 0 to 1."""

    hss: float
    f1: float
    iou: float


ZERO = Score(0.0, 0.0, 0.0)


class Outcome(NamedTuple):
    """A scene's score, and why it is zero by default; ``failure`` is None where the metric gave it."""

    score: Score
    failure: str | None


def score(predicted: Wireframe, truth: Wireframe) -> Score:
    """The scene's HSS, F1 and IoU by hoho2025's metric (0.5 m, 0.5 m), computed in this process.

    Args:
        predicted: vertices [V, 3] and edges [E, 2]; scores 0 where it has no vertices, a coordinate that is
            not finite, or edges that are not pairs of ids of its vertices.
        truth: likewise; must be well formed and have edges.

    Raises:
        ScoreError: the truth is no wireframe, or the metric failed on this pair.
        MissingPackageError: hoho2025 is not installed.
    """
    require_hoho()
    request, failure = check_pair(predicted, truth)
    if request is None:
        if failure.startswith("bad truth"):
            raise ScoreError(failure)
        return ZERO
    try:
        return hoho_score(*request)
    except ImportError as error:
        raise MissingPackageError(f"hoho2025 cannot be imported ({error}): pip install hoho2025") from error
    except Exception as error:
        raise ScoreError(f"the metric failed, {type(error).__name__}: {one_line(error)}") from error


def score_many(
    pairs: Sequence[tuple[Wireframe, Wireframe]],
    workers: int | None = None,
    timeout: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Scores of (predicted, truth) pairs, computed in worker processes; no scene can end the run.

    A scene whose worker crashes, raises or takes longer than ``timeout`` seconds scores 0 and says why in its
    ``failure``, as does one whose prediction or truth is ill-formed; the worker is replaced.

    Args:
        pairs: (predicted, truth) wireframes.
        workers: number of processes; None for one per usable core, at most 8.
        timeout: seconds a scene may take.
        progress: called in this thread with (scenes done, scenes in all) after each scene.

    Returns:
        One outcome per pair, in the order of the pairs.

    Raises:
        ScoreError: no worker can be started.
        MissingPackageError: hoho2025 is not installed.
    """
    from wireframe.scoring_pool import ScorePool, usable_cores

    pairs = list(pairs)
    workers = min(workers or usable_cores(), max(1, len(pairs)))
    with ScorePool(workers=workers, timeout=timeout) as pool:
        return pool.score_many(pairs, progress=progress)


def summarise(outcomes: Sequence[Outcome]) -> dict:
    """Means over all scenes (failed ones count as 0), their intervals, failures by reason.

    Returns:
        ``scenes``, ``hss``, ``f1``, ``iou``, of each score also ``_low`` and ``_high`` (``bootstrap_interval``), and
        ``failures``, a dictionary from reason to count, most frequent first; plain numbers throughout.

    Raises:
        ScoreError: there are no outcomes.
    """
    if not outcomes:
        raise ScoreError("there are no scored scenes to summarise")
    table = np.array([outcome.score for outcome in outcomes], dtype=np.float64)
    intervals = {}
    for column, name in enumerate(Score._fields):
        intervals[f"{name}_low"], intervals[f"{name}_high"] = bootstrap_interval(table[:, column])
    failures = Counter(outcome.failure for outcome in outcomes if outcome.failure is not None)
    hss, f1, iou = (float(value) for value in table.mean(axis=0))
    return {
        "scenes": len(outcomes),
        "hss": hss,
        "f1": f1,
        "iou": iou,
        **intervals,
        "failures": dict(sorted(failures.items(), key=lambda item: (-item[1], item[0]))),
    }


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """2.5 and 97.5 percentile of the means of 2000 resamples of ``values`` [N], drawn with a fixed key."""
    rng = np.random.Generator(np.random.Philox(key=_BOOTSTRAP_KEY))
    means = np.empty(_BOOTSTRAP_DRAWS)
    for draw in range(_BOOTSTRAP_DRAWS):
        means[draw] = values[(rng.random(values.size) * values.size).astype(np.int64)].mean()
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def require_hoho() -> None:
    """Raises MissingPackageError where hoho2025 is not installed; does not import it."""
    if importlib.util.find_spec("hoho2025") is None:
        raise MissingPackageError("scoring needs hoho2025, which is not installed: pip install hoho2025")


def check_pair(predicted: Wireframe, truth: Wireframe) -> tuple[tuple | None, str | None]:
    """What ``hoho_score`` takes (float64 and int64 arrays), or None and the reason why the pair scores 0."""
    true_vertices, true_edges, problem = _check(truth)
    if problem is None and len(true_edges) == 0:
        problem = "no edges"
    if problem is not None:
        return None, f"bad truth: {problem}"
    vertices, edges, problem = _check(predicted)
    if problem is not None:
        return None, f"bad prediction: {problem}"
    return (vertices, edges, true_vertices, true_edges), None


def hoho_score(
    vertices: np.ndarray, edges: np.ndarray, true_vertices: np.ndarray, true_edges: np.ndarray
) -> Score:
    """hoho2025's metric on well-formed arrays; lets through whatever the metric raises."""
    from hoho2025.metric_helper import hss

    thresholds = {"vert_thresh": VERTEX_THRESHOLD, "edge_thresh": EDGE_RADIUS}
    result = hss(vertices, edges, true_vertices, true_edges, **thresholds)
    values = Score(float(result.hss), float(result.f1), float(result.iou))
    if not np.isfinite(values).all():
        raise ValueError(f"the metric gave {tuple(values)}")
    return values


def _check(wireframe: Wireframe) -> tuple[np.ndarray, np.ndarray, str | None]:
    """The arrays of a wireframe and what is wrong with them, None if nothing is."""
    nothing = np.zeros((0, 3)), np.zeros((0, 2), dtype=np.int64)
    try:
        vertices, edges = (np.asarray(part) for part in wireframe)
    except (TypeError, ValueError):
        return *nothing, "not a pair of vertices and edges"
    if vertices.size == 0:
        return *nothing, "no vertices"
    if edges.size == 0:
        edges = nothing[1]
    if vertices.dtype.kind not in "fiu" or vertices.ndim != 2 or vertices.shape[1] != 3:
        return *nothing, "vertices are not numbers of shape [V, 3]"
    if edges.dtype.kind not in "iu" or edges.ndim != 2 or edges.shape[1] != 2:
        return *nothing, "edges are not integers of shape [E, 2]"
    if not np.isfinite(vertices).all():
        return *nothing, "a vertex is not finite"
    if edges.size and (edges.min() < 0 or edges.max() >= len(vertices)):
        return *nothing, "an edge names a vertex that is not there"
    return vertices.astype(np.float64), edges.astype(np.int64), None

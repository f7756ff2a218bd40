"""Races of the inference chain on one synthetic scene: the whole, from raw bytes or a decoded scene, and its parts,
each of them in turn with the whole, or the share of a part would be that of another minute.

Scene: 6 usable views of 768 x 576 with depth in all of them, 40k COLMAP points, 20k depth points a view. The model has
the published size and no training, so its threshold is 0: nothing would be above one half, and the graph cost nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from wireframe import hashing
from wireframe.bench.race import Bar, How, Race, Rival, Work
from wireframe.colmap import read_points3d
from wireframe.fusion import fuse_views
from wireframe.graph import Wireframe
from wireframe.perceiver import Perceiver, PerceiverConfig
from wireframe.predict import SceneSegments, predict_segments, predict_wireframe, wireframe_of
from wireframe.rivals import try_handcrafted
from wireframe.sampling import SampledScene, sample_points
from wireframe.scene import Scene, read_scene
from wireframe.synth import SynthConfig, make_scene
from wireframe.synth.write import encoded_scene

RAW, DECODED = "raw bytes -> wireframe", "decoded scene -> wireframe"
FUSE = "fuse_views + sample_points"
_ON_DEVICE = (RAW, DECODED, "predict_segments")

# A house of 17 edges: most scenes of this seed have fewer, so that merging would be easier.
SEED, INDEX = 0, 9


class Setup(NamedTuple):
    """What is measured; the defaults are the published sizes."""

    scene: SynthConfig = SynthConfig(
        views_range=(6, 6), depth_missing_prob=0.0, depth_none_prob=0.0, pose_only_prob=0.0
    )
    model: PerceiverConfig = PerceiverConfig()
    depth_points_per_view: int = 20000
    training_scenes: int = 4
    training_points: int = 2048

    @property
    def candidates(self) -> int:
        """Points that fusion labels."""
        return self.scene.colmap_points + self.scene.views_range[1] * self.depth_points_per_view

    @property
    def maps(self) -> str:
        return f"{self.scene.views_range[1]} x {self.scene.width} x {self.scene.height}"

    @property
    def sizes(self) -> dict[str, int]:
        width, height = self.scene.width, self.scene.height
        return {"views": self.scene.views_range[1], "width": width, "height": height, "points": self.candidates}


SMALL = Setup(
    Setup().scene.changed(width=160, height=120, colmap_points=1000),
    PerceiverConfig(
        hidden=32, ff=48, latent_tokens=8, latent_layers=2, decoder_layers=1, segments=16, num_points=256
    ),
    depth_points_per_view=500, training_scenes=2, training_points=128,
)  # fmt: skip


def setup_of(how: How) -> Setup:
    return SMALL if how.small else Setup()


@functools.lru_cache(maxsize=1)
def raw_row(setup: Setup) -> dict:
    """The scene as its files hold it."""
    return encoded_scene(SEED, INDEX, setup.scene)


@functools.lru_cache(maxsize=1)
def decoded(setup: Setup) -> Scene:
    """The scene decoded; a shape would state another number of points than it has where this raises."""
    scene = read_scene(raw_row(setup))
    found = (len(scene.views), len(scene.points))
    if found != (setup.scene.views_range[1], setup.scene.colmap_points):
        raise ValueError(f"the scene has {found[0]} views and {found[1]} points, not what is stated")
    return scene


def sampled(setup: Setup, points: int, seed: int = SEED) -> SampledScene:
    """The scene's points as the model gets them."""
    return sample_points(fuse_views(decoded(setup), setup.depth_points_per_view, seed), points, seed)


def races(how: How) -> Iterator[Race]:
    """The wholes, then their parts in the order of the chain; on a GPU those with the model in it alone."""
    return (race for race in _chain(how) if how.device == "cpu" or race.op in _ON_DEVICE)


def _chain(how: How) -> Iterator[Race]:
    setup, at = setup_of(how), functools.partial(_race, how)
    yield at(RAW, _raw, whole=None, bars=(Bar(250.0),))
    yield at(DECODED, _decoded, whole=None, bars=(Bar(120.0),))
    yield at("read_scene", _reading)
    yield at("read_points3d", _points3d, shape=f"{setup.scene.colmap_points} points", whole="read_scene")
    shape = f"{setup.candidates} -> {setup.model.num_points} points"
    yield at(FUSE, _fusing, shape=shape, bars=(Bar(40.0), Bar(40.0, memory=True)))
    yield at("predict_segments", _segments, shape=f"1 x {setup.model.num_points}")
    yield at("wireframe_of", _graph, shape=f"{setup.model.segments} segments, {setup.model.num_points} points")
    yield at("make_scene", _making, whole=None, bars=(Bar(1500.0),))
    for threads in range(1, how.threads + 1) if how.grow and how.device == "cpu" else ():
        sizes = {**setup.sizes, "threads": threads}
        for op, make in ((RAW, _raw), (FUSE, _fusing)):
            threaded = functools.partial(_threaded, make, threads)
            yield at(op, threaded, shape=f"{setup.maps}, {threads} threads", whole=None, sizes=sizes)


def _race(
    how: How, op: str, make: Callable, shape: str = "", whole: str | None = RAW, sizes: dict | None = None, bars=()
) -> Race:
    setup = setup_of(how)
    make = functools.partial(_part, make, whole) if whole else make
    return Race(
        op, "forward", shape or setup.maps, sizes or setup.sizes, "float32", functools.partial(make, setup, how),
        host=True, bars=() if how.small or how.device != "cpu" else bars, whole=whole,
    )  # fmt: skip


def _ours(function: Callable, *inputs: Any) -> Work:
    return Work([inputs], [Rival("ours", lambda: function, deterministic=True)])


@functools.lru_cache(maxsize=1)
def _model(setup: Setup, device: str) -> Perceiver:
    return Perceiver(setup.model).eval().to(device)


def _raw(setup: Setup, how: How) -> Work:
    model, images = _model(setup, how.device), make_scene(SEED, INDEX, setup.scene)

    def handcrafted(_: dict) -> Wireframe:
        found, reason = try_handcrafted(images)
        if reason:
            raise RuntimeError(reason)
        return found

    work = _ours(lambda row: predict_wireframe(row, model, threshold=0.0), raw_row(setup))
    # It takes images, so that of the two it alone is spared the decoding.
    rival = Rival("handcrafted (hoho2025), from decoded images", lambda: handcrafted, exact=False)
    work.rivals = [*work.rivals, rival]
    return work


def beside_the_whole(work: Work, whole: str, run: Callable[..., object]) -> Work:
    """The work of a part, whose rivals take turns with the whole that it is a part of; run: of the part's inputs."""
    work.rivals = [*work.rivals, Rival(whole, lambda: run, exact=False)]
    return work


def _part(make: Callable, whole: str, setup: Setup, how: How) -> Work:
    work = {RAW: _raw, "read_scene": _reading}[whole](setup, how)
    (inputs,), run = work.inputs, work.rivals[0].build()
    return beside_the_whole(make(setup, how), whole, lambda *_: run(*inputs))


def _decoded(setup: Setup, how: How) -> Work:
    model = _model(setup, how.device)

    def ours(scene: Scene) -> Wireframe:
        sample = sample_points(fuse_views(scene, setup.depth_points_per_view), setup.model.num_points)
        return wireframe_of(predict_segments(sample, model), sample, threshold=0.0)

    return _ours(ours, decoded(setup))


def _reading(setup: Setup, how: How) -> Work:
    return _ours(read_scene, raw_row(setup))


def _points3d(setup: Setup, how: How) -> Work:
    return _ours(read_points3d, raw_row(setup)["colmap"])


def _fusing(setup: Setup, how: How) -> Work:
    count, points = setup.depth_points_per_view, setup.model.num_points

    def run(scene: Scene, impl: str = "auto", threads: int | None = None) -> SampledScene:
        return sample_points(fuse_views(scene, count, impl=impl, threads=threads), points, impl=impl, threads=threads)

    return Work([(decoded(setup),)], own_rivals(run))


def own_rivals(run: Callable) -> list[Rival]:
    """Ours with all threads and with one, and the NumPy reference, which all of it must equal bit for bit.

    Args:
        run: takes the race's inputs and the keywords impl and threads.
    """
    # Nothing else may stand in for the native code, which may be absent.
    settings = {
        "NumPy reference": {"impl": "reference"}, "ours": {"impl": "native"},
        "ours, 1 thread": {"impl": "native", "threads": 1},
    }  # fmt: skip
    return [
        Rival(name, lambda how=how: functools.partial(run, **how), deterministic=True, budget=0.0)
        for name, how in settings.items()
    ]


def _segments(setup: Setup, how: How) -> Work:
    sample = sampled(setup, setup.model.num_points)
    return _ours(lambda sample: predict_segments(sample, _model(setup, how.device)), sample)


def _graph(setup: Setup, how: How) -> Work:
    segments = noisy_segments(decoded(setup), setup.model.segments)
    found = SceneSegments(segments, np.ones(len(segments), np.float32))
    return _ours(
        lambda found, sample: wireframe_of(found, sample, threshold=0.0), found, sampled(setup, setup.model.num_points)
    )


def _making(setup: Setup, how: How) -> Work:
    return _ours(lambda: make_scene(SEED, INDEX, setup.scene))


def _threaded(make: Callable, threads: int, setup: Setup, how: How) -> Work:
    work = make(setup, how)
    (ours,) = (rival for rival in work.rivals if rival.provider == "ours")
    return Work(work.inputs, [ours._replace(settings=functools.partial(_using_threads, threads))])


@contextlib.contextmanager
def _using_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def noisy_segments(scene: Scene, count: int) -> np.ndarray:
    """float32 [count, 2, 3] world metres: true edges in turn, their ends moved by 0.1 m."""
    truth = scene.vertices[scene.edges[np.arange(count) % len(scene.edges)]]
    noise = hashing.generator(SEED, INDEX, hashing.SYNTH).standard_normal(truth.shape)
    return (truth + 0.1 * noise).astype(np.float32)

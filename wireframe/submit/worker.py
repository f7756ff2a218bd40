"""The process that predicts for ``wireframe submit``: one JSON line in, one JSON line out for everything that happens.

In: ``{"model", "config", "threshold", "workers", "compiled", "seconds", "scenes": [[number, IndexedScene], ...]}``.
Out: ``{"ready": true}`` once the model is loaded, or ``{"fatal": reason}``; then per scene ``{"begun": number}`` and
later ``{"answer": number, "vertices", "edges"}`` or ``{"failure": number, "reason"}``, answers and failures in the
order of the scenes; at last ``{"end": true}``. Floats cross as their shortest decimal form, which reads back to the
same bits.

It ends when its input does: with the process that started it, whatever became of that. Whatever libraries print goes
to stderr.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from wireframe.ahead import in_order
from wireframe.errors import WireframeError, one_line
from wireframe.member_names import MemberName
from wireframe.submit.tar_index import IndexedMember, IndexedScene, open_tar, read_members

if TYPE_CHECKING:
    from wireframe.graph import Wireframe
    from wireframe.sampling import SampledScene

_COMPILED = "wireframe._C"
# The model's threads wait for one another, so they go before those that read ahead.
_READER_NICE = 10


class _Read(NamedTuple):
    """The bytes of a scene, or why there are none."""

    number: int
    key: str
    members: list[tuple[MemberName, bytes]]
    problem: str | None


def main() -> None:
    """Serves one request."""
    # Ctrl-C reaches every process of the terminal; the parent decides what becomes of this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    events = _Events(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    nothing = open(os.devnull, "r+b")
    os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    job = json.loads(requests.readline())
    # A scene that hangs outside Python also stops the thread that watches the input; this runs beside both.
    faulthandler.dump_traceback_later(min(job["seconds"] + 10.0, 1e6), exit=True, file=nothing)
    threading.Thread(target=_end_with, args=(requests,), daemon=True).start()
    if not job["compiled"]:
        # As if it were not built: a machine may lack instructions that it was compiled for.
        sys.modules[_COMPILED] = None
    try:
        # Operations import it when they are first called: seconds that no scene should be charged with.
        import torch._dynamo  # noqa: F401

        from wireframe.predict import predict_segments, wireframe_of

        model, graph = _load(job)
        read = _reader(model.config.num_points, job["workers"], events)
    except WireframeError as problem:
        events.send(fatal=str(problem))
        return
    except Exception as problem:
        events.send(fatal=_fault(problem))
        return
    events.send(ready=True)
    scenes = [(number, _indexed(scene)) for number, scene in job["scenes"]]
    with closing(in_order(read, _read_all(scenes), job["workers"])) as found:
        for number, sample in found:
            events.send(**_answer(
                lambda sample: wireframe_of(predict_segments(sample, model), sample, graph=graph), number, sample
            ))  # fmt: skip
    events.send(end=True)


class _Events:
    def __init__(self, file: TextIO) -> None:
        self._file, self._lock = file, threading.Lock()

    def send(self, **event: Any) -> None:
        with self._lock:
            self._file.write(json.dumps(event) + "\n")
            self._file.flush()


def _end_with(requests: TextIO) -> None:
    requests.read()
    os._exit(0)


def _load(job: dict):
    """The model and the graph's settings, chosen as for ``wireframe predict``."""
    import dataclasses

    from wireframe.perceiver import Perceiver
    from wireframe.pretrained import read_graph

    source, config = job["model"], job["config"]
    graph = read_graph(source) if source and not config else None
    if graph is None:
        from wireframe.train.config import BASE_CONFIG, DEMO_CONFIG, load_config

        graph = load_config(Path(config) if config else BASE_CONFIG if source else DEMO_CONFIG).graph
    if job["threshold"] is not None:
        graph = dataclasses.replace(graph, confidence=job["threshold"])
    if not source:
        from wireframe.assets import DEMO_MODEL as source
    return Perceiver.from_checkpoint(source), graph


def _reader(num_points: int, workers: int, events: _Events) -> Callable[[_Read], tuple[int, SampledScene | str]]:
    """A function that samples a scene, or says why it cannot."""
    from wireframe.fusion import fuse_views
    from wireframe.raw_rows import build_row
    from wireframe.sampling import sample_points
    from wireframe.scene import read_scene

    # Several readers have a core each; one has those that the model does not use at that moment.
    threads = None if workers == 1 else 1

    def sampled(read: _Read) -> tuple[int, SampledScene | str]:
        events.send(begun=read.number)
        if workers > 1 and sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _READER_NICE)
        if read.problem is not None:
            return read.number, read.problem
        try:
            points = fuse_views(read_scene(build_row(read.key, read.members)), threads=threads)
            return read.number, sample_points(points, num_points, threads=threads)
        except WireframeError as problem:
            return read.number, str(problem)
        except Exception as problem:
            return read.number, _fault(problem)

    return sampled


def _answer(predict: Callable[[SampledScene], Wireframe], number: int, sample: SampledScene | str) -> dict:
    if isinstance(sample, str):
        return {"failure": number, "reason": sample}
    try:
        found = predict(sample)
    except Exception as problem:
        return {"failure": number, "reason": _fault(problem)}
    return {"answer": number, "vertices": found.vertices.tolist(), "edges": found.edges.tolist()}


def _indexed(scene: list) -> IndexedScene:
    shard, key, order_id, members, problem = scene
    return IndexedScene(
        shard, key, order_id, tuple(IndexedMember(MemberName(*name), *place) for name, *place in members), problem
    )


def _read_all(scenes: Iterable[tuple[int, IndexedScene]]) -> Iterator[_Read]:
    """The bytes of the scenes, one after the other; a tar stays open until the next one's turn."""
    shard, file = None, None
    with ExitStack() as opened:
        for number, scene in scenes:
            try:
                if scene.shard != shard:
                    opened.close()
                    shard, file = None, opened.enter_context(open_tar(scene.shard))
                    shard = scene.shard
                members = [] if scene.problem else read_members(file, scene)
                yield _Read(number, scene.key, members, scene.problem)
            except WireframeError as problem:
                yield _Read(number, scene.key, [], str(problem))


def _fault(problem: Exception) -> str:
    return f"a fault of ours, {type(problem).__name__}: {one_line(problem)}"

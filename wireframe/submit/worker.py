"""The process that predicts for ``wireframe submit``: one JSON line in, one JSON line out for everything that happens.

In: ``{"model", "config", "threshold", "workers", "seconds", "scenes": [[number, IndexedScene], ...]}``.
Out: ``{"ready": true}`` once the model is loaded, or ``{"fatal": reason}``; then per scene ``{"begun": number}`` and
later ``{"answer": number, "vertices", "edges"}`` or ``{"failure": number, "reason"}``, answers and failures in the
order of the scenes. Floats cross as their shortest decimal form, which reads back to the same bits.

It ends with its last scene, or when its input does: with the process that started it, whatever became of that.
"""

from __future__ import annotations

import faulthandler
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from wireframe import child
from wireframe.ahead import in_order
from wireframe.errors import WireframeError, one_line
from wireframe.member_names import MemberName
from wireframe.submit.tar_index import IndexedScene, open_tar, read_members

if TYPE_CHECKING:
    from wireframe.sampling import SampledScene

# A scene's key and its members, or why there are none.
_Read = tuple[str, list[tuple[MemberName, bytes]]] | Exception


def main() -> None:
    """Serves one request."""
    requests, events = child.pipes()
    job = json.loads(requests.readline())
    child.end_with(requests)
    # A scene that hangs outside Python also stops the thread that watches the input; this runs beside both.
    faulthandler.dump_traceback_later(min(job["seconds"] + 10.0, 1e6), exit=True)

    def send(**event) -> None:
        print(json.dumps(event), file=events, flush=True)

    try:
        predict = _prepared(job)
    except Exception as problem:
        send(fatal=_reason(problem))
        return
    send(ready=True)
    # What escapes from here ends the process, as a crash does: scenes that were begun are tried once more.
    predict(send)


def _prepared(job: dict) -> Callable[[Callable], None]:
    """Loads the model; the function returned answers the scenes."""
    # Operations import it when they are first called: seconds that no scene should be charged with.
    import torch._dynamo  # noqa: F401

    from wireframe.fusion import fuse_views
    from wireframe.predict import predict_segments, wireframe_of
    from wireframe.pretrained import load_model
    from wireframe.raw_rows import build_row
    from wireframe.sampling import sample_points
    from wireframe.scene import read_scene

    model, graph = load_model(job["model"], job["config"], job["threshold"])
    # Several readers have a core each; one has those that the model does not use at that moment.
    threads = None if job["workers"] == 1 else 1

    def sampled(pair: tuple[int, _Read]) -> tuple[int, SampledScene | Exception]:
        number, read = pair
        if isinstance(read, Exception):
            return pair
        try:
            points = fuse_views(read_scene(build_row(*read)), threads=threads)
            return number, sample_points(points, model.config.num_points, threads=threads)
        except Exception as problem:
            return number, problem

    def predict(send: Callable) -> None:
        with closing(in_order(sampled, _read_all(job["scenes"], send), job["workers"])) as samples:
            for number, sample in samples:
                try:
                    if isinstance(sample, Exception):
                        raise sample
                    found = wireframe_of(predict_segments(sample, model), sample, graph=graph)
                    send(answer=number, vertices=found.vertices.tolist(), edges=found.edges.tolist())
                except Exception as problem:
                    send(failure=number, reason=_reason(problem))

    return predict


def _read_all(scenes: Iterable[tuple[int, list]], send: Callable) -> Iterator[tuple[int, _Read]]:
    """The scenes' members; a tar stays open until the next one's turn."""
    shard = None
    with ExitStack() as opened:
        for number, found in scenes:
            send(begun=number)
            scene = IndexedScene(*found)
            try:
                if scene.problem:
                    raise WireframeError(scene.problem)
                if scene.shard != shard:
                    opened.close()
                    shard = None
                    file = opened.enter_context(open_tar(scene.shard))
                    shard = scene.shard
                yield number, (scene.key, read_members(file, scene))
            except Exception as problem:
                yield number, problem


def _reason(problem: Exception) -> str:
    if isinstance(problem, WireframeError):
        return str(problem)
    return f"a fault of ours, {type(problem).__name__}: {one_line(problem)}"

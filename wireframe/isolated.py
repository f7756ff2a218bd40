"""A map by processes that survives items which kill their process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from wireframe.errors import WireframeError

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_isolated(
    functions: Sequence[Callable[[Item], Result]],
    items: Iterable[Item],
    workers: int,
    initializer: Callable[..., object],
    initargs: Sequence[Any] = (),
) -> Iterator[Result]:
    """``map(functions[0], items)`` in spawned processes, in order; some twice as many items as processes are under way.

    An item whose process died, by itself or with others, is done again in a process of its own: by each function in
    turn, until one survives it.

    Raises:
        WireframeError: an item outlived none of the functions. What a function raises comes through.
    """

    def pool(size: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(size, mp_context=get_context("spawn"), initializer=initializer, initargs=initargs)

    def alone(item: Item) -> Result:
        for function in functions:
            with pool(1) as process:
                try:
                    return process.submit(function, item).result()
                except BrokenProcessPool:
                    continue
        raise WireframeError("a process was killed whatever it was asked for (out of memory?); use fewer --workers")

    awaited: deque[tuple[Item, Future]] = deque()
    shared = pool(workers)

    def first() -> Result:
        item, future = awaited.popleft()
        try:
            return future.result()
        except BrokenProcessPool:
            return alone(item)

    try:
        for item in items:
            try:
                future = shared.submit(functions[0], item)
            except BrokenProcessPool:
                shared.shutdown()
                shared = pool(workers)
                future = shared.submit(functions[0], item)
            awaited.append((item, future))
            if len(awaited) > 2 * workers:
                yield first()
        while awaited:
            yield first()
    finally:
        shared.shutdown(cancel_futures=True)

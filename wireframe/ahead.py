"""``map`` by threads that work a few items ahead.

The native operations, Pillow's decoders and zlib run without the GIL: threads keep the cores busy, and nothing has to
be copied between processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Items taken for each thread beyond what was given back: enough to keep it busy, few enough to bound memory.
_AHEAD_PER_WORKER = 4


def in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``map(function, items)``, some items ahead of the caller.

    The results come in the order of the items. An exception, of ``function`` or of ``items``, is raised where ``map``
    would raise it, after the results before it. When the iterator is closed, by an exception too, items that no thread
    has begun are dropped and the others are waited for.

    Args:
        function: safe to call from several threads.
        items: taken in the calling thread, at most ``4 workers + 1`` beyond what was given back.
        workers: threads; 1 is ``map`` itself, in the calling thread.
    """
    if workers == 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="wireframe-ahead")
    waiting: deque[Future] = deque()
    try:
        for future in _submitted(pool, function, items):
            waiting.append(future)
            if len(waiting) > workers * _AHEAD_PER_WORKER:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _submitted(pool: ThreadPoolExecutor, function: Callable, items: Iterable) -> Iterator[Future]:
    """A future for each item; where ``items`` breaks off, a last one that holds its exception."""
    try:
        for item in items:
            yield pool.submit(function, item)
    except Exception as problem:
        broken: Future = Future()
        broken.set_exception(problem)
        yield broken

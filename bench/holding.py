"""Holds races under pytest-benchmark.

Every rival first computes the whole of its inputs, and one whose result is off the reference (the work's own, else the
first exact rival that runs) is not timed. Then all rounds of all rivals are one call of ``benchmark.pedantic``: rivals
take turns, so that a drift of the machine hits all of them, and times of one turn are pairs, of which ratios are made.
The order within a turn goes round, and short calls on a CPU are made once before, or a rival's time would be that of
what its neighbour left in the caches.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wireframe.bench import clocks
from wireframe.bench.agreement import off_the_reference, relative_error
from wireframe.bench.names import LEFT_OUT, is_ours
from wireframe.bench.race import BACKWARD, FORWARD, GRAPH, How, Race, Rival, Work
from wireframe.errors import one_line

# A call of microseconds is repeated beyond what is asked for, until this much time is spent on its rounds; one of
# seconds less often, so that they take no longer than this, but no less often than the least.
_LEAST_S, _MOST_S = 0.2, 6.0
_MOST_FACTOR, _LEAST_ROUNDS = 20, 3
# Turns that do not count, for calls of less than this; longer ones have run several times by then.
_WARM_UP, _WARM_UP_S = 2, 1.0
# Below this a CPU's time depends on what the call before it left in the caches.
_SHORT_S = 0.02

# Calls in one captured graph, one after another: the time between two graphs is not part of a call.
_GRAPH_CALLS = 16


class Entry:
    """A rival in a race: its calls, what is known of it, and its milliseconds by turn."""

    def __init__(self, rival: Rival) -> None:
        self.rival = rival
        self.failed: str | None = None
        # Whether the device waits while the host launches, and whether it once did not wait long enough.
        self.hidden = self.host_bound = False
        self.error = self.peak_mib = self.first_s = None
        self.times: dict[int, float] = {}
        self.calls: list[_Call | _Replay] = []
        self.estimate_s = self.launch_s = 0.0
        self._stack = contextlib.ExitStack()

    @property
    def ours(self) -> bool:
        return is_ours(self.rival.provider)

    def enter(self, turn: int, prepare: Callable[[float], None], warm: bool = False) -> Callable[[], Any]:
        """What is to be timed; all around it is not, nor what warms the cache: the same call once before."""
        call = self.calls[turn % len(self.calls)]
        if self.failed is None:
            try:
                self._stack.enter_context(self.rival.context())
                if warm:
                    call.prepare()
                    call()
                call.prepare()
                prepare(self.launch_s)
                return self._caught(call)
            except Exception as failure:
                self.failed = reason(failure)
        return _nothing

    def leave(self) -> None:
        self._stack.close()

    def _caught(self, call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            start = time.perf_counter()
            try:
                call()
            except Exception as failure:
                self.failed = reason(failure)
            # So too where the queue of launches was full, which one launch alone does not tell.
            if self.hidden and time.perf_counter() - start >= clocks.pause_s(self.launch_s):
                self.host_bound = True

        return run


def _nothing() -> None:
    pass


class _Call:
    """One call in one mode on one set; ``prepare`` does what is not to be timed."""

    per = 1

    def __init__(self, function: Callable, work: Work, number: int, mode: str) -> None:
        self._function, self._mode, self._output = function, mode, None
        self._gradient = None if work.gradients is None else work.gradients[number]
        self._inputs = _detached(work.inputs[number]) if mode == FORWARD else work.inputs[number]

    def prepare(self) -> None:
        if self._mode == BACKWARD:
            self._output = self._function(*self._inputs)

    def __call__(self) -> Any:
        if self._gradient is None:
            return self._function(*self._inputs)
        if self._mode == FORWARD:
            with torch.no_grad():
                return self._function(*self._inputs)
        output, self._output = self._output, None
        return _gradients(
            self._function(*self._inputs) if output is None else output, self._inputs, self._gradient
        )


class _Replay:
    """Replays a CUDA graph of several calls, which go through the sets; gives the results of each set."""

    per = _GRAPH_CALLS

    def __init__(self, function: Callable, work: Work, mode: str) -> None:
        forward = mode == FORWARD + GRAPH
        self._graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        sets = [(_detached(inputs) if forward else inputs, g) for inputs, g in zip(work.inputs, work.gradients)]
        with torch.set_grad_enabled(not forward):
            with torch.cuda.stream(stream):
                # The replays read what the forward saved.
                outputs = [function(*inputs) for inputs, _ in sets]
                for _ in range(3):
                    for output, (inputs, gradient) in zip(outputs, sets):
                        function(*inputs) if forward else _gradients(output, inputs, gradient, retain_graph=True)
            with torch.cuda.graph(self._graph, stream=stream):
                found = []
                for number in range(self.per):
                    inputs, gradient = sets[number % len(sets)]
                    found.append(
                        function(*inputs)
                        if forward
                        else _gradients(outputs[number % len(sets)], inputs, gradient, retain_graph=True)
                    )
        self._outputs, self._found = outputs, found[: len(sets)]

    def prepare(self) -> None:
        pass

    def __call__(self) -> list:
        self._graph.replay()
        return self._found


def _detached(inputs: tuple) -> tuple:
    """The inputs as inference has them: some rivals refuse what could want a gradient."""
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)


def _gradients(output: Tensor, inputs: tuple, gradient: Tensor, retain_graph: bool = False) -> tuple:
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return torch.autograd.grad(output, wanted, gradient, allow_unused=True, retain_graph=retain_graph)


def hold(race: Race, benchmark: Any, how: How) -> list[Entry]:
    """Runs a race under the fixture of pytest-benchmark; an entry a rival, in their order."""
    work = race.make()
    _forget_other(work)
    entries = _admitted(race, work, how)
    racing = [entry for entry in entries if entry.failed is None]
    if racing:
        turns = schedule([entry.estimate_s for entry in racing], how.repeats, 0.0 if how.small else _LEAST_S)
        quick = [] if how.small else [i for i, entry in enumerate(racing) if entry.estimate_s < _WARM_UP_S]
        warm = [(turn, i) for turn in range(_WARM_UP) for i in quick]
        coming, prepare = iter([*warm, *turns]), clocks.preparation(how.device, race.host, race.cache)
        short = _SHORT_S if how.device == "cpu" and not how.small else 0.0

        def setup() -> tuple:
            turn, number = next(coming)
            entry = racing[number]
            return (entry, entry.enter(turn, prepare, race.cache == "warm" or entry.estimate_s < short)), {}

        benchmark.pedantic(
            lambda entry, run: run(), setup=setup, teardown=lambda entry, run: entry.leave(),
            warmup_rounds=len(warm), rounds=len(turns),
        )  # fmt: skip
        # None where the fixture is disabled: then a single call has run.
        data = benchmark.stats.stats.data if benchmark.stats else ()
        for (turn, number), seconds in zip(turns, data):
            entry = racing[number]
            entry.times[turn] = seconds * 1e3 / entry.calls[0].per
    for entry in entries:
        entry.calls.clear()
    return entries


_last: list[Work] = []


def _forget_other(work: Work) -> None:
    """Before the first race on a work: what was compiled for another one would count against a limit of torch's."""
    if not _last or _last[0] is not work:
        _last[:] = [work]
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def schedule(
    estimates: Sequence[float], repeats: int, least: float = _LEAST_S, most: float = _MOST_S
) -> list[tuple[int, int]]:
    """(turn, rival) of every round. Slow rivals run in every second, fourth, ... turn, so that turns stay pairs.

    Of the turns of the same rivals each begins with the next one.
    """
    wanted = [
        max(min(_LEAST_ROUNDS, repeats), min(max(repeats, least / s), repeats * _MOST_FACTOR, most / s))
        for s in (max(estimate, 1e-9) for estimate in estimates)
    ]
    turns = math.ceil(max(wanted))
    strides = [2 ** int(math.log2(turns / math.ceil(rounds))) for rounds in wanted]
    rounds, begun = [], Counter()
    for turn in range(turns):
        taking = [i for i, stride in enumerate(strides) if turn % stride == 0]
        first = begun[len(taking)] % max(1, len(taking))
        begun[len(taking)] += 1
        rounds += [(turn, i) for i in (*taking[first:], *taking[:first])]
    return rounds


def _admitted(race: Race, work: Work, how: How) -> list[Entry]:
    """An entry a rival after its first calls; those that failed, or computed something else, say why."""
    entries = [Entry(r) for r in work.rivals if race.mode.removesuffix(GRAPH) in r.modes]
    reference, without = None, ""
    if work.reference is not None:
        try:
            reference = [work.reference(*inputs) for inputs in work.inputs]
        except Exception as failure:
            without = f"the reference: {reason(failure)}"
    for entry in entries:
        rival = entry.rival
        if rival.slow and how.late():
            entry.failed = LEFT_OUT
            continue
        try:
            with rival.context():
                found = _first_calls(entry, race, work, how)
            if rival.exact and without:
                raise ValueError(f"there is nothing to hold it against, {without}")
            if rival.exact and reference is None:
                reference = found
                # Ours beside itself would be right whatever it computes.
                entry.error = None if entry.ours else 0.0
            elif rival.exact:
                entry.error = relative_error(found, reference)
                budget = race.budget if rival.budget is None else rival.budget
                if not entry.error <= budget:
                    entry.failed = off_the_reference(entry.error, budget)
        except Exception as failure:
            entry.failed = reason(failure)
        if entry.failed:
            entry.calls.clear()
            if rival.exact and reference is None and not without:
                without = f"{rival.provider}: {entry.failed}"
    return entries


def _first_calls(entry: Entry, race: Race, work: Work, how: How) -> list:
    """Builds a rival's calls, and runs each; gives the results of every set. Fills what the entry says of them."""
    provider, start = entry.rival.provider, time.perf_counter()
    if provider not in work.built:
        try:
            work.built[provider] = entry.rival.build()
        except Exception as failure:
            work.built[provider] = failure
    function = work.built[provider]
    if isinstance(function, Exception):
        raise function
    if race.mode.endswith(GRAPH):
        entry.calls = [_Replay(function, work, race.mode)]
    else:
        entry.calls = [_Call(function, work, number, race.mode) for number in range(len(work.inputs))]
    found = [_run(entry.calls[0], how.device)]
    entry.first_s = round(time.perf_counter() - start, 3)
    found += [_run(call, how.device) for call in entry.calls[1:]]
    start = time.perf_counter()
    entry.calls[0].prepare()
    launched = time.perf_counter()
    entry.calls[0]()
    entry.launch_s = time.perf_counter() - launched
    if how.device != "cpu":
        torch.cuda.synchronize()
    entry.hidden = how.device != "cpu" and not race.host
    entry.host_bound = entry.hidden and clocks.too_long(entry.launch_s)
    entry.estimate_s = time.perf_counter() - start
    # What a graph needs was taken when it was captured.
    if entry.estimate_s < _MOST_S / 2 and isinstance(entry.calls[0], _Call):
        entry.calls[0].prepare()
        entry.peak_mib = clocks.peak_mib(entry.calls[0], how.device)
    return found[0] if race.mode.endswith(GRAPH) else found


def _run(call: _Call | _Replay, device: str) -> Any:
    call.prepare()
    found = call()
    if device != "cpu":
        torch.cuda.synchronize()
    return found


def reason(failure: Exception) -> str:
    """What went wrong, on one line; of torch.compile's explanations what was raised under it."""
    text = str(failure)
    return one_line(text.partition("Developer debug context: ")[2] or text or failure)

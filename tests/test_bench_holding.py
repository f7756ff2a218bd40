"""How a race is held: which call is timed, in which order, what is equal; without the command around it."""

import math
import time

import numpy as np
import pytest
import torch

from wireframe.bench import clocks, holding
from wireframe.bench.race import BACKWARD, BOTH, FORWARD, MODES, How, Race, Rival, Work


def test_a_backward_is_timed_without_its_forward():
    calls = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls.append("forward")
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            calls.append("backward")
            return gradient

    work = Work([(torch.ones(2, requires_grad=True),)], [], [torch.ones(2)])
    seen = {}
    for mode in MODES:
        call = holding._Call(Watched.apply, work, 0, mode)
        call.prepare()
        before = len(calls)
        call()
        seen[mode] = calls[before:]
    assert seen == {FORWARD: ["forward"], BACKWARD: ["backward"], BOTH: ["forward", "backward"]}


def test_slow_rivals_take_every_second_fourth_turn_and_never_less_than_three():
    turns = holding.schedule([0.001, 0.05, 60.0], repeats=9, least=0.2, most=6.0)
    of = [[turn for turn, rival in turns if rival == number] for number in range(3)]
    assert len(of[0]) == 180 and len(of[1]) >= 9 and 3 <= len(of[2]) < 9
    assert set(of[2]) <= set(of[1]) <= set(of[0])
    # No rival always follows the same one.
    assert holding.schedule([1.0, 1.0, 1.0], 3) == [
        (0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (1, 0), (2, 2), (2, 0), (2, 1),
    ]  # fmt: skip
    assert [turn for turn, _ in turns] == sorted(turn for turn, _ in turns)
    assert {rival for turn, rival in turns if turn in of[2] and turns[turns.index((turn, rival)) - 1][0] < turn} > {0}
    assert holding.schedule([1e-6], 2, least=0.0) == [(0, 0), (1, 0)]


def test_errors_are_relative_and_other_shapes_are_infinitely_wrong():
    a, masked = torch.tensor([3.0, 4.0]), torch.tensor([3.0, -math.inf])
    assert holding.relative_error([a, 2 * a], [a, a]) == 1 and holding.relative_error(a, a[None]) == math.inf
    assert holding.relative_error(masked, masked) == 0 and holding.relative_error(masked, a) == math.inf
    assert holding.relative_error(a, masked) == math.inf == holding.relative_error(-masked, masked)
    assert holding.relative_error([a], [a, a]) == math.inf
    assert holding.relative_error(np.array([1, 2]), torch.tensor([1, 2])) == 0


def test_arrays_by_name_are_compared_and_nothing_to_compare_is_no_agreement():
    a = torch.tensor([3.0, 4.0])
    assert holding.relative_error({"x": a, "n": 2}, {"n": 2, "x": a}) == 0
    assert holding.relative_error({"x": 2 * a}, {"x": a}) == 1 == holding.relative_error(4, 2)
    assert holding.relative_error({}, {}) == holding.relative_error("b", "b") == math.inf


class Benchmark:
    """What ``hold`` asks of pytest-benchmark's fixture; nothing is timed."""

    stats = None

    def pedantic(self, target, setup, teardown, warmup_rounds, rounds):
        for _ in range(warmup_rounds + rounds):
            arguments, _ = setup()
            target(*arguments)
            teardown(*arguments)


@pytest.mark.parametrize("short", [True, False])
def test_a_short_call_on_a_cpu_is_made_once_before_it_is_timed(monkeypatch, short):
    calls, at = [], []
    monkeypatch.setattr(holding, "_LEAST_S", 0.0)
    if not short:
        monkeypatch.setattr(holding, "_SHORT_S", 0.0)

    def run(x):
        calls.append(1)
        return x

    benchmark = Benchmark()
    pedantic = benchmark.pedantic
    benchmark.pedantic = lambda *a, **how: (at.append(len(calls)), pedantic(*a, **how))
    race = Race("op", FORWARD, "1", {}, "float32", lambda: Work([(torch.ones(1),)], [Rival("ours", lambda: run)]))
    holding.hold(race, benchmark, How(small=False, repeats=4))
    assert len(calls) - at[0] == (2 + 4) * (2 if short else 1)


def test_a_call_that_the_pause_does_not_hide_is_marked(monkeypatch):
    calls = []
    entry = holding.Entry(Rival("ours", lambda: None))
    entry.calls = [holding._Call(lambda: calls.append(time.perf_counter()), Work([()], []), 0, FORWARD)]
    monkeypatch.setattr(holding.clocks, "pause_s", lambda launch_s: 0.02)
    for hidden, pause, bound in ((True, 0.0, False), (False, 0.03, False), (True, 0.03, True)):
        entry.hidden = hidden
        entry.calls[0]._function = lambda pause=pause: (time.sleep(pause), calls.append(pause))
        entry.enter(0, lambda launch_s: None)()
        entry.leave()
        assert entry.host_bound is bound


def test_the_device_waits_twice_as_long_as_the_host_launches(monkeypatch):
    cycles = []
    monkeypatch.setattr(torch.cuda, "_sleep", cycles.append, raising=False)
    for launch in (1e-5, 0.01, 0.04, 3.0):
        clocks.preparation("cuda", False, "warm")(launch)
    assert cycles == [6_000_000, 40_000_000, 160_000_000, 200_000_000]
    assert [clocks.too_long(launch) for launch in (0.01, 0.04, 3.0)] == [False, False, True]


@pytest.mark.parametrize(("cache", "calls"), [("warm", 2), ("cold", 1)])
def test_what_is_timed_warm_has_run_on_its_set_just_before(cache, calls):
    seen = []
    entry = holding.Entry(Rival("ours", lambda: None))
    entry.calls = [holding._Call(lambda x: seen.append(x), Work([(5,)], []), 0, FORWARD)]
    entry.enter(0, lambda launch: seen.append("timed from here"), cache == "warm")()
    assert seen == [5, "timed from here", 5][2 - calls :]

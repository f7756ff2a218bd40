"""Whole steps beside rivals: what is timed with what, what is kept when something fails, and what the table says."""

import dataclasses
import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch

from wireframe.bench import step, step_rivals, timing
from wireframe.bench.gpus import SPECIFIED, specified
from wireframe.bench.plain_model import Told
from wireframe.bench.report_rows import read_rows
from wireframe.bench.step_rivals import COMPILED, FIXED, FREE, GRAPHED, OURS, PLAIN, PROVIDERS, PUBLISHED, Provider
from wireframe.cli import main
from wireframe.train.config import BASE_CONFIG, load_config

MACHINE = {"device": "a device"}
TOLD = Told(torch.ones(8), 2.0)
TINY = ["bench", "step", "--device", "cpu", "--small", "--stage", "1", "--rounds", "1", "--steps", "1"]


@pytest.fixture(scope="module")
def bench():
    return step_rivals.make_bench(0, "cpu", small=True)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def watched(monkeypatch, *providers):
    """Providers in the place of all others; what is called, by name with the number of steps, is noted."""
    calls = []

    def build(name, broken):
        def built(bench):
            if broken == "build":
                raise RuntimeError("does\nnot build")
            return run

        def run(count):
            if broken == "late" and len([call for call in calls if call[0] == name]) == 2:
                raise RuntimeError("out of memory")
            calls.append((name, count))
            return TOLD

        return built

    made = [Provider(name, build(name, broken), slow=slow) for name, broken, slow in providers]
    monkeypatch.setattr(step, "PROVIDERS", made)
    return calls


def test_every_rival_is_timed_in_turns_with_ours(bench, monkeypatch):
    calls = watched(monkeypatch, (OURS, None, False), ("a", None, False), ("b", None, True))
    rows = list(step.measure_steps(bench, MACHINE, rounds=2, steps=4))
    # One step to be held against ours, two when it is built for good.
    first, turn = [(OURS, 1), (OURS, 2)] + 3 * [(OURS, 4)], lambda name: [
        (name, 1), (name, 2)] + 3 * [(name, 4), (OURS, 4)]
    assert calls == first + turn("a") + turn("b")
    assert [row["provider"] for row in rows] == [OURS, "a", "b"]
    # One round is to warm up.
    assert all(row["calls"] == 2 and row["steps"] == 4 and row["device"] == "a device" for row in rows)
    assert rows[0]["ours_ms"] is None and all(row["ours_ms"] > 0 for row in rows[1:])


@pytest.mark.parametrize("broken, said", [("build", "does not build"), ("late", "out of memory")])
def test_a_rival_that_raises_has_a_row_with_the_reason_and_stops_nobody(bench, monkeypatch, broken, said):
    watched(monkeypatch, (OURS, None, False), ("a", broken, False), ("b", None, False))
    ours, failed, other = step.measure_steps(bench, MACHINE, rounds=1, steps=1)
    assert failed["failed"] == said and failed["provider"] == "a" and failed["device"] == "a device"
    assert failed["p50_ms"] is None and ours["p50_ms"] > 0 and other["ours_ms"] > 0


def planted(calls, **loss):
    """Plain PyTorch with another loss than ours, and a note of the steps it takes."""

    def build(bench):
        config = dataclasses.replace(bench.config, loss=dataclasses.replace(bench.config.loss, **loss))
        run = step_rivals._plain(bench._replace(config=config), False)
        return lambda count: calls.append(count) or run(count)

    return build


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("precision, loss", [("float32", {"iters": 5}), ("bfloat16", {"conf_weight": 0.0})])
def test_a_wrong_rival_is_not_timed_and_says_so(bench, monkeypatch, precision, loss):
    right, wrong = [], []
    ours = next(provider for provider in PROVIDERS if provider.name == OURS)
    monkeypatch.setattr(step, "PROVIDERS", [
        ours, Provider("right", planted(right)), Provider("wrong", planted(wrong, **loss), slow=True),
    ])  # fmt: skip
    rounded = bench._replace(config=dataclasses.replace(bench.config, precision=precision))
    found = {row["provider"]: row for row in step.measure_steps(rounded, MACHINE, rounds=1, steps=2)}
    assert found[OURS]["error"] is None and found["right"]["p50_ms"] > 0 and right == [1, 2, 2, 2]
    budget = step._BUDGETS[precision]
    assert found["right"]["error"] < budget / 2 < budget < found["wrong"]["error"] < 0.1
    assert found["wrong"]["failed"] == f"off the reference by {found['wrong']['error']:.2g}, budget {budget:g}"
    assert found["wrong"]["p50_ms"] is None and found["wrong"]["calls"] == 0 and wrong == [1]


def test_a_wrong_rival_of_the_command_is_a_line_of_its_table(tmp_path, monkeypatch, capsys):
    providers = [Provider(name, lambda bench, n=norm: lambda count: Told(torch.ones(8), n)) for name, norm in (
        (OURS, 2.0), ("a", 2.2))]  # fmt: skip
    monkeypatch.setattr(step, "PROVIDERS", providers)
    assert main([*TINY, "--out", str(tmp_path / "rows.jsonl")]) == 0
    assert "| a | not measured: off the reference by 0.1, budget 0.0001 |" in capsys.readouterr().out
    # One of ours that is wrong is a failure.
    monkeypatch.setattr(step, "PROVIDERS", [providers[0], providers[1]._replace(name=FREE)])
    assert main([*TINY, "--out", str(tmp_path / "rows.jsonl")]) == 1
    assert len(read_rows([tmp_path / "rows.jsonl"])) == 4


def test_a_rival_whose_time_is_over_after_its_check_is_not_compiled_again(bench, monkeypatch):
    calls = watched(monkeypatch, (OURS, None, False), ("slow", None, True))
    asked = []
    rows = list(step.measure_steps(bench, MACHINE, 1, 1, late=lambda: asked.append(1) or len(asked) > 1))
    assert rows[1]["failed"] == "left out, the time is over" and [c for c in calls if c[0] == "slow"] == [("slow", 1)]


def test_without_ours_rivals_are_timed_alone(bench, monkeypatch):
    calls = watched(monkeypatch, (OURS, "late", False), ("a", None, False))
    ours, other = step.measure_steps(bench, MACHINE, rounds=1, steps=3)
    assert "failed" in ours and other["ours_ms"] is None and other["p50_ms"] > 0
    assert calls == [(OURS, 1), (OURS, 2), ("a", 1), ("a", 2), ("a", 3), ("a", 3)]


def test_when_the_time_is_over_only_what_need_not_be_compiled_is_built(bench, monkeypatch):
    calls = watched(monkeypatch, (OURS, None, False), ("slow", None, True), ("quick", None, False))
    rows = list(step.measure_steps(bench, MACHINE, 1, 1, late=lambda: True))
    assert [row.get("failed") for row in rows] == [None, "left out, the time is over", None]
    assert {name for name, _ in calls} == {OURS, "quick"}


def test_a_rival_is_gone_before_the_next_is_built(bench, monkeypatch):
    alive = []

    class Weights:
        def __init__(self):
            # As modules and optimisers refer to one another.
            self.me = self

        def __call__(self, count):
            # Of ours the second one, which is timed beside all others.
            assert [found() is None for found in alive[2:-1]] == [True] * len(alive[2:-1])
            assert len(alive) == 1 or alive[0]() is None
            return TOLD

    def build(bench):
        run = Weights()
        alive.append(weakref.ref(run))
        return run

    monkeypatch.setattr(step, "PROVIDERS", [Provider(name, build) for name in (OURS, "a", "b", "c")])
    rows = list(step.measure_steps(bench, MACHINE, 1, 1))
    assert len(alive) == 8 and not any("failed" in row for row in rows), rows
    gc.collect()
    assert [found() is None for found in alive] == [True] * 8


def test_every_row_is_kept_before_the_next_provider_is_built(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"

    def killed(bench):
        assert [json.loads(line)["provider"] for line in out.read_text().splitlines()] == [OURS]
        assert "\n| ours | " in capsys.readouterr().out
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "PROVIDERS", [Provider(OURS, lambda bench: lambda count: TOLD), Provider("a", killed)])
    assert main([*TINY, "--out", str(out)]) == 130
    assert len(out.read_text().splitlines()) == 1


def test_rows_go_to_the_file_of_the_device_and_name_the_command(bench, tmp_path, monkeypatch):
    (tmp_path / "bench").mkdir()
    monkeypatch.setattr(timing, "ROOT", tmp_path)
    monkeypatch.setattr(timing, "commit", lambda: "abc1234")
    monkeypatch.setattr(timing, "cpu_name", lambda: "Made (R) CPU")
    monkeypatch.setattr(step, "make_bench", lambda *_: bench)
    watched(monkeypatch, (OURS, None, False))
    assert main([*(argument for argument in TINY if argument != "--small"), "--seconds", "900"]) == 0
    (row,) = map(json.loads, (tmp_path / "bench" / "results" / "made-r-cpu.jsonl").read_text().splitlines())
    assert row["command"] == "wireframe bench step --stage 1 --rounds 1 --steps 1 --device cpu --seconds 900"


def test_a_failure_of_ours_is_the_exit_status(monkeypatch, capsys):
    watched(monkeypatch, (OURS, None, False), ("a", "build", False))
    assert main(TINY) == 0
    watched(monkeypatch, (OURS, None, False), (FREE, "build", False))
    assert main(TINY) == 1
    assert "| ours, torch's determinism off | not measured: does not build |" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
def test_every_provider_takes_steps(tmp_path, monkeypatch, capsys):
    # What a compiler makes of a step is not of interest here.
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    out = tmp_path / "rows.jsonl"
    assert main([*TINY, "--out", str(out)]) == 0
    rows = {row["provider"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == [provider.name for provider in PROVIDERS]
    failed = {name: row["failed"] for name, row in rows.items() if "failed" in row}
    assert failed == {GRAPHED: "there are no graphs on a CPU"}
    assert all(row["p50_ms"] > 0 for name, row in rows.items() if name != GRAPHED)
    # The host's loader gives the scenes of ours too.
    assert all(row["error"] < 1e-5 for name, row in rows.items() if name not in (OURS, GRAPHED))
    assert rows[OURS]["error"] is None is rows[GRAPHED]["error"] and rows[FREE]["error"] == 0
    printed = capsys.readouterr().out
    assert "stage 1, 8 x 64, float32" in printed and printed.count("\n| ") == 1 + len(rows)
    # A CPU meets no goal.
    assert printed.count("not measured yet") == 5


def test_the_rivals_of_the_goals_come_first():
    slow = [provider.name for provider in PROVIDERS if provider.slow]
    assert slow[:3] == [GRAPHED, COMPILED + FIXED, PUBLISHED] and PROVIDERS[0].name == OURS
    assert {provider.name for provider in PROVIDERS[:3] if not provider.slow} >= {OURS, FREE}


def test_batches_of_rivals_come_without_weights_of_ours(bench, monkeypatch):
    def forbidden(*arguments, **keywords):
        raise AssertionError("weights that nobody trains")

    monkeypatch.setattr(step_rivals, "Perceiver", forbidden)
    batches = bench.batches()
    first, second = next(batches), next(batches)
    assert first.target.shape == second.target.shape == (8, 64, 2, 3)
    assert not torch.equal(first.scene_keys, second.scene_keys)


def test_a_span_is_read_while_the_next_one_runs():
    seen = []

    class Steps:
        def start(self, begin, end, stop):
            seen.append((begin, end))
            last = SimpleNamespace(losses=torch.tensor([[float(end), 0.0, 0.0, 0.0]]), grad_norm=0.5)
            return SimpleNamespace(results=lambda: seen.append(f"read {begin}") or [None, last])

    run = step_rivals._in_spans(Steps(), 100, 5)
    assert [(told.losses.tolist(), told.grad_norm) for told in (run(12), run(3))] == [([112.0], 0.5), ([115.0], 0.5)]
    assert seen == [
        (100, 105), (105, 110), "read 100", (110, 112), "read 105", "read 110", (112, 115), "read 112",
    ]  # fmt: skip


def row(provider, ms, ours=None, **more):
    found = {"provider": provider, "p20_ms": ms, "p50_ms": ms, "p80_ms": 2 * ms, "ours_ms": ours}
    return {**found, "peak_mib": None, "mfu": None, **more}


def test_goals_are_held_against_ours_in_the_turns_of_the_rival():
    rows = [
        row(OURS, 99.0, mfu=0.5),
        row(FREE, 5.0, ours=5.2),
        row(GRAPHED, 10.0, ours=8.0),
        {"provider": COMPILED + FIXED, "failed": "left out"},
        row(PUBLISHED, 20.0, ours=9.0),
    ]
    assert [line.rpartition(", ")[2] for line in step.goals(rows)] == [
        "measured 0.8: met", "not measured yet", "measured 0.45: missed", "measured 1.04: missed", "measured 0.5: met",
    ]  # fmt: skip
    assert step.goals(rows)[0] == "ours / torch.compile in a CUDA graph: goal <= 0.9, measured 0.8: met"
    assert all(line.endswith("not measured yet") for line in step.goals([]))


def test_the_table_names_what_mfu_is_of():
    rows = [
        row(OURS, 4.0, mfu=0.185, launches=643, idle=0.02, peak_mib=1500.5),
        row(PLAIN, 27.0, ours=4.5),
        {"provider": COMPILED, "failed": "left out, the time is over"},
    ]
    head, rule = step.table_head("NVIDIA H200").splitlines()
    lines = [step.table_line(row) for row in rows]
    assert "| MFU, of 989 TFLOP/s |" in head and "| MFU |" in step.table_head("AMD EPYC")
    assert lines == [
        "| ours | 4 | 4-8 |  | 18.5% | 643 | 2.0% | 1500.5 |",
        "| torch eager | 27 | 27-54 | 4.5 |  |  |  |  |",
        "| torch.compile | not measured: left out, the time is over | | | | | | |",
    ]
    assert len({line.count("|") for line in (head, rule, *lines)}) == 1


@pytest.mark.parametrize("device, name", [
    ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA H100 80GB HBM3", "H100 80GB HBM3"), ("NVIDIA H200", "H200"),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA H100 PCIe", None), ("NVIDIA GH200", None),
    ("AMD EPYC", None),
])  # fmt: skip
def test_the_data_sheet_is_that_of_the_very_card(device, name):
    assert specified(device) == (SPECIFIED[name] if name else None)


def test_mfu_is_the_models_operations_against_the_data_sheet():
    published = step_rivals.Bench(load_config(BASE_CONFIG), 0, SimpleNamespace(points=2048), torch.device("cpu"), "")
    found = step._utilisation(5.0, published, "NVIDIA H100 80GB HBM3")
    # Two operations a multiply-add, and a backward pass of twice the forward one.
    assert found == {"mfu": pytest.approx(2 * 3 * 32 * 3817e6 / 5e-3 / 989e12, abs=1e-4), "mfu_of": 989.0}
    assert step._utilisation(5.0, published, "AMD EPYC") == {"mfu": None, "mfu_of": None}

"""Figures that need no clock: the committed ones hold, a change is seen, and what cannot be compared says so."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from wireframe.bench import guard, guard_extension, guard_replay, guard_step, guard_values, step_cases
from wireframe.bench.guard_values import Counted, NotComparable, differences
from wireframe.bench.step_aten import MOVEMENT, PRODUCTS
from wireframe.bench.step_trace import FORWARD, Row
from wireframe.kernels import native

ROOT = Path(__file__).resolve().parent.parent


def hold(name):
    try:
        lines = guard.part(name).check()
    except NotComparable as problem:
        pytest.skip(str(problem))
    if lines:
        pytest.fail("\n".join([*lines, guard.verdict(name, lines)]), pytrace=False)


@pytest.fixture
def countable():
    """Skips where callgrind is not there, or nothing for it to count."""
    try:
        guard_extension.made_with()
    except NotComparable as problem:
        pytest.skip(str(problem))


@pytest.fixture(scope="module")
def calls():
    if native.problem():
        pytest.skip(native.problem())
    return guard_extension.calls()


@pytest.mark.slow
def test_native_operations_take_the_committed_instructions():
    hold("extension")


@pytest.mark.slow
def test_the_step_asks_for_the_committed_launches_products_and_bytes():
    pytest.importorskip("triton")
    hold("step")


@pytest.mark.slow
def test_no_triton_kernel_is_newer_than_the_committed_report():
    pytest.importorskip("triton")
    done = compiling("-m", "wireframe.bench.guard", "static")
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
    if "not compared" in done.stdout:
        pytest.skip(done.stdout)


@pytest.mark.parametrize("before, after, tolerance, lines", [
    ({"a": {"n": 1000}}, {"a": {"n": 1010}}, 0.01, []),
    ({"a": {"n": 1000}}, {"a": {"n": 1011}}, 0.01, ["a, n: 1000 -> 1011 (+1.1 %)"]),
    ({"a": {"n": 1000}}, {"a": {"n": 900}}, 0.01, ["a, n: 1000 -> 900 (-10 %)"]),
    ({"a": {"n": 1000}}, {"a": {"n": 1001}}, 0.0, ["a, n: 1000 -> 1001 (+0.1 %)"]),
    ({"a": {"n": 0}}, {"a": {"n": 8}}, 0.0, ["a, n: 0 -> 8"]),
    ({"a": {"n": 1, "m": 2}}, {"a": {"n": 1}}, 0.0, ["a, m: 2 -> None"]),
    ({"a": {"n": 1, "m": 2}}, {}, 0.0, ["a: n 1, m 2 -> none"]),
    ({}, {"a": {"n": 1}}, 0.01, ["a: none -> n 1"]),
    ({"a": {"n": "x"}}, {"a": {"n": "y"}}, 0.01, ["a, n: x -> y"]),
])  # fmt: skip
def test_a_change_in_either_direction_is_a_line(before, after, tolerance, lines):
    assert differences(before, after, tolerance) == lines


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A part whose figures and tools may be changed, with values of its own in place of the committed ones."""
    now = SimpleNamespace(tools={"compiler": "g++ 12"}, figures={"a": {"n": 100}}, path=tmp_path / "values.json")

    def tools():
        if now.tools is None:
            raise NotComparable("no tools")
        return now.tools

    counted = Counted("toy", tools, lambda: now.figures, tolerance=0.01)
    other = Counted("other", dict, lambda: {"b": {"n": 1}})
    kept = {
        "toy": SimpleNamespace(check=lambda: counted.check(now.path), update=lambda: counted.update(now.path)),
        "other": SimpleNamespace(check=lambda: other.check(now.path), update=lambda: other.update(now.path)),
    }
    monkeypatch.setattr(guard, "PARTS", tuple(kept))
    monkeypatch.setattr(guard, "part", kept.get)
    assert guard.main(["--update"]) == 0
    return now


def test_figures_that_were_committed_hold(toy, capsys):
    capsys.readouterr()
    assert guard.main([]) == 0
    assert capsys.readouterr().out == "toy: as committed\nother: as committed\n"


def test_a_difference_fails_and_says_how_to_accept_it_which_then_holds(toy, capsys):
    toy.figures = {"a": {"n": 90}}
    capsys.readouterr()
    assert guard.main([]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "a, n: 100 -> 90 (-10 %)",
        "toy: 1 difference; to accept: python -m wireframe.bench.guard toy --update",
        "other: as committed",
    ]
    before = json.loads(toy.path.read_text())
    assert guard.main(["toy", "--update"]) == 0
    assert capsys.readouterr().out.endswith("toy: 1 difference, now committed\n")
    assert guard.main([]) == 0
    assert json.loads(toy.path.read_text())["other"] == before["other"]


def test_figures_of_other_tools_are_not_compared_and_a_line_says_so(toy, capsys):
    toy.figures, toy.tools = {"a": {"n": 1}}, {"compiler": "clang 15"}
    capsys.readouterr()
    assert guard.main(["toy"]) == 0
    said = "toy: not compared: the figures are of compiler g++ 12 (here clang 15); for those of here: "
    assert capsys.readouterr().out == f"{said}python -m wireframe.bench.guard toy --update\n"
    assert guard.main(["toy", "--update"]) == 0 and guard.main(["toy"]) == 0


def test_what_cannot_be_counted_is_no_failure_but_cannot_be_committed(toy, capsys):
    before, toy.tools = toy.path.read_bytes(), None
    assert guard.main(["toy"]) == 0
    assert guard.main(["toy", "--update"]) == 2
    assert capsys.readouterr().out.count("toy: not compared: no tools\n") == 2
    assert toy.path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", '{"toy": 1}', '{"toy": {"figures": {}}}', "{}"])
def test_a_file_without_the_figures_is_one_line(toy, text, capsys):
    toy.path.write_text(text)
    assert guard.main(["toy"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("toy: ") and "figures of" in line


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        guard.main(["kernel"])
    assert "unknown part 'kernel': one of extension, static, step" in capsys.readouterr().err


def test_every_operation_of_the_extension_is_counted(calls):
    module = native.module()
    bound = {name for name in dir(module) if callable(getattr(module, name)) and not name.startswith("_")}
    assert {name for name, _ in calls.values()} == bound
    committed = json.loads(guard_values.VALUES.read_text())["extension"]["figures"]
    assert committed.keys() == calls.keys()
    # Beside these what pybind11 does around a call, some thousands, is small.
    assert all(figures["instructions"] > 300_000 for figures in committed.values())


def test_recorded_calls_do_again_what_they_did(calls, tmp_path):
    guard_replay.write(tmp_path, calls.values())
    replayed = guard_replay.read(tmp_path)
    for (name, arguments), (again, buffers) in zip(calls.values(), replayed, strict=True):
        function = getattr(native.module(), name)
        first, second = function(*arguments), function(*buffers)
        # A file that the reference has to read would be -1.
        assert again == name and first == second != -1
        assert flat(arguments) == flat(buffers)


def flat(arguments):
    """The bytes of the arrays among arguments, and the rest."""
    found = []
    for argument in arguments:
        if isinstance(argument, (tuple, list)):
            found += flat(argument)
        else:
            found.append(bytes(argument) if isinstance(argument, (np.ndarray, memoryview, bytes)) else argument)
    return found


@pytest.mark.usefixtures("countable")
def test_instructions_are_those_of_each_call(calls):
    name, (image, colors, ids, threads) = calls["colors_to_ids"]
    tall = [np.concatenate([image, image]), colors, np.concatenate([ids, ids]), threads]
    first, wide, again = guard_extension.count([calls["colors_to_ids"], (name, tall), calls["colors_to_ids"]])
    assert first == again > image.shape[0]
    assert wide == pytest.approx(2 * first, rel=0.02)


def test_only_instructions_of_the_module_itself_are_added():
    profile = """\
version: 1
positions: line
events: Ir
summary: 1000

ob=/lib/libc.so.6
fn=malloc
12 900

ob=/a/_C.so
fi=x.h
fn=f
0 7
fe=y.h
15 20
cob=/lib/libc.so.6
cfn=malloc
calls=3 12
15 900
16 3
fn=g
1 40
"""
    assert guard_extension._own(profile, "/a/_C.so") == 7 + 20 + 3 + 40


def test_a_failure_of_valgrind_is_one_line(calls, tmp_path, monkeypatch, capsys):
    fake = tmp_path / "valgrind"
    fake.write_text("#!/bin/sh\necho the first >&2\necho and the last >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(guard_extension, "calls", lambda: calls)
    monkeypatch.setattr(guard_extension, "made_with", dict)
    part = Counted("extension", dict, guard_extension.measure)
    monkeypatch.setattr(guard, "part", lambda name: SimpleNamespace(update=lambda: part.update(tmp_path / "v.json")))
    assert guard.main(["extension", "--update"]) == 2
    assert capsys.readouterr().err == "extension: valgrind failed: the first and the last\n"
    # One that counts nothing is no count of zero.
    fake.write_text("#!/bin/sh\nexit 0\n")
    assert guard.main(["extension", "--update"]) == 2
    assert capsys.readouterr().err == f"extension: callgrind told 0 calls apart, of {len(calls)}\n"


def test_without_valgrind_or_under_another_compiler_nothing_is_compared(monkeypatch, calls):
    monkeypatch.setattr(guard_extension.shutil, "which", lambda name: None)
    with pytest.raises(NotComparable, match="valgrind is not installed; run: apt-get install valgrind"):
        guard.part("extension").check()
    monkeypatch.setattr(guard_extension.shutil, "which", lambda name: name)
    monkeypatch.setattr(native, "module", lambda name="_C": SimpleNamespace(compiler="clang 15.0.6"))
    with pytest.raises(NotComparable, match=r"\(here clang 15.0.6\); for those of here: .* extension --update"):
        guard.part("extension").check()


def test_a_planted_copy_is_told_by_kind_of_operation(monkeypatch):
    def row(name, kind, launches=1, flops=0.0, moved=100):
        return Row(name, kind, FORWARD, "", True, flops, moved, launches, {}, {})

    rows = [row("mm", PRODUCTS, flops=8e9), row("mm", PRODUCTS, flops=2e9), row("clone", MOVEMENT)]
    monkeypatch.setattr(step_cases, "traced", lambda of, stage: SimpleNamespace(rows=rows))
    before = guard_step.measure(stages=(1,))
    assert before["ours, stage 1, products: mm"] == {"launches": 2, "flops": 10**10, "bytes": 200}
    rows.append(row("clone", MOVEMENT, moved=50))
    assert differences(before, guard_step.measure(stages=(1,)), guard_step.STEP.tolerance) == [
        f"{of}, stage 1, gather, cat, copy: clone, {change}"
        for of in ("ours", "plain")
        for change in ("launches: 1 -> 2 (+100 %)", "bytes: 100 -> 150 (+50 %)")
    ]


def test_a_step_under_another_torch_is_not_compared(monkeypatch):
    monkeypatch.setattr(guard_step.importlib.metadata, "version", lambda name: "2.99.1+cu130")
    with pytest.raises(NotComparable, match=r"torch .* \(here 2.99.1\); for those of here: .* step --update"):
        guard.part("step").check()


SCRIPT = """
import json, sys
from pathlib import Path
from wireframe.bench import guard_static, static

path = Path(sys.argv[1])
static.ARCHITECTURES = (80, 89)
static.run((80, 89), path, workers=1, progress=False, module="static_toys")
text = path.read_text()
compiled = []
measure_all = static.measure_all

def counting(wanted, *rest, **how):
    compiled.append(len(wanted))
    return measure_all(wanted, *rest, **how)

static.measure_all = counting

def of(change):
    report = json.loads(text)
    row = next(row for row in report["rows"] if (row["arch"], row["dtype"]) == (80, "fp16"))
    change(report, row)
    path.write_text(json.dumps(report))
    try:
        return guard_static.check(path, "static_toys")
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"

found = {
    "true": of(lambda report, row: None),
    "source": of(lambda report, row: row.update(hash="0")),
    "figures": of(lambda report, row: row.update(hash="0", registers=2 * row["registers"])),
    "updated": guard_static.update(path, "static_toys"),
    "after": guard_static.check(path, "static_toys"),
}
before, after = json.loads(text)["rows"], json.loads(path.read_text())["rows"]
found["same"] = [{**row, "seconds": 0} for row in before] == [{**row, "seconds": 0} for row in after]
found["gone"] = of(lambda report, row: report["rows"].append({**row, "hash": "1", "dim": 9}))
found["compiled"] = list(compiled)
found["old"] = of(lambda report, row: report.update(triton="3.0.0"))
static.problems = lambda rows, version: [f"{row['arch']} breaks a limit" for row in rows]
of(lambda report, row: row.update(hash="0"))
text = path.read_text()
try:
    guard_static.update(path, "static_toys")
except Exception as problem:
    found["broken"] = str(problem).replace(str(path), "it")
found["kept"] = path.read_text() == text
print(json.dumps(found))
"""


def compiling(*arguments):
    """Runs Python where Triton compiles, with the checkout and the tests on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment
    )


@pytest.mark.slow
def test_a_kernel_newer_than_its_report_is_compiled_alone_and_what_it_changes_is_told(tmp_path):
    pytest.importorskip("triton")
    done = compiling("-c", SCRIPT, str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["true"] == found["after"] == []
    assert found["source"] == ["tests/static_toys.py: newer than the report of 1 binaries, which measure the same"]
    newer, registers = found["figures"]
    assert newer == "tests/static_toys.py: newer than the report of 1 binaries"
    said = re.fullmatch(r"sm_80 _toy_dot_kernel fp16 64 \(short fp16 64\): registers (\d+), reported (\d+)", registers)
    assert 2 * int(said[1]) == int(said[2]) > 0
    assert found["updated"] == found["figures"] and found["same"]
    (gone,) = found["gone"]
    assert gone.startswith("sm_80 _toy_dot_kernel fp16 9") and gone.endswith("is no longer compiled")
    # Nothing where nothing changed; the update compiles once more.
    assert found["compiled"] == [0, 1, 1, 1, 0, 0]
    assert found["old"].startswith("NotComparable: the report is of triton 3.0.0, here ")
    assert found["broken"] == "it stays as it is: 80 breaks a limit" and found["kept"]

"""The ahead-of-time report. Compiling needs a process without TRITON_INTERPRET: what it found comes here as JSON."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from wireframe.bench import static, static_cases, static_table
from wireframe.bench.gpus import GPUS, resident_warps, roofline_us
from wireframe.cli import main
from wireframe.errors import WireframeError
from wireframe.kernels import dispatch, tiles
from wireframe.kernels.launch import ARCHITECTURES, Launch

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import contextlib, importlib.util, io, json, sys
from pathlib import Path
import static_toys as toys
from wireframe.bench import compile_ahead, sass, static

folder = Path(sys.argv[1])
found = {}

def specialised(launch):
    made = compile_ahead.specialise(launch, 89)
    return [made.types, made.constants, made.divisible, made.options]

found["arguments"] = [specialised(toys.argument_launch(device)) for device in ("meta", "cpu")]
found["aligned"], found["offset"] = (specialised(toys.dot_launch(offset=n))[2] for n in (0, 1))
found["copies"] = [
    sass.count(sass.read_cubin(compile_ahead.compile_launch(toys.dot_launch(offset=n), 89).cubin)[1]).copy_async
    for n in (0, 1)
]

def command(function, *arguments, **keywords):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = function(*arguments, workers=1, progress=False, **keywords)
    return {"status": status, "out": out.getvalue(), "err": err.getvalue().splitlines()}

found["labels"] = [c.cases for c in static.configurations("static_planted", 89)]
found["planted"] = command(static.run, (89,), module="static_planted")
path = folder / "report.json"
found["run"] = command(static.run, (80, 89, 90), path, module="static_toys")
found["more"] = command(static.run, (86,), path, module="static_toys")
found["report"] = json.loads(path.read_text())
found["check"] = command(static.check, path, module="static_toys")

def edited(arch, **changes):
    report = json.loads(path.read_text())
    for row in report["rows"]:
        if row["arch"] == arch and row["dtype"] == "fp16":
            row.update(changes)
    other = folder / "edited.json"
    other.write_text(json.dumps(report))
    return command(static.check, other, module="static_toys")

found["edited 89"] = edited(89, registers=1)
found["hash 80"] = edited(80, hash="0")
found["hash and registers 80"] = edited(80, hash="0", registers=1)
found["minimum 80"] = edited(80, minimum_warps=1)
found["spill 80"] = edited(80, stack=8)
report = json.loads(path.read_text())
(folder / "short.json").write_text(json.dumps({**report, "rows": report["rows"][1:]}))
found["short"] = command(static.check, folder / "short.json", module="static_toys")
(folder / "old.json").write_text(json.dumps({**report, "triton": "3.0.0"}))
found["old"] = command(static.check, folder / "old.json", module="static_toys")

def hashed(name, change):
    # A module of its own, since functions are read from their file.
    file = folder / f"{name}.py"
    file.write_text(change(Path(toys.__file__).read_text()))
    spec = importlib.util.spec_from_file_location("toy", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    launch = module.dot_launch()
    return compile_ahead.fingerprint(launch, compile_ahead.specialise(launch, 89))

found["hashes"] = {
    "same": hashed("same", lambda text: text),
    "moved": hashed("moved", lambda text: text.replace("# [BM, BK]", "# A tile").replace("FACTOR =", "\\n\\nFACTOR =")),
    "helper": hashed("helper", lambda text: text.replace("return b_x * FACTOR", "return FACTOR * b_x")),
    "constant": hashed("constant", lambda text: text.replace("constexpr(2.0)", "constexpr(3.0)")),
    "kernel": hashed("kernel", lambda text: text.replace("zeros((BM, BN)", "zeros([BM, BN]")),
    "argument": hashed("argument", lambda text: text.replace("length=256", "length=264")),
    "tile": hashed("tile", lambda text: text.replace('"BK": 32', '"BK": 16')),
    "warps": hashed("warps", lambda text: text.replace("warps=4", "warps=2")),
}
print(json.dumps(found))
"""


def compiling(*arguments, timeout):
    """Runs Python where Triton compiles, with the checkout and the tests on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    done = compiling("-c", SCRIPT, str(tmp_path_factory.mktemp("static")), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def strict():
    import triton

    return static.is_strict(triton.__version__)


def test_arguments_are_specialised_as_a_launch_specialises_them(found):
    types, constants, divisible, options = found["arguments"][0]
    assert types == {
        "p_x": "*fp32", "p_odd": "*fp32", "none": "constexpr", "one": "constexpr", "sixteen": "i32", "odd": "i32",
        "long": "i64", "plain": "i32", "number": "fp32", "truth": types["truth"], "SIZE": "constexpr",
    }  # fmt: skip
    # A bool is u1 or i1, by version.
    assert types["truth"] in ("u1", "i1")
    assert constants == {"none": None, "one": 1, "SIZE": 64}
    assert divisible == ["p_x", "sixteen", "long"]
    assert options == {"num_warps": 2, "num_stages": 1}


def test_meta_tensors_are_specialised_as_those_in_memory(found):
    on_meta, in_memory = found["arguments"]
    assert on_meta == in_memory


def test_an_address_that_is_not_aligned_is_not_taken_for_one(found):
    assert "p_x" in found["aligned"] and "p_x" not in found["offset"]
    # Asynchronous copies take whole 16 bytes: of the two operands one is left.
    aligned, offset = found["copies"]
    assert 0 < offset == aligned // 2


def test_a_row_holds_what_the_binary_takes(found):
    assert found["run"]["status"] == 0, found["run"]["err"]
    rows = {row["arch"]: row for row in found["report"]["rows"] if row["dtype"] == "fp16"}
    assert list(rows) == [80, 86, 89, 90] and len(found["report"]["rows"]) == 8
    for arch, row in rows.items():
        # Both cases come to the same binary.
        assert row["cases"] == ["short fp16 64", "long fp16 64"]
        assert row["constants"] == {"BM": 64, "BN": 64, "BK": 32}
        assert (row["num_warps"], row["num_stages"], row["stack"], row["minimum_warps"]) == (4, 3, 0, 4)
        # Two or three stages of a [64, 32] and a [32, 64] tile of float16.
        assert row["shared"] in (2 * 8192, 3 * 8192)
        assert 32 <= row["registers"] <= 128
        assert row["resident_warps"] == resident_warps(arch, row["registers"], row["shared"], 4)
        loop = row["loop"]
        assert row["loops"] == [loop["instructions"]]
        assert 30 < loop["instructions"] < row["instructions"]
        # 64 x 64 x 32 by 4 warps: 16 x 8 x 16 an instruction, or 64 x 64 x 16 by all of them on Hopper.
        assert loop["tensor_core"] == (2 if arch == 90 else 16) and loop["copy_async"] == 4
        assert (row["flops"], row["bytes"]) == (2.0 * 64 * 64 * 256, 2 * 64 * 256 * 2 + 64 * 64 * 4)
        assert row["roofline_us"] == {"RTX 4090": 0.08, "H200": 0.02}
        assert row["seconds"] > 0


def test_the_table_shows_a_row_for_every_binary(found):
    lines = found["run"]["out"].splitlines()
    binaries = [[arch, "toy_dot", dtype] for arch in ("80", "89", "90") for dtype in ("fp16", "fp32")]
    assert [line.split()[:3] for line in lines[2:]] == binaries


def test_two_binaries_of_one_kernel_in_one_call_have_names_of_their_own(found):
    assert found["labels"][:2] == [
        ["short fp16 64", "long fp16 64", "twice fp32 64"], ["wide fp32 64", "twice fp32 64 (2)"],
    ]  # fmt: skip


def test_a_planted_spilling_kernel_fails_the_report(found):
    planted = found["planted"]
    assert planted["status"] == 1
    spills = [line for line in planted["err"] if "sm_89 _toy_spilling_kernel" in line and "spills" in line]
    assert len(spills) == strict()
    if not strict():
        assert "sm_89 _toy_spilling_kernel" in planted["out"].splitlines()[-1]


def test_a_kernel_that_does_not_compile_is_one_line_and_the_others_are_measured(found):
    (line,) = [line for line in found["planted"]["err"] if "does not compile" in line]
    assert "sm_89 _toy_broken_kernel" in line and "broken on purpose" in line
    assert "toy_dot" in found["planted"]["out"] and "toy_broken" not in found["planted"]["out"]


def test_a_report_that_is_true_passes_and_only_sm_89_is_compiled(found):
    assert found["more"]["status"] == 0
    check = found["check"]
    assert check["status"] == 0 and check["err"] == []
    assert "2 configurations compiled" in check["out"]


@pytest.mark.parametrize("case, said", [
    ("edited 89", "the report measures otherwise: run: wireframe bench static --out "),
    ("hash and registers 80", "the report is older than tests/static_toys.py: run: wireframe bench static --out "),
    ("short", "is not in the report"),
])  # fmt: skip
def test_a_report_that_is_not_true_fails_in_clear_words(found, case, said):
    assert found[case]["status"] == 1
    assert any(said in line for line in found[case]["err"])
    if case != "short":
        assert any("registers" in line and "reported 1" in line for line in found[case]["err"])


def test_another_architecture_is_compiled_where_its_hash_changed_and_may_measure_the_same(found):
    changed = found["hash 80"]
    assert changed["status"] == 0 and "3 configurations compiled" in changed["out"]
    assert "1 rows have other sources" in changed["out"]


def test_the_fewest_warps_are_those_of_the_code_whatever_the_report_says(found):
    assert found["minimum 80"]["status"] == 1
    assert "minimum_warps 4, reported 1" in found["minimum 80"]["err"][1]


@pytest.mark.skipif("not strict()")
def test_a_committed_row_that_spills_fails_without_being_compiled(found):
    assert found["spill 80"]["status"] == 1
    assert "sm_80 _toy_dot_kernel" in found["spill 80"]["err"][0] and "spills" in found["spill 80"]["err"][0]


def test_a_report_of_another_triton_is_not_compared(found):
    assert found["old"]["status"] == 0 and "triton 3.0.0" in found["old"]["out"]


def test_hashes_follow_what_determines_a_binary_and_nothing_else(found):
    hashes = found["hashes"]
    assert hashes["moved"] == hashes["same"]
    others = [key for name, key in hashes.items() if name != "moved"]
    assert len(set(others)) == len(others)


@pytest.mark.parametrize("arch, registers, shared, warps, resident", [
    # By warps; by registers, of which each of four partitions has its own; by shared memory.
    (80, 32, 0, 4, 64), (89, 32, 0, 4, 48), (89, 168, 0, 4, 12), (89, 169, 0, 4, 8), (89, 200, 0, 2, 8),
    (90, 255, 0, 8, 8),
    (89, 64, 40960, 8, 16), (89, 64, 50176, 8, 16), (89, 64, 50177, 8, 8), (90, 64, 74752, 4, 12),
    # By blocks, and none at all.
    (86, 16, 0, 1, 16), (89, 16, 0, 1, 24), (89, 128, 101377, 8, 0), (90, 255, 0, 16, 0),
])  # fmt: skip
def test_resident_warps_are_those_of_the_occupancy_calculator(arch, registers, shared, warps, resident):
    assert resident_warps(arch, registers, shared, warps) == resident


def test_roofline_times_are_the_larger_of_products_and_bytes():
    ada = GPUS["RTX 4090"]
    assert roofline_us(ada, 165e9, 1.0, single=False) == pytest.approx(1000)
    assert roofline_us(ada, 82.6e9, 1.0, single=True) == pytest.approx(1000)
    assert roofline_us(ada, 1.0, 1.008e9, single=True) == pytest.approx(1000)


def test_bytes_count_every_tensor_once_and_an_expanded_axis_not():
    x = torch.empty(4, 8, dtype=torch.float16, device="meta")
    arguments = {"p_x": x, "p_again": x, "p_mask": torch.empty(3, device="meta").expand(5, 3), "n": 4, "p_none": None}
    kernel = SimpleNamespace(fn=SimpleNamespace(__name__="_a_kernel"))
    assert static.bytes_moved(Launch(kernel, (1,), arguments, 4)) == 4 * 8 * 2 + 3 * 4
    # What is read and written counts twice.
    changed = {"p_weights": x, "p_exp_avg": x.clone(), "p_exp_avg_sq": x.clone(), "p_gradient": x.clone()}
    kernel.fn.__name__ = "_adamw_step_update_kernel"
    assert static.bytes_moved(Launch(kernel, (1,), changed, 4)) == 7 * 4 * 8 * 2


def row(**changes):
    fine = {
        "arch": 89, "kernel": "_a_kernel", "dtype": "bf16", "dim": 64, "cases": ["c"], "hash": "0", "stack": 0,
        "shared": 101376, "resident_warps": 8, "minimum_warps": 8,
    }  # fmt: skip
    return {**fine, **changes}


@pytest.mark.parametrize("changes, said", [
    ({"stack": 4}, "spills, 4 bytes"), ({"shared": 101377}, "the architecture has 101376"),
    ({"arch": 86, "shared": 101377}, "sm_86"), ({"arch": 80, "shared": 166913}, "166912"),
    ({"arch": 90, "shared": 232449}, "232448"), ({"minimum_warps": 12}, "8 resident warps, at least 12 wanted"),
])  # fmt: skip
def test_every_limit_is_held_with_one_line_each(changes, said):
    assert static.problems([row()], "3.7.1") == []
    (line,) = static.problems([row(**changes)], "3.7.1")
    assert said in line and "_a_kernel bf16 64 (c)" in line


def test_a_launch_that_states_its_registers_may_spill_beside_its_products():
    aside = {"stack": 120, "maxnreg": 128, "loop": {"tensor_core": 8}, "spills_among_products": 0}
    assert static.problems([row(**aside)], "3.7.1") == []
    for change in ({"spills_among_products": 1}, {"loop": {"tensor_core": 0}}):
        assert len(static.problems([row(**aside | change)], "3.7.1")) == 1
    del aside["maxnreg"]
    assert len(static.problems([row(**aside)], "3.7.1")) == 1


def test_before_triton_3_7_spills_are_no_problem_but_shared_memory_is():
    assert static.problems([row(stack=4, minimum_warps=12)], "3.6.0") == []
    assert static.problems([row(stack=4)], "3.10.0")
    assert static.problems([row(shared=101377)], "3.4.0")


def test_too_many_configurations_of_an_architecture_are_a_problem():
    assert static.problems([row(hash=str(i)) for i in range(130)], "3.7.1") == []
    (line,) = static.problems([row(hash=str(i)) for i in range(131)], "3.7.1")
    assert line == "sm_89: 131 configurations, more than 130"


def test_the_command_refuses_where_kernels_are_interpreted(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    assert main(["bench", "static"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("wireframe bench: TRITON_INTERPRET is set")


def test_a_file_that_is_no_report_is_refused(tmp_path):
    for text in ("", "{}", "[1]", '{"triton": 1}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(WireframeError, match="is no report"):
            static.read_report(tmp_path / "x.json")


def test_the_table_of_the_readme_is_printed_without_a_compiler(monkeypatch, capsys):
    # Where kernels are interpreted nothing compiles.
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    rows = static.read_report(static.REPORT)["rows"]
    assert main(["bench", "static", "--table"]) == 0
    assert capsys.readouterr().out == static_table.table(rows) + "\n"
    with pytest.raises(WireframeError, match="no _adamw_step_update_kernel of adamw_step"):
        static_table.table([row for row in rows if row["kernel"] != "_adamw_step_update_kernel"])
    with pytest.raises(SystemExit):
        main(["bench", "static", "--table", "--check", str(static.REPORT)])


def launched_kernels(folder):
    """Names of the functions of a folder that @triton.jit turns into kernels, by the naming rule."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                decorators = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
                if any(ast.unparse(decorator) in ("triton.jit", "jit") for decorator in decorators):
                    found.add(node.name)
    return found


def test_every_kernel_is_in_a_case_of_the_report_and_has_its_fewest_warps():
    written = launched_kernels(ROOT / "kernels") | launched_kernels(ROOT / "bench")
    assert len(written) >= 6
    for arch in ARCHITECTURES:
        planned = {static.kernel_name(launch) for case in static_cases.cases() for launch in case.plan(arch)}
        assert planned == written
    assert set(static_cases.LEAST_WARPS) == written
    assert static_cases.minimum_warps("_qk_norm_attention_dq_kernel", "fp32", 128) == 4
    assert static_cases.minimum_warps("_qk_norm_attention_dq_kernel", "bf16", 128) == 8


def test_every_entry_of_the_tile_table_is_in_a_case():
    for arch, table in tiles.TABLE.items():
        compiled = set()
        for case in static_cases.cases():
            for launch in case.plan(arch):
                chosen = launch.arguments
                if "BN" in chosen:
                    tile = (chosen["BM"], chosen["BN"], launch.num_warps, launch.num_stages, launch.max_registers)
                    role = static.kernel_name(launch).split("_")[-2]
                    role = "one_chunk" if chosen.get("ONE_CHUNK") else "chunks" if role == "fwd" else role
                    compiled.add((case.dtype, case.dim, role, tile))
        for (dtype, dim), entries in table.items():
            name = next(name for name, found in static_cases.DTYPES.items() if found == dtype)
            for role, tile in entries._asdict().items():
                assert (name, dim, role, tuple(tile)) in compiled


def test_a_kernel_that_nobody_listed_is_noticed(tmp_path):
    (tmp_path / "a.py").write_text(
        "import triton\n@triton.jit\ndef _new_kernel(p): pass\n@triton.jit(debug=True)\ndef _other_kernel(p): pass\n"
        "@triton.jit\ndef helper(p): pass\ndef _plain_kernel(): pass\n"
    )
    assert launched_kernels(tmp_path) == {"_new_kernel", "_other_kernel"}


@pytest.mark.slow
def test_the_committed_report_is_true():
    done = compiling("-m", "wireframe", "bench", "static", "--check", str(static.REPORT), "--quiet", timeout=600)
    assert done.returncode == 0, done.stderr

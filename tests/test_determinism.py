import contextlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor

from wireframe import cli
from wireframe.kernels import determinism
from wireframe.kernels.determinism import DeterminismError, deterministic, prepare_process

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
MATMUL = torch.backends.cuda.matmul
REDUCTIONS = tuple(f"allow_{dtype}_reduced_precision_reduction" for dtype in ("fp16", "bf16"))
HAS_PAIRS = hasattr(MATMUL, f"{REDUCTIONS[0]}_split_k")


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    # setenv first: monkeypatch then takes back what the code under test sets.
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)


def state():
    found = {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "benchmark": torch.backends.cudnn.benchmark,
        "inductor": getattr(inductor, "deterministic", None),
    }
    for name in REDUCTIONS:
        found[name] = getattr(MATMUL, name)
        found[f"{name} split_k"] = getattr(MATMUL, f"{name}_split_k") if HAS_PAIRS else None
    return found


def write_state(algorithms, warn_only, fill, benchmark, reduced):
    torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.backends.cudnn.benchmark = benchmark
    for name in REDUCTIONS:
        setattr(MATMUL, name, reduced)
    if hasattr(inductor, "deterministic"):
        inductor.deterministic = algorithms


@pytest.fixture
def restored():
    before = state()
    yield
    write_state(*(before[name] for name in ("algorithms", "warn only", "fill", "benchmark")), before[REDUCTIONS[0]])
    assert state() == before


def inside():
    split_k = True if HAS_PAIRS else None
    return {
        "algorithms": True, "warn only": False, "fill": False, "benchmark": False,
        "inductor": True if hasattr(inductor, "deterministic") else None,
        **{name: False for name in REDUCTIONS}, **{f"{name} split_k": split_k for name in REDUCTIONS},
    }  # fmt: skip


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("before", [
    (False, False, True, True, True),
    (True, True, True, True, (False, False) if HAS_PAIRS else True),
    (False, False, False, False, False),
])
@pytest.mark.parametrize("error", [None, KeyError, KeyboardInterrupt])
def test_every_setting_is_made_and_taken_back_also_after_an_exception(before, error):
    write_state(*before)
    outside = state()
    with pytest.raises(error) if error else contextlib.nullcontext(), deterministic():
        assert state() == inside()
        if error:
            raise error
    assert state() == outside


@pytest.mark.usefixtures("restored")
def test_a_setting_of_inductor_alone_survives():
    if not hasattr(inductor, "deterministic"):
        pytest.skip("this torch has no such setting")
    inductor.deterministic = True
    outside = state()
    with deterministic():
        pass
    assert state() == outside and not outside["algorithms"]


@pytest.mark.usefixtures("restored")
def test_uses_may_be_nested():
    write_state(False, False, True, True, True)
    outside = state()
    with deterministic():
        with deterministic():
            assert state() == inside()
        assert state() == inside()
    assert state() == outside


@pytest.mark.usefixtures("restored")
def test_what_was_set_is_taken_back_when_a_later_setting_fails(monkeypatch):
    write_state(False, False, True, True, True)
    outside = state()

    def refuse(value):
        raise RuntimeError("refused")

    def settings():
        yield from itself()
        yield lambda: None, lambda value: value and refuse(value), True

    itself = determinism._settings
    monkeypatch.setattr(determinism, "_settings", settings)
    with pytest.raises(RuntimeError, match="refused"), deterministic():
        raise AssertionError("the body must not run")
    assert state() == outside


def test_an_operation_without_a_deterministic_form_raises():
    with deterministic(), pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        torch.zeros(2).put_(torch.tensor([0]), torch.tensor([1.0]))


@pytest.mark.parametrize("enter", [prepare_process, lambda: deterministic().__enter__()])
def test_after_the_start_of_cuda_it_is_too_late(enter, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    outside = state()
    with pytest.raises(DeterminismError, match=r"CUDA has started .* set it to :4096:8") as found:
        enter()
    assert "\n" not in str(found.value) and VARIABLE not in os.environ and state() == outside


@pytest.mark.parametrize("value", ["", ":0:0", ":4096:2", ":4096:8:16:8"])
def test_a_workspace_that_promises_nothing_is_refused_not_replaced(value, monkeypatch):
    monkeypatch.setenv(VARIABLE, value)
    for enter in (prepare_process, lambda: deterministic().__enter__()):
        with pytest.raises(DeterminismError, match=r"unset it or set it to :4096:8") as found:
            enter()
        assert repr(value) in str(found.value)
    assert os.environ[VARIABLE] == value


@pytest.mark.parametrize("value", determinism.WORKSPACES)
@pytest.mark.parametrize("started", [False, True])
def test_a_workspace_set_in_time_is_kept(value, started, monkeypatch):
    monkeypatch.setenv(VARIABLE, value)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    prepare_process()
    with deterministic():
        assert os.environ[VARIABLE] == value


def test_the_context_prepares_a_process_in_which_cuda_has_not_started():
    with deterministic():
        assert os.environ[VARIABLE] == ":4096:8"
    assert os.environ[VARIABLE] == ":4096:8"


def run(code, **environment):
    environment = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_program_is_prepared_without_torch():
    code = (
        "import os, sys\n"
        "from wireframe.kernels.determinism import prepare_process\n"
        "prepare_process()\n"
        "print(os.environ['CUBLAS_WORKSPACE_CONFIG'], 'torch' in sys.modules)"
    )
    done = run(code)
    assert done.stdout.split() == [":4096:8", "False"], done.stderr


def test_the_train_command_prepares_before_it_does_anything_else(monkeypatch, capsys, tmp_path):
    arguments = ["train", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
    monkeypatch.setenv(VARIABLE, ":0:0")
    assert cli.main(arguments) == 2
    assert VARIABLE in capsys.readouterr().err and not (tmp_path / "run").exists()
    monkeypatch.delenv(VARIABLE)
    # The data that are not there are an error of their own, after the variable was set.
    assert cli.main(arguments) == 2
    assert os.environ[VARIABLE] == ":4096:8" and VARIABLE not in capsys.readouterr().err


def test_torch_of_before_the_pairs_gets_a_plain_flag():
    matmul = types.SimpleNamespace(allow_bf16_reduced_precision_reduction=True)
    read, write, value = determinism._reduction(matmul, "allow_bf16_reduced_precision_reduction")
    assert read() is True and value is False
    write(value)
    assert matmul.allow_bf16_reduced_precision_reduction is False


def test_on_the_cpu_nothing_comes_too_late(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with deterministic("cpu"):
        assert torch.are_deterministic_algorithms_enabled()
    with pytest.raises(DeterminismError), deterministic():
        pass

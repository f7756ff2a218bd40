"""What the compiler makes of names that a loop assigns; needs a process without TRITON_INTERPRET."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from triton.compiler.code_generator import CodeGenerator

TESTS = Path(__file__).resolve().parent


@pytest.mark.skipif(not hasattr(CodeGenerator, "_find_carries"), reason="this version of Triton visits loops otherwise")
def test_every_name_that_a_loop_assigns_is_carried():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, str(TESTS / "loop_carries.py")], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    planted, count = found["planted"]
    assert [name for _, name in planted] == ["past"] and count == 1
    assert found["right"] == [[], 2]
    assert found["every"] == [[], found["launches"]] and found["launches"] > 100

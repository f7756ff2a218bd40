"""Memory of a process that trains on a CPU."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from wireframe.train.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(14):
    if turn == 10:
        before = pages()
    tensors = [torch.zeros(10 << 20) for _ in range(2)]
    del tensors
print(pages() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is of glibc")
def test_large_tensors_that_are_freed_and_made_again_cost_no_pages():
    taken = {
        how: int(subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "return")
    }
    # Four turns of two tensors of 40 MiB, which glibc by itself always returns, in pages of 4 KiB or 2 MiB; the first
    # turns find places for them.
    assert taken["keep"] < 32 < taken["return"]

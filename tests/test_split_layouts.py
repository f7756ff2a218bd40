"""A scene alone takes other binaries than a batch: that they add in the same order shows in their layouts.

The order of a product's or a reduction's sums follows from the layout that Triton gives it. So the forward with a
program for each chunk of keys must have the layouts of the forward with one program for all; the interpreter, which has
no layouts, cannot show it.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import json, sys
import torch
from wireframe.bench.compile_ahead import compile_launch
from wireframe.kernels import tiles
from wireframe.kernels.qk_norm_attention_forward import plan_forward

def launch(dtype, dim, architecture, split):
    q, out = (torch.empty(1, 256, 4, dim, dtype=dtype, device="meta") for _ in range(2))
    k, v = (torch.empty(1, 4096, 2, dim, dtype=dtype, device="meta") for _ in range(2))
    log_scale, lse = (torch.empty(shape, device="meta") for shape in ((4,), (1, 2, 512)))
    mask = torch.empty(1, 4096, dtype=torch.bool, device="meta")
    return plan_forward(q, k, v, log_scale, mask, out, lse, architecture, split)[1]

architecture = int(sys.argv[1])
found = [
    [str(dtype), dim, *(compile_launch(launch(dtype, dim, architecture, split), architecture).ir for split in (0, 1))]
    for dtype, dim in tiles.TABLE[architecture]
]
print(json.dumps(found))
"""


def layouts(ir):
    """The types of all products and reductions, layouts written out."""
    named = dict(re.findall(r"^(#\w+) = (.*)$", ir, re.MULTILINE))

    def written_out(text):
        for _ in named:
            text = re.sub(r"#\w+", lambda name: named.get(name[0], name[0]), text)
        return re.sub(r" loc\(.*", "", text)

    products = re.findall(r"(?:tt\.dot|warp_group_dot) [^\n]*? -> (tensor<[^\n]*)", ir)
    reductions = re.findall(r"^ *\}\) : \((tensor<[^)]*)\)", ir, re.MULTILINE)
    return {written_out(text) for text in products}, {written_out(text) for text in reductions}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [89, 90])
def test_a_program_for_each_chunk_adds_in_the_order_of_one_for_all(architecture, tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(architecture)], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 9
    for dtype, dim, together, split in found:
        products, reductions = layouts(together)
        assert len(reductions) >= 2 and all("#ttg" in text for text in products | reductions) and products
        assert layouts(split) == (products, reductions), (dtype, dim)

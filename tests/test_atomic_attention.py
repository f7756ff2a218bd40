import pytest
import torch

import kernel_budget
from interpreter_bf16 import interpreted_bfloat16
from wireframe.bench.atomic_attention import TILES, atomic_attention
from wireframe.kernels.tiles import Tile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a CUDA device")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "batch, queries, keys, heads, kv_heads, dim, mask, tile",
    [(2, 37, 70, 4, 2, 64, True, Tile(32, 32, 4, 1)), (1, 40, 128, 2, 2, 32, False, TILES[1])],
)
def test_the_atomic_rival_computes_the_same_attention(
    device, batch, queries, keys, heads, kv_heads, dim, mask, tile, dtype
):
    problem = kernel_budget.attention_problem(
        batch, queries, keys, heads, kv_heads, dim, dtype=dtype, device=device, mask=mask
    )
    # Changes the interpreter alone.
    with interpreted_bfloat16():
        found = kernel_budget.run_attention(lambda *inputs: atomic_attention(*inputs, tile), problem)
    kernel_budget.attention_budget(problem).check(found)

"""A linear map and GELU on a CUDA device (marker ``gpu``): within the budget, and the same bits every time."""

import pytest
import torch

from gelu_budget import Problem, check_budget, make_problem, run, same_bits
from gpu_cases import DTYPES, poisoned
from wireframe.kernels import ops
from wireframe.kernels.determinism import deterministic, prepare_process

# Before the tests start CUDA.
prepare_process()

pytestmark = pytest.mark.gpu

# Rows, columns, terms, bias: the first map of the points, a feed-forward; then ends inside every tile, one number, the
# longest product.
SIZES = [
    ((32, 2048), 1024, 128, False), ((32, 256), 1024, 256, True), ((64, 64), 1024, 256, True),
    ((1033,), 259, 95, True), ((1,), 1, 1, True), ((65,), 130, 1024, False),
]  # fmt: skip


def cuda_problem(rows, columns, terms, bias, dtype=torch.bfloat16) -> Problem:
    return make_problem(*rows, columns=columns, terms=terms, bias=bias, dtype=dtype).change(lambda x: x.cuda())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_results_lie_within_the_budget(size, dtype):
    problem = cuda_problem(*size, dtype)
    with poisoned():
        found = run(problem, "triton")
    check_budget(problem, found)
    assert same_bits({"out": found["out"]}, run(problem, "auto", ""))


def test_gelu_is_exact_to_float32():
    y = torch.linspace(-18, 18, 1_000_001).cuda()
    exact = y.double() * torch.special.ndtr(y.double())
    found = ops.linear_gelu(y[:, None], torch.ones(1, 1, device="cuda"), impl="triton")[:, 0]
    # Of that 1e-7 are the hardware's power of 2.
    assert ((found - exact).abs() <= 2e-7 * y.abs().clamp_max(6) + 6e-8 * exact.abs()).all()
    ends = torch.tensor([[torch.inf], [-torch.inf], [torch.nan]], device="cuda")
    found = ops.linear_gelu(ends, torch.ones(1, 1, device="cuda"), impl="triton")[:, 0].tolist()
    assert found[:2] == [torch.inf, 0] and found[2] != found[2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES[1:4])
def test_many_calls_give_equal_bits(size, dtype):
    problem = cuda_problem(*size, dtype)
    # Other work on the device changes when the programs of a launch run.
    noise, stream = torch.randn(1024, 1024, device="cuda"), torch.cuda.Stream()
    with deterministic():
        first = run(problem, "triton")
        for number in range(300):
            if number % 3 == 0:
                with torch.cuda.stream(stream):
                    noise @ noise
            found = run(problem, "triton")
            assert all(torch.equal(x, found[name]) for name, x in first.items()), f"call {number}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES[1:4])
def test_a_row_has_its_bits_beside_any_others(size, dtype):
    problem = cuda_problem(*size, dtype)
    problem = problem._replace(x=problem.x.flatten(0, -2), dout=problem.dout.flatten(0, -2))

    def rows(problem):
        dy, _ = torch.ops.wireframe.linear_gelu_backward(problem.dout, *problem[:3], True)
        return {"out": ops.linear_gelu(*problem[:3], impl="triton"), "dy": dy}

    whole = rows(problem)
    for order in ([1000], [5, 900, 3], list(range(37, 300))):
        assert same_bits(rows(problem.rows(order)), {name: x[order] for name, x in whole.items()})


@pytest.mark.parametrize("size", SIZES[:2])
def test_a_captured_graph_gives_the_bits_of_its_launches(size):
    problem = cuda_problem(*size)
    inputs = [problem.change(torch.clone), problem._replace(x=problem.x.flip(0), dout=problem.dout.flip(0))]
    with deterministic():
        expected = [run(given, "triton") for given in inputs]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run(problem, "triton")
        for given, wanted in zip(inputs[::-1], expected[::-1]):
            problem.x.copy_(given.x)
            problem.dout.copy_(given.dout)
            graph.replay()
            assert same_bits(found, wanted)
    assert not torch.equal(expected[0]["out"], expected[1]["out"])

"""Residual connection and norm on a CUDA device (marker ``gpu``): within the budget, and the same bits every time."""

import pytest
import torch

from gpu_cases import poisoned
from norm_budget import Problem, check_budget, make_problem, run, same_bits
from wireframe.kernels import ops
from wireframe.kernels.determinism import prepare_process

# Before the tests start CUDA.
prepare_process()

pytestmark = pytest.mark.gpu

FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16

# Of the model's latents and queries; then one number, hashes that serve two rows, a row of four warps.
SHAPES = [(32, 256, 256), (64, 64, 256), (1, 1), (5, 33, 63), (3, 5, 1021)]


def norm_problem(*shape: int) -> Problem:
    return make_problem(*shape, dtypes=(BFLOAT, None, BFLOAT), branch=False, dropout=False, given="normed")


@pytest.mark.parametrize("given", ["total normed", "total normed copy"])
@pytest.mark.parametrize("dtypes", [(FLOAT, BFLOAT, BFLOAT), (FLOAT, FLOAT, FLOAT), (HALF, HALF, HALF)])
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_norm_lies_within_the_budget(shape, dtypes, given):
    problem = make_problem(*shape, dtypes=dtypes, given=given)
    with poisoned():
        found = run(problem.to("cuda"), "triton")
    check_budget(problem, found)
    # The sum, of which no bit depends on where it was computed.
    assert same_bits({"total": found["total"]}, {"total": run(problem, "reference")["total"]})


@pytest.mark.parametrize("shape", [(65536, 256), (4099, 256), (17, 95)])
def test_rms_norm_lies_within_the_budget(shape):
    problem = norm_problem(*shape)
    with poisoned():
        check_budget(problem, run(problem.to("cuda"), "triton"))


@pytest.mark.parametrize("problem", [make_problem(32, 256, 256), make_problem(5, 33, 63), norm_problem(65536, 256)])
def test_a_thousand_calls_give_equal_bits(problem):
    problem = problem.to("cuda")
    first = run(problem, "triton")
    # Other work on the device changes when the programs of a launch run.
    noise, stream = torch.randn(1024, 1024, device="cuda"), torch.cuda.Stream()
    for number in range(1000):
        if number % 3 == 0:
            with torch.cuda.stream(stream):
                noise @ noise
        found = run(problem, "triton")
        assert all(torch.equal(x, found[name]) for name, x in first.items()), f"call {number}"


@pytest.mark.parametrize("shape", [(6, 256, 256), (6, 33, 63)])
def test_a_scene_has_its_bits_in_any_batch_and_place(shape):
    problem = make_problem(*shape).to("cuda")
    whole = run(problem, "triton")
    for order in ([4], [5, 0], [3, 5, 0, 1]):
        part = run(problem.scenes(order), "triton")
        assert same_bits(
            {name: x for name, x in part.items() if name != "dweight"},
            {name: x[order] for name, x in whole.items() if name != "dweight"},
        )


def test_a_captured_graph_gives_the_bits_of_its_launches():
    problem = make_problem(8, 64, 256).to("cuda")
    step = torch.zeros((), dtype=torch.int64, device="cuda")

    def call():
        keys = ops.step_keys(problem.keys, 353, step)
        return run(problem._replace(keys=keys), "auto")

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    seen = []
    for number in (3, 4):
        step.fill_(number)
        graph.replay()
        seen.append({name: x.clone() for name, x in found.items()})
        assert same_bits(seen[-1], call())
    assert not torch.equal(seen[0]["total"], seen[1]["total"])

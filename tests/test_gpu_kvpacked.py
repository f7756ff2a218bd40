"""Attention on packed keys and values on a CUDA device (marker ``gpu``) at the sizes of the model."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")
from gpu_cases import ATTENTION, DTYPES, poisoned, same_bits, triton_attention
from kernel_budget import AttentionProblem, AttentionResults, attention_budget, attention_problem, run_attention
from wireframe.kernels import ops
from wireframe.kernels.determinism import deterministic, prepare_process

# Before the tests start CUDA.
prepare_process()

pytestmark = pytest.mark.gpu

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def problem_of(name: str, dtype: torch.dtype) -> AttentionProblem:
    sizes, mask = ATTENTION["cuda"][name]
    return attention_problem(*sizes, dtype=dtype, device="cuda", mask=mask)


def run_packed(q: Tensor, kv: Tensor, log_scale: Tensor, key_mask: Tensor | None, dout: Tensor) -> AttentionResults:
    inputs = [x.detach().requires_grad_() for x in (q, kv, log_scale)]
    out = ops.qk_norm_attention_kvpacked(*inputs, key_mask, impl="triton")
    dq, dkv, dlog_scale = torch.autograd.grad(out, inputs, dout)
    assert dkv.is_contiguous()
    return AttentionResults(out.detach(), dq, *dkv.unbind(2), dlog_scale)


def packed(problem: AttentionProblem) -> tuple[Tensor | None, ...]:
    return problem.q, torch.stack([problem.k, problem.v], 2), *problem[3:]


@each_dtype
@pytest.mark.parametrize("name", ATTENTION["cuda"])
def test_results_have_the_bits_of_separate_keys_and_values(name, dtype):
    problem = problem_of(name, dtype)
    with poisoned():
        found = run_packed(*packed(problem))
    assert same_bits(found, run_attention(triton_attention, problem))


@each_dtype
def test_results_lie_within_the_budget(dtype):
    problem = problem_of("cross", dtype)
    with poisoned():
        found = run_packed(*packed(problem))
    attention_budget(problem).check(found)


def test_repeated_calls_give_equal_bits():
    arguments = packed(problem_of("cross", torch.bfloat16))
    first = run_packed(*arguments)
    # Other work on the device changes when the programs of a launch run.
    noise, stream = torch.randn(1024, 1024, device="cuda"), torch.cuda.Stream()
    for number in range(300):
        if number % 3 == 0:
            with torch.cuda.stream(stream):
                noise @ noise
        assert same_bits(first, run_packed(*arguments)), f"call {number}"


def test_a_cuda_graph_of_projection_and_attention_replays_the_bits_of_eager_calls():
    problem = problem_of("cross", torch.bfloat16)
    memory = torch.randn(32, 2048, 256, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(256, 256, device="cuda") / 16).to(torch.bfloat16)

    def run(memory):
        leaves = [x.detach().requires_grad_() for x in (problem.q, memory, weight, problem.log_scale)]
        kv = F.linear(leaves[1], leaves[2]).unflatten(-1, (2, 2, 64))
        out = ops.qk_norm_attention_kvpacked(leaves[0], kv, leaves[3], problem.key_mask)
        return [out.detach(), *torch.autograd.grad(out, leaves, problem.dout)]

    with deterministic():
        expected = run(memory)
        buffer = memory.flip(0).contiguous()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(buffer)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run(buffer)
        buffer.copy_(memory)
        for _ in range(2):
            graph.replay()
            assert same_bits(found, expected)

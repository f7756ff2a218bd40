"""The Triton kernels on a CUDA device (marker ``gpu``) at their real shapes, and the same tests interpreted in small.

Needs torch, triton, numpy and pytest alone, so that it runs on a GPU machine where nothing else is installed.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from transport_budget import log_plan_scale, sinkhorn_scale

from gpu_cases import (
    ATTENTION,
    CASES,
    DTYPES,
    EVERY,
    LENGTHS,
    TRANSPORT,
    Case,
    cost_case,
    digest,
    dtypes,
    evaluate,
    exactly,
    matching_case,
    poisoned,
    randn,
    same_bits,
    sinkhorn_case,
    triton_attention,
)
from interpreter_bf16 import interpreted_bfloat16
from kernel_budget import attention_budget, attention_problem, check, run_attention
from wireframe.kernels import dispatch
from wireframe.kernels.determinism import prepare_process
from wireframe.kernels.sinkhorn import lowest_cost
from wireframe.perceiver import Perceiver, PerceiverConfig

# Before the tests start CUDA.
prepare_process()

TESTS = Path(__file__).resolve().parent


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cpu" and not dispatch.INTERPRETED:
        pytest.skip("kernels are compiled here, not interpreted")
    return request.param


@pytest.fixture(autouse=True, scope="module")
def _bfloat16():
    # Changes the interpreter alone.
    with interpreted_bfloat16():
        yield


def pairs(*dtypes, op=None):
    """(op,) device, dtype: interpreted in float32 alone, the rest of which is tested elsewhere."""
    found = []
    for device, dtype in (("cpu", torch.float32), *(("cuda", dtype) for dtype in dtypes)):
        values = (device, dtype) if op is None else (op, device, dtype)
        marks = pytest.mark.gpu if device == "cuda" else ()
        found.append(pytest.param(*values, id="-".join(map(str, values)), marks=marks))
    return found


each_op = pytest.mark.parametrize("op", CASES)
each_dtype = pytest.mark.parametrize("device, dtype", pairs(*DTYPES), indirect=["device"])
each_branch = pytest.mark.parametrize("op", EVERY)
each_branch_and_dtype = pytest.mark.parametrize(
    "op, device, dtype", [pair for op in EVERY for pair in pairs(*dtypes(op), op=op)], indirect=["device"]
)
# Segments cost nothing below 0.
each_transport = pytest.mark.parametrize("name", [name for name in TRANSPORT["cuda"] if name != "below_zero"])


@each_dtype
@pytest.mark.parametrize("name", ATTENTION["cuda"])
def test_attention_lies_within_the_budget(name, dtype, device):
    sizes, mask = ATTENTION[device][name]
    problem = attention_problem(*sizes, dtype=dtype, device=device, mask=mask)
    with poisoned():
        found = run_attention(triton_attention, problem)
    attention_budget(problem).check(found)


@pytest.mark.parametrize("device, dtype", pairs(torch.bfloat16), indirect=["device"])
@pytest.mark.parametrize("name", LENGTHS["cuda"])
def test_attention_of_lengths_far_apart_lies_within_the_budget(name, dtype, device):
    sizes, mask = LENGTHS[device][name]
    problem = attention_problem(*sizes, dtype=dtype, device=device, mask=mask)
    with poisoned():
        found = run_attention(triton_attention, problem)
    attention_budget(problem).check(found)


@each_dtype
def test_attention_above_the_guard_lies_within_the_budget(dtype, device):
    sizes, _ = ATTENTION[device]["latent_self"]
    problem = attention_problem(*sizes, dtype=dtype, device=device)
    scales = torch.linspace(39, 90, sizes[3]).log().to(device)
    problem = problem._replace(log_scale=scales)
    attention_budget(problem).check(run_attention(triton_attention, problem))


@each_transport
def test_the_plan_of_sinkhorn_is_exact_to_5e_6_and_its_gradient_to_twice_the_eager_error(name, device):
    case = sinkhorn_case(device, name)
    with poisoned():
        log_plan, dcost = evaluate(case)
    exact_plan, exact_dcost = exactly(sinkhorn_case(device, name, "reference"))
    _, eager_dcost = evaluate(sinkhorn_case(device, name, "reference"))
    assert torch.equal(log_plan == -torch.inf, exact_plan == -torch.inf)
    # To that share of what is larger than 1, such as the corner.
    error = (log_plan.double().exp() - exact_plan.exp()).abs() / exact_plan.exp().clamp(min=1)
    assert error.max() <= 5e-6
    assert (dcost - exact_dcost).norm() <= 2 * (eager_dcost - exact_dcost).norm() + 5e-6 * exact_dcost.norm()
    assert exact_dcost.any()


def test_sinkhorn_in_the_log_domain_lies_within_the_budget(device):
    case, reference = (sinkhorn_case(device, "below_zero", impl) for impl in ("triton", "reference"))
    cost, mask, grad = (x.cpu() for x in (*case.inputs, *case.fixed, case.gradient))
    assert cost.min() < lowest_cost(0.1, 0.3)
    with poisoned():
        found = evaluate(case)
    results = [[x.cpu() for x in given] for given in (found, exactly(reference), evaluate(reference))]
    finite = results[1][0].isfinite()
    assert torch.equal(results[0][0] == -torch.inf, ~finite)
    settings = {"iters": TRANSPORT[device]["below_zero"][0][-1]}
    eps = torch.finfo(torch.float32).eps
    # -inf is right, and no number.
    log_plans = [torch.where(finite, log_plan, 0.0) for log_plan, _ in results]
    check("log_plan", *log_plans, log_plan_scale(cost, mask, **settings), eps)
    grad = torch.where(finite, grad, 0.0).double()
    check("dcost", *(dcost for _, dcost in results), sinkhorn_scale(cost, mask, grad, grad, **settings), eps)


@each_transport
@pytest.mark.parametrize("make", [cost_case, matching_case])
def test_segment_operations_are_exact_to_twice_the_eager_error(make, name, device):
    with poisoned():
        found = evaluate(make(device, name))
    exact, eager = exactly(make(device, name, "reference")), evaluate(make(device, name, "reference"))
    for a, b, c in zip(found, exact, eager, strict=True):
        assert (a - b).norm() <= 2 * (c - b).norm() + 5e-6 * b.norm()
        assert a.dtype == torch.float32 and b.any()


def spoilt(case: Case) -> Case:
    """The case with NaN wherever a mask says that nothing is read."""
    inputs = list(case.inputs)
    (mask,) = case.fixed
    if case.inputs[0].dim() == 3:
        inputs[0] = torch.where(mask[:, None, :], inputs[0], torch.nan)
    else:
        for i in (1, 2)[: len(inputs) - 1]:
            inputs[i] = torch.where(mask[:, :, None, None], inputs[i], torch.nan)
    return case._replace(inputs=tuple(inputs))


@pytest.mark.parametrize("op", ["qk_norm_attention", "sinkhorn", "segment_matching"])
def test_what_is_masked_changes_no_bit(op, device):
    case = CASES[op](device)
    other = spoilt(case)
    assert any(x.isnan().any() for x in other.inputs)
    assert same_bits(evaluate(case), evaluate(other))


@each_branch_and_dtype
def test_repeated_backwards_give_equal_bits(op, dtype, device):
    case = EVERY[op](device, dtype=dtype)
    first = evaluate(case)
    cuda = device == "cuda"
    # Other work on the device changes when the programs of a launch run.
    noise, stream = (randn(device, 1024, 1024), torch.cuda.Stream()) if cuda else (None, None)
    often = 1000 if op in CASES and (op != "qk_norm_attention" or dtype == torch.bfloat16) else 100
    for number in range(often if cuda else 2):
        if cuda and number % 3 == 0:
            with torch.cuda.stream(stream):
                noise @ noise
        assert same_bits(first, evaluate(case)), f"call {number}"


def test_two_processes_give_equal_bits(device):
    code = (
        "import gpu_cases, interpreter_bf16\n"
        f"with interpreter_bf16.interpreted_bfloat16(): print(gpu_cases.digest({device!r}))"
    )
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest(device)


@each_branch_and_dtype
def test_a_scene_alone_has_the_bits_that_it_has_in_a_batch(op, dtype, device, monkeypatch):
    case = EVERY[op](device, dtype=dtype)
    batch = len(case.inputs[0])
    if op.startswith("qk_norm_attention"):
        from wireframe.kernels import qk_norm_attention_forward as forward

        if device == "cpu":
            # Small enough for the scenes of a batch to be many: alone, the keys are split.
            monkeypatch.setattr(forward, "_FEW_PROGRAMS", 2)
            monkeypatch.setattr(forward, "CHUNK", 32)
        assert launches_of(case.scene(0)) == launches_of(case) + 1
    together = evaluate(case)
    outputs = len(together) - len(case.inputs)
    for scene in {0, 1, batch - 1}:
        alone = evaluate(case.scene(scene))
        # What all scenes share has a sum over them as its gradient.
        count = outputs + case.scenes
        assert same_bits([x[scene : scene + 1] for x in together[:count]], alone[:count]), scene


def launches_of(case: Case) -> int:
    from wireframe.kernels.launch import architecture
    from wireframe.kernels.qk_norm_attention_forward import plan_forward

    q, k, v, log_scale = case.inputs
    key_mask = case.fixed[0] if case.fixed else None
    lse = torch.empty(len(q), k.shape[2], q.shape[1] * (q.shape[2] // k.shape[2]), device=q.device)
    return len(plan_forward(q, k, v, log_scale, key_mask, torch.empty_like(q), lse, architecture(q.device)))


# Attention has no other binary for it.
@pytest.mark.parametrize("op", [op for op in EVERY if op.startswith(("sinkhorn", "segment_matching"))])
def test_a_forward_without_a_gradient_has_the_bits_of_one_with_it(op, device):
    case = EVERY[op](device)
    expected = evaluate(case)
    with torch.no_grad():
        found = case.function(*case.inputs, *case.fixed)
    assert same_bits(found, expected[: len(found)])


@each_op
def test_only_the_first_derivative_is_there(op, device):
    case = CASES[op](device)
    inputs = [x.detach().requires_grad_() for x in case.inputs]
    output = case.function(*inputs, *case.fixed)[0]
    for gradient in torch.autograd.grad(output, inputs, case.gradient, create_graph=True):
        with pytest.raises(RuntimeError, match=f"wireframe.{op}_backward.* no autograd formula"):
            torch.autograd.grad(gradient.sum(), inputs, retain_graph=True)


@pytest.mark.gpu
@each_branch
def test_a_cuda_graph_replays_the_bits_of_eager_calls(op):
    case = EVERY[op]("cuda")
    expected = evaluate(case)
    buffers = tuple(x.flip(-1).contiguous() for x in case.inputs)
    captured = case._replace(inputs=buffers)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        evaluate(captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = evaluate(captured)
    for buffer, values in zip(buffers, case.inputs):
        buffer.copy_(values)
    for _ in range(2):
        for x in found:
            x.zero_()
        graph.replay()
        assert same_bits(found, expected)


@each_op
def test_a_compiled_call_is_one_graph_with_the_bits_of_the_eager_one(op, device):
    case = CASES[op](device)
    torch.compiler.reset()
    compiled = torch.compile(case.function, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    assert same_bits(evaluate(case._replace(function=compiled)), evaluate(case))


def test_the_model_compiles_to_one_graph(device):
    from batches import random_batch, randomise

    torch.compiler.reset()
    config = PerceiverConfig(
        hidden=64, ff=48, latent_tokens=8, latent_layers=2, decoder_layers=1, num_heads=2, kv_heads_cross=1,
        kv_heads_self=1, segments=6,
    )  # fmt: skip
    model = Perceiver(config).eval()
    randomise(model)
    model.to(device)
    batch = {name: tensor.to(device) for name, tensor in random_batch().items()}
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")

    def results(function):
        prediction = function(batch)
        loss = prediction.segments.square().sum() + prediction.conf.sum()
        return [*(x.detach() for x in prediction), *torch.autograd.grad(loss, list(model.parameters()))]

    # Fused, the operations around ours round otherwise.
    for a, b in zip(results(compiled), results(model), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7


class _Recorder(TorchDispatchMode):
    """Keeps the calls of this project's registered operators."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "wireframe":
            self.calls[function.name()] = (function, arguments)
        return function(*arguments, **(keywords or {}))


def operators(op, device):
    with _Recorder() as recorder:
        evaluate(CASES[op](device))
    return recorder.calls


@each_op
def test_the_registered_operators_pass_opcheck(op, device):
    calls = operators(op, device)
    assert f"wireframe::{op}" in calls and len(calls) >= 2
    # What is traced with symbolic shapes is the same on every device.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    for name, (function, arguments) in calls.items():
        forward = "backward" not in name
        given = [
            x.detach().requires_grad_(forward and x.is_floating_point()) if isinstance(x, Tensor) else x
            for x in arguments
        ]
        torch.library.opcheck(function, tuple(given), test_utils=checks if forward else checks[:1] + checks[2:3])


@pytest.mark.gpu
@each_op
def test_auto_is_triton_on_a_gpu(op, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("auto took the reference")

    modules = [module for name, module in sys.modules.items() if name.startswith("wireframe.kernels.")]
    for module in modules:
        for name in [name for name in vars(module) if name.endswith("_reference")]:
            monkeypatch.setattr(module, name, refuse)
    chosen = evaluate(CASES[op]("cuda", impl="auto"))
    assert same_bits(chosen, evaluate(CASES[op]("cuda")))
    with pytest.raises(AssertionError, match="took the reference"):
        evaluate(CASES[op]("cuda", impl="reference"))

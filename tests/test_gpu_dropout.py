"""Dropout by keys on a CUDA device (marker ``gpu``): the bits of the CPU, again and again."""

import pytest
import torch

from batches import TINY, random_batch, randomise
from gpu_cases import DTYPES, poisoned, same_bits
from wireframe import Perceiver
from wireframe.kernels import ops
from wireframe.kernels.determinism import deterministic, prepare_process

# Before the tests start CUDA.
prepare_process()

pytestmark = pytest.mark.gpu

# Of the model's latents and queries, one element, no whole number of hashes, and rows that are not aligned.
SHAPES = [(32, 256, 256), (64, 64, 256), (1, 1), (5, 3, 701), (3, 4099)]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_keys(scenes):
    generator = torch.Generator().manual_seed(7)
    return ops.step_keys(torch.randint(-(1 << 63), (1 << 63) - 1, (scenes,), generator=generator), 353, 12)


def results(x, branch, keys, grad, device, impl, p=0.1):
    """out and both gradients, on the CPU."""
    leaves = [a.detach().to(device).requires_grad_() for a in (x, branch)]
    out = ops.dropout_add(*leaves, keys.to(device), site=3, p=p, impl=impl)
    grads = torch.autograd.grad(out, leaves, grad.to(device, out.dtype))
    return [a.detach().cpu() for a in (out, *grads)]


@pytest.mark.parametrize("p", [0.1, 0.37])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", [*((dtype, dtype) for dtype in DTYPES), (torch.float32, torch.bfloat16)])
def test_the_kernels_have_the_bits_of_the_reference_on_the_cpu(dtypes, shape, p):
    x, branch, grad = (randn(*shape, seed=i, dtype=dtypes[i % 2]) for i in range(3))
    # Results below the normal range.
    x.view(-1)[:1], branch.view(-1)[:1] = 1e-41, 3e-41
    keys = random_keys(shape[0])
    with poisoned():
        found = results(x, branch, keys, grad, "cuda", "triton", p)
    expected = results(x, branch, keys, grad, "cpu", "reference", p)
    assert same_bits(found, expected)
    assert same_bits(results(x, branch, keys, grad, "cuda", "reference", p), expected)
    assert same_bits(results(x, branch, keys, grad, "cuda", "auto", p), expected)


def test_views_have_the_bits_of_the_reference_on_the_cpu():
    keys = random_keys(8)
    for x, branch in (
        (randn(1, 256, 256).cuda().expand(8, -1, -1), randn(8, 256, 256, seed=1).cuda()),
        (randn(256, 8, 256).cuda().transpose(0, 1), randn(8, 256, 259, seed=1).cuda()[:, :, 3:]),
        (randn(8 * 65536 + 1).cuda()[1:].view(8, 256, 256), randn(8, 65539, seed=1).cuda()[:, 3:].view(8, 256, 256)),
    ):
        grad = torch.full((), 0.3, device="cuda").expand(8, 256, 256)
        found = results(x, branch, keys, grad, "cuda", "triton")
        assert same_bits(found, results(x.cpu(), branch.cpu(), keys, grad.cpu(), "cpu", "reference"))


def test_a_hundred_calls_give_the_same_bits():
    inputs = randn(32, 256, 256), randn(32, 256, 256, seed=1), random_keys(32), randn(32, 256, 256, seed=2)
    inputs = [a.cuda() for a in inputs]
    first = results(*inputs, "cuda", "triton")
    assert all(same_bits(first, results(*inputs, "cuda", "triton")) for _ in range(100))


def test_a_scene_has_its_bits_in_any_batch_and_place():
    x, branch, keys, grad = randn(6, 64, 256), randn(6, 64, 256, seed=1), random_keys(6), randn(6, 64, 256, seed=2)
    whole = results(x, branch, keys, grad, "cuda", "triton")
    for order in ([4], [5, 0], [3, 5, 0, 1]):
        part = results(x[order], branch[order], keys[order], grad[order], "cuda", "triton")
        assert same_bits(part, [a[order] for a in whole])


def test_the_keys_of_a_step_are_those_of_the_cpu():
    scenes = random_keys(64)
    for step in (0, 169_999):
        expected = ops.step_keys(scenes, 353, step)
        assert torch.equal(ops.step_keys(scenes.cuda(), 353, step).cpu(), expected)
        assert torch.equal(ops.step_keys(scenes.cuda(), 353, torch.tensor(step, device="cuda")).cpu(), expected)


def test_a_captured_graph_drops_out_anew_in_every_step():
    x, branch, scenes = (a.cuda() for a in (randn(8, 64, 256), randn(8, 64, 256, seed=1), random_keys(8)))
    step = torch.zeros((), dtype=torch.int64, device="cuda")

    def run(step):
        return ops.dropout_add(x, branch, ops.step_keys(scenes, 353, step), site=1, p=0.1)

    run(step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(step)
    seen = []
    for number in (3, 4):
        step.fill_(number)
        graph.replay()
        seen.append(out.clone())
        assert same_bits([out], [run(number)])
    assert not torch.equal(*seen)


@pytest.mark.parametrize("autocast", [False, True])
def test_training_with_keys_gives_the_same_bits_twice(autocast):
    model = Perceiver({**TINY, "hidden": 128}).train()
    randomise(model)
    model.cuda()
    batch = {name: value.cuda() for name, value in random_batch(4).items()}

    def run(keys=None):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            prediction = model(batch, keys)
        loss = prediction.segments.square().sum() + prediction.conf.sum()
        return [*(a.detach() for a in prediction), *torch.autograd.grad(loss, list(model.parameters()))]

    keys = random_keys(4).cuda()
    with deterministic():
        first = run(keys)
        assert all(same_bits(first, run(keys)) for _ in range(3))
        assert not torch.equal(first[0], run(ops.step_keys(keys, 0, 1))[0])
        # Without keys they are drawn on the device.
        torch.manual_seed(1)
        drawn = run()
        assert not torch.equal(drawn[0], run()[0])
        torch.manual_seed(1)
        assert same_bits(drawn, run())

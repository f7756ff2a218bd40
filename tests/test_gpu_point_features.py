"""Features of points on a CUDA device (marker ``gpu``): the budget at real sizes, and the same bits again and again."""

import pytest
import torch

from gpu_cases import DTYPES, poisoned
from point_cases import budget, features, random_points, rounded_angles, same
from wireframe.kernels.determinism import prepare_process

# Before the tests start CUDA.
prepare_process()

pytestmark = pytest.mark.gpu


def on_gpu(inputs):
    return {name: x.cuda() for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 2048), (64, 4096), (1, 1), (3, 63), (2, 65)])
def test_the_kernel_lies_within_the_budget_and_copies_exactly(shape, dtype):
    inputs = random_points(*shape)
    with poisoned():
        found = features(on_gpu(inputs), dtype=dtype).cpu()
    budget(inputs, found)
    assert torch.equal(found[..., 64:], features(inputs, "reference", dtype=dtype)[..., 64:])
    assert same(features(on_gpu(inputs), "auto", dtype=dtype).cpu(), found)


@pytest.mark.parametrize("spread", [1e-3, 0.3, 20.0, 400.0])
def test_waves_are_those_of_the_angle_as_the_cpu_rounds_it(spread):
    inputs = random_points(8, 2048, spread=spread)
    angle = rounded_angles(inputs).double()
    found = features(on_gpu(inputs)).cpu()[..., :64].double()
    expected = torch.where(inputs["mask"][..., None], torch.cat([angle.sin(), angle.cos()], -1), 0.0)
    assert (found - expected).abs().max() < 1.2e-7


def test_what_a_masked_point_holds_reaches_nothing_and_a_label_outside_its_table_is_none():
    inputs = on_gpu(random_points(8, 2048))
    expected, gone = features(inputs), ~inputs["mask"]
    inputs["xyz"][gone], inputs["vote_frac"][gone], inputs["class_id"][gone] = torch.nan, torch.nan, 255
    assert same(features(inputs), expected)
    inputs["class_id"][:], inputs["source"][:], inputs["behind"][:] = 255, 255, 32767
    assert not features(inputs)[..., 70:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_calls_and_a_captured_graph_give_the_same_bits(dtype):
    inputs = on_gpu(random_points(32, 2048))
    first = features(inputs, dtype=dtype)
    assert all(same(features(inputs, dtype=dtype), first) for _ in range(100))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = features(inputs, dtype=dtype)
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert same(out, first)


def test_a_scene_has_its_bits_in_any_batch_and_place():
    inputs = on_gpu(random_points(6, 1000))
    whole, b = features(inputs), {"frequencies": inputs.pop("frequencies")}
    for order in ([4], [5, 0], [3, 5, 0, 1]):
        assert same(features({name: x[order] for name, x in inputs.items()} | b), whole[order])

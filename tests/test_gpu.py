"""The operations and the model on a CUDA device (marker ``gpu``), and the same tests on the CPU.

Needs torch, numpy and pytest alone, so that it runs on a GPU machine where nothing else is installed.
"""

import os

import numpy as np
import pytest
import torch

from batches import TINY, random_batch, randomise
from scenes import random_scene
from wireframe.fusion import fuse_views
from wireframe.kernels import ops
from wireframe.perceiver import Perceiver, PerceiverConfig
from wireframe.predict import predict_segments
from wireframe.sampling import sample_points
from wireframe.train.config import LossConfig, OptimizerConfig
from wireframe.train.loss import scene_losses
from wireframe.train.optimizer import FlatAdamW

# cuBLAS reads it when CUDA starts, which is after the collection of the tests.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def randn(*shape, seed=0):
    """float32 numbers in float64: both precisions start from the same values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def attention_case(queries=7, keys=65, batch=3):
    inputs = [
        randn(batch, queries, 4, 16),
        randn(batch, keys, 2, 16, seed=1),
        randn(batch, keys, 2, 16, seed=2),
    ]
    mask = randn(batch, keys, seed=3) < 0.5
    # The second scene has no valid key, the third one a single one.
    mask[1:] = False
    mask[2:, 5] = True
    inputs += [randn(4, seed=4) + 1]
    return lambda q, k, v, s: (ops.qk_norm_attention(q, k, v, s, mask.to(q.device)),), inputs, mask


def real_columns(batch, columns):
    return torch.arange(columns).expand(batch, -1) < torch.tensor([columns, 0, 1])[:batch, None]


def sinkhorn_case(rows=17, columns=9):
    mask = real_columns(3, columns)
    return lambda cost: (ops.sinkhorn(cost, mask.to(cost.device)).exp(),), [
        randn(3, rows, columns).abs() * 0.5
    ]


def cost_case():
    return lambda p, t: (ops.segment_cost(p, t, weights=(1.0, 0.2, 0.5)),), [
        0.3 * randn(2, 9, 2, 3),
        0.3 * randn(2, 5, 2, 3, seed=1),
    ]


def matching_case(rows=17, columns=9):
    mask = real_columns(3, columns)
    return lambda p, t: ops.segment_matching(p, t, mask.to(p.device), weights=(1.0, 0.2, 0.5)), [
        0.3 * randn(3, rows, 2, 3),
        0.3 * randn(3, columns, 2, 3, seed=1),
    ]


CASES = {
    "sinkhorn": sinkhorn_case,
    "segment_cost": cost_case,
    "segment_matching": matching_case,
}


def model_case(config, points):
    """The model as a function of its parameters and of the positions of the points."""
    model = Perceiver(config).eval()
    randomise(model)
    names = [name for name, _ in model.named_parameters()]
    batch = random_batch(points=points)

    def forward(xyz, *parameters):
        here = {name: tensor.to(xyz.device) for name, tensor in batch.items()}
        here["xyz_norm"] = xyz
        here["vote_frac"] = here["vote_frac"].to(xyz.dtype)
        state = {"tokenizer.pos_enc.B": model.tokenizer.pos_enc.B.to(xyz), **dict(zip(names, parameters))}
        return tuple(torch.func.functional_call(model, state, (here,)))

    return forward, [batch["xyz_norm"].double(), *(p.detach().double() for p in model.parameters())]


def evaluate(function, inputs, dtype, device, gradients=True):
    """Outputs, and the gradients of a fixed weighting of the first one, all as float64 on the CPU."""
    inputs = [x.detach().to(device=device, dtype=dtype).requires_grad_(gradients) for x in inputs]
    outputs = function(*inputs)
    results = [y.detach() for y in outputs]
    if gradients:
        weight = randn(*outputs[0].shape, seed=9).to(outputs[0])
        results += torch.autograd.grad((outputs[0] * weight).sum(), inputs)
    return [x.double().cpu() for x in results]


def responses(function, inputs, exact, gradients=True):
    """How far each exact result moves when every input moves by one float32 eps of its size, sign by chance.

    That is the error that a float32 computation without any error of its own may show, because its inputs are
    known no better; it grows where the operation is ill-conditioned: no tolerance is chosen by hand.
    """
    moved = []
    for seed in range(3):
        signs = [torch.sign(randn(*x.shape, seed=100 + seed)) for x in inputs]
        shifted = [x * (1 + EPS * sign) for x, sign in zip(inputs, signs)]
        results = evaluate(function, shifted, torch.float64, "cpu", gradients)
        moved.append([(a - b).norm() for a, b in zip(results, exact)])
    return [max(norms) for norms in zip(*moved)]


def check_budget(function, inputs, device, gradients=True, terms=None):
    """Errors against float64, by norm: at most four responses, and on a GPU twice the error of the CPU more.

    The CPU gets no allowance from itself. A GPU rounds long sums in another order; the allowance for that is
    twice the error of the CPU on the same sums. ``terms`` {index: sums of absolute terms} adds four eps of
    them, for results that are long sums of terms that cancel.
    """
    exact = evaluate(function, inputs, torch.float64, "cpu", gradients)
    cpu = evaluate(function, inputs, torch.float32, "cpu", gradients)
    found = cpu if device == "cpu" else evaluate(function, inputs, torch.float32, device, gradients)
    moved = responses(function, inputs, exact, gradients)
    for index, (a, b, c, response) in enumerate(zip(found, exact, cpu, moved)):
        allowed = 4 * response
        if device != "cpu":
            allowed += 2 * (c - b).norm()
        if terms and index in terms:
            allowed += 4 * EPS * terms[index].norm()
        error = (a - b).norm()
        assert error <= allowed, f"result {index}: error {error:.3g}, allowed {allowed:.3g}"
    assert any(result.any() for result in exact)


def log_scale_terms(q, k, v, log_scale, mask):
    """The terms [B, N, H, D] of the gradient of log_scale: sq (the scaled unit query) times dL/dsq."""
    group = q.shape[2] // k.shape[2]
    unit_k, v = (x.repeat_interleave(group, 2) for x in (k / k.norm(dim=-1, keepdim=True), v))
    sq = (q / q.norm(dim=-1, keepdim=True) * log_scale.exp()[:, None]).requires_grad_()
    logits = torch.einsum("bnhd,bkhd->bhnk", sq, unit_k).masked_fill(~mask[:, None, None], -1e30)
    out = torch.einsum("bhnk,bkhd->bnhd", logits.softmax(-1), v) * mask.any(1)[:, None, None, None]
    (gradient,) = torch.autograd.grad((out * randn(*out.shape, seed=9)).sum(), sq)
    return sq.detach() * gradient


def test_attention_stays_within_its_rounding_budget(device):
    function, inputs, mask = attention_case()
    terms = log_scale_terms(*inputs, mask)
    exact = evaluate(function, inputs, torch.float64, "cpu")
    torch.testing.assert_close(terms.sum((0, 1, 3)), exact[4])
    # The gradient of log_scale cancels 30 times in this sum: four eps of its absolute terms, as for any sum.
    check_budget(function, inputs, device, terms={4: terms.abs().sum((0, 1, 3))})


@pytest.mark.parametrize("op", CASES)
def test_an_operation_stays_within_its_rounding_budget(op, device):
    check_budget(*CASES[op](), device)


@pytest.mark.parametrize("config, points", [(PerceiverConfig(**TINY), 96), (PerceiverConfig(), 128)])
def test_the_model_stays_within_its_rounding_budget(config, points, device):
    check_budget(*model_case(config, points), device, gradients=False)


def on(device, batch):
    return {name: tensor.to(device) for name, tensor in batch.items()}


def targets(device, scenes=2, segments=6):
    target = 0.3 * randn(scenes, segments, 2, 3, seed=5).float()
    return target.to(device), real_columns(3, segments)[:scenes].to(device)


def loss_and_gradients(model, device):
    torch.manual_seed(1)
    target, mask = targets(device)
    prediction = model(on(device, random_batch()))
    loss = scene_losses(prediction, target, mask, LossConfig(), 0.1).total.mean()
    return [*prediction, loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.usefixtures("deterministic")
def test_identical_calls_give_identical_bits(device):
    model = Perceiver(TINY).train()
    randomise(model)
    model.to(device)
    first, *others = (loss_and_gradients(model, device) for _ in range(5))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))
    # Dropout was on: another seed of the device's generator would give other bits.
    model.eval()
    assert not torch.equal(first[0], loss_and_gradients(model, device)[0])


@pytest.mark.usefixtures("deterministic")
def test_training_steps_lower_the_loss(device):
    model = Perceiver(TINY, seed=3).train().to(device)
    optimizer = FlatAdamW(model, OptimizerConfig())
    lr, healthy = torch.tensor(3e-3, device=device), torch.tensor(True, device=device)
    losses = []
    for _ in range(30):
        target, mask = targets(device)
        loss = scene_losses(model(on(device, random_batch())), target, mask, LossConfig(), 0.1).total.mean()
        optimizer.collect(0, torch.autograd.grad(loss, optimizer.parameters(), materialize_grads=True))
        optimizer.step(optimizer.gradients[0], lr, healthy)
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.device.type == device and p.isfinite().all() for p in model.parameters())


@pytest.mark.usefixtures("deterministic")
def test_what_masked_points_hold_reaches_neither_prediction_nor_gradient(device):
    model = Perceiver(TINY).eval()
    randomise(model)
    model.to(device)
    batch = on(device, random_batch())
    results = []
    for value in (0.0, float("nan")):
        batch["xyz_norm"] = torch.where(batch["mask"][..., None], batch["xyz_norm"], value)
        prediction = model(batch)
        results.append(
            [*prediction, *torch.autograd.grad(prediction.segments.sum(), list(model.parameters())[:4])]
        )
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*results))


def test_a_model_on_a_device_predicts_a_scene_of_numpy_arrays(device):
    sample = sample_points(fuse_views(random_scene(0), 200), 128)
    model = Perceiver(TINY).eval()
    randomise(model)
    here = predict_segments(sample, model)
    found = predict_segments(sample, model.to(device))
    assert isinstance(found.segments, np.ndarray) and found.segments.shape == (6, 2, 3)
    # In normalised units, ten times the rounding of this model: the rounding itself is tested above.
    np.testing.assert_allclose(found.segments, here.segments, rtol=0, atol=1e-4 * float(sample.scale))
    np.testing.assert_allclose(found.probability, here.probability, rtol=0, atol=1e-4)

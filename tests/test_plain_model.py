"""The plain model of the benchmarks is the same function as the model, and so an oracle of it."""

import pytest
import torch

from batches import TINY, random_batch, randomise
from wireframe import Perceiver, PerceiverConfig
from wireframe.bench.plain_model import PlainPerceiver, plain_loss, plain_optimizer, plain_step
from wireframe.train.config import LossConfig, OptimizerConfig
from wireframe.train.loss import scene_losses

# Sums of a few hundred terms of order one, in another order.
BUDGET = dict(rtol=2e-4, atol=2e-5)


@pytest.fixture(scope="module")
def pair():
    """A model of every kind of layer without a silent branch, and the plain one with its weights; dropout is off."""
    config = PerceiverConfig(**TINY, dropout=0.0)
    model = Perceiver(config)
    randomise(model)
    with torch.no_grad():
        # Segments among the targets, or no target would be matched.
        model.segmenter.segment_head.weight *= 0.1
        model.segmenter.query_offsets *= 0.1
    plain = PlainPerceiver(config)
    plain.load_state_dict(model.state_dict(), strict=True)
    return model, plain


@pytest.fixture(scope="module")
def problem():
    g = torch.Generator().manual_seed(3)
    target = 0.3 * torch.randn(3, TINY["segments"], 2, 3, generator=g)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4, [False] * 6])
    # What a masked target holds is nobody's business.
    return random_batch(scenes=3), torch.where(mask[:, :, None, None], target, float("nan")), mask


def test_the_published_state_dict_loads_by_name():
    with torch.device("meta"):
        ours, plain = Perceiver().state_dict(), PlainPerceiver().state_dict()
    assert len(ours) == 162
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in plain.items()}


@pytest.mark.parametrize("endpoint_weight, conf_target", [(0.0, "mass"), (0.1, "rank")])
def test_loss_and_gradients_are_those_of_the_model(pair, problem, endpoint_weight, conf_target):
    batch, target, mask = problem
    settings = (target, mask, LossConfig(), endpoint_weight, conf_target)
    predictions = [network(batch) for network in pair]
    for ours, plain in zip(*predictions):
        torch.testing.assert_close(plain, ours, **BUDGET)
    losses = [scene_losses(predictions[0], *settings).total, plain_loss(predictions[1], *settings)]
    torch.testing.assert_close(losses[1], losses[0], **BUDGET)
    ours, plain = (
        torch.autograd.grad(loss.mean(), list(network.parameters())) for loss, network in zip(losses, pair)
    )
    for (name, _), expected, found in zip(pair[0].named_parameters(), ours, plain):
        assert expected.abs().max() > 0, f"{name} is silent, so nothing is compared"
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["latent_layers.1.self_attn.attn.log_scale", "decoder_layers.1.ffn.norm.weight"])
def test_a_weight_of_its_own_is_seen(pair, problem, name):
    model, plain = pair
    ours = model(problem[0])[0]
    state = {n: t.clone() for n, t in model.state_dict().items()}
    state[f"segmenter.{name}"] *= 1.1
    plain.load_state_dict(state)
    try:
        assert not torch.allclose(plain(problem[0])[0], ours, **BUDGET)
    finally:
        plain.load_state_dict(model.state_dict())


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("fused, autocast", [(False, None), (True, torch.bfloat16)])
def test_a_step_changes_every_parameter_and_the_loss_falls(problem, fused, autocast):
    torch.manual_seed(0)
    plain = PlainPerceiver(PerceiverConfig(**TINY))
    randomise(plain)
    before = [p.detach().clone() for p in plain.parameters()]
    optimizer = plain_optimizer(plain, OptimizerConfig(), fused=fused)
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(before) - 2, 2]
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    told = [plain_step(plain, optimizer, *problem, LossConfig(), autocast=autocast) for _ in range(12)]
    losses = [step.losses.mean() for step in told]
    assert told[0].grad_norm > 0
    assert all(torch.isfinite(loss) for loss in losses) and losses[-1] < losses[0]
    assert all(not torch.equal(p, b) for p, b in zip(plain.parameters(), before))

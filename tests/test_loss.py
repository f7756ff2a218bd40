import pytest
import torch

from wireframe.perceiver import Prediction
from wireframe.train.config import LossConfig
from wireframe.train.loss import confidence_target, endpoint_loss, match_loss, scene_losses


def test_confidence_by_mass_is_what_a_query_sends_to_real_targets():
    plan = torch.tensor([[[0.9, 0.3], [0.0, 0.5]]])
    assert confidence_target(plan, torch.tensor([[True, False]]), "mass").tolist() == [[pytest.approx(0.9), 0.0]]


def test_confidence_by_rank_counts_duplicates_as_found_and_distant_queries_as_not():
    plan = torch.tensor([[[0.3, 0.0], [0.3, 0.0], [0.3, 0.0], [0.03, 0.0], [0.0, 0.01]]])
    found = confidence_target(plan, torch.tensor([[True, True]]), "rank")[0]
    assert torch.allclose(found, torch.tensor([0.93, 0.93, 0.93, 0.093, 0.01]), atol=1e-6)


def test_match_loss_pulls_every_target_with_weight_one_however_far_it_is():
    target = torch.tensor([[[[0.0, 0, 0], [1, 0, 0]], [[torch.nan] * 3] * 2]])
    mask = torch.tensor([[True, False]])
    for distance in (0.1, 2.0):
        pred = target[:, :1] + torch.tensor([0.0, distance, 0.0])
        pred = torch.cat([pred, pred + 5], 1).requires_grad_()
        plan = torch.tensor([[[1e-20, 0.0], [1e-26, 0.0]]])
        loss = match_loss(pred, target, mask, plan, (3.0, 0.0, 0.0))
        assert torch.allclose(loss, torch.tensor([3.0 * distance]), rtol=1e-4)
        (gradient,) = torch.autograd.grad(loss, pred)
        # Half of the pull on the midpoint goes to each end, towards the target.
        assert torch.allclose(gradient[0, 0, :, 1], torch.tensor(1.5), rtol=1e-4)


def test_endpoint_loss_does_not_care_which_end_is_first():
    pred = torch.tensor([[[[0.0, 0, 0], [1, 0, 0]]]])
    target = torch.tensor([[[[1.0, 0, 0.5], [0, 0, 0]], [[torch.nan] * 3] * 2]])
    mask = torch.tensor([[True, False]])
    loss = endpoint_loss(pred, target, mask, torch.tensor([[[0.5, 0.5]]]))
    assert loss.tolist() == [0.25]


def test_the_loss_of_a_scene_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(0)
    prediction = Prediction(torch.randn(5, 8, 2, 3, generator=generator), torch.randn(5, 8, generator=generator))
    target = torch.randn(5, 6, 2, 3, generator=generator)
    mask = torch.arange(6) < torch.tensor([1, 6, 3, 2, 5])[:, None]
    together = scene_losses(prediction, target, mask, LossConfig(), 0.1, "mass")
    for i in range(5):
        part = Prediction(prediction.segments[i : i + 1], prediction.conf[i : i + 1])
        alone = scene_losses(part, target[i : i + 1], mask[i : i + 1], LossConfig(), 0.1, "mass")
        assert all(torch.equal(one[0], many[i]) for one, many in zip(alone, together))
    assert (together.endpoint > 0).all()


def test_every_term_reaches_the_gradient():
    generator = torch.Generator().manual_seed(1)
    segments = torch.randn(2, 8, 2, 3, generator=generator).requires_grad_()
    conf = torch.randn(2, 8, generator=generator).requires_grad_()
    target, mask = torch.randn(2, 4, 2, 3, generator=generator), torch.ones(2, 4, dtype=torch.bool)
    gradients = [
        torch.autograd.grad(scene_losses(Prediction(segments, conf), target, mask, config, weight).total.sum(), inputs)
        for config, weight, inputs in (
            (LossConfig(), 0.0, (segments, conf)),
            (LossConfig(), 0.1, (segments,)),
            (LossConfig(conf_weight=0.0), 0.0, (segments,)),
        )
    ]
    assert gradients[0][1].abs().sum() > 0
    assert not torch.equal(gradients[0][0], gradients[1][0])
    # The confidence does not move the segments: its target is taken from the detached plan.
    assert torch.equal(gradients[0][0], gradients[2][0])

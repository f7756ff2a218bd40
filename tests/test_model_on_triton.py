"""The whole model and its training loss on the Triton kernels, interpreted: what a CUDA device runs by default."""

import pytest
import torch
from test_gpu import check_budget, loss_and_gradients, model_case

from batches import randomise
from wireframe.kernels import dispatch
from wireframe.perceiver import Perceiver, PerceiverConfig

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not dispatch.INTERPRETED, reason="needs TRITON_INTERPRET=1")

# Heads of 32, the smallest that the kernels take.
CONFIG = PerceiverConfig(
    hidden=128, ff=64, latent_tokens=8, latent_layers=2, decoder_layers=1, num_heads=4, segments=6, num_points=40
)

# Without dropout.
MODEL = {"point_features", "linear_gelu", "rms_norm", "residual_norm", "qk_norm_attention_kvpacked"}


@pytest.fixture
def chosen(monkeypatch):
    """Makes "auto" choose on the CPU as it does on CUDA; the operations that took the kernels."""
    taken, choose = [], dispatch.choose

    def choose_triton(op, impl, device="cpu", triton_limit=None, native_limit=None):
        if op in dispatch.MODEL_OPS and impl == "auto" and triton_limit is None:
            taken.append(op)
            return "triton"
        return choose(op, impl, device, triton_limit, native_limit)

    monkeypatch.setattr(dispatch, "choose", choose_triton)
    return taken


def test_the_model_stays_within_its_rounding_budget(chosen):
    check_budget(*model_case(CONFIG, 40), "cpu", gradients=False)
    assert set(chosen) == MODEL


def test_the_training_loss_and_its_gradients_are_those_of_the_reference(chosen, monkeypatch):
    model = Perceiver(CONFIG).eval()
    randomise(model)
    found = loss_and_gradients(model, "cpu")
    assert set(chosen) == {*MODEL, "segment_cost", "segment_matching"}
    again = loss_and_gradients(model, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(found, again))
    monkeypatch.undo()
    expected = loss_and_gradients(model, "cpu")
    for a, b in zip(found, expected):
        # Two orders of the same float32 sums, through layers; a wrong term would be off by far more.
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9, (a - b).norm() / b.norm()
    assert all(b.any() for b in expected)

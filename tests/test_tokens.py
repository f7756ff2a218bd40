"""Tokens: the folded map on features against embeddings written out, and what a batch must hold."""

import math

import pytest
import torch
import torch.nn.functional as F

from batches import random_batch
from wireframe.kernels.point_features_reference import point_features_reference
from wireframe.tokens import LABELS, MODEL_INPUTS, Tokenizer, token_width

TABLES = ("label_emb", "src_emb", "behind_emb")


def written_out(tokenizer, batch):
    """Tokens [B, T, 95] in double precision, with embeddings looked up."""
    xyz, b = batch["xyz_norm"].double(), tokenizer.pos_enc.B.double()
    angle = 2 * math.pi * xyz @ b.T
    votes = (batch["n_views_voted"].double() - 2.7) / 1.0, (batch["vote_frac"].double() - 0.5) / 0.25
    return torch.cat([
        xyz, angle.sin(), angle.cos(),
        F.embedding(batch["class_id"].long(), tokenizer.label_emb.weight.double()),
        F.embedding(batch["source"].long(), tokenizer.src_emb.weight.double()),
        F.embedding(batch["behind"].clamp_min(0).long(), tokenizer.behind_emb.weight.double()),
        torch.stack(votes, -1),
    ], -1)  # fmt: skip


def first_map(tokenizer, rows=24, bias=True):
    """weight [rows, 95], and bias [rows] or None."""
    g = torch.Generator().manual_seed(5)
    weight = torch.randn(rows, token_width(tokenizer.behind_emb.embedding_dim), generator=g) / 10
    return weight.requires_grad_(), torch.randn(rows, generator=g).requires_grad_() if bias else None


def every_label(batch):
    """The batch with each label of each table at least once, the ends of the tables in scene 0."""
    for key, size in zip(("class_id", "source", "behind"), LABELS):
        batch[key][0, :size] = torch.arange(size).to(batch[key].dtype)
    batch["behind"][1, :3] = torch.tensor([-1, 0, 28])
    return batch


@pytest.mark.parametrize("dim", [8, 4, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_the_folded_map_on_features_is_the_map_on_tokens(dim, bias):
    tokenizer, batch = Tokenizer(dim), every_label(random_batch())
    weight, bias = first_map(tokenizer, bias=bias)
    found = F.linear(tokenizer.features(batch), tokenizer.fold(weight, bias))
    tokens = written_out(tokenizer, batch)
    assert tokens.shape == (2, 96, token_width(dim)) and token_width(8) == 95
    expected = F.linear(tokens, weight.double(), None if bias is None else bias.double())
    expected = torch.where(batch["mask"][..., None], expected, 0.0)
    # Angles of up to 200 radians are rounded by 1e-5, each of 64 waves has a weight of 0.1.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("points", [1, 63, 96])
def test_gradients_are_those_of_embeddings(points):
    tokenizer, batch = Tokenizer().double(), random_batch(points=points)
    batch["xyz_norm"], batch["vote_frac"] = batch["xyz_norm"].double(), batch["vote_frac"].double()
    if points == 96:
        every_label(batch)
    weight, bias = (x.detach().double().requires_grad_() for x in first_map(tokenizer))
    leaves = [weight, bias, *(getattr(tokenizer, name).weight for name in TABLES)]
    grad = torch.randn(2, points, 24, generator=torch.Generator().manual_seed(6)).double()
    found = F.linear(tokenizer.features(batch, torch.float64), tokenizer.fold(weight, bias, torch.float64))
    expected = torch.where(batch["mask"][..., None], F.linear(written_out(tokenizer, batch), weight, bias), 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad)):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Folding(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tokenizer = Tokenizer(2).double()

    def forward(self, weight, bias):
        return self.tokenizer.fold(weight, bias, torch.float64)


def test_the_fold_is_differentiable_to_any_order():
    module = Folding()
    leaves = [x.detach().double().requires_grad_() for x in first_map(module.tokenizer, 2)]
    names = [f"tokenizer.{name}.weight" for name in TABLES]
    leaves += [module.get_parameter(name) for name in names]

    def function(weight, bias, *tables):
        return torch.func.functional_call(module, dict(zip(names, tables)), (weight, bias))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_fold_is_rounded_once(dtype):
    tokenizer = Tokenizer()
    weight, bias = first_map(tokenizer)
    exact = tokenizer.fold(weight, bias)
    assert exact.dtype == torch.float32 and exact.shape == (24, 128) and not exact[:, 114:].any()
    assert torch.equal(tokenizer.fold(weight, bias, dtype), exact.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.fold(weight, bias), exact)
    # Parameters in half precision are read as they are.
    halved = Tokenizer().to(dtype)
    rounded = Tokenizer()
    rounded.load_state_dict({name: x.float() for name, x in halved.state_dict().items()})
    expected = rounded.fold(weight.to(dtype).float(), bias.to(dtype).float(), dtype)
    assert torch.equal(halved.fold(weight.to(dtype), bias.to(dtype), dtype), expected)


def test_on_the_meta_device_there_are_shapes():
    with torch.device("meta"):
        tokenizer, weight, bias = Tokenizer(), torch.empty(24, 95), torch.empty(24)
    assert tokenizer.fold(weight, bias, torch.bfloat16).shape == (24, 128)
    batch = {name: value.to("meta") for name, value in random_batch().items()}
    tokenizer.pos_enc.to("meta")
    found = tokenizer.features(batch, torch.bfloat16)
    assert (found.shape, found.dtype, found.device.type) == ((2, 96, 128), torch.bfloat16, "meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_those_of_the_batch(dtype):
    tokenizer, batch = Tokenizer(), every_label(random_batch())
    names = ("xyz_norm", "class_id", "source", "behind", "n_views_voted", "vote_frac", "mask")
    expected = point_features_reference(*(batch[name] for name in names), tokenizer.pos_enc.B, (13, 2, 29), dtype)
    assert torch.equal(tokenizer.features(batch, dtype), expected)
    assert not tokenizer.features(batch, dtype).requires_grad


def test_the_frequencies_are_those_of_a_generator_seeded_zero_and_are_saved():
    tokenizer = Tokenizer()
    expected = torch.randn(32, 3, generator=torch.Generator().manual_seed(0)) * 10
    assert torch.equal(tokenizer.state_dict()["pos_enc.B"], expected)
    assert set(tokenizer.state_dict()) == {"pos_enc.B", "label_emb.weight", "src_emb.weight", "behind_emb.weight"}


def test_half_precision_and_autocast_leave_the_waves_alone():
    batch = random_batch()
    expected = Tokenizer().features(batch)
    for half in (torch.float16, torch.bfloat16):
        tokenizer = Tokenizer().to(half)
        assert tokenizer.pos_enc.B.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(tokenizer.features(batch), expected)


@pytest.mark.parametrize("key", MODEL_INPUTS)
def test_a_missing_or_ill_shaped_array_is_named(key):
    batch = random_batch()
    value = batch.pop(key)
    with pytest.raises(ValueError, match=key):
        Tokenizer().features(batch)
    with pytest.raises(ValueError, match=key):
        Tokenizer().features({**batch, key: value[:, :-1]} if key != "xyz_norm" else {**batch, key: value[..., :2]})
    with pytest.raises(ValueError, match=key):
        Tokenizer().features({**batch, key: value.numpy()})


@pytest.mark.parametrize("key, label", [("class_id", 13), ("source", 2), ("behind", 29)])
def test_a_label_out_of_its_table_is_named(key, label):
    batch = random_batch()
    batch[key][1, 5] = label
    with pytest.raises(ValueError, match=key):
        Tokenizer().features(batch)


def test_a_mask_that_is_not_boolean_is_refused():
    batch = random_batch()
    batch["mask"] = batch["mask"].to(torch.uint8)
    with pytest.raises(ValueError, match="mask"):
        Tokenizer().features(batch)

import math

import numpy as np
import pytest
import torch

from batches import random_batch
from wireframe.tokens import MODEL_INPUTS, Tokenizer, token_width


def test_every_column_of_a_token_is_the_documented_one():
    tokenizer, batch = Tokenizer(), random_batch()
    tokens = tokenizer(batch).detach().double().numpy()
    assert tokens.shape == (2, 96, 95) and token_width(8) == 95
    xyz = batch["xyz_norm"].double().numpy()
    angle = 2 * math.pi * xyz @ tokenizer.pos_enc.B.double().numpy().T
    behind = np.maximum(batch["behind"].numpy(), 0)
    expected = np.concatenate([
        xyz, np.sin(angle), np.cos(angle),
        tokenizer.label_emb.weight.detach().numpy()[batch["class_id"].numpy()],
        tokenizer.src_emb.weight.detach().numpy()[batch["source"].numpy()],
        tokenizer.behind_emb.weight.detach().numpy()[behind],
        (batch["n_views_voted"].numpy()[..., None] - 2.7) / 1.0,
        (batch["vote_frac"].double().numpy()[..., None] - 0.5) / 0.25,
    ], axis=-1)
    assert (batch["behind"] == -1).any()
    np.testing.assert_allclose(tokens, expected, atol=5e-5)


def test_the_frequencies_are_those_of_a_generator_seeded_zero_and_are_saved():
    tokenizer = Tokenizer()
    expected = torch.randn(32, 3, generator=torch.Generator().manual_seed(0)) * 10
    assert torch.equal(tokenizer.state_dict()["pos_enc.B"], expected)
    assert set(tokenizer.state_dict()) == {"pos_enc.B", "label_emb.weight", "src_emb.weight", "behind_emb.weight"}


def test_half_precision_and_autocast_leave_the_fourier_features_alone():
    batch = random_batch()
    expected = Tokenizer().pos_enc(batch["xyz_norm"])
    for half in (torch.float16, torch.bfloat16):
        tokenizer = Tokenizer().to(half)
        assert tokenizer.pos_enc.B.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(tokenizer.pos_enc(batch["xyz_norm"]), expected)


@pytest.mark.parametrize("key", MODEL_INPUTS)
def test_a_missing_or_ill_shaped_array_is_named(key):
    batch = random_batch()
    value = batch.pop(key)
    with pytest.raises(ValueError, match=key):
        Tokenizer()(batch)
    with pytest.raises(ValueError, match=key):
        Tokenizer()({**batch, key: value[:, :-1]} if key != "xyz_norm" else {**batch, key: value[..., :2]})
    with pytest.raises(ValueError, match=key):
        Tokenizer()({**batch, key: value.numpy()})


@pytest.mark.parametrize("key, label", [("class_id", 13), ("source", 2), ("behind", 29)])
def test_a_label_out_of_its_table_is_named(key, label):
    batch = random_batch()
    batch[key][1, 5] = label
    with pytest.raises(ValueError, match=key):
        Tokenizer()(batch)


def test_a_mask_that_is_not_boolean_is_refused():
    batch = random_batch()
    batch["mask"] = batch["mask"].to(torch.uint8)
    with pytest.raises(ValueError, match="mask"):
        Tokenizer()(batch)

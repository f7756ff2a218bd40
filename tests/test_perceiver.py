import math

import numpy as np
import pytest
import torch

from batches import TINY, random_batch, randomise
from wireframe import Perceiver, PerceiverConfig
from wireframe.errors import ConfigError
from wireframe.segments import decode_segments, denormalise, encode_segments


def published_names() -> set[str]:
    attention = ["norm.weight", "attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight",
                 "attn.out_proj.weight", "attn.log_scale"]
    ffn = ["norm.weight", "ffn.linear1.weight", "ffn.linear1.bias", "ffn.linear2.weight", "ffn.linear2.bias"]
    names = {"tokenizer.label_emb.weight", "tokenizer.src_emb.weight", "tokenizer.behind_emb.weight",
             "tokenizer.pos_enc.B", "segmenter.input_proj.0.weight", "segmenter.input_proj.0.bias",
             "segmenter.input_proj.2.weight", "segmenter.input_proj.2.bias", "segmenter.input_proj.3.weight",
             "segmenter.latent_embed.weight", "segmenter.query_embed.weight", "segmenter.query_offsets",
             "segmenter.segment_head.weight", "segmenter.segment_head.bias", "segmenter.conf_head.weight",
             "segmenter.conf_head.bias"}
    for stack, layers, crosses in (("latent_layers", 7, {0, 4, 6}), ("decoder_layers", 3, {0, 1, 2})):
        for i in range(layers):
            prefix = f"segmenter.{stack}.{i}"
            names |= {f"{prefix}.self_attn.{name}" for name in attention}
            names |= {f"{prefix}.ffn.{name}" for name in ffn}
            names |= {f"{prefix}.cross.{name}" for name in attention if i in crosses}
    return names


class Oracle:
    """The published forward pass in NumPy float64, from a state dict alone."""

    def __init__(self, state, heads=4):
        self.w = {name: tensor.double().numpy() for name, tensor in state.items()}
        self.heads = heads

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def norm(self, name, x):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1.1920929e-7) * self.w[f"{name}.weight"]

    @staticmethod
    def gelu(x):
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    def attention(self, name, x, memory, mask):
        out, normed = [], self.norm(f"{name}.norm", x)
        q, k, v = (self.linear(f"{name}.attn.{p}_proj", y) for p, y in (("q", normed), ("k", memory), ("v", memory)))
        dim = q.shape[-1] // self.heads
        kv_heads = k.shape[-1] // dim
        for h in range(self.heads):
            g = h // (self.heads // kv_heads)
            qh, kh, vh = q[:, h * dim:][:, :dim], k[:, g * dim:][:, :dim], v[:, g * dim:][:, :dim]
            qh = qh / np.maximum(np.linalg.norm(qh, axis=-1, keepdims=True), 1e-12)
            kh = kh / np.maximum(np.linalg.norm(kh, axis=-1, keepdims=True), 1e-12)
            p = np.exp(np.exp(self.w[f"{name}.attn.log_scale"][h]) * (qh @ kh.T))
            p = p * mask if mask is not None else p
            out.append(p @ vh / p.sum(-1, keepdims=True))
        return x + self.linear(f"{name}.attn.out_proj", np.concatenate(out, -1))

    def layer(self, name, x, memory, mask):
        if f"{name}.cross.norm.weight" in self.w:
            x = self.attention(f"{name}.cross", x, memory, mask)
        x = self.attention(f"{name}.self_attn", x, x, None)
        hidden = self.gelu(self.linear(f"{name}.ffn.ffn.linear1", self.norm(f"{name}.ffn.norm", x)))
        return x + self.linear(f"{name}.ffn.ffn.linear2", hidden)

    def tokens(self, s):
        angle = 2 * math.pi * s["xyz_norm"].astype(float) @ self.w["tokenizer.pos_enc.B"].T
        return np.concatenate([
            s["xyz_norm"], np.sin(angle), np.cos(angle), self.w["tokenizer.label_emb.weight"][s["class_id"]],
            self.w["tokenizer.src_emb.weight"][s["source"]],
            self.w["tokenizer.behind_emb.weight"][np.maximum(s["behind"], 0)],
            (s["n_views_voted"][:, None] - 2.7) / 1.0, (s["vote_frac"][:, None] - 0.5) / 0.25], axis=-1)

    def __call__(self, batch, index):
        s = {key: value[index].numpy() for key, value in batch.items()}
        points = self.gelu(self.linear("segmenter.input_proj.0", self.tokens(s)))
        points = self.norm("segmenter.input_proj.3", self.linear("segmenter.input_proj.2", points))
        x = self.w["segmenter.latent_embed.weight"]
        for i in range(7):
            x = self.layer(f"segmenter.latent_layers.{i}", x, points, s["mask"].astype(float))
        y = self.w["segmenter.query_embed.weight"]
        for i in range(3):
            y = self.layer(f"segmenter.decoder_layers.{i}", y, x, None)
        head = self.linear("segmenter.segment_head", y)
        middle = head[:, :3] + self.w["segmenter.query_offsets"][:, 0]
        direction = head[:, 3:6] / np.linalg.norm(head[:, 3:6], axis=-1, keepdims=True)
        half = direction * np.log1p(np.exp(head[:, 6:])) * 0.1 / 2
        return np.stack([middle - half, middle + half], 1), self.linear("segmenter.conf_head", y)[:, 0]


def test_the_state_dict_has_the_published_names_and_size():
    model = Perceiver()
    assert set(model.state_dict()) == published_names() and len(published_names()) == 162
    assert sum(p.numel() for p in model.parameters()) == 8_853_892
    assert model.state_dict()["segmenter.query_offsets"].shape == (64, 2, 3)


def test_a_published_checkpoint_gives_what_the_written_out_model_gives(tmp_path):
    model = Perceiver()
    randomise(model)
    state = {name.replace("segmenter.", "segmenter._orig_mod."): t for name, t in model.state_dict().items()}
    torch.save({"model": state, "args": {"dropout": 0.1}}, tmp_path / "published.pt")
    batch = random_batch()
    with torch.no_grad():
        prediction = Perceiver.from_checkpoint(tmp_path / "published.pt")(batch)
    oracle = Oracle(model.state_dict())
    for i in range(2):
        segments, conf = oracle(batch, i)
        np.testing.assert_allclose(prediction.segments[i].numpy(), segments, atol=1e-4)
        np.testing.assert_allclose(prediction.conf[i].numpy(), conf, atol=1e-4)
    # The comparison would be empty if the points did not matter.
    assert (prediction.segments[0] - prediction.segments[1]).abs().max() > 0.05


def test_a_fresh_model_ignores_its_points_and_starts_as_published():
    model = Perceiver(TINY).eval()
    a, b = model(random_batch(seed=1)), model(random_batch(seed=2))
    assert torch.equal(a.segments, b.segments) and torch.equal(a.conf, b.conf)
    state = model.state_dict()
    for name, tensor in state.items():
        if "out_proj" in name or "linear2" in name or name.endswith("conf_head.bias"):
            assert not tensor.any(), name
        if name.endswith("log_scale"):
            assert torch.allclose(tensor, torch.tensor(math.log(math.sqrt(8)))), name
    assert state["segmenter.segment_head.bias"].tolist() == [0, 0, 0, 0, 0, 0, 0.5]
    published = Perceiver().state_dict()
    assert 0.8e-3 < published["segmenter.segment_head.weight"].std() < 1.2e-3
    assert 0.04 < published["segmenter.query_offsets"].std() < 0.06


def test_scenes_of_a_batch_do_not_influence_one_another():
    model = Perceiver(TINY).eval()
    randomise(model)
    batch = random_batch(scenes=3)
    together = model(batch)
    for i in range(3):
        alone = model({key: value[i:i + 1] for key, value in batch.items()})
        # BLAS sums in another order at another batch size: a few roundings, where a leak would move centimetres.
        for ours, theirs in zip(alone, together):
            budget = 32 * torch.finfo(torch.float32).eps * theirs.abs().max().item()
            torch.testing.assert_close(ours[0], theirs[i], rtol=0, atol=budget)


def test_what_a_masked_point_holds_reaches_neither_prediction_nor_gradient():
    model = Perceiver(TINY).eval()
    randomise(model)
    batch, poisoned = random_batch(), random_batch()
    poisoned["xyz_norm"][~batch["mask"]] = float("nan")
    poisoned["vote_frac"][~batch["mask"]] = float("inf")
    poisoned["class_id"][~batch["mask"]] = 0
    results = []
    for case in (batch, poisoned):
        model.zero_grad()
        prediction = model(case)
        (prediction.segments.square().sum() + prediction.conf.sum()).backward()
        results.append([prediction.segments, prediction.conf, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("scene", ["masked", "empty"])
def test_a_scene_without_points_is_finite_forward_and_backward(scene):
    model = Perceiver(TINY).eval()
    randomise(model)
    batch = random_batch()
    if scene == "masked":
        batch["mask"][0] = False
    else:
        batch = {key: value[:, :0] if value.dim() > 1 else value for key, value in batch.items()}
    prediction = model(batch)
    (prediction.segments.sum() + prediction.conf.sum()).backward()
    assert prediction.segments.isfinite().all() and prediction.conf.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_initial_weights_follow_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = Perceiver(TINY), Perceiver(TINY, seed=0), Perceiver(TINY, seed=1)
    assert torch.equal(torch.rand(3), expected)
    weights = [m.state_dict()["segmenter.input_proj.0.weight"] for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_dropout_acts_in_training_only():
    model = Perceiver(TINY)
    randomise(model)
    batch = random_batch()
    assert not torch.equal(model(batch).conf, model(batch).conf)
    model.eval()
    assert torch.equal(model(batch).conf, model(batch).conf)


def test_predictions_are_float32_under_autocast_and_in_half_precision():
    model = Perceiver(TINY).eval()
    randomise(model)
    expected = model(random_batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = model(random_batch())
    assert prediction.segments.dtype == prediction.conf.dtype == torch.float32
    assert 0 < (prediction.segments - expected.segments).abs().max() < 0.2
    assert model.bfloat16()(random_batch()).segments.dtype == torch.float32


def test_configs_round_trip_and_refuse_what_cannot_be_built():
    config = PerceiverConfig.from_dict(TINY)
    assert PerceiverConfig.from_dict(config.to_dict()) == config and config.head_dim == 8
    with pytest.raises(ConfigError, match="hiden"):
        PerceiverConfig.from_dict({"hiden": 3})
    for bad in ({"hidden": 30}, {"kv_heads_self": 3}, {"dropout": 1.0}, {"segments": 0}, {"ff": 2.0}, {"ff": True},
                {"hidden": 1 << 20}, {"num_points": 65537}, {"latent_layers": 257}, {"decoder_layers": 10**30}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            PerceiverConfig(**bad)
    assert [i for i in range(7) if PerceiverConfig().reads_points(i)] == [0, 4, 6]


def test_segments_decode_to_their_midpoint_direction_and_length_and_back():
    g = torch.Generator().manual_seed(0)
    head = torch.randn(5, 8, 7, generator=g, dtype=torch.float64)
    offset = torch.randn(8, 3, generator=g, dtype=torch.float64)
    segments = decode_segments(head, offset)
    p, q = segments.unbind(-2)
    torch.testing.assert_close((p + q) / 2, head[..., :3] + offset)
    torch.testing.assert_close((q - p).norm(dim=-1), 0.1 * torch.log1p(head[..., 6].exp()))
    torch.testing.assert_close(decode_segments(encode_segments(segments)), segments)
    long = torch.tensor([[[0.0, 0, 0], [300.0, 0, 0]]])
    torch.testing.assert_close(decode_segments(encode_segments(long)), long)
    assert decode_segments(torch.zeros(7)).isfinite().all()


def test_denormalised_segments_use_the_scale_and_centre_of_their_own_scene():
    segments = torch.ones(2, 4, 2, 3)
    world = denormalise(segments, torch.tensor([[1.0, 2, 3], [0, 0, 0]]), torch.tensor([2.0, 5.0]))
    assert torch.equal(world[0, 3, 1], torch.tensor([3.0, 4, 5])) and torch.equal(world[1, 0, 0], torch.full((3,), 5.0))
    assert torch.equal(denormalise(segments[0], torch.zeros(3), torch.tensor(2.0)), segments[0] * 2)

"""Flat buffers behind the model: the same weights by other names, and AdamW over all of them at once."""

import pytest
import torch

from batches import TINY, random_batch, randomise
from wireframe.errors import ConfigError
from wireframe.layers import Linear
from wireframe.perceiver import Perceiver
from wireframe.train.config import OptimizerConfig
from wireframe.train.optimizer import FlatAdamW, product_dtype

ON = torch.tensor(True)


def flat(dtype=torch.float32, seed=1, **config):
    model = Perceiver(TINY).train()
    randomise(model, seed)
    return FlatAdamW(model, OptimizerConfig(**config), dtype)


def gradients(optimizer, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=g).to(p.dtype) for p in optimizer.parameters()]


def test_parameters_keep_their_values_and_become_views_of_one_buffer():
    model = Perceiver(TINY).train()
    randomise(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = FlatAdamW(model, OptimizerConfig())
    start = optimizer.master.data_ptr()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.is_contiguous()
        assert start <= p.data_ptr() < start + 4 * optimizer.master.numel() and (p.data_ptr() - start) % 256 == 0
    # Between them there are zeros.
    total = sum(p.abs().double().sum() for p in before.values())
    assert torch.isclose(optimizer.master.abs().double().sum(), total)


def test_steps_are_those_of_torch_with_clipping_and_a_decay_for_the_confidence_head():
    config = OptimizerConfig(weight_decay=0.02, conf_head_weight_decay=0.3, grad_clip=0.7)
    optimizer = flat(weight_decay=0.02, conf_head_weight_decay=0.3, grad_clip=0.7)
    theirs = Perceiver(TINY).train()
    theirs.load_state_dict(optimizer.model.state_dict())
    theirs.double()
    head = [p for name, p in theirs.named_parameters() if ".conf_head." in name]
    rest = [p for name, p in theirs.named_parameters() if ".conf_head." not in name]
    groups = [{"params": rest, "weight_decay": 0.02}, {"params": head, "weight_decay": 0.3}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(config.beta1, config.beta2))
    for step in range(5):
        found = gradients(optimizer, step)
        for p, g in zip(theirs.parameters(), found):
            p.grad = g.double()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.grad_clip)
        adamw.step()
        optimizer.collect(0, found)
        told = optimizer.step(optimizer.gradients[0], torch.tensor(1e-2), ON)
        assert torch.isclose(told.double(), norm, rtol=1e-6)
    for (name, p), q in zip(optimizer.model.named_parameters(), theirs.parameters()):
        assert torch.allclose(p.double(), q, rtol=1e-5, atol=1e-6), name


def test_products_read_rounded_copies_and_everything_else_the_weights_themselves():
    optimizer = flat(torch.bfloat16)
    names = {id(m): prefix for prefix, m in optimizer.compute.named_modules() if isinstance(m, Linear)}
    halved = {f"{prefix}.{n}" for prefix in names.values() for n in ("weight", "bias")}
    for (name, ours), twin in zip(optimizer.model.named_parameters(), optimizer.parameters()):
        if name in halved:
            assert twin.dtype == torch.bfloat16 and torch.equal(twin, ours.to(torch.bfloat16)), name
        else:
            assert twin is ours or twin.data_ptr() == ours.data_ptr(), name
    assert optimizer.compute.training and len(names) > 20
    # Heads, norms, tables, scales and what is folded stay in float32.
    kept = {name for name, p in optimizer.compute.named_parameters() if p.dtype == torch.float32}
    assert {"segmenter.segment_head.weight", "segmenter.input_proj.0.weight", "segmenter.input_proj.3.weight"} <= kept


def test_an_update_writes_the_copies_anew():
    optimizer = flat(torch.bfloat16)
    before = optimizer.half.clone()
    optimizer.collect(0, gradients(optimizer))
    optimizer.step(optimizer.gradients[0], torch.tensor(1e-2), ON)
    assert torch.equal(optimizer.half, optimizer.master.bfloat16()) and not torch.equal(optimizer.half, before)
    other = flat(torch.bfloat16, seed=3)
    other.load(optimizer.model.state_dict(), optimizer.state())
    assert torch.equal(other.half, optimizer.half) and torch.equal(other.exp_avg, optimizer.exp_avg)
    other.load(optimizer.model.state_dict(), {})
    assert not other.exp_avg.any() and other.count == 0


def test_gradients_of_both_dtypes_are_collected_in_float32_by_place():
    optimizer = FlatAdamW(Perceiver(TINY).train(), OptimizerConfig(), torch.bfloat16, micro_batches=2)
    found = gradients(optimizer)
    optimizer.collect(1, found)
    assert not optimizer.gradients[0].any()
    optimizer.gradients[0].copy_(optimizer.gradients[1])
    optimizer.master.copy_(optimizer.gradients[0])
    for p, g in zip(optimizer.model.parameters(), found):
        assert torch.equal(p, g.float())


def test_the_model_in_half_precision_is_close_to_the_one_in_float32():
    optimizer = flat(torch.bfloat16)
    batch = random_batch()
    keys = torch.arange(2)
    exact, rounded = (model(batch, dropout_keys=keys) for model in (optimizer.model, optimizer.compute))
    for a, b in zip(exact, rounded):
        error = (a - b).norm() / a.norm()
        # Some roundings of 2^-9 a block, of random signs; float32 would be a thousand times closer.
        assert 1e-5 < error < 0.05, error
        assert b.dtype == torch.float32


def test_precision_is_obeyed_and_auto_takes_what_the_device_has(monkeypatch):
    cpu = torch.device("cpu")
    assert product_dtype("float32", cpu) == torch.float32 and product_dtype("bfloat16", cpu) == torch.bfloat16
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("wireframe.train.optimizer.has_bfloat16_products", lambda has=has: has)
        assert product_dtype("auto", cpu) == dtype
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        flat(torch.float16)

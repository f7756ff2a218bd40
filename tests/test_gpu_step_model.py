"""The model of the plain step puts the casts where autocast puts them on a CUDA device."""

import collections

import pytest
import torch

from batches import random_batch
from wireframe import PerceiverConfig
from wireframe.bench import step_cases
from wireframe.bench.plain_model import PlainPerceiver
from wireframe.bench.step_aten import PRODUCTS
from wireframe.bench.step_trace import Trace

pytestmark = pytest.mark.gpu

SMALL = dict(hidden=128, ff=64, latent_tokens=16, latent_layers=2, decoder_layers=1, num_heads=2, kv_heads_cross=1,
             kv_heads_self=1, segments=8)


def test_products_and_casts_are_those_of_autocast_on_the_device():
    config, points = PerceiverConfig(**SMALL), random_batch(points=64)
    real = PlainPerceiver(config).to("cuda")
    with Trace("cuda") as on_cuda, torch.autocast("cuda", torch.bfloat16):
        real({name: tensor.to("cuda") for name, tensor in points.items()})
    model = PlainPerceiver(config).to("meta")
    with Trace() as on_meta, step_cases.OnCuda(torch.bfloat16):
        model({name: tensor.to("meta") for name, tensor in points.items()})
    found, expected = (
        collections.Counter((r.name, r.shapes) for r in trace.rows if r.kind == PRODUCTS or r.name == "_to_copy")
        for trace in (on_meta, on_cuda)
    )
    assert found == expected

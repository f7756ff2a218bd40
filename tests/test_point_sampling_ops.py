"""The operations of sampling: reference = native, bit for bit, and what they say to hostile callers."""

import dataclasses

import numpy as np
import pytest
import torch

from fusion_cases import assert_same
from scenes import random_scene
from wireframe import fuse_views, sample_points
from wireframe.kernels import ops

pytestmark = pytest.mark.native


def test_more_reference_points_than_the_cap_of_8000():
    scene = random_scene(7, views=6, points=9000)
    points = fuse_views(scene, 4000, impl="reference")
    assert (points.source == 1).sum() > 0
    many = dataclasses.replace(points, source=np.ones_like(points.source))
    many = many.select(np.arange(len(points)).repeat(6)[:9500])
    assert len(many) > 8000
    assert_same(sample_points(many, 64, impl="native"), sample_points(many, 64, impl="reference"))


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("sampler", ["fps", "voxel"])
def test_samplers_keep_the_quotas_and_pad_like_the_priority_sampler(impl, sampler):
    points = fuse_views(random_scene(1, points=3000), 300)
    for count in (64, 4 * len(points)):
        expected = sample_points(points, count)
        got = sample_points(points, count, sampler=sampler, impl=impl)
        assert_same([got.mask, got.source, got.center], [expected.mask, expected.source, expected.center])
        assert len(np.unique(got.xyz_norm[got.mask], axis=0)) == got.mask.sum()
    with pytest.raises(ValueError, match="unknown sampler 'best'"):
        sample_points(points, sampler="best")


def test_the_voxel_sampler_spreads_points_over_more_voxels():
    points = fuse_views(random_scene(1, points=3000), 300)
    points = dataclasses.replace(points, xyz=points.xyz * np.float32(0.02))

    def voxels(sampler):
        sample = sample_points(points, 200, sampler=sampler)
        return len(np.unique(np.floor(sample.world_points()[0] / 0.05), axis=0))

    assert voxels("voxel") > voxels("priority")


ARRAYS = {
    "xyz": (torch.float32, 2), "source": (torch.uint8, 1), "keep": (torch.bool, 1), "offsets": (torch.int64, 1),
    "keys": (torch.int64, 1), "group_id": (torch.int8, 1),
}  # fmt: skip


def sampling_arguments(n=20):
    return {
        "xyz": torch.randn(n, 3, generator=torch.Generator().manual_seed(0)),
        "source": (torch.arange(n) % 2).to(torch.uint8),
        "group_id": (torch.arange(n) % 5).to(torch.int8),
        "keep": torch.ones(n, dtype=torch.bool),
        "offsets": torch.tensor([0, 7, n]),
        "keys": torch.tensor([1, -2]),
    }


def damage(tensor, how):
    if how == "dtype":
        return tensor.to(torch.complex64 if tensor.dtype != torch.bool else torch.int32)
    if how == "rank":
        return tensor[None]
    if how == "shape":
        return torch.cat([tensor, tensor[:1]])
    if how == "list":
        return tensor.tolist()
    return tensor[:0]


@pytest.mark.parametrize("how", ["dtype", "rank", "shape", "list", "empty"])
@pytest.mark.parametrize("name", list(ARRAYS))
@pytest.mark.parametrize("impl", ["reference", "native"])
def test_a_wrong_argument_is_named(impl, name, how):
    arguments = sampling_arguments()
    arguments[name] = damage(arguments[name], how)
    op = ops.priority_sample if name == "group_id" else ops.centre_and_scale
    first = ("source", "group_id") if name == "group_id" else ("xyz", "source")
    rest = (8,) if name == "group_id" else ()
    # A longer or empty array shifts the blame to the first one that does not fit it.
    blamed = "source|keep|offsets|group_id|keys|xyz" if how in ("shape", "empty") else name
    with pytest.raises((ValueError, TypeError), match=blamed):
        op(*(arguments[key] for key in (*first, "keep", "offsets", "keys")), *rest, impl=impl)


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize(
    ("offsets", "source", "message"),
    [([0, 30, 20], 0, "offsets"), ([1, 7, 20], 0, "offsets"), ([0, 7, 19], 0, "offsets"), ([0, -1, 20], 0, "offsets"),
     ([0, 7, 20], 2, "source")],
)  # fmt: skip
def test_impossible_values_are_named(impl, offsets, source, message):
    arguments = sampling_arguments()
    arguments["offsets"] = torch.tensor(offsets)
    arguments["source"][3] = source
    with pytest.raises(ValueError, match=f"centre_and_scale: {message}"):
        ops.centre_and_scale(*(arguments[k] for k in ("xyz", "source", "keep", "offsets", "keys")), impl=impl)


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_kept_points_must_be_finite(impl, value):
    arguments = sampling_arguments()
    arguments["xyz"][4, 1] = value
    call = [arguments[k] for k in ("xyz", "source", "keep", "offsets", "keys")]
    with pytest.raises(ValueError, match="xyz"):
        ops.centre_and_scale(*call, impl=impl)
    arguments["keep"][4] = False
    center, scale = ops.centre_and_scale(*call, impl=impl)
    assert torch.isfinite(center).all() and torch.isfinite(scale).all()


def test_strided_inputs_are_read_as_what_they_are():
    arguments = sampling_arguments()
    strided = {k: torch.stack([v, torch.zeros_like(v)], -1)[..., 0] for k, v in arguments.items()}
    names = ("xyz", "source", "keep", "offsets", "keys")
    assert not strided["xyz"].is_contiguous()
    expected = ops.centre_and_scale(*(arguments[k] for k in names))
    assert_same(ops.centre_and_scale(*(strided[k] for k in names)), expected)

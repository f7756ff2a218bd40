"""Ids of label colours: native code and reference agree on every colour, whatever the shape and strides."""

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from raw_data import raw_row

from wireframe import classes
from wireframe.kernels import native
from wireframe.kernels.label_colors import colors_to_ids
from wireframe.scene import read_scene

pytestmark = pytest.mark.native

TABLES = ("ade", "gestalt")
CHUNK_PIXELS = 1 << 16  # as in csrc/cpu/colors.cpp


def assert_same_ids(image: np.ndarray, table: str) -> np.ndarray:
    expected = classes.colors_to_ids(image, table, impl="reference")
    tensor = torch.from_numpy(np.array(image))
    for threads in (1, 2, 4):
        found = classes.colors_to_ids(image, table, impl="native", threads=threads)
        assert found.dtype == np.uint8 and found.shape == image.shape[:-1]
        np.testing.assert_array_equal(found, expected)
        for impl in ("native", "reference", "auto"):
            ids = colors_to_ids(tensor, table, impl=impl, threads=threads)
            assert ids.dtype == torch.uint8 and ids.shape == tensor.shape[:-1]
            np.testing.assert_array_equal(ids.numpy(), expected)
    return expected


@pytest.mark.parametrize("table", TABLES)
def test_every_colour_has_the_id_of_the_reference(table):
    known = 0
    for first in range(0, 1 << 24, 1 << 21):
        # Every byte but the lowest of a big-endian number.
        packed = np.arange(first, first + (1 << 21), dtype=">u4").view(np.uint8).reshape(-1, 4)[:, 1:]
        expected = classes.colors_to_ids(packed, table, impl="reference")
        np.testing.assert_array_equal(classes.colors_to_ids(packed, table, impl="native", threads=2), expected)
        known += int((expected != classes.UNKNOWN).sum())
    colors = classes.ADE_COLORS if table == "ade" else classes.GESTALT_COLORS
    assert known == len(set(colors.values()))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from(TABLES),
    st.lists(st.tuples(st.integers(0, 40), st.one_of(st.integers(1, 70), st.just(CHUNK_PIXELS - 20))), max_size=12),
)
def test_runs_of_every_length_are_labelled_alike(table, runs):
    colors = np.array(list((classes.ADE_COLORS if table == "ade" else classes.GESTALT_COLORS).values())[:27])
    near = np.concatenate([colors, colors[:7] ^ 1, colors[:7] ^ [0, 0, 128]]).astype(np.uint8)
    which = np.repeat([color for color, _ in runs], [length for _, length in runs]).astype(np.int64)
    assert_same_ids(near[which], table)


@pytest.mark.parametrize("period", range(1, 20))
def test_patterns_that_repeat_are_no_runs(period):
    colors = np.array(list(classes.GESTALT_COLORS.values()), dtype=np.uint8)
    assert_same_ids(colors[np.arange(100) % period], "gestalt")
    # Bytes that repeat where pixels do not.
    assert_same_ids((np.arange(300) % period).astype(np.uint8).reshape(100, 3), "gestalt")


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("shape", [(3,), (0, 3), (4, 0, 3), (1, 3), (15, 3), (17, 3), (5, 7, 3), (2, 3, 4, 3)])
def test_any_number_of_axes_and_strides_will_do(table, shape):
    rng = np.random.default_rng(0)
    colors = np.array(list(classes.GESTALT_COLORS.values()), dtype=np.uint8)
    image = colors[rng.integers(0, 28, shape[:-1])].reshape(shape)
    assert_same_ids(image, table)
    wide = np.concatenate([image, image], axis=-1)
    turned = np.swapaxes(wide, 0, max(0, wide.ndim - 2))
    for view in (wide[..., :3], wide[..., 2:5], wide[..., 4:1:-1], image[::-1], turned[..., 1:4]):
        if view.shape[-1:] == (3,):
            assert_same_ids(view, table)


def test_strided_and_expanded_tensors_are_labelled():
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8).permute(1, 2, 0)
    for view in (image, image[::2, 3:], image[:1, :1].expand(5, 6, 3)):
        found = colors_to_ids(view, "ade", impl="native")
        assert found.is_contiguous()
        assert torch.equal(found, colors_to_ids(view.contiguous(), "ade", impl="reference"))


def test_read_only_images_are_labelled_without_a_warning():
    image = np.zeros((20, 30, 3), np.uint8)
    image.flags.writeable = False
    row = raw_row(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (classes.colors_to_ids(image, "gestalt", impl="native") == classes.GESTALT_ID["transition_line"]).all()
        assert (classes.colors_to_ids(np.asarray(Image.fromarray(image)), "ade") == classes.UNKNOWN).all()
        scene = read_scene(row)
    for view, ade, gestalt in zip(scene.views, row["ade"], row["gestalt"]):
        np.testing.assert_array_equal(view.ade, classes.colors_to_ids(np.asarray(ade), "ade", impl="reference"))
        np.testing.assert_array_equal(
            view.gestalt, classes.colors_to_ids(np.asarray(gestalt), "gestalt", impl="reference")
        )


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 3)), np.zeros((4, 3), np.int8), np.zeros((4, 4), np.uint8), np.uint8(3), np.zeros((3, 0), np.uint8)],
    ids=["float64", "int8", "four channels", "a number", "no channel"],
)
def test_wrong_images_are_named(impl, image):
    with pytest.raises(ValueError, match=r"^colors_to_ids: image must be uint8"):
        classes.colors_to_ids(image, "ade", impl=impl)
    with pytest.raises(ValueError, match=r"^colors_to_ids: image must be uint8"):
        colors_to_ids(torch.from_numpy(np.array(image)), "ade", impl=impl)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_wrong_tables_and_things_that_are_no_images_are_named(impl):
    image = np.zeros((4, 3), np.uint8)
    for table in ("ADE", "", None, 3):
        with pytest.raises(ValueError, match=r"^colors_to_ids: table must be 'ade' or 'gestalt'"):
            classes.colors_to_ids(image, table, impl=impl)
    with pytest.raises(ValueError, match=r"^colors_to_ids: table must be"):
        colors_to_ids(torch.from_numpy(image), "none", impl=impl)
    with pytest.raises(TypeError, match=r"^colors_to_ids: image must be a tensor"):
        colors_to_ids(image, "ade", impl=impl)
    with pytest.raises(ValueError, match=r"^colors_to_ids: image"):
        classes.colors_to_ids("picture", "ade", impl=impl)


@pytest.mark.parametrize("threads", [0, -1])
def test_less_than_one_thread_is_refused(threads):
    with pytest.raises(ValueError, match="threads"):
        colors_to_ids(torch.zeros(2, 3, dtype=torch.uint8), "ade", threads=threads)


def test_the_binding_refuses_images_and_tables_that_do_not_fit():
    label, image, colors = native.module().colors_to_ids, np.zeros((4, 3), np.uint8), np.zeros((2, 3), np.uint8)
    for name, arguments in (
        ("image", (np.zeros((4, 2), np.uint8), colors, np.zeros(4, np.uint8))),
        ("image", (image[:, ::-1], colors, np.zeros(4, np.uint8))),
        ("colors", (image, np.zeros((256, 3), np.uint8), np.zeros(4, np.uint8))),
        ("ids", (image, colors, np.zeros(3, np.uint8))),
    ):
        with pytest.raises(ValueError, match=rf"^{name} must be|^{name} must have"):
            label(*arguments, 1)
    with pytest.raises(TypeError, match=r"^ids must be uint8"):
        label(image, colors, np.zeros(4, np.int8), 1)


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("shape", [(6, 5, 3), (0, 3), (3,)])
def test_the_colour_operator_passes_opcheck(impl, shape):
    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.wireframe.colors_to_ids.default, (image, "ade", impl, 2))

import numpy as np
import pytest
import torch

import wireframe
from wireframe.errors import SceneError
from wireframe.fusion import fuse_views
from wireframe.perceiver import Perceiver, PerceiverConfig
from wireframe.predict import model_inputs, predict_segments, predict_wireframe, wireframe_of
from wireframe.sampling import sample_points
from wireframe.scene import read_scene
from wireframe.synth import SynthConfig, make_scene

TINY = SynthConfig(width=96, height=72, colmap_points=600)


@pytest.fixture(scope="module")
def model():
    model = Perceiver(
        PerceiverConfig(hidden=32, ff=32, latent_tokens=8, latent_layers=2, decoder_layers=1, num_points=64)
    ).eval()
    # Branches start at zero: without this every scene would get the same segments.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def row():
    return make_scene(3, 0, TINY)


def test_the_chain_from_a_raw_row_to_a_wireframe(model, row):
    found = predict_wireframe(row, model, threshold=0.0)
    assert found.vertices.dtype == np.float32 and found.edges.dtype == np.int64
    assert np.isfinite(found.vertices).all() and found.edges.max() < len(found.vertices)
    assert wireframe.predict_wireframe is predict_wireframe


def test_a_threshold_above_every_confidence_gives_the_empty_solution(model, row):
    found = predict_wireframe(row, model, threshold=1.0)
    assert found.vertices.tolist() == [[0, 0, 0]] * 2 and found.edges.tolist() == [[0, 1]]


def test_the_default_threshold_is_that_of_the_graph_configuration(model, row):
    sample = sample_points(fuse_views(read_scene(row)), 64)
    found = predict_segments(sample, model)
    default, half = wireframe_of(found, sample), wireframe_of(found, sample, threshold=0.5)
    assert np.array_equal(default.vertices, half.vertices)


def test_segments_are_in_world_metres(model, row):
    sample = sample_points(fuse_views(read_scene(row)), 64)
    found = predict_segments(sample, model)
    with torch.no_grad():
        prediction = model(model_inputs([sample]))
    expected = prediction.segments[0].numpy() * sample.scale + sample.center
    assert np.allclose(found.segments, expected, rtol=1e-6)
    assert np.allclose(found.probability, torch.sigmoid(prediction.conf[0]).numpy())


def test_a_scene_without_surviving_points_gives_the_empty_solution(model, row):
    from wireframe.classes import GESTALT_COLORS

    blank = np.broadcast_to(np.array(GESTALT_COLORS["unclassified"], np.uint8), (72, 96, 3))
    found = predict_wireframe({**row, "gestalt": [blank] * len(row["gestalt"])}, model, threshold=0.0)
    assert found.edges.tolist() == [[0, 1]] and not found.vertices.any()


def test_a_scene_without_views_is_a_scene_error(model):
    with pytest.raises(SceneError, match="no usable view"):
        predict_wireframe({"order_id": "x"}, model)

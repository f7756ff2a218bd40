import json

import numpy as np
import pytest

from wireframe.assets import DEMO_MODEL, MODEL
from wireframe.cli import main


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--out", str(out), "--scenes", "12", "--workers", "2", "--quiet"]) == 0
    return out


def test_the_demo_scores_every_method_on_every_scene(demo):
    results = json.loads((demo / "results.json").read_text())
    assert set(results["summary"]) == {"ours", "handcrafted", "nearest", "mean", "untrained"}
    assert len(results["scenes"]) == 12
    for scene in results["scenes"]:
        assert all(entry["failure"] is None and entry["seconds"] > 0 for entry in scene["methods"].values())


def test_the_shipped_model_clearly_beats_its_untrained_weights_and_both_dummies(demo):
    summary = json.loads((demo / "results.json").read_text())["summary"]
    for other in ("untrained", "mean", "nearest"):
        assert summary["ours"]["hss_low"] > summary[other]["hss_high"] + 0.1


def test_the_demo_draws_a_picture(demo):
    from PIL import Image

    pixels = np.asarray(Image.open(demo / "contact_sheet.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 500 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


@pytest.mark.parametrize("folder", [DEMO_MODEL, MODEL], ids=lambda path: path.name)
def test_the_shipped_weights_are_safetensors_of_at_most_10_mb(folder):
    files = {path.name for path in folder.iterdir()}
    assert files - {"README.md"} == {"config.json", "dummies.npz", "graph.json", "model.safetensors"}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 10 << 20

import json
import textwrap

import numpy as np
import pytest

from wireframe import comparison
from wireframe.assets import DEMO_DUMMIES, DEMO_MODEL
from wireframe.bench.held_out import edge_group
from wireframe.comparison import METHODS, Contenders, against, as_json, compare_methods, format_groups, format_table
from wireframe.graph import GraphConfig, empty_wireframe
from wireframe.scoring import Outcome, Score
from wireframe.shards import ShardWriter
from wireframe.synth import SynthConfig, make_scene

TINY = SynthConfig(width=96, height=72, colmap_points=400, views_range=(4, 4))
CONTENDERS = Contenders(str(DEMO_MODEL), GraphConfig(confidence=0.3), str(DEMO_DUMMIES))
FATAL = "synth-0-000001"


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    path = tmp_path_factory.mktemp("raw") / "a.tar"
    with ShardWriter(path) as writer:
        for index in range(3):
            writer.write(make_scene(0, index, TINY))
    return path


@pytest.fixture
def fatal_rival(tmp_path, monkeypatch):
    """In place of hoho2025: a rival that kills its process on one scene, and a score by the number of vertices."""
    package = tmp_path / "hoho2025"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "example_solutions.py").write_text(
        textwrap.dedent(f"""
            import os
            def predict_wireframe(entry):
                if entry["order_id"] == {FATAL!r}:
                    os._exit(9)
                return [[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1], [1, 2]]
            """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "hoho2025", raising=False)

    def score_many(pairs, workers, progress):
        return [Outcome(Score(*[len(predicted.vertices) / 100] * 3), None) for predicted, _ in pairs]

    monkeypatch.setattr(comparison, "score_many", score_many)


def test_a_rival_that_kills_its_process_loses_that_scene_alone(tar, fatal_rival):
    found = compare_methods([tar], CONTENDERS, workers=2, progress=False)
    assert [scene.order_id for scene in found.scenes] == [f"synth-0-{i:06d}" for i in range(3)]
    for scene in found.scenes:
        assert set(scene.predicted) == set(METHODS) == set(scene.seconds)
        rival = scene.predicted["handcrafted"]
        if scene.order_id == FATAL:
            assert np.array_equal(rival.vertices, empty_wireframe().vertices)
            assert np.isnan(scene.seconds["handcrafted"])
        else:
            assert len(rival.vertices) == 3 and scene.seconds["handcrafted"] > 0
        assert scene.predicted["ours"].edges.shape[1] == 2 and len(scene.truth.edges) > 0
    # A scene without an answer has no seconds, which JSON has no number for.
    content = json.loads(json.dumps(as_json(found)))
    assert content["scenes"][1]["methods"]["handcrafted"]["seconds"] is None
    assert content["summary"]["handcrafted"]["hss"] == pytest.approx((3 + 2 + 3) / 300)
    assert "| handcrafted (hoho2025) | 0.027 |" in format_table(found) and "difference on 3 scenes" in against(found)
    groups = {scene.order_id: "one" if scene.order_id == FATAL else "two" for scene in found.scenes}
    lines = format_groups(found, groups, "kind", ("handcrafted",)).splitlines()
    assert lines[2:] == ["| one | 1 | 0.020 |", "| two | 2 | 0.030 |"]


def test_groups_of_edges_hold_every_number_and_sort_by_it():
    groups = [edge_group(edges) for edges in range(1, 65)]
    assert groups == sorted(groups) and len(set(groups)) == 5
    assert edge_group(12) == " 1 to 12" and edge_group(13) == "13 to 18" and edge_group(64) == "33 and more"

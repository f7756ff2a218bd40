import json
import os
import textwrap

import numpy as np
import pytest

from wireframe import comparison
from wireframe.assets import DEMO_MODEL, MODEL
from wireframe.bench import calibration, held_out
from wireframe.bench.held_out import edge_group
from wireframe.comparison import METHODS, against, as_json, compare_methods, format_groups, format_table
from wireframe.errors import WireframeError
from wireframe.graph import empty_wireframe
from wireframe.isolated import map_isolated
from wireframe.scoring import Outcome, Score
from wireframe.shards import ShardWriter
from wireframe.synth import SynthConfig, make_scene

TINY = SynthConfig(width=96, height=72, colmap_points=400, views_range=(4, 4))
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
    found = compare_methods([tar], DEMO_MODEL, workers=2, progress=False)
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


def nothing() -> None:
    pass


def dies_at_two(number: int) -> int:
    if number == 2:
        os._exit(9)
    return number


def dies(number: int) -> int:
    os._exit(9)


def negated(number: int) -> int:
    return -number


def test_an_item_that_kills_its_process_goes_to_the_next_function():
    assert list(map_isolated((dies_at_two, negated), range(6), 2, nothing)) == [0, 1, -2, 3, 4, 5]
    with pytest.raises(WireframeError, match="killed whatever it was asked for"):
        list(map_isolated((dies,), [1], 1, nothing))


SMALL = ["--size", "96x72", "--set", "colmap_points=400", "--set", "views_range=[4,4]", "--workers", "1", "--quiet"]


def test_a_model_is_held_beside_its_rivals_by_roof_and_by_edges(tmp_path, capsys):
    assert held_out.main([str(DEMO_MODEL), "--out", str(tmp_path), "--scenes", "2", *SMALL]) == 0
    told = capsys.readouterr().out
    assert "ours less handcrafted: difference on 2 scenes" in told and "| roof | scenes |" in told
    assert len(json.loads((tmp_path / "results.json").read_text())["scenes"]) == 2


def test_on_hard_scenes_the_shipped_model_beats_both_dummies(tmp_path):
    scenes = ["--scenes", "8", "--seed", "99", "--size", "320x240", "--set", "colmap_points=12000"]
    assert held_out.main([str(MODEL), "--out", str(tmp_path), *scenes, "--workers", "2", "--quiet"]) == 0
    summary = json.loads((tmp_path / "results.json").read_text())["summary"]
    assert summary["ours"]["hss"] > 0.1 > max(summary["nearest"]["hss"], summary["mean"]["hss"])


def test_the_calibration_says_of_every_figure_whether_it_is_met(tmp_path, capsys):
    out = tmp_path / "calibration.json"
    words = ["--scenes", "2", "--dummy-scenes", "3", "--out", str(out), *SMALL]
    # Two tiny scenes meet next to nothing.
    assert calibration.main(words) == 1
    told, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "| rival: mean HSS |" in told and "do not predict a score on real data" in told
    assert len(found["scenes"]) == 2 and len(found["bars"]) == 22

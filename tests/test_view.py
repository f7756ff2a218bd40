"""The page of ``wireframe view`` as a file: what it holds of the scenes, in which order, and what it warns of."""

import base64
import hashlib
import json
import re

import numpy as np
import pytest

from hash_pool import HashPool
from scenes import random_scene
from view_cases import HOSTILE, Page, sampled, wires, without_truth, write_rows
from wireframe.cli import main
from wireframe.errors import ConfigError, MissingPackageError
from wireframe.graph import GraphConfig
from wireframe.perceiver import Perceiver, PerceiverConfig
from wireframe.predict import predict_wireframe
from wireframe.shards import ShardWriter
from wireframe.submissions import write_submission
from wireframe.synth import SynthConfig, make_scene
from wireframe.view import write as view
from wireframe.view.scenes import cameras_of, match_vertices, pack_scene, view_scene
from wireframe.view.write import view_model, view_submission

TINY = SynthConfig(width=96, height=72, colmap_points=600, views_range=(4, 5))
# The truth of the random scenes, and a prediction: one corner is 0.4 m off, one 0.6 m, and one edge is not there.
SQUARE = wires([[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 1]], [[0, 1], [1, 2], [2, 3], [0, 3]])
GUESS = wires([[0, 0, 0], [1, 0.4, 0], [1.6, 0, 1], [0, 0, 1]], [[0, 1], [1, 2], [0, 3], [1, 3]])


@pytest.fixture(autouse=True)
def quick_score(monkeypatch):
    monkeypatch.setattr(view, "ScorePool", HashPool)
    monkeypatch.setattr(view, "require_hoho", lambda: None)


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    """Three synthetic scenes, of which the second is broken."""
    path = tmp_path_factory.mktemp("raw") / "scenes.tar"
    with ShardWriter(path) as writer:
        for index in range(3):
            row = make_scene(0, index, TINY)
            writer.write({**row, "colmap": b"PK broken"} if index == 1 else row)
    return path


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.parquet", [sampled(f"scene-{i}", i) for i in range(4)])


def quiet(**options):
    return {"progress": False, **options}


def points_of(block):
    grid = np.frombuffer(base64.b64decode(block["points"]), "<u2").reshape(-1, 3)
    return np.array(block["low"]) + block["step"] * grid


def test_points_come_back_within_half_a_step_of_the_grid_by_class():
    sample = sampled("a", 3)
    points, class_id = sample.world_points()
    block = pack_scene(view_scene(sample, None))
    order = np.argsort(class_id, kind="stable")
    assert np.abs(points_of(block) - points[order]).max() <= block["step"] * 0.5001
    assert block["step"] < 1e-3 and block["far"] == 0
    assert block["counts"] == np.bincount(class_id, minlength=13).tolist() and len(set(class_id.tolist())) > 2


def test_few_of_many_points_are_the_same_ones_every_time():
    sample = sampled("a", 3)
    some = [points_of(pack_scene(view_scene(sample, None, num_points=40))) for _ in range(2)]
    assert len(some[0]) == 40 and np.array_equal(*some)
    other = points_of(pack_scene(view_scene(sampled("b", 3), None, num_points=40)))
    assert not np.allclose(some[0], other)


def test_strays_far_away_are_left_out_and_do_not_coarsen_the_grid():
    sample = sampled("a", 3)
    sample.xyz_norm[7] = 9e5
    block = pack_scene(view_scene(sample, None))
    assert block["far"] == 1 and sum(block["counts"]) == sample.mask.sum() - 1 and block["step"] < 1e-3


def test_a_scene_without_points_is_a_scene():
    sample = sampled("a", 3, mask=np.zeros(256, bool))
    block = pack_scene(view_scene(without_truth(sample), None))
    assert block["points"] == "" and sum(block["counts"]) == 0 and block["truth"] is None and block["radius"] > 0


def test_rays_of_a_camera_go_through_the_corners_of_its_picture():
    scene = random_scene(5)
    for camera, item in zip(cameras_of(scene), scene.views):
        centre, corners = camera[0], camera[0] + 3.0 * camera[1:]
        assert np.allclose(item.R @ centre + item.t, 0, atol=1e-4)
        seen = (item.K @ (corners @ item.R.T + item.t).T).T
        height, width = item.ade.shape
        assert np.allclose(seen[:, :2] / seen[:, 2:], [[0, 0], [width, 0], [width, height], [0, height]], atol=1e-2)
        assert np.allclose(seen[:, 2], 3.0, atol=1e-4)


@pytest.mark.parametrize(
    "predicted, partners",
    [
        ([[0.4, 0, 0], [0.1, 0, 0]], [-1, 0]),
        ([[0.5, 0, 0], [0.501, 9, 0]], [0, -1]),
        ([[np.nan, 0, 0], [1.9, 0, 0], [1e30, 0, 0]], [-1, 1, -1]),
        (np.zeros((0, 3)), []),
    ],
)
def test_vertices_are_paired_closest_first_and_once(predicted, partners):
    truth = np.array([[0, 0, 0], [2, 0, 0]], np.float32)
    assert match_vertices(np.asarray(predicted, np.float32), truth).tolist() == partners


def test_parts_of_truth_and_prediction_are_marked_where_they_meet():
    block = pack_scene(view_scene(sampled("a"), GUESS))
    assert block["truth"]["vertexFound"] == [1, 1, 0, 1] and block["truth"]["edgeFound"] == [1, 0, 0, 1]
    assert block["prediction"]["vertexFound"] == [1, 1, 0, 1] and block["prediction"]["edgeFound"] == [1, 0, 1, 0]
    assert block["truth"]["vertices"] == SQUARE.vertices.tolist() and block["truth"]["edges"] == SQUARE.edges.tolist()
    assert "edgeFound" not in pack_scene(view_scene(sampled("a"), None))["truth"]
    assert "edgeFound" not in pack_scene(view_scene(without_truth(sampled("a")), GUESS))["prediction"]


def test_what_cannot_be_drawn_of_a_prediction_is_counted():
    strange = wires([[np.nan, 0, 0], [0, 0, 0], [1, 0, 0], [1e30, 0, 0]], [[0, 1], [1, 2], [2, 3], [1, 9], [-1, 1]])
    found = pack_scene(view_scene(sampled("a"), strange))["prediction"]
    assert found["vertices"] == [[0, 0, 0], [1, 0, 0]] and found["edges"] == [[0, 1]] and found["undrawn"] == 4
    assert found["edgeFound"] == [1]


def test_the_worst_scene_comes_first_and_scenes_without_a_score_last(tmp_path):
    samples = [without_truth(sampled("scene-0", 0)), *(sampled(f"scene-{i}", i) for i in range(1, 5))]
    rows = write_rows(tmp_path / "r.parquet", samples)
    predictions = {f"scene-{i}": wires([[i, 0, 0], [1, 0, 0]], [[0, 1]]) for i in (0, 1, 2, 4)}
    result = view_submission(rows, tmp_path / "p.html", predictions, **quiet())
    page = Page(tmp_path / "p.html")
    scores = [entry["score"] and entry["score"][0] for entry in page.index["scenes"]]
    assert page.ids[0] == "scene-3" and page.index["scenes"][0]["note"] == "no prediction" and scores[0] == 0
    assert page.ids[-1] == "scene-0" and scores[-1] is None and scores[:-1] == sorted(scores[:-1])
    assert result.scenes == 5 and result.hss == pytest.approx(np.mean(scores[:-1]), abs=1e-5)
    assert page.scenes["scene-3"]["prediction"] is None and page.scenes["scene-0"]["truth"] is None
    worst = view_submission(rows, tmp_path / "w.html", predictions, **quiet(worst=2))
    assert Page(tmp_path / "w.html").ids == page.ids[:2] and worst.scenes == 2
    assert Page(tmp_path / "w.html").scenes == {name: page.scenes[name] for name in page.ids[:2]}


def test_without_the_metric_the_page_is_written_and_says_so(rows, tmp_path, monkeypatch):
    def absent():
        raise MissingPackageError("no hoho2025")

    monkeypatch.setattr(view, "require_hoho", absent)
    result = view_submission(rows, tmp_path / "p.html", {"scene-1": GUESS}, **quiet())
    page = Page(tmp_path / "p.html")
    assert result.hss is None and "hoho2025 is not installed" in result.unscored
    assert result.unscored in page.index["about"]
    assert page.ids == [f"scene-{i}" for i in range(4)] and not any(e["score"] for e in page.index["scenes"])
    assert page.scenes["scene-1"]["prediction"]["edgeFound"] == [1, 0, 1, 0]
    with pytest.raises(ConfigError, match=r"hoho2025 is not installed.*leave out --worst"):
        view_submission(rows, tmp_path / "w.html", {"scene-1": GUESS}, **quiet(worst=2))
    assert not (tmp_path / "w.html").exists()


def test_predictions_of_other_scenes_are_refused(rows, tmp_path):
    with pytest.raises(ConfigError, match="none of the 4 scenes"):
        view_submission(rows, tmp_path / "p.html", {"another": GUESS}, **quiet())
    assert not (tmp_path / "p.html").exists()


@pytest.fixture(scope="module")
def model():
    return Perceiver(PerceiverConfig(hidden=32, ff=32, latent_tokens=8, latent_layers=1, num_points=64))


def test_a_models_page_has_cameras_and_what_predict_finds_for_any_number_of_workers(tar, model, tmp_path):
    graph = GraphConfig(confidence=0.0)
    model.train()
    for workers in (1, 3):
        result = view_model(tar, tmp_path / f"{workers}.html", model, graph, **quiet(points=100, workers=workers))
    assert model.training and (tmp_path / "1.html").read_bytes() == (tmp_path / "3.html").read_bytes()
    assert [failure.order_id for failure in result.failures] == ["synth-0-000001"] and result.guarded == 0
    page = Page(tmp_path / "1.html")
    assert sorted(page.ids) == ["synth-0-000000", "synth-0-000002"] and "1 not read" in page.index["about"]
    row = make_scene(0, 2, TINY)
    block = page.scenes["synth-0-000002"]
    found = predict_wireframe(row, model.eval(), graph=graph)
    assert np.allclose(block["prediction"]["vertices"], found.vertices, atol=6e-4)
    assert block["prediction"]["edges"] == found.edges.tolist() and sum(block["counts"]) == 100
    assert len(block["cameras"]) == sum(not hidden for hidden in row["pose_only_in_colmap"]) >= 4


def test_names_cannot_leave_their_place_in_the_page(tmp_path):
    rows = write_rows(tmp_path / "rows.parquet", [sampled(HOSTILE), sampled("<!--<script>", 1)])
    result = view_submission(rows, tmp_path / "p.html", {HOSTILE: GUESS}, **quiet(label=HOSTILE))
    page = Page(tmp_path / "p.html")
    assert set(page.ids) == {HOSTILE, "<!--<script>"} and HOSTILE in page.index["about"]
    # The index, the page's own script and one block a scene.
    assert page.tags.count("script") == 4 and "img" not in page.tags
    assert result.guarded == 2 and "Do not share this page" in page.texts["strong"]
    assert "redistributed" in (tmp_path / "p.html").read_text()


def test_only_scenes_known_to_be_synthetic_come_without_a_warning(tmp_path):
    for names, guarded in ((["synth-0-000000"], 0), (["synth-0-000000", "synth-x"], 1), (["a1b2"], 1)):
        rows = write_rows(tmp_path / "rows.parquet", [sampled(name) for name in names])
        result = view_submission(rows, tmp_path / "p.html", {names[0]: GUESS}, **quiet())
        assert result.guarded == guarded and ("strong" in Page(tmp_path / "p.html").tags) == (guarded > 0)


def test_the_policy_allows_the_pages_own_texts_alone(rows, tmp_path):
    result = view_submission(rows, tmp_path / "p.html", {"scene-0": GUESS}, **quiet())
    content = (tmp_path / "p.html").read_text()
    assert result.size == len(content.encode())
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", content, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in Page(tmp_path / "p.html").policy
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", content) and "unsafe" not in content
    assert "default-src 'none'" in content and not re.search(r"innerHTML|insertAdjacent|eval\(", content)


def test_the_command_shows_a_file_of_predictions_and_warns(rows, tmp_path, capsys):
    write_submission(tmp_path / "s.json", [("scene-2", GUESS)])
    out = tmp_path / "new folder" / "p.html"
    assert main(["view", str(rows), str(out), "--pred", str(tmp_path / "s.json"), "--limit", "3", "--quiet"]) == 0
    said = capsys.readouterr()
    assert "3 scenes, mean HSS 0." in said.out and said.err.startswith(f"do not share {out}: 3 of its scenes are not")
    page = Page(out)
    assert "predictions of s.json" in page.index["about"] and page.index["source"] == "rows.parquet"
    assert str(tmp_path) not in out.read_text()


def test_the_command_shows_a_models_predictions_and_what_it_cannot_read(tar, model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    arguments = ["view", str(tar), str(tmp_path / "p.html"), "--model", str(tmp_path / "model"), "--threshold", "0"]
    assert main([*arguments, "--workers", "1", "--quiet"]) == 0
    said = capsys.readouterr()
    assert "not shown: synth-0-000001" in said.err and "do not share" not in said.err
    assert "predicted by model" in Page(tmp_path / "p.html").index["about"]
    tar.with_name("cut.tar").write_bytes(tar.read_bytes()[:-9000])
    assert main([*["view", str(tar.with_name("cut.tar"))], *arguments[2:], "--quiet"]) == 1
    assert "truncated" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, said",
    [
        (["--pred", "s.json", "--model", "m"], "--model does not count here"),
        (["--pred", "s.json", "--threshold", "0.5"], "--threshold does not count here"),
        (["--pred", "s.json", "--config", "c.json"], "--config does not count here"),
        (["--pred", "s.json"], "s.json"),
        (["--pred", "bad.json"], "bad.json"),
    ],
)
def test_wrong_input_is_one_line_and_the_old_page_stays(rows, tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "p.html").write_text("old")
    assert main(["view", str(rows), "p.html", *more, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and (tmp_path / "p.html").read_text() == "old"


def test_the_blocks_are_strict_json(rows, tmp_path):
    view_submission(rows, tmp_path / "p.html", {"scene-0": GUESS}, **quiet())
    for block in Page(tmp_path / "p.html").blocks.values():
        json.loads(block, parse_constant=lambda name: pytest.fail(name))

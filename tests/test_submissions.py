import json
import os

import numpy as np
import pytest

from hash_pool import HashPool
from wireframe import scene_scores
from wireframe.cli import main
from wireframe.errors import Failure, ScoreError, SubmissionError
from wireframe.evaluate import evaluate_submission
from wireframe.graph import Wireframe
from wireframe.prepare import PrepareConfig, prepare
from wireframe.score_files import compare, group_means, read_scores
from wireframe.scoring import ZERO, Score
from wireframe.shards import ShardWriter
from wireframe.submissions import MAX_PARTS, read_submission, write_submission
from wireframe.synth import SynthConfig, make_scene

TINY = SynthConfig(width=96, height=72, colmap_points=300, views_range=(4, 4))
GOOD = {"order_id": "a", "wf_vertices": [[0, 0, 0], [1.5, 2, 3]], "wf_edges": [[0, 1]]}


def written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_predictions_read_back_as_they_were_written(tmp_path):
    rng = np.random.default_rng(0)
    made = {
        f"scene {i}": Wireframe(rng.normal(size=(i, 3)).astype(np.float32), rng.integers(0, max(i, 1), (i, 2)))
        for i in range(5)
    }
    write_submission(tmp_path / "s.json", made.items())
    found = read_submission(tmp_path / "s.json")
    assert list(found) == list(made)
    for name, (vertices, edges) in made.items():
        assert found[name].vertices.tobytes() == vertices.tobytes() and found[name].vertices.dtype == np.float32
        assert np.array_equal(found[name].edges, edges) and found[name].edges.dtype == np.int64


@pytest.mark.parametrize(
    "content, told",
    [
        ("{", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ({"a": 1}, "expected a list"),
        ([1], "entry 0 has no order_id"),
        ([GOOD, {**GOOD, "order_id": ""}], "entry 1 has no order_id"),
        ([GOOD, GOOD], "a is there twice"),
        ([{**GOOD, "wf_vertices": None}], "a: wf_vertices must be a list"),
        ([{**GOOD, "wf_vertices": [[0, 0]]}], "wf_vertices must hold rows of 3 numbers"),
        ([{**GOOD, "wf_vertices": [[0, 0, "1"]]}], "wf_vertices must hold rows of 3 numbers"),
        ([{**GOOD, "wf_vertices": [[0, 0, True]]}], "wf_vertices must hold rows of 3 numbers"),
        ([{**GOOD, "wf_edges": [[0, 1.0]]}], "wf_edges must hold rows of 2 whole numbers"),
        ([{**GOOD, "wf_edges": [[0, 1 << 70]]}], "holds a number that no array can"),
        ([{**GOOD, "wf_vertices": [[0, 0, 10**400]]}], "holds a number that no array can"),
        ([{**GOOD, "wf_edges": [[0, 1]] * (MAX_PARTS + 1)}], "at most 10000 rows"),
    ],
)
def test_what_is_no_submission_is_one_line_that_names_the_place(tmp_path, content, told, capsys):
    path = written(tmp_path / "s.json", content)
    with pytest.raises(SubmissionError) as caught:
        read_submission(path)
    assert told in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert main(["eval", str(tmp_path), "--pred", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_huge_file_is_refused(tmp_path):
    with open(tmp_path / "s.json", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(SubmissionError, match="larger"):
        read_submission(tmp_path / "s.json")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Five raw scenes, the third without edges; the same as sampled rows; and their truth as a submission."""
    folder = tmp_path_factory.mktemp("scenes")
    truth = []
    with ShardWriter(folder / "a.tar") as writer:
        for index in range(5):
            row = make_scene(0, index, TINY)
            if index == 2:
                row |= {"wf_edges": [], "wf_classifications": []}
            else:
                edges = np.asarray(row["wf_edges"], dtype=np.int64)
                truth.append((row["order_id"], Wireframe(np.asarray(row["wf_vertices"], dtype=np.float32), edges)))
            writer.write(row)
    prepare(folder / "a.tar", folder / "rows", PrepareConfig(num_points=64, keep_all=True), progress=False)
    write_submission(folder / "truth.json", truth)
    return folder


@pytest.mark.parametrize("kind", ["a.tar", "rows"])
def test_the_truth_scores_one_and_what_is_missing_scores_zero(scenes, tmp_path, kind):
    pytest.importorskip("hoho2025")
    entries = json.loads((scenes / "truth.json").read_text())
    entries[1]["wf_vertices"][0][0] = float("nan")
    entries[2]["wf_edges"][0][0] = 999
    entries[3]["order_id"] = "elsewhere"
    path = written(tmp_path / "s.json", entries)
    out = tmp_path / "scores.json"
    result = evaluate_submission(scenes / kind, path, out=out, progress=False)
    assert result.order_ids == [f"synth-0-{i:06d}" for i in (0, 1, 3, 4)]
    assert result.outcomes[0].score == pytest.approx((1, 1, 1), abs=1e-6)
    assert [outcome.score for outcome in result.outcomes[1:]] == [ZERO] * 3
    assert [outcome.failure for outcome in result.outcomes] == [
        None, "bad prediction: a vertex is not finite", "bad prediction: an edge names a vertex that is not there",
        "no prediction",
    ]  # fmt: skip
    assert [failure.order_id for failure in result.failures] == ["synth-0-000002", "elsewhere"]
    assert list(read_scores(out)) == result.order_ids and not os.path.exists(f"{out}.partial")


def test_predictions_of_other_scenes_alone_score_zero_and_the_command_says_so(scenes, tmp_path, monkeypatch, capsys):
    pytest.importorskip("hoho2025")
    monkeypatch.setattr(scene_scores, "ScorePool", HashPool)
    result = evaluate_submission(scenes / "a.tar", written(tmp_path / "s.json", [GOOD]), progress=False)
    assert {outcome.failure for outcome in result.outcomes} == {"no prediction"}
    assert result.failures[-1] == Failure("a", "predicted, but no such scene is there")
    assert main(["eval", str(scenes / "a.tar"), "--pred", str(tmp_path / "s.json"), "--quiet"]) == 1
    assert "there is a prediction for none of the 4 scenes" in capsys.readouterr().err
    limited = evaluate_submission(scenes / "a.tar", written(tmp_path / "s.json", [GOOD]), limit=2, progress=False)
    assert len(limited.outcomes) == 2 and not limited.failures
    part = evaluate_submission(scenes / "rows", scenes / "truth.json", split="dev-val", dev_val=2, progress=False)
    assert len(part.outcomes) == 2 and not part.failures


@pytest.mark.parametrize("options", [["--model", "m"], ["--thresholds", "0.5"], ["--threshold", "0.5"]])
def test_what_predictions_cannot_answer_is_refused(scenes, options, capsys):
    assert main(["eval", str(scenes / "a.tar"), "--pred", str(scenes / "truth.json"), *options]) == 2
    assert options[0] in capsys.readouterr().err


def test_two_evaluations_are_compared_scene_by_scene(scenes, tmp_path, capsys, monkeypatch):
    pytest.importorskip("hoho2025")
    monkeypatch.setattr(scene_scores, "ScorePool", HashPool)
    command = ["eval", str(scenes / "a.tar"), "--pred", str(scenes / "truth.json"), "--quiet"]
    assert main([*command, "--out", str(tmp_path / "one.json")]) == 0
    assert main([*command, "--against", str(tmp_path / "one.json")]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert "difference on 4 scenes: HSS +0.0000 (95 % +0.0000 to +0.0000)" in told and "higher HSS on 0" in told
    written(tmp_path / "none.json", {"scenes": [{"order_id": "x"}]})
    assert main([*command, "--against", str(tmp_path / "none.json")]) == 2


def test_differences_are_those_of_the_common_scenes_and_have_a_sign():
    rng = np.random.default_rng(1)
    base = {str(i): Score(*rng.random(3)) for i in range(60)}
    better = {name: Score(hss + 0.1, f1, iou - 0.2) for name, (hss, f1, iou) in base.items()}
    told = compare(better, {**base, "alone": ZERO})
    # Paired: scenes differ by far more than the two, whose difference has no spread.
    assert "on 60 scenes: HSS +0.1000 (95 % +0.1000 to +0.1000), F1 +0.0000" in told and "IoU -0.2000" in told
    assert "higher HSS on 60, lower on 0; 1 scenes of one alone left out" in told
    assert compare(base, better).startswith("difference on 60 scenes: HSS -0.1000")
    with pytest.raises(ScoreError, match="no scene in common"):
        compare(base, {"x": ZERO})


def test_means_by_group_leave_out_what_has_none():
    scores = {"a": Score(1, 0, 0), "b": Score(0, 1, 0), "c": Score(0, 0, 1)}
    assert group_means(scores, {"a": "y", "b": "y", "x": "z"}) == {"y": (2, Score(0.5, 0.5, 0.0))}


def test_scenes_that_were_scored_before_or_not_looked_at_are_not_called_missing(scenes, tmp_path, monkeypatch):
    pytest.importorskip("hoho2025")
    monkeypatch.setattr(scene_scores, "ScorePool", HashPool)
    path, out = scenes / "truth.json", tmp_path / "scores.json"
    whole = evaluate_submission(scenes / "a.tar", path, out=out, progress=False)
    expected = out.read_bytes()
    submit, left = HashPool.submit, [2]

    def interrupted(self, predicted, truth):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return submit(self, predicted, truth)

    out.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(HashPool, "submit", interrupted)
        patch.setattr(scene_scores, "_AWAITED_PER_WORKER", 0)
        with pytest.raises(KeyboardInterrupt):
            evaluate_submission(scenes / "a.tar", path, out=out, progress=False)
    assert len((tmp_path / "scores.json.partial").read_text().splitlines()) > 1
    assert evaluate_submission(scenes / "a.tar", path, out=out, progress=False) == whole
    assert out.read_bytes() == expected
    # Where a tar breaks off, nobody knows what was behind it.
    (tmp_path / "cut.tar").write_bytes((scenes / "a.tar").read_bytes()[:-12000])
    cut = evaluate_submission(tmp_path / "cut.tar", path, progress=False)
    assert [failure.order_id for failure in cut.failures] == ["synth-0-000002", str(tmp_path / "cut.tar")]

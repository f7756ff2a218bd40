import json
import subprocess
import sys

import pytest

from wireframe.cli import main
from wireframe.perceiver import Perceiver, PerceiverConfig
from wireframe.samples import iter_sample_rows
from wireframe.submissions import read_submission

SMALL_SYNTH = ["--size", "96x72", "--set", "colmap_points=600", "--workers", "1", "--quiet"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """synth -> prepare -> train by the commands, all tiny."""
    folder = tmp_path_factory.mktemp("cli")
    assert main(["synth", str(folder / "raw"), "--count", "4", *SMALL_SYNTH]) == 0
    folders = [str(folder / "raw"), str(folder / "rows")]
    assert main(["prepare", *folders, "--points", "64", "--workers", "1", "--quiet"]) == 0
    config = {
        "model": {"hidden": 32, "ff": 32, "latent_tokens": 8, "latent_layers": 1, "num_points": 64},
        "stages": [{"name": "s", "points": 64, "steps": 2, "batch_size": 2, "lr": 1e-3}],
    }
    (folder / "config.json").write_text(json.dumps(config))
    arguments = ["--config", str(folder / "config.json"), "--data", str(folder / "rows"), "--out", str(folder / "run")]
    assert main(["train", *arguments, "--quiet"]) == 0
    return folder


def test_the_commands_chain_from_synthetic_scenes_to_predictions(workspace, capsys):
    out = workspace / "predictions.json"
    model = str(workspace / "run" / "model")
    assert main(["predict", str(workspace / "raw"), str(out), "--model", model, "--threshold", "0", "--quiet"]) == 0
    entries = json.loads(out.read_text())
    assert [entry["order_id"] for entry in entries] == [f"synth-0-{i:06d}" for i in range(4)]
    for entry in entries:
        count = len(entry["wf_vertices"])
        assert count >= 2 and all(0 <= i < count for edge in entry["wf_edges"] for i in edge)


def test_eval_scores_raw_and_sampled_scenes_alike(workspace, capsys):
    model = str(workspace / "run" / "model")
    report = workspace / "scores.json"
    common = ["--model", model, "--threshold", "0", "--workers", "1", "--quiet", "--limit", "2"]
    assert main(["eval", str(workspace / "rows"), "--out", str(report), *common]) == 0
    assert "2 scenes: HSS" in capsys.readouterr().out
    assert len(json.loads(report.read_text())["scenes"]) == 2
    assert main(["eval", str(workspace / "raw"), *common]) == 0
    assert "2 scenes: HSS" in capsys.readouterr().out


def test_predict_answers_for_every_scene_and_reports_the_bad_ones(workspace, tmp_path, capsys):
    from wireframe.shards import ShardWriter
    from wireframe.synth import SynthConfig, make_scene

    config = SynthConfig(width=96, height=72, colmap_points=600)
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.write(make_scene(0, 0, config))
        writer.write({**make_scene(0, 1, config), "colmap": b"broken"})
    model = str(workspace / "run" / "model")
    assert main(["predict", str(tmp_path / "a.tar"), str(tmp_path / "p.json"), "--model", model, "--quiet"]) == 0
    entries = json.loads((tmp_path / "p.json").read_text())
    assert entries[1] == {"order_id": "synth-0-000001", "wf_vertices": [[0.0] * 3] * 2, "wf_edges": [[0, 1]]}
    assert "synth-0-000001" in capsys.readouterr().err


def test_predict_and_eval_keep_what_came_before_a_break(workspace, tmp_path, capsys):
    (tar,) = (workspace / "raw").glob("*.tar")
    (tmp_path / "cut.tar").write_bytes(tar.read_bytes()[:-12000])
    model = ["--model", str(workspace / "run" / "model"), "--quiet"]
    out = tmp_path / "new folder" / "p.json"
    assert main(["predict", str(tmp_path / "cut.tar"), str(out), *model]) == 1
    assert 1 <= len(json.loads(out.read_text())) < 4 and "truncated" in capsys.readouterr().err
    scores = tmp_path / "another" / "s.json"
    assert main(["eval", str(tmp_path / "cut.tar"), "--out", str(scores), "--workers", "1", *model]) == 1
    assert "truncated" in capsys.readouterr().err


def test_of_a_scene_that_is_there_twice_the_first_is_predicted(workspace, tmp_path, capsys):
    (tar,) = (workspace / "raw").glob("*.tar")
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(tar.read_bytes())
    out, model = tmp_path / "p.json", ["--model", str(workspace / "run" / "model"), "--quiet"]
    assert main(["predict", str(tmp_path), str(out), *model]) == 1
    assert len(read_submission(out)) == 4 and "there twice" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"text, not a tar" * 100, bytes(10240)])
def test_a_source_without_a_scene_writes_nothing(workspace, tmp_path, capsys, content):
    (tmp_path / "a.tar").write_bytes(content)
    model = ["--model", str(workspace / "run" / "model"), "--quiet"]
    assert main(["predict", str(tmp_path / "a.tar"), str(tmp_path / "p.json"), *model]) == 2
    assert not (tmp_path / "p.json").exists() and capsys.readouterr().err.count("\n") == 1
    assert main(["prepare", str(tmp_path / "a.tar"), str(tmp_path / "rows"), "--workers", "1", "--quiet"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_device_or_folder_is_never_replaced_by_an_output_file(workspace, tmp_path, capsys):
    import os
    import stat

    os.mkfifo(tmp_path / "pipe")
    arguments = ["predict", str(workspace / "raw"), "OUT", "--model", str(workspace / "run" / "model"), "--quiet"]
    for name, words in (("pipe", "not a regular file"), (".", "is a folder"), ("", "empty")):
        out = str(tmp_path / name) if name else ""
        if name:
            assert main([out if word == "OUT" else word for word in arguments]) == 2
        else:
            with pytest.raises(SystemExit):
                main([out if word == "OUT" else word for word in arguments])
        assert words in capsys.readouterr().err
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_synth_writes_the_same_bytes_again_and_skips_finished_shards(workspace, tmp_path):
    arguments = ["--count", "4", *SMALL_SYNTH]
    assert main(["synth", str(tmp_path), *arguments]) == 0
    (tar,) = tmp_path.glob("*.tar")
    assert tar.read_bytes() == (workspace / "raw" / tar.name).read_bytes()
    written = tar.stat().st_mtime_ns
    assert main(["synth", str(tmp_path), *arguments]) == 0
    assert tar.stat().st_mtime_ns == written


def test_doctor_describes_the_machine_and_the_data(workspace, capsys):
    assert main(["doctor", str(workspace / "raw")]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "triton", "nvcc", "sinkhorn: reference", "qk_norm_attention: ", "gestalt", "wf_vertices"):
        assert word in text
    assert main(["doctor", str(workspace / "rows")]) == 0
    assert "xyz_norm" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["doctor", "/nowhere"], "no tar"),
        (["prepare", "/nowhere", "OUT"], "no tar"),
        (["eval", "/nowhere"], "no tar"),
        (["predict", "/nowhere", "OUT"], "no tar"),
        (["train", "--data", "/nowhere", "--out", "OUT"], "no Parquet shards"),
        (["train", "--data", "/nowhere", "--out", "OUT", "--set", "sead=1"], "unknown key sead"),
        (["train", "--config", "/nowhere.json", "--data", "x", "--out", "OUT"], "cannot read the configuration"),
        (["eval", "/nowhere", "--model", "/nowhere"], "/nowhere"),
        (["synth", "OUT", "--set", "wall=3"], "unknown setting"),
        (["synth", "OUT", "--size", "1x1"], "image size"),
        (["bench", "static", "--out", "/nowhere/report.json"], "/nowhere is no folder"),
        (["bench", "step", "--model", "--small"], "--small does not count here: --model runs nothing"),
        (["bench", "step", "--list"], "--list does not count here: without --model"),
        (["bench", "static", "--check", "x", "--arch", "89"], "--arch does not count here: --check and --table are"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(arguments, words, tmp_path, capsys):
    arguments = [str(tmp_path / "out") if word == "OUT" else word for word in arguments]
    if arguments[0] in ("eval", "predict") and "--model" not in arguments:
        Perceiver(PerceiverConfig(hidden=32, ff=32)).save_pretrained(tmp_path / "model")
        arguments += ["--model", str(tmp_path / "model")]
    assert main([*arguments, "--quiet"]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error and "Traceback" not in error


def test_debug_shows_the_traceback(tmp_path):
    from wireframe.errors import ShardError

    with pytest.raises(ShardError):
        main(["prepare", str(tmp_path), str(tmp_path / "out"), "--debug"])


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["fly"], ["synth"], ["synth", "x", "--count", "0"], ["eval", "x", "--threshold", "2"],
        ["train", "--out", "x", "--init", ""], ["train", "--out", "x", "--threads", "3000"],
        ["eval", "x", "--model", ""],
    ],
)
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage" in capsys.readouterr().err


def test_prepare_with_nothing_usable_is_status_1(tmp_path):
    from wireframe.shards import ShardWriter
    from wireframe.synth import SynthConfig, make_scene

    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.write({**make_scene(0, 0, SynthConfig(width=96, height=72, colmap_points=600)), "colmap": b"broken"})
    assert main(["prepare", str(tmp_path / "a.tar"), str(tmp_path / "out"), "--workers", "1", "--quiet"]) == 1
    assert list(iter_sample_rows(tmp_path / "out")) == []


def test_interrupting_a_command_is_status_130(monkeypatch, capsys):
    import wireframe.doctor

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(wireframe.doctor, "describe_machine", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "wireframe doctor: interrupted\n"


def test_a_fault_of_ours_is_one_line_and_status_3(monkeypatch, capsys):
    import wireframe.doctor

    monkeypatch.setattr(wireframe.doctor, "describe_machine", lambda: 1 / 0)
    assert main(["doctor"]) == 3
    error = capsys.readouterr().err.strip()
    assert "ZeroDivisionError" in error and "\n" not in error
    with pytest.raises(ZeroDivisionError):
        main(["doctor", "--debug"])


def test_a_closed_pipe_is_not_an_error():
    command = f"{sys.executable} -m wireframe doctor | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr

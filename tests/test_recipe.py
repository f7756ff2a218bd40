"""The recipe as its owner runs it: rows in the hub's layout, the commands of the README, a disk that fills up."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scenes import random_scene
from wireframe.cli import main
from wireframe.fusion import fuse_views
from wireframe.samples import write_parquet, write_sample
from wireframe.sampling import sample_points
from wireframe.train import checkpoints

ROOT = Path(__file__).parent.parent
SMALL = [
    "model.hidden=32", "model.ff=32", "model.latent_tokens=8", "model.latent_layers=2", "model.decoder_layers=1",
    "model.num_heads=2", "model.kv_heads_cross=1", "model.kv_heads_self=1", "model.num_points=64",
    "stages.0.points=32", "stages.1.points=64", "stages.2.points=64", "dev_val=3", "evaluation.thresholds=[0.0]",
    "graph.confidence=0.0", *(f"stages.{i}.{name}" for i in range(3) for name in ("steps=2", "batch_size=2")),
    "stages.2.cooldown=1", "log_every=1",
]  # fmt: skip
SETTINGS = [word for setting in SMALL for word in ("--set", setting)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two sets as the hub lays them out: their train splits differ in length, validation lies beside them."""
    folder = tmp_path_factory.mktemp("hub")
    for points, count in ((32, 9), (64, 8)):
        data = folder / str(points) / "data"
        data.mkdir(parents=True)
        rows = [write_sample(sample_points(fuse_views(random_scene(i), 60), points)) for i in range(count + 2)]
        write_parquet(rows[:4], data / "train-00000-of-00002.parquet")
        write_parquet(rows[4:count], data / "train-00001-of-00002.parquet")
        write_parquet(rows[count:], data / "validation-00000-of-00001.parquet")
    return [str(folder / "32"), str(folder / "64")]


def test_the_four_commands_lead_from_the_sets_to_the_worst_scenes(sets, tmp_path, capsys):
    run, scores = tmp_path / "run", tmp_path / "dev-val.json"
    data = ["--data", sets[0], "--data", sets[1]]
    assert main(["train", *data, "--out", str(run), "--quiet", *SETTINGS]) == 0
    said = capsys.readouterr().err
    # 6, 7, 8 of 9 and 5, 6, 7 of 8.
    assert "2 scenes in common" in said and "4 left out" in said
    model = ["--model", str(run / "model"), "--threshold", "0"]
    worst = ["--worst", "2", "--out", str(scores), "--workers", "1", "--quiet"]
    assert main(["eval", sets[1], "--split", "dev-val", "--dev-val", "3", *model, *worst]) == 0
    told = capsys.readouterr()
    assert "3 scenes of dev val" in told.out and ": HSS" in told.out
    # Of ids that may be the challenge's, pictures come with a warning.
    assert f"do not share {tmp_path / 'dev-val.worst.png'}: 2 of its scenes" in told.err
    assert "Do not share this page" in (run / "report.html").read_text()
    found = json.loads(scores.read_text())
    evaluated = json.loads((run / "evaluation" / "3-endpoint.json").read_text())
    assert len(found["worst"]) == 2 and found["scenes"] == evaluated["scenes"]
    assert (tmp_path / "dev-val.worst.png").exists() and (run / "evaluation" / "3-endpoint.png").exists()
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert all(name in page for name in (*found["worst"], "endpoint", "weight_decay"))


def test_a_published_checkpoint_resumes_into_the_last_stage(sets, tmp_path):
    data = ["--data", sets[0], "--data", sets[1], "--no-eval", "--quiet"]
    assert main(["train", *data, "--out", str(tmp_path / "a"), *SETTINGS]) == 0
    published = tmp_path / "a" / "stages" / "2-4096" / "checkpoint.pt"
    state = torch.load(published, weights_only=True)
    assert set(state) == {"model", "args"}
    last = ["--stages", "3", "--init", str(published), "--out", str(tmp_path / "b")]
    assert main(["train", *data, *last, *SETTINGS]) == 0
    log = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "event" not in line] == [5, 6]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--stages", "4"], "--stages reaches stage 4; there are 3"),
        (["--stages", "2"], "stage 2 goes on from a checkpoint"),
        (["--init", "nowhere.pt"], "nowhere.pt"),
        (["--exclude", "nowhere.txt"], "nowhere.txt"),
        (["--smoke", "--config", "base"], "--smoke is a configuration of its own"),
        (["--set", "dev_val=100"], "dev_val"),
    ],
)
def test_wrong_arguments_are_one_line_each(sets, tmp_path, capsys, words, message):
    data = ["--data", sets[0], "--data", sets[1]]
    assert main(["train", *data, "--out", str(tmp_path), "--quiet", *SETTINGS, *words]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("wireframe train:")]
    assert len(said) == 1 and message in said[0]


def test_training_goes_on_when_nobody_reads_along(sets, tmp_path):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    words = ["--data", sets[0], "--data", sets[1], "--out", str(tmp_path / "run"), "--no-eval", *SETTINGS]
    command = [sys.executable, "-m", "wireframe", "train", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, **pipes)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=120) == 0 and (tmp_path / "run" / "model" / "config.json").exists()


@pytest.mark.parametrize("words", [["--out", "file"], ["--set", "description=" + "x" * 10_001]])
def test_what_could_not_be_resumed_is_refused_before_it_begins(sets, tmp_path, capsys, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    data = ["--data", sets[0], "--data", sets[1], "--out", "run", "--no-eval", "--quiet"]
    assert main(["train", *data, *SETTINGS, *words]) == 2
    assert capsys.readouterr().err.strip().count("\n") == 0


def test_training_without_data_is_one_line(tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path), "--quiet"]) == 2
    assert "--data is missing" in capsys.readouterr().err


def test_verify_wants_two_checkpoints_or_a_configuration(capsys):
    assert main(["verify", "one"]) == 2 and main(["verify"]) == 2
    assert capsys.readouterr().err.count("give two checkpoints to compare, or --rerun CONFIG") == 2


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]).returncode:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_ends_the_run_with_one_line_and_keeps_what_was_saved(sets, small_disk, capsys):
    # A checkpoint takes some 250 KB here: the disk is full after a few.
    words = ["--data", sets[0], "--data", sets[1], "--out", str(small_disk / "run"), "--no-eval", "--quiet"]
    often = ["--set", "save_every=1", "--set", "keep_checkpoints=10"]
    assert main(["train", *words, *SETTINGS, *often]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    # Whatever it was that did not fit any more: a checkpoint, a stage's model, the log.
    assert said.startswith("wireframe train: cannot") and "No space left on device" in said
    saved = checkpoints.latest(small_disk / "run", pytest.fail)
    assert saved is not None
    # Room is made, and the same command goes on to the bits of a run with room enough.
    shutil.copytree(small_disk / "run", small_disk.parent / "run")
    words[words.index("--out") + 1] = str(small_disk.parent / "run")
    assert main(["train", *words, *SETTINGS, *often]) == 0
    words[words.index("--out") + 1] = str(small_disk.parent / "calm")
    assert main(["train", *words, *SETTINGS]) == 0
    ends = [checkpoints.tensor_hashes(small_disk.parent / name) for name in ("run", "calm")]
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_the_small_recipe_twice_from_scenes_to_scores_gives_the_same_bits(tmp_path):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    script = ["bash", str(ROOT / "train" / "reproduce_deterministic.sh"), "--smoke", str(tmp_path / "out")]
    done = subprocess.run(
        script, env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": path}, capture_output=True, text=True,
        cwd=tmp_path, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "equal" in done.stdout.lower() and done.stdout.count(": 4 scenes of dev val") == 6
    for run in ("first", "second"):
        assert (tmp_path / "out" / run / "run" / "report.html").exists()


def test_the_published_sets_are_downloaded_trained_on_and_scored(sets, tmp_path):
    # Stands in for the hub's own command, which needs the network: the same arguments, rows in the same layout.
    (tmp_path / "hf").write_text(
        "#!/bin/sh\n"
        'test "$1 $2 $3 $5 $6 $7" = "download --repo-type dataset --include *train* --local-dir" || exit 9\n'
        f'case "$4" in *_2048_v2) from={sets[0]};; *_4096_v2) from={sets[1]};; *) exit 8;; esac\n'
        'mkdir -p "$8/data" && cp "$from"/data/train-* "$8/data"\n'
    )
    (tmp_path / "hf").chmod(0o755)
    env = {
        **os.environ, "PYTHON": sys.executable, "OPTIONS": " ".join(["--quiet", *SETTINGS]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    script = ["bash", str(ROOT / "train" / "reproduce.sh"), str(tmp_path / "out")]
    # Half a download is no training set.
    hf = (tmp_path / "hf").read_text()
    (tmp_path / "hf").write_text(hf + "exit 1\n")
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and not (tmp_path / "out" / "run").exists()
    (tmp_path / "hf").write_text(hf)
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split(":")[0] for line in done.stdout.splitlines() if ": 3 scenes of dev val" in line] == [
        "stage 1-2048", "stage 2-4096", "stage 3-endpoint",
    ]  # fmt: skip

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import (
    DATA,
    STAGES,
    advance,
    contents,
    file_size_limit,
    refused,
    resealed,
    same_state,
    save,
    settings,
    small_run,
    three_checkpoints,
)

import wireframe
from wireframe.train import checkpoints
from wireframe.train.checkpoint_files import FILES, MODEL, OPTIMIZER, STATE, SUMS
from wireframe.train.checkpoints import State


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with the checkpoints of steps 1, 2 and 3; never altered."""
    return three_checkpoints(tmp_path_factory.mktemp("run"))


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def newest(run):
    """Name of the checkpoint that would be resumed from, and what was said."""
    said = []
    found = checkpoints.latest(run, said.append)
    assert all("\n" not in line and line.isprintable() and len(line) < 700 for line in said)
    return found and found.name, said


def test_weights_and_optimiser_come_back_bit_for_bit_and_go_on_alike(tmp_path):
    ours = small_run()
    for step in range(3):
        advance(ours, step)
    start = {"source": "a.pt", "sha256": "0" * 64, "optimizer": False}
    path = checkpoints.save(tmp_path, State(3, 2, start), ours, settings(), DATA)
    theirs = small_run(1)
    # State of its own, which must not shine through.
    advance(theirs, 9)
    assert checkpoints.load(path, theirs, settings(), DATA) == State(3, 2, start)
    assert same_state(ours, theirs)
    assert theirs.count == 3
    for optimizer in (ours, theirs):
        advance(optimizer, 3)
    assert same_state(ours, theirs)


def test_a_checkpoint_before_the_first_step_empties_the_optimiser(tmp_path):
    path = save(tmp_path, 0, small_run())
    theirs = small_run(1)
    advance(theirs, 0)
    checkpoints.load(path, theirs, settings(), DATA)
    assert theirs.count == 0 and same_state(theirs, small_run())


def test_in_half_precision_the_weights_themselves_are_kept_and_their_copies_made_anew(tmp_path):
    ours, theirs = (small_run(seed, dtype=torch.bfloat16) for seed in (0, 1))
    advance(ours, 0)
    path = save(tmp_path, 1, ours)
    assert all(tensor.dtype == torch.float32 for tensor in checkpoints.read(path).tensors["model"].values())
    checkpoints.load(path, theirs, settings(), DATA)
    assert same_state(ours, theirs) and torch.equal(ours.half, theirs.half)
    said = []
    checkpoints.load(path, small_run(2), settings(), DATA, said.append)
    assert len(said) == 1 and "precision" in said[0] and "the bits will differ" in said[0]


@pytest.mark.gpu
def test_a_checkpoint_goes_between_gpu_and_cpu(tmp_path):
    ours, theirs, host = small_run(0, "cuda"), small_run(1, "cuda"), small_run(2)
    advance(ours, 0)
    checkpoints.load(save(tmp_path, 1, ours), theirs, settings(), DATA)
    assert same_state(ours, theirs) and all(tensor.is_cuda for tensor in theirs.state().values())
    checkpoints.load(save(tmp_path, 2, ours), host, settings(), DATA, lambda line: None)
    assert all(torch.equal(tensor, ours.state()[name].cpu()) for name, tensor in host.state().items())


def test_the_manifest_is_that_of_sha256sum(run):
    folder = run / "checkpoints" / "step-00000003"
    assert sorted(contents(folder)) == sorted([*FILES, SUMS])
    program = shutil.which("sha256sum")
    if program is None:
        pytest.skip("no sha256sum here")
    told = subprocess.run([program, "-c", "--strict", SUMS], cwd=folder, capture_output=True, text=True)
    assert told.returncode == 0 and told.stdout.count("OK") == 3


@pytest.mark.parametrize("name", [*FILES, SUMS])
def test_a_flipped_byte_anywhere_is_reported_and_passed_over(run, name):
    path = run / "checkpoints" / "step-00000003" / name
    data = path.read_bytes()
    for share in (0, 0.001, 0.05, 0.3, 0.5, 0.77, 0.99, 1):
        place = round(share * (len(data) - 1))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        found, said = newest(run)
        assert found == "step-00000002" and len(said) == 1
        assert "step-00000003 is corrupt" in said[0] and "passing it over" in said[0]
        assert name == SUMS or name in said[0]
        refused(lambda: checkpoints.load(path.parent, small_run(1), settings(), DATA), "corrupt")
    path.write_bytes(data)
    assert newest(run) == ("step-00000003", [])


@pytest.mark.parametrize("name", [*FILES, SUMS])
def test_what_is_missing_cut_or_longer_is_reported_and_passed_over(run, name):
    path = run / "checkpoints" / "step-00000003" / name
    data = path.read_bytes()
    for short in (b"", data[:1], data[: len(data) // 2], data[:-1], data + b"\n"):
        path.write_bytes(short)
        found, said = newest(run)
        assert found == "step-00000002" and len(said) == 1 and "corrupt" in said[0], short[:9]
    path.unlink()
    found, said = newest(run)
    assert found == "step-00000002"
    assert said == [f"checkpoint {path.parent} is corrupt: there is no {name}; passing it over"]
    path.mkdir()
    assert newest(run)[0] == "step-00000002"
    path.rmdir()
    os.mkfifo(path)
    found, said = newest(run)
    assert found == "step-00000002" and "not a regular file" in said[0]


def test_a_foreign_file_is_named_and_its_name_cannot_steer_the_terminal(run):
    folder = run / "checkpoints" / "step-00000003"
    (folder / "notes\x1b[2J\n.txt").write_text("x")
    found, said = newest(run)
    assert found == "step-00000002" and "no part of it" in said[0]


def test_all_broken_or_none_there(run, tmp_path):
    for folder in (run / "checkpoints").iterdir():
        (folder / STATE).write_text("{}")
    found, said = newest(run)
    assert found is None and len(said) == 3
    assert newest(tmp_path / "nothing") == (None, [])
    (run / "checkpoints" / "step-00000009").write_text("no folder")
    (run / "checkpoints" / "step-x").mkdir()
    assert len(newest(run)[1]) == 4


def test_links_are_not_followed_nor_what_the_manifest_names(run, tmp_path):
    folder = run / "checkpoints" / "step-00000003"
    outside = tmp_path / "outside"
    (folder / MODEL).rename(outside)
    (folder / MODEL).symlink_to(outside)
    found, said = newest(run)
    assert found == "step-00000002" and f"{MODEL} is a link" in said[0]
    (folder / MODEL).unlink()
    outside.rename(folder / MODEL)
    # To open it would wait for ever.
    os.mkfifo(outside)
    manifest = (folder / SUMS).read_text()
    for line in (f"{'0' * 64}  ../../../outside\n", f"{'0' * 64}  {outside}\n", f"{'0' * 64}  \x00\n"):
        (folder / SUMS).write_text(manifest + line)
        assert newest(run)[0] == "step-00000002"
        (folder / SUMS).write_text(manifest.replace(MODEL, line[66:-1]))
        assert newest(run)[0] == "step-00000002"


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over(run):
    (run / "checkpoints" / "step-00000002").rename(run / "checkpoints" / "step-00000007")
    found, said = newest(run)
    assert found == "step-00000003" and "it is that of step 2" in said[0]


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "{", '"step"', "\xff", "[" * 100_000, '{"step":' * 50_000, "9" * 10_000,
        " " * ((1 << 20) + 1),
    ],
)  # fmt: skip
def test_a_state_that_is_no_state_is_one_line_though_its_hash_holds(run, text):
    folder = run / "checkpoints" / "step-00000003"
    (folder / STATE).write_text(text, encoding="latin-1")
    resealed(folder)
    found, said = newest(run)
    assert found == "step-00000002" and STATE in said[0]
    refused(lambda: checkpoints.load(folder, small_run(1), settings(), DATA), STATE)
    refused(lambda: checkpoints.start_from(folder, small_run(1)), STATE)


@pytest.mark.parametrize(
    "change",
    [
        {"step": "3"}, {"step": True}, {"step": -1}, {"step": 3.0}, {"step": 1 << 70}, {"step": None},
        {"bad_steps": []}, {"start": "x"}, {"config": []}, {"data": None}, {"environment": 3}, {"more": 1},
    ],
)  # fmt: skip
def test_a_state_with_a_wrong_type_is_one_line(run, change):
    folder = run / "checkpoints" / "step-00000003"
    state = json.loads((folder / STATE).read_text())
    (folder / STATE).write_text(json.dumps({**state, **change}))
    resealed(folder)
    found, said = newest(run)
    assert found == "step-00000002" and STATE in said[0]
    (folder / STATE).write_text(json.dumps({k: v for k, v in state.items() if k not in change}))
    resealed(folder)
    assert newest(run)[0] == ("step-00000003" if "more" in change else "step-00000002")


def test_a_state_over_the_limit_is_not_read(run):
    folder = run / "checkpoints" / "step-00000003"
    size = (folder / STATE).stat().st_size
    with open(folder / STATE, "ab") as file:
        file.write(b" " * ((1 << 20) - size))
    assert newest(resealed(folder).parents[1]) == ("step-00000003", [])
    with open(folder / STATE, "ab") as file:
        file.write(b" ")
    found, said = newest(resealed(folder).parents[1])
    assert found == "step-00000002" and f"{STATE} is {(1 << 20) + 1} bytes long; the limit is {1 << 20}" in said[0]


def test_hostile_settings_within_a_state_are_one_line(run):
    folder = run / "checkpoints" / "step-00000003"
    state = json.loads((folder / STATE).read_text())
    evil = {"a\x1b[2J\n": 1, "stages": "x" * 10_000, "model": {"hidden": -1, "zz": []}, "seed": 10**4000}
    for change in ({"config": evil}, {"config": {}}, {"config": {"model": None}}, {"data": {"x" * 999: 3, "32": []}}):
        (folder / STATE).write_text(json.dumps({**state, **change}))
        resealed(folder)
        assert newest(run) == ("step-00000003", [])
        refused(lambda: checkpoints.load(folder, small_run(1), settings(), DATA), "another configuration|other data")
        if "config" in change:
            refused(lambda: checkpoints.start_from(folder, small_run(1)), "model config|architecture|holds no model")


class Marking:
    """A pickle that makes a file when it is executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
def test_a_pickle_in_place_of_tensors_is_not_executed(run, tmp_path, name):
    folder = run / "checkpoints" / "step-00000003"
    mark = tmp_path / "executed"
    torch.save({"x": Marking(mark)}, folder / name)
    resealed(folder)
    refused(lambda: checkpoints.load(folder, small_run(1), settings(), DATA), f"{name} is not a readable safetensors")
    (folder / name).write_bytes(pickle.dumps(Marking(mark)))
    resealed(folder)
    refused(lambda: checkpoints.start_from(folder, small_run(1)), f"{name} is not a readable safetensors")
    assert not mark.exists()


def kept(out):
    return [int(name[5:]) for name in sorted(os.listdir(out / "checkpoints"))]


def test_the_last_ones_every_mth_and_stage_ends_are_kept(tmp_path):
    optimizer = small_run()
    config = settings(keep_checkpoints=2, keep_every=3)
    for step in range(10):
        save(tmp_path, step, optimizer, config)
        assert kept(tmp_path) == sorted({s for s in range(step + 1) if s >= step - 1 or s % 3 == 0 or s == 4})
    save(tmp_path, 10, optimizer, settings(keep_checkpoints=1))
    assert kept(tmp_path) == [4, 10]


def test_corrupt_ones_do_not_count_among_those_to_keep(tmp_path):
    optimizer = small_run()
    config = settings(keep_checkpoints=2)
    long = settings(stages=[{**STAGES[0], "steps": 100}], keep_checkpoints=2)
    for step in (5, 6, 7):
        save(tmp_path, step, optimizer, long)
    for step in (6, 7):
        (tmp_path / "checkpoints" / f"step-{step:08d}" / MODEL).write_bytes(b"")
    # 7 is ahead of what is saved; 6, had the run gone on from it, would be dropped with the next.
    (tmp_path / "checkpoints" / "step-00000006").rename(tmp_path / "checkpoints" / "step-00000008")
    save(tmp_path, 5, optimizer, config)
    save(tmp_path, 6, optimizer, long)
    assert kept(tmp_path) == [5, 6, 7, 8]
    save(tmp_path, 9, optimizer, long)
    assert kept(tmp_path) == [6, 9]


def test_an_equal_checkpoint_is_not_written_again_and_a_corrupt_one_is(run, monkeypatch):
    path = run / "checkpoints" / "step-00000003"
    ours = small_run()
    checkpoints.load(path, ours, settings(), DATA)
    number, before = path.stat().st_ino, contents(path)
    assert save(run, 3, ours) == path and path.stat().st_ino == number and contents(path) == before
    # It was made where its environment says, not where it is saved again.
    monkeypatch.setattr(checkpoints, "environment", lambda _: {"torch": "another"})
    assert save(run, 3, ours) == path and path.stat().st_ino == number and contents(path) == before
    monkeypatch.undo()
    (path / "more").write_text("x")
    save(run, 3, ours)
    assert path.stat().st_ino != number and newest(run) == ("step-00000003", []) and contents(path) == before
    # Also where the folder's place is taken by something else.
    shutil.rmtree(path)
    path.write_text("x")
    save(run, 3, ours)
    assert newest(run) == ("step-00000003", []) and kept(run) == [1, 2, 3]


def test_a_valid_checkpoint_of_another_history_is_replaced(run):
    # It was passed over for an error that went by, and training came there again on another way.
    optimizer = small_run()
    advance(optimizer, 99)
    save(run, 3, optimizer)
    read = small_run(1)
    checkpoints.load(run / "checkpoints" / "step-00000003", read, settings(), DATA)
    assert same_state(read, optimizer)
    checkpoints.save(run, State(3, 7, None), optimizer, settings(), DATA)
    found = checkpoints.load(run / "checkpoints" / "step-00000003", read, settings(), DATA)
    assert found.bad_steps == 7 and newest(run) == ("step-00000003", [])


def test_none_is_dropped_while_steps_are_skipped(tmp_path):
    ours, config = small_run(), settings(keep_checkpoints=1)
    for step, bad_steps in ((1, 0), (2, 1), (3, 2)):
        checkpoints.save(tmp_path, State(step, bad_steps, None), ours, config, DATA)
    assert kept(tmp_path) == [1, 2, 3]
    checkpoints.save(tmp_path, State(5, 0, None), ours, config, DATA)
    assert kept(tmp_path) == [5]


def test_equal_runs_write_equal_bytes(tmp_path):
    for name in ("a", "b"):
        optimizer = small_run()
        advance(optimizer, 0)
        save(tmp_path / name, 1, optimizer)
    first, second = (contents(tmp_path / name / "checkpoints" / "step-00000001") for name in ("a", "b"))
    assert first == second


def test_a_save_that_cannot_write_leaves_all_as_it_was(run):
    before = {path.name: contents(path) for path in (run / "checkpoints").iterdir()}
    sizes = {name: len(data) for name, data in before["step-00000003"].items()}
    optimizer = small_run()
    advance(optimizer, 4)
    # Breaks off at the weights, in the middle of them, and at the optimiser.
    for limit in (0, 1, sizes[MODEL] // 2, sizes[MODEL], sizes[OPTIMIZER] - 1):
        with file_size_limit(limit):
            text = refused(lambda: save(run, 4, optimizer), "cannot save step 4 in .*File too large")
        assert "older checkpoints are as they were" in text
        assert {path.name: contents(path) for path in (run / "checkpoints").iterdir()} == before
    save(run, 4, optimizer)
    assert newest(run) == ("step-00000004", [])


def test_a_run_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    refused(lambda: save(tmp_path, 1, small_run()), "cannot save step 1 in .*(File exists|Not a directory)")
    refused(lambda: checkpoints.latest(tmp_path), "cannot be read: Not a directory")


def program(*arguments, before=()):
    root = Path(wireframe.__file__).resolve().parents[1]
    path = os.pathsep.join([str(root), str(Path(__file__).parent)])
    command = [*before, sys.executable, "-m", "checkpoint_cases", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_killed_at_every_act_of_a_save_and_at_random_moments(tmp_path):
    program("killed", tmp_path)


def test_a_full_disk(tmp_path):
    # A mount of its own, gone with the process, whatever happens to it.
    mount = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=512k tmpfs "$0" && exec "$@"', str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
        mount[1] = "-m"
        if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
            pytest.skip("no tmpfs can be mounted here; the limit on the size of files is tested instead")
    assert "No space left on device" in program("full", tmp_path, before=mount)


def test_everything_is_on_the_disk_before_it_has_its_name(run, monkeypatch):
    said, fsync, rename = [], os.fsync, os.rename

    def spying_fsync(descriptor):
        said.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        return fsync(descriptor)

    def spying_rename(a, b):
        said.append(f"{Path(a).name} -> {Path(b).name}")
        return rename(a, b)

    monkeypatch.setattr(os, "fsync", spying_fsync)
    monkeypatch.setattr(os, "rename", spying_rename)
    save(run, 4, small_run())
    new = ".step-00000004.new"
    assert said == [
        *FILES, SUMS, new, f"{new} -> step-00000004", "checkpoints", "step-00000001 -> .step-00000001.old",
    ]  # fmt: skip


def test_what_a_killed_save_left_is_cleared_by_the_next(run):
    for name in (".step-00000004.new", ".step-00000001.old"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / MODEL).write_bytes(b"x")
    (run / "checkpoints" / "notes").mkdir()
    assert newest(run) == ("step-00000003", [])
    save(run, 4, small_run())
    assert sorted(os.listdir(run / "checkpoints")) == [
        "notes", "step-00000002", "step-00000003", "step-00000004",
    ]  # fmt: skip

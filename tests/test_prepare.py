import dataclasses
import hashlib
import io
import json
import re
import signal
import tarfile
import threading
import time

import numpy as np
import pytest

from wireframe.cli import main
from wireframe.errors import ConfigError, ShardError
from wireframe.fusion import fuse_views
from wireframe.prepare import PrepareConfig, prepare
from wireframe.samples import iter_sample_rows, read_sample
from wireframe.sampling import SAMPLERS, sample_points
from wireframe.scene import read_scene
from wireframe.shards import ShardWriter, iter_rows
from wireframe.synth import SynthConfig, make_scene

TINY = SynthConfig(width=96, height=72, colmap_points=600, views_range=(4, 5))
CONFIG = PrepareConfig(num_points=128, depth_points_per_view=100)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Two tars of three good scenes each; the second also holds one without edges and one that is broken."""
    folder = tmp_path_factory.mktemp("raw")
    for shard in range(2):
        with ShardWriter(folder / f"part{shard}.tar") as writer:
            for index in range(3):
                writer.write(make_scene(0, 10 * shard + index, TINY))
            if shard == 1:
                writer.write({**make_scene(0, 90, TINY), "wf_edges": [], "wf_classifications": []})
                writer.write({**make_scene(0, 91, TINY), "colmap": b"PK broken"})
    return folder


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.parquet")}


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    return out, prepare(raw, out, CONFIG, progress=False)


def test_every_good_scene_becomes_a_row_and_every_other_is_reported(prepared):
    out, report = prepared
    assert (report.shards, report.rows) == (2, 6)
    assert {reason.order_id for reason in report.skipped} == {"synth-0-000090", "synth-0-000091"}
    notes = [json.loads(path.read_text()) for path in sorted((out / ".manifest").iterdir())]
    assert [len(note["skipped"]) for note in notes] == [0, 2]


def test_rows_equal_the_public_functions(raw, prepared):
    rows = {row["order_id"]: row for row in iter_sample_rows(prepared[0])}
    raw_row = next(iter_rows(raw))
    expected = sample_points(fuse_views(read_scene(raw_row), 100), 128)
    got = read_sample(rows[raw_row["order_id"]])
    assert all(np.array_equal(array, got.arrays()[name]) for name, array in expected.arrays().items())


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers_writes_the_same_bytes_as_one(raw, prepared, tmp_path, workers):
    assert prepare(raw, tmp_path, CONFIG, workers=workers, progress=False) == prepared[1]
    assert digests(tmp_path) == digests(prepared[0])


def test_two_workers_are_in_two_scenes_at_the_same_time(raw, tmp_path, monkeypatch):
    both = threading.Barrier(2, timeout=60)
    scenes = []

    def together(scene, *arguments, **how):
        scenes.append(scene.order_id)
        if len(scenes) <= 2:
            both.wait()
        return fuse_views(scene, *arguments, **how)

    monkeypatch.setattr("wireframe.prepare.fuse_views", together)
    assert prepare(raw / "part0.tar", tmp_path, CONFIG, workers=2, progress=False).rows == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_or_a_fault_drops_the_scenes_that_wait_and_writes_nothing(raw, prepared, tmp_path, monkeypatch,
                                                                               error):
    begun = []

    def interrupting(scene, *arguments, **how):
        begun.append(scene.order_id)
        if len(begun) == 2 and error is KeyboardInterrupt:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        # By then the main thread has dropped the third scene.
        time.sleep(0.5)
        return fuse_views(scene, *arguments, **how) if error is KeyboardInterrupt else 1 / 0

    monkeypatch.setattr("wireframe.prepare.fuse_views", interrupting)
    # Ignored where the tests run in the background of a shell.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(error):
            prepare(raw / "part0.tar", tmp_path, CONFIG, workers=2, progress=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(begun) <= 2 + (error is ZeroDivisionError)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("wireframe-ahead")]
    monkeypatch.undo()
    prepare(raw, tmp_path, CONFIG, workers=2, progress=False)
    assert digests(tmp_path) == digests(prepared[0])


def test_shards_i_of_n_together_equal_the_whole(raw, prepared, tmp_path):
    first = prepare(raw, tmp_path, CONFIG, shard=(0, 2), progress=False)
    assert len(digests(tmp_path)) == 1 and first.rows == 3
    prepare(raw, tmp_path, CONFIG, shard=(1, 2), progress=False)
    assert digests(tmp_path) == digests(prepared[0])


def test_a_second_run_resumes_and_makes_only_what_is_missing_or_damaged(raw, prepared, tmp_path):
    prepare(raw, tmp_path, CONFIG, progress=False)
    again = prepare(raw, tmp_path, CONFIG, progress=False)
    assert again[:3] == (0, 2, 6) and len(again.skipped) == 2
    (tmp_path / "part0.parquet").write_bytes(b"damaged")
    assert prepare(raw, tmp_path, CONFIG, progress=False)[:3] == (1, 1, 6)
    assert digests(tmp_path) == digests(prepared[0])


def test_other_settings_do_not_mix_into_one_folder(raw, prepared):
    with pytest.raises(ConfigError, match="other settings"):
        prepare(raw, prepared[0], PrepareConfig(num_points=64), progress=False)


@pytest.mark.parametrize("sampler", ["fps", "voxel"])
def test_another_sampler_takes_other_points_into_a_folder_of_its_own(raw, prepared, tmp_path, sampler):
    config = dataclasses.replace(CONFIG, sampler=sampler)
    with pytest.raises(ConfigError, match="other settings"):
        prepare(raw, prepared[0], config, progress=False)
    for workers in (1, 2):
        prepare(raw, tmp_path / str(workers), config, workers=workers, progress=False)
    assert digests(tmp_path / "1") == digests(tmp_path / "2") != digests(prepared[0])
    first = read_sample(next(iter_sample_rows(tmp_path / "1")))
    raw_row = next(iter_rows(raw))
    expected = sample_points(fuse_views(read_scene(raw_row), 100), 128, sampler=sampler)
    assert all(np.array_equal(array, first.arrays()[name]) for name, array in expected.arrays().items())


def test_an_unknown_sampler_is_a_config_error(raw, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown sampler 'random'; choose one of priority, fps, voxel"):
        prepare(raw, tmp_path, PrepareConfig(sampler="random"), progress=False)


def test_the_command_takes_every_sampler_and_refuses_others_in_a_line(raw, tmp_path, capsys):
    for sampler in SAMPLERS:
        out = tmp_path / sampler
        arguments = ["prepare", str(raw / "part0.tar"), str(out), "--points", "64", "--workers", "1", "--quiet"]
        assert main([*arguments, "--sampler", sampler]) == 0
        assert json.loads((out / ".manifest" / "part0.parquet.json").read_text())["config"]["sampler"] == sampler
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["prepare", "a", "b", "--sampler", "random"])
    assert stop.value.code == 2
    assert re.search("--sampler: invalid choice: 'random'.*priority.*fps.*voxel", capsys.readouterr().err)



def test_two_machines_that_finish_shards_at_the_same_time_lose_no_note(raw, prepared, tmp_path):
    from wireframe.prepare import _Manifest

    tars = [str(raw / f"part{i}.tar") for i in range(2)]
    # Both start before either has finished a shard.
    manifests = [_Manifest(tmp_path, CONFIG) for _ in tars]
    for i, manifest in enumerate(manifests):
        name = f"part{i}.parquet"
        (tmp_path / name).write_bytes((prepared[0] / name).read_bytes())
        manifest.add(name, tars[i], 3, [], None)
    assert prepare(raw, tmp_path, CONFIG, progress=False)[:3] == (0, 2, 6)


def test_an_unreadable_note_makes_its_shard_again(raw, prepared, tmp_path):
    prepare(raw, tmp_path, CONFIG, progress=False)
    (tmp_path / ".manifest" / "part0.parquet.json").write_text("{")
    assert prepare(raw, tmp_path, CONFIG, progress=False)[:3] == (1, 1, 6)


def test_load_dataset_reads_the_folder(prepared, tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.load_dataset("parquet", data_dir=str(prepared[0]), split="train", cache_dir=str(tmp_path))
    assert len(table) == 6 and table.column_names == ["order_id", "data"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_truncated_tar_keeps_the_scenes_before_the_damage_and_is_tried_again(raw, tmp_path, workers):
    whole = (raw / "part0.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        third = next(m.offset for m in tar.getmembers() if m.name.startswith("synth-0-000002"))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "cut.tar").write_bytes(whole[: third + 2000])
    report = prepare(tmp_path / "raw", tmp_path / "out", CONFIG, workers=workers, progress=False)
    assert report.rows == 2
    assert [damaged.order_id for damaged in report.damaged] == ["cut.tar"]
    (tmp_path / "raw" / "cut.tar").write_bytes(whole)
    assert prepare(tmp_path / "raw", tmp_path / "out", CONFIG, progress=False) == (1, 0, 3, (), ())


def test_another_tar_of_the_same_name_is_prepared_again(raw, tmp_path):
    (tmp_path / "raw").mkdir()
    for part in ("part0.tar", "part1.tar"):
        (tmp_path / "raw" / "x.tar").write_bytes((raw / part).read_bytes())
        assert prepare(tmp_path / "raw", tmp_path / "out", CONFIG, progress=False).shards == 1


def test_a_scene_whose_row_no_reader_would_take_is_left_out(raw, tmp_path, monkeypatch):
    def overflowing(points, num_points, seed, **how):
        sample = sample_points(points, num_points, seed, **how)
        return dataclasses.replace(sample, gt_segments=sample.gt_segments * np.float32(np.inf))

    monkeypatch.setattr("wireframe.prepare.sample_points", overflowing)
    report = prepare(raw / "part0.tar", tmp_path, CONFIG, progress=False)
    assert report.rows == 0 and len(report.skipped) == 3 and "gt_segments" in report.skipped[0].reason


def test_keep_all_keeps_scenes_without_ground_truth(raw, tmp_path):
    config = PrepareConfig(num_points=128, depth_points_per_view=100, keep_all=True)
    assert prepare(raw, tmp_path, config, progress=False).rows == 7


def test_no_tar_is_a_shard_error(tmp_path):
    with pytest.raises(ShardError, match="no tar"):
        prepare(tmp_path, tmp_path / "out", CONFIG, progress=False)


def test_same_named_tars_in_two_folders_are_refused(raw, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.tar").write_bytes((raw / "part0.tar").read_bytes())
    with pytest.raises(ConfigError, match="same file name"):
        prepare(tmp_path, tmp_path / "out", CONFIG, progress=False)

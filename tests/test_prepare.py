import dataclasses
import hashlib
import io
import json
import tarfile

import numpy as np
import pytest

from wireframe.errors import ConfigError, ShardError
from wireframe.prepare import PrepareConfig, prepare
from wireframe.samples import iter_sample_rows, read_sample
from wireframe.sampling import sample_points
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
    from wireframe import fuse_views, read_scene

    rows = {row["order_id"]: row for row in iter_sample_rows(prepared[0])}
    raw_row = next(iter_rows(raw))
    expected = sample_points(fuse_views(read_scene(raw_row), 100), 128)
    got = read_sample(rows[raw_row["order_id"]])
    assert all(np.array_equal(array, got.arrays()[name]) for name, array in expected.arrays().items())


def test_two_workers_write_the_same_bytes_as_one(raw, prepared, tmp_path):
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
    def overflowing(points, num_points, seed):
        sample = sample_points(points, num_points, seed)
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

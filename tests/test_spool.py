import dataclasses
import itertools
import resource
import shutil

import numpy as np
import pytest
import torch

from train_rows import POINTS, RESAMPLED, assert_same, load, load_one, readers, requests_of, write, write_two
from wireframe.errors import ConfigError, SampleError, ShardError, WireframeError
from wireframe.samples import write_parquet, write_sample
from wireframe.train import data as data_module
from wireframe.train import spool
from wireframe.train.config import AugmentConfig
from wireframe.train.made_rows import made_rows
from wireframe.train.rows import RowLayout


@pytest.fixture(scope="module")
def scenes():
    return made_rows(POINTS, 11)


@pytest.fixture(scope="module")
def rows(scenes, tmp_path_factory):
    return write_two(tmp_path_factory.mktemp("rows"), scenes)


@pytest.fixture(scope="module")
def training(rows):
    return load_one(rows)


@pytest.mark.parametrize("points", [None, 20])
def test_a_set_on_disk_gives_the_bits_of_one_in_memory(rows, training, tmp_path, points):
    streamed = load_one(rows, stream=True, spool=tmp_path)
    assert training.resident and not streamed.resident and streamed.source == str(rows)
    assert streamed.fingerprint() == training.fingerprint() and streamed.order_ids == training.order_ids
    # Batches of 4 out of 11 scenes: most epochs end within a batch.
    requests = requests_of(training, 4, 9)
    found = list(streamed.batches(requests, 353, RESAMPLED, points))
    assert len(found) == len(requests)
    for (step, index), a, b in zip(requests, training.batches(requests, 353, RESAMPLED, points), found):
        assert_same(a, b)
        assert_same(training.batch(353, step, index, RESAMPLED, points), a)
        assert_same(streamed.batch(353, step, index, RESAMPLED, points), b)


def test_the_thread_reads_a_few_batches_ahead_and_ends_with_the_iterator(rows, tmp_path):
    streamed = load_one(rows, stream=True, spool=tmp_path)
    taken = []

    def endless():
        for step in itertools.count():
            taken.append(step)
            yield step, np.arange(2)

    batches = streamed.batches(endless(), 0, AugmentConfig())
    for _ in range(3):
        next(batches)
    assert len(readers()) == 1 and 3 < len(taken) < 12
    batches.close()
    assert readers() == []


def test_what_fails_in_the_thread_is_one_line_and_ends_it(rows, tmp_path, monkeypatch):
    streamed = load_one(rows, stream=True, spool=tmp_path)
    requests = [(0, np.arange(2))] * 9
    monkeypatch.setattr(spool.Spool, "fetch", lambda *_: 1 / 0)
    with pytest.raises(WireframeError, match=r"reading rows ahead failed \(ZeroDivisionError: division by zero\)"):
        list(streamed.batches(requests, 0, AugmentConfig()))
    assert readers() == []


def test_rows_that_vanish_from_the_disk_are_one_line(rows, tmp_path):
    streamed = load_one(rows, stream=True, spool=tmp_path)
    (path,) = tmp_path.glob("rows-*/rows.npy")
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    batches = streamed.batches([(0, np.arange(2)), (1, np.arange(11))], 0, AugmentConfig())
    with pytest.raises(ShardError, match=r"rows\.npy: cannot be read \(it ends within row \d+\); delete"):
        list(batches)
    assert readers() == []


@pytest.mark.parametrize("place", [0.3, 0.999])
def test_a_bit_that_flips_on_the_disk_is_one_line_and_not_trained_on(rows, tmp_path, place):
    load_one(rows, stream=True, spool=tmp_path)
    (path,) = tmp_path.glob("rows-*/rows.npy")
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 16
    path.write_bytes(data)
    streamed = load_one(rows, stream=True, spool=tmp_path)
    batches = streamed.batches([(step, np.array([step])) for step in range(11)], 0, AugmentConfig())
    broken = (
        rf"^{path}: row \d+ is not what was written \(its SHA-256 differs\); delete {path.parent} to write it again$"
    )
    with pytest.raises(ShardError, match=broken):
        list(batches)
    assert readers() == []
    shutil.rmtree(path.parent)
    assert len(load_one(rows, stream=True, spool=tmp_path).batch(0, 0, np.arange(11), AugmentConfig()).target) == 11


def test_a_spool_is_found_again_and_its_rows_are_not_decoded_twice(rows, training, tmp_path, monkeypatch):
    load_one(rows, stream=True, spool=tmp_path)
    monkeypatch.setattr(data_module, "packed_rows", lambda *_: pytest.fail("decoded again"))
    assert load_one(rows, stream=True, spool=tmp_path).fingerprint() == training.fingerprint()


def test_a_spool_is_written_again_when_shards_or_scenes_change_and_the_old_one_goes(scenes, training, tmp_path):
    folder, disk = tmp_path / "rows", tmp_path / "spool"
    write(folder / "a.parquet", scenes[:6])
    first = load_one(folder, stream=True, spool=disk)
    (before,) = disk.glob("rows-*")
    write(folder / "a.parquet", scenes)
    assert load_one(folder, stream=True, spool=disk).fingerprint() == training.fingerprint()
    (after,) = disk.glob("rows-*")
    assert after != before
    # The first one still has its file.
    assert len(list(first.batches([(0, np.arange(6))], 0, AugmentConfig()))) == 1
    # The same scenes with other labels.
    write(folder / "a.parquet", [dataclasses.replace(scene, behind=scene.behind[::-1].copy()) for scene in scenes])
    assert load_one(folder, stream=True, spool=disk).fingerprint() == load_one(folder).fingerprint()
    assert load_one(folder).fingerprint() != training.fingerprint()
    fewer = load_one(folder, stream=True, spool=disk, exclude=frozenset(training.order_ids[:3]))
    assert len(fewer) == len(training) - 3 and len(list(disk.glob("rows-*"))) == 1


def test_a_damaged_spool_is_reported_and_written_again(rows, training, tmp_path):
    load_one(rows, stream=True, spool=tmp_path)
    (folder,) = tmp_path.glob("rows-*")
    index = (folder / "index.json").read_text()
    for damage in ("", index[:-9], "[]", index.replace('"digests"', '"other"'), "\xff", None):
        if damage is None:
            (folder / "rows.npy").write_bytes((folder / "rows.npy").read_bytes()[:-1])
        else:
            (folder / "index.json").write_text(damage, encoding="latin-1")
        sets, said = load(rows, stream=True, spool=tmp_path)
        assert sets[POINTS].fingerprint() == training.fingerprint()
        assert "is no whole spool" in said[0] and said[0].endswith("it is written again")


@pytest.mark.parametrize("how", ["full before", "full within", "killed"])
def test_a_spool_is_whole_or_not_there(rows, training, tmp_path, monkeypatch, how):
    if how == "full before":
        monkeypatch.setattr(spool.shutil, "disk_usage", lambda _: type("", (), {"free": 5})())
        with pytest.raises(ShardError, match=r"the spool of .* cannot be written \(0\.00 GB are free there\)"):
            load(rows, stream=True, spool=tmp_path)
        assert list(tmp_path.glob("*rows*")) == []
    elif how == "full within":
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
        try:
            with pytest.raises(ShardError, match=r"cannot be written \(File too large\); it takes"):
                load(rows, stream=True, spool=tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(tmp_path.glob("*rows*")) == []
    else:
        # What a killed process leaves behind.
        (tmp_path / ".rows-0123.tmp").mkdir()
        (tmp_path / ".rows-0123.tmp" / "rows.npy").write_bytes(b"half")
    monkeypatch.undo()
    assert load_one(rows, stream=True, spool=tmp_path).fingerprint() == training.fingerprint()
    assert len(list(tmp_path.glob("*rows*"))) == 1


def test_a_set_goes_to_disk_when_it_takes_more_than_half_of_what_is_free(rows, tmp_path, monkeypatch):
    size = 11 * RowLayout(POINTS, 64).bytes
    for free, resident in ((2 * size, True), (2 * size - 2, False)):
        monkeypatch.setattr(data_module, "free_bytes", lambda _, free=free: free)
        assert load_one(rows, spool=tmp_path).resident == resident
    assert load_one(rows, stream=False).resident
    with pytest.raises(ConfigError, match="too much for cpu; name a folder"):
        load(rows)
    monkeypatch.undo()
    assert data_module.free_bytes(torch.device("cpu")) > 1 << 20


@pytest.mark.parametrize("stream", [False, True])
def test_a_truncated_shard_is_one_line_that_names_it_and_leaves_nothing(scenes, tmp_path, stream):
    write(tmp_path / "rows/a.parquet", scenes[:7])
    write(tmp_path / "rows/b.parquet", scenes[7:])
    path = tmp_path / "rows/a.parquet"
    whole = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(whole[: len(whole) * tenth // 10])
        with pytest.raises(ShardError, match=r"rows/a\.parquet: not a readable Parquet file .*fetch or write it again"):
            load(tmp_path / "rows", stream=stream, spool=tmp_path / "spool")
        assert not list((tmp_path / "spool").glob("*rows*"))
    path.write_bytes(whole)
    assert len(load_one(tmp_path / "rows", stream=stream, spool=tmp_path / "spool")) == 11


def test_a_row_that_breaks_while_a_spool_is_written_leaves_nothing(scenes, tmp_path):
    broken = write_sample(scenes[5])
    broken["data"] = broken["data"][:-100]
    rows = [*(write_sample(scene) for scene in scenes[:5]), broken]
    write_parquet(rows, tmp_path / "a.parquet")
    for stream in (False, True):
        with pytest.raises(SampleError, match="sample made-0-000005"):
            load(tmp_path / "a.parquet", stream=stream, spool=tmp_path / "spool")
        assert not list((tmp_path / "spool").glob("*rows*"))
        # Left out, it is not decoded.
        found = load_one(tmp_path / "a.parquet", stream=stream, spool=tmp_path / "spool", exclude={broken["order_id"]})
        assert len(found) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("points", [None, 20])
def test_batches_on_a_gpu_have_the_bits_of_the_cpu(rows, training, tmp_path, points):
    requests = requests_of(training, 4, 40)
    expected = list(training.batches(requests, 353, RESAMPLED, points))
    for stream in (False, True):
        there = load_one(rows, device="cuda", stream=stream, spool=tmp_path)
        assert there.resident != stream and there.fingerprint() == training.fingerprint()
        if stream:
            # The copies come late: rows that are not waited for would show.
            with torch.cuda.stream(there._store._stream):
                torch.cuda._sleep(50_000_000)
        batches = there.batches(requests, 353, RESAMPLED, points)
        for a in expected:
            # The batch is used late: memory that is given to a later one too early would show.
            torch.cuda._sleep(2_000_000)
            b = next(batches)
            assert {tensor.device.type for tensor in (*b.inputs.values(), *b[1:])} == {"cuda"}
            assert_same(a, b)
        assert next(batches, None) is None
    assert readers() == []


@pytest.mark.gpu
def test_a_set_beyond_the_gpus_memory_says_so(rows, monkeypatch):
    monkeypatch.setattr(RowLayout, "__init__", _huge)
    with pytest.raises(ConfigError, match="do not fit on cuda; keep them on disk with --stream"):
        load(rows, device="cuda", stream=False)


def _huge(self, points, segments):
    self.points, self.segments, self.bytes = points, segments, 1 << 40

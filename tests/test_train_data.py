import dataclasses
import hashlib
import io

import numpy as np
import pytest
import torch

from scenes import random_scene
from train_rows import POINTS, RESAMPLED, assert_same, load, load_one, rows_of, settings, write, write_two
from wireframe import hashing
from wireframe.errors import ConfigError, SampleError, ShardError
from wireframe.fusion import fuse_views
from wireframe.samples import read_sample, write_sample
from wireframe.sampling import sample_points
from wireframe.splits import iter_split_rows
from wireframe.train import data as data_module
from wireframe.train import resident
from wireframe.train.augment import draw_points, scene_hashes, turn, turns
from wireframe.train.config import AugmentConfig
from wireframe.train.data import TrainingSet, set_for
from wireframe.train.made_rows import MadeRows, made_rows


@pytest.fixture(scope="module")
def scenes():
    return made_rows(POINTS, 11)


@pytest.fixture(scope="module")
def rows(scenes, tmp_path_factory):
    return write_two(tmp_path_factory.mktemp("rows"), scenes)


@pytest.fixture(scope="module")
def training(rows):
    return load_one(rows)


def test_the_order_of_files_and_rows_does_not_matter(scenes, training, tmp_path):
    write(tmp_path / "z.parquet", scenes[4::-1])
    write(tmp_path / "a.parquet", scenes[:4:-1])
    again = load_one(tmp_path)
    assert training.order_ids == sorted(training.order_ids) == again.order_ids
    assert again.fingerprint() == training.fingerprint()
    everything = np.arange(len(training))
    assert_same(again.batch(1, 2, everything, AugmentConfig()), training.batch(1, 2, everything, AugmentConfig()))


def test_every_epoch_is_a_permutation_and_pieces_of_it_are_of_any_size(training):
    size = len(training)
    order = training.order(353, 0, 0, 3 * size)
    epochs = order.reshape(3, size)
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order.dtype == np.int64
    pieces = [training.order(353, 0, start, 4) for start in range(0, 3 * size - 4, 4)]
    assert np.array_equal(np.concatenate(pieces), order[: 4 * len(pieces)])
    assert not np.array_equal(training.order(353, 1, 0, size), epochs[0])
    assert not np.array_equal(training.order(354, 0, 0, size), epochs[0])


def test_an_epochs_order_is_that_of_the_hashes_of_its_scenes(training):
    keys = [hashing.scene_key(order_id) for order_id in training.order_ids]
    for epoch, stage in ((0, 0), (1, 2)):
        hashes = hashing.hash64(353, epoch, hashing.EPOCH_ORDER + stage, np.array(keys, dtype=np.uint64))
        found = training.order(353, stage, epoch * len(training), len(training))
        assert found.tolist() == sorted(range(len(keys)), key=lambda i, hashes=hashes: int(hashes[i]))


def test_leaving_scenes_out_keeps_the_order_of_the_others(rows, training):
    gone = frozenset(training.order_ids[1:8:3])
    fewer = load_one(rows, exclude=gone)
    for stage in (0, 1):
        before = [training.order_ids[i] for i in training.order(5, stage, 0, len(training))]
        after = [fewer.order_ids[i] for i in fewer.order(5, stage, 0, len(fewer))]
        assert after == [order_id for order_id in before if order_id not in gone]


@pytest.mark.parametrize("points", [None, 20])
def test_a_scenes_bits_depend_on_seed_step_and_scene_alone(training, points):
    order = np.array([3, 0, 7, 1, 10, 4, 2])
    whole = training.batch(353, 9, order, RESAMPLED, points)
    for parts in ([0], [3, 1], [6, 5, 4, 2, 1, 0, 3], [2, 2]):
        assert_same(training.batch(353, 9, order[parts], RESAMPLED, points), rows_of(whole, parts))
    for other in (training.batch(353, 10, order, RESAMPLED, points), training.batch(1, 9, order, RESAMPLED, points)):
        assert not torch.equal(other.inputs["xyz_norm"], whole.inputs["xyz_norm"])


def test_a_batch_holds_the_rows_as_they_are_stored(scenes, training):
    batch = training.batch(0, 0, np.arange(len(scenes)), AugmentConfig(rotate=False, flip=False))
    by_id = {scene.order_id: scene for scene in scenes}
    for i, order_id in enumerate(training.order_ids):
        scene = by_id[order_id]
        for name, tensor in batch.inputs.items():
            stored = getattr(scene, name)
            assert tensor[i].numpy().dtype == stored.dtype and np.array_equal(tensor[i].numpy(), stored), name
        count = len(scene.gt_segments)
        assert np.array_equal(batch.target[i, :count].numpy(), scene.gt_segments)
        assert not batch.target[i, count:].any()
        assert batch.target_mask[i].tolist() == [True] * count + [False] * (64 - count)
    assert batch.scene_keys.numpy().tolist() == hashing.key_bits(training.order_ids).tolist()


def test_rows_come_to_the_device_in_pieces(monkeypatch):
    # Scenes that no other test packs, for memory may still hold what was packed before.
    scenes, everything = made_rows(POINTS, 11, seed=2), np.arange(11)
    monkeypatch.setattr(resident, "_CHUNK_ROWS", 4)
    pieces = TrainingSet.from_scenes(scenes, 64).batch(0, 0, everything, AugmentConfig())
    monkeypatch.undo()
    assert_same(pieces, TrainingSet.from_scenes(scenes, 64).batch(0, 0, everything, AugmentConfig()))


def test_augmentation_turns_points_and_segments_alike_about_y(training):
    everything = np.arange(len(training))
    plain = training.batch(353, 3, everything, AugmentConfig(rotate=False, flip=False))
    moved = training.batch(353, 3, everything, AugmentConfig())
    assert torch.equal(plain.inputs["xyz_norm"][..., 1], moved.inputs["xyz_norm"][..., 1])
    # Distances between points and segment ends do not change when both are moved alike.
    before, after = (
        torch.cdist(batch.inputs["xyz_norm"].double(), batch.target.flatten(1, 2).double()) for batch in (plain, moved)
    )
    assert torch.allclose(before, after, rtol=0, atol=1e-6) and not torch.allclose(plain.target, moved.target)
    assert torch.equal(plain.target_mask, moved.target_mask)


def test_a_turn_is_the_rotation_of_the_draw_behind_the_flip(training):
    keys = hashing.key_bits(training.order_ids)
    for seed, step in ((353, 0), (-1, 169_999)):
        found = turns(seed, step, keys, AugmentConfig())
        xyz = torch.rand(len(keys), 5, 3)
        for key, coefficients, before, after in zip(keys, found, xyz, turn(xyz, found)):
            angle, coin = hashing.uniform(seed, int(key), hashing.AUGMENTATION + step, 2)
            mirror = -1.0 if coin < 0.5 else 1.0
            c, s = np.cos(2 * np.pi * angle), np.sin(2 * np.pi * angle)
            np.testing.assert_allclose(coefficients, [c * mirror, s, -s * mirror, c], rtol=1e-7)
            rotation = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]) @ np.diag([mirror, 1, 1])
            np.testing.assert_allclose(after, before.double().numpy() @ rotation.T, atol=2e-7)


def test_flip_alone_mirrors_about_half_the_scenes(training):
    keys = hashing.key_bits(training.order_ids)
    found = torch.cat([turns(1, step, keys, AugmentConfig(rotate=False)) for step in range(40)])
    mirrored = found[:, 0] < 0
    assert 0.4 < mirrored.float().mean() < 0.6
    assert torch.equal(found[:, 0].abs(), torch.ones(len(found))) and torch.equal(found[:, 3], torch.ones(len(found)))
    assert not found[:, 1:3].any()


@pytest.mark.parametrize("seed, stream", [(0, 0), (-3, hashing.RESAMPLE + 7), ((1 << 64) - 1, (1 << 63) + 5)])
def test_hashes_of_many_scenes_are_those_of_each(seed, stream):
    keys = hashing.key_bits(["a", "b", "c", "d"])
    assert (keys < 0).any() and (keys > 0).any()
    found = scene_hashes(seed, torch.from_numpy(keys), stream, 9).numpy().view(np.uint64)
    for key, row in zip(keys, found):
        assert np.array_equal(row, hashing.hash64(seed, int(key), stream, np.arange(9)))


def test_points_are_drawn_by_the_smallest_hashes_and_padded():
    rng = np.random.default_rng(0)
    mask = rng.random((6, 50)) < 0.8
    mask[3, :] = False
    mask[4, 5:] = False
    mask[5] = True
    keys = hashing.key_bits(list("abcdef"))
    for step, count in ((0, 20), (1, 20), (5, 1), (5, 50)):
        index, kept = draw_points(7, step, torch.from_numpy(keys), torch.from_numpy(mask), count)
        assert index.shape == kept.shape == (6, count)
        for key, valid, chosen, real in zip(keys, mask, index.numpy(), kept.numpy()):
            there = np.flatnonzero(valid)
            hashes = hashing.hash64(7, int(key), hashing.RESAMPLE + step, there)
            expected = there[hashing.smallest(hashes, count)]
            assert real.tolist() == [True] * len(expected) + [False] * (count - len(expected))
            assert np.array_equal(chosen[: len(expected)], expected)
            if len(expected):
                assert (chosen[len(expected) :] == expected[-1]).all()


def test_a_draw_takes_every_array_of_the_same_points_and_differs_by_step(scenes, training):
    plain = AugmentConfig(rotate=False, flip=False, resample=True)
    everything = np.arange(len(training))
    whole = training.batch(353, 0, everything, plain)
    drawn = training.batch(353, 4, everything, plain, points=20)
    keys, mask = whole.scene_keys, whole.inputs["mask"]
    index, kept = draw_points(353, 4, keys, mask, 20)
    for name, tensor in drawn.inputs.items():
        for i in range(len(training)):
            stored = whole.inputs[name][i][index[i]]
            assert torch.equal(tensor[i], kept[i] if name == "mask" else stored), name
    assert torch.equal(drawn.target, whole.target)
    other = training.batch(353, 5, everything, plain, points=20)
    assert not torch.equal(other.inputs["xyz_norm"], drawn.inputs["xyz_norm"])
    assert_same(training.batch(353, 4, everything, plain, points=POINTS), whole)


def test_a_scene_with_fewer_points_than_are_drawn_is_padded_and_masked(scenes):
    few = dataclasses.replace(scenes[0], mask=np.arange(POINTS) % 10 == 1)
    plain = AugmentConfig(rotate=False, flip=False, resample=True)
    batch = TrainingSet.from_scenes([few], 64).batch(353, 4, np.arange(1), plain, points=20)
    assert batch.inputs["mask"][0].tolist() == [True] * 4 + [False] * 16
    expected = few.xyz_norm[[1, 11, 21, *[31] * 17]]
    assert np.array_equal(batch.inputs["xyz_norm"][0].numpy(), expected)


@pytest.mark.parametrize("points, augment, message", [
    (20, AugmentConfig(), "a stage of 20 points cannot use rows of 32; augment.resample=true would draw them"),
    (40, RESAMPLED, "a stage of 40 points cannot use rows of 32$"),
])  # fmt: skip
def test_a_stage_of_another_number_of_points_is_refused_at_once(training, points, augment, message):
    with pytest.raises(ConfigError, match=message):
        training.batch(0, 0, np.arange(2), augment, points)
    with pytest.raises(ConfigError, match=message):
        training.batches([], 0, augment, points)


@pytest.mark.parametrize("stage, available, resample, expected", [
    (32, [64, 32, 128], False, 32), (32, [64, 32], True, 32), (32, [128, 64, 16], True, 64),
    (32, [128, 64], False, None), (32, [16], True, None), (32, [], True, None),
])  # fmt: skip
def test_a_stage_takes_its_own_set_or_draws_from_the_next_larger(stage, available, resample, expected):
    assert set_for(stage, available, resample) == set_for(stage, iter(available), resample) == expected


def test_dev_val_of_every_set_is_left_out_of_all_and_the_overlap_is_said(tmp_path):
    small, large = made_rows(POINTS, 12), made_rows(2 * POINTS, 10)
    write(tmp_path / "small/a.parquet", small)
    write(tmp_path / "large/a.parquet", large)
    sets, said = load(tmp_path / "small", tmp_path / "large", config=settings(dev_val=4))
    ids = [scene.order_id for scene in small]
    assert sets[POINTS].order_ids == sets[2 * POINTS].order_ids == ids[:6]
    assert said[0] == (
        f"dev-val: the last 4 of 12 rows of {tmp_path}/small and the last 4 of 10 rows of {tmp_path}/large; "
        "2 scenes in common, 6 left out of every set"
    )
    assert f"{tmp_path}/small: 6 scenes of 32 points on cpu" in said[1]
    # Without dev val nothing is said of it.
    assert len(load(tmp_path / "small")[1]) == 1


def test_excluded_scenes_are_counted_and_dev_val_keeps_its_own(scenes, rows):
    ids = [scene.order_id for scene in scenes]
    sets, said = load(rows, config=settings(dev_val=3), exclude=frozenset([ids[0], ids[10], "nowhere", "else"]))
    found = sets[POINTS]
    assert found.order_ids == ids[1:8]
    assert said[0] == f"dev-val: the last 3 of 11 rows of {rows}"
    assert said[1] == "excluded: 2 of the 4 listed scenes are in the data"


@pytest.mark.parametrize("changes, exclude, message", [
    ({"dev_val": 11}, 0, "no scene left to train on: of 11 rows 11 are dev-val and 0 excluded; lower dev_val"),
    ({"dev_val": 3}, 8, "of 11 rows 3 are dev-val and 8 excluded"),
    ({"model": {"segments": 2}}, 0, "none of 11 has 1 to 2 edges; raise model.segments"),
])  # fmt: skip
def test_a_set_with_nothing_left_says_why(scenes, rows, tmp_path, changes, exclude, message):
    gone = frozenset(scene.order_id for scene in scenes[:exclude])
    for stream in (False, True):
        with pytest.raises(SampleError, match=message):
            load(rows, config=settings(**changes), exclude=gone, stream=stream, spool=tmp_path)


def test_an_empty_set_says_so(tmp_path):
    write(tmp_path / "a.parquet", [])
    with pytest.raises(SampleError, match="has no rows; make some with `wireframe prepare`"):
        load(tmp_path)


def test_scenes_without_edges_or_with_too_many_are_left_out(scenes, rows):
    counts = {scene.order_id: len(scene.gt_segments) for scene in scenes}
    sets, said = load(rows, config=settings(model={"segments": 10}))
    expected = sorted(order_id for order_id, count in counts.items() if count <= 10)
    assert 0 < len(expected) < 11 and sets[POINTS].order_ids == expected
    assert said == [
        f"{rows}: {len(expected)} scenes of 32 points on cpu (0.00 GB); "
        f"{11 - len(expected)} more do not have 1 to 10 edges"
    ]
    assert sets[POINTS].batch(0, 0, np.arange(2), AugmentConfig()).target.shape == (2, 10, 2, 3)


def test_only_train_shards_of_the_hubs_layout_are_trained_on(scenes, tmp_path):
    names = ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001")
    for name, part in zip(names, (scenes[:4], scenes[4:7], scenes[7:9], scenes[9:])):
        write(tmp_path / "data" / f"{name}.parquet", part)
    sets, said = load(tmp_path, config=settings(dev_val=2))
    ids = [scene.order_id for scene in scenes]
    # What is left out is what is scored, across shards.
    assert sets[POINTS].order_ids == ids[:5]
    assert [row["order_id"] for row in iter_split_rows(tmp_path, "dev-val", 2)] == ids[5:7]
    sets, _ = load(tmp_path, config=settings(dev_val=5))
    assert sets[POINTS].order_ids == ids[:2]
    assert [row["order_id"] for row in iter_split_rows(tmp_path, "dev-val", 5)] == ids[2:7]
    assert not any("warning" in line for line in said)
    with pytest.raises(ShardError, match="no shard of the train split"):
        load(tmp_path / "data/validation-00000-of-00001.parquet")
    (tmp_path / "data/train-00001-of-00002.parquet").unlink()
    _, said = load(tmp_path)
    assert said[0].startswith(f"warning: {tmp_path} lacks the shard {tmp_path}/data/train-00001-of-00002;")
    assert len(load(tmp_path / "data/train-00000-of-00002.parquet")[1]) == 1


def test_rows_of_different_sizes_are_refused(scenes, tmp_path):
    write(tmp_path / "a.parquet", [*scenes[:3], *made_rows(16, 1, seed=1)])
    for stream in (False, True):
        with pytest.raises(SampleError, match="one number of points, found 32 and, in scene made-1-000000, 16"):
            load(tmp_path / "a.parquet", stream=stream, spool=tmp_path / "spool")
    with pytest.raises(SampleError, match="one number of points"):
        TrainingSet.from_scenes([*scenes[:1], *made_rows(16, 1)], 64)


def test_two_sets_of_one_size_are_refused_before_they_are_read(rows, monkeypatch):
    monkeypatch.setattr(data_module, "packed_rows", lambda *_: pytest.fail("read"))
    with pytest.raises(ConfigError, match="two --data have rows of 32 points"):
        load(rows, MadeRows(POINTS, 3))


def test_a_scene_that_is_there_twice_is_refused(scenes, tmp_path):
    write(tmp_path / "a.parquet", scenes)
    write(tmp_path / "b.parquet", scenes[3:4])
    with pytest.raises(SampleError, match="holds the scene made-0-000003 2 times"):
        load(tmp_path)


def test_the_fingerprint_is_of_every_value_that_is_trained_on(scenes, training):
    assert TrainingSet.from_scenes(scenes[::-1], 64).fingerprint() == training.fingerprint()
    for name in (*training.batch(0, 0, np.arange(1), AugmentConfig()).inputs, "gt_segments"):
        other = read_sample(write_sample(scenes[2]))
        array = getattr(other, name)
        array.reshape(-1).view(np.uint8)[-1] ^= 1
        changed = TrainingSet.from_scenes([*scenes[:2], other, *scenes[3:]], 64)
        assert changed.fingerprint() != training.fingerprint(), name
    assert TrainingSet.from_scenes(scenes[:10], 64).fingerprint() != training.fingerprint()


def test_fused_scenes_train_too(tmp_path):
    found = [sample_points(fuse_views(random_scene(i), 50), POINTS) for i in range(3)]
    write(tmp_path / "a.parquet", found)
    batch = load_one(tmp_path).batch(0, 0, np.arange(3), AugmentConfig())
    assert batch.target_mask.sum() == 12


def test_a_set_comes_from_the_hub(scenes, training, tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    write(tmp_path / "a.parquet", scenes)
    files = {
        "datasets/o/rows/data/train-00000-of-00001.parquet": (tmp_path / "a.parquet").read_bytes(),
        "datasets/o/rows/data/validation-00000-of-00001.parquet": b"never read",
    }

    class Files:
        def isfile(self, path):
            return path.removeprefix("hf://") in files

        def glob(self, pattern):
            return [path for path in files if path.startswith(pattern.removeprefix("hf://").removesuffix("**"))]

        def open(self, path, mode):
            return io.BytesIO(files[path.removeprefix("hf://")])

        def info(self, path):
            data = files[path.removeprefix("hf://")]
            return {"size": len(data), "blob_id": hashlib.sha1(data).hexdigest(), "lfs": None}

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Files)
    for stream in (False, True, True):
        found = load_one("hf://datasets/o/rows", stream=stream, spool=tmp_path)
        assert found.fingerprint() == training.fingerprint()
    (before,) = tmp_path.glob("rows-*")
    write(tmp_path / "a.parquet", scenes[:5])
    files["datasets/o/rows/data/train-00000-of-00001.parquet"] = (tmp_path / "a.parquet").read_bytes()
    assert len(load_one("hf://datasets/o/rows", stream=True, spool=tmp_path)) == 5
    assert not before.exists()

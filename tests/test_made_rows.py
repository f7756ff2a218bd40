import hashlib

import numpy as np

from train_rows import POINTS, load, load_one, settings
from wireframe.samples import read_sample, write_sample
from wireframe.train.data import TrainingSet
from wireframe.train.made_rows import MadeRows, made_rows
from wireframe.train.sources import open_source


def test_made_rows_are_sampled_rows_with_the_same_bits_everywhere():
    scenes = made_rows(256, 40)
    digest = hashlib.sha256()
    for scene in scenes:
        again = read_sample(write_sample(scene))
        for name, array in scene.arrays().items():
            stored = again.arrays()[name]
            assert np.array_equal(stored, array) and stored.dtype == np.asarray(array).dtype, name
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        assert 6 <= len(scene.gt_edges) <= 20 and len(np.unique(scene.gt_edges, axis=0)) == len(scene.gt_edges)
        assert (scene.gt_edges[:, 0] != scene.gt_edges[:, 1]).all()
        real = scene.xyz_norm[scene.mask]
        assert len(real) >= 256 * 7 // 8 and (scene.xyz_norm[~scene.mask] == real[-1]).all()
        ends = scene.gt_segments.reshape(-1, 3)
        assert (ends >= real.min(0) - 1e-6).all() and (ends <= real.max(0) + 1e-6).all()
    assert digest.hexdigest() == "734ba07d7c0b584d0083774585fc5d5376f75642ba06af484e239476ce2f7634"


def test_made_scenes_do_not_depend_on_the_points_or_on_each_other():
    few, many = made_rows(32, 5), made_rows(64, 8)
    assert [scene.order_id for scene in few] == [scene.order_id for scene in many[:5]]
    assert all(np.array_equal(a.gt_segments, b.gt_segments) for a, b in zip(few, many))
    assert not np.array_equal(few[0].gt_vertices[:5], made_rows(32, 1, seed=1)[0].gt_vertices[:5])
    assert len(np.unique([scene.gt_vertices[0] for scene in many], axis=0)) == 8


def test_made_rows_are_a_source_of_their_own(tmp_path):
    training = TrainingSet.from_scenes(made_rows(POINTS, 11), 64)
    for stream in (False, True):
        sets, said = load(MadeRows(POINTS, 11), MadeRows(16, 7), stream=stream, spool=tmp_path)
        assert sets.keys() == {POINTS, 16} and sets[POINTS].source is None
        assert sets[POINTS].fingerprint() == training.fingerprint()
        assert said[1].startswith("made rows of 16 points: 7 scenes")
    assert len(list(tmp_path.glob("rows-*"))) == 2
    held = load_one(MadeRows(POINTS, 11), config=settings(dev_val=2))
    assert held.order_ids == training.order_ids[:9]
    assert open_source(MadeRows(POINTS, 11)).dev_val_ids(2) == ["made-0-000009", "made-0-000010"]

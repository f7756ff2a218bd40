import hashlib

import numpy as np
import pytest

from wireframe import hashing

MASK = (1 << 64) - 1
PINNED = [2501206744874035420, 5583708567384437884]


def hash_in_plain_integers(seed, scene, stream, index):
    golden = 0x9E3779B97F4A7C15

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    key = seed & MASK
    key = mix((key + golden) & MASK)
    key = mix(((key ^ (scene & MASK)) + golden) & MASK)
    key = mix(((key ^ (stream & MASK)) + golden) & MASK)
    return mix((key + (index + 1) * golden) & MASK)


@pytest.mark.parametrize("seed, scene, stream", [(0, 0, 0), (353, (1 << 64) - 1, hashing.SAMPLING), (-1, 5, 1 << 40)])
def test_hash_equals_the_formula_in_plain_integers(seed, scene, stream):
    index = np.array([0, 1, 2, 1000, (1 << 40) + 7])
    expected = [hash_in_plain_integers(seed, scene, stream, int(i)) for i in index]
    assert hashing.hash64(seed, scene, stream, index).tolist() == expected


def test_the_first_hash_of_key_zero_is_pinned():
    # A change of this number changes every sampled row ever written.
    assert int(hashing.hash64(0, 0, 0, np.array([0]))[0]) == hash_in_plain_integers(0, 0, 0, 0)
    assert hashing.hash64(0, hashing.scene_key("scene"), hashing.SAMPLING, np.arange(2)).tolist() == PINNED


def test_scene_key_is_the_start_of_sha256():
    assert hashing.scene_key("abc") == int(hashlib.sha256(b"abc").hexdigest()[:16], 16)


def test_smallest_takes_k_smallest_with_ties_to_the_lower_position():
    hashes = np.array([5, 1, 5, 0, 5, 9], dtype=np.uint64)
    assert hashing.smallest(hashes, 3).tolist() == [0, 1, 3]
    assert hashing.smallest(hashes, 4).tolist() == [0, 1, 2, 3]
    assert hashing.smallest(hashes, 0).tolist() == []
    assert hashing.smallest(hashes, 99).tolist() == list(range(6))


def test_uniform_has_the_right_moments():
    u = hashing.uniform(1, 2, 3, 20000)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.003


def test_streams_of_one_scene_do_not_share_numbers():
    streams = [hashing.depth_pixels(0), hashing.depth_pixels(1), hashing.SAMPLING, hashing.CENTRE_SCALE]
    drawn = np.concatenate([hashing.hash64(0, 1, stream, np.arange(1000)) for stream in streams])
    assert len(np.unique(drawn)) == len(drawn)

"""Counter-based randomness: one 64-bit hash of what a thing is, never of when it is drawn.

``hash64(seed, scene, stream, index)`` folds the first three into a key and reads the SplitMix64 sequence
(Steele, Lea, Flood 2014) of that key at position ``index``. Everything random in fusion, sampling, augmentation and
the synthetic scenes comes from here, so the same scene gives the same bits in any process, order or batch.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

# Streams: one per use, so that two uses of one scene never share numbers. The low 32 bits are free for a sub-index.
SAMPLING = 2 << 32
CENTRE_SCALE = 3 << 32
AUGMENTATION = 4 << 32
EPOCH_ORDER = 5 << 32
SYNTH = 6 << 32
DROPOUT = 7 << 32
RESAMPLE = 8 << 32


def depth_pixels(view: int) -> int:
    """The stream that draws depth pixels of the view at position ``view`` of the raw row."""
    return (1 << 32) + view


def scene_key(order_id: str) -> int:
    """The first 8 bytes, big-endian, of the SHA-256 of the scene's id in UTF-8."""
    return int.from_bytes(hashlib.sha256(order_id.encode()).digest()[:8], "big")


def key_bits(order_ids: Sequence[str]) -> np.ndarray:
    """int64 [B], the bits of every scene's key: tensors know no uint64 that operations take."""
    return np.array([scene_key(order_id) for order_id in order_ids], dtype=np.uint64).view(np.int64)


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def key(*parts: int) -> int:
    """Seed, scene and stream, each modulo 2^64, folded into one key: where their SplitMix64 sequence begins."""
    folded = 0
    for part in parts:
        # NumPy's integers would overflow.
        folded = _mix_int(((folded ^ (operator.index(part) & _MASK)) + _GOLDEN) & _MASK)
    return folded


def hash64(seed: int, scene: int, stream: int, index: np.ndarray) -> np.ndarray:
    """uint64 hashes of (seed, scene, stream, index).

    Args:
        seed, scene, stream: integers, taken modulo 2^64; ``scene`` is usually ``scene_key(order_id)``.
        index: integer array of any shape, non-negative.
    """
    x = np.asarray(index).astype(np.uint64)
    with np.errstate(over="ignore"):
        x = np.uint64(key(seed, scene, stream)) + (x + np.uint64(1)) * np.uint64(_GOLDEN)
        x ^= x >> np.uint64(30)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(27)
        x *= np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return x


def smallest(hashes: np.ndarray, k: int) -> np.ndarray:
    """Positions of the ``k`` smallest of ``hashes`` [n] (ties to the lower position), in ascending position."""
    n = hashes.shape[0]
    if k >= n:
        return np.arange(n)
    if k <= 0:
        return np.zeros(0, dtype=np.int64)
    bound = np.partition(hashes, k - 1)[k - 1]
    chosen = hashes < bound
    ties = np.flatnonzero(hashes == bound)
    chosen[ties[: k - int(chosen.sum())]] = True
    return np.flatnonzero(chosen)


def uniform(seed: int, scene: int, stream: int, n: int) -> np.ndarray:
    """float64 [n], uniform in [0, 1): the top 53 bits of each hash."""
    return (hash64(seed, scene, stream, np.arange(n)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generator(seed: int, scene: int, stream: int) -> np.random.Generator:
    """A NumPy generator keyed like ``hash64``, for code that wants many kinds of draws in a fixed order."""
    return np.random.Generator(np.random.Philox(key=key(seed, scene, stream)))

"""Instructions of ``wireframe._C`` for one call of each operation, counted by callgrind.

The operations are called through the package on a scene made of hashes; what reaches the module is recorded, and
``guard_replay`` repeats it under valgrind. Instructions of the module itself are counted, not those of the libraries
that it calls (libc, libstdc++, Python): these differ from one machine to the next. So a loop that calls malloc shows
by its call, not by what malloc does.
"""

from __future__ import annotations

import math
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from wireframe import merging
from wireframe.bench import guard_replay
from wireframe.bench.guard_values import Counted, Figures, NotComparable
from wireframe.classes import ADE_ID, GESTALT_COLORS, GESTALT_ID, UNKNOWN, colors_to_ids
from wireframe.errors import WireframeError, one_line
from wireframe.hashing import hash64
from wireframe.kernels import native, norms_native, ops
from wireframe.kernels.points3d import parse_points3d_binary
from wireframe.scene import Scene, View
from wireframe.scene_batch import SceneBatch

Call = tuple[str, Sequence[Any]]

# Under which pybind11 calls what it binds.
_ENTRY = "pybind11::cpp_function::dispatcher*"
_HOW = {"impl": "native", "threads": 1}
_WIDTH, _HEIGHT, _BLOCK = 256, 192, 16


def made_with() -> dict[str, Any]:
    """The compiler of the module, and whether the processor has the instructions that the module asks for."""
    if shutil.which("valgrind") is None:
        raise NotComparable("valgrind is not installed; run: apt-get install valgrind")
    reason = native.problem()
    if reason:
        raise NotComparable(reason)
    avx2 = "avx2" in Path("/proc/cpuinfo").read_text().split()
    return {"machine": platform.machine(), "compiler": native.module().compiler, "avx2": avx2}


def measure() -> Figures:
    """Instructions of every call of ``calls``."""
    made = calls()
    return {name: {"instructions": n} for name, n in zip(made, count(list(made.values())))}


def count(made: Sequence[Call]) -> list[int]:
    """Instructions of the module in each of some calls.

    Raises:
        WireframeError: valgrind fails, or the calls cannot be told apart.
    """
    with tempfile.TemporaryDirectory(prefix="wireframe-guard-") as folder:
        guard_replay.write(folder, made)
        module = native.module().__file__
        command = [
            "valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/profile", "--compress-strings=no",
            "--compress-pos=no", "--collect-atstart=no", f"--toggle-collect={_ENTRY}", "--dump-after=getppid",
            sys.executable, "-I", "-S", guard_replay.__file__, module, folder,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise WireframeError(f"valgrind failed: {one_line(done.stderr[-300:])}")
        # The first one ends before the first call; the last is of the end of the process.
        profiles = sorted(Path(folder).glob("profile.*"), key=lambda path: int(path.suffix[1:]))[1:]
        counts = [_own(path.read_text(errors="replace"), module) for path in profiles]
    if len(counts) != len(made) or not all(counts):
        raise WireframeError(f"callgrind told {sum(map(bool, counts))} calls apart, of {len(made)}")
    return counts


def _own(profile: str, module: str) -> int:
    """Sum of the costs in a profile of callgrind that are of the module's own functions (its format: cl-format)."""
    total, ours, of_callee = 0, False, False
    for line in profile.splitlines():
        if line.startswith("ob="):
            ours = line[3:] == module
        elif line.startswith("calls="):
            # The next line is what the called function took.
            of_callee = True
        elif line[:1].isdigit():
            if ours and not of_callee:
                total += int(line.split()[1])
            of_callee = False
    return total


class Recorder:
    """Stands for the compiled module; ``calls`` holds what it is called with, as it was before the call."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._module = native.module()

    def __getattr__(self, name: str):
        def recorded(*arguments):
            self.calls.append((name, [_copy(argument) for argument in arguments]))
            return getattr(self._module, name)(*arguments)

        return recorded


def _copy(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(map(_copy, argument))
    return argument.copy() if isinstance(argument, np.ndarray) else argument


def calls() -> dict[str, Call]:
    """A call of each operation of the module, by name; ``portable``: without AVX2."""
    found: dict[str, Call] = {}
    recorder = Recorder()
    with mock.patch.object(native, "module", lambda name="_C": recorder):
        for label in _operations():
            (call,), recorder.calls = recorder.calls, []
            found[label or call[0]] = call
    for name in ("vote_labels", "farthest_point_sample"):
        operation, arguments = found[name]
        found[f"{name}, portable"] = (operation, [*arguments, False])
    return found


def _operations() -> Iterator[str]:
    """Does one operation after another; what to call it where the name is not enough."""
    batch = SceneBatch.from_scenes([_scene(0), _scene(1)])
    mask = ops.house_mask(batch, **_HOW)
    yield ""
    limits = ops.clip_limits(batch, **_HOW)
    yield ""
    ops.depth_points(batch, mask, limits, 2000, **_HOW)
    yield ""
    votes = ops.vote_labels(batch, batch.points, batch.point_offsets, **_HOW)
    yield ""
    ops.vote_labels(batch, batch.points, batch.point_offsets, zbuffer=0.05, **_HOW)
    yield "vote_labels, z-buffer"
    group, _ = ops.point_tiers(votes.visible_src, votes.visible_id, votes.behind, **_HOW)
    yield ""
    source = torch.from_numpy((_draw(9, len(batch.points)) % 3 > 0).astype(np.uint8))
    ragged = (group >= 0, batch.point_offsets, batch.keys)
    ops.centre_and_scale(batch.points, source, *ragged, **_HOW)
    yield ""
    ops.priority_sample(source, group, *ragged, 2000, **_HOW)
    yield ""
    ops.farthest_point_sample(batch.points, 400, **_HOW)
    yield ""
    priority = torch.from_numpy(_draw(10, len(batch.points)).view(np.int64))
    ops.voxel_sample(batch.points, 0.4, priority, **_HOW)
    yield ""
    merging.merge_vertices(_box(11, 600), _draw(12, 1200).reshape(-1, 2) % 600, (0.2, 0.4), impl="native")
    yield ""
    colors_to_ids(np.array(list(GESTALT_COLORS.values()), dtype=np.uint8)[_blocks(13, _house_ids())], "gestalt", **_HOW)
    yield ""
    ops.parse_points3d(_text_of(_box(14, 4000)), **_HOW)
    yield ""
    parse_points3d_binary(_binary_of(_box(15, 16000)), impl="native")
    yield ""
    yield from _model_operations()


def _model_operations() -> Iterator[str]:
    x, branch, weight = _floats(16, 2048, 128), _floats(17, 2048, 128), _floats(18, 128)
    normed = ops.residual_norm(x, branch, weight.requires_grad_(), impl="native").normed
    yield "rms_norm"
    normed.backward(x)
    yield ""
    heads, log_scale = _floats(19, 1, 2048, 4, 32).requires_grad_(), _floats(20, 4)
    units = norms_native.unit_heads(heads, log_scale, mask=torch.from_numpy(_draw(21, 2048) % 8 > 0)[None])
    yield ""
    units.backward(units)
    yield "unit_heads, backward"


def _scene(number: int) -> Scene:
    """Four views around points in a box: label maps in blocks, depth maps of their size, half of it, and none."""
    views = []
    # Cosines and sines that are exact, so that no library decides on a last bit.
    for index, (cosine, sine) in enumerate(((1.0, 0.0), (0.8, 0.6), (0.6, 0.8), (0.0, 1.0))):
        stream = 100 * number + 10 * index
        R = np.array([[cosine, 0, -sine], [0, 1, 0], [sine, 0, cosine]], dtype=np.float32)
        K = np.array([[_WIDTH, 0, _WIDTH / 2], [0, _WIDTH, _HEIGHT / 2], [0, 0, 1]], dtype=np.float32)
        ade = _blocks(stream + 20, [ADE_ID[name] for name in ("house", "wall", "tree", "sky")])
        gestalt = _blocks(stream + 21, [*_house_ids(), GESTALT_ID["unclassified"], UNKNOWN])
        shape = (_HEIGHT, _WIDTH) if index < 2 else (_HEIGHT // 2, _WIDTH // 2)
        depth = (3000 + _draw(stream + 22, shape[0] * shape[1]) % 9000).astype(np.uint16).reshape(shape)
        depth[depth % 5 == 0] = 0
        t = np.array([0, 0, 9], dtype=np.float32)
        views.append(View(f"view {index}", index, K, R, t, ade, gestalt, depth if index < 3 else None))
    ends = np.zeros((0, 3), np.float32), np.zeros((0, 2), np.int64), np.zeros(0, np.int64)
    return Scene(f"guard {number}", tuple(views), _box(number, 4000).astype(np.float32), *ends, dropped=())


def _house_ids() -> list[int]:
    return [GESTALT_ID[name] for name in ("roof", "apex", "ridge", "eave", "window", "brick")]


def _draw(stream: int, number: int) -> np.ndarray:
    """uint64 [number], hashes."""
    return hash64(0, 0, stream, np.arange(number))


def _box(stream: int, number: int) -> np.ndarray:
    """float64 [number, 3], within 3 of the origin."""
    return (_draw(stream, 3 * number) >> np.uint64(11)).reshape(-1, 3) * (6 * 2.0**-53) - 3


def _floats(stream: int, *shape: int) -> torch.Tensor:
    """float32 of a shape, within 3 of 0."""
    size = math.prod(shape)
    return torch.from_numpy(_box(stream, -(-size // 3)).astype(np.float32)).flatten()[:size].view(shape)


def _blocks(stream: int, ids: Sequence[int]) -> np.ndarray:
    """uint8 [H, W], blocks of one of the ids."""
    rows, columns = _HEIGHT // _BLOCK, _WIDTH // _BLOCK
    chosen = np.array(ids, dtype=np.uint8)[_draw(stream, rows * columns) % len(ids)]
    return chosen.reshape(rows, columns).repeat(_BLOCK, 0).repeat(_BLOCK, 1)


def _text_of(points: np.ndarray) -> bytes:
    """A points3D.txt."""
    lines = [f"{i} {x!r} {y!r} {z!r} 90 90 90 0.5 1 {i}" for i, (x, y, z) in enumerate(points.tolist())]
    return "\n".join(["# points", *lines, ""]).encode()


def _binary_of(points: np.ndarray) -> bytes:
    """A points3D.bin whose points are seen once."""
    rows = [struct.pack("<Q3d3BdQ2I", i, *xyz, 90, 90, 90, 0.5, 1, 1, i) for i, xyz in enumerate(points.tolist())]
    return struct.pack("<Q", len(rows)) + b"".join(rows)


EXTENSION = Counted("extension", made_with, measure, tolerance=0.01)

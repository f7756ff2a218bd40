"""Whether two checkpoints hold the same bits, and if not, where they part."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from wireframe.checkpoint import tensor_sha256
from wireframe.errors import one_line
from wireframe.train.checkpoints import Stored, read

# What of a run's state is part of the bits, besides the tensors.
_STATE = ("step", "bad_steps")
_LISTED = 8


class Difference(NamedTuple):
    """Where two checkpoints part.

    name: section and tensor, as "model segmenter.conf_head.bias". what: one line. largest: the largest absolute
    difference between two values; inf where one of them alone is not finite; None where values cannot be compared.
    """

    name: str
    what: str
    largest: float | None = None


class Comparison(NamedTuple):
    """Of checkpoints ``a`` and ``b``, given by their paths.

    compared: number of tensors compared, by section ("model", "optimizer"). differing: in the order of the names, the
    model before the optimiser. uncompared: a line for each section that one of them has alone. hashes_a, hashes_b:
    SHA-256 by section.
    """

    a: str
    b: str
    compared: dict[str, int]
    differing: tuple[Difference, ...]
    uncompared: tuple[str, ...]
    hashes_a: dict[str, str]
    hashes_b: dict[str, str]

    @property
    def equal(self) -> bool:
        """Whether everything that both have agrees bit for bit."""
        return not self.differing


def compare(a: str | os.PathLike, b: str | os.PathLike) -> Comparison:
    """Compares two checkpoints tensor by tensor, by their bits: NaNs are equal where their bits are, 0.0 is not -0.0.

    Args:
        a, b: checkpoint folders of runs, runs (their newest valid checkpoint), model folders, safetensors files or
            published ``.pt``, in any combination. The optimiser is compared where both have one.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    return compare_stored(read(a), read(b))


def compare_stored(a: Stored, b: Stored) -> Comparison:
    """``compare`` of what is already read."""
    differing = _compare_states(a.state, b.state)
    compared, uncompared = {}, []
    for section in ("model", "optimizer"):
        if section in a.tensors and section in b.tensors:
            compared[section] = len(a.tensors[section].keys() & b.tensors[section].keys())
            differing += _compare_sections(section, a.tensors[section], b.tensors[section])
        elif section in a.tensors or section in b.tensors:
            owner = a if section in a.tensors else b
            uncompared.append(f"only {owner.path} has the tensors of the {section}: not compared")
    hashes = [{name: tensor_sha256(tensors) for name, tensors in stored.tensors.items()} for stored in (a, b)]
    return Comparison(str(a.path), str(b.path), compared, tuple(differing), tuple(uncompared), *hashes)


def format_comparison(comparison: Comparison) -> str:
    """What ``wireframe verify`` prints: the verdict first, where they part, and the hashes."""
    counts = ", ".join(f"{count} of the {section}" for section, count in comparison.compared.items())
    lines = [f"A  {comparison.a}", f"B  {comparison.b}"]
    if comparison.equal:
        lines.append(f"equal bit for bit: tensors compared: {counts}")
    else:
        lines.append(f"DIFFERENT in {len(comparison.differing)} places; tensors compared: {counts}")
        lines.append(f"first: {_line(comparison.differing[0])}")
        measured = [found for found in comparison.differing if found.largest is not None]
        if measured:
            # Of equally large ones the first.
            lines.append(f"largest: {_line(max(measured, key=lambda found: found.largest))}")
        lines += [f"  {_line(found)}" for found in comparison.differing[1:_LISTED]]
        if len(comparison.differing) > _LISTED:
            lines.append(f"  and {len(comparison.differing) - _LISTED} more")
    lines += comparison.uncompared
    for section in ("model", "optimizer"):
        for letter, hashes in (("A", comparison.hashes_a), ("B", comparison.hashes_b)):
            if section in hashes:
                lines.append(f"{letter} {section:9} {hashes[section]}")
    return "\n".join(one_line(line, 400) for line in lines)


def _line(found: Difference) -> str:
    return f"{found.name}: {found.what}"


def _compare_states(a: dict | None, b: dict | None) -> list[Difference]:
    if a is None or b is None:
        return []
    return [Difference(f"state {name}", f"{a[name]} against {b[name]}") for name in _STATE if a[name] != b[name]]


def _compare_sections(section: str, a: dict[str, Tensor], b: dict[str, Tensor]) -> list[Difference]:
    found = []
    for name in sorted(a.keys() | b.keys()):
        label = f"{section} {name}"
        if name not in a or name not in b:
            found.append(Difference(label, f"only in {'A' if name in a else 'B'}"))
        elif a[name].dtype != b[name].dtype:
            found.append(Difference(label, f"{_dtype(a[name])} against {_dtype(b[name])}"))
        elif a[name].shape != b[name].shape:
            found.append(Difference(label, f"shape {list(a[name].shape)} against {list(b[name].shape)}"))
        elif not torch.equal(_bytes(a[name]), _bytes(b[name])):
            found.append(_compare_values(label, a[name], b[name]))
    return found


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(tensor: Tensor) -> Tensor:
    """uint8 [numel, itemsize]."""
    return tensor.reshape(-1).contiguous().view(torch.uint8).reshape(tensor.numel(), -1)


def _compare_values(label: str, a: Tensor, b: Tensor) -> Difference:
    """Of two tensors of one shape and dtype whose bits differ."""
    places = (_bytes(a) != _bytes(b)).any(1).nonzero()[:, 0]
    x, y = (tensor.reshape(-1)[places].to(torch.float64) for tensor in (a, b))
    # Equal infinities and two NaNs of other bits are no distance apart.
    same = (x == y) | (x.isnan() & y.isnan())
    distance = torch.where(same, 0.0, (x - y).abs().nan_to_num(nan=torch.inf, posinf=torch.inf))
    worst = int(distance.argmax())
    where = [int(i) for i in torch.unravel_index(places[worst], a.shape)]
    largest = distance[worst].item()
    values = f"{x[worst].item()!r} against {y[worst].item()!r}"
    what = f"{len(places)} of {a.numel()} values differ, by up to {largest:.3g} at {where}: {values}"
    return Difference(label, what, largest)

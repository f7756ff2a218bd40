"""What a compiler that fuses would leave of a step: torch.compile, estimated from the operations of eager PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from wireframe.bench.step_aten import ELEMENTWISE, MOVEMENT, REDUCTION
from wireframe.bench.step_trace import AROUND, UPDATE, Row


def fused(rows: Sequence[Row]) -> list[Row]:
    """Rows as a compiler that fuses would leave them: chains of elementwise operations are one kernel.

    Between two products (or other kernels that are not generated), an operation joins the chain that made one of its
    inputs, or reads what it reads, unless both reduce and over different axes. A chain reads what it did not make, and
    writes what others read or nobody; it is one launch. An estimate: the compiler's own choices are others.
    """
    readers: dict[int, set[int]] = {}
    for i, row in enumerate(rows):
        for number in row.reads:
            readers.setdefault(number, set()).add(i)
    out: list[Row] = []
    chains: list[list[int]] = []

    def close() -> None:
        out.extend(_chain([rows[i] for i in chain], set(chain), readers) for chain in chains)
        chains.clear()

    for i, row in enumerate(rows):
        if row.ours or row.phase in (AROUND, UPDATE) or row.kind not in (ELEMENTWISE, REDUCTION, MOVEMENT):
            close()
            out.append(row)
            continue
        touched = (set(row.reads) | set(row.writes), row.over)
        home = next((c for c in reversed(chains) if _joins(touched, [rows[j] for j in c])), None)
        if home is None:
            chains.append([i])
        else:
            home.append(i)
    close()
    return out


def _joins(touched: tuple[set[int], tuple | None], chain: Sequence[Row]) -> bool:
    numbers, over = touched
    axes = {row.over for row in chain if row.over is not None}
    return (over is None or axes <= {over}) and any(numbers & (row.reads.keys() | row.writes.keys()) for row in chain)


def _chain(chain: Sequence[Row], places: set[int], readers: dict[int, set[int]]) -> Row:
    reads: dict[int, int] = {}
    writes: dict[int, int] = {}
    for row in chain:
        for number, size in row.reads.items():
            if number not in writes:
                reads[number] = max(reads.get(number, 0), size)
        for number, size in row.writes.items():
            writes[number] = max(writes.get(number, 0), size)
    writes = {number: size for number, size in writes.items() if not readers.get(number, {-1}) <= places}
    first = max(chain, key=lambda row: row.moved)
    name = first.name if len(chain) == 1 else f"{first.name} and {len(chain) - 1} more"
    kind = REDUCTION if any(row.over for row in chain) else first.kind
    return first._replace(name=name, kind=kind, moved=sum(reads.values()) + sum(writes.values()), launches=1,
                          flops=sum(row.flops for row in chain), reads=reads, writes=writes)  # fmt: skip

"""Proposes entries of the tile table of attention: ``python -m wireframe.bench.tune_tiles --arch 89 --dtype bf16``.

For each kernel of an entry it compiles every candidate ahead of time for the architecture, drops those that spill or
want more shared memory than a block has, and ranks the rest: by medians on the GPU, all candidates in turn in one run,
where there is one of that architecture; else by a static estimate, which it says. It prints the candidates and the line
for ``kernels/tiles.py`` and changes nothing: bits depend on the table, so a change of it is a decision.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import torch

from wireframe.bench import clocks
from wireframe.bench.compile_ahead import compile_launch, require_compiler
from wireframe.bench.gpus import MULTIPROCESSORS, resident_warps
from wireframe.bench.sass import hot_loop, read_cubin, spills_among_products
from wireframe.bench.timing import measure
from wireframe.errors import WireframeError, one_line
from wireframe.kernels import launch as launching
from wireframe.kernels import tiles
from wireframe.kernels.launch import ARCHITECTURES, Launch
from wireframe.kernels.tiles import Tile, Tiles

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_HEADS, _KV_HEADS = 4, 2

# Fewer resident warps than these hide too little latency, whatever the loop: two for each scheduler.
_ENOUGH_WARPS = 8


class Shape(NamedTuple):
    batch: int
    queries: int
    keys: int
    mask: bool


class Kernel(NamedTuple):
    """A kernel of the table: its name, and the shapes that stand for its shape class, the published model's."""

    name: str
    shapes: tuple[Shape, ...]
    backward: bool = False


_CROSS, _SELF = Shape(32, 256, 2048, True), Shape(32, 256, 256, False)
KERNELS = {
    "one_chunk": Kernel("_qk_norm_attention_fwd_kernel", (_SELF, Shape(32, 64, 256, False))),
    "chunks": Kernel("_qk_norm_attention_fwd_kernel", (_CROSS, Shape(1, 256, 4096, True), _CROSS._replace(mask=False))),
    "dq": Kernel("_qk_norm_attention_dq_kernel", (_CROSS, _SELF), backward=True),
    "dkv": Kernel("_qk_norm_attention_dkv_kernel", (_CROSS, _SELF), backward=True),
}


class Candidate(NamedTuple):
    """A tile and what its binaries take, the worst of all shapes; dropped: why it cannot be used, else "".

    work: instructions of a warp in the loop for each 1000 logits; inf where the loop was not found in the binary.
    """

    tile: Tile
    dropped: str
    registers: int = 0
    shared: int = 0
    warps: int = 0
    work: float = math.inf


def candidates(*choices: Sequence[int]) -> list[Tile]:
    """All tiles worth a compilation: a warp holds between 64 and 2048 logits of a tile."""
    every = itertools.starmap(Tile, itertools.product(*choices))
    return [tile for tile in every if 64 <= tile.block_m * tile.block_n // tile.num_warps <= 2048]


@contextlib.contextmanager
def using(arch: int, dtype: torch.dtype, dim: int, kernel: str, tile: Tile) -> Iterator[None]:
    """The table with one tile replaced, until the end of the block."""
    before = tiles.TABLE[arch]
    try:
        tiles.TABLE[arch] = {**before, (dtype, dim): before[dtype, dim]._replace(**{kernel: tile})}
        yield
    finally:
        tiles.TABLE[arch] = before


def plan(shape: Shape, dtype: torch.dtype, dim: int, arch: int, backward: bool, device: str = "meta") -> list[Launch]:
    """All launches of a call; on a device with tensors of random values."""
    from wireframe.kernels.qk_norm_attention_backward import plan_backward
    from wireframe.kernels.qk_norm_attention_forward import plan_forward

    def randn(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=device, dtype=dtype)

    batch, queries, keys, mask = shape
    q, do = randn(batch, queries, _HEADS, dim), randn(batch, queries, _HEADS, dim)
    k, v = randn(batch, keys, _KV_HEADS, dim), randn(batch, keys, _KV_HEADS, dim)
    log_scale = torch.full((_HEADS,), 2.0, device=device)
    key_mask = torch.rand(batch, keys, device=device) < 0.9 if mask else None
    out, dq, dk, dv = (torch.empty_like(x) for x in (q, q, k, v))
    lse = torch.empty(batch, _KV_HEADS, queries * _HEADS // _KV_HEADS, device=device)
    launches = plan_forward(q, k, v, log_scale, key_mask, out, lse, arch)
    if backward:
        launches += plan_backward(
            do, q, k, v, log_scale, key_mask, out, lse, dq, dk, dv, torch.empty_like(log_scale), arch
        )
    return launches


def _wanted(launches: list[Launch], kernel: Kernel) -> Launch:
    return next(launch for launch in launches if launch.kernel.fn.__name__ == kernel.name)


def examine(kernel: str, dtype: str, dim: int, arch: int, tile: Tile) -> Candidate:
    """Compiles a candidate for every shape of its class, until one drops it."""
    described, found = KERNELS[kernel], []
    with using(arch, _DTYPES[dtype], dim, kernel, tile):
        for shape in described.shapes:
            launch = _wanted(plan(shape, _DTYPES[dtype], dim, arch, described.backward), described)
            try:
                compiled = compile_launch(launch, arch)
            except Exception as problem:
                return Candidate(tile, f"does not compile: {one_line(problem, 60)}")
            usage, instructions = read_cubin(compiled.cubin)
            if usage.stack and (tile.max_registers is None or spills_among_products(instructions)):
                return Candidate(tile, "spills", usage.registers, compiled.shared)
            if compiled.shared > MULTIPROCESSORS[arch].block_shared:
                return Candidate(tile, "too much shared memory", usage.registers, compiled.shared)
            warps = resident_warps(arch, usage.registers, compiled.shared, tile.num_warps)
            loop = hot_loop(instructions)
            work = 1000 * loop.instructions * tile.num_warps / (tile.block_m * tile.block_n)
            has_products = loop.fma if dtype == "fp32" else loop.tensor_core
            found.append((usage.registers, compiled.shared, warps, work if has_products else math.inf))
    registers, shared, warps, work = zip(*found)
    return Candidate(tile, "", max(registers), max(shared), min(warps), max(work))


def rank(found: Sequence[Candidate], times: dict[Tile, float]) -> list[Candidate]:
    """Usable candidates, the best first: by time where there are times, else by the static estimate."""
    usable = [candidate for candidate in found if not candidate.dropped]
    if times:
        return sorted((c for c in usable if c.tile in times), key=lambda c: times[c.tile])
    return sorted(usable, key=lambda c: (c.warps < _ENOUGH_WARPS, c.work, -c.warps))


def time_tiles(
    kernel: str, dtype: str, dim: int, arch: int, found: Sequence[Candidate], device: str, repeats: int
) -> dict[Tile, float]:
    """For each tile its median against the fastest, averaged over the shapes (geometric mean)."""
    described, relative = KERNELS[kernel], {}
    for shape in described.shapes:
        runs = []
        for candidate in found:
            with using(arch, _DTYPES[dtype], dim, kernel, candidate.tile):
                launches = plan(shape, _DTYPES[dtype], dim, arch, described.backward, device)
            # Once in full: the kernel reads what others wrote.
            launching.run(launches)
            wanted = _wanted(launches, described)
            runs.append(lambda wanted=wanted: launching.run([wanted]))
        medians = [float(np.median(times)) for times in measure(runs, repeats, clocks.device_ms)]
        for candidate, median in zip(found, medians):
            relative.setdefault(candidate.tile, []).append(median / min(medians))
    return {tile: float(np.exp(np.mean(np.log(ratios)))) for tile, ratios in relative.items()}


def entry(dtype: torch.dtype, dim: int, proposed: Tiles) -> str:
    """A line of ``kernels/tiles.py``."""
    name = {torch.bfloat16: "_BF16", torch.float16: "_FP16", torch.float32: "_FP32"}[dtype]
    numbers = (", ".join(str(number) for number in tile if number is not None) for tile in proposed)
    return f"({name}, {dim}): Tiles({', '.join(f'Tile({of_tile})' for of_tile in numbers)}),"


def _describe(candidate: Candidate, times: dict[Tile, float]) -> str:
    time = f"{times[candidate.tile]:.3f} x the fastest, " if candidate.tile in times else ""
    sizes = "{:>3} x {:<3} {} warps {} stages".format(*candidate.tile)
    sizes += f" {candidate.tile.max_registers} registers" if candidate.tile.max_registers else ""
    work = "loop not found" if candidate.work == math.inf else f"{candidate.work:.0f} instructions for 1000 logits"
    return (
        f"  {sizes}: {time}{work}, {candidate.warps} resident warps, {candidate.registers} registers, "
        f"{candidate.shared} B shared"
    )


def _device(arch: int) -> str | None:
    if torch.cuda.is_available() and launching.architecture(torch.device("cuda")) == arch:
        return "cuda"
    return None


def tune(
    kernel: str, dtype: str, dim: int, arch: int, wanted: Sequence[Tile], pool: ProcessPoolExecutor | None, repeats: int
) -> Tile | None:
    """Prints how the candidates of one kernel rank; the best tile, None where no candidate is usable."""
    jobs = [(kernel, dtype, dim, arch, tile) for tile in wanted]
    if pool is None:
        found = list(itertools.starmap(examine, jobs))
    else:
        found = list(pool.map(examine, *zip(*jobs)))
    reasons = [candidate.dropped.partition(":")[0] for candidate in found if candidate.dropped]
    counts = ", ".join(f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons)) or "none dropped"
    device = _device(arch)
    usable = [candidate for candidate in found if not candidate.dropped]
    times = time_tiles(kernel, dtype, dim, arch, usable, device, repeats) if device and usable else {}
    ranked = rank(found, times)
    how = "by time" if times else "by a static estimate, nothing was timed"
    print(f"{kernel}, {dtype}, D {dim}, sm_{arch}: {len(found)} candidates, {counts}; ranked {how}", flush=True)
    today = getattr(tiles.lookup(arch, _DTYPES[dtype], dim), kernel)
    for candidate in ranked[:8]:
        print(_describe(candidate, times) + (" (today's)" if candidate.tile == today else ""), flush=True)
    if today not in [candidate.tile for candidate in ranked[:8]]:
        print(f"  today's is {today}")
    return ranked[0].tile if ranked else None


def main(argv: list[str] | None = None) -> int:
    """Prints a proposal for each dtype and head dimension asked for; 1 where a kernel has no usable tile."""
    parser = argparse.ArgumentParser(
        prog="python -m wireframe.bench.tune_tiles", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--arch", type=int, required=True, choices=ARCHITECTURES, help="column of the table")
    parser.add_argument("--dtype", nargs="+", default=list(_DTYPES), choices=_DTYPES, help="default: all")
    parser.add_argument("--dim", type=int, nargs="+", default=[32, 64, 128], choices=(32, 64, 128), help="default: all")
    parser.add_argument("--kernel", nargs="+", default=list(KERNELS), choices=KERNELS, help="default: all")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32, 64, 128], help="block_m to try")
    parser.add_argument("--keys", type=int, nargs="+", default=[32, 64, 128], help="block_n to try")
    parser.add_argument("--warps", type=int, nargs="+", default=[4, 8], help="num_warps to try")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3], help="num_stages to try")
    parser.add_argument("--registers", type=int, nargs="+", default=[], help="max_registers to try, beside none")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of timing (default 5, more for short kernels)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    arguments = parser.parse_args(argv)
    try:
        print(f"triton {require_compiler()}")
    except WireframeError as problem:
        parser.error(str(problem))
    registers = (None, *arguments.registers)
    wanted = candidates(arguments.rows, arguments.keys, arguments.warps, arguments.stages, registers)
    complete = True
    several = arguments.workers > 1
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) if several else contextlib.nullcontext() as pool:
        for dtype, dim in itertools.product(arguments.dtype, arguments.dim):
            proposed = tiles.lookup(arguments.arch, _DTYPES[dtype], dim)
            for kernel in arguments.kernel:
                best = tune(kernel, dtype, dim, arguments.arch, wanted, pool, arguments.repeats)
                complete &= best is not None
                proposed = proposed if best is None else proposed._replace(**{kernel: best})
            print(f"sm_{arguments.arch}: {entry(_DTYPES[dtype], dim, proposed)}", flush=True)
    return int(not complete)


if __name__ == "__main__":
    raise SystemExit(main())

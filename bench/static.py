"""The ahead-of-time report: what every kernel takes on every architecture, and whether that is within the limits.

``wireframe bench static`` compiles the launches of ``static_cases`` on a machine without a GPU and prints one row a
binary. ``--out`` writes the rows as the committed report, ``--check`` holds the code against it: sm_89 is compiled
again in any case, another architecture only where a hash of sources and specialisation differs.

Registers and instructions are facts about the binary. Roofline times are bounds, computed from products and bytes
(every input read once, every output written once); nothing here has run.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from wireframe.bench.compile_ahead import (
    Specialisation,
    compile_launch,
    fingerprint,
    require_compiler,
    sources,
    specialise,
)
from wireframe.bench.gpus import GPUS, MULTIPROCESSORS, resident_warps, roofline_us
from wireframe.bench.sass import count, hot_loop, loops, read_cubin, spills_among_products
from wireframe.errors import WireframeError, one_line
from wireframe.files import atomic_write
from wireframe.kernels.launch import ARCHITECTURES, Launch

REPORT = Path(__file__).resolve().parent / "static_report.json"
CASES = "wireframe.bench.static_cases"

# Compiled again by every check.
ALWAYS = 89
MOST_CONFIGURATIONS = 130

# Arguments that a kernel reads and writes.
_IN_PLACE = {"_adamw_step_update_kernel": ("p_weights", "p_exp_avg", "p_exp_avg_sq")}

# Before this version spills are reported, from it on they are refused.
_STRICT_FROM = (3, 7)

# What ptxas reports as static on sm_90 is what CUDA reserves there; resident_warps counts it for every architecture.
_RESERVED_STATIC = {90: 1024}

_IDENTITY = ("arch", "kernel", "dtype", "dim", "cases")
_UNCOMPARED = (*_IDENTITY, "hash", "seconds")


class Configuration(NamedTuple):
    """One binary: a launch, what Triton makes of it, its hash, and the cases that come to it."""

    arch: int
    launch: Launch
    specialisation: Specialisation
    hash: str
    dtype: str
    dim: int
    flops: float
    minimum_warps: int
    cases: list[str]


@lru_cache(maxsize=8)
def configurations(module: str, arch: int) -> list[Configuration]:
    """Every distinct binary of the cases of a module (``cases()``, ``minimum_warps``) on an architecture."""
    listed = importlib.import_module(module)
    found: dict[str, Configuration] = {}
    for case in listed.cases():
        binaries: dict[str, list[str]] = {}
        for launch in case.plan(arch):
            made, name = specialise(launch, arch), kernel_name(launch)
            key = fingerprint(launch, made)
            keys = binaries.setdefault(name, [])
            if key not in keys:
                keys.append(key)
            # A call may launch several binaries of one kernel.
            number = f" ({keys.index(key) + 1})" if keys.index(key) else ""
            label = f"{case.name} {case.dtype} {case.dim}{number}"
            if key not in found:
                minimum = listed.minimum_warps(name, case.dtype, case.dim)
                flops = case.flops(launch)
                found[key] = Configuration(arch, launch, made, key, case.dtype, case.dim, flops, minimum, [])
            if label not in found[key].cases:
                found[key].cases.append(label)
    return list(found.values())


def kernel_name(launch: Launch) -> str:
    return launch.kernel.fn.__name__


def bytes_moved(launch: Launch) -> int:
    """Every tensor of a launch once, or twice where it is read and written; an expanded axis counts as one element."""
    tensors = {id(x): x for x in launch.arguments.values() if hasattr(x, "stride")}
    changed = [launch.arguments[name] for name in _IN_PLACE.get(kernel_name(launch), ())]
    total = 0
    for tensor in (*tensors.values(), *changed):
        size = tensor.element_size()
        for length, stride in zip(tensor.shape, tensor.stride()):
            size *= length if stride else 1
        total += size
    return total


def measure(configuration: Configuration) -> dict:
    """Compiles one configuration; its row of the report, or one that holds an ``error`` where it does not compile."""
    launch, made, arch = configuration.launch, configuration.specialisation, configuration.arch
    row = {
        "arch": arch,
        "kernel": kernel_name(launch),
        "dtype": configuration.dtype,
        "dim": configuration.dim,
        "cases": configuration.cases,
        "hash": configuration.hash,
    }
    try:
        compiled = compile_launch(launch, arch)
    # Whatever a compiler fails with.
    except Exception as problem:
        return {**row, "error": f"{type(problem).__name__}: {one_line(problem, 500)}"}
    usage, instructions = read_cubin(compiled.cubin)
    shared = compiled.shared + max(0, usage.shared - _RESERVED_STATIC.get(arch, 0))
    moved = bytes_moved(launch)
    return {
        **row,
        "constants": {name: value for name, value in sorted(made.constants.items()) if name.isupper()},
        **made.options,
        "registers": usage.registers,
        "stack": usage.stack,
        "spills_among_products": spills_among_products(instructions),
        "shared": shared,
        "resident_warps": resident_warps(arch, usage.registers, shared, made.options["num_warps"]),
        "minimum_warps": configuration.minimum_warps,
        "instructions": count(instructions).instructions,
        "loop": hot_loop(instructions)._asdict(),
        # A count of instructions for each, since which of them runs most is a matter of the input.
        "loops": [count(loop).instructions for loop in loops(instructions)],
        "flops": configuration.flops,
        "bytes": moved,
        "roofline_us": {
            name: round(roofline_us(gpu, configuration.flops, moved, configuration.dtype == "fp32"), 2)
            for name, gpu in GPUS.items()
        },
        "seconds": round(compiled.seconds, 1),
    }


def measure_all(
    wanted: Sequence[Configuration], module: str = CASES, workers: int = 2, done: Callable[[dict], None] | None = None
) -> list[dict]:
    """Rows of configurations of a module of cases, in their order; ``done`` hears of each as it comes.

    Args:
        workers: processes, which keep to themselves what compilers print; 1 compiles in this one.
    """
    rows = {}
    # Empty at first: every binary of a report is compiled now, by this version of Triton.
    with tempfile.TemporaryDirectory(prefix="wireframe-static-") as cache:
        results = _measure_here(wanted, cache) if workers == 1 else _measure_in_pool(wanted, cache, module, workers)
        for row in results:
            rows[row["arch"], row["hash"]] = row
            if done:
                done(row)
    return [rows[c.arch, c.hash] for c in wanted]


def _measure_here(wanted: Sequence[Configuration], cache: str) -> Iterator[dict]:
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = cache
    try:
        for configuration in wanted:
            yield measure(configuration)
    finally:
        del os.environ["TRITON_CACHE_DIR"]
        if before is not None:
            os.environ["TRITON_CACHE_DIR"] = before


def _measure_in_pool(wanted: Sequence[Configuration], cache: str, module: str, workers: int) -> Iterator[dict]:
    # What takes longest to compile first, so that no process is left alone with it at the end.
    order = sorted(wanted, key=lambda c: (c.dtype == "fp32", c.dim), reverse=True)
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (cache,)) as pool:
        try:
            for task in as_completed([pool.submit(_measure_in_worker, module, c.arch, c.hash) for c in order]):
                yield task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    # A kernel that does not compile is one line of the report, and a thousand of its intermediate code here.
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)


def _measure_in_worker(module: str, arch: int, key: str) -> dict:
    for configuration in configurations(module, arch):
        if configuration.hash == key:
            return measure(configuration)
    raise WireframeError("the kernels changed while they were being compiled; run it again")


def problems(rows: Iterable[dict], version: str) -> list[str]:
    """One line for every limit that a row breaks."""
    found = []
    for arch, number in Counter(row["arch"] for row in rows).items():
        if number > MOST_CONFIGURATIONS:
            found.append(f"sm_{arch}: {number} configurations, more than {MOST_CONFIGURATIONS}")
    for row in rows:
        if "error" in row:
            found.append(f"{name(row)}: does not compile: {row['error']}")
            continue
        most = MULTIPROCESSORS[row["arch"]].block_shared
        if row["shared"] > most:
            found.append(f"{name(row)}: {row['shared']} bytes of shared memory, the architecture has {most}")
        if row["stack"] and not _spills_aside(row) and is_strict(version):
            found.append(f"{name(row)}: spills, {row['stack']} bytes of stack a thread")
        if row["resident_warps"] < row["minimum_warps"] and is_strict(version):
            found.append(f"{name(row)}: {row['resident_warps']} resident warps, at least {row['minimum_warps']} wanted")
    return found


def _spills_aside(row: dict) -> bool:
    """Whether a launch that states its registers keeps in memory only what its loops of products do not touch."""
    return "maxnreg" in row and row["loop"]["tensor_core"] > 0 and row["spills_among_products"] == 0


def is_strict(version: str) -> bool:
    """Whether spills and resident warps are refused with this version of Triton, not just reported."""
    return tuple(int(part) for part in version.split(".")[:2]) >= _STRICT_FROM


def run(
    architectures: Sequence[int] = ARCHITECTURES,
    out: Path | None = None,
    workers: int = 2,
    progress: bool = True,
    module: str = CASES,
) -> int:
    """Compiles and prints rows; 1 where one breaks a limit, with a line for each on stderr, else 0.

    Args:
        out: file for the report; rows of other architectures stay in it as they are.

    Raises:
        WireframeError: nothing can be compiled here, or rows of another version of Triton would stay.
    """
    version = require_compiler()
    kept = []
    if out and out.exists():
        report = read_report(out)
        kept = [row for row in report["rows"] if row["arch"] not in architectures]
        if kept and report["triton"] != version:
            raise WireframeError(f"{out} is of triton {report['triton']}, this is {version}: compile all architectures")
    wanted = [c for arch in architectures for c in configurations(module, arch)]
    rows = measure_all(wanted, module, workers, _progress(len(wanted)) if progress else None)
    if out:
        write_report(out, version, [*(row for row in rows if "error" not in row), *kept])
    return _conclude(rows, version, problems(rows, version))


def check(path: Path, workers: int = 2, progress: bool = True, module: str = CASES) -> int:
    """Holds the code against a committed report; 1 where it differs or breaks a limit, with lines on stderr, else 0.

    sm_89 is compiled, and of other architectures what has another hash than in the report. Under another version of
    Triton than the report's only the limits are checked.

    Raises:
        WireframeError: nothing can be compiled here, or the file is no report.
    """
    version, report = require_compiler(), read_report(path)
    if report["triton"] != version:
        wanted = configurations(module, ALWAYS)
        rows = measure_all(wanted, module, workers, _progress(len(wanted)) if progress else None)
        print(f"{path} is of triton {report['triton']}: the limits are checked, the rows not compared")
        return _conclude(rows, version, problems(rows, version))
    now = compare(report, module, (ALWAYS,), workers, progress)
    found = [*now.broken, *_stale(now, path)]
    if now.newer and not found:
        print(f"{len(now.newer)} rows have other sources than in {path} and measure the same")
    return _conclude(now.compiled, version, found)


class Comparison(NamedTuple):
    """What the code gives, beside a report.

    rows: all of them; compiled: those that were measured now, the others are the report's. newer: what the report has
    under another hash or not at all. broken: a line for every limit that a row breaks; changed: see ``differences``.
    """

    rows: list[dict]
    compiled: list[dict]
    newer: list[Configuration]
    broken: list[str]
    changed: list[str]


def compare(
    report: dict, module: str = CASES, always: Sequence[int] = (), workers: int = 1, progress: bool = False
) -> Comparison:
    """Compiles what has another hash than in a report of this version of Triton, and architectures ``always``."""
    committed = {(row["arch"], row["hash"]): row for row in report["rows"]}
    planned = [c for arch in ARCHITECTURES for c in configurations(module, arch)]
    newer = [c for c in planned if (c.arch, c.hash) not in committed]
    wanted = [c for c in planned if c.arch in always or (c.arch, c.hash) not in committed]
    compiled = measure_all(wanted, module, workers, _progress(len(wanted)) if progress else None)
    again = {(c.arch, c.hash) for c in wanted}
    unchanged = [
        # What a report has of the plan may have changed without a hash.
        committed[c.arch, c.hash] | {"cases": c.cases, "minimum_warps": c.minimum_warps}
        for c in planned
        if (c.arch, c.hash) not in again
    ]
    rows = [*compiled, *unchanged]
    return Comparison(rows, compiled, newer, problems(rows, report["triton"]), differences(rows, report["rows"]))


def _conclude(rows: Sequence[dict], version: str, found: Sequence[str]) -> int:
    compiled = [row for row in rows if "error" not in row]
    print(f"triton {version}, {len(compiled)} configurations compiled")
    print(table(compiled))
    spilled = [row for row in compiled if row["stack"] and not _spills_aside(row)]
    if spilled and not is_strict(version):
        print(f"{len(spilled)} of {len(compiled)} spill, which is no fault under triton {version}:")
        print(*(f"{name(row)}: {row['stack']} bytes of stack" for row in spilled), sep="\n")
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


def _stale(now: Comparison, path: Path) -> list[str]:
    """One line for every way in which a report is not what the code gives; before them, what it is older than."""
    if not now.changed:
        return []
    files = {file for c in now.newer for file in source_files(c.launch)}
    older = f"the report is older than {', '.join(sorted(files))}" if files else "the report measures otherwise"
    return [f"{older}: run: wireframe bench static --out {path}", *now.changed]


def differences(rows: Iterable[dict], committed: Iterable[dict]) -> list[str]:
    """One line for every row that is new, gone or measures otherwise; hashes and seconds are not measurements."""
    before = {_identity(row): row for row in committed}
    now = {_identity(row): row for row in rows if "error" not in row}
    found = [f"{name(before[key])}: is no longer compiled" for key in before.keys() - now.keys()]
    found += [f"{name(now[key])}: is not in the report" for key in now.keys() - before.keys()]
    for key in before.keys() & now.keys():
        changed = [
            f"{field} {now[key][field]}, reported {before[key].get(field)}"
            for field in now[key]
            if field not in _UNCOMPARED and now[key][field] != before[key].get(field)
        ]
        if changed:
            found.append(f"{name(now[key])}: {'; '.join(changed)}")
    return sorted(found)


def read_report(path: Path) -> dict:
    """{"triton": version, "rows": [...]}.

    Raises:
        WireframeError: the file is not there, or is no such report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return {"triton": report["triton"], "rows": report["rows"]}
    except (ValueError, KeyError, TypeError):
        raise WireframeError(f"{path} is no report of wireframe bench static") from None


def write_report(path: Path, version: str, rows: Iterable[dict]) -> None:
    """One row a line, in an order of their own, so that a change of a kernel is a change of few lines."""
    lines = [json.dumps(row) for row in sorted(rows, key=_identity)]
    text = "\n".join(['{"triton": ' + json.dumps(version) + ', "rows": [', ",\n".join(lines), "]}\n"])
    with atomic_write(path) as file:
        file.write(text.encode())


def table(rows: Iterable[dict]) -> str:
    """The rows for people: kernel, tile, resources, the hot loop, bounds."""
    heading = (
        "sm", "kernel", "dtype", "D", "tile", "warps", "stages", "registers", "stack", "shared", "resident (least)",
        "loop", "mma", "fma", "cp.async", "ldsm", "GFLOP", "MB", *(f"us {gpu}" for gpu in GPUS), "s", "case",
    )  # fmt: skip
    lines = [heading, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _cells(row: dict) -> tuple[str, ...]:
    tile = "x".join(str(value) for name, value in row["constants"].items() if name in ("SIDE", "BM", "BN", "BI", "BJ"))
    loop = row["loop"]
    values = (
        row["arch"], row["kernel"].strip("_").removesuffix("_kernel"), row["dtype"], row["dim"], tile or "-",
        row["num_warps"], row["num_stages"], row["registers"], row["stack"], row["shared"],
        f"{row['resident_warps']} ({row['minimum_warps']})", loop["instructions"], loop["tensor_core"], loop["fma"],
        loop["copy_async"], loop["load_matrix"], f"{row['flops'] / 1e9:.3g}", f"{row['bytes'] / 1e6:.3g}",
        *row["roofline_us"].values(), row["seconds"], row["cases"][0],
    )  # fmt: skip
    return tuple(map(str, values))


def _progress(number: int) -> Callable[[dict], None]:
    numbers = iter(range(1, number + 1))

    def done(row: dict) -> None:
        compiled = next(numbers)
        print(f"\r{compiled}/{number} compiled", end="\n" if compiled == number else "", file=sys.stderr, flush=True)

    return done


def source_files(launch: Launch) -> list[str]:
    """Where the kernel and what it calls are written, from the root of the repository."""
    return sorted(_from_root(file) for file in sources(launch.kernel).files)


def name(row: dict) -> str:
    """A row's binary in a few words."""
    return f"sm_{row['arch']} {row['kernel']} {row['dtype']} {row['dim']} ({row['cases'][0]})"


def _identity(row: dict) -> tuple:
    return (*(row[field] for field in _IDENTITY[:-1]), tuple(row["cases"]))


def _from_root(file: str) -> str:
    path = Path(file).resolve()
    root = REPORT.parent.parent
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name

"""Compiles csrc/cuda for the CPU: the kernels' own source with ``cuda_emulation.h`` in place of CUDA."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"

COMMON = "-std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas"
# Every memory access becomes a call, which memory.cpp answers; a loop that became memset would escape it.
UNDEFINED = "bounds,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow"
CHECKED = f"-DWIREFRAME_EMULATE -x c++ -fsanitize=thread,{UNDEFINED} -fno-tree-loop-distribute-patterns"


def build(folder: Path, compiler: str) -> tuple[ModuleType, ctypes.CDLL]:
    """The emulated ``_C_cuda``, and its library with the functions that steer the emulation."""
    import pybind11

    folders = {"-I": (CSRC, HERE), "-isystem ": (pybind11.get_include(), sysconfig.get_path("include"))}
    headers = " ".join(f"{flag}{shlex.quote(str(path))}" for flag, paths in folders.items() for path in paths)
    kernels = [*sorted((CSRC / "cuda").glob("*.cu")), HERE / "toys.cu"]
    sources = [
        # The slowest first: the others fill the time.
        (CSRC / "cuda" / "module.cpp", "-O0"), *((kernel, CHECKED) for kernel in kernels),
        (HERE / "scheduler.cpp", "-O2"), (HERE / "memory.cpp", "-O2"),
    ]  # fmt: skip
    objects = [str(folder / f"{source.name}.o") for source, _ in sources]
    commands = [
        [*shlex.split(f"{compiler} {COMMON} {flags} {headers}"), "-c", str(source), "-o", target]
        for (source, flags), target in zip(sources, objects)
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_run, commands))
    library = folder / "_C_cuda.so"
    _run([*shlex.split(compiler), "-shared", *objects, "-o", str(library)])
    loader = importlib.machinery.ExtensionFileLoader("_C_cuda", str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C_cuda", loader))
    loader.exec_module(module)
    return module, ctypes.CDLL(str(library))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or "warning:" in done.stderr:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")

"""Compiles planned launches without a GPU, as a launch on one would: the same specialisation, options and source.

Triton's own launch path does the work (``JITFunction.warmup``); only the driver, which would be asked for the device,
is a stand-in that names the architecture.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import io
import time
import tokenize
from collections.abc import Iterator
from typing import Any, NamedTuple

from wireframe.errors import MissingPackageError, WireframeError
from wireframe.kernels import dispatch
from wireframe.kernels.launch import Launch, run


class Specialisation(NamedTuple):
    """What Triton makes of a launch's arguments, by parameter.

    types: "*bf16", "i32", "fp32" and so on, "constexpr" for what is a constant of the binary. constants: the values of
    those (None and the integer 1 among them). divisible: parameters known to be multiples of 16 (addresses, numbers).
    options: num_warps, num_stages and whatever else the launch states.
    """

    types: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    options: dict[str, Any]


class Compiled(NamedTuple):
    """ir: Triton's, with the layouts. shared: bytes of dynamic shared memory a block. seconds: of the compilation."""

    cubin: bytes
    ir: str
    shared: int
    seconds: float


class _Device:
    """Stands for a GPU of one architecture where Triton asks for the current one."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


class _Recorder:
    """Stands for the kernel of a launch and keeps what it is launched with."""

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda **keywords: vars(self).update(grid=grid, keywords=keywords)


@contextlib.contextmanager
def _launching_on(architecture: int, launch: Launch) -> Iterator[dict[str, Any]]:
    """The keywords that ``run`` launches with, while Triton takes the architecture for that of the device."""
    from triton.runtime.driver import driver

    recorder = _Recorder()
    run([launch._replace(kernel=recorder)])
    before = dict(vars(driver))
    # Kernels remember binaries by device, and there is only one here.
    launch.kernel.device_caches.clear()
    driver.set_active(_Device(architecture))
    try:
        yield {"grid": recorder.grid, **recorder.keywords}
    finally:
        vars(driver).update(before)
        launch.kernel.device_caches.clear()


def specialise(launch: Launch, architecture: int) -> Specialisation:
    """What Triton would compile for a launch; takes no time, compiles nothing."""
    from triton import knobs

    found: dict[str, Any] = {}

    def stop(*, compile: dict, **_) -> bool:
        found.update(compile)
        return True

    before = knobs.runtime.jit_cache_hook
    with _launching_on(architecture, launch) as keywords:
        knobs.runtime.jit_cache_hook = stop
        try:
            launch.kernel.warmup(**keywords)
        finally:
            knobs.runtime.jit_cache_hook = before
    names = launch.kernel.arg_names
    return Specialisation(
        dict(found["signature"]),
        {names[index]: value for (index,), value in found["constants"].items()},
        tuple(names[index] for (index,), marks in found["configs"][0].items() if ["tt.divisibility", 16] in marks),
        {name: value for name, value in keywords.items() if name not in names and name != "grid"},
    )


def compile_launch(launch: Launch, architecture: int) -> Compiled:
    """The binary that a launch would run, through Triton's cache (TRITON_CACHE_DIR)."""
    with _launching_on(architecture, launch) as keywords:
        start = time.perf_counter()
        kernel = launch.kernel.warmup(**keywords)
        seconds = time.perf_counter() - start
    return Compiled(kernel.asm["cubin"], kernel.asm["ttgir"], kernel.metadata.shared, seconds)


def fingerprint(launch: Launch, specialisation: Specialisation) -> str:
    """Hash of all that determines a binary but the version of Triton: sources and specialisation."""
    text = repr((sorted(sources(launch.kernel).texts.items()), specialisation))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Sources(NamedTuple):
    """texts: code of functions and values of global constants, by name. files: where the functions are."""

    texts: dict[str, str]
    files: set[str]


@functools.cache
def sources(kernel: Any) -> Sources:
    """The code of a kernel and of every function and global constant it uses; Triton's own are left out.

    Comments, blank lines and the place in the file do not count: they change no instruction.
    """
    found = Sources({}, set())
    _collect(kernel, found)
    return found


def _collect(function: Any, found: Sources) -> None:
    import triton.language as tl

    name = f"{function.fn.__module__}.{function.fn.__qualname__}"
    if name in found.texts or name.startswith("triton."):
        return
    text = function.src
    found.texts[name] = _without_comments(text)
    found.files.add(function.fn.__code__.co_filename)
    scope = {**function.fn.__globals__, **inspect.getclosurevars(function.fn).nonlocals}
    for used, value in _used(ast.parse(text), scope):
        if hasattr(value, "fn") and hasattr(value, "src"):
            _collect(value, found)
        elif isinstance(value, (tl.constexpr, bool, int, float, str)):
            found.texts[f"{name}: {used}"] = repr(value)


def _used(tree: ast.AST, scope: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every global that a function names, attributes of modules too, with its value."""
    for node in ast.walk(tree):
        path: list[str] = []
        while isinstance(node, ast.Attribute):
            path.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in scope:
            value = scope[node.id]
            for name in path:
                value = getattr(value, name, None)
            yield ".".join([node.id, *path]), value


def _without_comments(text: str) -> str:
    dropped = (tokenize.COMMENT, tokenize.NL)
    marks = {tokenize.NEWLINE: "\n", tokenize.INDENT: ">", tokenize.DEDENT: "<", tokenize.ENDMARKER: ""}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return " ".join(marks.get(token.type, token.string) for token in tokens if token.type not in dropped)


def require_compiler() -> str:
    """The version of Triton; raises WireframeError where this process cannot compile kernels."""
    if dispatch.INTERPRETED:
        raise WireframeError("TRITON_INTERPRET is set, and interpreted kernels are never compiled; unset it")
    if importlib.util.find_spec("triton") is None:
        raise MissingPackageError("triton is not installed; run: pip install triton")
    return importlib.import_module("triton").__version__

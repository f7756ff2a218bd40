"""Races: an operation in one mode on one shape, and its rivals, which ``holding.hold`` times in turn.

A race is data, and its inputs and rivals are made when it is held.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wireframe.bench.names import ABSENT, FIXED
from wireframe.errors import MissingPackageError
from wireframe.kernels.determinism import deterministic

FORWARD, BACKWARD, BOTH = MODES = ("forward", "backward", "forward + backward")
# Behind a mode: its calls are replayed from a CUDA graph.
GRAPH = ", graph"


class How(NamedTuple):
    """How races are held. repeats: rounds of a call of ordinary length. late: the time for slow rivals is over."""

    device: str = "cpu"
    small: bool = True
    repeats: int = 1
    threads: int = 1
    grow: bool = False
    backend: str = "inductor"
    late: Callable[[], bool] = lambda: False

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes of short kernels: on a GPU also from graphs."""
        return MODES if self.device == "cpu" else (*MODES, FORWARD + GRAPH, BACKWARD + GRAPH)


class Rival(NamedTuple):
    """One way to compute an operation.

    build: gives the function of a race's inputs; what it raises is the reason why the rival has no times.
    exact: whether it computes this operation, and its results are compared. settings: what its calls run under.
    slow: whether it takes seconds to compile, and is left out when the time is over. budget, dtype: the race's
    where None. modes: those in which it differs from ours, from graphs or not.
    """

    provider: str
    build: Callable[[], Callable[..., Any]]
    exact: bool = True
    deterministic: bool = False
    settings: Callable[[], Any] = contextlib.nullcontext
    slow: bool = False
    budget: float | None = None
    dtype: str | None = None
    modes: tuple[str, ...] = MODES

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """What the rival is built and called under: its settings, and of compiled ones a backward that runs again."""
        with repeatable_backward() if self.slow else contextlib.nullcontext(), self.settings():
            yield


@dataclasses.dataclass
class Work:
    """What a race runs on: sets of inputs, which calls take in turn, and rivals; with gradients, autograd is timed.

    gradients: one of each set's output, None where rivals are called as they are. built: what rivals built, kept for
    races on the same work in other modes. reference: computes once, untimed and without gradients, what all exact
    rivals are held against; None where the first of them is quick enough to be that.
    """

    inputs: Sequence[tuple]
    rivals: Sequence[Rival]
    gradients: Sequence[Tensor] | None = None
    built: dict[str, Any] = dataclasses.field(default_factory=dict)
    reference: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        # Slow rivals take every second, fourth, ... turn: of an even number of sets they would see but some.
        if len(self.inputs) % 2 == 0:
            raise ValueError(f"a race needs an odd number of sets, and this one has {len(self.inputs)}")


class Bar(NamedTuple):
    """bound: milliseconds of ours at most; with a rival (the beginning of names, the fastest counts) its time in ours,
    at least; with ``memory`` MiB of ours at most."""

    bound: float
    rival: str | None = None
    memory: bool = False


class Race(NamedTuple):
    """sizes: what growth plots draw against. budget: the error that results may have, relative to the reference.

    host: whether the launches of the host count on a GPU. cache: "cold" or "warm", None on a CPU. flops, bytes: of the
    operation, None where unknown. whole: the operation that this one is a part of, and the provider of it that takes
    turns with the part.
    """

    op: str
    mode: str
    shape: str
    sizes: dict[str, int]
    dtype: str
    make: Callable[[], Work]
    budget: float = 1e-4
    host: bool = False
    cache: str | None = None
    bars: tuple[Bar, ...] = ()
    flops: float | None = None
    bytes: float | None = None
    whole: str | None = None

    @property
    def title(self) -> str:
        return ", ".join(filter(None, (self.op, self.mode, self.shape, self.dtype, self.cache)))


def compiled(function: Callable, how: How) -> Callable:
    """``torch.compile`` for one shape."""
    return torch.compile(function, backend=how.backend, fullgraph=True, dynamic=False)


def compiled_deterministically(name: str, function: Callable, how: How) -> Rival:
    """The deterministic form of the rival ``name``, which compiles ``function``."""

    def build() -> Callable:
        require_deterministic_compile()
        return compiled(function, how)

    fixed = functools.partial(deterministic, how.device)
    return Rival(name + FIXED, build, deterministic=True, settings=fixed, slow=True)


@contextlib.contextmanager
def repeatable_backward() -> Iterator[None]:
    """Compiled inside, the backward of one forward may run several times, as it does in a graph."""
    from torch._functorch import config

    with config.patch(donated_buffer=False):
        yield


def require_deterministic_compile() -> None:
    """Raises where torch.compile cannot be made deterministic."""
    from torch._inductor import config

    if not hasattr(config, "deterministic"):
        raise RuntimeError(f"torch {torch.__version__} has no torch._inductor.config.deterministic")


def package(module: str, name: str) -> ModuleType:
    """The module of a rival's package.

    Raises:
        MissingPackageError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(f"{name} {ABSENT} ({error}): pip install {name}") from error


def randn(device: str, *shape: int, seed: int = 0) -> Tensor:
    """Normal numbers drawn on the CPU, so that every device gets the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)

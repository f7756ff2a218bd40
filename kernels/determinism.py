"""Equal bits on every call: what a process must set before CUDA starts, and a context for everything else.

The kernels of this package need none of it; it is there for the operations of torch around them. Precision (TF32,
autocast) is the caller's choice: it changes bits, but not whether they come out again.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from wireframe.errors import WireframeError

# The two values under which cuBLAS promises equal bits; the first is the faster one.
WORKSPACES = (":4096:8", ":16:8")
_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"

# Reads a setting, writes it, and the value to write.
_Setting = tuple[Callable[[], Any], Callable[[Any], None], Any]


class DeterminismError(WireframeError, RuntimeError):
    """Determinism was asked for too late, or against what the environment says."""


def prepare_process() -> None:
    """Sets what is read once, when CUDA starts: to be called at the entry of a program, before any CUDA tensor.

    Gives ``CUBLAS_WORKSPACE_CONFIG`` a value where it has none. Does not import torch.

    Raises:
        DeterminismError: the variable has a value under which bits may change from call to call, or has none
            and CUDA has already started in this process.
    """
    value = os.environ.get(_VARIABLE)
    if value in WORKSPACES:
        return
    if value is not None:
        raise DeterminismError(
            f"{_VARIABLE} is {value!r}, under which products on CUDA may change from call to call; "
            f"unset it or set it to {WORKSPACES[0]}"
        )
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise DeterminismError(
            f"CUDA has started without {_VARIABLE} and reads it no more; set it to {WORKSPACES[0]} in the "
            "environment, or call wireframe.kernels.determinism.prepare_process() before anything uses CUDA"
        )
    os.environ[_VARIABLE] = WORKSPACES[0]


@contextlib.contextmanager
def deterministic(device: str = "cuda") -> Iterator[None]:
    """Inside, an operation of torch gives the same bits on every call or raises; outside, all is as it was before.

    The settings are those of the whole process, all its threads included. Uses may be nested. It prepares the
    process too, where that is not too late; the environment variable stays.

    Args:
        device: type of the device that computes; on "cpu" nothing has to be prepared and nothing is too late.

    Raises:
        DeterminismError: it comes too late, see ``prepare_process``.
    """
    if device != "cpu":
        prepare_process()
    with contextlib.ExitStack() as restored:
        for read, write, value in _settings():
            restored.callback(write, read())
            write(value)
        yield


def _settings() -> Iterator[_Setting]:
    """What holds inside ``deterministic``; undone in the opposite order."""
    import torch
    from torch._inductor import config as inductor

    if hasattr(inductor, "deterministic"):
        # torch.use_deterministic_algorithms overwrites it, back to False at the end whatever it was.
        yield _attribute(inductor, "deterministic", True)
    yield (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
        (True, False),
    )
    # Nothing of ours reads memory it has not written; filling all of it would only cost time.
    yield _attribute(torch.utils.deterministic, "fill_uninitialized_memory", False)
    # It takes whichever algorithm was the fastest this time.
    yield _attribute(torch.backends.cudnn, "benchmark", False)
    for dtype in ("fp16", "bf16"):
        yield _reduction(torch.backends.cuda.matmul, f"allow_{dtype}_reduced_precision_reduction")


def _attribute(owner: Any, name: str, value: Any) -> _Setting:
    return lambda: getattr(owner, name), lambda before: setattr(owner, name, before), value


def _reduction(matmul: Any, name: str) -> _Setting:
    """Partial sums of products stay in float32, stated with its twin where torch (2.10 and later) has a pair.

    The twin allows split-K. Its partial sums are added in a fixed order, and to forbid it would make every half
    precision product raise, unless cuBLASLt is the preferred library.
    """
    if not hasattr(matmul, f"{name}_split_k"):
        return _attribute(matmul, name, False)
    return (
        lambda: (getattr(matmul, name), getattr(matmul, f"{name}_split_k")),
        lambda value: setattr(matmul, name, value),
        (False, True),
    )

"""Makes recorded calls of a compiled module again, in a Python that has nothing else loaded.

    python -I -S bench/guard_replay.py MODULE FOLDER

Without NumPy and torch, whose start under valgrind takes longer than the calls. After each call it asks for the number
of its parent process: the mark at which callgrind ends one profile and begins the next.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

CALLS, MEMORY = "calls.json", "memory.bin"


def write(folder, calls):
    """Keeps calls, each a name and positional arguments: numbers, None, bytes, arrays, and sequences of such."""
    memory = bytearray()

    def kept(argument):
        if isinstance(argument, (tuple, list)):
            return [type(argument).__name__, [kept(one) for one in argument]]
        if isinstance(argument, bytes):
            memory.extend(argument)
            return ["bytes", len(argument)]
        if hasattr(argument, "tobytes"):
            view = memoryview(argument)
            memory.extend(view.tobytes())
            return ["array", view.nbytes, view.format, list(view.shape)]
        return ["value", argument]

    listed = [[name, [kept(argument) for argument in arguments]] for name, arguments in calls]
    Path(folder, CALLS).write_text(json.dumps(listed))
    Path(folder, MEMORY).write_bytes(memory)


def read(folder):
    """The calls again; an array is a writable memoryview of its shape."""
    memory = Path(folder, MEMORY).read_bytes()
    place = 0

    def taken(size):
        nonlocal place
        place += size
        return memory[place - size : place]

    def argument(kind, *rest):
        if kind == "value":
            return rest[0]
        if kind == "bytes":
            return taken(rest[0])
        if kind == "array":
            size, form, shape = rest
            return memoryview(bytearray(taken(size))).cast("B").cast(form, shape)
        items = [argument(*one) for one in rest[0]]
        return tuple(items) if kind == "tuple" else items

    listed = json.loads(Path(folder, CALLS).read_text())
    return [(name, [argument(*one) for one in arguments]) for name, arguments in listed]


def main(path, folder):
    # A module finds its entry by its name.
    spec = importlib.util.spec_from_file_location(Path(path).name.partition(".")[0], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls = read(folder)
    os.getppid()
    for name, arguments in calls:
        getattr(module, name)(*arguments)
        os.getppid()


if __name__ == "__main__":
    main(*sys.argv[1:])

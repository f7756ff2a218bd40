"""Finds names that Triton's compiler takes for unchanged by a loop although the loop assigns them.

Before it compiles a loop, the compiler visits its body once and carries from turn to turn those names whose value is
then another one. A name that began as a second name of a value and is given that value's name again inside

    past = x
    for _ in range(n):
        past = x
        x = step(past)

has the same value after that visit, is not carried, and keeps its first value; interpreted, it changes. Run as a
program: planted kernels first, then every launch of ``static_cases``; prints JSON.
"""

import json

import static_toys
import torch
import triton
import triton.language as tl
from triton.compiler import compiler
from triton.compiler.code_generator import CodeGenerator

from wireframe.bench import compile_ahead, static_cases
from wireframe.kernels.launch import Launch


@triton.jit
def _toy_alias_kernel(p_x, p_out, n):
    x = tl.load(p_x)
    past = x
    for _ in range(n):
        past = x
        x = x * x + past
    tl.store(p_out, past)


@triton.jit
def _toy_own_value_kernel(p_x, p_out, n):
    x = tl.load(p_x)
    past = tl.full((), 0.0, tl.float32)
    for _ in range(n):
        past = x
        x = x * x + past
    tl.store(p_out, past)


class _Visited(Exception):
    """The source has become IR; machine code is not wanted."""


def lost_names(launches, architecture=90):
    """Pairs (function, name) of what is assigned in a loop and not carried; and how many launches were looked at."""
    from triton import knobs

    lost, count = set(), 0
    find_carries, make_ir = CodeGenerator._find_carries, compiler.ASTSource.make_ir

    def finding(self, node, liveins, *more, **keywords):
        assigned, visit = set(), self.visit_compound_statement
        # Loops nest, and so do these stand-ins.
        before = vars(self).get("visit_compound_statement")

        def visiting(statements):
            visit(statements)
            if statements is node.body:
                assigned.update(self.local_defs)

        self.visit_compound_statement = visiting
        try:
            found = find_carries(self, node, liveins, *more, **keywords)
        finally:
            if before is None:
                del self.visit_compound_statement
            else:
                self.visit_compound_statement = before
        # The variable of the loop is ignored there too.
        ignored = set(*more, *keywords.values())
        lost.update((self.function_name, name) for name in (assigned & set(liveins)) - {*found[0], *ignored})
        return found

    def stopping(self, *arguments, **keywords):
        make_ir(self, *arguments, **keywords)
        raise _Visited

    CodeGenerator._find_carries, compiler.ASTSource.make_ir = finding, stopping
    knobs.compilation.always_compile = True
    try:
        for launch in launches:
            try:
                compile_ahead.compile_launch(launch, architecture)
            except _Visited:
                count += 1
    finally:
        CodeGenerator._find_carries, compiler.ASTSource.make_ir = find_carries, make_ir
        knobs.compilation.always_compile = False
    return sorted((name.split(".")[-1], variable) for name, variable in lost), count


def toy(kernel):
    x, out = (torch.empty(1, device="meta") for _ in range(2))
    return Launch(kernel, (1,), {"p_x": x, "p_out": out, "n": 5}, num_warps=1)


if __name__ == "__main__":
    every = [launch for case in static_cases.cases() for launch in case.plan(90)]
    print(
        json.dumps(
            {
                "planted": lost_names([toy(_toy_alias_kernel)]),
                "right": lost_names([toy(_toy_own_value_kernel), static_toys.dot_launch()]),
                "every": lost_names(every),
                "launches": len(every),
            }
        )
    )

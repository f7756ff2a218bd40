"""Reads a compiled kernel (cubin) with the tools inside triton's package: resources, machine instructions, loops.

A loop is what compilers call one: a jump back to a block that every way to the jump passes (natural loop). Blocks laid
out behind the end of the kernel that jump back into it are therefore not mistaken for loops.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# ptxas pads with these.
_PADDING = "NOP"
_ENDS = ("EXIT", "RET", "BRX", "JMX")
_TENSOR_CORE = ("HMMA", "HGMMA", "IMMA", "IGMMA", "QGMMA", "DMMA", "BMMA")
_LOCAL = ("LDL", "STL")
_COPY_ASYNC = ("LDGSTS", "UBLKCP", "UTMALDG")

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_ADDRESS = re.compile(r"\b0x([0-9a-f]+)\s*$")
_BARRIER = re.compile(r"\bB\d+\b")


class Usage(NamedTuple):
    """Registers a thread, bytes of stack a thread (what spills take), bytes of static shared memory a block."""

    registers: int
    stack: int
    shared: int


class Instruction(NamedTuple):
    """name: the opcode without its modifiers. conditional: whether a jump may not be taken."""

    address: int
    name: str
    operands: str
    conditional: bool


class Counts(NamedTuple):
    """Instructions: all, of the tensor cores, fused multiply-adds of float32, asynchronous copies, matrix loads."""

    instructions: int
    tensor_core: int
    fma: int
    copy_async: int
    load_matrix: int


def read_cubin(cubin: bytes) -> tuple[Usage, list[Instruction]]:
    """Resources and instructions of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _cuobjdump("--dump-resource-usage", file.name)
        assembly = _cuobjdump("--dump-sass", file.name)
    return parse_usage(resources), parse_instructions(assembly)


def parse_usage(resources: str) -> Usage:
    found = _USAGE.findall(resources)
    if len(found) != 1:
        raise ValueError(f"expected the resources of one function, found {len(found)}")
    return Usage(*map(int, found[0]))


def parse_instructions(assembly: str) -> list[Instruction]:
    found = []
    for address, predicate, opcode, operands in _LINE.findall(assembly):
        # BRA.DIV leaves for code that diverged warps alone run, and keeps its name: it ends no block.
        name = opcode if opcode.startswith("BRA.DIV") else opcode.partition(".")[0]
        # A jump takes its predicate in front, or before the address.
        found.append(Instruction(int(address, 16), name, operands.strip(), bool(predicate) or "," in operands))
    return found


def count(instructions: Sequence[Instruction]) -> Counts:
    def of(*names: str) -> int:
        return sum(instruction.name in names for instruction in instructions)

    everything = len(instructions) - of(_PADDING)
    return Counts(everything, of(*_TENSOR_CORE), of("FFMA"), of(*_COPY_ASYNC), of("LDSM"))


def hot_loop(instructions: Sequence[Instruction]) -> Counts:
    """Counts of the loop that does the work, without loops inside it; zeros where there is no loop.

    That is the one with most tensor-core instructions, or with most fused multiply-adds where no loop has any. Of loops
    that have nearly as many (the ways a kernel can take, of which one runs) the shortest; without products the longest.
    """
    found = [count(loop) for loop in loops(instructions)]
    for products in ("tensor_core", "fma"):
        most = max((getattr(loop, products) for loop in found), default=0)
        if most:
            return min((loop for loop in found if getattr(loop, products) >= 0.9 * most), key=lambda x: x.instructions)
    return max(found, key=lambda x: x.instructions, default=Counts(0, 0, 0, 0, 0))


def spills_among_products(instructions: Sequence[Instruction]) -> int:
    """Accesses to the stack in loops that hold tensor-core instructions; what a kernel spills elsewhere runs rarely."""
    counted = [(count(loop).tensor_core, sum(i.name in _LOCAL for i in loop)) for loop in loops(instructions)]
    return sum(local for products, local in counted if products)


def loops(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """The instructions of every loop, in order of its first; one inside two loops belongs to the inner one."""
    blocks, successors = _graph(instructions)
    dominators = _dominators(successors)
    bodies: dict[int, set[int]] = {}
    for block, targets in successors.items():
        for header in targets:
            if block in dominators and header in dominators[block]:
                bodies.setdefault(header, {header}).update(_body(header, block, successors, dominators))
    found = []
    for _, body in sorted(bodies.items()):
        inside = [other for other in bodies.values() if other < body]
        found.append([i for block in sorted(body.difference(*inside)) for i in blocks[block]])
    return found


def _graph(instructions: Sequence[Instruction]) -> tuple[dict[int, list[Instruction]], dict[int, set[int]]]:
    """Basic blocks by the address of their first instruction, and the blocks that may run after each."""
    by_address = {instruction.address: instruction for instruction in instructions}
    following = dict(zip(list(by_address), list(by_address)[1:]))
    # BSYNC goes on where the BSSY of the same barrier says.
    joins: dict[str, set[int]] = {}
    for instruction in instructions:
        if instruction.name == "BSSY":
            joins.setdefault(_barrier(instruction), set()).add(_target(instruction))
    after: dict[int, set[int]] = {}
    for address, instruction in by_address.items():
        if instruction.name == "BRA":
            targets = {_target(instruction)}
        elif instruction.name == "BSYNC":
            targets = set(joins.get(_barrier(instruction), ()))
        elif instruction.name in _ENDS:
            targets = set()
        else:
            continue
        if (instruction.conditional or (instruction.name == "BSYNC" and not targets)) and address in following:
            targets.add(following[address])
        after[address] = {target for target in targets if target in by_address}
    leaders = {min(by_address, default=0)}.union(*after.values(), (following[a] for a in after if a in following))
    blocks: dict[int, list[Instruction]] = {}
    successors: dict[int, set[int]] = {}
    for address, instruction in by_address.items():
        if address in leaders:
            leader = address
            blocks[leader] = []
        blocks[leader].append(instruction)
        if address in after:
            successors[leader] = after[address]
        elif following.get(address) in leaders:
            successors[leader] = {following[address]}
        else:
            successors.setdefault(leader, set())
    return blocks, successors


def _dominators(successors: dict[int, set[int]]) -> dict[int, set[int]]:
    """For every block that can be reached from the first one: the blocks on every way to it, itself among them."""
    entry = min(successors, default=None)
    reached, waiting = set(), [] if entry is None else [entry]
    while waiting:
        block = waiting.pop()
        if block not in reached:
            reached.add(block)
            waiting.extend(successors[block])
    before = {block: [b for b in reached if block in successors[b]] for block in reached}
    dominators = {block: {entry} if block == entry else set(reached) for block in reached}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {entry}):
            now = {block} | set.intersection(*(dominators[b] for b in before[block]))
            if now != dominators[block]:
                dominators[block], changed = now, True
    return dominators


def _body(header: int, last: int, successors: dict[int, set[int]], reached: dict[int, set[int]]) -> set[int]:
    """Blocks that lead to ``last`` without passing ``header``."""
    body, waiting = set(), [last]
    while waiting:
        block = waiting.pop()
        if block != header and block not in body:
            body.add(block)
            waiting.extend(b for b in reached if block in successors[b])
    return body


def _target(instruction: Instruction) -> int:
    found = _ADDRESS.search(instruction.operands)
    return int(found[1], 16) if found else -1


def _barrier(instruction: Instruction) -> str:
    found = _BARRIER.search(instruction.operands)
    return found[0] if found else ""


def _cuobjdump(option: str, path: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], check=True, capture_output=True, text=True).stdout

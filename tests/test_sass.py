"""Reading machine code: resources, instructions, loops, spills."""

import pytest

from wireframe.bench.sass import count, hot_loop, loops, parse_instructions, parse_usage, spills_among_products


def assembly(*lines):
    """What cuobjdump prints, instructions 16 bytes apart."""
    return "".join(f"        /*{16 * i:04x}*/           {line} ;    /* 0x0000 */\n" for i, line in enumerate(lines))


NESTED = assembly(
    "MOV R1, c[0x0][0x28]",
    "FADD R2, R2, R3",
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "LDGSTS.E.BYPASS.128 [R67], [R6.64], P0",
    "@P1 BRA 0xd0",
    "LDSM.16.M88.4 R8, [R2]",
    "@!P0 BRA 0x20",
    "NOP",
    "@P2 BRA 0x10",
    "FFMA R2, R2, R3, R2",
    "FFMA R3, R2, R3, R2",
    "@!P3 BRA 0x90",
    "EXIT",
    # Out of the way, and back into the middle of the inner loop.
    "FMUL R2, R2, R2",
    "BRA 0x50",
    "BRA 0xf0",
)


def test_loops_are_found_by_their_jumps_and_the_one_that_multiplies_counts():
    instructions = parse_instructions(NESTED)
    assert len(instructions) == 16
    found = [[i.address // 16 for i in loop] for loop in loops(instructions)]
    assert found == [[1, 7, 8], [2, 3, 4, 5, 6, 13, 14], [9, 10, 11]]
    assert hot_loop(instructions) == (7, 1, 0, 1, 1)
    assert count(instructions).instructions == 15


def test_without_tensor_cores_the_loop_of_most_multiply_adds_counts_and_without_loops_none():
    plain = parse_instructions(NESTED.replace("HMMA", "HADD2"))
    assert hot_loop(plain) == (3, 0, 2, 0, 0)
    assert hot_loop(parse_instructions(assembly("FFMA R2, R2, R3, R2", "EXIT", "BRA 0x20"))) == (0, 0, 0, 0, 0)


def test_of_two_ways_that_multiply_alike_the_shorter_loop_counts():
    ways = assembly(
        "@P0 BRA 0x50", "HMMA R4, R8, R12, R4", "FADD R2, R2, R3", "@P1 BRA 0x10", "EXIT",
        "HMMA R4, R8, R12, R4", "@P1 BRA 0x50", "EXIT",
    )  # fmt: skip
    assert hot_loop(parse_instructions(ways)).instructions == 2


def test_a_loop_inside_the_one_that_multiplies_is_not_mistaken_for_it():
    inside = assembly("HMMA R4, R8, R12, R4", "FADD R2, R2, R3", "@P0 BRA 0x10", "@P1 BRA 0x0", "EXIT")
    assert hot_loop(parse_instructions(inside)) == (2, 1, 0, 0, 0)


def test_spills_among_products_are_told_from_those_between_them():
    spilling = assembly("LDL R2, [R1]", "HMMA R4, R8, R12, R4", "STL [R1], R2", "@P0 BRA 0x10", "@P1 BRA 0x0", "EXIT")
    assert spills_among_products(parse_instructions(spilling)) == 1
    assert spills_among_products(parse_instructions(spilling.replace("HMMA", "HADD2"))) == 0


def test_code_that_only_diverged_warps_run_is_no_part_of_a_loop():
    diverging = assembly(
        "FFMA R2, R2, R3, R2", "BRA.DIV UR4, 0x50", "WARPSYNC.ALL", "@P0 BRA 0x0", "EXIT", "FADD R2, R2, R3", "BRA 0x20"
    )
    (loop,) = loops(parse_instructions(diverging))
    assert [i.address // 16 for i in loop] == [0, 1, 2, 3]


def test_reconvergence_goes_on_where_its_barrier_says():
    joined = assembly(
        "BSSY B0, 0x40", "@P0 BRA 0x30", "FADD R2, R2, R3", "BSYNC B0", "FFMA R2, R2, R3, R2", "@P1 BRA 0x0", "EXIT"
    )
    assert [len(loop) for loop in loops(parse_instructions(joined))] == [6]


def test_resources_are_read_and_two_functions_are_refused():
    line = " Function f:\n  REG:80 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:408 TEXTURE:0\n"
    assert parse_usage(line) == (80, 16, 1024)
    with pytest.raises(ValueError, match="found 2"):
        parse_usage(line + line)

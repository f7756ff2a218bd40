"""Points of COLMAP files: the native parsers and the reference agree on values, refusals and messages."""

import struct
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import example, given, settings
from hypothesis import strategies as st
from raw_data import colmap_zip

from wireframe import colmap
from wireframe.errors import SceneError
from wireframe.kernels import native
from wireframe.kernels.dispatch import ImplementationError
from wireframe.kernels.points3d import parse_points3d, parse_points3d_binary

pytestmark = pytest.mark.native

quick = settings(max_examples=300, deadline=None, derandomize=True)
CHUNK = 1 << 18  # bytes, as in csrc/cpu/points3d.cpp


def outcome(parse, data, **options):
    """The bytes of the points, or the message of the error."""
    try:
        points = parse(data, **options)
    except SceneError as error:
        return str(error)
    assert points.dtype == np.float32 and points.shape[1:] == (3,) and points.flags.writeable
    return points.tobytes()


def assert_same(parse, data):
    expected = outcome(parse, data, impl="reference")
    assert outcome(parse, data, impl="native") == expected
    return expected


# ---- points3D.txt ----


def points_text(count: int, digits: int = 17, tracks: int = 9, seed: int = 0) -> bytes:
    """A file as COLMAP writes it, tracks of every length up to ``tracks``."""
    rng = np.random.default_rng(seed)
    lines = ["# 3D point list with one line of data per point:", "#   POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[]"]
    for i, row in enumerate((rng.normal(size=(count, 3)) * 10.0 ** rng.integers(-3, 4, (count, 1))).tolist()):
        numbers = " ".join(f"{value:.{digits}g}" for value in row)
        lines.append(f"{i} {numbers} 10 20 30 0.5" + " 7 1234" * (i % (tracks + 1)))
    return ("\n".join(lines) + "\n").encode()


def padded(text: bytes, size: int) -> bytes:
    """The text after a comment that moves its beginning to byte ``size``."""
    return b"#" * (size - 1) + b"\n" + text


USUAL = {
    "empty": b"",
    "comments": b"# nothing\n\n \t\n#1 2 3 4\n",
    "40000 points": points_text(40000),
    "six digits": points_text(20000, digits=6),
    "no line end at the end": b"1 0.5 -2 3e0",
    "ends in a digit": b"1 2 3 4\n2 5 6 7.25",
    "white space": b"\t1\v2 \f 3\t\t4\r\n\r\n 5 6 7 8 \r\n",
    "signs": b"1 +1 -1 +.5\n2 -0 -0.0 +0.\n3 -.5e-3 +5.E+2 1e30\n",
    "many digits": b"1 " + b"0" * 400 + b"7 0." + b"3" * 900 + b" 12345678901234567890123.5\n",
    "whatever is not read": b"x 1 2 3 \xff\0 nan # y\n\0 4 5 6 1_0\n",
    "a line across three chunks": points_text(3000) + b"9 1 2 3" + b" 4" * CHUNK + b"\n" + points_text(3000),
    "blank chunks": points_text(10) + b"\n" * (3 * CHUNK) + points_text(10),
    "a chunk begins with a line": padded(points_text(9000), CHUNK),
    "a chunk begins with a line end": padded(points_text(9000), CHUNK + 1),
    "a chunk begins within a number": padded(points_text(9000), CHUNK - 8),
}


@pytest.mark.parametrize("name", USUAL)
def test_usual_files_are_read_without_the_reference_and_alike(name, monkeypatch):
    expected = parse_points3d(USUAL[name], impl="reference").tobytes()
    monkeypatch.delattr(colmap, "parse_points3d_reference")
    for threads in (1, 2, 4, None):
        assert outcome(parse_points3d, USUAL[name], impl="native", threads=threads) == expected


@pytest.mark.parametrize("at", range(14))
def test_a_line_is_read_once_wherever_a_chunk_ends(at):
    text = padded(b"1 1.5 2.5 3.5\n2 4.5 5.5 6.5\n", CHUNK - at)
    points = parse_points3d(text, impl="native", threads=2)
    assert points.tolist() == [[1.5, 2.5, 3.5], [4.5, 5.5, 6.5]]


UNUSUAL = {
    "underscores": (b"1 1_000 2 3\n", [[1000, 2, 3]]),
    "below the doubles": (b"1 1e-400 -1e-400 3\n", [[0, -0.0, 3]]),
    "infinite": (b"1 0 0 0\n2 inf 2 3\n", "line 2 of points3D.txt is not finite"),
    "not a number": (b"1 nan 2 3\n", "line 1 of points3D.txt is not finite"),
    "above the floats": (b"1 0 0 0\n\n2 1 3.5e38 0\n", "line 3 of points3D.txt is not finite"),
    "above the doubles": (b"1 1e999 0 0\n", "line 1 of points3D.txt is not finite"),
    "two signs": (b"1 +-1 2 3\n", "line 1 of points3D.txt is not 'id X Y Z ...'"),
    "a lone point": (b"1 . 2 3\n", "line 1 of"),
    "hexadecimal": (b"1 0x10 2 3\n", "line 1 of"),
    "half an exponent": (b"1 1e 2 3\n", "line 1 of"),
    "a letter": (b"1 1 2 3x\n", "line 1 of"),
    "too few": (b"# c\n1 1 2\n3 4 5 6\n", "line 2 of"),
    "a zero byte": (b"1 1 2 3\0\n", "line 1 of"),
    "the last of many": (points_text(20000) + b"1 2 3", "line 20003 of"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_the_native_parser_leaves_is_read_or_refused_by_the_reference(name):
    data, expected = UNUSUAL[name]
    found = np.zeros((20100, 3), np.float32)
    assert native.module().parse_points3d(data, 20100, found, 1) == -1
    if isinstance(expected, str):
        with pytest.raises(SceneError) as caught:
            parse_points3d(data, impl="native", threads=2)
        assert expected in str(caught.value)
    else:
        assert parse_points3d(data, impl="native").tolist() == expected
    assert_same(parse_points3d, data)


@st.composite
def near_a_midpoint(draw):
    """A decimal number beside the middle between two floats, where rounding to double first may show."""
    low = np.float32(draw(st.floats(min_value=2.0**-20, max_value=2.0**20, width=32)))
    middle = (float(low) + float(np.nextafter(low, np.float32(np.inf)))) / 2
    text = f"{middle:.{draw(st.integers(1, 40))}f}"
    last = draw(st.sampled_from("0123456789"))
    return draw(st.sampled_from(["", "-"])) + draw(st.sampled_from([text, text[:-1] + last, text + "0001"]))


decimals = st.one_of(
    near_a_midpoint(),
    st.floats(allow_nan=False, allow_infinity=False, width=32).map(repr),
    st.floats(min_value=-1e6, max_value=1e6).map(repr),
    st.from_regex(r"\A[+-]?[0-9]{0,22}\.?[0-9]{0,22}\Z"),
    st.from_regex(r"\A[+-]?[0-9]{1,9}\.[0-9]{1,12}(e[+-]?[0-9]{1,3})?\Z"),
    st.sampled_from(["", "+", "-", ".", "1.", ".5", "1e5", "nan", "inf", "-inf", "1_0", "0x1", "1e-320"]),
    st.sampled_from(["3.4028235e38", "3.40282356e38", "3.4028236e38", "1e38", "1e-46"]),
)


@settings(quick, max_examples=800)
@given(st.lists(decimals, min_size=3, max_size=3), st.booleans())
@example(["9007199254740993", "1.00000005960464478", "16777217"], False)
@example(["1.000000059604644775390625", "1.0000000596046447754", "1.0000000596046447753"], False)
@example(["9999999999999999999", "18446744073709551616", "0.0000000000000000001"], True)
def test_numbers_are_rounded_as_the_reference_rounds_them(words, windows):
    assert_same(parse_points3d, f"1 {' '.join(words)}{' 9 9 9 9' if windows else ''}\n".encode())


def test_numbers_beside_the_middle_between_two_floats_are_rounded_once_to_double_and_once_to_float():
    rng = np.random.default_rng(0)
    low = (rng.uniform(1, 2, (20000, 3)) * 2.0 ** rng.integers(-9, 20, (20000, 3))).astype(np.float32)
    middle = (low.astype(np.float64) + np.nextafter(low, np.float32(np.inf)).astype(np.float64)) / 2
    # As many digits as fit: one unit in the last of them is less than the spacing of doubles.
    words = [[f"{value:.{digits}g}" for value, digits in zip(row, (17, 18, 19))] for row in middle.tolist()]
    text = "\n".join(f"1 {' '.join(row)} 4" for row in words).encode()
    points = parse_points3d(text, impl="native")
    expected = np.array([[float(word) for word in row] for row in words])
    assert points.tobytes() == expected.astype(np.float32).tobytes()
    # Where the shortcut would go wrong: a quotient beside the middle, and the middle goes the other way.
    short = [float(word.replace(".", "")) / 10.0 ** len(word.partition(".")[2]) for row in words for word in row]
    assert (np.array(short).astype(np.float32) != expected.astype(np.float32).ravel()).sum() > 1000


spaces = st.sampled_from([b" ", b" ", b" ", b"\t", b"  ", b"\r", b"\v", b"\f", b"\x1c", b"\xa0", b"\n", b""])


@st.composite
def mutated_text(draw):
    """Lines that are nearly points, with bytes changed, cut off or repeated."""
    text = b""
    for _ in range(draw(st.integers(0, 6))):
        words = draw(st.lists(decimals.map(str.encode), max_size=7))
        text += draw(st.sampled_from([b"", b" ", b"#", b"1 "])) + draw(spaces).join(words)
        text += draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\r", b" # x\n"]))
    if text and draw(st.booleans()):
        at = draw(st.integers(0, len(text) - 1))
        text = text[:at] + draw(st.binary(max_size=3)) + text[at + draw(st.integers(0, 5)):]
    return text[: draw(st.integers(0, len(text)))] if draw(st.booleans()) else text


@quick
@given(mutated_text(), st.integers(0, 14))
def test_mutated_text_has_the_same_outcome(text, back):
    assert_same(parse_points3d, text)
    assert_same(parse_points3d, padded(text, CHUNK - back))


@quick
@given(st.binary(max_size=200))
def test_any_bytes_have_the_same_outcome(data):
    assert_same(parse_points3d, data)
    assert_same(parse_points3d_binary, data)
    assert_same(parse_points3d_binary, struct.pack("<Q", len(data) % 4) + data)


def test_the_cap_on_lines_is_kept(monkeypatch):
    monkeypatch.setattr(colmap, "MAX_POINTS", 3)
    for text in (b"1 0 0 0\n" * 3, b"1 0 0 0\n" * 3 + b"1 0 0 0", b"\n\n\n", b"\n\n\n1 2 3 4"):
        assert isinstance(assert_same(parse_points3d, text), bytes)
    for text in (b"1 0 0 0\n" * 4, b"\n" * 4, b"1 0 0 0\n" * CHUNK, b"x\n" * 4):
        for threads in (1, 2):
            assert outcome(parse_points3d, text, impl="native", threads=threads).endswith("more than 3 lines")
        assert_same(parse_points3d, text)
    with pytest.raises(SceneError, match="more than 3 lines"):
        colmap.read_points3d(colmap_zip("\n" * 4))


# ---- points3D.bin ----


def points_binary(points, tracks) -> bytes:
    body = struct.pack("<Q", len(points))
    for number, (point, track) in enumerate(zip(points, tracks)):
        body += struct.pack("<Q3d3BdQ", number, *point, 1, 2, 3, 0.5, track) + b"\7" * 8 * track
    return body


def test_binary_points_are_read_without_the_reference_and_alike(monkeypatch):
    rng = np.random.default_rng(0)
    data = points_binary((rng.normal(size=(500, 3)) * 1e3).tolist(), rng.integers(0, 9, 500).tolist())
    expected = parse_points3d_binary(data, impl="reference").tobytes()
    monkeypatch.delattr(colmap, "parse_points3d_binary_reference")
    assert outcome(parse_points3d_binary, data, impl="native") == expected and len(expected) == 6000
    assert parse_points3d_binary(struct.pack("<Q", 0), impl="native").shape == (0, 3)


@quick
@given(st.data())
def test_mutated_binary_files_have_the_same_outcome(data):
    coordinate = st.one_of(st.floats(-9, 9), st.sampled_from([np.nan, np.inf, 1e39, -1e-320]))
    points = data.draw(st.lists(st.tuples(coordinate, coordinate, coordinate), max_size=4))
    whole = bytearray(points_binary(points, data.draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))))
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, max(0, (len(whole) - 8) // 8)))
        number = data.draw(st.sampled_from([0, 1, 2, 5, 2**32, 2**61, 2**64 - 1]))
        whole[8 * at : 8 * at + 8] = struct.pack("<Q", number)
    assert_same(parse_points3d_binary, bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    assert_same(parse_points3d_binary, bytes(whole) + data.draw(st.binary(max_size=2)))


@pytest.mark.parametrize("track", [2**61, 2**63 - 1, 2**64 - 1])
def test_a_track_that_leaves_the_address_space_is_refused(track):
    data = bytearray(points_binary([(1, 2, 3), (4, 5, 6)], [0, 0]))
    data[8 + 43 : 8 + 51] = struct.pack("<Q", track)
    assert assert_same(parse_points3d_binary, bytes(data)) == "COLMAP: points3D.bin ends inside point 2"


def test_the_cap_on_binary_points_is_kept(monkeypatch):
    monkeypatch.setattr(colmap, "MAX_POINTS", 2)
    data = points_binary([(1, 2, 3)] * 3, [0] * 3)
    assert "announces 3 points, above the cap of 2" in assert_same(parse_points3d_binary, data)


# ---- both, and the binding itself ----


@pytest.mark.parametrize("parse", [parse_points3d, parse_points3d_binary])
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_wrong_arguments_of_the_parsers_are_named(parse, impl):
    for data in ("1 2 3 4", bytearray(b"1 2 3 4"), None, np.zeros(3)):
        with pytest.raises(TypeError, match=rf"^{parse.__name__}: data must be bytes"):
            parse(data, impl=impl)
    with pytest.raises(ValueError, match="unknown impl 'fast'"):
        parse(b"", impl="fast")
    with pytest.raises(ImplementationError, match="triton"):
        parse(b"", impl="triton")


@pytest.mark.parametrize("threads", [0, -1])
def test_less_than_one_thread_is_refused(threads):
    with pytest.raises(ValueError, match="threads"):
        parse_points3d(b"", impl="native", threads=threads)


def test_the_binding_refuses_buffers_that_do_not_fit():
    parse = native.module().parse_points3d
    read_only = np.zeros((2, 3), np.float32)
    read_only.flags.writeable = False
    for error, name, data, out in (
        (TypeError, "data", "text", np.zeros((2, 3), np.float32)),
        (TypeError, "data", np.zeros(9), np.zeros((2, 3), np.float32)),
        (ValueError, "data", np.zeros((3, 3), np.uint8), np.zeros((2, 3), np.float32)),
        (TypeError, "out", b"1 2 3 4", np.zeros((2, 3))),
        (ValueError, "out", b"1 2 3 4", np.zeros(3, np.float32)),
        (ValueError, "out", b"1 2 3 4", np.zeros((3, 2), np.float32).T[:, :1]),
        (ValueError, "out", b"1 2 3 4\n" * 3, np.zeros((2, 3), np.float32)),
        ((ValueError, BufferError), "", b"1 2 3 4", read_only),
    ):
        with pytest.raises(error, match=rf"^{name}"):
            parse(data, 9, out, 1)
    with pytest.raises(ValueError, match=r"^out"):
        native.module().parse_points3d_binary(points_binary([(1, 2, 3)], [0]), 9, np.zeros((0, 3), np.float32))


def test_reading_points_and_labels_does_not_load_torch():
    code = """
import sys
import numpy as np
from wireframe import classes, colmap
from raw_data import colmap_zip
assert len(colmap.read_points3d(colmap_zip())) == 3
classes.colors_to_ids(np.zeros((2, 3), np.uint8), "ade")
print("torch" in sys.modules)
"""
    paths = [path for path in sys.path if path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}"], capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == ("False", "")

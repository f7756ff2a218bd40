"""COLMAP points are read from the ZIP in memory, and every cap is enforced."""

import io
import struct
import time
import zipfile

import numpy as np
import pytest
from raw_data import colmap_zip

from wireframe import colmap
from wireframe.colmap import read_points3d
from wireframe.errors import SceneError

EXPECTED = np.array([[0, 0, 5], [1, 2, 3], [-1, 0.5, 4]], dtype=np.float32)


def _zip(members, method=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def test_points_are_read_in_file_order_as_float32():
    points = read_points3d(colmap_zip())
    assert points.dtype == np.float32
    np.testing.assert_array_equal(points, EXPECTED)


@pytest.mark.parametrize("name", ["sparse/0/points3D.txt", "a/POINTS3D.TXT", "points3D.txt"])
def test_points_file_is_found_by_name_in_any_folder(name):
    np.testing.assert_array_equal(read_points3d(colmap_zip(name=name)), EXPECTED)


def test_file_nearest_to_the_root_is_read():
    data = _zip([("sparse/0/points3D.txt", "1 9 9 9 0 0 0 0"), ("points3D.txt", "1 1 2 3 0 0 0 0")])
    np.testing.assert_array_equal(read_points3d(data), [[1, 2, 3]])


def test_binary_points_equal_text_points():
    body = struct.pack("<Q", 3)
    for number, (point, track) in enumerate(zip(EXPECTED.tolist(), (2, 0, 3))):
        body += struct.pack("<Q3d3BdQ", number, *point, 1, 2, 3, 0.5, track) + b"\0" * 8 * track
    np.testing.assert_array_equal(read_points3d(_zip([("points3D.bin", body)])), EXPECTED)
    for cut in (4, 20, len(body) - 1):
        with pytest.raises(SceneError, match=r"points3D\.bin"):
            read_points3d(_zip([("points3D.bin", body[:cut])]))


@pytest.mark.parametrize("text", ["", "# nothing\n", "\n\r\n"])
def test_no_points_is_an_empty_array(text):
    points = read_points3d(colmap_zip(text))
    assert points.shape == (0, 3) and points.dtype == np.float32


def test_windows_line_ends_and_bare_coordinates_are_read():
    np.testing.assert_array_equal(read_points3d(colmap_zip("# c\r\n1 1 2 3\r\n2 4 5 6 0\r\n")), [[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize("line", ["2 1 2", "2 1 x 3 0 0 0 0", "2 nan 2 3", "2 1 inf 3 0 0 0 0", "2 1e300 0 0"])
def test_a_bad_line_is_named(line):
    with pytest.raises(SceneError, match=r"line 3 of points3D\.txt"):
        read_points3d(colmap_zip(f"# header\n1 0 0 0 0 0 0 0\n{line}\n"))


def test_coordinates_are_rounded_once_from_float64():
    text = "1 1.00000005960464478 -0.1 123456.789012345 0 0 0 0"
    expected = np.array([[1.00000005960464478, -0.1, 123456.789012345]]).astype(np.float32)
    np.testing.assert_array_equal(read_points3d(colmap_zip(text)), expected)


# Ids of their own: an archive holds the time, and processes that share the tests must find the same names.
@pytest.mark.parametrize(
    "data", [b"", b"PK", b"not a zip", colmap_zip()[:-30], colmap_zip()[:100]],
    ids=["nothing", "PK", "text", "without its end", "its beginning"],
)  # fmt: skip
def test_what_is_no_zip_is_refused(data):
    with pytest.raises(SceneError, match="COLMAP"):
        read_points3d(data)


def test_zip_without_points_names_what_it_holds():
    with pytest.raises(SceneError, match=r"cameras\.txt"):
        read_points3d(_zip([("cameras.txt", "")]))


def test_caps_on_members_points_size_and_ratio(monkeypatch):
    bomb = _zip([("points3D.txt", b" " * (8 << 20))])
    with pytest.raises(SceneError, match="compressed more than"):
        read_points3d(bomb)
    monkeypatch.setattr(colmap, "MAX_POINTS_BYTES", 40)
    with pytest.raises(SceneError, match="above the cap of 40"):
        read_points3d(colmap_zip())
    monkeypatch.undo()
    monkeypatch.setattr(colmap, "MAX_MEMBERS", 2)
    with pytest.raises(SceneError, match="more than 2 members"):
        read_points3d(colmap_zip())
    monkeypatch.undo()
    monkeypatch.setattr(colmap, "MAX_POINTS", 2)
    with pytest.raises(SceneError, match="more than 2 lines"):
        read_points3d(colmap_zip())


def _with_announced_size(data: bytes, size: int) -> bytes:
    """``data`` with the uncompressed size of its only member changed, in both of its records."""
    local, central = data.index(b"PK\x03\x04"), data.index(b"PK\x01\x02")
    changed = bytearray(data)
    changed[local + 22:local + 26] = changed[central + 24:central + 28] = struct.pack("<I", size)
    return bytes(changed)


@pytest.mark.parametrize("announced", [10, 5000])
def test_actual_size_must_be_the_announced_one(announced):
    data = _zip([("points3D.txt", "1 0 0 0 0 0 0 0\n" * 100)])
    with pytest.raises(SceneError, match=r"corrupt|holds"):
        read_points3d(_with_announced_size(data, announced))


def test_encrypted_duplicate_and_oddly_compressed_members_are_refused():
    data = bytearray(_zip([("points3D.txt", "1 0 0 0")]))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(SceneError, match="encrypted"):
        read_points3d(bytes(data))
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = _zip([("points3D.txt", "1 0 0 0"), ("points3D.txt", "1 1 1 1")])
    with pytest.raises(SceneError, match="two members named"):
        read_points3d(twice)
    with pytest.raises(SceneError, match="two points files"):
        read_points3d(_zip([("a/points3D.txt", "1 0 0 0"), ("b/points3D.txt", "1 1 1 1")]))
    with pytest.raises(SceneError, match="not stored or deflated"):
        read_points3d(colmap_zip(method=zipfile.ZIP_BZIP2))


def test_a_member_without_a_name_is_passed_over_or_refused():
    data = colmap_zip().replace(b"images.txt", b"\0mages.txt")
    np.testing.assert_array_equal(read_points3d(data), EXPECTED)


def test_forty_thousand_points_are_read_quickly():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(40_000, 3)) * 10
    track = " 1 2 3 4 5 6 7 8 9 10"
    text = "\n".join(f"{i} {x:.15f} {y:.15f} {z:.15f} 10 20 30 0.5{track}"
                     for i, (x, y, z) in enumerate(points.tolist()))
    data = colmap_zip(text)
    start = time.process_time()
    read = read_points3d(data)
    seconds = time.process_time() - start
    assert read.shape == (40_000, 3)
    np.testing.assert_allclose(read, points, rtol=1e-6)
    # 0.06 s measured; the bound only catches a return to splitting whole tracks.
    assert seconds < 1.0

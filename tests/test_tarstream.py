"""Our tar reader gives the members that the standard library's gives."""

import io
import tarfile

import pytest
from raw_data import tar_bytes

from wireframe.tarstream import TarError, iter_members


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_members_equal_those_of_tarfile_in_every_format(form, mode):
    names = ["a.txt", "folder/" * 20 + "b.txt", "n" * 99 + "/" + "m" * 90]
    names += ["k" * 180 + ".png", "é" * 70] if form != tarfile.USTAR_FORMAT else []
    members = [(name, bytes([index]) * (index * 300 + 1)) for index, name in enumerate(names)]
    assert [tuple(member) for member in iter_members(io.BytesIO(tar_bytes(members, form, mode)))] == members


def test_member_of_no_bytes_and_a_member_of_whole_blocks_are_read():
    members = [("empty", b""), ("block", b"x" * 512), ("two", b"y" * 1024)]
    assert [tuple(member) for member in iter_members(io.BytesIO(tar_bytes(members)))] == members


def test_what_follows_the_closing_block_is_not_read():
    data = tar_bytes([("a", b"1")]) + tar_bytes([("b", b"2")])
    assert [tuple(member) for member in iter_members(io.BytesIO(data))] == [("a", b"1")]


def test_a_tar_without_its_closing_block_gives_its_members_and_then_an_error():
    data = tar_bytes([("a", b"1"), ("b", b"2")])[:2048]
    members = iter_members(io.BytesIO(data))
    assert [next(members).name, next(members).name] == ["a", "b"]
    with pytest.raises(TarError, match="truncated"):
        next(members)


def test_a_damaged_checksum_is_noticed():
    data = bytearray(tar_bytes([("a", b"1"), ("b", b"2")]))
    data[1024] ^= 1
    members = iter_members(io.BytesIO(bytes(data)))
    assert next(members).name == "a"
    with pytest.raises(TarError, match="checksum"):
        next(members)

"""Texts from outside on one printable line."""

import pytest

from wireframe.errors import one_line, printable


@pytest.mark.parametrize("error, text", [
    (ValueError("two\nlines\tand  blanks"), "two lines and blanks"),
    (ValueError(), "ValueError"),
    (KeyError(), "KeyError"),
    (ValueError("\n \r\n"), "ValueError"),
    (ValueError("\x1b[2Jgone\x00"), r"\x1b[2Jgone\x00"),
    ("\ud800 é \u202e", r"\ud800 é \u202e"),
])
def test_any_error_is_one_printable_line(error, text):
    assert one_line(error) == text and text.isprintable()


def test_long_texts_are_cut():
    assert len(one_line("x" * 500)) == 200 and one_line("\x1b" * 500).endswith("...")
    assert one_line("x" * 500, limit=1000) == "x" * 500


def test_printable_text_stays_as_it_is():
    assert printable("  a  ü  ") == "  a  ü  "
    assert printable("a\nb\x9b") == r"a\nb\x9b"

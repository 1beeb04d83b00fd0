"""Numbers and excerpts of untrusted text are bounded, and parsed in one place."""

import ast
import logging
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonia.process.log_setup import _LineFormatter
from harmonia.untrusted import excerpt, integer

PACKAGE = Path(__file__).parents[1] / "harmonia"
OWN_NUMBERS = {
    "time.time()",
    "POSITIVE_TTL_S",
    "time.monotonic() - began + max_age",
    "host != '::'",
    "newest",  # an integer from SQLite, like the next two
    "total",
    "newer",
    "row[0]",
    "row.pid",  # a process of ours, as a double
    "descriptor",  # from a system call
    "taken",  # the number of a token, as a double; likewise the next two
    "self._numbers[place]",
    "number",
    "time.time() + amounts.duration(text)",
    "length[1]",  # at most six digits
    "part",  # the index of a table in the configuration file
    "key[1]",
    "Decimal(number) * (1000 if suffix.upper() == 'B' else 1024) ** exponent",  # amounts.py bounds the digits
    "seconds",
    "super().convert(count, param, ctx)",
}
"""Arguments of `int` that contain no untrusted text."""


def test_untrusted_text_becomes_a_number_in_one_place() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name == "untrusted.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "int":
                assert ast.unparse(node.args[0]) in OWN_NUMBERS, f"{path}:{node.lineno}: use untrusted.integer"
            # `int` must not be passed as a function, either.
            if isinstance(node, ast.Call) and any(isinstance(arg, ast.Name) and arg.id == "int" for arg in node.args):
                names = {"isinstance", "cast", "Annotated", "ParamType"}
                assert isinstance(node.func, ast.Name)
                assert node.func.id in names, f"{path}:{node.lineno}: use untrusted.integer"


@given(st.integers(0), st.integers(0), st.integers(0, 40))
def test_integer_is_parsed_up_to_its_bound(number: int, highest: int, zeros: int) -> None:
    text = "0" * zeros + str(number)
    expected = number if number <= highest else None
    assert integer(text, highest) == integer(text.encode(), highest) == expected
    assert integer(f"{number:o}", highest, base=8) == expected


@pytest.mark.parametrize(
    "text", ["", " 1", "1 ", "+1", "-1", "1_0", "0x1", "1.0", "1e3", "\u0661", "\u00b2", "a", "\x001", "\udcff"]
)
def test_other_text_is_not_an_integer(text: str) -> None:
    assert integer(text, 1 << 64) is None
    assert integer(text.encode("utf-8", "surrogateescape" if "\udcff" in text else "strict"), 1 << 64) is None


@pytest.mark.parametrize("highest", [0, 1 << 63])
def test_thousands_of_digits_raise_nothing(highest: int) -> None:
    digits = "9" * (sys.get_int_max_str_digits() + 1)
    assert integer(digits, highest) is None
    assert integer("0" * 100_000 + "0", highest) == 0


@given(st.text(min_size=0, max_size=300) | st.binary(max_size=300))
def test_excerpt_is_short_and_printable(text: str | bytes) -> None:
    assert excerpt(text).isprintable()
    assert len(excerpt(text)) < 1200
    assert len(text) > 100 or excerpt(text) == repr(text)


@pytest.mark.parametrize("journal", [True, False])
def test_log_record_is_one_short_printable_line(*, journal: bool) -> None:
    formatter = _LineFormatter(journal=journal)
    record = logging.LogRecord("harmonia", logging.ERROR, "", 0, "%s", ("\x1b[2J\r\n\x00\u2028" * 1_000_000,), None)
    line = formatter.format(record)
    assert line.isprintable()
    assert len(line) < 200_000
    assert "\\x1b[2J\\r | \\x00\\u2028" in line

"""The documents: their blocks of code and their sentences."""

import re
import textwrap
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    found = re.finditer(r"^( *)```([\w.]*)\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)
    for match in found:
        line = match.string.count("\n", 0, match.start()) + 1
        yield Block(str(page.relative_to(ROOT)), line, match[2], textwrap.dedent(match[3]))


BLOCKS = [block for page in PAGES for block in blocks(page)]


_FENCE = re.compile(r"^( *)```.*?^ *```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`]*`")
_SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)[.!?][\"')*]*\s+(?=\S)")
_LIST_MARK = re.compile(r" *(?:[-*]|\d+\.) ")


def without_fences(page: Path) -> str:
    """Return the text of a page with empty lines instead of fenced blocks, so that line numbers stay right."""
    return _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), page.read_text())


def sentences(text: str) -> list[str]:
    """Split a paragraph into its sentences, each on one line."""
    text = " ".join(text.split())
    masked = _CODE.sub(lambda code: "x" * len(code[0]), text)
    ends = [0, *(end.end() for end in _SENTENCE_END.finditer(masked)), len(text)]
    return [text[start:end].rstrip() for start, end in pairwise(ends) if text[start:end]]


def paragraphs(lines: Iterable[str]) -> Iterator[tuple[int, str, list[str]]]:
    """Yield each paragraph and list item of a page: number of its first line, its list mark, its lines.

    Tables, headings, comments and the targets of links are left out.
    """
    first, mark, inside = 0, "", list[str]()
    for number, line in enumerate([*lines, ""], 1):
        starts = _LIST_MARK.match(line)
        is_prose = bool(line.strip()) and not re.match(r"\||#+ |<!--|\[[^\]]+\]: |!\[", line)
        if inside and (starts or not is_prose):
            yield first, mark, inside
            inside = []
        if is_prose:
            if not inside:
                first, mark = number, starts[0] if starts else ""
            inside.append(line[len(mark) :] if not inside else line.strip())

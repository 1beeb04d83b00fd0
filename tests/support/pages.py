"""The documents, and the blocks of code in them."""

import re
import textwrap
from collections.abc import Iterator
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

"""docs/cli.md tells what `--help` tells."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from harmonia import cli
from harmonia.cli.man import commands, options, paragraphs

DOCUMENT = Path(__file__).parents[1] / "docs/cli.md"


def reference() -> Iterator[str]:
    for context in commands(cli.main):
        yield f"## `{context.command_path}`\n"
        usage = " ".join(context.command.collect_usage_pieces(context))
        yield f"```text\n{context.command_path} {usage}\n```\n"
        for literal, paragraph in paragraphs(context.command.help):
            yield f"```text\n{paragraph}\n```\n" if literal else f"{paragraph}\n"
        if rows := options(context):
            yield "| option | does |\n|---|---|"
            yield from (f"| `{what}` | {does.replace('|', '/')} |" for what, does in rows)
            yield ""
    for _, paragraph in paragraphs(cli.main.epilog):
        title, _, lines = paragraph.partition(":\n")
        yield f"## {title}\n\n```text\n{lines}\n```\n"


def test_the_reference_is_what_the_help_says() -> None:
    head, mark, _ = DOCUMENT.read_text().partition("<!-- generated -->\n")
    text = head + mark + "\n" + "\n".join(reference())
    if text != DOCUMENT.read_text():
        DOCUMENT.write_text(text)
        pytest.fail("docs/cli.md was out of date; it is written anew, look and commit it")

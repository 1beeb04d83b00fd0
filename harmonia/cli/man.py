"""`harmonia man`: manual page generated from the texts of `--help`."""

import inspect
import re
from collections.abc import Iterator

import click

from harmonia import __version__, cli


@click.command("man", hidden=True)
def command() -> None:
    """Print the manual page for man(1): `harmonia man > harmonia.1`."""
    click.echo("\n".join(roff(cli.main)))


def commands(command: click.Command, parent: click.Context | None = None) -> Iterator[click.Context]:
    """Yield the contexts of the command and of all its visible subcommands. A context has the command's full name."""
    context = click.Context(command, parent=parent, info_name=command.name if parent else "harmonia")
    yield context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None and not inner.hidden:
                yield from commands(inner, context)


def options(context: click.Context) -> list[tuple[str, str]]:
    """Return each visible option's usage and description."""
    records = (each.get_help_record(context) for each in context.command.params if isinstance(each, click.Option))
    return [record for record in records if record]


def paragraphs(text: str | None) -> Iterator[tuple[bool, str]]:
    """Yield each paragraph of a help text, with True before those whose line breaks must be kept."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text or "")):
        literal = paragraph.lstrip("\n").startswith("\b")
        yield literal, paragraph.strip("\n\b") if literal else " ".join(paragraph.split())


def roff(main: click.Command) -> Iterator[str]:
    """Yield the lines of the manual page, in the macros of man(7)."""
    yield f'.TH HARMONIA 1 "" "Harmonia {__version__}" "User Commands"'
    yield ".SH NAME"
    yield r"harmonia \- a Nix binary cache"
    top, *others = commands(main)
    yield ".SH SYNOPSIS"
    yield from _usage(top)
    yield ".SH DESCRIPTION"
    yield from _described(top)
    yield ".SH COMMANDS"
    for context in others:
        yield f".SS {_escaped(context.command_path)}"
        yield from _usage(context)
        yield ".PP"
        yield from _described(context)
    for _, paragraph in paragraphs(main.epilog):
        title, _, lines = paragraph.partition(":\n")
        yield f".SH {_escaped(title.upper())}"
        yield from _kept(lines)
    yield ".SH SEE ALSO"
    yield r".BR nix (1),"
    yield r".BR nix.conf (5)"


def _usage(context: click.Context) -> Iterator[str]:
    yield f".B {_escaped(context.command_path)}"
    yield _escaped(" ".join(context.command.collect_usage_pieces(context)))


def _described(context: click.Context) -> Iterator[str]:
    for number, (literal, paragraph) in enumerate(paragraphs(context.command.help)):
        if number:
            yield ".PP"
        yield from _kept(paragraph) if literal else (_escaped(paragraph),)
    for what, does in options(context):
        yield from (".TP", f".B {_escaped(what)}", _escaped(does))


def _kept(lines: str) -> Iterator[str]:
    yield from (".nf", _escaped(lines), ".fi")


def _escaped(text: str) -> str:
    text = text.replace("\\", r"\e").replace("-", r"\-").replace("`", r"\`").replace("'", r"\(aq")
    text = re.sub(r"[^\x00-\x7f]", lambda letter: rf"\[u{ord(letter[0]):04X}]", text)
    return re.sub(r"(?m)^(\s*)\.", r"\1\&.", text).replace('"', r"\(dq")

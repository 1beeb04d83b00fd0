"""`harmonia check-config`."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import click
import msgspec

from harmonia.config.loader import Source
from harmonia.config.proxy import without_password
from harmonia.config.settings import Settings
from harmonia.process import preflight


@click.command("check-config")
@click.option(
    "--text-only",
    is_flag=True,
    help="Check only the text, for use on another machine: skip store, keys and certificates.",
)
@click.pass_obj
def command(config_file: str | None, *, text_only: bool) -> None:
    """Check the settings, and show where each value comes from.

    The settings are checked against this machine, as when the server starts. Two problems only show when the server
    starts: the port is in use, or the cache directory or `push.state_dir` is not writable.

    The output is an equivalent configuration file. Each line sets one value, followed by its source: file and line,
    environment variable, or default.
    """
    source = Source.read(config_file, os.environ)
    with nullcontext(source.settings()) if text_only else preflight.checked(source) as settings:
        origins = source.origins()
    click.echo("# The configuration is valid. Values in effect, each with its source:")
    for line in explained(settings, origins):
        click.echo(line)


def explained(settings: Settings, origins: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of a TOML file with the settings, and each value's source as a comment."""
    derived = {"real_nix_store": settings.real_store, "nix_db_path": settings.database, "log_dir": settings.logs}
    values = {field.name: getattr(settings, field.name) for field in msgspec.structs.fields(settings)}
    tables = {key: value for key, value in values.items() if _is_table(value)}
    del values["sign_key_path"]  # the loader has added it to sign_key_paths
    for key in values.keys() - tables.keys():
        values[key] = derived.get(key, values[key])
    kinds = {field.name: field.type for field in msgspec.structs.fields(Settings)}
    for key, value in values.items():
        if key not in tables:
            yield _line(key, value, origins[key], _default(kinds[key]))
    for key, table in tables.items():
        many = isinstance(table, tuple)
        for number, each in enumerate(table if many else (table,)):
            yield f"\n[[{key}]]" if many else f"\n[{key}]"
            for name, value in msgspec.to_builtins(each).items():
                path = f"{key}.{number}.{name}" if many else f"{key}.{name}"
                shown = without_password(value) if name == "proxy" and value else value
                yield _line(name, shown, origins.get(path, "default"), None)


def _is_table(value: object) -> bool:
    if isinstance(value, tuple):
        return bool(value) and isinstance(value[0], msgspec.Struct)
    return isinstance(value, msgspec.Struct)


def _line(key: str, value: Any, origin: str, default: str | None) -> str:  # noqa: ANN401 (settings have any type)
    if value is None:
        return f"# {key} is not set{f': {default}' if default else ''}"
    # JSON strings, numbers, booleans and arrays of them are valid TOML.
    line = f"{key} = {json.dumps(value, ensure_ascii=False)}"
    comment = f"{origin}: {default}" if default and origin == "default" else origin
    return f"{line:<50}  # {comment}" if comment else line


def _default(kind: object) -> str | None:
    """Return how the default is found, or None if the default is a plain value."""
    schema = msgspec.inspect.type_info(kind)
    if not (isinstance(schema, msgspec.inspect.Metadata) and schema.extra and "default" in schema.extra):
        return None
    return str(schema.extra["default"]).replace("`", "")

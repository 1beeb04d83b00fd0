"""Generated documents: `make docs` writes them, tests/test_generated.py compares them with the code."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import msgspec

from harmonia import cli
from harmonia.cli.man import commands, options, paragraphs
from harmonia.config.settings import TABLES, Settings
from harmonia.config.tables.upstream import Upstream
from harmonia.config.value_types import expected
from support import slow_network
from support.nixos_machine import Machine, configured, evaluate
from support.pages import ROOT, sentences
from support.speed_chart import speed_chart


def one_a_line(paragraph: str) -> str:
    """Return the paragraph with one sentence per line."""
    return "\n".join(sentences(paragraph))


def _between(page: str, mark: str, text: str) -> str:
    """Return the page with `text` between the marks."""
    head, begin, rest = page.partition(f"<!-- {mark} -->\n")
    _, end, tail = rest.partition(f"<!-- /{mark} -->\n")
    if not end:
        raise ValueError(f"no <!-- {mark} --> or no end of it")
    return f"{head}{begin}{text}\n{end}{tail}"


def _command_reference() -> Iterator[str]:
    for context in commands(cli.main):
        yield f"## `{context.command_path}`\n"
        usage = " ".join(context.command.collect_usage_pieces(context))
        yield f"```text\n{context.command_path} {usage}\n```\n"
        for literal, paragraph in paragraphs(context.command.help):
            yield f"```text\n{paragraph}\n```\n" if literal else one_a_line(paragraph) + "\n"
        if rows := options(context):
            yield "| option | does |\n|---|---|"
            yield from (f"| `{option}` | {does.replace('|', '/')} |" for option, does in rows)
            yield ""
    for _, paragraph in paragraphs(cli.main.epilog):
        title, _, lines = paragraph.partition(":\n")
        yield f"## {title}\n\n```text\n{lines}\n```\n"


def _settings_table(struct: type[msgspec.Struct]) -> str:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for item, info in zip(msgspec.structs.fields(struct), msgspec.inspect.type_info(struct).fields, strict=True):  # type: ignore[attr-defined]
        schema, extra = info.type.extra_json_schema, info.type.extra or {}
        if item.name in {*TABLES, "upstream"}:
            continue  # has its own table
        if item.required:
            rows.append(f"| `{item.name}` | {expected(item.type)} | | {schema['description']} |")
            continue
        default = extra.get("default") or ("none" if item.default is None else f"`{json.dumps(item.default)}`")
        rows.append(f"| `{item.name}` | {expected(item.type)} | {default} | {schema['description']} |")
    return "\n".join(rows)


_SIMPLE: Mapping[Any, str] = {
    msgspec.inspect.BoolType: "bool",
    msgspec.inspect.FloatType: "number",
    msgspec.inspect.StrType: "string",
    msgspec.inspect.VarTupleType: "strings",
}


def module_keys(struct: type[msgspec.Struct]) -> dict[str, Any]:
    infos = msgspec.inspect.type_info(struct).fields  # type: ignore[attr-defined]
    return {
        item.name: _module_key(item, info) for item, info in zip(msgspec.structs.fields(struct), infos, strict=True)
    }


def _module_key(item: Any, info: Any) -> dict[str, Any]:
    """Return the description of one setting for module.nix."""
    key: dict[str, Any] = {"description": info.type.extra_json_schema["description"]}
    if item.default_factory is msgspec.NODEFAULT and item.default is not msgspec.NODEFAULT:
        key["default"] = "none" if item.default is None else f"`{msgspec.json.encode(item.default).decode()}`"
    key |= {name: text for name, text in (info.type.extra or {}).items() if name == "default"}
    kind = info.type
    is_file = False
    while isinstance(kind, msgspec.inspect.Metadata | msgspec.inspect.UnionType):
        if isinstance(kind, msgspec.inspect.Metadata):
            is_file = is_file or "file" in (kind.extra or {})
            kind = kind.type
        else:  # an optional setting: unwrap the union with None
            [kind] = [each for each in kind.types if not isinstance(each, msgspec.inspect.NoneType)]
    more: dict[str, Any]
    match kind:
        case msgspec.inspect.IntType(ge=low, le=high):
            more = {"type": "int", "min": low, "max": high}
        case msgspec.inspect.LiteralType(values=words):
            more = {"type": "enum", "words": list(words)}
        case msgspec.inspect.VarTupleType(item_type=msgspec.inspect.Metadata(extra={"file": True})):
            more = {"type": "files"}
        case msgspec.inspect.VarTupleType(item_type=msgspec.inspect.StructType(cls=struct)):
            more = {"type": "tables", "keys": module_keys(struct)}
        case msgspec.inspect.StructType(cls=struct):
            more = {"type": "table", "keys": module_keys(struct)}
        case _:
            more = {"type": "file" if is_file else _SIMPLE[type(kind)]}
    return key | more


def nixos_options() -> str:
    """Return the reference of the module's options, evaluated without nixpkgs."""

    def shown(value: Any) -> str:
        if isinstance(value, dict) and "_type" in value:
            text = value["text"].strip()
            return text if value["_type"] == "literalMD" else f"`{text}`"
        return f"`{nix_value(value)}`"

    def nix_value(value: Any) -> str:
        match value:
            case None | bool() | int() | str():
                return json.dumps(value)
            case list():
                return f"[ {' '.join(map(nix_value, value))} ]" if value else "[ ]"
            case dict():
                inner = "".join(f'"{name}" = {nix_value(each)}; ' for name, each in value.items())
                return f"{{ {inner}}}"
        raise AssertionError(value)

    parts = [
        "# Options of the NixOS module\n",
        "`make docs` writes this page from `module.nix`.\n[Set up a cache on NixOS](../how-to/nixos.md) uses them.\n",
    ]
    for each in evaluate(f'(import {ROOT}/nixos-tests/eval {{ nixpkgs = ""; }}).options'):
        parts.append(f"## `{each['name']}`\n")
        parts.extend(one_a_line(paragraph) + "\n" for paragraph in each["description"].strip().split("\n\n"))
        rows = [f"- type: {each['type']}"]
        if not each["required"] and (each["default"] is not None or ".settings." not in each["name"]):
            rows.append(f"- default: {shown(each['default'])}")
        if each["example"] is not None:
            example = shown(each["example"])
            fence = "\n  ```nix\n" + "".join(f"  {line}\n" for line in example.strip("`").split("\n")) + "  ```"
            rows.append(f"- example:{fence}" if "\n" in example else f"- example: {example}")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


@cache
def _units() -> Machine:
    return configured('enable = true; signKeyPaths = [ "/etc/harmonia/cache.secret" ];', arguments='nixpkgs = "";')


def service() -> str:
    """Return the module's service for a machine without NixOS."""
    unit = re.sub(r"^Environment=.*\n", "", _units()["service"], flags=re.MULTILINE)
    start = "ExecStart=/opt/harmonia/bin/harmonia --config /etc/harmonia/harmonia.toml serve"
    return re.sub(r"^ExecStart=.*", start, unit, flags=re.MULTILINE)


def watch_service() -> str:
    """Return the module's service for `harmonia watch` on a machine without NixOS."""
    settings = 'enable = true; url = "https://cache.example.org/push";'
    keys = 'signKeyPaths = [ "/etc/harmonia/cache.secret" ]; settings.watch.netrc = "/etc/nix/netrc";'
    machine = configured(f"watch = {{ {settings} }}; {keys}", arguments='nixpkgs = "";')
    unit = re.sub(r"^Environment=.*\n", "", machine["watch"], flags=re.MULTILINE)
    start = "ExecStart=/opt/harmonia/bin/harmonia --config /etc/harmonia/watch.toml watch"
    return re.sub(r"^ExecStart=.*", start, unit, flags=re.MULTILINE)


def socket() -> str:
    unit: str = _units()["socket"]
    return unit


@cache
def targets() -> dict[str, str]:
    """Return the Makefile's documented targets with their descriptions."""
    return dict(re.findall(r"(?m)^([a-z-]+):.*?  ## (.*)$", (ROOT / "Makefile").read_text()))


def cli_reference() -> str:
    head, mark, _ = (ROOT / "docs/reference/cli.md").read_text().partition("<!-- generated -->\n")
    return head + mark + "\n" + "\n".join(_command_reference())


def configuration() -> str:
    text = (ROOT / "docs/reference/configuration.md").read_text()
    structs: dict[str, type[msgspec.Struct]] = {"keys": Settings, "upstream": Upstream, **TABLES}
    for mark, struct in structs.items():
        text = _between(text, mark, _settings_table(struct))
    return text


def benchmarks() -> str:
    return _between((ROOT / "docs/explanation/benchmarks.md").read_text(), "slow network", slow_network.table())


def contributing() -> str:
    rows = [f"| `make {name}` | {does} |" for name, does in targets().items()]
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return _between(text, "targets", "\n".join(["| command | does |", "|---|---|", *rows]))


def module_settings() -> str:
    return json.dumps(module_keys(Settings), indent=2) + "\n"


DOCUMENTS: dict[str, Callable[[], str]] = {
    "CONTRIBUTING.md": contributing,
    "docs/reference/cli.md": cli_reference,
    "docs/reference/configuration.md": configuration,
    "docs/explanation/benchmarks.md": benchmarks,
    "docs/pictures/slow-network.svg": slow_network.chart,
    "docs/pictures/speed.svg": speed_chart,
    "nix/module-settings.json": module_settings,
}
EVALUATED: dict[str, Callable[[], str]] = {
    "docs/reference/nixos-options.md": nixos_options,
    "docs/systemd/harmonia.service": service,
    "docs/systemd/harmonia.socket": socket,
    "docs/systemd/harmonia-watch.service": watch_service,
}
"""Documents that need Nix. They depend on nix/module-settings.json."""


def main() -> None:
    """Write each document that has changed."""
    documents = dict(DOCUMENTS)
    if shutil.which("nix-instantiate"):
        documents |= EVALUATED
    else:
        print(f"skipped without Nix (apt-get install nix-bin): {', '.join(EVALUATED)}", file=sys.stderr)
    for name, make in documents.items():
        text = make()
        if (ROOT / name).read_text() != text:
            (ROOT / name).write_text(text)
            print(f"wrote {name}")


if __name__ == "__main__":
    main()

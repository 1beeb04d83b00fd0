"""Builder of the stub's pkgs.formats.toml: converts the JSON file $valuePath with the standard library."""

import json
import os
import re


def key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def inline(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key(name)} = {inline(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    if value is None:
        raise SystemExit("TOML has no null")
    return json.dumps(value)  # strings, numbers and booleans have the same form in JSON and TOML


def main() -> None:
    source, out = (os.environ[name] for name in ("valuePath", "out"))
    with open(source, encoding="utf-8") as file:
        settings = json.load(file)
    tables = {name: value for name, value in settings.items() if isinstance(value, dict)}
    with open(out, "w", encoding="utf-8") as file:
        for name, value in settings.items():
            if name not in tables:
                file.write(f"{key(name)} = {inline(value)}\n")
        for name, table in tables.items():
            file.write(f"\n[{key(name)}]\n")
            file.writelines(f"{key(inner)} = {inline(value)}\n" for inner, value in table.items())


if __name__ == "__main__":
    main()

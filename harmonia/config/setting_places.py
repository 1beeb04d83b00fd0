"""Places of settings, for messages: the option, the environment variable, or the line of the file."""

import tomllib
from collections.abc import Mapping
from typing import Any

import msgspec

from harmonia.config import rust_log
from harmonia.config.settings import TABLES, Settings
from harmonia.config.value_types import Level
from harmonia.config.wrong_setting import WrongSettingError
from harmonia.errors import ConfigError

_CACHE_DIR = ["CACHE_DIRECTORY", "XDG_CACHE_HOME", "HOME"]  # the first of these variables that is set counts


def origins(text: str, name: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the origin of each value: `file:line`, the environment variable, or `default`."""
    given = tomllib.loads(text)
    keys: list[tuple[str, ...]] = [(field.name,) for field in msgspec.structs.fields(Settings)]
    keys += [(table, field.name) for table, struct in TABLES.items() for field in msgspec.structs.fields(struct)]
    for key, values in given.items():
        tables = [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []
        keys += [(key, str(number), each) for number, table in enumerate(tables) for each in table]
    lines = {".".join(key): line_of(text, _as_written(key, given)) for key in keys}
    places = {key: f"{name}:{line}" if line else "default" for key, line in lines.items()}
    variables = {"virtual_nix_store": ["NIX_STORE_DIR"], "log_dir": ["NIX_LOG_DIR"]}
    if "cache_dir" not in given:
        variables["cache_dir"] = _CACHE_DIR
    if rust_log_level(given, environ):
        variables["log_level"] = ["RUST_LOG"]
    for key, names in variables.items():
        if variable := next(filter(environ.get, names), None):
            places[key] = f"environment variable {variable}"
    if named := dict.fromkeys(key_files(given, environ).values()):
        places["sign_key_paths"] = ", ".join(
            f"environment variable {key[1:]}" if key.startswith("$") else places[key] for key in named
        )
    return places


def located(
    error: WrongSettingError, text: str, name: str, environ: Mapping[str, str], bind: str | None = None
) -> ConfigError:
    """Return the error with the place of its setting: the option, the environment variable, or the file and line."""
    given = tomllib.loads(text)
    key = _as_written(error.key, given)
    if key == ("bind",) and bind is not None:
        return ConfigError(f"--{error}")
    if key == ("sign_key_paths",) and error.key_file is not None:
        key = (key_files(given, environ)[error.key_file],)
    elif key == ("virtual_nix_store",) and environ.get("NIX_STORE_DIR"):
        key = ("$NIX_STORE_DIR",)
    elif key == ("log_dir",) and environ.get("NIX_LOG_DIR"):
        key = ("$NIX_LOG_DIR",)
    elif key == ("cache_dir",) and "cache_dir" not in given:
        key = (f"${next(filter(environ.get, _CACHE_DIR), 'HOME')}",)
    if key != error.key and key[0].startswith("$"):
        place = f"environment variable {key[0][1:]}"
    else:
        line = line_of(text, key) or (line_of(text, key[:-1]) if key[1:] else None)  # of the table of a missing key
        place = f"{name}:{line}" if line else name
    return ConfigError(f"{place}: {error}")


def key_files(given: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """Return each key file once, with the setting or variable that names it.

    The order is that of upstream Harmonia, because it is the order of signatures that clients see.
    """
    named = [(path, "sign_key_paths") for path in given.get("sign_key_paths", ())]
    named += [(path, "sign_key_path") for path in [given.get("sign_key_path")] if path is not None]
    named += [(path, "$SIGN_KEY_PATH") for path in [environ.get("SIGN_KEY_PATH")] if path]
    named += [(path, "$SIGN_KEY_PATHS") for path in environ.get("SIGN_KEY_PATHS", "").split()]
    return dict(named)


def rust_log_level(given: Mapping[str, Any], environ: Mapping[str, str]) -> Level | None:
    """Return the level that RUST_LOG sets, or None if it sets no level, or if the file sets `log_level`."""
    return None if "log_level" in given else rust_log.level(environ.get("RUST_LOG", ""))


def _as_written(key: tuple[str, ...], given: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the key as the file spells it: the table `publish` may have its old name `release`."""
    return ("release", *key[1:]) if key[0] == "publish" and "publish" not in given else key


def line_of(text: str, key: tuple[str, ...]) -> int | None:
    """Return the first line of the statement that first sets `key`, or None if the file does not set it.

    tomllib does not report lines. So we parse the first lines, one more each time: they parse if they end with a
    complete statement. The first such part of the file that has the key ends with the wanted statement.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    start = 1
    for count in range(1, len(lines) + 1):
        try:
            table: Any = tomllib.loads("\n".join(lines[:count]))
        except (ValueError, RecursionError):
            continue  # inside an array or string of several lines
        for part in key:
            if isinstance(table, list):
                table = table[int(part)] if int(part) < len(table) else None
            else:
                table = table.get(part) if isinstance(table, dict) else None
        if table is not None:
            return start
        start = count + 1
    return None

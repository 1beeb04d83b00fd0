"""Loader of the settings, from one TOML file and the environment.

`parse` is pure; `read` reads the file. `process/preflight.py` also checks the settings against this machine. An error
names the file, the line and the key of the wrong setting.
"""

import difflib
import logging
import os
import re
import reprlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import msgspec

from harmonia.config import setting_places
from harmonia.config.default_directories import default_cache_dir, default_runtime_file, default_state_dir
from harmonia.config.settings import TABLES, Settings
from harmonia.config.tables.push import Push
from harmonia.config.tables.upstream import Upstream
from harmonia.config.tables.watch import Watch
from harmonia.config.value_types import expected, plain
from harmonia.config.wrong_setting import WrongSettingError
from harmonia.errors import ConfigError

SYSTEM_FILE = "/etc/harmonia/harmonia.toml"
"""The path of the file that is read by default."""

_log = logging.getLogger("harmonia")

_SECRET = {"netrc", "credentials_file", "signed_by", "url", "proxy", "upstream"}  # a URL may contain a password
_NO_EFFECT = {"max_connection_rate"}
_GUESSES = dict.fromkeys(("address", "host", "listen", "port"), "bind")  # the names of `bind` in other servers


@dataclass(frozen=True, slots=True)
class Source:
    """The text of a configuration file, with the environment and the options that override its settings."""

    text: str
    name: str
    """The name of the file in messages."""
    environ: Mapping[str, str]
    bind: str | None = None
    """Value of the option `--bind`."""

    @classmethod
    def read(cls, path: str | None, environ: Mapping[str, str], bind: str | None = None) -> Self:
        """Read the first given file of `path`, `$CONFIG_FILE` and `SYSTEM_FILE`.

        If no file is given and `SYSTEM_FILE` does not exist, the text is empty.
        Raises ConfigError if the file cannot be read.
        """
        name, text = _file(path, environ)
        return cls(text, name, environ, bind)

    def settings(self) -> Settings:
        """Return the settings. The files and addresses that they name are not checked.

        Raises ConfigError if a setting is wrong.
        """
        return parse(self.text, self.name, self.environ, self.bind)

    def origins(self) -> dict[str, str]:
        """Return the origin of each value: `file:line`, the environment variable, or `default`.

        Keys are like `zstd.level`, and in an array of tables like `upstream.0.url`.
        """
        return setting_places.origins(self.text, self.name, self.environ)

    def located(self, error: WrongSettingError) -> ConfigError:
        """Return the error with the place of its setting: the option, the environment variable, or file and line."""
        return setting_places.located(error, self.text, self.name, self.environ, self.bind)

    def ignored_log_level(self) -> str | None:
        """Return why RUST_LOG has no effect, or None if it is not set or has an effect."""
        given = tomllib.loads(self.text)
        if not self.environ.get("RUST_LOG") or setting_places.rust_log_level(given, self.environ) is not None:
            return None
        return "the file sets log_level" if "log_level" in given else "it sets no level for Harmonia"


def read(path: str | None, environ: Mapping[str, str]) -> Settings:
    """Return the settings of the file that `Source.read` finds. The files and addresses that they name are not checked.

    Raises ConfigError if the file cannot be read, or a setting is wrong.
    """
    return Source.read(path, environ).settings()


def _file(path: str | None, environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the name and the content of the settings file, or `built-in defaults` and an empty text."""
    if path:
        name, origin = path, "--config: "
    elif variable := environ.get("CONFIG_FILE"):
        name, origin = variable, "environment variable CONFIG_FILE: "
    else:
        name, origin = SYSTEM_FILE, ""
    try:
        with open(name, "rb") as file:
            return name, file.read().decode()
    except OSError as error:
        if not origin and isinstance(error, FileNotFoundError | NotADirectoryError):
            return "built-in defaults", ""
        remedy = "name a readable TOML file" if origin else "make it readable, or name another file with --config"
        raise ConfigError(f"{origin}cannot read {name!r}: {error.strerror}; {remedy}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}:{line}: not UTF-8, the encoding of TOML; save the file in UTF-8") from None


def parse(text: str, name: str, environ: Mapping[str, str], bind: str | None = None) -> Settings:
    """Return the settings from the text of the file `name`, the environment and the option `--bind`. Do no disk access.

    Raises ConfigError if a setting is wrong.
    """
    try:
        given = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        at = re.search(r"\(at (?:line (\d+), column \d+|end of document)\)\Z", str(error))
        last = text.rstrip().count("\n") + 1
        place = f"{name}:{at[1] or last}" if at else name
        raise ConfigError(f"{place}: not valid TOML: {error}") from None
    try:
        values = _effective(given, text, name, environ)
        return Settings(**(values if bind is None else values | {"bind": bind}))
    except WrongSettingError as error:
        raise setting_places.located(error, text, name, environ, bind) from None


def _effective(given: Mapping[str, Any], text: str, name: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of the file, overridden by the environment."""
    if "release" in given:
        if "publish" in given:
            raise WrongSettingError("the old name of publish, which is set, too; keep only publish", "release")
        _log.warning("%s:%s: release: deprecated; use publish", name, setting_places.line_of(text, ("release",)))
        given = {"publish" if key == "release" else key: value for key, value in given.items()}
    values = _values(Settings, given)
    values["sign_key_paths"] = tuple(setting_places.key_files(values, environ))
    for key in sorted(values.keys() & _NO_EFFECT):
        _log.warning(
            "%s:%s: %s: has no effect in this Harmonia; remove it", name, setting_places.line_of(text, (key,)), key
        )
    if values.pop("sign_key_path", None) is not None:
        line = setting_places.line_of(text, ("sign_key_path",))
        _log.warning("%s:%s: sign_key_path: deprecated; use sign_key_paths", name, line)
    if environ.get("SIGN_KEY_PATH"):
        _log.warning("environment variable SIGN_KEY_PATH is deprecated; use SIGN_KEY_PATHS")
    values.setdefault("cache_dir", default_cache_dir(environ))
    push = values.get("push", Push())
    values["push"] = msgspec.structs.replace(push, state_dir=push.state_dir or default_state_dir(environ))
    watch = values.get("watch", Watch())
    values["watch"] = msgspec.structs.replace(
        watch,
        state_dir=watch.state_dir or default_state_dir(environ),
        socket=watch.socket or default_runtime_file(environ, "socket"),
        metrics_file=watch.metrics_file or default_runtime_file(environ, "metrics.prom"),
    )
    if store := environ.get("NIX_STORE_DIR") or values.get("virtual_nix_store"):
        values["virtual_nix_store"] = os.path.normpath(store)  # with a final slash, store paths would have two slashes
    if log_dir := environ.get("NIX_LOG_DIR"):
        values["log_dir"] = log_dir
    if level := setting_places.rust_log_level(values, environ):
        values["log_level"] = level
    return values


def _values(struct: type[msgspec.Struct], given: Mapping[str, Any], *table: str) -> dict[str, Any]:
    """Return the arguments for `struct` from a TOML table.

    Raises WrongSettingError if a key is unknown, or its value has the wrong type or is out of range.
    """
    types = {field.name: field.type for field in msgspec.structs.fields(struct)}
    values = {}
    for key, value in given.items():
        if key not in types:
            # Tables have keys of the same name: those of this table count first.
            keys = _KEYS if struct is Upstream else _KEYS | {name: ".".join((*table, name)) for name in types}
            near = [_GUESSES[key]] if key in _GUESSES else difflib.get_close_matches(key, keys, 1)
            remedy = (
                f"did you mean {keys[near[0]]}?" if near else "remove it; docs/reference/configuration.md lists them"
            )
            raise WrongSettingError(f"unknown key; {remedy}", *table, key)
        part = value
        if key in TABLES and isinstance(value, dict):
            part = TABLES[key](**_values(TABLES[key], value, key))
        elif key == "upstream" and isinstance(value, list) and all(isinstance(each, dict) for each in value):
            part = tuple(_upstream(each, str(number)) for number, each in enumerate(value))
        try:
            values[key] = msgspec.convert(plain(part, types[key]), types[key])
        except msgspec.ValidationError:
            # A user may paste a secret key in the place of its file's path. Do not show it.
            secret = "_path" in key or key in _SECRET
            shown = "(not shown)" if secret else str(value).lower() if isinstance(value, bool) else reprlib.repr(value)
            found = f"{_TOML_TYPES.get(type(value), 'date or time')} {shown}"
            remedy = "; begin each of them with [[upstream]]" if key == "upstream" else ""
            raise WrongSettingError(f"expected {expected(types[key])}, found {found}{remedy}", *table, key) from None
    return values


def _upstream(given: Mapping[str, Any], number: str) -> Upstream:
    values = _values(Upstream, given, "upstream", number)
    if "url" not in values:
        raise WrongSettingError("missing; each [[upstream]] needs the URL of a cache", "upstream", number, "url")
    return Upstream(**values)


_KEYS = (
    {field.name: f"{table}.{field.name}" for table, part in TABLES.items() for field in msgspec.structs.fields(part)}
    | {field.name: f"[[upstream]] {field.name}" for field in msgspec.structs.fields(Upstream)}
    | {field.name: field.name for field in msgspec.structs.fields(Settings)}
)
"""The key to suggest for each name. Names of the top level precede those of tables."""
_TOML_TYPES = {str: "string", int: "integer", float: "float", bool: "boolean", list: "array", dict: "table"}

"""Error for a wrong value of a setting, and the call of checks that raises it."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from harmonia.errors import ConfigError, FormatError


class WrongSettingError(ConfigError):
    """The value of a key, such as `("zstd", "level")` or `("upstream", "0", "url")`, is wrong."""

    def __init__(self, what: str, *key: str, key_file: str | None = None) -> None:
        super().__init__(f"{_name(key)}: {what}")
        self.key = key
        self.key_file = key_file
        """The wrong file, if the key names several files."""


def _name(key: tuple[str, ...]) -> str:
    """Return the name of a key in messages, such as `zstd.level` or `[[upstream]] 1: url`."""
    if key[0] == "upstream" and key[1:]:
        return f"[[upstream]] {int(key[1]) + 1}: {_name(key[2:])}"
    return ".".join(word if re.fullmatch(r"[A-Za-z0-9_-]+", word) else repr(word) for word in key)


def check_values(check: Callable[[Any], object], values: Iterable[object], *key: str) -> None:
    """Raise WrongSettingError for `key` if `check` raises FormatError for one of its values. Skip values of None."""
    for value in values:
        if value is not None:
            try:
                check(value)
            except FormatError as error:
                raise WrongSettingError(str(error), *key, key_file=str(value)) from None

"""Log level in `RUST_LOG`, by which users of the Rust Harmonia set it."""

import re

from harmonia.config.value_types import Level

_LEVELS: dict[str, Level] = {
    "off": "error",
    "error": "error",
    "warn": "warning",
    "info": "info",
    "debug": "debug",
    "trace": "debug",
}
_VERBOSE: tuple[Level, ...] = ("debug", "info", "warning", "error")
_TARGET = re.compile(r"harmonia(_\w+)?(::.*)?")


def level(text: str) -> Level | None:
    """Return the level that `RUST_LOG` sets for Harmonia, or None if it sets none.

    The text is a list of directives such as `info` and `harmonia_cache=debug`, as in Rust's env_logger and tracing. A
    target's own directive has precedence. The most verbose one counts, because all of Harmonia has one level here.
    """
    own: list[Level] = []
    others: list[Level] = []
    text = re.sub(r"\[[^]]*\]", "", text).partition("/")[0]  # without spans, and without a pattern for messages
    for directive in text.split(","):
        target, _, name = directive.strip().rpartition("=")
        if name and not target and name.lower() not in _LEVELS:
            target, name = name, "trace"  # a target alone has all levels
        if (found := _LEVELS.get(name.lower())) is not None:
            if not target:
                others.append(found)
            elif _TARGET.fullmatch(target):
                own.append(found)
    return min(own or others, key=_VERBOSE.index, default=None)

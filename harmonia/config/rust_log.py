"""Log level from the environment variable `RUST_LOG`, for users of the Rust Harmonia."""

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
    """Return the level that the value of `RUST_LOG` sets for Harmonia, or None if it sets no level.

    The value is a list of directives like `info` and `harmonia_cache=debug`, as in Rust's env_logger and tracing. A
    directive for Harmonia's targets takes precedence over one for all. Of several such directives, the most verbose
    counts, because this server has one level for all of its code.
    """
    own: list[Level] = []
    others: list[Level] = []
    text = re.sub(r"\[[^]]*\]", "", text).partition("/")[0]  # drop spans and the pattern for messages
    for directive in text.split(","):
        target, _, name = directive.strip().rpartition("=")
        if name and not target and name.lower() not in _LEVELS:
            target, name = name, "trace"  # a target without a level enables all levels
        if (log_level := _LEVELS.get(name.lower())) is not None:
            if not target:
                others.append(log_level)
            elif _TARGET.fullmatch(target):
                own.append(log_level)
    return min(own or others, key=_VERBOSE.index, default=None)

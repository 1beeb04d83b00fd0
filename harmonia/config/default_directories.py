"""Default directories, from the variables of systemd and the XDG base directories."""

import os
from collections.abc import Mapping


def default_state_dir(environ: Mapping[str, str]) -> str:
    """Return the first directory in systemd's `$STATE_DIRECTORY`, or `harmonia` in the user's state directory."""
    of_user = _home(environ, "XDG_STATE_HOME", ".local/state")
    return _first(environ, "STATE_DIRECTORY") or os.path.join(of_user, "harmonia")


def default_cache_dir(environ: Mapping[str, str]) -> str:
    """Return the first directory in systemd's `$CACHE_DIRECTORY`, or `harmonia` in the user's cache directory."""
    return _first(environ, "CACHE_DIRECTORY") or os.path.join(user_cache_dir(environ), "harmonia")


def default_runtime_file(environ: Mapping[str, str], name: str) -> str | None:
    """Return the path of a file in the first directory in systemd's `$RUNTIME_DIRECTORY`, or None without it."""
    directory = _first(environ, "RUNTIME_DIRECTORY")
    return os.path.join(directory, name) if directory else None


def user_cache_dir(environ: Mapping[str, str]) -> str:
    """Return the directory for the caches of all programs of this user."""
    return _home(environ, "XDG_CACHE_HOME", ".cache")


def _first(environ: Mapping[str, str], variable: str) -> str:
    """Return the first directory in a variable of systemd, or an empty text without it."""
    return environ.get(variable, "").split(":")[0]


def _home(environ: Mapping[str, str], variable: str, default: str) -> str:
    """Return an XDG base directory of the user; `default` is relative to the home directory."""
    return environ.get(variable) or os.path.join(environ.get("HOME") or "/nonexistent", default)

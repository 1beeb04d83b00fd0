"""Default directories, from the variables of systemd and the XDG base directories."""

import os
from collections.abc import Mapping


def default_state_dir(environ: Mapping[str, str]) -> str:
    """Return the first directory in systemd's `$STATE_DIRECTORY`, or `harmonia` in the user's state directory."""
    home = environ.get("XDG_STATE_HOME") or os.path.join(environ.get("HOME") or "/nonexistent", ".local/state")
    return environ.get("STATE_DIRECTORY", "").split(":")[0] or os.path.join(home, "harmonia")


def default_runtime_file(environ: Mapping[str, str], name: str) -> str | None:
    """Return the path of a file in the first directory in systemd's `$RUNTIME_DIRECTORY`, or None without it."""
    directory = environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    return os.path.join(directory, name) if directory else None


def default_cache_dir(environ: Mapping[str, str]) -> str:
    """Return the first directory in systemd's `$CACHE_DIRECTORY`, or `harmonia` in the user's cache directory."""
    home = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME") or "/nonexistent", ".cache")
    return environ.get("CACHE_DIRECTORY", "").split(":")[0] or os.path.join(home, "harmonia")

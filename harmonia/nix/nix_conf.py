"""Public keys that this machine's Nix trusts, from nix.conf (Nix `src/libutil/configuration.cc`)."""

import os
from collections.abc import Iterator, Mapping

from harmonia.errors import FormatError
from harmonia.nix.signing import PublicKey

_DEFAULT = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="
_MAX_INCLUDES = 20  # maximum depth of nested includes


def trusted_keys(environ: Mapping[str, str]) -> list[PublicKey]:
    """Return the keys in `trusted-public-keys` and `extra-trusted-public-keys`.

    The files are found by `environ`, as Nix finds them. Malformed keys and lines and unreadable files are skipped.
    """
    home = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME") or "/nonexistent", ".config")
    files = [os.path.join(environ.get("NIX_CONF_DIR") or "/etc/nix", "nix.conf"), os.path.join(home, "nix/nix.conf")]
    words = [_DEFAULT]
    settings = [setting for file in files for setting in _file(file, 0)]
    for name, value in (*settings, *_settings(environ.get("NIX_CONFIG", ""), "/", 0)):
        if name in ("trusted-public-keys", "binary-cache-public-keys"):
            words = value.split()
        elif name == "extra-trusted-public-keys":
            words += value.split()
    keys = []
    for word in dict.fromkeys(words):
        try:
            keys.append(PublicKey.parse(word))
        except FormatError:
            continue
    return keys


def _file(path: str, depth: int) -> Iterator[tuple[str, str]]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        return
    yield from _settings(text, os.path.dirname(path), depth)


def _settings(text: str, directory: str, depth: int) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if len(words) == 2 and words[0] in ("include", "!include") and depth < _MAX_INCLUDES:  # noqa: PLR2004 (the directive and a file)
            yield from _file(os.path.join(directory, words[1]), depth + 1)
        elif words[1:2] == ["="]:
            yield words[0], " ".join(words[2:])

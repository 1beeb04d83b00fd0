"""Settings of this machine's Nix, from nix.conf (Nix `src/libutil/configuration.cc`)."""

import os
from collections.abc import Iterator, Mapping

from harmonia.errors import FormatError
from harmonia.nix.signing import PublicKey

_DEFAULTS = {
    "trusted-public-keys": "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=",
    "substituters": "https://cache.nixos.org/",
}
_OLD_NAMES = {"binary-cache-public-keys": "trusted-public-keys", "binary-caches": "substituters"}
_MAX_INCLUDES = 20  # maximum depth of nested includes


class NixConf:
    """The settings in the files that Nix reads by `environ`, or in `file` alone if it is given.

    Malformed lines and unreadable files are skipped.
    """

    def __init__(self, environ: Mapping[str, str], file: str | None = None) -> None:
        home = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME") or "/nonexistent", ".config")
        directory = environ.get("NIX_CONF_DIR") or "/etc/nix"
        files = [os.path.join(directory, "nix.conf"), os.path.join(home, "nix/nix.conf")] if file is None else [file]
        self._settings = [setting for file in files for setting in _file(file, 0)]
        if file is None:
            self._settings += _settings(environ.get("NIX_CONFIG", ""), "/", 0)

    def words(self, name: str) -> list[str]:
        """Return the words of a setting, with those of its `extra-` form."""
        words = _DEFAULTS.get(name, "").split()
        for key, value in self._settings:
            if _OLD_NAMES.get(key, key) == name:
                words = value.split()
            elif key == f"extra-{name}":
                words += value.split()
        return list(dict.fromkeys(words))

    def trusted_keys(self) -> list[PublicKey]:
        """Return the trusted public keys. Malformed ones are skipped."""
        keys = []
        for word in self.words("trusted-public-keys"):
            try:
                keys.append(PublicKey.parse(word))
            except FormatError:
                continue
        return keys


def trusted_keys(environ: Mapping[str, str]) -> list[PublicKey]:
    """Return the public keys that this machine's Nix trusts."""
    return NixConf(environ).trusted_keys()


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

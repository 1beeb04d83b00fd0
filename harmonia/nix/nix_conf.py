"""Settings of this machine's Nix, from nix.conf (Nix `src/libutil/configuration.cc`)."""

import grp
import os
import pwd
from collections.abc import Iterator, Mapping
from contextlib import suppress

from harmonia.errors import FormatError
from harmonia.nix.signing import PublicKey

_DEFAULTS = {
    "trusted-public-keys": "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=",
    "substituters": "https://cache.nixos.org/",
    "trusted-users": "root",
}
_OLD_NAMES = {"binary-cache-public-keys": "trusted-public-keys", "binary-caches": "substituters"}
_ALLOWED = ("substituters", "trusted-substituters")  # of root, which the daemon asks for any user
_OF_ANY_USER = ("substitute",)  # a user's setting that the daemon always obeys
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
"""Values of settings that are true or false."""
_MAX_INCLUDES = 20  # maximum depth of nested includes


class NixConf:
    """The settings in the files that Nix reads by `environ`, or in `file` alone if it is given.

    Malformed lines and unreadable files are skipped.
    """

    def __init__(self, environ: Mapping[str, str], file: str | None = None, *, by_daemon: bool = False) -> None:
        """Read the files.

        With `by_daemon`, the settings of this user's own file and of NIX_CONFIG count as far as the Nix daemon obeys
        them, if this user has to ask it: it obeys only `trusted-users`.
        """
        directory = environ.get("NIX_CONF_DIR") or "/etc/nix"
        self._of_system = list(_file(file or os.path.join(directory, "nix.conf"), 0))
        self._of_user: list[tuple[str, str]] = []
        if file is None:
            self._of_user += (setting for each in _user_files(environ) for setting in _file(each, 0))
            self._of_user += _settings(environ.get("NIX_CONFIG", ""), "/", 0)
        self._netrc = os.path.join(directory, "netrc")
        self._is_restricted = by_daemon and file is None and asks_daemon(environ) and not self._trusts_this_user()

    def words(self, name: str) -> list[str]:
        """Return the words of a setting that counts, with those of its `extra-` form."""
        if name == "substituters" and self._is_restricted:
            return [url for url in self._words(name) if url not in self.ignored_substituters]
        return self._words(name, of_user=not self._is_restricted or name in _OF_ANY_USER)

    def is_on(self, name: str, *, default: bool) -> bool:
        """Return the value of a setting that is true or false."""
        return BOOLEANS.get("".join(self.words(name)), default)

    @property
    def ignored_substituters(self) -> list[str]:
        """Substituters of this user that the Nix daemon ignores, because it allows them only to `trusted-users`."""
        if not self._is_restricted:
            return []
        allowed = {url.rstrip("/") for name in _ALLOWED for url in self._words(name, of_user=False)}
        return [url for url in self._words("substituters") if url.rstrip("/") not in allowed]

    @property
    def netrc_file(self) -> str:
        """The file with the tokens that Nix sends."""
        return "".join(self.words("netrc-file")) or self._netrc

    def _trusts_this_user(self) -> bool:
        """Return True if `trusted-users` has this user, one of its groups like `@wheel`, or `*`."""
        names = {"*"}
        with suppress(KeyError):
            names.add(pwd.getpwuid(os.geteuid()).pw_name)
        for group in {os.getegid(), *os.getgroups()}:
            with suppress(KeyError):
                names.add(f"@{grp.getgrgid(group).gr_name}")
        return not names.isdisjoint(self._words("trusted-users", of_user=False))

    def _words(self, name: str, *, of_user: bool = True) -> list[str]:
        words = _DEFAULTS.get(name, "").split()
        for key, value in [*self._of_system, *(self._of_user if of_user else [])]:
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


def asks_daemon(environ: Mapping[str, str]) -> bool:
    """Return True if this user's Nix asks the Nix daemon, False if it opens the store itself (Nix `openStore`)."""
    remote = environ.get("NIX_REMOTE") or "auto"
    if remote != "auto":
        return remote == "daemon" or remote.startswith("unix://")
    state = environ.get("NIX_STATE_DIR") or "/nix/var/nix"
    socket = environ.get("NIX_DAEMON_SOCKET_PATH") or os.path.join(state, "daemon-socket/socket")
    return not os.access(state, os.R_OK | os.W_OK) and os.path.exists(socket)


def _user_files(environ: Mapping[str, str]) -> list[str]:
    """Return the files with settings of this user. Later ones override earlier ones (Nix `getUserConfigFiles`)."""
    if names := environ.get("NIX_USER_CONF_FILES"):
        return names.split(":")[::-1]
    home = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME") or "/nonexistent", ".config")
    directories = [home, *(environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":")]
    return [os.path.join(directory, "nix/nix.conf") for directory in reversed(directories)]


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

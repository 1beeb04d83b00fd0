"""A small but real Nix store, made without Nix, for machines that have none.

demo_packages.py has what is in it.

The directories of a store are read-only, as Nix makes them, so that `rm -rf` fails for all but root. This works::

    chmod -R u+w demo-store && rm -rf demo-store
"""

import fcntl
import json
import os
from dataclasses import dataclass

from harmonia.errors import ConfigError, HarmoniaError
from harmonia.nix.signing import PublicKey, SecretKey
from harmonia.nix.store_path import StorePath
from harmonia.store.store import Database
from harmonia.tools import demo_packages
from harmonia.tools.fixture_tree import remove_tree
from harmonia.tools.store_builder import StoreBuilder

_MARK = "# The demo store beside this file, as harmonia made it. To remove both: chmod -R u+w DIR && rm -rf DIR\n"


@dataclass(frozen=True, slots=True)
class Demo:
    """A complete demo store. `config_path` starts a server of it."""

    directory: str
    paths: dict[str, StorePath]
    """The valid paths by their names. `demo-environment` refers to all that can be used."""
    public_key: PublicKey

    @property
    def config_path(self) -> str:
        return os.path.join(self.directory, "harmonia.toml")


def make(directory: str) -> Demo:
    """The demo store in `directory`: the one that is there, or a new one if there is none or only parts of one.

    It is built beside and renamed, so that an interrupted run leaves none that looks whole. ConfigError where the
    directory holds something else, which is left alone.
    """
    directory = os.path.realpath(directory)
    parent = os.path.dirname(directory)
    os.makedirs(parent, exist_ok=True)
    lock = os.open(parent, os.O_RDONLY | os.O_CLOEXEC)  # two runs at a time make one store
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        demo = _load(directory)
        if demo is None:
            unfinished = directory + ".unfinished"
            _discard(directory)
            _discard(unfinished)
            _build(unfinished, directory)
            os.rename(unfinished, directory)
            demo = _load(directory)
    finally:
        os.close(lock)
    if demo is None:
        raise ConfigError(f"{directory}: the demo store was changed while it was made; try again")
    return demo


def write_config(directory: str, home: str) -> None:
    """Writes `directory`/harmonia.toml, which serves the demo store that is, or will be, in `home`."""
    settings = {
        "real_nix_store": os.path.join(home, "nix/store"),
        "nix_db_path": os.path.join(home, "nix/var/nix/db/db.sqlite"),
        "sign_key_paths": [os.path.join(home, "secret-key")],
        "browse": True,
    }
    with open(os.path.join(directory, "harmonia.toml"), "w", encoding="utf-8") as file:
        file.write(_MARK)
        # JSON's strings, arrays and booleans are TOML's too.
        file.writelines(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in settings.items())


def _load(directory: str) -> Demo | None:
    """The demo store in `directory`, or None where anything of it is missing."""
    store = os.path.join(directory, "nix/store")
    database = Database(os.path.join(directory, "nix/var/nix/db/db.sqlite"), timeout=10)
    try:
        with open(os.path.join(directory, "secret-key"), encoding="ascii") as file:
            key = SecretKey.parse(file.read())
        rows = database.query("select path from ValidPaths order by id desc")  # so that the oldest keeps its name
        paths = {path.name: path for path in (StorePath.in_dir("/nix/store", path) for (path,) in rows)}
    except (OSError, ValueError, HarmoniaError):
        return None
    finally:
        database.close()
    demo = Demo(directory, paths, key.public_key)
    whole = "demo-environment" in paths and all(os.path.lexists(os.path.join(store, path)) for path in paths.values())
    return demo if whole and os.path.exists(demo.config_path) else None


def _discard(directory: str) -> None:
    """Removes what is left of a demo store. ConfigError where that is not known to be one."""
    if not os.path.lexists(directory):
        return
    try:
        if os.listdir(directory):
            with open(os.path.join(directory, "harmonia.toml"), encoding="utf-8") as file:
                ours = file.readline() == _MARK
        else:
            ours = True
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise ConfigError(f"{directory} exists and is no demo store; name a directory that is empty, or not there yet")
    remove_tree(os.fsencode(directory))


def _build(directory: str, home: str) -> None:
    """Makes the demo store in `directory`, to be renamed to `home`."""
    os.mkdir(directory)
    write_config(directory, home)  # first: it marks what follows as ours
    key = SecretKey.generate("demo-1")
    for name, text, mode in (("secret-key", key.export(), 0o600), ("public-key", str(key.public_key), 0o644)):
        descriptor = os.open(os.path.join(directory, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(text)

    demo_packages.add(StoreBuilder(directory), key)

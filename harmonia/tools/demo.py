"""Demo store: a small but real Nix store for machines without Nix.

Its packages are in demo_packages.py. Store directories are read-only, as Nix leaves them, so `rm -rf` works only for
root. To remove the store::

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

_MARK = "# Demo store of Harmonia, in this directory. To remove it: chmod -R u+w DIR && rm -rf DIR\n"


@dataclass(frozen=True, slots=True)
class Demo:
    """Complete demo store. A server with `config_path` as settings serves it."""

    directory: str
    paths: dict[str, StorePath]
    """Valid paths by name. The closure of `demo-environment` has all programs and the manual."""
    public_key: PublicKey

    @property
    def config_path(self) -> str:
        return os.path.join(self.directory, "harmonia.toml")


def make(directory: str) -> Demo:
    """Return the demo store in `directory`. Creates it if it is missing or incomplete.

    A new store is built under another name and then renamed, so an interrupted run never leaves a store that looks
    complete. Raises ConfigError if the directory has other content, which is not touched.
    """
    directory = os.path.realpath(directory)
    parent = os.path.dirname(directory)
    os.makedirs(parent, exist_ok=True)
    lock = os.open(parent, os.O_RDONLY | os.O_CLOEXEC)  # concurrent runs create one store
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        demo = _load_demo(directory)
        if demo is None:
            unfinished = directory + ".unfinished"
            _discard(directory)
            _discard(unfinished)
            _build(unfinished, directory)
            os.rename(unfinished, directory)
            demo = _load_demo(directory)
    finally:
        os.close(lock)
    if demo is None:
        raise ConfigError(f"{directory}: another program changed the demo store while it was created; try again")
    return demo


def write_config(directory: str, home: str) -> None:
    """Write `directory`/harmonia.toml: settings that serve the demo store in `home`, which may not exist yet."""
    settings = {
        "real_nix_store": os.path.join(home, "nix/store"),
        "nix_db_path": os.path.join(home, "nix/var/nix/db/db.sqlite"),
        "sign_key_paths": [os.path.join(home, "secret-key")],
        "browse": True,
    }
    with open(os.path.join(directory, "harmonia.toml"), "w", encoding="utf-8") as file:
        file.write(_MARK)
        # JSON strings, arrays and booleans are valid TOML.
        file.writelines(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in settings.items())


def _load_demo(directory: str) -> Demo | None:
    """Return the demo store in `directory`, or None if it is incomplete."""
    store = os.path.join(directory, "nix/store")
    database = Database(os.path.join(directory, "nix/var/nix/db/db.sqlite"), timeout=10)
    try:
        with open(os.path.join(directory, "secret-key"), encoding="ascii") as file:
            key = SecretKey.parse(file.read())
        rows = database.query(
            "select path from ValidPaths order by id desc"
        )  # oldest last, so that it wins if two paths have one name
        paths = {path.name: path for path in (StorePath.in_dir("/nix/store", path) for (path,) in rows)}
    except (OSError, ValueError, HarmoniaError):
        return None
    finally:
        database.close()
    demo = Demo(directory, paths, key.public_key)
    whole = "demo-environment" in paths and all(os.path.lexists(os.path.join(store, path)) for path in paths.values())
    return demo if whole and os.path.exists(demo.config_path) else None


def _discard(directory: str) -> None:
    """Remove an incomplete demo store. Raises ConfigError if the directory has content that is not a demo store."""
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
        raise ConfigError(f"{directory} exists and is not a demo store; name an empty or new directory")
    remove_tree(os.fsencode(directory))


def _build(directory: str, home: str) -> None:
    """Create the demo store in `directory`. The caller renames it to `home`."""
    os.mkdir(directory)
    write_config(directory, home)  # first, because this file marks the directory as a demo store
    key = SecretKey.generate("demo-1")
    for name, text, mode in (("secret-key", key.export(), 0o600), ("public-key", str(key.public_key), 0o644)):
        descriptor = os.open(os.path.join(directory, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(text)

    demo_packages.add(StoreBuilder(directory), key)

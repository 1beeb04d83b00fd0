"""A small but real Nix store, made without Nix, for machines that have none.

It holds a few of Python's own modules, a derivation with its output and build log, a web page, and odd file names.

The directories of a store are read-only, as Nix makes them, so that `rm -rf` fails for all but root. This works::

    chmod -R u+w demo-store && rm -rf demo-store
"""

import fcntl
import json
import os
import platform
import sysconfig
from dataclasses import dataclass
from glob import iglob

from harmonia.errors import ConfigError, HarmoniaError
from harmonia.nix.signing import PublicKey, SecretKey
from harmonia.nix.store_path import StorePath
from harmonia.store.store import Database
from harmonia.tools.store_builder import StoreBuilder
from harmonia.tools.tree import Executable, Symlink, Tree, remove

_MARK = "# The demo store beside this file, as harmonia made it. To remove both: chmod -R u+w DIR && rm -rf DIR\n"

_LIBRARY = ("asyncio", "concurrent", "email", "encodings", "html", "http", "json", "logging", "urllib")

_HELLO = b"""\
#!/usr/bin/env python3
# Installed as @out@
import sys

sys.path.insert(0, "@library@")

import json

print(json.dumps({"greeting": "Hello from the Nix store!", "library": json.__file__}))
"""

_BUILD_HELLO = b"""\
PATH=/usr/bin:/bin
echo "installing hello as $out"
mkdir -p "$out/bin"
sed "s|@out@|$out|; s|@library@|$library|" "$script" > "$out/bin/hello"
chmod +x "$out/bin/hello"
ln -s hello "$out/bin/hi"
echo "done"
"""

_PAGE = b"""\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>A page in a Nix store</title>
<link rel="stylesheet" href="style.css">
<h1>A page in a Nix store</h1>
<p>It is served right from the store. So is <a href="more/">another one</a>.</p>
"""

_MORE = b"""\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>Another page</title>
<link rel="stylesheet" href="../style.css">
<p><a href="../">Back</a></p>
"""

_STYLE = b"body { max-width: 40rem; margin: 4rem auto; font-family: sans-serif; }\n"


@dataclass(frozen=True, slots=True)
class Demo:
    """A complete demo store. `config_path` starts a server of it."""

    directory: str
    paths: dict[str, StorePath]
    """The valid paths by their names. `demo` refers to all that can be used, `website` holds an index.html."""
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
    whole = "demo" in paths and all(os.path.lexists(os.path.join(store, path)) for path in paths.values())
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
    remove(os.fsencode(directory))


def _build(directory: str, home: str) -> None:
    """Makes the demo store in `directory`, to be renamed to `home`."""
    os.mkdir(directory)
    write_config(directory, home)  # first: it marks what follows as ours
    key = SecretKey.generate("demo-1")
    for name, text, mode in (("secret-key", key.export(), 0o600), ("public-key", str(key.public_key), 0o644)):
        descriptor = os.open(os.path.join(directory, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(text)

    store = StoreBuilder(directory)
    library = store.add_source(f"python-library-{platform.python_version()}", _python_library()).path
    hello = _build_hello(store, library, key)
    website = store.add_source(
        "website", {"index.html": _PAGE, "style.css": _STYLE, "more": {"index.html": _MORE}}
    ).path
    latest = store.add_source("latest-website", Symlink(f"/nix/store/{website}"), [website]).path
    odd = store.add_source("odd-names", _odd_names(hello), [hello]).path
    links = {"hello": hello, "odd-names": odd, "website": latest}
    tree = {name: Symlink(f"/nix/store/{path}") for name, path in links.items()}
    store.add_source("demo", tree, links.values())


def _build_hello(store: StoreBuilder, library: StorePath, key: SecretKey) -> StorePath:
    """A derivation, and what its builder would make of it."""
    script = store.add_text("hello.py", _HELLO).path
    builder = store.add_text("build-hello.sh", _BUILD_HELLO).path
    library_path, script_path, builder_path = (f"/nix/store/{path}" for path in (library, script, builder))
    derivation, output = store.add_derivation(
        "hello-1.0",
        "/bin/sh",
        ["-e", builder_path],
        {"library": library_path, "script": script_path},
        [library, script, builder],
    )
    out = f"/nix/store/{output}"
    hello = _HELLO.replace(b"@out@", out.encode()).replace(b"@library@", library_path.encode())
    tree: Tree = {"bin": {"hello": Executable(hello), "hi": Symlink("hello")}}
    store.add(output, tree, references=[library, output], deriver=derivation.path, keys=[key])
    store.add_log(derivation.path, f"installing hello as {out}\ndone\n".encode())
    return output


def _python_library() -> Tree:
    """Some modules of the running Python: about 3 MB."""
    root = sysconfig.get_path("stdlib")
    tree: dict[str, Tree] = {}
    for package in _LIBRARY:
        for path in iglob(f"{package}/**/*.py", root_dir=root, recursive=True):
            *directories, name = path.split("/")
            node = tree
            for directory in directories:
                node = node.setdefault(directory, {})  # type: ignore[assignment]
            with open(os.path.join(root, path), "rb") as file:
                node[name] = file.read()
    return tree


def _odd_names(hello: StorePath) -> Tree:
    """Names that need care on their way through URLs, pages and archives; all that any Linux file system takes."""
    return {
        ".hidden": b"hidden\n",
        "100%": b"no escape: %2f\n",
        "a": {"b": {"c": b"sorted before a-b, though / comes after -\n"}},
        "a-b": b"",
        "a.b": Executable(b"#!/bin/sh\necho odd\n"),
        "dangling": Symlink("nowhere"),
        "empty": {},
        "hello": Symlink(f"/nix/store/{hello}/bin/hello"),
        "n" * 140: b"a long name\n",
        "question?&hash#<b>": b"not markup\n",
        'quote"\\': b"\n",
        "tab\tand newline\n": b"\n",
        "up": Symlink(".."),
        "with space": b"\n",
        "Ünïcödé-☃": b"\n",
    }

"""Packages of the demo store: two versions of a program and its library, a manual, a tool in Python, an environment.

The programs find their libraries by relative paths, so they also run in a copy of the store.
"""

import os
import platform
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from glob import iglob

from harmonia.nix.signing import SecretKey
from harmonia.nix.store_path import StorePath
from harmonia.tools.fixture_tree import Executable, Symlink, Tree
from harmonia.tools.store_builder import StoreBuilder

_PYTHON_PACKAGES = ("asyncio", "concurrent", "email", "encodings", "html", "http", "json", "logging", "urllib")

_BUILD = b"""\
PATH=/usr/bin:/bin
echo "installing $name as $out"
cp -R "$src" "$out"
chmod -R u+w "$out"
for program in "$out"/bin/*; do
  if [ -f "$program" ]; then
    echo "patching $program"
    sed -i "s|@out@|$out|; s|@library@|${library##*/}|" "$program"
  fi
done
echo "done"
"""

_GREET_1_2 = b"""\
# Prints a greeting for NAME.
greet() {
  echo "Hello, $1!"
}
"""

_GREET_1_3 = b"""\
# Prints a greeting for each NAME.
greet() {
  printf 'Hello, %s!\\n' "$@"
}
"""

_HELLO = b"""\
#!/bin/sh
# Greets the world, or each NAME. Installed as @out@
here=$(dirname "$(readlink -f "$0")")
. "$here/../../@library@/lib/greet.sh"
case ${1-} in
  --version) echo "hello @version@" ;;
  --help) echo "usage: hello [NAME]..." ;;
  "") greet world ;;
  *) greet "$@" ;;
esac
"""

_HELLO_MAN = b"""\
.TH HELLO 1 "" "hello @version@"
.SH NAME
hello \\- greet the world, or each NAME
.SH SYNOPSIS
.B hello
.RI [ NAME ]...
"""

_JSON_PRETTY = b"""\
#!/usr/bin/env python3
# Prints the JSON that it reads, indented. Installed as @out@
import os
import sys

here = os.path.dirname(os.path.realpath(__file__))
sys.path.insert(0, os.path.join(here, "../../@library@"))

import json

print(json.dumps(json.load(sys.stdin), indent=2))
"""

_MANUAL = b"""\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>The manual of hello</title>
<link rel="stylesheet" href="style.css">
<h1>The manual of hello</h1>
<p>This page is served from the Nix store. <code>hello</code> greets the world, or each name given:
<pre>$ hello Ada Grace
Hello, Ada!
Hello, Grace!</pre>
<p>See <a href="options/">its options</a>.
"""

_OPTIONS = b"""\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>Options of hello</title>
<link rel="stylesheet" href="../style.css">
<h1>Options of hello</h1>
<dl><dt><code>--version</code><dd>prints the version<dt><code>--help</code><dd>prints the usage</dl>
<p><a href="../">The manual</a>
"""

_STYLE = b"body { max-width: 40rem; margin: 4rem auto; font-family: sans-serif; }\n"


def add(store: StoreBuilder, key: SecretKey) -> None:
    """Add all packages to the store. Outputs of derivations are signed with the key."""
    packages = _Packages(store, key, store.add_text("build.sh", _BUILD).path)
    libraries = [
        packages.build(
            f"libgreet-{version}", {"lib": {"greet.sh": text}, "share": {"doc": {"libgreet": {"NEWS": news}}}}
        )
        for version, text, news in (
            ("1.2.0", _GREET_1_2, b"The first version.\n"),
            ("1.3.0", _GREET_1_3, b"greet takes any number of names.\n"),
        )
    ]
    for version, library in zip(("2.12.1", "2.13.0"), libraries, strict=True):
        script, page = (text.replace(b"@version@", version.encode()) for text in (_HELLO, _HELLO_MAN))
        files: Mapping[str, Tree] = {"share": {"man": {"man1": {"hello.1": page}}}}
        hello = packages.build(f"hello-{version}", files, {"hello": script}, library)
    manual_files: Tree = {"index.html": _MANUAL, "style.css": _STYLE, "options": {"index.html": _OPTIONS}}
    manual = store.add_source("hello-manual-2.13.0", manual_files).path
    modules = store.add_source(f"python-modules-{platform.python_version()}", _python_modules()).path
    json_pretty = packages.build("json-pretty-1.0", {}, {"json-pretty": _JSON_PRETTY}, modules)
    links = {"hello": Symlink(f"/nix/store/{hello}/bin/hello")}
    links["json-pretty"] = Symlink(f"/nix/store/{json_pretty}/bin/json-pretty")
    environment: Tree = {"bin": links, "share": {"doc": {"hello": Symlink(f"/nix/store/{manual}")}}}
    store.add_source("demo-environment", environment, [hello, json_pretty, manual])


@dataclass(frozen=True, slots=True)
class _Packages:
    store: StoreBuilder
    key: SecretKey
    script: StorePath
    """Build script of every package."""

    def build(
        self,
        name: str,
        files: Mapping[str, Tree],
        programs: Mapping[str, bytes] | None = None,
        library: StorePath | None = None,
    ) -> StorePath:
        """Add a derivation, its build log and its output. Return the output's path."""
        source = self.store.add_source(f"{name}-source", _with_programs(files, programs or {})).path
        derivation, output = self.store.add_derivation(
            name,
            "/bin/sh",
            ["-e", f"/nix/store/{self.script}"],
            {"src": f"/nix/store/{source}", "library": f"/nix/store/{library}" if library else ""},
            [each for each in (source, self.script, library) if each],
        )
        out = f"/nix/store/{output}"
        patched = {
            program: text.replace(b"@out@", out.encode()).replace(b"@library@", os.fsencode(library or ""))
            for program, text in (programs or {}).items()
        }
        references = [each for each in (library, output if programs else None) if each]
        tree = _with_programs(files, patched)
        self.store.add(output, tree, references=references, deriver=derivation.path, keys=[self.key])
        log = [f"installing {name} as {out}", *(f"patching {out}/bin/{program}" for program in sorted(patched)), "done"]
        self.store.add_log(derivation.path, "".join(f"{line}\n" for line in log).encode())
        return output


def _with_programs(files: Mapping[str, Tree], programs: Mapping[str, bytes]) -> Tree:
    executables = {name: Executable(text) for name, text in programs.items()}
    return {**files, "bin": executables} if programs else files


def _python_modules() -> Tree:
    """Return some modules of the running Python, about 3 MB."""
    root = sysconfig.get_path("stdlib")
    tree: dict[str, Tree] = {}
    for package in _PYTHON_PACKAGES:
        for path in iglob(f"{package}/**/*.py", root_dir=root, recursive=True):
            *directories, name = path.split("/")
            node = tree
            for directory in directories:
                node = node.setdefault(directory, {})  # type: ignore[assignment]
            with open(os.path.join(root, path), "rb") as file:
                node[name] = file.read()
    return tree

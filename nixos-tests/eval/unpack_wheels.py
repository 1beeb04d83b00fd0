"""Builder of the stub's buildPythonApplication, without pip.

Unpacks every wheel in $wheels into $out and writes the console scripts of $pname, like `pip install --no-index`.
"""

import compileall
import configparser
import os
import py_compile
import re
import zipfile
from pathlib import Path


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def main() -> None:
    wheels, pname, out = (os.environ[name] for name in ("wheels", "pname", "out"))
    site, programs = Path(out, "lib/site-packages"), Path(out, "bin")
    site.mkdir(parents=True)
    programs.mkdir()
    for wheel in sorted(Path(wheels).glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    # As in nixpkgs: the store is read-only later. Unchecked, because Nix sets all file times to the same value.
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(site, quiet=2, invalidation_mode=unchecked)
    for entry_points in site.glob("*.dist-info/entry_points.txt"):
        if normal(entry_points.parent.name.split("-")[0]) != normal(pname):
            continue
        parser = configparser.ConfigParser(delimiters=("=",))
        parser.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their case
        parser.read_string(entry_points.read_text())
        for name, target in parser["console_scripts"].items():
            module, _, function = target.partition(":")
            script = programs / name
            script.write_text(
                "#!/usr/bin/python3 -I\n"
                f"import sys\nsys.path.insert(0, {str(site)!r})\n"
                f"from {module} import {function}\nsys.exit({function}())\n"
            )
            script.chmod(0o755)


if __name__ == "__main__":
    main()

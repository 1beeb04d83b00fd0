"""`harmonia why` takes a flake reference, which this machine's Nix evaluates."""

import json
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from harmonia.cli import EXIT_CONFIG, EXIT_FOUND
from support.running import run

FLAKE = """
{
  outputs = _: {
    packages = builtins.listToAttrs (map (system: {
      name = system;
      value = rec {
        default = app;
        app = derivation {
          name = "app-1.0"; inherit system; builder = "/bin/sh"; outputs = [ "out" "dev" ];
        };
        broken = throw "this package is broken";
        number = 5;
        text = "/etc/passwd";
      };
    }) [ "x86_64-linux" "aarch64-linux" ]);
  };
}
"""


class Machine(NamedTuple):
    """A machine with a Nix of its own, whose store is below `directory`, and a flake in `flake`."""

    directory: Path
    flake: Path

    @property
    def environment(self) -> dict[str, str]:
        nix = self.directory / "nix"
        directories = {f"NIX_{name}_DIR": str(nix / name.lower()) for name in ("STORE", "STATE", "LOG", "CONF")}
        return directories | {
            "NIX_REMOTE": "local",
            "NIX_CONFIG": "flake-registry =\nsubstituters =",
            "XDG_CACHE_HOME": str(self.directory / "cache"),
            "HOME": str(self.directory),
        }

    def why(self, installable: str) -> subprocess.CompletedProcess[str]:
        config = self.directory / "harmonia.toml"
        database = self.directory / "nix/state/db/db.sqlite"
        config.write_text(f"nix_db_path = '{database}'\n")
        return run("--config", str(config), "why", "--json", installable, environment=self.environment)

    def output(self, attribute: str) -> str:
        """Return the path of an output, as Nix shows it."""
        command = ["nix", "--extra-experimental-features", "nix-command flakes", "eval", "--raw"]
        shown = subprocess.run(
            [*command, f"path:{self.flake}#{attribute}"],
            env={"PATH": "/usr/bin:/bin", **self.environment},
            capture_output=True,
            text=True,
            check=True,
        )
        return shown.stdout


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    flake = tmp_path / "flake"
    flake.mkdir()
    (flake / "flake.nix").write_text(FLAKE)
    return Machine(tmp_path, flake)


@pytest.mark.nix
@pytest.mark.parametrize(
    ("installable", "attribute"),
    [("#app", "app"), ("#", "default"), ("", "default"), ("#app^dev", "app.dev"), ("#app.dev", "app.dev")],
)
def test_flake_reference_stands_for_its_output_path(machine: Machine, installable: str, attribute: str) -> None:
    done = machine.why(f"path:{machine.flake}{installable}")
    assert done.returncode == EXIT_FOUND, done.stderr
    value = json.loads(done.stdout)
    assert f"{machine.directory}/nix/store/{value['path']}" == machine.output(attribute)
    assert value["path"].endswith("-dev" if "dev" in attribute else "-app-1.0")
    assert "is not available: this server: " in value["summary"]


@pytest.mark.nix
@pytest.mark.parametrize(
    ("installable", "cause"),
    [
        ("#broken", "this package is broken"),
        ("#none", "does not provide attribute"),
        ("-none#app", "does not exist"),
        ("#number", "an integer"),
    ],
)
def test_evaluation_that_fails_is_an_error(machine: Machine, installable: str, cause: str) -> None:
    done = machine.why(f"path:{machine.flake}{installable}")
    assert (done.returncode, done.stdout) == (EXIT_CONFIG, "")
    assert "harmonia: cannot evaluate 'path:" in done.stderr
    assert cause in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.nix
def test_other_value_than_a_store_path_is_an_error(machine: Machine) -> None:
    done = machine.why(f"path:{machine.flake}#text")
    assert (done.returncode, done.stdout) == (EXIT_CONFIG, "")
    assert "#text' evaluates to '/etc/passwd', which is not a path in " in done.stderr


@pytest.mark.nix
def test_directory_of_a_flake_stands_for_its_default(machine: Machine) -> None:
    for name in (str(machine.flake), os.path.relpath(machine.flake)):
        value = json.loads(machine.why(name).stdout)
        assert f"{machine.directory}/nix/store/{value['path']}" == machine.output("default")


@pytest.mark.nix
def test_name_with_an_attribute_is_that_of_the_registry(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like Nix, which does not look for a directory of that name."""
    monkeypatch.chdir(machine.directory)
    done = machine.why(f"{machine.flake.name}#app")
    assert (done.returncode, done.stdout) == (EXIT_CONFIG, "")
    assert "harmonia: cannot evaluate 'flake#app'" in done.stderr


def test_missing_nix_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "harmonia.toml").write_text(f"nix_db_path = '{tmp_path}/none'\n")
    done = run("--config", str(tmp_path / "harmonia.toml"), "why", "nixpkgs#hello", environment={"PATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (EXIT_CONFIG, "")
    assert (
        done.stderr == "harmonia: cannot evaluate 'nixpkgs#hello': there is no program nix on PATH; give a store path\n"
    )


@pytest.mark.nix
@pytest.mark.parametrize(
    ("attributes", "forbids"),
    [
        ("allowSubstitutes = false;", True),
        ("allowSubstitutes = true;", False),
        ("", False),
        ("__structuredAttrs = true; allowSubstitutes = false;", True),
    ],
)
def test_derivation_that_forbids_substitutes_is_named(machine: Machine, attributes: str, *, forbids: bool) -> None:
    (machine.flake / "flake.nix").write_text(FLAKE.replace('name = "app-1.0";', f'name = "app-1.0"; {attributes}'))
    value = json.loads(machine.why(f"path:{machine.flake}#app").stdout)
    causes = [reason["text"] for reason in value["client"]]
    assert ["sets allowSubstitutes = false, so Nix builds it" in cause for cause in causes] == [True] * forbids

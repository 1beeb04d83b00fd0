"""Store paths of flake references, evaluated by the machine's own Nix."""

import os
import re
import shutil
import subprocess

from harmonia.errors import ConfigError, FormatError
from harmonia.nix.store_path import StorePath
from harmonia.untrusted import excerpt

_WITH_TYPE = re.compile(r"(?:flake|github|gitlab|path|sourcehut|(?:git|hg|tarball)\+[a-z]+):")
_FEATURES = ("--extra-experimental-features", "nix-command flakes")


def is_flake_reference(text: str) -> bool:
    """Return True if `text` is an installable like `nixpkgs#hello`, `github:owner/repository` or `.`."""
    return "#" in text or _WITH_TYPE.match(text) is not None or os.path.isfile(os.path.join(text, "flake.nix"))


def evaluate(installable: str, store_dir: str) -> StorePath:
    """Return the output path of an installable, such as `nixpkgs#hello` or `.#app^dev`, without building it.

    Nix may download the flake, and its messages go to stderr. Raises ConfigError if there is no Nix, if the evaluation
    fails, or if the result is not a store path of `store_dir`.
    """
    nix = shutil.which("nix")
    if nix is None:
        raise ConfigError(f"cannot evaluate {installable!r}: there is no program nix on PATH; give a store path")
    flake, hash_sign, attribute = installable.partition("#")
    if not hash_sign and os.path.isfile(os.path.join(flake, "flake.nix")):
        flake = os.path.abspath(flake)  # Nix looks up a bare name in its registry, also if such a directory exists
    attribute, _, output = attribute.partition("^")
    name = f"{flake}#{attribute}.{output}" if output else f"{flake}#{attribute}"  # outputs are attributes
    command = [nix, *_FEATURES, "eval", "--raw", "--", name]
    evaluated = subprocess.run(command, stdout=subprocess.PIPE, check=False)  # noqa: S603 (an argument of the user)
    if evaluated.returncode != 0:
        why = f"{nix} eval failed with status {evaluated.returncode}, and printed the cause above"
        raise ConfigError(f"cannot evaluate {installable!r}: {why}; name a derivation, or one of its outputs like ^dev")
    text = evaluated.stdout.decode(errors="replace")
    try:
        return StorePath.in_dir(store_dir, text)
    except FormatError:
        what = f"{installable!r} evaluates to {excerpt(text)}, which is not a path in {store_dir}"
        remedy = "name a derivation whose output path is known before its build"
        raise ConfigError(f"{what}; {remedy}") from None

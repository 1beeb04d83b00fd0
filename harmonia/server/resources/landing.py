"""`/`: page for people with the URL, the public keys, and the settings for Nix clients."""

import shlex
from collections.abc import Sequence

from html5tagger import Builder
from sanic import Request
from sanic.exceptions import NotFound

from harmonia.server import page
from harmonia.server.context import ServerContext
from harmonia.server.http import origin
from harmonia.server.http.response import Representation


async def get(context: ServerContext, request: Request) -> Representation:
    settings = context.settings
    if not settings.landing or request.path != "/":
        raise NotFound
    url = origin.base_url(request, settings)
    keys = context.trusted_keys
    _, _, name = url.partition("//")
    document = page.begin(context, f"{name}, a Nix binary cache", "./")
    with document.main:
        document.h1(name)
        document.p("Add this cache to ").a("Nix", href="https://nixos.org/")
        document._(" to download builds instead of compiling them.")
        _identity(document, url, keys)
        _section(document, "nix.conf", "/etc/nix/nix.conf, on any system", _nix_conf(url, keys))
        _section(document, "NixOS", "configuration.nix", _nixos(url, keys))
        _section(document, "Flake", "flake.nix, for all users of the flake", _flake(url, keys))
        once = command("nix build nixpkgs#hello", url, keys)
        _section(document, "Once", "For one command (requires a user in trusted-users)", once)
        with document.section:
            document.h2("About")
            with document.dl:
                document.dt("Store directory").dd.code(settings.virtual_nix_store)
                document.dt("Priority").dd(f"{settings.priority} (Nix asks the cache with the lowest number first)")
                if settings.push.enable:
                    push_to = f"nix copy --to '{url}/push?secret-key=FILE' PATH"
                    document.dt("Push").dd("With a token of the scope push: ").code(push_to)
                document.dt("For programs").dd.a("nix-cache-info", href="nix-cache-info")
    return page.end(context, document, script="copy")


def _identity(document: Builder, url: str, keys: Sequence[str]) -> None:
    page.snippet(document, url, "URL")
    for key in keys:
        page.snippet(document, key, "Public key")
    if not keys:
        document.p("This cache does not sign. Paths keep the signatures that they have in its store.", class_="dim")


def _section(document: Builder, heading: str, caption: str, text: str) -> None:
    with document.section:
        document.h2(heading)
        page.snippet(document, text, caption)


def _nix_conf(url: str, keys: Sequence[str]) -> str:
    lines = [f"extra-substituters = {url}"]
    if keys:
        lines.append(f"extra-trusted-public-keys = {' '.join(keys)}")
    return "\n".join(lines)


def _nixos(url: str, keys: Sequence[str]) -> str:
    lines = [f"substituters = [ {_nix_string(url)} ];"]
    if keys:
        lines.append(f"trusted-public-keys = [ {' '.join(map(_nix_string, keys))} ];")
    return _attributes("nix.settings", lines)


def _flake(url: str, keys: Sequence[str]) -> str:
    lines = [f"extra-substituters = [ {_nix_string(url)} ];"]
    if keys:
        lines.append(f"extra-trusted-public-keys = [ {' '.join(map(_nix_string, keys))} ];")
    return _attributes("nixConfig", lines)


def command(start: str, url: str, keys: Sequence[str]) -> str:
    """Return a Nix command with options that make it use this cache, in addition to the caches in nix.conf."""
    lines = [start, f"--option extra-substituters {url}"]
    if keys:
        lines.append(f"--option extra-trusted-public-keys {shlex.quote(' '.join(keys))}")
    return " \\\n  ".join(lines)


def _attributes(name: str, lines: Sequence[str]) -> str:
    return "\n".join([f"{name} = {{", *(f"  {line}" for line in lines), "};"])


def _nix_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${")
    return f'"{escaped}"'

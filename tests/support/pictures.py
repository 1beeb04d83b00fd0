"""Pictures of the pages in docs/pictures, of an invented store: `make pictures` takes them."""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from harmonia.nix.signing import SecretKey
from harmonia.nix.store_path import StorePath
from harmonia.tools.store_builder import StoreBuilder
from support.browser import CHROMIUM, Page, chromium, open_tab
from support.pages import ROOT
from support.running import Server

_WIDTH = 1100
_SETTINGS = """
browse = true
base_url = "https://cache.example.org"
cache_name = "Example cache"
cache_description = "Builds of the Example project for x86_64-linux, kept for 90 days by its infrastructure team."
"""
_FIRST_BUILD = 1_780_000_000  # seconds since 1970
_BUILD_INTERVAL_S = 5_000

_PACKAGES: Mapping[str, tuple[str, str, float, float, str]] = {
    "glibc": ("2.40", "2.40", 28.9, 28.9, ""),
    "zlib": ("1.3.1", "1.3.1", 0.1, 0.1, "glibc"),
    "openssl": ("3.4.1", "3.5.0", 7.2, 7.6, "glibc"),
    "icu4c": ("76.1", "77.1", 37.8, 38.9, "glibc"),
    "perl": ("5.40.0", "5.40.0", 56.5, 56.5, "glibc"),
    "python3": ("3.12.10", "3.12.10", 118.0, 118.0, "glibc zlib"),
    "postgresql": ("17.5", "17.5", 54.5, 54.6, "glibc openssl icu4c zlib perl"),
    "linux": ("6.12.30", "6.12.34", 128.6, 129.1, ""),
    "linux-firmware": ("20250509", "20250613", 315.4, 331.0, ""),
    "systemd": ("257.5", "257.6", 33.8, 33.9, "glibc openssl zlib"),
    "nginx": ("1.28.0", "1.28.0", 3.4, 3.4, "glibc openssl zlib"),
    "example-models": ("7", "8", 96.1, 88.0, ""),
    "example-backend": ("1.9", "1.10", 24.6, 21.3, "python3 postgresql example-models"),
    "example-frontend": ("1.9", "1.10", 11.9, 9.4, ""),
    "example-docs": ("1.9", "", 18.2, 0.0, ""),
    "jemalloc": ("", "5.3.0", 0.0, 1.7, "glibc"),
    "example-system": (
        "1.9", "1.10", 0.1, 0.1,
        "linux linux-firmware systemd nginx example-backend example-frontend example-docs jemalloc",
    ),
}  # fmt: skip
"""Packages by name: the versions and the sizes in MiB in two generations, and references. No version is no package."""


def _fill(store: StoreBuilder) -> list[StorePath]:
    """Build both generations of the system. Return their top paths."""
    valid: set[StorePath] = set()
    tops = []
    for generation in (0, 1):
        made: dict[str, StorePath] = {}
        for name, (old, new, old_size, new_size, needed) in _PACKAGES.items():
            version, size = ((old, old_size), (new, new_size))[generation]
            if not version:
                continue
            references = [made[each] for each in needed.split() if each in made]
            made[name] = path = store.output_path(f"{name}-{version}", " ".join(references).encode())
            if path in valid:
                continue
            valid.add(path)
            store.add(path, {"bin": {}}, references=references)
            row = int(size * 1024 * 1024), _FIRST_BUILD + _BUILD_INTERVAL_S * len(valid), f"/nix/store/{path}"
            with store.connect() as connection:
                connection.execute("update ValidPaths set narSize = ?, registrationTime = ? where path = ?", row)
        tops.append(made["example-system"])
    return tops


def _take(page: Page, url: str, file: Path) -> None:
    page.set_view((_WIDTH, 100))
    page.open(url)
    assert page.errors == []
    page.set_view((_WIDTH, page.run("document.documentElement.scrollHeight")))
    page.screenshot(str(file))


def main() -> None:
    """Serve the invented store, and take the pictures."""
    if CHROMIUM is None:
        sys.exit("make pictures: install chromium-headless-shell or chromium")
    pictures = ROOT / "docs" / "pictures"
    with tempfile.TemporaryDirectory(prefix="harmonia-pictures-") as name:
        directory = Path(name)
        key = SecretKey.generate("cache.example.org-1")
        (directory / "key").write_text(key.export())
        os.chmod(directory / "key", 0o600)
        before, after = _fill(StoreBuilder(directory / "store"))
        settings = f"{_SETTINGS}sign_key_paths = ['{directory}/key']\ncache_size = '200G'"
        server = Server(directory / "server", directory / "store", settings)
        server.start()
        try:
            with chromium(directory / "profile") as connection, open_tab(connection) as page:
                for picture, path in (
                    ("landing", "/"),
                    ("search", "/search?q=example"),
                    ("path", f"/path/{after.hash_part}"),
                    ("diff", f"/diff/{before.hash_part}/{after.hash_part}"),
                ):
                    _take(page, server.url + path, pictures / f"{picture}.png")
        finally:
            server.stop()


if __name__ == "__main__":
    main()

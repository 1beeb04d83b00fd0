"""Path arguments, closures and GC roots are resolved as by Nix."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonia.errors import InvalidPathError
from harmonia.nix.path_info import PathInfo
from harmonia.store.path_arguments import closure, gc_roots, resolve
from harmonia.store.store import Store
from harmonia.tools.store_builder import StoreBuilder
from support.programs import needs


@pytest.fixture
def builder(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "root")


@pytest.fixture
def store(builder: StoreBuilder) -> Store:
    return Store("/nix/store", builder.real_dir, builder.db_path)


@pytest.fixture
def text(builder: StoreBuilder) -> PathInfo:
    return builder.add_text("text", b"")


class TestNamed:
    def test_every_form_of_a_path_is_resolved(self, store: Store, text: PathInfo) -> None:
        real = store.real_path(text.path)
        for name in (f"/nix/store/{text.path}", f"{store.real_dir}/{text.path}", text.path, text.path.hash_part):
            assert resolve(store, name) == (text, real)
            assert resolve(store, f"{name}/a/b") == (text, real + b"/a/b")
        assert resolve(store, f"/nix/store/{text.path}/") == (text, real)

    def test_symlinks_are_followed(
        self, store: Store, text: PathInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "profile-1-link").symlink_to(f"/nix/store/{text.path}")
        (tmp_path / "profile").symlink_to("profile-1-link")
        (tmp_path / "loop").symlink_to("loop")
        monkeypatch.chdir(tmp_path)
        for name in ("profile", "./profile", f"{tmp_path}/profile", "../" + tmp_path.name + "/profile"):
            assert resolve(store, name)[0] == text
            assert resolve(store, f"{name}/bin")[1].endswith(b"/bin")
        with pytest.raises(InvalidPathError):
            resolve(store, "loop")

    @pytest.mark.parametrize("name", ["", "/", "text", "/nix/store", "/nix/store/", "/etc/passwd", "0" * 32])
    def test_other_arguments_raise(self, store: Store, text: PathInfo, name: str) -> None:
        with pytest.raises(InvalidPathError, match="does not name a valid path of the store /nix/store"):
            resolve(store, name)
        for unknown in (f"{text.path}x", f"/nix/store/{text.path}x", f"/nix/store/{text.path.hash_part}-other"):
            with pytest.raises(InvalidPathError):
                resolve(store, unknown)


def test_closure_has_all_references(builder: StoreBuilder, store: Store) -> None:
    a = builder.add_text("a", b"").path
    b = builder.output_path("b")
    builder.add(b, b"", references=[a, b])
    c = builder.add_text("c", b"", [b]).path
    builder.add_text("d", b"")
    assert set(closure(store, [c])) == {a, b, c}
    assert set(closure(store, [b, a])) == {a, b}
    builder.delete(c)
    with pytest.raises(InvalidPathError, match=f"/nix/store/{c} is not a valid path"):
        closure(store, [c])


@pytest.fixture
def roots(builder: StoreBuilder, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that creates valid and invalid GC roots. The paths of valid roots are called root-…"""
    state = tmp_path / "root/nix/var/nix"

    def path(name: str) -> str:
        return f"/nix/store/{builder.add_text(name, b'').path}"

    def link(name: str, target: object) -> None:
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).symlink_to(str(target))

    def make() -> Path:
        link("gcroots/direct", path("root-direct"))
        link("gcroots/deep/er/direct", path("root-deep"))
        link("gcroots/inside", f"{path('root-inside')}/bin/sh")
        (tmp_path / "result").symlink_to(path("root-indirect"))
        link("gcroots/auto/indirect", tmp_path / "result")
        link("gcroots/profiles", state / "profiles")
        link("profiles/per-user/me/profile-7-link", path("root-profile"))
        link("profiles/per-user/me/profile", "profile-7-link")
        link("gcroots/auto/stale", tmp_path / "none")
        link("gcroots/elsewhere", "/etc")
        link("gcroots/invalid", f"/nix/store/{builder.output_path('invalid')}")
        (tmp_path / "far").symlink_to(tmp_path / "further")
        (tmp_path / "further").symlink_to(path("too-far"))
        link("gcroots/auto/far", tmp_path / "far")
        (state / "gcroots" / path("root-file").rpartition("/")[2]).touch()
        path("garbage")
        return state

    return make


def test_gc_roots_of_all_kinds_are_found(store: Store, roots: Callable[..., Path]) -> None:
    found = gc_roots(store, str(roots()))
    assert {path.name for path in found} == {
        f"root-{it}" for it in ("direct", "deep", "inside", "indirect", "profile", "file")
    }
    assert len(found) == 6


def test_missing_state_directory_has_no_gc_roots(store: Store, tmp_path: Path) -> None:
    assert gc_roots(store, str(tmp_path / "none")) == []


@pytest.mark.nix
@needs("nix-store")
def test_nix_finds_the_same_gc_roots(store: Store, roots: Callable[..., Path], tmp_path: Path) -> None:
    state = roots()
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "NIX_CONFIG": "build-users-group =\n"}
    command = ["nix-store", "--store", f"local?root={tmp_path}/root", "--gc", "--print-roots"]
    lines = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.splitlines()
    below = [line.split(" -> ")[1] for line in lines if str(tmp_path) in line]
    assert {path[44:] for path in below} == {path.name for path in gc_roots(store, str(state))}

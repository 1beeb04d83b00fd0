"""Publish policy: what each rule permits, and how soon changes of GC roots take effect."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonia.config.tables.publish import PublishRules
from harmonia.errors import StoreUnavailableError
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.nix.store_path import StorePath
from harmonia.store import gc_roots, queries
from harmonia.store.publish_policy import Closure, PublishPolicy
from harmonia.store.store import Store
from harmonia.tools.store_builder import StoreBuilder

KEY, OTHER = SecretKey.generate("key-1"), SecretKey.generate("other-1")


def info(name: str, *keys: SecretKey) -> PathInfo:
    unsigned = PathInfo(StorePath(f"{'0' * 32}-{name}"), bytes(32), 1)
    sigs = tuple(key.sign(unsigned.fingerprint("/nix/store")) for key in keys)
    return PathInfo(unsigned.path, unsigned.nar_hash, 1, sigs=sigs)


def policy(**rules: tuple[str, ...]) -> PublishPolicy:
    return PublishPolicy(PublishRules(**rules), Store("/nix/store", "/nowhere", "/nowhere"))


@pytest.mark.parametrize(
    ("allow", "deny", "name", "permitted"),
    [
        ((), (), "hello-1.0", True),
        (("hello-*",), (), "hello-1.0", True),
        (("hello-*",), (), "xhello-1.0", False),
        (("hello",), (), "hello-1.0", False),
        (("a", "hello-?.0"), (), "hello-1.0", True),
        (("hello-[0-9]*",), (), "hello-doc", False),
        ((), ("*secret*",), "my-secret-1", False),
        (("*",), ("*secret*",), "my-secret-1", False),
        (("*",), ("*SECRET*",), "my-secret-1", True),
        ((), ("hello",), "hello.drv", False),  # a derivation has the name of its output
        (("hello",), (), "hello.drv", True),
        (("*.drv",), (), "hello", False),
        ((), ("hello.drv",), "hello", True),
        ((), ("0*",), "hello", True),  # a name has no hash part
    ],
)
def test_allow_and_deny_patterns_match_names(
    allow: tuple[str, ...], deny: tuple[str, ...], name: str, *, permitted: bool
) -> None:
    rules = policy(allow=allow, deny=deny)
    assert rules.permits(info(name)) == rules.permits_name(info(name).path) == permitted


@pytest.mark.parametrize(
    ("name", "denial"),
    [
        ("hello-1.0", None),
        ("hello.drv", None),
        ("other", "no pattern of publish.allow matches its name"),
        ("hello-secret-1", '"*secret*" of publish.deny matches its name'),
        ("hello-tmp.drv", '"*-tmp" of publish.deny matches its name'),
        ("other-tmp", '"*-tmp" of publish.deny matches its name'),
    ],
)
def test_denial_names_the_rule(name: str, denial: str | None) -> None:
    assert policy(allow=("hello*",), deny=("*secret*", "*-tmp")).denial(info(name)) == denial


def test_stored_valid_signature_permits() -> None:
    rules = policy(signed_by=(str(KEY.public_key),))
    assert rules.permits(info("a", KEY))
    assert rules.permits(info("a", OTHER, KEY))
    assert not rules.permits(info("a"))
    assert not rules.permits(info("a", OTHER))
    # The name of the key with another key; signatures of another path.
    assert not rules.permits(info("a", SecretKey(KEY.name, OTHER.key)))
    stolen = info("a", KEY).sigs
    moved = PathInfo(StorePath(f"{'1' * 32}-a"), bytes(32), 1, sigs=stolen)
    assert not rules.permits(moved)
    grown = PathInfo(info("a").path, bytes(32), 2, sigs=stolen)
    assert not rules.permits(grown)
    assert not rules.permits(PathInfo(info("a").path, bytes(32), 1, sigs=("key-1:", "garbage", "")))


def test_all_rules_must_permit() -> None:
    rules = policy(signed_by=(str(KEY.public_key), str(OTHER.public_key)), deny=("b",))
    assert rules.permits(info("a", OTHER))
    assert not rules.permits(info("b", KEY))
    assert not rules.permits(info("a"))


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "store")


@pytest.fixture
def chain(store: StoreBuilder) -> list[StorePath]:
    """Add paths of which each refers to the one before it, and to itself."""
    paths: list[StorePath] = []
    for name in ("a", "b", "c"):
        path = store.output_path(name)
        store.add(path, b"", references=[*paths[-1:], path])
        paths.append(path)
    return paths


def refresh_now(closure: Closure) -> None:
    """Refresh the closure without waiting for its interval."""
    closure._not_before = 0  # noqa: SLF001 (a private part is tested)
    closure.refresh()


def opened(store: StoreBuilder) -> Store:
    return Store(store.store_dir, store.real_dir, store.db_path)


@pytest.fixture
def needed(store: StoreBuilder, chain: list[StorePath]) -> Callable[..., str]:
    def needed(*roots: object) -> str:
        closure = Closure(opened(store), [str(root) for root in roots])
        closure.refresh()
        return "".join(path.name for path in chain if path in closure)

    return needed


def test_roots_are_store_paths_symlinks_and_directories(
    store: StoreBuilder, chain: list[StorePath], needed: Callable[..., str], tmp_path: Path
) -> None:
    a, b, c = chain
    assert needed(f"/nix/store/{b}") == "ab"
    assert needed(f"/nix/store/{b}/lib/file") == "ab"
    assert needed(f"{store.real_dir}/{b}") == "ab"
    (tmp_path / "link").symlink_to(f"/nix/store/{a}")
    assert needed(tmp_path / "link") == "a"
    (tmp_path / "indirect").symlink_to("link")
    assert needed(tmp_path / "indirect") == "a"
    roots = tmp_path / "roots"
    (roots / "deeper").mkdir(parents=True)
    assert needed(roots) == ""
    (roots / "deeper" / "auto").symlink_to(tmp_path / "profile")
    (tmp_path / "profile").symlink_to("profile-2-link")
    (tmp_path / "profile-2-link").symlink_to(f"/nix/store/{b}")
    assert needed(roots) == "ab"
    assert needed(roots, f"/nix/store/{c}") == "abc"
    (tmp_path / "to-roots").symlink_to(roots)
    assert needed(tmp_path / "to-roots") == "ab"
    files = tmp_path / "files"
    files.mkdir()
    (files / b).touch()
    assert needed(files) == "ab"


@pytest.mark.parametrize(("symlinks", "expected"), [(40, "a"), (41, "")])
def test_root_is_followed_through_at_most_40_symlinks(
    chain: list[StorePath], needed: Callable[..., str], tmp_path: Path, symlinks: int, expected: str
) -> None:
    (tmp_path / "1").symlink_to(f"/nix/store/{chain[0]}")
    for number in range(2, symlinks + 1):
        (tmp_path / str(number)).symlink_to(str(number - 1))
    assert needed(tmp_path / str(symlinks)) == expected


def test_invalid_root_publishes_nothing(
    tmp_path: Path, chain: list[StorePath], needed: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    roots = tmp_path / "roots"
    roots.mkdir()
    (roots / "loop").symlink_to("loop")
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "root").symlink_to(f"/nix/store/{chain[0]}")
    (roots / "aside").symlink_to(tmp_path / "beside")
    (roots / "up").symlink_to(".")
    (roots / "broken").symlink_to("nothing")
    (roots / "file").write_text(f"/nix/store/{chain[0]}")
    (tmp_path / "beside" / chain[0]).touch()
    (roots / "to-file").symlink_to(tmp_path / "beside" / chain[0])
    (roots / "gone").symlink_to(f"/nix/store/{'0' * 32}-gone")
    (roots / "no-path").symlink_to("/nix/store/.links")
    (roots / "elsewhere").symlink_to("/proc/self/fd")
    assert needed(roots) == ""
    assert needed(tmp_path / "none") == ""
    assert f"'{tmp_path}/none' does not exist" in caplog.text
    assert len(caplog.records) == 3


def test_added_and_removed_roots_are_noticed(store: StoreBuilder, chain: list[StorePath], tmp_path: Path) -> None:
    a, b, c = chain
    root = tmp_path / "root"
    closure = Closure(opened(store), [str(root)])
    closure.refresh()
    assert a not in closure
    for path, expected in ((a, "a"), (c, "abc"), (b, "ab")):
        (tmp_path / "new").symlink_to(f"/nix/store/{path}")
        os.replace(tmp_path / "new", root)
        refresh_now(closure)
        assert "".join(path.name for path in chain if path in closure) == expected
    root.unlink()
    refresh_now(closure)
    assert a not in closure


def test_root_that_becomes_valid_later_is_noticed(store: StoreBuilder) -> None:
    path = store.output_path("late")
    closure = Closure(opened(store), [f"/nix/store/{path}"])
    closure.refresh()
    assert path not in closure
    store.add(path, b"")
    refresh_now(closure)
    assert path in closure


def counted(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, seconds: float = 0) -> list[float]:
    """Record the times of all calls of a function, each of which is delayed by `seconds`."""
    calls: list[float] = []
    original = getattr(owner, name)

    def call(*arguments: object) -> object:
        calls.append(time.monotonic())
        time.sleep(seconds)
        return original(*arguments)

    monkeypatch.setattr(owner, name, call)
    return calls


def test_closure_is_not_recomputed_without_changes(
    store: StoreBuilder, chain: list[StorePath], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = counted(monkeypatch, Closure, "_needed_hash_parts")
    closure = Closure(opened(store), [f"/nix/store/{chain[-1]}"])
    for number in range(5):
        refresh_now(closure)
        store.add_text(f"unrelated-{number}", b"")
    assert len(found) == 1
    assert all(path in closure for path in chain)


def test_search_for_roots_takes_a_bounded_share_of_the_time(
    store: StoreBuilder, chain: list[StorePath], monkeypatch: pytest.MonkeyPatch
) -> None:
    closure = Closure(opened(store), [f"/nix/store/{chain[0]}"])
    searches = counted(monkeypatch, gc_roots, "find", 0.02)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        closure.refresh()
    assert 1 <= len(searches) <= 1 / (0.02 * 10) + 1


def test_too_large_closure_is_cut_and_logged(
    store: StoreBuilder, chain: list[StorePath], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("harmonia.store.publish_policy._CLOSURE_MAX_PATHS", 2)
    closure = Closure(opened(store), [f"/nix/store/{chain[-1]}"])
    closure.refresh()
    assert len([path for path in chain if path in closure]) == 2
    assert "the closure has more than 2 paths" in caplog.text


def test_closure_is_kept_while_the_database_is_missing(store: StoreBuilder, chain: list[StorePath]) -> None:
    closure = Closure(opened(store), [f"/nix/store/{chain[-1]}"])
    closure.refresh()
    os.rename(store.db_path, f"{store.db_path}.away")
    with pytest.raises(StoreUnavailableError):
        refresh_now(closure)
    assert all(path in closure for path in chain)


def test_closure_of_100_000_paths_takes_little_time(store: StoreBuilder) -> None:
    hashes = [f"{number:032}" for number in range(100_000)]
    with store.connect() as connection:
        connection.executemany(
            "insert into ValidPaths (id, path, hash, registrationTime, narSize) values (?, ?, '', 0, 1)",
            ((number + 1, f"/nix/store/{hash_part}-p") for number, hash_part in enumerate(hashes)),
        )
        connection.executemany("insert into Refs values (?, ?)", ((n + 1, n) for n in range(1, 100_000)))
    closure = Closure(opened(store), [f"/nix/store/{hashes[-1]}-p"])
    began = time.process_time()
    closure.refresh()
    assert time.process_time() - began < 60  # one query for each path would take longer
    assert StorePath(f"{hashes[0]}-p") in closure


def test_outputs_are_found_without_their_derivation(store: StoreBuilder) -> None:
    derivation = StorePath(f"{'0' * 32}-gone.drv")
    output = store.output_path("made")
    store.add(output, b"", deriver=derivation)
    with store.connect() as connection:  # rows without a valid path
        connection.executemany(
            "insert into ValidPaths (path, hash, registrationTime, deriver) values (?, '', 0, ?)",
            (
                (path, f"/nix/store/{derivation}")
                for path in ("/nix/store/odd", f"/elsewhere/{output}", f"/nix/store/{output}/in")
            ),
        )
    assert queries.outputs(opened(store), derivation) == [output]

"""Publish policy: each resource answers a path that is not published like a missing one."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.nix.store_path import StorePath
from harmonia.tools.fixture_tree import Symlink
from harmonia.tools.store_builder import StoreBuilder
from support.build_logs import add_log
from support.contract import ABOUT_PATHS, filled, stock
from support.running import Server, nar_url, patched, run, wait_until

Start = Callable[..., Server]

KEY = SecretKey.generate("trusted-1")
UNUSED_KEY = SecretKey.generate("never-1")


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Build a store with objects of every kind, without signatures, and an empty directory for GC roots."""
    directory = tmp_path_factory.mktemp("release")
    (directory / "roots").mkdir()
    return directory, stock(directory / "store")


RULES = {
    "denied": 'deny = ["tree", "plain", "packed"]',
    "not allowed": 'allow = ["hello*"]',
    "not signed": f'signed_by = ["{UNUSED_KEY.public_key}"]',
    "not needed": 'gc_roots = ["{directory}/roots"]',
}
ALLOWING = {
    "no rule": "",
    "not denied": 'deny = ["hello*"]',
    "allowed": 'allow = ["tr?e", "plain", "packed"]',
    "needed": 'allow = ["*"]\ngc_roots = ["/nix/store/{hash}-tree"]',
}


@pytest.mark.parametrize("rule", RULES)
def test_unpublished_path_is_answered_like_a_missing_one(
    start: Start, stocked: tuple[Path, dict[str, str]], rule: str
) -> None:
    directory, hashes = stocked
    none = dict(hashes, hash="0" * 32, plain=f"{'0' * 32}-n.drv", packed=f"{'0' * 32}-n.drv")
    rules = RULES[rule].format(directory=directory)
    server = start(store=directory / "store", settings=f"browse = true\n[publish]\n{rules}")
    assert len(ABOUT_PATHS) > 15
    for row in ABOUT_PATHS:
        for method in ("GET", "HEAD"):
            for headers in ({}, {"Range": "bytes=0-0"}, {"If-None-Match": "*"}, {"Accept-Encoding": "zstd"}):
                hidden = server.request(method, filled(row, hashes), headers)
                assert hidden.status == 404, (method, row.path)
                if "{" in row.path:
                    assert hidden == server.request(method, filled(row, none), headers)
    # The search does not find it either.
    for query in ("tree", "e", hashes["hash"], hashes["hash"][:10]):
        found = server.get(f"/search?q={query}")
        assert found.status == 200
        assert "0 paths for" in found.text
        assert "tree</a>" not in found.text
    assert not [line for line in server.log if "ERROR" in line]


@pytest.mark.parametrize("rule", ALLOWING)
def test_published_path_is_served(start: Start, stocked: tuple[Path, dict[str, str]], rule: str) -> None:
    directory, hashes = stocked
    rules = ALLOWING[rule].format(**hashes)
    server = start(store=directory / "store", settings=f"browse = true\n[publish]\n{rules}")
    for row in ABOUT_PATHS:
        if rule == "needed" and row.path.startswith("/log/"):
            continue  # it was built elsewhere, so it has no log here
        assert server.get(filled(row, hashes)).status == row.status, row.path
    assert "1 path for" in server.get("/search?q=tree").text


def test_signature_of_our_own_key_does_not_publish(start: Start, tmp_path: Path) -> None:
    store = StoreBuilder(tmp_path / "store")
    plain = store.add(store.output_path("plain"), b"")
    signed = store.add(store.output_path("signed"), b"", keys=[KEY])
    (tmp_path / "key").write_text(KEY.export())
    (tmp_path / "key").chmod(0o600)
    rules = f"sign_key_paths = ['{tmp_path}/key']\n[publish]\nsigned_by = ['{KEY.public_key}']"
    server = start(store=tmp_path / "store", settings=rules)
    assert server.get(f"/{signed.path.hash_part}.narinfo").status == 200
    assert server.get(f"/{plain.path.hash_part}.narinfo").status == 404
    # A new or removed signature takes effect at once.
    sig = KEY.sign(plain.fingerprint("/nix/store"))
    for sigs, status in ((sig, 200), (None, 404), ("trusted-1:AAAA", 404), (f"x:y {sig}", 200)):
        with store.connect() as connection:
            connection.execute("update ValidPaths set sigs = ? where path = ?", (sigs, f"/nix/store/{plain.path}"))
        assert server.get(f"/{plain.path.hash_part}.narinfo").status == status
        assert server.get(nar_url(plain)).status == status


@pytest.fixture
def pair(tmp_path: Path) -> tuple[StoreBuilder, PathInfo, PathInfo]:
    """Build a store with a path that refers to a secret path."""
    store = StoreBuilder(tmp_path / "store")
    secret = store.add(store.output_path("secret"), {"file": b"secret"})
    tree = {"link": Symlink(f"/nix/store/{secret.path}/file")}
    return store, store.add(store.output_path("user"), tree, references=[secret.path]), secret


def test_pages_show_no_more_of_an_unpublished_reference_than_the_narinfo(
    start: Start, pair: tuple[StoreBuilder, PathInfo, PathInfo], tmp_path: Path
) -> None:
    _, user, secret = pair
    server = start(store=tmp_path / "store", settings="browse = true\n[publish]\ndeny = ['secret']")
    # The narinfo must list the reference: it is part of the signed fingerprint.
    assert str(secret.path) in server.get(f"/{user.path.hash_part}.narinfo").text
    page = server.get(f"/path/{user.path.hash_part}").text
    assert secret.path.hash_part in page
    assert f"./{secret.path.hash_part}" not in page
    assert "Closure" not in page
    assert server.get(f"/serve/{user.path.hash_part}/link").status == 404
    assert server.get(f"/search?q={secret.path.hash_part}").status == 200  # no redirect to its page
    both = server.get("/search?q=e").text
    assert "1 path for" in both


def test_unpublished_referrers_are_not_shown(
    start: Start, pair: tuple[StoreBuilder, PathInfo, PathInfo], tmp_path: Path
) -> None:
    _, user, secret = pair
    server = start(store=tmp_path / "store", settings="browse = true\n[publish]\ndeny = ['user']")
    page = server.get(f"/path/{secret.path.hash_part}").text
    assert user.path.hash_part not in page
    assert "This path is needed by no path." in page


def test_added_and_removed_gc_roots_take_effect_within_seconds(
    start: Start, pair: tuple[StoreBuilder, PathInfo, PathInfo], tmp_path: Path
) -> None:
    _, user, secret = pair
    roots = tmp_path / "roots"
    roots.mkdir()
    server = start(store=tmp_path / "store", settings=f"[publish]\ngc_roots = ['{roots}']")

    def statuses() -> list[int]:
        return [server.get(f"/{info.path.hash_part}.narinfo").status for info in (user, secret)]

    assert statuses() == [404, 404]
    (roots / "root").symlink_to(f"/nix/store/{user.path}")
    wait_until(lambda: statuses() == [200, 200])
    (roots / "root").unlink()
    wait_until(lambda: statuses() == [404, 404])
    (roots / "root").symlink_to(f"/nix/store/{secret.path}")
    wait_until(lambda: statuses() == [404, 200])


def test_path_page_links_to_no_unpublished_log(start: Start, tmp_path: Path) -> None:
    store = StoreBuilder(tmp_path / "store")
    derivation, output = store.add_derivation("tree", "/bin/sh")
    store.add(output, b"", deriver=derivation.path)
    store.add_log(derivation.path, b"log\n")
    for rules, published in (("", True), ("[publish]\ndeny = ['*.drv']", False)):
        server = start(store=tmp_path / "store", settings=f"browse = true\n{rules}")
        assert (server.get(f"/log/{derivation.path}").status == 200) is published
        assert ("Build log" in server.get(f"/path/{output.hash_part}").text) is published


def test_log_is_published_together_with_its_output(start: Start, tmp_path: Path) -> None:
    store = StoreBuilder(tmp_path / "store")
    drvs = [StorePath(f"{number}{'0' * 31}-{name}.drv") for number, name in ((1, "good"), (2, "bad"), (3, "lost"))]
    outputs = [store.output_path(name) for name in ("good", "bad")]
    store.add(outputs[0], b"", deriver=drvs[0], keys=[KEY])
    store.add(outputs[1], b"", deriver=drvs[1])
    for drv in drvs:
        add_log(store, drv)
    server = start(store=tmp_path / "store", settings=f"[publish]\nsigned_by = ['{KEY.public_key}']")
    names = [*drvs, *outputs, *(output.hash_part for output in outputs)]
    assert [server.get(f"/log/{name}").status for name in names] == [200, 404, 404, 200, 404, 200, 404]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("signed_by = ['x']", "publish.signed_by: a public key has the form name:base64, as in nix.conf"),
        pytest.param(
            f"signed_by = '{KEY.export()}'",
            "publish.signed_by: expected an array of strings, found string (not shown)",
            id="a secret key",
        ),
        pytest.param(
            f"signed_by = ['{KEY.export()}']",
            "publish.signed_by: the public key has 64 bytes after its colon",
            id="a list of a secret key",
        ),
        ("gc_roots = ['roots']", "publish.gc_roots: expected an absolute path, found 'roots'"),
        ("gc_roots = ['/nowhere/roots']", "publish.gc_roots: '/nowhere/roots' does not exist; name a store path"),
        ("alow = ['a']", "publish.alow: unknown key; did you mean publish.allow?"),
        ("deny = 'a'", "publish.deny: expected an array of strings, found string 'a'"),
    ],
)
def test_invalid_publish_rules_are_rejected(tmp_path: Path, rules: str, message: str) -> None:
    StoreBuilder(tmp_path / "store")
    (tmp_path / "harmonia.toml").write_text(f"real_nix_store = '{tmp_path}/store/nix/store'\n[publish]\n{rules}")
    checked = run("--config", str(tmp_path / "harmonia.toml"), "check-config")
    assert checked.returncode == 2
    assert f":3: {message}" in checked.stderr
    assert KEY.export()[-20:] not in checked.stderr


def test_search_ends_at_its_time_limit_with_many_unpublished_paths(start: Start, tmp_path: Path) -> None:
    store = StoreBuilder(tmp_path / "store")
    signed = store.add(store.output_path("lib-signed"), b"", keys=[KEY])
    with store.connect() as connection:
        connection.executemany(
            "insert into ValidPaths (path, hash, registrationTime, narSize, sigs) values (?, ?, 0, 1, ?)",
            ((f"/nix/store/{n:032}-lib", f"sha256:{'0' * 64}", signed.sigs[0]) for n in range(20_000)),
        )
    hurried = patched("from harmonia.store import queries; queries._SEARCH_TIME_S = 0.01")
    settings = f"browse = true\n[publish]\nsigned_by = ['{KEY.public_key}']"
    server = start(store=tmp_path / "store", settings=settings, program=hurried)
    answer = server.get("/search?q=lib")
    assert re.search(r"At least (1 path|0 paths) for", answer.text)
    assert ">lib</a>" not in answer.text

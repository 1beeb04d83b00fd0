"""Servers behind a balancer that share key, tokens and publish rules answer alike, whichever one is asked."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonia.config import tokens
from harmonia.nix.signing import SecretKey
from harmonia.tools.store_builder import StoreBuilder
from support.running import Server, file_url, wait_until

_SERVERS = 3


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "store")


def test_servers_with_shared_files_answer_alike(
    store: StoreBuilder, tmp_path: Path, start: Callable[..., Server]
) -> None:
    public, secret = store.add_text("public", b"public" * 1000), store.add_text("secret", b"secret")
    (key := tmp_path / "key").write_text(SecretKey.generate("shared-1").export())
    key.chmod(0o600)
    (password, line), (other, other_line) = (tokens.new(name, ["read"]) for name in ("ci", "other"))
    (file := tmp_path / "tokens").write_text(f"{line}\n{other_line}\n")
    settings = f"sign_key_paths = ['{key}']\ntokens_path = '{file}'\npublish.deny = ['secret']"
    servers = [start(store=tmp_path / "store", settings=settings) for _ in range(_SERVERS)]
    authorization = {"Authorization": f"Bearer {password}"}

    def answers(path: str, headers: dict[str, str] | None = None) -> set[tuple[int, bytes, str | None]]:
        found = [server.get(path, headers) for server in servers]
        return {(each.status, each.body, each.headers.get("etag")) for each in found}

    [(status, narinfo, _)] = answers(f"/{public.path.hash_part}.narinfo", authorization)
    assert status == 200
    assert b"Sig: shared-1:" in narinfo
    [(status, _, etag)] = answers(file_url(public), authorization)
    assert (status, bool(etag)) == (200, True)
    [(status, _, _)] = answers(f"/{secret.path.hash_part}.narinfo", authorization)
    assert status == 404
    assert {status for status, *_ in answers(f"/{public.path.hash_part}.narinfo")} == {401}

    file.write_text(f"{other_line}\n")
    for server in servers:
        server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: {status for status, *_ in answers(file_url(public), authorization)} == {401})
    assert {status for status, *_ in answers(file_url(public), {"Authorization": f"Bearer {other}"})} == {200}

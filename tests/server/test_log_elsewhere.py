"""`/log/…` finds Hydra's logs, and redirects to `log_redirect` for logs that are not here."""

from collections.abc import Callable
from pathlib import Path

import pytest

from harmonia.nix.store_path import StorePath
from harmonia.tools.store_builder import StoreBuilder
from support.build_logs import FORMS, TEXT, add_log, collected
from support.running import Server, run

Start = Callable[..., Server]

ELSEWHERE = "log_redirect = 'https://hydra.example.org/log/'"
TARGET = "https://hydra.example.org/log/"


@pytest.mark.parametrize("suffix", FORMS)
def test_log_is_found_where_hydra_writes_it(start: Start, store: StoreBuilder, tmp_path: Path, suffix: str) -> None:
    derivation = collected(store, "from-hydra")
    logs = tmp_path / "hydra/build-logs"
    file = logs / derivation[:2] / f"{derivation[2:]}{suffix}"
    file.parent.mkdir(parents=True)
    file.write_bytes(FORMS[suffix](TEXT))
    server = start(store=tmp_path / "store", settings=f"log_dir = '{logs}'")
    for name in (derivation, derivation[:32]):
        answer = server.get(f"/log/{name}")
        assert (answer.status, answer.body) == (200, TEXT)
    assert server.get(f"/log/{collected(store, 'other')}").status == 404


def test_log_that_is_not_here_is_redirected(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    derivation = collected(store, "gone-1.0+b")
    server = start(store=tmp_path / "store", settings=ELSEWHERE)
    answer = server.get(f"/log/{derivation}")
    assert (answer.status, answer.body) == (307, b"")
    assert answer.headers["location"] == f"{TARGET}{derivation.replace('+', '%2B')}"
    assert answer.headers["cache-control"] == "no-cache"
    assert server.head(f"/log/{derivation}").headers == answer.headers


def test_log_that_is_here_is_not_redirected(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    derivation = collected(store, "here")
    server = start(store=tmp_path / "store", settings=ELSEWHERE)
    assert server.get(f"/log/{derivation}").status == 307
    add_log(store, derivation)
    assert server.get(f"/log/{derivation}").body == TEXT


def test_redirect_for_an_output_names_its_derivation(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    derivation = StorePath(collected(store, "app-built"))
    output = store.add(store.output_path("app"), b"content", deriver=derivation)
    server = start(store=tmp_path / "store", settings=ELSEWHERE)
    assert server.get(f"/log/{output.path}").headers["location"] == f"{TARGET}{derivation}"


@pytest.mark.parametrize("name", ["none", "%2e%2e", "0" * 32, "..%2fx.drv", f"{'0' * 32}-x.drv%0d%0aX:y"])
def test_malformed_name_or_bare_hash_is_not_redirected(
    start: Start, store: StoreBuilder, tmp_path: Path, name: str
) -> None:
    add_log(store, collected(store, "other"))
    server = start(store=tmp_path / "store", settings=ELSEWHERE)
    assert server.get(f"/log/{name}").status == 404


def test_hidden_and_missing_logs_are_redirected_alike(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    hidden, missing = collected(store, "secret-1"), collected(store, "secret-2")
    add_log(store, hidden)
    server = start(store=tmp_path / "store", settings=f"{ELSEWHERE}\n[publish]\ndeny = ['secret-*']")
    answers = [server.get(f"/log/{name}") for name in (hidden, missing)]
    assert [answer.status for answer in answers] == [307, 307]
    assert [server.get(f"/log/{name[:32]}").status for name in (hidden, missing)] == [404, 404]


def test_redirect_without_a_local_store(start: Start, store: StoreBuilder, tmp_path: Path) -> None:
    derivation = collected(store, "gone")
    upstream = "local_store = false\n[[upstream]]\nurl = 'http://127.0.0.1:1'\nmode = 'proxy'"
    server = start(store=tmp_path / "store", settings=f"{ELSEWHERE}\n{upstream}")
    assert server.get(f"/log/{derivation}").status == 307


@pytest.mark.parametrize("value", ["hydra.example.org", "ftp://x/log", "https://x/log?a=b", "https://x/ log"])
def test_other_values_of_log_redirect_are_rejected(tmp_path: Path, value: str) -> None:
    config = tmp_path / "harmonia.toml"
    config.write_text(f"log_redirect = '{value}'\n")
    checked = run("--config", str(config), "check-config", "--text-only")
    assert checked.returncode == 2
    assert f"{config}:1: log_redirect: expected a string like" in checked.stderr

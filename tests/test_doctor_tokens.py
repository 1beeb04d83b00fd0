"""`harmonia doctor` and `harmonia check-config` warn of tokens that have expired, or expire within 14 days."""

import time
from pathlib import Path

import msgspec
import pytest

from harmonia.config.settings import Settings
from harmonia.config.tokens import new
from harmonia.tools.doctor import tokens
from harmonia.tools.store_builder import StoreBuilder
from support.running import run

DAY_S = 86400


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tokens_path=str(tmp_path / "tokens"))


def write(settings: Settings, **days: float) -> None:
    """Write a token for each name, which expires in so many days."""
    now = time.time()
    lines = [f"{new(name, ['read'], now + days_left * DAY_S)[1]}\n" for name, days_left in days.items()]
    Path(str(settings.tokens_path)).write_text("".join(lines))


def test_tokens_that_expire_within_fourteen_days_are_warnings(settings: Settings) -> None:
    write(settings, old=-1, soon=13, later=15)
    findings = list(tokens.check(settings))
    assert [(finding.check, finding.level) for finding in findings] == [("tokens", "warning")] * 2
    assert findings[0].what.startswith("the token old expired at 20")
    assert findings[1].what.startswith("the token soon expires at 20")
    assert findings[1].remedy.endswith("with one of harmonia token soon")


def test_tokens_that_are_valid_for_longer_are_fine(settings: Settings) -> None:
    write(settings, one=15, two=float("inf"))
    assert [finding.level for finding in tokens.check(settings)] == ["ok"]


def test_server_without_tokens_has_no_finding(settings: Settings) -> None:
    write(settings)
    assert not list(tokens.check(settings))
    assert not list(tokens.check(msgspec.structs.replace(settings, tokens_path=None)))
    assert not list(tokens.check(msgspec.structs.replace(settings, tokens_path="/none")))


def test_check_config_warns_of_a_token_that_expires_soon(tmp_path: Path, settings: Settings) -> None:
    store = StoreBuilder(tmp_path)
    store.add_source("source", b"")
    write(settings, soon=13, later=15)
    config = tmp_path / "harmonia.toml"
    config.write_text(
        f"real_nix_store = '{store.real_dir}'\nnix_db_path = '{store.db_path}'\n"
        f"tokens_path = '{settings.tokens_path}'\n"
    )
    checked = run("--config", str(config), "check-config")
    assert checked.returncode == 0
    [warning] = [line for line in checked.stderr.splitlines() if "token" in line]
    assert f"{config}:3: tokens_path: the token soon expires at " in warning


def test_doctor_prints_the_warning(tmp_path: Path, settings: Settings) -> None:
    write(settings, soon=13)
    config = tmp_path / "harmonia.toml"
    config.write_text(f"bind = '127.0.0.1:1'\nreal_nix_store = '{tmp_path}'\ntokens_path = '{settings.tokens_path}'\n")
    printed = run("--config", str(config), "doctor", "--quiet")
    assert "tokens: the token soon expires at" in printed.stdout

"""The doctor finds reasons why every push would fail."""

from pathlib import Path

import msgspec
import pytest

from harmonia.config.settings import Settings
from harmonia.config.tables.push import Push
from harmonia.nix.signing import SecretKey
from harmonia.tools.doctor import push
from support.daemon_server import DaemonServer

KEY = SecretKey.generate("push-1")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "key").write_text(KEY.export())
    enabled = Push(enable=True, allow_without_tls=True, sign_key_path=str(tmp_path / "key"))
    return Settings(tokens_path=str(tmp_path / "tokens"), daemon_socket=str(tmp_path / "daemon"), push=enabled)


def test_unreachable_daemon_is_an_error(settings: Settings) -> None:
    [finding] = push.check(settings, [KEY.public_key])
    assert (finding.level, "start it" in finding.remedy) == ("error", True)


def test_key_that_nix_does_not_trust_is_a_warning(settings: Settings) -> None:
    with DaemonServer(Path(str(settings.daemon))):
        assert [finding.level for finding in push.check(settings, [KEY.public_key])] == ["ok"]
        _, warning = push.check(settings, [SecretKey.generate("push-1").public_key])
    assert warning.level == "warning"
    assert str(KEY.public_key) in warning.remedy


def test_disabled_push_is_not_checked(settings: Settings) -> None:
    assert not list(push.check(msgspec.structs.replace(settings, push=Push()), []))

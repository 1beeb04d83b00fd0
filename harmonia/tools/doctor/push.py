"""Checks of pushes into the local store: the Nix daemon, and the key that signs for pushers."""

from harmonia.config import credentials
from harmonia.config.settings import Settings
from harmonia.errors import ConfigError, RemoteError
from harmonia.nix.signing import PublicKey
from harmonia.store.nix_daemon import BlockingDaemon
from harmonia.tools.doctor.finding import Finding, Findings

_TIMEOUT_S = 5.0


def check(settings: Settings, trusted: list[PublicKey]) -> Findings:
    """Yield findings if the settings enable pushes. `trusted` are the keys of this machine's Nix."""
    if not settings.push.enable:
        return
    try:
        BlockingDaemon(str(settings.daemon), _TIMEOUT_S).close()
    except (OSError, RemoteError) as error:
        what = f"every push will fail: the Nix daemon at {settings.daemon} does not answer: {error}"
        yield Finding("push", "error", what, "start it (systemctl start nix-daemon), or set daemon_socket")
    else:
        yield Finding("push", "ok", "the Nix daemon answers")
    try:
        key = credentials.push_key(settings)
    except ConfigError:
        return  # only some users may read the key
    if key is not None and str(key.public_key) not in map(str, trusted):
        what = f"this machine's Nix does not trust push.sign_key_path, so it refuses what {key.name} signs"
        yield Finding("push", "warning", what, f"add {key.public_key} to trusted-public-keys in nix.conf")

"""The target of pushes: a store with a daemon and a server, and the commands of a pusher."""

from collections.abc import Callable
from dataclasses import dataclass

from harmonia.config.tokens import new
from harmonia.nix.signing import SecretKey
from support.nix_client import Client, Key
from support.pusher import Pusher
from support.running import Server


@dataclass(frozen=True)
class Target:
    """The target of pushes. Its daemon trusts one key, and no user, not even root."""

    client: Client
    key: Key
    start: Callable[..., Server]

    def serve(
        self,
        settings: str = "",
        scopes: tuple[str, ...] = ("push", "read"),
        *,
        access_log: bool = True,
        **options: object,
    ) -> Server:
        """Serve the store with push. Clients in the same directory find the token in /etc/netrc of that directory."""
        shared = self.client.shared
        token, record = new("ci", scopes)
        (shared / "tokens").write_text(str(record))
        (shared / "token").write_text(token)
        (shared / "netrc").write_text(f"machine 127.0.0.1 login ci password {token}\n")
        return self.start(
            store=self.client.directory,
            settings=f"tokens_path = '{shared}/tokens'\naccess_log = {str(access_log).lower()}\n[push]\nenable = true\n"
            f"allow_without_tls = true\nstate_dir = '{shared}/state'\n{settings}",
            environment={"NIX_CONFIG": f"trusted-public-keys = {self.key.public}"},
            **options,
        )

    def pusher(self, server: Server) -> Pusher:
        return Pusher(server, (self.client.shared / "token").read_text())

    @property
    def secret(self) -> SecretKey:
        return SecretKey.parse(self.key.secret_file.read_text())


def push(pusher: Client, server: Server, *paths: str, query: str = "", check: bool = True) -> str:
    return pusher.run("nix", "copy", "--to", f"{server.url}/push?{query}", *paths, check=check).stderr


def spooled(server: Server) -> list[str]:
    """Return the files that wait in the spool."""
    names = (path.name for path in (server.cache_dir / "push").iterdir())
    return sorted(name for name in names if not name.startswith(".") and not name.endswith(".imported"))

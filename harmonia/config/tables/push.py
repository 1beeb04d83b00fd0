"""`[push]`: uploads to this server."""

from typing import Annotated

import msgspec
from msgspec import Meta

from harmonia.config import amounts, name_patterns, value_types
from harmonia.config.value_types import Days, File, Size
from harmonia.config.wrong_setting import WrongSettingError, check_values


class Push(msgspec.Struct, frozen=True, kw_only=True):
    """Uploads: `nix copy --to` the URL of the cache with `/push`."""

    enable: Annotated[
        bool,
        Meta(
            description="Accept store paths at `/push`. Needs `tokens_path` or `client_certificates`, and the Nix"
            " daemon, which checks the signatures."
        ),
    ] = False
    allow_without_tls: Annotated[
        bool,
        Meta(
            description="Accept pushes over plain HTTP on TCP, where others on the network can read the tokens and use"
            " them. For a proxy on this machine that does TLS, a unix socket is better."
        ),
    ] = False
    client_certificates: Annotated[
        tuple[str, ...],
        Meta(
            description="Common names of client certificates that may push without a token. Needs `tls_client_ca_path`."
        ),
    ] = ()
    max_nar_size: Annotated[Size, Meta(description="Maximum size of a pushed NAR, as sent and unpacked.")] = "16G"
    spool_size: Annotated[
        Size,
        Meta(
            description="Maximum size of all NARs that wait for their narinfo, in `cache_dir`. Nix 2.35 and newer send"
            " all NARs of a closure first."
        ),
    ] = "32G"
    keep: Annotated[
        Days,
        Meta(ge=60, description="Seconds after the last push or download for which a pushed path is a GC root."),
    ] = 30 * 86400
    state_dir: Annotated[
        str | None,
        Meta(
            extra={"default": "`$STATE_DIRECTORY`, `$XDG_STATE_HOME/harmonia` or `~/.local/state/harmonia`"},
            description="Directory of the GC roots and build logs of pushed paths.",
        ),
    ] = None
    sign_key_path: Annotated[
        File | None,
        Meta(
            description="File with a secret key that the Nix daemon trusts. It signs unsigned paths of pushers whose"
            " token has the scope `sign`: they can then push anything. With `sign:PATTERN`, it signs only paths whose"
            " name matches."
        ),
    ] = None
    sign_names: Annotated[
        tuple[str, ...],
        Meta(
            description='Patterns like "hello-*": sign only paths whose name matches one of them, whatever the token'
            " allows. Default: all."
        ),
    ] = ()

    def __post_init__(self) -> None:
        for key in ("max_nar_size", "spool_size"):
            check_values(value_types.check_size, [getattr(self, key)], "push", key)
        if amounts.size(self.max_nar_size) > amounts.size(self.spool_size):
            raise WrongSettingError("more than spool_size; lower it, or raise spool_size", "push", "max_nar_size")
        check_values(name_patterns.check_pattern, self.sign_names, "push", "sign_names")
        for key in ("state_dir", "sign_key_path"):
            check_values(value_types.check_path, [getattr(self, key)], "push", key)

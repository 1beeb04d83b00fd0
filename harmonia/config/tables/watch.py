"""`[watch]`: uploads by `harmonia watch`."""

from typing import Annotated

import msgspec
from msgspec import Meta

from harmonia.config import name_patterns, value_types
from harmonia.config.value_types import File, UploadTarget
from harmonia.config.wrong_setting import check_values


class Watch(msgspec.Struct, frozen=True, kw_only=True):
    """Uploads of each path that becomes valid in the store, by `harmonia watch`."""

    url: Annotated[
        UploadTarget | None,
        Meta(
            description="URL of the binary cache to upload to, such as the `/push` of another Harmonia, or `mirror`,"
            " the bucket of `[mirror]`."
        ),
    ] = None
    netrc: Annotated[
        File | None,
        Meta(
            extra={"default": "`$NETRC`, `/etc/nix/netrc` or `~/.netrc`"},
            description="netrc(5) file with user and password for the host of `url`.",
        ),
    ] = None
    jobs: Annotated[int, Meta(ge=1, le=100, description="Number of NARs to upload at a time.")] = 8
    new_paths: Annotated[
        bool,
        Meta(
            description="Upload each path that becomes valid, except derivations. If false, only those of `gc_roots`"
            " and of the post-build hook."
        ),
    ] = True
    allow: Annotated[
        tuple[str, ...],
        Meta(description='Patterns like "hello-*": upload only those new paths and `gc_roots` whose name matches one.'),
    ] = ()
    deny: Annotated[
        tuple[str, ...],
        Meta(description="Patterns: do not upload those new paths and `gc_roots` whose name matches one."),
    ] = ()
    not_signed_by: Annotated[
        tuple[str, ...],
        Meta(
            description="Public keys like `name:base64`: do not upload paths with a stored signature by one of them,"
            " not even as references, because clients get these from another cache."
        ),
    ] = ()
    gc_roots: Annotated[
        tuple[str, ...],
        Meta(
            description="Store paths, symlinks to them, or directories with such symlinks: upload these paths, and each"
            " path that one of them leads to later."
        ),
    ] = ()
    state_dir: Annotated[
        str | None,
        Meta(
            extra={"default": "`$STATE_DIRECTORY`, `$XDG_STATE_HOME/harmonia` or `~/.local/state/harmonia`"},
            description="Directory of the queue and of NARs that are being compressed.",
        ),
    ] = None
    socket: Annotated[
        str | None,
        Meta(
            extra={"default": "`$RUNTIME_DIRECTORY/socket`, if that variable is set"},
            description="Unix socket at which the post-build hook `harmonia-hook` hands over paths.",
        ),
    ] = None
    metrics_file: Annotated[
        str | None,
        Meta(
            extra={"default": "`$RUNTIME_DIRECTORY/metrics.prom`, if that variable is set"},
            description="File with metrics, for the textfile collector of Prometheus' node exporter.",
        ),
    ] = None

    def __post_init__(self) -> None:
        check_values(name_patterns.check_pattern, self.allow, "watch", "allow")
        check_values(name_patterns.check_pattern, self.deny, "watch", "deny")
        check_values(value_types.check_public_key, self.not_signed_by, "watch", "not_signed_by")
        check_values(value_types.check_absolute, self.gc_roots, "watch", "gc_roots")
        for key in ("netrc", "state_dir", "socket", "metrics_file"):
            check_values(value_types.check_path, [getattr(self, key)], "watch", key)

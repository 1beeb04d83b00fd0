"""`[publish]`: publish policy."""

from typing import Annotated

import msgspec
from msgspec import Meta

from harmonia.config import name_patterns, value_types
from harmonia.config.wrong_setting import check_values
from harmonia.nix.signing import PublicKey


class PublishRules(msgspec.Struct, frozen=True, kw_only=True):
    """Publish policy: the rules for which store paths are served. Without rules, all valid paths are."""

    signed_by: Annotated[
        tuple[str, ...],
        Meta(description="Public keys like `name:base64`: serve only paths with a stored signature by one of them."),
    ] = ()
    allow: Annotated[
        tuple[str, ...], Meta(description='Patterns like "hello-*": serve only paths whose name matches one of them.')
    ] = ()
    deny: Annotated[
        tuple[str, ...], Meta(description="Patterns: do not serve paths whose name matches one of them.")
    ] = ()
    gc_roots: Annotated[
        tuple[str, ...],
        Meta(
            description="Store paths, symlinks to them, or directories with such symlinks: serve only these paths and"
            " their closures."
        ),
    ] = ()

    def __post_init__(self) -> None:
        check_values(value_types.check_public_key, self.signed_by, "publish", "signed_by")
        check_values(name_patterns.check_pattern, self.allow, "publish", "allow")
        check_values(name_patterns.check_pattern, self.deny, "publish", "deny")
        check_values(value_types.check_absolute, self.gc_roots, "publish", "gc_roots")

    @property
    def public_keys(self) -> tuple[PublicKey, ...]:
        """Return the keys in `signed_by`."""
        return tuple(map(PublicKey.parse, self.signed_by))

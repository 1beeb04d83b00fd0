"""`[lan]`: siblings."""

from typing import Annotated

import msgspec
from msgspec import Meta

from harmonia.config import value_types
from harmonia.config.wrong_setting import check_values


class Lan(msgspec.Struct, frozen=True, kw_only=True):
    """Siblings: binary caches in the local network, which announce themselves by multicast DNS (UDP port 5353)."""

    announce: Annotated[
        bool,
        Meta(
            description="Announce this server in the local network as `_nix_binary_cache._tcp`. Needs the Python"
            " package zeroconf (`harmonia[lan]`)."
        ),
    ] = False
    public_keys: Annotated[
        tuple[str, ...],
        Meta(
            description="Public keys like `name:base64`. With at least one, servers that announce themselves become"
            " upstreams for paths that one of these keys signed. They learn which paths are asked for. Needs zeroconf,"
            " too."
        ),
    ] = ()
    priority: Annotated[
        int, Meta(ge=0, le=2**31 - 1, description="Priority of the siblings among the upstreams (`upstream.priority`).")
    ] = 60

    def __post_init__(self) -> None:
        check_values(value_types.check_public_key, self.public_keys, "lan", "public_keys")

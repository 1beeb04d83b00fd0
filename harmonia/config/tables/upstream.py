"""`[[upstream]]`: upstream caches."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from harmonia.config import value_types
from harmonia.config.proxy import Proxy
from harmonia.config.value_types import File, Seconds, Size, Url
from harmonia.config.wrong_setting import WrongSettingError, check_values


class Upstream(msgspec.Struct, frozen=True, kw_only=True):
    """An upstream cache, which is asked for paths that are not in the store."""

    url: Annotated[Url, Meta(description="URL of the upstream, as in the setting `substituters` of Nix.")]
    public_keys: Annotated[
        tuple[str, ...],
        Meta(
            description="Public keys like `name:base64`. Only paths signed by one of them are passed on; with `[]`, all"
            " paths."
        ),
    ] = ()
    mode: Annotated[
        Literal["proxy", "redirect"],
        Meta(
            description="`proxy` fetches NARs through this server and caches them; `redirect` sends clients to the"
            " upstream."
        ),
    ] = "proxy"
    priority: Annotated[
        int,
        Meta(
            ge=0,
            le=2**31 - 1,
            description="The upstream with the lowest number is asked first, those with equal numbers together.",
        ),
    ] = 50
    sign: Annotated[
        bool,
        Meta(
            description="Also sign its paths with our keys, if one of `public_keys` signed them. Needs `public_keys`."
        ),
    ] = False
    connect_timeout: Annotated[Seconds, Meta(description="Timeout for a connection to the upstream.")] = 2.0
    timeout: Annotated[
        Seconds, Meta(description="Timeout for the first byte of a response, and for each pause between its bytes.")
    ] = 10.0
    proxy: Annotated[
        str | None,
        Meta(
            extra={"default": "from the environment"},
            description="The HTTP proxy for this upstream: `http://host:port` or `http://user:password@host:port`;"
            ' `""` is a direct connection.',
        ),
    ] = None
    fetch_ahead: Annotated[
        Size,
        Meta(
            description="Maximum size of the NARs that are fetched before a client requests them, if the upstream is"
            " also a Harmonia and `mode` is `proxy`; 0 fetches none ahead."
        ),
    ] = "256M"
    netrc: Annotated[
        File | None,
        Meta(description="netrc(5) file with user and password for the upstream's host, parsed as by curl."),
    ] = None
    credentials_file: Annotated[
        File | None, Meta(description="File with `user:password` or `:token` for the upstream, instead of `netrc`.")
    ] = None
    ca_file: Annotated[
        File | None,
        Meta(
            extra={"default": "the system's"},
            description="File with CA certificates in PEM form. The upstream's certificate must chain to one of them.",
        ),
    ] = None


def check_upstreams(upstreams: tuple[Upstream, ...]) -> None:
    """Raise WrongSettingError if a value of one of the tables is wrong, or if two tables have the same URL.

    `Upstream` cannot do that itself, because the error names the number of the table.
    """
    urls = [upstream.url.rstrip("/") for upstream in upstreams]
    for number, upstream in enumerate(upstreams):
        table = ("upstream", str(number))
        for key in ("netrc", "credentials_file", "ca_file"):
            check_values(value_types.check_path, [getattr(upstream, key)], *table, key)
        check_values(value_types.check_public_key, upstream.public_keys, *table, "public_keys")
        check_values(Proxy.parse, [upstream.proxy or None], *table, "proxy")
        check_values(value_types.check_size, [upstream.fetch_ahead], *table, "fetch_ahead")
        if upstream.sign and not upstream.public_keys:
            what = "set without public_keys; only paths that they signed are signed again, so set them or remove this"
            raise WrongSettingError(what, *table, "sign")
        if upstream.netrc is not None and upstream.credentials_file is not None:
            raise WrongSettingError("set together with netrc; keep one of them", *table, "credentials_file")
        if urls.index(urls[number]) != number:
            raise WrongSettingError("given twice; keep one of them", *table, "url")

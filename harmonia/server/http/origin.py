"""The URL under which clients know this cache: for pages, from which people copy it."""

from sanic import Request

from harmonia.config.settings import Settings
from harmonia.config.value_types import BASE_URL
from harmonia.server.http import access_log, sanic_adapter


def base_url(request: Request, settings: Settings) -> str:
    """Without a final slash: as it is set, else as a trusted proxy tells, else as the client does in `Host`.

    What is no URL then is not repeated, but the address that the connection came to told instead.
    """
    connection = sanic_adapter.connection_of(request)
    scheme = "https" if connection and connection.ssl else "http"
    host = request.headers.get("host", "")
    candidates = [settings.base_url, _url(scheme, host), _url(scheme, connection.server if connection else "")]
    if access_log.from_proxy(request, settings.trusted_proxies):
        proto = _last(request, "x-forwarded-proto") or scheme
        prefix = _last(request, "x-forwarded-prefix").strip("/")
        candidates.insert(1, _url(proto, _last(request, "x-forwarded-host") or host, prefix))
    known = next((url for url in candidates if url and BASE_URL.match(url)), f"{scheme}://localhost")
    return known.rstrip("/")


def _url(scheme: str, host: str, path: str = "") -> str | None:
    return None if "/" in host else f"{scheme}://{host}/{path}"


def _last(request: Request, header: str) -> str:
    """What the nearest proxy told: others before it may have been told by anybody."""
    return ",".join(request.headers.getall(header, [])).rpartition(",")[2].strip()

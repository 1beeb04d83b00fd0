"""Base URL of this cache as clients see it, for pages where people copy it."""

from sanic import Request

from harmonia.config.settings import Settings
from harmonia.config.value_types import BASE_URL
from harmonia.server.http import access_log, sanic_adapter


def base_url(request: Request, settings: Settings) -> str:
    """Return the base URL without a final slash.

    The setting `base_url` comes first, then the X-Forwarded fields of a trusted proxy, then Host. An invalid URL is
    skipped; the last resort is the server address of the connection.
    """
    connection = sanic_adapter.connection_of(request)
    scheme = "https" if connection and connection.ssl else "http"
    host = request.headers.get("host", "")
    candidates = [settings.base_url, _url(scheme, host), _url(scheme, connection.server if connection else "")]
    if access_log.from_proxy(request, settings.trusted_proxies):
        proto = _last(request, "x-forwarded-proto") or scheme
        prefix = _last(request, "x-forwarded-prefix").strip("/")
        candidates.insert(1, _url(proto, _last(request, "x-forwarded-host") or host, prefix))
    valid = next((url for url in candidates if url and BASE_URL.match(url)), f"{scheme}://localhost")
    return valid.rstrip("/")


def _url(scheme: str, host: str, path: str = "") -> str | None:
    return None if "/" in host else f"{scheme}://{host}/{path}"


def _last(request: Request, header: str) -> str:
    """Return the last element of a field: the nearest proxy added it. Earlier ones can be forged by clients."""
    return sanic_adapter.field_value(request, header).rpartition(",")[2].strip()

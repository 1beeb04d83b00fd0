"""Who gets in: tokens, which Nix sends from its netrc-file as Basic, other programs as Bearer.

Without one, or with a wrong one, every resource answers 401, whether there is anything or not, and `/nix-cache-info`,
too: from Nix 2.26 on that ends with a clear word, and up to 2.25 with "does not appear to be a binary cache"
(Nix `src/libstore/http-binary-cache-store.cc`). What a right token is not good for is 403.

`/health` and `/version` stay open. Who asks them, as a load balancer, has no token, and they tell nothing of the store.
"""

import base64
import logging
import math
from dataclasses import replace
from functools import wraps
from typing import Protocol

from sanic import Request
from sanic.exceptions import MethodNotAllowed, NotFound, SanicException

from harmonia.config import credentials
from harmonia.config.settings import Settings
from harmonia.config.tokens import Scope, Tokens
from harmonia.server.http import access_log
from harmonia.server.http.rate_limit import Rate
from harmonia.server.http.response import Handler, Representation
from harmonia.server.http.response_cache import AbsentError

# RFC 9110 section 11.6.1 allows for both in one line. A browser asks people for a name and a password, the token.
_CHALLENGE = 'Basic realm="Nix binary cache", charset="UTF-8", Bearer realm="Nix binary cache"'

_log = logging.getLogger("harmonia")


class _Context(Protocol):
    @property
    def settings(self) -> Settings: ...

    @property
    def query_rate(self) -> Rate | None: ...

    def client(self, request: Request) -> str: ...


class Guard:
    """Looks at the tokens that requests bring."""

    def __init__(self, settings: Settings) -> None:
        """ConfigError, also later from `read`."""
        self._settings = settings
        self._failures = Rate(settings.max_failed_auth_rate) if settings.max_failed_auth_rate else None
        self._warnings = Rate(1)
        self.read()

    def read(self) -> None:
        """Read the file with the tokens again, in any thread. A broken one leaves those of before in place."""
        self._tokens = Tokens(credentials.load_tokens(self._settings))

    def guarded(self, handler: Handler, scope: Scope) -> Handler:
        """The same resource, for those who have a token for it; without another step where that takes none."""
        if scope in self._settings.anonymous_scopes:
            return handler

        @wraps(handler)
        async def get(context: object, request: Request, **parameters: str) -> Representation:
            self.admit(request, scope)
            try:
                representation = await handler(context, request, **parameters)
            except AbsentError:
                raise NotFound from None
            # What is public may be kept by a cache on the way, and told to others (RFC 9111 section 3.5).
            private = representation.cache_control.replace("public", "private")
            # Nor is anything said again without a look at the token.
            return replace(representation, cache_control=private, still_valid=None)

        return get

    def admit(self, request: Request, scope: Scope) -> None:
        """Raises the answer to a request that does not get in."""
        token = self._tokens.find_token(secret) if (secret := presented(request)) else None
        if token is not None:
            if scope not in token.scopes:
                raise SanicException(status_code=403)
            return
        if secret:
            self._count(request)
        raise SanicException(status_code=401, headers={"WWW-Authenticate": _CHALLENGE})

    def instead(self, request: Request, error: Exception) -> Exception:
        """The answer in the place of 404 and 405, which are for those who got in."""
        if isinstance(error, NotFound | MethodNotAllowed) and "read" not in self._settings.anonymous_scopes:
            try:
                self.admit(request, "read")
            except SanicException as refused:
                return refused
        return error

    def _count(self, request: Request) -> None:
        """Count a wrong token. Right ones are let in from everywhere at any rate: nobody finds one by trying, and those
        who share an address with somebody who tries must not suffer for it.
        """
        if self._failures is None:
            return
        client = access_log.client(request, self._settings.trusted_proxies)
        if wait := self._failures.wait(client):
            if not self._warnings.wait(client):
                _log.warning("%s sends many wrong tokens, and is told to wait", client)
            raise too_many(wait)


def hold_to_rate(context: _Context, request: Request) -> None:
    """Raise 429 if the client asks more often than `max_query_rate` allows."""
    if context.query_rate is not None and (wait := context.query_rate.wait(context.client(request))):
        raise too_many(wait)


def limited(handler: Handler) -> Handler:
    """The same resource, for each client at the rate of `max_query_rate`."""

    @wraps(handler)
    async def get(context: _Context, request: Request, **parameters: str) -> Representation:
        hold_to_rate(context, request)
        return await handler(context, request, **parameters)

    return get


def too_many(wait: float) -> SanicException:
    return SanicException(status_code=429, headers={"Retry-After": str(math.ceil(wait))})


def presented(request: Request) -> str:
    """The token of a request, empty where it has none."""
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    credentials = credentials.strip()
    if scheme.lower() == "bearer":
        return credentials
    if scheme.lower() != "basic":
        return ""
    try:
        user_and_password = base64.b64decode(credentials, validate=True)
    except ValueError:
        return ""
    # The user is for the client's convenience: it is the token that says who it is.
    return user_and_password.partition(b":")[2].decode(errors="surrogateescape")

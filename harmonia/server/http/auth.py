"""Access control by tokens: Nix sends a token from its netrc-file as Basic, other programs send it as Bearer.

Without a valid token, every resource answers 401, whether it exists or not. That includes `/nix-cache-info`: Nix 2.26
and newer then show a clear error, Nix up to 2.25 shows "does not appear to be a binary cache" (Nix
`src/libstore/http-binary-cache-store.cc`). A valid token without the needed scope gets 403.

`/health` and `/version` need no token, because load balancers have none; `/robots.txt` and `/favicon.ico` because
crawlers and browsers do not send one. They show nothing of the store.
"""

import base64
import logging
import math
import time
import weakref
from collections.abc import Container
from dataclasses import replace
from functools import partial, wraps
from typing import Protocol

from sanic import Request
from sanic.exceptions import MethodNotAllowed, NotFound, SanicException

from harmonia.config import credentials
from harmonia.config.settings import Settings
from harmonia.config.tokens import SCOPES, Scope, Token, Tokens
from harmonia.metrics.shared_counters import TokenUses
from harmonia.process import request_trace
from harmonia.server.http import access_log, sanic_adapter
from harmonia.server.http.rate_limit import Rate
from harmonia.server.http.response import Handler, Representation

# RFC 9110 section 11.6.1 allows both in one line. A browser asks for a user name and a password: the token.
_CHALLENGE = 'Basic realm="Nix binary cache", charset="UTF-8", Bearer realm="Nix binary cache"'

_log = logging.getLogger("harmonia")


class _Context(Protocol):
    @property
    def settings(self) -> Settings: ...

    @property
    def query_rate(self) -> Rate | None: ...

    @property
    def bulk_rate(self) -> Rate | None: ...

    def client(self, request: Request) -> str: ...


class Guard:
    """Checks the tokens of requests."""

    def __init__(self, settings: Settings, uses: TokenUses) -> None:
        """Load the tokens. Raises ConfigError if the file is invalid."""
        self._settings = settings
        self._uses = uses
        self._anonymous_scopes: set[Scope] = set(settings.anonymous_scopes)
        if settings.tokens_path is None:
            self._anonymous_scopes.update(SCOPES)
            self._anonymous_scopes -= {"push", "sign"}
        self._certificates = frozenset(settings.push.client_certificates)
        self._failures = Rate(settings.max_failed_auth_rate) if settings.max_failed_auth_rate else None
        self._warnings = Rate(1)
        self.loaded: tuple[Token, ...] = ()
        """The tokens of the file, also those that have expired."""
        self.load_tokens()

    def load_tokens(self) -> None:
        """Load or reload the tokens, in any thread. If the file is invalid, raises ConfigError and keeps old tokens."""
        loaded = credentials.load_tokens(self._settings)
        self._tokens, self.loaded = Tokens(loaded), loaded

    def guarded(self, handler: Handler, scope: Scope) -> Handler:
        """Return a handler that first checks the token, or the same handler if the scope needs no token."""
        if scope in self._anonymous_scopes:
            return handler

        @wraps(handler)
        async def get(context: object, request: Request, **parameters: str) -> Representation:
            self.admit(request, scope)
            representation = await handler(context, request, **parameters)
            # With `public`, a shared cache could serve the response to other clients (RFC 9111 section 3.5).
            private = representation.cache_control.replace("public", "private")
            return replace(representation, cache_control=private)

        return get

    def admit(self, request: Request, scope: Scope) -> None:
        """Raise SanicException unless the request has a valid token with the scope.

        The status is 401 without a valid token, 403 without the scope, 429 after too many invalid tokens. A token that
        has expired is not valid.
        """
        tokens = self._tokens
        token = tokens.find_token(secret) if (secret := presented(request)) else None
        now = time.time()
        if token is not None and now >= token.expires_at:
            if not self._warnings.wait(f"token {token.name}"):
                why = f"token {token.name} expired at {token.end}"
                client = access_log.client(request, self._settings.trusted_proxies)
                _log.warning("refused %s: %s; replace it, or remove its line", client, why)
            token = None
        # Weak, because this is remembered with the response: old tokens may take megabytes.
        request.ctx.readmit = partial(self._readmit, token, weakref.ref(tokens))
        if token is not None:
            self._uses.record(token.number, now)
            request.ctx.token = token
            if scope not in token.scopes:
                request_trace.log.debug("the token %s lacks the scope %s", token.name, scope)
                raise SanicException(status_code=403)
            request_trace.log.debug("the token %s has the scope %s", token.name, scope)
            return
        if scope == "push" and sanic_adapter.certificate_name(request) in self._certificates:
            request_trace.log.debug("the client certificate may push")
            return
        request_trace.log.debug("%s, but the scope %s needs one", "invalid token" if secret else "no token", scope)
        if secret:
            self._count(request)
        raise SanicException(status_code=401, headers={"WWW-Authenticate": _CHALLENGE})

    def _readmit(self, token: Token | None, tokens: "weakref.ref[Tokens]") -> bool:
        """Return True if a request with the same head as one that presented a token is admitted. Count that use.

        A client that was admitted by its certificate is not: another one can send the same head.
        """
        if token is None or self._tokens is not tokens() or (now := time.time()) >= token.expires_at:
            return False
        self._uses.record(token.number, now)
        return True

    def scopes(self, request: Request) -> Container[Scope]:
        """Return the scopes of a request: those without a token, and those of its token if that is valid.

        Does not count invalid tokens: only for links and facts on a page that was admitted, or that needs no token.
        """
        token = self._tokens.find_token(secret) if (secret := presented(request)) else None
        if token is None or time.time() >= token.expires_at:
            return self._anonymous_scopes
        return self._anonymous_scopes | token.scopes

    def error_to_send(self, request: Request, error: Exception) -> Exception:
        """Return `error`, or 401, 403 or 429 in place of 404 or 405 if the request may not read."""
        if isinstance(error, NotFound | MethodNotAllowed) and "read" not in self._anonymous_scopes:
            try:
                self.admit(request, "read")
            except SanicException as refused:
                return refused
        return error

    def _count(self, request: Request) -> None:
        """Count an invalid token of a client. Raises SanicException 429 if it exceeds `max_failed_auth_rate`.

        Valid tokens are not limited: tokens cannot be guessed, and clients that share an address with an attacker must
        not be locked out.
        """
        if self._failures is None:
            return
        client = access_log.client(request, self._settings.trusted_proxies)
        if wait := self._failures.wait(client):
            if not self._warnings.wait(client):
                _log.warning("too many invalid tokens from %s: answered with 429; check that client's netrc", client)
            raise too_many(wait)


def check_rate(context: _Context, request: Request) -> None:
    """Raise SanicException 429 if the client exceeds `max_query_rate`. Otherwise, count the request."""
    if context.query_rate is not None and (wait := context.query_rate.wait(context.client(request))):
        raise too_many(wait)


def check_bulk_rate(context: _Context, request: Request, paths: int) -> None:
    """Raise SanicException 429 if the client exceeds `max_bulk_rate`. Otherwise, count the paths of a request."""
    if context.bulk_rate is not None and (wait := context.bulk_rate.wait(context.client(request), paths)):
        raise too_many(wait)


def limited(handler: Handler) -> Handler:
    """Return a handler that first calls `check_rate`."""

    @wraps(handler)
    async def get(context: _Context, request: Request, **parameters: str) -> Representation:
        check_rate(context, request)
        return await handler(context, request, **parameters)

    return get


def too_many(wait: float) -> SanicException:
    """Return the error 429 with Retry-After, for a client that must wait so many seconds."""
    request_trace.log.debug("a rate limit applies: may come again in %.0f s", wait)
    return SanicException(status_code=429, headers={"Retry-After": str(math.ceil(wait))})


def presented(request: Request) -> str:
    """Return the token in Authorization, or "" if there is none or the field is malformed."""
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
    # Any user name is accepted: only the token identifies the client.
    return user_and_password.partition(b":")[2].decode(errors="surrogateescape")

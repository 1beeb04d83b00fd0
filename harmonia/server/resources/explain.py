"""`/explain/<hash>`: why this server serves a path or does not. Only if `browse` is set.

A page for browsers, text for other clients, and JSON with `?json`.

Paths that the publish policy forbids look like missing ones, and upstreams are not shown, unless the server has tokens
and has checked one: `browse` may be public.
"""

import json
from collections.abc import Sequence
from dataclasses import replace

from sanic import Request
from sanic.exceptions import NotFound

from harmonia.server import page
from harmonia.server.context import ServerContext
from harmonia.server.http.negotiation import prefers_html
from harmonia.server.http.response import Representation
from harmonia.server.http.sanic_adapter import field_value
from harmonia.store.explain import Code, Explainer, Reason, decisive
from harmonia.store.store import Store


async def get(context: ServerContext, request: Request, hash_part: str) -> Representation:
    if not context.settings.browse:
        raise NotFound
    is_trusted = hasattr(request.ctx, "token")
    reasons = await _reasons(context, hash_part, is_trusted=is_trusted)
    cause = decisive(reasons)
    shows_upstreams = is_trusted or context.settings.tokens_path is None  # like /health?verbose
    if cause is not None and context.upstreams is not None and shows_upstreams:
        reasons += await context.upstreams.explain(request, hash_part)
    from_upstream = next((reason for reason in reasons if reason.code == Code.UPSTREAM_HAS), None)
    available = cause is None or from_upstream is not None
    main = from_upstream or cause
    summary = main.text if main else "this server has the path"
    if "json" in request.get_args(keep_blank_values=True):
        rows = [reason._asdict() for reason in reasons]
        value = {"hash": hash_part, "available": available, "summary": summary, "reasons": rows}
        content_type, text = "application/json", json.dumps(value, ensure_ascii=False, indent=2)
    elif prefers_html(field_value(request, "accept")):
        return _page(context, request, hash_part, summary, reasons, available=available)
    else:
        lines = [f"{'yes' if available else 'no'}: {summary}", "", *map(_line, reasons)]
        content_type, text = "text/plain; charset=utf-8", "\n".join(lines)
    return Representation(content_type=content_type, body=f"{text}\n".encode(), cache_control="no-store")


async def _reasons(context: ServerContext, hash_part: str, *, is_trusted: bool) -> list[Reason]:
    policy = context.paths.policy
    if policy is not None and not is_trusted and not await context.paths.lookup_path(hash_part):
        return [Reason(Code.NOT_VALID, f"this server serves no path with the hash {hash_part}", decides=True)]
    keys = [key.public_key for key in context.keys]

    def explain(store: Store) -> list[Reason]:
        explainer = Explainer(store, policy, keys, context.settings.logs)
        return list(explainer.explain(hash_part, closure=policy is None or is_trusted))

    return await context.threads.run_slow_db(explain)


def _page(
    context: ServerContext,
    request: Request,
    hash_part: str,
    summary: str,
    reasons: Sequence[Reason],
    *,
    available: bool,
) -> Representation:
    verdict = "Available" if available else "Not available"
    document = page.begin(context, request, verdict, "../")
    with document.main:
        document.h1(verdict)
        document.p(f"{summary[:1].upper()}{summary[1:]}.", class_="lead")
        with document.section:
            document.h2("Reasons")
            with document.ul(class_="reasons"):
                for reason in reasons:
                    document.li(reason.text)
                    if reason.remedy:
                        document.p(f"Remedy: {reason.remedy}", class_="dim")
        with document.nav(class_="actions", aria_label="Other pages"):
            if any(reason.code == Code.VALID for reason in reasons):
                document.a("Path", href=f"../path/{hash_part}")
            document.a("JSON", href="?json")
    made = page.end(context, document)
    return replace(made, cache_control="no-store", etag=None, zstd=None)  # like the text


def _line(reason: Reason) -> str:
    return f"- {reason.text}" + (f"; {reason.remedy}" if reason.remedy else "")

"""`/`: what this cache is and how to use it, for people."""

from html5tagger import Document
from sanic import Request

from harmonia.server.body import Representation
from harmonia.server.cache import Cache


async def get(cache: Cache, request: Request) -> Representation:
    url = f"{request.scheme}://{request.host}"
    keys = " ".join(str(key.public_key) for key in cache.keys)
    page = Document("Nix binary cache", lang="en")
    page.h1("Nix binary cache")
    page.p("This is ").a("Harmonia", href="https://github.com/nix-community/harmonia")
    conf = f"extra-substituters = {url}\n"
    if keys:
        conf += f"extra-trusted-public-keys = {keys}\n"
    page.p("To download from it what it has instead of building that, add to nix.conf:").pre(conf)
    return Representation(content_type="text/html; charset=utf-8", body=str(page).encode(), cache_control="no-cache")

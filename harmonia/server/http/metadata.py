"""Representations of small metadata, such as narinfos: cacheable for a while, then revalidated by ETag."""

import hashlib

from harmonia.server.http.response import Representation


def representation(content_type: str, text: bytes, max_age: int) -> Representation:
    """Return a representation that caches may keep for `max_age` seconds. Its ETag is a hash of the text."""
    return Representation(
        content_type=content_type,
        body=text,
        cache_control=f"public, max-age={max_age}",
        etag=f'"{hashlib.blake2b(text, digest_size=15).hexdigest()}"',
    )

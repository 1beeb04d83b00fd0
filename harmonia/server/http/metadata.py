"""What is told of a path in few bytes: clients keep it for a while, and then ask by its ETag whether it is still so."""

import hashlib

from harmonia.server.http.response import Representation


def representation(content_type: str, text: bytes, max_age: int) -> Representation:
    """To be kept for `max_age` seconds."""
    return Representation(
        content_type=content_type,
        body=text,
        cache_control=f"public, max-age={max_age}",
        etag=f'"{hashlib.blake2b(text, digest_size=15).hexdigest()}"',
    )

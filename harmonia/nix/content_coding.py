"""Decoders of HTTP bodies with a Content-Encoding, in bounded memory (RFC 9110 section 8.4)."""

from collections.abc import Iterable, Iterator

from harmonia.errors import FormatError
from harmonia.nix.decompress import COMPRESSIONS, DEFLATE, Decompressor, decompressor
from harmonia.untrusted import excerpt

MAX_CODINGS = 5
"""Maximum number of content codings of an HTTP body, as in curl."""

_MAX_PIECES = 1 << 12
"""Maximum number of pieces of a small body in each decoding step, including empty pieces. Each stream makes one."""

_COMPRESSIONS = {name: name for name in (COMPRESSIONS | {DEFLATE}) - {"none"}} | {
    f"x-{name}": name for name in ("gzip", "bzip2", "xz")
}
"""The compression of each content coding."""


class SizeError(FormatError):
    """A decoded body is longer than allowed, or has too many pieces."""


class Decoder:
    """The decompressor of a body with several content codings. `steps` are in the order of decoding."""

    def __init__(self, steps: list[Decompressor]) -> None:
        self._steps = steps
        self._empty = True

    @property
    def whole(self) -> bool:
        # Servers send an empty body without encoding it, whatever their Content-Encoding says.
        return self._empty or all(step.whole for step in self._steps)

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._empty = self._empty and not data
        pieces: Iterable[bytes] = [data]
        for step in self._steps:
            pieces = _fed(step, pieces)
        yield from pieces

    def decode(self, body: bytes, most: int) -> bytes:
        """Return a complete body, decoded.

        Raises SizeError if any step outputs more than `most` bytes, or too many pieces.
        Raises FormatError if the body is malformed or cut short.
        """
        for step in self._steps if body else []:
            body = _joined(step.feed(body), most)
            if not step.whole:
                raise FormatError("it is cut short")
        return body


def _joined(pieces: Iterable[bytes], most: int) -> bytes:
    body = bytearray()
    for count, piece in enumerate(pieces, 1):
        body += piece
        if len(body) > most:
            raise SizeError(f"it is longer than {most} bytes")
        if count > _MAX_PIECES:
            raise SizeError(f"it has more than {_MAX_PIECES} pieces")
    return bytes(body)


def _fed(step: Decompressor, pieces: Iterable[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        yield from step.feed(piece)


def decoder(codings: Iterable[str]) -> Decoder | None:
    """Return a decompressor for an HTTP body with these content codings, or None if the body is not encoded.

    Raises FormatError if a coding is unknown, or if there are more than MAX_CODINGS.
    """
    names = [name for name in map(str.lower, codings) if name not in {"", "identity", "none"}]
    if len(names) > MAX_CODINGS:
        raise FormatError(f"its Content-Encoding has {len(names)} codings, more than the maximum of {MAX_CODINGS}")
    steps: list[Decompressor] = []
    for name in reversed(names):
        if name not in _COMPRESSIONS:
            raise FormatError(f"its Content-Encoding {excerpt(name)} is unknown")
        steps.append(decompressor(_COMPRESSIONS[name]))
    return Decoder(steps) if steps else None

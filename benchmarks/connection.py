"""HTTP client that detects truncated responses."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

import zstandard

_PATIENCE_S = 60.0  # timeout without a byte


class BrokenError(Exception):
    """A response ended early."""


class WrongError(Exception):
    """A response is wrong. This must never happen."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]

    async def read(self) -> bytes:
        return b"".join([part async for part in self.body])


class Connection:
    """Keep-alive connection of a client. Reopened after it was closed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.used = self._asked = time.monotonic()
        """Time of the previous request. The server may have closed the connection since then."""

    async def get(self, path: str, headers: str = "") -> Answer:
        """Send a request. Raises BrokenError if there is no response, or if the server had closed the connection."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                self.used, self._asked = self._asked, time.monotonic()
                if self._streams is None:
                    self.used = self._asked
                    self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 18)
                reader, writer = self._streams
                writer.write(f"GET {path} HTTP/1.1\r\nHost: cache\r\n{headers}\r\n".encode())
                status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
        except TimeoutError:
            raise WrongError(f"{path}: no answer") from None
        except (OSError, asyncio.IncompleteReadError) as error:
            self.leave()
            raise BrokenError from error
        fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
        return Answer(int(status.split()[1]), fields, self._body(reader, fields, path))

    async def _body(self, reader: asyncio.StreamReader, headers: Mapping[str, str], path: str) -> AsyncIterator[bytes]:
        chunked = headers.get("transfer-encoding") == "chunked"
        left = 0 if chunked else int(headers["content-length"])
        try:
            while True:
                async with asyncio.timeout(_PATIENCE_S):
                    if chunked and not left and not (left := int(await reader.readline(), 16)):
                        await reader.readexactly(2)
                    if not left:
                        break
                    if not (part := await reader.read(min(left, 1 << 16))):
                        raise BrokenError
                    left -= len(part)
                    if chunked and not left:
                        await reader.readexactly(2)
                yield part
        except TimeoutError:
            raise WrongError(f"{path}: it does not go on") from None
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            self.leave()
            raise BrokenError from error
        except BrokenError:
            self.leave()
            raise

    def leave(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


def unpacking(take: Callable[[bytes], object]) -> Callable[[bytes], None]:
    """Return a function that decompresses zstd frames given in parts, and passes the content on."""
    frame = zstandard.ZstdDecompressor().decompressobj()

    def unpack(data: bytes) -> None:
        nonlocal frame
        while data:
            take(frame.decompress(data))
            data = frame.unused_data
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()

    return unpack

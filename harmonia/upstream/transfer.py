"""Transfer of one NAR from an upstream into the cache: download, resume after interruptions, verify, commit."""

import asyncio
import errno
import logging
import os
from collections.abc import Iterator, Mapping
from http import HTTPStatus

from harmonia.cache.growing_file import Filler
from harmonia.errors import FormatError, UpstreamError
from harmonia.process.threads import Threads
from harmonia.upstream import nar_verifier
from harmonia.upstream.answer import Answer
from harmonia.upstream.header_fields import accepts_ranges
from harmonia.upstream.refusals import Reason, UpstreamMismatchError
from harmonia.upstream.remote_path import RemotePath
from harmonia.upstream.transport import WHOLE

_PIECE_BYTES = 256 * 1024  # per read
_MAX_RESUMES = 5  # in a row without progress
_RESUME_DELAY_S = 0.1  # before the first resume; the delay doubles with each resume without progress

_log = logging.getLogger("harmonia")


class Transfer:
    """Download of one NAR, which several clients may read while it grows."""

    def __init__(
        self,
        path: RemotePath,
        headers: Mapping[str, str],
        filler: Filler,
        limit: int,
        threads: Threads,
    ) -> None:
        self.size = path.file_size
        """Bytes of the file, or None until that is known."""
        self.error: UpstreamError | None = None
        """Cause of the failure, if the transfer failed."""
        self.started = asyncio.Event()
        """Set when the head of the upstream's response has arrived, or when the request has failed."""
        self.path = path
        self.paths = {path.info.path: path}
        """All paths with this NAR for which clients have requested it."""
        self._headers = headers
        self._filler = filler
        self._limit = limit
        self._threads = threads
        self._given_up = False

    @property
    def received(self) -> int:
        """Return the bytes of the file so far."""
        return self._filler.size

    async def run(self) -> None:
        write = self._threads.write
        try:
            await self._download()
            try:
                await self._check()
            except FormatError as error:
                raise self.path.refuse_nar(error) from None
            await self._threads.sync(self._filler.commit)
        except UpstreamError as error:
            self.error = error
            if not isinstance(error, UpstreamMismatchError):
                _log.error("%s: %s", self.path.url, error)
            await write(self._filler.withdraw)
        except OSError:  # logged by the cache, unless the file is larger than the cache's limit
            await write(self._filler.abandon)
        except BaseException:
            self._filler.abandon()
            raise
        finally:
            self.started.set()

    async def _check(self) -> None:
        """Raise FormatError if the file is not the NAR.

        If the FileHash matches, clients that read the file while it grows get its end before it is unpacked.
        """
        info, nar, filler = self.path.info, self.path.nar, self._filler
        file_hash_matches = nar_verifier.has_file_hash(info, nar, filler.sha256)
        if file_hash_matches:
            await self._threads.write(filler.finish)
        if nar.compression != "none" or not file_hash_matches:
            await self._threads.with_enough_memory(
                lambda memory: self._threads.unpack(nar_verifier.check_content, info, nar, self._written(), memory)
            )
        if not file_hash_matches:
            await self._threads.write(filler.finish)

    def give_up(self) -> None:
        """Make a thread that verifies the file stop soon. Call it before the task is cancelled."""
        self._given_up = True

    def abandon(self) -> None:
        """Release the file of a transfer that never ran, for another process to write."""
        self._filler.abandon()

    def _written(self) -> Iterator[bytes]:
        position = 0
        while not self._given_up and (data := self._filler.read(position, _PIECE_BYTES)):
            position += len(data)
            yield data

    async def _download(self) -> None:
        self.path.client.counters.add("fetches")
        response: Answer | None
        response = first = await self.path.request_nar(self._headers, WHOLE)
        try:
            self._begin(first.content_length)
        except BaseException:
            first.close()
            raise
        self.started.set()
        # A range of an encoded response would be a range of its encoded bytes.
        resumable = accepts_ranges(first.headers) and not first.is_encoded
        etag = first.headers.get("ETag", "")
        headers = dict(self._headers) | ({"If-Range": etag} if etag.startswith('"') else {})
        failures = 0
        while True:
            before = self._filler.size
            try:
                await self._append_body(response or await self._resume(headers))
            except UpstreamError as error:
                response = None
                failures = 1 if self._filler.size > before else failures + 1
                if not resumable or isinstance(error, UpstreamMismatchError) or failures > _MAX_RESUMES:
                    raise
                await asyncio.sleep(_RESUME_DELAY_S * 2 ** (failures - 1))
            else:
                return

    def _begin(self, length: int | None) -> None:
        """Set the size from Content-Length. Raises UpstreamMismatchError if a plain NAR does not have its NarSize."""
        if self.size is not None and length not in {None, self.size}:
            raise self._wrong(f"Content-Length is {length}, but NarSize is {self.size}")
        self.size = length if length is not None else self.size
        self._measure(self.size or 0)

    async def _resume(self, headers: Mapping[str, str]) -> Answer:
        response = await self.path.request_nar(headers, (self._filler.size, None))
        if response.status != HTTPStatus.PARTIAL_CONTENT:  # the file there has changed
            response.close()
            raise self._wrong("the file changed during the download")
        return response

    async def _append_body(self, response: Answer) -> None:
        async with response:
            while data := await self.path.client.read_answer(response, _PIECE_BYTES):
                size = self._filler.size + len(data)
                if self.size is not None and size > self.size:
                    raise self._wrong("the body is longer than announced")
                self._measure(size)
                await self._threads.write(self._filler.append, data)
                self.path.client.counters.add("fetched_bytes", len(data))
        if self.size is not None and self._filler.size < self.size:
            raise UpstreamError("the response ended early")

    def _measure(self, size: int) -> None:
        if size > self._limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    def _wrong(self, why: str) -> UpstreamMismatchError:
        return self.path.client.refusals.refuse(self.path.url, Reason.WRONG_NAR, why)

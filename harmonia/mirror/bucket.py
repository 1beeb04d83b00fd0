"""A bucket of an S3 service, through obstore. Only `connection.py` imports this module: obstore is optional.

Keys are relative to the mirror's prefix. They are prefixed here, because obstore 0.9 ignores a prefix when it signs.
"""

import re
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import NamedTuple

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from harmonia.config.tables.mirror import Mirror
from harmonia.upload.target import TargetError, TargetRefusedError, TargetUnavailableError

_PART_BYTES = 8 << 20  # in memory at once: _PARTS_AT_ONCE of them for each upload
_CHUNK_BYTES = 1 << 20  # of an object that is read
_PARTS_AT_ONCE = 2
_MAX_PARTS = 10_000  # of one object, in all S3 services
_RETRIES_MAX = 10

_CODE = re.compile(r"<Code>([A-Za-z]+)</Code>")
_STATUS = re.compile(r"status code: (\d{3})")
_NO_REGION = re.compile("redirect without LOCATION")
_NO_S3 = re.compile("invalid [A-Za-z ]*response|metadata from headers")
_REGION = "set mirror.region to that of the bucket"
_REMEDIES = {
    "RequestTimeTooSkewed": "set this machine's clock",
    "SignatureDoesNotMatch": "check the secret in mirror.credentials_file",
    "InvalidAccessKeyId": "check the access key in mirror.credentials_file",
    "AuthorizationHeaderMalformed": _REGION,
    "NoSuchBucket": "create the bucket, or check mirror.bucket",
    "QuotaExceeded": "the bucket is full: raise its quota, or run harmonia mirror gc",
}
_REMEDY_BY_STATUS = {
    "403": "give the access key permission to get, put, list and delete objects",
    "507": "the service's disk is full",
}


class Object(NamedTuple):
    """An object of the bucket, as it is listed."""

    key: str
    size: int
    """In bytes."""
    modified: datetime


class Bucket:
    """The objects below the mirror's prefix. Methods raise TargetRefusedError or TargetUnavailableError.

    Requests that fail for a moment are repeated.
    """

    def __init__(self, settings: Mirror, keys: tuple[str, str] | None, retry: timedelta) -> None:
        """Open a connection pool. `keys` are the access key ID and the secret, or None for anonymous requests.

        `retry` is the time for which a request is repeated.
        """
        self.url = settings.url
        self._prefix = settings.prefix and f"{settings.prefix}/"
        access = {"skip_signature": True} if keys is None else {"access_key_id": keys[0], "secret_access_key": keys[1]}
        self._store = S3Store(
            settings.bucket,
            endpoint=settings.endpoint,
            region=settings.region,
            client_options={
                "allow_http": str(settings.endpoint).startswith("http:"),
                "timeout": timedelta(seconds=60),
                "connect_timeout": timedelta(seconds=5),
            },
            retry_config={"max_retries": _RETRIES_MAX, "retry_timeout": retry},
            **access,
        )

    async def size(self, key: str) -> int | None:
        """Return the length of an object in bytes, or None if it does not exist."""
        with self._errors(key):
            try:
                return (await obstore.head_async(self._store, self._prefix + key))["size"]
            except FileNotFoundError:
                return None

    async def get(self, key: str) -> bytes | None:
        """Return the content of a small object, or None if it does not exist."""
        with self._errors(key):
            try:
                answer = await obstore.get_async(self._store, self._prefix + key)
                return bytes(await answer.bytes_async())
            except FileNotFoundError:
                return None

    async def chunks(self, key: str) -> AsyncIterator[bytes]:
        """Yield the content of an object. Yields nothing if it does not exist."""
        with self._errors(key):
            try:
                answer = await obstore.get_async(self._store, self._prefix + key)
            except FileNotFoundError:
                return
            async for chunk in answer.stream(min_chunk_size=_CHUNK_BYTES):
                yield bytes(chunk)

    async def create(self, key: str, content: bytes, content_type: str) -> bool:
        """Write a small object unless it exists. Return True if it was written."""
        with self._errors(key):
            try:
                await obstore.put_async(
                    self._store,
                    self._prefix + key,
                    content,
                    mode="create",
                    use_multipart=False,
                    attributes={"Content-Type": content_type},
                )
            except AlreadyExistsError:
                return False
            return True

    async def replace(
        self, key: str, content: bytes | Iterator[bytes] | AsyncIterator[bytes], content_type: str, size: int = 0
    ) -> None:
        """Write an object, whether or not it exists. Pieces are written part by part, for `size` bytes in all.

        No part of the object is visible before the last piece. An error of the iterator leaves no object.
        """
        with self._errors(key):
            await obstore.put_async(
                self._store,
                self._prefix + key,
                content,
                use_multipart=not isinstance(content, bytes),
                chunk_size=max(_PART_BYTES, -(-size // _MAX_PARTS)),
                max_concurrency=_PARTS_AT_ONCE,
                attributes={"Content-Type": content_type},
            )

    async def list(self, folder: str = "") -> AsyncIterator[Sequence[Object]]:
        """Yield the objects whose keys begin with `folder`, in pages."""
        with self._errors(folder):
            async for page in obstore.list(self._store, self._prefix + folder, chunk_size=1000):
                start = len(self._prefix)
                yield [Object(each["path"][start:], each["size"], each["last_modified"]) for each in page]

    async def delete(self, keys: Iterable[str]) -> None:
        """Delete objects. It is no error if one does not exist."""
        paths = [self._prefix + key for key in keys]
        if paths:
            with self._errors(paths[0]):
                await obstore.delete_async(self._store, paths)

    def presign(self, method: str, key: str, lifetime: timedelta) -> str:
        """Return the URL of an object with a signature, which anyone can use for `lifetime`. Sends no request."""
        return obstore.sign(self._store, "HEAD" if method == "HEAD" else "GET", self._prefix + key, lifetime)

    @contextmanager
    def _errors(self, key: str) -> Generator[None]:
        """Raise TargetError for an error of obstore, with its cause and remedy in one line."""
        try:
            yield
        except (BaseError, FileNotFoundError) as error:
            if isinstance(error, FileNotFoundError) and error.errno is not None:
                raise  # of what is written: those of obstore have no number, and mean that there is no bucket
            raise _error(f"{self.url}/{key}", str(error)) from None


def _error(url: str, message: str) -> TargetError:
    code, status = _CODE.search(message), _STATUS.search(message)
    if status is None:
        if _NO_REGION.search(message):
            return TargetRefusedError(f"{url}: the service redirects to another region; {_REGION}")
        what = "this is not an answer of an S3 service" if _NO_S3.search(message) else "the S3 service does not answer"
        return TargetUnavailableError(f"{url}: {what}; check mirror.endpoint, and that the service runs")
    cause = f"status {status[1]}{f' ({code[1]})' if code else ''}"
    remedy = (code and _REMEDIES.get(code[1])) or _REMEDY_BY_STATUS.get(status[1])
    kind = TargetRefusedError if status[1].startswith("4") else TargetUnavailableError
    return kind(f"{url}: {cause}; {remedy}" if remedy else f"{url}: {cause}")

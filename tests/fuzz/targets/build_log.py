"""Build logs in any stored form: ranges are slices of the whole, and damage is reported after the bytes before it."""

import os
import tempfile

from harmonia.errors import StoreObjectError
from harmonia.store.build_log import BuildLog

WORDS = [b"BZh91AY&SY", b"\x17rE8P\x90", b"\x28\xb5\x2f\xfd", b"1", b"2", b"\x50\x2a\x4d\x18"]

_DIRECTORY = tempfile.mkdtemp()
_MOST = 1 << 22  # bytes that one input may decompress to; otherwise the fuzzer would only find bombs


def check(data: bytes) -> bool:
    """Take the first byte as the form, and the rest as the file."""
    suffix = {b"1": ".bz2", b"2": ".zst"}.get(data[:1], "")
    path = os.path.join(_DIRECTORY, f"log{suffix}")
    with open(path, "wb") as file:
        file.write(data[1:])
    log = BuildLog(path, suffix)
    whole, error = _read(log, 0, None)
    if len(whole) >= _MOST:
        return True
    for start, stop in ((0, 1), (len(whole) // 2, len(whole)), (1, None), (len(whole), None)):
        part, _ = _read(log, start, stop)
        assert part == whole[start:stop]
    assert error is not None or log.size == len(whole)
    return error is None


def _read(log: BuildLog, start: int, stop: int | None) -> tuple[bytes, Exception | None]:
    read = bytearray()
    try:
        for chunk in log.read(start, stop):
            read += chunk or b""
            assert len(chunk or b"") <= 3 << 20
            if len(read) >= _MOST:
                break
    except (StoreObjectError, OSError) as error:
        return bytes(read), error
    return bytes(read), None

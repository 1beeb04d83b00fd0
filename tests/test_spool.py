"""The spool keeps a small file whole or not at all, on every file system, and never more bytes than its size."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from harmonia.errors import PushRefusedError
from harmonia.nix import base32
from harmonia.push.spool import Spool

FILES = [bytes([number]) * 1000 for number in range(20)]


def name(data: bytes) -> str:
    return base32.encode(hashlib.sha256(data).digest())


def kept(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


def failing(function: Callable[..., object], error: int, *, flag: int = 0) -> Callable[..., object]:
    """Return a function that fails with an error if one of its arguments has all bits of `flag`."""

    def fail(*arguments: object, **named: object) -> object:
        if any(isinstance(each, int) and each & flag == flag for each in arguments):
            raise OSError(error, os.strerror(error))
        return function(*arguments, **named)

    return fail


@pytest.fixture(params=["unnamed", "without O_TMPFILE", "without /proc"])
def spool(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spool:
    if request.param == "without O_TMPFILE":
        monkeypatch.setattr(os, "open", failing(os.open, errno.EOPNOTSUPP, flag=os.O_TMPFILE))
    if request.param == "without /proc":
        monkeypatch.setattr(os, "link", missing)
    return Spool(str(tmp_path), 15_000, 5_000)


def missing(*_: object, **__: object) -> None:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def test_small_files_are_kept_and_read_again(spool: Spool, tmp_path: Path) -> None:
    for data in (*FILES[:5], *FILES[:5]):
        spool.store(name(data), data)
    assert kept(tmp_path) == sorted(map(name, FILES[:5]))
    for data in FILES[:5]:
        assert spool.has(name(data))
        file = spool.open(name(data))
        assert file is not None
        with file:
            assert file.read(10_000) == data


def test_file_that_lost_its_content_in_a_crash_is_replaced(spool: Spool, tmp_path: Path) -> None:
    data = FILES[1]
    spool.store(name(data), data)
    os.truncate(tmp_path / name(data), 0)
    spool.store(name(data), data)
    assert (tmp_path / name(data)).read_bytes() == data


def test_only_a_damaged_file_is_removed(spool: Spool, tmp_path: Path) -> None:
    for data in FILES[:2]:
        spool.store(name(data), data)
    (tmp_path / name(FILES[1])).write_bytes(b"damaged")
    for data in FILES:
        spool.remove_damaged(name(data))
    assert kept(tmp_path) == [name(FILES[0])]


def test_file_with_another_hash_is_refused_and_leaves_nothing(spool: Spool, tmp_path: Path) -> None:
    with pytest.raises(PushRefusedError, match="SHA-256"):
        spool.store(name(FILES[0]), FILES[1])
    assert kept(tmp_path) == []


def test_small_files_beyond_the_size_are_refused_until_others_are_imported(spool: Spool, tmp_path: Path) -> None:
    other = Spool(str(tmp_path), 15_000, 5_000)  # of another worker
    for data in FILES[:15]:
        spool.store(name(data), data)
    for each in (spool, other):
        with pytest.raises(PushRefusedError, match="full"):
            each.store(name(FILES[15]), FILES[15])
    assert len(kept(tmp_path)) == 15
    spool.mark_imported(name(FILES[0]))
    other.store(name(FILES[15]), FILES[15])
    assert kept(tmp_path) == sorted(map(name, FILES[1:16]))


def test_file_that_is_larger_than_a_nar_may_be_is_refused(spool: Spool, tmp_path: Path) -> None:
    spool.store(name(FILES[0]), FILES[0])
    with pytest.raises(PushRefusedError, match=r"push\.max_nar_size"):
        spool.store(name(bytes(5_001)), bytes(5_001))
    assert kept(tmp_path) == [name(FILES[0])]


def test_full_disk_refuses_a_small_file(spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool.store(name(FILES[0]), FILES[0])
    monkeypatch.setattr(os, "write", failing(os.write, errno.ENOSPC))
    with pytest.raises(PushRefusedError, match="disk"):
        spool.store(name(FILES[1]), FILES[1])
    assert kept(tmp_path) == [name(FILES[0])]

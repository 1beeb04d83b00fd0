"""A store path that changes while it is read: nothing from outside of it is ever sent.

A process swaps a directory and a symlink to an outside directory as fast as it can. The outside directory has the same
files with other contents.
"""

import ctypes
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path

import pytest

from harmonia.errors import StoreObjectError
from harmonia.nix import listing
from harmonia.store import confined, file_reader, object_files, tree_reader
from harmonia.store.nar_layout import Layout
from harmonia.store.store import Store
from harmonia.tools.fixture_tree import Symlink, Tree
from harmonia.tools.store_builder import StoreBuilder
from support.running import PATIENCE_S, Server, nar_url

SECONDS = 0.15
SECRET = b"SECRET"
EXCHANGE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
one, other = map(os.fsencode, sys.argv[1:])
print("ready", flush=True)
while True:
    if libc.renameat2(-100, one, -100, other, 2):  # RENAME_EXCHANGE: renameat2(2)
        sys.exit(os.strerror(ctypes.get_errno()))
"""


def tree(contents: bytes) -> Tree:
    files: dict[str, Tree] = {f"file-{number}": contents * 100 for number in range(5)}
    inner = {**files, "large": contents * 100_000, "link": Symlink(contents), "same": {"deep": contents}}
    return {"a": {"b": inner}, "z": contents}


class Attacked:
    """A store path whose directory `a` alternates with a symlink to an outside directory."""

    def __init__(self, directory: Path) -> None:
        builder = StoreBuilder(directory / "store")
        self.root = directory / "store"
        self.info = builder.add(builder.output_path("attacked"), tree(b"inside"))
        self.path = builder.real_path(self.info.path)
        self.store = Store(builder.store_dir, builder.real_dir, builder.db_path)
        outside = builder.add(builder.output_path("outside"), tree(SECRET))
        os.rename(builder.real_path(outside.path), os.fsencode(directory / "outside"))
        self.swapped = os.fsdecode(self.path) + "/a"
        self.link = str(directory / "link")
        os.symlink(directory / "outside/a", self.link)
        os.chmod(self.path, 0o755)

    @contextmanager
    def swapping(self) -> Iterator[None]:
        with subprocess.Popen([sys.executable, "-c", EXCHANGE, self.swapped, self.link], stdout=-1) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                yield
                assert process.poll() is None
            finally:
                process.kill()
                process.wait()
                if os.path.islink(self.swapped):
                    os.rename(self.swapped, self.link + "-")
                    os.rename(self.link, self.swapped)
                    os.rename(self.link + "-", self.link)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    return Attacked(tmp_path_factory.mktemp("races").resolve())


@pytest.fixture(params=["by the kernel", "step by step"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open files with openat2, or step by step, as on older kernels and in sandboxes that forbid openat2."""
    if request.param == "step by step":

        def unknown(*_: object) -> int:
            ctypes.set_errno(errno.ENOSYS)
            return -1

        monkeypatch.setattr(confined, "_syscall", unknown)


def rounds(seconds: float, complete: Callable[[], bool]) -> Iterator[None]:
    """Yield for this time, and longer until the attack has had all its outcomes: on a busy machine, some come late."""
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end or not complete():
        assert now < end + PATIENCE_S, "some outcomes never came"
        yield


def whole(attacked: Attacked) -> bytes:
    return b"".join(file_reader.read(tree_reader.dump(attacked.path)))


def part(_: Attacked, layout: Layout) -> bytes:
    assert layout.size
    return b"".join(file_reader.read(layout.window(layout.size // 2, layout.size)))


def a_file(attacked: Attacked) -> bytes:
    entry = object_files.lookup_entry(attacked.store, attacked.info, [b"a", b"b", b"large"])
    if not isinstance(entry, object_files.Entry):
        raise StoreObjectError
    return entry.sample + b"".join(
        file_reader.flatten(object_files.File(attacked.path, entry.names, entry.status).read(0, entry.status.st_size))
    )


def a_directory(attacked: Attacked) -> bytes:
    return repr(object_files.list_directory(attacked.path, [b"a", b"b"], 100)).encode()


def a_listing(attacked: Attacked) -> bytes:
    return b"".join(listing.render(Layout.of(attacked.path).located()))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("read", [whole, "part", a_file, a_directory, a_listing])
def test_reader_follows_no_symlink_out_of_the_path(attacked: Attacked, read: Callable[[Attacked], bytes] | str) -> None:
    reading = partial(part, layout=Layout.of(attacked.path)) if isinstance(read, str) else read
    expected = reading(attacked)
    assert SECRET not in expected
    seen: set[bool] = set()
    with attacked.swapping():
        for _ in rounds(SECONDS, lambda: seen == {True, False}):
            got = None
            with suppress(OSError, StoreObjectError):
                got = reading(attacked)
                assert SECRET not in got
            seen.add(got == expected)


def test_server_sends_nothing_from_outside_the_path(attacked: Attacked, start: Callable[..., Server]) -> None:
    server = start(store=attacked.root)
    hash_part = attacked.info.path.hash_part
    requests: list[tuple[str, dict[str, str]]] = [(nar_url(attacked.info), {}), (f"/{hash_part}.ls", {})]
    requests += [(f"{nar_url(attacked.info)}.zst", {}), (nar_url(attacked.info), {"Range": "bytes=2000-"})]
    paths = [f"/serve/{hash_part}/a/b/file-1", f"/serve/{hash_part}/a/b/", f"/serve/{hash_part}/a/b/link"]
    requests += [(path, {}) for path in paths]
    seen: set[int] = set()
    with attacked.swapping():
        for _ in rounds(5 * SECONDS, lambda: seen >= {200, 206, 404}):
            for path, headers in requests:
                with suppress(OSError, HTTPException):
                    answer = server.get(path, headers)
                    seen.add(answer.status)
                    assert SECRET not in answer.body
    assert not [line for line in server.log if "Traceback" in line]


@pytest.mark.usefixtures("way")
def test_symlink_anywhere_in_a_path_is_rejected(tmp_path: Path) -> None:
    top = tmp_path.resolve()
    (top / "a/b").mkdir(parents=True)
    (top / "a/b/file").write_text("text")
    (top / "link").symlink_to("a")
    (top / "a/b/end").symlink_to("file")
    for name in ("a/b/file", "a//b/./file"):
        os.close(confined.open_file(os.fsencode(top / name), os.O_RDONLY))
    for name in ("link/b/file", "a/b/end", "link", "a/../link/b/file"):
        with pytest.raises(OSError, match=r"symbolic links|Not a directory") as caught:
            confined.open_file(os.fsencode(top) + b"/" + name.encode(), os.O_RDONLY)
        assert caught.value.filename == os.fsencode(top) + b"/" + name.encode()
    with pytest.raises(FileNotFoundError):
        confined.open_file(os.fsencode(top / "none/file"), os.O_RDONLY)
    os.close(confined.open_file(confined.resolved(os.fsencode(top / "link/b/file")), os.O_RDONLY))


def test_root_of_a_dump_may_be_reached_through_symlinks(tmp_path: Path) -> None:
    (tmp_path / "a/tree").mkdir(parents=True)
    (tmp_path / "a/tree/file").write_text("text")
    (tmp_path / "link").symlink_to("a")
    named = [os.fsencode(tmp_path / name) for name in ("a/tree", "link/tree")]
    assert len({b"".join(file_reader.read(tree_reader.dump(path))) for path in named}) == 1

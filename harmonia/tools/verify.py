"""Integrity check of the store: hashes the NAR of each path in parallel and compares it with the database.

A journal records good paths. An interrupted run continues from it, and a large store can be verified over several
nights.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from threading import Event
from types import TracebackType
from typing import Literal, NamedTuple, Self

from harmonia.errors import ConfigError, StoreObjectError
from harmonia.nix import base32
from harmonia.nix.path_info import PathInfo
from harmonia.store import file_reader, tree_reader
from harmonia.store.store import Store
from harmonia.untrusted import integer

_MAX_TIME_S = 1 << 40

State = Literal["good", "corrupt", "missing", "unreadable", "unregistered"]


class Result(NamedTuple):
    path: str
    """Full store path."""
    state: State
    what: str = ""
    """Short description of the problem. Empty if the path is good."""


class Journal:
    """Journal file: lines `time hash path`, each for a path that was found good at that time.

    Raises ConfigError if the file cannot be written, or if another run uses it.
    """

    def __init__(self, path: str) -> None:
        try:
            os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o700, exist_ok=True)
            self._file = open(path, "a+", encoding="ascii", errors="replace")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            what = f"cannot write {path!r}: {error.strerror}; choose another file with --journal"
            raise ConfigError(what) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(
                f"{path}: another `harmonia verify` uses this journal; wait for it, or choose another with --journal"
            ) from None
        self._file.seek(0)
        lines = self._file.read().split("\n")[:-1]
        # A killed run may leave a truncated line. Malformed lines are ignored.
        self._times = {
            (words[1], words[2]): when for words in map(str.split, lines) if (when := _time(words)) is not None
        }
        if len(lines) > 2 * len(self._times):
            self._file.truncate(0)
            for (nar_hash, name), when in self._times.items():
                self._file.write(f"{when} {nar_hash} {name}\n")

    def age(self, info: PathInfo) -> float:
        """Return the seconds since the path was found good with the registered hash, or infinity."""
        when = self._times.get((base32.encode(info.nar_hash), str(info.path)))
        return float("inf") if when is None else time.time() - when

    def record(self, info: PathInfo) -> None:
        """Record that the path is good now."""
        self._file.write(f"{int(time.time())} {base32.encode(info.nar_hash)} {info.path}\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def _time(words: list[str]) -> int | None:
    """Return the time in a line of the journal, or None if it has another form."""
    return integer(words[0], _MAX_TIME_S) if len(words) == 3 else None  # noqa: PLR2004 (a line has three words)


def verify(
    store: Store,
    paths: Iterable[str],
    journal: Journal,
    *,
    max_age: float = 0,
    threads: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> Generator[Result]:
    """Yield a result for each of the full store `paths`, in the order of completion.

    Skips paths found good less than `max_age` seconds ago, and paths deleted meanwhile. Any thread may call `progress`,
    with the number of bytes hashed since the last call.
    """
    stop = Event()
    running: dict[Future[Result], PathInfo] = {}
    pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")

    def finished(max_running: int) -> Iterator[Result]:
        """Yield results until at most `max_running` checks are running."""
        while len(running) > max_running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                info, result = running.pop(future), future.result()
                if result.state == "good":
                    journal.record(info)
                elif _look_up(store, result.path) != info:
                    continue  # garbage-collected during the check
                yield result

    try:
        for path in paths:
            try:
                info = _look_up(store, path)
            except StoreObjectError as error:
                yield Result(path, "unregistered", str(error))
                continue
            if info is None:
                continue
            if journal.age(info) < max_age:
                progress(info.nar_size)
                continue
            yield from finished(2 * threads)
            running[pool.submit(check, store, info, progress, stop)] = info
        yield from finished(0)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _look_up(store: Store, path: str) -> PathInfo | None:
    info = store.path_info(path[len(store.store_dir) + 1 :][:32])
    return info if info is not None and f"{store.store_dir}/{info.path}" == path else None


def check(
    store: Store, info: PathInfo, progress: Callable[[int], None] = lambda _: None, stop: Event | None = None
) -> Result:
    """Hash the files of a valid path, until `stop` is set. Calls `progress` with the number of bytes hashed since."""
    path, root = f"{store.store_dir}/{info.path}", store.real_path(info.path)
    sha256, size = hashlib.sha256(), 0
    try:
        for chunk in file_reader.read(tree_reader.dump(root)):
            if stop is not None and stop.is_set():
                break
            sha256.update(chunk)
            size += len(chunk)
            progress(min(len(chunk), max(info.nar_size - size + len(chunk), 0)))
    except StoreObjectError as error:
        return Result(path, "corrupt", str(error))
    except OSError as error:
        if not os.path.lexists(root):
            return Result(path, "missing", "registered in the database, but not on disk")
        return Result(path, "unreadable", f"{os.fsdecode(error.filename or root)}: {error.strerror}")
    if size != info.nar_size:
        return Result(path, "corrupt", f"the NAR has {size} bytes, but {info.nar_size} are registered")
    if sha256.digest() != info.nar_hash:
        actual, registered = base32.encode(sha256.digest()), base32.encode(info.nar_hash)
        return Result(path, "corrupt", f"the NAR hash is sha256:{actual}, but sha256:{registered} is registered")
    return Result(path, "good")

"""Import of pushed paths into the store by the Nix daemon, and the checks before that.

The daemon decides: it accepts paths that are signed by a key of its `trusted-public-keys`, and content-addressed paths.
The checks here refuse earlier, with better messages, and leave no incomplete path in the store.
"""

import asyncio
import logging
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, BinaryIO

from harmonia.errors import DaemonError, FormatError, PushRefusedError, RemoteError
from harmonia.nix import base32, nix_conf
from harmonia.nix.build_trace import Realisation, is_signed, render_realisation
from harmonia.nix.decompress import COMPRESSIONS, WindowError, unpack_file
from harmonia.nix.nar_check import NarCheck
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import PublicKey, SecretKey
from harmonia.nix.store_path import StorePath
from harmonia.process.loop_reads import LoopReads
from harmonia.push.connections import DaemonConnections
from harmonia.push.loop_daemon import LoopDaemon
from harmonia.push.path_locks import PathLocks
from harmonia.push.roots import PushRoots
from harmonia.push.spool import Spool
from harmonia.store.nix_daemon import BlockingDaemon, DaemonClient, run_blocking

SMALL_NAR_BYTES = 4 << 20
"""Size up to which an unpacked NAR stays in memory between its check and its import. Others are unpacked twice."""
_LOOP_BYTES = 256 << 10  # of a NAR, and of its file: to unpack and hash them takes 0.4 ms
_LOOP_REFERENCES = 256  # to ask the daemon for them takes 3 ms
_LOOP_COMPRESSIONS = {"none", "zstd"}  # others take longer to unpack
_MAX_TURN_S = 1.0  # of an import on the event loop: after that, others do not wait for it
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_UNSIGNED = re.compile("lacks a (valid )?signature")
_DISK_FULL = re.compile("No space left on device|Disk quota exceeded|database or disk is full")
_MAX_NAMED = 5  # paths in a message
_SIGN = "sign it: nix copy --to '…/push?secret-key=FILE', with a key in the trusted-public-keys of the server's Nix"

MaySign = Callable[[str], bool]
"""Returns True if the pusher may have a path with this name signed by the server."""

_OnDisk = Callable[[Callable[[], Any]], Any]
"""Runs a short job that uses the disk, and returns its result."""

_log = logging.getLogger("harmonia")


@dataclass(frozen=True, slots=True)
class Upload:
    """A path to import: its information and compression from its narinfo, and the file of its NAR."""

    info: PathInfo
    compression: str
    file_hash: str | None
    """Base-32 SHA-256 of the file in the spool. None if the narinfo names no file that could be sent."""


@dataclass(frozen=True, slots=True)
class Signer:
    """The server's own key for pushers that have none, and the names of the paths that it may sign."""

    key: SecretKey
    permits: Callable[[str], object]


class NeedsThreadError(Exception):
    """An import may take long, so that a thread has to do it instead of the event loop."""


class Importer:
    """Imports paths, in several threads and on the event loop, where `loop_disk` observes how long the disk takes."""

    def __init__(
        self,
        connections: DaemonConnections[BlockingDaemon],
        loop_connections: DaemonConnections[LoopDaemon],
        loop_disk: LoopReads,
        store_dir: str,
        locks: PathLocks,
        roots: PushRoots,
        spool: Spool,
        signer: Signer | None,
        max_nar_bytes: int,
    ) -> None:
        self._connections = connections
        self._loop_connections = loop_connections
        self._loop_disk = loop_disk
        self._loop_turn = asyncio.Lock()
        self._turn_began = 0.0  # by the clock of the event loop
        self._store_dir = store_dir
        self._locks = locks
        self._roots = roots
        self._spool = spool
        self._signer = signer
        self._max_nar_bytes = max_nar_bytes
        self._is_stopping = False

    def run(self, upload: Upload, may_sign: MaySign) -> bool:
        """Import a path and make a GC root for it. Return False if it was valid already. Blocks.

        Raises PushRefusedError if it cannot be imported.
        """
        borrowed = self._connections.borrowed()
        return run_blocking(self._import(upload, may_sign, borrowed, self._check_stop, operator.call))

    async def run_on_loop(self, upload: Upload, may_sign: MaySign) -> bool:
        """Import a path like `run`, on the event loop, one after the other.

        A thread would compete for the interpreter at each message to the daemon, and from it. Two imports would wait
        for each other in the daemon, which sleeps while its database is locked.
        Raises NeedsThreadError if a thread has to import the path, because that or another import may take long.
        """
        info = upload.info
        if info.nar_size > _LOOP_BYTES or len(info.references) > _LOOP_REFERENCES:
            raise NeedsThreadError
        if upload.compression not in _LOOP_COMPRESSIONS:
            raise NeedsThreadError
        try:
            async with asyncio.timeout_at(self._turn_began + _MAX_TURN_S):
                await self._loop_turn.acquire()
        except TimeoutError:
            raise NeedsThreadError from None
        self._turn_began = asyncio.get_running_loop().time()
        try:
            if not self._loop_disk.allowed or self._loop_disk.run(partial(self._is_large, upload)):
                raise NeedsThreadError
            borrowed = self._loop_connections.borrowed()
            return await self._import(upload, may_sign, borrowed, _need_thread, self._loop_disk.run)
        finally:
            self._loop_turn.release()

    def _is_large(self, upload: Upload) -> bool:
        return upload.file_hash is not None and self._spool.size(upload.file_hash) > _LOOP_BYTES

    async def _import(
        self,
        upload: Upload,
        may_sign: MaySign,
        borrowed: AbstractAsyncContextManager[DaemonClient],
        before_wait: Callable[[], None],
        on_disk: _OnDisk,
    ) -> bool:
        """Import a path. Call `before_wait` before each wait for another import of it. `on_disk` runs short jobs."""
        info = upload.info
        if info.nar_size > self._max_nar_bytes:
            what = f"the NAR has {info.nar_size} bytes, more than push.max_nar_size, {self._max_nar_bytes}"
            raise PushRefusedError(413, f"{what}; raise the setting")
        info = self._signed(info, may_sign)
        try:
            with self._locks.locked(info.path, before_wait):
                async with borrowed as daemon:
                    others = [self._full(path) for path in info.references if path != info.path]
                    # The temporary roots last until long after the persistent one is made.
                    valid_hash, valid = await daemon.protect_and_query(self._full(info.path), others)
                    if missing := set(others) - valid:
                        named = ", ".join(sorted(missing)[:_MAX_NAMED])
                        raise PushRefusedError(409, f"its references are not in the store: {named}; push them first")
                    if valid_hash is None:
                        await self._add(daemon, info, upload, on_disk)
                    else:
                        await self._renew(daemon, info, upload, valid_hash, on_disk)
                    on_disk(partial(self._end, upload))
        except DaemonError as error:
            self._check_signatures(info)
            raise _refused(info.path, error) from None
        except (OSError, RemoteError) as error:
            _log.error("%s: import failed: %s; the client has to push it again", info.path, error)
            raise PushRefusedError(409, "the import failed; push again, or see the server's log") from None
        return valid_hash is None

    def register(self, realisation_id: str, realisation: Realisation, may_sign: MaySign) -> None:
        """Register a realisation with the Nix daemon, which does not check its signatures itself.

        It is dropped unless a trusted key signed it, or our key may sign its output path. Nix does not sign
        realisations while it pushes, and their output paths are of use without them.
        Raises PushRefusedError if it cannot be registered.
        """
        signer = self._signer_of(realisation.out_path, may_sign)
        signers = [signer] if signer else []
        if not signers and not is_signed(realisation_id, realisation, trusted_keys()):
            what = "%s: realisation not registered: no trusted key has signed it; set secret-key-files on the builder"
            _log.warning(what, realisation_id)
            return
        try:
            run_blocking(self._register(realisation.out_path, render_realisation(realisation_id, realisation, signers)))
        except DaemonError as error:
            raise _refused(realisation.out_path, error) from None
        except (OSError, RemoteError) as error:
            _log.error("%s: registration failed: %s; the client has to push it again", realisation_id, error)
            raise PushRefusedError(409, "the registration failed; push again, or see the server's log") from None

    async def _register(self, out_path: StorePath, realisation: bytes) -> None:
        async with self._connections.borrowed() as daemon:
            if not daemon.query_valid_paths([self._full(out_path)]):
                raise PushRefusedError(409, f"{out_path} is not in the store; push it first")
            daemon.register_realisation(realisation.decode())

    def stop(self) -> None:
        """Let running imports fail soon, because the worker stops."""
        self._is_stopping = True

    def _check_stop(self) -> None:
        if self._is_stopping:
            raise PushRefusedError(409, "the server is stopping; push again later")

    def _full(self, path: str) -> str:
        return f"{self._store_dir}/{path}"

    def _signed(self, info: PathInfo, may_sign: MaySign) -> PathInfo:
        """Return the path, with our signature if it needs one and the pusher may have one.

        Raises PushRefusedError if the Nix daemon would refuse it certainly. It checks signatures before it takes a NAR,
        so those of a small one are checked only by it.
        """
        if info.ca is not None:
            return info
        if (signer := self._signer_of(info.path, may_sign)) is not None:
            is_trusted = _is_signed(info, self._store_dir, trusted_keys())
            return (
                info if is_trusted else replace(info, sigs=(*info.sigs, signer.sign(info.fingerprint(self._store_dir))))
            )
        if not info.sigs:
            raise PushRefusedError(403, f"{info.path} is not signed; {_SIGN}")
        if info.nar_size > SMALL_NAR_BYTES:
            self._check_signatures(info)
        return info

    def _check_signatures(self, info: PathInfo) -> None:
        """Raise PushRefusedError if the Nix daemon would refuse the signatures certainly."""
        keys = trusted_keys()
        names = {key.name for key in keys}
        is_known = all(sig.partition(":")[0] in names for sig in info.sigs)
        if info.ca is None and is_known and not _is_signed(info, self._store_dir, keys):
            raise PushRefusedError(403, f"the signature of {info.path} is wrong; sign it again")

    def _signer_of(self, path: StorePath, may_sign: MaySign) -> SecretKey | None:
        """Return our key if both the settings and the pusher's token allow to sign a path with this name."""
        signer = self._signer
        return signer.key if signer and signer.permits(path.name) and may_sign(path.name) else None

    async def _renew(
        self, daemon: DaemonClient, info: PathInfo, upload: Upload, valid_hash: bytes, on_disk: _OnDisk
    ) -> None:
        """Renew the root of a path that was valid before, with the NAR hash `valid_hash`, or make one."""
        if valid_hash != info.nar_hash:
            raise PushRefusedError(409, f"{info.path} is in the store with another NarHash; keep that one")
        if upload.file_hash is None:  # `nix store sign` or `nix store copy-sigs`
            raise PushRefusedError(409, f"{info.path} is in the store; only a trusted user of Nix can sign it there")
        await daemon.register_roots([on_disk(partial(self._roots.make, info.path))])

    async def _add(self, daemon: DaemonClient, info: PathInfo, upload: Upload, on_disk: _OnDisk) -> None:
        """Import a path and make its root."""
        with ExitStack() as files:
            chunks, link = on_disk(partial(self._prepare, info, upload, files))
            try:
                if await daemon.add_to_store(info, self._store_dir, chunks, link) != info.nar_hash:
                    raise PushRefusedError(409, f"the Nix daemon did not import {info.path}; see its log")
            except (DaemonError, PushRefusedError) as error:  # after others, the daemon may still complete the import
                self._roots.drop(info.path)
                if isinstance(error, DaemonError) and upload.file_hash is not None:
                    self._spool.remove_damaged(upload.file_hash)
                raise

    def _prepare(self, info: PathInfo, upload: Upload, files: ExitStack) -> tuple[Iterable[bytes], str]:
        """Return the chunks of the NAR, which was checked, and the link for its root. `files` closes its file."""
        if upload.file_hash is None or (file := self._spool.open(upload.file_hash)) is None:
            raise PushRefusedError(409, "its NAR was not sent, or too long ago; push the path again")
        files.enter_context(file)
        small = self._check(file, info, upload)
        file.seek(0)
        return small or self._unpacked(file, upload.compression), self._roots.make(info.path)  # no root until valid

    def _end(self, upload: Upload) -> None:
        """Note that a path was imported, or was valid already."""
        self._roots.end_soon(path for path in upload.info.references if path != upload.info.path)
        if upload.file_hash is not None:
            self._spool.mark_imported(upload.file_hash)

    def _check(self, file: BinaryIO, info: PathInfo, upload: Upload) -> list[bytes]:
        """Raise PushRefusedError unless the file unpacks to the NAR. Return the chunks of a small NAR, or nothing."""
        if upload.compression not in COMPRESSIONS:
            known = ", ".join(sorted(COMPRESSIONS))
            raise PushRefusedError(400, f"cannot unpack {upload.compression}; push with ?compression= one of {known}")
        as_named = upload.compression == "none" and upload.file_hash == base32.encode(info.nar_hash)
        if as_named and os.fstat(file.fileno()).st_size == info.nar_size:  # the spool has checked the hash
            return [file.read()] if info.nar_size <= SMALL_NAR_BYTES else []
        check = NarCheck(info, "none")
        small: list[bytes] = []
        try:
            for piece in self._unpacked(file, upload.compression):
                small += (part for part in check.feed(piece) if part and info.nar_size <= SMALL_NAR_BYTES)
            check.finish()
        except WindowError as error:
            raise PushRefusedError(400, f"the NAR of {info.path}: {error}; push with ?compression=zstd") from None
        except FormatError as error:
            self._spool.remove_damaged(upload.file_hash or "")
            raise PushRefusedError(400, f"the NAR of {info.path}: {error}; push it again") from None
        return small

    def _unpacked(self, file: BinaryIO, compression: str) -> Iterator[bytes]:
        for piece in unpack_file(file, compression):
            self._check_stop()
            yield piece


def trusted_keys() -> list[PublicKey]:
    """Return the keys that this machine's Nix trusts, as far as its nix.conf shows them."""
    return nix_conf.trusted_keys(os.environ)


def _is_signed(info: PathInfo, store_dir: str, keys: list[PublicKey]) -> bool:
    """Return True if one of the keys has signed the path. Of two keys with one name, Nix takes the first."""
    message = info.fingerprint(store_dir)
    first = {key.name: key for key in reversed(keys)}
    return any(key.verify(message, sig) for key in first.values() for sig in info.sigs)


def _refused(path: StorePath, error: DaemonError) -> PushRefusedError:
    why = " ".join(_COLOUR.sub("", str(error)).split())
    _log.warning("%s: push refused: %s", path, why)
    if _UNSIGNED.search(why):
        return PushRefusedError(403, f"the server's Nix trusts no signature of {path}; {_SIGN}")
    if _DISK_FULL.search(why):
        return PushRefusedError(413, "the disk of the server's store is full; free space there, then push again")
    return PushRefusedError(409, f"{why}; see the server's log")


def _need_thread() -> None:
    raise NeedsThreadError

"""Path of an upstream: its narinfo, parsed and checked."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from harmonia.errors import FormatError
from harmonia.nix import base32, narinfo
from harmonia.nix.decompress import COMPRESSIONS, WindowError
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.store_path import StoreDirError
from harmonia.upstream.answer import Answer
from harmonia.upstream.client import Client
from harmonia.upstream.nar_name import NarName
from harmonia.upstream.refusals import Reason, UpstreamMismatchError
from harmonia.upstream.transport import Part


def memory_bytes(narinfo_size: int) -> int:
    """Return about the bytes of memory of a path, whose Python objects take more than the text of its narinfo."""
    return 1000 + 3 * narinfo_size


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A path that an upstream has, by its narinfo."""

    client: Client
    info: PathInfo
    nar: NarFile
    verified: bool
    """True if there is a valid signature by one of the upstream's `public_keys`."""
    url: str
    """Absolute URL of the NAR."""
    narinfo_size: int
    """Bytes of the narinfo."""

    @property
    def name(self) -> NarName:
        file = self.client.id if self.nar.file_hash is None else base32.encode(self.nar.file_hash)
        return NarName(self.info.path.hash_part, base32.encode(self.info.nar_hash), file, self.nar.compression)

    @property
    def file_size(self) -> int | None:
        """Bytes of the NAR file, or None if it is compressed: FileSize is not signed, and some caches get it wrong."""
        return self.info.nar_size if self.nar.compression == "none" else None

    async def request_nar(
        self, headers: Mapping[str, str], part: Part, method: str = "GET", *, checked: bool = True
    ) -> Answer:
        """Request the NAR or a part of it. Return the response, which the caller must close.

        `checked` is whether the caller verifies the NAR; only then redirects to other hosts are followed. Raises
        UpstreamError if the request fails or the NAR does not exist.
        """
        return await self.client.request_nar(self.url, headers, method, part, anywhere=checked)

    def refuse_nar(self, why: Exception) -> UpstreamMismatchError:
        """Count and log that the received file is not the NAR, and return the error for the caller to raise."""
        reason = Reason.COMPRESSION if isinstance(why, WindowError) else Reason.WRONG_NAR
        return self.client.refusals.refuse(self.url, reason, str(why))


async def fetch_narinfo(client: Client, hash_part: str, headers: Mapping[str, str]) -> RemotePath | None:
    """Request the narinfo of a path. Return None if the upstream does not have it, or if it is refused.

    Raises UpstreamError if the request fails.
    """
    path = await request_narinfo(client, hash_part, headers)
    if isinstance(path, UpstreamMismatchError):
        return None
    client.counters.add("hits" if path else "misses")
    return path


async def request_narinfo(
    client: Client, hash_part: str, headers: Mapping[str, str]
) -> RemotePath | UpstreamMismatchError | None:
    """Like `fetch_narinfo`, but return the refusal if the narinfo is refused, and count no hit or miss."""

    def parse(text: bytes) -> RemotePath | UpstreamMismatchError:
        try:
            return parse_now(client, hash_part, text)
        except UpstreamMismatchError as error:
            error.__context__ = None  # its traceback and that of the error would keep the text in memory
            return error.with_traceback(None)

    return await client.request_small(_narinfo_path(hash_part), headers, parse)


async def parse(client: Client, hash_part: str, text: bytes) -> RemotePath:
    """Parse and check a narinfo of an upstream. Raises UpstreamMismatchError if it is refused."""
    return await client.parse(partial(parse_now, client, hash_part), text)


def parse_now(client: Client, hash_part: str, text: bytes) -> RemotePath:
    """Parse and check a narinfo, in any thread. Raises UpstreamMismatchError if it is refused."""
    refuse = partial(client.refusals.refuse, _narinfo_path(hash_part))
    try:
        info, nar = narinfo.parse(text.decode(errors="surrogateescape"), client.store_dir)
    except StoreDirError as error:
        raise refuse(Reason.WRONG_STORE_DIR, str(error)) from None
    except FormatError as error:
        raise refuse(Reason.MALFORMED_NARINFO, str(error)) from None
    if info.path.hash_part != hash_part:
        raise refuse(Reason.WRONG_PATH, "the narinfo is for another path")
    if nar.compression not in COMPRESSIONS and client.settings.mode == "proxy":
        raise refuse(Reason.COMPRESSION, f"cannot verify NARs with the compression {nar.compression}")
    if nar.compression == "none":
        nar = replace(nar, file_hash=info.nar_hash, file_size=info.nar_size)
    fingerprint = info.fingerprint(client.store_dir)
    verified = any(key.verify(fingerprint, sig) for key in client.keys for sig in info.sigs)
    if client.keys and not verified:
        raise refuse(Reason.NOT_SIGNED, "no signature by any of public_keys")
    return RemotePath(client, info, nar, verified, client.nar_url(nar.url, _narinfo_path(hash_part)), len(text))


def _narinfo_path(hash_part: str) -> str:
    return f"{hash_part}.narinfo"

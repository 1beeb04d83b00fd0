"""A path that an upstream has: what its narinfo says, as far as we may believe it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

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


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A path that an upstream has, as it says."""

    client: Client
    info: PathInfo
    nar: NarFile
    verified: bool
    """Whether one of the upstream's public keys has signed it."""
    url: str
    """Where its NAR really is."""
    narinfo_size: int
    """Bytes of its narinfo."""

    @property
    def name(self) -> NarName:
        file = self.client.id if self.nar.file_hash is None else base32.encode(self.nar.file_hash)
        return NarName(self.info.path.hash_part, base32.encode(self.info.nar_hash), file, self.nar.compression)

    @property
    def file_size(self) -> int | None:
        """Bytes of its NAR as it comes, if that is certain: nobody signs a FileSize, and caches get it wrong."""
        return self.info.nar_size if self.nar.compression == "none" else None

    async def request_nar(
        self, headers: Mapping[str, str], part: Part, method: str = "GET", *, checked: bool = True
    ) -> Answer:
        """Request its NAR, or a part of it. Raises UpstreamError if there is none."""
        return await self.client.request_nar(self.url, headers, method, part, anywhere=checked)

    def refuse_nar(self, why: Exception) -> UpstreamMismatchError:
        """Note that what came is not its NAR, and return the error to be raised."""
        reason = Reason.COMPRESSION if isinstance(why, WindowError) else Reason.WRONG_NAR
        return self.client.refusals.refuse(self.url, reason, str(why))


async def fetch_narinfo(client: Client, hash_part: str, headers: Mapping[str, str]) -> RemotePath | None:
    """What that upstream says of a path. UpstreamError where it does not answer."""

    def parse(text: bytes) -> RemotePath | Literal[False]:
        try:
            return _parse(client, hash_part, text)
        except UpstreamMismatchError:  # which would keep the text
            return False

    found = await client.request_small(_narinfo_path(hash_part), headers, parse)
    if found is False:
        return None
    client.counters.add("hits" if found else "misses")
    return found


async def parse(client: Client, hash_part: str, text: bytes) -> RemotePath:
    """Return what a narinfo of that upstream says. Raise UpstreamMismatchError if it cannot be taken."""
    return await client.parse(partial(_parse, client, hash_part), text)


def _parse(client: Client, hash_part: str, text: bytes) -> RemotePath:
    """Return what a narinfo says. Raise UpstreamMismatchError if it cannot be taken."""
    refuse = partial(client.refusals.refuse, _narinfo_path(hash_part))
    try:
        info, nar = narinfo.parse(text.decode(errors="surrogateescape"), client.store_dir)
    except StoreDirError as error:
        raise refuse(Reason.WRONG_STORE_DIR, str(error)) from None
    except FormatError as error:
        raise refuse(Reason.MALFORMED_NARINFO, str(error)) from None
    if info.path.hash_part != hash_part:
        raise refuse(Reason.WRONG_PATH, "it is of another path")
    if nar.compression not in COMPRESSIONS and client.settings.mode == "proxy":
        raise refuse(Reason.COMPRESSION, f"NARs in {nar.compression} cannot be checked")
    if nar.compression == "none":
        nar = replace(nar, file_hash=info.nar_hash, file_size=info.nar_size)
    fingerprint = info.fingerprint(client.store_dir)
    verified = any(key.verify(fingerprint, sig) for key in client.keys for sig in info.sigs)
    if client.keys and not verified:
        raise refuse(Reason.NOT_SIGNED, "none of the public_keys has signed it")
    return RemotePath(client, info, nar, verified, client.nar_url(nar.url, _narinfo_path(hash_part)), len(text))


def _narinfo_path(hash_part: str) -> str:
    return f"{hash_part}.narinfo"

"""Explanations why the local store serves a path or does not: one sentence that decides, then further facts.

Nothing is written. The contents of files are not read: `harmonia verify` does that.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import NamedTuple

from harmonia.errors import FormatError, StoreObjectError
from harmonia.nix import derivation
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import PublicKey, is_signature
from harmonia.nix.store_path import StorePath
from harmonia.store import build_log, queries
from harmonia.store.build_log import BuildLog
from harmonia.store.publish_policy import PublishPolicy
from harmonia.store.store import Store

MAX_CLOSURE_PATHS = 10_000
"""Paths of a closure that are examined."""
_MAX_DERIVATION_BYTES = 64 << 20
_MAX_FAULTS = 3  # of the closure, in the explanation

# Index IndexDerivationOutputs of Nix's schema covers `path`.
_DERIVER = """
select cast(drvs.path as text), cast(outputs.path as text) from DerivationOutputs as outputs
join ValidPaths as drvs on drvs.id = outputs.drv where outputs.path >= ? and outputs.path < ? limit 1
"""


class Code(StrEnum):
    """Machine-readable form of a reason."""

    VALID = "valid"
    NOT_VALID = "not_valid"
    NOT_BUILT = "not_built"
    BUILT_BEFORE = "built_before"
    MALFORMED = "malformed"
    FILES_MISSING = "files_missing"
    DAMAGED = "damaged"
    NOT_PUBLISHED = "not_published"
    CLOSURE_INCOMPLETE = "closure_incomplete"
    SIGNED = "signed"
    NOT_SIGNED = "not_signed"
    BUILT_INSTEAD = "built_instead"
    NOT_ASKED = "not_asked"
    UPSTREAM_HAS = "upstream_has"
    UPSTREAM_LACKS = "upstream_lacks"


class Reason(NamedTuple):
    code: str
    """One of Code, or the name of a check of `harmonia doctor`."""
    text: str
    decides: bool = False
    """True if this reason alone keeps clients from using the path."""
    remedy: str = ""


class Explainer:
    """Explains paths of one store. Not thread-safe. The methods block.

    `keys` are the public keys of the signatures that the server adds, `logs` is the directory of build logs. Raises
    StoreUnavailableError if the database cannot be read.
    """

    def __init__(self, store: Store, policy: PublishPolicy | None, keys: Sequence[PublicKey], logs: str) -> None:
        self._store = store
        self._policy = policy
        self._keys = keys
        self._logs = logs

    def explain(self, hash_part: str, *, closure: bool = True) -> Iterator[Reason]:
        """Yield the reasons. Clients can use the path if none of them decides.

        `closure` is whether the paths that it needs are examined, even those that the publish policy forbids.
        """
        try:
            info = self._store.path_info(hash_part)
        except StoreObjectError as error:
            yield Reason(Code.MALFORMED, str(error), decides=True, remedy="delete the path and build it again")
            return
        if info is None:
            yield from self._absent(hash_part)
            return
        yield Reason(Code.VALID, f"{self._store.store_dir}/{info.path} is valid in the store of this server")
        if fault := self._fault(info):
            yield fault
        yield self._signatures(info)
        if closure:
            yield from self._closure(info)

    def _absent(self, hash_part: str) -> Iterator[Reason]:
        prefix = f"{self._store.store_dir}/{hash_part}"
        what = f"no path with the hash {hash_part} is valid in the store of this server"
        known = self._deriver(prefix)
        if known is None:
            yield Reason(Code.NOT_VALID, what, decides=True, remedy="build it on this server, or copy it there")
            return
        deriver, output = known
        log = self._log(deriver)
        if log is None:
            text = f"{output} was never built here: its derivation {deriver} is valid, but has no build log"
            yield Reason(Code.NOT_BUILT, text, decides=True, remedy=f"nix-store --realise {deriver}")
            return
        day = time.strftime("%Y-%m-%d", time.gmtime(log.modified_at))
        text = f"{output} is not valid: its build ran here on {day}, and failed, or its output was garbage-collected"
        remedy = f"read the log with `nix log {deriver}`, build it again, and keep it with a GC root"
        yield Reason(Code.BUILT_BEFORE, text, decides=True, remedy=remedy)

    def _deriver(self, prefix: str) -> tuple[str, str] | None:
        """Return a valid derivation with an output that begins with `prefix`, and that output, or None."""
        rows = self._store.database.query(_DERIVER, f"{prefix}-", f"{prefix}.")
        return rows[0] if rows else None

    def _log(self, deriver: str) -> BuildLog | None:
        with suppress(FormatError, OSError):
            return build_log.find_log(self._logs, StorePath.in_dir(self._store.store_dir, deriver))
        return None

    def _fault(self, info: PathInfo) -> Reason | None:
        """Return why a valid path is not served, or None."""
        if not os.path.lexists(self._store.real_path(info.path)):
            text = f"the files of {info.path} are missing, although the database has the path"
            remedy = f"nix-store --repair-path {self._store.store_dir}/{info.path}"
            return Reason(Code.FILES_MISSING, text, decides=True, remedy=remedy)
        denial = self._policy.denial(info) if self._policy is not None else None
        if denial is None:
            return None
        return Reason(
            Code.NOT_PUBLISHED, f"{info.path} is not served: {denial}", decides=True, remedy="change [publish]"
        )

    def _signatures(self, info: PathInfo) -> Reason:
        names = [sig.partition(":")[0] for sig in info.sigs if is_signature(sig)]
        names = list(dict.fromkeys([*names, *(key.name for key in self._keys)]))
        if names:
            return Reason(Code.SIGNED, f"signed by {', '.join(names)}: clients must trust one of these keys")
        if info.ca:
            return Reason(Code.SIGNED, "content-addressed: clients need no signature")
        remedy = "create a key with `harmonia keygen NAME`, and set sign_key_paths"
        return Reason(Code.NOT_SIGNED, "no key has signed it, so clients refuse it", decides=True, remedy=remedy)

    def _closure(self, info: PathInfo) -> Iterator[Reason]:
        """Yield the first faults of the paths that a path needs: without them, Nix downloads nothing."""
        faults = 0
        for path in sorted(queries.closure_hash_parts(self._store, [info.path], MAX_CLOSURE_PATHS)):
            fault = None if path == info.path.hash_part else self._fault_of(path)
            if fault is not None:
                faults += 1
                if faults <= _MAX_FAULTS:
                    yield fault
        if faults > _MAX_FAULTS:
            yield Reason(Code.CLOSURE_INCOMPLETE, f"{faults - _MAX_FAULTS} more paths of its closure are not served")

    def _fault_of(self, hash_part: str) -> Reason | None:
        """Return why a path of the closure is not served, or None."""
        try:
            info = self._store.path_info(hash_part)
        except StoreObjectError as error:
            return Reason(Code.CLOSURE_INCOMPLETE, f"a path of its closure is not served: {error}", decides=True)
        fault = None if info is None else self._fault(info)
        if fault is None:
            return None
        return fault._replace(code=Code.CLOSURE_INCOMPLETE, text=f"a path of its closure is missing: {fault.text}")


def built_instead(store: Store, hash_part: str) -> Reason | None:
    """Return why Nix builds the path even if caches have it, or None if its derivation is unknown or says nothing.

    Raises StoreUnavailableError if the database cannot be read.
    """
    prefix = f"{store.store_dir}/{hash_part}"
    for deriver, output in store.database.query(_DERIVER, f"{prefix}-", f"{prefix}."):
        with (
            suppress(OSError, FormatError),
            open(store.real_path(StorePath.in_dir(store.store_dir, deriver)), "rb") as file,
        ):
            if not derivation.allows_substitutes(file.read(_MAX_DERIVATION_BYTES)):
                text = f"{deriver} sets allowSubstitutes = false, so Nix builds it without asking caches"
                remedy = (
                    f"set always-allow-substitutes = true in the client's nix.conf, or nix-store --realise {output}"
                )
                return Reason(Code.BUILT_INSTEAD, text, remedy=remedy)
    return None


def decisive(reasons: Sequence[Reason]) -> Reason | None:
    """Return the reason for which clients cannot use the path, or None if they can."""
    return next((reason for reason in reasons if reason.decides), None)

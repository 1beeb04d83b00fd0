"""Checks of narinfos and their signatures."""

from collections.abc import Generator, Sequence

from harmonia.errors import FormatError
from harmonia.nix import narinfo
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import PublicKey
from harmonia.tools.doctor.answer import caching
from harmonia.tools.doctor.finding import Finding
from harmonia.tools.http_client import Client


def fetch(client: Client, sample: str, store_dir: str) -> Generator[Finding, None, tuple[PathInfo, NarFile] | None]:
    """Fetch and parse a narinfo. Return its parts, or None after an error."""
    name = f"{sample[:32]}.narinfo"
    answer = client.get(name)
    if answer.headers.get("content-encoding"):
        coding = answer.headers["content-encoding"]
        remedy = "send it without Content-Encoding unless the client accepts one"
        yield Finding(
            "narinfo", "error", f"{name} has Content-Encoding: {coding}, which the client did not request", remedy
        )
        return None
    try:
        info, file = narinfo.parse(answer.body.decode(), store_dir)
    except (FormatError, UnicodeDecodeError) as error:
        remedy = "write it again, for example with `nix copy --to`: each line is `Name: value` and a newline"
        yield Finding("narinfo", "error", f"{name}: {error}", remedy)
        return None
    if sample not in (info.path, info.path.hash_part):
        remedy = "if you meant that path, pass its name; otherwise delete the narinfo: Nix treats the path as missing"
        yield Finding("narinfo", "error", f"{name}, requested for {sample}, describes {info.path}", remedy)
        return None
    yield Finding("narinfo", "ok", f"{info.path}: the narinfo is valid")
    yield from caching(client, name, answer, 0)
    return info, file


def signatures(info: PathInfo, keys: Sequence[PublicKey], store_dir: str) -> Finding:
    """Check that a trusted key has signed the path, as a client does."""
    fingerprint = info.fingerprint(store_dir)
    by_name = {key.name: key for key in reversed(keys)}  # the first key of a name counts, as in Nix
    names = [sig.partition(":")[0] for sig in info.sigs]
    good = [
        name
        for name, sig in zip(names, info.sigs, strict=True)
        if name in by_name and by_name[name].verify(fingerprint, sig)
    ]
    bad = [name for name in names if name in by_name and name not in good]
    if bad:
        remedy = "check that the public key belongs to the server's secret key, and sign again: nix store sign"
        return Finding("signatures", "error", f"{info.path}: the signature by {bad[0]} is wrong", remedy)
    if good:
        return Finding("signatures", "ok", f"{info.path}: signed by {', '.join(good)}")
    if info.ca is not None:
        return Finding("signatures", "ok", f"{info.path}: content-addressed, needs no signature")
    if names:
        what = f"{info.path}: signed by {', '.join(dict.fromkeys(names))}, whose public key is unknown here"
        remedy = "add the key to extra-trusted-public-keys in nix.conf; `harmonia doctor` also takes it by --public-key"
        return Finding("signatures", "warning", what, remedy)
    remedy = (
        "sign it: set sign_key_paths (Harmonia), or use `nix store sign --key-file`; `harmonia keygen` creates a key"
    )
    return Finding("signatures", "error", f"{info.path}: no signature, so clients reject it", remedy)

"""Narinfos, and whether their signatures will satisfy."""

from collections.abc import Generator, Sequence

from harmonia.errors import FormatError
from harmonia.nix import narinfo
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import PublicKey
from harmonia.tools.doctor.answer import caching
from harmonia.tools.doctor.finding import Finding
from harmonia.tools.http_client import Client


def read(client: Client, sample: str, store_dir: str) -> Generator[Finding, None, tuple[PathInfo, NarFile] | None]:
    name = f"{sample[:32]}.narinfo"
    answer = client.get(name)
    if answer.headers.get("content-encoding"):
        coding = answer.headers["content-encoding"]
        remedy = "send it unencoded to those who do not ask for an encoding"
        yield Finding("narinfo", "error", f"{name} is encoded as {coding}, which nobody asked for", remedy)
        return None
    try:
        info, file = narinfo.parse(answer.body.decode(), store_dir)
    except (FormatError, UnicodeDecodeError) as error:
        remedy = "write it anew, as `nix copy --to` does: each line is a name, a colon, a space, a value and a line end"
        yield Finding("narinfo", "error", f"{name}: {error}", remedy)
        return None
    if sample not in (info.path, info.path.hash_part):
        remedy = "name it so, if that is what you meant; else remove that narinfo: Nix takes the path for not there"
        yield Finding("narinfo", "error", f"{name}, asked for {sample}, tells of {info.path}", remedy)
        return None
    yield Finding("narinfo", "ok", f"{info.path}: its narinfo is as Nix wants it")
    yield from caching(client, name, answer, 0)
    return info, file


def signatures(info: PathInfo, keys: Sequence[PublicKey], store_dir: str) -> Finding:
    fingerprint = info.fingerprint(store_dir)
    by_name = {key.name: key for key in reversed(keys)}  # as for Nix, the first of a name counts
    names = [sig.partition(":")[0] for sig in info.sigs]
    good = [
        name
        for name, sig in zip(names, info.sigs, strict=True)
        if name in by_name and by_name[name].verify(fingerprint, sig)
    ]
    bad = [name for name in names if name in by_name and name not in good]
    if bad:
        remedy = "see that the public key is that of the server's secret key, and sign anew: nix store sign"
        return Finding("signatures", "error", f"{info.path}: the signature by {bad[0]} is wrong", remedy)
    if good:
        return Finding("signatures", "ok", f"{info.path}: signed by {', '.join(good)}")
    if info.ca is not None:
        return Finding("signatures", "ok", f"{info.path}: content-addressed, so that it needs no signature")
    if names:
        what = f"{info.path}: signed by {', '.join(dict.fromkeys(names))}, whose public key is not known here"
        remedy = (
            "give the key with --public-key, or in nix.conf: extra-trusted-public-keys; else clients refuse the path"
        )
        return Finding("signatures", "warning", what, remedy)
    remedy = "sign it: set sign_key_paths (Harmonia), or `nix store sign --key-file`; `harmonia keygen` makes a key"
    return Finding("signatures", "error", f"{info.path}: no signature, so that clients refuse it", remedy)

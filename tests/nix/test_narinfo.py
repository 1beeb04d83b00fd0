import base64
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from harmonia.errors import FormatError
from harmonia.nix import base32, narinfo
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.nix.store_path import StorePath
from support import narinfos
from support.narinfos import GOLDEN, changed
from support.strategies import STORE_DIR, content_addresses, digests, path_infos, sigs

KEY = SecretKey.parse("test-1:MwghEDPsIZshZ5bOUvgeBbJhGkkXJGlet7RuVxpOzRguRiFB1/bierBd8R9WouqhpGv3TMOaMTC32vzr2BFaAw==")
NAR_HASH = base32.decode("1mx17j51kwn7kb7rf1fgm5cr9sk8lyrl69f9brqa4d02bn2gjaj6")
INFO = PathInfo(
    path=StorePath("1dvdsyn9d7z6wfrkpxw28nj59kflfxyz-top-1.0"),
    nar_hash=NAR_HASH,
    nar_size=5000768,
    references=(
        StorePath("1dvdsyn9d7z6wfrkpxw28nj59kflfxyz-top-1.0"),
        StorePath("pays67jzjqfi6vmvngybskaiqsww24a0-dep-1.0"),
    ),
    deriver=StorePath("0cbibmsh8gdw1fwnjvh2n9fghv0ggxfk-top-1.0.drv"),
)
INFO_SIGS = (GOLDEN.partition("Sig: ")[2].strip(),)

nar_files = st.builds(
    NarFile,
    url=st.sampled_from(["nar/x.nar", "nar/x.nar.zst", "nar/x.nar?hash=abc"]),
    compression=st.sampled_from(["none", "zstd", "xz"]),
    file_hash=st.none() | digests,
    file_size=st.none() | st.integers(1, 2**64 - 1),
)
secret_keys = st.builds(SecretKey, st.sampled_from(["a-1", "b-1"]), st.binary(min_size=32, max_size=32).map(SigningKey))


def parse(text: str) -> list[tuple[str, str]]:
    """Parse as Nix does: a name up to the colon, one ignored character, a value up to the end of the line."""
    fields = []
    while text:
        name, _, text = text.partition(":")
        value, newline, text = text[1:].partition("\n")
        assert newline
        fields.append((name, value))
    return fields


def test_rendered_narinfo_equals_that_of_nix() -> None:
    nar = NarFile(
        url="nar/1mx17j51kwn7kb7rf1fgm5cr9sk8lyrl69f9brqa4d02bn2gjaj6.nar", file_hash=NAR_HASH, file_size=5000768
    )
    assert narinfo.render(INFO, STORE_DIR, nar, narinfo.signatures(INFO, STORE_DIR, [KEY])) == GOLDEN


@given(path_infos(), nar_files, st.lists(sigs, max_size=3))
def test_fields_are_complete_and_in_the_order_of_nix(info: PathInfo, nar: NarFile, sigs: list[str]) -> None:
    expected = [
        ("StorePath", f"/nix/store/{info.path}"),
        ("URL", nar.url),
        ("Compression", nar.compression),
        ("FileHash", nar.file_hash and "sha256:" + base32.encode(nar.file_hash)),
        ("FileSize", None if nar.file_size is None else str(nar.file_size)),
        ("NarHash", "sha256:" + base32.encode(info.nar_hash)),
        ("NarSize", str(info.nar_size)),
        ("References", " ".join(info.references)),
        ("Deriver", info.deriver),
        *(("Sig", sig) for sig in sigs),
        ("CA", info.ca),
    ]
    text = narinfo.render(info, STORE_DIR, nar, sigs)
    assert parse(text) == [field for field in expected if field[1] is not None]


def test_empty_references_are_rendered_with_a_space() -> None:
    """If a colon ended its line, Nix would take the next line for the value."""
    text = narinfo.render(replace(INFO, references=()), STORE_DIR, NarFile("nar/x.nar"), [])
    assert "\nReferences: \nDeriver: " in text


@given(path_infos(), content_addresses, st.lists(secret_keys, max_size=3))
def test_signatures_are_sorted_and_unique(info: PathInfo, ca: str, keys: list[SecretKey]) -> None:
    ours = {key.sign(info.fingerprint(STORE_DIR)) for key in keys}
    stored = replace(info, sigs=(*info.sigs, *ours, *info.sigs), ca=ca)
    assert narinfo.signatures(stored, STORE_DIR, keys) == sorted(ours | set(info.sigs))


@given(path_infos(), st.sampled_from([STORE_DIR, "/gnu/store"]))
def test_our_signature_signs_the_fingerprint(info: PathInfo, store_dir: str) -> None:
    references = ",".join(f"{store_dir}/{reference}" for reference in info.references)
    nar_hash = base32.encode(info.nar_hash)
    signed = f"1;{store_dir}/{info.path};sha256:{nar_hash};{info.nar_size};{references}".encode()
    (sig,) = narinfo.signatures(replace(info, sigs=()), store_dir, [KEY])
    assert KEY.public_key.verify(signed, sig)


@pytest.mark.parametrize(
    "change",
    [
        lambda info: replace(info, path=StorePath(f"{'0' * 32}-top-1.0")),
        lambda info: replace(info, nar_hash=bytes(32)),
        lambda info: replace(info, nar_size=1),
        lambda info: replace(info, references=info.references[:1]),
    ],
    ids=["path", "nar_hash", "nar_size", "references"],
)
def test_signature_does_not_verify_a_changed_path_info(change: Callable[[PathInfo], PathInfo]) -> None:
    (sig,) = narinfo.signatures(INFO, STORE_DIR, [KEY])
    assert not KEY.public_key.verify(change(INFO).fingerprint(STORE_DIR), sig)


@pytest.mark.parametrize(
    "malformed",
    [
        "",
        ":",
        "no-colon",
        "a-1:",
        "a-1:not base64",
        "a-1:" + base64.b64encode(bytes(63)).decode(),
        "a-1:" + base64.b64encode(bytes(65)).decode(),
        ":" + base64.b64encode(bytes(64)).decode(),
        "a-1:" + base64.b64encode(bytes(64)).decode() + "\nStorePath: /nix/store/other",
    ],
)
def test_malformed_stored_signature_is_omitted(malformed: str) -> None:
    good = "a-1:" + base64.b64encode(bytes(64)).decode()
    assert narinfo.signatures(replace(INFO, sigs=(malformed, good)), STORE_DIR, []) == [good]


@given(path_infos(), nar_files, st.lists(secret_keys, max_size=3))
def test_parse_is_the_inverse_of_render(info: PathInfo, nar: NarFile, keys: list[SecretKey]) -> None:
    sigs = narinfo.signatures(info, STORE_DIR, keys)
    given = replace(info, sigs=tuple(sigs))
    assert narinfo.parse(narinfo.render(given, STORE_DIR, nar, sigs), STORE_DIR) == (given, nar)


def test_narinfo_of_nix_is_parsed() -> None:
    info, nar = narinfo.parse(GOLDEN, STORE_DIR)
    assert KEY.public_key.verify(info.fingerprint(STORE_DIR), info.sigs[0])
    assert replace(info, sigs=()) == INFO
    assert (nar.compression, nar.file_hash, nar.file_size) == ("none", NAR_HASH, 5000768)


@given(path_infos(), nar_files, st.lists(sigs, max_size=3))
def test_json_has_the_same_values_as_the_text(info: PathInfo, nar: NarFile, sigs: list[str]) -> None:
    rendered = json.loads(narinfo.render_json(info, STORE_DIR, nar, sigs))

    def digest(sri: str | None) -> bytes | None:
        assert sri is None or sri.startswith("sha256-")
        return sri and base64.b64decode(sri.removeprefix("sha256-"), validate=True)  # type: ignore[return-value]

    assert rendered.pop("ca") == (
        info.ca and {"method": JSON_METHODS[info.ca.rpartition(":sha256:")[0]], "hash": ca_hash(info)}
    )
    assert replace(info, ca=None, sigs=()) == PathInfo(
        path=StorePath(rendered.pop("path")),
        nar_hash=digest(rendered.pop("narHash")) or b"",
        nar_size=rendered.pop("narSize"),
        references=tuple(map(StorePath, rendered.pop("references"))),
        deriver=StorePath(deriver) if (deriver := rendered.pop("deriver")) else None,
    )
    assert nar == NarFile(
        rendered.pop("url"),
        rendered.pop("compression"),
        digest(rendered.pop("downloadHash", None)),
        rendered.pop("downloadSize", None),
    )
    assert [f"{each['keyName']}:{each['sig']}" for each in rendered.pop("signatures")] == sigs
    assert rendered == {"version": 3, "storeDir": STORE_DIR, "registrationTime": None, "ultimate": False}


JSON_METHODS = {"text": "text", "fixed": "flat", "fixed:r": "nar"}


def ca_hash(info: PathInfo) -> str:
    digest = base32.decode((info.ca or "").rpartition(":")[2])
    return f"sha256-{base64.b64encode(digest).decode()}"


@pytest.mark.parametrize(
    ("ca", "method", "value"),
    [
        ("fixed:md5:" + "0" * 26, "flat", "md5-" + "A" * 22 + "=="),
        ("fixed:git:sha1:" + "0" * 39 + "1", "git", "sha1-" + "A" * 26 + "E="),
        ("fixed:r:sha512:" + "0" * 103, "nar", "sha512-" + "A" * 86 + "=="),
        ("text:sha256:" + "0" * 64, "text", "sha256-" + "A" * 43 + "="),
    ],
)
def test_json_has_the_content_address(ca: str, method: str, value: str) -> None:
    rendered = json.loads(narinfo.render_json(replace(INFO, ca=ca), STORE_DIR, NarFile("nar/x.nar"), []))
    assert rendered["ca"] == {"method": method, "hash": value}


@pytest.mark.parametrize(
    "ca", ["x", "text:", "fixed:r", "fixed:r:sha256:x", "fixed:x:sha256:" + "0" * 52, "text:sha0:0"]
)
def test_malformed_content_address_is_not_rendered_as_json(ca: str) -> None:
    with pytest.raises(FormatError):
        narinfo.render_json(replace(INFO, ca=ca), STORE_DIR, NarFile("nar/x.nar"), [])


@pytest.mark.parametrize("text", narinfos.ACCEPTED.values(), ids=narinfos.ACCEPTED)
def test_narinfo_accepted_by_nix_is_accepted(text: str) -> None:
    narinfo.parse(text, STORE_DIR)


@pytest.mark.parametrize("text", narinfos.REJECTED.values(), ids=narinfos.REJECTED)
def test_narinfo_rejected_by_nix_is_rejected(text: str) -> None:
    with pytest.raises(FormatError):
        narinfo.parse(text, STORE_DIR)


@pytest.mark.parametrize("text", narinfos.UNUSABLE.values(), ids=narinfos.UNUSABLE)
def test_unusable_narinfo_is_rejected(text: str) -> None:
    with pytest.raises(FormatError):
        narinfo.parse(text, STORE_DIR)


@pytest.mark.parametrize(
    "spelling",
    [
        NAR_HASH.hex(),
        NAR_HASH.hex().upper(),
        base32.encode(NAR_HASH),
        base64.b64encode(NAR_HASH).decode(),
    ],
)
def test_hash_in_every_base_is_parsed(spelling: str) -> None:
    for text in (f"sha256:{spelling}", *([f"sha256-{spelling}"] if spelling.endswith("=") else [])):
        assert narinfo.parse(changed("NarHash", f"NarHash: {text}"), STORE_DIR)[0].nar_hash == NAR_HASH
        assert narinfo.parse(changed("FileHash", f"FileHash: {text}"), STORE_DIR)[1].file_hash == NAR_HASH


def test_values_of_unusual_accepted_narinfos() -> None:
    def parsed(name: str) -> tuple[PathInfo, NarFile]:
        return narinfo.parse(narinfos.ACCEPTED[name], STORE_DIR)

    assert parsed("deriver unknown")[0].deriver is None
    assert parsed("deriver absent")[0].deriver is None
    assert parsed("compression absent")[1].compression == "bzip2"
    assert parsed("compression empty")[1].compression == "bzip2"
    assert parsed("references empty")[0].references == ()
    assert parsed("character after the colon")[1].url == "nar/x.nar"
    assert parsed("NarSize twice")[0].nar_size == 2
    assert parsed("NarSize plus")[0].nar_size == 7
    assert parsed("FileSize 0")[1].file_size is None
    assert parsed("FileHash sha512")[1].file_hash is None
    assert parsed("Sig odd beside a good one")[0].sigs == INFO_SIGS
    assert parsed("StorePath not canonical")[0].path == INFO.path


@given(st.text() | st.text(alphabet="SNURLig: \n/ax0").map(GOLDEN.__add__))
def test_arbitrary_text_raises_only_format_error(text: str) -> None:
    with suppress(FormatError):
        narinfo.parse(text, STORE_DIR)

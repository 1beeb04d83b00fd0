import base64
import pickle
import subprocess
import textwrap
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from harmonia.errors import FormatError
from harmonia.nix.signing import PublicKey, SecretKey, is_signature
from support.strategies import key_names, sigs

# Made by Nix, for tests only.
SECRET = "test-1:MwghEDPsIZshZ5bOUvgeBbJhGkkXJGlet7RuVxpOzRguRiFB1/bierBd8R9WouqhpGv3TMOaMTC32vzr2BFaAw=="
PUBLIC = "test-1:LkYhQdf24nqwXfEfVqLqoaRr90zDmjEwt9r869gRWgM="
FINGERPRINT = (
    b"1;/nix/store/1dvdsyn9d7z6wfrkpxw28nj59kflfxyz-top-1.0"
    b";sha256:1mx17j51kwn7kb7rf1fgm5cr9sk8lyrl69f9brqa4d02bn2gjaj6;5000768"
    b";/nix/store/1dvdsyn9d7z6wfrkpxw28nj59kflfxyz-top-1.0,/nix/store/pays67jzjqfi6vmvngybskaiqsww24a0-dep-1.0"
)
SIGNATURE = "test-1:33AouZhAz8/7tSw1acMeA3zZG7zB+rupulnk/vDUbRs69Y+xHqOxTDVfGjZ/L2sxnSArc8OEfwKH+KGEz8ZlBA=="

seeds = st.binary(min_size=32, max_size=32)
secret_keys = st.builds(SecretKey, key_names, seeds.map(SigningKey))


def join(name: str, value: bytes) -> str:
    return f"{name}:{base64.b64encode(value).decode()}"


def test_signature_equals_that_of_nix() -> None:
    key = SecretKey.parse(SECRET)
    assert key.sign(FINGERPRINT) == SIGNATURE
    assert str(key.public_key) == PUBLIC
    assert PublicKey.parse(PUBLIC).verify(FINGERPRINT, SIGNATURE)


@pytest.mark.nix
def test_keys_made_by_nix_are_parsed_and_exported_unchanged(tmp_path: Path) -> None:
    secret, public = tmp_path / "secret", tmp_path / "public"
    subprocess.run(["nix-store", "--generate-binary-cache-key", "cache.example.org-1", secret, public], check=True)
    key = SecretKey.parse(secret.read_text())
    assert key.name == "cache.example.org-1"
    assert key.export() == secret.read_text()
    assert str(key.public_key) == public.read_text()


@given(secret_keys, st.binary())
def test_keys_and_signatures_round_trip(key: SecretKey, message: bytes) -> None:
    assert SecretKey.parse(key.export()) == key
    assert PublicKey.parse(str(key.public_key)) == key.public_key
    signature = key.sign(message)
    assert is_signature(signature)
    assert key.public_key.verify(message, signature)


@given(secret_keys, st.binary(), st.binary())
def test_signature_does_not_verify_another_message(key: SecretKey, message: bytes, other: bytes) -> None:
    assume(message != other)
    assert not key.public_key.verify(other, key.sign(message))


@given(secret_keys, key_names, seeds)
def test_signature_does_not_verify_with_another_key_or_key_name(key: SecretKey, name: str, seed: bytes) -> None:
    assume(name != key.name)
    assume(seed != bytes(key.key))
    other_key, renamed_key = SecretKey(key.name, SigningKey(seed)), SecretKey(name, key.key)
    assert not other_key.public_key.verify(b"message", key.sign(b"message"))
    assert not renamed_key.public_key.verify(b"message", key.sign(b"message"))


@pytest.mark.parametrize("signature", ["", ":", "test-1", "test-1:", "test-1:AAAA", "test-1:!", SIGNATURE[7:]])
def test_malformed_signature_verifies_nothing(signature: str) -> None:
    assert not PublicKey.parse(PUBLIC).verify(FINGERPRINT, signature)


@given(secret_keys, st.integers(1, 30), st.integers(0, 2))
def test_line_breaks_and_missing_padding_in_keys_are_tolerated(key: SecretKey, width: int, padding: int) -> None:
    name, encoded = key.export().split(":")
    lines = textwrap.wrap(encoded.rstrip("=") + "=" * padding, width)
    assert SecretKey.parse(name + ":" + "\n".join(lines) + "\n") == key
    assert PublicKey.parse(str(key.public_key).rstrip("=") + "\n") == key.public_key


@given(key_names, st.binary(max_size=100))
def test_wrong_key_and_signature_lengths_are_rejected(name: str, value: bytes) -> None:
    assert is_signature(join(name, value)) == (len(value) == 64)
    if len(value) != 64:
        with pytest.raises(FormatError, match=f"has {len(value)} bytes after its colon instead of 64"):
            SecretKey.parse(join(name, value))
    if len(value) != 32:
        with pytest.raises(FormatError, match=f"has {len(value)} bytes after its colon instead of 32"):
            PublicKey.parse(join(name, value))


@given(sigs, st.integers(0, 84), st.sampled_from("*-_é\0"))
def test_signature_with_a_digit_outside_base64_is_rejected(sig: str, position: int, digit: str) -> None:
    name, encoded = sig.split(":")
    assert not is_signature(f"{name}:{encoded[:position]}{digit}{encoded[position + 1 :]}")


@given(sigs, st.integers(0), st.sampled_from(["\n", "\r\n", " ", "\t", "\x85", "\u2028"]))
def test_signature_with_whitespace_is_rejected(sig: str, position: int, space: str) -> None:
    position %= len(sig) + 1
    assert not is_signature(sig[:position] + space + sig[position:])


@given(secret_keys, seeds)
def test_secret_key_with_the_public_half_of_another_is_rejected(key: SecretKey, other: bytes) -> None:
    assume(other != bytes(key.key.verify_key))
    with pytest.raises(FormatError, match="do not belong together"):
        SecretKey.parse(join(key.name, bytes(key.key) + other))


@given(secret_keys)
def test_secret_is_in_no_repr_and_no_error(key: SecretKey) -> None:
    secret = key.export()
    encoded = secret.partition(":")[2]
    shown = [repr(key), str(key), f"{key}", repr([key])]
    damaged = [
        encoded,  # no name
        ":" + encoded,
        encoded + ":",  # name on the wrong side
        secret + "AAAA",
        secret[:-9],
        secret.replace(":", ":*"),
        join(key.name, bytes(key.key) + bytes(32)),
    ]
    for text in damaged:
        with pytest.raises(FormatError) as caught:
            SecretKey.parse(text)
        shown += [str(caught.value), repr(caught.value)]
    assert not [text for text in shown if encoded[:20] in text or repr(bytes(key.key)) in text]


def test_secret_key_survives_pickling() -> None:
    key = SecretKey.generate("test-1")
    assert pickle.loads(pickle.dumps(key)) == key

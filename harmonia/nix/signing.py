"""Ed25519 keys and signatures as `name:base64` (Nix `src/libutil/signature/local-keys.cc`)."""

import binascii
from dataclasses import dataclass, field
from typing import Self

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from harmonia.errors import FormatError

SIGNATURE_BYTES = 64


def _split(text: str, size: int, what: str) -> tuple[str, bytes]:
    """The name and the bytes of `name:base64`. No message shows any of it: a secret may be where the name should."""
    name, colon, encoded = text.partition(":")
    if not (name and colon) or any(character.isspace() for character in name):
        raise FormatError(f"a {what} has the form name:base64")
    encoded = "".join(encoded.split())
    try:
        # Nix's own decoder tolerates line breaks and missing padding.
        value = binascii.a2b_base64(encoded + "=" * (-len(encoded) % 4), strict_mode=True)
    except ValueError:
        raise FormatError(f"the {what} is not base64 after its colon") from None
    if len(value) != size:
        raise FormatError(f"the {what} has {len(value)} bytes after its colon instead of {size}")
    return name, value


def _join(name: str, value: bytes) -> str:
    return f"{name}:{binascii.b2a_base64(value, newline=False).decode()}"


def is_signature(text: str) -> bool:
    """Whether Nix ≥ 2.34 would accept `text` as a signature: it refuses a narinfo for a single bad one."""
    try:
        _split(text, SIGNATURE_BYTES, "signature")
    except FormatError:
        return False
    return not any(character.isspace() for character in text)


@dataclass(frozen=True, slots=True)
class PublicKey:
    name: str
    key: VerifyKey

    @classmethod
    def parse(cls, text: str) -> Self:
        name, value = _split(text.strip(), 32, "public key")
        return cls(name, VerifyKey(value))

    def __str__(self) -> str:
        return _join(self.name, bytes(self.key))

    def verify(self, message: bytes, signature: str) -> bool:
        """Whether `signature` is this key's, by name and by content."""
        if not signature.startswith(f"{self.name}:"):  # it takes 0.1 ms to see that another key made it
            return False
        try:
            _, value = _split(signature, SIGNATURE_BYTES, "signature")
            self.key.verify(message, value)
        except (FormatError, BadSignatureError):
            return False
        return True


@dataclass(frozen=True, slots=True)
class SecretKey:
    name: str
    key: SigningKey = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """A key file's content: 64 bytes, the seed and the public key. FormatError also where the two do not fit."""
        name, value = _split(text.strip(), 64, "secret key")
        key = SigningKey(value[:32])
        if bytes(key.verify_key) != value[32:]:
            raise FormatError("the secret key is damaged: its two halves do not belong together")
        return cls(name, key)

    @classmethod
    def generate(cls, name: str) -> Self:
        return cls(name, SigningKey.generate())

    def export(self) -> str:
        """The content of its key file, as `nix-store --generate-binary-cache-key` writes it."""
        return _join(self.name, bytes(self.key) + bytes(self.key.verify_key))

    @property
    def public_key(self) -> PublicKey:
        return PublicKey(self.name, self.key.verify_key)

    def sign(self, message: bytes) -> str:
        return _join(self.name, self.key.sign(message).signature)

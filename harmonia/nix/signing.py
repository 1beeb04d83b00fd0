"""Ed25519 keys and signatures in the form `name:base64` (Nix `src/libutil/signature/local-keys.cc`)."""

import binascii
from dataclasses import dataclass, field
from typing import Self

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from harmonia.errors import FormatError

SIGNATURE_BYTES = 64


def _split(text: str, size: int, what: str) -> tuple[str, bytes]:
    """Return the name and the bytes of `name:base64`.

    Raises FormatError if `text` is malformed or has another number of bytes than `size`. The message never quotes
    `text`, because a secret may stand in the place of the name.
    """
    name, colon, encoded = text.partition(":")
    if not (name and colon) or any(character.isspace() for character in name):
        raise FormatError(f"a {what} has the form name:base64")
    encoded = "".join(encoded.split())
    try:
        # Nix's decoder accepts line breaks and missing padding.
        value = binascii.a2b_base64(encoded + "=" * (-len(encoded) % 4), strict_mode=True)
    except ValueError:
        raise FormatError(f"the {what} is not base64 after its colon") from None
    if len(value) != size:
        raise FormatError(f"the {what} has {len(value)} bytes after its colon instead of {size}")
    return name, value


def _join(name: str, value: bytes) -> str:
    return f"{name}:{binascii.b2a_base64(value, newline=False).decode()}"


def is_signature(text: str) -> bool:
    """Return True if `text` is well-formed. Nix ≥ 2.34 refuses a whole narinfo because of one malformed signature."""
    try:
        _split(text, SIGNATURE_BYTES, "signature")
    except FormatError:
        return False
    return text.split() == [text]  # no white space


@dataclass(frozen=True, slots=True)
class PublicKey:
    name: str
    key: VerifyKey

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the key `name:base64`.

        Raises FormatError if `text` is malformed.
        """
        name, value = _split(text.strip(), 32, "public key")
        return cls(name, VerifyKey(value))

    def __str__(self) -> str:
        return _join(self.name, bytes(self.key))

    def verify(self, message: bytes, signature: str) -> bool:
        """Return True if this key made `signature` for `message`. The name of the key must match, too."""
        if not signature.startswith(f"{self.name}:"):  # saves the 0.1 ms that a verification takes
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
        """Return the key in a key file's content: a name, and 64 bytes of seed and public key.

        Raises FormatError if `text` is malformed, or if the public key does not belong to the seed.
        """
        name, value = _split(text.strip(), 64, "secret key")
        key = SigningKey(value[:32])
        if bytes(key.verify_key) != value[32:]:
            raise FormatError("the secret key is damaged: its two halves do not belong together")
        return cls(name, key)

    @classmethod
    def generate(cls, name: str) -> Self:
        """Return a new random key."""
        return cls(name, SigningKey.generate())

    def export(self) -> str:
        """Return the content of a key file, as `nix-store --generate-binary-cache-key` writes it."""
        return _join(self.name, bytes(self.key) + bytes(self.key.verify_key))

    @property
    def public_key(self) -> PublicKey:
        return PublicKey(self.name, self.key.verify_key)

    def sign(self, message: bytes) -> str:
        """Return the signature of a message as `name:base64`."""
        return _join(self.name, self.key.sign(message).signature)

"""Public and secret keys and signatures: accepted ones are exported unchanged, and no error quotes a rejected one."""

from harmonia.errors import FormatError
from harmonia.nix.signing import PublicKey, SecretKey, is_signature

WORDS = [b"cache.example.org-1:", b"=", b"==", b"\n", b" ", b"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="]


def check(data: bytes) -> bool:
    text = data.decode("utf-8", "surrogateescape")
    accepted = False
    for kind in (PublicKey, SecretKey):
        try:
            key = kind.parse(text)
        except FormatError as error:
            hidden = text.partition(":")[2].strip()
            assert len(hidden) < 12 or hidden not in str(error)
            continue
        accepted = True
        if isinstance(key, SecretKey):
            exported = key.export()
            assert key.public_key.verify(b"message", key.sign(b"message"))
            assert exported.partition(":")[2] not in repr(key)
        else:
            exported = str(key)
        assert kind.parse(exported) == key
    if is_signature(text):
        accepted = True
        assert not PublicKey.parse("a:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=").verify(b"", text)
    return accepted

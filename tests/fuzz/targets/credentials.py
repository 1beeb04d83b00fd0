"""A netrc(5), or a file with user and password: gives an Authorization, or an error that quotes neither."""

import base64
import os
import tempfile

from harmonia.config import credentials, loader
from harmonia.errors import ConfigError

WORDS = [b"machine ", b"default ", b"login ", b"password ", b"account ", b"macdef ", b"cache.example.org", b"\n", b"#"]

_DIRECTORY = tempfile.mkdtemp()
_FILE = os.path.join(_DIRECTORY, "file")


def check(data: bytes) -> bool:
    with open(_FILE, "wb") as file:
        file.write(data)
    accepted = False
    for key in ("netrc", "credentials_file"):
        text = f"[[upstream]]\nurl = 'https://cache.example.org'\n{key} = '{_FILE}'\n"
        settings = loader.parse(text, "file", {"HOME": "/home"})
        try:
            authorization = credentials.authorization(settings, 0)
        except ConfigError as error:
            assert str(error).isprintable()
            assert all(word not in str(error) for word in data.decode("utf-8", "replace").split() if len(word) > 11)
            continue
        if authorization is None:
            assert key == "netrc"  # the netrc has no entry for this host
            continue
        user, _, password = (
            base64.b64decode(authorization.removeprefix("Basic ")).decode(errors="replace").partition(":")
        )
        assert user or password or b'""' in data
        accepted = True
    return accepted

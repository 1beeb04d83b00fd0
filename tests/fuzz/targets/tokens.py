"""Token files and Authorization headers: no error quotes a line, and only the secret itself finds its token."""

import re
from types import SimpleNamespace

from harmonia.config.tokens import Tokens, parse
from harmonia.errors import FormatError
from harmonia.server.http.auth import presented

WORDS = [b" read ", b" browse,metrics ", b"sha256:", b"0123456789abcdef" * 4, b"#", b"\nBearer ", b"\nBasic dTpw", b":"]


def check(data: bytes) -> bool:
    """Take the last line as Authorization, and all lines before as the file."""
    file, _, authorization = data.decode("utf-8", "surrogateescape").rpartition("\n")
    secret = presented(SimpleNamespace(headers={"authorization": authorization}))  # type: ignore[arg-type]
    try:
        tokens = parse(file)
    except FormatError as error:
        assert re.fullmatch(r"line [0-9]+: [a-zA-Z0-9 ,;.:_@-]+", str(error))
        return False
    assert Tokens(tokens).find_token(secret) is None
    assert parse("\n".join(map(str, tokens))) == tokens
    return bool(tokens)

"""The kinds of values that settings take: each a type, its words for messages and the reference, and how it is read.

The types say what msgspec can check. The functions raise FormatError for the rest, with what was expected and found.
"""

import ipaddress
import os
import re
import reprlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from harmonia.config import tokens
from harmonia.errors import FormatError
from harmonia.nix.signing import PublicKey
from harmonia.nix.store_path import is_hash_part

_UNIX_PATH_MAX = 107  # unix(7): sun_path has 108 bytes, one of them the final NUL
_PORT_MAX = 65535
_WINDOW_LOG_MIN, _WINDOW_LOG_MAX = 10, 27  # libzstd's least; the most that decoders take unless told otherwise
_WINDOW_LOG = f"0, or an integer from {_WINDOW_LOG_MIN} to {_WINDOW_LOG_MAX}"
_ADDRESS = '"host:port", "[IPv6]:port" or "unix:/path"'
_MODE = 'a string of three or four octal digits, like "0660"'
_SIZE = 'a string like "500M" or "20G": K, M, G, T for KiB to TiB'
_PROXIES = 'an array of IP addresses, networks like "10.0.0.0/8", or "unix"'
_URL = 'a string like "https://cache.example.org" or "https://example.org/nix"'
_SCOPES = "an array of " + ", ".join(f'"{scope}"' for scope in tokens.SCOPES)

_HOST = r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
BASE_URL = re.compile(rf"\Ahttps?://{_HOST}(?:/[A-Za-z0-9._~%-]+)*/?\Z")
"""What can stand unquoted in a shell, in a Nix string and in nix.conf, where people copy it to."""

# Control characters, or a key pasted in the place of its file's path: that must not reach any message.
_NO_PATH = re.compile(r"[\x00-\x1f\x7f]|\A[^/]*:[A-Za-z0-9+/=]{40}")
# What names have, wildcards and sets; an open `[` is no set, for fnmatch.
_PATTERN = re.compile(r"(?:[0-9A-Za-z+\-._?=*]|\[!?\]?[^]]*\])+")

Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0, le=3600)]
Level = Literal["debug", "info", "warning", "error"]
Address = Annotated[str, Meta(extra={"wanted": _ADDRESS})]
Mode = Annotated[str, Meta(pattern=r"\A[0-7]{3,4}\Z", extra={"wanted": _MODE})]
Size = Annotated[str, Meta(pattern=r"\A[0-9]{1,6}[KMGT]\Z", extra={"wanted": _SIZE})]
Url = Annotated[str, Meta(pattern=BASE_URL.pattern, extra={"wanted": _URL})]
AbsolutePath = Annotated[str, Meta(extra={"wanted": "an absolute path"})]
# One that the server reads, and perhaps nobody else may: the NixOS module has systemd hand it over.
File = Annotated[str, Meta(extra={"file": True})]
WindowLog = Annotated[int, Meta(ge=0, le=_WINDOW_LOG_MAX, extra={"wanted": _WINDOW_LOG})]
Proxies = Annotated[tuple[str, ...], Meta(extra={"wanted": _PROXIES})]
Scopes = Annotated[tuple[tokens.Scope, ...], Meta(extra={"wanted": _SCOPES})]

HostAndPort = tuple[str, int]


def address(text: str) -> HostAndPort | str:
    """Host and port, or the path of a unix socket."""
    if text.startswith("unix:"):
        path = re.sub(r"\A//(?=/)", "", text.removeprefix("unix:"))
        if path and not re.match(r"//[^/]", path) and "\0" not in path and len(os.fsencode(path)) <= _UNIX_PATH_MAX:
            return path
    elif match := re.fullmatch(r"(?:\[([^]]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})", text):
        v6, host, port = match.groups()
        try:
            if int(port) <= _PORT_MAX:
                return str(ipaddress.IPv6Address(v6)) if v6 else host, int(port)
        except ValueError:
            pass  # not an IPv6 address: told below
    limits = f"ports to {_PORT_MAX}, socket paths to {_UNIX_PATH_MAX} bytes"
    raise FormatError(f"expected {_ADDRESS} ({limits}), found {reprlib.repr(text)}")


def size(text: str) -> int:
    """A `Size` in bytes."""
    return int(text[:-1]) << 10 * (1 + "KMGT".index(text[-1]))


def check_path(text: str) -> None:
    """What may be a secret is not shown."""
    if not text:
        raise FormatError("expected a path, found an empty string; name one, or remove this")
    if _NO_PATH.search(text):
        raise FormatError("expected a path, found something else (not shown)")
    if text.startswith("~"):
        raise FormatError("expected a path, found one that begins with ~, which only shells expand; write all of it")


def check_absolute(text: str) -> None:
    if not os.path.isabs(text):
        raise FormatError(f"expected an absolute path, found {reprlib.repr(text)}")


def check_pattern(text: str) -> None:
    """That it can match the name of some store path."""
    if not _PATTERN.fullmatch(text) or (is_hash_part(text[:32]) and text[32:33] == "-"):
        what = f"{reprlib.repr(text)} can match no name; a name is a store path without its directory and hash"
        raise FormatError(f"{what}, and has letters, digits and +-._?= alone")


def check_public_key(text: str) -> None:
    try:
        PublicKey.parse(text)
    except FormatError as error:
        raise FormatError(f"{error}, as in nix.conf") from None


def check_proxy(text: str) -> None:
    try:
        text == "unix" or ipaddress.ip_network(text)
    except ValueError as error:
        raise FormatError(f"expected {_PROXIES}: {error}") from None


def check_window_log(number: int) -> None:
    if 0 < number < _WINDOW_LOG_MIN:
        raise FormatError(f"expected {_WINDOW_LOG}, found integer {number}")


def wanted(kind: object) -> str:
    """What a field of this type takes, in the words of error messages and of the reference."""
    schema = msgspec.inspect.type_info(kind)
    while isinstance(schema, msgspec.inspect.Metadata | msgspec.inspect.UnionType):
        if isinstance(schema, msgspec.inspect.UnionType):  # with None, where nothing is given
            schema = next(one for one in schema.types if not isinstance(one, msgspec.inspect.NoneType))
        elif schema.extra and "wanted" in schema.extra:
            return str(schema.extra["wanted"])
        else:
            schema = schema.type
    match schema:
        case msgspec.inspect.IntType(ge=low, le=high):
            return f"an integer, {low} or more" if high is None else f"an integer from {low} to {high}"
        case msgspec.inspect.FloatType(le=high):
            return f"seconds, more than 0 and at most {high}"
        case msgspec.inspect.LiteralType(values=words):
            return "one of " + ", ".join(f'"{word}"' for word in words)
    names: dict[type, str] = {
        msgspec.inspect.BoolType: "true or false",
        msgspec.inspect.VarTupleType: "an array of " + ("tables" if _is_of_tables(schema) else "strings"),
        msgspec.inspect.StructType: "a table",
    }
    return names.get(type(schema), "a string")


def _is_of_tables(schema: object) -> bool:
    return isinstance(schema, msgspec.inspect.VarTupleType) and isinstance(schema.item_type, msgspec.inspect.StructType)

"""Types of the values of settings, with their descriptions for messages and the reference, and their readers.

The types contain the constraints that msgspec can check. The functions check the others: they raise FormatError with
the expected and the actual value.
"""

import ipaddress
import os
import re
import reprlib
from contextlib import suppress
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from harmonia.config import amounts, tokens
from harmonia.errors import FormatError
from harmonia.nix.signing import PublicKey
from harmonia.untrusted import integer

_UNIX_PATH_MAX_BYTES = 107  # unix(7): sun_path has 108 bytes, one of them the final NUL
_MAX_PORT = 65535
_WINDOW_LOG_MIN, _WINDOW_LOG_MAX = 10, 27  # libzstd's minimum; the maximum of decoders with default options
_WINDOW_LOG = f"0, or an integer from {_WINDOW_LOG_MIN} to {_WINDOW_LOG_MAX}"
_ADDRESS = '"host:port", "[IPv6]:port", ":port" or "unix:/path"'
_MODE = 'a string of three or four octal digits, like "0660"'
_SIZE = f"a string like {amounts.SIZE}, or a number of bytes"
_SIZE_MIN_BYTES = 1 << 20  # minimum of a size without a unit: a smaller number lacks its unit
_DURATION: dict[str, Any] = {
    "unit": "seconds",
    "also": f", or a string like {amounts.DURATION}",
    "reader": (str, amounts.duration),
}
_PROXIES = 'an array of IP addresses, networks like "10.0.0.0/8", or "unix"'
_URL = 'a string like "https://cache.example.org" or "https://example.org/nix"'
MIRROR = "mirror"
"""Names the bucket of [mirror] in the place of a URL to upload to."""
_SCOPES = "an array of " + ", ".join(f'"{scope}"' for scope in tokens.SCOPES)

_HOST = r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
BASE_URL = re.compile(rf"\Ahttps?://{_HOST}(?:/[A-Za-z0-9._~%-]+)*/?\Z")
"""URLs that need no quotes in a shell, in a Nix string and in nix.conf, because users copy them there."""

# Control characters, or a key pasted in the place of its file's path. No message may show it.
_NO_PATH = re.compile(r"[\x00-\x1f\x7f]|\A[^/]*:[A-Za-z0-9+/=]{40}")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]*)(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")  # needs no escapes in URLs

Count = Annotated[int, Meta(ge=0)]
# A reader is a type in TOML, and the function that converts it to the type of the field.
Seconds = Annotated[float, Meta(gt=0, le=3600, extra=_DURATION)]
Days = Annotated[int, Meta(extra={**_DURATION, "also": ', or a string like "30d"'})]
WholeSeconds = Annotated[int, Meta(extra=_DURATION)]
Bytes = Annotated[int, Meta(extra={"unit": "bytes", "also": ', or a string like "8K"', "reader": (str, amounts.size)})]
Address = Annotated[str, Meta(extra={"expected": _ADDRESS, "reader": (int, str)})]
Size = Annotated[str, Meta(extra={"expected": _SIZE, "reader": (int, str)})]
Level = Literal["debug", "info", "warning", "error"]
Mode = Annotated[str, Meta(pattern=r"\A[0-7]{3,4}\Z", extra={"expected": _MODE})]
Url = Annotated[str, Meta(pattern=BASE_URL.pattern, extra={"expected": _URL})]
UploadTarget = Annotated[
    str,
    Meta(pattern=rf"\A{MIRROR}\Z|{BASE_URL.pattern}", extra={"expected": f'{_URL}, or "{MIRROR}"'}),
]
Name = Annotated[str, Meta(pattern=r"\A[^\x00-\x1f\x7f]{1,60}\Z", extra={"expected": "one line of 1 to 60 characters"})]
Sentence = Annotated[
    str, Meta(pattern=r"\A[^\x00-\x1f\x7f]{1,300}\Z", extra={"expected": "one line of 1 to 300 characters"})
]
Location = Annotated[
    str, Meta(pattern=r"\A/(?:[A-Za-z0-9._-]+/)+\Z", extra={"expected": 'a path like "/harmonia-nar/"'})
]
AbsolutePath = Annotated[str, Meta(extra={"expected": "an absolute path"})]
# A file that the server reads and others perhaps may not. The NixOS module passes it as a systemd credential.
File = Annotated[str, Meta(extra={"file": True})]
WindowLog = Annotated[int, Meta(ge=0, le=_WINDOW_LOG_MAX, extra={"expected": _WINDOW_LOG})]
Proxies = Annotated[tuple[str, ...], Meta(extra={"expected": _PROXIES})]
Scopes = Annotated[tuple[tokens.Scope, ...], Meta(extra={"expected": _SCOPES})]

HostAndPort = tuple[str, int]
_HOST_AND_PORT = re.compile(r"(?=.)(?:\[([^]]+)\]|([A-Za-z0-9._-]*|\*))(?::([0-9]{1,5}))?")


def address(text: str, default_port: int | None) -> HostAndPort | str:
    """Return host and port, or the path of a unix socket. The default host is `::`, all addresses.

    Raises FormatError if `text` is not an address, or if it has no port and `default_port` is None.
    """
    if text.startswith(("unix:", "/")):
        path = re.sub(r"\A//(?=/)", "", text.removeprefix("unix:"))
        if (
            path
            and not re.match(r"//[^/]", path)
            and "\0" not in path
            and len(os.fsencode(path)) <= _UNIX_PATH_MAX_BYTES
        ):
            return path
    elif match := _HOST_AND_PORT.fullmatch(_bracketed(text)):
        v6, host, port = match.groups()
        if not port and default_port is None:
            raise FormatError(f"expected {_ADDRESS}, found {reprlib.repr(text)} without a port; add one")
        number = integer(port, _MAX_PORT) if port else default_port
        if number is not None and (not v6 or _is_v6(v6)):
            return str(ipaddress.IPv6Address(v6)) if v6 else "::" if host in ("", "*") else host, number
    limits = f"ports to {_MAX_PORT}, socket paths to {_UNIX_PATH_MAX_BYTES} bytes"
    raise FormatError(f"expected {_ADDRESS} ({limits}), found {reprlib.repr(text)}")


def _bracketed(text: str) -> str:
    """Return the address with brackets around an IPv6 address, and with a colon before a port that is alone.

    `::1:5000` is ambiguous: it is a valid IPv6 address, but probably means port 5000. It is returned unchanged, so that
    the caller refuses it.
    """
    if re.fullmatch(r"[0-9]{1,5}", text):
        return f":{text}"
    with_port = re.fullmatch(r"(.+):[0-9]{2,5}", text)
    is_ambiguous = with_port and (with_port[1] == ":" or _is_v6(with_port[1]))
    return f"[{text}]" if _is_v6(text) and not is_ambiguous else text


def _is_v6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def plain(value: object, kind: object) -> object:
    """Return the value as a field of this type stores it: a duration in seconds, a port as text.

    All other values, including wrong ones, are returned unchanged.
    """
    accepted, reader = _inspected(kind)[1].get("reader", (None, None))
    if type(value) is accepted:
        with suppress(FormatError):
            return reader(value)
    return value


def check_size(text: str) -> None:
    """Raise FormatError if `text` is not a size, or if it is a small number, other than 0, without a unit."""
    if amounts.size(text) < _SIZE_MIN_BYTES and re.fullmatch("[0-9.]*[1-9][0-9.]*", text):
        raise FormatError(f"expected {_SIZE}, found {text}, less than one NAR needs; add a unit")


def check_path(text: str) -> None:
    """Raise FormatError if `text` cannot be a path. The message does not show text that may be a secret."""
    if not text:
        raise FormatError("expected a path, found an empty string; name one, or remove this")
    if _NO_PATH.search(text):
        raise FormatError("expected a path, found something else (not shown)")
    if text.startswith("~"):
        raise FormatError("expected a path, found one that begins with ~, which only shells expand; write it in full")


def check_absolute(text: str) -> None:
    """Raise FormatError if `text` is not an absolute path."""
    if not os.path.isabs(text):
        raise FormatError(f"expected an absolute path, found {reprlib.repr(text)}")


def check_bucket(text: str) -> None:
    """Raise FormatError if `text` is not the name of an S3 bucket."""
    if not _BUCKET.fullmatch(text):
        raise FormatError(f"expected 3 to 63 lower-case letters, digits, dots and hyphens, found {reprlib.repr(text)}")


def check_prefix(text: str) -> None:
    """Raise FormatError if `text` is not a folder like `nix` or `caches/nix`."""
    if not _PREFIX.fullmatch(text):
        raise FormatError(f'expected a folder like "caches/nix", found {reprlib.repr(text)}')


def check_public_key(text: str) -> None:
    """Raise FormatError if `text` is not a public key `name:base64`."""
    try:
        PublicKey.parse(text)
    except FormatError as error:
        raise FormatError(f"{error}, as in nix.conf") from None


def check_trusted_proxy(text: str) -> None:
    """Raise FormatError if `text` is not `unix`, an IP address or a network."""
    try:
        text == "unix" or ipaddress.ip_network(text)
    except ValueError as error:
        raise FormatError(f"expected {_PROXIES}: {error}") from None


def check_window_log(number: int) -> None:
    """Raise FormatError if the number is below libzstd's minimum. 0 is allowed."""
    if 0 < number < _WINDOW_LOG_MIN:
        raise FormatError(f"expected {_WINDOW_LOG}, found integer {number}")


def _inspected(kind: object) -> tuple[object, dict[str, Any]]:
    """Return the type without None and metadata, and the extra metadata."""
    schema = msgspec.inspect.type_info(kind)
    extra: dict[str, Any] = {}
    while True:
        if isinstance(schema, msgspec.inspect.UnionType):  # with None, if the field may be left out
            schema = next(one for one in schema.types if not isinstance(one, msgspec.inspect.NoneType))
        elif isinstance(schema, msgspec.inspect.Metadata):
            extra |= schema.extra or {}
            schema = schema.type
        else:
            return schema, extra


def expected(kind: object) -> str:
    """Return the description of the values of this type, for error messages and the reference."""
    schema, extra = _inspected(kind)
    if "expected" in extra:
        return str(extra["expected"])
    unit, also = extra.get("unit", "an integer"), extra.get("also", "")
    match schema:
        case msgspec.inspect.IntType(ge=low, le=high):
            return f"{unit}, {low} or more{also}" if high is None else f"{unit} from {low} to {high}{also}"
        case msgspec.inspect.FloatType(le=high):
            return f"{unit}, more than 0 and at most {high}{also}"
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

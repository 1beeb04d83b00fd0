"""A netrc(5) is parsed like by curl, which Nix uses."""

import base64
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harmonia.config import netrc
from harmonia.errors import FormatError
from support.programs import needs
from support.serving import QuietHandler, ThreadServer

HOST = "127.0.0.1"
OUR_CASES = {
    "no_login": (b"machine 127.0.0.1 password token\n", b":token"),
    "no_login_before_another_machine": (b"machine 127.0.0.1 password token\nmachine b login c password d\n", b":token"),
    "no_password": (b"machine 127.0.0.1 login me\n", b"me:"),
    "no_password_before_another_machine": (b"machine 127.0.0.1 login me\nmachine b login c password d\n", b"me:"),
    "no_login_at_the_end": (b"machine 127.0.0.1 login", None),
    "no_password_at_the_end": (b"machine 127.0.0.1 login me password", b"me:"),
    "neither": (b"machine 127.0.0.1\n", None),
    "another_host": (b"machine other login me password x", None),
    "a_longer_host": (b"machine 127.0.0.12 login me password x", None),
    "a_port": (b"machine 127.0.0.1:80 login me password x", None),
    "empty": (b"", None),
    "a_backslash": (rb"machine 127.0.0.1 login a\b password c\\d\n", rb"a\b:c\\d\n"),
    "quotes": (rb'machine 127.0.0.1 login "a b" password "c\"\\\td#"', b'a b:c"\\\td#'),
    "a_quote_within_a_word": (b'machine 127.0.0.1 login a"b password c"d"', b'a"b:c"d"'),
    "empty_words": (b'machine 127.0.0.1 login "" password "x"', b":x"),
    "an_empty_login": (b'machine 127.0.0.1 login ""', b":"),
    "the_first_counts": (b"machine 127.0.0.1 login a password b\nmachine 127.0.0.1 login c password d\n", b"a:b"),
    "default": (b"machine other login a password b\ndefault login c password d\n", b"c:d"),
    "default_before": (b"default login c password d\nmachine 127.0.0.1 login a password b\n", b"c:d"),
    "default_as_a_value": (b"machine other login default password x", None),
    "machine_as_a_value": (b"machine 127.0.0.1 login machine password default", b"machine:default"),
    "unknown_words": (b"machine 127.0.0.1 foo bar login a account z password b", b"a:b"),
    "a_misspelt_word": (b"machine 127.0.0.1 passwort x", None),
    "the_password_first": (b"machine 127.0.0.1 password b login a", b"a:b"),
    "lines": (b"machine\n127.0.0.1\n\n\tlogin a\n password\nb", b"a:b"),
    "carriage_returns": (b"machine 127.0.0.1\r\nlogin a\r\npassword b\r\n", b"a:b"),
    "cases": (b"MACHINE 127.0.0.1 Login a PASSWORD b", b"a:b"),
    "a_comment": (b" # machine 127.0.0.1 login x password y\nmachine 127.0.0.1 login a password b", b"a:b"),
    "a_hash_in_a_word": (b"machine 127.0.0.1 login a#b password c#", b"a#b:c#"),
    "a_hash_before_a_word": (b"machine 127.0.0.1 login a password #b", b"a:#b"),
    "a_macro": (
        b"macdef x\nmachine 127.0.0.1 login x password y\n \n\nmachine 127.0.0.1 login a password b",
        b"a:b",
    ),
    "a_macro_of_windows": (b"macdef x\r\nput\r\n\r\nmachine 127.0.0.1 login a password b", b"a:b"),
    "a_macro_within": (b"machine 127.0.0.1 login a\nmacdef x\npassword x\n\n", b"a:"),
    "bytes": (b"machine 127.0.0.1 login \xff password \xc3\xa9", b"\xff:\xc3\xa9"),
}
NOT_OF_EVERY_CURL = {
    "no_login_before_another_machine",
    "no_password_before_another_machine",
    "default_as_a_value",
    "a_hash_before_a_word",
    "a_macro_within",
}
"""Cases that releases of curl treat differently; we follow the newest."""


def ours(content: bytes) -> bytes | None:
    found = netrc.authorization(content, HOST)
    return None if found is None else base64.b64decode(found.removeprefix("Basic "))


@pytest.mark.parametrize(("content", "expected"), OUR_CASES.values(), ids=OUR_CASES)
def test_netrc_selects_the_credentials(content: bytes, expected: bytes | None) -> None:
    assert ours(content) == expected


def test_case_of_the_host_does_not_matter() -> None:
    assert netrc.authorization(b"machine Cache.Example.ORG password x", "cache.EXAMPLE.org") == netrc.basic(b"", b"x")


@pytest.mark.parametrize("content", [b'machine 127.0.0.1 login "sesame', b"#" * (netrc.MAX_BYTES + 1)])
def test_netrc_that_curl_cannot_read_is_rejected_and_not_shown(content: bytes) -> None:
    with pytest.raises(FormatError) as error:
        netrc.authorization(content, HOST)
    assert "sesame" not in str(error.value)


class _Echo(QuietHandler):
    """Answers with the credentials of the request."""

    wbufsize = -1  # one packet for each response: with two, TCP would delay the second (RFC 896)

    def do_GET(self) -> None:  # noqa: N802 (name from http.server)
        sent = self.headers.get("Authorization", "none")
        self.send_response(200)
        self.send_header("Content-Length", str(len(sent) + 1))
        self.end_headers()
        self.wfile.write(f"{sent}\n".encode())


@contextmanager
def echo() -> Iterator[str]:
    with ThreadServer((HOST, 0), _Echo) as server:
        yield f"http://{HOST}:{server.server_port}/"


def credentials_from_curl(files: list[bytes], directory: Path) -> list[bytes | None]:
    """Return the credentials that one curl process sends with each of these files."""
    with echo() as url:
        operations = []
        for number, content in enumerate(files):
            (directory / str(number)).write_bytes(content)
            operations.append(f'url = "{url}"\nnetrc-file = "{directory}/{number}"\nsilent\nnoproxy = "*"\n')
        command = ["curl", "--disable", "--config", "-"]
        done = subprocess.run(command, input="next\n".join(operations).encode(), stdout=subprocess.PIPE, check=True)
    lines = done.stdout.splitlines()
    return [None if line == b"none" else base64.b64decode(line.removeprefix(b"Basic ")) for line in lines]


def some_value(chance: random.Random) -> str:
    word = "".join(chance.choices('abAB01#"\\=:;,.$%é', k=chance.randint(1, 8)))
    if chance.random() < 0.3 or word[0] in '"#':  # a line may begin with the word
        word = word.replace("\\", "\\\\").replace('"', '\\"') + chance.choice(["", " ", "\\t", "\\n", "\\x"])
        return f'"{word}"'
    return word


def some_gap(chance: random.Random) -> str:
    return chance.choice([" ", " ", "  ", "\t", "\n", "\r\n", "\n  "])


def some_pair(chance: random.Random, keyword: str, value: str) -> str:
    """Return a keyword with its value. Some releases of curl take an empty rest of a line for the value."""
    return keyword + chance.choice([" ", "  ", "\t", "\n"]) + value


def some_entry(chance: random.Random, name: str) -> str:
    words = [some_pair(chance, keyword, some_value(chance)) for keyword in ("login", "password")]
    words.append(chance.choice(["account", "foo"]))
    chance.shuffle(words)
    return some_gap(chance).join([chance.choice([name, name.upper()]), *words])


def some_netrc(chance: random.Random) -> bytes:
    """Return a random netrc with all syntax that all releases of curl parse alike."""
    hosts = ["127.0.0.1", "other", "127.0.0.1:80", "127.0.0.10", "example.org"]
    parts = []
    for _ in range(chance.randint(0, 5)):
        machine = some_entry(chance, some_pair(chance, "machine", chance.choice(hosts)))
        comment = f"# {some_entry(chance, 'machine 127.0.0.1').splitlines()[0]}"
        others = [comment, "macdef init\nput a b\n\n", some_entry(chance, "default")]
        parts.append(machine if chance.random() < 0.65 else chance.choice(others))
    if chance.random() < 0.3:  # the last entry may be incomplete
        parts.append(chance.choice(["machine 127.0.0.1 password x", "machine 127.0.0.1 login x", "machine 127.0.0.1"]))
    return ("\n".join(parts) + chance.choice(["", "\n"])).encode()


@needs("curl")
def test_curl_sends_the_same_credentials(tmp_path: Path) -> None:
    chance = random.Random(16)
    files = [content for name, (content, _) in OUR_CASES.items() if name not in NOT_OF_EVERY_CURL]
    files += [some_netrc(chance) for _ in range(500)]
    theirs = credentials_from_curl(files, tmp_path)
    assert len(theirs) == len(files)
    for content, expected in zip(files, theirs, strict=True):
        assert ours(content) == expected, content
    assert len(set(theirs)) > 200

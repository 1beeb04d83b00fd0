"""Forward proxies: requests use the same proxy as those of curl."""

import random
import subprocess

import pytest

from harmonia.config.proxy import Proxy, ProxyRules, is_excepted, without_password
from harmonia.errors import FormatError
from support.programs import needs
from support.serving import QuietHandler, ThreadServer


@pytest.mark.parametrize(
    ("text", "url", "user", "password"),
    [
        ("http://proxy:3128", "http://proxy:3128", None, ""),
        ("proxy:3128", "http://proxy:3128", None, ""),
        ("proxy", "http://proxy:1080", None, ""),
        ("HTTP://Proxy:3128/ignored", "http://proxy:3128", None, ""),
        ("http://[::1]:3128", "http://[::1]:3128", None, ""),
        ("http://me:a%3Ab%40c@proxy:1", "http://proxy:1", "me", "a:b@c"),
        ("http://me@proxy:1", "http://proxy:1", "me", ""),
    ],
)
def test_every_form_of_a_proxy_is_parsed(text: str, url: str, user: str | None, password: str) -> None:
    proxy = Proxy.parse(text)
    assert (proxy.url, proxy.user, proxy.password) == (url, user, password)
    assert not password or password not in repr(proxy)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "http://",
        "http://:sesame@",
        "socks5://sesame@x",
        "ftp://sesame@x",
        "http://sesame@x:70000",
        "http://[sesame",
    ],
)
def test_invalid_proxy_is_rejected_and_not_shown(text: str) -> None:
    with pytest.raises(FormatError) as error:
        Proxy.parse(text)
    assert "sesame" not in str(error.value)


@pytest.mark.parametrize(
    ("environ", "http", "https"),
    [
        ({}, None, None),
        ({"http_proxy": "a:1"}, "http://a:1", None),
        ({"HTTP_PROXY": "a:1"}, None, None),
        ({"https_proxy": "a:1"}, None, "http://a:1"),
        ({"HTTPS_PROXY": "a:1"}, None, "http://a:1"),
        ({"https_proxy": "a:1", "HTTPS_PROXY": "b:1"}, None, "http://a:1"),
        ({"all_proxy": "a:1"}, "http://a:1", "http://a:1"),
        ({"ALL_PROXY": "a:1", "https_proxy": "b:1"}, "http://a:1", "http://b:1"),
        ({"http_proxy": "", "ALL_PROXY": "a:1"}, "http://a:1", "http://a:1"),
        ({"all_proxy": "a:1", "no_proxy": "example.org"}, None, None),
        ({"all_proxy": "a:1", "NO_PROXY": ".example.org"}, None, None),
        ({"all_proxy": "a:1", "no_proxy": "x", "NO_PROXY": "*"}, "http://a:1", "http://a:1"),
    ],
)
def test_variables_and_setting_select_the_proxy(environ: dict[str, str], http: str | None, https: str | None) -> None:
    for setting in (None, "", "c:1"):
        rules = ProxyRules(environ, setting)
        found = [rules.proxy_for(f"{scheme}://cache.example.org/x") for scheme in ("http", "https")]
        expected = {None: [http, https], "": [None, None], "c:1": ["http://c:1"] * 2}[setting]
        assert [proxy and proxy.url for proxy in found] == expected


def test_password_of_a_proxy_is_not_shown() -> None:
    assert without_password("http://me:ses@ame@proxy:1") == "http://(not shown)@proxy:1"
    assert without_password("me:sesame@proxy:1") == "(not shown)@proxy:1"
    assert without_password("http://proxy:1") == "http://proxy:1"


class _Handler(QuietHandler):
    """Answers every request at once. A CONNECT, which would ask for a proxy, is refused."""

    wbufsize = -1

    def do_GET(self) -> None:  # noqa: N802 (as http.server wants it)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_CONNECT(self) -> None:  # noqa: N802 (as http.server wants it)
        self.send_response(502)
        self.send_header("Connection", "close")
        self.end_headers()


def excepted_by_curl(cases: list[tuple[str, str]]) -> list[bool]:
    """Return, for pairs of host and no_proxy, True if curl connects without a proxy."""
    with ThreadServer(("127.0.0.1", 0), _Handler) as server:
        port = server.server_port
        operations = [
            f'url = "http://{f"[{host}]" if ":" in host else host}/"\nproxy = "http://127.0.0.1:{port}"\nsilent\n'
            f'connect-to = "::127.0.0.1:{port}"\nnoproxy = "{no_proxy}"\noutput = "/dev/null"\n'
            'write-out = "%{http_connect}\\n"\n'
            for host, no_proxy in cases
        ]
        command = ["curl", "--disable", "--config", "-"]
        done = subprocess.run(command, input="next\n".join(operations), stdout=subprocess.PIPE, text=True, check=False)
    return [line == "000" for line in done.stdout.split()]


EXCEPTIONS = [
    ("example.org", "example.org"),
    ("www.example.org", "example.org"),
    ("www.example.org", ".example.org"),
    ("example.org", ".example.org"),
    ("example.org", "*.example.org"),
    ("badexample.org", "example.org"),
    ("EXAMPLE.org", "Example.ORG"),
    ("example.org", "example.org."),
    ("example.org.", "example.org"),
    ("example.org", "example.org:80"),
    ("example.org", "a, example.org ,b"),
    ("example.org", "a,,example.org"),
    ("example.org", "*"),
    ("example.org", "*,b"),
    ("example.org", " * "),
    ("example.org", "."),
    ("localhost", "local"),
    ("10.1.2.3", "10.1.2.3"),
    ("10.1.2.3", "2.3"),
    ("10.1.2.3", ".3"),
    ("10.1.2.3", "10.0.0.0/8"),
    ("10.1.2.3", "10.1.2.0/31"),
    ("10.1.2.3", "10.1.2.0/30"),
    ("10.1.2.3", "10.1.2.3/32"),
    ("10.1.2.3", "10.1.2.3/33"),
    ("fd00::1", "10.0.0.0/8"),
]


@pytest.mark.parametrize(
    ("no_proxy", "expected"),
    [
        ("fd00::1", True),
        ("fd00:0:0::1", True),
        ("fd00::/8", True),
        ("fc00::/7", True),
        ("fe00::/7", False),
        ("fd00::/129", False),
        ("fd00::/8x", False),
        ("10.0.0.0/8", False),
    ],
)
def test_no_proxy_supports_ipv6_networks(no_proxy: str, *, expected: bool) -> None:
    """The rules are those of curl 7.87 and newer."""
    assert is_excepted("fd00::1", no_proxy) == expected


def some_exception(chance: random.Random) -> tuple[str, str]:
    host = chance.choice(["a.b.c", "b.c", "xb.c", "10.1.2.3", "192.168.0.1", "fd00::1", "localhost"])
    parts = [
        chance.choice(["b.c", ".b.c", "c", "B.C.", "a.b.c", "10.1.2.3", "localhost", "x"])
        if chance.random() < 0.5
        else f"{chance.choice(['10.1.2.3', '10.1.0.0', '192.168.0.0'])}/{chance.randint(1, 32)}"
        for _ in range(chance.randint(1, 3))
    ]
    return host, chance.choice([",", ", ", " ,", ",,"]).join(parts)


@needs("curl")
def test_no_proxy_excludes_the_same_hosts_as_curl() -> None:
    chance = random.Random(3)
    cases = [*EXCEPTIONS, *(some_exception(chance) for _ in range(300))]
    theirs = excepted_by_curl(cases)
    assert len(theirs) == len(cases)
    for case, excepted in zip(cases, theirs, strict=True):
        assert is_excepted(*case) == excepted, case
    assert 50 < sum(theirs) < len(theirs) - 50

"""Rules for every resource: methods, HEAD, errors, framing."""

import ssl

import pytest

from harmonia import __version__
from harmonia.tools.store_builder import StoreBuilder
from support.running import Server, read_answer
from support.shared_store import info, url


@pytest.fixture(
    params=[
        "/",
        "/nix-cache-info",
        "/version",
        "/health",
        "narinfo",
        "nar",
        "log",
        "serve",
        "directory",
        "/search",
        "/none",
        "/nar/none.nar",
    ]
)
def resource(request: pytest.FixtureRequest, server: Server, shared_store: StoreBuilder) -> str:
    """Return the path of each resource, and of some that do not exist."""
    hash_part = info(shared_store, "tree").path.hash_part
    match request.param:
        case "narinfo":
            return f"/{hash_part}.narinfo"
        case "nar":
            return url(server, hash_part)
        case "log":
            derivation = info(shared_store, "tree.drv").path
            shared_store.add_log(derivation, b"log\n", compressed=False)
            return f"/log/{derivation}"
        case "serve":
            return f"/serve/{hash_part}/bin/run"
        case "directory":
            return f"/serve/{hash_part}/"
    return str(request.param)


def test_head_equals_get_without_a_body(server: Server, resource: str) -> None:
    get, head = server.get(resource), server.head(resource)
    assert head.status == get.status
    assert head.headers == get.headers
    assert head.body == b""
    assert get.headers["content-length"] == str(len(get.body))


def test_connection_is_reusable_after_head(server: Server, resource: str) -> None:
    with server.connect() as connection:
        connection.sendall(f"HEAD {resource} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        read_answer(connection, "HEAD")
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(connection).text == f"harmonia {__version__}\n"


def test_upload_to_a_server_without_pushes_gets_no_remedy_for_pushers(server: Server) -> None:
    answer = server.request("PUT", f"/push/{'0' * 32}.narinfo")
    assert (answer.status, answer.text) == (404, "Not Found\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
def test_other_methods_get_405(server: Server, resource: str, method: str) -> None:
    answer = server.request(method, resource)
    if server.get(resource).status == 404 and not resource.startswith("/nar/"):
        assert answer.status in (404, 405)
    else:
        assert answer.status == 405
        assert answer.headers["allow"] == "GET, HEAD"
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path",
    ["/none", "/nar", "/nar/", "/nar//x", "/nix-cache-info/", "/%00", "/..%2f..%2fetc%2fpasswd", "/%80"],
)
def test_unknown_path_gets_404(server: Server, path: str) -> None:
    answer = server.get(path)
    assert (answer.status, answer.body) == (404, b"Not Found\n")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/3.9\r\n\r\n", 505),
        (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /\x01 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET http:// HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
    ],
)
def test_malformed_request_gets_4xx_or_505(server: Server, sent: bytes, status: int) -> None:
    with server.connect() as connection:
        connection.sendall(sent)
        answer = read_answer(connection)
    assert answer.status == status
    assert b"Traceback" not in answer.body
    assert len(answer.body) < 100


def test_tls_handshake_on_a_plain_port_fails_at_once(server: Server) -> None:
    context = ssl.create_default_context()
    with server.connect() as connection, pytest.raises(ssl.SSLError, match="WRONG_VERSION_NUMBER"):
        context.wrap_socket(connection, server_hostname="cache")
    with server.connect() as connection:
        connection.sendall(b"\x16")
        assert read_answer(connection).status == 400


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        received = b""
        while not received.endswith(b"OK\n"):
            received += connection.recv(4096)
    assert received.index(b"harmonia ") < received.index(b"OK\n")


def test_nix_cache_info(server: Server) -> None:
    answer = server.get("/nix-cache-info")
    assert answer.headers["content-type"] == "text/x-nix-cache-info"
    assert answer.text == (
        "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\nGetNarInfosV1: get-narinfos-v1\nClosureV1: .closure\n"
    )

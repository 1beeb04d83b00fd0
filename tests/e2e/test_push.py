"""Pushes: `nix copy --to` adds paths to the store of a machine whose Nix daemon trusts no user."""

from collections.abc import Callable
from dataclasses import replace
from http.client import IncompleteRead
from pathlib import Path

import pytest
import zstandard

from harmonia.nix import base32
from harmonia.nix.signing import SecretKey
from harmonia.nix.store_path import StorePath
from support.closure import build_one, instantiate, make_closure, requisites
from support.lean_responses import COUNT_UPLOADS, count
from support.nix_client import Client
from support.push_target import Target, push, spooled
from support.pusher import Pushed, Pusher, signed
from support.running import Server, patched, read_answer, wait_until

Start = Callable[..., Server]
MakeClient = Callable[[str], Client]


def test_closure_is_pushed_and_substituted(target: Target, pusher: Client, make_client: MakeClient) -> None:
    closure = make_closure(pusher)
    server = target.serve()
    with target.client.daemon():
        push(pusher, server, *closure.paths.values(), query=f"secret-key={target.key.secret_file}")
        target.client.run("nix-store", "--gc")  # the closure is kept by GC roots
    for path in (*closure.paths.values(), *requisites(pusher, closure.top)):
        target.client.run("nix-store", "--verify-path", path)
    assert "pusher-1:" in target.client.run("nix", "path-info", "--sigs", closure.top).text
    consumer = make_client("consumer")
    consumer.settings |= {"substituters": server.url, "trusted-public-keys": target.key.public}
    consumer.settings["netrc-file"] = str(pusher.shared / "netrc")
    consumer.run("nix-store", "--realise", closure.top)
    assert not spooled(server)
    server.stop()
    assert not [line for line in server.log if "Traceback" in line or "ERROR" in line], server.log
    assert [line for line in server.log if "'PUT /push/nar/" in line and " 200 " in line and "token=ci" in line]


@pytest.mark.parametrize(
    "query",
    [
        "compression=none",
        "compression=zstd&write-nar-listing=true",
        "compression=bzip2&index-debug-info=true",
        "compression=gzip",
        "compression=br",
    ],
)
def test_options_of_the_store_url_work(target: Target, pusher: Client, query: str) -> None:
    path = build_one(
        pusher, "one-1.0", "mkdir -p $out/lib/debug/.build-id/ab; echo one > $out/lib/debug/.build-id/ab/c.debug"
    )
    server = target.serve(scopes=("push",))
    with target.client.daemon():
        push(pusher, server, path, query=f"{query}&secret-key={target.key.secret_file}")
    target.client.run("nix-store", "--verify-path", path)


def test_path_that_was_signed_before_needs_no_key_during_the_push(target: Target, pusher: Client) -> None:
    path = build_one(pusher, "one-1.0", "echo one > $out")
    pusher.run("nix", "store", "sign", "--key-file", target.key.secret_file, path)
    server = target.serve(scopes=("push",))
    with target.client.daemon():
        push(pusher, server, path)
    assert "pusher-1:" in target.client.run("nix", "path-info", "--sigs", path).text


def test_content_addressed_path_needs_no_key(target: Target, pusher: Client) -> None:
    file = pusher.directory / "file"
    file.write_text("content")
    path = pusher.run("nix-store", "--add", file).text
    server = target.serve()
    with target.client.daemon():
        push(pusher, server, path)
    target.client.run("nix-store", "--verify-path", path)


def test_unsigned_path_is_refused_unless_the_server_may_sign(target: Target, pusher: Client) -> None:
    path = build_one(pusher, "one-1.0", "echo one > $out")
    other = build_one(pusher, "other-1.0", "echo other > $out")
    server = target.serve()
    with target.client.daemon():
        assert "secret-key=FILE" in push(pusher, server, path, check=False)
        assert not target.client.real_path(path).exists()
        signing = f"sign_key_path = '{target.key.secret_file}'\nsign_names = ['one-*']\n"
        assert "secret-key=FILE" in push(pusher, target.serve(signing), path, check=False)
        server = target.serve(signing, ("push", "sign"))
        push(pusher, server, path)
        assert "secret-key=FILE" in push(pusher, server, other, check=False)
        for_others = target.serve(f"sign_key_path = '{target.key.secret_file}'\n", ("push", "sign:one-*"))
        assert "secret-key=FILE" in push(pusher, for_others, other, check=False)
    target.client.run("nix-store", "--verify-path", path)
    assert not target.client.real_path(other).exists()


def test_signed_realisations_are_registered(target: Target, pusher: Client, tmp_path: Path) -> None:
    expression = tmp_path / "expression.nix"
    expression.write_text("""
        derivation {
          name = "ca-1.0"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo hi > $out" ];
          __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";
        }""")
    server = target.serve()

    def is_known() -> bool:
        """Return True if the target has nothing to build."""
        target.client.settings["max-jobs"] = "0"
        return target.client.run("nix-build", "--no-out-link", expression, check=False).returncode == 0

    with target.client.daemon():
        for keys in ("", str(target.key.secret_file)):
            pusher.run("sh", "-c", "rm -rf /nix/var /nix/store")
            pusher.settings["secret-key-files"] = keys
            pusher.run("nix-build", "--no-out-link", expression)
            pusher.run("nix", "copy", "--to", f"{server.url}/push", "--file", expression, "")
            assert is_known() == bool(keys)


def test_signatures_of_a_valid_path_are_not_changed(target: Target, pusher: Client) -> None:
    """Only a trusted user of the daemon may; the pusher is told so."""
    path = build_one(pusher, "one-1.0", "echo one > $out")
    server = target.serve()
    other = pusher.generate_key("other-1")
    with target.client.daemon():
        push(pusher, server, path, query=f"secret-key={target.key.secret_file}")
        pusher.run("rm", "-rf", "/root/.cache")  # the narinfo as it was pushed
        command = ("nix", "store", "sign", "--store", f"{server.url}/push", "--key-file", other.secret_file, path)
        signed = pusher.run(*command, check=False)
        pusher.run("nix", "store", "sign", "--key-file", other.secret_file, path)
        pusher.run("nix", "copy", "--to", f"file://{pusher.shared}/files", path)
        copy_sigs = ("nix", "store", "copy-sigs", "--store", f"{server.url}/push")
        copied = pusher.run(*copy_sigs, "--substituter", f"file://{pusher.shared}/files", path, check=False)
    for refused in (signed, copied):
        assert (refused.returncode, "trusted user" in refused.stderr) == (1, True), refused.stderr
    assert "other-1" not in target.client.run("nix", "path-info", "--sigs", path).text


def test_long_import_sends_bytes_until_it_ends(target: Target) -> None:
    """Nix aborts a request after 300 s without a byte."""
    quick = "from harmonia.server.resources import push; push._SILENCE_S = 0.001"
    server = target.serve(program=patched(quick))
    path = Pushed.make("large", bytes(32 << 20), target.secret)
    wrong = replace(path, info=signed(replace(path.info, nar_hash=bytes(32)), target.secret))
    pusher = target.pusher(server)
    with target.client.daemon():
        assert pusher.put_nar(path).status == 200
        with pytest.raises(IncompleteRead):
            pusher.put_narinfo(wrong)
        answer = pusher.put_narinfo(path)
    assert (answer.status, set(answer.body)) == (200, set(b".\n"))
    target.client.run("nix-store", "--verify-path", f"/nix/store/{path.info.path}")


def test_pushed_path_that_was_missing_is_served_at_once_and_counted(target: Target) -> None:
    server = target.serve("[[upstream]]\nurl = 'http://127.0.0.1:1'\n", ("push", "read", "metrics"))
    path = Pushed.make("late", b"content", target.secret)
    authorized = {"Authorization": f"Bearer {(target.client.shared / 'token').read_text()}"}
    narinfo = f"/{path.info.path.hash_part}.narinfo"
    with target.client.daemon():
        assert server.get(narinfo, authorized).status == 404
        assert target.pusher(server).push(path).status == 200
        assert server.get(narinfo, authorized).status == 200
    counted = server.get("/metrics", authorized).text
    assert "harmonia_push_found_after_miss_total 1.0" in counted
    assert "harmonia_pushed_paths_total 1.0" in counted


def test_pushed_log_is_kept_and_served(target: Target) -> None:
    server = target.serve()
    name = f"{'0' * 32}-top-1.0.drv"
    log = b"line\n" * 1000
    pusher = target.pusher(server)
    assert pusher.request("PUT", f"log/{name}", log).status == 200
    token = (target.client.shared / "token").read_text()
    answer = server.get(f"/log/{name}", {"Authorization": f"Bearer {token}"})
    assert (answer.status, answer.body) == (200, log)
    assert pusher.request("PUT", f"log/{name}", b"x", {"Content-Encoding": "zstd"}).status == 400
    assert pusher.request("PUT", "log/none", log).status == 400


@pytest.mark.parametrize("query", ["", "log-compression=br", "log-compression=gzip"])
def test_nix_pushes_a_log(target: Target, pusher: Client, query: str) -> None:
    """Nix 2.8 compresses it with brotli for each query; newer versions only if it is asked for."""
    derivation = instantiate(pusher, "one-1.0", "echo a line of the log; echo one > $out")
    pusher.run("nix-store", "--realise", derivation)
    server = target.serve()
    pusher.run("nix", "store", "copy-log", "--to", f"{server.url}/push?{query}", derivation)
    token = (target.client.shared / "token").read_text()
    answer = server.get(f"/log/{Path(derivation).name}", {"Authorization": f"Bearer {token}"})
    assert (answer.status, answer.body) == (200, b"a line of the log\n")


OTHER = SecretKey.generate("other-1")


def test_refusal_is_one_line_and_leaves_nothing(target: Target) -> None:
    """Refused paths do not become valid, and the next push of the same path succeeds."""
    server = target.serve("max_nar_size = '64M'\n")
    pusher, secret = target.pusher(server), target.secret
    good = Pushed.make("good", b"content" * 1000, secret)
    info = good.info
    other = Pushed.make("other", b"", secret)
    missing = StorePath(f"{'0' * 32}-missing")
    longer = replace(good, body=good.body + bytes(8))
    cases = {
        "of another key": replace(good, info=signed(info, OTHER)),
        "signature of another path": replace(good, info=replace(info, sigs=other.info.sigs)),
        "another hash": replace(good, info=signed(replace(info, nar_hash=bytes(32)), secret)),
        "another size": replace(good, info=signed(replace(info, nar_size=info.nar_size + 8), secret)),
        "longer": longer,
        "reference": replace(good, info=signed(replace(info, references=(missing,)), secret)),
        "compression": replace(good, compression="xz"),
        "no decompressor": replace(good, compression="lz4"),
        "too large": replace(good, info=signed(replace(info, nar_size=1 << 40), secret)),
        "no content address": replace(good, info=replace(info, sigs=(), ca="fixed:r:sha256:" + "0" * 52)),
    }
    with target.client.daemon():
        for name, wrong in cases.items():
            answer = pusher.push(wrong)
            assert 400 <= answer.status < 500, (name, answer)
            assert answer.body.count(b"\n") == 1, (name, answer)
            assert len(answer.body) < 1000
            assert server.get(f"/{info.path.hash_part}.narinfo").status in (401, 404)
            assert pusher.request("GET", f"{info.path.hash_part}.narinfo").status == 404, name
        wrong_name = pusher.request("PUT", f"nar/{'0' * 52}.nar", good.body)
        assert (wrong_name.status, b"SHA-256" in wrong_name.body) == (400, True)
        elsewhere = good.narinfo.replace(b"/nix/store/", b"/gnu/store/")
        other_dir = pusher.request("PUT", f"{info.path.hash_part}.narinfo", elsewhere)
        assert (other_dir.status, b"/nix/store" in other_dir.body) == (400, True)
        assert pusher.request("PUT", f"{'0' * 32}.narinfo", good.narinfo).status == 400
        assert pusher.request("PUT", f"{info.path.hash_part}.narinfo", b"junk").status == 400
        assert pusher.push(good).status == 200
        assert pusher.push(good).status == 200  # once more
        another = replace(Pushed.make("good", b"", secret), info=info)
        another = replace(another, info=signed(replace(info, nar_hash=bytes(32)), secret))
        assert pusher.push(another).status == 409
    target.client.run("nix-store", "--verify-path", f"/nix/store/{info.path}")


def test_token_without_the_scope_is_refused_before_the_body(target: Target) -> None:
    """The refusal comes instead of 100 Continue."""
    server = target.serve(scopes=("read",))
    token = (target.client.shared / "token").read_text()
    path = Pushed.make("good", b"content", target.secret)
    for authorization, status in (("", 401), (f"Authorization: Bearer {token}\r\n", 403)):
        with server.connect() as connection:
            head = f"PUT /push/{path.nar_url} HTTP/1.1\r\nHost: x\r\n{authorization}Content-Length: 1000000000\r\n"
            connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
            assert connection.recv(4096).startswith(f"HTTP/1.1 {status} ".encode())
    assert not spooled(server)


def test_refusal_by_status_has_a_remedy(target: Target) -> None:
    server = target.serve(scopes=("read",))
    reader, nobody = target.pusher(server), Pusher(server, "wrong")
    nar = f"nar/{'0' * 52}.nar"
    refused = {nobody.request("PUT", nar, b"x").text, reader.request("PUT", nar, b"x").text}
    refused |= {reader.request("GET", "nix-cache-info").text, reader.request("POST", nar).text}
    server = target.serve()
    pusher = target.pusher(server)
    refused |= {pusher.request("PUT", "unknown", b"x").text}
    with pusher.raw() as connection:
        head = pusher.head("PUT", nar, 0, "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
        connection.sendall(head + b"0\r\n\r\n")
        refused |= {read_answer(connection).text}
    assert refused == {
        "Unauthorized: no valid token; put one with the scope push into the netrc-file of your Nix\n",
        "Forbidden: the token lacks the scope push; make another with `harmonia token NAME --scope push`\n",
        "Method Not Allowed: no such method here; push with `nix copy` or `harmonia push`\n",
        "Not Found: no such upload in a binary cache; push with `nix copy` or `harmonia push`\n",
        "Length Required: send Content-Length; a proxy in front of the server must not remove it\n",
    }
    assert pusher.request("GET", f"{'0' * 32}.narinfo").text == "Not Found\n"


def test_token_that_may_only_push_cannot_download(target: Target) -> None:
    server = target.serve(scopes=("push",))
    path = Pushed.make("secret", b"content", target.secret)
    pusher = target.pusher(server)
    hash_part = path.info.path.hash_part
    with target.client.daemon():
        assert pusher.push(path).status == 200
    url = f"nar/{hash_part}-{base32.encode(path.info.nar_hash)}.nar"
    assert url in pusher.request("GET", f"{hash_part}.narinfo").text
    for name in (url, f"{hash_part}.ls", f"log/{hash_part}-name.drv"):
        answer = pusher.request("GET", name)
        assert (answer.status, "the token lacks the scope read" in answer.text) == (403, True)
    assert pusher.request("HEAD", url).status == 200
    server = target.serve(scopes=("push", "read"))
    assert target.pusher(server).request("GET", url).body == path.body


def test_truncated_body_leaves_nothing(target: Target) -> None:
    server = target.serve()
    token = (target.client.shared / "token").read_text()
    path = Pushed.make("good", b"content" * 1_000_000, target.secret)
    with server.connect() as connection:
        head = f"PUT /push/{path.nar_url} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        connection.sendall(f"{head}Content-Length: {len(path.body)}\r\nExpect: 100-continue\r\n\r\n".encode())
        assert connection.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(path.body[:1_000_000])
        wait_until(lambda: spooled(server))
    wait_until(lambda: not spooled(server))
    assert target.pusher(server).request("HEAD", path.nar_url).status == 404


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_nar_that_was_damaged_in_the_spool_can_be_sent_again(target: Target, compression: str) -> None:
    server, path = target.serve(), Pushed.make("good", b"content", target.secret)
    if compression == "zstd":
        path = replace(path, body=zstandard.compress(path.body), compression=compression)
    pusher = target.pusher(server)
    with target.client.daemon():
        assert pusher.request("PUT", path.nar_url, path.body).status == 200
        [file] = spooled(server)
        (server.cache_dir / "push" / file).write_bytes(path.body[:-1] + b"x")
        narinfo_url = f"{path.info.path.hash_part}.narinfo"
        assert 400 <= pusher.request("PUT", narinfo_url, path.narinfo).status < 500
        assert pusher.request("HEAD", path.nar_url).status == 404
        assert pusher.push(path).status == 200


def test_connection_stays_open_after_each_put(target: Target) -> None:
    server = target.serve()
    paths = [Pushed.make(f"path-{number}", b"%d" % number, target.secret) for number in range(20)]
    with target.client.daemon(), target.pusher(server).connected() as pusher:
        assert {pusher.push(path).status for path in paths} == {200}


def test_small_paths_are_imported_without_sanic_unless_the_import_takes_long(target: Target) -> None:
    impatient = """
from harmonia.server.http import sanic_adapter
advance = sanic_adapter.Connection._advance_upload
def advance_and_leave(self, upload):
    advance(self, upload)
    if not upload.left:
        self._leave_upload_to_sanic()
sanic_adapter.Connection._advance_upload = advance_and_leave
"""
    with target.client.daemon():
        for name, program, lean_puts in (("quick", COUNT_UPLOADS, 2), ("slow", COUNT_UPLOADS + impatient, 0)):
            server = target.serve(program=patched(program), access_log=False)
            paths = [Pushed.make(f"{name}-{number}", b"%d" % number, target.secret) for number in range(20)]
            large = Pushed.make(f"large-{name}", bytes(5 << 20), target.secret)
            with target.pusher(server).connected() as pusher:
                assert {pusher.push(path).status for path in (*paths, large)} == {200}
            assert count(server) == lean_puts * (len(paths) - 1)
            for path in (*paths, large):
                target.client.run("nix-store", "--verify-path", f"/nix/store/{path.info.path}")
            assert not [line for line in server.log if "Traceback" in line or "ERROR" in line], server.log

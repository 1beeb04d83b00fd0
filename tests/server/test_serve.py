"""`/serve/<hash>/<path>`: files and directories for browsers, confined to valid store paths."""

import html
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote, urljoin

import pytest
import zstandard

from harmonia.nix.path_info import PathInfo
from harmonia.tools.fixture_tree import Executable, Sparse, Symlink, Tree
from harmonia.tools.store_builder import StoreBuilder
from support.running import FROZEN_RATES, Server, open_files, patched, peak_bytes, wait_until

Start = Callable[..., Server]

SECRET = b"must not be served\n"
BIG = bytes(range(256)) * 8192  # 2 MiB

FILES: dict[str, Tree] = {
    "page.html": b"<!DOCTYPE html><script>alert(1)</script>",
    "latin1.html": b'<meta charset="iso-8859-1"><p>caf\xe9',
    "style.css": b"p { color: red }\n",
    "app.js": b"export default 1\n",
    "module.MJS": b"export default 1\n",
    "data.json": b"{}\n",
    "app.wasm": b"\0asm",
    "logo.svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "feed.xml": b"<a/>",
    "paper.pdf": b"%PDF-1.7\n\0",
    "font.woff2": b"wOF2\0",
    "photo.png": b"\x89PNG\r\n\x1a\n\0",
    "tool.py": b"print('hi')\n",
    "README": "schön\n".encode(),
    "binary": b"\x7fELF\0",
    "latin1.txt": b"caf\xe9\n",
    "cut.txt": b"a" * (64 * 1024 - 1) + "é".encode() + b"\n",
    "archive.tar.gz": b"\x1f\x8b\0",
    "archive.tar.zst": b"\x28\xb5\x2f\xfd",
    "run": Executable(b"#!/bin/sh\n"),
    "big": BIG,
    "text": b"to be compressed\n" * 1000,
    "empty": b"",
}


class Made:
    """A store with all kinds of files, names and symlinks."""

    def __init__(self, root: Path) -> None:
        self.store = store = StoreBuilder(root)
        self.root = root
        (root / "secret").write_bytes(SECRET)
        outside = os.path.join(root, "secret")
        self.other = store.add_source("other", {"file": b"other\n", "dir": {"deep": b"deep\n"}})
        self.stray = store.output_path("stray")  # in the store directory, but not valid
        Path(os.fsdecode(store.real_path(self.stray))).write_bytes(SECRET)
        Path(store.real_dir, ".lock").mkdir()
        Path(store.real_dir, ".lock", "x").write_bytes(SECRET)
        self.files = store.add_source("files", FILES)
        other = self.other.path
        self.links = store.add_source(
            "links",
            {
                "real": {"file": b"real\n", "up": Symlink("../target"), "sub": {}},
                "target": b"target\n",
                "relative": Symlink("real/file"),
                "dotted": Symlink("./real/./sub//..//file"),
                "through": Symlink("real/sub/../up"),
                "directory": Symlink("real/"),
                "via": Symlink("directory/file"),
                "other": Symlink(f"/nix/store/{other}/file"),
                "other-relative": Symlink(f"../{other}/dir"),
                "other-odd": Symlink(f"//nix/.//store/{other}//dir/"),
                "itself": Symlink(f"/nix/store/{other}/../{other}/file"),
                "loop": Symlink("loop"),
                "a": Symlink("b"),
                "b": Symlink("a"),
                "dangling": Symlink("nothing"),
                "file-as-directory": Symlink("target/.."),
                "chain-0": b"the end\n",
                **{f"chain-{n}": Symlink(f"chain-{n - 1}") for n in range(1, 50)},
                "stray": Symlink(f"/nix/store/{self.stray}"),
                "hidden": Symlink("/nix/store/.lock/x"),
                "hidden-relative": Symlink("../.lock/x"),
                "store": Symlink("/nix/store"),
                "store-relative": Symlink(".."),
                "outside": Symlink(outside),
                "outside-relative": Symlink("../" * 20 + outside.lstrip("/")),
                "outside-via-other": Symlink(f"/nix/store/{other}/../../../secret"),
                "real-directory": Symlink(f"{store.real_dir}/{self.files.path}/README"),
                "wrong-name": Symlink(f"/nix/store/{other.hash_part}-wrong/file"),
                "passwd": Symlink("/etc/passwd"),
                "root": Symlink("/"),
                "empty": {},
            },
            [other],
        )
        self.single = store.add_source("single.txt", b"one file\n")
        self.latest = store.add_source("latest", Symlink(f"/nix/store/{self.links.path}"), [self.links.path])
        self.escape = store.add_source("escape", Symlink(outside))
        self.site = store.add_source(
            "site",
            {
                "index.html": b"<h1>Home</h1>",
                "linked": {"index.html": Symlink("../index.html")},
                "lost": {"index.html": Symlink("/etc/passwd"), "file": b""},
                "odd": {"index.html": {"file": b""}},
            },
        )
        self.odd_directories = store.add_source("odd", {"dir:1": {}, "javascript:x": {}, "ü": {}, "50%": {}})
        self.names = store.add_source(
            "names",
            {
                b"\xff\xfe": b"bytes\n",
                "a:b": {"colon": b"colon\n"},
                "<script>alert(1)": b"",
                "<img src=x onerror=alert(1)>": b"",
                '"onmouseover="x': b"",
                "&amp;": b"ampersand\n",
                "100%": b"",
                "%2e%2e": b"not decoded twice\n",
                "back\\slash": b"back-slash\n",
                "line\nbreak": b"",
                "\u202egnp.exe": b"",
                "with space?#": b"space\n",
                "é": b"",
                "...": b"dots\n",
                "a.b": b"",
                "a": {},
                "javascript:alert(1)": b"",
                "arrow": Symlink(b"<b>\xff"),
            },
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("serve") / "store")


@pytest.fixture(scope="module")
def server(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("serve-server") / "running", made.root)
    running.start()
    yield running
    assert running.stop() == 0
    assert not [line for line in running.log if "Traceback" in line]


def url(path: PathInfo, inner: str = "") -> str:
    return f"/serve/{path.path.hash_part}{inner}"


def rows(page: str) -> list[tuple[str, str, str, str]]:
    """Return link, name, kind and size of each row of a listing."""
    found = re.findall(
        r'<tr><td[^>]*><a href="([^"]*)"[^>]*>(.*?)</a>(?:<span.*?</span>)?<td.*?>(.*?)<td.*?>([^<]*)', page
    )
    return [(html.unescape(href), html.unescape(name), kind, size) for href, name, kind, size in found]


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "content_type"),
        [
            ("page.html", "text/html; charset=utf-8"),
            ("latin1.html", "text/html"),
            ("style.css", "text/css; charset=utf-8"),
            ("app.js", "text/javascript; charset=utf-8"),
            ("module.MJS", "text/javascript; charset=utf-8"),
            ("data.json", "application/json"),
            ("app.wasm", "application/wasm"),
            ("logo.svg", "image/svg+xml"),
            ("feed.xml", "application/xml"),
            ("paper.pdf", "application/pdf"),
            ("font.woff2", "font/woff2"),
            ("photo.png", "image/png"),
            ("tool.py", "text/plain; charset=utf-8"),
            ("README", "text/plain; charset=utf-8"),
            ("binary", "application/octet-stream"),
            ("latin1.txt", "text/plain"),
            ("cut.txt", "text/plain; charset=utf-8"),
            ("archive.tar.gz", "application/gzip"),
            ("archive.tar.zst", "application/zstd"),
            ("run", "text/plain; charset=utf-8"),
            ("empty", "text/plain; charset=utf-8"),
        ],
    )
    def test_content_type_follows_name_and_content(
        self, server: Server, made: Made, name: str, content_type: str
    ) -> None:
        answer = server.get(url(made.files, f"/{name}"))
        assert answer.status == 200
        assert answer.headers["content-type"] == content_type
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "content-encoding" not in answer.headers
        content = FILES[name]
        assert answer.body == (content.contents if isinstance(content, Executable) else content)

    def test_headers_and_head(self, server: Server, made: Made) -> None:
        get, head = server.get(url(made.files, "/big")), server.head(url(made.files, "/big"))
        assert head.headers == get.headers
        assert head.body == b""
        assert get.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert get.headers["accept-ranges"] == "bytes"
        assert get.headers["content-length"] == str(len(BIG))

    def test_ranges_and_conditions(self, server: Server, made: Made) -> None:
        where = url(made.files, "/big")
        etag = server.head(where).headers["etag"]
        part = server.get(where, {"Range": "bytes=300000-1500000"})
        assert (part.status, part.body) == (206, BIG[300000:1500001])
        assert part.headers["content-range"] == f"bytes 300000-1500000/{len(BIG)}"
        assert server.get(where, {"Range": "bytes=-5", "If-Range": etag}).body == BIG[-5:]
        assert server.get(where, {"Range": "bytes=-5", "If-Range": '"another"'}).status == 200
        assert server.get(where, {"Range": f"bytes={len(BIG)}-"}).status == 416
        assert server.get(where, {"If-None-Match": etag}).status == 304

    def test_every_file_has_its_own_etag_by_any_link(self, server: Server, made: Made) -> None:
        paths = [url(made.files, f"/{name}") for name in ("README", "big")]
        paths += [url(made.links, "/real/file"), url(made.single), url(made.other, "/file")]
        assert len({server.head(path).headers["etag"] for path in paths}) == len(paths)
        # One file has one ETag, by whatever symlink.
        same = [url(made.links, "/via"), url(made.links, "/relative"), url(made.latest, "/real/file"), paths[2]]
        assert len({server.head(path).headers["etag"] for path in same}) == 1

    def test_large_text_is_compressed_and_other_files_are_not(self, server: Server, made: Made) -> None:
        accepted = {"Accept-Encoding": "zstd"}
        plain, packed = server.get(url(made.files, "/text")), server.get(url(made.files, "/text"), accepted)
        assert packed.headers["content-encoding"] == "zstd"
        assert zstandard.ZstdDecompressor().decompressobj().decompress(packed.body) == plain.body
        assert len(packed.body) < len(plain.body) / 10
        assert packed.headers["etag"] != plain.headers["etag"]
        assert packed.headers["vary"] == plain.headers["vary"] == "Accept-Encoding"
        for name in ("README", "photo.png", "archive.tar.gz", "font.woff2"):
            assert "content-encoding" not in server.get(url(made.files, f"/{name}"), accepted).headers
        assert "content-encoding" not in server.get(url(made.files, "/text"), accepted | {"Range": "bytes=0-9"}).headers

    def test_store_path_that_is_a_file(self, server: Server, made: Made) -> None:
        answer = server.get(url(made.single))
        assert (answer.body, answer.headers["content-type"]) == (b"one file\n", "text/plain; charset=utf-8")
        assert server.get(url(made.single, "/")).status == 404
        assert server.get(url(made.single, "/x")).status == 404

    def test_huge_file_takes_little_memory(self, start: Start, tmp_path: Path) -> None:
        store = StoreBuilder(tmp_path / "store")
        huge = store.add(store.output_path("huge"), Sparse(256 << 20))
        server = start(store=tmp_path / "store")
        answer = server.get(url(huge), {"Range": "bytes=-3"})
        assert (answer.status, answer.body) == (206, b"\0\0\0")
        [worker] = server.workers
        with server.connect() as connection:
            connection.sendall(f"GET {url(huge)} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            received = 0
            while data := connection.recv(1 << 20):
                received += len(data)
        assert received > 256 << 20
        assert peak_bytes(worker) < 200 << 20


class TestSandbox:
    """Scripts in the store cannot act for the cache, but built websites work (tests/server/test_browser.py)."""

    @pytest.mark.parametrize("name", ["page.html", "logo.svg", "feed.xml", "README", "binary"])
    def test_files_that_may_run_scripts_are_sandboxed(self, server: Server, made: Made, name: str) -> None:
        policy = server.head(url(made.files, f"/{name}")).headers["content-security-policy"]
        assert policy.startswith("sandbox ")
        assert "allow-scripts" in policy
        assert "allow-same-origin" not in policy

    def test_files_are_readable_by_sandboxed_pages(self, server: Server, made: Made) -> None:
        headers = server.head(url(made.files, "/app.js")).headers
        assert headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in headers

    def test_pdf_is_not_sandboxed(self, server: Server, made: Made) -> None:
        assert "content-security-policy" not in server.head(url(made.files, "/paper.pdf")).headers

    def test_listings_run_no_script_and_are_not_readable_by_other_origins(self, server: Server, made: Made) -> None:
        headers = server.head(url(made.files, "/")).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "script-src" not in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


class TestTraversal:
    @pytest.mark.parametrize(
        "inner",
        [
            "/..", "/../", "/../secret", "/%2e%2e/", "/%2E%2E/secret", "/.%2e/secret", "/real/../target", "/./target",
            "/.", "/%2e", "//", "//target", "/real//file", "/real%2ffile", "/%2fetc%2fpasswd",
            "/..%2f..%2fetc%2fpasswd",
            "/target%00", "/%00", "/target%00.html", "/..%5c..%5cetc%5cpasswd", "/real%5cfile", "/%252e%252e/secret",
            "/%c0%ae%c0%ae/secret", "/target/", "/target/x", "/real/nothing", "/real/nothing/", "/" + "a" * 300,
            "/real" * 900, "//..", "/..;/secret", "/%2e%2e%2fsecret", "/%", "/%zz", "/real/sub/..%00/",
        ],
    )  # fmt: skip
    def test_traversal_or_missing_file_gets_404(self, server: Server, made: Made, inner: str) -> None:
        lines = len(server.log)
        for method in ("GET", "HEAD"):
            answer = server.request(method, url(made.links, inner))
            assert answer.status == 404
            assert SECRET not in answer.body
            assert answer.headers["cache-control"] == "no-store"
        assert len(server.log) == lines, "requests for missing files must not be logged"

    @pytest.mark.parametrize(
        "path", ["", "/", "/x", "/x/", "//", f"/{'0' * 32}", f"/{'0' * 32}/", f"/{'e' * 32}/", "/.."]
    )
    def test_malformed_or_unknown_hash_part_gets_404(self, server: Server, path: str) -> None:
        assert server.get(f"/serve{path}").status == 404

    def test_only_valid_hash_parts_are_accepted(self, server: Server, made: Made) -> None:
        assert server.get(f"/serve/{made.single.path}").status == 404
        assert server.get(f"/serve/{made.stray.hash_part}").status == 404

    @pytest.mark.parametrize(
        "name",
        [
            "loop", "a", "b", "dangling", "file-as-directory", "chain-41", "chain-49", "stray", "hidden",
            "hidden-relative", "store", "store-relative", "outside", "outside-relative", "outside-via-other",
            "real-directory", "wrong-name", "passwd", "root",
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("suffix", ["", "/", "/x"])
    def test_symlink_to_anything_but_a_valid_path_gets_404(
        self, server: Server, made: Made, name: str, suffix: str
    ) -> None:
        answer = server.get(url(made.links, f"/{name}{suffix}"))
        assert (answer.status, answer.body) == (404, b"Not Found\n")

    @pytest.mark.parametrize(
        ("inner", "body"),
        [
            ("/relative", b"real\n"), ("/dotted", b"real\n"), ("/through", b"target\n"), ("/directory/file", b"real\n"),
            ("/via", b"real\n"), ("/other", b"other\n"), ("/other-relative/deep", b"deep\n"), ("/itself", b"other\n"),
            ("/other-odd/deep", b"deep\n"), ("/chain-39", b"the end\n"), ("/real/up", b"target\n"),
        ],
    )  # fmt: skip
    def test_symlink_within_valid_paths_is_followed(self, server: Server, made: Made, inner: str, body: bytes) -> None:
        for path in (made.links, made.latest):
            answer = server.get(url(path, inner))
            assert (answer.status, answer.body) == (200, body)

    def test_store_path_that_is_a_symlink_is_followed(self, server: Server, made: Made) -> None:
        assert server.get(url(made.latest)).headers["location"] == f"./{made.latest.path.hash_part}/"
        assert server.get(url(made.latest, "/target")).body == b"target\n"
        for inner in ("", "/", "/x"):
            assert server.get(url(made.escape, inner)).status == 404

    def test_symlink_target_that_is_no_longer_valid_gets_404(self, start: Start, tmp_path: Path) -> None:
        store = StoreBuilder(tmp_path / "store")
        target = store.add_source("target", b"target\n")
        link = store.add_source("link", {"to": Symlink(f"/nix/store/{target.path}")})
        server = start(store=tmp_path / "store")
        assert server.get(url(link, "/to")).body == b"target\n"
        with store.connect() as connection:
            connection.execute("delete from ValidPaths where path = ?", (f"/nix/store/{target.path}",))
        assert server.get(url(link, "/to")).status == 404
        assert server.get(url(target)).status == 404


class TestRaces:
    """Changes of the store by root or a bug during a request never lead out of the store."""

    def test_directory_swapped_for_a_symlink_is_never_followed_outside(self, start: Start, tmp_path: Path) -> None:
        store = StoreBuilder(tmp_path / "store")
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "file").write_bytes(SECRET)
        path = store.add(store.output_path("racy"), {"dir": {"file": b"x" * len(SECRET)}})
        top = Path(os.fsdecode(store.real_path(path.path)))
        top.chmod(0o700)
        stop = threading.Event()
        swapped = 0

        def swap() -> None:
            nonlocal swapped
            while not stop.is_set():
                (top / "dir").rename(top / "kept")
                (top / "dir").symlink_to(outside)
                (top / "dir").unlink()
                (top / "kept").rename(top / "dir")
                time.sleep(0.001)
                swapped += 1

        server = start(store=tmp_path / "store")
        thread = threading.Thread(target=swap)
        thread.start()
        try:
            statuses = set()
            for _ in range(300):
                try:
                    answer = server.get(url(path, "/dir/file"))
                except (OSError, HTTPException):  # the transfer broke off, as it must
                    continue
                statuses.add(answer.status)
                assert SECRET not in answer.body
            assert statuses <= {200, 404}
            assert 200 in statuses
        finally:
            stop.set()
            thread.join()
        assert swapped > 20

    def test_file_truncated_during_the_transfer_breaks_it(self, start: Start, tmp_path: Path) -> None:
        store = StoreBuilder(tmp_path / "store")
        path = store.add(store.output_path("big"), {"big": Sparse(64 << 20)})
        top = Path(os.fsdecode(store.real_path(path.path)))
        server = start(store=tmp_path / "store")
        with server.connect(receive_buffer=4096) as connection:
            connection.sendall(f"GET {url(path, '/big')} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert connection.recv(12) == b"HTTP/1.1 200"
            (top / "big").chmod(0o644)
            os.truncate(top / "big", 32 << 20)
            received = 0
            try:
                while data := connection.recv(1 << 20):
                    received += len(data)
            except ConnectionResetError:
                pass
        assert received < 64 << 20
        assert server.wait_for_log("breaks off")

    def test_special_files_get_404(self, start: Start, tmp_path: Path) -> None:
        store = StoreBuilder(tmp_path / "store")
        path = store.add(store.output_path("special"), {})
        top = Path(os.fsdecode(store.real_path(path.path)))
        top.chmod(0o700)
        os.mknod(top / "fifo", stat.S_IFIFO | 0o600)
        os.mknod(top / "socket", stat.S_IFSOCK | 0o600)
        server = start(store=tmp_path / "store")
        assert server.get(url(path, "/fifo")).status == 404
        assert server.get(url(path, "/socket")).status == 404
        assert server.get(url(path, "/")).status == 200

    def test_missing_store_object_gets_404_and_is_logged(self, start: Start, tmp_path: Path) -> None:
        store = StoreBuilder(tmp_path / "store")
        path = store.add_text("gone", b"")
        os.unlink(store.real_path(path.path))
        server = start(store=tmp_path / "store")
        assert server.get(url(path)).status == 404
        assert server.wait_for_log("No such file")

    def test_serve_files_false_disables_files_and_links(self, start: Start, made: Made) -> None:
        server = start(store=made.root, settings="serve_files = false\nbrowse = true")
        hash_part = made.files.path.hash_part
        for path in ("", "/", "/README", "/none"):
            assert server.get(f"/serve/{hash_part}{path}").status == 404
        assert "/serve/" not in server.get(f"/path/{hash_part}").text
        assert server.get(f"/{hash_part}.ls").status == 200

    def test_no_descriptor_is_left_open(self, server: Server, made: Made) -> None:
        [worker] = server.workers

        def descriptors() -> int:
            return sum("/nix/store/" in name for name in open_files(worker))

        before = descriptors()
        for inner in ("/loop", "/real/", "/real/up", "/other", "/outside", "/real/nothing", "/file-as-directory", "/"):
            server.get(url(made.links, inner))
            server.head(url(made.links, inner))
            server.get(url(made.links, inner), {"If-None-Match": "*"})
        with server.connect(receive_buffer=4096) as connection:
            connection.sendall(f"GET {url(made.files, '/big')} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            connection.recv(100)
        wait_until(lambda: descriptors() == before)


class TestDirectories:
    @pytest.mark.parametrize("inner", ["", "/real", "/real/sub", "/directory", "/other-relative"])
    def test_directory_redirects_to_its_final_slash(self, server: Server, made: Made, inner: str) -> None:
        for method in ("GET", "HEAD"):
            answer = server.request(method, url(made.links, inner) + "?x=//evil.example")
            assert answer.status == 301
            # Relative, because a proxy may add a prefix.
            location = urljoin(f"https://example.org/nix{url(made.links, inner)}", answer.headers["location"])
            assert location == f"https://example.org/nix{url(made.links, inner)}/"
        assert server.get(url(made.links, inner) + "/").status == 200

    @pytest.mark.parametrize("name", ["dir:1", "javascript:x", "ü", "50%"])
    def test_redirect_escapes_special_names(self, server: Server, made: Made, name: str) -> None:
        where = url(made.odd_directories, f"/{quote(name, safe='')}")
        location = urljoin(f"http://cache{where}", server.get(where).headers["location"])
        assert server.get(location.removeprefix("http://cache")).status == 200

    def test_listing_shows_names_kinds_and_sizes(self, server: Server, made: Made) -> None:
        page = server.get(url(made.files, "/"))
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        listed = rows(page.text)
        names = [name for _, name, _, _ in listed]
        assert names == sorted(FILES, key=lambda name: str(name).encode())
        found = {name: (kind, size) for _, name, kind, size in listed}
        assert found["big"] == ("file", "2.0 MiB")
        assert found["empty"] == ("file", "0 bytes")
        assert found["run"] == ("executable", "10 bytes")

    def test_listing_has_a_parent_link(self, server: Server, made: Made) -> None:
        assert "../" not in [href for href, *_ in rows(server.get(url(made.links, "/")).text)]
        [parent, *rest] = rows(server.get(url(made.links, "/real/")).text)
        assert parent[:3] == ("../", "..", "directory")
        assert [(name, kind) for _, name, kind, _ in rest] == [
            ("sub", "directory"),
            ("file", "file"),
            ("up", "symlink"),
        ]
        assert len(rows(server.get(url(made.links, "/empty/")).text)) == 1

    def test_every_link_in_a_listing_works(self, server: Server, made: Made) -> None:
        where = url(made.names, "/")
        listed = rows(server.get(where).text)
        assert len(listed) == 18
        for href, name, kind, _ in listed:
            answer = server.get(urljoin(f"http://cache{where}", href).removeprefix("http://cache"))
            assert answer.status == (404 if kind == "symlink" else 200), (href, name)

    def test_names_are_escaped_and_sorted_with_directories_first(self, server: Server, made: Made) -> None:
        page = server.get(url(made.names, "/")).text
        assert "<script" not in page.lower()
        assert "<img" not in page
        names = [name for _, name, _, _ in rows(page)]
        for shown in (r"\xff\xfe", "<script>alert(1)", '"onmouseover="x', "&amp;", "é", "back\\slash"):
            assert shown in names
        assert r"line\nbreak" in names
        assert r"\u202egnp.exe" in names
        assert "javascript:alert(1)" in names
        assert 'href="javascript' not in page
        assert "→ &lt;b>\\xff" in page
        assert names[:3] == ["a", "a:b", '"onmouseover="x']
        assert names[-1] == r"\xff\xfe"
        assert names.index("%2e%2e") < names.index("&amp;") < names.index("...") < names.index("a.b")

    @pytest.mark.parametrize(
        ("inner", "body"),
        [("/%ff%fe", b"bytes\n"), ("/%252e%252e", b"not decoded twice\n"), ("/back%5cslash", b"back-slash\n"),
         ("/&amp;", b"ampersand\n"), ("/with%20space%3f%23", b"space\n"), ("/a:b/colon", b"colon\n"),
         ("/...", b"dots\n")],
    )  # fmt: skip
    def test_encoded_names_are_decoded_once(self, server: Server, made: Made, inner: str, body: bytes) -> None:
        assert server.get(url(made.names, inner)).body == body

    def test_index_html_is_served_if_it_is_a_file_of_the_store(self, server: Server, made: Made) -> None:
        assert server.get(url(made.site, "/")).body == b"<h1>Home</h1>"
        assert server.get(url(made.site, "/linked/")).body == b"<h1>Home</h1>"
        assert server.get(url(made.site, "/linked/")).headers["content-security-policy"].startswith("sandbox")
        for inner, names in (("/lost/", ["..", "file", "index.html"]), ("/odd/", ["..", "index.html"])):
            # the index is a symlink out of the store, or a directory
            assert [name for _, name, _, _ in rows(server.get(url(made.site, inner)).text)] == names

    def test_large_directory_is_cut_off(self, start: Start, tmp_path: Path) -> None:
        store = StoreBuilder(tmp_path / "store")
        path = store.add_source("large", {f"{n:02}": b"" for n in range(51)})
        few = patched("from harmonia.server.resources import directory\ndirectory._MAX_ENTRIES = 50")
        server = start(store=tmp_path / "store", program=few)
        page = server.get(url(path, "/")).text
        assert "The first 50 of 51 entries" in page
        names = [name for _, name, _, _ in rows(page)]
        assert names == [f"{n:02}" for n in range(50)]
        assert server.get(url(path, "/50")).status == 200

    def test_listing_has_an_etag_and_is_compressed(self, server: Server, made: Made) -> None:
        answer = server.get(url(made.names, "/"))
        assert answer.headers["cache-control"] == "no-cache"
        assert server.get(url(made.names, "/"), {"If-None-Match": answer.headers["etag"]}).status == 304
        packed = server.get(url(made.names, "/"), {"Accept-Encoding": "zstd"})
        assert zstandard.ZstdDecompressor().decompressobj().decompress(packed.body) == answer.body


def test_listing_is_rendered_once_and_max_query_rate_limits_it(
    start: Start, store: StoreBuilder, tmp_path: Path
) -> None:
    counted = """
import logging
from harmonia.server.resources import directory
list_directory = directory.list_directory
def counted(*arguments):
    logging.getLogger("harmonia").warning("a directory is listed")
    return list_directory(*arguments)
directory.list_directory = counted
"""
    path = store.add(store.output_path("tree"), {"file": b"contents", "inner": {"other": b""}}).path
    settings = "max_query_rate = 3\ntrusted_proxies = ['127.0.0.1']"
    server = start(store=tmp_path / "store", settings=settings, program=patched(FROZEN_RATES + counted))
    where = f"/serve/{path.hash_part}/"
    answers = [server.get(where) for _ in range(5)]
    assert [answer.status for answer in answers] == [200] * 3 + [429] * 2
    assert len({answer.body for answer in answers[:3]}) == 1
    assert len([line for line in server.log if "a directory is listed" in line]) == 1
    other = {"X-Forwarded-For": "192.0.2.1"}
    assert b"other" in server.get(f"{where}inner/", other).body
    assert server.get(f"{where}file").status == 200  # files have no rate limit
    real = Path(store.real_path(path).decode())
    real.chmod(0o700)
    (real / "added").touch()
    assert b"added" in server.get(where, other).body

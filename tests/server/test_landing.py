"""`/`, `/search` and `/path/<hash>`: HTML pages in which foreign text never becomes markup."""

import base64
import html
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from harmonia.nix import base32
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.store import queries
from harmonia.store.store import Store
from harmonia.tools.store_builder import StoreBuilder
from support.running import PATIENCE_S, Answer, Server, patched, read_answer

Start = Callable[..., Server]

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&{{7*7}}"
EVIL_KEY = EVIL.replace(" ", "/")  # the database separates signatures by spaces
NO_SIGNATURE = base64.b64encode(bytes(64)).decode()


def snippets(answer: Answer) -> list[str]:
    return [html.unescape(text) for text in re.findall(r"<pre><code[^>]*>(.*?)</code>", answer.text, re.DOTALL)]


def links(answer: Answer) -> list[str]:
    return [html.unescape(href) for href in re.findall(r'<a [^>]*href="?([^" >]*)', answer.text)]


def with_host(server: Server, host: str, *headers: str, path: str = "/") -> Answer:
    """Return the response to a request with another Host than `Server.get` sends."""
    with server.connect() as connection:
        lines = [f"GET {path} HTTP/1.1", f"Host: {host}", "Connection: close", *headers, "", ""]
        connection.sendall("\r\n".join(lines).encode("latin-1"))
        return read_answer(connection)


class Made:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = store = StoreBuilder(root)
        self.lib = store.add_source("lib-1.0", b"x" * 5000)
        derivation, output = store.add_derivation("app-2.0", "/bin/sh")
        self.derivation = derivation
        key = SecretKey.generate("stored-1")
        self.app = store.add(
            output, {"app": b"app"}, references=[self.lib.path, output], deriver=derivation.path, keys=[key]
        )
        self.top = store.add_source("top", b"", [self.app.path])
        self.others = [store.add_source(f"many-{n:03}", b"%d" % n, [self.lib.path]) for n in range(250)]
        store.add_log(derivation.path, b"built")
        self.named = store.add_source("odd+name?=a_b", b"odd")
        gone = store.output_path("gone.drv")
        self.orphan = store.add(store.output_path("orphan"), b"", deriver=gone, sigs=[f"{EVIL_KEY}:{NO_SIGNATURE}"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("pages") / "store")


@pytest.fixture(scope="module")
def server(made: Made, keys: list[SecretKey], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("pages-server")
    for key in keys:
        (directory / key.name).write_text(key.export())
        (directory / key.name).chmod(0o600)
    files = [str(directory / key.name) for key in keys]
    running = Server(directory / "running", made.root, f"browse = true\nsign_key_paths = {files}")
    running.start()
    yield running
    assert running.stop() == 0
    assert not [line for line in running.log if "Traceback" in line]


class TestLanding:
    def test_snippets_have_url_and_keys(self, server: Server, keys: list[SecretKey]) -> None:
        url, one, two, nix_conf, nixos, flake, once = snippets(with_host(server, "cache.example.org:5000"))
        public = [str(key.public_key) for key in keys]
        assert url == "http://cache.example.org:5000"
        assert [one, two] == public
        assert nix_conf == f"extra-substituters = {url}\nextra-trusted-public-keys = {' '.join(public)}"
        quoted = " ".join(f'"{key}"' for key in public)
        assert nixos == (
            f'nix.settings = {{\n  substituters = [ "{url}" ];\n  trusted-public-keys = [ {quoted} ];\n}};'
        )
        assert flake == (
            f'nixConfig = {{\n  extra-substituters = [ "{url}" ];\n  extra-trusted-public-keys = [ {quoted} ];\n}};'
        )
        assert once == (
            f"nix build nixpkgs#hello \\\n  --option extra-substituters {url} \\\n"
            f"  --option extra-trusted-public-keys '{' '.join(public)}'"
        )
        assert subprocess.run(["sh", "-n", "-c", once], check=False).returncode == 0

    def test_server_without_a_key_shows_no_key(self, start: Start, made: Made) -> None:
        answer = start(store=made.root).get("/")
        assert "trusted-public-keys" not in answer.text
        assert "This cache has no signing key" in answer.text
        assert "role=search" not in answer.text

    def test_headers_of_the_landing_page(self, server: Server) -> None:
        answer = server.get("/")
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy
        assert "http" not in policy
        assert server.get("/", {"If-None-Match": answer.headers["etag"]}).status == 304

    def test_page_has_no_third_party_and_no_absolute_links(self, server: Server) -> None:
        page = server.get("/").text
        assert not re.search(r'\b(src|action)="?(https?:|/)', page)
        assert not [link for link in re.findall(r'href="?([^" >]*)', page) if link.startswith(("http", "/"))]

    def test_landing_false_disables_the_page(self, start: Start, made: Made) -> None:
        server = start(store=made.root, settings="landing = false")
        assert server.get("/").status == 404
        assert server.get("/nix-cache-info").status == 200
        assert 'href="../../"' not in server.get(f"/serve/{made.app.path.hash_part}/").text
        assert "<nav" not in server.get("/", {"Accept": "text/html"}).text  # it would be empty


class TestUrl:
    @pytest.mark.parametrize("host", ["cache.example.org", "cache:5000", "[::1]:5000", "a_b-c.example"])
    def test_url_uses_the_host_header(self, server: Server, host: str) -> None:
        assert snippets(with_host(server, host))[0] == f"http://{host}"

    @pytest.mark.parametrize("host", ["", "$(reboot)", "x;y", "x:"])
    def test_host_that_makes_no_valid_url_is_not_repeated(self, server: Server, host: str) -> None:
        answer = with_host(server, host)
        assert answer.status == 200
        assert snippets(answer)[0] == server.url

    @pytest.mark.parametrize("host", [EVIL, "a b", "x/../y", "u@x", '"', "${x}", "\xe9", "x:999999"])
    def test_invalid_host_gets_400(self, server: Server, host: str) -> None:
        answer = with_host(server, host)
        assert (answer.status, answer.text) == (400, "Bad Request\n")

    def test_forwarded_headers_of_an_untrusted_client_are_ignored(self, server: Server) -> None:
        headers = ("X-Forwarded-Host: evil.example", "X-Forwarded-Proto: https", "X-Forwarded-Prefix: /evil")
        assert snippets(with_host(server, "cache", *headers))[0] == "http://cache"

    def test_forwarded_headers_of_a_trusted_proxy_are_used(self, start: Start, made: Made) -> None:
        server = start(store=made.root, settings="trusted_proxies = ['127.0.0.1']")

        def shown_url(*headers: str) -> str:
            answer = with_host(server, "inner", *headers)
            assert "alert(1)" not in answer.text
            return snippets(answer)[0]

        assert shown_url() == "http://inner"
        assert shown_url("X-Forwarded-Proto: https") == "https://inner"
        assert shown_url("X-Forwarded-Proto: https", "X-Forwarded-Host: cache.example") == "https://cache.example"
        assert shown_url("X-Forwarded-Host: evil.example, cache.example") == "http://cache.example"
        assert shown_url("X-Forwarded-Host: evil.example", "X-Forwarded-Host: cache.example") == "http://cache.example"
        assert shown_url("X-Forwarded-Host: cache.example", "X-Forwarded-Prefix: /nix/") == "http://cache.example/nix"
        for header in ("Host", "Proto", "Prefix"):
            assert shown_url(f"X-Forwarded-{header}: {EVIL}") == "http://inner"
        assert shown_url("X-Forwarded-Proto: javascript") == "http://inner"

    def test_url_on_a_unix_socket(self, start: Start, made: Made, tmp_path: Path) -> None:
        server = start(store=made.root, bind=f"unix:{tmp_path}/s", settings="trusted_proxies = ['unix']")
        assert snippets(with_host(server, ""))[0] == "http://localhost"
        assert snippets(with_host(server, "x", "X-Forwarded-Proto: https"))[0] == "https://x"

    def test_base_url_takes_precedence(self, start: Start, made: Made) -> None:
        settings = "base_url = 'https://example.org/nix/'\nbrowse = true\ntrusted_proxies = ['127.0.0.1']"
        server = start(store=made.root, settings=settings)
        answer = with_host(server, "inner.example", "X-Forwarded-Host: other.example")
        assert snippets(answer)[0] == "https://example.org/nix"
        assert "inner.example" not in answer.text
        page = server.get(f"/path/{made.app.path.hash_part}")
        assert "https://example.org/nix" in snippets(page)[2]
        assert not [link for link in links(page) if link.startswith("/")]


class TestSearch:
    def found(self, server: Server, text: str) -> list[str]:
        answer = server.get(f"/search?q={quote(text)}")
        assert answer.status == 200
        return re.findall(r'<a href="?path/(\w+)', answer.text)

    @pytest.mark.parametrize("text", ["app", "APP", "pp-2", "app 2.0", "  app   2 "])
    def test_search_matches_parts_of_the_name(self, server: Server, made: Made, text: str) -> None:
        assert self.found(server, text) == [made.app.path.hash_part, made.derivation.path.hash_part]

    def test_search_matches_the_beginning_of_the_hash(self, server: Server, made: Made) -> None:
        assert made.lib.path.hash_part in self.found(server, made.lib.path.hash_part[:8])

    @pytest.mark.parametrize("form", ["{hash}", "{base}", "/nix/store/{base}", " /nix/store/{base}/x ", "{hash}-x"])
    def test_whole_hash_redirects_to_its_page(self, server: Server, made: Made, form: str) -> None:
        text = form.format(hash=made.app.path.hash_part, base=made.app.path)
        answer = server.get(f"/search?q={quote(text)}")
        assert (answer.status, answer.headers["location"]) == (303, f"path/{made.app.path.hash_part}")

    @pytest.mark.parametrize("text", ["nothing-like-it", "%", "a%p", "_pp", "\\", "'; drop", "0" * 32])
    def test_query_without_matches_finds_nothing(self, server: Server, text: str) -> None:
        assert self.found(server, text) == []

    def test_query_is_shown_unchanged(self, server: Server) -> None:
        assert "1 path for “Odd+NAME”" in server.get(f"/search?q={quote('Odd+NAME')}").text

    def test_wildcards_match_literally(self, server: Server, made: Made) -> None:
        assert self.found(server, "a_b") == [made.named.path.hash_part]
        assert self.found(server, "name?=a") == [made.named.path.hash_part]

    def test_results_are_on_pages_of_100(self, server: Server) -> None:
        pages = [server.get(f"/search?q=many&page={number}").text for number in range(1, 5)]
        found = [re.findall(r'<a href="path/\w+">(many-\d+)', page) for page in pages]
        assert list(map(len, found)) == [100, 100, 50, 0]
        assert [name for names in found for name in names] == [f"many-{number:03}" for number in range(250)]
        assert all("250 paths for “many”" in page for page in pages)
        assert ["rel=next" in page for page in pages] == [True, True, False, False]
        assert ["rel=prev" in page for page in pages] == [False, True, True, True]
        assert 'href="search?q=many&amp;page=2"' in pages[0]

    @pytest.mark.parametrize("number", ["", "0", "-1", "x", "1e3", "9" * 30, "\u0662"])
    def test_wrong_number_of_a_page_is_the_first(self, server: Server, number: str) -> None:
        assert "many-000" in server.get(f"/search?q=many&page={quote(number)}").text

    def test_long_query_gets_200(self, server: Server) -> None:
        assert server.get("/search?q=" + "x" * 5_000).status == 200

    def test_query_never_becomes_markup(self, server: Server) -> None:
        for text in (EVIL, "</title><script>alert(1)</script>", "\u202e\x00\x1b"):
            page = server.get(f"/search?q={quote(text)}").text
            style = page.index("<style>"), page.index("</style>")
            tags = re.findall(r"<(\w+)", re.sub(r'="[^"]*"', "", page[: style[0]] + page[style[1] :]))
            assert not {"script", "img"} & set(tags)
            assert html.unescape(page).count(text.split()[0]) >= 2

    def test_malformed_queries_get_200(self, server: Server) -> None:
        for query in ("", "?", "?q", "?q=%ff%fe", "?q=a&q=b", "?q[]=x", "?x=1", "?q=%"):
            assert server.get(f"/search{query}").status == 200

    def test_best_matches_come_first_and_versions_in_natural_order(self, tmp_path: Path) -> None:
        builder = StoreBuilder(tmp_path)
        names = ["vim", "vim-9.9", "vim-9.10", "vim-9.10-doc", "vim-plugin-x", "neovim-0.9", "neovim-0.10", "vim.drv"]
        for name in reversed(names):
            builder.add_text(name, name.encode())
        store = Store("/nix/store", builder.real_dir, builder.db_path)
        assert [found.path.name for found in queries.search(store, "vim", 9).shown] == names
        assert [found.path.name for found in queries.search(store, "vim", 2, start=1).shown] == names[1:3]
        assert queries.search(store, "vim", 2, start=9) == ([], 8, True)
        store.database.close()

    def test_newest_of_paths_with_one_name_comes_first(self, tmp_path: Path) -> None:
        builder = StoreBuilder(tmp_path)
        paths = [builder.add_text("app-1.0", b"%d" % number).path for number in range(9)]
        with builder.connect() as connection:
            for time, path in enumerate(paths):
                connection.execute(
                    "update ValidPaths set registrationTime = ? where path = ?", (time, f"/nix/store/{path}")
                )
        store = Store("/nix/store", builder.real_dir, builder.db_path)
        assert [found.path for found in queries.search(store, "app", 9).shown] == paths[::-1]
        store.database.close()

    def test_search_stops_at_its_time_limit_and_uses_the_index(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        builder = StoreBuilder(tmp_path)
        with builder.connect() as connection:
            connection.executemany(
                "insert into ValidPaths (path, hash, registrationTime) values (?, '', 0)",
                ((f"/nix/store/{builder.output_path(f'n-{n}')}",) for n in range(25_000)),
            )
            connection.execute("insert into ValidPaths (path, hash, registrationTime) values ('/nix/store/odd', '', 0)")
        store = Store("/nix/store", builder.real_dir, builder.db_path)
        monkeypatch.setattr(queries, "_SEARCH_TIME_S", PATIENCE_S)
        found = queries.search(store, "n-24999", 9)
        assert ([each.path.name for each in found.shown], found.total, found.complete) == (["n-24999"], 1, True)
        monkeypatch.setattr(queries, "_SEARCH_TIME_S", 0)
        assert not queries.search(store, "n-24999", 9).complete
        monkeypatch.setattr(queries, "_SEARCH_TIME_S", PATIENCE_S)
        many = queries.search(store, "n", 9)
        assert (len(many.shown), many.complete) == (9, False)
        assert many.total >= 5000
        plan = " ".join(row[3] for row in store.database.query("explain query plan " + queries._MATCHES, *[""] * 6))  # noqa: SLF001 (a private part is tested)
        assert "COVERING INDEX" in plan
        store.database.close()

    @pytest.mark.parametrize("value", [-1, 2**62, "'text'", "x'ff'", 1e300])
    def test_malformed_time_in_the_database_does_not_matter(
        self, start: Start, store: StoreBuilder, tmp_path: Path, value: object
    ) -> None:
        path = store.add_text("odd", b"").path
        with store.connect() as connection:
            connection.execute(f"update ValidPaths set registrationTime = {value}")
        server = start(store=tmp_path / "store", settings="browse = true")
        for url in ("/", "/search", "/search?q=odd", f"/path/{path.hash_part}"):
            assert server.get(url).status == 200, url

    def test_slow_search_delays_no_narinfo(self, start: Start, made: Made) -> None:
        slow = "import time\nfrom harmonia.store import queries\nqueries.search = lambda *_, **__: time.sleep(30)"
        server = start(store=made.root, settings="browse = true", program=patched(slow))
        with server.connect() as connection:
            connection.sendall(b"GET /search?q=x HTTP/1.1\r\nHost: x\r\n\r\n")
            assert server.get(f"/{made.app.path.hash_part}.narinfo").status == 200
            answer = server.get("/search?q=y")
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        os.kill(server.workers[0], 9)


class TestPath:
    def page(self, server: Server, path: PathInfo) -> Answer:
        answer = server.get(f"/path/{path.path.hash_part}")
        assert answer.status == 200
        return answer

    def test_page_shows_size_closure_signatures_and_links(
        self, server: Server, made: Made, keys: list[SecretKey]
    ) -> None:
        page = self.page(server, made.app)
        full, nar_hash, command = snippets(page)
        assert nar_hash == f"sha256:{base32.encode(made.app.nar_hash)}"
        assert full == f"/nix/store/{made.app.path}"
        assert command.startswith(f"nix-store --realise {full} \\\n  --option extra-substituters http://cache")
        assert str(keys[0].public_key) in command
        text = re.sub(r"<[^>]*>", " ", page.text)
        total = made.app.nar_size + made.lib.nar_size
        assert f"{total / 1024:.1f} KiB, 2 paths" in text
        assert made.app.sigs[0] in text
        hash_part = made.app.path.hash_part
        for link in (
            f"../serve/{hash_part}", f"../{hash_part}.ls", f"../{hash_part}.narinfo", f"../log/{made.derivation.path}",
            made.derivation.path.hash_part, f"./{made.lib.path.hash_part}", f"./{made.top.path.hash_part}",
        ):  # fmt: skip
            assert link in links(page)

    def test_internal_links_work(self, server: Server, made: Made) -> None:
        for path in (made.app, made.derivation, made.lib):
            for link in links(self.page(server, path)):
                if not link.startswith("http"):
                    where = link.removeprefix("..") if link.startswith("../") else f"/path/{link.removeprefix('./')}"
                    assert server.head(where).status in (200, 301), link

    def test_signatures_equal_those_of_the_narinfo(self, server: Server, made: Made) -> None:
        for path in (made.app, made.lib, made.orphan):
            text = server.get(f"/{path.path.hash_part}.narinfo").text
            sigs = re.findall(r"^Sig: (.*)$", text, re.MULTILINE)
            assert len(sigs) >= 2
            shown = self.page(server, path).text.partition("Signatures")[2]
            assert [html.unescape(sig) for sig in re.findall(r"<code>([^<]+)</code>", shown)][: len(sigs)] == sigs

    def test_missing_log_has_no_link(self, start: Start, tmp_path: Path) -> None:
        builder = StoreBuilder(tmp_path / "store")
        derivation, output = builder.add_derivation("app", "/bin/sh")
        app = builder.add(output, b"app", deriver=derivation.path)
        server = start(store=tmp_path / "store", settings="browse = true")
        for path in (app, derivation):
            assert "../log/" not in self.page(server, path).text
        builder.add_log(derivation.path, b"built")
        for path in (app, derivation):
            assert f"../log/{derivation.path}" in links(self.page(server, path))

    def test_referrers_are_limited_and_exclude_the_path_itself(self, server: Server, made: Made) -> None:
        page = self.page(server, made.lib)
        assert "This path is needed by 251 paths; the first 200 are shown." in page.text
        referrers = self.page(server, made.app).text.partition("Referrers")[2]
        assert made.top.path.hash_part in referrers
        assert made.app.path.hash_part not in referrers

    def test_foreign_text_never_becomes_markup(self, server: Server, made: Made) -> None:
        page = self.page(server, made.orphan).text
        assert "<script>alert" not in page
        assert "<img" not in page
        assert "(not in this cache)" in page
        assert EVIL_KEY in html.unescape(page)

    def test_unusable_row_of_the_deriver_does_not_matter(
        self, start: Start, store: StoreBuilder, tmp_path: Path
    ) -> None:
        deriver = store.add_text("damaged.drv", b"")
        path = store.add(store.output_path("path"), b"", deriver=deriver.path)
        with store.connect() as database:
            database.execute("update ValidPaths set narSize = null where path like '%.drv'")
        server = start(store=tmp_path / "store", settings="browse = true")
        assert "(not in this cache)" in self.page(server, path).text
        assert server.get(f"/search?q={deriver.path.hash_part}").status == 200

    def test_closure_too_large_to_count_is_marked_incomplete(self, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        store = Store("/nix/store", made.store.real_dir, made.store.db_path)
        assert queries.closure_size(store, made.top.path) == (
            3, made.top.nar_size + made.app.nar_size + made.lib.nar_size, True
        )  # fmt: skip
        monkeypatch.setattr(queries, "_CLOSURE_MAX_PATHS", 2)
        assert queries.closure_size(store, made.top.path).complete is False
        store.database.close()

    def test_unknown_nar_size_is_marked_incomplete(self, tmp_path: Path) -> None:
        builder = StoreBuilder(tmp_path)
        old = builder.add(builder.output_path("old"), b"", known_size=False)
        new = builder.add_source("new", b"", [old.path])
        store = Store("/nix/store", builder.real_dir, builder.db_path)
        assert queries.closure_size(store, new.path) == (2, new.nar_size, False)
        store.database.close()

    @pytest.mark.parametrize("hash_part", ["0" * 32, "e" * 32, "x"])
    def test_unknown_hash_part_gets_404(self, server: Server, hash_part: str) -> None:
        assert server.get(f"/path/{hash_part}").status == 404


def test_without_browse_search_and_path_pages_get_404(start: Start, made: Made) -> None:
    server = start(store=made.root)
    assert server.get("/search?q=app").status == 404
    assert server.get(f"/search?q={made.app.path.hash_part}").status == 404
    assert server.get(f"/path/{made.app.path.hash_part}").status == 404
    page = server.get(f"/serve/{made.app.path.hash_part}/")
    assert page.status == 200
    assert "path/" not in page.text
    assert "role=search" not in page.text

"""Narinfos of a plan, and small NARs fetched ahead, are verified like all others, and sent without Sanic."""

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard

from harmonia.nix import base32
from harmonia.nix.narinfo import NarFile
from harmonia.nix.path_info import PathInfo
from harmonia.tools.store_builder import StoreBuilder
from support.lean_responses import COUNT_ALL, SEND_NONE, Client, count, text
from support.running import Server, patched, wait_until
from support.upstream_paths import KEY, entry, fields
from support.upstream_server import UpstreamServer, cut, file_url

Start = Callable[..., Server]

COUNT = 6
NAR_BYTES = 30_000
SETTINGS = "upstream_timeout = 60.0\ndebug_info = false"
NIX = ["User-Agent: curl/8.5.0 Nix/2.34.1", "Accept: */*", "Accept-Encoding: zstd, br, gzip, deflate"]


COUNT_FETCHED = """
import os, sys
from harmonia.upstream.small_nars import SmallNars
fetch = SmallNars.fetch
async def counting_fetch(self, path, headers):
    result = await fetch(self, path, headers)
    with open(os.path.join(os.path.dirname(sys.argv[-1]), "fetched"), "a") as file:
        file.write("x")
    return result
SmallNars.fetch = counting_fetch
"""


@dataclass
class Closure:
    """A closure of an upstream: a chain of paths, and the zstd files of their NARs, references first."""

    upstream: UpstreamServer
    infos: list[PathInfo]
    files: list[bytes]

    def announce(self) -> None:
        """Let the upstream offer the plan of its closure."""
        texts = [self.upstream.files[f"/{info.path.hash_part}.narinfo"] for info in self.infos]
        self.upstream.files["/nix-cache-info"] += b"ClosureV1: .closure\n"
        self.upstream.files[f"/{self.infos[-1].path.hash_part}.closure"] = b"\n".join(texts)

    def nar(self, number: int) -> str:
        return f"GET /{file_url(hashlib.sha256(self.files[number]).digest(), '.zst')}"


@pytest.fixture
def closure(tmp_path: Path) -> Iterator[Closure]:
    store = StoreBuilder(tmp_path / "upstream")
    with UpstreamServer() as upstream:
        infos: list[PathInfo] = []
        files = []
        for number in range(COUNT):
            content = random.Random(number).randbytes(NAR_BYTES)
            infos.append(
                store.add(store.output_path(f"path-{number}"), content, references=[i.path for i in infos[-1:]])
            )
            nar = b"".join(
                _word(word) for word in (b"nix-archive-1", b"(", b"type", b"regular", b"contents", content, b")")
            )
            files.append(zstandard.ZstdCompressor(3).compress(nar))
            digest = hashlib.sha256(files[-1]).digest()
            file = NarFile(file_url(digest, ".zst"), "zstd", digest, len(files[-1]))
            upstream.add(infos[-1], files[-1], file, (KEY,))
        yield Closure(upstream, infos, files)


def _word(word: bytes) -> bytes:
    return len(word).to_bytes(8, "little") + word + bytes(-len(word) % 8)


@pytest.fixture
def here(start: Start, tmp_path: Path, closure: Closure) -> Callable[..., Server]:
    StoreBuilder(tmp_path / "store").add_text("here", b"here\n")
    return lambda statements="", **options: start(
        store=tmp_path / "store",
        settings=f"{SETTINGS}\n{entry(closure.upstream)}",
        program=patched(COUNT_FETCHED + statements),
        **options,
    )


def narinfo_request(info: PathInfo, more: Sequence[str] = ()) -> str:
    return text("GET", f"/{info.path.hash_part}.narinfo", [*NIX, *more])


def url_of(narinfo: bytes) -> str:
    found = re.search(rb"^URL: (.*)$", narinfo, re.MULTILINE)
    assert found, narinfo
    return f"/{found[1].decode()}"


def substitute(server: Server, closure: Closure, more: Sequence[str] = ()) -> list[bytes]:
    """Ask for all narinfos, and then for all NARs when all are fetched ahead. Return the responses."""
    client = Client(server)
    narinfos = [client.ask(narinfo_request(info, more)) for info in reversed(closure.infos)]
    urls = [url_of(narinfo) for narinfo in reversed(narinfos)]
    nars = [client.ask(text("GET", urls[0], [*NIX, *more]))]
    fetched = server.directory / "fetched"
    wait_until(lambda: fetched.exists() and fetched.stat().st_size == COUNT - 1)
    nars += [client.ask(text("GET", url, [*NIX, *more])) for url in urls[1:]]
    client.close()
    return [*narinfos, *nars]


def test_responses_without_sanic_are_identical_to_those_of_the_handlers(
    here: Callable[..., Server], closure: Closure
) -> None:
    closure.announce()
    lean = here(COUNT_ALL)
    responses = substitute(lean, closure)
    assert responses == substitute(here(SEND_NONE), closure)
    assert all(response.startswith(b"HTTP/1.1 200 OK\r\n") for response in responses)
    assert [response.partition(b"\r\n\r\n")[2] for response in responses[COUNT:]] == closure.files
    # The first narinfo, the first NAR, and the first NAR from memory are answered by Sanic, which shows their heads.
    assert count(lean) == 2 * COUNT - 3


@pytest.mark.parametrize("via", ["1.1 harmonia-0123456789abcdef", "1.1 nginx"])
def test_forwarded_requests_for_paths_of_an_upstream_go_to_the_handler(
    here: Callable[..., Server], closure: Closure, via: str
) -> None:
    closure.announce()
    server = here(COUNT_ALL)
    responses = substitute(server, closure, [f"Via: {via}"])
    assert [response.partition(b"\r\n\r\n")[2] for response in responses[COUNT:]] == closure.files
    assert count(server) == 0


def test_path_that_became_valid_here_is_answered_from_the_local_store(
    here: Callable[..., Server], closure: Closure, tmp_path: Path
) -> None:
    closure.announce()
    server = here()
    client = Client(server)
    for info in (*reversed(closure.infos), closure.infos[0]):
        assert b"\nURL: upstream/" in client.ask(narinfo_request(info))
    store = StoreBuilder(tmp_path / "store")
    store.add(closure.infos[0].path, random.Random(0).randbytes(NAR_BYTES), keys=[KEY])
    assert b"\nURL: nar/" in client.ask(narinfo_request(closure.infos[0]))
    client.close()


def test_nar_fetched_ahead_that_is_another_one_is_refused(here: Callable[..., Server], closure: Closure) -> None:
    closure.upstream.files[closure.nar(2).removeprefix("GET ")] = closure.files[3]
    closure.announce()
    server = here()
    client = Client(server)
    urls = [url_of(client.ask(narinfo_request(info))) for info in reversed(closure.infos)][::-1]
    assert client.ask(text("GET", urls[0], NIX)).endswith(closure.files[0])
    assert server.wait_for_log("another NarHash or NarSize")
    assert not client.ask(text("GET", urls[2], NIX)).endswith(closure.files[3])  # it breaks off
    client.close()
    assert server.get(f"/{closure.infos[2].path.hash_part}.narinfo").status == 404
    assert not [file for file in (server.cache_dir / "nar").iterdir() if urls[2].partition("-")[2] in file.name]


def test_nar_whose_download_breaks_off_is_resumed(here: Callable[..., Server], closure: Closure) -> None:
    closure.upstream.behaviours[re.escape(closure.nar(2).removeprefix("GET "))] = cut(1000, 2000)
    closure.announce()
    responses = substitute(here(), closure)
    assert [response.partition(b"\r\n\r\n")[2] for response in responses[COUNT:]] == closure.files


def test_nar_taken_from_memory_is_in_the_cache_for_the_next_client(
    here: Callable[..., Server], closure: Closure
) -> None:
    closure.announce()
    server = here()
    substitute(server, closure)
    asked = dict(closure.upstream.asked)
    for info, file in zip(closure.infos, closure.files, strict=True):
        answer = server.get(f"/{info.path.hash_part}.narinfo")
        part = server.get(f"/{fields(answer)['URL']}", {"Range": "bytes=100-"})
        assert (part.status, part.body) == (206, file[100:])
        assert server.get(f"/{fields(answer)['URL']}").body == file
    assert dict(closure.upstream.asked) == asked
    kept = {base32.encode(hashlib.sha256(file).digest()) for file in closure.files}
    nars = server.cache_dir / "nar"
    wait_until(lambda: {file.name.partition("-")[2].removesuffix(".nar.zstd") for file in nars.iterdir()} == kept)


def test_small_nars_are_served_when_memory_and_upstream_are_gone(
    here: Callable[..., Server], closure: Closure, tmp_path: Path
) -> None:
    closure.announce()
    server = here(cache_dir=tmp_path / "cache")
    substitute(server, closure)
    server.stop()
    closure.upstream.behaviours["."] = lambda handler: handler.answer(503, b"")
    server = here(cache_dir=tmp_path / "cache")
    for info, file in zip(closure.infos[1:], closure.files[1:], strict=True):
        assert server.get(f"/{fields(server.get(f'/{info.path.hash_part}.narinfo'))['URL']}").body == file

"""Two Harmonias: the narinfos of a closure take two requests, and NARs are fetched before a client asks for them."""

import asyncio
import hashlib
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zstandard

from harmonia.nix import narinfo
from harmonia.nix.path_info import PathInfo
from harmonia.nix.signing import SecretKey
from harmonia.nix.store_path import StorePath
from harmonia.tools.store_builder import StoreBuilder
from harmonia.upstream import plans
from support.running import Server, patched, peak_bytes, wait_until
from support.shared_store import dump
from support.small_disk import with_small_disk
from support.upstream_paths import KEY, entry, fields
from support.upstream_server import Behaviour, UpstreamServer, chunked, hang, status

Start = Callable[..., Server]

COUNT = 20
NAR_BYTES = 50_000
PATIENT = "upstream_timeout = 60.0"
AT_UPSTREAM = "access_log = true\nnar_compression = 'none'"


def chain(root: Path, count: int = COUNT, keys: tuple[SecretKey, ...] = (KEY,)) -> list[PathInfo]:
    """Build a store with a chain of paths, each referring to the one before it. Return them, references first."""
    store = StoreBuilder(root)
    infos: list[PathInfo] = []
    for number in range(count):
        references = [info.path for info in infos[-1:]]
        content = random.Random(number).randbytes(NAR_BYTES)
        infos.append(store.add(store.output_path(f"path-{number}"), content, references=references, keys=keys))
    return infos


def asked(server: Server, pattern: str) -> list[str]:
    """Return the requests in the access log of the upstream that contain `pattern`."""
    return [line for line in server.log if pattern in line]


@pytest.fixture
def there(tmp_path: Path) -> list[PathInfo]:
    return chain(tmp_path / "upstream")


@pytest.fixture
def upstream(start: Start, tmp_path: Path, there: list[PathInfo]) -> Server:
    del there  # made before the server starts
    return start(store=tmp_path / "upstream", settings=AT_UPSTREAM)


@pytest.fixture
def here(start: Start, tmp_path: Path) -> Callable[..., Server]:
    StoreBuilder(tmp_path / "store").add_text("here", b"here\n")
    return lambda *entries, settings=PATIENT, **options: start(
        store=tmp_path / "store", settings="\n".join([settings, *entries]), **options
    )


def get(server: Server, info: PathInfo) -> int:
    return server.get(f"/{info.path.hash_part}.narinfo").status


def get_nar(server: Server, info: PathInfo) -> bytes:
    answer = server.get(f"/{info.path.hash_part}.narinfo")
    nar = server.get(f"/{fields(answer)['URL']}")
    assert nar.status == 200
    return nar.body


def test_narinfos_of_a_closure_take_two_requests(
    upstream: Server, here: Callable[..., Server], there: list[PathInfo]
) -> None:
    server = here(entry(upstream))
    for info in reversed(there):
        answer = server.get(f"/{info.path.hash_part}.narinfo")
        assert narinfo.parse(answer.text, "/nix/store")[0] == info
    upstream.stop()  # so that its log is complete
    assert len(asked(upstream, ".narinfo")) == 1
    assert len(asked(upstream, ".closure")) == 1


def test_narinfo_of_a_plan_is_refused_without_a_valid_signature(
    start: Start, here: Callable[..., Server], tmp_path: Path
) -> None:
    infos = chain(tmp_path / "upstream")
    with StoreBuilder(tmp_path / "upstream").connect() as connection:
        forged = SecretKey.generate("upstream-1").sign(infos[3].fingerprint("/nix/store"))
        for info, sigs in ((infos[2], ""), (infos[3], forged)):
            path = f"/nix/store/{info.path}"
            connection.execute("update ValidPaths set sigs = ? where path = ?", [sigs, path])
    server = here(entry(start(store=tmp_path / "upstream", settings=AT_UPSTREAM)))
    assert [get(server, info) for info in reversed(infos)] == [
        404 if info in infos[2:4] else 200 for info in reversed(infos)
    ]
    assert server.wait_for_log("no signature by any of public_keys")


def test_what_a_plan_lacks_is_a_miss_without_a_request(
    start: Start, here: Callable[..., Server], tmp_path: Path
) -> None:
    infos = chain(tmp_path / "upstream")
    upstream = start(store=tmp_path / "upstream", settings=f"{AT_UPSTREAM}\n[publish]\ndeny = ['path-5']")
    server = here(entry(upstream))
    assert get(server, infos[-1]) == 200
    assert get(server, infos[5]) == 404
    upstream.stop()
    assert not asked(upstream, f"{infos[5].path.hash_part}.narinfo")


def test_plan_of_another_path_does_not_repeat_earlier_plans(
    start: Start, here: Callable[..., Server], tmp_path: Path
) -> None:
    infos = chain(tmp_path / "upstream")
    store = StoreBuilder(tmp_path / "upstream")
    middle = store.add(store.output_path("middle"), b"x", references=[infos[-1].path], keys=[KEY])
    top = store.add(store.output_path("top"), b"x", references=[infos[0].path, middle.path], keys=[KEY])
    upstream = start(store=tmp_path / "upstream", settings=AT_UPSTREAM)
    server = here(entry(upstream))
    assert [get(server, info) for info in (infos[-1], top, middle, infos[3])] == [200] * 4
    upstream.stop()
    assert [f"?have={infos[-1].path.hash_part}" in line for line in asked(upstream, ".closure")] == [False, True]
    assert len(asked(upstream, ".narinfo")) == 2


FAULTY: dict[str, Behaviour] = {
    "missing": status(404),
    "limited": status(429, Retry_After="60"),
    "broken": status(500),
    "garbage": lambda handler: handler.answer(200, b"StorePath: /nix/store/x\n\n\n\x00\xff"),
    "chunked": chunked,
}


@pytest.mark.parametrize("fault", FAULTY)
def test_upstream_without_a_usable_plan_is_asked_for_each_narinfo(
    here: Callable[..., Server], there: list[PathInfo], fault: str
) -> None:
    with UpstreamServer() as upstream:
        for info in there:
            upstream.add(info, b"", narinfo.NarFile("nar/x.nar"), (KEY,))
        upstream.files["/nix-cache-info"] += b"ClosureV1: .closure\n"
        upstream.files[f"/{there[-1].path.hash_part}.closure"] = b""
        upstream.behaviours[r"\.closure"] = FAULTY[fault]
        server = here(entry(upstream))
        assert [get(server, info) for info in reversed(there)] == [200] * COUNT
        assert sum(count for path, count in upstream.asked.items() if path.endswith(".closure")) >= 1


def test_plan_that_hangs_delays_the_narinfo_by_less_than_upstream_timeout(
    here: Callable[..., Server], there: list[PathInfo]
) -> None:
    with UpstreamServer() as upstream:
        for info in there[:2]:
            upstream.add(info, b"", narinfo.NarFile("nar/x.nar"), (KEY,))
        upstream.files["/nix-cache-info"] += b"ClosureV1: .closure\n"
        upstream.behaviours[r"\.closure"] = hang
        server = here(entry(upstream, timeout=600.0), settings="upstream_timeout = 5.0")
        assert [get(server, info) for info in (there[1], there[0])] == [200, 200]


def test_long_plan_takes_little_memory(here: Callable[..., Server]) -> None:
    """Without a limit, the references of these narinfos took 11 times as much memory as their text."""

    def text(number: int, references: int) -> str:
        first = number * references
        info = PathInfo(
            path=StorePath(f"{number:032d}-path"),
            nar_hash=bytes(32),
            nar_size=100,
            references=tuple(StorePath(f"{each:032d}-x") for each in range(first, first + references)),
        )
        return narinfo.render(info, "/nix/store", narinfo.NarFile("nar/x.nar"), ())

    plan = "\n".join([*(text(number, 25_000) for number in range(1, 35)), text(0, 1)]).encode()
    root = "0" * 32
    with UpstreamServer() as upstream:
        upstream.files["/nix-cache-info"] += b"ClosureV1: .closure\n"
        upstream.files[f"/{root}.narinfo"] = text(0, 1).replace(f"{root}-x", f"{1:032d}-x").encode()
        upstream.files[f"/{root}.closure"] = plan
        server = here(entry(upstream, verify=False))
        [worker] = server.workers
        before = peak_bytes(worker)
        assert server.get(f"/{root}.narinfo").status == 200
        assert peak_bytes(worker) - before < 7 * len(plan)


def test_plans_of_all_upstreams_share_their_memory(
    start: Start, here: Callable[..., Server], tmp_path: Path, there: list[PathInfo]
) -> None:
    others = StoreBuilder(tmp_path / "other")
    leaf = others.add(others.output_path("leaf"), b"leaf", keys=[KEY])
    root = others.add(others.output_path("root"), b"root", references=[leaf.path], keys=[KEY])
    first, second = (start(store=tmp_path / name, settings=AT_UPSTREAM) for name in ("upstream", "other"))
    little = patched("from harmonia.upstream import plans\nplans._MAX_BYTES = 5000")  # two paths of a plan
    server = here(entry(first), entry(second), program=little)
    assert [get(server, info) for info in (root, there[-1], leaf)] == [200] * 3
    second.stop()  # so that its log is complete
    assert len(asked(second, f"{root.path.hash_part}.closure")) == 1
    assert asked(second, f"{leaf.path.hash_part}.narinfo")  # the plan of another upstream has evicted it


def test_other_tasks_run_while_a_plan_is_remembered() -> None:
    async def other_turns() -> int:
        turns = 0

        async def take_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(take_turns())
        assert [each async for each in plans.in_turns(range(1000))] == list(range(1000))
        other.cancel()
        return turns

    assert asyncio.run(other_turns()) >= 1000 // plans.BATCH


def test_upstream_without_the_announcement_is_not_asked_for_plans(
    here: Callable[..., Server], there: list[PathInfo]
) -> None:
    with UpstreamServer() as upstream:
        for info in there:
            upstream.add(info, b"", narinfo.NarFile("nar/x.nar"), (KEY,))
        server = here(entry(upstream))
        assert [get(server, info) for info in reversed(there)] == [200] * COUNT
        assert not [path for path in upstream.asked if ".closure" in path]


def nars(server: Server) -> list[str]:
    return asked(server, "GET /nar/")


def test_nars_of_requested_narinfos_are_fetched_ahead(
    upstream: Server, here: Callable[..., Server], there: list[PathInfo]
) -> None:
    server = here(entry(upstream))
    wanted = there[: COUNT // 2]
    for info in reversed(wanted):
        assert get(server, info) == 200
    assert not nars(upstream)  # a client that asks only for narinfos, such as --dry-run, causes no download
    get_nar(server, wanted[0])
    wait_until(lambda: len(nars(upstream)) == len(wanted))
    assert {get_nar(server, info) for info in wanted} == {get_nar(upstream, info) for info in wanted}
    assert len([line for line in nars(upstream) if "harmonia/" in line]) == len(wanted)  # each was fetched once


def test_fetching_ahead_stays_within_its_budget(
    upstream: Server, here: Callable[..., Server], there: list[PathInfo]
) -> None:
    server = here(entry(upstream, fetch_ahead="160K"))  # three NARs

    def is_count(count: int) -> bool:
        return len(nars(upstream)) == count

    for info in reversed(there):
        assert get(server, info) == 200
    for number, info in enumerate(there, 1):
        get_nar(server, info)
        assert len(nars(upstream)) <= number + 3
        wait_until(partial(is_count, min(number + 3, COUNT)))


@pytest.mark.root
def test_nars_fetched_ahead_are_downloaded_once_although_the_disk_is_full(
    upstream: Server, here: Callable[..., Server], there: list[PathInfo], tmp_path: Path
) -> None:
    cache_dir = tmp_path / "small"
    program = with_small_disk(cache_dir, "128k")  # two NARs
    server = here(entry(upstream), settings=f"{PATIENT}\ncache_size = '1G'", cache_dir=cache_dir, program=program)
    for info in reversed(there):
        assert get(server, info) == 200
    got = [get_nar(server, info) for info in there]
    assert len(nars(upstream)) <= COUNT + 1  # a NAR whose file breaks off is requested again
    assert got == [get_nar(upstream, info) for info in there]
    server.wait_for_log("cannot write to the cache")


def test_wrong_file_sizes_do_not_extend_the_budget(here: Callable[..., Server], tmp_path: Path) -> None:
    """FileSize is not signed. An upstream that made it 1 for each NAR had all of them fetched ahead."""
    infos = chain(tmp_path / "upstream", 40)
    with UpstreamServer() as upstream:
        for info in infos:
            file = zstandard.ZstdCompressor(1).compress(dump(StoreBuilder(tmp_path / "upstream"), info.path.name))
            nar_file = narinfo.NarFile(f"nar/{info.path}.zst", "zstd", hashlib.sha256(file).digest(), 1)
            upstream.add(info, file, nar_file, (KEY,))
        upstream.files["/nix-cache-info"] += b"ClosureV1: .closure\n"
        narinfos = [upstream.files[f"/{info.path.hash_part}.narinfo"] for info in infos]
        upstream.files[f"/{infos[-1].path.hash_part}.closure"] = b"\n".join(narinfos)
        server = here(entry(upstream, fetch_ahead="160K"))  # three NARs, but 16 connections
        for info in reversed(infos):
            assert get(server, info) == 200
        for number, info in enumerate(infos[:10], 1):
            get_nar(server, info)
            wait_until(lambda: sum("/nar/" in path for path in list(upstream.asked)) > 16)
            server.settle()
            assert sum("/nar/" in path for path in list(upstream.asked)) <= number + 16 + 4


@pytest.mark.parametrize("option", [{"fetch_ahead": "0"}, {"mode": "redirect"}])
def test_no_nar_is_fetched_ahead_without_a_budget_or_cache(
    upstream: Server, here: Callable[..., Server], there: list[PathInfo], option: dict[str, Any]
) -> None:
    server = here(entry(upstream, **option))
    for info in reversed(there):
        assert get(server, info) == 200
    if "mode" not in option:
        get_nar(server, there[0])
    server.settle()
    server.stop()
    upstream.stop()
    assert len(nars(upstream)) == (0 if "mode" in option else 1)


def test_nars_that_no_client_requests_are_removed(
    upstream: Server, here: Callable[..., Server], there: list[PathInfo], tmp_path: Path
) -> None:
    left = tmp_path / "left"  # exists when the client has left for long
    waiting = f"""
import asyncio, os
from harmonia.upstream import fetch_ahead
from harmonia.upstream.fetch_ahead import FetchAhead
clean = FetchAhead._clean
async def clean_later(self):
    while not os.path.exists({str(left)!r}):
        await asyncio.sleep(0.01)
    await clean(self)
FetchAhead._clean = clean_later
fetch_ahead._UNCLAIMED_S = 0.0
"""
    server = here(entry(upstream), program=patched(waiting))
    for info in reversed(there):
        assert get(server, info) == 200
    get_nar(server, there[0])
    cached = server.cache_dir / "nar"
    wait_until(lambda: sum(file.suffix != ".growing" for file in cached.iterdir()) == COUNT)
    left.touch()
    wait_until(lambda: len(list(cached.iterdir())) == 1)
    assert [get_nar(server, info) for info in there] == [get_nar(upstream, info) for info in there]

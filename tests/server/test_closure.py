"""`/<hash>.closure`: the narinfos of a whole closure, references first, without what the client has or may not see."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonia.nix import narinfo
from harmonia.nix.store_path import StorePath
from harmonia.server.path_lookup import SignedPath
from harmonia.server.resources.closure import references_first
from harmonia.tools.store_builder import StoreBuilder
from support.running import FROZEN_RATES, Answer, Server, patched, unpacked

if TYPE_CHECKING:
    from harmonia.nix.path_info import PathInfo

Start = Callable[..., Server]

ABSENT = "0" * 32
COUNT = 60


class Graph:
    """A store whose paths refer to random earlier ones, some to themselves."""

    def __init__(self, root: Path, count: int = COUNT) -> None:
        self.root = root
        store = StoreBuilder(root)
        chosen = random.Random(24)
        self.infos: list[PathInfo] = []
        for number in range(count):
            output = store.output_path(f"path-{number}")
            earlier = [each.path for each in chosen.sample(self.infos, min(number, 1 + chosen.randrange(3)))]
            references = [*earlier, *([output] if number % 3 == 0 else [])]
            self.infos.append(store.add(output, b"content", references=references))
        self.by_path = {info.path: info for info in self.infos}

    def closure(self, *roots: StorePath, hidden: frozenset[StorePath] = frozenset()) -> set[StorePath]:
        found: set[StorePath] = set()
        pending = list(roots)
        while pending:
            if (path := pending.pop()) not in found | hidden:
                found.add(path)
                pending += self.by_path[path].references
        return found


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return Graph(tmp_path_factory.mktemp("graph") / "store")


@pytest.fixture(scope="module")
def server(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "server", graph.root)
    server.start()
    yield server
    assert server.stop() == 0
    assert not [line for line in server.log if "Traceback" in line]


def paths(answer: Answer) -> list[StorePath]:
    assert answer.status == 200
    return [narinfo.parse(text, "/nix/store")[0].path for text in narinfo.split(answer.text)]


@pytest.mark.parametrize("number", [0, 1, COUNT // 2, COUNT - 1])
def test_closure_has_each_narinfo_once_and_references_first(server: Server, graph: Graph, number: int) -> None:
    root = graph.infos[number].path
    answer = server.get(f"/{root.hash_part}.closure")
    assert answer.headers["content-type"] == "text/x-nix-narinfo"
    assert answer.headers["cache-control"] == "public, max-age=86400"
    assert narinfo.split(answer.text) == [server.get(f"/{path.hash_part}.narinfo").text for path in paths(answer)]
    assert set(paths(answer)) == graph.closure(root)
    assert paths(answer)[-1] == root
    seen: set[StorePath] = set()
    for path in paths(answer):
        assert path not in seen
        seen.add(path)
        assert set(graph.by_path[path].references) <= seen


@given(st.data())
def test_closures_of_paths_in_have_are_left_out(server: Server, graph: Graph, data: st.DataObject) -> None:
    root = data.draw(st.sampled_from(graph.infos)).path
    had = data.draw(st.lists(st.sampled_from(graph.infos), max_size=3))
    have = ",".join([*(info.path.hash_part for info in had), ABSENT])
    expected = graph.closure(root) - graph.closure(*(info.path for info in had))
    assert set(paths(server.get(f"/{root.hash_part}.closure?have={have}"))) == expected


class Counting(dict[str, SignedPath]):
    """A dictionary that counts how often it is searched."""

    searched = 0

    def __contains__(self, key: object) -> bool:
        self.searched += 1
        return super().__contains__(key)


def test_closures_of_paths_in_have_are_walked_once(graph: Graph) -> None:
    """With a walk for each, 64 of them that had 10,000 paths took 21 s of the event loop."""
    published = Counting({info.path.hash_part: SignedPath(info, ()) for info in graph.infos})
    root, *had = (SignedPath(info, ()) for info in reversed(graph.infos))
    left = references_first(root, had, published)
    assert [path.info.path for path in left] == [graph.infos[-1].path]
    assert published.searched <= len(had) + sum(1 + len(info.references) for info in graph.infos)


@pytest.mark.parametrize("have", ["x", f"{ABSENT},x", "e" * 32, ",".join([ABSENT] * 65)])
def test_malformed_have_gets_400_with_the_reason(server: Server, graph: Graph, have: str) -> None:
    answer = server.get(f"/{graph.infos[0].path.hash_part}.closure?have={have}")
    assert (answer.status, "at most 64 hash parts" in answer.text) == (400, True)


def test_64_hash_parts_of_have_fit(server: Server, graph: Graph) -> None:
    have = ",".join([ABSENT] * 63 + [graph.infos[-1].path.hash_part])
    answer = server.get(f"/{graph.infos[-1].path.hash_part}.closure?have={have}")
    assert (answer.status, answer.body) == (200, b"")


def test_etag_depends_on_the_content(server: Server, graph: Graph) -> None:
    url = f"/{graph.infos[-1].path.hash_part}.closure"
    whole = server.get(url)
    assert server.get(url, {"If-None-Match": whole.headers["etag"]}).status == 304
    part = server.get(f"{url}?have={graph.infos[-2].path.hash_part}")
    assert (part.headers["etag"] == whole.headers["etag"]) == (part.body == whole.body)
    encoded = server.get(url, {"Accept-Encoding": "zstd"})
    assert unpacked(encoded.body) == whole.body


def test_unpublished_path_and_what_only_it_refers_to_are_left_out(start: Start, graph: Graph) -> None:
    hidden = frozenset(info.path for info in graph.infos[:-1:4])
    names = ", ".join(repr(path.name) for path in hidden)
    server = start(store=graph.root, settings=f"[publish]\ndeny = [{names}]")
    root = graph.infos[-1].path
    assert set(paths(server.get(f"/{root.hash_part}.closure"))) == graph.closure(root, hidden=hidden)
    hidden_root = next(iter(hidden)).hash_part
    assert server.get(f"/{hidden_root}.closure").status == 404
    # A hidden path in `have` is like an absent one: its closure is not shown by what is left out.
    have = server.get(f"/{root.hash_part}.closure?have={','.join(path.hash_part for path in hidden)}")
    assert have.body == server.get(f"/{root.hash_part}.closure").body


def test_malformed_row_is_left_out(start: Start, tmp_path: Path) -> None:
    graph = Graph(tmp_path / "store", 20)
    root, other = (
        graph.infos[-1].path,
        next(path for path in graph.infos[-1].references if path != graph.infos[-1].path),
    )
    with StoreBuilder(tmp_path / "store").connect() as connection:
        connection.execute("update ValidPaths set narSize = null where path = ?", [f"/nix/store/{other}"])
    found = paths(start(store=tmp_path / "store").get(f"/{root.hash_part}.closure"))
    assert set(found) == graph.closure(root, hidden=frozenset([other]))


def test_cycle_in_the_database_ends(start: Start, tmp_path: Path) -> None:
    """Nix makes none, but a damaged database must not make the server loop."""
    graph = Graph(tmp_path / "store", 10)
    with StoreBuilder(tmp_path / "store").connect() as connection:
        connection.execute("insert or ignore into Refs select 1, id from ValidPaths")
    root = graph.infos[-1].path
    assert paths(start(store=tmp_path / "store").get(f"/{root.hash_part}.closure"))[-1] == root


def test_closure_is_whole_if_those_in_have_make_it_too_long(start: Start, graph: Graph) -> None:
    """A client names what it got within the last hour, which must not make a short closure a 404."""
    root, *had = (info.path for info in graph.infos[COUNT // 2 :])
    size = len(graph.closure(root))
    assert len(graph.closure(root, *had)) > size
    limited = patched(f"from harmonia.server.resources import closure\nclosure.MAX_BULK_PATHS = {size}")
    server = start(store=graph.root, program=limited)
    have = ",".join(path.hash_part for path in had)
    assert set(paths(server.get(f"/{root.hash_part}.closure?have={have}"))) == graph.closure(root)


def test_closure_without_those_in_have_counts_once(start: Start, graph: Graph) -> None:
    """Otherwise, it could need more than `max_bulk_rate`: the client would get 429 whenever it asks."""
    root, *had = (info.path for info in graph.infos[COUNT // 2 :])
    size = len(graph.closure(root))
    limit = f"from harmonia.server.resources import closure\nclosure.MAX_BULK_PATHS = {size}"
    server = start(store=graph.root, settings="max_bulk_rate = 10000", program=patched(f"{FROZEN_RATES}\n{limit}"))
    lines = "\n".join(f"{number:032}" for number in range(10_000 - size))
    assert server.post("/get-narinfos-v1", lines.encode()).status == 200
    have = ",".join(path.hash_part for path in had)
    assert set(paths(server.get(f"/{root.hash_part}.closure?have={have}"))) == graph.closure(root)
    assert server.get(f"/{root.hash_part}.closure").status == 429


def test_closure_with_too_many_paths_gets_404_and_each_path_counts(start: Start, graph: Graph) -> None:
    root = graph.infos[-1].path
    size = len(graph.closure(root))
    small = patched(f"from harmonia.server.resources import closure\nclosure.MAX_BULK_PATHS = {size - 1}")
    assert start(store=graph.root, program=small).get(f"/{root.hash_part}.closure").status == 404
    server = start(store=graph.root, settings="max_bulk_rate = 10000", program=patched(FROZEN_RATES))
    lines = "\n".join(f"{number:032}" for number in range(10_000))
    assert server.post("/get-narinfos-v1", lines.encode()).status == 200
    assert server.get(f"/{root.hash_part}.closure").status == 429
    both = patched(f"{FROZEN_RATES}from harmonia.server.resources import closure\nclosure.MAX_BULK_PATHS = {size - 1}")
    server = start(store=graph.root, settings="max_bulk_rate = 10000", program=both)
    served = 10_000 // (size - 1)
    statuses = [server.get(f"/{root.hash_part}.closure").status for _ in range(served + 1)]
    assert statuses == [404] * served + [429]

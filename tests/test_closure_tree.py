"""The tree of a closure shows the paths whose removal would make the closure smaller, and by how much."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmonia.nix.path_info import PathInfo
from harmonia.store import closure_tree
from harmonia.store.closure_tree import dominators
from harmonia.store.store import Store
from harmonia.tools.store_builder import StoreBuilder

GRAPHS = st.integers(1, 12).flatmap(
    lambda nodes: st.tuples(*(st.lists(st.integers(node, nodes - 1)) for node in range(nodes)))
)
"""References of each node, only to itself and to later ones: graphs as the database has them."""


def reached(references: Mapping[int, Sequence[int]], without: int | None = None) -> set[int]:
    """Return the nodes that 0 reaches if the node `without` does not exist."""
    found: set[int] = set()
    waiting = [0]
    while waiting:
        node = waiting.pop()
        if node not in found and node != without:
            found.add(node)
            waiting += references[node]
    return found


@given(GRAPHS)
def test_dominators_are_the_nodes_without_which_others_are_not_reached(graph: tuple[list[int], ...]) -> None:
    references = dict(enumerate(graph))
    parents = dominators(0, references)
    everything = reached(references)
    assert parents.keys() == everything
    for node in everything - {0}:
        lost = everything - reached(references, without=node)

        def below(other: int, ancestor: int = node) -> bool:
            while other not in (ancestor, 0):
                other = parents[other]
            return other == ancestor

        assert lost == {other for other in everything if below(other)}


def summary(builder: StoreBuilder, root: PathInfo) -> closure_tree.Summary:
    store = Store("/nix/store", builder.real_dir, builder.db_path)
    try:
        return closure_tree.summarize(store, root.path)
    finally:
        store.database.close()


def test_large_paths_are_shown_with_what_only_they_need(tmp_path: Path) -> None:
    builder = StoreBuilder(tmp_path)

    def add(name: str, size: int, *references: PathInfo) -> PathInfo:
        return builder.add_source(name, bytes(size), [each.path for each in references])

    shared = add("shared", 50_000)
    font = add("font", 90_000)
    small = add("small", 10)
    editor = add("editor", 20_000, font, shared, small)
    shell = add("shell", 1_000, shared)
    root = add("system", 10, editor, shell, small)
    found = summary(builder, root)
    assert found.closure.paths == 6
    assert [(node.path.name, node.size) for node in found.tree] == [
        ("editor", editor.nar_size + font.nar_size),
        ("shared", shared.nar_size),
    ]
    assert [node.path.name for node in found.tree[0].children] == ["font"]


def test_path_that_refers_to_itself_has_no_tree(tmp_path: Path) -> None:
    builder = StoreBuilder(tmp_path)
    output = builder.output_path("alone")
    root = builder.add(output, b"alone", references=[output])
    assert summary(builder, root) == ((1, root.nar_size, True), ())


def test_large_closure_has_no_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = StoreBuilder(tmp_path)
    reference = builder.add_source("reference", bytes(1000))
    root = builder.add_source("root", b"", [reference.path])
    assert summary(builder, root).tree
    monkeypatch.setattr(closure_tree, "_MAX_PATHS", 1)
    assert summary(builder, root) == ((2, root.nar_size + reference.nar_size, True), ())


def test_path_that_was_deleted_meanwhile_has_no_tree(tmp_path: Path) -> None:
    builder = StoreBuilder(tmp_path)
    root = builder.add_source("root", b"")
    with builder.connect() as connection:
        connection.execute("delete from ValidPaths")
    assert summary(builder, root) == ((0, 0, True), ())

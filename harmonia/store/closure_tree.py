"""The paths that make a closure large: its dominator tree, cut down to the large nodes.

A path dominates another one if every chain of references from the root to that one contains it. So the size of a node
is what the closure would lose if nothing referred to the path any longer.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import NamedTuple

from harmonia.errors import FormatError
from harmonia.nix.store_path import StorePath
from harmonia.store import queries
from harmonia.store.store import Store

_MAX_PATHS = 10_000
_MAX_DEPTH = 3
_MAX_CHILDREN = 6
_MIN_PART = 0.02  # of the whole closure


class Node(NamedTuple):
    path: StorePath
    size: int
    """The sum of the NAR sizes of the path and of all paths that only it needs, in bytes."""
    children: tuple["Node", ...]
    """The largest of the paths that only it needs, the largest first."""


class Summary(NamedTuple):
    closure: queries.Closure
    tree: tuple[Node, ...]
    """The large nodes below the root. Empty if there are none, or if the closure has over _MAX_PATHS paths."""


def summarize(store: Store, root: StorePath) -> Summary:
    """Return the size of a valid path's closure, and the paths that make it large."""
    closure = queries.closure_size(store, root)
    try:
        return Summary(closure, _tree(store, root) if closure.paths <= _MAX_PATHS else ())
    except FormatError:  # a malformed path in the database
        return Summary(closure, ())


def _tree(store: Store, root: StorePath) -> tuple[Node, ...]:
    references: defaultdict[int, list[int]] = defaultdict(list)
    for referrer, reference in queries.closure_references(store, root, _MAX_PATHS):
        references[referrer].append(reference)
    rows = queries.closure_rows(store, root, _MAX_PATHS)
    names = {number: name for number, name, _, _ in rows}
    sizes = {number: max(size or 0, 0) for number, _, _, size in rows}
    start = next((number for number, name in names.items() if name == root), None)
    if start is None:  # deleted meanwhile
        return ()
    parents = {node: parent for node, parent in dominators(start, references).items() if node in names}
    children: defaultdict[int, list[int]] = defaultdict(list)
    for node, parent in reversed(parents.items()):  # first the nodes that dominate no other
        if node != start:
            sizes[parent] += sizes[node]
            children[parent].append(node)
    least = max(1, _MIN_PART * sizes[start])

    def nodes(parent: int, depth: int) -> tuple[Node, ...]:
        if depth > _MAX_DEPTH:
            return ()
        large = sorted((-sizes[node], names[node], node) for node in children[parent] if sizes[node] >= least)
        return tuple(Node(StorePath(name), -size, nodes(node, depth + 1)) for size, name, node in large[:_MAX_CHILDREN])

    return nodes(start, 1)


def dominators(start: int, references: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """Return the immediate dominator of each node that `start` reaches, each after its dominator.

    The graph has no cycles, except nodes that refer to themselves: then one pass in topological order is enough
    (Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm").
    """
    order = _topological(start, references)
    place = {node: number for number, node in enumerate(order)}
    referrers: defaultdict[int, list[int]] = defaultdict(list)
    for node in order:
        for reference in references.get(node, ()):
            if place[reference] > place[node]:
                referrers[reference].append(node)
    found = {start: start}

    def common(one: int, other: int) -> int:
        while one != other:
            if place[one] > place[other]:
                one = found[one]
            else:
                other = found[other]
        return one

    for node in order[1:]:
        found[node] = reduce(common, referrers[node])
    return found


def _topological(start: int, references: Mapping[int, Sequence[int]]) -> list[int]:
    """Return the nodes that `start` reaches, each before its references (the reverse postorder of a search)."""
    seen = {start}
    finished = []
    stack = [(start, iter(references.get(start, ())))]
    while stack:
        node, rest = stack[-1]
        for reference in rest:
            if reference not in seen:
                seen.add(reference)
                stack.append((reference, iter(references.get(reference, ()))))
                break
        else:
            stack.pop()
            finished.append(node)
    return finished[::-1]

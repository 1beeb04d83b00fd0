"""The gate of `make bench --short` fails only if a figure is bad in every round."""

from typing import Any

import pytest

from benchmarks.figures import Figure
from benchmarks.servers import HARMONIA


def figure(ours: list[float], theirs: list[float], unit: str = "s", **target: Any) -> Figure:
    return Figure("what", unit, "nginx", **target, values={HARMONIA: ours, "nginx": theirs})


@pytest.mark.parametrize(
    ("ours", "collapsed"),
    [
        ([100.0, 100.0, 100.0, 100.0, 100.0], False),
        ([10.0, 10.0, 10.0, 10.0, 10.0], True),
        ([10.0, 10.0, 10.0, 10.0, 30.0], False),
        ([19.9], True),
        ([], False),
    ],
)
def test_figure_collapses_only_if_it_does_in_every_round(ours: list[float], collapsed: bool) -> None:  # noqa: FBT001 (a parameter of pytest)
    theirs = [100.0] * len(ours)
    assert figure(ours, theirs, at_least=0.8).collapsed(0.25) is collapsed
    assert figure(theirs, ours, at_most=1.25).collapsed(0.25) is collapsed


def test_figure_without_target_or_reference_never_collapses() -> None:
    assert not figure([1.0], [1000.0]).collapsed(0.25)
    assert not Figure("figure", "s", at_most=0.001, values={HARMONIA: [1000.0]}).collapsed(0.25)


def test_speed_is_above_1_if_we_are_faster() -> None:
    assert figure([1.0, 1.0], [2.0, 2.0]).speed("nginx") == 2
    assert figure([1.0, 1.0], [2.0, 2.0], unit="MiB/s").speed("nginx") == 0.5
    assert figure([1.0], [2.0]).speed("other") is None

"""The gate of `make bench --short` fails only if a figure is bad in every round."""

from typing import Any

import pytest

from benchmarks.figures import Figure
from benchmarks.servers import HARMONIA
from benchmarks.xz_or_zstd import Method, row, xz, zstd


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


def test_time_at_a_bandwidth_is_that_of_the_slowest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 5.0, 10.0, 14.0, 20.0, 29.0, 30.0, 31.0, 40.0, 43.0, 50.0, 52.0))
    monkeypatch.setattr("benchmarks.xz_or_zstd.time.process_time", lambda: next(clock))
    half = Method("half", lambda nar: nar[: len(nar) // 2], lambda file: file * 2)
    nars = [bytes(1_000_000), bytes(3_000_000)]
    # 2 MB; made in 5, 4 or 9 s, unpacked in 1, 3 or 2 s; sent in 1.6, 0.16 and 0.016 s
    assert row(half, nars) == "| half | 2.0 | 2.00 | 4.0 | 1.00 | 1.6 / 4.0 | 1.0 / 4.0 | 1.0 / 4.0 |"


@pytest.mark.parametrize("method", [zstd(3), xz(6)], ids=lambda method: method.name)
def test_compressed_nar_unpacks_to_itself(method: Method) -> None:
    nar = bytes(range(256)) * 100_000
    assert method.unpack(method.compress(nar)) == nar

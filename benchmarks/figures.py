"""Figures: measurements of several contenders in several rounds, and the ratio of ours to a reference."""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.servers import HARMONIA

TIMES = {"s", "ms", "µs"}
"""Units of which less is better."""


@dataclass(frozen=True)
class Sample:
    """One measurement of a contender."""

    values: Sequence[float]
    """A value for each figure."""
    cpu: float | None = None
    """Seconds of processor time of the server for each unit of work (`Figure.work`)."""


Measure = Callable[[], Sequence[float] | Sample]


@dataclass
class Figure:
    what: str
    unit: str
    reference: str | None = None
    """Contender whose values are the divisor of the ratio."""
    at_least: float | None = None
    """Target for the ratio. If there is no reference, the target is for the value itself."""
    at_most: float | None = None
    other_at_least: float | None = None
    """Target for the speed compared with the server of BENCH_OTHER: 2 is twice as fast."""
    work: str = ""
    """Unit of work of the processor time, such as GiB."""
    values: dict[str, list[float]] = field(default_factory=dict)
    """Values of each contender, one per round."""
    cpu: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of processor time of each contender for a unit of work, one per round."""

    def median(self, contender: str) -> float:
        return statistics.median(self.values[contender])

    def speed(self, other: str) -> float | None:
        """Return how many times as fast as another contender we are, or None if it was not measured."""
        if HARMONIA not in self.values or other not in self.values:
            return None
        pairs = zip(self.values[HARMONIA], self.values[other], strict=True)
        return statistics.median([theirs / ours if self.unit in TIMES else ours / theirs for ours, theirs in pairs])

    @property
    def ratios(self) -> Sequence[float]:
        """Ratio of ours to the reference in each round. Empty if there is no reference."""
        ours, theirs = self.values.get(HARMONIA), self.values.get(self.reference or "")
        return [mine / other for mine, other in zip(ours, theirs, strict=True)] if ours and theirs else []

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def reached(self) -> float | None:
        """Share of the target that the median reaches: 1 or more meets it. None without a target or reference."""
        value = self.ratio if self.reference else self.median(HARMONIA)
        return None if value is None else self._share(value)

    def _share(self, value: float) -> float | None:
        if self.at_least is not None:
            return value / self.at_least
        return self.at_most / value if self.at_most is not None else None

    def collapsed(self, share: float) -> bool:
        """Return True if the ratio is below this share of the target in every round.

        Noise of the machine slows some rounds. Only a regression slows all of them.
        """
        shares = [reached for reached in map(self._share, self.ratios) if reached is not None]
        return bool(shares) and max(shares) < share


def compare(figures: Sequence[Figure], contenders: Mapping[str, Measure], rounds: int) -> Sequence[Figure]:
    """Fill the figures. Each contender measures one value for each figure and round.

    The contenders take turns, in a random order each round, so that noise of the machine affects all of them.
    """
    for _ in range(rounds):
        for name in random.sample(list(contenders), len(contenders)):
            measured = contenders[name]()
            sample = measured if isinstance(measured, Sample) else Sample(measured)
            for figure, value in zip(figures, sample.values, strict=True):
                figure.values.setdefault(name, []).append(value)
            if sample.cpu is not None:
                figures[0].cpu.setdefault(name, []).append(sample.cpu)
    for figure in figures:
        medians = ", ".join(f"{name} {figure.median(name):.4g}" for name in figure.values)
        print(f"  {figure.what}: {medians} {figure.unit}", flush=True)
    return figures

"""A figure: what several contenders were measured at, round after round, and how ours compares."""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.servers import HARMONIA

Measure = Callable[[], Sequence[float]]


@dataclass
class Figure:
    what: str
    unit: str
    reference: str | None = None
    """The contender by whose values ours are divided."""
    at_least: float | None = None
    """The target: for the ratio, or where there is no reference, for the value itself."""
    at_most: float | None = None
    values: dict[str, list[float]] = field(default_factory=dict)
    """By contender, one for each round."""

    def median(self, contender: str) -> float:
        return statistics.median(self.values[contender])

    @property
    def ratios(self) -> Sequence[float]:
        """Each round's ratio of ours to the reference. Empty if there is nothing to compare with."""
        ours, theirs = self.values.get(HARMONIA), self.values.get(self.reference or "")
        return [mine / other for mine, other in zip(ours, theirs, strict=True)] if ours and theirs else []

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def reached(self) -> float | None:
        """How much of the target the median is: 1 or more is all. None without a target or anything to compare with."""
        value = self.ratio if self.reference else self.median(HARMONIA)
        return None if value is None else self._share(value)

    def _share(self, value: float) -> float | None:
        if self.at_least is not None:
            return value / self.at_least
        return self.at_most / value if self.at_most is not None else None

    def collapsed(self, share: float) -> bool:
        """Return whether no round's ratio reached this share of the target.

        What disturbs the machine slows some rounds. Only a fault of ours slows all of them.
        """
        shares = [reached for reached in map(self._share, self.ratios) if reached is not None]
        return bool(shares) and max(shares) < share


def compare(figures: Sequence[Figure], contenders: Mapping[str, Measure], rounds: int) -> Sequence[Figure]:
    """Fill the figures with what each contender measures, which is one value for each figure.

    They take turns, in another order each round, so that a noisy machine is so to all of them.
    """
    for _ in range(rounds):
        for name in random.sample(list(contenders), len(contenders)):
            for figure, value in zip(figures, contenders[name](), strict=True):
                figure.values.setdefault(name, []).append(value)
    for figure in figures:
        medians = ", ".join(f"{name} {figure.median(name):.4g}" for name in figure.values)
        print(f"  {figure.what}: {medians} {figure.unit}", flush=True)
    return figures

"""Statistics of interleaved repetitions: medians, quartiles, and ratios of pairs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """A median and its spread: half of the samples lie between `low` and `high`."""

    median: float
    low: float
    high: float
    count: int


def summarize(samples: Sequence[float]) -> Summary:
    """Median and quartiles. Raises ValueError when there are no samples."""
    if not samples:
        raise ValueError("there are no samples to summarize")
    ordered = sorted(samples)
    return Summary(
        statistics.median(ordered), _quantile(ordered, 0.25), _quantile(ordered, 0.75), len(ordered)
    )


def speed_up(baseline: Sequence[float], samples: Sequence[float]) -> Summary:
    """How many times faster than the baseline: the ratio of each round's two times, summarized.

    Both took their turns in the same rounds, so their i-th samples were taken close together, and
    what slowed one of them slowed the other. Raises ValueError when there is no common round.
    """
    return summarize([theirs / ours for theirs, ours in zip(baseline, samples)])


def _quantile(ordered: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the two samples around it."""
    place = fraction * (len(ordered) - 1)
    index = int(place)
    above = ordered[min(index + 1, len(ordered) - 1)]
    return ordered[index] + (place - index) * (above - ordered[index])

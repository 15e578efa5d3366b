"""Is a difference more than seed noise? Student's t over pairs of runs with the same seed."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

SEEDS_NEEDED = 3
CONFIDENCE = 0.95

Verdict = Literal["more than seed noise", "within seed noise", "the same", "cannot be told"]


class Difference(NamedTuple):
    """The mean difference of two arms over the seeds that both have.

    Attributes:
      mean: of (this arm - baseline).
      low: lower end of the 95 % confidence interval; NaN where it cannot be told.
      high: its upper end.
      seeds: number of pairs.
      verdict: in words.
      reason: why it cannot be told.
    """

    mean: float
    low: float
    high: float
    seeds: int
    verdict: Verdict
    reason: str = ""


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and its standard error, s / √n; NaN for a single value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def paired_difference(baseline: Mapping[int, float], other: Mapping[int, float]) -> Difference:
    """Compares two arms seed by seed.

    The interval is mean ± t · s / √n of the differences, t being Student's quantile with n - 1 degrees of freedom. A
    difference is more than seed noise when it excludes 0 and there are at least three seeds.

    Args:
      baseline: number by seed.
      other: number by seed.
    """
    seeds = sorted(baseline.keys() & other.keys())
    values = [other[seed] - baseline[seed] for seed in seeds]
    unknown = Difference(math.nan, math.nan, math.nan, len(seeds), "cannot be told")
    if not values:
        return unknown._replace(reason="no seed in common")
    if not all(map(math.isfinite, values)):
        return unknown._replace(reason="a number is not finite")
    mean, error = mean_and_error(values)
    unknown = unknown._replace(mean=mean)
    if len(seeds) < SEEDS_NEEDED:
        return unknown._replace(reason=f"{len(seeds)} of {SEEDS_NEEDED} seeds")
    largest = max(abs(number) for seed in seeds for number in (baseline[seed], other[seed]))
    if max(values) - min(values) <= 4 * math.ulp(largest):  # what subtraction leaves of equal differences
        if mean == 0:
            return Difference(0.0, 0.0, 0.0, len(seeds), "the same")
        return unknown._replace(reason="all seeds differ by the same, which says nothing of noise")
    half = student_t(len(seeds) - 1) * error
    low, high = mean - half, mean + half
    return Difference(mean, low, high, len(seeds), "within seed noise" if low <= 0 <= high else "more than seed noise")


def student_t(degrees: int) -> float:
    """Returns the quantile of Student's t that leaves half of 1 - CONFIDENCE above it."""
    from scipy.stats import t

    return float(t.ppf(0.5 + CONFIDENCE / 2, degrees))

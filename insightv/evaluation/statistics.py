"""Numbers with their uncertainty, on numpy alone.

Questions about one table share its difficulty, so intervals resample whole groups
(a cluster bootstrap, Davison and Hinkley 1997, section 3.8). Every estimate here is a ratio of
two sums over groups, so one matrix product gives all resamples at once; entries that are
compared are resampled together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 2000
"""Resamples behind an interval: the error of its ends is then about a tenth of its width."""

LEVEL = 0.95

_CHUNK = 2**24
"""Cells of the resampling matrix held at once (128 MiB of float64)."""

Array = NDArray[np.float64]


def verdict_name(correct: bool | None) -> str:
    """A verdict in a word."""
    return "undecided" if correct is None else "right" if correct else "wrong"


@dataclass(frozen=True)
class Estimate:
    """A value, its interval, and how much it rests on.

    Attributes:
        value: The point estimate; NaN when there is nothing to estimate from.
        low: Lower end of the interval.
        high: Upper end.
        n: Number of questions.
        groups: Number of groups that were resampled.
    """

    value: float
    low: float
    high: float
    n: int
    groups: int


NOTHING = Estimate(float("nan"), float("nan"), float("nan"), 0, 0)


def accuracy(
    right: Sequence[float], groups: Sequence[str], seed: int = 0, draws: int = DRAWS
) -> Estimate:
    """Share of right answers with its 95 % interval.

    Where all answers (or none) are right, resampling shows no spread; the open end is then
    the exact binomial bound with groups as trials, ``1 - 0.025 ** (1 / groups)``.

    Args:
        right: Whether each question was answered rightly, or what part of it was.
        groups: The group of each question.
        seed: Seed of the resamples.
        draws: Number of resamples.
    """
    if len(right) == 0:
        return NOTHING
    hits, sizes = _sums([np.asarray(right, float), np.ones(len(right))], groups)
    value = float(hits.sum() / sizes.sum())
    slack = 1 - ((1 - LEVEL) / 2) ** (1 / len(sizes))
    if value == 0.0:
        return Estimate(value, 0.0, slack, len(right), len(sizes))
    if value == 1.0:
        return Estimate(value, 1.0 - slack, 1.0, len(right), len(sizes))
    low, high = _interval(hits, sizes, seed, draws)
    return Estimate(value, low, high, len(right), len(sizes))


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    groups: Sequence[str],
    seed: int = 0,
    draws: int = DRAWS,
) -> Estimate:
    """Accuracy of ``first`` minus accuracy of ``second`` on the same questions.

    Both are resampled together, so that what they share (hard tables) cancels.

    Args:
        first: Whether each question was answered rightly by the one.
        second: The same for the other, in the same order.
        groups: The group of each question.
        seed: Seed of the resamples.
        draws: Number of resamples.
    """
    if len(first) != len(second):
        raise ValueError("a paired difference needs the same questions on both sides")
    if len(first) == 0:
        return NOTHING
    gain = np.asarray(first, float) - np.asarray(second, float)
    gains, sizes = _sums([gain, np.ones(len(gain))], groups)
    low, high = _interval(gains, sizes, seed, draws)
    return Estimate(float(gains.sum() / sizes.sum()), low, high, len(gain), len(sizes))


def auc(scores: ArrayLike, positive: ArrayLike) -> float:
    """Probability that a positive outranks a negative, ties counting half.

    Args:
        scores: One score an item.
        positive: Whether each item is positive.

    Returns:
        The area under the ROC curve (Mann-Whitney U / pairs); NaN if a class is empty.
    """
    labels = np.asarray(positive, bool)
    count = int(labels.sum())
    others = len(labels) - count
    if count == 0 or others == 0:
        return float("nan")
    rank_sum = float(ranks(scores)[labels].sum())
    return (rank_sum - count * (count + 1) / 2) / (count * others)


@dataclass(frozen=True)
class Agreement:
    """How well two scorings of the same paths agree.

    Attributes:
        n: Number of paths scored twice.
        pearson: Linear correlation; NaN if either side is constant.
        spearman: Rank correlation, ties at their mean rank.
        difference: Mean absolute difference, in points.
    """

    n: int
    pearson: float
    spearman: float
    difference: float


def agreement(first: ArrayLike, second: ArrayLike) -> Agreement:
    """Test-retest agreement of two scorings, in the same order."""
    a, b = np.asarray(first, float), np.asarray(second, float)
    if a.shape != b.shape:
        raise ValueError("agreement needs the same paths on both sides")
    difference = float(np.abs(a - b).mean()) if len(a) else float("nan")
    return Agreement(len(a), _correlation(a, b), _correlation(ranks(a), ranks(b)), difference)


def ranks(values: ArrayLike) -> Array:
    """Ranks from 1, ties at their mean rank."""
    array = np.asarray(values, float)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _sums(values: Sequence[Array], groups: Sequence[str]) -> tuple[Array, ...]:
    """Sums of each of ``values`` per group; groups are sorted, so that a seed means the same."""
    if len(groups) != len(values[0]):
        raise ValueError("every question needs its group")
    names, member = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    return tuple(
        np.bincount(member, weights=value, minlength=len(names)).astype(float) for value in values
    )


def _interval(numerator: Array, denominator: Array, seed: int, draws: int) -> tuple[float, float]:
    """Percentile interval of sum(numerator) / sum(denominator) over resampled groups."""
    ratios = np.concatenate(
        [
            (weights @ numerator) / (weights @ denominator)
            for weights in _weights(len(numerator), seed, draws)
        ]
    )
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


def _weights(groups: int, seed: int, draws: int) -> Iterator[Array]:
    """How often each group is drawn, (draws, groups), in chunks that fit memory."""
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // groups)
    for start in range(0, draws, rows):
        size = min(rows, draws - start)
        picks = generator.integers(groups, size=(size, groups))
        picks += np.arange(size)[:, None] * groups
        counts = np.bincount(picks.ravel(), minlength=size * groups)
        yield counts.reshape(size, groups).astype(float)


def _correlation(a: Array, b: Array) -> float:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])

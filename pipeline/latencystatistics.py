"""Whether two measurements differ: a statement about latencies, and not a difference of two numbers.

Latencies that follow each other are alike (a load that comes and goes, a clock that drifts), so single samples are no
independent observations, and a test over millions of them would call any two runs different. What is compared are
*blocks*: stretches of some seconds, each with one value. Where neighbouring blocks are still alike, they are joined in
pairs until they are not. The values' ranks decide (Mann-Whitney), since latencies have no distribution that could be
presumed, and one outlier must not decide alone. What likeness is left makes the statement weaker.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import NormalDist, fmean, median

#: Blocks that each side must have: with eight on each the rarest outcome has a chance of 1 in 6435, which leaves
#: room for the correction for many comparisons.
MIN_BLOCKS = 8
#: From this many blocks on each side the normal approximation of the rank sum is as good as its distribution.
MANY = 20
#: Ways to split the blocks that are tried one by one; where there are more, this many are drawn.
SPLITS = 20_000
#: Standard errors of the likeness of neighbours from which on they are joined.
SURE = 1.96
#: Of the draws, so that equal measurements give equal reports.
SEED = 20_260_101
#: Chance of a statement that is wrong although nothing differs, for all comparisons of a report together.
ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Difference:
    """What the ranks say; `shift` is of now against before, and `joined` how many blocks became one.

    `superiority` is the chance that a block of now has the greater value, ties counted half.
    """

    blocks: int
    blocks_before: int
    joined: int
    median: float
    median_before: float
    shift: float
    low: float
    high: float
    superiority: float
    p: float


class TooFewError(ValueError):
    """There are not enough blocks for a statement."""


def alike(values: Sequence[float]) -> float:
    """How much neighbours resemble each other: correlation of their ranks, 0 where chance alone would give as much."""
    ranked = _ranks(values)
    mean = fmean(ranked)
    spread = sum((rank - mean) ** 2 for rank in ranked)
    if not spread:
        return 0.0
    lagged = sum((a - mean) * (b - mean) for a, b in pairwise(ranked))
    # among independent values it is negative by that much, since they share their mean
    return max(0.0, lagged / spread + 1 / len(values))


def join(values: Sequence[float]) -> list[float]:
    """Neighbours in pairs, the greater of each; an odd last one is left out, since it is shorter than the others."""
    return [max(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]


def compare(now: Sequence[float], before: Sequence[float]) -> Difference:
    """Hold the block values of two measurements against each other; raises `TooFewError`.

    Both sides are joined alike, since the greatest of a longer block is greater.
    """
    joined = 1
    while True:
        if min(len(now), len(before)) < MIN_BLOCKS:
            why = f"{len(now)} blocks now and {len(before)} before"
            if joined > 1:
                why += f", once {joined} neighbours that are alike are one"
            raise TooFewError(f"{why}: {MIN_BLOCKS} are needed on each side")
        near = [alike(now), alike(before)]
        if all(part <= SURE / math.sqrt(len(side)) for part, side in zip(near, (now, before), strict=True)):
            break
        now, before, joined = join(now), join(before), 2 * joined
    n, m = len(now), len(before)
    ranked = _ranks([*now, *before])
    above = sum(ranked[:n]) - n * (n + 1) / 2
    # what likeness is left makes fewer observations of the blocks: of a first-order process, by this factor
    rest = min(fmean(near), 0.9)
    fewer = (1 + rest) / (1 - rest)
    shift, low, high = _shift(now, before, fewer)
    return Difference(
        blocks=n,
        blocks_before=m,
        joined=joined,
        median=median(now),
        median_before=median(before),
        shift=shift,
        low=low,
        high=high,
        superiority=above / (n * m),
        p=_weaker(_chance(ranked, n), fewer),
    )


def holm(chances: Sequence[float]) -> list[float]:
    """Chances corrected for their number (Holm): the family keeps the level that one alone would have."""
    corrected = [0.0] * len(chances)
    greatest = 0.0
    for place, index in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        greatest = max(greatest, min(1.0, (len(chances) - place) * chances[index]))
        corrected[index] = greatest
    return corrected


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranked = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for index in order[start:end]:
            ranked[index] = (start + 1 + end) / 2
        start = end
    return ranked


def _chance(ranked: list[float], n: int) -> float:
    """Two-sided chance of a rank sum of the first `n` as far from its mean, when all splits are equally likely."""
    total = len(ranked)
    mean = n * fmean(ranked)
    off = abs(sum(ranked[:n]) - mean)
    if min(n, total - n) >= MANY:
        mean_rank = fmean(ranked)
        variance = n * (total - n) / total * sum((r - mean_rank) ** 2 for r in ranked) / (total - 1)
        if not variance:
            return 1.0
        # continuity: rank sums come in halves and wholes
        return min(1.0, 2 * NormalDist().cdf(-max(0.0, off - 0.5) / math.sqrt(variance)))
    if math.comb(total, n) <= SPLITS:
        sums = [sum(each) for each in combinations(ranked, n)]
        return sum(abs(each - mean) >= off - 1e-9 for each in sums) / len(sums)
    draw = random.Random(SEED)  # noqa: S311  # a permutation test needs no secrecy, and must repeat
    as_far = sum(abs(sum(draw.sample(ranked, n)) - mean) >= off - 1e-9 for _ in range(SPLITS))
    return (as_far + 1) / (SPLITS + 1)  # the split that was seen is one of them


def _weaker(p: float, fewer: float) -> float:
    """A chance as it would be with so many times fewer observations."""
    if p >= 1 or fewer == 1:
        return p
    return 2 * NormalDist().cdf(NormalDist().inv_cdf(max(p / 2, 1e-300)) / math.sqrt(fewer))


def _shift(now: Sequence[float], before: Sequence[float], fewer: float) -> tuple[float, float, float]:
    """The median of all differences between blocks, and their 95 % confidence interval from the same ranks."""
    differences = sorted(a - b for a in now for b in before)
    n, m = len(now), len(before)
    spread = math.sqrt(fewer * n * m * (n + m + 1) / 12)
    cut = max(0, math.floor(n * m / 2 - NormalDist().inv_cdf(1 - ALPHA / 2) * spread))
    return median(differences), differences[cut], differences[-1 - cut]

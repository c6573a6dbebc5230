"""Intervals of means over seeds and of differences, from sums by image; no torch is loaded.

Each bootstrap sample draws images once, for all runs, so that runs are paired image by image. Shapes: S
seeds, I images, R bootstrap samples, C columns of sums (a ratio has two).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

Interval = tuple[float, float, float]
"""Value, lower and upper end."""
SAMPLES = 1000


@lru_cache(maxsize=4)
def bootstrap_weights(images: int) -> np.ndarray:
    """[1 + R, images] how often each image is drawn; the first row is the sample itself."""
    drawn = np.random.default_rng(0).multinomial(images, [1 / images] * images, size=SAMPLES)
    return np.concatenate([np.ones((1, images)), drawn])


def ratio(sums: np.ndarray) -> np.ndarray:
    """The metric [...] of sums over images [..., C]: C is 2 for a ratio, 10 for `scores.bleu`'s counts."""
    with np.errstate(divide="ignore", invalid="ignore"):  # A sample without tokens, or a right 4-gram.
        if sums.shape[-1] == 2:
            return sums[..., 0] / sums[..., 1]
        right, count, (length, reference) = sums[..., :4], sums[..., 4:8], np.moveaxis(sums[..., 8:], -1, 0)
        precision = np.exp(np.log(right / np.maximum(count, 1)).mean(-1))
        return precision * np.exp(np.minimum(1 - reference / length, 0))


class TwoLevel(NamedTuple):
    """A mean over seeds, or the difference of two, with what its 95 % interval is made of."""

    value: float
    low: float
    high: float
    """Ends of the interval over images."""
    seeds: list[np.ndarray]
    """Values of the seeds [S] of each group."""

    def interval(self) -> Interval:
        seeds = seeds_part(self.seeds)
        below, above = (math.hypot(self.value - end, seeds) for end in (self.low, self.high))
        return self.value, self.value - below, self.value + above

    def p(self) -> float:
        """The p-value that belongs to the interval: 1 less the level at which it would just reach 0.

        At other levels the part over images is in proportion to the normal distribution's quantile, that
        over seeds to Student's: beyond 99 % a thousand samples have no percentiles of their own.
        """
        images = abs(self.value - (self.low if self.value > 0 else self.high)) / NormalDist().inv_cdf(0.975)

        def reach(p: float) -> float:
            return math.hypot(images * NormalDist().inv_cdf(1 - p / 2), seeds_part(self.seeds, 1 - p))

        low, high = 0.0, 1.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if reach(middle) >= abs(self.value) else (low, middle)
        return high


def levels(ours: np.ndarray, base: np.ndarray | None = None) -> TwoLevel:
    """Mean over seeds of a metric, minus that of other runs, with a 95 % interval over images and seeds.

    The images' part is the percentile interval of a bootstrap that draws the same images for all runs, with
    their seeds as they are; the seeds' part is Student's t on the seeds' values (drawing few seeds with
    replacement makes intervals too short: two seeds cover 79 % in 95). They are independent sources, so the
    distances to the ends are added in squares. One seed says nothing of others: where a group has one
    alone, the interval is over images only.

    Args:
        ours: [S, I, C] sums by image.
        base: [S', I, C] of the same images; None subtracts nothing.
    """
    return levels_of_many(ours[None], None if base is None else base[None])[0]


def levels_of_many(ours: np.ndarray, base: np.ndarray | None = None) -> list[TwoLevel]:
    """`levels` of K metrics of the same runs at once, which is several times as fast: [K, S, I, C]."""
    runs, seeds = ours if base is None else np.concatenate([ours, base], axis=1), ours.shape[1]
    # An image without any token (or part in an intervention) is not of the sample.
    used = np.asarray(runs.any((1, 3)))  # [K, I]
    found: dict[int, TwoLevel] = {}
    for mask in {mask.tobytes(): mask for mask in used}.values():  # Mostly one.
        places = np.flatnonzero((used == mask).all(1))
        by_image = runs[places][:, :, mask].transpose(2, 0, 1, 3)  # [I, k, S + S', C]
        weights = bootstrap_weights(len(by_image))
        sums = weights @ by_image.reshape(len(by_image), -1)
        values = ratio(sums.reshape(len(sums), *by_image.shape[1:]))  # [1 + R, k, S + S']
        samples = values[..., :seeds].mean(-1)
        if base is not None:
            samples = samples - values[..., seeds:].mean(-1)
        percentile = np.nanpercentile if np.isnan(samples).any() else np.percentile  # The second is faster.
        ends = percentile(samples[1:], [2.5, 97.5], axis=0)
        for place, value, low, high, of_seeds in zip(places, samples[0], *ends, values[0], strict=True):
            groups = [of_seeds] if base is None else [of_seeds[:seeds], of_seeds[seeds:]]
            found[place] = TwoLevel(float(value), float(low), float(high), groups)
    return [found[place] for place in range(len(runs))]


def two_level(ours: np.ndarray, base: np.ndarray | None = None) -> Interval:
    """`levels` as one interval."""
    return levels(ours, base).interval()


def seeds_part(groups: Sequence[np.ndarray], level: float = 0.95) -> float:
    """Half of the interval of a mean over seeds' values [S], or of the difference of two such means.

    Student's t, for two groups with Welch's degrees of freedom; 0 where a group has one seed alone.
    """
    from scipy.special import stdtrit

    if min(map(len, groups)) < 2:
        return 0.0
    variances = [_variance_of_mean(values.tolist()) for values in groups]
    if not (total := sum(variances)):
        return 0.0
    freedom = total**2 / sum(v**2 / (len(values) - 1) for v, values in zip(variances, groups, strict=True))
    return float(stdtrit(freedom, (1 + level) / 2) * math.sqrt(total))


def _variance_of_mean(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm 1979): those below 0.05 are wrong in 5 % of families."""
    order, adjusted, least = np.argsort(p_values, kind="stable"), [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order.tolist()):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def independent(a: Sequence[float], b: Sequence[float]) -> Interval:
    """a - b with a 95 % interval from theirs, for independent estimates.

    The square-and-add method (Zou and Donner 2008, doi:10.1002/sim.3095), which keeps skewed intervals
    skewed.
    """
    (value_a, low_a, high_a), (value_b, low_b, high_b) = a, b
    value = value_a - value_b
    below = math.hypot(value_a - low_a, high_b - value_b)
    above = math.hypot(high_a - value_a, value_b - low_b)
    return value, value - below, value + above

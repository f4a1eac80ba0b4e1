"""Statistics of a comparison: intervals over items, intervals over seeds, and the estimator of pass@k.

Two sources of noise are kept apart. Resampling the *items* of a benchmark says how far a difference depends on the
questions that happened to be asked. It says nothing about the training run: another seed gives another model. So a
difference between two training methods takes its interval from the seeds as soon as there are two of them.

Suffixes: N items of one benchmark, R resamples, S seeds. All functions are pure; numpy is the only dependency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polm.errors import DataError

Floats = NDArray[np.float64]

# Two-sided 95 % point of the normal distribution.
NORMAL_95 = 1.959963984540054
# Upper bound of the index block held in memory at once (elements, 8 bytes each).
_CHUNK_ELEMENTS = 1 << 20
# Up to here the number of distinct differences is small enough to draw their counts instead of the items.
_MAX_DISTINCT = 64


@dataclass(frozen=True)
class Interval:
    """A mean difference (arm minus control) with its 95 % interval; the bounds are nan where none can be given."""

    mean_difference: float
    low95: float
    high95: float

    @property
    def has_width(self) -> bool:
        """False where the bounds meet (but for rounding): equal values say nothing about their spread."""
        return not math.isclose(self.low95, self.high95, rel_tol=1e-9, abs_tol=1e-12)

    @property
    def excludes_zero(self) -> bool:
        """True only if both bounds exist, lie on the same side of zero, and come from values that differ."""
        return self.has_width and (self.low95 > 0 or self.high95 < 0)


@dataclass(frozen=True)
class Estimate:
    """A mean or a proportion with its 95 % interval; the bounds are nan where none can be given."""

    mean: float
    low95: float
    high95: float


@dataclass(frozen=True)
class MeanStderr:
    """A mean over `n` values and its standard error, which is nan for `n = 1`: one value has no spread."""

    mean: float
    stderr: float
    n: int

    @property
    def note(self) -> str:
        """What a reader must know about the standard error; empty when it is an ordinary one."""
        return "one value only: no standard error exists" if self.n == 1 else ""


@dataclass(frozen=True)
class Comparison:
    """Arm minus control over all seeds.

    `basis` names where the interval comes from: "seeds" is a t interval over the differences of the seeds; "items" is
    the bootstrap over the items of a single seed, which leaves out the noise of training.
    """

    interval: Interval
    differences_by_seed: tuple[float, ...]
    num_items: int
    basis: Literal["seeds", "items"]

    @property
    def label(self) -> str:
        """The basis in words, to stand beside every interval."""
        if self.basis == "items":
            return "items only: one seed proves nothing about training noise"
        return f"t interval over {len(self.differences_by_seed)} seeds"


def _build_values(values: ArrayLike, what: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise DataError(f"{what}: expected a list of at least one number, got shape {array.shape}")
    if not np.isfinite(array).all():
        num_bad = int((~np.isfinite(array)).sum())
        raise DataError(f"{what}: {num_bad} of {array.size} values are not finite; drop these items on both sides")
    return array


def _compute_paired_differences(a_N: ArrayLike, b_N: ArrayLike) -> Floats:
    left_N, right_N = _build_values(a_N, "first side of the pairs"), _build_values(b_N, "second side of the pairs")
    if left_N.shape != right_N.shape:
        raise DataError(
            f"paired values must belong to the same items: got {left_N.size} and {right_N.size}; "
            "keep the items that both sides have, in the same order"
        )
    return left_N - right_N


def _compute_resampled_means(values_N: Floats, num_resamples: int, rng: np.random.Generator) -> Floats:
    """Means of `num_resamples` samples of size N with replacement: float64 [R].

    Scores of right or wrong have few distinct differences; the number of times that each is drawn is multinomial, which
    is the same distribution for a fraction of the random numbers. Otherwise items are drawn in blocks, so that the
    memory does not grow with N * R.
    """
    distinct, counts = np.unique(values_N, return_counts=True)
    if distinct.size <= _MAX_DISTINCT:
        drawn = rng.multinomial(values_N.size, counts / values_N.size, size=num_resamples)
        return np.asarray(drawn @ distinct / values_N.size, dtype=np.float64)
    means_R = np.empty(num_resamples)
    block = max(1, _CHUNK_ELEMENTS // values_N.size)
    for start in range(0, num_resamples, block):
        rows = min(block, num_resamples - start)
        drawn = rng.integers(0, values_N.size, size=(rows, values_N.size))
        means_R[start : start + rows] = values_N[drawn].mean(axis=1)
    return means_R


def compute_stratified_bootstrap(
    differences: Sequence[ArrayLike], *, num_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the plain average over benchmarks of the mean difference within each benchmark.

    `differences` has one list of per-item differences for each benchmark. Items are resampled within their benchmark,
    so each benchmark keeps its weight of 1 / number of benchmarks. The bounds are nan if a benchmark has one item.
    """
    if num_resamples < 1:
        raise DataError(f"num_resamples must be at least 1, got {num_resamples}")
    if not differences:
        raise DataError("a bootstrap needs at least one benchmark, got none")
    strata = [_build_values(values_N, "differences") for values_N in differences]
    mean = float(np.mean([values_N.mean() for values_N in strata]))
    if min(values_N.size for values_N in strata) < 2:
        return Interval(mean, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    means_R = np.mean([_compute_resampled_means(values_N, num_resamples, rng) for values_N in strata], axis=0)
    low, high = np.percentile(means_R, [2.5, 97.5])
    return Interval(mean, float(low), float(high))


def compute_paired_bootstrap(a_N: ArrayLike, b_N: ArrayLike, *, num_resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean of `a_N - b_N` with its percentile bootstrap interval over items.

    `a_N` and `b_N` hold the scores of the same N items in the same order. The same seed gives the same bounds. With one
    item the bounds are nan. Raises DataError for unequal lengths, no items, or values that are not finite.
    """
    return compute_stratified_bootstrap([_compute_paired_differences(a_N, b_N)], num_resamples=num_resamples, seed=seed)


def compute_mean_stderr(values: ArrayLike) -> MeanStderr:
    """Mean and standard error (sample deviation with n - 1, over the root of n); the latter is nan for n = 1."""
    array = _build_values(values, "values")
    stderr = float(array.std(ddof=1) / math.sqrt(array.size)) if array.size > 1 else math.nan
    return MeanStderr(float(array.mean()), stderr, int(array.size))


def compute_t_probability(t: float, num_degrees: int) -> float:
    """P(|T| <= t) of Student's t for `t >= 0` and a whole number of degrees of freedom.

    The finite trigonometric sums of Abramowitz & Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4: exact,
    no series to cut off.
    """
    theta = math.atan(t / math.sqrt(num_degrees))
    cosine, sine = math.cos(theta), math.sin(theta)
    if num_degrees % 2 == 1:
        term, total = cosine, 0.0
        for odd in range(1, num_degrees - 1, 2):
            total += term
            term *= cosine * cosine * (odd + 1) / (odd + 2)
        return 2 / math.pi * (theta + sine * total)
    term, total = 1.0, 0.0
    for even in range(0, num_degrees - 1, 2):
        total += term
        term *= cosine * cosine * (even + 1) / (even + 2)
    return sine * total


def compute_t_quantile(num_degrees: int, confidence: float = 0.95) -> float:
    """The t with P(|T| <= t) = `confidence` (two-sided), by bisection to full float precision."""
    if num_degrees < 1 or not 0 < confidence < 1:
        raise DataError(
            f"a t quantile needs at least 1 degree of freedom and a confidence between 0 and 1, "
            f"got {num_degrees} and {confidence}"
        )
    low, high = 0.0, 1.0
    while compute_t_probability(high, num_degrees) < confidence:
        high *= 2
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        if compute_t_probability(middle, num_degrees) < confidence:
            low = middle
        else:
            high = middle


def compute_t_interval(differences: ArrayLike) -> Interval:
    """Mean of the differences of S seeds with the t interval of S - 1 degrees of freedom; nan bounds for one seed."""
    summary = compute_mean_stderr(differences)
    if summary.n == 1:
        return Interval(summary.mean, math.nan, math.nan)
    margin = compute_t_quantile(summary.n - 1) * summary.stderr
    return Interval(summary.mean, summary.mean - margin, summary.mean + margin)


def compute_pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that at least one of `k` samples is right, from `num_correct` right out of `num_samples`.

    1 - C(n - c, k) / C(n, k): Chen et al. 2021, arXiv 2107.03374, equation 1. Whole numbers, so nothing cancels.
    """
    if not 0 <= num_correct <= num_samples:
        raise DataError(f"num_correct must lie in 0..{num_samples} (num_samples), got {num_correct}")
    if not 1 <= k <= num_samples:
        raise DataError(f"pass@k needs 1 <= k <= {num_samples} (num_samples), got k = {k}")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def compute_wilson_interval(num_correct: int, num_items: int) -> Estimate:
    """Share of right answers with Wilson's score interval at 95 % (Wilson 1927), which stays inside 0..1."""
    if num_items < 1 or not 0 <= num_correct <= num_items:
        raise DataError(f"expected 0 <= num_correct <= num_items with num_items >= 1, got {num_correct}, {num_items}")
    share, squared = num_correct / num_items, NORMAL_95**2
    scale = 1 + squared / num_items
    centre = (share + squared / (2 * num_items)) / scale
    margin = NORMAL_95 * math.sqrt(share * (1 - share) / num_items + squared / (4 * num_items**2)) / scale
    # At 0 and 1 the bounds meet the ends exactly; rounding must not push them past.
    return Estimate(share, max(0.0, centre - margin), min(1.0, centre + margin))


def compute_seed_comparison(
    arm_by_seed: Sequence[Sequence[ArrayLike]],
    control_by_seed: Sequence[Sequence[ArrayLike]],
    *,
    num_resamples: int = 10_000,
) -> Comparison:
    """Arm minus control: paired over items within a seed, then averaged over seeds.

    `arm_by_seed[s][b]` holds the scores of seed s on benchmark b, item by item; the control has the same items in the
    same order. A seed's difference is the plain average over its benchmarks. From two seeds on the interval is the t
    interval over the seeds' differences; with one seed it is the bootstrap over items, and the label says so.
    """
    if not arm_by_seed or len(arm_by_seed) != len(control_by_seed):
        raise DataError(
            f"a comparison needs the same seeds on both sides, at least one: got {len(arm_by_seed)} of the arm and "
            f"{len(control_by_seed)} of the control"
        )
    differences = [
        [_compute_paired_differences(a_N, b_N) for a_N, b_N in zip(arm, control, strict=True)]
        for arm, control in zip(arm_by_seed, control_by_seed, strict=True)
    ]
    by_seed = tuple(float(np.mean([values_N.mean() for values_N in strata])) for strata in differences)
    num_items = sum(values_N.size for strata in differences for values_N in strata)
    if len(by_seed) > 1:
        return Comparison(compute_t_interval(by_seed), by_seed, num_items, "seeds")
    interval = compute_stratified_bootstrap(differences[0], num_resamples=num_resamples)
    return Comparison(interval, by_seed, num_items, "items")

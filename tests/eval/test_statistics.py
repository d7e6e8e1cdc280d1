"""Standard errors and intervals against resampling, and against what they promise on known data."""

import math

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp, ttest_ind, ttest_rel

from srde.eval.statistics import Estimate, mean, mean_of, paired_mean, paired_ratio, ratio


def rows(rng, count, spread=0.4):
    """Summed losses and token counts of rows: long rows have other losses per token than short ones."""
    tokens = rng.integers(3, 60, count)
    per_token = 2 - 0.01 * tokens + spread * rng.standard_normal(count)
    return per_token * tokens, tokens


def bootstrap(statistic, columns, rounds=4000, seed=1):
    rng = np.random.default_rng(seed)
    columns = [np.asarray(column) for column in columns]
    picks = rng.integers(0, len(columns[0]), (rounds, len(columns[0])))
    return np.std([statistic(*(column[pick] for column in columns)) for pick in picks])


def test_the_mean_is_the_textbooks():
    scores = np.random.default_rng(0).integers(0, 2, 40).astype(float)
    found = mean(list(scores))
    assert found.value == pytest.approx(scores.mean())
    assert found.se == pytest.approx(math.sqrt(scores.var(ddof=1) / 40))
    assert found.ci95 == pytest.approx(tuple(ttest_1samp(scores, 0).confidence_interval(0.95)))
    assert (found.df, found.items) == (39, 40)


def test_the_standard_error_of_a_loss_is_the_bootstraps():
    losses, tokens = rows(np.random.default_rng(2), 150)
    found = ratio(list(losses), list(tokens))
    assert found.value == pytest.approx(losses.sum() / tokens.sum())
    resampled = bootstrap(lambda a, b: a.sum() / b.sum(), (losses, tokens))
    assert found.se == pytest.approx(resampled, rel=0.06)
    without = losses.std(ddof=1) / math.sqrt(150) / tokens.mean()  # as if the number of tokens were fixed
    assert without > 1.5 * resampled


def test_the_paired_standard_error_of_a_loss_is_the_bootstraps():
    rng = np.random.default_rng(3)
    base, tokens = rows(rng, 150)
    ours = base - tokens * (0.1 + 0.05 * rng.standard_normal(150))
    found = paired_ratio(list(ours), list(base), list(tokens))
    assert found.value == pytest.approx((ours.sum() - base.sum()) / tokens.sum())
    resampled = bootstrap(lambda a, b, n: (a.sum() - b.sum()) / n.sum(), (ours, base, tokens))
    assert found.se == pytest.approx(resampled, rel=0.06)
    unpaired = math.hypot(ratio(list(ours), list(tokens)).se, ratio(list(base), list(tokens)).se)
    assert found.se < unpaired / 3


def test_the_paired_accuracy_is_the_paired_t_test():
    rng = np.random.default_rng(4)
    base, ours = rng.integers(0, 2, 60).astype(float), rng.integers(0, 2, 60).astype(float)
    found = paired_mean(list(ours), list(base))
    assert found.value == pytest.approx(ours.mean() - base.mean())
    assert found.ci95 == pytest.approx(tuple(ttest_rel(ours, base).confidence_interval(0.95)))


def test_the_mean_over_domains_counts_each_once():
    rng = np.random.default_rng(5)
    small, large = rng.normal(1, 1, 9), rng.normal(3, 2, 90)
    found = mean_of([mean(list(small)), mean(list(large))])
    assert found.value == pytest.approx((small.mean() + large.mean()) / 2)
    assert found.items == 99
    # half the sum of two means has half the interval of their difference, whose degrees of freedom are Welch's
    welch = ttest_ind(small, large, equal_var=False)
    assert found.df == pytest.approx(welch.df)
    low, high = welch.confidence_interval(0.95)
    assert 2 * found.half_width == pytest.approx((high - low) / 2)


@pytest.mark.parametrize(
    "estimate",
    [
        lambda rng: (mean(list(rng.normal(0.3, 1, 12))), 0.3),
        lambda rng: (mean(list((rng.random(80) < 0.7).astype(float))), 0.7),
        lambda rng: (ratio(*map(list, rows(rng, 40))), TRUE_RATIO),
        lambda rng: (paired_ratio(*map(list, pair(rng, 40))), -0.2),
        lambda rng: (
            mean_of(
                [mean(list(rng.normal(1, 1, 10))), mean(list(rng.normal(2, 3, 25))), mean(list(rng.normal(0, 1, 8)))]
            ),
            1.0,
        ),
    ],
    ids=["mean of 12", "accuracy of 80", "loss of 40 rows", "paired loss of 40 rows", "mean of 3 domains"],
)  # fmt: skip
def test_the_interval_covers_the_truth_19_times_of_20(estimate):
    rng = np.random.default_rng(6)
    hits = 0
    for _ in range(1500):
        found, truth = estimate(rng)
        low, high = found.ci95
        hits += low <= truth <= high
    assert 0.93 <= hits / 1500 <= 0.97  # five standard deviations of such a count are 2.8 %


LENGTHS = np.arange(3, 60)
TRUE_RATIO = float(((2 - 0.01 * LENGTHS) * LENGTHS).sum() / LENGTHS.sum())


def pair(rng, count):
    base, tokens = rows(rng, count)
    return base + tokens * (-0.2 + 0.3 * rng.standard_normal(count)), base, tokens


def test_what_is_not_known_is_none():
    assert mean([]) is None and ratio([], []) is None and mean_of([]) is None
    one = mean([0.5])
    assert (one.value, one.se, one.half_width, one.ci95) == (0.5, None, None, None)
    whole = mean_of([one, mean([0.0, 1.0])])
    assert (whole.value, whole.se, whole.ci95) == (0.5, None, None)


def test_items_that_are_all_alike_leave_no_width():
    found = paired_mean([1.0] * 5, [0.0] * 5)
    assert (found.value, found.se, found.ci95) == (1.0, 0.0, (1.0, 1.0))
    assert mean_of([found, found]).ci95 == (1.0, 1.0)


def test_few_items_have_wide_intervals():
    found = Estimate(0.0, 1.0, 2, 3)
    assert found.half_width == pytest.approx(t.ppf(0.975, 2)) and found.half_width > 4

"""Intervals and tests over seeds and samples: hand-made cases, and how often they are wrong."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("scipy")

from scipy import stats

from mmfast.experiments.differences import difference, holm, mean_of


def test_of_one_seed_it_is_the_t_test_over_samples():
    table = np.random.default_rng(0).normal(0.3, 1.0, (1, 40))
    found, expected = mean_of(table), stats.ttest_1samp(table[0], 0.0)
    assert found.mean == pytest.approx(table.mean())
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.num_seeds == 1


def test_where_seeds_alone_differ_it_is_the_t_test_over_seeds():
    by_seed = np.array([0.1, 0.3, 0.2, 0.5])
    found, expected = mean_of(by_seed[:, None] + np.zeros((4, 30))), stats.ttest_1samp(by_seed, 0.0)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.half_width == pytest.approx(expected.confidence_interval(0.95).high - by_seed.mean())


def test_where_samples_alone_differ_more_seeds_tell_no_more():
    row = np.random.default_rng(1).normal(0.2, 1.0, 50)
    one, five = mean_of(row[None]), mean_of(np.tile(row, (5, 1)))
    assert five.half_width == pytest.approx(one.half_width, rel=1e-6)
    assert five.p == pytest.approx(one.p, rel=1e-6)


def test_the_variance_is_that_of_both_at_once():
    # Seeds (+-1) and samples (+-2) add up, and nothing else differs: the mean squares are 4 x 2 of seeds,
    # 2 x 16 / 3 of samples and 0 of the rest, so the variance of the mean is (8 + 32 / 3) / 8.
    table = np.array([1.0, -1.0])[:, None] + np.array([2.0, -2.0, 2.0, -2.0])
    variance = (8 + 32 / 3) / 8
    assert mean_of(table).half_width == pytest.approx(stats.t.ppf(0.975, 1) * variance**0.5)
    assert mean_of(table).p == 1.0
    # Three of each: 4 x 2 of seeds again, 6 x 16 / 3 of samples; of six seeds freedom is Satterthwaite's.
    many = np.repeat(table, 3, axis=0)
    by_seed, by_sample = 4 * 6 / 5, 6 * 16 / 3
    freedom = (by_seed + by_sample) ** 2 / (by_seed**2 / 5 + by_sample**2 / 3)
    width = stats.t.ppf(0.975, max(freedom, 5)) * ((by_seed + by_sample) / 24) ** 0.5
    assert mean_of(many).half_width == pytest.approx(width)


def test_samples_without_an_answer_are_left_out():
    table = np.array([[1.0, 0.0, np.nan, 1.0], [1.0, 1.0, 1.0, np.nan]])
    assert mean_of(table) == mean_of(table[:, :2])
    assert mean_of(np.full((2, 3), np.nan)) is None
    assert mean_of(np.zeros((0, 3))) is None
    assert mean_of(np.zeros((3, 0))) is None


@pytest.mark.parametrize(("shape", "value", "p"), [((3, 4), 0.0, 1.0), ((3, 4), 0.5, 0.0)])
def test_a_table_without_spread(shape, value, p):
    found = mean_of(np.full(shape, value))
    assert (found.mean, found.half_width, found.p) == (value, 0.0, p)


def test_one_sample_of_one_seed_says_nothing():
    found = mean_of(np.array([[3.0]]))
    assert found.half_width == np.inf
    assert found.p == 1.0


def test_a_few_answers_that_differ_are_no_proof():
    one, other = np.zeros((1, 200)), np.zeros((1, 200))
    one[0, :4] = 1
    # McNemar's exact test gives 0.125.
    assert 0.05 < difference(one, other).p < 0.125
    one[0, :12] = 1
    assert difference(one, other).p < 0.002
    assert difference(one, one).p == 1.0
    assert 0 < difference(one, one).half_width < 0.01
    alike = np.ones((3, 200))
    assert 0 < difference(alike, alike).half_width < 0.01


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])
    assert holm([0.5, 0.9, 0.001]) == pytest.approx([1.0, 1.0, 0.003])
    assert holm([]) == []


def answers(rng, num_seeds, num_samples, by_seed, by_sample):
    """Right answers of two methods that do not differ, but in which samples suit them and in their luck."""
    base = rng.normal(1.0, 2.0, num_samples)

    def of_one():
        suits, luck = rng.normal(0, by_sample, num_samples), rng.normal(0, by_seed, (num_seeds, 1))
        return (base + suits + luck + rng.normal(0, 0.7, (num_seeds, num_samples)) > 0).astype(float)

    return of_one(), of_one()


def pooled(one, other):
    """McNemar's p-value with the answers of all seeds pooled."""
    more, less = ((one > other).sum(), (one < other).sum())
    return stats.chi2.sf((abs(more - less) - 1) ** 2 / max(1, more + less), 1)


@pytest.mark.parametrize(("by_seed", "by_sample"), [(0, 0), (0.2, 0), (0, 1.0), (0.2, 1.0)])
@pytest.mark.parametrize("num_seeds", [3, 5])
def test_methods_that_do_not_differ_are_told_apart_in_a_twentieth_of_the_cases(num_seeds, by_seed, by_sample):
    rng = np.random.default_rng(7)
    drawn = [answers(rng, num_seeds, 200, by_seed, by_sample) for _ in range(400)]
    wrong = np.mean([difference(*pair).p < 0.05 for pair in drawn])
    # Three standard errors of a share of 400 above a twentieth.
    assert wrong <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5
    if by_seed:
        assert np.mean([pooled(*pair) < 0.05 for pair in drawn]) > 0.2


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_one_of_nine_methods_is_seldom_told_apart_after_the_correction(num_seeds):
    rng = np.random.default_rng(11)
    wrong = 0
    for _ in range(150):
        base = rng.normal(1.0, 2.0, 300)

        def of_one(base=base):
            luck = rng.normal(0, 0.15, (num_seeds, 1))
            return (base + luck + rng.normal(0, 0.7, (num_seeds, 300)) > 0).astype(float)

        joint = of_one()
        wrong += min(holm([difference(of_one(), joint).p for _ in range(9)])) < 0.05
    assert wrong / 150 <= 0.05 + 3 * (0.05 * 0.95 / 150) ** 0.5


def test_intervals_hold_what_is_true_and_differences_are_found():
    rng = np.random.default_rng(3)
    found = []
    for _ in range(300):
        luck, suits = rng.normal(0, 0.02, (5, 1)), rng.normal(0, 0.5, 300)
        found.append(mean_of(0.1 + luck + suits + rng.normal(0, 0.5, (5, 300))))
    held = np.mean([each.low <= 0.1 <= each.high for each in found])
    assert held >= 0.95 - 3 * (0.05 * 0.95 / 300) ** 0.5
    assert np.mean([each.p < 0.05 for each in found]) > 0.7

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insightv.evaluation import statistics
from insightv.evaluation.statistics import accuracy, agreement, auc, paired_difference


def test_interval_equals_closed_form_when_every_question_is_its_own_group():
    right = [True] * 700 + [False] * 300
    estimate = accuracy(right, [str(i) for i in range(1000)], draws=20000)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 1000)
    assert estimate.value == pytest.approx(0.7)
    assert (estimate.low, estimate.high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.002)
    assert (estimate.n, estimate.groups) == (1000, 1000)


def test_questions_of_one_table_widen_the_interval_by_root_of_their_number():
    # Ten copies of each of 100 answers carry no more than the 100.
    right = [i % 2 == 0 for i in range(100) for _ in range(10)]
    tables = [str(i) for i in range(100) for _ in range(10)]
    clustered = accuracy(right, tables)
    single = accuracy(right, [str(i) for i in range(1000)])
    ratio = (clustered.high - clustered.low) / (single.high - single.low)
    assert ratio == pytest.approx(math.sqrt(10), rel=0.1)


def test_interval_covers_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(7)
    truth = 0.6
    covered = covered_difference = 0
    for run in range(400):
        # Tables differ in difficulty: Beta(3, 2) has mean 0.6.
        hardness = generator.beta(3, 2, size=60)
        sizes = generator.integers(3, 12, size=60)
        tables = np.repeat(np.arange(60).astype(str), sizes)
        chance = np.repeat(hardness, sizes)
        first = generator.random(len(chance)) < chance
        second = generator.random(len(chance)) < chance * 0.8
        one = accuracy(list(first), list(tables), seed=run, draws=500)
        covered += one.low <= truth <= one.high
        two = paired_difference(list(first), list(second), list(tables), seed=run, draws=500)
        covered_difference += two.low <= 0.2 * truth <= two.high
    assert 0.90 <= covered / 400 <= 0.98
    assert 0.90 <= covered_difference / 400 <= 0.98


def test_pairing_cancels_what_both_share():
    generator = np.random.default_rng(0)
    tables = np.repeat(np.arange(50).astype(str), 10)
    second = np.repeat(generator.random(50) < 0.5, 10)
    first = second | (generator.random(500) < 0.1)
    groups = list(tables)
    gain = paired_difference(list(first), list(second), groups)
    alone = accuracy(list(first), groups)
    assert gain.value == pytest.approx(first.mean() - second.mean())
    assert gain.low > 0
    assert gain.high - gain.low < (alone.high - alone.low) / 2


def test_same_seed_same_interval_whatever_the_order_of_questions():
    right = [bool(i % 3) for i in range(97)]
    tables = [str(i * i // 97 // 5) for i in range(97)]
    forwards = accuracy(right, tables, seed=3)
    backwards = accuracy(right[::-1], tables[::-1], seed=3)
    assert forwards == backwards
    assert forwards != accuracy(right, tables, seed=4)


def test_chunks_do_not_change_the_draws(monkeypatch):
    right, tables = [bool(i % 3) for i in range(90)], [str(i // 5) for i in range(90)]
    whole = accuracy(right, tables)
    monkeypatch.setattr(statistics, "_CHUNK", 100)
    assert accuracy(right, tables) == whole


def test_all_right_does_not_claim_certainty():
    estimate = accuracy([True] * 20, [str(i) for i in range(20)])
    assert estimate.high == 1.0
    # Clopper-Pearson for 20 of 20: 0.8316.
    assert estimate.low == pytest.approx(0.8316, abs=1e-4)
    none = accuracy([False] * 20, [str(i) for i in range(20)])
    assert (none.low, none.high) == pytest.approx((0.0, 1 - 0.8316), abs=1e-4)


def test_nothing_gives_nothing():
    assert math.isnan(accuracy([], []).value)
    assert paired_difference([], [], []).n == 0
    with pytest.raises(ValueError, match="same questions"):
        paired_difference([True], [], [])


@given(
    st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=2, max_size=40).filter(
        lambda items: len({label for _, label in items}) == 2
    )
)
@settings(max_examples=100, deadline=None)
def test_auc_counts_pairs(items):
    right = [score for score, label in items if label]
    wrong = [score for score, label in items if not label]
    pairs = [(a > b) + (a == b) / 2 for a in right for b in wrong]
    expected = sum(pairs) / len(pairs)
    assert auc([s for s, _ in items], [label for _, label in items]) == pytest.approx(expected)


def test_auc_of_one_class_is_unknown():
    assert math.isnan(auc([1, 2], [True, True]))


def test_agreement_against_known_values():
    # Ranks 1..5 against 2 1 4 3 5: rho = 1 - 6 * 4 / (5 * 24) = 0.8.
    result = agreement([10, 20, 30, 40, 50], [22, 11, 44, 33, 55])
    assert result.spearman == pytest.approx(0.8)
    assert result.difference == pytest.approx((12 + 9 + 14 + 7 + 5) / 5)
    assert result.pearson == pytest.approx(np.corrcoef([1, 2, 3, 4, 5], [2, 1, 4, 3, 5])[0, 1])
    ties = agreement([1, 1, 2], [1, 1, 2])
    assert ties.spearman == pytest.approx(1.0)
    assert math.isnan(agreement([5, 5], [1, 2]).spearman)


def test_ranks_share_ties():
    assert statistics.ranks([10, 30, 10, 20]).tolist() == [1.5, 4, 1.5, 3]


def test_large_sets_take_little_time_and_memory():
    count = 200_000
    right = np.arange(count) % 2 == 0
    groups = np.char.mod("%d", np.arange(count) // 2)
    start = time.monotonic()
    estimate = accuracy(right, groups, draws=200)
    assert time.monotonic() - start < 30
    assert estimate.n == count

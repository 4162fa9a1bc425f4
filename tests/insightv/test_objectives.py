"""Objectives against their formulas written out by hand, and against their own splits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.errors import UserError
from insightv.training import objectives
from insightv.training.config import DPOConfig, SFTConfig

PAIRS = 4


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token log-probabilities, segments, reference sums of four pairs of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [3, 5, 1, 2, 7, 4, 2, 2]
    segments = torch.repeat_interleave(torch.arange(2 * PAIRS), torch.tensor(lengths))
    logps = -torch.rand(len(segments), generator=generator) * 3
    reference = objectives.segment_sums(logps, segments, 2 * PAIRS)
    return logps, segments, reference + torch.randn(2 * PAIRS, generator=generator)


def loss(logps, segments, reference, config, total=PAIRS, chosen_tokens=13):
    pairs = objectives.replies(logps, segments, reference)
    return objectives.preference_loss(pairs, config, total, chosen_tokens)


def by_hand(term: str, beta: float) -> float:
    logps, segments, reference = case()
    total = 0.0
    for pair in range(PAIRS):
        w, r = (logps[segments == 2 * pair + k] for k in (0, 1))
        won = (w.sum() - reference[2 * pair]).item()
        lost = (r.sum() - reference[2 * pair + 1]).item()
        sigma = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
        total += {
            "sigmoid": -math.log(sigma(beta * (won - lost))),
            "ipo": (won / len(w) - lost / len(r) - 1 / (2 * beta)) ** 2,
            "bco": -math.log(sigma(beta * won)) - math.log(sigma(-beta * lost)),
            "sft": -w.sum().item() * PAIRS / 13,
        }[term]
    return total / PAIRS


@pytest.mark.parametrize("term", ["sigmoid", "ipo", "bco", "sft"])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_each_term_is_its_formula(term, beta):
    got = loss(*case(), DPOConfig(terms={term: 1.0}, beta=beta))
    assert got.item() == pytest.approx(by_hand(term, beta), rel=1e-5)


def test_terms_are_weighed_and_zero_switches_off():
    mixed = loss(*case(), DPOConfig(terms={"sigmoid": 0.8, "bco": 0.2, "sft": 1.0, "ipo": 0.0}))
    want = 0.8 * by_hand("sigmoid", 0.1) + 0.2 * by_hand("bco", 0.1) + by_hand("sft", 0.1)
    assert mixed.item() == pytest.approx(want, rel=1e-5)


def test_empty_terms_are_the_papers():
    assert DPOConfig().weights() == {"sigmoid": 1.0, "sft": 1.0}


def test_a_policy_that_is_its_reference_loses_log_two():
    logps, segments, _ = case()
    reference = objectives.segment_sums(logps, segments, 2 * PAIRS)
    got = loss(logps, segments, reference, DPOConfig(terms={"sigmoid": 1.0}))
    assert got.item() == pytest.approx(math.log(2), rel=1e-6)
    smoothed = DPOConfig(terms={"sigmoid": 1.0}, label_smoothing=0.3)
    assert loss(logps, segments, reference, smoothed).item() == pytest.approx(math.log(2))


def test_label_smoothing_mixes_the_other_order():
    logps, segments, reference = case()
    flipped = segments ^ 1
    swap = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    plain = DPOConfig(terms={"sigmoid": 1.0})
    want = 0.9 * loss(logps, segments, reference, plain)
    want += 0.1 * loss(logps, flipped, reference[swap], plain)
    got = loss(logps, segments, reference, DPOConfig(terms={"sigmoid": 1.0}, label_smoothing=0.1))
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_length_normalisation_removes_the_length():
    """Doubling each token of a reply leaves the normalised loss as it was."""
    logps, segments, reference = case()
    config = DPOConfig(terms={"sigmoid": 1.0, "bco": 0.5}, length_normalised=True)
    twice = loss(logps.repeat(2), segments.repeat(2), reference * 2, config)
    assert twice.item() == pytest.approx(loss(logps, segments, reference, config).item(), rel=1e-5)
    plain = DPOConfig(terms={"sigmoid": 1.0, "bco": 0.5})
    assert loss(logps.repeat(2), segments.repeat(2), reference * 2, plain).item() != pytest.approx(
        loss(logps, segments, reference, plain).item(), rel=1e-3
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), cut=st.integers(1, PAIRS - 1))
def test_shares_of_any_split_add_up(seed, cut):
    config = DPOConfig(terms={"sigmoid": 1.0, "ipo": 0.1, "bco": 0.3, "sft": 0.5})
    logps, segments, reference = case(seed)
    whole = logps.clone().requires_grad_()
    loss(whole, segments, reference, config).backward()
    split = logps.clone().requires_grad_()
    left = segments < 2 * cut
    for part, start, stop in ((left, 0, cut), (~left, cut, PAIRS)):
        share = loss(
            split[part], segments[part] - 2 * start, reference[2 * start : 2 * stop], config
        )
        share.backward()
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-5, atol=1e-6)


def test_sft_is_a_mean_over_the_global_batch():
    logps = torch.tensor([-1.0, -2.0, -3.0])
    shares = objectives.sft_loss(logps[:1], 3) + objectives.sft_loss(logps[1:], 3)
    assert shares.item() == pytest.approx(2.0)


def test_metrics_flag_both_falling():
    def pair(chosen: float, rejected: float) -> objectives.Replies:
        numbers = (chosen, rejected, -10.0, -12.0, 5.0, 8.0)
        return objectives.Replies(*(torch.tensor([number]) for number in numbers))

    falling = objectives.preference_metrics([pair(-11, -20), pair(-14, -13)], 0.1)
    assert falling["both_falling"] is True
    assert falling["margin"] == pytest.approx(0.1 * ((-1 + 8) + (-4 + 1)) / 2)
    assert falling["accuracy"] == 0.5
    assert falling["reward_chosen"] == pytest.approx(-0.25)
    assert falling["logp_rejected"] == pytest.approx(-16.5)
    assert falling["length_chosen"] == 5 and falling["length_rejected"] == 8
    assert falling["kl"] == pytest.approx((-1 - 8 - 4 - 1) / 26)
    assert objectives.preference_metrics([pair(-9, -20)], 0.1)["both_falling"] is False


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (DPOConfig(terms={"sigmod": 1.0}), "sigmod"),
        (DPOConfig(terms={"sigmoid": 0.0}), "all 0"),
        (DPOConfig(terms={"sft": -1.0}), "terms.sft"),
        (DPOConfig(beta=0.0), "beta"),
        (DPOConfig(label_smoothing=0.5), "label_smoothing"),
        (SFTConfig(schedule="linear"), "cosine, constant"),
        (SFTConfig(precision="fp8"), "precision"),
        (SFTConfig(batch_size=0), "batch_size"),
        (SFTConfig(learning_rate=float("nan")), "learning_rate"),
        (SFTConfig(warmup=1.0), "warmup"),
    ],
)
def test_bad_values_are_named(config, word):
    with pytest.raises(UserError, match=word):
        config.validate()


def test_rates_warm_up_and_fall():
    config = SFTConfig(learning_rate=1.0, warmup=0.1, final_lr_ratio=0.1)
    rates = [config.rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[10] == 1.0 and rates[99] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert SFTConfig(learning_rate=1.0, schedule="constant").rate(99, 100) == 1.0
    assert SFTConfig(learning_rate=1.0, warmup=0.0).rate(0, 1) == 1.0

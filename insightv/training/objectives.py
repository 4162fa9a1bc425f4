"""Objectives: weighted terms over token log-probabilities.

Nothing here knows a model. A micro-batch hands over the log-probability of every target
token and the reply it belongs to; what comes back is that micro-batch's *share* of the
global batch's loss, so that shares of any split add up to the same loss and gradients.

The terms are those of TRL 1.16 (``trl/trainer/dpo_trainer.py``, ``_compute_loss``):

========== ======================================================================
sigmoid    ``-log σ(β Δ)``, Δ = winner's minus loser's log-ratio (arXiv 2305.18290)
ipo        ``(Δ̄ - 1/(2β))²``, log-ratios divided by their tokens (arXiv 2310.12036)
bco        ``-log σ(β r_w) - log σ(-β r_l)``, r the log-ratios: TRL's ``bco_pair``,
           which has no reward shift (arXiv 2404.04656)
sft        token-mean of the winners' negative log-likelihood, over the whole batch
========== ======================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from insightv.training.config import DPOConfig
from insightv.training.packing import Batch


@dataclass(frozen=True)
class Replies:
    """Both replies of P pairs, as numbers.

    Attributes:
        chosen: [P] summed log-probabilities (nats) of the winners under the policy.
        rejected: [P] the same of the losers.
        reference_chosen: [P] the winners' under the reference.
        reference_rejected: [P] the losers' under the reference.
        chosen_tokens: [P] target tokens of the winners.
        rejected_tokens: [P] target tokens of the losers.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def detach(self) -> Replies:
        """The same numbers without their graph, on the CPU."""
        return Replies(*(value.detach().cpu() for value in vars(self).values()))


def segment_sums(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """Sums ``values`` [T] by segment; [count] in fp32."""
    return values.new_zeros(count, dtype=torch.float32).index_add(0, segments, values.float())


def sft_loss(logps: Tensor, target_tokens: int) -> Tensor:
    """A micro-batch's share of the mean negative log-likelihood of a global batch.

    Args:
        logps: [T] log-probabilities of this micro-batch's target tokens.
        target_tokens: Target tokens of the global batch.
    """
    return -logps.float().sum() / target_tokens


def replies(logps: Tensor, segments: Tensor, reference: Tensor) -> Replies:
    """Gathers token log-probabilities into replies.

    Args:
        logps: [T] log-probabilities of the target tokens.
        segments: [T] the reply each token belongs to: 2i the winner of pair i, 2i + 1 its loser.
        reference: [2P] summed log-probabilities under the reference, in the same order.
    """
    sums = segment_sums(logps, segments, len(reference))
    tokens = segment_sums(torch.ones_like(logps), segments, len(reference))
    reference = reference.to(sums)
    return Replies(
        *(sums[0::2], sums[1::2]),
        *(reference[0::2], reference[1::2]),
        *(tokens[0::2], tokens[1::2]),
    )


def preference_loss(pairs: Replies, config: DPOConfig, total: int, chosen_tokens: int) -> Tensor:
    """A micro-batch's share of the preference loss of a global batch.

    Args:
        pairs: The micro-batch's replies.
        config: Terms and their constants.
        total: Pairs in the global batch.
        chosen_tokens: Target tokens of all winners in the global batch.
    """
    won = pairs.chosen - pairs.reference_chosen
    lost = pairs.rejected - pairs.reference_rejected
    mean_won = won / pairs.chosen_tokens.clamp(min=1)
    mean_lost = lost / pairs.rejected_tokens.clamp(min=1)
    if config.length_normalised:
        won, lost = mean_won, mean_lost
    loss = won.new_zeros(())
    for term, weight in config.weights().items():
        if term == "sigmoid":
            # Smoothed as in conservative DPO: with probability ε the order is the other one.
            logits, epsilon = config.beta * (won - lost), config.label_smoothing
            losses = -(1 - epsilon) * logsigmoid(logits) - epsilon * logsigmoid(-logits)
            share = losses.sum() / total
        elif term == "ipo":
            share = ((mean_won - mean_lost - 1 / (2 * config.beta)) ** 2).sum() / total
        elif term == "bco":
            share = -(logsigmoid(config.beta * won) + logsigmoid(-config.beta * lost)).sum() / total
        else:
            share = -pairs.chosen.sum() / chosen_tokens
        loss = loss + weight * share
    return loss


def preference_metrics(parts: Sequence[Replies], beta: float) -> dict[str, float | bool]:
    """What to watch in a preference training, over the micro-batches of one step.

    Returns:
        Mean implicit rewards of winners and losers, their margin, the share of pairs the
        policy orders rightly; mean summed log-probabilities; ``both_falling``: whether winners
        and losers have on average become less likely than under the reference (the sign of
        collapse); ``kl``: mean log-ratio per token over all replies, an estimate of the
        divergence from the reference as far as the replies are the policy's own; mean lengths.
    """
    chosen, rejected, reference_chosen, reference_rejected, chosen_tokens, rejected_tokens = (
        torch.cat([vars(part)[name] for part in parts]).double()
        for name in Replies.__dataclass_fields__
    )
    won, lost = chosen - reference_chosen, rejected - reference_rejected
    tokens = (chosen_tokens + rejected_tokens).sum().clamp(min=1)
    return {
        "reward_chosen": beta * won.mean().item(),
        "reward_rejected": beta * lost.mean().item(),
        "margin": beta * (won - lost).mean().item(),
        "accuracy": (won > lost).double().mean().item(),
        "logp_chosen": chosen.mean().item(),
        "logp_rejected": rejected.mean().item(),
        "both_falling": bool(won.mean() < 0 and lost.mean() < 0),
        "kl": ((won + lost).sum() / tokens).item(),
        "length_chosen": chosen_tokens.mean().item(),
        "length_rejected": rejected_tokens.mean().item(),
    }


@dataclass(frozen=True)
class Totals:
    """What a global batch's loss is divided by.

    Attributes:
        samples: Samples or pairs.
        target_tokens: Tokens the loss covers.
        chosen_tokens: Of those, the winners'.
        tokens: All tokens that go through the model, prompts and pictures included; those
            that several replies share count once.
        unshared: Tokens of the replies as sequences of their own.
        places: Rows times width of the micro-batches: the tokens and the padding.
    """

    samples: int = 0
    target_tokens: int = 0
    chosen_tokens: int = 0
    tokens: int = 0
    unshared: int = 0
    places: int = 0

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> Totals:
        """Counts the micro-batches of a step, or of one copy's part of it."""
        counts = [
            (
                len(batch.keys),
                len(batch.targets),
                int((batch.owners % 2 == 0).sum()),
                *(batch.tokens, batch.unshared, batch.segments.numel()),
            )
            for batch in batches
        ]
        return cls(*(sum(column) for column in zip(*counts, strict=True)))

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Objective(Protocol):
    """What a backend asks of an objective, one micro-batch at a time."""

    def share(self, logps: Tensor, batch: Batch, totals: Totals) -> tuple[Tensor, Replies | None]:
        """The micro-batch's share of the global loss, and what its metrics need.

        Args:
            logps: [T] log-probabilities of ``batch.targets``.
            batch: The micro-batch.
            totals: Of the global batch.
        """
        ...

    def metrics(self, parts: Sequence[Replies]) -> dict[str, float | bool]:
        """Numbers to log for a step, from the parts of all its micro-batches."""
        ...


class Supervised:
    """SFT: negative log-likelihood, averaged over the target tokens of the global batch."""

    def share(self, logps: Tensor, batch: Batch, totals: Totals) -> tuple[Tensor, Replies | None]:
        """See `Objective`."""
        return sft_loss(logps, totals.target_tokens), None

    def metrics(self, parts: Sequence[Replies]) -> dict[str, float | bool]:
        """Nothing beyond the loss."""
        return {}


class Preference:
    """DPO and its relatives: weighted terms, averaged over the pairs of the global batch."""

    def __init__(self, config: DPOConfig):
        """Takes the terms and their constants."""
        self.config = config

    def share(self, logps: Tensor, batch: Batch, totals: Totals) -> tuple[Tensor, Replies | None]:
        """See `Objective`."""
        pairs = replies(logps, batch.owners, batch.reference)
        loss = preference_loss(pairs, self.config, totals.samples, totals.chosen_tokens)
        return loss, pairs.detach()

    def metrics(self, parts: Sequence[Replies]) -> dict[str, float | bool]:
        """Rewards, margins, log-probabilities and lengths (`preference_metrics`)."""
        return preference_metrics(parts, self.config.beta)

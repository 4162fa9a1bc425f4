"""The summary agent's set: reasoning of every quality, the true answer always the target."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from hpc.errors import UserError
from insightv.agents import summary_messages
from insightv.curation.groups import (
    Case,
    Draws,
    Groups,
    Judged,
    PlainQuestions,
    cases,
    check_range,
    check_scale,
    cut,
    draw,
    histogram,
)
from insightv.prompting import Prompts
from insightv.records import Message, Question, TrainingSample

KINDS = ("good", "middling", "low", "wrong", "plain")


@dataclass
class SummarySetConfig:
    """What the summary agent learns to judge, use or set aside.

    The share of good to flawed reasoning is not published; of the paper's 1.2M samples about
    1M are plain question answering, which here is left to the user's budget.

    Attributes:
        good: Share of right paths with a high score: reasoning to be used.
        middling: Share of right paths in between: to be used with care.
        low: Share of right paths with a low score: the answer holds, the reasoning does not.
        wrong: Share of wrong paths; the target is still the true answer, so bad reasoning is
            corrected or set aside. As much as middling and low together: an agent that never
            sees wrong reasoning copies whatever it is given.
        plain: Share without any reasoning, so that the picture itself is still read.
        scale: What the two thresholds are read on; see ``ReasoningSetConfig.scale``.
        good_from: 67: the best third of the right paths.
        low_below: 33: the worst third.
        per_kind: At most so many paths of one kind from one question, drawn by seed. 1 keeps
            all kinds spread over as many questions as there are.
        size: Samples in all. None: as many as the good ones allow at their share (failing
            those, the next kind in the list above). Kinds that run short are not made up for:
            the shortage is counted.
    """

    good: float = 0.35
    middling: float = 0.15
    low: float = 0.1
    wrong: float = 0.2
    plain: float = 0.2
    scale: str = "percentile"
    good_from: int = 67
    low_below: int = 33
    per_kind: int = 1
    size: int | None = None

    def validate(self) -> None:
        """Checks the values.

        Raises:
            UserError: One of them is not possible.
        """
        check_scale("summary_set.scale", self.scale)
        for name in KINDS:
            check_range(f"summary_set.{name}", getattr(self, name), 0, 1)
        total = sum(getattr(self, name) for name in KINDS)
        if abs(total - 1) > 1e-6:
            raise UserError(f"summary_set: {', '.join(KINDS)} add up to {total:g}, not to 1")
        check_range("summary_set.good_from", self.good_from, 0, 100)
        check_range("summary_set.low_below", self.low_below, 0, self.good_from)
        if self.per_kind < 1:
            raise UserError(f"summary_set.per_kind is {self.per_kind}: use 1 or more")
        if self.size is not None and self.size < 0:
            raise UserError(f"summary_set.size is {self.size}: use 0 or more, or null")


def summary_set(
    config: SummarySetConfig,
    groups: Groups,
    plain: PlainQuestions,
    prompts: Prompts,
    seed: int,
    counts: Counter[str],
) -> Iterator[TrainingSample]:
    """The set for the summary agent: picture, question and reasoning in, the true answer out.

    Args:
        config: Shares, thresholds, size.
        groups: Questions with paths, verdicts and scores: two passes, three with percentiles.
        plain: Questions answered without reasoning.
        prompts: The set the agent will be asked with.
        seed: Of the draws.
        counts: Filled with what came in, was dropped, was kept, and what ran short.

    Raises:
        UserError: A value of ``config`` is not possible.
    """
    config.validate()
    totals = histogram(groups) if config.scale == "percentile" else None
    good = cut(config.scale, config.good_from, totals)
    bands = (min(good, cut(config.scale, config.low_below, totals)), good)
    counts["low below"], counts["good from"] = bands
    draws = {kind: Draws() for kind in KINDS}
    for case in cases(groups, Counter()):
        for kind, judged in _of_case(config, case, bands, seed, Counter()):
            draws[kind].add(draw(seed, kind, judged.key))
    for question in plain():
        draws["plain"].add(draw(seed, "summary-plain", question.key))
    limits = _limits(config, draws, counts)
    for case in cases(groups, counts):
        for kind, judged in _of_case(config, case, bands, seed, counts):
            if draw(seed, kind, judged.key) <= limits[kind]:
                counts[f"kept {kind}"] += 1
                yield _sample(prompts, case.question, judged, kind)
            else:
                counts[f"dropped: more {kind} than its share"] += 1
    for question in plain():
        if draw(seed, "summary-plain", question.key) <= limits["plain"]:
            counts["kept plain"] += 1
            yield _sample(prompts, question, None, "plain")


def _of_case(
    config: SummarySetConfig, case: Case, bands: tuple[int, int], seed: int, counts: Counter[str]
) -> Iterator[tuple[str, Judged]]:
    """A question's candidates by kind, at most ``per_kind`` of each."""
    by_kind: dict[str, list[Judged]] = defaultdict(list)
    for judged in case.paths:
        if judged.correct is None:
            counts["dropped: undecided"] += 1
        elif not judged.correct:
            by_kind["wrong"].append(judged)
        elif judged.total is None:
            counts["dropped: unscored"] += 1
        elif judged.total >= bands[1]:
            by_kind["good"].append(judged)
        else:
            by_kind["low" if judged.total < bands[0] else "middling"].append(judged)
    for kind, candidates in by_kind.items():
        candidates.sort(key=lambda judged: draw(seed, "order", judged.key))
        counts["dropped: over the cap of its question"] += max(0, len(candidates) - config.per_kind)
        for judged in candidates[: config.per_kind]:
            yield kind, judged


def _limits(
    config: SummarySetConfig, draws: dict[str, Draws], counts: Counter[str]
) -> dict[str, int]:
    """The largest draw taken of each kind, so that the shares come out."""
    shares = {kind: getattr(config, kind) for kind in KINDS}
    size = config.size
    if size is None:
        usable = [kind for kind in KINDS if shares[kind] > 0 and len(draws[kind])]
        size = round(len(draws[usable[0]]) / shares[usable[0]]) if usable else 0
    limits = {}
    for kind in KINDS:
        quota = round(size * shares[kind])
        limits[kind] = draws[kind].limit(quota)
        if quota > len(draws[kind]):
            counts[f"short of {kind}"] = quota - len(draws[kind])
    return limits


def _sample(
    prompts: Prompts, question: Question, judged: Judged | None, kind: str
) -> TrainingSample:
    parent = judged.key if judged else question.key
    answer = Message("assistant", question.answer, train=True)
    return TrainingSample(
        key=f"{parent}/summary",
        question=question.key,
        pictures=question.pictures,
        messages=(*summary_messages(prompts, question, judged.text if judged else ""), answer),
        kind=f"summary:{kind}",
        parents=(parent,),
    )

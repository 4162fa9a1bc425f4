"""The reasoning agent's set: the best paths, several ways to an answer, plain tasks mixed in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from hpc.errors import UserError
from insightv.agents import direct_messages, reasoning_messages
from insightv.assessment.rules import normal, stated
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

Render = Callable[[Prompts, Question, Judged], tuple[Message, ...]]
"""The turns of one sample."""


@dataclass
class ReasoningSetConfig:
    """Which paths the reasoning agent learns from.

    Attributes:
        scale: What ``threshold`` is read on. ``percentile`` (of the totals of all right paths)
            means the same whatever scorer is used; ``score`` takes it as it stands. The paper
            trains on "the best" paths and does not publish its threshold.
        threshold: 50: the better half of the right paths.
        per_question: At most so many paths of one question. 2: more questions teach more than
            more ways to one answer, one alternative keeps some variety.
        max_overlap: Two paths of a question that share more than this part of their word
            triples are one. 0.9 removes rewordings and keeps other orders and other readings.
        consistent: Drops paths whose last step plainly states another answer than the (right)
            one that was then given: right by luck.
        max_pass_rate: Leaves out questions of whose paths more than this share is right. 1.0
            keeps all; the paper took half of its questions from those the generator's direct
            answer failed on.
        use_unscored: Whether right paths without a score may be used (after the scored ones): a
            control without scoring.
        size: At most so many reasoning samples, drawn by seed; a smaller size is a subset of a
            larger. None: all. (Paper: 200,000.)
        replay: Share of plain question answering in the finished set, so that nothing is
            forgotten: two minutes of reasoning alone cost the embedded model a fifth of its
            transcriptions. 0.2 keeps reasoning the main thing.
    """

    scale: str = "percentile"
    threshold: int = 50
    per_question: int = 2
    max_overlap: float = 0.9
    consistent: bool = True
    max_pass_rate: float = 1.0
    use_unscored: bool = False
    size: int | None = None
    replay: float = 0.2

    def validate(self) -> None:
        """Checks the values.

        Raises:
            UserError: One of them is not possible.
        """
        check_scale("reasoning_set.scale", self.scale)
        check_range("reasoning_set.threshold", self.threshold, 0, 100)
        check_range("reasoning_set.max_overlap", self.max_overlap, 0, 1)
        check_range("reasoning_set.max_pass_rate", self.max_pass_rate, 0, 1)
        check_range("reasoning_set.replay", self.replay, 0, 0.95)
        if self.per_question < 1:
            raise UserError(f"reasoning_set.per_question is {self.per_question}: use 1 or more")
        if self.size is not None and self.size < 0:
            raise UserError(f"reasoning_set.size is {self.size}: use 0 or more, or null for all")


def path_set(
    config: ReasoningSetConfig,
    groups: Groups,
    plain: PlainQuestions,
    prompts: Prompts,
    seed: int,
    counts: Counter[str],
    kind: str,
    render: Render,
) -> Iterator[TrainingSample]:
    """The best paths in some form of training turn, then the plain samples of the replay.

    The same paths are chosen whatever the form, so that forms can be compared.

    Args:
        config: Threshold, caps, replay.
        groups: Questions with paths, verdicts and scores. One pass; one more each for a
            percentile and for a size.
        plain: Questions for replay.
        prompts: The set the agent will be asked with.
        seed: Of the draws.
        counts: Filled with what came in, was dropped, was kept.
        kind: What the samples are called.
        render: The turns of one sample.

    Yields:
        The samples made of paths, then the plain ones.

    Raises:
        UserError: A value of ``config`` is not possible.
    """
    config.validate()
    kept = 0
    for question, judged in _best(config, groups, seed, counts):
        kept += 1
        yield TrainingSample(
            key=f"{judged.key}/{kind.split(':')[0]}",
            question=question.key,
            pictures=question.pictures,
            messages=render(prompts, question, judged),
            kind=kind,
            parents=(judged.key,),
        )
    counts["kept"] += kept
    wanted = round(kept * config.replay / (1 - config.replay))
    yield from plain_samples(plain, prompts, wanted, seed, counts)


def plain_samples(
    plain: PlainQuestions, prompts: Prompts, size: int | None, seed: int, counts: Counter[str]
) -> Iterator[TrainingSample]:
    """Questions answered directly, ``size`` of them drawn by seed; a shortage is counted."""
    if size == 0:
        return
    draws = Draws()
    for question in plain():
        draws.add(draw(seed, "plain", question.key))
    limit = draws.limit(size)
    for question in plain():
        if draw(seed, "plain", question.key) <= limit:
            counts["plain kept"] += 1
            answer = Message("assistant", question.answer, train=True)
            yield TrainingSample(
                key=f"{question.key}/plain",
                question=question.key,
                pictures=question.pictures,
                messages=(*direct_messages(prompts, question), answer),
                kind="plain",
                parents=(question.key,),
            )
    if size is not None and size > len(draws):
        counts["plain short"] += size - len(draws)


def near_duplicate(one: frozenset[str], other: frozenset[str], limit: float) -> bool:
    """Whether two texts share more than ``limit`` of their word triples (Jaccard index)."""
    return one == other or len(one & other) > limit * len(one | other)


def triples(judged: Judged) -> frozenset[str]:
    """The word triples of a path's steps, without case and punctuation."""
    said = (part for step in judged.path.steps for part in (step.title, step.content))
    words = " ".join(map(normal, said)).split()
    if len(words) < 3:
        return frozenset([" ".join(words)])
    return frozenset(" ".join(words[place : place + 3]) for place in range(len(words) - 2))


def _render(prompts: Prompts, question: Question, judged: Judged) -> tuple[Message, ...]:
    turn = Message("assistant", judged.text, train=True)
    return (*reasoning_messages(prompts, question), turn)


reasoning_set = partial(path_set, kind="reasoning:best", render=_render)
"""The set for the reasoning agent: its prompt, then the steps as one supervised turn."""


def _best(
    config: ReasoningSetConfig, groups: Groups, seed: int, counts: Counter[str]
) -> Iterator[tuple[Question, Judged]]:
    """The chosen paths; with a size, a first pass over all groups finds where it ends."""
    totals = histogram(groups) if config.scale == "percentile" else None
    least = cut(config.scale, config.threshold, totals)
    counts["least total"] = least

    def chosen(tally: Counter[str]) -> Iterator[tuple[Question, Judged]]:
        for case in cases(groups, tally):
            for judged in _of_case(config, case, least, seed, tally):
                yield case.question, judged

    if config.size is None:
        yield from chosen(counts)
        return
    draws = Draws()
    for _, judged in chosen(Counter()):
        draws.add(draw(seed, "reasoning", judged.key))
    limit = draws.limit(config.size)
    for question, judged in chosen(counts):
        if draw(seed, "reasoning", judged.key) <= limit:
            yield question, judged
        else:
            counts["dropped: over the size"] += 1


def _of_case(
    config: ReasoningSetConfig, case: Case, least: int, seed: int, counts: Counter[str]
) -> list[Judged]:
    """A question's best paths, best first, every other one counted with its reason."""
    right = sum(judged.correct is True for judged in case.paths)
    too_easy = right > config.max_pass_rate * len(case.paths)
    candidates = []
    for judged in case.paths:
        reason = _unfit(config, case.question, judged, least)
        if reason is None and too_easy:
            reason = "too easy a question"
        if reason is None:
            candidates.append(judged)
        else:
            counts[f"dropped: {reason}"] += 1
    order = {judged.key: draw(seed, "order", judged.key) for judged in candidates}
    candidates.sort(key=lambda judged: (-(judged.total or 0), order[judged.key]))
    return _diverse(config, candidates, counts)


def _unfit(
    config: ReasoningSetConfig, question: Question, judged: Judged, least: int
) -> str | None:
    """Why a path cannot be learned from, or None."""
    if judged.correct is None:
        return "undecided"
    if not judged.correct:
        return "wrong answer"
    if not judged.finished:
        return "unfinished"
    if judged.total is None and not config.use_unscored:
        return "unscored"
    if judged.total is not None and judged.total < least:
        return "low score"
    if config.consistent and stated(question, judged.conclusion) is False:
        return "steps state another answer"
    return None


def _diverse(
    config: ReasoningSetConfig, candidates: Sequence[Judged], counts: Counter[str]
) -> list[Judged]:
    kept: list[Judged] = []
    seen: list[frozenset[str]] = []
    for judged in candidates:
        if len(kept) == config.per_question:
            counts["dropped: over the cap of its question"] += 1
            continue
        words = triples(judged)
        if any(near_duplicate(words, other, config.max_overlap) for other in seen):
            counts["dropped: near duplicate"] += 1
            continue
        kept.append(judged)
        seen.append(words)
    return kept


def with_prefix(sample: TrainingSample, prefix: str) -> TrainingSample:
    """The sample under a key of its own in a joint set."""
    return replace(sample, key=f"{prefix}:{sample.key}")

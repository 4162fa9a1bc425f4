"""Preference pairs: two reasonings about one question, the first to be preferred."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from hpc.errors import UserError
from insightv.agents import reasoning_messages
from insightv.assessment.rules import normal, stated
from insightv.curation.groups import (
    Case,
    Draws,
    Groups,
    Judged,
    cases,
    check_range,
    check_scale,
    cut,
    draw,
    histogram,
)
from insightv.prompting import Prompts
from insightv.records import PreferencePair, Question


@dataclass
class PairConfig:
    """Which paths become winner and loser; the paper's own rule is not published.

    Attributes:
        scale: What ``winner_from`` is read on; see ``ReasoningSetConfig.scale``.
        winner_from: A winner is right and has at least this total. 50: the better half.
        wrong_losers: Pairs of a right path and a wrong one.
        score_losers: Pairs of two right paths, the loser's score clearly lower: hard negatives
            that teach how to reason rather than what to answer.
        min_gap: Points a right loser must lie below its winner. 20: well beyond what scorers
            differ by when asked twice.
        per_question: At most so many pairs of one question. MMPR allows 15; 4 spreads the
            paper's 15,000 pairs over thousands of questions, instead of a thousand hard ones.
        per_path: At most so many pairs with the same path, so that no single text is pushed up
            or down again and again.
        max_length_ratio: The longer text may have at most so many times the characters of the
            shorter: raw DPO drifts to longer texts where winners are longer.
        max_pairs: At most so many pairs in all, drawn by seed; None: all. (Paper: 15,000.)
    """

    scale: str = "percentile"
    winner_from: int = 50
    wrong_losers: bool = True
    score_losers: bool = True
    min_gap: int = 20
    per_question: int = 4
    per_path: int = 2
    max_length_ratio: float = 1.5
    max_pairs: int | None = 15_000

    def validate(self, name: str = "pairs") -> None:
        """Checks the values; ``name`` is the section's, for the message.

        Raises:
            UserError: One of them is not possible.
        """
        check_scale(f"{name}.scale", self.scale)
        check_range(f"{name}.winner_from", self.winner_from, 0, 100)
        check_range(f"{name}.min_gap", self.min_gap, 1, 99)
        check_range(f"{name}.max_length_ratio", self.max_length_ratio, 1, 1e6)
        if self.per_question < 1 or self.per_path < 1:
            raise UserError(f"{name}.per_question and {name}.per_path: use 1 or more")
        if not (self.wrong_losers or self.score_losers):
            raise UserError(f"{name}.wrong_losers and {name}.score_losers are both off: no pairs")
        if self.max_pairs is not None and self.max_pairs < 0:
            raise UserError(f"{name}.max_pairs is {self.max_pairs}: use 0 or more, or null for all")


@dataclass(frozen=True)
class _Pair:
    question: Question
    winner: Judged
    loser: Judged
    kind: str

    @property
    def key(self) -> str:
        return f"{self.winner.key}|{self.loser.key}"


def preference_pairs(
    config: PairConfig, groups: Groups, prompts: Prompts, seed: int, counts: Counter[str]
) -> Iterator[PreferencePair]:
    """Pairs for DPO of the reasoning agent; both texts are whole reasonings, without answers.

    A winner is decided right, scored high, finished, and its steps do not state another answer.
    A loser is decided wrong, or right with a clearly lower score. A wrong loser must give
    another answer than the winner and must not conclude with the true one: its last step, read
    by the same rules as answers, is not the true answer, nor does it end in its words.
    Undecided paths are neither, unscored ones never winners. Both stem from the same round.

    Args:
        config: Thresholds and caps.
        groups: Questions with paths, verdicts and scores; one pass, one more each for a
            percentile and for ``max_pairs``.
        prompts: The set the agent is asked with.
        seed: Of the draws.
        counts: Filled with what came in, was dropped and why, was kept, and the summed lengths
            of both sides in characters.

    Raises:
        UserError: A value of ``config`` is not possible.
    """
    config.validate()
    totals = histogram(groups) if config.scale == "percentile" else None
    least = cut(config.scale, config.winner_from, totals)
    counts["least total"] = least

    def chosen(tally: Counter[str]) -> Iterator[_Pair]:
        for case in cases(groups, tally):
            yield from _of_case(config, case, least, seed, tally)

    limit = Draws().limit(None)
    if config.max_pairs is not None:
        draws = Draws()
        for pair in chosen(Counter()):
            draws.add(draw(seed, "pairs", pair.key))
        limit = draws.limit(config.max_pairs)
    for pair in chosen(counts):
        if draw(seed, "pairs", pair.key) > limit:
            counts["dropped: over max_pairs"] += 1
            continue
        counts["kept"] += 1
        counts[f"kept {pair.kind}"] += 1
        counts["chosen characters"] += len(pair.winner.text)
        counts["rejected characters"] += len(pair.loser.text)
        yield _record(prompts, pair)


def _of_case(
    config: PairConfig, case: Case, least: int, seed: int, counts: Counter[str]
) -> list[_Pair]:
    """A question's pairs; every combination of winner and loser is kept or counted."""
    paths = _distinct(case, counts)
    winners = [judged for judged in paths if _wins(case.question, judged, least, counts)]
    losers = [judged for judged in paths if _may_lose(config, judged, counts)]
    pairs: list[_Pair] = []
    for winner in winners:
        for loser in losers:
            if winner is loser:
                continue
            counts["combinations"] += 1
            reason = _mismatch(config, case.question, winner, loser)
            if reason is None:
                kind = "score" if loser.correct else "right>wrong"
                pairs.append(_Pair(case.question, winner, loser, kind))
            else:
                counts[f"dropped: {reason}"] += 1
    return _capped(config, pairs, seed, counts)


def _distinct(case: Case, counts: Counter[str]) -> list[Judged]:
    """Finished paths with different texts; a text judged both right and wrong is none."""
    by_text: dict[tuple[str, str], list[Judged]] = {}
    for judged in case.paths:
        if not judged.finished:
            counts["paths unfinished"] += 1
        elif judged.correct is not None:
            by_text.setdefault((judged.round, judged.text), []).append(judged)
    distinct = []
    for same in by_text.values():
        if len({judged.correct for judged in same}) > 1:
            counts["paths with one text, right and wrong"] += len(same)
            continue
        counts["paths with a text seen before"] += len(same) - 1
        distinct.append(max(same, key=lambda judged: judged.total or 0))
    return distinct


def _wins(question: Question, judged: Judged, least: int, counts: Counter[str]) -> bool:
    if not judged.correct:
        return False
    if judged.total is None:
        counts["no winner: unscored"] += 1
    elif judged.total < least:
        counts["no winner: low score"] += 1
    elif stated(question, judged.conclusion) is False:
        counts["no winner: steps state another answer"] += 1
    else:
        counts["winners"] += 1
        return True
    return False


def _may_lose(config: PairConfig, judged: Judged, counts: Counter[str]) -> bool:
    wanted = judged.total is not None and config.score_losers
    loses = wanted if judged.correct else config.wrong_losers
    counts["losers wrong"] += bool(loses and not judged.correct)
    return loses


def _mismatch(config: PairConfig, question: Question, winner: Judged, loser: Judged) -> str | None:
    """Why two paths are no pair, or None."""
    if winner.round != loser.round:
        return "of different rounds"
    if loser.correct:
        if (winner.total or 0) - (loser.total or 0) < config.min_gap:
            return "scores too close"
    elif normal(loser.path.answer) == normal(winner.path.answer):
        return "same answer"
    elif concludes_right(question, loser):
        return "loser concludes with the true answer"
    lengths = sorted((len(winner.text), len(loser.text)))
    if lengths[1] > config.max_length_ratio * lengths[0]:
        return "lengths too different"
    return None


def concludes_right(question: Question, judged: Judged) -> bool:
    """Whether a path's last step states the true answer, or at least ends in its words."""
    said = stated(question, judged.conclusion)
    if said is not None:
        return said
    return f" {normal(judged.conclusion)}".endswith(f" {normal(question.answer)}")


def _capped(config: PairConfig, pairs: list[_Pair], seed: int, counts: Counter[str]) -> list[_Pair]:
    """Within the caps, in seeded order, the two kinds taking turns."""
    order = sorted(pairs, key=lambda pair: draw(seed, "order", pair.key))
    wrong = [pair for pair in order if pair.kind == "right>wrong"]
    score = [pair for pair in order if pair.kind == "score"]
    kept: list[_Pair] = []
    uses: Counter[str] = Counter()
    while wrong or score:
        queue = wrong if wrong and (not score or _fewer(kept)) else score
        pair = queue.pop(0)
        if len(kept) == config.per_question:
            counts["dropped: over the cap of its question"] += 1
        elif max(uses[pair.winner.key], uses[pair.loser.key]) >= config.per_path:
            counts["dropped: over the cap of a path"] += 1
        else:
            uses.update((pair.winner.key, pair.loser.key))
            kept.append(pair)
    return kept


def _fewer(kept: list[_Pair]) -> bool:
    """Whether it is the turn of a wrong loser."""
    return 2 * sum(pair.kind == "right>wrong" for pair in kept) <= len(kept)


def _record(prompts: Prompts, pair: _Pair) -> PreferencePair:
    winner, loser = pair.winner, pair.loser
    both = winner.total is not None and loser.total is not None
    return PreferencePair(
        key=pair.key,
        question=pair.question.key,
        pictures=pair.question.pictures,
        prompt=tuple(reasoning_messages(prompts, pair.question)),
        chosen=winner.text,
        rejected=loser.text,
        kind=pair.kind,
        gap=(winner.total or 0) - (loser.total or 0) if both else None,
    )

"""One entry of the ladder answers the test questions: predictions, judged as they come.

Modes, from the base upwards: ``direct`` (the answer at once), ``reasoning`` (one model writes
its steps, then answers in a further turn), ``direct_sft`` (steps and answer in one turn),
``summary_only`` (the summary agent without reasoning), ``multi_agent`` (reasoning agent, then
summary agent). Controls: ``majority`` (a vote over sampled paths at no more tokens than
another entry spent) and ``judge_card`` (the summary agent with another entry's reasoning,
with none, and with the reasoning for another question).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpc import shards
from hpc.errors import RecordError, UserError
from hpc.stages import Row
from insightv.agents import (
    DirectAgent,
    FinalAgent,
    ReasoningAgent,
    SummaryAgent,
    reasoning_messages,
)
from insightv.assessment.judge import Judge
from insightv.assessment.rules import normal, stated
from insightv.curation.controls import parse_direct
from insightv.engines.base import Engine, Request
from insightv.engines.config import SamplingConfig
from insightv.prompting import Prompts
from insightv.records import Prediction, Question, Step, seed_for
from insightv.steps import parse_steps, render_steps

MODES = (
    "direct",
    "reasoning",
    "direct_sft",
    "summary_only",
    "multi_agent",
    "majority",
    "judge_card",
)
VOTERS = ("direct", "reasoning", "direct_sft")
CARD = ("agent", "none", "other")
"""Whose reasoning the judge's card gives: the other entry's, nobody's, another question's."""


@dataclass
class CallConfig(SamplingConfig):
    """How one agent's tokens are drawn; each agent has its own limits. See `SamplingConfig`.

    Attributes:
        temperature: 0.2, the paper's setting at inference; 0 is greedy.
        top_p: 0.95, likewise.
    """

    temperature: float = 0.2
    top_p: float = 0.95


@dataclass
class EntryConfig:
    """One entry of the ladder.

    Attributes:
        name: Its name in predictions and results; letters, digits, ``_`` and ``-``.
        mode: One of `MODES`.
        reasoning_model: Who reasons, or answers alone: a model of the run, or a folder.
        summary_model: Who answers last, for ``summary_only``, ``multi_agent``, ``judge_card``.
        reasoning: Sampling of the reasoning. 4,096 tokens hold the longest chains of the
            paper's generator (about 16 steps) in one call.
        answer: Sampling of the final answer. 256 tokens: a few words are asked for, some
            models put them in a sentence.
        voter: For ``majority``: the mode of each vote.
        votes: For ``majority``: most votes. 16: beyond that a vote changes little.
        reasoning_from: For ``judge_card``: the entry whose reasoning is given; for
            ``majority``: the entry whose tokens on each question may not be exceeded (empty:
            all ``votes`` count). Its predictions are the stage's input ``predictions``.
    """

    name: str = "multi_agent"
    mode: str = "multi_agent"
    reasoning_model: str = ""
    summary_model: str = ""
    reasoning: CallConfig = field(default_factory=lambda: CallConfig(max_tokens=4096))
    answer: CallConfig = field(default_factory=lambda: CallConfig(max_tokens=256))
    voter: str = "direct"
    votes: int = 16
    reasoning_from: str = ""

    @property
    def reasons(self) -> bool:
        """Whether it needs ``reasoning_model``."""
        return self.mode not in ("summary_only", "judge_card")

    @property
    def summarises(self) -> bool:
        """Whether it needs ``summary_model``."""
        return self.mode in ("summary_only", "multi_agent", "judge_card")

    def validate(self) -> None:
        """Checks what types cannot.

        Raises:
            UserError: A value that cannot work; the line names it.
        """
        where = f"entry {self.name!r}"
        if not self.name or not self.name.replace("_", "").replace("-", "").isalnum():
            raise UserError(f"{where}: a name has letters, digits, _ and - only")
        if self.mode not in MODES:
            raise UserError(f"{where}: mode is {self.mode!r}; use {', '.join(MODES)}")
        if self.voter not in VOTERS:
            raise UserError(f"{where}: voter is {self.voter!r}; use {', '.join(VOTERS)}")
        if self.mode == "judge_card" and not self.reasoning_from:
            raise UserError(f"{where}: name in reasoning_from whose reasoning is judged")
        if self.mode == "majority" and self.votes < 1:
            raise UserError(f"{where}: votes is {self.votes}; give at least 1")
        sampled = self.answer if self.voter == "direct" else self.reasoning
        if self.mode == "majority" and self.votes > 1 and sampled.temperature <= 0:
            raise UserError(f"{where}: votes at temperature 0 are all the same; give one above 0")
        for wanted, value in (
            ("reasoning_model", self.reasoning_model or not self.reasons),
            ("summary_model", self.summary_model or not self.summarises),
        ):
            if not value:
                raise UserError(f"{where}: mode {self.mode} needs a {wanted}")


@dataclass(frozen=True)
class Said:
    """What an entry said about one question.

    Attributes:
        answer: The final answer.
        tokens: Generated tokens behind it.
        reasoning: The steps, in canonical form where any could be read.
        conclusion: What the last step says.
    """

    answer: str
    tokens: int
    reasoning: str = ""
    conclusion: str = ""


class Answer:
    """The mapper questions (and predictions of another entry) → predictions."""

    def __init__(
        self,
        config: EntryConfig,
        prompts: Prompts,
        judge: Judge,
        reasoning: Engine | None = None,
        summary: Engine | None = None,
        seed: int = 0,
        donors: Mapping[str, str] | None = None,
    ):
        """Takes the engines the entry's mode needs.

        Args:
            config: The entry.
            prompts: The set both models were trained with.
            judge: Decides answers, by rule first.
            reasoning: Runs ``reasoning_model``.
            summary: Runs ``summary_model``.
            seed: The run's seed.
            donors: For ``judge_card``: another question's reasoning for each question (`donate`).

        Raises:
            UserError: The configuration cannot work.
        """
        config.validate()
        if config.reasons and reasoning is None or config.summarises and summary is None:
            raise ValueError(f"entry {config.name}: an engine is missing")
        self.config, self.prompts, self.judge, self.seed = config, prompts, judge, seed
        self.donors = donors or {}
        self._engines = [engine for engine in (reasoning, summary) if engine is not None]
        self.concurrency = max(engine.concurrency for engine in self._engines)
        sampling = config.answer.sampling()
        if reasoning is not None:
            self._direct = DirectAgent(reasoning, prompts, sampling)
            self._reasoner = ReasoningAgent(reasoning, prompts, config.reasoning.sampling())
            self._final = FinalAgent(reasoning, prompts, sampling)
        if summary is not None:
            self._summary = SummaryAgent(summary, prompts, sampling)

    async def __call__(self, key: str, inputs: Mapping[str, list[Row]]) -> list[Row]:
        """The predictions of one question: one, or three for the judge's card.

        Raises:
            RecordError: The question is missing, or an engine cannot serve it.
        """
        if not inputs["questions"]:
            raise RecordError(f"{key}: the question is missing")
        question = Question.from_json(inputs["questions"][0])
        other = _only(inputs.get("predictions", ()), self.config.reasoning_from)
        if self.config.mode == "judge_card":
            return await self._card(question, other)
        if self.config.mode == "majority":
            said = await self._majority(question, other)
        else:
            said = await self._answer(self.config.mode, question)
        return [await self._prediction(self.config.name, question, said)]

    async def close(self) -> None:
        """Closes every engine once, the judge's among them."""
        engines = [*self._engines, self.judge.engine]
        for engine in {id(engine): engine for engine in engines if engine}.values():
            await engine.close()

    async def _answer(self, mode: str, question: Question, vote: int = 0) -> Said:
        """One answer in a mode of one or two models."""
        seed = seed_for(self.seed, "eval", self.config.name, question.key, vote)
        if mode == "direct":
            found = await self._direct.answer(question, seed=seed)
            return Said(found.text, found.tokens)
        if mode == "summary_only":
            return await self._summarise(question, "")
        if mode == "direct_sft":
            return await self._answer_at_once(question, seed)
        thought = await self._reasoner.reason(question, lambda step, attempt: seed + attempt)
        answerer = self._final if mode == "reasoning" else self._summary
        found = await answerer.answer(question, thought.text, seed)
        return Said(
            found.text, thought.tokens + found.tokens, thought.text, _conclusion(thought.steps)
        )

    async def _answer_at_once(self, question: Question, seed: int) -> Said:
        """Steps and answer in one turn, asked as the reasoning agent is."""
        request = Request(
            reasoning_messages(self.prompts, question),
            question.pictures,
            self.config.reasoning.sampling(),
            seed,
        )
        done = await self._reasoner.engine.complete(request)
        text, answer = parse_direct(done.text)
        steps = parse_steps(text).steps
        reasoning = render_steps(steps) if steps else text
        return Said(answer, done.tokens, reasoning, _conclusion(steps))

    async def _summarise(self, question: Question, reasoning: str) -> Said:
        """The summary agent's answer, given someone's reasoning or none."""
        seed = seed_for(self.seed, "eval", self.config.name, question.key, reasoning)
        found = await self._summary.answer(question, reasoning, seed)
        steps = parse_steps(reasoning).steps
        return Said(found.text, found.tokens, reasoning, _conclusion(steps))

    async def _majority(self, question: Question, other: Row | None) -> Said:
        """The most frequent answer among the votes that fit the budget; ties go to the first.

        Votes are counted in the order of their seeds, until one would exceed what the other
        entry spent on this question; the first counts always.
        """
        votes = await asyncio.gather(
            *(self._answer(self.config.voter, question, vote) for vote in range(self.config.votes))
        )
        counted = votes[:1]
        for vote in votes[1:]:
            spent = sum(earlier.tokens for earlier in counted) + vote.tokens
            if other is not None and spent > other["tokens"]:
                break
            counted.append(vote)
        # Answers that say nothing (cut off before they came) have no vote while others have.
        cast = [vote for vote in counted if vote.answer] or counted
        said = Counter(normal(vote.answer) for vote in cast)
        best = max(said.values())
        winner = next(vote for vote in cast if said[normal(vote.answer)] == best)
        tokens = sum(vote.tokens for vote in counted)
        return Said(winner.answer, tokens, winner.reasoning, winner.conclusion)

    async def _card(self, question: Question, other: Row | None) -> list[Row]:
        """The summary agent's three answers."""
        if other is None or question.key not in self.donors:
            raise RecordError(f"{question.key}: no reasoning of {self.config.reasoning_from}")
        given = {"agent": other["reasoning"], "none": "", "other": self.donors[question.key]}
        said = await asyncio.gather(*(self._summarise(question, given[name]) for name in CARD))
        return [
            await self._prediction(f"{self.config.name}:{name}", question, answer)
            for name, answer in zip(CARD, said, strict=True)
        ]

    async def _prediction(self, entry: str, question: Question, said: Said) -> Row:
        """The judged record of what was said."""
        decision = await self.judge.decide_answer(question, said.answer)
        rules = self.judge.config.rules
        return Prediction(
            key=f"{question.key}@{entry}",
            question=question.key,
            entry=entry,
            reasoning=said.reasoning,
            reasoning_answer=said.conclusion,
            answer=said.answer,
            correct=decision.correct,
            reasoning_correct=(
                stated(question, said.conclusion, rules) if said.conclusion else None
            ),
            rule=decision.rule,
            tokens=said.tokens,
            models=tuple(engine.digest for engine in self._engines),
        ).to_json()


def donate(questions: Path, predictions: Path, entry: str, seed: int) -> dict[str, str]:
    """Gives every question the reasoning an entry wrote for another one of its question set.

    A seeded shuffle of the set; each takes from the next one about another picture's table
    (group), where there is one. Holds one reasoning text a question in memory.

    Args:
        questions: Shards of the questions.
        predictions: Shards of the entry's predictions.
        entry: Name of the entry.
        seed: The run's seed.
    """
    written: dict[str, dict[str, tuple[str, str]]] = {}
    for key, rows in shards.join({"questions": questions, "predictions": predictions}):
        found = _only(rows["predictions"], entry)
        if found is not None and rows["questions"]:
            question = Question.from_json(rows["questions"][0])
            told = (question.group or key, found["reasoning"])
            written.setdefault(question.benchmark, {})[key] = told
    given = {}
    for benchmark, texts in written.items():
        keys = sorted(texts)
        random.Random(seed_for(seed, "donate", entry, benchmark)).shuffle(keys)
        for place, key in enumerate(keys):
            others = (keys[(place + step) % len(keys)] for step in range(1, len(keys)))
            strangers = (other for other in others if texts[other][0] != texts[key][0])
            donor = next(strangers, keys[(place + 1) % len(keys)])
            if donor != key:
                given[key] = texts[donor][1]
    return given


def _only(rows: Iterable[Row], entry: str) -> Row | None:
    """The prediction of one entry among the rows of a question."""
    return next((row for row in rows if row["entry"] == entry), None)


def _conclusion(steps: Sequence[Step]) -> str:
    """What the last step says: the answer the reasoning arrives at."""
    return steps[-1].content.strip() if steps else ""

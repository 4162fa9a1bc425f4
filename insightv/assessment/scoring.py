"""Scores of reasoning paths: all paths of one question in one pass, so that they compare.

Known biases of such scorers, and what is done about them: they favour positions (the order
is drawn by seed, several passes with other orders can be averaged) and length (the report
shows score against length; preference pairs are length-matched); they move between calls
(where a question's paths need several, shared anchors align them; a share of questions is
scored twice to measure agreement). The scorer sees steps, never verdicts or true answers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from hpc.errors import RecordError, UserError
from hpc.stages import Row
from insightv.assessment.marks import CRITERIA, Marks, parse_scores, shift
from insightv.engines.base import Engine, Request, Sampling
from insightv.engines.config import SamplingConfig
from insightv.prompting import Prompts
from insightv.records import Message, PathScore, Question, ReasoningPath, seed_for
from insightv.steps import render_steps

RETEST = "retest"
"""How ``reason`` begins in the rows of a second scoring, which are for the report alone."""


@dataclass
class ScoreConfig:
    """How paths are scored.

    Attributes:
        which: ``correct``: only paths with a right answer, as in the paper; ``all``: also wrong
            and undecided ones.
        samples: Passes per question, each in another order, averaged. 1: what the paper's
            single pass costs; 3 would halve the noise for three times the calls.
        retest: Share of questions (drawn by seed) scored a second time, only to measure the
            scorer's test-retest agreement. 5 % gives 500 questions of 10,000.
        tries: Calls, each with its own seed, until a reply can be read. 3, as the paper grants
            its generator.
        max_paths: Most paths in one pass. Listwise judges weaken on long lists; 16 is twice
            the usual number of paths.
        anchors: Paths shared by all passes of a question that needs several. 2: one alone
            would carry its own noise into every alignment.
        temperature: Not published; 0.2 as for the paper's judge.
        top_p: Likewise, 0.7.
        tokens_per_path: Room for the reply's line: about 45 tokens in common vocabularies.
    """

    which: str = "correct"
    samples: int = 1
    retest: float = 0.05
    tries: int = 3
    max_paths: int = 16
    anchors: int = 2
    temperature: float = 0.2
    top_p: float = 0.7
    tokens_per_path: int = 64

    def validate(self) -> None:
        """Checks the values.

        Raises:
            UserError: One of them is not possible.
        """
        if self.which not in ("correct", "all"):
            raise UserError(f"score.which is {self.which!r}: use correct or all")
        if not 0 <= self.retest <= 1:
            raise UserError(f"score.retest is {self.retest}: use a share from 0 to 1")
        if min(self.samples, self.tries, self.max_paths, self.tokens_per_path) < 1:
            raise UserError("score.samples, tries, max_paths and tokens_per_path: use 1 or more")
        if not 0 <= self.anchors < self.max_paths:
            raise UserError(f"score.anchors is {self.anchors}: use 0 up to max_paths - 1")
        SamplingConfig(self.temperature, self.top_p).validate("score")


def render_paths(texts: Sequence[str]) -> str:
    """The ``{paths}`` field of the score prompt: each path's step lines after its number.

    Args:
        texts: The paths' canonical step lines (``render_steps``), in the order shown.
    """
    return "\n".join(f"[{number}] {text}" for number, text in enumerate(texts, 1))


def render_scores(marks: Sequence[Marks]) -> str:
    """The reply a scorer is trained to give: one JSON object a line, paths numbered from 1."""
    return "\n".join(
        json.dumps(
            {
                "path": number,
                **{name: getattr(mark, name) for name in (*CRITERIA, "total")},
                "bad_steps": list(mark.bad_steps),
            }
        )
        for number, mark in enumerate(marks, 1)
    )


@dataclass(frozen=True)
class _Shown:
    """A path as the scorer sees it, and what came of it."""

    path: ReasoningPath
    text: str
    position: int = 0
    marks: Marks | None = None
    reason: str = ""
    seed: int = 0


class Score:
    """The mapper questions, paths, verdicts → path scores.

    One row per eligible path. A question too long for one pass is split: every part holds the
    same anchor paths, and each criterion of a part is shifted so that its anchors' mean agrees
    with that of the first part. An anchor's score is the mean of its aligned scores.
    """

    def __init__(self, engine: Engine, prompts: Prompts, config: ScoreConfig, seed: int = 0):
        """Takes the scoring model.

        Args:
            engine: Sees the picture, the question and the steps.
            prompts: Gives the ``score`` prompt.
            config: Passes, tries, sampling.
            seed: The run's seed.

        Raises:
            UserError: A value of ``config`` is not possible.
        """
        config.validate()
        self.engine, self.prompts, self.config, self.seed = engine, prompts, config, seed
        self.concurrency = engine.concurrency

    async def __call__(self, key: str, inputs: Mapping[str, list[Row]]) -> list[Row]:
        """Scores all eligible paths of one question; none eligible, no rows.

        Raises:
            RecordError: The engine cannot serve the question (a broken picture).
        """
        if not inputs["questions"]:
            raise RecordError(f"{key}: its question is missing")
        question = Question.from_json(inputs["questions"][0])
        paths = self._eligible(inputs)
        if not paths:
            return []
        samples = self.config.samples
        passes = [await self._pass(question, paths, sample) for sample in range(samples)]
        rows = [_mean([done[path.key] for done in passes]) for path in paths]
        again: list[_Shown] = []
        draw = seed_for(self.seed, "retest", question.key) / 2**63
        if draw < self.config.retest:
            second = await self._pass(question, paths, samples)
            again = [_as_retest(second[path.key]) for path in paths]
        return [self._row(question, shown).to_json() for shown in (*rows, *again)]

    async def close(self) -> None:
        """Closes the engine."""
        await self.engine.close()

    def _eligible(self, inputs: Mapping[str, list[Row]]) -> list[ReasoningPath]:
        right = {row["path"]: row["correct"] for row in inputs["verdicts"]}
        wanted = (True,) if self.config.which == "correct" else (True, False, None)
        return [
            ReasoningPath.from_json(row)
            for row in inputs["paths"]
            if row["key"] in right and right[row["key"]] in wanted
        ]

    async def _pass(
        self, question: Question, paths: Sequence[ReasoningPath], sample: int
    ) -> dict[str, _Shown]:
        """All paths in one order drawn by seed, in as many parts as the context demands."""
        seed = seed_for(self.seed, "score", question.key, sample)
        order = [_Shown(path, render_steps(path.steps)) for path in paths]
        random.Random(seed).shuffle(order)
        parts, anchors, left = self._parts(question, order)
        scored = []
        for number, part in enumerate(parts):
            if number:  # anchors stand at other places in each part
                random.Random(seed + number).shuffle(part)
            part = [replace(shown, position=place) for place, shown in enumerate(part, 1)]
            scored.append(await self._score(question, part, sample, number))
        done = {shown.path.key: shown for shown in left}
        return done | _aligned(scored, {shown.path.key for shown in anchors})

    def _parts(
        self, question: Question, order: list[_Shown]
    ) -> tuple[list[list[_Shown]], list[_Shown], list[_Shown]]:
        """Parts that fit the context, their common anchors, and what can never fit."""
        if self._fits(question, order):
            return [order], [], []
        usable = [shown for shown in order if self._fits(question, [shown])]
        left = [
            replace(shown, reason=f"longer than the scorer's context of {self.engine.context}")
            for shown in order
            if shown not in usable
        ]
        # The shortest make the best anchors: they leave most room for the others.
        anchors = sorted(usable, key=lambda shown: len(shown.text))[: self.config.anchors]
        rest = [shown for shown in usable if shown not in anchors]
        while anchors and not all(self._fits(question, [*anchors, shown]) for shown in rest):
            rest.append(anchors.pop())
        parts: list[list[_Shown]] = []
        for shown in rest:
            if parts and self._fits(question, [*parts[-1], shown]):
                parts[-1].append(shown)
            elif parts and not anchors:
                reason = "its question's paths do not fit one pass, nor with a shared anchor"
                left.append(replace(shown, reason=reason))
            else:
                parts.append([*anchors, shown])
        if not parts and anchors:
            parts = [anchors]
        return parts, anchors, left

    def _fits(self, question: Question, part: Sequence[_Shown]) -> bool:
        if len(part) > self.config.max_paths:
            return False
        request = self._request(question, part, 0)
        return self.engine.count(request) + request.sampling.max_tokens <= self.engine.context

    def _request(self, question: Question, part: Sequence[_Shown], seed: int) -> Request:
        paths = render_paths([shown.text for shown in part])
        text = self.prompts.render("score", question=question.text, paths=paths, count=len(part))
        sampling = Sampling(
            self.config.temperature,
            self.config.top_p,
            max_tokens=self.config.tokens_per_path * len(part) + 16,
        )
        return Request((Message("user", text),), question.pictures, sampling, seed)

    async def _score(
        self, question: Question, part: list[_Shown], sample: int, number: int
    ) -> list[_Shown]:
        """One part, asked again while a path lacks its line; the fullest reply counts."""
        best: dict[int, Marks] = {}
        problems: list[str] = []
        used = 0
        steps = [len(shown.path.steps) for shown in part]
        for attempt in range(self.config.tries):
            seed = seed_for(self.seed, "score", question.key, sample, number, attempt)
            reply = await self.engine.complete(self._request(question, part, seed))
            found, complaints = parse_scores(reply.text, len(part), steps)
            if attempt == 0 or len(found) > len(best):
                best, problems, used = found, complaints, seed
            if len(best) == len(part):
                break
        why = "; ".join(problems)[:300] or "the reply leaves the path out"
        return [
            replace(shown, marks=best.get(place), seed=used, reason="" if place in best else why)
            for place, shown in enumerate(part, 1)
        ]

    def _row(self, question: Question, shown: _Shown) -> PathScore:
        marks = shown.marks or Marks(None, None, None, None)
        return PathScore(
            path=shown.path.key,
            question=question.key,
            logic=marks.logic,
            grounding=marks.grounding,
            completeness=marks.completeness,
            total=marks.total,
            bad_steps=marks.bad_steps,
            position=shown.position,
            reason=shown.reason,
            model=self.engine.digest,
            prompt=self.prompts.version,
            seed=shown.seed,
        )


def _as_retest(shown: _Shown) -> _Shown:
    return replace(shown, reason=f"{RETEST}: {shown.reason}" if shown.reason else RETEST)


def _aligned(parts: Sequence[Sequence[_Shown]], anchors: set[str]) -> dict[str, _Shown]:
    """Brings all parts to the scale of the first one whose anchors have scores."""
    if len(parts) == 1:
        return {shown.path.key: shown for shown in parts[0]}
    done: dict[str, list[_Shown]] = {}
    reference: dict[str, Marks] = {}
    for part in parts:
        own = {s.path.key: s.marks for s in part if s.path.key in anchors and s.marks}
        reference = reference or own
        common = [key for key in own if key in reference]
        for shown in part:
            if shown.marks and common:
                marks = shift(shown.marks, [(own[key], reference[key]) for key in common])
                shown = replace(shown, marks=marks)
            elif shown.marks:
                reason = "no anchor of its part was scored, so it cannot be compared"
                shown = replace(shown, marks=None, reason=reason)
            done.setdefault(shown.path.key, []).append(shown)
    return {key: _mean(several) for key, several in done.items()}


def _mean(several: Sequence[_Shown]) -> _Shown:
    """One path's scores averaged over passes; steps flagged by more than half of them."""
    scored = [shown for shown in several if shown.marks]
    if len(scored) <= 1:
        return scored[0] if scored else several[0]
    marks = [shown.marks for shown in scored if shown.marks]
    means: dict[str, int | None] = {}
    for name in (*CRITERIA, "total"):
        values = [value for mark in marks if (value := getattr(mark, name)) is not None]
        means[name] = round(fmean(values)) if values else None
    flagged = {step for mark in marks for step in mark.bad_steps}
    often = [s for s in sorted(flagged) if 2 * sum(s in m.bad_steps for m in marks) > len(marks)]
    return replace(scored[0], marks=Marks(**means, bad_steps=tuple(often)))

"""Verdicts on answers: rules first, a language model for what they leave undecided."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from hpc.errors import RecordError, UserError
from hpc.stages import Row
from insightv.assessment.rules import Decision, RuleConfig, decide, normal
from insightv.engines.base import Engine, Request, Sampling
from insightv.engines.config import SamplingConfig
from insightv.prompting import Prompts
from insightv.records import Message, Question, ReasoningPath, Verdict, seed_for

SHOWN = 2000
"""At most so many characters of an answer are put before the model (its end)."""


@dataclass
class JudgeConfig:
    """How answers are judged.

    Attributes:
        rules: Tolerances of the rules.
        temperature: 0.2, the paper's setting for its judge (Qwen2).
        top_p: 0.7, likewise.
        max_tokens: One word is asked for; some models wrap it in a sentence.
        tries: Calls, each with its own seed, until a reply can be read. 3: as the paper grants
            its generator; a reply that says "unclear" is a reply.
    """

    rules: RuleConfig = field(default_factory=RuleConfig)
    temperature: float = 0.2
    top_p: float = 0.7
    max_tokens: int = 32
    tries: int = 3

    def validate(self) -> None:
        """Checks the values.

        Raises:
            UserError: One of them is not possible.
        """
        SamplingConfig(self.temperature, self.top_p, max_tokens=self.max_tokens).validate("judge")
        if self.tries < 1:
            raise UserError(f"judge.tries is {self.tries}: use 1 or more")
        for key in ("integer_tolerance", "decimal_tolerance"):
            if not 0 <= getattr(self.rules, key) < 1:
                raise UserError(
                    f"judge.rules.{key} is {getattr(self.rules, key)}: use a share, 0 to below 1"
                )


class Judge:
    """The mapper questions, paths → verdicts; also decides single answers.

    An answer nobody can decide keeps ``correct=None``: visible, and never counted as wrong.
    """

    def __init__(self, engine: Engine | None, prompts: Prompts, config: JudgeConfig, seed: int = 0):
        """Without an engine the rules alone decide.

        Args:
            engine: The judging model; text only.
            prompts: Gives the ``judge`` prompt.
            config: Tolerances and sampling.
            seed: The run's seed.
        """
        self.engine, self.prompts, self.config, self.seed = engine, prompts, config, seed
        self.concurrency = engine.concurrency if engine else 8

    async def __call__(self, key: str, inputs: Mapping[str, list[Row]]) -> list[Row]:
        """One verdict for each path of a question; failed paths get none.

        Equal answers of a question are judged once, so they cannot get different verdicts.
        """
        if not inputs["questions"]:
            raise RecordError(f"{key}: its question is missing")
        question = Question.from_json(inputs["questions"][0])
        decisions: dict[str, Decision] = {}
        verdicts = []
        for row in inputs["paths"]:
            if "steps" not in row:  # a FailedPath
                continue
            path = ReasoningPath.from_json(row)
            same = " ".join(path.answer.split())
            if same not in decisions:
                decisions[same] = await self.decide_answer(question, path.answer)
            decision = decisions[same]
            model = self.engine.digest if self.engine and decision.rule == "llm" else ""
            verdict = Verdict(
                path.key, question.key, decision.correct, decision.rule, decision.detail, model
            )
            verdicts.append(verdict.to_json())
        return verdicts

    async def close(self) -> None:
        """Closes the engine."""
        if self.engine:
            await self.engine.close()

    async def decide_answer(self, question: Question, answer: str) -> Decision:
        """By rule, else by the model: yes, no, or undecided with what was replied."""
        decision = decide(question, answer, self.config.rules)
        if decision.correct is not None or self.engine is None:
            return decision
        prompt = self.prompts.render(
            "judge", question=question.text, truth=question.answer, answer=answer.strip()[-SHOWN:]
        )
        sampling = Sampling(
            self.config.temperature, self.config.top_p, max_tokens=self.config.max_tokens
        )
        detail = decision.detail
        for attempt in range(self.config.tries):
            seed = seed_for(self.seed, "judge", question.key, answer, attempt)
            request = Request((Message("user", prompt),), (), sampling, seed)
            try:
                reply = (await self.engine.complete(request)).text
            except RecordError as error:
                return Decision(None, decision.rule, f"{detail}; judge: {error}")
            word = parse_reply(reply)
            if word is not None:
                correct = {"yes": True, "no": False}.get(word)
                return Decision(correct, "llm", reply.strip()[:200])
        shown = " ".join(reply.split())[:100]
        return Decision(None, decision.rule, f"{detail}; judge replied {shown!r}")


def parse_reply(reply: str) -> str | None:
    """``yes``, ``no`` or ``unclear``, or None where a reply is none of them or several.

    The first word counts, or the last, or the one after ``answer`` or ``verdict``; a "no"
    inside a sentence ("there is no difference") is none.
    """
    text = re.sub(r"<think>.*?</think>", "", reply, flags=re.S)
    marked = re.findall(
        r"\b(?:answer|verdict|judge?ment|result|reply|same)\b\W{0,8}(?:is\b\W{0,4})?(yes|no|unclear)\b",
        text,
        re.I,
    )
    if marked:
        said = {word.lower() for word in marked}
        return said.pop() if len(said) == 1 else None
    words = normal(text).split()
    named = [word for word in words if word in ("yes", "no", "unclear")]
    if not named or len(words) <= 5 and len(set(named)) > 1:
        return None
    if words[0] == named[0] and words[:2] not in (["no", "difference"], ["no", "doubt"]):
        return words[0]
    return words[-1] if words[-1] == named[-1] else None

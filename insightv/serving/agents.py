"""The ways of answering, each under a model name."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Literal

from insightv.agents import (
    Answer,
    DirectAgent,
    FinalAgent,
    MultiAgent,
    ReasoningAgent,
    SummaryAgent,
    direct_messages,
    reasoning_messages,
    summary_messages,
)
from insightv.curation.controls import parse_direct
from insightv.engines.base import Engine, Sampling
from insightv.engines.base import Request as Call
from insightv.evaluation.answering import EntryConfig
from insightv.evaluation.asking import steps_aloud
from insightv.prompting import Prompts
from insightv.records import Question, seed_for
from insightv.serving.asking import Asked
from insightv.steps import parse_steps, render_steps

MODELS = ("direct", "base-reasoning", "single-agent", "summary-only", "multi-agent")
_SPEAKS_FIRST = {
    "direct": "base",
    "base-reasoning": "base",
    "single-agent": "single",
    "summary-only": "summary",
    "multi-agent": "reasoning",
}


@dataclass(frozen=True)
class Piece:
    """A part of a reply, and the tokens it took so far."""

    kind: Literal["reasoning_content", "content"]
    text: str
    tokens: int = 0
    finish: str = "stop"

    def until(self, stops: tuple[str, ...]) -> Piece:
        """The piece, its answer ended before the first of some strings."""
        found = [self.text.find(stop) for stop in stops if stop in self.text]
        if self.kind != "content" or not found:
            return self
        return replace(self, text=self.text[: min(found)], finish="stop")


class Agents:
    """What answers: the run's models, each loaded when it is first asked for."""

    def __init__(
        self,
        load: Callable[[str], Engine],
        prompts: Prompts,
        entry: EntryConfig,
        offered: tuple[str, ...] = MODELS,
    ):
        """Takes what is known of a run.

        Args:
            load: Loads ``base``, ``single``, ``reasoning`` or ``summary``.
            prompts: The set they were trained with.
            entry: Sampling of reasoning and answer.
            offered: The models that the run has what is needed for.
        """
        self.offered = offered
        self._load, self._prompts, self._entry = load, prompts, entry
        self._engines: dict[str, Engine] = {}

    def engine(self, role: str) -> Engine:
        """The engine of a role."""
        if role not in self._engines:
            self._engines[role] = self._load(role)
        return self._engines[role]

    async def close(self) -> None:
        """Closes all engines."""
        for engine in {id(engine): engine for engine in self._engines.values()}.values():
            await engine.close()

    def count(self, asked: Asked, question: Question) -> int:
        """Length of the prompt that begins a reply, in tokens.

        Raises:
            RecordError: The engine cannot serve it.
        """
        if asked.model == "direct":
            messages = direct_messages(self._prompts, question)
        elif asked.model == "summary-only":
            messages = summary_messages(self._prompts, question, None)
        else:
            messages = reasoning_messages(self._prompts, question)
        return self.engine(_SPEAKS_FIRST[asked.model]).count(
            Call(messages, question.pictures, Sampling())
        )

    async def reply(self, asked: Asked, question: Question) -> AsyncGenerator[Piece]:
        """The pieces of a reply.

        Raises:
            RecordError: An engine cannot serve it.
        """
        async with aclosing(self._reply(asked, question)) as pieces:
            async for piece in pieces:
                yield piece.until(asked.stop)

    async def _reply(self, asked: Asked, question: Question) -> AsyncGenerator[Piece]:
        entry = replace(
            self._entry,
            reasoning=replace(self._entry.reasoning),
            answer=replace(self._entry.answer),
        )
        for call in (entry.reasoning, entry.answer):
            call.temperature = call.temperature if asked.temperature is None else asked.temperature
            call.top_p = asked.top_p or call.top_p
        entry.answer.max_tokens = asked.tokens or entry.answer.max_tokens
        answer, thought = entry.answer.sampling(), entry.reasoning.sampling()
        seed = seed_for(asked.seed, "serve", asked.model)
        if asked.model == "direct":
            agent = DirectAgent(self.engine("base"), self._prompts, answer)
            yield _content(await agent.answer(question, seed=seed))
        elif asked.model == "single-agent":
            reasoner = ReasoningAgent(self.engine("single"), self._prompts, thought)
            async for piece in _at_once(reasoner, question, thought, seed):
                yield piece
        elif asked.model == "summary-only":
            yield _content(await self._summary(answer).answer(question, None, seed))
        elif asked.model == "multi-agent" and asked.stream:
            async for piece in self._aloud(question, entry, seed):
                yield piece
        else:  # as the evaluation asks: the whole chain in one call
            reasoner = ReasoningAgent(
                self.engine(_SPEAKS_FIRST[asked.model]), self._prompts, thought
            )
            alone = asked.model == "base-reasoning"
            last = FinalAgent(reasoner.engine, self._prompts, answer)
            pair = MultiAgent(reasoner, last if alone else self._summary(answer))
            reasoning, said = await pair.answer(question, seed)
            yield Piece("reasoning_content", reasoning.text, reasoning.tokens)
            yield _content(said)

    async def _aloud(
        self, question: Question, entry: EntryConfig, seed: int
    ) -> AsyncIterator[Piece]:
        steps = []
        reasoner = self.engine("reasoning")
        async for heard in steps_aloud(reasoner, self._prompts, question, entry, seed):
            if heard.step is None:
                yield Piece("reasoning_content", f"{heard.text}\n", heard.tokens)
                continue
            steps.append(heard.step)
            yield Piece("reasoning_content", f"{render_steps([heard.step])}\n", heard.tokens)
        summary = self._summary(entry.answer.sampling())
        yield _content(await summary.answer(question, render_steps(steps), seed))

    def _summary(self, sampling: Sampling) -> SummaryAgent:
        return SummaryAgent(self.engine("summary"), self._prompts, sampling)


def _content(answer: Answer) -> Piece:
    return Piece("content", answer.text, answer.tokens, answer.finish)


async def _at_once(
    reasoner: ReasoningAgent, question: Question, sampling: Sampling, seed: int
) -> AsyncIterator[Piece]:
    """Steps and answer of a model that writes both in one turn."""
    messages = reasoning_messages(reasoner.prompts, question)
    done = await reasoner.engine.complete(Call(messages, question.pictures, sampling, seed))
    text, answer = parse_direct(done.text)
    steps = parse_steps(text).steps
    yield Piece("reasoning_content", render_steps(steps) if steps else text)
    yield Piece("content", answer, done.tokens, done.finish)

"""The agents and the chats they hold: who is asked what, in which words.

The builders of messages are the only place where prompts become chats; curation, training
and evaluation use them too, so a model is asked as it was trained. The question's pictures
go with every call, the summary agent's included: it is to look for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from hpc.errors import UserError
from insightv.engines.base import Completion, Engine, Request, Sampling
from insightv.prompting import Prompts
from insightv.records import Finish, Message, Question, Step
from insightv.steps import ParsedSteps, StepError, parse_step, parse_steps, render_steps, repeats

REASONING = Sampling(temperature=0.2, top_p=0.95, max_tokens=4096)
"""The paper's sampling at inference; the tokens hold its longest chains in one call."""
ANSWER = Sampling(temperature=0.2, top_p=0.95, max_tokens=256)
"""The same for an answer of a few words, which some models put in a sentence."""
MODES = ("progressive", "single")

Seeds = Callable[[int, int], int]
"""The seed of a call by step (0-based) and attempt (0-based)."""


def direct_messages(prompts: Prompts, question: Question) -> tuple[Message, ...]:
    """Asks for the answer alone."""
    return (Message("user", prompts.render("direct", question=question.text)),)


def reasoning_messages(
    prompts: Prompts, question: Question, written: str = ""
) -> tuple[Message, ...]:
    """Asks for steps; with ``written``, the assistant's turn so far, to be gone on with."""
    asked = Message("user", prompts.render("reasoning", question=question.text))
    return (asked, Message("assistant", written)) if written else (asked,)


def final_messages(prompts: Prompts, question: Question, steps: str) -> tuple[Message, ...]:
    """Asks for the answer in a further turn, after the steps (canonical text)."""
    final = Message("user", prompts.render("final", question=question.text))
    return (*reasoning_messages(prompts, question, steps), final)


def summary_messages(
    prompts: Prompts, question: Question, reasoning: str | None
) -> tuple[Message, ...]:
    """Asks for the answer given someone's reasoning; without any, in the plain words."""
    if not reasoning:
        return (Message("user", prompts.render("plain_summary", question=question.text)),)
    text = prompts.render("summary", question=question.text, reasoning=reasoning)
    return (Message("user", text),)


@dataclass(frozen=True)
class Reasoning:
    """What a reasoning agent wrote.

    Attributes:
        text: The steps in canonical form; if there are none or something went wrong, what
            the model wrote instead, in its own words.
        steps: The readable steps, none of them after a ``summary``.
        finish: Why they ended.
        tokens: Generated tokens, retries included.
        attempts: Calls, retries included.
        problem: Why this is no complete chain of steps; empty if it is.
    """

    text: str
    steps: tuple[Step, ...]
    finish: Finish
    tokens: int
    attempts: int
    problem: str = ""


@dataclass(frozen=True)
class Answer:
    """A final answer, stripped, the tokens it took, and why it ended (see `Completion`)."""

    text: str
    tokens: int
    finish: str = "stop"


class Answerer(Protocol):
    """Who draws an answer from a question and some reasoning about it."""

    engine: Engine

    async def answer(self, question: Question, reasoning: str | None, seed: int = 0) -> Answer:
        """One answer.

        Raises:
            RecordError: The engine cannot serve the request.
        """
        ...


class ReasoningAgent:
    """Writes steps: all in one call (``single``) or one a call (``progressive``)."""

    def __init__(
        self,
        engine: Engine,
        prompts: Prompts,
        sampling: Sampling = REASONING,
        mode: str = "single",
        max_steps: int = 16,
        tries: int = 1,
    ):
        """Takes the model, its prompts and the bounds.

        Args:
            engine: The model.
            prompts: The set it knows.
            sampling: Of a call; its token limit holds for one step in ``progressive`` mode,
                for the whole chain in ``single`` mode.
            mode: ``single`` or ``progressive``.
            max_steps: Most steps of a chain.
            tries: Most attempts, each with its own seed, at a step (at the chain, in
                ``single`` mode) that can be read and does not repeat an earlier one.

        Raises:
            UserError: An unknown mode.
        """
        if mode not in MODES:
            raise UserError(f"mode is {mode!r}: use {' or '.join(MODES)}")
        self.engine, self.prompts, self.sampling, self.mode = engine, prompts, sampling, mode
        self.max_steps, self.tries = max_steps, tries

    async def reason(self, question: Question, seeds: Seeds | None = None) -> Reasoning:
        """Reasons about a question.

        Args:
            question: What is asked; its answer is not used.
            seeds: The calls' seeds; by default those of a chain of seed 0.

        Raises:
            RecordError: The engine cannot serve the request.
        """
        seeds = seeds or (lambda step, attempt: step * self.tries + attempt)
        write = self._stepwise if self.mode == "progressive" else self._at_once
        return await write(question, seeds)

    async def _at_once(self, question: Question, seeds: Seeds) -> Reasoning:
        tokens = 0
        for attempt in range(self.tries):
            asked = reasoning_messages(self.prompts, question)
            done = await self._call(question, asked, self.sampling, seeds(0, attempt))
            tokens += done.tokens
            found = parse_steps(done.text)
            steps = _up_to_summary(found.steps[: self.max_steps])
            finish = _finish(steps, len(found.steps))
            problem = _problem(found, steps)
            # A chain that was cut short may be whole at the next try; at last it is kept.
            if not problem and (finish != "truncated" or attempt + 1 == self.tries):
                text = render_steps(steps)
                return Reasoning(text, steps, finish, tokens, attempt + 1)
        text = render_steps(steps) if steps and not found.lost else done.text.strip()
        problem = problem or "cut short"
        return Reasoning(text, steps, finish, tokens, self.tries, problem)

    async def _stepwise(self, question: Question, seeds: Seeds) -> Reasoning:
        steps: tuple[Step, ...] = ()
        tokens = calls = 0
        while len(steps) < self.max_steps:
            for attempt in range(self.tries):
                seed = seeds(len(steps), attempt)
                raw, spent, more = await self._write_step(question, steps, seed)
                tokens, calls = tokens + spent, calls + more
                try:
                    step = parse_step(raw)
                except StepError as error:
                    problem = f"step {len(steps) + 1}: {error}"
                    continue
                earlier = repeats(steps, step)
                if not earlier:
                    break
                problem = f"step {len(steps) + 1} repeats step {earlier}"
            else:
                text = f"{render_steps(steps)}\n{raw}".strip()
                return Reasoning(text, steps, "truncated", tokens, calls, problem)
            steps = (*steps, step)
            if step.next_action == "summary":
                break
        finish = _finish(steps, len(steps) + 1)
        return Reasoning(render_steps(steps), steps, finish, tokens, calls)

    async def _write_step(
        self, question: Question, steps: tuple[Step, ...], seed: int
    ) -> tuple[str, int, int]:
        """The raw text of one step, going on with the turn so far; its tokens and calls.

        The call ends at a closing brace, on one line or many. Where that brace was not the
        object's last (the step speaks of a set, say), the same turn is gone on with.
        """
        written = render_steps(steps) + "\n" if steps else ""
        raw, tokens, calls = "", 0, 0
        while tokens < self.sampling.max_tokens:
            asked = reasoning_messages(self.prompts, question, written + raw)
            sampling = replace(self.sampling, max_tokens=self.sampling.max_tokens - tokens)
            done = await self._call(question, asked, sampling, seed + calls, ("}",))
            tokens, calls = tokens + done.tokens, calls + 1
            raw += done.text
            if done.finish == "length":
                break
            raw += "}"
            found = parse_steps(raw)
            complete = found.steps or (found.lost and not found.truncated)
            if complete or "{" not in raw or not done.text.strip():
                break
        return raw, tokens, calls

    async def _call(
        self,
        question: Question,
        messages: tuple[Message, ...],
        sampling: Sampling,
        seed: int,
        stop: tuple[str, ...] = (),
    ) -> Completion:
        request = Request(messages, question.pictures, sampling, seed, stop)
        return await self.engine.complete(request)


class _Answering:
    """What agents that answer have in common: one call, with the question's pictures."""

    def __init__(self, engine: Engine, prompts: Prompts, sampling: Sampling = ANSWER):
        """Takes the model, the prompts it knows, and how its answer is drawn."""
        self.engine, self.prompts, self.sampling = engine, prompts, sampling

    async def _ask(self, question: Question, messages: tuple[Message, ...], seed: int) -> Answer:
        request = Request(messages, question.pictures, self.sampling, seed)
        done = await self.engine.complete(request)
        return Answer(done.text.strip(), done.tokens, done.finish)


class SummaryAgent(_Answering):
    """Judges someone's reasoning and answers, using it or not."""

    async def answer(self, question: Question, reasoning: str | None, seed: int = 0) -> Answer:
        """The answer, given reasoning or none."""
        messages = summary_messages(self.prompts, question, reasoning)
        return await self._ask(question, messages, seed)


class FinalAgent(_Answering):
    """Draws the answer from its own steps, in a further turn of the same chat."""

    async def answer(self, question: Question, reasoning: str | None, seed: int = 0) -> Answer:
        """The answer that follows from the steps."""
        messages = final_messages(self.prompts, question, reasoning or "")
        return await self._ask(question, messages, seed)


class DirectAgent(_Answering):
    """Answers at once."""

    async def answer(
        self, question: Question, reasoning: str | None = None, seed: int = 0
    ) -> Answer:
        """The answer; reasoning, if there is any, is not looked at."""
        return await self._ask(question, direct_messages(self.prompts, question), seed)


class MultiAgent:
    """The pair: one reasons, the other answers (or the same, where that is a `FinalAgent`)."""

    def __init__(self, reasoning: ReasoningAgent, summary: Answerer):
        """Takes the two agents."""
        self.reasoning, self.summary = reasoning, summary

    async def answer(self, question: Question, seed: int = 0) -> tuple[Reasoning, Answer]:
        """Both agents' words. Reasoning that went wrong is passed on too: it is to be judged."""
        thought = await self.reasoning.reason(question, lambda step, attempt: seed + step + attempt)
        return thought, await self.summary.answer(question, thought.text, seed)


def _up_to_summary(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps up to the first that ends the reasoning."""
    for number, step in enumerate(steps, 1):
        if step.next_action == "summary":
            return steps[:number]
    return steps


def _finish(steps: tuple[Step, ...], written: int) -> Finish:
    if steps and steps[-1].next_action == "summary":
        return "summary"
    return "step_cap" if written > len(steps) else "truncated"


def _problem(found: ParsedSteps, steps: tuple[Step, ...]) -> str:
    """Why the steps kept of a whole chain are no good chain; empty if they are."""
    if not steps:
        return found.lost[0] if found.lost else "no JSON object"
    again = [number for number in found.repeats if number <= len(steps)]
    if again:
        return f"step {again[0]} repeats an earlier one"
    ended = steps[-1].next_action == "summary"
    # What comes after the end does not matter, nor does a last object that is cut off.
    broken = found.lost[: len(found.lost) - found.truncated]
    return broken[0] if broken and not ended else ""

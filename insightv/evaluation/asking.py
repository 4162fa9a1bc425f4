"""Asks the two agents one question and shows the steps as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from hpc.errors import printable
from insightv.agents import reasoning_messages, summary_messages
from insightv.engines.base import Engine, Request
from insightv.evaluation.answering import EntryConfig
from insightv.prompting import Prompts
from insightv.records import Question, Step, seed_for
from insightv.steps import parse_steps, render_steps

MOST_STEPS = 32
_MOST_LINES = 16


@dataclass(frozen=True)
class Heard:
    """Something an agent said.

    Attributes:
        kind: ``step``; ``noise`` (what the reasoning agent wrote that is no step); ``answer``
            (the summary agent's, given the steps); ``unaided`` (its answer without them).
        text: What was said; for a step its content.
        step: The step.
        tokens: What was generated since the last of these.
    """

    kind: Literal["step", "noise", "answer", "unaided"]
    text: str
    step: Step | None = None
    tokens: int = 0


async def ask(
    reasoning: Engine,
    summary: Engine,
    prompts: Prompts,
    question: Question,
    config: EntryConfig,
    seed: int = 0,
) -> AsyncIterator[Heard]:
    """Steps one by one, then the answer, then the answer without the reasoning.

    The reasoning agent's turn is written line by line: each call goes on with the same turn,
    so that (greedily) the steps are those of one single call.

    Args:
        reasoning: Runs the reasoning agent.
        summary: Runs the summary agent.
        prompts: The set both were trained with.
        question: What is asked; its ``answer`` is not used.
        config: Sampling of both agents.
        seed: Seed of all calls.

    Raises:
        RecordError: An engine cannot serve the question (a broken picture, say).
    """
    steps: list[Step] = []
    async for heard in steps_aloud(reasoning, prompts, question, config, seed):
        if heard.step is not None:
            steps.append(heard.step)
        yield heard
    text = render_steps(steps)
    for kind, given in (("answer", text), ("unaided", "")):
        request = Request(
            summary_messages(prompts, question, given),
            question.pictures,
            config.answer.sampling(),
            seed_for(seed, "ask", kind),
        )
        done = await summary.complete(request)
        yield Heard("answer" if kind == "answer" else "unaided", done.text.strip())


async def steps_aloud(
    engine: Engine, prompts: Prompts, question: Question, config: EntryConfig, seed: int
) -> AsyncIterator[Heard]:
    """The reasoning agent's steps, until it is done, cut off, or writes what is no step."""
    sampling = config.reasoning.sampling()
    written, pending, spent, told, blank = "", "", 0, 0, 0
    for call in range(MOST_STEPS * _MOST_LINES):
        request = Request(
            reasoning_messages(prompts, question, written),
            question.pictures,
            sampling,
            seed_for(seed, "ask", call),
            stop=("\n",),
        )
        done = await engine.complete(request)
        spent += done.tokens
        written += done.text + "\n"
        pending += done.text + "\n"
        # A blank line and the end of the turn look alike; after the end comes nothing again.
        blank = 0 if done.text.strip() else blank + 1
        ended = done.finish == "length" or blank == 2 or spent >= sampling.max_tokens
        found = parse_steps(pending)
        # Prose before a step, or a step over several lines: it is still to come.
        if not ended and pending.count("\n") < _MOST_LINES and (not found.steps or found.truncated):
            continue
        if not found.steps:
            if pending.strip():
                yield Heard("noise", pending.strip(), None, spent - told)
            return
        step = found.steps[0]
        yield Heard("step", step.content, step, spent - told)
        pending, told = "", spent
        if ended or step.next_action == "summary":
            return


async def ask_and_print(
    reasoning: Engine,
    summary: Engine,
    prompts: Prompts,
    question: Question,
    config: EntryConfig,
    console: Console | None = None,
    seed: int = 0,
) -> None:
    """Prints what `ask` hears as it comes.

    Args:
        reasoning: Runs the reasoning agent.
        summary: Runs the summary agent.
        prompts: The set both were trained with.
        question: What is asked.
        config: Sampling of both agents.
        console: Where to; standard output by default.
        seed: Seed of all calls.
    """
    console = console or Console(highlight=False)
    console.print(Text(printable(question.text), style="bold"))
    number = 0
    async for heard in ask(reasoning, summary, prompts, question, config, seed):
        said = printable(heard.text)
        if heard.step is not None:
            number += 1
            line = Text.assemble(
                (f"{number:>2}  ", "dim"), (printable(heard.step.title), "italic"), "  ", said
            )
        elif heard.kind == "noise":
            line = Text.assemble((" ?  ", "dim"), (said, "dim"), ("  (not a step)", "yellow"))
        elif heard.kind == "answer":
            line = Text.assemble(("Answer  ", "dim"), (said or "none", "bold green"))
            console.print()
        else:
            line = Text.assemble(("Without the reasoning  ", "dim"), said or "none")
        console.print(Padding(line, (0, 0, 0, 2)))

"""Sets for the ladder's controls: the same paths in other forms, both agents' data in one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

from insightv.agents import final_messages, reasoning_messages
from insightv.curation.groups import Groups, Judged, PlainQuestions
from insightv.curation.reasoning import (
    ReasoningSetConfig,
    path_set,
    reasoning_set,
    with_prefix,
)
from insightv.curation.summary import SummarySetConfig, summary_set
from insightv.prompting import Prompts
from insightv.records import Message, Question, Step, TrainingSample
from insightv.steps import render_steps

_ANSWER = re.compile(
    r"^[\s*#_>-]*(?:the )?(?:final )?answer[\s*_]*(?:[:=]|is\b)[ \t*_]*", re.I | re.M
)


def render_direct(steps: Sequence[Step], answer: str) -> str:
    r"""The turn of a model that reasons and answers at once: step lines, ``\nAnswer: X``."""
    return f"{render_steps(steps)}\nAnswer: {answer}"


def parse_direct(text: str) -> tuple[str, str]:
    """Splits such a turn into its reasoning and its answer; the answer is empty if none came.

    The last line that begins with ``Answer:`` (in any case, marked up or not) counts.
    """
    found = list(_ANSWER.finditer(text))
    if not found:
        return text.strip(), ""
    answer = text[found[-1].end() :].strip().split("\n", 1)[0]
    return text[: found[-1].start()].strip(), answer.strip().strip("*`").strip()


def union_set(
    reasoning: ReasoningSetConfig,
    summary: SummarySetConfig,
    groups: Groups,
    plain: PlainQuestions,
    prompts: Prompts,
    seed: int,
    counts: Counter[str],
) -> Iterator[TrainingSample]:
    """One model on the data of both agents: what is won by data, not by having two models.

    Counts are kept apart by the prefixes ``reasoning`` and ``summary``.
    """
    first: Counter[str] = Counter()
    second: Counter[str] = Counter()
    for sample in reasoning_set(reasoning, groups, plain, prompts, seed, first):
        yield with_prefix(sample, "reasoning")
    for sample in summary_set(summary, groups, plain, prompts, seed, second):
        yield with_prefix(sample, "summary")
    counts.update({f"reasoning: {name}": count for name, count in first.items()})
    counts.update({f"summary: {name}": count for name, count in second.items()})


def _direct(prompts: Prompts, question: Question, judged: Judged) -> tuple[Message, ...]:
    text = render_direct(judged.path.steps, question.answer)
    return (*reasoning_messages(prompts, question), Message("assistant", text, train=True))


def _multi_turn(prompts: Prompts, question: Question, judged: Judged) -> tuple[Message, ...]:
    *asked, steps, final = final_messages(prompts, question, judged.text)
    turn = Message("assistant", steps.text, train=True)
    return (*asked, turn, final, Message("assistant", question.answer, train=True))


direct_set = partial(path_set, kind="direct:best", render=_direct)
"""One model that reasons and answers in one turn, on the reasoning set's own paths."""

multi_turn_set = partial(path_set, kind="multi_turn:best", render=_multi_turn)
"""One model with two supervised turns, the steps and the final answer, on the same paths."""

"""Stages that compare: entries of the ladder, benchmarks, results and report."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from hpc.config import shaping
from hpc.errors import UserError
from hpc.stages import Stage
from insightv import payloads
from insightv.chain.fine_tuning import TOKENS
from insightv.chain.rounds import Rounds, makers
from insightv.evaluation import benchmark_scores, benchmarks
from insightv.evaluation.answering import EntryConfig
from insightv.payloads import Source

ENTRIES = {
    "base": ("direct", "base", ""),
    "base_reasoning": ("reasoning", "base", ""),
    "direct_sft": ("direct_sft", "direct", ""),
    "multi_turn": ("reasoning", "multi-turn", ""),
    "summary_only": ("summary_only", "", "summary"),
    "multi_agent": ("multi_agent", "reasoning", "summary"),
    "dpo": ("multi_agent", "reasoning-dpo", "summary"),
    "iterative_dpo": ("multi_agent", "reasoning-last", "summary"),
    "judge_card": ("judge_card", "", "summary"),
    "union": ("multi_agent", "union", "union"),
    "majority": ("majority", "", ""),
    "base_plain": ("direct", "plain", ""),
}
"""Each entry's mode, who reasons (or answers alone), and who answers last.

``reasoning-last`` is the model of the last round, or of the best where rounds may stop early;
who votes in ``majority`` is a key.
"""

COMPARED = "multi_agent"
"""The entry whose reasoning the judge's card tests, and whose tokens a majority may spend."""

_RESTING = ("majority", "judge_card")
"""Modes that rest on another entry's predictions."""


class Ladder(Rounds):
    """Adds what the ladder's entries compare, and all that they need."""

    def all(self) -> list[Stage]:
        """Every stage the ladder's entries need, and the summaries."""
        entries = self.config.evaluation.entries
        _check_entries("evaluation", entries, ENTRIES)
        self._questions("train")
        self._paths("r0", self.generator, self.config.generation, 0)
        for name in entries:
            self._entry(name)
        if self.config.benchmarks.tasks:
            self._benchmarks()
        self._summaries()
        return list(self.stages.values())

    def _model(self, name: str) -> Source:
        """A model by the name entries know it by; its training becomes part of the chain."""
        if name == "base":
            return self.base
        if name == "reasoning-last":
            rounds = self.config.rounds
            if rounds.early_stop.enabled and rounds.count:
                return self._best_round()
            return self._round(rounds.count)
        if name == "reasoning-dpo":
            return self._single_round()
        return self._fine_tuned(name)

    def _speakers(self, entry: EntryConfig) -> tuple[Source | None, Source | None]:
        """The models of who reasons, or answers alone, and of who answers last."""
        reasoner, summariser = entry.reasoning_model, entry.summary_model
        first = self._model(reasoner) if reasoner else None
        return first, self._model(summariser) if summariser else None

    def _entry(self, name: str) -> str:
        """An entry of the ladder on the evaluation's questions."""
        stage = f"eval-{name}".replace("_", "-")
        if stage in self.stages:
            return stage
        config, asked = self.config, self.config.evaluation
        mode, reasoner, summariser = ENTRIES[name]
        reasoner = reasoner or (asked.voting_model if mode == "majority" else "")
        inputs = {"questions": self._questions(asked.split)}
        if mode in _RESTING:
            inputs["predictions"] = self._entry(COMPARED)
        entry = EntryConfig(
            name=name,
            mode=mode,
            reasoning_model=reasoner,
            summary_model=summariser,
            reasoning=asked.voting if mode == "majority" else asked.reasoning,
            answer=asked.voting if mode == "majority" else asked.answer,
            voter=asked.voter,
            votes=asked.votes,
            reasoning_from=COMPARED if "predictions" in inputs else "",
        )
        entry.validate()
        first, last = self._speakers(entry)
        return self._map(
            stage,
            (first, last, self.judge),
            inputs=inputs,
            after=makers(first, last),
            config={
                "seed": config.seed,
                "entry": shaping(entry),
                "by": [source.shape for source in (first, last) if source is not None],
                "judge": shaping(config.judge),
                "judged by": self._referee(),
            },
            load=payloads.answer(config, entry, first, last, self.judge),
            counted=TOKENS,
        )

    def _benchmarks(self) -> None:
        """What lmms-eval's tasks ask, what entries answer, and what it finds that worth."""
        config, asked = self.config, self.config.benchmarks
        alone = [name for name, (mode, _, _) in ENTRIES.items() if mode not in _RESTING]
        _check_entries("benchmarks", asked.entries, alone)
        tasks = {"tasks": list(asked.tasks), "limit": asked.limit, "include": asked.include}
        questions = self._job(
            benchmarks.QUESTIONS,
            config=tasks | {"per_shard": asked.per_shard},
            run=payloads.benchmark_questions(config),
            outputs=(f"stages/{benchmarks.QUESTIONS}/pictures",),
        )
        inputs = {"questions": questions}
        for name in dict.fromkeys(asked.entries):
            mode, reasoner, summariser = ENTRIES[name]
            entry = EntryConfig(
                name=name,
                mode=mode,
                reasoning_model=reasoner,
                summary_model=summariser,
                reasoning=config.evaluation.reasoning,
                answer=config.evaluation.answer,
            )
            first, last = self._speakers(entry)
            inputs[name] = self._map(
                f"lmms-{name}".replace("_", "-"),
                (first, last),
                inputs={"questions": questions},
                after=makers(first, last),
                config={
                    "seed": config.seed,
                    "entry": shaping(entry),
                    "by": [source.shape for source in (first, last) if source is not None],
                    "rules": shaping(asked)["rules"],
                    "other rules": shaping(config.judge.rules),
                },
                load=payloads.benchmark(config, entry, first, last),
                counted=TOKENS,
            )
        self._job(
            benchmark_scores.SCORES,
            inputs=inputs,
            config=tasks | {"seed": config.evaluation.resamples_seed},
            run=payloads.benchmark_scores(config, list(inputs)[1:]),
        )

    def _summaries(self) -> None:
        seed = self.config.evaluation.resamples_seed
        self._job(
            "results",
            after=tuple(self.stages),
            config={"seed": seed},
            run=payloads.results(self.config),
            outputs=("results.json",),
        )
        self._job(
            "report", after=("results",), run=payloads.report(), outputs=("report/index.html",)
        )


def _check_entries(section: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Looks that entries exist.

    Raises:
        UserError: One does not; the nearest is named.
    """
    for name in names:
        if name not in (usable := list(known)):
            near = difflib.get_close_matches(name, usable, 1)
            told = f"did you mean {near[0]}?" if near else f"use {', '.join(usable)}"
            raise UserError(f"{section}.entries: no entry {name!r}; {told}")

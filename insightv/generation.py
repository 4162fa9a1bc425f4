"""Questions to reasoning paths: N for each, sampled with their own seeds."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hpc.errors import RecordError, UserError
from hpc.stages import Row
from insightv.agents import MODES, Answerer, FinalAgent, ReasoningAgent
from insightv.engines import Engine, SamplingConfig
from insightv.prompting import Prompts
from insightv.records import FailedPath, Question, ReasoningPath, seed_for

_KEPT = 4096
"""Characters kept of what a failed path said."""


@dataclass
class GenerationConfig:
    """How paths are sampled.

    Attributes:
        mode: ``progressive`` asks for one step a call, as the paper does with its untrained
            generator; ``single`` for the whole chain, as trained agents write.
        paths: Paths for each question. Not published; 8 gives right and wrong ones for most
            questions that are neither trivial nor hopeless.
        max_steps: Most steps of a path. Paper: about 16.
        tries: Attempts, each with its own seed, at a step (in ``single`` mode at a chain) that
            can be read and repeats nothing. Paper: 3.
        sampling: Of the steps; the paper's values. The token limit holds for one step.
        chain_tokens: In ``single`` mode: the token limit of the whole chain.
        answer: Of the final answer. Greedy: the diversity is to come from the reasoning.
    """

    mode: str = "progressive"
    paths: int = 8
    max_steps: int = 16
    tries: int = 3
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(0.7, 0.95, 1.05, max_tokens=1024)
    )
    chain_tokens: int = 4096
    answer: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_tokens=128))

    def validate(self, name: str = "generation") -> None:
        """Checks the values; ``name`` is the section's, for the message.

        Raises:
            UserError: One of them is not possible.
        """
        if self.mode not in MODES:
            raise UserError(f"{name}.mode is {self.mode!r}: use {' or '.join(MODES)}")
        for key in ("paths", "max_steps", "tries", "chain_tokens"):
            if getattr(self, key) < 1:
                raise UserError(f"{name}.{key} is {getattr(self, key)}: use 1 or more")
        self.sampling.validate(f"{name}.sampling")
        self.answer.validate(f"{name}.answer")


class Generate:
    """Mapper: a question to its N paths, the failed ones among them."""

    def __init__(
        self,
        config: GenerationConfig,
        engine: Engine,
        prompts: Prompts,
        seed: int,
        round: int = 0,
        answerer: Answerer | None = None,
    ):
        """Takes what is sampled from, and how.

        Args:
            config: How paths are sampled.
            engine: The model that reasons.
            prompts: The set it knows.
            seed: The run's seed.
            round: 0 for the generator, 1, 2, … for the rounds of preference training.
            answerer: Who draws the final answer from the steps; by default the same model,
                in a further turn. The summary agent or another model can stand here.

        Raises:
            UserError: The configuration is not possible.
        """
        config.validate()
        sampling = config.sampling.sampling()
        if config.mode == "single":
            sampling = replace(sampling, max_tokens=config.chain_tokens)
        self._agent = ReasoningAgent(
            engine, prompts, sampling, config.mode, config.max_steps, config.tries
        )
        self._answerer = answerer or FinalAgent(engine, prompts, config.answer.sampling())
        self._engine, self._prompts = engine, prompts
        self._paths, self._seed, self._round = config.paths, seed, round
        self.concurrency = max(1, -(-engine.concurrency // config.paths))

    async def __call__(self, key: str, inputs: Mapping[str, list[Row]]) -> list[Row]:
        """All paths of a question, sampled at the same time.

        Raises:
            RecordError: The question is missing, or every path failed.
        """
        if not inputs["questions"]:
            raise RecordError(f"{key}: its question is missing")
        question = Question.from_json(inputs["questions"][0])
        paths = await asyncio.gather(*(self._path(question, n) for n in range(self._paths)))
        failed = [path for path in paths if isinstance(path, FailedPath)]
        if len(failed) == len(paths):
            reasons = Counter(path.reason for path in failed).most_common()
            told = "; ".join(f"{count} x {reason}" for reason, count in reasons)
            raise RecordError(f"all {len(paths)} paths failed: {told}")
        return [path.to_json() for path in paths]

    async def close(self) -> None:
        """Closes the engine, and the answerer's where it has its own."""
        await self._engine.close()
        if self._answerer.engine is not self._engine:
            await self._answerer.engine.close()

    async def _path(self, question: Question, number: int) -> ReasoningPath | FailedPath:
        """One path, with seeds of its own."""
        key = f"{question.key}/r{self._round}/p{number}"

        def seed(step: int | str, attempt: int) -> int:
            return seed_for(
                self._seed, "generate", self._round, question.key, number, step, attempt
            )

        thought = None
        try:
            thought = await self._agent.reason(question, seed)
            if thought.problem:
                return FailedPath(key, question.key, thought.problem, thought.text[:_KEPT])
            answer = await self._answerer.answer(question, thought.text, seed("answer", 0))
        except RecordError as error:
            text = thought.text[:_KEPT] if thought else ""
            return FailedPath(key, question.key, str(error), text)
        return ReasoningPath(
            key=key,
            question=question.key,
            steps=thought.steps,
            answer=answer.text,
            finish=thought.finish,
            tokens=thought.tokens + answer.tokens,
            attempts=thought.attempts + 1,
            model=self._engine.digest,
            prompt=self._prompts.version,
            seed=seed(0, 0),
        )

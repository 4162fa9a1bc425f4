"""Questions, the paths drawn for them, and what is thought of these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from hpc.errors import UserError
from hpc.shards import write_groups
from hpc.stages import Context, Counts, Mapper, Row
from insightv.config import ChainConfig
from insightv.payloads.source import Load, Run, Source
from insightv.pictures import PictureWriter
from insightv.prompting import load_prompts

if TYPE_CHECKING:
    from insightv.assessment.judge import Judge
    from insightv.generation import GenerationConfig


def questions(config: ChainConfig, split: str) -> Run:
    """Draws a split's questions: rows in shards, pictures in packs beside them."""

    def run(context: Context) -> Counts:
        from insightv.demo.sets import make_questions
        from insightv.questions.making import make_read, told_of

        counts: Counter[str] = Counter()

        def groups(writer: PictureWriter) -> Iterator[tuple[str, list[Row]]]:
            total = sum(config.questions.asked(split).values())
            drawn = make_questions(split, config.questions, config.seed, writer)
            read = make_read(config, split, context.directory, writer, counts)
            for done, question in enumerate(chain(drawn, read), 1):
                counts[question.benchmark] += 1
                context.progress(done, max(total, done))
                yield question.key, [question.to_json()]

        with PictureWriter(context.directory / "pictures") as writer:
            shards = context.directory / "shards"
            made = write_groups(shards, groups(writer), config.questions.per_shard)
        if not made:
            told = f" ({told_of(counts)})" if counts else ""
            raise UserError(f"questions: the {split} split has none{told}; give sizes or mend sets")
        return dict(counts)

    return run


class Only:
    """Passes some questions on to a mapper: of some sets, and hard ones; others give no rows.

    Hard are those whose direct answer was judged wrong; one that nobody could judge is not,
    since nobody could judge its paths either.
    """

    def __init__(self, mapper: Mapper, names: Sequence[str], hard: Sequence[str] = ()):
        self.mapper, self.names, self.hard = mapper, tuple(names), tuple(hard)
        self.concurrency = mapper.concurrency

    async def __call__(self, key: str, inputs: Mapping[str, list[Row]]) -> list[Row]:
        """The mapper's rows, or none."""
        name = key.split(":", 1)[0]
        direct = inputs.get("direct", [])
        if name in self.hard and not any(row["correct"] is False for row in direct):
            return []
        return await self.mapper(key, inputs) if name in self.names else []

    async def close(self) -> None:
        """Closes the mapper."""
        await self.mapper.close()


def generate(
    config: ChainConfig,
    source: Source,
    sampling: GenerationConfig,
    number: int,
    answerer: Source | None = None,
    judging: bool = False,
) -> Load:
    """Questions → paths of one round.

    Args:
        config: The chain's.
        source: The model that reasons.
        sampling: How paths are sampled.
        number: Of the round, from 0.
        answerer: Who draws the answers from the steps, if it is not the same model.
        judging: Whether the answerer is a summary agent: it judges the steps, where others
            answer what follows from them.
    """

    def load(context: Context) -> Mapper:
        from insightv.agents import FinalAgent, SummaryAgent
        from insightv.generation import Generate

        among = 1 if answerer is None else 2
        engine, agent = source.engine(config, context, among), None
        if answerer is not None:
            other = answerer.engine(config, context, among)
            drawn = sampling.answer.sampling()
            agent = (SummaryAgent if judging else FinalAgent)(other, answerer.texts, drawn)
        mapper = Generate(sampling, engine, source.texts, config.seed, number, agent)
        return Only(mapper, config.questions.reasoned, config.questions.hard)

    return load


def score(config: ChainConfig, source: Source) -> Load:
    """Paths with their verdicts → scores, all paths of a question in one pass."""

    def load(context: Context) -> Mapper:
        from insightv.assessment.scoring import Score

        engine = source.engine(config, context)
        return Score(engine, source.texts, config.score, config.seed)

    return load


def judge(config: ChainConfig, source: Source | None) -> Load:
    """Paths → verdicts; without a model the rules alone decide."""

    def load(context: Context) -> Mapper:
        return judge_of(config, source, context)

    return load


def judge_of(config: ChainConfig, source: Source | None, context: Context, among: int = 1) -> Judge:
    """A judge that a stage runs, one of ``among`` models."""
    from insightv.assessment.judge import Judge

    if source is None:
        return Judge(None, load_prompts("default"), config.judge, config.seed)
    engine = source.engine(config, context, among)
    return Judge(engine, source.texts, config.judge, config.seed)

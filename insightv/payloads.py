"""What each stage of the chain does when it runs; `insightv.chain` says when.

Every function takes its configuration and returns the payload: ``load`` of a map stage, ``run``
of a job. Models and their libraries are imported inside, by the process that needs them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING

from hpc.errors import UserError
from hpc.rundir import RunDir
from hpc.shards import join, read_rows, write_groups
from hpc.stages import Context, Counts, Mapper, Row
from insightv.config import ChainConfig
from insightv.folders import model_folder
from insightv.pictures import Pictures, PictureWriter
from insightv.prompting import Prompts, load_prompts
from insightv.records import Question, TrainingSample, seed_for

if TYPE_CHECKING:
    from insightv.assessment.judge import Judge
    from insightv.curation import Groups, PairConfig, PlainQuestions
    from insightv.engines import Engine, EngineConfig
    from insightv.evaluation.answering import EntryConfig
    from insightv.generation import GenerationConfig
    from insightv.training.config import DPOConfig, SFTConfig

Load = Callable[[Context], Mapper]
Run = Callable[[Context], Counts | None]
MakeSet = Callable[["Groups", "PlainQuestions", Counter[str]], Iterable[TrainingSample]]

ROLES = ("questions", "paths", "verdicts", "scores")
"""What curation joins."""


@dataclass(frozen=True)
class Source:
    """A model as stages see it.

    Attributes:
        path: What the configuration names, or its folder in the run.
        prompts: The set it is spoken to with.
        stage: The stage that makes it; empty for configured ones.
        digest: Of a configured one.
        engine_config: How it is run, if not like the others.
    """

    path: str
    prompts: str
    stage: str = ""
    digest: str = ""
    engine_config: EngineConfig | None = field(default=None, compare=False)

    @property
    def shape(self) -> dict[str, str]:
        """What a stage that uses it is known by; a trained one also by the stage behind it."""
        model = self.path if self.stage else self.digest
        return {"model": model, "prompts": self.texts.version}

    @property
    def after(self) -> tuple[str, ...]:
        """What must be complete before it can be loaded."""
        return (self.stage,) if self.stage else ()

    @property
    def texts(self) -> Prompts:
        """Its prompts."""
        return load_prompts(self.prompts)

    def folder(self, run: Path) -> Path:
        """Where it is."""
        return run / self.path if self.stage else model_folder(self.path)

    def engine(self, config: ChainConfig, context: Context, among: int = 1) -> Engine:
        """The model, loaded, with every picture of the run.

        Args:
            config: The chain's.
            context: The stage's.
            among: How many engines the stage runs at once.
        """
        from insightv.engines import load_engine

        return load_engine(
            self.folder(context.run),
            self.engine_config or config.engine,
            pictures(context.run),
            context.directory / "logs",
            1 / among,
        )


def pictures(run: Path) -> Pictures:
    """Every picture of a run."""
    return Pictures(sorted(run.glob("stages/questions-*/pictures")))


# ---- questions and what is thought about them


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


class _Only:
    """Passes some questions on to a mapper: of some sets, and hard ones; others give no rows.

    Hard are those whose direct answer was judged wrong; one that nobody could judge is not,
    since nobody could judge its paths either.
    """

    def __init__(self, mapper: Mapper, names: Sequence[str], hard: Sequence[str] = ()):
        self.mapper, self.names, self.hard = mapper, tuple(names), tuple(hard)
        self.concurrency = mapper.concurrency

    async def __call__(self, key: str, inputs: Mapping[str, list[Row]]) -> list[Row]:
        name = key.split(":", 1)[0]
        direct = inputs.get("direct", [])
        if name in self.hard and not any(row["correct"] is False for row in direct):
            return []
        return await self.mapper(key, inputs) if name in self.names else []

    async def close(self) -> None:
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
        return _Only(mapper, config.questions.reasoned, config.questions.hard)

    return load


def direct(config: ChainConfig, entry: EntryConfig, source: Source, referee: Source | None) -> Load:
    """Questions of sets of which only the hard ones count → the generator's direct answers."""
    answers = answer(config, entry, source, None, referee)
    return lambda context: _Only(answers(context), config.questions.hard)


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
        return _judge(config, source, context)

    return load


def _judge(config: ChainConfig, source: Source | None, context: Context, among: int = 1) -> Judge:
    from insightv.assessment.judge import Judge

    if source is None:
        return Judge(None, load_prompts("default"), config.judge, config.seed)
    engine = source.engine(config, context, among)
    return Judge(engine, source.texts, config.judge, config.seed)


# ---- sets


def sample_set(config: ChainConfig, name: str, make: MakeSet) -> Run:
    """Chooses training samples from everything that is known about the paths."""

    def run(context: Context) -> Counts:
        def plain() -> Iterator[Question]:
            rows = map(Question.from_json, read_rows(context.shards("questions")))
            return (row for row in rows if row.benchmark in config.questions.plain)

        counts: Counter[str] = Counter()
        samples = make(groups_of(context), plain, counts)
        groups = ((sample.key, [sample.to_json()]) for sample in samples)
        written = write_groups(
            context.directory / "shards", _watched(groups, context), config.questions.per_shard
        )
        if not written:
            raise UserError(_empty(f"the {name} set", counts))
        return dict(counts)

    return run


def groups_of(context: Context) -> Groups:
    """Begins passes over a stage's questions with paths, verdicts and scores."""
    return lambda: join({role: context.shards(role) for role in ROLES})


def _watched(
    groups: Iterable[tuple[str, list[Row]]], context: Context
) -> Iterator[tuple[str, list[Row]]]:
    for number, group in enumerate(groups, 1):
        context.progress(number, 0)
        yield group


def _empty(what: str, counts: Counter[str]) -> str:
    """Why nothing was kept, the commonest reasons first."""
    whys = ("dropped", "no winner", "paths failed", "paths wrong", "paths undecided", "unscored")
    told = Counter({name: n for name, n in counts.items() if n and name.startswith(whys)})
    reasons = ", ".join(f"{name}: {n}" for name, n in told.most_common(6))
    return f"{what} is empty ({reasons or 'no paths came in'}); loosen its keys or sample more"


def pairs(
    config: ChainConfig, source: Source, pairing: PairConfig, as_many_as: Sequence[str] = ()
) -> Run:
    """Chooses winners and losers; ``as_many_as`` stages together have, where some are named."""

    def run(context: Context) -> Counts:
        from insightv.curation import preference_pairs

        chosen = pairing
        counts: Counter[str] = Counter()
        if as_many_as:
            manifests = [RunDir(context.run).read_manifest(name) or {} for name in as_many_as]
            counts["wanted"] = sum(manifest["rows"] for manifest in manifests)
            chosen = replace(pairing, max_pairs=counts["wanted"])
        found = preference_pairs(chosen, groups_of(context), source.texts, config.seed, counts)
        # A question's pairs come one after the other, and stay together.
        groups = (
            (key, [pair.to_json() for pair in of_question])
            for key, of_question in groupby(found, key=lambda pair: pair.question)
        )
        written = write_groups(
            context.directory / "shards", _watched(groups, context), config.questions.per_shard
        )
        if not written:
            raise UserError(_empty(f"the pairs of {context.directory.name}", counts))
        return dict(counts)

    return run


# ---- trainings


def sft(config: ChainConfig, training: SFTConfig, source: Source, out: str) -> Run:
    """Fine-tunes a model on the stage's samples."""

    def run(context: Context) -> Counts | None:
        from insightv.training.trainer import train_sft

        base, data = source.folder(context.run), context.shards("samples")
        seeded = replace(training, seed=seed_for(config.seed, "training", out, training.seed))
        return train_sft(seeded, base, data, pictures(context.run), context.run / out, context)

    return run


def reference(config: ChainConfig, source: Source) -> Load:
    """Pairs → the same with their log-probabilities under the reference model."""

    def load(context: Context) -> Mapper:
        from insightv.training.reference import Reference

        settings = config.rounds.log_probabilities
        return Reference(source.folder(context.run), settings, pictures(context.run))

    return load


def dpo(config: ChainConfig, training: DPOConfig, policy: Source, tied: Source, out: str) -> Run:
    """Trains the policy on pairs, tied to the reference that scored them."""

    def run(context: Context) -> Counts | None:
        from insightv.training.trainer import train_dpo

        seeded = replace(training, seed=seed_for(config.seed, "training", out, training.seed))
        return train_dpo(
            seeded,
            policy.folder(context.run),
            context.shards("pairs"),
            pictures(context.run),
            context.run / out,
            context,
            tied.folder(context.run),
        )

    return run


# ---- evaluation


def _speakers(
    config: ChainConfig,
    context: Context,
    reasoner: Source | None,
    summariser: Source | None,
    among: int,
) -> tuple[Prompts, Engine | None, Engine | None]:
    """An entry's prompts and the engines of its models, of ``among`` in this process."""
    texts = (reasoner or summariser or Source("", "default")).texts
    agents = dict.fromkeys(source for source in (reasoner, summariser) if source is not None)
    engines = {source: source.engine(config, context, among) for source in agents}
    first = engines[reasoner] if reasoner else None
    return texts, first, engines[summariser] if summariser else None


def answer(
    config: ChainConfig,
    entry: EntryConfig,
    reasoner: Source | None,
    summariser: Source | None,
    referee: Source | None,
) -> Load:
    """Questions → predictions of one entry of the ladder."""

    def load(context: Context) -> Mapper:
        from insightv.evaluation.answering import Answer, donate

        among = len({reasoner, summariser} - {None}) + (referee is not None)
        texts, first, last = _speakers(config, context, reasoner, summariser, among)
        donors = None
        if entry.mode == "judge_card":
            folders = context.shards("questions"), context.shards("predictions")
            donors = donate(*folders, entry.reasoning_from, config.seed)
        return Answer(
            entry,
            texts,
            _judge(config, referee, context, among),
            first,
            last,
            config.seed,
            donors,
        )

    return load


def validate(
    config: ChainConfig,
    entry: EntryConfig,
    reasoner: Source,
    summariser: Source,
    referee: Source | None,
) -> Load:
    """Validation questions of the reasoned sets → a round's predictions."""
    ask = answer(config, entry, reasoner, summariser, referee)
    return lambda context: _Only(ask(context), config.questions.reasoned)


def decide(config: ChainConfig, number: int) -> Run:
    """Decides whether rounds go on after this one."""

    def run(context: Context) -> Counts:
        from insightv.evaluation.stopping import decide

        rounds, seed = config.rounds, config.evaluation.resamples_seed
        return decide(context.run, number, rounds.count, rounds.early_stop, seed)

    return run


def choose(config: ChainConfig, target: str) -> Run:
    """Takes over the best round's model."""

    def run(context: Context) -> Counts:
        from insightv.evaluation.stopping import choose

        return choose(context.run, config.rounds.count, target)

    return run


def benchmark_questions(config: ChainConfig) -> Run:
    """Writes down what lmms-eval's tasks ask."""

    def run(context: Context) -> Counts | None:
        from insightv.evaluation.benchmarks import ask

        return ask(config.benchmarks, context)

    return run


def benchmark(
    config: ChainConfig, entry: EntryConfig, reasoner: Source | None, summariser: Source | None
) -> Load:
    """What lmms-eval's tasks ask → predictions of one entry, judged by the rules alone."""

    def load(context: Context) -> Mapper:
        from insightv.assessment.judge import Judge, JudgeConfig
        from insightv.evaluation.benchmarks import ByTask, made_with

        among = len({reasoner, summariser} - {None})
        texts, first, last = _speakers(config, context, reasoner, summariser, among)
        sampling = made_with(context.shards("questions"))["sampling"]
        rules = {task: config.benchmarks.judged(task, config.judge.rules) for task in sampling}
        return ByTask(
            entry,
            texts,
            {task: Judge(None, texts, JudgeConfig(rule)) for task, rule in rules.items()},
            first,
            last,
            config.seed,
            sampling,
        )

    return load


def benchmark_scores(config: ChainConfig, entries: Sequence[str]) -> Run:
    """Lets lmms-eval score what the entries answered."""

    def run(context: Context) -> Counts | None:
        from insightv.evaluation.benchmark_scores import score

        seed = config.evaluation.resamples_seed
        return score(config.benchmarks, entries, context, seed)

    return run


def results(config: ChainConfig) -> Run:
    """Collects ``results.json``."""

    def run(context: Context) -> Counts:
        from insightv.evaluation.results import write_results

        found = write_results(context.run, config.evaluation.resamples_seed)
        return {"entries": len({rung["name"] for rung in found["ladder"]})}

    return run


def report() -> Run:
    """Writes the page."""

    def run(context: Context) -> Counts:
        from insightv.report import write_report

        return {"bytes": write_report(context.run).stat().st_size}

    return run

"""Answers of the ladder's entries, what they decide, and the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpc.stages import Context, Counts, Mapper
from insightv.config import ChainConfig
from insightv.payloads.source import Load, Run, Source
from insightv.payloads.thinking import Only, judge_of
from insightv.prompting import Prompts

if TYPE_CHECKING:
    from insightv.engines import Engine
    from insightv.evaluation.answering import EntryConfig


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
            judge_of(config, referee, context, among),
            first,
            last,
            config.seed,
            donors,
        )

    return load


def direct(config: ChainConfig, entry: EntryConfig, source: Source, referee: Source | None) -> Load:
    """Questions of sets of which only the hard ones count → the generator's direct answers."""
    answers = answer(config, entry, source, None, referee)
    return lambda context: Only(answers(context), config.questions.hard)


def validate(
    config: ChainConfig,
    entry: EntryConfig,
    reasoner: Source,
    summariser: Source,
    referee: Source | None,
) -> Load:
    """Validation questions of the reasoned sets → a round's predictions."""
    ask = answer(config, entry, reasoner, summariser, referee)
    return lambda context: Only(ask(context), config.questions.reasoned)


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

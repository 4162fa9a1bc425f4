"""Sets and pairs, and the trainings on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from hpc.errors import UserError
from hpc.rundir import RunDir
from hpc.shards import join, read_rows, write_groups
from hpc.stages import Context, Counts, Mapper, Row
from insightv.config import ChainConfig
from insightv.payloads.source import Load, Run, Source, pictures
from insightv.records import Question, TrainingSample, seed_for

if TYPE_CHECKING:
    from insightv.curation import Groups, PairConfig, PlainQuestions
    from insightv.training.config import DPOConfig, SFTConfig

MakeSet = Callable[["Groups", "PlainQuestions", Counter[str]], Iterable[TrainingSample]]

ROLES = ("questions", "paths", "verdicts", "scores")
"""What curation joins."""


def sample_set(config: ChainConfig, name: str, make: MakeSet) -> Run:
    """Chooses training samples from everything that is known about the paths."""

    def run(context: Context) -> Counts:
        def plain() -> Iterator[Question]:
            rows = map(Question.from_json, read_rows(context.shards("questions")))
            return (row for row in rows if row.benchmark in config.questions.plain)

        counts: Counter[str] = Counter()
        samples = make(groups_of(context), plain, counts)
        groups = ((sample.key, [sample.to_json()]) for sample in samples)
        return _written(config, context, groups, f"the {name} set", counts)

    return run


def groups_of(context: Context) -> Groups:
    """Begins passes over a stage's questions with paths, verdicts and scores."""
    return lambda: join({role: context.shards(role) for role in ROLES})


def _written(
    config: ChainConfig,
    context: Context,
    groups: Iterable[tuple[str, list[Row]]],
    what: str,
    counts: Counter[str],
) -> Counts:
    """Writes a stage's shards, which may not be empty; returns the counts."""
    shards = context.directory / "shards"
    if not write_groups(shards, _watched(groups, context), config.questions.per_shard):
        raise UserError(_empty(what, counts))
    return dict(counts)


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
        return _written(config, context, groups, f"the pairs of {context.directory.name}", counts)

    return run


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

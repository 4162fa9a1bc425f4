"""The order of stages: the only place that knows it.

Each stage's ``config`` holds just what shapes its result, so that a changed key makes again
what it touches and what depends on that, and nothing else. What a stage does when it runs
stands in `insightv.payloads`; putting a chain together loads no model.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hpc.cluster import Profile
from hpc.config import load, shaping
from hpc.errors import UserError
from hpc.rundir import Chain, RunDir
from hpc.stages import Stage
from insightv import payloads
from insightv.chainfile import folders
from insightv.config import NONE, ChainConfig, ModelConfig
from insightv.evaluation import benchmark_scores, benchmarks, stopping
from insightv.evaluation.answering import EntryConfig
from insightv.generation import GenerationConfig
from insightv.payloads import ROLES, MakeSet, Source
from insightv.questions import making
from insightv.training.config import TrainConfig
from insightv.training.fitting import fit

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

TOKENS = ("tokens",)
"""What stages with a model count beside rows: tokens generated (of paths that came to nothing,
none), or trained on."""

SUMMARIES = ("results", "report")
"""Stages that only tell what the others made; they follow any change."""


def build(run: RunDir | Path) -> Chain:
    """The chain of a run, from its ``chain.yaml``.

    Raises:
        UserError: There is no such file, or it is damaged.
    """
    run = run if isinstance(run, RunDir) else RunDir(run)
    path = run.chain_file
    if path.is_file() and not path.read_bytes().strip():  # a disk that was full leaves such
        raise UserError(
            f"{path} is empty; give the same `run` or `submit` command again, which writes it anew"
        )
    return assemble(load(ChainConfig, run.chain_file), run)


def assemble(config: ChainConfig, run: RunDir) -> Chain:
    """The chain of a resolved configuration in a run directory.

    Raises:
        UserError: An entry of the ladder does not exist, or cannot be made.
    """
    command = [sys.executable, "-m", "insightv"]
    return Chain(_Stages(config).all(), run, command, ("hpc", "insightv"), folders(config))


def hold_layouts(chain: Chain, config: ChainConfig, profile: Profile) -> None:
    """Looks whether a cluster's trainings have ranks for whole copies of the model.

    Raises:
        UserError: They have not; it would else be told when the training starts.
    """
    for name, stage in chain.stages.items():
        if not stage.distributed:
            continue
        kind, _, model = name.partition("-")
        training: TrainConfig = config.rounds.dpo
        if kind == "sft":
            training = getattr(config.training, model.replace("-", "_"))
        if training.backend == "megatron":
            asked = profile.of_stage(stage)
            try:
                training.megatron.data_parallel(asked.nodes * asked.tasks)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None


class _Stages:
    """Puts stages together, each with what it needs, on demand and once."""

    def __init__(self, config: ChainConfig):
        self.config = config
        self.stages: dict[str, Stage] = {}
        models = config.models
        self.base = _configured(models.base)
        self.generator = _configured(models.generator)
        self.scorer = _configured(models.scorer)
        self.judge = None if models.judge.path == NONE else _configured(models.judge)

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

    def _add(self, stage: Stage) -> str:
        self.stages[stage.name] = stage
        return stage.name

    def _map(self, name: str, **parts: Any) -> str:
        """A map stage that runs a model."""
        workers = self.config.local.workers or sys.maxsize
        limit = self.config.error_limit
        return self._add(
            Stage(name, "map", workers=workers, resources="gpu", error_limit=limit, **parts)
        )

    def _job(self, name: str, **parts: Any) -> str:
        return self._add(Stage(name, "job", **parts))

    def _training(self, name: str, training: TrainConfig, **parts: Any) -> str:
        """A training; but for the torch backend on as many ranks as the profile gives it."""
        workers = self.config.local.workers or sys.maxsize
        ranks = training.backend != "torch"
        fits = partial(fit, name, training, self.base.folder(Path()))
        parts |= {"distributed": ranks, "counted": TOKENS, "fits": fits}
        return self._job(name, workers=workers, resources="gpu", **parts)

    # ---- questions, and one round of paths with their assessment

    def _questions(self, split: str) -> str:
        name = f"questions-{split}"
        if name in self.stages:
            return name
        asked = shaping(self.config.questions)
        shape = {
            "split": split,
            "sizes": {name: asked[name][split] for name in ("charts", "reading", "shapes")},
            "tasks": asked["tasks"],
            "kinds": asked["kinds"],
            "seed": self.config.seed if split == "train" else asked["held_out_seed"],
            "per_shard": asked["per_shard"],
        }
        outputs = [f"stages/{name}/pictures"]
        if asked["mappings"]:
            shape["read"] = making.shape(self.config.questions, split)
            outputs.append(f"stages/{name}/{making.DROPPED}")
        run = payloads.questions(self.config, split)
        return self._job(name, config=shape, run=run, outputs=tuple(outputs))

    def _direct(self) -> str:
        """The generator's answers without reasoning, which tell what is hard."""
        asked, name = self.config.questions, "hard-direct"
        entry = EntryConfig("hard", "direct", reasoning_model="generator", answer=asked.direct)
        entry.validate()
        return self._map(
            name,
            inputs={"questions": "questions-train"},
            config={
                "seed": self.config.seed,
                "entry": shaping(entry),
                "sets": list(asked.hard),
                "by": self.generator.shape,
                "judge": shaping(self.config.judge),
                "judged by": self._referee(),
            },
            load=payloads.direct(self.config, entry, self.generator, self.judge),
        )

    def _paths(self, prefix: str, source: Source, sampling: GenerationConfig, number: int) -> None:
        """Generation, verdicts and scores of one round, named ``<prefix>-…``."""
        config = self.config
        generate, judge = f"{prefix}-generate", f"{prefix}-judge"
        inputs = {"questions": "questions-train"}
        if generate in self.stages:
            return
        # Generation goes on beside the decision after the round before; the rest waits for it.
        unless = self._decisions(number) if prefix == f"r{number}" else ()
        answerer = self._answerer() if number else None
        judging = config.rounds.answer_from == "summary"
        shape = {
            "seed": config.seed,
            "round": number,
            "sampling": shaping(sampling),
            "sets": list(config.questions.reasoned),
            "by": source.shape,
        }
        if answerer is not None:
            shape |= {"answers by": answerer.shape, "judging": judging}
        hard = config.questions.hard
        if hard:
            shape["hard"] = list(hard)
        self._map(
            generate,
            inputs=inputs | ({"direct": self._direct()} if hard else {}),
            after=_stages(source, answerer),
            config=shape,
            load=payloads.generate(config, source, sampling, number, answerer, judging),
            unless=unless,
            counted=TOKENS,
        )
        inputs = inputs | {"paths": generate}
        self._map(
            judge,
            inputs=inputs,
            after=unless[-1:],
            config={"seed": config.seed, "judge": shaping(config.judge), "by": self._referee()},
            load=payloads.judge(config, self.judge),
            unless=unless,
        )
        self._map(
            f"{prefix}-score",
            inputs=inputs | {"verdicts": judge},
            config={"seed": config.seed, "score": shaping(config.score), "by": self.scorer.shape},
            load=payloads.score(config, self.scorer),
            unless=unless,
        )

    def _answerer(self) -> Source | None:
        """Who draws the answers of a trained agent's paths, if it does not itself."""
        who = self.config.rounds.answer_from
        if who == "summary":
            return self._fine_tuned("summary")
        return self.base if who == "extractor" else None

    def _referee(self) -> dict[str, str]:
        """What verdicts depend on beside rules; the judge speaks no prompts without a model."""
        return {} if self.judge is None else self.judge.shape

    def _joined(self, prefix: str) -> dict[str, str]:
        """What curation reads of a round, by role."""
        stages = [f"{prefix}-{name}" for name in ("generate", "judge", "score")]
        return dict(zip(ROLES, ["questions-train", *stages], strict=True))

    # ---- models

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

    def _trained(self, name: str, stage: str) -> Source:
        return Source(f"models/{name}", self.base.prompts, stage)

    def _fine_tuned(self, name: str) -> Source:
        """A model trained from the base on the set of its name."""
        stage = f"sft-{name}"
        model = self._trained(name, stage)
        if stage in self.stages:
            return model
        training = getattr(self.config.training, name.replace("-", "_"))
        self._training(
            stage,
            training,
            inputs={"samples": self._set(name)},
            config={
                "seed": self.config.seed,
                "training": shaping(training),
                "from": self.base.shape,
            },
            run=payloads.sft(self.config, training, self.base, model.path),
            outputs=(model.path,),
        )
        return model

    def _set(self, name: str) -> str:
        make, shape = self._recipe(name)
        config = {
            "seed": self.config.seed,
            **shape,
            "plain": list(self.config.questions.plain),
            "prompts": self.base.texts.version,
            "per_shard": self.config.questions.per_shard,
        }
        inputs = {"questions": "questions-train"} if name == "plain" else self._joined("r0")
        run = payloads.sample_set(self.config, name, make)
        return self._job(f"set-{name}", inputs=inputs, config=config, run=run)

    def _recipe(self, name: str) -> tuple[MakeSet, dict[str, Any]]:
        """How a set is made, and the part of the configuration that shapes it."""
        from insightv import curation

        texts, seed = self.base.texts, self.config.seed
        paths, summary = self.config.reasoning_set, self.config.summary_set
        of_paths = {"paths": shaping(paths)}
        if name in ("reasoning", "direct", "multi-turn"):
            make = {
                "reasoning": curation.reasoning_set,
                "direct": curation.direct_set,
                "multi-turn": curation.multi_turn_set,
            }[name]
            return lambda groups, plain, n: make(paths, groups, plain, texts, seed, n), of_paths
        if name == "summary":
            return (
                lambda groups, plain, n: curation.summary_set(
                    summary, groups, plain, texts, seed, n
                ),
                {"summary": shaping(summary)},
            )
        if name == "union":
            return (
                lambda groups, plain, n: curation.union_set(
                    paths, summary, groups, plain, texts, seed, n
                ),
                {**of_paths, "summary": shaping(summary)},
            )
        return lambda groups, plain, n: curation.plain_samples(plain, texts, None, seed, n), {}

    # ---- preference optimisation

    def _round(self, number: int) -> Source:
        """The reasoning agent after a round; round 0 is the one SFT made."""
        if number == 0:
            return self._fine_tuned("reasoning")
        before, prefix = self._round(number - 1), f"r{number}"
        if f"{prefix}-dpo" not in self.stages and self.config.rounds.early_stop.enabled:
            self._decision(number - 1, before)
        self._paths(prefix, before, self.config.rounds.generation, number)
        name, unless = f"reasoning-{prefix}", self._decisions(number)
        return self._preferred(prefix, f"{prefix}-dpo", before, name, unless=unless)

    def _decisions(self, number: int) -> tuple[str, ...]:
        """The stages that may decide that a round is not made."""
        if not self.config.rounds.early_stop.enabled:
            return ()
        return tuple(stopping.decision(before) for before in range(1, number))

    def _decision(self, number: int, model: Source) -> None:
        """A round's pair of agents on the validation split, and whether further rounds follow."""
        config, stop = self.config, self.config.rounds.early_stop
        if not sum(getattr(config.questions, n).validation for n in config.questions.reasoned):
            raise UserError(
                "rounds.early_stop decides by the validation split, which has no questions; give "
                f"questions.{(config.questions.reasoned or ['charts'])[0]}.validation"
            )
        asked, unless = config.evaluation, self._decisions(number)
        entry = EntryConfig(
            name=f"round-{number}",
            mode=ENTRIES[COMPARED][0],
            reasoning_model=model.path,
            summary_model="summary",
            reasoning=asked.reasoning,
            answer=asked.answer,
        )
        summary = self._fine_tuned("summary")
        self._map(
            stopping.validation(number),
            inputs={"questions": self._questions("validation")},
            after=_stages(model, summary),
            config={
                "seed": config.seed,
                "entry": shaping(entry),
                "sets": list(config.questions.reasoned),
                "by": [model.shape, summary.shape],
                "judge": shaping(config.judge),
                "judged by": self._referee(),
            },
            load=payloads.validate(config, entry, model, summary, self.judge),
            unless=unless,
            counted=TOKENS,
        )
        if number:
            self._job(
                stopping.decision(number),
                after=(*map(stopping.validation, range(number + 1)), *unless[-1:]),
                config={
                    "patience": stop.patience,
                    "min_gain": stop.min_gain,
                    "last": number == config.rounds.count,
                    "seed": asked.resamples_seed,
                },
                run=payloads.decide(config, number),
                unless=unless,
            )

    def _best_round(self) -> Source:
        """The reasoning agent of the round that was best on the validation split."""
        count = self.config.rounds.count
        last = self._round(count)
        model = self._trained("reasoning-chosen", stopping.CHOICE)
        if model.stage not in self.stages:
            self._decision(count, last)
            made = [f"r{number}-dpo" for number in range(1, count + 1)]
            self._job(
                model.stage,
                after=("sft-reasoning", *made, *self._decisions(count + 1)),
                run=payloads.choose(self.config, model.path),
                outputs=(model.path,),
            )
        return model

    def _single_round(self) -> Source:
        """The control: one round on as many pairs as all rounds of the iterative run have."""
        rounds = self.config.rounds
        if rounds.count < 1:
            raise UserError("entry dpo needs rounds.count of at least 1")
        self._round(rounds.count)
        start, prefix = self._fine_tuned("reasoning"), "r1"
        if rounds.single_paths:
            prefix = "dpo"
            sampling = replace(rounds.generation, paths=rounds.single_paths)
            self._paths(prefix, start, sampling, rounds.count + 1)
        return self._preferred("dpo", "dpo-train", start, "reasoning-dpo", prefix)

    def _preferred(
        self,
        prefix: str,
        stage: str,
        policy: Source,
        name: str,
        paths: str = "",
        unless: tuple[str, ...] = (),
    ) -> Source:
        """Pairs, their reference log-probabilities, and DPO on them.

        Args:
            prefix: Of the stages' names.
            stage: The training's name.
            policy: The model to be trained.
            name: The trained model's name.
            paths: For the control: prefix of the stages whose paths it pairs.
            unless: The decisions that may leave all this out.
        """
        config, rounds = self.config, self.config.rounds
        model = self._trained(name, stage)
        if stage in self.stages:
            return model
        pairing = rounds.pairs
        as_many_as: tuple[str, ...] = ()
        if paths:
            as_many_as = tuple(f"r{number}-pairs" for number in range(1, rounds.count + 1))
            pairing = replace(
                pairing,
                per_question=pairing.per_question * rounds.count,
                per_path=pairing.per_path * rounds.count,
                max_pairs=None,
            )
        tied = self._fine_tuned("reasoning") if rounds.reference == "sft" else policy
        self._job(
            f"{prefix}-pairs",
            inputs=self._joined(paths or prefix),
            after=as_many_as,
            config={
                "seed": config.seed,
                "pairs": shaping(pairing),
                "prompts": policy.texts.version,
                "per_shard": config.questions.per_shard,
            },
            run=payloads.pairs(config, policy, pairing, as_many_as),
            unless=unless,
        )
        self._map(
            f"{prefix}-reference",
            inputs={"pairs": f"{prefix}-pairs"},
            after=tied.after,
            config={"run": shaping(rounds.log_probabilities), "by": tied.shape},
            load=payloads.reference(config, tied),
            unless=unless,
        )
        self._training(
            stage,
            rounds.dpo,
            inputs={"pairs": f"{prefix}-reference"},
            after=_stages(policy, tied),
            config={
                "seed": config.seed,
                "training": shaping(rounds.dpo),
                "from": policy.shape,
                "tied to": tied.shape,
            },
            run=payloads.dpo(config, rounds.dpo, policy, tied, model.path),
            outputs=(model.path,),
            unless=unless,
        )
        return model

    # ---- evaluation

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
        first = self._model(reasoner) if reasoner else None
        last = self._model(summariser) if summariser else None
        return self._map(
            stage,
            inputs=inputs,
            after=_stages(first, last),
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
            first = self._model(reasoner) if reasoner else None
            last = self._model(summariser) if summariser else None
            inputs[name] = self._map(
                f"lmms-{name}".replace("_", "-"),
                inputs={"questions": questions},
                after=_stages(first, last),
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


def _stages(*sources: Source | None) -> tuple[str, ...]:
    """The stages that make these models, each once."""
    return tuple(dict.fromkeys(stage for source in sources if source for stage in source.after))


def _configured(model: ModelConfig) -> Source:
    return Source(model.path, model.prompts, digest=model.digest, engine_config=model.engine)

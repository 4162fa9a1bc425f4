"""Stages of a round: paths and their assessment, preference optimisation, and whether to go on."""

from __future__ import annotations

from dataclasses import replace

from hpc.config import shaping
from hpc.errors import UserError
from insightv import payloads
from insightv.chain.fine_tuning import TOKENS, FineTuning
from insightv.evaluation import stopping
from insightv.evaluation.answering import EntryConfig
from insightv.generation import GenerationConfig
from insightv.payloads import Source


class Rounds(FineTuning):
    """Adds rounds, which begin from fine-tuned models."""

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
            (source, answerer),
            inputs=inputs | ({"direct": self._direct()} if hard else {}),
            after=makers(source, answerer),
            config=shape,
            load=payloads.generate(config, source, sampling, number, answerer, judging),
            unless=unless,
            counted=TOKENS,
        )
        inputs = inputs | {"paths": generate}
        self._map(
            judge,
            (self.judge,),
            inputs=inputs,
            after=unless[-1:],
            config={"seed": config.seed, "judge": shaping(config.judge), "by": self._referee()},
            load=payloads.judge(config, self.judge),
            unless=unless,
        )
        self._map(
            f"{prefix}-score",
            (self.scorer,),
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
            mode="multi_agent",
            reasoning_model=model.path,
            summary_model="summary",
            reasoning=asked.reasoning,
            answer=asked.answer,
        )
        summary = self._fine_tuned("summary")
        self._map(
            stopping.validation(number),
            (model, summary, self.judge),
            inputs={"questions": self._questions("validation")},
            after=makers(model, summary),
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
            (),  # the model is loaded in process, whatever the engines are
            gpus=1,
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
            after=makers(policy, tied),
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


def makers(*sources: Source | None) -> tuple[str, ...]:
    """The stages that make these models, each once."""
    return tuple(dict.fromkeys(stage for source in sources if source for stage in source.after))

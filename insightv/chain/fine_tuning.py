"""Stages up to the models that are fine-tuned on the paths of round 0."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from hpc.config import shaping
from hpc.stages import Stage
from insightv import payloads
from insightv.config import NONE, ChainConfig, ModelConfig
from insightv.engines.fitting import fit as held
from insightv.engines.fitting import usable
from insightv.evaluation.answering import EntryConfig
from insightv.payloads import ROLES, MakeSet, Source
from insightv.questions import making
from insightv.training.config import TrainConfig
from insightv.training.fitting import PACKAGES, fit

TOKENS = ("tokens",)
"""What stages with a model count beside rows: tokens generated (of paths that came to nothing,
none), or trained on."""


class FineTuning:
    """Puts stages together, each with what it needs, on demand and once."""

    def __init__(self, config: ChainConfig):
        self.config = config
        self.stages: dict[str, Stage] = {}
        models = config.models
        self.base = _configured(models.base)
        self.generator = _configured(models.generator)
        self.scorer = _configured(models.scorer)
        self.judge = None if models.judge.path == NONE else _configured(models.judge)

    def _add(self, stage: Stage) -> str:
        self.stages[stage.name] = stage
        return stage.name

    def _map(self, name: str, models: Iterable[Source | None], **parts: Any) -> str:
        """A map stage whose workers run these models on engines."""
        workers = self.config.local.workers or sys.maxsize
        limit = self.config.error_limit
        speak = [model for model in models if model is not None]
        engines = [model.engine_config or self.config.engine for model in speak]
        parts = {"gpus": usable(engines), "fits": partial(held, name, engines)} | parts
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
        parts |= {"needs": PACKAGES.get(training.backend, ())}
        return self._job(name, workers=workers, resources="gpu", **parts)

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
        needs = making.packages_of(self.config.questions, split)
        return self._job(name, config=shape, run=run, outputs=tuple(outputs), needs=needs)

    def _direct(self) -> str:
        """The generator's answers without reasoning, which tell what is hard."""
        asked, name = self.config.questions, "hard-direct"
        entry = EntryConfig("hard", "direct", reasoning_model="generator", answer=asked.direct)
        entry.validate()
        return self._map(
            name,
            (self.generator, self.judge),
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

    def _referee(self) -> dict[str, str]:
        """What verdicts depend on beside rules; the judge speaks no prompts without a model."""
        return {} if self.judge is None else self.judge.shape

    def _joined(self, prefix: str) -> dict[str, str]:
        """What curation reads of a round, by role."""
        stages = [f"{prefix}-{name}" for name in ("generate", "judge", "score")]
        return dict(zip(ROLES, ["questions-train", *stages], strict=True))

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


def _configured(model: ModelConfig) -> Source:
    return Source(model.path, model.prompts, digest=model.digest, engine_config=model.engine)

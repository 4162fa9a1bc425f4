"""The configuration of a chain: a section a room, its fields explained where they stand.

A chain file is YAML over `ChainConfig`; ``insightv run CHAIN key=value …`` overrides single
keys. What a run really used stands resolved in its ``chain.yaml``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpc.config import load, unhashed
from hpc.errors import UserError
from insightv.assessment.judge import JudgeConfig
from insightv.assessment.scoring import ScoreConfig
from insightv.curation import PairConfig, ReasoningSetConfig, SummarySetConfig
from insightv.demo.sets import QuestionsConfig
from insightv.engines import EngineConfig
from insightv.generation import GenerationConfig
from insightv.prompting import load_prompts
from insightv.training.config import DPOConfig, ReferenceConfig, SFTConfig

SETS = ("charts", "reading", "shapes")
SPLITS = ("validation", "test")
EMBEDDED = "tiny"
"""Names the model that is shipped with the package."""


@dataclass
class QuestionsSection(QuestionsConfig):
    """What is asked; see `QuestionsConfig` for the sizes.

    Attributes:
        reasoned: Sets whose questions become reasoning paths.
        plain: Sets whose questions are replayed with their plain answers, so that perception
            is not forgotten.
        per_shard: Questions in a shard. A shard is what a worker claims: several for each
            worker keep all busy to the end.
    """

    reasoned: list[str] = field(default_factory=lambda: ["charts"])
    plain: list[str] = field(default_factory=lambda: ["reading", "shapes"])
    per_shard: int = 64

    def validate(self) -> None:
        """Checks names and sizes.

        Raises:
            UserError: A set does not exist, or a size is not possible.
        """
        super().validate()
        for name in (*self.reasoned, *self.plain):
            if name not in SETS:
                raise UserError(f"questions: no set {name!r}; use {', '.join(SETS)}")
        if self.per_shard < 1:
            raise UserError(f"questions.per_shard is {self.per_shard}; give 1 or more")


@dataclass
class ModelConfig:
    """A model and how it is spoken to.

    Attributes:
        path: ``tiny`` (the embedded model) or a folder in Hugging Face format (LLaVA-NeXT,
            Qwen2.5-VL, …). Empty: the model of ``models.base``.
        prompts: The set of prompts: ``default`` for instruction-following models, ``tiny`` for
            the embedded one, or a folder of one's own. Empty: ``tiny`` for the embedded model
            and what was trained from it, ``default`` otherwise.
    """

    path: str = ""
    prompts: str = ""


@dataclass
class ModelsConfig:
    """Who does what. In the paper a larger model generates; here, unless told otherwise, one
    model does everything, which is self-improvement.

    Attributes:
        base: What both agents are trained from.
        generator: Writes the paths of round 0, step by step.
        judge: Decides answers that the rules leave undecided.
        scorer: Scores paths.
    """

    base: ModelConfig = field(default_factory=lambda: ModelConfig(EMBEDDED))
    generator: ModelConfig = field(default_factory=ModelConfig)
    judge: ModelConfig = field(default_factory=ModelConfig)
    scorer: ModelConfig = field(default_factory=ModelConfig)


@dataclass
class TrainingSection:
    """One training for each model of the ladder.

    Attributes:
        reasoning: The reasoning agent. Paper: 2 epochs at 5e-6.
        summary: The summary agent. Paper: 1 epoch at 1e-5.
        direct: One model that reasons and answers in one turn.
        multi_turn: One model with two supervised turns.
        union: Control: one model on both agents' data.
        plain: Control: the base with the plain replay alone.
    """

    reasoning: SFTConfig = field(default_factory=SFTConfig)
    summary: SFTConfig = field(default_factory=lambda: SFTConfig(epochs=1, learning_rate=1e-5))
    direct: SFTConfig = field(default_factory=SFTConfig)
    multi_turn: SFTConfig = field(default_factory=SFTConfig)
    union: SFTConfig = field(default_factory=SFTConfig)
    plain: SFTConfig = field(default_factory=SFTConfig)


@dataclass
class RoundsConfig:
    """Iterative DPO of the reasoning agent.

    Attributes:
        count: Rounds; each samples fresh paths from the model of the round before. Paper: 3.
        generation: How the agent's paths are sampled: all steps in one call.
        pairs: Which paths become winner and loser.
        dpo: The training of each round.
        reference: Whose log-probabilities tie the policy: ``previous`` (the model of the round
            before, as in iterative DPO) or ``sft`` (the first one, all rounds long).
        log_probabilities: How the reference model is run.
        single_paths: Paths for each question that the one-round control (``dpo``) samples from
            the SFT model of its own. 0: it reuses the paths of round 1, with caps on pairs
            widened by the number of rounds, until it has as many pairs as all rounds together;
            this costs no generation, but its pairs share questions and winners more often.
    """

    count: int = 3
    generation: GenerationConfig = field(default_factory=lambda: GenerationConfig(mode="single"))
    pairs: PairConfig = field(default_factory=PairConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    reference: str = "previous"
    log_probabilities: ReferenceConfig = field(default_factory=ReferenceConfig)
    single_paths: int = 0

    def validate(self) -> None:
        """Checks the values.

        Raises:
            UserError: One of them is not possible.
        """
        if self.reference not in ("previous", "sft"):
            raise UserError(f"rounds.reference is {self.reference!r}: use previous or sft")
        if self.count < 0 or self.single_paths < 0:
            raise UserError("rounds.count and rounds.single_paths: give 0 or more")


@dataclass
class EvaluationSection:
    """The final evaluation, the only reader of the test split.

    Attributes:
        entries: Names of the ladder's entries, controls among them.
        split: ``test``, or ``validation`` while anything is still being tuned.
        rules: Tolerances under which answers count as right.
        resamples_seed: Of the bootstrap behind the intervals.
    """

    entries: list[str] = field(default_factory=lambda: list(LADDER))
    split: str = "test"

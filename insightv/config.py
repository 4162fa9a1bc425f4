"""The configuration of a chain: a section a room, its fields explained where they stand.

A chain file is YAML over `ChainConfig`; ``insightv run CHAIN key=value …`` overrides single
keys. What a run really used stands resolved in its ``chain.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hpc.config import unhashed, unhashed_factory
from hpc.errors import UserError
from insightv.assessment.judge import JudgeConfig
from insightv.assessment.scoring import ScoreConfig
from insightv.curation import PairConfig, ReasoningSetConfig, SummarySetConfig
from insightv.demo.sets import QuestionsConfig, Sizes
from insightv.engines import EngineConfig
from insightv.evaluation.answering import CallConfig
from insightv.evaluation.benchmarks import BenchmarksConfig
from insightv.evaluation.results import LADDER
from insightv.evaluation.stopping import EarlyStopConfig
from insightv.folders import EMBEDDED
from insightv.generation import GenerationConfig
from insightv.questions import Place, SetConfig, count_questions
from insightv.questions.making import DUPLICATES
from insightv.training.config import DPOConfig, ReferenceConfig, SFTConfig

SETS = ("charts", "reading", "shapes")
SPLITS = ("validation", "test")
NONE = "none"
"""Names no model."""

MOST_ROUNDS = 100
"""Each round has six stages of its own; the paper has 3 rounds."""


@dataclass
class QuestionsSection(QuestionsConfig):
    """What is asked; see `QuestionsConfig` for the sizes of the sets that are drawn.

    Attributes:
        sets: Files of sets that are read (``configs/data/chartqa.yaml``), relative to the chain
            file or to where the command is given. They move into ``mappings`` when a run starts,
            which then stands on its own.
        mappings: Sets that are read, written out; see `SetConfig`.
        take: Most questions of these sets, by split; a set that is not named gives all.
        longest_side: Larger pictures of sets that are read are made smaller, to so many pixels,
            also where the set itself would let them be; 0: as each set says. For models that
            take a picture as it is: Qwen2.5-VL reads 28 × 28 pixels a token, so 1,792 is at
            most 4,096 tokens.
        folder: Where the folders of sets lie.
        network: Sets without files there may be read from the hub. Compute nodes mostly have
            no way out; then fetch them before.
        held_out: Files of further evaluation sets that training must not see.
        held_out_mappings: The same, written out.
        duplicates: Training questions that evaluation asks too (in any set that is read, or
            held out). ``question``: those with the same text about the same picture go;
            ``picture``: all about a picture of evaluation; ``keep``: none.
        hard: Sets that are read of which only questions are reasoned about that the generator
            answers wrong without reasoning. Paper: half of its reasoning data.
        direct: Sampling of that answer: greedy, so that luck is left out of it.
        reasoned: Sets whose questions become reasoning paths.
        plain: Sets whose questions are replayed with their plain answers, so that perception
            is not forgotten.
        per_shard: Questions in a shard. A shard is what a worker claims: several for each
            worker keep all busy to the end.
    """

    sets: list[str] = unhashed_factory(list)
    mappings: list[SetConfig] = field(default_factory=list)
    take: dict[str, Sizes] = field(default_factory=dict)
    longest_side: int = unhashed(0)  # it stands, hashed, in the mappings it changes
    folder: str = unhashed("")
    network: bool = unhashed(False)
    held_out: list[str] = unhashed_factory(list)
    held_out_mappings: list[SetConfig] = field(default_factory=list)
    duplicates: str = "question"
    hard: list[str] = field(default_factory=list)
    direct: CallConfig = field(default_factory=lambda: CallConfig(temperature=0.0, top_p=1.0))
    reasoned: list[str] = field(default_factory=lambda: ["charts"])
    plain: list[str] = field(default_factory=lambda: ["reading", "shapes"])
    per_shard: int = 64

    def validate(self) -> None:
        """Checks names and sizes.

        Raises:
            UserError: A set does not exist, or a size is not possible.
        """
        super().validate()
        for mapping in (*self.mappings, *self.held_out_mappings):
            mapping.validate("questions")
        read = [mapping.name for mapping in self.mappings]
        if twice := {name for name in read if read.count(name) > 1}:
            raise UserError(f"questions.sets: two sets are named {min(twice)}; rename one")
        for key, names, known in (
            ("reasoned", self.reasoned, [*SETS, *read]),
            ("plain", self.plain, [*SETS, *read]),
            ("take", self.take, read),
            ("hard", self.hard, [*SETS, *read]),
        ):
            for name in names:
                if name not in known:
                    told = f"use {', '.join(known)}" if known else "give questions.sets"
                    raise UserError(f"questions.{key}: no set {name!r}; {told}")
        for name, sizes in self.take.items():
            if min(vars(sizes).values()) < 0:
                raise UserError(f"questions.take.{name}: give 0 or more")
        if self.duplicates not in DUPLICATES:
            raise UserError(
                f"questions.duplicates is {self.duplicates!r}: use {', '.join(DUPLICATES)}"
            )
        self.direct.validate("questions.direct")
        if self.longest_side < 0:
            raise UserError(f"questions.longest_side is {self.longest_side}; give 0 or more")
        if self.per_shard < 1:
            raise UserError(f"questions.per_shard is {self.per_shard}; give 1 or more")

    @property
    def place(self) -> Place:
        """Where sets that are read are found."""
        return Place(Path(self.folder), self.network)

    def asked(self, split: str) -> dict[str, int]:
        """How many questions of each set a split has, about: before any are dropped."""
        asked = {name: int(getattr(getattr(self, name), split)) for name in SETS}
        for mapping in self.mappings:
            most = self.most(mapping, split)
            if most is None:
                most = count_questions(mapping, split, self.place)
            asked[mapping.name] = most
        return asked

    def most(self, mapping: SetConfig, split: str) -> int | None:
        """The most questions of a set that is read; None for all of them."""
        if split not in mapping.splits:
            return 0
        sizes = self.take.get(mapping.name)
        return None if sizes is None else int(getattr(sizes, split))


@dataclass
class ModelConfig:
    """A model and how it is spoken to.

    Attributes:
        path: ``tiny`` (the embedded model) or a folder in Hugging Face format (LLaVA-NeXT,
            Qwen2.5-VL, …); the judge's may be a GGUF file. Empty: the model of ``models.base``.
        hub: Its name on the Hugging Face hub: what `insightv prefetch` fetches into ``path``
            unless it is there.
        revision: The commit that is fetched. Empty: the newest.
        prompts: The set of prompts: ``default`` for instruction-following models, ``tiny`` for
            the embedded one, or a folder of one's own. Empty: ``tiny`` for the embedded model
            and what was trained from it, ``default`` otherwise.
        digest: Filled in when a run starts; a stage is known by it, wherever the folder lies.
        engine: How this model is run, where it differs from ``engine``: behind a server that
            runs already, say. Nothing is taken over from there.
    """

    path: str = unhashed("")
    hub: str = unhashed("")
    revision: str = unhashed("")
    prompts: str = ""
    digest: str = ""
    engine: EngineConfig | None = unhashed(None)


@dataclass
class ModelsConfig:
    """Who does what.

    In the paper a larger model generates (distillation); here, unless told otherwise, one model
    does everything (self-improvement).

    Attributes:
        base: What both agents are trained from.
        generator: Writes the paths of round 0, step by step.
        judge: Decides answers that the rules leave undecided; ``path: none``: nobody does.
        scorer: Scores paths.
    """

    base: ModelConfig = field(default_factory=lambda: ModelConfig(EMBEDDED))
    generator: ModelConfig = field(default_factory=ModelConfig)
    judge: ModelConfig = field(default_factory=ModelConfig)
    scorer: ModelConfig = field(default_factory=ModelConfig)

    def validate(self) -> None:
        """Checks how they are run, and where they are fetched to.

        Raises:
            UserError: One of them cannot be.
        """
        for role, model in vars(self).items():
            if model.hub and model.path in ("", EMBEDDED, NONE):
                raise UserError(f"models.{role}.hub: give path as well, the folder it is for")
            if model.hub and model.path.endswith(".gguf"):
                raise UserError(f"models.{role}.hub: a GGUF file is not fetched; bring it to path")
            if model.engine is not None:
                model.engine.validate(f"models.{role}.engine")


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
        count: Rounds; each samples fresh paths from the model of the round before. Paper: 3;
            here at most 100.
        generation: How the agent's paths are sampled: all steps in one call.
        answer_from: Who draws a path's answer from its steps. ``extractor``: the base, which
            only says what follows from them, so that a verdict speaks of the steps; ``path``: the
            agent itself in a further turn, which it was not trained for; ``summary``: the
            summary agent, which may also correct them.
        pairs: Which paths become winner and loser.
        dpo: The training of each round.
        reference: Whose log-probabilities tie the policy: ``previous`` (the model of the round
            before, as in iterative DPO) or ``sft`` (the first one, all rounds long).
        log_probabilities: How the reference model is run.
        single_paths: Paths for each question that the one-round control (``dpo``) samples from
            the SFT model of its own. 0: it reuses the paths of round 1, with caps on pairs
            widened by the number of rounds, until it has as many pairs as all rounds together;
            this costs no generation, but its pairs share questions and winners more often.
        early_stop: When to leave the rest of the rounds out.
    """

    count: int = 3
    generation: GenerationConfig = field(default_factory=lambda: GenerationConfig(mode="single"))
    answer_from: str = "extractor"
    pairs: PairConfig = field(default_factory=PairConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    reference: str = "previous"
    log_probabilities: ReferenceConfig = field(default_factory=ReferenceConfig)
    single_paths: int = 0
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)

    def validate(self) -> None:
        """Checks the values.

        Raises:
            UserError: One of them is not possible.
        """
        if self.reference not in ("previous", "sft"):
            raise UserError(f"rounds.reference is {self.reference!r}: use previous or sft")
        if self.answer_from not in ("path", "extractor", "summary"):
            raise UserError(
                f"rounds.answer_from is {self.answer_from!r}: use path, extractor or summary"
            )
        if not 0 <= self.count <= MOST_ROUNDS:
            raise UserError(f"rounds.count is {self.count}: give 0 to {MOST_ROUNDS}")
        if self.single_paths < 0:
            raise UserError(f"rounds.single_paths is {self.single_paths}: give 0 or more")


@dataclass
class EvaluationSection:
    """The final evaluation, the only reader of the test split.

    Attributes:
        entries: Names of the ladder's entries, controls among them; only what they need is
            trained. `insightv.chain.ENTRIES` says what each is made of.
        split: ``test``; ``validation`` while anything is still being tuned.
        reasoning: Sampling of the reasoning agent's turn.
        answer: Sampling of the final answer.
        voter: For ``majority``: how each vote is made.
        votes: For ``majority``: most votes; as many count as fit the tokens of ``multi_agent``.
        voting: For ``majority``: sampling of the votes. Warmer than the others: equal votes say
            nothing.
        voting_model: For ``majority``: which trained model (or ``base``) votes.
        resamples_seed: Of the bootstrap behind the intervals.
    """

    entries: list[str] = field(default_factory=lambda: [*LADDER, "judge_card"])
    split: str = "test"
    reasoning: CallConfig = field(default_factory=lambda: CallConfig(max_tokens=4096))
    answer: CallConfig = field(default_factory=lambda: CallConfig(max_tokens=256))
    voter: str = "direct_sft"
    votes: int = 16
    voting: CallConfig = field(default_factory=lambda: CallConfig(0.7, max_tokens=4096))
    voting_model: str = "direct"
    resamples_seed: int = 0

    def validate(self) -> None:
        """Checks the split and the sampling; `insightv.chain.assemble` checks the entries.

        Raises:
            UserError: There is no such split to evaluate on, or tokens cannot be drawn so.
        """
        for name in ("reasoning", "answer", "voting"):
            getattr(self, name).validate(f"evaluation.{name}")
        if self.split not in SPLITS:
            raise UserError(f"evaluation.split is {self.split!r}: use {' or '.join(SPLITS)}")
        if not self.entries:
            raise UserError("evaluation.entries is empty: name one, such as base")
        if self.resamples_seed < 0:  # numpy takes none, and would say so at the end of the run
            raise UserError(f"evaluation.resamples_seed is {self.resamples_seed}: give 0 or more")


@dataclass
class LocalConfig:
    """How this machine is used; nothing here shapes a result.

    Attributes:
        slots: Worker processes at once; 0: one a core.
        workers: Processes that pull shards of one stage, and cores a training may use; 0: as
            many as there are slots. With one GPU for all of them, one or two are best.
    """

    slots: int = unhashed(0)
    workers: int = unhashed(0)

    def validate(self) -> None:
        """Checks the numbers.

        Raises:
            UserError: One is negative.
        """
        if self.slots < 0 or self.workers < 0:
            raise UserError("local.slots and local.workers: give 0 (all cores) or more")


@dataclass
class ChainConfig:
    """Everything a chain can be told.

    Attributes:
        seed: Draws questions, paths, sets and shuffles; other seeds make other runs.
        error_limit: Largest share of a stage's questions that may fail (a broken picture, a
            path without a readable step) before the run stops.
    """

    seed: int = 0
    models: ModelsConfig = field(default_factory=ModelsConfig)
    questions: QuestionsSection = field(default_factory=QuestionsSection)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    reasoning_set: ReasoningSetConfig = field(default_factory=ReasoningSetConfig)
    summary_set: SummarySetConfig = field(default_factory=SummarySetConfig)
    training: TrainingSection = field(default_factory=TrainingSection)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    benchmarks: BenchmarksConfig = field(default_factory=BenchmarksConfig)
    error_limit: float = unhashed(0.02)
    engine: EngineConfig = field(default_factory=EngineConfig)
    local: LocalConfig = field(default_factory=LocalConfig)

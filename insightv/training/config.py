"""What shapes a training. Defaults are the paper's where it published them.

Paper means arXiv 2411.14432 (its tables and its released scripts); everything else is this
project's choice, and every field is a configuration key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hpc.config import later, unhashed, unhashed_factory
from hpc.errors import UserError
from insightv.training.megatron.layout import Layout

TERMS = ("sigmoid", "ipo", "bco", "sft")
"""The terms a preference objective may weigh; `insightv.training.objectives` defines them."""

MOST = 10**15
"""Of any number here; beyond it they lose their last digits in a float."""
BACKENDS = ("torch", "deepspeed", "megatron")
"""What holds the model; `insightv.training.backend` says what each of them must do."""


@dataclass
class DeepSpeedConfig:
    """How ZeRO cuts a model over ranks; no choice here changes a result.

    Attributes:
        zero_stage: 1 cuts optimizer states over ranks, 2 gradients as well, 3 weights as well.
        offload: Keep optimizer states in the memory of the node.
    """

    zero_stage: int = unhashed(2)
    offload: bool = unhashed(False)


@dataclass
class TrainConfig:
    """What SFT and DPO have in common.

    Attributes:
        epochs: Passes over the data; every sample is seen this many times.
        max_steps: Ends earlier, after this many optimizer steps; 0 is no limit.
        batch_size: Samples (SFT) or pairs (DPO) of one optimizer step, on all devices together.
        learning_rate: Its peak.
        schedule: ``cosine`` (to ``final_lr_ratio`` of the peak) or ``constant``; both warm up.
        warmup: Share of all steps over which the rate rises linearly.
        final_lr_ratio: What the cosine ends at, as a share of the peak.
        weight_decay: AdamW's, on every trained tensor.
        beta1: AdamW's first decay.
        beta2: AdamW's second decay.
        grad_clip: Largest global gradient norm; 0 is no limit.
        precision: ``bf16`` (autocast over fp32 weights) or ``fp32``.
        freeze_vision: Train the projector and the language model only.
        max_length: Longest sequence in tokens, picture tokens included; a longer sample is
            dropped and counted, never cut.
        seed: Shuffles the data.
        share_pictures: Rows of the same pictures follow each other in the shuffle, and those
            that meet in a step go through the model as one tree: the picture, and whatever else
            they begin with, is computed once for all. Questions about one picture, and pairs of
            one question, then cost little more than one of them; a step sees fewer pictures.
            Off, rows are shuffled one by one, as is usual.
        max_skipped_steps: How many steps may be passed over, because their loss is not a number
            or for `spike_factor`, before the training ends.
        spike_factor: A step whose gradient norm is more than so many times the median of the
            last ``spike_window`` norms is passed over; 0 takes every step that has a number.
            Clipping bounds what a spike does, so it is off; 10 is rarely reached but by broken
            samples.
        spike_window: How many steps that median is taken of; before so many were taken, none is
            a spike.
        tokens_per_micro_batch: The packing budget: how many tokens (padding included) go
            through the model at once; a sample that alone has more goes alone. The result is
            the same for any value; memory and speed are not. 16384 holds one sample of the
            longest length and some short ones.
        recompute: Recompute activations in the backward pass: a third slower, much less memory.
        save_steps: Writes a checkpoint every so many steps; 0 leaves it to ``save_seconds``.
        save_seconds: Writes a checkpoint after so many seconds without one; 0 is never.
        keep: How many checkpoints stay.
        picture_cache_mb: Memory for prepared pictures.
        device: ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.
        peak_tflops: What one rank's device computes at best, in 10¹² operations a second of this
            precision; 0 takes it from a table (`insightv.training.utilisation`). ``mfu`` is
            told against it.
        tensorboard: Write the numbers of ``metrics.jsonl`` as TensorBoard's event files, too.
        backend: ``torch`` (one device), ``deepspeed`` (ZeRO over many) or ``megatron`` (tensor
            and pipeline parallel). In fp32 they compute the same; in bf16 they round in
            different places, and a checkpoint of one is no other's.
        megatron: How the megatron backend lays the model over ranks.
        deepspeed: How the deepspeed backend does.
    """

    epochs: int = 1
    max_steps: int = 0
    batch_size: int = 128  # not published
    learning_rate: float = 5e-6
    schedule: str = "cosine"  # paper
    warmup: float = 0.05  # paper
    final_lr_ratio: float = 0.0
    weight_decay: float = 0.0  # paper
    beta1: float = 0.9
    beta2: float = 0.999
    grad_clip: float = 1.0
    precision: str = "bf16"  # paper
    freeze_vision: bool = True  # paper
    max_length: int = 12288  # paper
    seed: int = 0
    share_pictures: bool = later(False)
    max_skipped_steps: int = 3
    spike_factor: float = 0.0
    spike_window: int = 32
    tokens_per_micro_batch: int = unhashed(16384)
    recompute: bool = unhashed(False)
    save_steps: int = unhashed(0)
    save_seconds: float = unhashed(600.0)
    keep: int = unhashed(2)
    picture_cache_mb: int = unhashed(512)
    device: str = unhashed("auto")
    peak_tflops: float = unhashed(0.0)
    tensorboard: bool = unhashed(False)
    backend: str = "torch"
    megatron: Layout = unhashed_factory(Layout)
    deepspeed: DeepSpeedConfig = unhashed_factory(DeepSpeedConfig)

    def validate(self, name: str = "") -> None:
        """Checks every value; ``name`` is the section's, for the message.

        Raises:
            UserError: One is out of its range; the line names it and what is allowed.
        """
        self._check(f"{name}." if name else "")

    def _check(self, section: str) -> None:
        _choice(f"{section}schedule", self.schedule, ("cosine", "constant"))
        _choice(f"{section}precision", self.precision, ("bf16", "fp32"))
        _choice(f"{section}device", self.device, ("auto", "cpu", "cuda"))
        _choice(f"{section}backend", self.backend, BACKENDS)
        if self.deepspeed.zero_stage not in (1, 2, 3):
            stage = self.deepspeed.zero_stage
            raise UserError(f"{section}deepspeed.zero_stage is {stage}: choose one of 1, 2, 3")
        for name, kind in (("megatron", Layout), ("deepspeed", DeepSpeedConfig)):
            given, default = vars(getattr(self, name)), vars(kind())
            changed = [key for key in default if given[key] != default[key]]
            if changed and self.backend != name:
                raise UserError(
                    f"{section}{name}.{changed[0]} is given, and {section}backend is "
                    f"{self.backend}: give backend={name}, or leave that key out"
                )
        for name in (
            *("epochs", "batch_size", "max_length", "tokens_per_micro_batch", "keep"),
            "spike_window",
        ):
            _least(f"{section}{name}", getattr(self, name), 1)
        for name in (
            *("max_steps", "learning_rate", "final_lr_ratio", "weight_decay", "grad_clip"),
            *("max_skipped_steps", "save_steps", "save_seconds", "picture_cache_mb"),
            *("peak_tflops", "spike_factor"),
        ):
            _least(f"{section}{name}", getattr(self, name), 0)
        if not 0 <= self.seed < 2**63:
            raise UserError(f"{section}seed is {self.seed}: expected 0 <= x < 2^63")
        if 0 < self.spike_factor < 1:
            raise UserError(
                f"{section}spike_factor is {self.spike_factor}: expected 0, or 1 or more"
            )
        for name in ("warmup", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{section}{name} is {getattr(self, name)}: expected 0 <= x < 1")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, of ``steps`` in all."""
        rising = math.ceil(self.warmup * steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - rising) / max(1, steps - rising)
        falling = 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * (self.final_lr_ratio + (1 - self.final_lr_ratio) * falling)


@dataclass
class SFTConfig(TrainConfig):
    """Supervised fine-tuning of either agent.

    The paper trains the reasoning agent for 2 epochs at 5e-6 (the defaults) and the summary
    agent for 1 epoch at 1e-5.
    """

    epochs: int = 2
    learning_rate: float = 5e-6


@dataclass
class DPOConfig(TrainConfig):
    """Direct preference optimisation of the reasoning agent, one round.

    Attributes:
        terms: Weight of each term of the objective: ``sigmoid``, ``ipo``, ``bco``, ``sft``.
            Empty stands for ``{sigmoid: 1.0, sft: 1.0}``, what the paper's scripts default to.
            A weight of 0 switches a term off.
        beta: How strongly the policy is tied to the reference.
        label_smoothing: Probability that a pair's order is wrong (``sigmoid`` only).
        length_normalised: Divide each reply's log-ratio by its tokens (``sigmoid``, ``bco``;
            ``ipo`` always does).
    """

    epochs: int = 1  # paper: one a round
    batch_size: int = 64  # not published
    learning_rate: float = 5e-7  # paper
    terms: dict[str, float] = field(default_factory=dict)
    beta: float = 0.1  # released default; the paper's own is not published
    label_smoothing: float = 0.0
    length_normalised: bool = False

    def weights(self) -> dict[str, float]:
        """The terms that count, with their weights."""
        terms = self.terms or {"sigmoid": 1.0, "sft": 1.0}
        return {name: weight for name, weight in terms.items() if weight}

    def _check(self, section: str) -> None:
        """As for every training; also the objective."""
        super()._check(section)
        for name, weight in self.terms.items():
            _choice(f"{section}terms", name, TERMS)
            _least(f"{section}terms.{name}", weight, 0)
        if not self.weights():
            raise UserError(f"{section}terms are all 0: give one of them a weight")
        if not 0 < self.beta < math.inf:
            raise UserError(f"{section}beta is {self.beta}: expected a number above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"{section}label_smoothing is {self.label_smoothing}: expected 0 <= x < 0.5"
            )


@dataclass
class ReferenceConfig:
    """Log-probabilities of both replies of each pair under the reference model.

    Attributes:
        precision: As in training, so that the first step's margins are 0.
        max_length: A pair that is longer is passed on without values; training drops it.
        share_pictures: The pairs of one question go through the model as one tree, as in
            training.
        tokens_per_batch: The packing budget, as ``tokens_per_micro_batch`` in training.
        concurrency: How many questions are in flight, so that batches fill.
        picture_cache_mb: Memory for prepared pictures.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    precision: str = "bf16"
    max_length: int = 12288
    share_pictures: bool = later(False)
    tokens_per_batch: int = unhashed(16384)
    concurrency: int = unhashed(64)
    picture_cache_mb: int = unhashed(256)
    device: str = unhashed("auto")

    def validate(self, name: str = "") -> None:
        """Checks every value; ``name`` is the section's, for the message.

        Raises:
            UserError: One is out of its range.
        """
        section = f"{name}." if name else ""
        _choice(f"{section}precision", self.precision, ("bf16", "fp32"))
        _choice(f"{section}device", self.device, ("auto", "cpu", "cuda"))
        for key in ("max_length", "tokens_per_batch", "concurrency"):
            _least(f"{section}{key}", getattr(self, key), 1)
        _least(f"{section}picture_cache_mb", self.picture_cache_mb, 0)


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}: choose one of {', '.join(choices)}")


def _least(name: str, value: float, least: float) -> None:
    if not least <= value <= MOST:
        raise UserError(f"{name} is {value}: expected a number from {least} to {MOST:.0e}")

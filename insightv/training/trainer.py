"""Training runs: SFT and DPO of one model from rows to a Hugging Face folder.

In the stage's directory stand ``metrics.jsonl`` (one line a step), ``dropped.jsonl`` (samples
that were not used, with the reason), ``checkpoints/`` while training, and ``training.json``
once it is done. The model folder appears whole or not at all.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hpc.config import digest, shaping
from hpc.disk import write_atomic
from hpc.errors import UserError
from hpc.stages import Context, Counts, Row
from insightv import models
from insightv.pictures import Pictures
from insightv.training.batches import (
    Encoder,
    Example,
    Rows,
    TooLong,
    encode_all,
    step_members,
)
from insightv.training.checkpoint import Checkpoints, Position, writing
from insightv.training.config import DPOConfig, SFTConfig, TrainConfig
from insightv.training.objectives import Objective, Preference, Supervised, Totals
from insightv.training.torch_backend import Backend, Outcome, TorchBackend

logger = logging.getLogger(__name__)


def train_sft(
    config: SFTConfig,
    model: Path,
    data: Iterable[Row] | Path,
    pictures: Pictures,
    out: Path,
    context: Context,
) -> Counts | None:
    """Fine-tunes a model on `TrainingSample` rows.

    Args:
        config: What shapes the training.
        model: Folder of the model to start from.
        data: Rows, or a folder of shards.
        pictures: Where the rows' pictures are.
        out: Folder of the trained model; replaced as a whole at the end.
        context: Of the run; its directory takes metrics and checkpoints.

    Returns:
        Counts for the manifest; None if ``context.stopping()`` turned true: then a checkpoint
        is written, and calling again goes on exactly from there.

    Raises:
        UserError: The configuration, model or data cannot be used, or the loss stopped being
            a number more often than is tolerated.
    """
    config.validate()
    backend = TorchBackend(model, config)
    encoder = Encoder(backend.processor, pictures, config.max_length, config.picture_cache_mb)
    return _Training(config, backend, encoder.sample, Supervised(), out, context).run(data)


def train_dpo(
    config: DPOConfig,
    model: Path,
    data: Iterable[Row] | Path,
    pictures: Pictures,
    out: Path,
    context: Context,
    reference: str,
) -> Counts | None:
    """Trains a model on `PreferencePair` rows that carry their reference log-probabilities.

    Args:
        config: What shapes the training.
        model: Folder of the model to start from (the policy).
        data: Rows, or a folder of shards, as the reference stage wrote them.
        pictures: Where the rows' pictures are.
        out: Folder of the trained model; replaced as a whole at the end.
        context: Of the run; its directory takes metrics and checkpoints.
        reference: Digest of the reference model; rows made with another are refused.

    Returns:
        As `train_sft`.

    Raises:
        UserError: As `train_sft`; also if a pair has no reference values, or another model's.
    """
    config.validate()
    backend = TorchBackend(model, config)
    encoder = Encoder(backend.processor, pictures, config.max_length, config.picture_cache_mb)

    def check(row: Row) -> None:
        # A row without values is one the reference stage found too long: see `encode`.
        known = row.get("reference_chosen") is not None
        if known and row.get("reference_model") != reference:
            raise UserError(
                f"pair {row.get('key')} has reference log-probabilities of model "
                f"{row.get('reference_model') or 'unknown'}, expected {reference}: remake them"
            )

    def encode(row: Row) -> Example:
        example = encoder.pair(row)
        if len(example.reference) != 2:
            raise UserError(
                f"pair {example.key} has no reference log-probabilities: "
                "run the reference stage over the pairs first"
            )
        return example

    training = _Training(config, backend, encode, Preference(config), out, context, reference)
    return training.run(data, check)


class _Training:
    """The loop that SFT and DPO share."""

    def __init__(
        self,
        config: TrainConfig,
        backend: Backend,
        encode: Callable[[Row], Example],
        objective: Objective,
        out: Path,
        context: Context,
        reference: str = "",
    ):
        self.config, self.backend, self.objective = config, backend, objective
        self.encode, self.out, self.context, self.reference = encode, out, context, reference
        self.checkpoints = Checkpoints(context.directory / "checkpoints", config.keep)
        self.metrics = context.directory / "metrics.jsonl"
        self.finished = context.directory / "training.json"

    def run(
        self, data: Iterable[Row] | Path, check: Callable[[Row], None] = lambda row: None
    ) -> Counts | None:
        rows = Rows(data, self.context.directory, check)
        try:
            return self._run(rows)
        finally:
            rows.close()

    def _run(self, rows: Rows) -> Counts | None:
        config = self.config
        identity = digest(
            {
                "config": shaping(config),
                "model": self.backend.digest,
                "data": rows.digest,
                "reference": self.reference,
            }
        )
        if (counts := self._done(identity)) is not None:
            return counts
        steps = math.ceil(len(rows) * config.epochs / config.batch_size)
        if config.max_steps:
            steps = min(steps, config.max_steps)
        position = self.checkpoints.resume(identity, self.backend.resume) or Position(identity)
        _cut_metrics(self.metrics, position.step)
        with ThreadPoolExecutor(1) as loader, self.metrics.open("a") as log:

            def load(step: int) -> tuple[list[Example], dict[str, str]]:
                members = step_members(
                    config.seed, step, len(rows), config.batch_size, config.epochs
                )
                return encode_all((rows[number] for number in members), self.encode)

            # The next step's samples are read and encoded while this one trains.
            ahead = loader.submit(load, position.step)
            saved = time.monotonic()
            while position.step < steps:
                if self.context.stopping():
                    self.checkpoints.save(position, self.backend.save)
                    return None
                examples, dropped = ahead.result()
                if position.step + 1 < steps:
                    ahead = loader.submit(load, position.step + 1)
                line = self._step(position, steps, examples, dropped)
                log.write(json.dumps(line) + "\n")
                log.flush()
                numbers = {"rate": line["samples"] / max(line["seconds"], 1e-9)}
                if line["loss"] is not None:
                    numbers["loss"] = line["loss"]
                self.context.progress(position.step, steps, **numbers)
                if position.step < steps and self._save_due(position.step, saved):
                    self.checkpoints.save(position, self.backend.save)
                    saved = time.monotonic()
        return self._finish(position, len(rows))

    def _step(
        self, position: Position, steps: int, examples: list[Example], dropped: dict[str, str]
    ) -> dict[str, Any]:
        """One optimizer step; moves ``position`` on and returns the line to log."""
        began = time.monotonic()
        rate = self.config.rate(position.step, steps)
        position.step += 1
        position.dropped.update(dropped)
        line: dict[str, Any] = {"step": position.step, "loss": None, "grad_norm": None, "lr": rate}
        totals = Totals()
        if examples:
            batches = self.backend.packer.batches(examples)
            totals = Totals.of(batches)
            outcome = self.backend.step(batches, self.objective, rate)
            if outcome.applied:
                position.samples += totals.samples
                line |= {"loss": outcome.loss, "grad_norm": outcome.grad_norm}
                line |= outcome.metrics
                if position.first_loss is None:
                    position.first_loss = outcome.loss
                position.last_loss = outcome.loss
            else:
                line["skipped"] = self._skip(position, outcome, examples)
        seconds = time.monotonic() - began
        position.tokens += totals.tokens
        position.seconds += seconds
        line |= {"samples": totals.samples, "tokens": totals.tokens}
        line |= {"target_tokens": totals.target_tokens, "seconds": round(seconds, 4)}
        if totals.places:
            # What packing left empty, and what sharing prefixes saved.
            line["packing_efficiency"] = round(totals.tokens / totals.places, 4)
            line["shared_tokens"] = totals.unshared - totals.tokens
        if dropped:
            line["dropped"] = sorted(dropped)
        return line

    def _skip(self, position: Position, outcome: Outcome, examples: Sequence[Example]) -> list[str]:
        """Records a step whose loss is not a number; returns the keys of those to blame."""
        position.skipped += 1
        guilty = [
            example.key
            for example in examples
            if not math.isfinite(
                self.backend.loss(self.backend.packer.batches([example])[0], self.objective)
            )
        ]
        keys = guilty or [example.key for example in examples]
        shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
        if position.skipped > self.config.max_skipped_steps:
            what = "loss" if not math.isfinite(outcome.loss) else "gradient"
            raise UserError(
                f"the {what} of step {position.step} is not a number, and "
                f"{position.skipped - 1} steps were skipped before (max_skipped_steps); "
                f"samples {shown}: mend or remove them, or lower the learning rate"
            )
        logger.warning("step %d is skipped, its loss is not a number: %s", position.step, shown)
        return keys

    def _save_due(self, step: int, saved: float) -> bool:
        config = self.config
        if config.save_steps and step % config.save_steps == 0:
            return True
        return bool(config.save_seconds) and time.monotonic() - saved >= config.save_seconds

    def _done(self, identity: str) -> Counts | None:
        """The counts of this very training, if its model is there already."""
        try:
            finished = json.loads(self.finished.read_text())
            if finished["identity"] == identity and self.out.is_dir():
                counts: Counts = finished["counts"]
                return counts if counts["model"] == models.digest_of(self.out) else None
        except (OSError, ValueError, KeyError, UserError):
            pass
        return None

    def _finish(self, position: Position, rows: int) -> Counts:
        """Puts the model in place, then says so, then clears up."""
        if position.last_loss is None:
            reasons = "; ".join(sorted(set(position.dropped.values()))[:3])
            raise UserError(f"no step could be trained: {reasons or 'every step was skipped'}")
        part = self.out.with_name(self.out.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        with writing(part):
            self.backend.export(part)
        shutil.rmtree(self.out, ignore_errors=True)
        part.replace(self.out)
        with (self.context.directory / "dropped.jsonl").open("w") as file:
            for key, reason in sorted(position.dropped.items()):
                file.write(json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n")
        too_long = sum(reason.startswith(TooLong.__name__) for reason in position.dropped.values())
        numbers = asdict(position)
        identity, dropped = numbers.pop("identity"), numbers.pop("dropped")
        counts: Counts = {
            "rows": rows,
            **numbers,
            "dropped_too_long": too_long,
            "dropped_broken": len(dropped) - too_long,
            "model": models.digest_of(self.out),
        }
        write_atomic(self.finished, json.dumps({"identity": identity, "counts": counts}, indent=1))
        self.checkpoints.clear()
        return counts


def _cut_metrics(path: Path, step: int) -> None:
    """Keeps the lines up to ``step``: those after a checkpoint are made again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # A line that is cut off was being written when the process was killed.
    whole = [line for line in lines if line.endswith("\n")]
    kept = [line for line in whole if json.loads(line)["step"] <= step]
    write_atomic(path, "".join(kept))

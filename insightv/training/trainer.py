"""Training runs: SFT and DPO of one model from rows to a Hugging Face folder.

In the stage's directory stand ``metrics.jsonl`` (one line a step), ``tensorboard/`` if asked for,
``dropped.jsonl`` (samples that were not used, with the reason), ``checkpoints/`` while training,
and ``training.json`` once it is done. The model folder appears whole or not at all.

Every rank runs this same loop; the first one writes what is written once, and whatever may go
wrong on one of them only is agreed upon (`insightv.training.ranks`).
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import IO, Any

from hpc.config import digest, shaping
from hpc.disk import disk_errors, write_atomic
from hpc.errors import UserError
from hpc.stages import Context, Counts, Row
from insightv import models
from insightv.pictures import Pictures
from insightv.training.backend import Backend, Outcome, load_backend
from insightv.training.batches import Encoder, Example, Rows, TooLong
from insightv.training.checkpoint import Checkpoints, Position, writing
from insightv.training.config import DPOConfig, SFTConfig, TrainConfig
from insightv.training.events import Events, check_installed
from insightv.training.loading import Loader, Step
from insightv.training.objectives import Objective, Preference, Supervised
from insightv.training.ranks import Ranks, joined
from insightv.training.utilisation import peak, utilisation

logger = logging.getLogger(__name__)

SUSPECTS = 8
"""How many samples of a step that is a spike are named."""


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
        Counts for the manifest, on every rank; None if ``context.stopping()`` turned true on
        one of them: then a checkpoint is written, and calling again goes on exactly from there.

    Raises:
        UserError: The configuration, model or data cannot be used, or the loss stopped being
            a number more often than is tolerated.
    """
    config.validate()
    with joined(config) as ranks:
        backend = _loaded(model, config, ranks)
        encoder = Encoder(backend.processor, pictures, config.max_length, config.picture_cache_mb)
        training = _Training(config, backend, encoder.sample, Supervised(), out, context, ranks)
        return training.run(data)


def train_dpo(
    config: DPOConfig,
    model: Path,
    data: Iterable[Row] | Path,
    pictures: Pictures,
    out: Path,
    context: Context,
    reference: Path | str,
) -> Counts | None:
    """Trains a model on `PreferencePair` rows that carry their reference log-probabilities.

    Args:
        config: What shapes the training.
        model: Folder of the model to start from (the policy).
        data: Rows, or a folder of shards, as the reference stage wrote them.
        pictures: Where the rows' pictures are.
        out: Folder of the trained model; replaced as a whole at the end.
        context: Of the run; its directory takes metrics and checkpoints.
        reference: The reference model's folder, or its digest; rows made with another are
            refused.

    Returns:
        As `train_sft`.

    Raises:
        UserError: As `train_sft`; also if a pair has no reference values, or another model's.
    """
    config.validate()
    with joined(config) as ranks:
        backend = _loaded(model, config, ranks)
        encoder = Encoder(backend.processor, pictures, config.max_length, config.picture_cache_mb)
        tied = ranks.first(
            lambda: models.digest_of(reference) if isinstance(reference, Path) else reference
        )

        def check(row: Row) -> None:
            # A row without values is one the reference stage found too long: see `encode`.
            known = row.get("reference_chosen") is not None
            if known and row.get("reference_model") != tied:
                raise UserError(
                    f"pair {row.get('key')} has reference log-probabilities of model "
                    f"{row.get('reference_model') or 'unknown'}, expected {tied}: remake them"
                )

        def encode(row: Row) -> Example:
            example = encoder.pair(row)
            if len(example.reference) != 2:
                raise UserError(
                    f"pair {example.key} has no reference log-probabilities: "
                    "run the reference stage over the pairs first"
                )
            return example

        objective = Preference(config)
        training = _Training(config, backend, encode, objective, out, context, ranks, tied)
        return training.run(data, check)


def _loaded(model: Path, config: TrainConfig, ranks: Ranks) -> Backend:
    if config.tensorboard:
        ranks.first(check_installed)
    backends: list[Backend] = []
    ranks.every(lambda: backends.append(load_backend(model, config, ranks)))
    return backends[0]


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
        ranks: Ranks,
        reference: str = "",
    ):
        self.config, self.backend, self.objective = config, backend, objective
        self.encode, self.out, self.context, self.reference = encode, out, context, reference
        self.ranks, self.peak = ranks, peak(config, ranks)
        self.checkpoints = Checkpoints(context.directory / "checkpoints", config.keep, ranks)
        self.metrics = context.directory / "metrics.jsonl"
        self.finished = context.directory / "training.json"

    def run(
        self, data: Iterable[Row] | Path, check: Callable[[Row], None] = lambda row: None
    ) -> Counts | None:
        rows = Rows(data, self.context.directory, check, self.ranks)
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
        if (counts := self.ranks.first(lambda: self._done(identity))) is not None:
            return counts
        steps = math.ceil(len(rows) * config.epochs / config.batch_size)
        if config.batch_size > len(rows) * config.epochs and self.ranks.lead:
            logger.warning(
                "batch_size %d is more than %d rows in %d epochs: there is one step, of them all",
                *(config.batch_size, len(rows), config.epochs),
            )
        if config.max_steps:
            steps = min(steps, config.max_steps)
        position = self.checkpoints.resume(identity, self.backend.resume) or Position(identity)
        self.ranks.first(lambda: _cut_metrics(self.metrics, position.step))
        load = Loader(
            *(config, rows, self.encode, self.backend.packer),
            *(self.ranks.aside(), self.backend.copies, self.backend.copy),
        )
        with ExitStack() as stack:
            stack.callback(self.checkpoints.close)
            log = stack.enter_context(self.metrics.open("a")) if self.ranks.lead else None
            events = None
            if config.tensorboard and self.ranks.lead:
                events = Events(self.metrics.with_name("tensorboard"), position.step)
                stack.callback(events.close)
            loader = stack.enter_context(ThreadPoolExecutor(1))
            # The next step's samples are read and encoded while this one trains.
            ahead = loader.submit(load, position.step)
            saved = time.monotonic()
            while position.step < steps:
                if self._leaving():
                    self.checkpoints.save(position, self.backend.snapshot)
                    self.checkpoints.wait()
                    return None
                step = ahead.result()
                if position.step + 1 < steps:
                    ahead = loader.submit(load, position.step + 1)
                line = self._step(position, steps, step)
                self.ranks.first(partial(self._tell, line, log, events))
                numbers = {"rate": line["samples"] / max(line["seconds"], 1e-9)}
                numbers |= {name: line[name] for name in ("loss", "mfu") if line[name] is not None}
                self.context.progress(position.step, steps, **numbers)
                due = position.step < steps and self._save_due(position.step, saved)
                if self.ranks.any(due):
                    self.checkpoints.save(position, self.backend.snapshot)
                    saved = time.monotonic()
            self.checkpoints.wait()
        return self._finish(position, len(rows))

    def _leaving(self) -> bool:
        """Whether a rank was asked to leave.

        Raises:
            UserError: A checkpoint could not be written, on some rank.
        """
        told = self.ranks.every(lambda: [self.context.stopping(), self.checkpoints.failed()])
        if any(failed for _, failed in told):
            self.checkpoints.wait()
        return any(stopping for stopping, _ in told)

    def _tell(self, line: dict[str, Any], log: IO[str] | None, events: Events | None) -> None:
        assert log is not None
        with disk_errors(self.metrics):
            log.write(json.dumps(line) + "\n")
            log.flush()
        if events is not None:
            events.write(line)

    def _step(self, position: Position, steps: int, step: Step) -> dict[str, Any]:
        """One optimizer step; moves ``position`` on and returns the line to log."""
        began = time.monotonic()
        rate = self.config.rate(position.step, steps)
        position.step += 1
        position.dropped.update(step.dropped)
        line: dict[str, Any] = {"step": position.step, "loss": None, "grad_norm": None, "lr": rate}
        totals = step.totals
        if step.batches:
            bound = self._bound(position)
            outcome = self.backend.step(step.batches, totals, self.objective, rate, bound)
            if outcome.applied:
                position.samples += totals.samples
                line |= {"loss": outcome.loss, "grad_norm": outcome.grad_norm}
                line |= outcome.metrics
                if position.first_loss is None:
                    position.first_loss = outcome.loss
                position.last_loss = outcome.loss
                if self.config.spike_factor:
                    position.norms.append(outcome.grad_norm)
                    del position.norms[: -self.config.spike_window]
            else:
                if math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm):
                    line["grad_norm"] = outcome.grad_norm
                line["skipped"] = self._skip(position, outcome, step, bound)
        seconds = time.monotonic() - began
        position.tokens += totals.tokens
        position.seconds += seconds
        line |= {"samples": totals.samples, "tokens": totals.tokens}
        line |= {"target_tokens": totals.target_tokens, "seconds": round(seconds, 4)}
        # A step that is skipped takes the time of looking for the samples to blame as well.
        done = None if line["loss"] is None else self.peak
        line |= {"flops": step.flops, "mfu": utilisation(step.flops, seconds, done)}
        if totals.places:
            # What packing left empty, and what sharing prefixes saved.
            line["packing_efficiency"] = round(totals.tokens / totals.places, 4)
            line["shared_tokens"] = totals.unshared - totals.tokens
        if step.dropped:
            line["dropped"] = sorted(step.dropped)
        return line

    def _bound(self, position: Position) -> float:
        """The largest gradient norm that is no spike."""
        config = self.config
        if not config.spike_factor or len(position.norms) < config.spike_window:
            return math.inf
        return config.spike_factor * median(position.norms)

    def _skip(self, position: Position, outcome: Outcome, step: Step, bound: float) -> list[str]:
        """Records a step that was not applied; returns the keys of those to blame."""
        position.skipped += 1
        found = self.ranks.every(lambda: self._losses(step))
        losses = {key: loss for told in found for key, loss in told}
        if math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm):
            why = (
                f"the gradient norm of step {position.step} is {outcome.grad_norm:.4g}, above "
                f"{bound:.4g} (spike_factor times the last median)"
            )
            # No sample's share of a norm is known; those that fit worst come first.
            keys = sorted(losses, key=lambda key: (-(losses[key] or 0.0), key))[:SUSPECTS]
        else:
            what = "gradient" if math.isfinite(outcome.loss) else "loss"
            why = f"the {what} of step {position.step} is not a number"
            keys = sorted(key for key in losses if losses[key] is None) or sorted(losses)
        shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
        if position.skipped > self.config.max_skipped_steps:
            raise self._ended(
                f"{why}, and {position.skipped - 1} steps were skipped before (max_skipped_steps); "
                f"samples {shown}: mend or remove them, or lower the learning rate"
            )
        if self.ranks.lead:
            logger.warning("%s; it is skipped: %s", why, shown)
        return keys

    def _losses(self, step: Step) -> list[tuple[str, float | None]]:
        """The loss of each of this copy's samples alone; None where it is not a number."""
        found: list[tuple[str, float | None]] = []
        packer = self.backend.packer
        for sample in (sample for tree in step.trees for sample in tree.samples):
            loss = self.backend.loss(packer.alone(packer.tree(sample)), self.objective)
            found.append((sample.key, loss if math.isfinite(loss) else None))
        for _ in range(step.most - len(found)):  # copies ask equally often
            self.backend.loss(step.batches[0].idle(), self.objective)
        return found

    def _ended(self, why: str) -> BaseException:
        """What ends all ranks where all know of the trouble: the first one says it."""
        return UserError(why) if self.ranks.lead else SystemExit(2)

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
            raise self._ended(f"no step could be trained: {reasons or 'every step was skipped'}")
        part = self.out.with_name(self.out.name + ".part")
        self.ranks.first(lambda: _emptied(part))
        self.ranks.every(lambda: self._export(part))
        return self.ranks.first(lambda: self._complete(position, rows, part))

    def _export(self, part: Path) -> None:
        with writing(part):
            self.backend.export(part)

    def _complete(self, position: Position, rows: int, part: Path) -> Counts:
        shutil.rmtree(self.out, ignore_errors=True)
        part.replace(self.out)
        with (self.context.directory / "dropped.jsonl").open("w") as file:
            for key, reason in sorted(position.dropped.items()):
                file.write(json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n")
        too_long = sum(reason.startswith(TooLong.__name__) for reason in position.dropped.values())
        numbers = asdict(position)
        identity, dropped = numbers.pop("identity"), numbers.pop("dropped")
        del numbers["norms"]
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


def _emptied(folder: Path) -> None:
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def _cut_metrics(path: Path, step: int) -> None:
    """Keeps the lines up to ``step``: those after a checkpoint are made again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # A line that is cut off was being written when the process was killed.
    whole = [line for line in lines if line.endswith("\n")]
    kept = [line for line in whole if json.loads(line)["step"] <= step]
    write_atomic(path, "".join(kept))

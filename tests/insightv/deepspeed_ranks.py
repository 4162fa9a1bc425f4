"""What each rank does in the tests of the deepspeed backend; torchrun starts it.

``deepspeed_ranks.py FOLDER WORK…``: each piece of work is a JSON list of the name of a function
below and its arguments. In the folder lie ``pictures`` and the bases; results go there too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from training_case import Here, pair_rows, sample_rows

from hpc.stages import Row
from insightv.pictures import Pictures
from insightv.training import policy
from insightv.training.batches import Encoder, Example, encode_all
from insightv.training.checkpoint import Checkpoints
from insightv.training.config import DeepSpeedConfig, DPOConfig, SFTConfig
from insightv.training.deepspeed import backend as room
from insightv.training.deepspeed import starting
from insightv.training.deepspeed.backend import DeepSpeedBackend
from insightv.training.objectives import Objective, Preference, Supervised, Totals
from insightv.training.ranks import Ranks, joined
from insightv.training.trainer import train_dpo, train_sft

KINDS = ("sft", "dpo")
BUDGET = 700
"""Tokens of a micro-batch, so that a rank has several."""
REFERENCE = "0" * 16
_SETTINGS = starting.settings_of


def launch(ranks: int, folder: Path, *work: list[Any]) -> int:
    """Does the work on some ranks; returns torchrun's exit status."""
    here = Path(__file__)
    paths = [str(here.parents[2]), str(here.parent)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(here), str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *map(json.dumps, work)], env=environment).returncode


def config_of(kind: str, backend: str = "deepspeed", stage: int = 2, **keys: Any) -> Any:
    """A training's configuration: fp32 on a CPU, unclipped unless asked for."""
    cut = DeepSpeedConfig(zero_stage=stage, offload=keys.pop("offload", False))
    common = {"precision": "fp32", "device": "cpu", "grad_clip": 0.0}
    common |= {"backend": backend, "tokens_per_micro_batch": BUDGET}
    if backend == "deepspeed":
        common["deepspeed"] = cut
    return {"sft": SFTConfig, "dpo": DPOConfig}[kind](**(common | keys))


def rows_of(folder: Path, kind: str, count: int = 8) -> list[Row]:
    """Samples with 0, 1 and 2 pictures, or pairs with values as a reference would give them."""
    ids = json.loads((folder / "pictures.json").read_text())
    if kind == "sft":
        return sample_rows(ids, count)
    rows = pair_rows(ids, count)
    for number, row in enumerate(rows):
        row |= {"reference_chosen": -40.0 - number, "reference_rejected": -55.0 + number}
        row["reference_model"] = REFERENCE
    return rows


def examples_of(folder: Path, kind: str, processor: Any, count: int = 5) -> list[Example]:
    encoder = Encoder(processor, Pictures([folder / "pictures"]), 4096, 64)
    encode = encoder.sample if kind == "sft" else encoder.pair
    found, dropped = encode_all(rows_of(folder, kind, count), encode)
    assert not dropped
    return found


def objective_of(kind: str) -> Objective:
    return Preference(config_of(kind)) if kind == "dpo" else Supervised()


def whole_batch(backend: Any, examples: list[Example]) -> tuple[list[Any], Totals]:
    """This copy's micro-batches, and the totals of all copies'."""
    made = [
        backend.packer.batches(examples, copy, backend.copies) for copy in range(backend.copies)
    ]
    return made[backend.copy], sum((Totals.of(batches) for batches in made), Totals())


def gradients(ranks: Ranks, folder: Path, name: str, base: str, stage: int, keys: Any) -> None:
    """Loss, norm and whole gradients of a step of either kind; weights stay as they are."""
    backend = DeepSpeedBackend(folder / base, config_of("sft", stage=stage, **keys), ranks)
    found = _caught(backend)
    for kind in KINDS:
        examples = examples_of(folder, kind, backend.processor)
        outcome = backend.step(*whole_batch(backend, examples), objective_of(kind), 0.0)
        assert outcome.applied
        if stage == 3:  # nothing is held whole between steps
            assert not any(weight.numel() for weight in backend.model.parameters())
        if ranks.lead:
            told = {"loss": outcome.loss, "norm": outcome.grad_norm}
            tensors = {key: torch.tensor(value) for key, value in told.items()}
            save_file(found | tensors, folder / f"{name}-{kind}.safetensors")
    backend._engine.destroy()


def _caught(backend: Any) -> dict[str, torch.Tensor]:
    """Filled with the whole gradients that the optimizer is given, at each step."""
    from deepspeed.utils import safe_get_full_grad

    optimizer, found = backend._engine.optimizer, {}
    step = optimizer.step

    def look() -> None:
        found.clear()
        for name, weight in backend.model.named_parameters():
            if weight.requires_grad:
                found[f"gradient.{name}"] = safe_get_full_grad(weight).clone()
        step()

    optimizer.step = look
    return found


def sgd(ranks: Ranks, folder: Path, name: str, base: str, stage: int, rate: float) -> None:
    """20 steps of plain SGD on pairs; the model goes to ``folder / name``."""
    adam = room.adamw
    room.adamw = lambda weights, config: torch.optim.SGD(weights, rate)
    backend = DeepSpeedBackend(folder / base, config_of("dpo", stage=stage), ranks)
    batches, totals = whole_batch(backend, examples_of(folder, "dpo", backend.processor))
    for _ in range(20):
        assert backend.step(batches, totals, objective_of("dpo"), rate).applied
    (folder / name).mkdir(exist_ok=True)
    backend.export(folder / name)
    backend._engine.destroy()
    room.adamw = adam


def train(
    ranks: Ranks, folder: Path, name: str, kind: str, base: str, stage: int, keys: Any, stop_at: int
) -> None:
    """A training in ``folder / name``, stopped after some steps (0: not)."""
    keys = dict(keys)
    bad = keys.pop("bad", None)
    config = config_of(kind, stage=stage, **keys)
    trained(folder / name, kind, folder / base, config, stop_at, bad)


def trained(
    out: Path, kind: str, base: Path, config: Any, stop_at: int = 0, bad: str | None = None
) -> Any:
    rows = rows_of(out.parent, kind)
    if bad is not None:
        rows[4]["reference_rejected"] = float(bad)
    common = (rows, Pictures([out.parent / "pictures"]), out / "model", Here(out, stop_at))
    if kind == "sft":
        return train_sft(config, base, *common)
    return train_dpo(config, base, *common, REFERENCE)


def killed(ranks: Ranks, folder: Path, when: str, *arguments: Any) -> None:
    """A training whose second rank is killed before, during or after the second save."""
    saves, snapshot, begin = 0, DeepSpeedBackend.snapshot, Checkpoints.save

    def die() -> None:
        if saves == 2 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def taken(backend: Any) -> Any:
        write = snapshot(backend)

        def written(to: Path) -> None:
            write(to)
            if saves == 2 and ranks.rank == 1:
                time.sleep(1.0)  # meanwhile training goes on
                os.truncate(to / "zero-00001.safetensors", 1000)
            die()

        return written if when == "during" else write

    def saved(self: Any, *arguments: Any) -> None:
        nonlocal saves
        self.wait()
        saves += 1
        if when == "before":
            die()
        begin(self, *arguments)
        if when == "after":
            self.wait()
            die()

    DeepSpeedBackend.snapshot, Checkpoints.save = taken, saved
    train(ranks, folder, *arguments)


def _settings(config: Any) -> dict[str, Any]:
    """The backend's own, but that tiny tensors are cut as well, and SGD is taken."""
    settings = _SETTINGS(config) | {"zero_allow_untested_optimizer": True}
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


if __name__ == "__main__":
    torch.set_num_threads(1)
    policy.LOGITS = 5000  # the head is applied in pieces
    starting.settings_of = _settings
    with joined(config_of("sft")) as ranks:
        for text in sys.argv[2:]:
            name, *arguments = json.loads(text)
            globals()[name](ranks, Path(sys.argv[1]), *arguments)

"""Long sequences under the backends of several ranks; torchrun starts it.

``long_ranks.py FOLDER BACKEND NAME…``: for each name ``FAMILY:TOKENS:LAYOUT`` a step's
log-probabilities and gradients go into the folder. The bases lie there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from families import picture
from safetensors.torch import save_file

from insightv import chats
from insightv.records import Message
from insightv.training.batches import Example, Reply
from insightv.training.config import DeepSpeedConfig, SFTConfig
from insightv.training.megatron.layout import Layout
from insightv.training.objectives import Replies, Totals
from insightv.training.packing import Batch
from insightv.training.ranks import Ranks, joined

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"megatron": Layout(2)},
    "tp2-sp": {"megatron": Layout(2, sequence_parallel=True)},
    "pp2": {"megatron": Layout(1, 2)},
    "zero-3": {"deepspeed": DeepSpeedConfig(3)},
}


def launch(folder: Path, backend: str, names: list[str]) -> None:
    here = Path(__file__)
    paths = os.pathsep.join([str(here.parents[2]), str(here.parent)])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(here), str(folder), backend, *names]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True)


def examples(processor: Any, tokens: int) -> list[Example]:
    """A pair whose picture tiles, question and longer answer fill so many tokens; two short ones.

    One of these has no picture.
    """
    images = [picture(n, 300 + 90 * n, 340 - 60 * n) for n in range(3)]
    shown = [chats.encode_picture(processor, image) for image in images]
    question = (Message("user", "Read A. " * 40),)
    generator = torch.Generator().manual_seed(tokens)

    def pair(key: str, pictures: list[Any], *lengths: int) -> Example:
        prompt = chats.encode(processor, question, pictures)
        replies = []
        for length in lengths:
            ids = torch.randint(100, 400, (length,), generator=generator).tolist()
            marks = {k: [*v, *[0] * length] for k, v in prompt.marks.items()}
            whole = chats.Encoding(prompt.ids + ids, marks, prompt.pictures)
            replies.append(Reply(whole, ((len(prompt.ids), len(whole.ids)),)))
        return Example(key, tuple(replies))

    room = tokens - len(chats.encode(processor, question, shown).ids)
    return [
        pair("long", shown, room, room // 3),
        pair("small", shown[:1], 50, 90),
        pair("text", [], 70, 30),
    ]


def weighed(logps: torch.Tensor) -> torch.Tensor:
    """Some scalar of log-probabilities that no order or sign leaves alone."""
    return (logps * torch.linspace(-1, 2, len(logps))).sum() / len(logps)


class Weighed:
    """An objective that keeps what it is given."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def share(
        self, logps: torch.Tensor, batch: Batch, totals: Totals
    ) -> tuple[torch.Tensor, Replies | None]:
        total = logps.sum() * 0.0
        for number in range(batch.replies):
            mine = logps[batch.owners == number]
            total = total + weighed(mine)
            self.found[f"logps.{batch.keys[number // 2]}.{number % 2}"] = mine.detach().clone()
        return total, None

    def metrics(self, parts: Any) -> dict[str, float | bool]:
        return {}


def step(ranks: Ranks, folder: Path, name: str) -> None:
    """One step at rate 0; what each rank saw of it."""
    family, tokens, layout = name.split(":")
    kind = next(iter(LAYOUTS[layout]))
    config = SFTConfig(
        backend=kind,
        **LAYOUTS[layout],
        precision="fp32",
        device="cpu",
        grad_clip=0.0,
        beta1=0.0,  # the first moment is the gradient
        freeze_vision=False,
        tokens_per_micro_batch=2 * int(tokens),
    )
    objective, out = Weighed(), folder / name
    out.mkdir(exist_ok=True)
    if kind == "megatron":
        from insightv.training.megatron.backend import MegatronBackend

        backend: Any = MegatronBackend(folder / family, config, ranks)
        gradients: dict[str, torch.Tensor] = {}
    else:
        from deepspeed_ranks import _caught

        from insightv.training.deepspeed.backend import DeepSpeedBackend

        backend = DeepSpeedBackend(folder / family, config, ranks)
        gradients = _caught(backend)
    some = examples(backend.processor, int(tokens))
    batches = backend.packer.batches(some, backend.copy, backend.copies)
    widest = max(batch.width for batch in batches)
    outcome = backend.step(batches, Totals.of(batches), objective, 0.0)
    assert outcome.applied
    if kind == "megatron":
        backend.snapshot()(out)
    elif ranks.lead:
        save_file(gradients, out / "gradients.safetensors")
    shapes = {"width": torch.tensor(widest), "batches": torch.tensor(len(batches))}
    save_file(objective.found | shapes, out / f"rank-{ranks.rank}.safetensors")
    if kind == "deepspeed":
        backend._engine.destroy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, backend, *names = sys.argv[1:]
    with joined(SFTConfig(backend=backend, device="cpu")) as ranks:
        for name in names:
            step(ranks, Path(place), name)

"""Makes the embedded model again from nothing, on a CPU: ``python -m insightv.demo.pretrain``.

The model is taught on charts of *random* values, drawn as it goes (no table of any
question set is seen), and on the training pictures of easy-vqa. Three things make this
possible in the better part of an hour on two cores:

* a dense loss on the picture tokens: each patch, after the projector, must resemble the
  embeddings of the label and of the value of the mark it belongs to. The first minutes
  train nothing else, at ten times the pictures a second that the whole model would see;
* many short lessons share one picture: a block mask keeps them apart;
* plain bfloat16 attention and compiled layers (a third of the time of the defaults).

The scorer has dense losses of its own: at every value stated in a path, linear heads tell what
the picture shows and whether that is what is stated. All heads are thrown away afterwards.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from insightv.demo import tiny
from insightv.demo.learner import Learner
from insightv.demo.practice import sample_own_paths
from insightv.demo.teaching import SHAPES, Teacher, build_vocabulary, random_chart

FOLDER = Path(__file__).parent / "model"


@dataclass
class Options:
    """Settings of a pretraining run.

    Attributes:
        out: Folder to write.
        minutes: Time for training, start-up and compilation not counted.
        processes: Data-parallel processes, one thread each.
        rate: Peak learning rate.
        seed: Seed of weights and charts.
        compiled: Compile the layers (needs a C++ compiler); twice as fast.
        start: Folder of a model to go on from, with the last kind of lessons; none for a fresh
            one.
        seeing: Share of the time in which only the picture tokens are trained.
    """

    out: Path = FOLDER
    minutes: float = 40.0
    processes: int = 2
    rate: float = 1.5e-3
    seed: int = 0
    compiled: bool = True
    start: Path | None = None
    seeing: float = 0.4


def lesson_kind(spoken: float, rng: random.Random) -> str:
    """What to teach when a share ``spoken`` of the time with text has passed.

    First to speak, then to retrieve by label, and at last to reason and to judge; a fifth of
    the time there is no picture, which makes lines of work cheap to practise.
    """
    if spoken < 0.15:
        return rng.choices(("mixed", "thinking"), (8, 2))[0]
    if spoken < 0.3:
        return rng.choices(("mixed", "retrieval", "thinking"), (3, 5, 2))[0]
    kinds = ("mixed", "retrieval", "reasoning", "thinking", "scoring")
    return rng.choices(kinds, (12, 8, 35, 25, 20))[0]


def train(rank: int, options: Options, meeting: str) -> None:
    """One data-parallel process of the training; rank 0 writes the folder."""
    torch.set_num_threads(1)
    if options.processes > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=options.processes
        )
    if options.start is None:
        tokenizer = tiny.build_tokenizer(build_vocabulary())
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.start)
    teacher = Teacher(tokenizer, options.seed * 1000 + rank)
    schedule = random.Random(options.seed)  # the same kinds of lessons on every rank
    learner = Learner(tokenizer, options.seed, options.compiled, options.start)
    parameters = list(learner.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
    for kind in ("seeing", "mixed", *SHAPES):  # compile before the clock starts
        learner.loss(teacher.batch(kind), teacher, 1.0)[0].backward()
        optimizer.zero_grad()
    clock = Clock(options, rank)
    while (done := clock.done()) < 1:
        spoken = (done - options.seeing) / (1 - options.seeing)
        if options.start is not None and spoken >= 0:
            spoken = 0.3 + 0.7 * spoken
        if spoken > 0.5 and not teacher.sampled:
            learner.writing()
            teacher.sampled = sample_own_paths(learner.model, tokenizer, teacher.rng, random_chart)
            learner.learning()
            clock.note(sampled=len(teacher.sampled))
        rate = options.rate * min(1, done / 0.03) * (0.485 * (1 + math.cos(math.pi * done)) + 0.03)
        for group in optimizer.param_groups:
            group["lr"] = rate
        kind = "seeing" if spoken < 0 else lesson_kind(spoken, schedule)
        loss, parts = learner.loss(teacher.batch(kind), teacher, 1.0 if spoken < 0.4 else 0.3)
        loss.backward()
        average_gradients(parameters, options.processes)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(kind, parts)
        if rank == 0 and clock.due():
            learner.writing()
            save(learner.model, tokenizer, options.out, clock.log)
            learner.learning()
    if rank == 0:
        learner.writing()
        save(learner.model, tokenizer, options.out, clock.log)


def average_gradients(parameters: list[torch.nn.Parameter], processes: int) -> None:
    """One all-reduce over all gradients."""
    if processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:  # every rank reduces the same tensors
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    dist.all_reduce(flat)
    flat /= processes
    offset = 0
    for parameter in parameters:
        size = parameter.numel()
        assert parameter.grad is not None
        parameter.grad.copy_(flat[offset : offset + size].view_as(parameter))
        offset += size


class Clock:
    """Time of rank 0, shared by all, and the log."""

    def __init__(self, options: Options, rank: int):
        """Starts the time."""
        self.options, self.rank = options, rank
        self.began = time.monotonic()
        self.steps = 0
        self.log: list[dict] = []
        self._sums: dict[str, list[float]] = {}
        self._noted = self._saved = self.began

    def done(self) -> float:
        """Share of the time that has passed, the same on every rank."""
        share = torch.tensor((time.monotonic() - self.began) / (60 * self.options.minutes))
        if self.options.processes > 1:
            dist.broadcast(share, 0)
        return share.item()

    def step(self, kind: str, parts: dict[str, float]) -> None:
        """Counts a step; prints the means of the last half minute."""
        self.steps += 1
        for name, value in parts.items():
            self._sums.setdefault(f"{kind}_{name}", []).append(value)
        if time.monotonic() - self._noted > 30:
            self.note(**{name: sum(v) / len(v) for name, v in self._sums.items()})
            self._sums.clear()

    def note(self, **numbers: float) -> None:
        """Adds a line to the log."""
        self._noted = time.monotonic()
        minutes = (self._noted - self.began) / 60
        line = {"minutes": round(minutes, 2), "steps": self.steps}
        line |= {name: round(value, 3) for name, value in numbers.items()}
        self.log.append(line)
        if self.rank == 0:
            print(json.dumps(line), flush=True)

    def due(self) -> bool:
        """Whether five minutes have passed since the folder was last written."""
        if time.monotonic() - self._saved < 300:
            return False
        self._saved = time.monotonic()
        return True


def save(model: Any, tokenizer: Any, out: Path, log: list[dict]) -> None:
    """Writes the folder: half-precision safetensors, tokenizer, processor, log."""
    state = {name: value.to(torch.float16) for name, value in model.state_dict().items()}
    model.save_pretrained(out, state_dict=state)
    tiny.build_processor(tokenizer).save_pretrained(out)
    (out / "pretraining.json").write_text("\n".join(json.dumps(line) for line in log) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Pretrain the embedded model from nothing.")
    defaults = Options()
    parser.add_argument("--out", type=Path, default=defaults.out)
    parser.add_argument("--minutes", type=float, default=defaults.minutes)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rate", type=float, default=defaults.rate)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--start", type=Path, default=None)
    parser.add_argument("--seeing", type=float, default=defaults.seeing)
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    options = Options(**vars(parser.parse_args()))
    # Keep freed memory: mapping it anew for every step costs a tenth of the time.
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
    meeting = tempfile.mktemp(prefix="insightv-pretrain-")
    if options.processes == 1:
        train(0, options, meeting)
    else:
        torch.multiprocessing.spawn(train, (options, meeting), nprocs=options.processes)


if __name__ == "__main__":
    main()

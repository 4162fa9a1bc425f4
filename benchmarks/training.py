"""Our DPO and SFT beside TRL's: samples a second and peak memory, in one run on a CPU.

One small VLM (LLaVA-NeXT in front of a Llama, random weights), the same samples, the same
global batch, fp32, frozen vision tower, no recomputation. Pairs have a realistic shape: a
picture of several tiles, a short question, two answers of different length. ``dpo`` and
``sft`` have one row a picture; ``dpo-shared`` and ``sft-shared`` have as many as the sets that
the quickstart makes (several paths, and several pairs, of one question), and there we train
with ``share_pictures``. TRL is tried at each batch size that divides the global batch, we at
several token budgets; the best of each is compared. Our DPO includes the reference stage, as
TRL computes its reference in the step, and loading and exporting the model; TRL is timed from
`train()` on.

Time is processor time of one thread, so that other work on the machine does not enter; peak
memory is what a process that has imported everything grows by.

    python benchmarks/training.py [--pairs 32] [--samples 64] [--rounds 2] [--hidden 256]
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "insightv")]

import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from families import picture, save_family  # noqa: E402
from origin import origin  # noqa: E402

from insightv import chats, models  # noqa: E402
from insightv.pictures import Pictures, PictureWriter  # noqa: E402
from insightv.records import Message, PreferencePair, TrainingSample  # noqa: E402
from insightv.training.batches import Encoder  # noqa: E402
from insightv.training.config import DPOConfig, ReferenceConfig, SFTConfig  # noqa: E402
from insightv.training.reference import Reference  # noqa: E402
from insightv.training.trainer import train_dpo, train_sft  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "training.json"
TILE = 336
"""Pixels of a tile, LLaVA-NeXT's own: 576 tokens, so that a picture of 2 × 2 tiles has 2,928."""
BATCH = {"dpo": 8, "sft": 16}
BUDGETS = (4096, 16384)
KINDS = ("dpo", "sft", "dpo-shared", "sft-shared")
ROWS = {"dpo": {1: 46, 2: 198, 4: 55}, "sft": {1: 372, 2: 601, 3: 142}}
"""How many pictures of the quickstart's ``r1-pairs`` and ``set-reasoning`` (1,600 questions, seed
0) have so many rows."""
WORDS = (
    *("bar", "value", "axis", "read", "step", "chart", "compare"),
    *("sum", "highest", "lowest", "left", "right", "colour", "total"),
)


class Case:
    """The model folder, the pictures and the rows of both trainings."""

    def __init__(
        self, folder: Path, pairs: int, samples: int, hidden: int, layers: int, shared: bool
    ):
        generator = random.Random(0)
        self.folder, self.shared = folder, shared
        self.model = save_family(
            "llava-next", folder / "model", hidden=hidden, layers=layers, tile=TILE
        )
        sides = [(2 * TILE, 2 * TILE), (2 * TILE, 2 * TILE), (2 * TILE, TILE), (TILE, TILE)]

        def text(median: int) -> str:
            return " ".join(
                generator.choices(WORDS, k=int(generator.lognormvariate(0, 0.5) * median))
            )

        def asked(kind: str, count: int) -> list[tuple[str, Message]]:
            """A picture and a question for each row."""
            rows: list[tuple[str, Message]] = []
            while len(rows) < count:
                # Pairs: whole pictures. SFT: pictures of all sizes, as data sets mix them.
                size = sides[0] if kind == "dpo" else generator.choice(sides)
                data = io.BytesIO()
                picture(len(rows) + (kind == "sft") * pairs, *size).save(data, "PNG")
                one = (writer.add(data.getvalue()), Message("user", text(12)))
                sizes, weights = zip(*ROWS[kind].items(), strict=True)
                rows += [one] * (generator.choices(sizes, weights)[0] if shared else 1)
            return rows[:count]

        with PictureWriter(folder / "pictures") as writer:
            questions = {kind: asked(kind, n) for kind, n in (("dpo", pairs), ("sft", samples))}
        self.pictures = Pictures([folder / "pictures"])
        self.pairs = [
            PreferencePair(
                *(f"w{n}|l{n}", f"q{n}", (shown,), (question,)),
                *(text(50), text(70), "right>wrong"),
            ).to_json()
            for n, (shown, question) in enumerate(questions["dpo"])
        ]
        self.samples = [
            TrainingSample(
                *(f"s{n}", f"s{n}", (shown,)),
                (question, Message("assistant", text(90), train=True)),
                "plain",
            ).to_json()
            for n, (shown, question) in enumerate(questions["sft"])
        ]

    def lengths(self) -> dict[str, Any]:
        """Tokens of the samples, as our encoder counts them."""
        loaded = models.load(self.model, "cpu")
        encoder = Encoder(loaded.processor, self.pictures, 10**6, 64)
        pairs = [encoder.pair(row) for row in self.pairs]
        samples = [encoder.sample(row) for row in self.samples]
        return {
            "dpo": {
                "rows of a picture": rows_of_a_picture(self.pairs),
                "prompt": spread([pair.replies[0].spans[0][0] for pair in pairs]),
                "chosen": spread([pair.replies[0].targets for pair in pairs]),
                "rejected": spread([pair.replies[1].targets for pair in pairs]),
            },
            "sft": {
                "rows of a picture": rows_of_a_picture(self.samples),
                "prompt": spread([sample.replies[0].spans[0][0] for sample in samples]),
                "answer": spread([sample.replies[0].targets for sample in samples]),
            },
        }


def rows_of_a_picture(rows: list[Any]) -> float:
    """On average."""
    return round(len(rows) / len({tuple(row["pictures"]) for row in rows}), 2)


def spread(values: list[int]) -> dict[str, float]:
    """Smallest, quartiles, largest."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"min": min(values), "q1": low, "median": middle, "q3": high, "max": max(values)}


class Quiet:
    """A training's context that only stands there."""

    def __init__(self, directory: Path):
        self.run = self.directory = directory
        directory.mkdir(parents=True)

    def shards(self, role: str) -> Path:
        return self.directory / role

    def progress(self, done: int, total: int, **numbers: float) -> None:
        pass

    def stopping(self) -> bool:
        return False


def ours_dpo(case: Case, budget: int, folder: Path) -> Callable[[], Any]:
    config = DPOConfig(
        batch_size=BATCH["dpo"],
        terms={"sigmoid": 1.0},
        **ours(case, budget),
    )
    referring = ReferenceConfig(
        precision="fp32", device="cpu", tokens_per_batch=budget, share_pictures=case.shared
    )

    async def refer() -> tuple[list[Any], str]:
        reference = Reference(case.model, referring, case.pictures)
        try:
            return await reference("all", {"pairs": case.pairs}), reference.digest
        finally:
            await reference.close()

    def work() -> None:
        rows, digest = asyncio.run(refer())
        context = Quiet(folder / "stage")
        train_dpo(config, case.model, rows, case.pictures, folder / "out", context, digest)

    return work


def ours_sft(case: Case, budget: int, folder: Path) -> Callable[[], Any]:
    config = SFTConfig(batch_size=BATCH["sft"], **ours(case, budget))

    def work() -> None:
        context = Quiet(folder / "stage")
        train_sft(config, case.model, case.samples, case.pictures, folder / "out", context)

    return work


def ours(case: Case, budget: int) -> dict[str, Any]:
    return {
        "share_pictures": case.shared,
        "precision": "fp32",
        "device": "cpu",
        "epochs": 1,
        "learning_rate": 1e-5,
        "schedule": "constant",
        "tokens_per_micro_batch": budget,
    }


def theirs(folder: Path, size: int, batch: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": batch // size,
        "num_train_epochs": 1,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "max_length": None,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }


def peer(case: Case) -> models.LoadedModel:
    loaded = models.load(case.model, "cpu", "float32")
    models.freeze_vision(loaded.model)
    return loaded


def trl_dpo(case: Case, size: int, folder: Path) -> Callable[[], Any]:
    loaded, reference = peer(case), peer(case)
    eos = loaded.tokenizer.eos_token
    rows = []
    for row in case.pairs:
        prompt = [Message(**turn) for turn in row["prompt"]]
        rows.append(
            {
                "images": [case.pictures.image(row["pictures"][0])],
                "prompt": chats.render(loaded.processor, prompt, 1),
                "chosen": row["chosen"] + eos,
                "rejected": row["rejected"] + eos,
            }
        )
    trainer = trl.DPOTrainer(
        model=loaded.model,
        ref_model=reference.model,
        args=trl.DPOConfig(**theirs(folder, size, BATCH["dpo"])),
        train_dataset=Dataset.from_list(rows),
        processing_class=loaded.processor,
    )
    return trainer.train


def trl_sft(case: Case, size: int, folder: Path) -> Callable[[], Any]:
    loaded = peer(case)
    rows = []
    for row in case.samples:
        turns = [Message(**turn) for turn in row["messages"]]
        rows.append(
            {
                "images": [case.pictures.image(row["pictures"][0])],
                "prompt": chats.render(loaded.processor, turns[:1], 1),
                "completion": turns[1].text + loaded.tokenizer.eos_token,
            }
        )
    trainer = trl.SFTTrainer(
        model=loaded.model,
        args=trl.SFTConfig(completion_only_loss=True, **theirs(folder, size, BATCH["sft"])),
        train_dataset=Dataset.from_list(rows),
        processing_class=loaded.processor,
    )
    return trainer.train


def measured(build: Callable[..., Callable[[], Any]], case: Case, setting: int) -> dict[str, float]:
    """Runs one training in a fork of this process, which has imported everything."""
    ours, far = multiprocessing.get_context("fork").Pipe()

    def child() -> None:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work = build(case, setting, Path(folder))
            before = status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            far.send({"cpu": cpu, "wall": wall, "peak_mb": (status("VmHWM") - before) / 1024})

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    far.close()
    try:
        found: dict[str, float] = ours.recv()
    except EOFError:
        raise SystemExit(f"{build.__name__} at {setting} failed, see above") from None
    process.join()
    return found


def status(field: str) -> int:
    """Kilobytes of a memory figure of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS, metavar="KIND")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    results: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    counts = {"dpo": given.pairs, "sft": given.samples}
    for name in given.only:
        kind, _, shared = name.partition("-")
        with tempfile.TemporaryDirectory() as folder:
            size = (given.pairs, given.samples, given.hidden, given.layers)
            case = Case(Path(folder), *size, bool(shared))
            results[name] = {
                "versions": {
                    each.__name__: each.__version__.split("+")[0]
                    for each in (torch, transformers, trl)
                },
                "origin": origin(),
                "threads": 1,
                "model": {"hidden": given.hidden, "layers": given.layers, "tile": TILE},
                "tokens": case.lengths()[kind],
                "count": counts[kind],
                "batch": BATCH[kind],
                "rounds": given.rounds,
                **raced(name, case, counts[kind], given.rounds),
            }
        print(name, results[name]["best"], results[name]["speed_ratio"], flush=True)
        given.out.write_text(json.dumps(results, indent=1) + "\n")


def raced(name: str, case: Case, count: int, rounds: int) -> dict[str, Any]:
    """Each way at each of its settings, in turns, so that a busy minute hits all alike."""
    kind = name.partition("-")[0]
    build, rival = {"dpo": (ours_dpo, trl_dpo), "sft": (ours_sft, trl_sft)}[kind]
    trials = [("insightv", build, budget) for budget in BUDGETS]
    trials += [("trl", rival, size) for size in (1, 2, 4, 8, 16) if size <= BATCH[kind]]
    found: dict[str, dict[str, Any]] = {"insightv": {}, "trl": {}}
    for number in range(rounds):
        for who, make, setting in trials:
            one = measured(make, case, setting)
            print(f"{name} round {number} {who} {setting}: {one}", flush=True)
            best = found[who].get(str(setting))
            if best is None or one["cpu"] < best["cpu"]:
                found[who][str(setting)] = one | {"per_second": count / one["cpu"]}
    top = {
        who: max(settings.items(), key=lambda item: item[1]["per_second"])
        for who, settings in found.items()
    }
    (mine, us), (peers, them) = top["insightv"], top["trl"]
    return {
        **found,
        "best": {"insightv budget": int(mine), "trl batch": int(peers)},
        "speed_ratio": round(us["per_second"] / them["per_second"], 2),
        "memory_ratio": round(them["peak_mb"] / us["peak_mb"], 2),
    }


if __name__ == "__main__":
    main()

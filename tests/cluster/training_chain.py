"""A chain of two stages: pairs, and DPO on them with the megatron backend on several ranks.

As a program: ``training_chain.py submit RUN PROFILE``, ``status RUN``, and the payloads of
`hpc.control`. The base, its pictures and the pairs with their reference values lie in ``data``
beside the run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hpc import submission
from hpc.cluster import read_profile
from hpc.config import shaping
from hpc.control import payload
from hpc.disk import write_atomic
from hpc.errors import UserError
from hpc.rundir import Chain, RunDir
from hpc.shards import write_groups
from hpc.stages import Context, Counts, Stage
from hpc.status import status
from insightv.training.config import DPOConfig
from insightv.training.megatron.layout import Layout

STEPS = 24


def config(**more: Any) -> DPOConfig:
    values = {"precision": "fp32", "device": "cpu", "learning_rate": 1e-3, "batch_size": 3}
    return DPOConfig(**values, epochs=STEPS // 2, save_steps=4, freeze_vision=False, **more)


def make_chain(run: Path) -> Chain:
    data = run.parent / "data"
    training = config(backend="megatron", megatron=Layout(2, 2))

    def pairs(context: Context) -> Counts:
        rows = json.loads((data / "data.json").read_text())["pairs"]
        groups = [(row["key"], [row]) for row in rows]
        return {"shards": write_groups(context.directory / "shards", iter(groups), 2)}

    def dpo(context: Context) -> Counts | None:
        from insightv.pictures import Pictures
        from insightv.training.trainer import train_dpo

        shards, out = context.shards("pairs"), context.run / "models" / "dpo"
        pictures = Pictures([data / "pictures"])
        return train_dpo(training, data / "base", shards, pictures, out, context, data / "base")

    stages = [
        Stage("pairs", "job", run=pairs),
        Stage(
            "dpo",
            "job",
            {"pairs": "pairs"},
            config=shaping(training),
            run=dpo,
            outputs=("models/dpo",),
            resources="gpu",
            distributed=True,
        ),
    ]
    return Chain(stages, RunDir(run), [sys.executable, str(Path(__file__).resolve())])


def main(words: list[str]) -> int:
    command, path, *rest = words
    chain = make_chain(Path(path))
    try:
        if command == "submit":
            chain.run.create()
            write_atomic(chain.run.chain_file, f"steps: {STEPS}\n")
            print(submission.submit(chain, read_profile(Path(rest[0]))))
            return 0
        if command == "status":
            used = submission.hours(chain.run)
            print(json.dumps(status(chain, submission.job_counts(chain.run), used)))
            return 0
        return payload(chain, [command, *rest])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

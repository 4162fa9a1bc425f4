"""A chain in small, and how much work each of its stages is: what a forecast rests on.

A *unit* of a stage is what its time and its bytes grow with: a question, a path, a training
sample seen, a vote.
"""

from __future__ import annotations

import copy
import json
import math
from importlib.resources import files
from typing import Any

from hpc.cluster import Profile
from hpc.errors import UserError
from hpc.forecasting import Forecast, Measured, extrapolate, measure, path_of
from hpc.retention import size
from hpc.rundir import Chain, RunDir
from insightv.chain import ENTRIES
from insightv.config import MOST_ROUNDS, SETS, ChainConfig
from insightv.demo.sets import Sizes
from insightv.evaluation.benchmark_scores import SCORES
from insightv.evaluation.stopping import CHOICE
from insightv.folders import model_folder

_SPLITS = ("train", "validation", "test")
_SHARDS = 8  # enough to see how much they differ
_ALIKE = {
    "sft": "sft-reasoning",
    "set": "set-reasoning",
    "eval": "eval-multi-agent",
    "lmms": "eval-multi-agent",
}
_TASK = 1000
"""Questions of a benchmark, about: how many is known to lmms-eval alone."""


def small(config: ChainConfig, share: float, floor: int) -> ChainConfig:
    """The same chain on a share of its questions; everything else is as it was.

    Args:
        config: The whole chain.
        share: Of each set and split.
        floor: But so many at least, where there are so many.

    Raises:
        UserError: The share is none, or the floor is negative.
    """
    if not 0 < share <= 1 or floor < 0:
        raise UserError(f"share {share:g}, floor {floor}: give a share up to 1 and 0 or more")
    made = copy.deepcopy(config)
    for split in _SPLITS:
        for name, whole in config.questions.asked(split).items():
            if name in SETS:
                sizes = getattr(made.questions, name)
            else:
                sizes = made.questions.take.setdefault(name, Sizes())
            setattr(sizes, split, min(whole, max(math.ceil(whole * share), floor)))
    if made.benchmarks.tasks:
        whole = config.benchmarks.limit or _TASK
        made.benchmarks.limit = min(whole, max(math.ceil(whole * share), floor, 1))
    total = _questions(made, "train")
    # A forecast is of all rounds; and so few questions decide nothing.
    made.rounds.early_stop.patience = MOST_ROUNDS
    made.questions.per_shard = max(min(config.questions.per_shard, -(-total // _SHARDS)), 1)
    return made


def units(config: ChainConfig, chain: Chain) -> dict[str, float]:
    """How much work each stage of a chain is."""
    return {name: max(_units(config, name), 1.0) for name in chain.stages}


def _units(config: ChainConfig, name: str) -> float:
    first, _, rest = name.partition("-")
    if "lmms" in (first, rest):
        return len(config.benchmarks.tasks) * (config.benchmarks.limit or _TASK)
    if first == "questions":
        return _questions(config, rest)
    train, asked = _questions(config, "train"), _questions(config, config.evaluation.split)
    if first == "set":
        return train
    if first == "sft":
        training = getattr(config.training, rest.replace("-", "_"))
        return _seen(training, train)
    if first == "eval":
        entry = rest.replace("-", "_")
        votes = config.evaluation.votes if ENTRIES[entry][0] == "majority" else 1
        return asked * votes
    if first in ("results", "report"):
        return asked
    if rest == "validate":
        reasoned = (getattr(config.questions, name) for name in config.questions.reasoned)
        return sum(sizes.validation for sizes in reasoned)
    if rest == "decide" or name == CHOICE:
        return 1.0
    paths = _paths(config, first, rest)
    return _seen(config.rounds.dpo, paths) if rest in ("dpo", "train") else paths


def _paths(config: ChainConfig, prefix: str, what: str) -> float:
    """Paths of a round, or behind its pairs."""
    rounds = config.rounds
    asked = config.questions.asked("train")
    reasoned = sum(asked[name] for name in config.questions.reasoned)
    if prefix == "r0":
        return reasoned * config.generation.paths
    if prefix == "dpo" and rounds.single_paths:
        return reasoned * rounds.single_paths
    one = reasoned * rounds.generation.paths
    return one * max(rounds.count, 1) if prefix == "dpo" else one


def _questions(config: ChainConfig, split: str) -> int:
    return sum(config.questions.asked(split).values())


def _seen(training: Any, samples: float) -> float:
    """Samples that a training sees, were all of them kept."""
    most = samples * training.epochs
    return min(most, training.max_steps * training.batch_size) if training.max_steps else most


# ---- forecasts


def forecast_of(config: ChainConfig, chain: Chain, profile: Profile) -> Forecast:
    """What a chain will take: by its rehearsal, else by what is known of the quickstart.

    Without a rehearsal there are no times, and bytes are those of another model's records.
    """
    rehearsed = rehearsal_of(chain.run)
    if rehearsed.chain_file.exists() and path_of(chain.run).exists():
        found = from_rehearsal(config, chain, profile)
        return found or _from_quickstart(config, chain, profile)
    return _from_quickstart(config, chain, profile)


def rehearsal_of(run: RunDir) -> RunDir:
    """The run directory of a run's rehearsal."""
    return RunDir(run.path / "rehearsal")


def from_rehearsal(config: ChainConfig, chain: Chain, profile: Profile) -> Forecast | None:
    """A forecast from a run's rehearsal; None unless that is complete for this very chain."""
    from insightv.chain import assemble
    from insightv.chainfile import read

    rehearsed = rehearsal_of(chain.run)
    done = read(rehearsed.chain_file)
    before = assemble(done, rehearsed)
    measured = measure(before, units(done, before))
    if set(chain.stages) - set(measured):
        return None
    count = sum(_questions(done, split) for split in ("train", done.evaluation.split))
    source = f"the rehearsal on {count} questions"
    per_shard = config.questions.per_shard
    return extrapolate(chain, profile, measured, units(config, chain), per_shard, source)


def _from_quickstart(config: ChainConfig, chain: Chain, profile: Profile) -> Forecast:
    known = json.loads((files("insightv") / "measured.json").read_text(encoding="utf-8"))
    measured = {name: Measured(**item) for name, item in known["stages"].items()}
    alike = {name: measured[_alike(name, measured)] for name in chain.stages}
    folder = model_folder(config.models.base.path)
    base = size(folder) if folder.exists() else 0  # `plan` says that it is not here
    return extrapolate(
        chain,
        profile,
        alike,
        units(config, chain),
        config.questions.per_shard,
        known["source"],
        timed=False,
        models=base / known["base_bytes"],
    )


def _alike(name: str, measured: dict[str, Measured]) -> str:
    """The measured stage that does most nearly the same."""
    first, _, rest = name.partition("-")
    if name in measured:
        return name
    if name == SCORES:
        return "results"
    if first in _ALIKE:
        return _ALIKE[first]
    if first == "questions":
        return "questions-test"
    if rest == "validate":
        return _ALIKE["eval"]
    if rest == "decide" or name == CHOICE:
        return "results"
    return f"r1-{rest}" if f"r1-{rest}" in measured else "r1-generate"


def record(config: ChainConfig, chain: Chain, source: str) -> dict[str, Any]:
    """What a complete run of the quickstart tells later plans; written to ``measured.json``."""
    found = measure(chain, units(config, chain), timed=False)
    base = size(model_folder(config.models.base.path))
    times = ("seconds", "ready", "starts", "gap")
    stages = {
        name: {key: value for key, value in vars(item).items() if key not in times}
        for name, item in found.items()
    }
    return {"source": source, "base_bytes": base, "stages": stages}

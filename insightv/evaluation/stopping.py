"""Early stop: whether a round of preference optimisation was worth it, by the validation split.

After SFT (round 0) and after every round the pair of agents answers the validation questions.
A round gains if it answers more of them rightly than the best round before it, on the questions
that both have decided; the test split is never looked at.
"""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.errors import UserError
from hpc.rundir import RunDir
from hpc.shards import read_rows
from hpc.stages import Counts
from insightv.evaluation.funnel import known
from insightv.evaluation.statistics import paired_difference
from insightv.records import Question

QUESTIONS = "questions-validation"
CHOICE = "choose-round"
"""The stage that takes over the best round's model."""


@dataclass
class EarlyStopConfig:
    """Ends rounds that gain nothing.

    The pair of agents answers the validation questions after SFT and after every round, beside
    the next round's generation; all that follows there waits for the decision. The entry
    ``iterative_dpo`` then has the model of the best round, which may be SFT's own (round 0).

    Attributes:
        enabled: Off: the paper makes all of its rounds.
        patience: So many rounds in a row without a gain end the rounds.
        min_gain: A round gains if its accuracy on the validation split lies by more than this
            above that of the best round before it, on the questions that both have decided;
            0.01 is a point. 0: any gain counts, chance's as well, for a few hundred questions
            cannot tell differences of less than some points.
    """

    enabled: bool = False
    patience: int = 1
    min_gain: float = 0.0

    def validate(self, where: str) -> None:
        """Checks the values.

        Raises:
            UserError: One of them is not possible.
        """
        if self.patience < 1:
            raise UserError(f"{where}.patience is {self.patience}: give 1 or more")
        if not -1 <= self.min_gain <= 1:
            raise UserError(f"{where}.min_gain is {self.min_gain}: give a share from -1 to 1")


def validation(number: int) -> str:
    """The stage in which a round's pair of agents answers the validation questions."""
    return f"r{number}-validate"


def decision(number: int) -> str:
    """The stage that decides after a round."""
    return f"r{number}-decide"


def model_of(number: int) -> str:
    """The reasoning agent after a round, in the run."""
    return "models/reasoning" if number == 0 else f"models/reasoning-r{number}"


def decide(run: Path, number: int, last: int, config: EarlyStopConfig, seed: int) -> Counts:
    """Whether further rounds follow on this one.

    Args:
        run: The run directory.
        number: The round, from 1.
        last: The number of the last round there may be.
        config: When to stop.
        seed: Of the resamples behind the interval, which is only told.

    Returns:
        The round, the best before it (``against``), the accuracy of both, the ``gain`` with
        ``ci95`` on ``n`` questions, the ``best`` by now, how many rounds in a row have gained
        nothing (``waited``), all that in words (``said``), and ``skip``: why the rounds end
        here, or nothing.
    """
    before = _counts(RunDir(run), number - 1) if number > 1 else {"best": 0, "waited": 0}
    against = int(before["best"])
    groups = _groups(run)
    now, then = _answers(run, number), _answers(run, against)
    keys = [key for key in groups if now.get(key) is not None and then.get(key) is not None]
    right, wrong = [bool(now[key]) for key in keys], [bool(then[key]) for key in keys]
    found = paired_difference(right, wrong, [groups[key] for key in keys], seed)
    gained = bool(keys) and found.value > config.min_gain
    waited = 0 if gained else int(before["waited"]) + 1
    told: Counts = {
        "round": number,
        "against": against,
        "accuracy": sum(right) / len(keys) if keys else None,
        "accuracy_before": sum(wrong) / len(keys) if keys else None,
        "gain": known(found.value),
        "ci95": [found.low, found.high] if keys else None,
        "n": len(keys),
        "best": number if gained else against,
        "waited": waited,
    }
    told["said"] = _said(told)
    stops = waited >= config.patience and number < last
    rounds = "it" if waited == 1 else f"the last {waited} rounds"
    wanted = f" of more than {100 * config.min_gain:g} points" if config.min_gain else ""
    ended = f"stopped after round {number}, for {rounds} brought no gain{wanted}: {told['said']}"
    return told | {"skip": ended if stops else ""}


def choose(run: Path, last: int, target: str) -> Counts:
    """Takes over the best round's model under a name of its own, by hard links.

    Returns:
        The ``chosen`` round, its model (``from``), and why, in words (``said``).
    """
    made = [told for told in decisions(run) if told["round"] <= last]
    chosen = int(made[-1]["best"])
    source = model_of(chosen)
    folder, aside = run / target, run / "models" / f".chosen-{uuid.uuid4().hex}"
    try:
        ignored = shutil.ignore_patterns("checkpoints")
        shutil.copytree(run / source, aside, copy_function=os.link, ignore=ignored)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    rounds = "round 0, the SFT model," if chosen == 0 else f"round {chosen}"
    said = f"{rounds} is the best of {len(made) + 1} on the validation split"
    return {"chosen": chosen, "from": source, "said": said}


def decisions(run: Path) -> list[dict[str, Any]]:
    """What was decided after each round that was made, in order."""
    found, number = [], 1
    while counts := _counts(RunDir(run), number):
        found.append(counts)
        number += 1
    return found


def summary(run: Path) -> dict[str, Any] | None:
    """How the rounds ended; None for a run without early stop, or whose rounds are under way.

    Returns:
        ``{"stopped_after", "reason", "chosen", "said", "rounds"}``: the round after which no
        further one was made (null where all were), why, the round whose model was taken and
        why, and what was decided after each round.
    """
    choice = RunDir(run).read_manifest(CHOICE)
    if choice is None:
        return None
    made = decisions(run)
    last = made[-1]
    return {
        "stopped_after": last["round"] if last["skip"] else None,
        "reason": last["skip"],
        "chosen": choice["counts"]["chosen"],
        "said": choice["counts"]["said"],
        "rounds": made,
    }


def _said(told: Counts) -> str:
    names = ["SFT" if told["against"] == 0 else f"round {told['against']}", "the best before"]
    if not told["n"]:
        return f"no validation question was decided both after it and after {names[0]}"
    low, high = told["ci95"]
    return (
        f"{100 * told['accuracy']:.1f} % right of {told['n']} validation questions, "
        f"{100 * told['gain']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}] "
        f"against {', '.join(names)}"
    )


def _counts(run: RunDir, number: int) -> dict[str, Any]:
    """What was decided after a round; nothing where that was not made."""
    manifest = run.read_manifest(decision(number)) or {}
    found: dict[str, Any] = manifest.get("counts") or {}
    return found


def _groups(run: Path) -> dict[str, str]:
    """Each validation question with what it is resampled by: its table, else itself."""
    rows = map(Question.from_json, read_rows(RunDir(run).shards(QUESTIONS)))
    return {row.key: row.group or row.key for row in rows}


def _answers(run: Path, number: int) -> dict[str, bool | None]:
    rows = read_rows(RunDir(run).shards(validation(number)))
    return {row["question"]: row["correct"] for row in rows}

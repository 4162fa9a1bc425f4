"""Finished runs beside each other: seeds pooled, sizes and rounds as curves.

Runs that differ in nothing but their seed form one condition. Its seeds answer the same
questions, so they are pooled by concatenation and whole tables are resampled with everything
that any seed said about them: an interval speaks of other tables under these seeds. How much
another seed would change is told by the values of each seed, which stand beside it.

Everything is read from the runs' predictions, never from their summaries.
"""

from __future__ import annotations

import itertools
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.config import digest, load, shaping
from hpc.errors import UserError
from hpc.rundir import RunDir, read_json
from insightv.config import ChainConfig
from insightv.evaluation.funnel import known
from insightv.evaluation.results import (
    CARD,
    PAPER,
    Asked,
    confusion,
    ladder_place,
    paper_difference,
    read_predictions,
    turned,
)
from insightv.evaluation.statistics import Estimate, accuracy, paired_difference

Comparison = dict[str, Any]

IGNORED = ("seed", "evaluation.entries", "evaluation.resamples_seed")
"""Keys in which the runs of one condition may differ: none shapes what an entry answers,
but the seed, which is what is pooled."""

SIZE, ROUNDS = "reasoning_set.size", "rounds.count"
SET_STAGE = "set-reasoning"
"""The stage that tells how many samples a size came to."""

START = "multi_agent"
"""The entry that the rounds of preference optimisation start from: their round 0."""


@dataclass(frozen=True)
class Member:
    """One run of a condition: where it is, its seed, and what its entries answered."""

    path: Path
    seed: int
    asked: Asked

    @property
    def entries(self) -> list[str]:
        """Its entries in the ladder's order, the judge's card left out."""
        names = (name for name in self.asked.told if name.rpartition(":")[2] not in CARD)
        return sorted(names, key=ladder_place)


@dataclass(frozen=True)
class Condition:
    """A configuration, by dotted keys, and its runs in the order of their seeds."""

    config: Mapping[str, Any]
    members: tuple[Member, ...]

    @property
    def entries(self) -> list[str]:
        """Entries that any of its runs has."""
        return sorted({name for run in self.members for name in run.entries}, key=ladder_place)

    @property
    def benchmarks(self) -> list[str]:
        """Question sets that any of its runs answered, ``charts`` first."""
        names = {name for run in self.members for name in run.asked.benchmarks}
        return sorted(names, key=lambda name: (name != "charts", name))

    def having(self, *entries: str) -> list[Member]:
        """The runs that have all of these entries."""
        return [run for run in self.members if all(name in run.asked.told for name in entries)]


def compare(runs: Sequence[Path], seed: int = 0) -> Comparison:
    """Puts finished runs beside each other.

    Args:
        runs: Run directories; at least one.
        seed: Of the resamples.

    Returns:
        ``conditions``: one for each configuration, the one with most entries and runs first:
        ``label``, ``seeds``, ``runs``, ``ladder``, ``differences`` (rows as in ``results.json``,
        with the value of each seed), ``confusion``, ``judge_card``. ``curves``: one for each
        key in which conditions differ: ``key``, ``points``, ``changes``.

    Raises:
        UserError: A folder is no run or has no predictions, a run is named twice, or the runs
            of one condition answered different questions.
    """
    conditions = read_runs(runs)
    varying = _varying(conditions)
    return {
        "seed": seed,
        "conditions": [_told(condition, varying, seed) for condition in conditions],
        "curves": [
            curve
            for key in varying
            for family in _families(conditions, key)
            if (curve := _curve(family, key, [name for name in varying if name != key], seed))
        ],
    }


def read_runs(runs: Sequence[Path]) -> list[Condition]:
    """Reads runs and puts those together that differ in their seed alone."""
    found: dict[str, tuple[dict[str, Any], list[Member]]] = {}
    for path in dict.fromkeys(Path(path).resolve() for path in runs):
        run = RunDir(path)
        if not run.chain_file.is_file():
            raise UserError(f"{path} is no run directory: it has no chain.yaml")
        config = shaping(load(ChainConfig, run.chain_file), defaults=True)
        member = Member(path, config["seed"], read_predictions(path))
        if not member.entries:
            raise UserError(f"{path}: no entry of the ladder is complete; `insightv run` first")
        flat = {key: value for key, value in _flat(config) if key not in IGNORED}
        _, members = found.setdefault(digest(flat), (flat, []))
        _refuse_twins(members, member)
        members.append(member)
    conditions = [
        Condition(config, tuple(sorted(members, key=lambda member: member.seed)))
        for config, members in found.values()
    ]
    return sorted(conditions, key=lambda one: (-len(one.entries), -len(one.members)))


def _refuse_twins(members: Sequence[Member], member: Member) -> None:
    """Refuses what cannot be pooled.

    Raises:
        UserError: Two runs are the same draw, or answered different questions.
    """
    for other in members:
        if other.seed == member.seed:
            raise UserError(
                f"{other.path} and {member.path} have the same configuration and seed "
                f"{member.seed}; name one of them"
            )
        mine, theirs = (run.asked.questions for run in (member, other))
        if any(theirs.get(key, place) != place for key, place in mine.items()):
            raise UserError(
                f"{other.path} and {member.path} answered different questions under the same "
                "keys; make them with the same version"
            )


# ---- one condition


def _told(condition: Condition, varying: Sequence[str], seed: int) -> dict[str, Any]:
    main, *others = condition.benchmarks
    return {
        "label": _label(condition, varying),
        "runs": [run.path.name for run in condition.members],
        "seeds": [run.seed for run in condition.members],
        "commands": [_command(run.path) for run in condition.members],
        "entries": condition.entries,
        "benchmarks": condition.benchmarks,
        "ladder": [
            _rung(condition, entry, benchmark, seed)
            for benchmark in condition.benchmarks
            for entry in condition.entries
        ],
        "differences": [
            *(
                _difference(condition, second, first, main, seed)
                for first, second in itertools.combinations(condition.entries, 2)
            ),
            *(
                _difference(condition, entry, "base", benchmark, seed)
                for benchmark in others
                for entry in condition.entries
                if entry != "base" and "base" in condition.entries
            ),
        ],
        "confusion": _confusion(condition),
        "judge_card": _judge_card(condition, seed),
    }


def _rung(condition: Condition, entry: str, benchmark: str, seed: int) -> dict[str, Any]:
    """One entry on one benchmark, over all seeds."""
    members = condition.having(entry)
    right: list[bool] = []
    tables: list[str] = []
    by_seed: dict[int, float | None] = {}
    told = undecided = tokens = 0
    for run in members:
        rows = run.asked.told[entry]
        keys = run.asked.decided(entry, benchmark=benchmark)
        answers = [bool(rows[key].correct) for key in keys]
        by_seed[run.seed] = sum(answers) / len(answers) if answers else None
        right += answers
        tables += [run.asked.questions[key][2] for key in keys]
        asked = [row for key, row in rows.items() if run.asked.questions[key][0] == benchmark]
        told, undecided = told + len(asked), undecided + len(asked) - len(keys)
        tokens += sum(row.tokens for row in asked)
    estimate = accuracy(right, tables, seed)
    return {
        "name": entry,
        "benchmark": benchmark,
        "accuracy": known(estimate.value),
        **_interval(estimate),
        "by_seed": by_seed,
        "undecided": undecided,
        "failed": sum(run.asked.failed.get(entry, Counter())[benchmark] for run in members),
        "tokens": tokens / told if told else None,
        "paper": PAPER.get(entry) if benchmark == "charts" else None,
    }


def _difference(
    condition: Condition, entry: str, other: str, benchmark: str, seed: int
) -> dict[str, Any]:
    """``entry`` minus ``other`` over the seeds that have both."""
    sides = [(run, run) for run in condition.having(entry, other)]
    return {
        "entry": entry,
        "other": other,
        "benchmark": benchmark,
        **_paired(sides, entry, other, benchmark, seed),
        "paper": paper_difference(entry, other) if benchmark == "charts" else None,
    }


def _paired(
    sides: Iterable[tuple[Member, Member]], entry: str, other: str, benchmark: str, seed: int
) -> dict[str, Any]:
    """An entry of the first runs minus an entry of the second, pair by pair of runs."""
    first: list[bool] = []
    second: list[bool] = []
    tables: list[str] = []
    by_seed: dict[int, float | None] = {}
    for one, two in sides:
        shared = set(two.asked.decided(other, benchmark=benchmark))
        keys = [key for key in one.asked.decided(entry, benchmark=benchmark) if key in shared]
        mine = [bool(one.asked.told[entry][key].correct) for key in keys]
        theirs = [bool(two.asked.told[other][key].correct) for key in keys]
        by_seed[one.seed] = (sum(mine) - sum(theirs)) / len(keys) if keys else None
        first, second = first + mine, second + theirs
        tables += [one.asked.questions[key][2] for key in keys]
    estimate = paired_difference(first, second, tables, seed)
    return {"difference": known(estimate.value), **_interval(estimate), "by_seed": by_seed}


def _interval(estimate: Estimate) -> dict[str, Any]:
    ends = [estimate.low, estimate.high] if estimate.n else None
    return {"ci95": ends, "n": estimate.n, "groups": estimate.groups}


def _confusion(condition: Condition) -> dict[str, dict[str, int]]:
    """Counts of reasoning × answer on the main benchmark, summed over seeds."""
    summed: dict[str, Counter[str]] = defaultdict(Counter)
    for run in condition.members:
        for entry, counts in confusion(run.asked, run.entries).items():
            summed[entry].update(counts)
    return {entry: dict(summed[entry]) for entry in condition.entries if entry in summed}


def _judge_card(condition: Condition, seed: int) -> dict[str, Any] | None:
    """The summary agent by whose reasoning it is given, over the seeds that have the card."""
    names = {name for run in condition.members for name in run.asked.told if name.endswith(":none")}
    if not names:
        return None
    name = min(names).rpartition(":")[0]
    entries = {mode: f"{name}:{mode}" for mode in CARD}
    members = condition.having(*entries.values())
    right: dict[str, list[bool]] = {mode: [] for mode in CARD}
    tables: list[str] = []
    for run in members:
        keys = run.asked.decided(*entries.values(), benchmark=condition.benchmarks[0])
        tables += [run.asked.questions[key][2] for key in keys]
        for mode, entry in entries.items():
            right[mode] += [bool(run.asked.told[entry][key].correct) for key in keys]
    estimates = {mode: accuracy(right[mode], tables, seed) for mode in CARD}
    given = [mode for mode in CARD if mode != "none"]
    return {
        "benchmark": condition.benchmarks[0],
        "seeds": [run.seed for run in members],
        **{mode: known(estimates[mode].value) for mode in CARD},
        "ci95": {mode: _interval(estimates[mode])["ci95"] for mode in CARD},
        "harm": {mode: turned(right["none"], right[mode], was=True) for mode in given},
        "rescue": {mode: turned(right["none"], right[mode], was=False) for mode in given},
    }


# ---- conditions beside each other


def _varying(conditions: Sequence[Condition]) -> list[str]:
    """The dotted keys in which conditions differ."""
    keys = dict.fromkeys(key for condition in conditions for key in condition.config)
    return [
        key
        for key in keys
        if len({digest({"": condition.config.get(key)}) for condition in conditions}) > 1
    ]


def _families(conditions: Sequence[Condition], key: str) -> Iterator[list[Condition]]:
    """Conditions that differ in one key and nothing else, two or more of them."""
    families: dict[str, list[Condition]] = defaultdict(list)
    for condition in conditions:
        rest = {name: value for name, value in condition.config.items() if name != key}
        families[digest(rest)].append(condition)
    yield from (family for family in families.values() if len(family) > 1)


def _curve(
    family: Sequence[Condition], key: str, others: Sequence[str], seed: int
) -> dict[str, Any] | None:
    """Accuracy against a key, an entry a line, in the order of the key's values.

    ``changes`` holds, for each entry, the last value minus the first, paired by seed and
    question.
    """
    at = {id(condition): _abscissa(condition, key) for condition in family}

    def order(condition: Condition) -> tuple[bool, float]:
        x = at[id(condition)]
        return x is None, x or 0.0

    family = sorted(family, key=order)
    main = family[0].benchmarks[0]
    points, changes = [], []
    for entry in dict.fromkeys(name for condition in family for name in condition.entries):
        having = [condition for condition in family if condition.having(entry)]
        rows = [
            _point(at[id(condition)], condition, entry, entry, key, main, seed)
            for condition in having
        ]
        origin = next((condition for condition in having if condition.having(START)), None)
        if key == ROUNDS and entry in ("dpo", "iterative_dpo") and origin and rows[0]["x"]:
            rows.insert(0, _point(0.0, origin, START, entry, key, main, seed) | {"value": 0})
        points += rows
        if len(having) > 1 and (sides := list(_same_seeds(having[-1], having[0]))):
            change = _paired(sides, entry, entry, main, seed)
            ends = {"entry": entry, "from": having[0].config[key], "to": having[-1].config[key]}
            changes.append(ends | change)
    if len({repr(point["value"]) for point in points}) < 2:
        return None
    return {
        "key": key,
        "label": _label(family[0], others),
        "benchmark": main,
        "points": sorted(points, key=lambda point: ladder_place(point["entry"])),
        "changes": sorted(changes, key=lambda change: ladder_place(change["entry"])),
    }


def _point(
    x: float | None, condition: Condition, entry: str, line: str, key: str, main: str, seed: int
) -> dict[str, Any]:
    """What ``entry`` reached in a condition, as a point of ``line``."""
    rung = _rung(condition, entry, main, seed)
    kept = {name: rung[name] for name in ("accuracy", "ci95", "n", "by_seed")}
    return {"entry": line, "value": condition.config[key], "x": x, **kept}


def _same_seeds(one: Condition, other: Condition) -> Iterator[tuple[Member, Member]]:
    """Runs of two conditions with the same seed."""
    seeds = {run.seed: run for run in other.members}
    yield from ((run, seeds[run.seed]) for run in one.members if run.seed in seeds)


def _abscissa(condition: Condition, key: str) -> float | None:
    """Where a condition stands on a curve; None where its value is no number.

    A size is a limit: what counts is how many samples the sets came to, on average.
    """
    if key == SIZE:
        kept = [kept for run in condition.members if (kept := _kept(run.path)) is not None]
        if kept:
            return sum(kept) / len(kept)
    value = condition.config[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number else None


def _kept(run: Path) -> int | None:
    counts = (RunDir(run).read_manifest(SET_STAGE) or {}).get("counts", {})
    kept: int | None = counts.get("kept")
    return kept


def _label(condition: Condition, keys: Iterable[str]) -> str:
    """What a condition is known by among the others."""
    said = ((key, condition.config.get(key)) for key in keys)
    return ", ".join(f"{key}={'all' if value is None else value}" for key, value in said)


def _command(run: Path) -> str:
    """The command a run was first started with."""
    starts = (read_json(RunDir(run).provenance) or {}).get("starts") or [{}]
    words = starts[0].get("command") or []
    return shlex.join(["insightv", *words[1:]]) if words else ""


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

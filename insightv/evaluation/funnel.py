"""From questions to pairs: what each round generated, how it was judged, what was kept.

Reads shards as a stream: a paper-sized round (1.6 million paths) needs memory for its
counts only. A stage that is not complete is left out; the page says so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc import shards
from hpc.rundir import RunDir
from hpc.stages import Row
from insightv.assessment.scoring import RETEST
from insightv.evaluation.statistics import agreement, auc

OUTCOMES = ("right", "wrong", "undecided")
BINS = 20
_ROUND = re.compile(r"r(\d+)-")
CONTROL = "dpo"
"""Prefix of the stages of the one-round control."""
_PATH_KEY = re.compile(r"/(r\d+)/p\d+$")
_DROPPED = "dropped: "
_REASONS = 8
_POINTS = 400


def complete(run: Path, stage: str) -> bool:
    """Whether the stage has been committed by its gate, and not let pass by a decision."""
    manifest = RunDir(run).read_manifest(stage)
    return manifest is not None and not manifest.get("skipped")


def shard_folder(run: Path, stage: str) -> Path:
    """Where a stage's shards are."""
    return RunDir(run).shards(stage)


def stage_names(run: Path) -> list[str]:
    """Every stage that has a folder in the run."""
    folder = run / "stages"
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")


def rounds(run: Path) -> list[str]:
    """Prefixes of the rounds whose generation is complete: ``r0``, ``r1``, …, the control's."""
    found = [
        name.removesuffix("-generate")
        for name in stage_names(run)
        if name.endswith("-generate") and complete(run, name)
    ]
    return sorted(found, key=lambda prefix: (rank_of_round(f"{prefix}-") < 0, prefix))


def rank_of_round(stage: str) -> int:
    """The number of the round a stage belongs to; -1 for any other."""
    match = _ROUND.match(stage)
    return int(match[1]) if match else -1


def round_name(prefix: str) -> str:
    """``Round 1`` for ``r1``; other prefixes as they are."""
    number = rank_of_round(f"{prefix}-")
    return f"Round {number}" if number >= 0 else f"Control {prefix}"


def outcome(correct: bool | None) -> str:
    """The name of a verdict."""
    return "undecided" if correct is None else "right" if correct else "wrong"


def funnel(run: Path) -> dict[str, Any]:
    """Counts from questions to pairs, each round's distributions, and the training sets.

    Returns:
        ``{"questions": n, "left_out": {reason: n}, "rounds": [...], "sets": {...},
        "control_pairs": n}``; a number is None while its stage is not complete. What is left
        out was no question, or one that evaluation asks too.
    """
    sets, kept = _sets(run)
    return {
        "questions": _count(run, "questions-train"),
        "left_out": _left_out(run),
        "rounds": [_round(run, prefix, kept[prefix]) for prefix in rounds(run)],
        "sets": sets,
        "control_pairs": _count(run, f"{CONTROL}-pairs"),
    }


def _count(run: Path, stage: str) -> int | None:
    if not complete(run, stage):
        return None
    return sum(sidecar.rows for sidecar in shards.sidecars(shard_folder(run, stage)).values())


def _left_out(run: Path) -> dict[str, int]:
    counts = (RunDir(run).read_manifest("questions-train") or {}).get("counts", {})
    found = {name.removeprefix(_DROPPED): n for name, n in counts.items() if _DROPPED in name}
    return dict(Counter(found).most_common(_REASONS))


def _round(run: Path, prefix: str, kept: Mapping[str, int]) -> dict[str, Any]:
    """One round's counts, from the stages of it that are complete."""
    stages = {
        role: f"{prefix}-{stage}"
        for role, stage in (("paths", "generate"), ("verdicts", "judge"), ("scores", "score"))
    }
    present = {role: stage for role, stage in stages.items() if complete(run, stage)}
    tally = _Tally()
    folders = {role: shard_folder(run, stage) for role, stage in present.items()}
    for _, rows in shards.join(folders):
        tally.add(rows)
    failures = Counter(
        reason for _, reason in shards.read_errors(shard_folder(run, stages["paths"]))
    )
    report = {
        "round": prefix,
        "name": round_name(prefix),
        **tally.report("verdicts" in present, "scores" in present),
        "failed_questions": failures.total(),
        "failures": dict(failures.most_common(_REASONS)),
        "kept": dict(kept),
    }
    pairs = f"{prefix}-pairs"
    if complete(run, pairs):
        kinds = Counter(row["kind"] for row in shards.read_rows(shard_folder(run, pairs)))
        report |= {"pairs": kinds.total(), "pair_kinds": dict(kinds)}
    else:
        report |= {"pairs": None, "pair_kinds": {}}
    return report


class _Tally:
    """Counts over one round's paths."""

    def __init__(self) -> None:
        self.questions = self.paths = self.unanswered = self.tokens = 0
        self.finish: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.verdicts: Counter[str] = Counter()
        self.rules: Counter[str] = Counter()
        self.unscored: Counter[str] = Counter()
        self.solved: Counter[str] = Counter()
        self.twice: list[tuple[int, int]] = []
        self.lengths: dict[str, dict[str, Counter[int]]] = {
            measure: {name: Counter() for name in OUTCOMES}
            for measure in ("tokens", "steps", "total", "logic", "grounding", "completeness")
        }

    def add(self, rows: Mapping[str, list[Row]]) -> None:
        """Counts one question's rows, by role; one that was not asked, or failed, has none."""
        if not rows["paths"]:
            return
        self.questions += 1
        verdicts = {row["path"]: row for row in rows.get("verdicts", ())}
        for path in rows["paths"]:
            if "steps" not in path:
                self.failed[path.get("reason", "failed")] += 1
                continue
            verdict = verdicts.get(path["key"])
            name = outcome(verdict["correct"] if verdict else None)
            self.paths += 1
            self.tokens += path["tokens"]
            self.finish[path["finish"]] += 1
            self.unanswered += not path["answer"]
            self.lengths["tokens"][name][path["tokens"]] += 1
            self.lengths["steps"][name][len(path["steps"])] += 1
            if verdict:
                self.verdicts[name] += 1
                self.rules[verdict["rule"]] += 1
        first: dict[str, int] = {}
        for score in rows.get("scores", ()):
            if not score["reason"].startswith(RETEST):
                self._score(score, verdicts)
                first[score["path"]] = score["total"]
            elif score["total"] is not None and first.get(score["path"]) is not None:
                self.twice.append((first[score["path"]], score["total"]))
        names = {outcome(row["correct"]) for row in verdicts.values()}
        self.solved["some right"] += "right" in names
        self.solved["right and wrong"] += {"right", "wrong"} <= names

    def _score(self, score: Row, verdicts: Mapping[str, Row]) -> None:
        if score["total"] is None:
            self.unscored[score["reason"] or "no score"] += 1
            return
        verdict = verdicts.get(score["path"])
        name = outcome(verdict["correct"] if verdict else None)
        for measure in ("total", "logic", "grounding", "completeness"):
            if score[measure] is not None:
                self.lengths[measure][name][score[measure]] += 1

    def report(self, judged: bool, scored: bool) -> dict[str, Any]:
        """The counts as JSON values; None for what no complete stage tells."""
        totals = self.lengths["total"]
        return {
            "questions": self.questions,
            "paths": self.paths,
            "tokens": self.tokens,
            "answered": self.paths - self.unanswered,
            "failed_paths": self.failed.total(),
            "path_failures": dict(self.failed.most_common(_REASONS)),
            "finish": dict(self.finish),
            "verdicts": {name: self.verdicts[name] for name in OUTCOMES} if judged else None,
            "rules": dict(self.rules.most_common()),
            "solved": dict(self.solved) if judged else None,
            "scored": sum(counter.total() for counter in totals.values()) if scored else None,
            "unscored": dict(self.unscored.most_common(_REASONS)),
            "score_auc": _auc(totals["right"], totals["wrong"]),
            "agreement": _agreement(self.twice),
            "distributions": {
                measure: _distribution(counters, measure)
                for measure, counters in self.lengths.items()
                if any(counters.values())
            },
        }


def _distribution(counters: Mapping[str, Counter[int]], measure: str) -> dict[str, Any]:
    """Binned counts of each outcome, with its mean; scores span 1-100, lengths 0 to their most."""
    most = max(value for counter in counters.values() for value in counter)
    low, high, bins = 0.0, 100.0, BINS
    if measure in ("tokens", "steps"):
        # Whole numbers stand in the middle of their bin.
        width = -(-(most + 1) // BINS)
        bins = -(-(most + 1) // width)
        low, high = -0.5, bins * width - 0.5
    report: dict[str, Any] = {"low": low, "high": high}
    for name, counter in counters.items():
        counts = [0] * bins
        for value, count in counter.items():
            counts[min(bins - 1, int((value - low) * bins / (high - low)))] += count
        total = counter.total()
        mean = sum(value * count for value, count in counter.items()) / total if total else None
        report[name] = {"counts": counts, "n": total, "mean": mean}
    return report


def _auc(right: Counter[int], wrong: Counter[int]) -> float | None:
    """How well the total score tells right paths from wrong ones; None if one kind is unscored."""
    if not right or not wrong:
        return None
    scores = [*right.elements(), *wrong.elements()]
    return auc(scores, [True] * right.total() + [False] * wrong.total())


def _agreement(twice: Sequence[tuple[int, int]]) -> dict[str, Any] | None:
    """Test-retest agreement of the paths that were scored a second time; None without any."""
    if not twice:
        return None
    found = agreement([first for first, _ in twice], [second for _, second in twice])
    return {
        "n": found.n,
        "pearson": known(found.pearson),
        "spearman": known(found.spearman),
        "difference": known(found.difference),
        "points": [list(pair) for pair in twice[:_POINTS]],
    }


def known(value: float) -> float | None:
    """JSON has no NaN: what cannot be told is null."""
    return None if value != value else value


def _sets(run: Path) -> tuple[dict[str, Any], dict[str, Counter[str]]]:
    """The training sets: samples of each kind, and how many samples come from each round."""
    sets: dict[str, Any] = {}
    kept: dict[str, Counter[str]] = {prefix: Counter() for prefix in rounds(run)}
    for stage in stage_names(run):
        if not stage.startswith("set-") or not complete(run, stage):
            continue
        name = stage.removeprefix("set-")
        kinds: Counter[str] = Counter()
        for row in shards.read_rows(shard_folder(run, stage)):
            kinds[row["kind"]] += 1
            for prefix in _rounds_of(row["parents"]):
                kept.setdefault(prefix, Counter())[name] += 1
        sets[name] = {"samples": kinds.total(), "kinds": dict(kinds.most_common())}
    return sets, kept


def _rounds_of(parents: Iterable[str]) -> set[str]:
    return {match[1] for parent in parents if (match := _PATH_KEY.search(parent))}

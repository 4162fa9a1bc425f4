"""Shards and workers at the paper's shape: 200,000 questions × 8 paths of 1–8 KB.

The engine is synthetic (prose from a seed, which packs about as real reasoning does);
everything else is the true thing: worker processes pull shards under leases, write and
commit them, and a reader joins questions and paths. Measured are wall time, rates, bytes,
files and each process' peak memory. A worker's and a reader's must not grow with the number
of questions; the job that writes the questions holds their keys, to refuse doubles.

    python benchmarks/shards_at_scale.py --questions 200000 --workers 2
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpc.reading import join, read_entries
from hpc.rundir import Chain, RunDir
from hpc.shards import shard_path, sidecars, write_groups
from hpc.stages import Context, Row, Stage
from hpc.work import work

RESULTS = Path(__file__).parent / "results" / "shards_at_scale.json"


class Prose:
    """Text of any length from a seed: phrases of made-up words, common ones more often."""

    def __init__(self) -> None:
        generator = random.Random("prose")
        syllables = [c + v for c in "bdfghklmnprstvz" for v in ("a", "e", "i", "o", "u", "ai")]
        words = ["".join(generator.choices(syllables, k=1 + n % 4)) for n in range(6000)]
        common = list(itertools.accumulate(1 / (rank + 2) for rank in range(len(words))))
        ends = [" ", " ", ", ", ". "]
        self.phrases = [
            " ".join(generator.choices(words, cum_weights=common, k=2)) + generator.choice(ends)
            for _ in range(60_000)
        ]

    def __call__(self, generator: random.Random, size: int) -> str:
        return "".join(generator.choices(self.phrases, k=size // 10))[:size]


class Engine:
    """Eight paths a question, like the rows of generation."""

    def __init__(self, paths: int) -> None:
        self.concurrency, self.paths, self.prose = 64, paths, Prose()

    async def __call__(self, key: str, inputs: Mapping[str, list[Row]]) -> list[Row]:
        generator = random.Random(key)
        await asyncio.sleep(generator.uniform(0, 0.002))  # outcomes in another order than inputs
        return [
            {
                "key": f"{key}/r0/p{path}",
                "question": key,
                "steps": self._steps(generator, generator.randint(1000, 8000)),
                "answer": str(generator.randrange(1000)),
                "finish": "summary",
                "tokens": generator.randrange(2000),
                "seed": generator.getrandbits(63),
            }
            for path in range(self.paths)
        ]

    def _steps(self, generator: random.Random, size: int) -> list[Row]:
        count = generator.randint(3, 8)
        return [
            {
                "title": self.prose(generator, 30),
                "content": self.prose(generator, size // count),
                "next_action": "continue" if step < count - 1 else "summary",
            }
            for step in range(count)
        ]

    async def close(self) -> None:
        pass


def questions(count: int) -> Iterator[tuple[str, list[Row]]]:
    prose = Prose()
    for n in range(count):
        key = f"synthetic:train:{n}"
        yield key, [{"key": key, "text": prose(random.Random(n), 200), "answer": str(n)}]


def make(run: Path, count: int, paths: int) -> Chain:
    def write(context: Context) -> dict[str, Any]:
        return {"shards": write_groups(context.directory / "shards", questions(count))}

    def read(context: Context) -> dict[str, Any]:
        folders = {role: context.shards(role) for role in ("questions", "paths")}
        keys = rows = 0
        for _, found in join(folders):
            keys += 1
            rows += len(found["paths"])
        assert (keys, rows) == (count, count * paths), (keys, rows)
        return {"keys": keys, "rows": rows}

    both = {"questions": "questions", "paths": "paths"}
    stages = [
        Stage("questions", "job", run=write),
        Stage("paths", "map", {"questions": "questions"}, load=lambda context: Engine(paths)),
        Stage("read", "job", both, run=read),
    ]
    return Chain(stages, RunDir(run), [sys.executable, __file__])


def measure(run: Path, words: argparse.Namespace, stage: str, processes: int) -> dict[str, Any]:
    """Runs a stage in processes of its own; each one's last line tells its peak memory."""
    command = [sys.executable, __file__, "--payload", stage, "--run-dir", str(run)]
    command += ["--questions", str(words.questions), "--paths", str(words.paths)]
    started = time.monotonic()
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(processes)]
    told = [json.loads(worker.communicate()[0].splitlines()[-1]) for worker in workers]
    seconds = time.monotonic() - started
    assert all(worker.returncode == 0 for worker in workers), stage
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(entry["cpu"] for entry in told), 1),
        "peak_rss_mb": sorted(entry["rss"] for entry in told),
        "rss_before_work_mb": max(entry["before"] for entry in told),
    }


def rss() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def payload(words: argparse.Namespace) -> int:
    chain = make(words.run_dir, words.questions, words.paths)
    before = rss()
    status = work(chain, words.payload)
    spent = os.times()
    print(json.dumps({"rss": rss(), "before": before, "cpu": spent.user + spent.system}))
    return status


def bench(words: argparse.Namespace, run: Path) -> dict[str, Any]:
    chain = make(run, words.questions, words.paths)
    result: dict[str, Any] = {
        "shape": {"questions": words.questions, "paths": words.paths, "workers": words.workers},
        "machine": {
            "cores": os.cpu_count(),
            "load_before": round(os.getloadavg()[0], 1),
            "python": platform.python_version(),
        },
    }
    for stage, processes in (("questions", 1), ("paths", words.workers), ("read", 1)):
        result[stage] = measure(run, words, stage, processes)
        print(stage, result[stage], flush=True)
    shards = chain.run.shards("paths")
    made = sidecars(shards)
    sample = [shard_path(shards, index) for index in list(made)[:: max(1, len(made) // 20)]]
    raw = sum(len(row) + 1 for path in sample for entry in read_entries(path) for row in entry.rows)
    packed = sum(path.stat().st_size for path in sample)
    stored = sum(sidecar.bytes for sidecar in made.values())
    rows = sum(sidecar.rows for sidecar in made.values())
    result["shards"] = {
        "rows": rows,
        "rows_a_second": round(rows / result["paths"]["seconds"]),
        "bytes": stored,
        "raw_bytes_about": round(stored * raw / packed),
        "ratio": round(raw / packed, 2),
        "files": sum(1 for _ in run.rglob("*")),
        "largest_shard": max(sidecar.bytes for sidecar in made.values()),
    }
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=200_000)
    parser.add_argument("--paths", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--run-dir", type=Path, help="by default a temporary folder, removed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--payload", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.payload:
        return payload(words)
    run = words.run_dir or Path(tempfile.mkdtemp(prefix="shards-at-scale-"))
    try:
        result = bench(words, run)
    finally:
        if words.run_dir is None:
            shutil.rmtree(run, ignore_errors=True)
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["shards"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

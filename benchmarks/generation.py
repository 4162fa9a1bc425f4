"""Records a second of our engines beside transformers' own ways to generate, in one run.

    python benchmarks/generation.py engine|server [--questions 48] [--rounds 3]

The embedded model on test questions of the quickstart, four paths each. Paths are sampled
once, which is not measured, and tell which calls there are: of lengths as they are, the paths
of a question beginning alike. Every way then makes the same calls greedily, a path's one
after the other, and all texts are compared: what differs is counted, and stands in the result.

``engine``: the engine in process against a `generate` for each call, against batches of
`generate`, and against transformers' continuous batching, which takes no pictures: for it all
are measured again on the same chats without their pictures. The batch sizes are tried first, each
once, and judged by processor time; then the best of each way take turns, ``--rounds`` times.

``server``: the server engine against a load generator at the same `transformers serve`, which
posts bodies that were made before, at the best number of requests in flight.

One thread computes. A record is a path; seconds are those of the clock, and processor seconds
of all threads stand beside them, as the machine may have other work.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import httpx2  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from generation_peers import Paths, Peers, Replies  # noqa: E402
from generation_table import write  # noqa: E402
from origin import origin  # noqa: E402

from hpc.rundir import read_json, write_json  # noqa: E402
from insightv import models  # noqa: E402
from insightv.agents import FinalAgent, ReasoningAgent  # noqa: E402
from insightv.demo.sets import QuestionsConfig, Sizes, make_questions  # noqa: E402
from insightv.engines import (  # noqa: E402
    Completion,
    Engine,
    EngineConfig,
    Request,
    Sampling,
    load_engine,
)
from insightv.engines.server.config import ServerConfig  # noqa: E402
from insightv.engines.server.engine import ServerEngine  # noqa: E402
from insightv.folders import model_folder  # noqa: E402
from insightv.pictures import Pictures, PictureWriter  # noqa: E402
from insightv.prompting import load_prompts  # noqa: E402
from insightv.records import Question, seed_for  # noqa: E402

RESULTS = HERE / "results" / "generation.json"
TINY = model_folder("tiny")
PATHS = 4
SIZES = (1, 2, 4, 8, 16, 32, 64)
OUR_SIZES = (16, 32, 64)
FLYING = (1, 2, 4, 8, 16, 32)  # and back again: a machine's load drifts
QUARTILES = ("min", "q1", "median", "q3", "max")


def ask(folder: Path, count: int) -> tuple[list[Question], Pictures]:
    """Test questions of the quickstart's mixture, and their pictures."""
    few = count // 8
    config = QuestionsConfig(Sizes(test=count - 2 * few), Sizes(test=few), Sizes(test=few))
    with PictureWriter(folder) as writer:
        found = list(make_questions("test", config, 0, writer))
    return found[:count], Pictures([folder])


class Recorder:
    """An engine that keeps what it was asked."""

    def __init__(self, engine: Engine):
        """Asks ``engine``."""
        self._engine = engine
        self.asked: list[Request] = []

    async def complete(self, request: Request) -> Completion:
        """Completes one chat."""
        self.asked.append(request)
        return await self._engine.complete(request)


def sample(mode: str, questions: Sequence[Question], pictures: Pictures) -> list[list[Request]]:
    """The calls of each question's paths, sampled as in the quickstart; then made greedy."""
    prompts = load_prompts("tiny")
    tokens = {"progressive": 64, "single": 192}[mode]

    async def path(engine: Engine, question: Question, number: int) -> list[Request]:
        recorder: Any = Recorder(engine)
        sampling = Sampling(0.8, 0.95, max_tokens=tokens)
        agent = ReasoningAgent(recorder, prompts, sampling, mode, max_steps=8, tries=3)
        thought = await agent.reason(
            question, lambda step, attempt: seed_for(0, question.key, number, step, attempt)
        )
        if not thought.problem:
            final = FinalAgent(recorder, prompts, Sampling(max_tokens=32))
            await final.answer(question, thought.text)
        return recorder.asked

    async def all_paths() -> list[list[Request]]:
        engine = load_engine(TINY, in_process(64), pictures)
        try:
            paths = [(question, n) for question in questions for n in range(PATHS)]
            return await asyncio.gather(*(path(engine, *each) for each in paths))
        finally:
            await engine.close()

    def greedy(call: Request) -> Request:
        return replace(call, sampling=Sampling(max_tokens=call.sampling.max_tokens))

    return [[greedy(call) for call in path] for path in asyncio.run(all_paths())]


def in_process(size: int) -> EngineConfig:
    """Our engine at a batch size, on one thread."""
    return EngineConfig(device="cpu", threads=1, batch_size=size)


async def through(engine: Engine, paths: Paths) -> Replies:
    """All calls of the paths; as many questions at once as `insightv.generation` has."""
    room = asyncio.Semaphore(max(1, -(-engine.concurrency // PATHS)))

    async def one(path: Sequence[Request]) -> list[Completion]:
        return [await engine.complete(call) for call in path]

    async def question(start: int) -> Replies:
        async with room:
            return await asyncio.gather(*map(one, paths[start : start + PATHS]))

    groups = await asyncio.gather(*map(question, range(0, len(paths), PATHS)))
    return [replies for group in groups for replies in group]


@dataclass(frozen=True)
class Run:
    """One way, run once over the paths."""

    replies: Replies
    wall: float
    cpu: float

    @property
    def row(self) -> dict[str, float]:
        """What is noted of it."""
        count = len(self.replies)
        return {
            "records_a_second": round(count / self.wall, 3),
            "records_a_processor_second": round(count / self.cpu, 3),
        }


class Ways:
    """All ways to run paths, at any batch size."""

    def __init__(self, pictures: Pictures):
        """Loads the model for the peers."""
        self.pictures = pictures
        self.peers = Peers(models.load(TINY, "cpu", "float32"), pictures)

    def run(self, way: str, size: int, paths: Paths) -> Run:
        """Runs one way; what is loaded, warmed or made once is not measured."""
        gc.collect()
        if way == "insightv":
            return asyncio.run(self._ours(size, paths))
        self.peers.forget()
        if way == "continuous":
            return Run(*self.peers.continuous(paths, size))
        begun = Clock()
        replies = (
            self.peers.one_by_one(paths) if way == "one by one" else self.peers.static(paths, size)
        )
        return begun.run(replies)

    async def _ours(self, size: int, paths: Paths) -> Run:
        engine = load_engine(TINY, in_process(size), self.pictures)
        try:
            await through(engine, paths[:1])
            begun = Clock()
            return begun.run(await through(engine, paths))
        finally:
            await engine.close()


class Clock:
    """Begins to measure when it is made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def run(self, replies: Replies) -> Run:
        """Ends."""
        return Run(replies, time.perf_counter() - self.wall, time.process_time() - self.cpu)


def compared(replies: Replies, wanted: Replies) -> dict[str, int]:
    """How many texts there are, and how many are not those wanted."""
    pairs = [
        pair
        for mine, theirs in zip(replies, wanted, strict=True)
        for pair in zip(mine, theirs, strict=True)
    ]
    return {"texts": len(pairs), "differ": sum(mine != theirs for mine, theirs in pairs)}


def tried(ways: Ways, names: Sequence[str], paths: Paths) -> tuple[dict[str, Any], Replies]:
    """Each way at each batch size, once; all texts against those of batches of `generate`."""
    wanted: Replies = []
    found: dict[str, Any] = {}
    for way in names:
        sizes = OUR_SIZES if way == "insightv" else SIZES
        for size in sizes:
            run = ways.run(way, size, paths)
            wanted = wanted or run.replies
            row = run.row | compared(run.replies, wanted)
            print(f"  {way} {size}: {row}", flush=True)
            found.setdefault(way, {})[str(size)] = row
    return found, wanted


def workload(ways: Ways, paths: Paths, rounds: int) -> dict[str, Any]:
    """All ways over the same paths."""
    pictures = any(call.pictures for path in paths for call in path)
    names = ["static", *([] if pictures else ["continuous"]), "insightv"]
    sizes, wanted = tried(ways, names, paths)
    best = {
        way: max(found, key=lambda size: float(found[size]["records_a_processor_second"]))
        for way, found in sizes.items()
    }
    few = len(paths) // 4
    alone = ways.run("one by one", 1, paths[:few])
    one_by_one = alone.row | compared(alone.replies, wanted[:few]) | {"records": few}
    print(f"  one by one: {one_by_one}", flush=True)
    turns: list[dict[str, Any]] = []
    for number in range(rounds):
        order = names if number % 2 else names[::-1]  # no way is always the first
        turn: dict[str, Any] = {}
        for way in order:
            run = ways.run(way, int(best[way]), paths)
            turn[way] = run.row | compared(run.replies, wanted)
        print(f"  round {number}: {turn}", flush=True)
        turns.append(turn)
    tokens = sorted(reply.tokens for replies in wanted for reply in replies)
    return {
        "records": len(paths),
        "calls": len(tokens),
        "tokens_a_call": dict(zip(QUARTILES, _quartiles(tokens), strict=True)),
        "one by one": one_by_one,
        "sizes": sizes,
        "best": {way: int(size) for way, size in best.items()},
        "rounds": turns,
        "ratios": {
            unit: _ratio(turns, [name for name in names if name != "insightv"], unit)
            for unit in ("records_a_second", "records_a_processor_second")
        },
    }


def _ratio(turns: list[dict[str, Any]], peers: list[str], unit: str) -> dict[str, float]:
    """Ours over the best peer of the same round: the median, and the extremes."""
    found = [turn["insightv"][unit] / max(turn[peer][unit] for peer in peers) for turn in turns]
    return _spread(found)


def _spread(found: list[float]) -> dict[str, float]:
    middle = statistics.median(found)
    return {"median": round(middle, 2), "min": round(min(found), 2), "max": round(max(found), 2)}


def _quartiles(values: list[int]) -> list[float]:
    return [values[0], *statistics.quantiles(values, n=4), values[-1]]


def engine(words: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The engine in process; the result so far, after each workload."""
    with tempfile.TemporaryDirectory() as folder:
        questions, pictures = ask(Path(folder), words.questions)
        ways = Ways(pictures)
        found: dict[str, Any] = {}
        for mode in ("progressive", "single"):
            paths = sample(mode, questions, pictures)
            bare = [[replace(call, pictures=()) for call in path] for path in paths]
            for name, calls in ((mode, paths), (f"{mode}, without pictures", bare)):
                print(name, flush=True)
                found[name] = workload(ways, calls, words.rounds)
                yield {"questions": len(questions), "paths": PATHS, "workloads": found}


# ---- a server


def server(words: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The server engine and a load generator in turns, at one `transformers serve`."""
    with tempfile.TemporaryDirectory() as folder:
        questions, pictures = ask(Path(folder) / "pictures", words.questions)
        paths = sample("single", questions, pictures)
        yield asyncio.run(_at_server(paths, pictures, words.rounds, Path(folder)))


async def _at_server(paths: Paths, pictures: Pictures, rounds: int, folder: Path) -> dict[str, Any]:
    calls = [call for path in paths for call in path]
    here = load_engine(TINY, in_process(32), pictures)
    wanted = await asyncio.gather(*map(here.complete, calls))
    await here.close()
    starter: Any = load_engine(TINY, _behind(command=["transformers"]), pictures)
    assert isinstance(starter, ServerEngine)
    try:
        await starter.complete(calls[0])
        (replica,) = starter._replicas  # where the server is, and its key
        key = folder / "key"
        key.touch(0o600)
        key.write_text(replica.key)
        at = {"url": [replica.url], "key_file": str(key), "model": str(TINY)}
        bodies = [starter._body(call) for call in calls]

        def row(seconds: float, differ: int) -> dict[str, Any]:
            return {"calls_a_second": round(len(calls) / seconds, 3), "differ": differ}

        async def ours() -> dict[str, Any]:
            """A new engine, which has encoded nothing yet."""
            config = _behind(dialect="transformers", **at)
            asked: Any = load_engine(TINY, config, pictures)
            await asked.complete(calls[0])  # it looks what the server is
            begun = time.perf_counter()
            replies = await asyncio.gather(*map(asked.complete, calls))
            seconds = time.perf_counter() - begun
            await asked.close()
            return row(seconds, sum(x != y for x, y in zip(replies, wanted, strict=True)))

        async def load(flying: int) -> dict[str, Any]:
            url = f"{replica.url}/v1/chat/completions"
            seconds, texts = await _load(url, replica.key, bodies, flying)
            return row(seconds, sum(x != y.text for x, y in zip(texts, wanted, strict=True)))

        tuned: dict[str, Any] = {}
        for flying in (*FLYING, *reversed(FLYING)):
            found = await load(flying)
            print(f"  {flying} in flight: {found}", flush=True)
            before = tuned.setdefault(str(flying), found)
            found["calls_a_second"] = max(found["calls_a_second"], before["calls_a_second"])
            tuned[str(flying)] = found | {"differ": max(found["differ"], before["differ"])}
        best = max(tuned, key=lambda flying: float(tuned[flying]["calls_a_second"]))
        turns = []
        for number in range(rounds):
            turn = {} if number % 2 else {"insightv": await ours()}
            turn["load generator"] = await load(int(best))
            turn = turn if "insightv" in turn else turn | {"insightv": await ours()}
            turns.append(turn)
            print(f"  round {number}: {turn}", flush=True)
    finally:
        await starter.close()
    ratios = [
        turn["insightv"]["calls_a_second"] / turn["load generator"]["calls_a_second"]
        for turn in turns
    ]
    return {
        "calls": len(calls),
        "flying": tuned,
        "best": int(best),
        "ours": starter.concurrency,
        "rounds": turns,
        "ratio": _spread(ratios),
    }


async def _load(
    url: str, key: str, bodies: Sequence[bytes], flying: int
) -> tuple[float, list[str]]:
    """Posts all bodies, so many at a time; the seconds, and the texts."""
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    waiting = iter(range(len(bodies)))
    texts = [""] * len(bodies)
    limits = httpx2.Limits(max_connections=flying)
    async with httpx2.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:

        async def post() -> None:
            for number in waiting:
                reply = await client.post(url, content=bodies[number], headers=headers)
                texts[number] = reply.raise_for_status().json()["choices"][0]["message"]["content"]

        begun = time.perf_counter()
        await asyncio.gather(*(post() for _ in range(flying)))
        return time.perf_counter() - begun, texts


def _behind(**told: Any) -> EngineConfig:
    """The server engine, on one thread where it starts a server."""
    return EngineConfig(kind="server", device="cpu", threads=1, server=ServerConfig(**told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["engine", "server"])
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    words = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    made_by = origin() | {
        "versions": {
            each.__name__: each.__version__.split("+")[0] for each in (torch, transformers)
        },
        "load_before": round(os.getloadavg()[0], 1),
    }
    for result in {"engine": engine, "server": server}[words.what](words):
        result |= {"load_after": round(os.getloadavg()[0], 1)}
        write_json(words.out, (read_json(words.out) or {}) | {words.what: made_by | result})
    print(write(words.out))


if __name__ == "__main__":
    main()

"""A small training problem: tiny models of each family, pictures, rows, a context."""

import io
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from families import picture, save_family

from hpc.stages import Row
from insightv import models
from insightv.pictures import Pictures, PictureWriter
from insightv.records import Message, PreferencePair, TrainingSample

FINAL = "Now give the final answer."


class Here:
    """A context in a folder, which stops when it is told to."""

    def __init__(self, directory: Path, stop_at: int = 0):
        self.run = self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.stop_at, self.seen = stop_at, []

    def shards(self, role: str) -> Path:
        return self.directory / role

    def progress(self, done: int, total: int, **numbers: float) -> None:
        self.seen.append((done, total, numbers))

    def stopping(self) -> bool:
        return bool(self.stop_at) and len(self.seen) >= self.stop_at

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").open()]


_folders: list[TemporaryDirectory[str]] = []  # they go with the process


@cache
def family(name: str, seed: int = 0) -> Path:
    _folders.append(TemporaryDirectory(prefix="family-"))
    return save_family(name, Path(_folders[-1].name), seed)


@cache
def loaded(name: str, seed: int = 0) -> models.LoadedModel:
    return models.load(family(name, seed), device="cpu", dtype="float32")


def store(directory: Path, count: int = 4) -> tuple[Pictures, list[str]]:
    """Pictures of several sizes, so that anyres families cut them into different tiles."""
    ids = []
    with PictureWriter(directory) as writer:
        for number in range(count):
            data = io.BytesIO()
            picture(number, 40 + 37 * number, 120 - 20 * number).save(data, "PNG")
            ids.append(writer.add(data.getvalue()))
    return Pictures([directory]), ids


def step(number: int, text: str, last: bool) -> str:
    action = "summary" if last else "continue"
    return f'{{"title": "Step {number}", "content": "{text}", "next_action": "{action}"}}'


def path(length: int, number: int) -> str:
    return "\n".join(step(n, f"{number} is read", n == length - 1) for n in range(length))


def sample_rows(ids: list[str], count: int = 10) -> list[Row]:
    """Chats of one and of two trained turns, with 0, 1 and 2 pictures, of many lengths."""
    rows = []
    for number in range(count):
        shown = tuple(ids[k % len(ids)] for k in range(number, number + number % 3))
        messages = [
            Message("user", f"What is the value of {'AB' * number}?"),
            Message("assistant", path(1 + number % 4, number), train=True),
        ]
        if number % 2:
            messages += [Message("user", FINAL), Message("assistant", str(number), train=True)]
        key = f"set:train:{number}"
        rows.append(TrainingSample(key, key, shown, tuple(messages), "plain").to_json())
    return rows


def pair_rows(ids: list[str], count: int = 6) -> list[Row]:
    rows = []
    for number in range(count):
        question = f"set:train:{number}"
        pair = PreferencePair(
            key=f"{question}/r0/p0|{question}/r0/p1",
            question=question,
            pictures=(ids[number % len(ids)],),
            prompt=(Message("user", f"What is {'the sum of ' * number}A? Steps."),),
            chosen=path(1 + number % 3, number),
            rejected=path(1 + (number + 1) % 4, number + 7),
            kind="right>wrong",
        )
        rows.append(pair.to_json())
    return rows

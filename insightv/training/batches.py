"""From rows to examples: tokens, targets, and which sample belongs to which step.

A sample is tokenised as inference does it: the tokens of the chat up to an assistant turn
are exactly those a model is given when it is asked for that turn. Targets are the turn's
text and the end-of-turn token.

Which samples make up a step depends on the seed and the step alone. How a step is packed into
micro-batches (`insightv.training.packing`) depends on lengths, the token budget and the
number of ranks, and changes no result.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from hpc.errors import RecordError, UserError
from hpc.stages import Row
from insightv import chats
from insightv.pictures import Pictures
from insightv.records import Message, PreferencePair, RecordFormatError, TrainingSample, seed_for
from insightv.training.ranks import Ranks


class TooLong(RecordError):
    """The sample has more tokens than ``max_length``; it is dropped, never cut."""


@dataclass(frozen=True)
class Reply:
    """One sequence: a chat whose last turn is the assistant's, closed.

    Attributes:
        encoding: Token ids, marks and pictures of the whole chat.
        spans: Half-open ranges of ``encoding.ids`` that are targets.
    """

    encoding: chats.Encoding
    spans: tuple[tuple[int, int], ...]

    @property
    def targets(self) -> int:
        """How many tokens the loss covers."""
        return sum(stop - start for start, stop in self.spans)


@dataclass(frozen=True)
class Example:
    """What a training row becomes: one reply (SFT) or winner and loser (preference pair).

    Attributes:
        key: The row's key.
        replies: The sequences.
        reference: Their summed log-probabilities under the reference model; empty for SFT.
        pictures: Ids of the pictures that every one of them begins with.
    """

    key: str
    replies: tuple[Reply, ...]
    reference: tuple[float, ...] = ()
    pictures: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of the longest of its sequences."""
        return max(len(reply.encoding.ids) for reply in self.replies)


class PictureCache:
    """Prepared pictures by id, the least recently used dropped beyond a number of bytes."""

    def __init__(self, processor: Any, pictures: Pictures, limit: int):
        """Nothing is prepared before it is asked for; ``limit`` is in bytes."""
        self._processor, self._pictures, self._limit = processor, pictures, limit
        self._kept: OrderedDict[str, chats.EncodedPicture] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __call__(self, picture: str) -> chats.EncodedPicture:
        """The prepared picture.

        Raises:
            RecordError: It is missing, broken, or refused by the model's processor.
        """
        with self._lock:
            if picture in self._kept:
                self._kept.move_to_end(picture)
                return self._kept[picture]
        encoded = chats.encode_picture(self._processor, self._pictures.image(picture))
        with self._lock:
            if picture not in self._kept and encoded.bytes <= self._limit:
                self._kept[picture] = encoded
                self._bytes += encoded.bytes
                while self._bytes > self._limit:
                    self._bytes -= self._kept.popitem(last=False)[1].bytes
        return encoded


class Encoder:
    """Turns rows into examples."""

    def __init__(self, processor: Any, pictures: Pictures, max_length: int, cache_mb: int):
        """Takes a loaded model's processor; ``max_length`` in tokens."""
        self.processor, self.max_length = processor, max_length
        self._picture = PictureCache(processor, pictures, cache_mb * 2**20)
        self._tail = end_of_turn(processor)

    def sample(self, row: Row) -> Example:
        """A `TrainingSample` row.

        Raises:
            RecordError: A picture is broken, the chat cannot be told, or it is too long.
            UserError: The row is no training sample, or has nothing to learn.
        """
        sample = _record(TrainingSample, row)
        reply = self._reply(sample.key, sample.messages, sample.pictures)
        return Example(sample.key, (reply,), pictures=sample.pictures)

    def pair(self, row: Row) -> Example:
        """A `PreferencePair` row; its reference values, where known, go with it.

        Raises:
            RecordError: As for samples.
            UserError: The row is no preference pair.
        """
        pair = _record(PreferencePair, row)
        replies = tuple(
            self._reply(
                pair.key, (*pair.prompt, Message("assistant", text, train=True)), pair.pictures
            )
            for text in (pair.chosen, pair.rejected)
        )
        known = (pair.reference_chosen, pair.reference_rejected)
        reference = tuple(value for value in known if value is not None)
        return Example(pair.key, replies, reference, pair.pictures)

    def _reply(self, key: str, messages: Sequence[Message], pictures: Sequence[str]) -> Reply:
        trained = [turn for turn, message in enumerate(messages) if message.train]
        if not trained or any(messages[turn].role != "assistant" for turn in trained):
            raise UserError(f"training sample {key}: mark the assistant turns to learn with train")
        if messages[0].role != "user":
            raise UserError(f"training sample {key}: the chat must begin with a user turn")
        shown = [self._picture(picture) for picture in pictures]
        last = trained[-1]
        prompt = chats.encode(self.processor, messages[:last], shown)
        target = self._target(messages, last)
        length = len(prompt.ids) + len(target)
        if length > self.max_length:
            raise TooLong(f"{length} tokens, more than max_length {self.max_length}")
        spans = [self._earlier(messages, turn, shown, prompt) for turn in trained[:-1]]
        marks = {name: [*values, *[0] * len(target)] for name, values in prompt.marks.items()}
        whole = chats.Encoding(prompt.ids + target, marks, prompt.pictures, prompt.opening)
        return Reply(whole, (*spans, (len(prompt.ids), length)))

    def _target(self, messages: Sequence[Message], turn: int) -> list[int]:
        """Tokens of an assistant turn as the model writes them, end of turn included."""
        asked = chats.render(self.processor, messages[:turn], 0)
        answered = chats.render(self.processor, messages[: turn + 1], 0)
        if not answered.startswith(asked):
            raise RecordError("the chat template changes a turn's beginning once it is answered")
        text = answered[len(asked) :]
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return [*ids, *self._tail]

    def _earlier(
        self, messages: Sequence[Message], turn: int, shown: list[Any], prompt: chats.Encoding
    ) -> tuple[int, int]:
        """Where an earlier trained turn stands in the prompt of the last one."""
        asked = chats.encode(self.processor, messages[:turn], shown).ids
        target = self._target(messages, turn)
        start, stop = len(asked), len(asked) + len(target)
        if prompt.ids[:start] != asked or prompt.ids[start:stop] != target:
            raise RecordError(f"turn {turn + 1} has other tokens once the chat goes on")
        return start, stop


def end_of_turn(processor: Any) -> list[int]:
    """The tokens after an assistant's text up to the one that ends generation.

    Where the chat template closes a turn without an end token, the tokenizer's is taken.
    """
    tokenizer = processor.tokenizer
    word = "word"
    chat = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "question"), ("assistant", word))
    ]
    text = processor.apply_chat_template(chat)
    tail = text[text.rindex(word) + len(word) :]
    ids: list[int] = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    special = set(tokenizer.all_special_ids)
    for place, token in enumerate(ids):
        if token in special:
            return ids[: place + 1]
    return [tokenizer.eos_token_id]


class Rows:
    """Training rows, kept on disk and read by number; a few bytes of memory each.

    Attributes:
        digest: SHA-256 (16 hex digits) over all rows.
        pictures: [rows] A number for each row's pictures; rows without any have their own.
    """

    def __init__(
        self,
        rows: Iterable[Row] | Path,
        directory: Path,
        check: Callable[[Row], None] = lambda row: None,
        ranks: Ranks | None = None,
    ):
        """Copies the rows of an iterable or a shard folder to a file in ``directory``.

        Args:
            rows: The rows or their shards.
            directory: Has room for all of them.
            check: Sees each row, and raises if it cannot be trained on.
            ranks: All of them read the one copy that the first makes.

        Raises:
            UserError: There are none, a shard is damaged, or ``check`` found fault.
        """
        ranks = ranks or Ranks()
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._names = [directory / "rows.jsonl", directory / "rows.npy"] if ranks.count > 1 else []
        self._lead = ranks.lead
        # Closed with the object that reads it; alone it has no name that could stay behind.
        if not self._names:
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        self.digest: str = ranks.first(lambda: self._write(rows, check))
        ranks.every(self._open)

    def _write(self, rows: Iterable[Row] | Path, check: Callable[[Row], None]) -> str:
        if isinstance(rows, Path):
            from hpc.shards import read_rows

            source, lines = str(rows), read_rows(rows)
        else:
            source, lines = "the training data", iter(rows)
        if self._names:
            self._file = self._names[0].open("w+b")
        total, offsets, pictures, end = hashlib.sha256(), [0], [], 0
        for row in lines:
            check(row)
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            total.update(line)
            end += self._file.write(line)
            offsets.append(end)
            pictures.append(_number(row["pictures"]) if row.get("pictures") else -len(offsets))
        if end == 0:
            raise UserError(f"nothing to train on: {source} holds no rows")
        self._file.flush()
        self._offsets, self.pictures = np.array(offsets), np.array(pictures)
        if self._names:
            np.save(self._names[1], np.concatenate([self._offsets, self.pictures]))
        return total.hexdigest()[:16]

    def _open(self) -> None:
        """On the ranks that read what the first has written."""
        if not self._lead:
            self._file = self._names[0].open("rb")
            found = np.load(self._names[1])
            self._offsets, self.pictures = np.split(found, [len(found) // 2 + 1])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> Row:
        start, end = self._offsets[number : number + 2].tolist()
        with self._lock:
            self._file.seek(start)
            line = self._file.read(end - start)
        row: Row = json.loads(line)
        return row

    def close(self) -> None:
        """Gives the disk space back."""
        self._file.close()
        if self._lead:
            for name in self._names:
                name.unlink(missing_ok=True)


class Members:
    """Which rows a step has; it depends on what is given here alone."""

    def __init__(
        self, seed: int, rows: int, batch_size: int, epochs: int, pictures: np.ndarray | None = None
    ):
        """Every epoch is its own seeded shuffle.

        Args:
            seed: Of the shuffles.
            rows: How many there are.
            batch_size: Rows of a step.
            epochs: How often each row is seen.
            pictures: [rows] A number for each row's pictures. Given, the rows of the same
                pictures stand behind the first of them in each shuffle.
        """
        self._rows, self._batch_size, self._epochs = rows, batch_size, epochs
        self._pictures = pictures
        self._order = lru_cache(maxsize=2)(lambda epoch: self._shuffled(seed, epoch))

    def __call__(self, step: int) -> list[int]:
        """Row numbers of a step, counted from 0.

        A step may begin in one epoch and end in the next; the last of all may be smaller.
        """
        start = step * self._batch_size
        places = range(start, min(start + self._batch_size, self._rows * self._epochs))
        return [int(self._order(place // self._rows)[place % self._rows]) for place in places]

    def _shuffled(self, seed: int, epoch: int) -> np.ndarray:
        order = np.random.default_rng(seed_for(seed, "epoch", epoch)).permutation(self._rows)
        if self._pictures is None:
            return order
        _, firsts, groups = np.unique(self._pictures[order], return_index=True, return_inverse=True)
        return order[np.argsort(firsts[groups], kind="stable")]


def encode_all(
    rows: Iterable[Row], encode: Callable[[Row], Example]
) -> tuple[list[Example], dict[str, str]]:
    """Encodes rows; those that cannot be used come back as key → reason."""
    examples, dropped = [], {}
    for row in rows:
        try:
            examples.append(encode(row))
        except RecordError as error:
            dropped[str(row["key"])] = f"{type(error).__name__}: {error}"
    return examples, dropped


def _number(pictures: Sequence[str]) -> int:
    """A positive number of 63 bits."""
    told = hashlib.sha256(json.dumps(list(pictures)).encode()).digest()
    return int.from_bytes(told[:8]) >> 1


def _record(kind: Any, row: Row) -> Any:
    try:
        return kind.from_json(row)
    except RecordFormatError as error:
        key = row.get("key", "without a key")
        raise UserError(f"training row {key}: {error}; remake the set") from None

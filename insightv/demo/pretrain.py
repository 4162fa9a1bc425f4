"""Makes the embedded model again from nothing, on a CPU: ``python -m insightv.demo.pretrain``.

The model is taught on charts of *random* values, drawn as it goes (no table of any
question set is seen), and on the training pictures of easy-vqa. Three things make this
possible in the better part of an hour on two cores:

* a dense loss on the picture tokens: each patch, after the projector, must resemble the
  embeddings of the label and of the value of the mark it belongs to. The first minutes
  train nothing else, at ten times the pictures a second that the whole model would see;
* many short lessons share one picture: a block mask keeps them apart;
* plain bfloat16 attention and compiled layers (a third of the time of the defaults).

The scorer has a dense loss of its own: at every value stated in a path, a linear head tells
whether it is the one in the picture. Both heads are thrown away afterwards.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from insightv.demo import tiny
from insightv.demo.charts import LARGEST, SIZE, Chart, draw, make_chart, mark_of_patch
from insightv.demo.lessons import (
    Lesson,
    mixed_lessons,
    retrieval_lessons,
    scoring_lesson,
    shape_lessons,
)
from insightv.demo.practice import Sampled, sample_own_paths
from insightv.demo.tables import tables, vocabulary

FOLDER = Path(__file__).parent / "model"
PREFIX = tiny.TOKENS + 2
"""``<s><user>`` and the picture tokens."""


@dataclass
class Options:
    """Settings of a pretraining run.

    Attributes:
        out: Folder to write.
        minutes: Time for training, start-up and compilation not counted.
        processes: Data-parallel processes, one thread each.
        rate: Peak learning rate.
        seed: Seed of weights and charts.
        compiled: Compile the layers (needs a C++ compiler); twice as fast.
        start: Folder of a model to go on from; none for a fresh one.
        seeing: Share of the time in which only the picture tokens are trained.
    """

    out: Path = FOLDER
    minutes: float = 40.0
    processes: int = 2
    rate: float = 1.5e-3
    seed: int = 0
    compiled: bool = True
    start: Path | None = None
    seeing: float = 0.4


@dataclass(frozen=True)
class Shape:
    """How a batch is laid out: pictures, and text tokens behind each picture."""

    pictures: int
    text: int


SEEING = Shape(96, 0)
READING = Shape(48, 128)
SCORING = Shape(16, 384)


@dataclass
class Batch:
    """One batch; ``pictures`` rows of ``PREFIX + text`` tokens."""

    pixels: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    tags: torch.Tensor
    patch_labels: torch.Tensor
    patch_values: torch.Tensor


def random_chart(rng: random.Random) -> Chart:
    """A chart of random values under labels as they occur together in real tables."""
    count = rng.randint(3, 6)
    if rng.random() < 0.7:
        labels = rng.choice(tables()).labels
        if len(labels) < count:
            labels = tuple(vocabulary())
        if rng.random() < 0.6:
            first = rng.randrange(len(labels) - count + 1)
            chosen = labels[first : first + count]
        else:
            chosen = tuple(rng.sample(labels, count))
    else:
        chosen = tuple(rng.sample(vocabulary(), count))
    top = rng.choice((8, 15, 20, 30, LARGEST, LARGEST))
    values = [rng.randint(1, top) for _ in chosen]
    if rng.random() < 0.3:
        values.sort(reverse=rng.random() < 0.5)
    elif rng.random() < 0.3:  # a slowly changing series
        values = [rng.randint(3, LARGEST - 3)]
        while len(values) < count:
            values.append(min(LARGEST, max(1, values[-1] + rng.randint(-5, 5))))
    return make_chart(rng, chosen, tuple(values))


def build_vocabulary() -> set[str]:
    """Every word of the lessons, the labels and the questions of easy-vqa."""
    from insightv.demo.shapes import training_pictures

    rng, texts = random.Random(1), []
    for _ in range(3000):
        chart = random_chart(rng)
        lessons = [*mixed_lessons(chart, rng), scoring_lesson(chart, rng)]
        texts += [turn for lesson in lessons for turn in lesson.turns]
    for _, pairs in training_pictures():
        texts += [text for pair in pairs for text in pair]
    words = tiny.words_of(texts) | set(vocabulary()) | {f"[{k}]" for k in range(1, 10)}
    return words | {"(A)", "(B)", "(C)", "(D)", "none", "unclear"}


class Teacher:
    """Turns charts and lessons into batches."""

    def __init__(self, tokenizer: object, seed: int):
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        from insightv.demo.shapes import training_pictures

        self.shapes = training_pictures()
        self.sampled: list[Sampled] = []
        token = tokenizer.convert_tokens_to_ids  # type: ignore[attr-defined]
        self.user, self.assistant, self.end = token("<user>"), token("<assistant>"), token("</s>")
        self.image, self.start = token("<image>"), token("<s>")
        self.title, self.read = token(tiny.FRAMES[0]), token("▁Read")
        self.closing = {token(tiny.FRAMES[2]), token(tiny.FRAMES[3])}
        self.label_ids = [token("▁" + label) for label in vocabulary()]
        self.number_ids = [token(f"▁{value}") for value in range(LARGEST + 1)]
        self._label_of = {label: k for k, label in enumerate(vocabulary())}
        self._label_by_id = dict(zip(self.label_ids, vocabulary(), strict=True))
        self._number_by_id = {token(f"▁{value}"): value for value in range(101)}

    def batch(self, kind: str) -> Batch:
        """A batch of ``seeing`` (no text), ``mixed``, ``retrieval`` or ``scoring`` lessons."""
        shape = {"seeing": SEEING, "scoring": SCORING}.get(kind, READING)
        charts: list[Chart | None] = []
        images, lessons = [], []
        for _ in range(shape.pictures):
            if kind == "mixed" and self.rng.random() < 0.1:
                image, pairs = self.rng.choice(self.shapes)
                charts.append(None)
                images.append(image)
                lessons.append(shape_lessons(self.rng.sample(pairs, min(len(pairs), 6))))
                continue
            chart, chosen = self._chart_lessons(kind)
            charts.append(chart)
            images.append(draw(chart))
            lessons.append(chosen)
        return self._collate(charts, images, lessons, shape)

    def _chart_lessons(self, kind: str) -> tuple[Chart, list[Lesson]]:
        if kind == "seeing":
            return random_chart(self.rng), []
        if kind == "mixed":
            chart = random_chart(self.rng)
            return chart, mixed_lessons(chart, self.rng)
        if kind == "retrieval":
            chart = random_chart(self.rng)
            return chart, retrieval_lessons(chart, self.rng)
        if self.sampled and self.rng.random() < 0.6:
            own = self.rng.choice(self.sampled)
            return own.chart, [scoring_lesson(own.chart, self.rng, (own.question, own.paths))]
        chart = random_chart(self.rng)
        return chart, [scoring_lesson(chart, self.rng) for _ in range(2)]

    def _collate(
        self,
        charts: list[Chart | None],
        images: list,
        lessons: list[list[Lesson]],
        shape: Shape,
    ) -> Batch:
        rows, length = shape.pictures, PREFIX + shape.text
        ids = np.zeros((rows, length), np.int64)
        segment = np.full((rows, length), -1, np.int64)
        positions = np.zeros((rows, length), np.int64)
        labels = np.full((rows, length), -100, np.int64)
        tags = np.full((rows, length), -100, np.int64)
        ids[:, 0], ids[:, 1], ids[:, 2:PREFIX] = self.start, self.user, self.image
        segment[:, :PREFIX], positions[:, :PREFIX] = 0, np.arange(PREFIX)
        turns = [turn for row in lessons for lesson in row for turn in lesson.turns]
        encoded = iter(self.tokenizer(turns or [""], add_special_tokens=False)["input_ids"])  # type: ignore[operator]
        for row, chosen in enumerate(lessons):
            offset = PREFIX
            for number, lesson in enumerate(chosen, 1):
                text, target = self._chat([next(encoded) for _ in lesson.turns])
                size = len(text)
                if offset + size > length:
                    continue
                here = slice(offset, offset + size)
                ids[row, here], segment[row, here] = text, number
                positions[row, here] = np.arange(PREFIX, PREFIX + size)
                labels[row, here] = np.where(target, text, -100)
                chart = charts[row]
                if lesson.scoring and chart is not None:
                    tags[row, here] = self._tags(text, target, chart)
                offset += size
        seg = torch.from_numpy(segment)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        seen = ((seg[:, None, :] == 0) | (seg[:, None, :] == seg[:, :, None])) & causal
        mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill_(~seen, -1e4)
        patch_labels, patch_values = self._patches(charts)
        pixels = np.stack([np.asarray(image) for image in images])
        return Batch(
            pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1,
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            mask=mask[:, None],
            labels=torch.from_numpy(labels),
            tags=torch.from_numpy(tags),
            patch_labels=patch_labels,
            patch_values=patch_values,
        )

    def _chat(self, turns: list[list[int]]) -> tuple[list[int], list[bool]]:
        """Token ids of a chat behind the picture, and which of them are learned."""
        text: list[int] = []
        target: list[bool] = []
        for number, turn in enumerate(turns):
            reply = number % 2 == 1
            lead = [self.assistant] if reply else ([self.user] if number else [])
            tail = [self.end] if reply else []
            text += lead + turn + tail
            target += [False] * len(lead) + [reply] * (len(turn) + len(tail))
        return text, target

    def _tags(self, text: list[int], target: list[bool], chart: Chart) -> list[int]:
        """1 at values stated rightly, 0 at values misstated, in the readings of a prompt."""
        table, tags, reading = chart.table, [-100] * len(text), False
        for k in range(1, len(text)):
            if target[k]:
                break
            if text[k - 1] == self.title:
                reading = text[k] == self.read
            elif text[k] in self.closing:
                reading = False
            elif reading and text[k] in self._number_by_id:
                label = self._label_by_id.get(text[k - 1])
                if label in table:
                    tags[k] = int(table[label] == self._number_by_id[text[k]])
        return tags

    def _patches(self, charts: list[Chart | None]) -> tuple[torch.Tensor, torch.Tensor]:
        """The label and the value each picture token should carry (-100: none)."""
        side = SIZE // tiny.PATCH
        labels = np.full((len(charts), side * side), -100, np.int64)
        values = labels.copy()
        for row, chart in enumerate(charts):
            if chart is None:
                continue
            marks = np.array(mark_of_patch(chart, side)).reshape(-1)
            inside = marks >= 0
            names = np.array([self._label_of[label] for label in chart.labels])
            labels[row, inside] = names[marks[inside]]
            values[row, inside] = np.array(chart.values)[marks[inside]]
        return torch.from_numpy(labels), torch.from_numpy(values)


def _plain_attention(module, query, key, value, attention_mask=None, scaling=1.0, **_):  # type: ignore[no-untyped-def]
    """Attention as three matrix products in bfloat16: on CPU, SDPA's backward is slower."""
    query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        scores = (query * scaling) @ key.transpose(2, 3)
        if attention_mask is not None:
            scores = scores + attention_mask
        out = torch.softmax(scores, -1) @ value
    return out.transpose(1, 2).contiguous(), None


class Learner:
    """The model with its two throw-away heads, and the switch between learning and writing."""

    def __init__(self, options: Options, tokenizer: object):
        torch.manual_seed(options.seed)
        if options.start is None:
            self.model = tiny.build_model(tokenizer)  # type: ignore[arg-type]
        else:
            self.model = LlavaForConditionalGeneration.from_pretrained(
                options.start, dtype=torch.float32
            )
        hidden = self.model.config.text_config.hidden_size
        self.tag_head = torch.nn.Linear(hidden, 2)
        self._projected: list[torch.Tensor] = []
        self.model.model.multi_modal_projector.register_forward_hook(
            lambda module, inputs, output: self._projected.append(output)
        )
        AttentionInterface.register("plain", _plain_attention)
        tower = self.model.model.vision_tower
        encoder = getattr(tower, "encoder", None) or tower.vision_model.encoder
        self._layers = [*self.model.model.language_model.layers, *encoder.layers]
        self._eager = [layer.forward for layer in self._layers]
        torch._dynamo.config.recompile_limit = 64
        self._fast = [
            torch.compile(forward, dynamic=False) if options.compiled else forward
            for forward in self._eager
        ]
        self.learning()

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """All trained parameters, the heads' included."""
        yield from self.model.parameters()
        yield from self.tag_head.parameters()

    def learning(self) -> None:
        """Compiled layers and plain attention."""
        self._switch("plain", self._fast)
        self.model.train()

    def writing(self) -> None:
        """The model as its users will run it."""
        self._switch("sdpa", self._eager)
        self.model.eval()

    def _switch(self, attention: str, forwards: list) -> None:
        self.model.model.language_model.config._attn_implementation = attention
        self.model.model.vision_tower.config._attn_implementation = attention
        for layer, forward in zip(self._layers, forwards, strict=True):
            layer.forward = forward

    def loss(self, batch: Batch, teacher: Teacher, dense: float) -> tuple[torch.Tensor, dict]:
        """Cross-entropy of the replies, plus the dense losses; and the parts as numbers."""
        self._projected.clear()
        if batch.ids.shape[1] == PREFIX:
            with torch.autocast("cpu", torch.bfloat16):
                self.model.model.get_image_features(pixel_values=batch.pixels)
            return self._dense(batch, teacher)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model.model(
                input_ids=batch.ids,
                pixel_values=batch.pixels,
                position_ids=batch.positions,
                attention_mask=batch.mask,
                use_cache=False,
            ).last_hidden_state
            wanted = batch.labels[:, 1:] != -100
            logits = self.model.lm_head(hidden[:, :-1][wanted])
        loss = F.cross_entropy(logits.float(), batch.labels[:, 1:][wanted])
        parts = {"reply": loss.item()}
        if dense > 0 and (batch.patch_labels != -100).any():
            seeing, numbers = self._dense(batch, teacher)
            loss = loss + dense * seeing
            parts |= numbers
        tagged = batch.tags != -100
        if tagged.any():
            tag = F.cross_entropy(self.tag_head(hidden[tagged].float()), batch.tags[tagged])
            loss = loss + tag
            parts["tag"] = tag.item()
        return loss, parts

    def _dense(self, batch: Batch, teacher: Teacher) -> tuple[torch.Tensor, dict]:
        """How well each picture token resembles its mark's label and value."""
        seen = self._projected[0].float()
        seen = seen.reshape(-1, seen.shape[-1])
        words = self.model.model.language_model.embed_tokens.weight
        label = F.cross_entropy(seen @ words[teacher.label_ids].T, batch.patch_labels.reshape(-1))
        value = F.cross_entropy(seen @ words[teacher.number_ids].T, batch.patch_values.reshape(-1))
        return label + value, {"label": label.item(), "value": value.item()}


def lesson_kind(spoken: float, rng: random.Random) -> str:
    """What to teach when a share ``spoken`` of the time with text has passed.

    First to speak, then to retrieve by label, and at last to judge.
    """
    if spoken < 0.2:
        return "mixed"
    if spoken < 0.38:
        return rng.choices(("mixed", "retrieval"), (4, 6))[0]
    return rng.choices(("mixed", "retrieval", "scoring"), (40, 25, 35))[0]


def train(rank: int, options: Options, meeting: str) -> None:
    """One data-parallel process of the training; rank 0 writes the folder."""
    torch.set_num_threads(1)
    if options.processes > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=options.processes
        )
    if options.start is None:
        tokenizer = tiny.build_tokenizer(build_vocabulary())
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.start)
    teacher = Teacher(tokenizer, options.seed * 1000 + rank)
    schedule = random.Random(options.seed)  # the same kinds of lessons on every rank
    learner = Learner(options, tokenizer)
    parameters = list(learner.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
    for kind in ("seeing", "mixed", "scoring"):  # compile before the clock starts
        learner.loss(teacher.batch(kind), teacher, 1.0)[0].backward()
        optimizer.zero_grad()
    clock = Clock(options, rank)
    while (done := clock.done()) < 1:
        spoken = (done - options.seeing) / (1 - options.seeing)
        if spoken > 0.78 and not teacher.sampled:
            learner.writing()
            teacher.sampled = sample_own_paths(learner.model, tokenizer, teacher.rng, random_chart)
            learner.learning()
            clock.note(sampled=len(teacher.sampled))
        rate = options.rate * min(1, done / 0.03) * (0.485 * (1 + math.cos(math.pi * done)) + 0.03)
        for group in optimizer.param_groups:
            group["lr"] = rate
        kind = "seeing" if spoken < 0 else lesson_kind(spoken, schedule)
        loss, parts = learner.loss(teacher.batch(kind), teacher, 1.0 if spoken < 0.4 else 0.3)
        loss.backward()
        average_gradients(parameters, options.processes)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(kind, parts)
        if rank == 0 and clock.due():
            learner.writing()
            save(learner.model, tokenizer, options.out, clock.log)
            learner.learning()
    if rank == 0:
        learner.writing()
        save(learner.model, tokenizer, options.out, clock.log)


def average_gradients(parameters: list[torch.nn.Parameter], processes: int) -> None:
    """One all-reduce over all gradients."""
    if processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:  # every rank reduces the same tensors
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    dist.all_reduce(flat)
    flat /= processes
    offset = 0
    for parameter in parameters:
        size = parameter.numel()
        assert parameter.grad is not None
        parameter.grad.copy_(flat[offset : offset + size].view_as(parameter))
        offset += size


class Clock:
    """Time of rank 0, shared by all, and the log."""

    def __init__(self, options: Options, rank: int):
        self.options, self.rank = options, rank
        self.began = time.monotonic()
        self.steps = 0
        self.log: list[dict] = []
        self._sums: dict[str, list[float]] = {}
        self._noted = self._saved = self.began

    def done(self) -> float:
        """Share of the time that has passed, the same on every rank."""
        share = torch.tensor((time.monotonic() - self.began) / (60 * self.options.minutes))
        if self.options.processes > 1:
            dist.broadcast(share, 0)
        return share.item()

    def step(self, kind: str, parts: dict[str, float]) -> None:
        """Counts a step; prints the means of the last half minute."""
        self.steps += 1
        for name, value in parts.items():
            self._sums.setdefault(f"{kind}_{name}", []).append(value)
        if time.monotonic() - self._noted > 30:
            self.note(**{name: sum(v) / len(v) for name, v in self._sums.items()})
            self._sums.clear()

    def note(self, **numbers: float) -> None:
        """Adds a line to the log."""
        self._noted = time.monotonic()
        minutes = (self._noted - self.began) / 60
        line = {"minutes": round(minutes, 2), "steps": self.steps}
        line |= {name: round(value, 3) for name, value in numbers.items()}
        self.log.append(line)
        if self.rank == 0:
            print(json.dumps(line), flush=True)

    def due(self) -> bool:
        """Whether five minutes have passed since the folder was last written."""
        if time.monotonic() - self._saved < 300:
            return False
        self._saved = time.monotonic()
        return True


def save(model: LlavaForConditionalGeneration, tokenizer: object, out: Path, log: list) -> None:
    """Writes the folder: half-precision safetensors, tokenizer, processor, log."""
    state = {name: value.to(torch.float16) for name, value in model.state_dict().items()}
    model.save_pretrained(out, state_dict=state)
    tiny.build_processor(tokenizer).save_pretrained(out)  # type: ignore[arg-type]
    (out / "pretraining.json").write_text("\n".join(json.dumps(line) for line in log) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Pretrain the embedded model from nothing.")
    defaults = Options()
    parser.add_argument("--out", type=Path, default=defaults.out)
    parser.add_argument("--minutes", type=float, default=defaults.minutes)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rate", type=float, default=defaults.rate)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--start", type=Path, default=None)
    parser.add_argument("--seeing", type=float, default=defaults.seeing)
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    options = Options(**vars(parser.parse_args()))
    # Keep freed memory: mapping it anew for every step costs a tenth of the time.
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
    meeting = tempfile.mktemp(prefix="insightv-pretrain-")
    if options.processes == 1:
        train(0, options, meeting)
    else:
        torch.multiprocessing.spawn(train, (options, meeting), nprocs=options.processes)


if __name__ == "__main__":
    main()

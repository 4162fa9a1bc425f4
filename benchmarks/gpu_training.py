"""Full fine-tuning and DPO of real architectures on one GPU, with random weights, in one run.

Measured are the largest base whose full fine-tuning with AdamW fits the GPU (frozen vision
tower, recomputation, bf16), its model FLOP utilisation, and DPO with shared prefixes against the
same pairs unshared. Each is a step of the `torch` backend as `insightv train` takes it; only the
weights are random and the samples made up. A base that does not fit is told, and the next
smaller one is tried. Attention is tried segment by segment (SDPA) and with FlexAttention.

Utilisation counts the model's own operations (`insightv.training.balance.Cost`): neither what
recomputation does twice, nor padding, nor attention in the vision tower.

    python benchmarks/gpu_training.py          on a GPU; writes benchmarks/results/gpu_training.json
    python benchmarks/gpu_training.py --dry    tiny sizes, on any machine, so that each line runs
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from torch.nn.attention.flex_attention import flex_attention  # noqa: E402
from transformers import (  # noqa: E402
    AttentionInterface,
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
)

from insightv import chats, models  # noqa: E402
from insightv.training import policy, torch_backend  # noqa: E402
from insightv.training.attention import attention_mask  # noqa: E402
from insightv.training.batches import Example, Reply  # noqa: E402
from insightv.training.config import DPOConfig, SFTConfig  # noqa: E402
from insightv.training.objectives import Preference, Supervised, Totals  # noqa: E402
from insightv.training.packing import Batch, Planned, Tree  # noqa: E402
from insightv.training.torch_backend import TorchBackend  # noqa: E402
from insightv.training.utilisation import device_peak  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gpu_training.json"
TARGETS = {"mfu": 0.45, "sharing": 1.6}
LAST_START = 420.0
"""Seconds after which no further part is begun, so that the run ends within nine minutes."""


@dataclass(frozen=True)
class Size:
    """An architecture of the Qwen2.5-VL family; the names are those of its configuration."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vision_intermediate: int
    tied: bool = False
    vocab_size: int = 152064
    depth: int = 32
    vision_hidden: int = 1280

    def config(self) -> Qwen2_5_VLConfig:
        head = self.hidden_size // self.num_attention_heads
        text = {
            name: value
            for name, value in asdict(self).items()
            if name.startswith(("hidden", "intermediate", "num_", "vocab"))
        }
        sections = [head // 8, 3 * head // 16, 3 * head // 16]
        return Qwen2_5_VLConfig(
            text_config=text
            | {
                "max_position_embeddings": 128000,
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": sections,
                    "rope_theta": 1000000.0,
                },
            },
            vision_config={
                "depth": self.depth,
                "hidden_size": self.vision_hidden,
                "intermediate_size": self.vision_intermediate,
                "num_heads": 16,
                "out_hidden_size": self.hidden_size,
                "fullatt_block_indexes": [self.depth // 4 * n - 1 for n in range(1, 5)],
            },
            tie_word_embeddings=self.tied,
            image_token_id=self.vocab_size - 1,
            video_token_id=self.vocab_size - 2,
        )


BASES = (
    Size("Qwen2.5-VL-7B", 3584, 18944, 28, 28, 4, 3420),
    Size("Qwen2.5-VL-3B", 2048, 11008, 36, 16, 2, 3420, tied=True, vocab_size=151936),
)
TINY = Size("tiny", 128, 256, 2, 2, 1, 64, vocab_size=1000, depth=4, vision_hidden=64)


@dataclass(frozen=True)
class Shape:
    """What a step holds.

    Attributes:
        grid: Patches of a picture's sides; four patches are a token.
        question: Tokens behind the picture.
        answers: Tokens of the answers, taken in turn; a pair takes two.
        samples: Samples of an SFT step.
        pairs: Pairs of a DPO step.
        budget: Tokens of a micro-batch.
        steps: Measured steps, behind one that is not.
    """

    grid: int = 96  # 1344 × 1344 pixels, 2304 tokens: a chart that can be read
    question: int = 96
    answers: tuple[int, ...] = (512, 384, 640, 448)
    samples: int = 24
    pairs: int = 16
    budget: int = 16384
    steps: int = 3


SMALL = Shape(8, 5, (12, 9, 15), 4, 2, 120, 1)


class Samples:
    """Made-up samples: a noise picture, a question, one answer or two."""

    def __init__(self, size: Size, shape: Shape, positions: Callable[[Any], torch.Tensor]):
        self.size, self.shape, self.positions = size, shape, positions
        self.generator = torch.Generator().manual_seed(0)

    def tree(self, number: int, replies: int) -> Tree:
        """A sample (1 reply) or a pair (2), laid out with its prefix once."""
        answers, made = self.shape.answers, []
        prompt = self._prompt()
        for reply in range(replies):
            length = answers[(number * replies + reply) % len(answers)]
            ids = prompt.ids + self._words(length)
            marks = {k: [*v, *[0] * length] for k, v in prompt.marks.items()}
            whole = chats.Encoding(ids, marks, prompt.pictures)
            made.append(Reply(whole, ((len(prompt.ids), len(ids)),)))
        reference = (-50.0,) * replies if replies > 1 else ()
        return Tree.of([Example(f"{number:04d}", tuple(made), reference)], self.positions)

    def _prompt(self) -> chats.Encoding:
        side, tokens = self.shape.grid, self.shape.grid**2 // 4
        pixels = torch.randn(side * side, 3 * 2 * 14 * 14, generator=self.generator)
        grid = torch.tensor([[1, side, side]])
        ids = [self.size.vocab_size - 1] * tokens
        tensors = {"pixel_values": pixels, "image_grid_thw": grid}
        marks = {"mm_token_type_ids": [1] * tokens}
        shown = chats.EncodedPicture(ids, marks, tensors)
        words = self._words(self.shape.question)
        marks = {"mm_token_type_ids": [*marks["mm_token_type_ids"], *[0] * len(words)]}
        return chats.Encoding(ids + words, marks, (shown,))

    def _words(self, count: int) -> list[int]:
        most = self.size.vocab_size - 10
        return torch.randint(5, most, (count,), generator=self.generator).tolist()


def unshared(tree: Tree) -> Tree:
    """The same pair as two sequences, each with its picture and question."""
    prefix, *branches = tree.lengths
    ids: list[int] = []
    marks: dict[str, list[int]] = {name: [] for name in tree.marks}
    positions, starts, begin = [], [], prefix
    for length in branches:
        places = [*range(prefix), *range(begin, begin + length)]
        starts.append(len(ids) - (begin - prefix))
        ids += [tree.ids[place] for place in places]
        for name, values in marks.items():
            values += [tree.marks[name][place] for place in places]
        positions.append(tree.positions[..., places])
        begin += length
    moved, prefix_starts = [], [0, prefix + branches[0]]
    for place, owner in zip(tree.places, tree.owners, strict=True):
        offset = starts[owner] if place >= prefix else prefix_starts[owner]
        moved.append(place + offset)
    return replace(
        tree,
        ids=ids,
        marks=marks,
        positions=torch.cat(positions, dim=-1),
        lengths=(0, *(prefix + length for length in branches)),
        places=moved,
        pictures=tree.pictures * len(branches),
    )


def backend_of(size: Size, config: Any) -> TorchBackend:
    """A `TorchBackend` whose weights are random and made on the device."""
    auto: Any = AutoModelForImageTextToText

    def load(folder: Any, device: str, dtype: str) -> models.LoadedModel:
        place = models.pick_device(device)
        with torch.device("meta"):
            model = auto.from_config(size.config(), dtype=torch.float32)
        buffers = dict(model.named_buffers())
        model.to_empty(device=place)
        _fill(model, size, buffers, place)
        return models.LoadedModel(
            model.eval(), None, SimpleNamespace(pad_token_id=0), "random weights"
        )

    real, torch_backend.models.load = torch_backend.models.load, load
    try:
        return TorchBackend(Path("random"), config)
    finally:
        torch_backend.models.load = real


@torch.no_grad()
def _fill(model: Any, size: Size, buffers: dict[str, Any], place: str) -> None:
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            weight.normal_(0.0, 0.02)
    model.tie_weights()
    # Rotary frequencies are computed when a module is made: a small model's, with these heads.
    auto: Any = AutoModelForImageTextToText
    small = auto.from_config(replace(size, num_hidden_layers=1, depth=4, vocab_size=64).config())
    known = dict(small.named_buffers())
    for name in buffers:
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, known[name].to(place))


class Clock:
    """Seconds and peak memory, of the GPU where there is one."""

    def __init__(self, device: str):
        self.cuda, self.began = device.startswith("cuda"), time.monotonic()

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.monotonic() - self.began

    def restart(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float | None:
        return round(torch.cuda.max_memory_allocated() / 2**30, 1) if self.cuda else None


def packed(backend: TorchBackend, trees: Sequence[Tree]) -> list[Batch]:
    packer = backend.packer
    costs = [packer.cost(tree) for tree in trees]
    [plan] = packer.plan([len(tree.ids) for tree in trees], costs)
    made: list[Planned] = plan
    return packer.made(made, trees.__getitem__)


def measure(
    backend: TorchBackend,
    objective: Any,
    trees: Sequence[Tree],
    steps: int,
    clock: Clock,
    peak: Any,
) -> dict[str, Any]:
    """Seconds of a step, and what follows from them."""
    batches = packed(backend, trees)
    totals = Totals.of(batches)
    clock.restart()
    outcome = backend.step(batches, totals, objective, 1e-6)
    seconds = []
    for _ in range(steps):
        began = clock.now()
        outcome = backend.step(batches, totals, objective, 1e-6)
        seconds.append(clock.now() - began)
    work = sum(backend.packer.cost(tree) for tree in trees)
    best = min(seconds)
    return {
        "seconds": [round(one, 3) for one in seconds],
        "samples": len(trees),
        "tokens": totals.tokens,
        "micro_batches": len(batches),
        "packing_efficiency": round(totals.tokens / totals.places, 4),
        "tokens_per_second": round(totals.tokens / best),
        "operations": work,
        "mfu": round(work / best / peak, 4) if peak else None,
        "peak_gib": clock.peak(),
        "loss": outcome.loss,
        "applied": outcome.applied,
    }


def flex_layer(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    block: Any,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """FlexAttention as transformers calls an attention; its mask is ``block``."""
    attend = _COMPILED if query.is_cuda else flex_attention
    seen = attend(query, key, value, block_mask=block, scale=scaling, enable_gqa=True)
    return seen.transpose(1, 2).contiguous(), None


_COMPILED = torch.compile(flex_attention, dynamic=False)
FLEX = "insightv_flex"
AttentionInterface.register(FLEX, flex_layer)


class Flex:
    """FlexAttention in place of the backend's own choice, while it lasts."""

    def __init__(self, backend: TorchBackend):
        self.backend, self.real = backend, policy.LogProbs.__call__

    def __enter__(self) -> None:
        self.backend.packer.multiple = 128  # tokens of a block
        policy.LogProbs.__call__ = self.call  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        self.backend.packer.multiple = 1
        policy.LogProbs.__call__ = self.real  # type: ignore[method-assign]
        self.backend._logps._set = ("", "")  # so that what was set before is set again

    def call(self, batch: Batch, most: int = 0) -> torch.Tensor:
        model = self.backend.model
        model.set_attn_implementation({"": "sdpa", "vision_config": "sdpa", "text_config": FLEX})
        inputs = {**batch.inputs, "use_cache": False, "block": attention_mask(batch, "flex")}
        pieces = -(-len(batch.targets) * model.config.get_text_config().vocab_size // policy.LOGITS)
        half = torch.autocast(batch.segments.device.type, torch.bfloat16)
        with half:
            hidden = model.model(**inputs).last_hidden_state.flatten(0, 1)[batch.places]
            cut = policy._in_pieces(model.lm_head, hidden, batch.targets, max(1, pieces))
            return torch.cat(list(cut))


def run(size: Size, shape: Shape, device: str, clock: Clock, peak: float | None) -> dict[str, Any]:
    """All figures of one base; raises torch's error if it does not fit."""
    common = {"device": device, "recompute": True, "tokens_per_micro_batch": shape.budget}
    backend = backend_of(size, SFTConfig(precision="bf16", **common))
    counted = {
        "parameters": sum(weight.numel() for weight in backend.model.parameters()),
        "trained": sum(w.numel() for w in backend.model.parameters() if w.requires_grad),
    }
    samples = Samples(size, shape, backend.packer.positions)
    singles = [samples.tree(number, 1) for number in range(shape.samples)]
    pairs = [samples.tree(number, 2) for number in range(shape.pairs)]
    preference = Preference(DPOConfig(terms={"sigmoid": 1.0}))
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "sft": partial(measure, backend, Supervised(), singles),
        "dpo_shared": partial(measure, backend, preference, pairs),
        "dpo_unshared": partial(measure, backend, preference, [unshared(tree) for tree in pairs]),
    }
    found: dict[str, Any] = {"base": size.name, **counted}
    # Before anything is trained, both layouts of a pair have one loss, up to rounding.
    found["loss_of_a_pair"] = [
        backend.loss(backend.packer.alone(tree), preference)
        for tree in (pairs[0], unshared(pairs[0]))
    ]
    for name, part in parts.items():
        found[name] = part(shape.steps, clock, peak)
        print(f"{size.name} {name}: {found[name]}", flush=True)
    for name in ("sft", "dpo_shared"):
        if clock.now() > LAST_START:
            found[f"{name}_flex"] = "not measured: no time was left"
            continue
        try:
            with Flex(backend):
                found[f"{name}_flex"] = parts[name](shape.steps, clock, peak)
        except Exception as error:  # a kernel that is not there is a finding, not the end
            found[f"{name}_flex"] = f"not measured: {type(error).__name__}: {str(error)[:200]}"
        print(f"{size.name} {name}_flex: {found[f'{name}_flex']}", flush=True)
    shared, whole = found["dpo_shared"], found["dpo_unshared"]
    found["sharing"] = round(min(whole["seconds"]) / min(shared["seconds"]), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on a CPU if need be")
    parser.add_argument("--out", type=Path, help="where the results go")
    arguments = parser.parse_args()
    device = models.pick_device("auto")
    if not arguments.dry and device == "cpu":
        parser.error("there is no GPU here; --dry runs tiny sizes on a processor")
    name = torch.cuda.get_device_name() if device == "cuda" else "processor"
    peak = device_peak(name, "bf16")
    clock, failed, found = Clock(device), {}, None
    bases, shape = ((TINY,), SMALL) if arguments.dry else (BASES, Shape())
    for size in bases:
        try:
            found = run(size, shape, device, clock, peak)
            break
        except torch.OutOfMemoryError as error:
            failed[size.name] = str(error).splitlines()[0]
            print(f"{size.name} does not fit: {failed[size.name]}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    told = {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dry": arguments.dry,
        "shape": asdict(shape),
        "peak_operations_per_second": peak,
        "targets": TARGETS,
        "does_not_fit": failed,
        "measured": found,
        "seconds": round(clock.now(), 1),
    }
    out = arguments.out or (None if arguments.dry else RESULTS)
    text = json.dumps(told, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""megatron-core against transformers: logits, gradients and weights, on every layout."""

from __future__ import annotations

import json
from pathlib import Path

import families
import megatron_ranks
import pytest
import torch
from megatron_ranks import FAMILIES, FROZEN, LAYOUTS, Case
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Qwen3Config

pytest.importorskip(
    "megatron.core", reason="megatron-core is not installed: pip install -e '.[megatron]'"
)
from insightv.training.megatron.layout import Layout  # noqa: E402

BATCHES = 4
TEXTS = (
    ("{} What is the value of A? The answer is 3.",),
    ("Compare the two. {} A is larger than B.",),
    ("Which bar is the highest? No picture.",),
    ("{} Steps. Read the chart: 12 and 30.", "{} Steps. Read the bars. Then answer: B."),
)
"""Samples; the last is a tree: two replies that go on from one picture."""
PLAIN = ("tp1", "tp2", "pp2", "tp2-pp2")
RUNS = [
    *((family, layout) for family in FAMILIES for layout in PLAIN),
    *(("qwen2.5-vl", layout) for layout in LAYOUTS if layout not in PLAIN),
    ("llava-next", "tp2-pp2-sp"),
    *(("llava-onevision-tied", layout) for layout in ("tp2", "pp2", "tp2-pp2-sp")),
    ("llava-onevision-qwen3", "tp2-sp"),
]
STEPS = 5
ADAM = [
    ("whole", "tp2-pp2", 0, STEPS),
    ("half", "tp2-pp2", 0, 2),
    ("half:same", "tp2-pp2", 2, STEPS),
    ("half:tp2", "tp2", 2, STEPS),
    ("half:pp2-virtual", "pp2-virtual", 2, STEPS),
]
BF16 = [
    ("bf16", "tp2-sp", 0, STEPS),
    ("bf16-half", "tp2-sp", 0, 2),
    ("bf16-half:same", "tp2-sp", 2, STEPS),
]
"""Runs of Adam: name, layout, first step, end; the later ones go on from ``half``."""
_TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")
_PICTURE = {"qwen2.5-vl": "<|vision_start|><|image_pad|><|vision_end|>"}


def save_model(name: str, folder: Path) -> None:
    """A family's tiny model, or a variant of it: tied embeddings, Qwen3 as language model."""
    family = name.removesuffix("-tied").removesuffix("-qwen3")
    families.save_family(family, folder, layers=4)
    if family == name:
        return
    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    if name.endswith("-tied"):
        config.tie_word_embeddings = text.tie_word_embeddings = True
    else:
        text = Qwen3Config(**{k: v for k, v in text.to_dict().items() if k != "model_type"})
        text.head_dim = 32  # not hidden / heads
        config.text_config = text
    torch.manual_seed(1)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)


def make_case(name: str, folder: Path) -> tuple[Case, dict[str, torch.Tensor]]:
    """A model, its micro-batches in files, and what transformers makes of them."""
    save_model(name, folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    shown = next((v for k, v in _PICTURE.items() if name.startswith(k)), "<image>")
    samples = [_sample(processor, number, shown) for number in range(BATCHES)]
    width = max(sum(_lengths(replies)) for replies in samples)
    width += width % 2
    total = sum(sum(_lengths(replies)) - 1 for replies in samples)
    expected: dict[str, torch.Tensor] = {"loss": torch.zeros(())}
    for number, replies in enumerate(samples):
        batch, logits, loss = _expected(model, replies, width, total)
        expected[f"logits-{number}"] = logits
        expected["loss"] += loss
        place = folder.with_name(f"{name}-batch-{number}.safetensors")
        save_file(batch | {"total": torch.tensor(float(total))}, place)
    for weight_name, weight in model.named_parameters():
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        language = "language_model." in weight_name or "lm_head" in weight_name
        short = weight_name.removeprefix("model.").removeprefix("language_model.")
        expected[("language." if language else "vision.") + short] = gradient
    return Case(folder, BATCHES), expected


def _sample(processor, number: int, shown: str) -> list[dict[str, torch.Tensor]]:
    image = families.picture(number, 60 + 40 * (number % 2), 100 - 40 * (number % 2))
    replies = []
    for text in TEXTS[number]:
        images = [image] if "{}" in text else None
        replies.append(dict(processor(images, text=[text.format(shown)], return_tensors="pt")))
    return replies


def _lengths(replies: list[dict[str, torch.Tensor]]) -> list[int]:
    """Tokens of the shared beginning (all, if there is one reply) and of each branch."""
    first = replies[0]["input_ids"][0]
    if len(replies) == 1:
        return [len(first)]
    second = replies[1]["input_ids"][0]
    shortest = min(len(first), len(second))
    same = (first[:shortest] == second[:shortest]).long().cumprod(0).sum().item()
    return [same, len(first) - same, len(second) - same]


def _expected(model, replies, width: int, total: int):
    """A micro-batch as tensors; transformers' logits of its tokens and loss of its targets."""
    prefix, *branches = _lengths(replies)
    ids, positions, logits, loss = [], [], [], torch.zeros(())
    places, targets, segments = [], [], [torch.zeros(prefix)]
    for number, reply in enumerate(replies):
        own = reply["input_ids"][0]
        found = model(**reply).logits[0]
        begin = 0 if number == 0 else prefix
        at = torch.arange(len(own) - 1)
        moved = torch.where(at < prefix, at, at + sum(branches[:number]))
        # Every token of the first reply is a target; of the second those of its branch.
        learned = at >= begin - 1
        places.append(moved[learned])
        targets.append(own[1:][learned])
        chosen = found[:-1].log_softmax(-1).gather(1, own[1:, None])[learned]
        loss = loss - chosen.sum() / total
        ids.append(own[begin:])
        positions.append(_positions(model, reply)[..., begin:])
        logits.append(found[begin:].detach())
        if branches:
            segments.append(torch.full((branches[number],), number + 1.0))
    loss.backward()
    segment = torch.cat(segments)
    filled = width - len(segment)
    segment = torch.cat([segment, torch.full((filled,), -1.0)])
    seen = (segment[None] == segment[:, None]) | (segment[None] == 0)
    batch = {
        "input_ids": torch.nn.functional.pad(torch.cat(ids), (0, filled))[None],
        "position_ids": torch.nn.functional.pad(torch.cat(positions, -1), (0, filled)),
        "places": torch.cat(places),
        "targets": torch.cat(targets),
        **{f"picture.{k}": v for k, v in replies[0].items() if k not in _TEXT},
    }
    if branches:
        batch["mask"] = seen.tril()[None, None].contiguous()
    return {k: v.contiguous() for k, v in batch.items()}, torch.cat(logits), loss.detach()


def _positions(model, sample) -> torch.Tensor:
    """Positions as the family counts them."""
    length = sample["input_ids"].shape[1]
    if not hasattr(model.model, "get_rope_index"):
        return torch.arange(length)[None]
    found, _ = model.model.get_rope_index(
        sample["input_ids"],
        image_grid_thw=sample.get("image_grid_thw"),
        mm_token_type_ids=sample["mm_token_type_ids"],
    )
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All of it in one go: four processes that live once."""
    root = tmp_path_factory.mktemp("parity")
    cases, expected = {}, {}
    for name in dict.fromkeys(case for case, _ in RUNS):
        cases[name], expected[name] = make_case(name, root / name)
    out = root / "out"
    out.mkdir()
    megatron_ranks.spawn(megatron_ranks.parity, out, cases, RUNS)
    return cases, expected, out


@pytest.mark.parametrize(("case", "layout"), RUNS)
class TestParity:
    def test_logits_equal(self, made, case, layout):
        _, expected, out = made
        for number in range(BATCHES):
            ours = load_file(out / f"{case}-{layout}" / f"logits-{number}.safetensors")["logits"]
            theirs = expected[case][f"logits-{number}"]
            torch.testing.assert_close(ours[0, : len(theirs)], theirs, atol=1e-5, rtol=0)

    def test_loss_and_gradients_equal(self, made, case, layout):
        _, expected, out = made
        found = out / f"{case}-{layout}"
        losses = [load_file(file)["loss"] for file in found.glob("loss-*.safetensors")]
        torch.testing.assert_close(
            torch.stack(losses).sum(), expected[case]["loss"], atol=1e-5, rtol=0
        )
        ours = {}
        for file in found.glob("gradients-*.safetensors"):
            ours |= load_file(file)
        theirs = {k: v for k, v in expected[case].items() if k.split(".")[0] in _PARTS}
        assert any(v.abs().max() > 1e-3 for k, v in theirs.items() if k.startswith("vision."))
        if layout in FROZEN:
            theirs = {k: v for k, v in theirs.items() if "visual." not in k or "merger" in k}
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=0, msg=name)

    def test_round_trip_is_bit_equal(self, made, case, layout):
        cases, _, out = made
        before = _tensors(cases[case].folder)
        after = _tensors(out / f"{case}-{layout}" / "model")
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype
            assert torch.equal(tensor, after[name]), name


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    root = tmp_path_factory.mktemp("adam")
    case, _ = make_case("qwen2.5-vl", root / "qwen2.5-vl")
    out = root / "out"
    out.mkdir()
    megatron_ranks.spawn(megatron_ranks.adam, out, case, ADAM + BF16)
    return out, _adam(case)


def _adam(case: Case) -> dict[str, torch.Tensor]:
    """Losses, norms and weights of transformers' model under torch's Adam."""
    model = AutoModelForImageTextToText.from_pretrained(case.folder, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=megatron_ranks.RATE, weight_decay=0.0)
    processor = AutoProcessor.from_pretrained(case.folder)
    samples = [_sample(processor, number, _PICTURE["qwen2.5-vl"]) for number in range(BATCHES)]
    total = sum(sum(_lengths(replies)) - 1 for replies in samples)
    width = max(sum(_lengths(replies)) for replies in samples)
    losses, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses.append(sum(_expected(model, replies, width, total)[2] for replies in samples))
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), megatron_ranks.CLIP))
        optimizer.step()
    weights = {k.replace("model.language_model.", "model."): v for k, v in model.named_parameters()}
    weights = {k.replace("model.visual.", "visual."): v.detach() for k, v in weights.items()}
    return {"losses": torch.stack(losses), "norms": torch.stack(norms), **weights}


def _numbers(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    found = [load_file(file) for file in sorted(folder.glob("losses-*.safetensors"))]
    return sum(one["losses"] for one in found), found[0]["norms"]


@pytest.mark.parametrize("run", ADAM, ids=[name for name, *_ in ADAM])
def test_adam_equals_torch_also_resumed_on_another_layout(stepped, run):
    out, expected = stepped
    name, _, start, end = run
    losses, norms = _numbers(out / name)
    torch.testing.assert_close(losses, expected["losses"][start:end], atol=1e-4, rtol=0)
    torch.testing.assert_close(norms, expected["norms"][start:end], atol=1e-4, rtol=0)
    assert expected["losses"][-1] < expected["losses"][0] - 0.05
    after = _tensors(out / name / "model")
    assert after.keys() == expected.keys() - {"losses", "norms"}
    if end == STEPS:
        for weight, tensor in after.items():
            torch.testing.assert_close(tensor, expected[weight], atol=1e-3, rtol=0, msg=weight)


def test_bf16_follows_fp32_and_resumes_bit_equal(stepped):
    out, expected = stepped
    losses, norms = _numbers(out / "bf16")
    torch.testing.assert_close(losses, expected["losses"], atol=0.03, rtol=0)
    torch.testing.assert_close(norms, expected["norms"], atol=0.1, rtol=0)
    resumed, _ = _numbers(out / "bf16-half:same")
    assert torch.equal(losses[2:], resumed)
    state = _tensors(out / "bf16" / "state", "*")
    model = _tensors(out / "bf16" / "model")
    assert all(tensor.dtype == torch.bfloat16 for tensor in model.values())
    master = state["weight.language.norm.weight"]
    assert master.dtype == torch.float32
    assert torch.equal(master.bfloat16(), model["model.norm.weight"])
    assert not torch.equal(master.bfloat16().float(), master)


def test_a_resume_on_the_same_layout_is_bit_equal(stepped):
    out, _ = stepped
    losses, _ = _numbers(out / "whole")
    resumed, _ = _numbers(out / "half:same")
    assert torch.equal(losses[2:], resumed)
    for place in ("model", "state"):
        one, other = (_tensors(out / name / place, "*") for name in ("whole", "half:same"))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_large_layout_is_constructed_on_256_ranks(tmp_path):
    layout = Layout(tensor_parallel=8, pipeline_parallel=4, sequence_parallel=True, vision_layers=2)
    megatron_ranks.construct(tmp_path / "out.json", "Qwen2.5-VL-72B", 256, layout)
    made = json.loads((tmp_path / "out.json").read_text())
    assert made["data_parallel"] == 8
    assert [stage["layers"] for stage in made["stages"]] == [18, 21, 21, 20]
    second = made["stages"][1]["groups"]
    assert second["tensor"] == list(range(64, 72))
    assert second["data"] == list(range(64, 128, 8))
    assert second["pipeline"] == [0, 64, 128, 192]
    # The whole language model: what the base has, up to rows of padding and repeated norms.
    language = sum(stage["parameters"] for stage in made["stages"]) * 8
    assert 72.7e9 < language - 7 * 0.7e9 < 73.5e9


_PARTS = ("language", "vision")


def _tensors(folder: Path, stem: str = "model*") -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob(f"{stem}.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors

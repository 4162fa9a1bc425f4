"""megatron-core against transformers: logits, gradients and weights, on every layout."""

from __future__ import annotations

from pathlib import Path

import families
import megatron_ranks
import pytest
import torch
from megatron_ranks import FAMILIES, LAYOUTS, Case
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

pytest.importorskip(
    "megatron.core", reason="megatron-core is not installed: pip install -e '.[megatron]'"
)
BATCHES = 4
TEXTS = (
    "{} What is the value of A? The answer is 3.",
    "{} Which bar is the highest? B, by far.",
    "Compare the two. {} A is larger than B.",
    "{} Steps. Read the chart. Then answer: 12 and 30.",
)


def make_case(family: str, folder: Path, layers: int = 4) -> tuple[Case, dict[str, torch.Tensor]]:
    """A model, its micro-batches in files, and what transformers makes of them."""
    families.save_family(family, folder, layers=layers)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    samples = []
    for number, text in enumerate(TEXTS):
        image = families.picture(number, 60 + 40 * (number % 2), 100 - 40 * (number % 2))
        shown = "<|vision_start|><|image_pad|><|vision_end|>" if "qwen" in family else "<image>"
        samples.append(dict(processor([image], text=[text.format(shown)], return_tensors="pt")))
    width = max(sample["input_ids"].shape[1] for sample in samples)
    width += width % 2
    total = sum(sample["input_ids"].shape[1] - 1 for sample in samples)
    expected: dict[str, torch.Tensor] = {}
    for number, sample in enumerate(samples):
        ids = sample["input_ids"]
        length = ids.shape[1]
        logits = model(**sample).logits[0]
        chosen = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        (-chosen.sum() / total).backward()
        expected[f"logits-{number}"] = logits.detach()
        expected["loss"] = expected.get("loss", torch.zeros(())) - chosen.detach().sum() / total
        save_file(
            {
                "input_ids": torch.nn.functional.pad(ids, (0, width - length)),
                "position_ids": _positions(model, sample, width),
                "places": torch.arange(length - 1),
                "targets": ids[0, 1:].contiguous(),
                "total": torch.tensor(float(total)),
                **({"mask": torch.ones(width, width).tril().bool()[None, None]} if number else {}),
                **{f"picture.{name}": sample[name] for name in sample if name not in _TEXT},
            },
            folder.with_name(f"{family}-batch-{number}.safetensors"),
        )
    for name, weight in model.named_parameters():
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        part = "language." if "language_model." in name or "lm_head" in name else "vision."
        short = name.removeprefix("model.").removeprefix("language_model.")
        expected[part + short] = gradient
    return Case(folder, BATCHES), expected


_TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")


def _positions(model, sample, width: int) -> torch.Tensor:
    """Rows of positions as the family counts them, going on into the padding."""
    length = sample["input_ids"].shape[1]
    if hasattr(model.model, "get_rope_index"):
        grid, kinds = sample["image_grid_thw"], sample["mm_token_type_ids"]
        found, _ = model.model.get_rope_index(
            sample["input_ids"], image_grid_thw=grid, mm_token_type_ids=kinds
        )
        return torch.cat([found, found.new_zeros(3, 1, width - length)], dim=-1)
    return torch.arange(width)[None]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All layouts of all families in one go: four processes that live once."""
    root = tmp_path_factory.mktemp("parity")
    cases, expected = {}, {}
    for family in FAMILIES:
        cases[family], expected[family] = make_case(family, root / family)
    out = root / "out"
    out.mkdir()
    megatron_ranks.spawn(megatron_ranks.parity, out, cases, tuple(LAYOUTS))
    return cases, expected, out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
class TestParity:
    def test_logits_equal(self, made, family, layout):
        _, expected, out = made
        for number in range(BATCHES):
            ours = load_file(out / f"{family}-{layout}" / f"logits-{number}.safetensors")["logits"]
            theirs = expected[family][f"logits-{number}"]
            torch.testing.assert_close(ours[0, : len(theirs)], theirs, atol=1e-5, rtol=0)

    def test_loss_and_gradients_equal(self, made, family, layout):
        _, expected, out = made
        found = out / f"{family}-{layout}"
        losses = [load_file(file)["loss"] for file in found.glob("loss-*.safetensors")]
        torch.testing.assert_close(
            torch.stack(losses).sum(), expected[family]["loss"], atol=1e-5, rtol=0
        )
        ours = {}
        for file in found.glob("gradients-*.safetensors"):
            ours |= load_file(file)
        theirs = {k: v for k, v in expected[family].items() if k.split(".")[0] in _PARTS}
        assert ours.keys() == theirs.keys()
        assert any(v.abs().max() > 1e-3 for k, v in theirs.items() if k.startswith("vision."))
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=0, msg=name)

    def test_round_trip_is_bit_equal(self, made, family, layout):
        cases, _, out = made
        before = _tensors(cases[family].folder)
        after = _tensors(out / f"{family}-{layout}" / "model")
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype
            assert torch.equal(tensor, after[name]), name


_PARTS = ("language", "vision")


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors

"""4k to 12k tokens with several picture tiles, packed and shared on two ranks, against plain ones.

Plain is Hugging Face's model, one reply a call; `test_packing` holds the torch backend to it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import long_ranks
import pytest
import torch
from families import save_family
from safetensors.torch import load_file

from insightv import chats, models

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]
BASES = ("llava-next", "llava-onevision", "qwen2.5-vl")
TOKENS = (4096, 12288)
BACKENDS = {"megatron": ("tp2", "tp2-sp", "pp2"), "deepspeed": ("zero-3",)}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    for base in BASES:
        save_family(base, folder / base)
    for backend, layouts in BACKENDS.items():
        if find_spec("megatron" if backend == "megatron" else backend) is not None:
            names = [f"{b}:{t}:{layout}" for b in BASES for t in TOKENS for layout in layouts]
            long_ranks.launch(folder, backend, names)
    return folder


@pytest.fixture(scope="module", params=[(base, tokens) for base in BASES for tokens in TOKENS])
def plain(request, work) -> tuple[str, int, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    base, tokens = request.param
    return base, tokens, *alone(work / base, tokens)


def alone(base: Path, tokens: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Log-probabilities and gradients of replies as sequences of their own."""
    loaded = models.load(base, "cpu", "float32")
    logps = {}
    for example in long_ranks.examples(loaded.processor, tokens):
        for number, reply in enumerate(example.replies):
            inputs = chats.collate([reply.encoding], 0, side="right")
            [(a, b)] = reply.spans
            every = loaded.model(**inputs).logits[0].log_softmax(-1)
            mine = every[torch.arange(a - 1, b - 1), reply.encoding.ids[a:b]]
            long_ranks.weighed(mine).backward()
            logps[f"logps.{example.key}.{number}"] = mine.detach()
    gradients = {
        _name(name): torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in loaded.model.named_parameters()
    }
    return logps, gradients


def _name(name: str) -> str:
    """A parameter's name as the megatron backend's checkpoints have it."""
    name = name.removeprefix("model.")
    language = name.startswith(("language_model.", "lm_head."))
    return ("language." if language else "vision.") + name.removeprefix("language_model.")


@pytest.mark.parametrize("layout", [name for names in BACKENDS.values() for name in names])
def test_long_sequences_with_many_tiles(plain, work, layout):
    base, tokens, logps, gradients = plain
    folder = work / f"{base}:{tokens}:{layout}"
    if not folder.is_dir():
        pytest.skip("the backend is not installed")
    ranks = [load_file(rank) for rank in folder.glob("rank-*")]
    assert max(told.pop("width") for told in ranks) > tokens / 2
    assert all(told.pop("batches") < len(logps) / 2 for told in ranks)  # packed
    found = {name: told for each in ranks for name, told in each.items()}
    assert found.keys() == logps.keys()
    for name, wanted in logps.items():
        torch.testing.assert_close(found[name], wanted, atol=1e-5, rtol=0, msg=name)
    assert max(len(wanted) for wanted in logps.values()) > tokens / 2
    ours = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            kind, _, rest = name.partition(".")
            if kind == "exp_avg":
                ours[rest] = tensor
            elif kind == "gradient":
                ours[_name(rest)] = tensor
    assert ours.keys() == gradients.keys()
    for name, wanted in gradients.items():
        torch.testing.assert_close(ours[name], wanted, atol=1e-5, rtol=0, msg=name)
    assert max(wanted.abs().max() for wanted in gradients.values()) > 1e-2

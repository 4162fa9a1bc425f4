"""Weights on one rank: spans, folders that do not fit, dialects; attention under any mask."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

pytest.importorskip(
    "megatron.core", reason="megatron-core is not installed: pip install -e '.[megatron]'"
)
import families  # noqa: E402

from hpc.errors import UserError  # noqa: E402
from insightv.training.megatron.families import (  # noqa: E402
    LANGUAGE,
    LAYER,
    Cut,
    shape_of,
    sizes_of,
)
from insightv.training.megatron.folders import Folder, Naming  # noqa: E402
from insightv.training.megatron.layers import CoreAttention  # noqa: E402
from insightv.training.megatron.layout import Layout, Shape  # noqa: E402
from insightv.training.megatron.weights import spans  # noqa: E402


@st.composite
def shapes(draw) -> tuple[Shape, Layout]:
    ranks = draw(st.sampled_from([1, 2, 4]))
    groups = ranks * draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 4))
    shape = Shape(
        layers=1,
        hidden=draw(st.integers(1, 8)),
        feed_forward=ranks * draw(st.integers(1, 6)),
        heads=heads,
        groups=groups,
        head=draw(st.sampled_from([2, 4])),
        vocabulary=draw(st.integers(1, 600)),
        tied=False,
        bias=True,
        qk_norm=True,
    )
    return shape, Layout(tensor_parallel=ranks)


@given(shapes())
def test_the_ranks_spans_cover_each_tensor_once(drawn):
    shape, layout = drawn
    sizes = sizes_of(shape)
    for row in (*LANGUAGE, *LAYER):
        seen = {name: torch.zeros(sizes[name], dtype=torch.long) for name in row.tensors}
        for rank in range(layout.tensor_parallel):
            for span in spans(row, shape, layout, rank):
                span.of(seen[span.tensor]).add_(1)
        times = layout.tensor_parallel if row.cut is Cut.WHOLE else 1
        assert all((one == times).all() for one in seen.values()), row


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return families.save_family("llava-next", tmp_path_factory.mktemp("model") / "model")


def _changed(folder, tmp_path, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    for name in ("config.json",):
        (tmp_path / name).write_text((folder / name).read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return AutoConfig.from_pretrained(tmp_path), Folder(tmp_path)


class TestFolder:
    def test_a_table_of_what_does_not_fit(self, folder, tmp_path):
        def change(tensors):
            del tensors["language_model.model.norm.weight"]
            tensors["stray"] = torch.zeros(3)
            name = "language_model.model.layers.0.mlp.up_proj.weight"
            tensors[name] = tensors[name][:5].clone()

        config, opened = _changed(folder, tmp_path, change)
        naming = Naming.of(config, opened.shapes)
        with pytest.raises(UserError, match="in 3 tensors") as caught:
            naming.check(opened)
        text = " ".join(str(caught.value).split())
        assert "language_model.model.norm.weight │ missing │ (64,)" in text
        assert "up_proj.weight │ wrong shape │ (128, 64) │ (5, 64)" in text
        assert "stray │ extra" in text

    def test_names_of_older_folders_fit(self, folder, tmp_path):
        def change(tensors):
            for name in [name for name in tensors if name.startswith("vision_tower.")]:
                new = name.replace("vision_tower.", "vision_tower.vision_model.")
                tensors[new] = tensors.pop(name)
            tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.zeros(1, 17)

        config, opened = _changed(folder, tmp_path, change)
        naming = Naming.of(config, opened.shapes)
        naming.check(opened)
        at = naming.place("vision.vision_tower.embeddings.class_embedding")
        assert at == "vision_tower.vision_model.embeddings.class_embedding"

    def test_an_index_names_files_of_its_folder_only(self, tmp_path):
        index = {"weight_map": {"a": "../secret.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="files outside its folder"):
            Folder(tmp_path)

    def test_a_cut_file_is_damaged(self, folder, tmp_path):
        whole = (folder / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(whole[:-100])
        with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
            Folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"attention_bias": True}, "a bias in attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding-window"),
    ],
)
def test_a_language_model_that_the_table_does_not_cover_is_refused(folder, change, says):
    config = AutoConfig.from_pretrained(folder)
    for name, value in change.items():
        setattr(config.text_config, name, value)
    with pytest.raises(UserError, match=says):
        shape_of(config)


def test_attention_is_the_same_under_dense_and_block_masks():
    from torch.nn.attention.flex_attention import create_block_mask

    torch.manual_seed(0)
    width = 256
    attend = CoreAttention.__new__(CoreAttention)
    torch.nn.Module.__init__(attend)
    attend.config, attend.scale = SimpleNamespace(), 0.25
    query = torch.randn(width, 2, 4, 16)
    key, value = torch.randn(width, 2, 2, 16), torch.randn(width, 2, 2, 16)
    branch = torch.arange(width) // 100  # a beginning that both others go on from

    def seen(b, h, q, k):
        return (k <= q) & ((branch[k] == branch[q]) | (branch[k] == 0))

    block = create_block_mask(seen, None, None, width, width, device="cpu")
    rows = torch.arange(width)
    dense = seen(0, 0, rows[:, None], rows[None])[None, None]
    expected = attend(query, key, value, dense)
    assert expected.shape == (width, 2, 64)
    torch.testing.assert_close(attend(query, key, value, block), expected, atol=1e-5, rtol=0)
    plain = attend(query, key, value, None)
    assert (plain[:100] - expected[:100]).abs().max() < 1e-5 < (plain - expected).abs().max()

"""Layout arithmetic, the table of names, spans, and the memory estimate: one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.errors import UserError
from insightv.training.megatron import estimate
from insightv.training.megatron.families import (
    FAMILIES,
    dialect_of,
    language_name,
    tensors_of,
    vision_name,
)
from insightv.training.megatron.layout import Layout, Shape

SHAPE = Shape(
    layers=8,
    hidden=64,
    feed_forward=128,
    heads=8,
    groups=4,
    head=16,
    vocabulary=421,
    tied=False,
    bias=True,
    qk_norm=False,
)


class TestSplit:
    @given(st.integers(1, 200), st.integers(1, 16), st.integers(1, 4), st.integers(0, 6))
    def test_every_layer_stands_once(self, layers, stages, virtual, vision):
        layout = Layout(pipeline_parallel=stages, virtual_stages=virtual, vision_layers=vision)
        try:
            split = layout.split(layers)
        except UserError:
            assert layers < stages * virtual * (vision + 1)
            return
        assert sum(split) == layers
        assert len(split) == stages * virtual
        weights = [split[0] + vision, *split[1:]]
        assert max(weights) - min(weights) <= 1
        held = [layout.stage_layers(layers, stage) for stage in range(stages)]
        assert sorted(sum(held, [])) == list(range(layers))

    def test_the_first_stage_makes_room_for_the_pictures(self):
        layout = Layout(pipeline_parallel=4, vision_layers=2)
        assert layout.split(80) == [18, 21, 21, 20]

    def test_interleaved_chunks_go_round(self):
        layout = Layout(pipeline_parallel=2, virtual_stages=2)
        assert layout.stage_layers(8, 0) == [0, 1, 4, 5]
        assert layout.stage_layers(8, 1) == [2, 3, 6, 7]

    def test_given_layers_must_add_up(self):
        with pytest.raises(UserError, match="add up to the model's 8 layers"):
            Layout(pipeline_parallel=2, layers=[3, 4]).split(8)

    def test_no_stage_without_a_layer(self):
        with pytest.raises(UserError, match="without a layer"):
            Layout(pipeline_parallel=4, vision_layers=3).split(8)


class TestRefusals:
    @pytest.mark.parametrize(
        ("layout", "says"),
        [
            (Layout(tensor_parallel=0), "tensor_parallel is 0"),
            (Layout(tensor_parallel=3), "does not divide the model's 8 attention heads"),
            (Layout(tensor_parallel=8), "does not divide the model's 4 key-value heads"),
            (Layout(sequence_parallel=True), "needs tensor_parallel above 1"),
            (Layout(virtual_stages=2), "needs pipeline_parallel above 1"),
            (Layout(vision_layers=-1), "vision_layers is -1"),
        ],
    )
    def test_layouts(self, layout, says):
        with pytest.raises(UserError, match=says):
            layout.validate(SHAPE)

    def test_ranks_that_hold_no_whole_copies(self):
        with pytest.raises(UserError, match="6 ranks hold no whole number of copies"):
            Layout(tensor_parallel=2, pipeline_parallel=2).data_parallel(6)


class TestNames:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_each_dialect_is_told_from_its_names(self, family):
        vision = ["vision_tower.embeddings.class_embedding", "multi_modal_projector.linear_1.bias"]
        for dialect in FAMILIES[family]:
            names = {language_name(dialect, name) for name in tensors_of(SHAPE)}
            names |= {vision_name(dialect, name) for name in vision}
            assert dialect_of(family, names.__contains__, vision) == dialect

    def test_an_unknown_family_is_refused(self):
        with pytest.raises(UserError, match="no megatron backend for 'gpt2'"):
            dialect_of("gpt2", {"wte.weight"}.__contains__, [])

    def test_a_tied_head_is_no_tensor(self):
        assert "lm_head.weight" in tensors_of(SHAPE)
        assert "lm_head.weight" not in tensors_of(replace(SHAPE, tied=True))


class TestEstimate:
    def test_counts_add_up_to_the_whole_model(self):
        whole = estimate.language_weights(SHAPE, Layout(), 0)
        sizes = tensors_of(SHAPE).values()
        counted = sum(one[0] * (one[1] if len(one) > 1 else 1) for one in sizes)
        assert whole == counted
        cut = Layout(pipeline_parallel=4)
        assert sum(estimate.language_weights(SHAPE, cut, stage) for stage in range(4)) == whole

    def test_later_stages_keep_fewer_micro_batches(self):
        layout = Layout(pipeline_parallel=4)
        kept = [estimate.in_flight(layout, stage, 16) for stage in range(4)]
        assert kept == [4, 3, 2, 1]
        assert estimate.in_flight(layout, 0, 2) == 2
        interleaved = Layout(pipeline_parallel=4, virtual_stages=2)
        assert estimate.in_flight(interleaved, 0, 16) == 11 / 2

    def test_sequence_parallel_and_recompute_save_memory(self):
        load = estimate.Load(tokens=1024, targets=128, micro_batches=8, recompute=False)
        plain = Layout(tensor_parallel=2)
        whole = estimate.activations(SHAPE, plain, 0, load)
        split = replace(plain, sequence_parallel=True)
        assert estimate.activations(SHAPE, split, 0, load) < whole
        assert estimate.activations(SHAPE, plain, 0, replace(load, recompute=True)) < whole

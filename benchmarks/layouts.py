"""Layouts of large bases, constructed for real on ranks that do not exist.

For each layout every pipeline stage is built as the megatron backend builds it, on meta
tensors and torch's fake process group of 64 or 256 ranks: groups, stage split and parameters
are the true ones, no memory is taken and nothing is computed. Memory a rank follows from the
counts (`insightv.training.megatron.estimate`): it is computed, not measured.

    python benchmarks/layouts.py            the table of docs/training.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen2_5_VLConfig

from insightv.training.megatron import cpu, estimate
from insightv.training.megatron.families import shape_of
from insightv.training.megatron.layout import Layout

LOAD = estimate.Load(tokens=16384, targets=4096, micro_batches=16, recompute=True)
_SIZES = {
    "Qwen2.5-VL-7B": (3584, 18944, 28, 28, 4, 3420),
    "Qwen2.5-VL-32B": (5120, 27648, 64, 40, 8, 3456),
    "Qwen2.5-VL-72B": (8192, 29568, 80, 64, 8, 3456),
}
"""Hidden, feed-forward, layers, heads, key-value heads, the tower's feed-forward."""
LAYOUTS = (
    ("Qwen2.5-VL-7B", 8, Layout(tensor_parallel=2, sequence_parallel=True)),
    (
        "Qwen2.5-VL-32B",
        64,
        Layout(tensor_parallel=8, pipeline_parallel=2, sequence_parallel=True, vision_layers=2),
    ),
    ("Qwen2.5-VL-32B", 256, Layout(tensor_parallel=8, sequence_parallel=True)),
    (
        "Qwen2.5-VL-72B",
        64,
        Layout(tensor_parallel=8, pipeline_parallel=4, sequence_parallel=True, vision_layers=2),
    ),
    (
        "Qwen2.5-VL-72B",
        256,
        Layout(tensor_parallel=8, pipeline_parallel=4, sequence_parallel=True, vision_layers=2),
    ),
)


def config_of(name: str) -> Qwen2_5_VLConfig:
    hidden, feed_forward, layers, heads, groups, tower = _SIZES[name]
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": feed_forward,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "vocab_size": 152064,
            "max_position_embeddings": 128000,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [16, 24, 24],
                "rope_theta": 1000000.0,
            },
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": tower,
            "num_heads": 16,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        tie_word_embeddings=False,
    )


def construct(name: str, ranks: int, layout: Layout) -> dict:
    """Builds every stage; raises where a count differs from the estimate's."""
    from megatron.core import parallel_state

    from insightv.training.megatron.model import build, initialise

    cpu.install()
    config = config_of(name)
    shape = shape_of(config)
    copies = layout.data_parallel(ranks)
    stages = []
    for stage in range(layout.pipeline_parallel):
        rank = stage * layout.tensor_parallel * copies
        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        initialise(layout)
        assert parallel_state.get_pipeline_model_parallel_rank() == stage
        groups = {
            "tensor": distributed.get_process_group_ranks(
                parallel_state.get_tensor_model_parallel_group()
            ),
            "pipeline": distributed.get_process_group_ranks(
                parallel_state.get_pipeline_model_parallel_group()
            ),
            "data": distributed.get_process_group_ranks(parallel_state.get_data_parallel_group()),
        }
        with torch.device("meta"):
            pieces = build(config, layout, dtype=torch.bfloat16)
        language = sum(w.numel() for piece in pieces for w in piece.language.parameters())
        tower = merger = 0
        for piece in pieces:
            for weight_name, weight in piece.named_parameters():
                if weight_name.startswith("vision."):
                    tower += weight.numel()
                    merger += weight.numel() if "merger" in weight_name else 0
        if language != estimate.language_weights(shape, layout, stage):
            raise AssertionError(f"{name}: stage {stage} holds {language} numbers")
        memory = estimate.memory(shape, layout, stage, ranks, LOAD, tower, merger)
        stages.append(
            {
                "stage": stage,
                "layers": len(layout.stage_layers(shape.layers, stage)),
                "groups": groups,
                "parameters": language + tower,
                "GB": {
                    part: round(getattr(memory, part) / 1e9, 1)
                    for part in ("weights", "gradients", "optimizer", "activations", "total")
                },
            }
        )
        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()
    return {
        "model": name,
        "ranks": ranks,
        "tensor_parallel": layout.tensor_parallel,
        "pipeline_parallel": layout.pipeline_parallel,
        "data_parallel": copies,
        "stages": stages,
    }


def table(results: list[dict]) -> str:
    lines = [
        "| base | ranks | TP × PP × DP | layers a stage | parameters a rank | weights "
        "| gradients | optimizer | activations | total |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        worst = max(one["stages"], key=lambda stage: stage["GB"]["total"])
        layout = f"{one['tensor_parallel']} × {one['pipeline_parallel']} × {one['data_parallel']}"
        layers = ", ".join(str(stage["layers"]) for stage in one["stages"])
        cells = [
            one["model"],
            one["ranks"],
            layout,
            layers,
            f"{worst['parameters'] / 1e9:.2f} B",
            *(f"{worst['GB'][part]} GB" for part in worst["GB"]),
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write everything here")
    arguments = parser.parse_args()
    results = [construct(*one) for one in LAYOUTS]
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

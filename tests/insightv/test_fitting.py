"""A training against what a cluster profile gives it, before anything is queued."""

import json
import math
import sys
import tomllib
from pathlib import Path

import pytest

from hpc.admission import fits
from hpc.cluster import Override, Profile, Resources
from hpc.errors import UserError
from hpc.rundir import RunDir
from insightv import cli
from insightv.chain import assemble
from insightv.chainfile import read
from insightv.folders import model_folder
from insightv.training.config import DeepSpeedConfig, DPOConfig, SFTConfig
from insightv.training.fitting import fit
from insightv.training.megatron.families import any_shape_of, tensors_of
from insightv.training.megatron.layout import Layout
from insightv.training.memory import base_of, needed, zero

ROOT = Path(__file__).parents[2]
TINY = model_folder("tiny")
VISION = {"visual.blocks.0.mlp.weight": (626_000_000,), "visual.merger.mlp.weight": (45_000_000,)}
SIZES = (3584, 18944, 28, 28, 4)


@pytest.fixture(scope="module")
def seven(tmp_path_factory) -> Path:
    """Qwen2.5-VL-7B as far as it is looked at: its configuration, and the head of its weights."""
    folder = tmp_path_factory.mktemp("seven")
    hidden, feed_forward, layers, heads, groups = SIZES
    text = {
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]},
    }
    config = {"model_type": "qwen2_5_vl", "text_config": text, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    from transformers import AutoConfig

    shape = any_shape_of(AutoConfig.from_pretrained(folder))
    language = {
        name if name == "lm_head.weight" else f"model.{name}": size
        for name, size in tensors_of(shape).items()
    }
    head = {
        name: {"dtype": "BF16", "shape": size, "data_offsets": [0, 0]}
        for name, size in (language | VISION).items()
    }
    data = json.dumps(head).encode()
    (folder / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
    return folder


def training(backend: str, **keys) -> SFTConfig:
    return SFTConfig(backend=backend, recompute=True, **keys)


def on(nodes: int, tasks: int, memory: float = 0.0) -> Resources:
    return Resources(gpus=tasks, nodes=nodes, tasks=tasks, gpu_memory=memory)


def test_what_is_told_of_a_base(seven):
    base = base_of(seven)
    assert (base.shape.layers, base.shape.groups) == (28, 4)
    assert base.vision == 671_000_000 and base.projector == 45_000_000
    assert base_of(TINY).vision > base_of(TINY).projector > 0


@pytest.mark.parametrize(
    ("layout", "asked", "says"),
    [
        ((4, 2), on(2, 2), "4 x pipeline_parallel 2 wants a multiple of 8 ranks, .* 2 nodes x 2"),
        ((2, 1), on(1, 1), "wants a multiple of 2 ranks.*`insightv run` starts one process only"),
        ((0, 1), on(1, 1), "tensor_parallel 0"),
        ((8, 1), on(1, 8), r"\(1 node x 8 tasks\).*8, which does not divide the model's 28 att"),
        ((4, 29), on(29, 4), "28 layers over 29 pipeline chunks"),
        ((2, 1), Resources(gpus=2, tasks=4), "4 tasks a node and 2 GPUs: ranks cannot share one"),
        ((2, 1), on(1, 2, 40), "megatron on .* about 79.*, and a GPU there has 40 .*: raise meg"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(seven, layout, asked, says):
    with pytest.raises(UserError, match=f"^stage sft.*{says}") as error:
        fit("sft", training("megatron", megatron=Layout(*layout)), seven, asked)
    assert "\n" not in str(error.value)


def test_a_base_that_megatron_does_not_compute_is_refused(tmp_path):
    config = json.loads((TINY / "config.json").read_text())
    config["text_config"]["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(TINY / "model.safetensors")
    with pytest.raises(UserError, match="stage sft .*does not compute activation 'gelu'"):
        fit("sft", training("megatron"), tmp_path, on(1, 1))
    assert "ZeRO-2" in fit("sft", training("deepspeed"), tmp_path, on(1, 1))


def test_torch_is_one_process(seven):
    told = "one process of backend=torch; 1 node x 8 tasks of the profile are not used"
    assert fit("sft", training("torch"), seven, on(1, 8)) == told
    assert fit("sft", training("torch"), seven, on(1, 1)) == ""
    assert fit("sft", training("torch"), TINY, on(1, 1, 80)).startswith("one process, about 0.")
    with pytest.raises(UserError, match="needs about 1.*and a GPU there has 141.*deepspeed or"):
        fit("sft", training("torch"), seven, on(1, 1, 141))


def test_a_plan_tells_layout_and_memory(seven, tmp_path):
    layout = Layout(2, sequence_parallel=True)
    said = fit("sft", training("megatron", megatron=layout), seven, on(1, 8, 80))
    assert said.startswith("TP 2 x PP 1 x DP 4 on 1 node x 8 tasks, about 42.")  # docs/training.md
    assert "optimizer 11.6" in said
    said = fit("sft", training("megatron", megatron=Layout(4), batch_size=2), seven, on(8, 2))
    assert "of several nodes" in said and "batch_size 2 leaves 2 idle" in said
    said = fit("sft", training("deepspeed"), tmp_path / "elsewhere", on(2, 8))
    assert "ZeRO-2 over 16 ranks" in said and "memory is not estimated" in said


def test_zero_is_the_papers_but_for_fp32_gradients():
    """Figure 1 of arXiv 1910.02054: 7.5 billion numbers on 64 GPUs, 31.4, 16.6 and 1.9 GB."""
    count, ranks = 7_500_000_000, 64
    paper = {1: 31.4e9, 2: 16.6e9, 3: 1.9e9}
    for stage, size in paper.items():
        memory = zero(count, count, ranks, stage)
        more = 2 * count if stage == 1 else 2 * count / ranks
        assert memory.total - memory.buffers - more == pytest.approx(size, rel=0.02)
    offloaded = zero(count, count, ranks, 2, offload=True)
    assert (offloaded.gradients, offloaded.optimizer) == (0, 0)


def test_recompute_and_stages_need_less(seven):
    base = base_of(seven)
    totals = [
        needed(training("deepspeed", deepspeed=DeepSpeedConfig(stage)), base, 8).total
        for stage in (1, 2, 3)
    ]
    assert totals[0] > totals[1] > totals[2]
    plain = SFTConfig(backend="deepspeed")
    assert needed(plain, base, 8).total > 2 * totals[1]
    assert needed(training("deepspeed", precision="fp32"), base, 8).total > totals[1]
    frozen, trained = (
        needed(training("torch", freeze_vision=frozen), base, 1) for frozen in (True, False)
    )
    assert trained.optimizer - frozen.optimizer == 8 * 626_000_000
    assert math.isclose(frozen.weights, 4 * frozen.gradients / 4 + 4 * 626e6 + frozen.gradients / 2)


def test_a_chain_is_held_against_its_profile(tmp_path, monkeypatch):
    chain = ROOT / "configs/chain/smoke.yaml"
    keys = ["training.reasoning.backend=megatron", "training.reasoning.megatron.tensor_parallel=2"]
    config = read(chain, keys)
    assembled = assemble(config, RunDir(tmp_path / "run"))
    profile = Profile(stages={"sft-reasoning": Override(nodes=3)})
    with pytest.raises(UserError, match="stage sft-reasoning: .*3 nodes x 1 task = 3"):
        fits(assembled, profile)
    profile.stages["sft-reasoning"] = Override(nodes=2)
    told = fits(assembled, profile)
    assert list(told) == ["sft-reasoning"] and "TP 2 x PP 1 x DP 1" in told["sft-reasoning"]
    # Nobody computes for hours before this is said, here neither.
    words = ["run", str(chain), *keys, "--run-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["insightv", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (SFTConfig(megatron=Layout(2)), "a.megatron.tensor_parallel is given, and a.backend is t"),
        (SFTConfig(backend="megatron", deepspeed=DeepSpeedConfig(3)), "a.deepspeed.zero_stage is"),
        (
            DPOConfig(backend="deepspeed", megatron=Layout(layers=[1])),
            "megatron.layers .*deepspeed",
        ),
    ],
)
def test_keys_of_another_backend_are_refused(config, says):
    with pytest.raises(UserError, match=says):
        config.validate("a")


def test_a_trainings_packages_are_known_before_it_is_queued(tmp_path):
    keys = ["training.summary.backend=deepspeed", "rounds.dpo.backend=megatron"]
    stages = assemble(read(ROOT / "configs/chain/smoke.yaml", keys), RunDir(tmp_path)).stages
    needs = {name: [p.name for p in stage.needs] for name, stage in stages.items() if stage.needs}
    assert needs["sft-summary"] == ["accelerate", "deepspeed"]
    assert needs["r1-dpo"] == ["megatron-core"] and "sft-reasoning" not in needs
    assert "plotly" in needs["questions-train"]
    # Each of them is what an extra installs, or comes with one.
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = " ".join(line for lines in extras["optional-dependencies"].values() for line in lines)
    for package in (package for stage in stages.values() for package in stage.needs):
        assert package.name == "pandas" or package.name in known.replace("_", "-"), package

"""The files of bases and roles: they load, they plan without weights, and their numbers fit.

Architectures stand on the meta device, where 72 billion parameters take no memory; none of the
real weights is at hand.
"""

import re
import shutil
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import transformers as T
from bases import ARCHITECTURES, processor
from families import save_family
from PIL import Image

from hpc.errors import UserError
from insightv import chats, cli, models
from insightv.chainfile import checked, missing, read
from insightv.training.batches import Example, Reply
from insightv.training.megatron import estimate
from insightv.training.megatron.families import shape_of
from insightv.training.megatron.layout import Layout
from insightv.training.packing import Packer
from insightv.training.policy import token_logps

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted((CONFIGS / "model").glob("*.yaml"))
ROLES = CONFIGS / "model" / "paper-roles.yaml"
BASES = [path for path in FILES if path != ROLES]
GB = 1e9
RANKS = {"qwen2.5-vl-72b": 64}
"""For whose trainings the layouts are meant; 8 for the others."""


def named(path: Path) -> list[str]:
    """What the file of roles leaves open."""
    return ["models.base.path=tiny"] if path == ROLES else []


@pytest.fixture
def profile(tmp_path_factory) -> Path:
    """A cluster of nodes with 8 GPUs, 4 of them for a training."""
    path = tmp_path_factory.mktemp("cluster") / "profile.yaml"
    path.write_text("gpu: {gpus: 4}\ntraining: {nodes: 4, tasks: 8, gpus: 8}\n")
    return path


def call(capsys, monkeypatch, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["insightv", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, *capsys.readouterr()


@lru_cache
def outline(hub: str):
    """A base on the meta device."""
    config = ARCHITECTURES[hub][0]()
    pictured = hasattr(config, "vision_config")
    auto = T.AutoModelForImageTextToText if pictured else T.AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


def test_each_base_has_a_file():
    assert {path.stem for path in FILES} == {
        "llava-next-llama3-8b",
        "llava-onevision-qwen2-7b",
        "paper-roles",
        "qwen2.5-vl-3b",
        "qwen2.5-vl-7b",
        "qwen2.5-vl-72b",
        "qwen3-vl-8b",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_a_chain_and_says_where_its_models_come_from(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = read(path, named(path), fetched=False)
    absent = missing(config)
    assert set(absent) == ({"generator", "judge"} if path == ROLES else {"base"})
    for model in absent.values():
        assert model.hub in ARCHITECTURES and re.fullmatch("[0-9a-f]{40}", model.revision)
        assert model.path == str(tmp_path / "models" / model.hub.partition("/")[2])
        assert model.digest == f"{model.hub}@{model.revision}"
    assert config.models.scorer.digest == (absent.get("generator") or absent["base"]).digest
    trainings = [*vars(config.training).values(), config.rounds.dpo]
    assert len({(one.backend, one.max_length) for one in trainings}) == 1
    assert (config.training.reasoning.epochs, config.training.summary.epochs) == (2, 1)
    if path != ROLES:
        assert config.rounds.log_probabilities.max_length == config.training.reasoning.max_length


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_planned_without_weights_and_run_with_them_only(
    path, profile, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    words = [path, *named(path)]
    status, out, _ = call(capsys, monkeypatch, "plan", *words, "--cluster", profile)
    assert status == 0 and "sft-reasoning" in out and "GPU-hours in one attempt" in out
    assert "is not here yet" in out and not list(tmp_path.iterdir())
    prepared = ["--cluster", profile, "--run-dir", "run", "--prepare"]
    for command in (["run", *words], ["plan", *words, *prepared]):
        status, _, err = call(capsys, monkeypatch, *command)
        assert status == 2 and err.count("\n") == 1
        assert "no folder" in err and "`insightv prefetch` fetch" in err
    assert not list(tmp_path.iterdir())


def test_a_cluster_without_ranks_for_the_layout_is_refused(profile, monkeypatch, capsys):
    words = ["plan", CONFIGS / "model" / "qwen2.5-vl-72b.yaml", "--cluster", profile]
    profile.write_text("gpu: {gpus: 4}\ntraining: {nodes: 3, tasks: 8, gpus: 8}\n")
    status, _, err = call(capsys, monkeypatch, *words)
    assert status == 2 and err.count("\n") == 1
    assert "wants a multiple of 32 ranks, and the profile gives 3 nodes x 8 tasks = 24" in err
    profile.write_text("gpu: {gpus: 4}\ntraining: {gpus: 8}\n")
    status, _, err = call(capsys, monkeypatch, *words)
    assert status == 2 and "the profile gives 1 node x 1 task = 1" in err


def test_a_chain_takes_questions_roles_and_base_from_a_file_each(tmp_path):
    chain = tmp_path / "mine.yaml"
    parts = [CONFIGS / "chain" / "own-data.yaml", ROLES, CONFIGS / "model" / "qwen3-vl-8b.yaml"]
    chain.write_text("extends:\n" + "".join(f"  - {part}\n" for part in parts) + "seed: 3\n")
    asked = CONFIGS / "data" / "chartqa.yaml"
    given = [f"questions.sets=[{asked}]", "questions.held_out=[]", "questions.plain=[]"]
    given += ["questions.reasoned=[chartqa]", "questions.take={chartqa: {train: 9}}"]
    config = checked(chain, given)
    roles = config.models
    assert roles.base.hub == "Qwen/Qwen3-VL-8B-Instruct"
    assert roles.generator.hub == roles.scorer.hub == "Qwen/Qwen2-VL-72B-Instruct"
    assert roles.judge.engine.server.options == ["--tensor-parallel-size", "4"]
    assert config.engine.server.replicas == 4 and config.engine.server.options == []
    assert config.questions.charts.train == 0  # of own-data.yaml, not of what all three extend
    assert config.questions.mappings[0].longest_side == config.questions.longest_side == 2048


def test_a_base_is_fetched_at_its_commit_where_it_belongs(monkeypatch, capsys, tmp_path):
    source, asked = save_family("qwen2.5-vl", tmp_path / "source"), []

    def snapshot_download(hub, revision, local_dir, allow_patterns):
        asked.append((hub, revision, local_dir))
        assert "*.safetensors" in allow_patterns
        shutil.copytree(source, local_dir, dirs_exist_ok=True)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    path = CONFIGS / "model" / "qwen2.5-vl-7b.yaml"
    folder = tmp_path / "models" / "Qwen2.5-VL-7B-Instruct"
    folder.mkdir(parents=True)  # as a fetch that was cut off leaves it
    none = "{train: 0, validation: 0, test: 0}"
    sets = [f"questions.{name}={none}" for name in ("charts", "reading", "shapes")]
    for _ in range(2):  # what is there is not fetched again
        status, out, _ = call(capsys, monkeypatch, "prefetch", path, *sets)
        assert status == 0 and f"{folder}, digest {models.digest_of(source)}" in out
        assert out.splitlines()[-1] == "jobs find all of this offline"
    assert asked == [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "cc594898137f460bfe9f0759e9844b3ce807cfb5", folder)
    ]
    assert read(path).models.base.digest != "" and not missing(read(path))


def test_a_name_on_the_hub_needs_a_folder():
    with pytest.raises(UserError, match=r"models\.judge\.hub: give path as well"):
        checked(CONFIGS / "chain" / "smoke.yaml", ["models.judge.hub=Qwen/Qwen2.5-72B-Instruct"])


@pytest.mark.parametrize("hub", ARCHITECTURES)
def test_the_architecture_has_the_parameters_of_the_base(hub):
    assert sum(weight.numel() for weight in outline(hub).parameters()) == ARCHITECTURES[hub][1]


@pytest.mark.parametrize("hub", [hub for hub in ARCHITECTURES if "Qwen2.5-72B" not in hub])
def test_shapes_of_a_packed_pair_fit_the_architecture(hub):
    """Winner and loser behind one prefix, through every layer and the head, on meta tensors."""
    model = outline(hub)
    prompt = list(range(100, 140))
    encodings = [chats.Encoding([*prompt, *range(200, 200 + n)], {}, ()) for n in (30, 50)]
    replies = tuple(Reply(one, ((len(prompt), len(one.ids)),)) for one in encodings)
    packer = Packer(model, 0, 4096)
    batch = packer.alone(packer.tree(Example("pair", replies)))
    with torch.no_grad():
        assert token_logps(model, batch.to("meta")).shape == (80,)
    assert models.freeze_vision(model) > 0.2e9


@pytest.mark.parametrize("path", BASES, ids=lambda path: path.stem)
def test_layouts_divide_the_model_and_fit_80_GB(path):
    config = read(path, fetched=False)
    architecture, training = outline(config.models.base.hub), config.training.reasoning
    ranks = RANKS.get(path.stem, 8)
    language = (".language_model.", "lm_head.")
    vision = sum(
        weight.numel()
        for name, weight in architecture.named_parameters()
        if not any(part in name for part in language)
    )
    count = sum(weight.numel() for weight in architecture.parameters())
    if "qwen3" in path.stem:
        with pytest.raises(UserError, match="the megatron backend does not compute"):
            shape_of(architecture.config)
    else:
        alike = training.backend == "megatron"
        layout = training.megatron if alike else Layout(2, sequence_parallel=True)  # as it says
        if not alike:
            said = "`backend: megatron` with `megatron: {tensor_parallel: 2, sequence_parallel:"
            assert said in path.read_text()
        shape = shape_of(architecture.config)
        layout.validate(shape)
        load = estimate.Load(training.tokens_per_micro_batch, 4096, 16)
        stages = range(layout.pipeline_parallel)
        worst = max(
            estimate.memory(shape, layout, stage, ranks, load, vision).total for stage in stages
        )
        assert layout.data_parallel(ranks) >= 1 and worst < 60 * GB
    if training.backend == "deepspeed":
        # ZeRO-2: bf16 weights on each rank; fp32 gradients, weights and two moments in parts.
        assert training.deepspeed.zero_stage == 2
        assert 2 * count + 16 * count / ranks < 40 * GB
    # The server: bf16 weights over the GPUs that it is told.
    told = config.engine.server.options
    gpus = int(told[told.index("--tensor-parallel-size") + 1]) if told else 1
    assert 2 * count / gpus < 40 * GB
    assert architecture.config.get_text_config().num_attention_heads % gpus == 0


@pytest.mark.parametrize("path", BASES, ids=lambda path: path.stem)
def test_a_picture_and_the_longest_chain_fit_the_context(path):
    config = read(path, fetched=False)
    hub, side = config.models.base.hub, config.questions.longest_side
    most = {"next": 2928, "onevision": 7371}
    tokens = next((count for name, count in most.items() if name in hub), 4096)
    told = processor(hub)
    sides = [side * part // 8 for part in (1, 3, 5, 8)]
    counted = [
        chats.picture_tokens(told, Image.new("L", (width, height)))
        for width in sides
        for height in sides
    ]
    assert tokens * 0.99 <= max(counted) <= tokens
    assert f"{tokens:,}" in path.read_text()
    # One picture, the prompt, all steps, the answer; generation one step at a time is as long.
    chain = config.rounds.generation.chain_tokens + config.rounds.generation.answer.max_tokens
    longest = min(config.training.reasoning.max_length, config.engine.context)
    assert tokens + chain + 512 <= longest
    positions = ARCHITECTURES[hub][0]().get_text_config().max_position_embeddings
    assert config.engine.context <= positions
    assert config.training.reasoning.max_length <= positions
    budget = config.training.reasoning.tokens_per_micro_batch
    assert budget >= config.training.reasoning.max_length


def test_a_cluster_has_as_many_workers_as_its_profile_says(profile, monkeypatch, capsys, tmp_path):
    """What a chain says of one machine is not for nodes."""
    profile.write_text("gpu: {gpus: 8, workers: 16}\nstages: {r0-generat: {gpus: 8}}\n")
    words = ["plan", CONFIGS / "model" / "qwen2.5-vl-7b.yaml", "--cluster", profile]
    monkeypatch.chdir(tmp_path)
    status, out, _ = call(capsys, monkeypatch, *words)
    (row,) = [line for line in out.splitlines() if "r0-generate" in line and "128" in line][:1]
    assert status == 0 and row.split("│")[3].strip() == "16"
    assert (
        "note: the profile's stages.r0-generat is no stage of this chain; did you mean r0-g" in out
    )

"""The chain: its order, and what a changed key makes again."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from families import save_family
from safetensors.numpy import save_file

from hpc.config import dump, load
from hpc.errors import UserError
from hpc.rundir import Chain, RunDir
from insightv.chain import ENTRIES, assemble, build
from insightv.chainfile import read
from insightv.config import ChainConfig

CONFIGS = Path(__file__).parents[2] / "configs" / "chain"
SERVED = "{kind: server, server: {url: ['http://127.0.0.1:1']}}"
KEYED = "{kind: server, server: {url: ['http://gpu7:1'], key_file: /no/key}}"


def make(tmp_path, *overrides: str, name: str = "quickstart") -> Chain:
    return assemble(read(CONFIGS / f"{name}.yaml", overrides), RunDir(tmp_path / "run"))


def identities(chain: Chain) -> dict[str, str]:
    return {name: chain.identity(name) for name in chain.stages}


def changed(one: Chain, other: Chain) -> set[str]:
    """Stages that are new or known by another identity; not those that merely depend on them."""
    before, after = identities(one), identities(other)
    return {name for name in after if before.get(name) != after[name]}


EVALUATIONS = {f"eval-{name}".replace("_", "-") for name in list(ENTRIES)[:9]}
CHANGES = {
    "local.workers=3": set(),
    "local.slots=3": set(),
    "engine.batch_size=7": set(),
    "error_limit=0.5": set(),
    "training.reasoning.tokens_per_micro_batch=512": set(),
    "questions.charts.train=10": {"questions-train"},
    "questions.charts.test=10": {"questions-test"},
    "questions.charts.validation=10": set(),
    "questions.held_out_seed=9": {"questions-test"},
    "questions.reasoned=[charts,reading]": {"r0-generate", "r1-generate", "r2-generate"},
    "questions.plain=[reading]": {
        f"set-{name}" for name in ("reasoning", "summary", "direct", "multi-turn")
    },
    "generation.paths=3": {"r0-generate"},
    "generation.sampling.temperature=0.5": {"r0-generate"},
    "score.samples=2": {"r0-score", "r1-score", "r2-score"},
    "reasoning_set.threshold=40": {"set-reasoning", "set-direct", "set-multi-turn"},
    "summary_set.per_kind=2": {"set-summary"},
    "training.summary.epochs=3": {"sft-summary"},
    "training.reasoning.learning_rate=1": {"sft-reasoning"},
    "rounds.generation.paths=3": {"r1-generate", "r2-generate"},
    "rounds.answer_from=path": {"r1-generate", "r2-generate"},
    "rounds.pairs.min_gap=30": {"r1-pairs", "r2-pairs", "dpo-pairs"},
    "rounds.dpo.beta=0.2": {"r1-dpo", "r2-dpo", "dpo-train"},
    "rounds.log_probabilities.precision=fp32": {"r1-reference", "r2-reference", "dpo-reference"},
    "rounds.reference=sft": {"r2-reference", "r2-dpo"},
    "evaluation.answer.max_tokens=9": EVALUATIONS,
    "evaluation.resamples_seed=1": {"results"},
    "models.generator.prompts=default": {"r0-generate"},
    "models.scorer.prompts=default": {"r0-score", "r1-score", "r2-score"},
}


@pytest.mark.parametrize("override", CHANGES)
def test_a_key_changes_just_its_stages(override, tmp_path):
    assert changed(make(tmp_path), make(tmp_path, override)) == CHANGES[override]


def test_judge_keys_change_verdicts_and_evaluations(tmp_path):
    found = changed(make(tmp_path), make(tmp_path, "judge.temperature=0.9"))
    assert found == {"r0-judge", "r1-judge", "r2-judge", *EVALUATIONS}


def test_seed_spares_only_the_held_out_questions(tmp_path):
    chain = make(tmp_path)
    kept = chain.stages.keys() - changed(chain, make(tmp_path, "seed=1"))
    # References depend on pairs and models alone: they follow those, and draw nothing.
    references = {"r1-reference", "r2-reference", "dpo-reference"}
    assert kept == {"questions-test", "results", "report", *references}


def leaves(config: object, prefix: str = ""):
    """Every number and switch of a configuration: (path, owner, field)."""
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{entry.name}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{entry.name}", config, entry


# Read only where `questions.hard` names a set.
SILENT = {
    f"questions.direct.{name}"
    for name in ("temperature", "top_p", "repetition_penalty", "max_tokens")
}


def test_every_hashed_number_changes_a_stage_and_no_other_does(tmp_path):
    """No key that does nothing; none that remakes what it does not shape."""
    # Early stop asks the validation split, beside the test split of the evaluation.
    asked = ["benchmarks.tasks=[chartqa]", "benchmarks.python=python3"]
    config = read(CONFIGS / "ablation.yaml", ["rounds.early_stop.enabled=true", *asked])
    run = RunDir(tmp_path)
    before = identities(assemble(config, run))
    wrong = []
    for path, owner, entry in leaves(config):
        value = getattr(owner, entry.name)
        setattr(owner, entry.name, not value if isinstance(value, bool) else value + 1)
        shapes = identities(assemble(config, run)) != before
        setattr(owner, entry.name, value)
        if shapes != (entry.metadata.get("hashed", True) and path not in SILENT):
            wrong.append(path)
    assert not wrong


def test_only_evaluations_read_the_test_split(tmp_path):
    chain = make(tmp_path, name="ablation")
    readers = {n for n, stage in chain.stages.items() if "questions-test" in stage.parents}
    assert readers == {n for n in chain.stages if n.startswith("eval-")} | {"results"}
    assert "questions-validation" not in chain.stages
    tuned = make(tmp_path, "evaluation.split=validation")
    assert "questions-test" not in tuned.stages and "questions-validation" in tuned.stages


def test_entries_bring_what_they_need_and_no_more(tmp_path):
    base = make(tmp_path, "evaluation.entries=[base]")
    assert not [n for n in base.stages if n.startswith(("sft-", "r1-", "set-"))]
    agents = make(tmp_path, "evaluation.entries=[multi_agent]")
    made = {n for n in agents.stages if n.startswith("sft-")}
    assert made == {"sft-reasoning", "sft-summary"}
    assert not [n for n in agents.stages if n.startswith("r1-")]


def test_trainings_of_a_distributed_backend_run_on_many_ranks(tmp_path):
    assert not any(stage.distributed for stage in make(tmp_path).stages.values())
    layout = [
        "training.reasoning.megatron.tensor_parallel=2",
        "training.reasoning.backend=megatron",
    ]
    chain = make(tmp_path, *layout, "rounds.dpo.backend=megatron")
    made = {name for name, stage in chain.stages.items() if stage.distributed}
    assert made == {"sft-reasoning", "r1-dpo", "r2-dpo", "dpo-train"}
    assert changed(make(tmp_path, "rounds.dpo.backend=megatron"), chain) == {"sft-reasoning"}
    other = make(tmp_path, *layout[1:], "rounds.dpo.backend=megatron")
    assert not changed(other, chain), "a layout changes no result"


def test_each_round_samples_from_the_model_of_the_round_before(tmp_path):
    chain = make(tmp_path, "rounds.count=3")
    makers = [chain.stages[f"r{number}-generate"].after for number in (1, 2, 3)]
    assert makers == [("sft-reasoning",), ("r1-dpo",), ("r2-dpo",)]
    assert chain.stages["eval-iterative-dpo"].after == ("r3-dpo", "sft-summary")
    assert chain.stages["r3-reference"].after == ("r2-dpo",)
    tied = make(tmp_path, "rounds.count=3", "rounds.reference=sft")
    assert tied.stages["r3-reference"].after == ("sft-reasoning",)
    assert tied.stages["r3-dpo"].after == ("r2-dpo", "sft-reasoning")


def test_the_single_round_reuses_round_one_or_samples_its_own(tmp_path):
    reused = make(tmp_path).stages["dpo-pairs"]
    assert reused.inputs["paths"] == "r1-generate"
    assert reused.config["pairs"]["per_question"] == 2 * 4
    assert set(reused.after) == {"r1-pairs", "r2-pairs"}
    chain = make(tmp_path, "rounds.single_paths=8")
    assert chain.stages["dpo-pairs"].inputs["paths"] == "dpo-generate"
    assert chain.stages["dpo-generate"].after == ("sft-reasoning",)
    assert chain.stages["dpo-generate"].config["sampling"]["paths"] == 8


def test_the_written_configuration_gives_the_same_chain(tmp_path):
    config = read(CONFIGS / "ablation.yaml", ["seed=3"])
    chain = assemble(config, RunDir(tmp_path))
    (tmp_path / "chain.yaml").write_text(dump(config))
    assert identities(build(RunDir(tmp_path))) == identities(chain)
    assert load(ChainConfig, tmp_path / "chain.yaml") == config


def test_a_moved_model_is_the_same_model_and_a_changed_one_is_not(tmp_path):
    for name in ("one", "two", "three"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llava"}')
        weights = np.zeros(300_000, np.uint8)
        weights[200_000] = name == "three"
        save_file({"weight": weights}, folder / "model.safetensors")
    one, two, three = (
        make(tmp_path, f"models.base.path={tmp_path / name}") for name in ("one", "two", "three")
    )
    assert identities(one) == identities(two)
    assert {"r0-generate", "sft-reasoning", "eval-base"} <= changed(one, three)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("evaluation.entries=[multi_agents]", "did you mean multi_agent?"),
        ("evaluation.entries=[foo]", "no entry 'foo'; use base, base_reasoning"),
        ("evaluation.split=train", "validation or test"),
        ("evaluation.resamples_seed=-1", "evaluation.resamples_seed is -1"),
        ("models.base.path=/no/such/folder", "models.base.path: no folder /no/such/folder"),
        ("models.generator.path=none", "only the judge can be none"),
        ("models.base.prompts=nonsense", "no prompt set 'nonsense'"),
        ("rounds.reference=first", "use previous or sft"),
        ("rounds.answer_from=nobody", "path, extractor or summary"),
        ("questions.plain=[chart]", "no set 'chart'"),
        ("questions.per_shard=0", "questions.per_shard is 0"),
        ("training.direct.epochs=0", "training.direct.epochs is 0"),
        ("training.reasoning.learning_rate=inf", "training.reasoning.learning_rate is inf"),
        ("judge.temperature=nan", "judge.temperature is nan"),
        ("judge.temperature=-1", "judge.temperature is -1"),
        ("judge.max_tokens=0", "judge.max_tokens is 0"),
        ("judge.tries=0", "judge.tries is 0"),
        ("judge.rules.decimal_tolerance=1", "judge.rules.decimal_tolerance is 1"),
        ("score.top_p=1.5", "score.top_p is 1.5"),
        ("models.base.path=~nobody-is-called-so/m", "no such home folder"),
        ("questions.sets=[~nobody-is-called-so/s.yaml]", "no such home folder"),
        ("rounds.dpo.beta=0", "rounds.dpo.beta is 0"),
        ("rounds.dpo.terms.sft=-1", "rounds.dpo.terms.sft is -1"),
        ("rounds.pairs.min_gap=0", "rounds.pairs.min_gap is 0"),
        ("rounds.generation.paths=0", "rounds.generation.paths is 0"),
        ("rounds.log_probabilities.max_length=0", "rounds.log_probabilities.max_length is 0"),
        ("engine.device=tpu", "use auto, cpu, cuda or cuda:N"),
        ("engine.dtype=int8", "use auto, float32"),
        ("rounds.count=1000000", "rounds.count is 1000000: give 0 to 100"),
        ("local.workers=-1", "local.workers"),
        ("error_limit=2", "share from 0 to 1"),
        ("rounds.count=0", "rounds.count of at least 1"),
        (f"engine={SERVED}", "engine.server.url: a server that runs has one model"),
        (f"models.judge.engine={KEYED}", "models.judge.engine.server.key_file: /no/key cannot be"),
    ],
)
def test_impossible_values_are_refused_in_one_line(override, told, tmp_path):
    with pytest.raises(UserError) as error:
        make(tmp_path, override)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_the_most_rounds_make_a_chain(tmp_path):
    assert "r100-dpo" in make(tmp_path, "rounds.count=100").stages


def test_an_empty_path_is_the_base(tmp_path):
    models = read(CONFIGS / "quickstart.yaml", ["models.judge.path="]).models
    assert models.judge == models.base


@pytest.mark.parametrize("family", ["llava-next", "qwen2.5-vl"])
def test_the_starting_point_for_a_model_of_ones_own(family, tmp_path):
    with pytest.raises(UserError, match=r"models\.base\.path: no folder /path/to/your/model"):
        make(tmp_path, name="own-model")
    model = save_family(family, tmp_path / "model")
    config = read(CONFIGS / "own-model.yaml", [f"models.base.path={model}"])
    assert {role.prompts for role in vars(config.models).values()} == {"default"}
    assert {role.path for role in vars(config.models).values()} == {str(model)}
    training, rounds = config.training, config.rounds
    assert (training.reasoning.epochs, training.reasoning.learning_rate) == (2, 5e-6)
    assert (training.summary.epochs, training.summary.learning_rate) == (1, 1e-5)
    assert (rounds.count, rounds.dpo.epochs, rounds.dpo.learning_rate) == (3, 1, 5e-7)
    stages = assemble(config, RunDir(tmp_path / "run")).stages
    assert {"r0-judge", "r3-dpo", "dpo-train", "eval-iterative-dpo"} <= stages.keys()


def test_shipped_configs_hold_the_whole_ladder(tmp_path):
    for name in ("quickstart", "smoke"):
        made = {n for n in make(tmp_path, name=name).stages if n.startswith("eval-")}
        assert made == EVALUATIONS
    chain = make(tmp_path, name="ablation")
    assert {f"eval-{name}".replace("_", "-") for name in ENTRIES} <= chain.stages.keys()

"""Workers' servers against the GPUs that a cluster profile gives them."""

from pathlib import Path

import pytest

from hpc.admission import fits
from hpc.cluster import Profile, Resources
from hpc.errors import UserError
from hpc.planning import plan_of
from hpc.rundir import RunDir
from insightv.chain import assemble
from insightv.chainfile import read
from insightv.cli.planning import _idle
from insightv.engines.config import EngineConfig
from insightv.engines.fitting import fit, usable
from insightv.engines.server.config import ServerConfig

ROOT = Path(__file__).parents[2]
IN_PROCESS = EngineConfig()


def served(*options: str, command: tuple[str, ...] = ("vllm",), replicas: int = 1) -> EngineConfig:
    server = ServerConfig(command=[*command], options=[*options], replicas=replicas)
    return EngineConfig("server", server=server)


@pytest.mark.parametrize(
    ("engine", "gpus"),
    [
        (IN_PROCESS, 1),
        (EngineConfig(device="cpu"), 0),
        (EngineConfig("server", server=ServerConfig(url=["http://127.0.0.1:1"])), 0),
        (served(), 1),
        (served(replicas=4), 4),
        (served("--tensor-parallel-size", "4", replicas=2), 8),
        (served("--tensor_parallel_size=2", "--pipeline-parallel-size", "2"), 4),
        (served("-tp", "2", "-dp", "2"), 4),
        (served("--tp-size=4", "--dp-size=4", "--enable-dp-attention", command=("sglang",)), 4),
        (served(command=("transformers",), replicas=2), 2),
        (served(command=("serve.sh", "{model}")), None),
        (served(command=("vllm", "serve", "{model}", "--tensor-parallel-size", "2")), 2),
    ],
)
def test_what_an_engine_computes_on(engine: EngineConfig, gpus: int | None) -> None:
    assert usable([engine]) == gpus
    assert usable([engine, EngineConfig(device="cpu")]) == gpus


def test_servers_that_need_more_gpus_than_a_worker_gets_are_refused() -> None:
    wide = served("--tensor-parallel-size", "4", replicas=2)
    with pytest.raises(
        UserError, match=r"wants 8 GPUs a worker \(replicas 2 x 4 .* gives 4; .*: 8}"
    ):
        fit("r0-generate", [IN_PROCESS, wide], Resources(gpus=4))
    with pytest.raises(UserError, match="replicas is 2, and the 3 GPUs .* cannot be divided so"):
        fit("r0-generate", [served(replicas=2)], Resources(gpus=3))
    with pytest.raises(UserError, match="cannot be divided"):
        fit("r0-generate", [served(command=("serve.sh",), replicas=2)], Resources(gpus=1))
    for given in (0, 8, 16):  # none: on processors
        assert fit("r0-generate", [wide], Resources(gpus=given)) == ""


def test_each_stage_of_a_chain_is_held_by_its_own_engines(tmp_path: Path) -> None:
    keys = [
        "engine.kind=server",
        "engine.server.command=[vllm]",
        'engine.server.options=[--tensor-parallel-size,"4"]',
    ]
    config = read(ROOT / "configs/chain/quickstart.yaml", keys)
    assembled = assemble(config, RunDir(tmp_path / "run"))
    with pytest.raises(UserError, match=r"stage r0-generate: .*gives 1; write `stages: \{r0-ge"):
        fits(assembled, Profile())
    profile = Profile(gpu=Resources(gpus=4))
    assert fits(assembled, profile) == {}
    notes = list(_idle(assembled, plan_of(assembled, profile)))
    # The reference model is loaded in process, and the rules alone judge.
    one = next(note for note in notes if "which computes on one" in note)
    assert "r1-reference" in one and "4 GPUs" in one and "generate" not in one
    none = next(note for note in notes if "which computes on none" in note)
    assert "r0-judge" in none and "`stages: {r0-judge: {gpus: 0}}`" in none
    assert len(notes) == 2

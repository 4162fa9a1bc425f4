"""Chains in small, and what plans expect of stages without a rehearsal."""

from pathlib import Path

import pytest

from hpc.cluster import read_profile
from hpc.errors import UserError
from hpc.rundir import RunDir
from insightv.chain import assemble
from insightv.chainfile import read
from insightv.rehearsal import forecast_of, small, units

CONFIGS = Path(__file__).parents[2] / "configs"
TESTBED = CONFIGS / "cluster" / "testbed.yaml"


def test_a_share_of_every_set_but_not_too_little():
    config = read(CONFIGS / "chain" / "quickstart.yaml", ["questions.charts.train=9000"])
    less = small(config, share=0.01, floor=20)
    assert (less.questions.charts.train, less.questions.reading.test) == (90, 20)
    assert less.questions.per_shard == -(-(90 + 20 + 20) // 8)
    assert less.training == config.training and config.questions.charts.train == 9000
    with pytest.raises(UserError, match="share 0"):
        small(config, share=0, floor=20)


def test_work_grows_with_questions_paths_and_epochs(tmp_path):
    config = read(CONFIGS / "chain" / "quickstart.yaml", ["questions.reasoned=[charts]"])
    chain = assemble(config, RunDir(tmp_path))
    before = units(config, chain)
    config.questions.charts.train *= 2
    config.generation.paths *= 3
    config.training.summary.epochs *= 5
    after = units(config, chain)
    assert after["r0-generate"] == 6 * before["r0-generate"]
    assert after["r1-generate"] == 2 * before["r1-generate"]
    assert after["eval-base"] == before["eval-base"]
    assert after["sft-summary"] > 5 * before["sft-summary"]


@pytest.mark.parametrize("name", ["quickstart", "ablation"])
def test_every_stage_of_a_plan_is_expected_to_make_something(tmp_path, name):
    config = read(CONFIGS / "chain" / f"{name}.yaml")
    chain = assemble(config, RunDir(tmp_path))
    found = forecast_of(config, chain, read_profile(TESTBED))
    assert [item.stage for item in found.stages] == list(chain.stages)
    assert all(item.bytes.mid > 0 and item.files > 0 for item in found.stages)
    assert found.gpu_hours is None  # times of one machine say nothing of another
    expected = {item.stage: item for item in found.stages}
    train = sum(getattr(config.questions, s).train for s in ("charts", "reading", "shapes"))
    assert expected["questions-train"].shards == -(-train // config.questions.per_shard)
    reasoned = sum(getattr(config.questions, s).train for s in config.questions.reasoned)
    paths = reasoned * config.generation.paths
    assert expected["r0-generate"].rows == pytest.approx(paths, rel=0.01)

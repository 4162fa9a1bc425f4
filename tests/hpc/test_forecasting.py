"""What a small run says of a large one, held against that large one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import counting  # noqa: E402

from hpc.cluster import Profile, Resources  # noqa: E402
from hpc.forecasting import Forecast, Range, compare, extrapolate, keep, kept, measure  # noqa: E402
from hpc.naming import work_name  # noqa: E402
from hpc.rundir import Chain  # noqa: E402

STAGES = ("numbers", "double", "square", "total", "triple")
PROFILE = Profile(cpu=Resources(workers=3, gpus=1))


def units(n: int) -> dict[str, float]:
    return dict.fromkeys(STAGES, float(n))


def test_what_comes_is_what_was_forecast(tmp_path: Path) -> None:
    small = counting.run(tmp_path / "small", ["n=24"])
    measured = measure(small, units(24), timed=False)
    large = counting.open_chain(tmp_path / "large", ["n=96", "workers=3"])
    found = extrapolate(large, PROFILE, measured, units(96), 4, "24 numbers", timed=False)
    assert found.gpu_hours is None and found.wall is None
    made = counting.run(tmp_path / "large")
    came = measure(made, units(96), timed=False)
    for item in found.stages:
        assert (item.shards, item.rows) == (came[item.stage].shards, came[item.stage].rows)
        assert item.data.mid == pytest.approx(came[item.stage].data, rel=0.15)
        assert item.data.low <= item.data.mid <= item.data.high
    double = next(item for item in found.stages if item.stage == "double")
    assert (double.shards, double.processes, double.gpus) == (24, 3, 3)
    keep(made.run, found)
    assert kept(made.run) == found
    beside = compare(made, found)
    assert beside["double"]["data"]["came"] == came["double"].data
    assert "wall" not in beside["double"]


def timed(tmp_path: Path, seconds: int) -> Chain:
    """A complete run whose jobs say that they took so long, 10 s of it to get ready."""
    chain = counting.run(tmp_path / "run", ["n=40", "workers=3"])
    chain.run.jobs.unlink()
    for number, stage in enumerate(STAGES):
        (chain.run.stage_dir(stage) / "began.jsonl").unlink(missing_ok=True)
        end = {"event": "ended", "stage": stage, "role": "work", "gpus": 1}
        end["name"] = work_name(chain.run, stage, 0)
        for element in range(2):
            job = f"{number}_{element}"
            with (chain.run.stage_dir(stage) / "began.jsonl").open("a") as file:
                file.write(json.dumps({"job": job, "seconds": 10.0}) + "\n")
            chain.run.add_job(**end, job=job, seconds=seconds)
        # An element that found nothing to do costs nothing that grows.
        chain.run.add_job(**end, job=f"{number}_2", seconds=3)
    return chain


def test_getting_ready_is_paid_once_a_process(tmp_path: Path) -> None:
    chain = timed(tmp_path, seconds=60)
    measured = measure(chain, units(40))
    assert (measured["double"].seconds, measured["double"].ready) == (120.0, 10.0)
    found = extrapolate(chain, PROFILE, measured, units(400), 4, "40 numbers")
    double = next(item for item in found.stages if item.stage == "double")
    assert double.gpu_hours is not None and double.wall is not None
    # 100 s of work in small are 1,000 in large, on three processes of 10 s to get ready.
    assert double.gpu_hours.mid == pytest.approx((1000 + 3 * 10) / 3600)
    assert double.wall.mid == pytest.approx(10 + 1000 / 3)
    assert double.gpu_hours.low < double.gpu_hours.mid < double.gpu_hours.high
    assert found.gpu_hours is not None and found.wall is not None
    assert found.gpu_hours.mid == pytest.approx(sum(x.gpu_hours.mid for x in found.stages))
    walls = {item.stage: item.wall.mid for item in found.stages}
    longest = walls["numbers"] + walls["double"] + walls["total"] + walls["triple"]
    assert found.wall.mid == pytest.approx(longest)  # double and square beside each other
    spent = compare(chain, found)["double"]["gpu_hours"]["came"]
    assert spent == pytest.approx((2 * 60 + 3) / 3600)


def test_clocks_of_whole_seconds_leave_doubt(tmp_path: Path) -> None:
    chain = timed(tmp_path, seconds=11)
    found = extrapolate(chain, PROFILE, measure(chain, units(40)), units(400), 4, "40 numbers")
    double = next(item for item in found.stages if item.stage == "double")
    assert double.gpu_hours is not None
    assert double.gpu_hours.high > 1.3 * double.gpu_hours.mid


def test_a_run_that_was_not_rehearsed_has_none(tmp_path: Path) -> None:
    chain = counting.open_chain(tmp_path / "run")
    assert kept(chain.run) is None
    keep(chain.run, Forecast("nothing", [], Range(0, 1, 2)))
    found = kept(chain.run)
    assert found is not None and found.bytes.holds(1) and not found.bytes.holds(3)

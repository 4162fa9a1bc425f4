"""The whole chain, for real, on a handful of questions and the embedded model."""

import contextlib
import json
import random
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from hpc import gates
from hpc.shards import read_entries, shard_paths
from insightv.chain import build

SMOKE = Path(__file__).parents[2] / "configs" / "chain" / "smoke.yaml"

pytestmark = pytest.mark.timeout(1200)


def insightv(*words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "insightv", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def keys(run: Path) -> dict[str, list[str]]:
    """Stage to the keys in its shards."""
    folders = [folder for folder in run.glob("stages/*/shards") if any(folder.iterdir())]
    return {
        folder.parent.name: [e.key for shard in shard_paths(folder) for e in read_entries(shard)]
        for folder in folders
    }


def manifests(run: Path) -> dict[str, str]:
    return {
        path.parent.name: json.loads(path.read_text())["made"]
        for path in run.glob("stages/*/manifest.json")
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smoke") / "run"
    insightv("run", SMOKE, "--run-dir", folder)
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def test_every_stage_is_complete_and_has_rows(finished):
    chain = build(finished)
    assert all(gates.standing(chain).values())
    for name, stage in chain.stages.items():
        if not stage.outputs or name.startswith("questions-"):
            assert chain.run.read_manifest(name)["rows"] > 0, name
    for name in ("reasoning", "summary", "direct", "multi-turn", "reasoning-r2", "reasoning-dpo"):
        assert (finished / "models" / name / "model.safetensors").is_file()


def test_results_hold_the_ladder_and_the_card(finished):
    results = json.loads((finished / "results.json").read_text())
    entries = {rung["name"] for rung in results["ladder"]}
    assert len(entries) == 8 and {"base", "multi_agent", "iterative_dpo"} <= entries
    assert {rung["benchmark"] for rung in results["ladder"]} == {"charts", "reading", "shapes"}
    assert results["judge_card"] and results["confusion"] and results["funnel"]["rounds"]
    page = (finished / "report" / "index.html").read_text()
    assert page.lower().startswith("<!doctype html>")


def test_a_finished_run_returns_at_once(finished):
    before = manifests(finished)
    begun = time.monotonic()
    done = insightv("run", SMOKE, "--run-dir", finished)
    assert time.monotonic() - begun < 15  # no library of models is loaded
    assert "complete, nothing to do" in done.stdout and "multi_agent" in done.stdout
    assert manifests(finished) == before


def test_a_removed_stage_is_remade_with_what_depends_on_it(run):
    before = manifests(run)
    shutil.rmtree(run / "stages" / "r2-pairs")
    insightv("run", SMOKE, "--run-dir", run)
    after = manifests(run)
    remade = {name for name in before if before[name] != after[name]}
    chain = build(run)
    assert remade == {"r2-pairs", *chain.dependents("r2-pairs")}
    assert "r2-dpo" in remade and "r1-dpo" not in remade


def test_another_configuration_is_refused_and_a_quiet_one_is_not(run):
    before = manifests(run)
    done = insightv("run", SMOKE, "rounds.dpo.beta=0.5", "--run-dir", run, check=False)
    assert done.returncode == 2 and "training.beta: 0.1 → 0.5" in done.stderr
    assert done.stderr.count("\n") == 1
    insightv("run", SMOKE, "local.workers=1", "engine.batch_size=3", "--run-dir", run)
    assert manifests(run) == before
    words = ["evaluation.entries=[base,multi_agent]", "--run-dir", run]
    insightv("run", SMOKE, *words)
    after = manifests(run)
    assert {name for name in after if after[name] != before.get(name)} == {"results", "report"}


def test_a_damaged_shard_is_named_mended_and_remade(run):
    shard = run / "stages" / "eval-base" / "shards" / "00001.jsonl.zst"
    before = keys(run)
    shard.write_bytes(shard.read_bytes()[:-20])
    done = insightv("shards", "verify", run, check=False)
    assert done.returncode == 2 and str(shard) in done.stderr and "Traceback" not in done.stderr
    insightv("shards", "repair", run)
    insightv("retry", run)
    assert {stage: sorted(found) for stage, found in keys(run).items()} == {
        stage: sorted(found) for stage, found in before.items()
    }
    assert "0 errors" in insightv("shards", "verify", run).stdout


def test_ask_shows_steps_and_both_answers(finished, tmp_path):
    pack = sorted(finished.glob("stages/questions-test/pictures/*.zip"))[0]
    with zipfile.ZipFile(pack) as pictures:
        (tmp_path / "chart.png").write_bytes(pictures.read(pictures.namelist()[0]))
    said = insightv("ask", finished, tmp_path / "chart.png", "What is the highest value?").stdout
    assert said.startswith("What is the highest value?")
    assert "Answer" in said and "Without the reasoning" in said


def test_why_tells_of_every_kind_of_key(finished):
    found = keys(finished)
    pair = insightv("shards", "cat", finished / "stages" / "r1-pairs").stdout.splitlines()[0]
    sample = found["set-reasoning"][0]
    for key, part in (
        (found["r0-generate"][0], "true answer"),
        (json.loads(pair)["key"], "rejected"),
        (sample, "models/reasoning by sft-reasoning"),
        (f"{found['eval-multi-agent'][0]}@multi_agent", "models/summary (sft-summary)"),
    ):
        told = insightv("why", key, finished).stdout
        assert part in told and "pictures" in told, told


def test_evaluate_on_the_other_split(finished):
    told = insightv("evaluate", finished, "base", "multi_agent").stdout
    assert "base" in told and "multi_agent" in told and "charts: 12 questions" in told
    before = manifests(finished / "evaluations" / "validation")
    insightv("evaluate", finished, "base")
    assert manifests(finished / "evaluations" / "validation") == before


def test_training_alone(finished, tmp_path):
    packs = finished / "stages" / "questions-train" / "pictures"
    words = ["--pictures", packs, "precision=fp32", "batch_size=4", "max_steps=2"]
    data = finished / "stages" / "set-reasoning"
    told = insightv("train", "sft", data, *words, "--out", tmp_path / "one").stdout
    assert "step 2" in told and (tmp_path / "one" / "config.json").is_file()
    pairs = finished / "stages" / "r1-pairs"
    insightv("train", "dpo", pairs, *words, "--model", tmp_path / "one", "--out", tmp_path / "two")
    lines = (tmp_path / "two.training" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert abs(first["margin"]) < 1e-3  # the reference is the model itself
    assert json.loads(lines[1])["margin"] != first["margin"]


def test_clean_keeps_a_run_complete(run):
    insightv("clean", run, "--logs")
    assert all(gates.standing(build(run)).values())
    assert not list(run.glob("stages/*/logs/*.log"))


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_killed_twenty_times_the_run_is_the_same(finished, tmp_path):
    """kill -9 at random moments: the same keys, none twice, the same greedy counts."""
    run, rng = tmp_path / "run", random.Random(7)
    command = [sys.executable, "-m", "insightv", "run", str(SMOKE), "--run-dir", str(run)]
    for _ in range(20):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(1, 15))
        below = psutil.Process(process.pid).children(recursive=True)
        if rng.random() < 0.5 and below:  # a worker before the driver
            with contextlib.suppress(psutil.NoSuchProcess):
                rng.choice(below).kill()
            time.sleep(1)
        process.kill()
        process.wait()
    insightv("run", SMOKE, "--run-dir", run)
    wanted, found = keys(finished), keys(run)
    for stage in wanted:
        assert len(set(found[stage])) == len(found[stage]), stage
    # Sampled text depends on how batches were composed; who was asked does not.
    chain = build(run)
    for stage in wanted:
        if chain.stages[stage].kind == "map" or stage.startswith("questions-"):
            assert sorted(found[stage]) == sorted(wanted[stage]), stage
    results = [json.loads((folder / "results.json").read_text()) for folder in (finished, run)]
    greedy = [[rung for rung in found["ladder"] if rung["name"] == "base"] for found in results]
    assert greedy[0] == greedy[1]

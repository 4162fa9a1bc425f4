"""lmms-eval itself, in an environment of its own: as a client of `insightv serve`, and as stages.

INSIGHTV_LMMS_PYTHON names the interpreter of such an environment; otherwise one is made of
containers/lmms.lock.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lmms_sets
import pytest

from hpc import shards
from hpc.config import dump
from hpc.rundir import RunDir, write_json
from insightv.chainfile import read
from insightv.evaluation.benchmark_scores import ALONE, read_scores
from insightv.folders import model_folder

pytestmark = [pytest.mark.full, pytest.mark.timeout(3000)]

ROOT = Path(__file__).parents[2]
INCLUDE = ROOT / "tests" / "insightv" / "lmms_tasks"
DEMO = ("chartqa_demo", "mmmu_demo")
TASKS = ("chartqa", "mmmu_val", *DEMO)
MODELS = {"base": "direct", "multi_agent": "multi-agent"}


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment with lmms-eval."""
    if named := os.environ.get("INSIGHTV_LMMS_PYTHON"):
        return named
    if sys.version_info[:2] != (3, 11):
        pytest.skip("containers/lmms.lock is for Python 3.11: name INSIGHTV_LMMS_PYTHON")
    folder = tmp_path_factory.mktemp("lmms")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps"]
    subprocess.run([*pip, "--require-hashes", "-r", ROOT / "containers/lmms.lock"], check=True)
    return str(folder / "bin" / "python")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the sets, and a run whose agents are the embedded model."""
    folder = tmp_path_factory.mktemp("benchmarks")
    lmms_sets.write(folder / "sets", chartqa=24, mmmu=16, two_pictures=2)
    run = RunDir(folder / "run")
    config = read(ROOT / "configs/chain/quickstart.yaml", ["local.slots=1"])
    run.create()
    run.chain_file.write_text(dump(config))
    for name in ("reasoning", "summary"):
        shutil.copytree(model_folder("tiny"), run.models / name)
        write_json(run.manifest(f"sft-{name}"), {"made": name, "counts": {}})
    return folder


def environment(place, **more):
    known = {"PYTHONPATH": str(ROOT), "HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **known, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def benchmarked(place, python):
    """The table, the records and the answers of `insightv benchmark`."""
    words = [sys.executable, "-m", "insightv", "benchmark", place / "run", *MODELS]
    words += [word for task in TASKS for word in ("--task", task)]
    words += ["--python", python, "--folder", place / "sets", "--include", INCLUDE]
    done = subprocess.run(words, env=environment(place), capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr
    stages = place / "run" / ALONE / "stages"
    records = list(shards.read_rows(stages / "lmms-scores/shards"))
    return done.stdout, read_scores(place / "run"), records


@pytest.fixture(scope="module")
def served(place, python):
    """lmms-eval's scores and samples, with its own client of `insightv serve`."""
    words = [sys.executable, "-m", "insightv", "serve", place / "run", "--port", "0"]
    server = subprocess.Popen(
        words, env=environment(place), stdout=subprocess.PIPE, text=True, cwd=place
    )
    found = {}
    try:
        url = server.stdout.readline().split()[0]
        key = (place / "run" / "serve.key").read_text().strip()
        for model in MODELS.values():
            out = place / "out" / model
            words = [python, "-m", "lmms_eval", "--model", "async_openai", "--batch_size", "1"]
            words += ["--model_args", f"model={model},base_url={url},num_cpus=8"]
            words += ["--tasks", ",".join(TASKS), "--include_path", INCLUDE]
            words += ["--log_samples", "--output_path", out]
            env = environment(place, OPENAI_API_KEY=key)
            env.pop("PYTHONPATH")
            done = subprocess.run(
                words, env=env, cwd=place / "sets", capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-2000:]
            scores = json.loads(next(out.rglob("*_results.json")).read_text())["results"]
            samples = {}
            for file in out.rglob("*_samples_*.jsonl"):
                task = file.stem.partition("_samples_")[2]
                for line in file.read_text().splitlines():
                    row = json.loads(line)
                    samples[task, row["doc_id"]] = row
            found[model] = scores, samples
    finally:
        server.send_signal(signal.SIGINT)
        for _ in range(100):
            if server.poll() is not None:
                break
            time.sleep(0.2)
        server.kill()
    return found


def told(sample):
    """An answer as lmms-eval logs it."""
    said = sample["filtered_resps"]
    return said if isinstance(said, str) else said[0]


def test_the_client_and_the_stages_have_the_same_answers_and_scores(benchmarked, served):
    _, table, records = benchmarked
    scores = {(row["entry"], row["task"], row["metric"]): row["value"] for row in table["scores"]}
    compared = 0
    for entry, model in MODELS.items():
        theirs, samples = served[model]
        for (name, task, metric), value in scores.items():
            if name == entry:
                assert value == pytest.approx(theirs[task][f"{metric},none"], abs=1e-9)
                compared += 1
        mine = {row["question"]: row["answer"] for row in records if row["entry"] == entry}
        for (task, doc), sample in samples.items():
            split = "validation" if task.startswith("mmmu") else "test"
            assert mine[f"{task}:{split}:{doc}"] == told(sample)
        assert len(samples) == len(mine) == 2 * (24 + 16)
    assert compared == 2 * (2 * 3 + 2)


def test_own_verdicts_are_lmms_evals_but_for_the_last_bit_of_five_per_cent(benchmarked):
    _, table, records = benchmarked
    rows = [row for row in records if row["question"].split(":")[0] in DEMO]
    assert len(rows) == 2 * (24 + 16) and not any(row["correct"] is None for row in rows)
    for row in rows:
        right = next(iter(row["lmms"].values())) >= 0.5
        if row["correct"] == right:
            continue
        # abs(2.1 - 2) / 2 is 0.05000000000000004, which lmms-eval calls too far.
        truth = float(row["target"])
        assert row["correct"] and row["question"].startswith("chartqa")
        assert abs(float(row["answer"]) - truth) / truth == pytest.approx(0.05, abs=1e-12)
    answered = {row["answer"] for row in rows if row["entry"] == "multi_agent"}
    assert len(answered) > 10
    accuracy = {(row["task"], row["entry"]): row["accuracy"] for row in table["own"]}
    assert accuracy["chartqa_demo", "multi_agent"] > accuracy["chartqa_demo", "base"]


def test_tables_hold_the_papers_numbers_and_the_confusion(benchmarked):
    said, table, _ = benchmarked
    assert "| – paper, own base | 47.1 | 22.6 |" in said and "lmms-eval 0.7.3" in said
    assert "reasoning right, answer right" in said
    assert set(table["confusion"]) == set(TASKS)


def test_a_task_that_is_not_there_is_told_in_a_line(place, python):
    words = [sys.executable, "-m", "insightv", "benchmark", place / "run", "base"]
    words += ["--task", "chart_qa", "--python", python, "--folder", place / "sets"]
    done = subprocess.run(words, env=environment(place), capture_output=True, text=True, cwd=place)
    assert done.returncode == 2
    assert "no task 'chart_qa'" in done.stderr.splitlines()[-1]

"""The command line: what users get wrong ends in one line and status 2."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from hpc import gates
from hpc.config import dump, shaping
from hpc.rundir import RunDir
from hpc.shards import write_groups
from insightv import cli
from insightv.chain import build
from insightv.chainfile import read

CONFIGS = Path(__file__).parents[2] / "configs" / "chain"
SMOKE = str(CONFIGS / "smoke.yaml")


@pytest.fixture
def insightv(monkeypatch, capsys):
    """Runs the command in this process; returns (status, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["insightv", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


def refused(result: tuple[int, str, str], *told: str) -> None:
    """Status 2, and one line on stderr that says it all."""
    status, _, err = result
    assert status == 2, err
    assert err.startswith("insightv: ") and err.count("\n") == 1, err
    for part in told:
        assert part in err


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory in which nothing has been made."""
    folder = tmp_path / "run"
    RunDir(folder).create()
    (folder / "chain.yaml").write_text(dump(read(Path(SMOKE))))
    return folder


def test_help_lists_the_commands_on_one_page(insightv):
    status, out, _ = insightv("--help")
    assert status == 0
    assert out.count("\n") < 55
    listed = [name for name in ("run", "status", "ask", "why", "train", "shards") if name in out]
    assert len(listed) == 6
    for hidden in ("work", "gate"):
        assert f"│ {hidden} " not in out


@pytest.mark.parametrize(
    "words",
    [
        ["run"],
        ["status"],
        ["retry"],
        ["cancel"],
        ["logs"],
        ["clean"],
        ["report"],
        ["ask"],
        ["why"],
        ["evaluate"],
        ["train", "sft"],
        ["train", "dpo"],
        ["shards", "verify"],
    ],
    ids=" ".join,
)
def test_every_command_explains_itself(words, insightv):
    status, out, err = insightv(*words, "--help")
    assert (status, err) == (0, "")
    assert f"insightv {' '.join(words)}" in out


def test_version(insightv):
    status, out, _ = insightv("--version")
    assert status == 0 and out.startswith("insightv 0.")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["rn", "x"], "Did you mean 'run'?"),
        (["run"], "Missing argument"),
        (["run", "no.yaml"], "no.yaml: No such file"),
        (["run", SMOKE, "rounds.dpo.betta=1"], "did you mean rounds.dpo.beta?"),
        (["run", SMOKE, "seed=many"], "seed is 'many', expected int"),
        (["run", SMOKE, "seed"], "expected key=value"),
        (["run", SMOKE, "--seed", "1"], "No such option: --seed; did you mean seed=1?"),
        (["run", SMOKE, "--rounds.dpo.beta=0.2"], "did you mean rounds.dpo.beta=0.2?"),
        (["train", "dpo", "x", "--learning-rate", "1e-6"], "did you mean learning_rate=1e-6?"),
        (["train", "sft", "x", "learning_rate=-1"], "insightv: learning_rate is -1"),
        (["status", "x", "--seed", "1"], "No such option: --seed (insightv"),
        (["run", SMOKE, "models.base.path=/no/model"], "no folder /no/model"),
        (["run", SMOKE, "evaluation.entries=[bass]"], "did you mean base?"),
        (["status", "/no/run"], "/no/run is no run directory"),
        (["retry", "/no/run"], "is no run directory"),
        (["logs", "/no/run", "--lines", "0"], "greater than or equal to 1"),
        (["compare", "/no/run", "--seed", "-1"], "greater than or equal to 0"),
        (["ask", "/no/run", "a.png", " "], "QUESTION is empty"),
        (["why", "a:b:1", "/no/run"], "is no run directory"),
        (["shards", "verify", "/no/shards"], "no shards here"),
        (["shards", "cat", "/no/shard/00000.jsonl.zst"], "there is no such shard"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_line(words, told, insightv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(insightv(*words), told)
    assert not list(tmp_path.rglob("chain.yaml"))


def test_a_refused_change_names_the_key_that_was_typed_and_the_way_out(insightv, run):
    chain = build(run)
    stage = "dpo-pairs"
    manifest = chain.run.manifest(stage)
    manifest.parent.mkdir(parents=True)
    record = {"hash": chain.identity(stage), "config": shaping(chain.stages[stage].config)}
    record |= {"made": "0", "parents": {}, "seconds": 0.0}
    record |= dict.fromkeys(("shards", "inputs", "rows", "errors"), 0)
    manifest.write_text(json.dumps(record))
    told = ("stage dpo-pairs", "changed: rounds.count: 2 → 3;", f"--run-dir NEW --reuse {run}`")
    refused(insightv("run", SMOKE, "rounds.count=3", "--run-dir", run), *told)


def test_unwritable_run_directory(insightv, tmp_path):
    (tmp_path / "file").write_text("")
    refused(insightv("run", SMOKE, "--run-dir", tmp_path / "file" / "run"), "Not a directory")


def tensors(path: Path) -> None:
    save_file({"weight": np.zeros((8, 8), np.float32)}, path)


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder that looks like a model from outside, of a kind that reads text alone."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    tensors(folder / "model.safetensors")
    return folder


def only(name: str) -> Callable[[Path], None]:
    return lambda folder: [path.unlink() for path in folder.iterdir() if path.name != name]


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def cut(length: int) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:length])

    return change


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (only(""), "needs config.json"),
        (only("config.json"), "*.safetensors"),
        (only("model.safetensors"), "needs config.json"),
        (written("config.json", '{"model'), "config.json is damaged"),
        (written("config.json", "[]"), "names no model_type"),
        (cut(-1), "model.safetensors has"),
        (cut(30), "model.safetensors is no safetensors file, or cut off"),
        (cut(0), "model.safetensors is no safetensors file, or cut off"),
        (written("model.safetensors", "version https://git-lfs.github.com/spec/v1"), "cut off"),
        (written(INDEX, '{"weight_map": {"a": "b.safetensors"}}'), "lacks b.safetensors"),
        (written(INDEX, "{"), "is no index"),
    ],
)
def test_wrong_model_folders_are_named_before_any_work(change, told, insightv, model, tmp_path):
    change(model)
    words = [f"models.base.path={model}", "--run-dir", tmp_path / "run"]
    refused(insightv("run", SMOKE, *words), "models.base.path", str(model), told)
    assert not (tmp_path / "run").exists()


def test_a_model_of_another_kind(insightv, model, tmp_path):
    run_dir = tmp_path / "run"
    words = ["evaluation.entries=[base]", "questions.charts.test=2", "questions.shapes.test=0"]
    words += [f"models.base.path={model}", "--run-dir", run_dir]
    result = insightv("run", SMOKE, *words)
    assert result[0] == 2
    last = result[2].splitlines()[-1]
    assert last.startswith("insightv: stage ") and str(model) in last
    assert "Traceback" not in result[2]


def test_status_of_a_run_that_has_not_begun(insightv, run):
    status, out, _ = insightv("status", run, "--json")
    found = json.loads(out)
    assert status == 0 and found["state"] == "incomplete"
    assert {stage["state"] for stage in found["stages"]} == {"waiting"}
    assert "questions-train" in insightv("status", run)[1]


def test_cancelling_what_does_not_run(insightv, run):
    refused(insightv("cancel", run), "nothing runs here")


def test_logs(insightv, run):
    folder = run / "stages" / "r0-generate" / "logs"
    folder.mkdir(parents=True)
    (folder / "a0-0.log").write_text("old\n")
    (folder / "a1-0.log").write_text("first\nlast \x1b[2Jword\n")
    assert insightv("logs", run)[1] == "r0-generate: last \ufffd[2Jword\n"
    whole = insightv("logs", run, "r0-generate")[1]
    assert "first" in whole and "old" not in whole and "\x1b" not in whole
    assert "first" not in insightv("logs", run, "r0-generate", "-n", 1)[1]
    assert "no stage has begun and not completed" in insightv("logs", run, "--failed")[1]
    (folder.parent / "stage.json").write_text("{}")
    assert "last" in insightv("logs", run, "--failed")[1]
    refused(insightv("logs", run, "r9-generate"), "no stage 'r9-generate'", "r0-generate")


def test_logs_without_a_word_are_told(insightv, run):
    assert insightv("logs", run)[1].endswith("no log yet; workers write theirs when they begin\n")
    assert "stage r0-judge: no log yet" in insightv("logs", run, "r0-judge")[1]
    folder = run / "stages" / "r0-generate" / "logs"
    folder.mkdir(parents=True)
    (folder / "a0-0.log").touch()
    (folder / "a0-1.log").touch()
    assert insightv("logs", run)[1].endswith(
        "nobody said anything: every log is empty (2 of them)\n"
    )
    assert insightv("logs", run, "r0-generate")[1].count("(empty: it said nothing)") == 2


def test_clean_plans_and_deletes_nothing_of_an_unfinished_run(insightv, run):
    status, out, _ = insightv("clean", run, "--plan")
    assert status == 0 and "0.00 MiB" in out


def test_why_of_an_unknown_key(insightv, run):
    refused(insightv("why", "charts:train:0/r0/p0", run), "no question 'charts:train:0'")


def test_why_takes_its_words_in_either_order(insightv, run, tmp_path):
    key = "charts:train:0/r0/p0|charts:train:0/r0/p1"
    assert insightv("why", key, run) == insightv("why", run, key)
    refused(insightv("why", run, key), "no question 'charts:train:0'")
    refused(insightv("why", key, tmp_path), f"{tmp_path} is no run directory", f"nor has {key}")
    refused(insightv("why", "k" * 5000, tmp_path), "is no run directory")


def test_ask_refuses_what_is_no_picture(insightv, run, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "good.png")
    refused(insightv("ask", run, tmp_path / "good.png", "What?"), "the agents are not trained yet")
    for name in ("reasoning", "reasoning-r1", "reasoning-r2.part", "summary"):
        (run / "models" / name).mkdir(parents=True)
    refused(insightv("ask", run, tmp_path / "no.png", "What?"), "no.png: No such file")
    refused(insightv("ask", run, tmp_path, "What?"), "Is a directory")
    broken = tmp_path / "broken.png"
    broken.write_bytes((tmp_path / "good.png").read_bytes()[:40])
    refused(insightv("ask", run, broken, "What?"), "broken.png cannot be decoded")
    refused(insightv("ask", run, tmp_path / "good.png", "What?"), "reasoning-r1 is no model folder")


@pytest.mark.parametrize("kept", [b"", b"\xff\n", b"no digest  x.sif\n"])
def test_a_digest_that_is_none_is_named(kept, insightv, tmp_path):
    (tmp_path / "x.sif").write_bytes(b"image")
    (tmp_path / "x.sif.sha256").write_bytes(kept)
    refused(insightv("image", "verify", tmp_path / "x.sif"), "x.sif.sha256 holds no digest")


def test_an_image_that_is_none_or_cut_off_is_one_line(insightv, tmp_path):
    sif, places = tmp_path / "x.sif", struct.pack("<2q", 128, 1000)
    whole = (b"#!/usr/bin/env run-singularity\n\0SIF_MAGIC\0" + bytes(70) + places)[:128]
    for command in ("check", "sign", "verify"):
        refused(insightv("image", command, sif), "x.sif: no image to be read (No such file")
        for data in (b"", whole[:100], bytes(4096)):
            sif.write_bytes(data)
            refused(insightv("image", command, sif), "x.sif is no SIF image; build one")
        sif.write_bytes(whole + bytes(999))
        refused(insightv("image", command, sif), "x.sif is cut off: 1,127 bytes of 1,128; copy")
        sif.unlink()


def test_building_outside_the_clone_says_what_is_missing(insightv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("build", "bundle"):
        refused(insightv("image", command, "cpu"), f"{tmp_path}/containers has no", "--source")
    clone = CONFIGS.parents[1]
    refused(insightv("image", "build", "gpu", "--source", clone), "no such definition", "cpu, ")
    refused(insightv("image", "build", "a.def"), "a.def: no such definition")


def test_evaluate_needs_the_models(insightv, run):
    refused(insightv("evaluate", run, "multi_agent"), "needs stage sft-reasoning")
    refused(insightv("evaluate", run, "multi_agent", "--split", "train"), "validation or test")
    refused(insightv("evaluate", run, "multi-agnt"), "did you mean multi_agent?")


@pytest.fixture
def shard(tmp_path) -> Path:
    groups = [(f"k{n}", [{"text": f"{n}" * 50}]) for n in range(300)]
    write_groups(tmp_path / "shards", groups, per_shard=300)
    return tmp_path / "shards" / "00000.jsonl.zst"


def test_shards_verify_and_cat(insightv, shard):
    status, out, _ = insightv("shards", "verify", shard.parent.parent)
    assert status == 0 and out.startswith("1 shards whole: 300 rows")
    lines = insightv("shards", "cat", shard)[1].splitlines()
    assert len(lines) == 300 and json.loads(lines[7]) == {"text": "7" * 50}


def truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-100])


def flip(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def forget(shard: Path) -> None:
    shard.with_name("00000.json").unlink()


@pytest.mark.parametrize("damage", [truncate, flip, forget])
@pytest.mark.parametrize("command", ["verify", "cat"])
def test_damaged_shards_are_refused_by_name(damage, command, insightv, shard):
    damage(shard)
    refused(insightv("shards", command, shard), "00000.jsonl.zst")


@pytest.mark.parametrize("command", ["status", "run", "retry"])
def test_a_cut_shard_of_a_run_is_refused_by_name(command, insightv, run):
    write_groups(run / "stages" / "questions-train" / "shards", [("k", [{"text": "t" * 50}])])
    shard = run / "stages" / "questions-train" / "shards" / "00000.jsonl.zst"
    shard.write_bytes(shard.read_bytes()[:-1])
    words = [SMOKE, "--run-dir", run] if command == "run" else [run]
    refused(insightv(command, *words), str(shard), "shards repair")


def test_repair_keeps_the_whole_frames(insightv, shard):
    truncate(shard)
    status, out, _ = insightv("shards", "repair", shard)
    assert status == 0 and "kept 256 keys, lost 44" in out
    assert not shard.exists() and shard.with_name("00000.jsonl.zst.damaged").exists()


def test_repair_reopens_the_stage_of_a_run(insightv, run):
    folder = run / "stages" / "questions-train"
    write_groups(folder / "shards", [(f"k{n}", [{}]) for n in range(300)], per_shard=300)
    (folder / "manifest.json").write_text("{}")
    assert "nothing is damaged" in insightv("shards", "repair", run)[1]
    assert (folder / "manifest.json").exists()
    truncate(folder / "shards" / "00000.jsonl.zst")
    assert "1 shards mended" in insightv("shards", "repair", run)[1]
    assert not (folder / "manifest.json").exists()


def test_a_reader_that_leaves_is_no_error(shard):
    command = f"{sys.executable} -m insightv shards cat {shard} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True)
    assert done.stderr == b"" and done.stdout.count(b"\n") == 1


def test_output_onto_a_full_disk_ends_in_one_line(shard):
    command = f"{sys.executable} -m insightv shards cat {shard} > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    refused((done.returncode, "", done.stderr), "No space left on device")


def test_interrupt_leaves_cleanly_and_the_same_command_goes_on(tmp_path):
    command = [sys.executable, "-m", "insightv", "run", SMOKE, "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "jobs.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "insightv: interrupted; the same command goes on from here"
    workers = [json.loads(line) for line in (tmp_path / "run" / "jobs.jsonl").open()]
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker["process"], 0)


def test_an_empty_chain_file_asks_for_the_same_command(insightv, run):
    (run / "chain.yaml").write_text("")
    for command in ("status", "retry"):
        refused(insightv(command, run), "chain.yaml is empty; give the same `run` or `submit`")


@pytest.mark.parametrize("text", ["{}", "[]", '{"hash": "x"}'])
def test_a_manifest_that_is_none_is_named(text, insightv, run):
    path = run / "stages" / "questions-train" / "manifest.json"
    path.parent.mkdir()
    path.write_text(text)
    refused(insightv("status", run), str(path), "delete it")


def test_shards_of_a_run_at_work_are_verified(insightv, run):
    stages = run / "stages"
    write_groups(stages / "questions-train" / "shards", [("k", [{"text": "t"}])])
    (stages / "set-summary" / "shards").mkdir(parents=True)
    (stages / "set-summary" / "shards" / "00000.0.part").write_bytes(b"half")
    status, out, _ = insightv("shards", "verify", run)
    assert status == 0 and out.startswith("1 shards whole: 1 rows")
    assert out.endswith("1 stages skipped: not finished, no complete shard yet\n")


TESTBED = CONFIGS.parent / "cluster" / "testbed.yaml"


@pytest.fixture
def no_cluster(tmp_path, monkeypatch):
    """Slurm's commands, installed and told of no cluster."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "scontrol", "squeue", "sinfo", "sacctmgr"):
        said = "fatal: Could not establish a configuration source"
        (folder / name).write_text(f"#!/bin/bash\necho '{said}' >&2; exit 1\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_CONF", raising=False)


def test_submitting_to_no_cluster_leaves_nothing(insightv, no_cluster, tmp_path):
    words = ["submit", SMOKE, "--cluster", TESTBED, "--run-dir"]
    refused(insightv(*words, tmp_path / "new"), "Slurm is not configured here")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes").write_text("mine")
    refused(insightv(*words, tmp_path / "old"), "Slurm is not configured here")
    assert (tmp_path / "old" / "notes").exists()


def test_a_plan_begins_with_its_table(insightv, no_cluster, tmp_path):
    profile = tmp_path / "wide.yaml"
    profile.write_text("training: {gpus: 4, nodes: 2}\n")
    words = ["plan", SMOKE, "--cluster", profile, "--run-dir", tmp_path / "run"]
    status, out, _ = insightv(*words)
    lines = out.splitlines()
    assert status == 0 and lines[0].strip() == "jobs" and "#SBATCH" not in out
    assert lines[-1] == "no Slurm answers here: the chain was not held against a cluster"
    notes = [line for line in lines if line.startswith("note: ")]
    rules, wide = notes  # no model judges here
    assert "r0-judge" in rules and "1 GPU for each process, which computes on none" in rules
    assert "sft-" in wide and "4 GPUs for each process" in wide
    assert "2 nodes x 1 task of the profile are not used" in out
    whole = insightv(*words, "--scripts")[1]
    assert whole.startswith(out) and "#SBATCH" in whole


def test_a_plan_refuses_what_a_submission_would(insightv, no_cluster, run):
    stage = run / "stages" / "questions-train"
    write_groups(stage / "shards", [("k", [{"text": "t"}])])
    (stage / "pictures").mkdir()
    (stage / "pictures" / "pack").write_bytes(b"p")
    (stage / "counts.json").write_text('{"charts": 1}')
    assert gates.check(build(run), "questions-train") == gates.DONE
    rest = [SMOKE, "--cluster", TESTBED, "--run-dir", run]
    assert insightv("plan", *rest)[0] == 0
    said = "stage questions-train was made with another configuration", "sizes.charts: "
    changed = [rest[0], "questions.charts.train=7", *rest[1:]]
    for words in ("plan",), ("plan", "--write", run / "scripts"), ("submit",):
        refused(insightv(*words, *changed), *said, "changed: questions.charts.train: ")
    status, out, _ = insightv("plan", *changed, "--remake")
    assert status == 0 and "questions-train" in out
    assert insightv("plan", *changed, "--remake", "--write", run / "scripts")[0] == 0
    assert "questions.charts.train=7 --remake --cluster" in (run / "scripts/chain.sh").read_text()


def test_torch_says_which_gpus_it_sees(insightv, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, _ = insightv("gpus")
    assert status == 1 and out.endswith(") sees no GPU\n")

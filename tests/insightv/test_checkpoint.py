"""Killed and resumed is the same as never killed; what is not whole is never resumed from."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from training_case import Here, family, sample_rows, store

from hpc.errors import UserError
from insightv import models
from insightv.training.checkpoint import Checkpoints, Position
from insightv.training.config import SFTConfig
from insightv.training.trainer import train_sft

CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from training_case import Here, sample_rows
from insightv.pictures import Pictures
from test_checkpoint import config
from insightv.training.trainer import train_sft
work = Path(sys.argv[2])
pictures = Pictures([work / "pictures"])
train_sft(config(), work / "base", sample_rows(sorted(pictures)), pictures,
          work / sys.argv[3] / "model", Here(work / sys.argv[3]))
"""


def config(**values) -> SFTConfig:
    plain = {
        "precision": "fp32",
        "device": "cpu",
        "learning_rate": 2e-3,
        "batch_size": 3,
        "epochs": 6,
        "save_steps": 3,
        "keep": 2,
        "tokens_per_micro_batch": 500,
    }
    return SFTConfig(**{**plain, **values})


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base with dropout, so that the state of the random generator matters."""
    work = tmp_path_factory.mktemp("work")
    store(work / "pictures")
    loaded = models.load(family("llava"), "cpu")
    loaded.model.config.text_config.attention_dropout = 0.2
    models.save(loaded.model, loaded.processor, work / "base")
    return work


def trained(work: Path, name: str, kill_at: int = 0) -> None:
    """Trains in a process of its own; kills it with -9 once so many steps are logged."""
    here = Path(__file__).parent
    command = [sys.executable, "-c", CHILD, str(here), str(work), name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parents[1])}
    process = subprocess.Popen(command, env=environment)
    try:
        metrics = work / name / "metrics.jsonl"
        while kill_at and process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= kill_at:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        status = process.wait(timeout=600)
    finally:
        process.kill()
    assert status == (-signal.SIGKILL if kill_at else 0)


def losses(work: Path, name: str) -> list[tuple]:
    lines = [json.loads(line) for line in (work / name / "metrics.jsonl").open()]
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]


@pytest.mark.timeout(900)  # three processes, each of which imports torch
def test_killed_and_resumed_is_bitwise_the_same(work):
    trained(work, "whole")
    trained(work, "killed", kill_at=8)  # two steps after a checkpoint, one before the next
    assert (work / "killed" / "checkpoints").is_dir() and not (work / "killed" / "model").exists()
    trained(work, "killed")
    whole = losses(work, "whole")
    assert len(whole) == 20 and losses(work, "killed") == whole
    first = load_file(work / "whole" / "model" / "model.safetensors")
    second = load_file(work / "killed" / "model" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    counts = [
        json.loads((work / name / "training.json").read_text()) for name in ("whole", "killed")
    ]
    for count in counts:
        del count["counts"]["seconds"]
    assert counts[0] == counts[1]


def test_dropout_was_at_work(work):
    """The test above would pass without the random state if nothing were drawn."""
    rows = sample_rows(sorted(p for p in pictures_of(work)))
    context = Here(work / "seeded")
    settings = config(max_steps=2, seed=0)
    train_sft(settings, work / "base", rows, pictures_of(work), work / "seeded-model", context)
    plain = Here(work / "plain")
    train_sft(settings, family("llava"), rows, pictures_of(work), work / "plain-model", plain)
    assert context.lines()[0]["loss"] != plain.lines()[0]["loss"]


def pictures_of(work: Path):
    from insightv.pictures import Pictures

    return Pictures([work / "pictures"])


def test_asked_to_stop_it_saves_and_goes_on(work, tmp_path):
    rows = sample_rows(sorted(pictures_of(work)))

    def train(context: Here, out: Path):
        return train_sft(config(), family("llava"), rows, pictures_of(work), out, context)

    whole = Here(tmp_path / "whole")
    train(whole, tmp_path / "a")
    for stop_at in (4, 1, 7):
        context = Here(tmp_path / "stopped", stop_at)
        assert train(context, tmp_path / "b") is None
        assert len(context.seen) == stop_at
    context = Here(tmp_path / "stopped")
    assert train(context, tmp_path / "b")["step"] == 20 and len(context.seen) == 20 - 12
    kept = [(line["step"], line["loss"]) for line in whole.lines()]
    assert [(line["step"], line["loss"]) for line in context.lines()] == kept
    assert models.digest_of(tmp_path / "a") == models.digest_of(tmp_path / "b")


def writer(value: float):
    def write(folder: Path) -> None:
        save_file({"x": torch.tensor([value])}, folder / "training.safetensors")

    return lambda: write


def resumed(checkpoints: Checkpoints, identity: str = "me") -> tuple[int, float] | None:
    seen = []
    read = lambda folder: seen.append(load_file(folder / "training.safetensors")["x"].item())  # noqa: E731
    position = checkpoints.resume(identity, read)
    return None if position is None else (position.step, seen[0])


def test_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert resumed(checkpoints) is None
    for step in (3, 6, 9, 12):
        position = Position("me", step=step, dropped={"k": "why"}, first_loss=1.5)
        checkpoints.save(position, writer(step))
    checkpoints.wait()
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["step-0000009", "step-0000012"]
    assert resumed(checkpoints) == (12, 12.0)
    assert checkpoints.resume("me", lambda folder: None) == position
    checkpoints.clear()
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("harm", ["cut", "flip", "missing", "state", "half"])
def test_what_is_not_whole_is_passed_over(harm, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (3, 6):
        checkpoints.save(Position("me", step=step), writer(step))
    checkpoints.wait()
    newest = tmp_path / "step-0000006"
    tensors = newest / "training.safetensors"
    data = tensors.read_bytes()
    if harm == "cut":
        tensors.write_bytes(data[:-2])
    elif harm == "flip":
        tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "missing":
        tensors.unlink()
    elif harm == "state":
        (newest / "state.json").write_text('{"files": {}')
    else:  # killed while writing: still under its provisional name
        newest.rename(tmp_path / "part-0000006")
    assert resumed(checkpoints) == (3, 3.0)
    # The next save takes its place and nothing of the broken one stays.
    checkpoints.save(Position("me", step=6), writer(6.5))
    checkpoints.wait()
    assert resumed(checkpoints) == (6, 6.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000003", "step-0000006"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
    ],
)
def test_a_full_disk_is_said_and_leaves_the_old_one(error, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(Position("me", step=3), writer(3))
    checkpoints.wait()

    def fail(folder: Path) -> None:
        (folder / "training.safetensors").write_bytes(b"half")
        raise error

    checkpoints.save(Position("me", step=6), lambda: fail)
    with pytest.raises(UserError, match="No space left on device.*free some space"):
        checkpoints.wait()
    assert not checkpoints.failed()  # it was said
    assert resumed(checkpoints) == (3, 3.0)


def test_one_of_another_training_is_not_lost(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(Position("me", step=3), writer(3))
    checkpoints.wait()
    with pytest.raises(UserError, match="step-0000003 is of another configuration.*remove"):
        resumed(checkpoints, "another")
    assert resumed(checkpoints) == (3, 3.0)


def test_what_is_being_written_is_not_there_yet(tmp_path):
    checkpoints, go = Checkpoints(tmp_path, keep=2), threading.Event()
    position = Position("me", step=3, norms=[1.0])

    def slowly(folder: Path) -> None:
        (folder / "training.safetensors").write_bytes(b"half")
        assert go.wait(60)
        writer(3)()(folder)

    checkpoints.save(position, lambda: slowly)
    position.step, position.norms[0] = 4, 2.0  # training goes on
    while not (tmp_path / "part-0000003" / "training.safetensors").exists():
        time.sleep(0.01)
    assert resumed(Checkpoints(tmp_path, keep=2)) is None
    go.set()
    checkpoints.save(position, writer(4))  # waits for the one before
    checkpoints.close()
    assert resumed(Checkpoints(tmp_path, keep=2)) == (4, 4.0)
    shutil.rmtree(tmp_path / "step-0000004")
    found = checkpoints.resume("me", lambda folder: None)
    assert found == Position("me", step=3, norms=[1.0])


def test_training_goes_on_while_a_checkpoint_is_written(work, tmp_path, monkeypatch):
    """And what it writes is the state it was asked for, bitwise."""
    rows, context = sample_rows(sorted(pictures_of(work))), Here(tmp_path / "run")
    begun, write = [], Checkpoints._write

    def late(self, *arguments) -> None:
        begun.append(len(context.seen))
        while len(context.seen) < begun[0] + 2:
            time.sleep(0.01)
        write(self, *arguments)

    monkeypatch.setattr(Checkpoints, "_write", late)
    common = (work / "base", rows, pictures_of(work))
    train_sft(config(save_steps=7, max_steps=9), *common, tmp_path / "a", context)
    assert begun[0] in (6, 7)
    monkeypatch.undo()
    killed = Here(tmp_path / "killed")
    monkeypatch.setattr(Checkpoints, "clear", lambda self: None)
    train_sft(config(save_steps=7, max_steps=9), *common, tmp_path / "b", killed)
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "killed" / "training.json").unlink()
    again = Here(tmp_path / "killed")
    train_sft(config(save_steps=7, max_steps=9), *common, tmp_path / "b", again)
    assert len(again.seen) == 2
    assert models.digest_of(tmp_path / "a") == models.digest_of(tmp_path / "b")


def test_a_checkpoint_that_cannot_be_written_ends_the_training(work, tmp_path, monkeypatch):
    rows, context = sample_rows(sorted(pictures_of(work))), Here(tmp_path / "run")

    def fail(tensors, path) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr("insightv.training.torch_backend.save_file", fail)
    with pytest.raises(UserError, match="checkpoints.*No space left on device.*free some space"):
        train_sft(config(), work / "base", rows, pictures_of(work), tmp_path / "a", context)
    assert 3 <= len(context.seen) < 7 and not (tmp_path / "a").exists()
    assert resumed(Checkpoints(context.directory / "checkpoints", 2)) is None


def test_a_batch_of_more_than_there_is_is_told(work, tmp_path, caplog):
    rows, context = sample_rows(sorted(pictures_of(work))), Here(tmp_path / "run")
    common = (work / "base", rows, pictures_of(work), tmp_path / "a", context)
    train_sft(config(batch_size=21, epochs=2), *common)
    assert "batch_size 21 is more than 10 rows in 2 epochs: there is one step" in caplog.text
    assert len(context.seen) == 1

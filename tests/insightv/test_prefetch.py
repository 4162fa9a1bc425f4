"""What jobs will find without internet."""

import shutil
from pathlib import Path

import pytest

from insightv import cli
from insightv.prompting import FOLDER

SMOKE = str(Path(__file__).parents[2] / "configs" / "chain" / "smoke.yaml")


@pytest.fixture
def prefetch(monkeypatch, capsys):
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["insightv", "prefetch", SMOKE, *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


def test_the_embedded_model_and_the_sets_are_there(prefetch):
    status, out, _ = prefetch()
    assert status == 0 and "model  tiny: /" in out and "digest " in out
    assert "set    charts:" in out and "pictures of easy-vqa" in out
    assert out.splitlines()[-1] == "jobs find all of this offline"


def test_a_folder_that_is_no_model_is_named(prefetch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    status, _, err = prefetch(f"models.judge.path={tmp_path}")
    assert (
        status == 2 and "models.judge.path" in err and "needs config.json and *.safetensors" in err
    )
    (tmp_path / "model.safetensors").write_bytes(b"")
    status, _, err = prefetch(f"models.base.path={tmp_path}")
    assert status == 2 and "models.base.path" in err and "names no model_type" in err


def test_impossible_values_and_prompts_are_found_before_the_jobs_start(prefetch, tmp_path):
    status, _, err = prefetch("engine.device=tpu")
    assert status == 2 and "engine.device is 'tpu'" in err
    shutil.copytree(FOLDER / "default", tmp_path / "prompts")
    (tmp_path / "prompts" / "reasoning.txt").write_text("Think.")
    status, _, err = prefetch(f"models.base.prompts={tmp_path / 'prompts'}")
    assert status == 2 and "reasoning.txt lacks the field {question}" in err


def test_a_hub_that_does_not_answer_is_one_line(prefetch, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    status, _, err = prefetch("models.base.path=some/model", "--to", tmp_path)
    assert status == 2 and "some/model" in err and err.count("\n") == 1


def test_a_hub_out_of_reach_is_one_line(prefetch, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    def away(*words, **more):
        logging.get_logger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        try:
            raise OSError("Name or service not known")
        except OSError as error:
            raise LocalEntryNotFoundError("An error happened\nand so on") from error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", away)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    before = logging.get_verbosity()
    status, out, err = prefetch("models.base.path=some/model", "--to", tmp_path)
    assert status == 2 and err.count("\n") == 1 and "Retry" not in err + out
    assert "the hub cannot be reached (Name or service not known); fetch some/model on a" in err
    assert "some/model: asking the hub for it" in out and logging.get_verbosity() == before


@pytest.mark.parametrize("command", ["run", "submit", "prefetch"])
def test_missing_packages_are_named_before_any_work(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hpc.needs.find_spec", lambda name: None if name == "plotly" else True)
    profile = Path(SMOKE).parents[1] / "cluster" / "testbed.yaml"
    words = [command, SMOKE, *(["--cluster", str(profile)] if command == "submit" else [])]
    words += [] if command == "prefetch" else ["--run-dir", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["insightv", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1
    assert "the package plotly" in err and "pip install -c constraints.txt '.[demo]'" in err
    assert not list(tmp_path.iterdir())

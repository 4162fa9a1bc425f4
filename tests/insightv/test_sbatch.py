"""The scripts under sbatch/ are what `insightv plan --write` writes today."""

import subprocess
from pathlib import Path

import pytest

from insightv import cli

ROOT = Path(__file__).parents[2]
FOLDER = Path("sbatch/quickstart")
WORDS = ["configs/chain/quickstart.yaml", "--cluster", "configs/cluster/testbed.yaml"]


def texts(folder: Path) -> dict[str, str]:
    """Each script, and the bash that they read, by its path in the folder."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*.sh")}
    return {name: path.read_text() for name, path in found.items()}


@pytest.fixture
def written(tmp_path, monkeypatch) -> Path:
    """The scripts, written anew from the project's own folder."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_TOKEN", "planted")
    folder = tmp_path / "scripts"
    monkeypatch.setattr("sys.argv", ["insightv", "plan", *WORDS, "--write", str(folder)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    return folder


def test_the_scripts_are_up_to_date(written: Path) -> None:
    """`insightv plan … --write sbatch/quickstart` mends what this names."""
    made, kept = texts(written), texts(ROOT / FOLDER)
    made["chain.sh"] = made["chain.sh"].replace(str(written), str(FOLDER))
    assert made.keys() == kept.keys()
    for name, text in made.items():
        assert text == kept[name], name


def test_they_name_no_folder_of_any_machine() -> None:
    for path, text in texts(ROOT / FOLDER).items():
        assert str(ROOT) not in text, path
        asked = [line.partition("=")[2] for line in text.splitlines() if line.startswith("#SBATCH")]
        assert not [value for value in asked if value.startswith("/")], path
        checked = subprocess.run(
            ["bash", "-n", ROOT / FOLDER / path], capture_output=True, text=True
        )
        assert checked.returncode == 0, checked.stderr


def test_they_are_short(written: Path) -> None:
    for name, text in texts(written).items():
        assert len(text.splitlines()) < 45 or name.startswith(("chain", "host-")), name

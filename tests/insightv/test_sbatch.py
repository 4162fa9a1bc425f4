"""The scripts under sbatch/ are what `insightv plan --write` writes today."""

import subprocess
from pathlib import Path

import pytest

from insightv import cli

ROOT = Path(__file__).parents[2]
FOLDER = Path("sbatch/quickstart")
WORDS = ["configs/chain/quickstart.yaml", "--cluster", "configs/cluster/testbed.yaml"]


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
    made = {path.name: path.read_text() for path in written.iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / FOLDER).iterdir()}
    made["chain.sh"] = made["chain.sh"].replace(str(written), str(FOLDER))
    assert made.keys() == kept.keys()
    for name, text in made.items():
        assert text == kept[name], name


def test_they_name_no_folder_of_any_machine() -> None:
    for path in (ROOT / FOLDER).iterdir():
        text = path.read_text()
        assert str(ROOT) not in text, path
        asked = [line.partition("=")[2] for line in text.splitlines() if line.startswith("#SBATCH")]
        assert not [value for value in asked if value.startswith("/")], path
        checked = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr

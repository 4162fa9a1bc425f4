"""Slurm's commands where no cluster answers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpc import slurm
from hpc.errors import UserError

UNKNOWN = (
    "resolve_ctls_from_dns_srv: res_nsearch error: Unknown host",
    "fetch_config: DNS SRV lookup failed",
    "fatal: Could not establish a configuration source",
)
AWAY = "Unable to contact slurm controller (connect failure)"


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    return folder


def write(path: Path, text: str) -> None:
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(0o755)


def test_a_command_that_knows_no_cluster_fails_at_once(commands, capsys):
    write(commands / "scontrol", f"printf '%s\\n' {' '.join(map(repr, UNKNOWN))} >&2; exit 1\n")
    with pytest.raises(UserError, match="Slurm is not configured here: scontrol finds"):
        slurm.config(patience=600)
    assert not slurm.answers()
    assert capsys.readouterr().err == ""


def test_a_slurm_conf_that_is_not_there_is_named(commands, monkeypatch):
    write(commands / "scontrol", "sleep 60\n")
    monkeypatch.setenv("SLURM_CONF", "/no/slurm.conf")
    with pytest.raises(UserError, match="SLURM_CONF names /no/slurm.conf"):
        slurm.config(patience=600)


def test_waiting_for_the_controller_is_told_once(commands, capsys, monkeypatch):
    monkeypatch.setattr(slurm.time, "sleep", lambda _: None)
    # Away three times; configless machines say more, of which the controller is what matters.
    write(
        commands / "scontrol",
        f"echo >>{commands}/calls\n"
        f'if [ "$(wc -l <{commands}/calls)" -gt 3 ]; then echo "A = b"; exit 0; fi\n'
        f"echo {AWAY!r} {UNKNOWN[-1]!r} >&2; exit 1\n",
    )
    assert slurm.config(patience=300) == {"A": "b"}
    said = "Slurm does not answer; waiting up to 300 s (submit.patience)\n"
    assert capsys.readouterr().err == said

"""The order of stages: the only place that knows it.

Each stage's ``config`` holds just what shapes its result, so that a changed key makes again
what it touches and what depends on that, and nothing else. What a stage does when it runs
stands in `insightv.payloads`; putting a chain together loads no model.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hpc.config import load
from hpc.errors import UserError
from hpc.rundir import Chain, RunDir
from insightv.chain.ladder import ENTRIES, Ladder
from insightv.chainfile import folders
from insightv.config import ChainConfig

__all__ = ["ENTRIES", "SUMMARIES", "assemble", "build"]

SUMMARIES = ("results", "report")
"""Stages that only tell what the others made; they follow any change."""


def build(run: RunDir | Path) -> Chain:
    """The chain of a run, from its ``chain.yaml``.

    Raises:
        UserError: There is no such file, or it is damaged.
    """
    run = run if isinstance(run, RunDir) else RunDir(run)
    path = run.chain_file
    if path.is_file() and not path.read_bytes().strip():  # a disk that was full leaves such
        raise UserError(
            f"{path} is empty; give the same `run` or `submit` command again, which writes it anew"
        )
    return assemble(load(ChainConfig, run.chain_file), run)


def assemble(config: ChainConfig, run: RunDir) -> Chain:
    """The chain of a resolved configuration in a run directory.

    Raises:
        UserError: An entry of the ladder does not exist, or cannot be made.
    """
    command = [sys.executable, "-m", "insightv"]
    return Chain(Ladder(config).all(), run, command, ("hpc", "insightv"), folders(config))

"""Commands that jobs call, not people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from insightv.cli.runs import opened


def work(run_dir: Path, stage: str) -> int:
    """Payload of one worker."""
    from hpc.control import payload

    # The driver, or the gate, repeats the last line of the log as the reason it stops.
    return payload(opened(run_dir), ["work", stage])


def gate(
    run_dir: Path,
    stage: str,
    attempt: Annotated[int, typer.Argument()] = 0,
    first: Annotated[int, typer.Argument()] = 0,
) -> int:
    """Payload of a gate."""
    from hpc.control import payload

    return payload(opened(run_dir), ["gate", stage, str(attempt), str(first)])


def preflight(run_dir: Path, stages: Annotated[list[str] | None, typer.Argument()] = None) -> int:
    """Payload of the first job on a cluster."""
    from hpc.control import payload

    return payload(opened(run_dir), ["preflight", *(stages or ())])


def gpus() -> int:
    """Whether torch computes on GPUs here: 0 and what it sees, or 1 and what it is."""
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    build = f"ROCm {torch.version.hip}" if torch.version.hip else build
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} ({build}) sees no GPU")
        return 1
    count = torch.cuda.device_count()
    print(f"torch {torch.__version__} ({build}) sees {count}, {torch.cuda.get_device_name(0)}")
    return 0


def add_to(app: typer.Typer) -> None:
    """Registers the commands."""
    for command in (work, gate, preflight, gpus):
        app.command(hidden=True)(command)

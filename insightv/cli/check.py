"""The command that holds a cluster profile against the cluster itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Look at a cluster before a run does.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _cluster() -> None:
    """Keeps `check` a word of its own, however few commands there are."""


@app.command()
def check(
    cluster: Annotated[
        Path, typer.Option("--cluster", metavar="PROFILE", help="A cluster profile (YAML).")
    ],
    run_dir: Annotated[Path, typer.Option(help="Where runs will lie.")] = Path("runs"),
    minutes: Annotated[
        float, typer.Option(help="How long to wait for nodes; 0 asks Slurm only, without jobs.")
    ] = 10.0,
) -> int:
    """Hold a profile against Slurm, and try two nodes of every kind; one line a finding."""
    import sys
    from functools import partial

    from hpc.cluster import read_profile
    from hpc.facts import Facts
    from hpc.probing import probe
    from hpc.site import check as ask

    profile, facts = read_profile(cluster), Facts()
    findings = ask(profile, facts)
    for finding in findings:
        print(finding, flush=True)
    if minutes > 0:
        tell = partial(print, file=sys.stderr)
        program = [sys.executable, "-m", "insightv"]
        probed = probe(profile, run_dir, program, 60 * minutes, tell, facts)
        for finding in probed:
            print(finding, flush=True)
        findings += probed
    wrong = sum(finding.level == "wrong" for finding in findings)
    print(f"{wrong} to mend" if wrong else f"{cluster}: nothing to mend")
    return 2 if wrong else 0

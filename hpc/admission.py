"""Whether a cluster would take a whole chain, asked before any of it is queued.

Three things are looked at: the partitions' and accounts' limits on each kind of job (`hpc.site`),
the number of jobs that may stand in the queue, and what ``sbatch --test-only`` says. Before that,
without asking Slurm, stages may refuse what the profile gives them (`fits`).
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hpc import gates, site, slurm
from hpc.cluster import KINDS, Profile, Resources
from hpc.errors import UserError
from hpc.facts import Facts
from hpc.planning import Planned
from hpc.rundir import Chain
from hpc.slurm import SlurmError

_JOB_COUNT = "10000"  # Slurm's own default of MaxJobCount


def fits(chain: Chain, profile: Profile) -> dict[str, str]:
    """Lets the stages that are yet to be made look at what they would get.

    Returns:
        What they tell of it, by stage.

    Raises:
        UserError: One of them cannot be made with that.
    """
    standing = gates.standing(chain)
    told = {
        name: stage.fits(profile.of_stage(stage))
        for name, stage in chain.stages.items()
        if stage.fits is not None and not standing[name]
    }
    return {name: said for name, said in told.items() if said}


def admit(
    planned: Sequence[Planned], profile: Profile, test: bool = True, facts: Facts | None = None
) -> str:
    """Refuses a chain that cannot fit.

    Args:
        planned: The jobs to be queued.
        profile: The cluster.
        test: Ask ``sbatch --test-only`` too.
        facts: What the cluster was asked before.

    Returns:
        What was asked, in words.

    Raises:
        UserError: It does not fit; which limit, and what to change.
    """
    if not slurm.available():
        return "no Slurm here: the chain was not held against a cluster"
    facts = facts or Facts(profile.submit.patience)
    wrong = [*_kinds(planned, profile, facts), *_too_many(planned, profile, facts)]
    if wrong:
        more = f" (and {len(wrong) - 1} more: insightv cluster check)" if len(wrong) > 1 else ""
        raise UserError(f"the chain cannot fit, nothing was queued: {wrong[0]}{more}")
    said = f"{len(planned)} jobs fit the cluster's limits"
    if not test:
        return said
    tried = [*_distinct(planned)]
    _try(tried, profile)
    return f"{said}; sbatch --test-only takes all {len(tried)} kinds of script"


def _kinds(planned: Sequence[Planned], profile: Profile, facts: Facts) -> Iterator[str]:
    """What is wrong with the kinds of job that the chain has."""
    named = {id(getattr(profile, name)): name for name in KINDS}
    # No more workers than there are: a small chain may fit where the profile would not.
    asked: dict[str, Resources] = {}
    for item in planned:
        name = named.get(id(item.resources), item.job.stage)
        known = asked.get(name, replace(item.resources, workers=1))
        asked[name] = replace(known, workers=max(known.workers, item.job.count))
    for finding in site.hold(profile, asked, facts):
        if finding.level == "wrong":
            yield f"{finding.about}: {finding.said}"


def _too_many(planned: Sequence[Planned], profile: Profile, facts: Facts) -> Iterator[str]:
    """Which limits on jobs in the queue the chain as a whole exceeds; elements count."""
    total = sum(item.job.count for item in planned)
    largest = int(facts.config.get("MaxJobCount", _JOB_COUNT).split()[0])
    if total > largest:
        yield f"{total} jobs, elements counted; MaxJobCount is {largest}; {_FEWER}"
    owned, rules = facts.associations, facts.rules
    if owned is None or rules is None:
        return  # no accounting, no such limits
    queued = sum(job.count for job in facts.queue)
    by_account, by_qos = Counter[str](), Counter[str]()
    default = owned[0] if owned else None
    for item in planned:
        account = profile.word(item.resources, "account")
        account = account or (default["account"] if default else "")
        mine = next((line for line in owned if line["account"] == account), None)
        qos = profile.word(item.resources, "qos") or (mine["defaultqos"] if mine else "")
        by_account[account] += item.job.count
        by_qos[qos or (mine["qos"] if mine and "," not in mine["qos"] else "")] += item.job.count
        partition = profile.word(item.resources, "partition").split(",")[0]
        if partition in facts.partitions:
            by_qos[facts.partitions[partition].fields.get("QoS", "N/A")] += item.job.count
    for line in owned:
        limits = [line["maxsubmitjobs"], line["grpsubmitjobs"]]
        yield from _over(by_account[line["account"]], queued, f"account {line['account']}", limits)
    for line in rules:
        limits = [line["maxsubmitjobspu"], line["maxsubmitjobspa"], line["grpsubmitjobs"]]
        yield from _over(by_qos[line["name"]], queued, f"QOS {line['name']}", limits)


_FEWER = "lower `workers` in the profile, or let other jobs end first"


def _over(count: int, queued: int, whose: str, limits: Sequence[str]) -> Iterator[str]:
    known = [int(limit) for limit in limits if limit.isdigit()]
    if count and known and count + queued > min(known):
        there = f" beside {queued} that you have queued" if queued else ""
        yield f"{count} jobs, elements counted{there}; {whose} allows {min(known)}; {_FEWER}"


def _distinct(planned: Sequence[Planned]) -> Iterator[Planned]:
    """One of all jobs that ask for the same; names and payloads make no difference to Slurm."""
    seen = set()
    for item in planned:
        lines = (line for line in item.text.splitlines() if line.startswith("#SBATCH"))
        own = ("#SBATCH --job-name=", "#SBATCH --output=", "#SBATCH --dependency=")
        asked = tuple(line for line in lines if not line.startswith(own))
        if asked not in seen:
            seen.add(asked)
            yield item


def _try(planned: Sequence[Planned], profile: Profile) -> None:
    """Asks Slurm about scripts, no faster than they would be submitted.

    Raises:
        UserError: It refuses one, or stays away.
    """
    give_up, earliest = time.monotonic() + profile.submit.patience, 0.0
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "job.sh"
        for item in planned:
            script.write_text(item.text)
            time.sleep(max(0.0, earliest - time.monotonic()))
            earliest = time.monotonic() + 1.0 / profile.submit.per_second
            told = False
            while True:
                try:
                    said = slurm.test_only(script, profile.export)
                    break
                except SlurmError as error:
                    if time.monotonic() > give_up:
                        raise UserError(f"{item.name}: {error}; try again later") from None
                if not told:
                    slurm.tell_waiting(profile.submit.patience)
                    told = True
                time.sleep(2.0)
            if said:
                raise UserError(
                    f"{item.name}: Slurm refuses it (sbatch --test-only: {said}); "
                    "nothing was queued"
                )

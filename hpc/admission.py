"""Whether a cluster would take a whole chain, asked before any of it is queued.

Three things are looked at: the partitions' and accounts' limits on each kind of job (`hpc.site`),
the number of jobs that may stand in the queue, and what ``sbatch --test-only`` says.
"""

from __future__ import annotations

import getpass
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hpc import site, slurm
from hpc.cluster import Profile, Resources
from hpc.errors import UserError
from hpc.planning import Planned
from hpc.slurm import SlurmError

_JOB_COUNT = "10000"  # Slurm's own default of MaxJobCount


def admit(planned: Sequence[Planned], profile: Profile, test: bool = True) -> str:
    """Refuses a chain that cannot fit.

    Args:
        planned: The jobs to be queued.
        profile: The cluster.
        test: Ask ``sbatch --test-only`` too.

    Returns:
        What was asked, in words.

    Raises:
        UserError: It does not fit; which limit, and what to change.
    """
    if not slurm.available():
        return "no Slurm here: the chain was not held against a cluster"
    patience = profile.submit.patience
    config = slurm.config(patience)
    partitions = site.read_partitions(patience)
    wrong = [*_kinds(planned, profile, config, partitions)]
    wrong += _too_many(planned, profile, config, partitions)
    if wrong:
        more = f" (and {len(wrong) - 1} more: insightv cluster check)" if len(wrong) > 1 else ""
        raise UserError(f"the chain cannot fit, nothing was queued: {wrong[0]}{more}")
    said = f"{len(planned)} jobs fit the cluster's limits"
    if not test:
        return said
    tried = [*_distinct(planned)]
    _try(tried, profile)
    return f"{said}; sbatch --test-only takes all {len(tried)} kinds of script"


def _kinds(
    planned: Sequence[Planned],
    profile: Profile,
    config: Mapping[str, str],
    partitions: Mapping[str, site.Partition],
) -> Iterator[str]:
    """What is wrong with the kinds of job that the chain has."""
    named = {id(resources): name for name, resources in profile.named().items()}
    # No more workers than there are: a small chain may fit where the profile would not.
    asked: dict[str, Resources] = {}
    for item in planned:
        name = named.get(id(item.resources), item.job.stage)
        known = asked.get(name, replace(item.resources, workers=1))
        asked[name] = replace(known, workers=max(known.workers, item.job.count))
    for finding in site.hold(profile, asked, partitions, config):
        if finding.level == "wrong":
            yield f"{finding.about}: {finding.said}"


def _too_many(
    planned: Sequence[Planned],
    profile: Profile,
    config: Mapping[str, str],
    partitions: Mapping[str, site.Partition],
) -> Iterator[str]:
    """Which limits on jobs in the queue the chain as a whole exceeds; elements count."""
    total = sum(item.job.count for item in planned)
    largest = int(config.get("MaxJobCount", _JOB_COUNT).split()[0])
    if total > largest:
        yield f"{total} jobs, elements counted; MaxJobCount is {largest}; {_FEWER}"
    user = getpass.getuser()
    form = "account,partition,user,qos,defaultqos,maxsubmitjobs,grpsubmitjobs"
    try:
        owned = site.table("sacctmgr", "show", "assoc", f"user={user}", f"format={form}")
        form = "name,maxsubmitjobspu,maxsubmitjobspa,grpsubmitjobs"
        rules = site.table("sacctmgr", "show", "qos", f"format={form}")
    except (SlurmError, UserError):
        return  # no accounting, no such limits
    queued = _queued_already()
    by_account, by_qos = Counter[str](), Counter[str]()
    default = owned[0] if owned else None
    for item in planned:
        account = profile.word(item.resources, "account") or (default[0] if default else "")
        mine = next((line for line in owned if line[0] == account), None)
        qos = profile.word(item.resources, "qos") or (mine[4] if mine else "")
        by_account[account] += item.job.count
        by_qos[qos or (mine[3] if mine and "," not in mine[3] else "")] += item.job.count
        partition = profile.word(item.resources, "partition").split(",")[0]
        if partition in partitions:
            by_qos[partitions[partition].fields.get("QoS", "N/A")] += item.job.count
    for line in owned:
        yield from _over(by_account[line[0]], queued, f"account {line[0]}", line[5:7])
    for line in rules:
        yield from _over(by_qos[line[0]], queued, f"QOS {line[0]}", line[1:])


_FEWER = "lower `workers` in the profile, or let other jobs end first"


def _over(count: int, queued: int, whose: str, limits: Sequence[str]) -> Iterator[str]:
    known = [int(limit) for limit in limits if limit.isdigit()]
    if count and known and count + queued > min(known):
        there = f" beside {queued} that you have queued" if queued else ""
        yield f"{count} jobs, elements counted{there}; {whose} allows {min(known)}; {_FEWER}"


def _queued_already() -> int:
    """This user's jobs in the queue, each element of an array counted."""
    try:
        return len(slurm.call("squeue", "--me", "--noheader", "--array", "--format=%i").split())
    except SlurmError:
        return 0


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
    give_up = time.monotonic() + profile.submit.patience
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "job.sh"
        for item in planned:
            script.write_text(item.text)
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
            time.sleep(1.0 / profile.submit.per_second)

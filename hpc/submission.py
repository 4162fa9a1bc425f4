"""Sends a chain to a cluster, all of it up front, and looks after it there.

Whatever is complete, queued or at work is left alone, so that submitting again only adds what
is missing: that is also how a run that stopped, was cancelled, or lost jobs goes on.
"""

from __future__ import annotations

import copy
import getpass
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpc import gates, slurm
from hpc.accounting import by_stage, spent
from hpc.admission import admit, fits
from hpc.cluster import Profile, read_profile
from hpc.config import dump
from hpc.container import Pin, pin
from hpc.disk import expanded, write_atomic
from hpc.errors import UserError
from hpc.executors.base import Job
from hpc.executors.slurm import SlurmExecutor
from hpc.facts import Facts
from hpc.naming import make_id, next_attempt, parse_name, prefix
from hpc.needs import refuse_absent
from hpc.planning import PREFLIGHT, Planned, Step, plan_of, preflight_job, steps_of
from hpc.provenance import image
from hpc.rundir import CANCELLED, STOPPED, Chain, RunDir, write_json
from hpc.slurm import Queued
from hpc.status import JobCounts

_ROUNDS = 3
Say = Callable[[str], None]


def profile_path(run: RunDir) -> Path:
    """The resolved profile of a run that was submitted to a cluster."""
    return run.path / "cluster.yaml"


def on_cluster(run: RunDir) -> bool:
    """Whether a run was submitted to a cluster."""
    return profile_path(run).exists()


def submit(
    chain: Chain,
    profile: Profile,
    say: Say = print,
    remake: bool = False,
    prepare: Callable[[], None] | None = None,
    other_image: bool = False,
) -> int:
    """Queues everything a chain still lacks.

    Args:
        chain: The chain; its run directory may hold finished work.
        profile: The cluster.
        say: Told what happens, a line at a time.
        remake: Make stages again that were made with another configuration.
        prepare: Called once the run is held, before anything is submitted: writes the chain's
            configuration, which its jobs read.
        other_image: Go on in another container image than the run began in.

    Returns:
        How many jobs were submitted; 0 if the chain is complete or all of it is queued.

    Raises:
        UserError: Slurm refuses a job or stays away, a stage cannot be made with what the profile
            gives it or for want of a package, another submission is under way, or the run
            directory cannot be used as it is.
    """
    run = chain.run
    new = not run.path.exists()
    run.create()
    with run.lock():
        with _removed_on_error(run) if new else nullcontext():
            if prepare is not None:
                prepare()
            if not remake:
                gates.refuse_changes(chain)
            if all(gates.standing(chain).values()):
                return 0
            fits(chain, profile)
            profile = pinned(chain, profile, other_image)
            refuse_absent(chain, profile)
            run.unmark(STOPPED, CANCELLED, "slurm/finished")
            gates.withdraw(chain)
            facts = Facts(profile.submit.patience)
            profile = keep_profile(run, profile, facts)
            make_id(run)
            run.add_provenance(chain.packages, chain.image, chain.images)
            if slurm.available():
                admit(_missing(chain, profile, facts), profile, facts=facts)
        # What is queued may move on; where there is nothing of this run, nobody adds to it.
        mine = [job for job in facts.queue if job.name.startswith(prefix(run) + "-")]
        if not mine:
            gates.pass_over(chain)
        count = 0
        for _ in range(_ROUNDS):
            submission = _Submission(chain, profile, say, None if mine or count else [])
            refused: slurm.Refused | None = None
            try:
                submission.fill()
            except slurm.Refused as error:
                refused = error
            count += submission.count
            if refused is not None and not refused.orphaned:
                # What limits and --test-only did not tell: no half of a chain stays behind.
                slurm.cancel([*submission.sent.values()], patience=profile.submit.patience)
                say(f"the {submission.count} jobs submitted before it were cancelled")
                raise refused
            if not submission.lost():
                if refused is not None:
                    raise refused
                return count
        raise UserError(f"{run.path}: Slurm keeps losing jobs it has taken; ask its admins")


@contextmanager
def _removed_on_error(run: RunDir) -> Iterator[None]:
    """Removes a run that was made for what has failed, an interrupt included.

    Unless another submission was here between, whose jobs work in it.
    """
    try:
        yield
    except BaseException:
        if not run.jobs.exists():
            shutil.rmtree(run.path, ignore_errors=True)
        raise


def pinned(chain: Chain, profile: Profile, other_image: bool = False) -> Profile:
    """The profile with the digests of the images in use, which see all that the chain reads.

    Raises:
        UserError: An image is not there, or not the one it should be.
    """
    profile, run = copy.deepcopy(profile), chain.run
    kept = profile_path(run)
    known = read_profile(kept) if kept.exists() else Profile()
    for section in profile.sections():
        section.image = _absolute(section.image) if section.image else section.image
    profile.pins = {_absolute(path): one for path, one in profile.pins.items()}
    profile.container = pin(profile.container, known.container)
    asked = [profile.of_stage(stage) for stage in chain.stages.values()]
    for path, one in {one.image: one for one in asked if one.image}.items():
        found = pin(profile.container_of(one), known.container_of(one))
        profile.pins[path] = Pin(found.sha256, found.stamp)
    profile.place(chain)
    if chain.image or chain.images:
        profile.container = profile.container.seeing(chain.reads)
    if not other_image:
        run.refuse_other_image(chain.image or image(), chain.images)
    return profile


def _absolute(path: str) -> str:
    return str(expanded(path).absolute())


def keep_profile(run: RunDir, profile: Profile, facts: Facts | None = None) -> Profile:
    """Writes the profile, fitted to the cluster, into the run, for its gates."""
    facts = facts or Facts(profile.submit.patience)
    profile = fitted(profile, facts)
    if slurm.available():
        facts.look()
        # Nodes are only avoided where many are left.
        write_json(run.path / "slurm" / "site.json", {"nodes": len(facts.nodes)})
    write_atomic(profile_path(run), dump(profile))
    return profile


def _missing(chain: Chain, profile: Profile, facts: Facts) -> list[Planned]:
    """The jobs of a plan that are not queued yet."""
    live = {
        (parsed[0], parsed[1])
        for job in facts.queue
        if job.reason != "DependencyNeverSatisfied" and (parsed := parse_name(chain.run, job.name))
    }
    planned = plan_of(chain, profile)
    return [item for item in planned if (item.job.stage, item.job.role) not in live]


def fitted(profile: Profile, facts: Facts | None = None) -> Profile:
    """The profile within the cluster's limit on arrays, where there is a cluster."""
    profile = copy.deepcopy(profile)
    if slurm.available():
        # The largest index is one less than this.
        facts = facts or Facts(profile.submit.patience)
        largest = int(facts.config.get("MaxArraySize", "1001"))
        for section in profile.sections():
            if section.workers is not None:
                section.workers = min(section.workers, max(largest, 1))
    return profile


@dataclass
class _Submission:
    """One pass over a chain."""

    chain: Chain
    profile: Profile
    say: Say
    seen: list[Queued] | None = None  # what is queued of the run, where that is known
    count: int = 0
    gates: dict[str, str] = field(default_factory=dict)  # stage to the id of its gate
    sent: dict[str, str] = field(default_factory=dict)  # name to id

    def __post_init__(self) -> None:
        run = self.chain.run
        self.executor = SlurmExecutor(run, self.profile)
        self.live: dict[str, Queued] = {}
        hopeless = []
        seen = self.seen
        if seen is None:
            seen = slurm.queue(prefix(run) + "-", patience=self.profile.submit.patience)
        for job in seen:
            if job.reason == "DependencyNeverSatisfied":
                hopeless.append(job.job)
            else:
                self.live[job.name] = job
        slurm.cancel(sorted(set(hopeless)))

    def fill(self) -> None:
        """Submits what is neither complete nor queued, parents first."""
        chain = self.chain
        standing = gates.standing(chain)
        todo = [name for name in chain.stages if not standing[name]]
        missing = [name for name in todo if self._live_gate(name) is None]
        first = [name for name in missing if not self._waits_for(name, todo)]
        first = [name for name in first if self._live_work(name) is None]
        preflight = self._preflight(first) if first else ""
        for name in todo:
            parents = self._waits_for(name, todo)
            before = [self.gates[parent] for parent in parents] or [preflight]
            after = "afterok:" + ":".join(before) if before != [""] else ""
            self._stage(name, after, renewed=any(parent in missing for parent in parents))
        self._cancel_stale()

    def _cancel_stale(self) -> None:
        """Cancels the jobs in whose place others were submitted, held ones say."""
        run = self.chain.run
        renewed = {parsed[:2] for name in self.sent if (parsed := parse_name(run, name))}
        stale = {
            job.job
            for name, job in self.live.items()
            if (parsed := parse_name(run, name)) and parsed[:2] in renewed
        }
        slurm.cancel(sorted(stale))

    def _stage(self, name: str, after: str, renewed: bool) -> None:
        """Submits a stage's work and gate, as far as they are not there."""
        gate, work = self._live_gate(name), self._live_work(name)
        if work is not None and renewed and work.state == "PENDING" and after:
            slurm.patiently(
                "scontrol",
                "update",
                f"JobId={work.job}",
                f"Dependency={after}",
                patience=self.profile.submit.patience,
            )
        if gate is not None:
            self.gates[name] = gate.job
            return
        attempt = next_attempt(self.chain.run, name)
        work_step, gate_step = steps_of(self.chain, self.profile, name, attempt, attempt)
        job = self._send(work_step, after) if work is None else work.job
        self.gates[name] = self._send(gate_step, f"afterany:{job}")

    def _preflight(self, stages: list[str]) -> str:
        attempt = next_attempt(self.chain.run, PREFLIGHT)
        job = preflight_job(self.chain, self.profile, stages, attempt)
        return self._send(Step(job, self.profile.gate), "")

    def _send(self, step: Step, after: str) -> str:
        if self.chain.run.marked(CANCELLED) is not None:
            raise UserError(f"{self.chain.run.path}: cancelled while it was being submitted")
        job = replace(step.job, after=after)
        self.executor.write(job, step.resources, step.retry)
        handle = self.executor.send(job)
        self.sent[job.name] = handle
        self.count += 1
        waits = f" after {after.partition(':')[2].replace(':', ', ')}" if after else ""
        self.say(f"{handle}  {_what(job)}{waits}")
        return handle

    def lost(self) -> bool:
        """Whether the controller has forgotten jobs it took, say because it was killed.

        What belongs to them is cancelled, so that another pass makes it again.
        """
        run = self.chain.run
        if not self.sent or run.marked(STOPPED) is not None or run.marked(CANCELLED) is not None:
            return False
        known = {
            (job.name, job.job)
            for job in slurm.queue(prefix(run) + "-", True, self.profile.submit.patience)
        }
        lost = [name for name, handle in self.sent.items() if (name, handle) not in known]
        ended = {entry["name"] for entry in run.read_jobs() if entry.get("event") == "ended"}
        lost = [name for name in lost if name not in ended]
        if not lost:
            return False
        self.say(f"{len(lost)} jobs are unknown to Slurm; submitting them again")
        touched = {parsed[0] for name in lost if (parsed := parse_name(run, name))}
        if PREFLIGHT in touched:
            touched = set(self.chain.stages)
        for name in [*touched]:
            touched.update(self.chain.dependents(name) if name in self.chain.stages else ())
        slurm.cancel(
            [
                handle
                for name, handle in self.sent.items()
                if (name, handle) in known and (parse_name(run, name) or ("",))[0] in touched
            ]
        )
        return True

    def _waits_for(self, name: str, todo: Iterable[str]) -> list[str]:
        return [parent for parent in self.chain.stages[name].parents if parent in todo]

    def _live_gate(self, name: str) -> Queued | None:
        return self._newest(name, "gate")

    def _live_work(self, name: str) -> Queued | None:
        return self._newest(name, "work")

    def _newest(self, stage: str, role: str) -> Queued | None:
        found = [
            (parsed[2], job)
            for job in self.live.values()
            if (parsed := parse_name(self.chain.run, job.name)) and parsed[:2] == (stage, role)
        ]
        return max(found, key=lambda pair: pair[0])[1] if found else None


def _what(job: Job) -> str:
    if job.role != "work":
        return f"{job.role} of {job.stage}" if job.role == "gate" else job.role
    if job.array:
        return f"{job.stage}: {job.count} worker{'s' if job.count > 1 else ''}"
    return f"{job.stage}: {job.nodes} × {job.tasks}" if job.nodes * job.tasks > 1 else job.stage


def live_jobs(run: RunDir) -> list[Queued]:
    """The run's jobs that wait or run, in one call of squeue."""
    patience = read_profile(profile_path(run)).submit.patience
    return slurm.queue(prefix(run) + "-", patience=min(patience, 60.0))


def cancel(run: RunDir, patience: float = 120.0) -> int:
    """Cancels everything of a run and nothing else; its workers save and leave.

    The marker comes first: no gate submits anything once it is there, and nothing that a
    preemption puts back into the queue begins to work.

    Args:
        run: The run directory.
        patience: Seconds to wait until nothing is left in the queue.

    Returns:
        How many jobs were cancelled.

    Raises:
        UserError: Slurm stays away, or some jobs do not leave.
    """
    run.mark(CANCELLED, f"by {getpass.getuser()} on {socket.gethostname()}")
    give_up, told = time.monotonic() + patience, set[str]()
    while True:
        jobs = sorted({job.job for job in live_jobs(run)})
        if not jobs:
            return len(told)
        if time.monotonic() > give_up:
            raise UserError(
                f"{run.path}: jobs {', '.join(jobs)} do not leave the queue; see squeue"
            )
        slurm.cancel(jobs)
        told.update(jobs)
        time.sleep(1.0)


def job_counts(run: RunDir) -> dict[str, JobCounts]:
    """The jobs of each stage that wait or run, in one call of squeue."""
    found: dict[str, JobCounts] = {}
    for job in live_jobs(run):
        if (parsed := parse_name(run, job.name)) is None:
            continue
        counts = found.setdefault(parsed[0], JobCounts())
        if job.state not in slurm.WAITING:
            counts.running += job.count
            continue
        counts.pending += job.count
        counts.why = counts.why or job.reason
        if "eld" in job.reason or "HOLD" in job.state:
            counts.held += job.count
            counts.why = job.reason
    return found


def hours(run: RunDir) -> dict[str, dict[str, float]]:
    """Each stage's node-, core- and GPU-hours so far, killed jobs and requeued ones included.

    One call of sacct, beside what the jobs noted.
    """
    entries = run.read_jobs()
    jobs = [entry["job"] for entry in entries if entry.get("event") == "submitted"]
    return by_stage(run, spent(entries, slurm.accounts(jobs), time.time()))

"""The configuration files of a test cluster, as text."""

from __future__ import annotations

import pwd
from pathlib import Path

from .layout import ACCOUNT, HEAD, USER, Layout, Settings

_DATABASE_PASSWORD = "testbed"


def slurm_conf(layout: Layout, settings: Settings) -> str:
    """slurm.conf: quick to react, no cgroups, the nodes' hardware believed as written."""
    nodes = "\n".join(
        f"NodeName={name} NodeAddr=127.0.0.1 NodeHostname={name} Port={settings.port + 10 + n} "
        f"CPUs={settings.cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={settings.cpus} "
        f"ThreadsPerCore=1 RealMemory={settings.memory} Gres=gpu:fake:{settings.gpus} State=UNKNOWN"
        for n, name in enumerate(settings.names)
    )
    accounting = "AccountingStorageType=accounting_storage/none"
    if not settings.has("no-accounting"):
        accounting = f"""AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={settings.port + 1}
AccountingStorageEnforce=associations,limits,qos
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment,job_script,job_env"""
    return f"""ClusterName=testbed
SlurmctldHost={HEAD}(127.0.0.1)
SlurmctldPort={settings.port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for the end of its old credential: 121 seconds by default.
AuthInfo=cred_expire=5
StateSaveLocation={layout.state}
SlurmdSpoolDir={layout.spool}/%n
SlurmctldPidFile={layout.run}/slurmctld.pid
SlurmdPidFile={layout.run}/slurmd-%n.pid
SlurmctldLogFile={layout.log}/slurmctld.log
SlurmdLogFile={layout.log}/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
DebugFlags=NO_CONF_HASH
Prolog=/etc/slurm/prolog
TaskProlog=/etc/slurm/task_prolog
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=2
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,bf_window=1440,sched_interval=1,sched_min_interval=10000,batch_sched_delay=0
SlurmctldTimeout=30
SlurmdTimeout=10
TCPTimeout=5
InactiveLimit=0
KillWait=5
MinJobAge=300
OverTimeLimit=0
CompleteWait=0
UnkillableStepTimeout=20
BatchStartTimeout=10
JobRequeue={0 if settings.has("no-requeue") else 1}
{"JobSubmitPlugins=lua" if settings.has("filter") else ""}
PriorityType=priority/multifactor
PriorityWeightAge=10
PriorityWeightPartition=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MaxArraySize=1001
MaxJobCount=20000
{accounting}
{nodes}
PartitionName=batch Nodes=ALL MaxTime=1-0 DefaultTime=10 PriorityTier=10 PreemptMode=OFF Default=YES
PartitionName=high Nodes=ALL MaxTime=1-0 DefaultTime=10 PriorityTier=100 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=1-0 DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=spare Nodes=ALL MaxTime=1-0 DefaultTime=10 PriorityTier=1 PreemptMode=CANCEL
PartitionName=short Nodes=ALL MaxTime=1 DefaultTime=1 PriorityTier=10 PreemptMode=OFF
"""


def gres_conf(layout: Layout, settings: Settings, devices: bool) -> str:
    """gres.conf; without device files CUDA_VISIBLE_DEVICES is not set in jobs."""
    if not settings.gpus:
        return "AutoDetect=off\n"
    last = settings.gpus - 1
    which = f"File={layout.gpu}/fake[0-{last}]" if devices else f"Count={settings.gpus}"
    if devices and not last:
        which = f"File={layout.gpu}/fake0"
    return f"AutoDetect=off\nNodeName={','.join(settings.names)} Name=gpu Type=fake {which}\n"


def cgroup_conf(version: tuple[int, ...]) -> str:
    """No cgroups: newer releases can say so, older ones only look for the file."""
    return "CgroupPlugin=disabled\n" if version >= (23, 11) else "CgroupPlugin=cgroup/v1\n"


def slurmdbd_conf(layout: Layout, settings: Settings) -> str:
    return f"""AuthType=auth/munge
DbdHost={HEAD}
DbdAddr=127.0.0.1
DbdPort={settings.port + 1}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={settings.port + 2}
StorageLoc=slurm
StorageUser=slurm
StoragePass={_DATABASE_PASSWORD}
PidFile={layout.run}/slurmdbd.pid
LogFile={layout.log}/slurmdbd.log
DebugLevel=info
"""


def my_cnf(layout: Layout, settings: Settings) -> str:
    return f"""[mysqld]
datadir={layout.mysql}
socket={layout.mysql}/mysql.sock
pid-file={layout.mysql}/mysql.pid
port={settings.port + 2}
bind-address=127.0.0.1
user=mysql
skip-name-resolve
skip-log-bin
innodb_buffer_pool_size=128M
innodb_log_file_size=48M
innodb_lock_wait_timeout=900
innodb_flush_log_at_trx_commit=0
log-error={layout.mysql}/mysqld.log
"""


def database_sql() -> str:
    return f"""CREATE DATABASE IF NOT EXISTS slurm;
CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY '{_DATABASE_PASSWORD}';
GRANT ALL ON slurm.* TO 'slurm'@'127.0.0.1';
"""


def associations() -> list[list[str]]:
    """What sacctmgr is told: the user's association, its limits, and a QOS with a job limit."""
    return [
        ["add", "cluster", "testbed"],
        ["add", "account", ACCOUNT],
        ["add", "qos", "few"],
        ["modify", "qos", "few", "set", "MaxJobsPerUser=2", "MaxSubmitJobsPerUser=8"],
        ["add", "user", USER, f"account={ACCOUNT}", "qos=normal,few", "defaultqos=normal"],
        ["modify", "user", USER, "set", "MaxJobs=300", "MaxSubmitJobs=6000"],
        ["add", "user", "root", f"account={ACCOUNT}"],
    ]


# A broken node: slurmd drains it and holds the job (launch failed requeued held).
PROLOG = """#!/bin/sh
[ ! -e "{faults}/$SLURMD_NODENAME.broken" ]
"""

# Lines `export NAME=value` for the jobs of one node: a wrong clock, a preloaded library.
TASK_PROLOG = """#!/bin/sh
[ ! -r "{faults}/$SLURMD_NODENAME.env" ] || cat "{faults}/$SLURMD_NODENAME.env"
"""

JOB_SUBMIT_LUA = """-- What sites do: refuse what they think careless, in their own words.
function slurm_job_submit(job, partitions, uid)
   if job.time_limit == slurm.NO_VAL then
      slurm.log_user("site policy: every job names its time limit (--time)")
      return slurm.ERROR
   end
   if job.name ~= nil and string.find(job.name, "forbidden") then
      slurm.log_user("site policy: this name is not allowed")
      return slurm.ERROR
   end
   return slurm.SUCCESS
end

function slurm_job_modify(job, record, partitions, uid)
   return slurm.SUCCESS
end

return slurm.SUCCESS
"""


def passwd(layout: Layout, settings: Settings) -> str:
    """The host's users and the unprivileged one, whom only the cluster's machines know."""
    line = f"{USER}:x:{settings.uid}:{settings.uid}::{layout.home}:/bin/bash\n"
    return Path("/etc/passwd").read_text() + line


def group(settings: Settings) -> str:
    return Path("/etc/group").read_text() + f"{USER}:x:{settings.uid}:\n"


def hosts(settings: Settings) -> str:
    names = " ".join([HEAD, *settings.names])
    return Path("/etc/hosts").read_text().rstrip("\n") + f"\n127.0.0.1 {names}\n"


def free_uid() -> int:
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    return next(uid for uid in range(20001, 60000) if uid not in taken)

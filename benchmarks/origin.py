"""Which code on which machine made a result."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hpc.provenance import describe


def origin() -> dict[str, Any]:
    """The code and the machine."""
    found = describe()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "time": found["time"],
        "code": found["code"]["hpc"],
        "python": found["python"],
        "machine": {
            "cores": os.cpu_count(),
            "processor": model[1] if model else "",
            "memory_gb": memory,
            "kernel": os.uname().release,
        },
    }


def told(found: dict[str, Any]) -> str:
    """The same on a line."""
    machine, code = found["machine"], found["code"]
    changed = " with changes" if code.get("changed") else ""
    return (
        f"Commit {code.get('commit', '?')[:7]}{changed}, {found['time'][:10]}, "
        f"{machine['cores']} cores ({machine['processor']}), {machine['memory_gb']} GB, "
        f"Linux {machine['kernel']}, Python {found['python']}."
    )

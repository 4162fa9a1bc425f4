"""Decisions: job stages whose counts hold ``skip``, a reason to let other stages pass."""

from __future__ import annotations

from typing import Any

from hpc.errors import UserError
from hpc.rundir import Chain, RunDir

# What is read of a manifest without looking whether it is there.
_KEYS = {"hash", "made", "parents", "config", "shards", "inputs", "rows", "errors", "seconds"}


def manifest_of(run: RunDir, name: str) -> dict[str, Any] | None:
    """A stage's manifest with all that is read of it, or None while it is not complete."""
    manifest = run.read_manifest(name)
    if manifest is not None and (lacking := _KEYS - manifest.keys()):
        raise UserError(
            f"{run.manifest(name)}: no manifest, lacks {', '.join(sorted(lacking))}; delete it, "
            "and its stage is completed again"
        )
    return manifest


def skipped_by(chain: Chain, name: str) -> dict[str, str] | None:
    """The decision that lets a stage pass, if there is one now.

    Returns:
        ``{"by": stage, "made": its id, "reason": in words}``, or None.
    """
    decided = (decision(chain, other) for other in chain.stages[name].unless)
    return next((found for found in decided if found is not None), None)


def decision(chain: Chain, name: str) -> dict[str, str] | None:
    """What a stage has decided, if that is to let others pass; see `skipped_by`."""
    manifest = manifest_of(chain.run, name)
    if manifest is None or manifest["hash"] != chain.identity(name):
        return None
    reason = manifest.get("counts", {}).get("skip")
    return {"by": name, "made": manifest["made"], "reason": str(reason)} if reason else None


def rests_on(chain: Chain, name: str) -> tuple[str, ...]:
    """The stages that must be fresh for this one to be: its parents, or who let it pass."""
    skipped = (manifest_of(chain.run, name) or {}).get("skipped")
    if skipped and skipped["by"] in chain.stages[name].unless:
        return (skipped["by"],)
    return chain.stages[name].parents

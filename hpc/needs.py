"""Packages that payloads import and that an installation or an image may lack.

Looked for before anything is queued, as far as that can be told from here, and by the preflight,
which stands where the payloads will.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hpc import gates
from hpc.cluster import Profile
from hpc.contents import contents
from hpc.errors import UserError
from hpc.provenance import image
from hpc.rundir import Chain
from hpc.stages import Package, Stage


def refuse_absent(chain: Chain, profile: Profile | None = None) -> None:
    """Refuses a chain whose payloads lack a package.

    Without an image this very installation is looked at; with one the list of its packages that
    lies beside it, where there is one and it speaks of this image. What a program of the profile's
    own imports is not to be seen from here.

    Args:
        chain: The chain; its images are pinned, where it has some.
        profile: The cluster; None: here.

    Raises:
        UserError: A stage that is yet to be made needs a package that is not there.
    """
    if profile is not None and (profile.program or profile.container.program):
        return
    listed = cache(contents)
    for stage in _needing(chain):
        inside = chain.image_of(stage.name)
        if inside is None:
            _refuse(stage, absent(stage.needs), "here")
        elif (held := listed(Path(inside["path"]), inside["sha256"])) is not None:
            lacking = [package for package in stage.needs if package.name not in held]
            _refuse(stage, lacking, f"in {inside['path']}")


def refuse_unimportable(chain: Chain) -> None:
    """Refuses, where payloads run, a chain that lacks a package.

    Where its stages run in several images, those are looked at that run in this one.

    Raises:
        UserError: As `refuse_absent`.
    """
    here = image()
    where = f"in {here['path']}" if here else "where payloads run"
    for stage in _needing(chain):
        if not chain.images or _digest(chain.image_of(stage.name)) == _digest(here):
            _refuse(stage, absent(stage.needs), where)


def absent(packages: Iterable[Package]) -> list[Package]:
    """Those that cannot be imported here; imports no more of them than the folders they lie in."""
    return [package for package in packages if not importable(package)]


def importable(package: Package) -> bool:
    """Whether this Python finds a package."""
    try:
        return find_spec(package.module) is not None
    except (ImportError, ValueError):  # what it lies in is absent, or half loaded
        return False


def _needing(chain: Chain) -> Iterator[Stage]:
    """The stages yet to be made that import what an installation may lack."""
    standing = gates.standing(chain)
    return (stage for name, stage in chain.stages.items() if stage.needs and not standing[name])


def _refuse(stage: Stage, lacking: Sequence[Package], where: str) -> None:
    if lacking:
        names = ", ".join(package.name for package in lacking)
        raise UserError(
            f"stage {stage.name} needs the package {names}, which is not {where}: "
            f"{lacking[0].install}"
        )


def _digest(image: Mapping[str, Any] | None) -> str | None:
    return image["sha256"] if image else None

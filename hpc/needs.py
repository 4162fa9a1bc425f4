"""Packages that payloads import and that an installation or an image may lack.

Looked for before anything is queued, as far as that can be told from here, and by the preflight,
which stands where the payloads will.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

from hpc import gates
from hpc.cluster import Profile
from hpc.contents import contents
from hpc.errors import UserError
from hpc.rundir import Chain
from hpc.stages import Package


def refuse_absent(chain: Chain, profile: Profile | None = None) -> None:
    """Refuses a chain whose payloads lack a package.

    Without an image this very installation is looked at; with one the list of its packages that
    lies beside it, where there is one and it speaks of this image. What a program of the profile's
    own imports is not to be seen from here.

    Args:
        chain: The chain; its image is pinned, where it has one.
        profile: The cluster; None: here.

    Raises:
        UserError: A stage that is yet to be made needs a package that is not there.
    """
    if profile is not None and (profile.program or profile.container.program):
        return
    if chain.image is None:
        _refuse(chain, importable, "here")
        return
    path = Path(chain.image["path"])
    held = contents(path, chain.image["sha256"])
    if held is not None:
        _refuse(chain, lambda package: package.name in held, f"in {path}")


def refuse_unimportable(chain: Chain) -> None:
    """Refuses, where payloads run, a chain that lacks a package.

    Raises:
        UserError: As `refuse_absent`.
    """
    _refuse(chain, importable, "where payloads run")


def absent(packages: Iterable[Package]) -> list[Package]:
    """Those that cannot be imported here; imports no more of them than the folders they lie in."""
    return [package for package in packages if not importable(package)]


def importable(package: Package) -> bool:
    """Whether this Python finds a package."""
    try:
        return find_spec(package.module) is not None
    except (ImportError, ValueError):  # what it lies in is absent, or half loaded
        return False


def _refuse(chain: Chain, there: Callable[[Package], bool], where: str) -> None:
    standing = gates.standing(chain)
    for name, stage in chain.stages.items():
        if standing[name]:
            continue
        lacking = [package for package in stage.needs if not there(package)]
        if lacking:
            names = ", ".join(package.name for package in lacking)
            raise UserError(
                f"stage {name} needs the package {names}, which is not {where}: "
                f"{lacking[0].install}"
            )

"""Building container images with Apptainer, and saying what is in them.

A definition ``NAME.def`` and its ``NAME.lock`` lie in one folder, mostly ``containers``. Beside
the image a build leaves ``IMAGE.sha256`` (for ``sha256sum --check``), ``IMAGE.spdx.json`` (every
package with its version and licence) and ``IMAGE.log``. A *bundle* is a folder with all that a
build without internet needs: base image, wheels, definition, lock file.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from hpc.container import identify
from hpc.contents import write_contents
from hpc.disk import make_folder, write_atomic
from hpc.errors import UserError
from hpc.site import Finding

_LEAST_VERSION = (1, 2)  # templates in definitions
_ROOM = re.compile(r"(?m)^# room: *(\d+) GiB")
_USED = re.compile(r"\{\{ *(\w+) *\}\}")
_FROM = re.compile(r"(?m)^From: *\{\{ *(\w+) *\}\}")
Say = Callable[[str], None]

_CURES = (
    ("no space left", "free space, or set APPTAINER_TMPDIR to a larger folder"),
    ("disk quota", "free space, or set APPTAINER_TMPDIR to a larger folder"),
    ("capability set", "this root may not all; say --fakeroot"),
    ("user namespace", "ask an administrator for user namespaces, or build elsewhere"),
    ("subuid", "ask an administrator for subordinate ids in /etc/subuid and /etc/subgid"),
    ("no such host", "no internet here; make a bundle where there is, then --offline BUNDLE"),
    ("dial tcp", "no internet here; make a bundle where there is, then --offline BUNDLE"),
    (
        "do not match the hashes",
        "a package is not the one that was locked; lock anew, or mend the index",
    ),
    ("no matching distribution", "a package is missing; complete the bundle or the index"),
    ("could not resolve", "no internet here; make a bundle where there is, then --offline BUNDLE"),
)
"""What Apptainer, pip and apt print, lower case, and what helps; see docs/containers.md."""


@dataclass(frozen=True)
class Definition:
    """A definition file with its lock file.

    Attributes:
        name: ``train`` of ``train.def``.
        file: The definition.
        room: GiB that a build takes in the temporary folder, as the file says: ``# room: 8 GiB``.
    """

    name: str
    file: Path
    room: int

    @property
    def lock(self) -> Path:
        """The lock file beside it."""
        return self.file.with_suffix(".lock")

    @property
    def bases(self) -> dict[str, str]:
        """The images that its stages begin from, by the names of their arguments.

        Raises:
            UserError: It names none, or none that can be replaced.
        """
        text = self.file.read_text(encoding="utf-8")
        found = {}
        for name in _FROM.findall(text):
            default = re.search(rf"(?m)^ *{name}=(\S+)", text)
            if default is None:
                raise UserError(f"{self.file}: %arguments has no {name}= for its From line")
            found[name] = default[1]
        if not found:
            raise UserError(f"{self.file}: write its base as From: {{{{ base }}}}")
        return found


def find(name: str, folder: Path) -> Definition:
    """A definition by its name in a folder, or by its path.

    Raises:
        UserError: There is none, or it has no lock file.
    """
    file = Path(name) if name.endswith(".def") else folder / f"{name}.def"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.def")))
        if not known and not name.endswith(".def"):
            raise UserError(
                f"{folder.absolute()} has no definitions; name the clone of this package with "
                "--source, or give the path of a definition"
            )
        raise UserError(f"{file}: no such definition; {folder} has {known or 'none'}")
    found = _ROOM.search(file.read_text(encoding="utf-8"))
    definition = Definition(file.stem, file.absolute(), int(found[1]) if found else 4)
    if not definition.lock.is_file():
        raise UserError(f"{definition.lock}: no lock file; containers/lock.py writes one")
    return definition


# ---- before a build


def preflight(definition: Definition, target: Path, fakeroot: bool) -> list[Finding]:
    """What a build needs of this machine, before hours are spent."""
    findings = [_version()]
    folder = temporary()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    findings.append(_room(folder, definition.room, "temporary folder", "APPTAINER_TMPDIR"))
    if folder.is_dir() and os.statvfs(folder).f_flag & os.ST_NOEXEC:
        said = f"{folder} is mounted noexec, and builds run programs there; set APPTAINER_TMPDIR"
        findings.append(Finding("wrong", "temporary folder", said))
    findings.append(_room(target.absolute().parent, max(definition.room // 3, 1), "image", "--to"))
    findings.append(_namespaces(fakeroot))
    return findings


def temporary() -> Path:
    """Where Apptainer unpacks what it builds."""
    return Path(os.environ.get("APPTAINER_TMPDIR") or tempfile.gettempdir())


def _version() -> Finding:
    program = shutil.which("apptainer")
    if program is None:
        return Finding("wrong", "apptainer", "is not here; install it, or load its module")
    said = _ask([program, "version"])
    found = re.match(r"(\d+)\.(\d+)", said)
    if found is None or (int(found[1]), int(found[2])) < _LEAST_VERSION:
        least = ".".join(map(str, _LEAST_VERSION))
        return Finding("wrong", "apptainer", f"{said or 'unknown'}; {least} or newer is needed")
    return Finding("ok", "apptainer", said)


def _room(folder: Path, wanted: int, about: str, other: str) -> Finding:
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Finding("wrong", about, f"{folder} cannot be written; set {other} to another folder")
    free = shutil.disk_usage(folder).free / 2**30
    said = f"{folder} has {free:.1f} GiB free, a build takes {wanted}"
    if free < wanted:
        return Finding("wrong", about, f"{said}; free space, or set {other} to another folder")
    return Finding("ok", about, said)


def _namespaces(fakeroot: bool) -> Finding:
    about = "user namespaces"
    if os.geteuid() == 0 and not fakeroot:
        return Finding("ok", about, "not needed by root")
    tried = subprocess.run(["unshare", "--user", "true"], capture_output=True, text=True)
    if tried.returncode:
        said = (tried.stderr.strip().splitlines() or ["no"])[-1]
        mend = "ask an administrator, or build on another machine"
        return Finding("wrong", about, f"cannot be made here ({said}); {mend}")
    user = _ask(["id", "-un"])
    ids = Path("/etc/subuid")
    listed = ids.exists() and re.search(rf"(?m)^({user}|{os.geteuid()}):", ids.read_text())
    if not listed and shutil.which("fakeroot") is None:
        said = f"{user} has no line in /etc/subuid and there is no fakeroot command"
        return Finding("wrong", about, f"{said}; ask an administrator for one of the two")
    return Finding("ok", about, "subordinate ids" if listed else "with the fakeroot command")


# ---- building


def build(
    definition: Definition,
    target: Path,
    source: Path,
    say: Say = print,
    fakeroot: bool = False,
    bases: Mapping[str, Path] = MappingProxyType({}),
    offline: Path | None = None,
    words: Sequence[str] = (),
) -> str:
    """Builds an image; it gets its name when it is whole.

    Args:
        definition: What to build.
        target: The image; what lies there is replaced.
        source: The folder of this package, with its pyproject.toml.
        say: Told what happens, a line at a time.
        fakeroot: Build as if by root.
        bases: Base images (SIF, folder, docker archive) in place of the definition's own.
        offline: A bundle to take everything from.
        words: More words for ``apptainer build``.

    Returns:
        The image's SHA-256.

    Raises:
        UserError: The build fails; the line says at what, and what may help.
    """
    log = target.with_name(f"{target.name}.log")
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.sif")
    make_folder(target.absolute().parent)
    if offline is not None:
        bases = {**bundled_bases(definition, offline), **bases}
        _check_bundle(definition, offline)
    with tempfile.TemporaryDirectory(prefix="image-", dir=temporary()) as place:
        context = Path(place)
        shutil.copy(definition.file, context / definition.file.name)
        shutil.copy(definition.lock, context / "lock")
        make_folder(context / "wheels")
        if offline is None:
            say("packing this package")
            wheel(source, context / "wheels")
        else:
            for path in (offline / "wheels").iterdir():
                _link(path, context / "wheels" / path.name)
        arguments = {
            "commit": _commit(source) if offline is None else _bundled_commit(offline, source, say),
            "locked": _digest(definition.lock),
            "index": "--no-index" if offline is not None else "",
        }
        arguments |= _begin(definition, bases)
        command = ["apptainer", "build", *(["--fakeroot"] if fakeroot else [])]
        command += ["--bind", f"{context / 'wheels'}:/mnt", *words]
        used = _USED.findall(definition.file.read_text(encoding="utf-8"))
        for name, value in arguments.items():
            command += ["--build-arg", f"{name}={value}"] if name in used else []
        try:
            _run([*command, str(part), definition.file.name], context, log, say)
            summed = describe(part, target, say)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    return summed


def _run(command: Sequence[str], place: Path, log: Path, say: Say) -> None:
    """Runs a build; tells its own lines as they come, all of them go to the log."""
    begun, last, told = time.monotonic(), "", ""
    # Apptainer hands the environment on: what Python finds here is not to be found inside.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            cwd=place,
            env=clean,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as running,
    ):
        assert running.stdout is not None
        try:
            for line in running.stdout:
                file.write(line)
                line = re.sub(r"\x1b\[[0-9;]*m", "", line).strip()
                if line.startswith("FATAL"):
                    # Apptainer says that a script failed; the line before it says at what.
                    told = f"{line}: {last}" if last else line
                elif line and not line.startswith(("INFO", "WARNING")):
                    last = line
                if re.match(r"INFO:|Installing|Collecting|Get:", line):
                    say(f"{time.monotonic() - begun:5.0f} s  {line.removeprefix('INFO:').strip()}")
        except BaseException:
            running.terminate()
            raise
    if running.returncode:
        text = log.read_text(encoding="utf-8", errors="replace").lower()
        cures = [cure for sign, cure in _CURES if sign in text]
        more = f"; {cures[0]}" if cures else ""
        raise UserError(f"the build failed: {told or last}{more}; log: {log.absolute()}")


def describe(built: Path, target: Path, say: Say = print) -> str:
    """Writes an image's digest and contents beside ``target``; returns the digest."""
    say("taking its digest and contents")
    summed, _ = identify(built)
    write_contents(built, target, summed)
    write_atomic(target.with_name(f"{target.name}.sha256"), f"{summed}  {target.name}\n")
    return summed


def _commit(source: Path) -> str:
    return _ask(["git", "-C", str(source), "rev-parse", "HEAD"]) or "unknown"


def _bundled_commit(offline: Path, source: Path, say: Say) -> str:
    """The commit of the package in a bundle; says so if this folder holds another."""
    try:
        held = (offline / "commit").read_text().strip()
    except FileNotFoundError:
        held = "unknown"
    if held != (here := _commit(source)):
        say(f"the package is the bundle's, of commit {held[:12]}; {source} is at {here[:12]}")
    return held


def wheel(source: Path, folder: Path) -> None:
    """Packs this very package.

    Raises:
        UserError: ``source`` is not its folder, or it cannot be packed.
    """
    if not (source / "pyproject.toml").is_file():
        raise UserError(f"{source}: no pyproject.toml; name this package's folder with --source")
    words = ["wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    # What packs it is mostly here; otherwise pip fetches it first.
    there = importlib.util.find_spec("setuptools.command.bdist_wheel") is not None
    _pip([*words, *(["--no-build-isolation"] if there else [])], "this package cannot be packed")


def bundle(
    definition: Definition,
    folder: Path,
    source: Path,
    bases: Mapping[str, Path] = MappingProxyType({}),
    say: Say = print,
) -> None:
    """Collects what a build without internet needs.

    Args:
        definition: What is to be built.
        folder: Gets everything; packages and base images that are there already are kept.
        source: The folder of this package.
        bases: Base images that lie here; the others come from the definition's registry.
        say: Told what happens.

    Raises:
        UserError: Something cannot be had.
    """
    make_folder(folder / "wheels")
    shutil.copy(definition.file, folder / definition.file.name)
    shutil.copy(definition.lock, folder / definition.lock.name)
    say(f"collecting the packages of {definition.lock.name}")
    words = ["download", "--quiet", "--no-deps", "--require-hashes"]
    for old in (folder / "wheels").glob("insightv_hpc-*.whl"):
        old.unlink()
    wheel(source, folder / "wheels")
    write_atomic(folder / "commit", _commit(source) + "\n")
    _pip([*words, "--dest", str(folder / "wheels"), "-r", str(definition.lock)], "no bundle")
    for name, image in definition.bases.items():
        target, part = folder / f"{name}.sif", folder / f".{name}.sif"
        if target.exists():
            continue
        say(f"collecting the base image {image}")
        origin = str(bases[name].absolute()) if name in bases else f"docker://{image}"
        command = ["apptainer", "build", "--force", str(part), origin]
        _run(command, folder, folder / f"{name}.log", say)
        part.replace(target)
    write_atomic(folder / "lock.sha256", _digest(definition.lock) + "\n")


def bundled_bases(definition: Definition, offline: Path) -> dict[str, Path]:
    """The base images of a bundle.

    Raises:
        UserError: One is not there.
    """
    found = {name: offline / f"{name}.sif" for name in definition.bases}
    for path in found.values():
        if not path.is_file():
            raise UserError(f"{path} is not there; `insightv image bundle` makes the bundle")
    return found


def _check_bundle(definition: Definition, offline: Path) -> None:
    kept = offline / "lock.sha256"
    if not kept.is_file() or kept.read_text().strip() != _digest(definition.lock):
        raise UserError(
            f"{offline}: was made for another {definition.lock.name}, or is incomplete; "
            f"make it again with `insightv image bundle {definition.name}`"
        )


def _begin(definition: Definition, bases: Mapping[str, Path]) -> dict[str, str]:
    """The arguments that let a definition begin from images that lie here."""
    if not bases:
        return {}
    known = definition.bases
    if set(bases) != set(known):
        raise UserError(f"--base: {definition.name} begins from {', '.join(known)}; give all")
    for base in bases.values():
        if not base.exists():
            raise UserError(f"{base}: no such base image; give a SIF, a folder or a docker archive")
    agents = {
        "docker-archive" if base.suffix in (".tar", ".tgz", ".gz") else "localimage"
        for base in bases.values()
    }
    if len(agents) > 1:
        raise UserError("--base: give docker archives only, or none")
    named = {name: str(base.absolute()) for name, base in bases.items()}
    return {"bootstrap": agents.pop(), **named}


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copy(source, target)


def _pip(words: Sequence[str], what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, "--disable-pip-version-check"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise UserError(f"{what}: pip says {(lines or [done.stderr.strip()[-200:]])[0]}")


def _ask(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

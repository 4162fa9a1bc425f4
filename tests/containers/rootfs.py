"""A root file system of this machine's own bash, core programs and Python: a base of seconds.

As a program: ``rootfs.py FOLDER``.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

PROGRAMS = ("bash", "sh", "env", "true", "cat", "ls", "mkdir", "rm", "touch", "cp", "sleep", "id",
            "uname", "chmod", "ln", "find", "grep", "mount")  # fmt: skip
LATE = ("libgcc_s.so.1", "libstdc++.so.6", "libnss_files.so.2")  # loaded while programs run
LEFT_OUT = shutil.ignore_patterns(
    "__pycache__", "test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "site-packages",
    "dist-packages", "config-*", "pydoc_data", "*.a", "_tkinter*", "_test*",
)  # fmt: skip
NEEDED = ("jinja2", "omegaconf", "pyyaml", "rich", "submitit", "typer", "zstandard", "setuptools")


def make(folder: Path) -> Path:
    """Fills a folder; returns where its Python keeps packages."""
    for name in ("usr/bin", "usr/lib", "etc", "proc", "sys", "dev", "tmp", "var/tmp", "mnt", "opt"):
        (folder / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (folder / name).symlink_to("usr/bin" if name == "bin" else "usr/lib")
    for name in ("passwd", "group", "hosts", "resolv.conf", "localtime"):
        (folder / "etc" / name).touch()
    for name in PROGRAMS:
        bring(folder, Path(shutil.which(name, path="/usr/bin:/bin") or name), "usr/bin")
    prefix = Path(sys.base_prefix)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    standard = Path(sysconfig.get_path("stdlib"))
    home = folder / "usr/local"
    shutil.copytree(standard, home / "lib" / version, ignore=LEFT_OUT)
    for library in (home / "lib" / version).rglob("*.so"):
        libraries(folder, library)
    bring(folder, Path(sys.executable).resolve(), "usr/local/bin")
    for library in prefix.glob("lib/libpython*.so*"):
        bring(folder, library, "usr/local/lib")
    own = Path("/usr/local/bin") / Path(sys.executable).resolve().name
    for name in ("python", "python3"):
        link = home / "bin" / name
        link.unlink(missing_ok=True)
        link.symlink_to(own)
    late(folder)
    packages = home / "lib" / version / "site-packages"
    packages.mkdir()
    for name in sorted(closure(NEEDED)):
        install(name, packages)
    for library in packages.rglob("*.so"):
        libraries(folder, library)
    return packages


def bring(folder: Path, file: Path, to: str) -> None:
    target = folder / to / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copy2(file.resolve(), target)
        libraries(folder, file)


def libraries(folder: Path, file: Path) -> None:
    """The shared libraries of a program, where its loader will look for them."""
    said = subprocess.run(["ldd", file], capture_output=True, text=True).stdout
    for line in said.splitlines():
        found = re.search(r"(/\S+) \(0x", line)
        if found and not (folder / "usr/lib" / Path(found[1]).name).exists():
            shutil.copy2(Path(found[1]).resolve(), folder / "usr/lib" / Path(found[1]).name)


def late(folder: Path) -> None:
    """Libraries that no program names but some load."""
    said = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True).stdout
    for name, path in re.findall(r"(?m)^\s*(\S+) \(libc6,x86-64.*=> (\S+)$", said):
        if name in LATE:
            shutil.copy2(Path(path).resolve(), folder / "usr/lib" / name)


def closure(names: tuple[str, ...]) -> set[str]:
    """Installed packages and what they need."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = re.split(r"[\s;<>=!~\[(]", left.pop().lower(), maxsplit=1)[0].replace("_", "-")
        if name in found:
            continue
        try:
            told = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform, or of an extra
        found.add(name)
        left += [r for r in told.requires or () if "extra ==" not in r]
    return found


def install(name: str, packages: Path) -> None:
    for file in importlib.metadata.distribution(name).files or ():
        source, target = Path(str(file.locate())), packages / str(file)
        if ".." in file.parts or "__pycache__" in file.parts or not source.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))

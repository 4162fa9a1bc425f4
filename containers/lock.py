"""Writes NAME.lock: every package of an image with its version and the digests of its files.

``python containers/lock.py NAME`` needs uv and an index of packages; nothing is installed. Only
files that fit the image's Python on linux x86-64 keep their digests, so that pip takes no other.
``lmms`` is no image but an environment that an interpreter of one's own is given.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

HERE = Path(__file__).parent
PYTHON = {"cpu": (3, 11), "train": (3, 12), "serve": (3, 12), "lmms": (3, 11)}
EXTRAS = {
    "cpu": ("demo",),
    "train": ("demo", "data", "judge", "deepspeed", "tensorboard"),
    "serve": ("demo", "data", "judge"),
}
"""Of the package's extras: what makes and reads questions, judges answers, trains."""
_WITHOUT = {"lmms": "torchvision"}
"""What is left out though it is asked for: no task that generates imports it, and beside a torch
for the CPU it fails to load, and transformers with it."""
_GLIBC = range(5, 36)  # what the images' systems can load: up to that of Debian 12


def resolve(name: str) -> dict[str, Any]:
    """What uv finds for the requirements of an image, together."""
    # lmms-eval has an environment of its own, without this package.
    package = [] if name == "lmms" else [HERE.parent / "pyproject.toml"]
    words: list[str | Path] = ["uv", "--config-file", HERE / "sources.toml", "pip", "compile"]
    words += [HERE / f"{name}.in", *package, "--no-header", "--format", "pylock.toml"]
    words += ["--python-version", ".".join(map(str, PYTHON[name]))]
    words += ["--python-platform", "x86_64-manylinux_2_28", "--no-annotate"]
    if name in _WITHOUT:
        words += ["--no-emit-package", _WITHOUT[name]]
    for extra in EXTRAS.get(name, ()):
        words += ["--extra", extra]
    if name == "cpu":
        words += ["-c", HERE.parent / "constraints.txt"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pylock.toml"
        subprocess.run([*words, "--quiet", "--output-file", file], check=True)
        return tomllib.loads(file.read_text())


def lines(found: dict[str, Any], name: str) -> list[str]:
    """The packages as pip reads them."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in _GLIBC]
    platforms += ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"]
    platforms += ["linux_x86_64"]
    tags = {*cpython_tags(PYTHON[name], platforms=platforms)}
    tags |= {*compatible_tags(PYTHON[name], platforms=platforms)}
    made = []
    for package in found["packages"]:
        if "version" not in package:
            continue  # this package itself
        digests = [w["hashes"]["sha256"] for w in package.get("wheels", []) if _fits(w, tags)]
        if not digests and "sdist" in package:
            digests = [package["sdist"]["hashes"]["sha256"]]
        if not digests:
            sys.exit(f"{package['name']} {package['version']}: no file fits")
        hashes = "".join(f" \\\n    --hash=sha256:{digest}" for digest in sorted(digests))
        made.append(f"{package['name']}=={package['version']}{hashes}")
    return made


def _fits(wheel: dict[str, Any], tags: set[Tag]) -> bool:
    name = wheel.get("name") or wheel["url"].rpartition("/")[2].partition("#")[0]
    return not tags.isdisjoint(parse_wheel_filename(name.replace("%2B", "+"))[3])


def main() -> None:
    """Writes the lock files that are named."""
    for name in sys.argv[1:] or PYTHON:
        made = lines(resolve(name), name)
        head = [
            f"# {len(made)} packages that fit together; python containers/lock.py {name} wrote it",
            f"# for Python {'.'.join(map(str, PYTHON[name]))} on linux x86-64; see {name}.in",
        ]
        (HERE / f"{name}.lock").write_text("\n".join([*head, *made]) + "\n")
        print(f"{name}.lock: {len(made)} packages")


if __name__ == "__main__":
    main()

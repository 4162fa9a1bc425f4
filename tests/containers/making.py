"""The image of the tests: this package without torch on this machine's own Python."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import rootfs  # noqa: E402

ROOT = Path(__file__).parents[2]
LOCKED = ("omegaconf", "submitit", "typer", "zstandard")


def obstacle() -> str | None:
    """Why no image can be built or run here; None where it can."""
    if shutil.which("apptainer") is None:
        return "Apptainer is not installed: tests/containers/install-apptainer.sh"
    return None


def definition(folder: Path, marker: str = "small", lock: str = "") -> Path:
    """A definition of the small image in a folder, with the versions that are installed here."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "small.def"
    text = (Path(__file__).parent / "small.def").read_text()
    file.write_text(text.replace("marker=small", f"marker={marker}"))
    pins = [f"{name}=={importlib.metadata.version(name)}" for name in LOCKED]
    file.with_suffix(".lock").write_text(lock or "\n".join(pins) + "\n")
    return file


def insightv(
    *words: str | Path, env: dict[str, str] | None = None, timeout: float = 900
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "insightv", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
    )


def build(folder: Path, base: Path, marker: str = "small", lock: str = "") -> Path:
    """Builds the small image as its user would."""
    target = folder / f"{marker}.sif"
    file = definition(folder, marker, lock)
    done = insightv(
        *("image", "build", file, "--to", target, "--base", base),
        *("--compression", "zstd", "--source", ROOT),
        *(["--fakeroot"] if os.geteuid() == 0 else []),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def base(folder: Path) -> Path:
    rootfs.make(folder)
    return folder

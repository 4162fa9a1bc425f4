"""Payloads inside an Apptainer image: the one place that knows how the line is made.

The bash behind it stands in ``hpc/executors/host/contained.sh``. It binds the run directory,
what the profile names and a folder of the job's own in node-local scratch, and nothing else;
passes the variables that are named; and looks that the image is the one the run began with.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from hpc.disk import expanded
from hpc.errors import UserError

_CONTAINED = Path(__file__).parent / "executors" / "host" / "contained.sh"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAGIC = b"SIF_MAGIC\0"
_HEAD = 128
"""Bytes of a SIF's head; the last two numbers say where its data begin and how long they are."""
_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?")

PASSED = [
    "SLURM_*",
    "CUDA_*",
    "NVIDIA_*",
    "NCCL_*",
    "GLOO_*",
    "UCX_*",
    "FI_*",
    "PMI*",
    "TORCH_*",
    "VLLM_*",
    "HF_*",
    "HPC_*",
    "DS_*",
    "OMP_*",
    "MKL_*",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PYTHONUNBUFFERED",
    "LANG",
    "LC_*",
    "TZ",
]
"""Variables that enter an image: of the scheduler, of GPUs and networks, of the rendezvous."""


@dataclass
class Pin:
    """The image that is meant: its digest, and its size and time when that was taken."""

    sha256: str = ""
    stamp: str = ""


@dataclass
class Container:
    """The image that payloads run in. Mostly ``image`` is all there is to write.

    Attributes:
        image: The SIF. Empty: payloads run as they are.
        sha256: The digest it must have. Empty: the one it has when the run is first submitted.
        program: The payload's command inside. Empty: the last word of the chain's own, which is
            what its command line is called where it is installed.
        binds: Folders seen inside beside the run directory and the models of the chain, as
            ``SOURCE[:INSIDE[:ro]]``.
        local: Copy the image to node-local scratch first: saves a file server from hundreds
            of workers that load libraries at once.
        passed: Variables that enter, by name or by beginning (``NCCL_*``); no others do.
        runtime: The program that runs images.
        options: More words for ``apptainer exec``, say ``--userns``.
        stamp: Size and time of the image when its digest was taken; filled in at submission.
    """

    image: str = ""
    sha256: str = ""
    program: list[str] = field(default_factory=list)
    binds: list[str] = field(default_factory=list)
    local: bool = False
    passed: list[str] = field(default_factory=lambda: list(PASSED))
    runtime: str = "apptainer"
    options: list[str] = field(default_factory=list)
    stamp: str = ""

    def validate(self, where: str = "container") -> None:
        """Checks the values; ``where`` is the section's name, for the message.

        Raises:
            UserError: One of them is not possible.
        """
        if self.image and not self.image.endswith(".sif"):
            raise UserError(
                f"{where}.image is {self.image!r}; give a file that ends in .sif "
                "(insightv image build makes one)"
            )
        if self.sha256 and not _SHA256.fullmatch(self.sha256):
            raise UserError(f"{where}.sha256: give 64 digits as sha256sum prints them")
        if not self.runtime:
            raise UserError(f"{where}.runtime: give a command")
        for bind in self.binds:
            parts = bind.split(":")
            if len(parts) > 3 or "," in bind or not all(p.startswith("/") for p in parts[:2]):
                raise UserError(
                    f"{where}.binds: {bind!r}; give absolute folders as SOURCE[:INSIDE[:ro]], "
                    "without commas"
                )
        for name in self.passed:
            if not _PATTERN.fullmatch(name):
                raise UserError(f"{where}.passed: {name!r} is no variable's name or beginning")

    @property
    def identity(self) -> dict[str, str] | None:
        """Path and digest of a pinned image; None where there is none."""
        return {"path": self.image, "sha256": self.sha256} if self.image else None

    def inside(self, command: Sequence[str]) -> list[str]:
        """The payload's command inside, for a chain whose own is ``command``."""
        return self.program or list(command[-1:])

    def seeing(self, folders: Sequence[Path]) -> Container:
        """The same, with folders bound read-only that no bind shows yet."""
        shown = [Path(bind.split(":")[0]) for bind in self.binds]
        more = [
            f"{folder}:{folder}:ro"
            for folder in dict.fromkeys(folders)
            if not any(folder.is_relative_to(other) for other in shown)
        ]
        return replace(self, binds=[*self.binds, *more])


def identify(path: Path) -> tuple[str, str]:
    """Digest and stamp (size and time) of an image.

    Raises:
        UserError: There is no such file.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, which has no digest; build a SIF of it")
    try:
        with path.open("rb") as file:
            summed = hashlib.file_digest(file, "sha256").hexdigest()
        return summed, stamp(path)
    except OSError as error:
        raise UserError(
            f"{path}: no image to be read ({error.strerror}); build it with `insightv image "
            "build`, or name another in the profile"
        ) from None


def refuse_broken(path: Path) -> None:
    """Looks at the head of an image, which says how long the file must be.

    Raises:
        UserError: It is no SIF, or only a part of one.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(
            f"{path}: no image to be read ({error.strerror}); give a .sif file"
        ) from None
    if len(head) < _HEAD or head[32:42] != _MAGIC:
        raise UserError(f"{path} is no SIF image; build one with `insightv image build`")
    begin, length = struct.unpack("<2q", head[112:128])
    if size < begin + length:
        raise UserError(
            f"{path} is cut off: {size:,} bytes of {begin + length:,}; copy it again, or build it"
        )


def stamp(path: Path) -> str:
    """Size and time of a file, as the host's bash compares them."""
    found = path.stat()
    return f"{found.st_size} {int(found.st_mtime)}"


def pin(container: Container, known: Container | None = None) -> Container:
    """The container with its image's path made absolute, its digest and its stamp.

    Args:
        container: As a profile names it.
        known: What was pinned before; the digest of an untouched file is not taken again.

    Raises:
        UserError: The image is not there, or has another digest than the profile names.
    """
    if not container.image:
        return container
    path = expanded(container.image).absolute()
    if known is not None and known.stamp and path == Path(known.image) and path.exists():
        same = stamp(path) == known.stamp
    else:
        same = False
    found, mark = (known.sha256, known.stamp) if same and known is not None else identify(path)
    if container.sha256 and container.sha256 != found:
        raise UserError(
            f"{path}: has the digest {found}, the profile says {container.sha256}; "
            "it is another image or a broken copy"
        )
    return replace(container, image=str(path), sha256=found, stamp=mark)


def settings(container: Container, gpus: int, scratch: str = "") -> list[str]:
    """What the bash needs to know before ``contained COMMAND…``, beside ``run`` and ``role``.

    Args:
        container: A pinned container.
        gpus: How many the job asks for; with any, the driver is brought in (``--nv``).
        scratch: Node-local scratch; empty: the node's TMPDIR.
    """
    words = {
        "image": container.image,
        "image_runtime": container.runtime,
        "image_sha256": container.sha256,
        "image_stamp": container.stamp,
        "image_local": "yes" if container.local and container.sha256 else "",
        "image_scratch": scratch,
        "image_gpus": str(gpus),
    }
    arrays = {
        "image_binds": container.binds,
        "image_options": container.options,
        "image_passed": container.passed,
    }
    lines = [f"{name}={shlex.quote(value)}" for name, value in words.items()]
    return lines + [f"{name}=({shlex.join(values)})" for name, values in arrays.items()]


def command(
    container: Container, run: Path, words: Sequence[str], gpus: int = 0, role: str = "work"
) -> list[str]:
    """The argument vector that runs a command inside the image, here.

    Raises:
        UserError: The run directory's name cannot be bound.
    """
    check_bindable(run)
    known = f"run={shlex.quote(str(run))} role={role}"
    text = "\n".join([known, *settings(container, gpus), _bash(), 'contained "$@"'])
    return ["bash", "-c", text, "contained", *words]


def check_bindable(path: Path) -> None:
    """Refuses names that Apptainer would take apart.

    Raises:
        UserError: There is a comma or a colon in it.
    """
    if any(sign in str(path) for sign in ",:"):
        raise UserError(f"{path}: Apptainer cannot bind a folder named so; choose another name")


@cache
def _bash() -> str:
    return _CONTAINED.read_text(encoding="utf-8").strip("\n")

"""What a node and an image make together: looked at from inside, by `insightv image check`.

``python -m insightv.inspection`` prints one line a finding, ``level<TAB>about<TAB>said``, and
ends with 2 where something is wrong. With ``--build`` it tries only what must hold anywhere:
that is the ``%test`` of the definitions.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import platform
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from hpc.inside import shadowed, unlocked
from hpc.site import Finding

_REDUCE = """
import os, sys, torch, torch.distributed as dist
rank, count, backend = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group(backend, init_method="file://" + sys.argv[4], rank=rank, world_size=count)
device = f"cuda:{rank}" if backend == "nccl" else "cpu"
if backend == "nccl":
    torch.cuda.set_device(rank)
found = torch.full((1024,), float(rank + 1), device=device)
dist.all_reduce(found)
assert found.unique().tolist() == [count * (count + 1) / 2], found
dist.destroy_process_group()
"""
_IMPORTS = "torch,transformers,insightv.cli"
_SECONDS = 180.0
_LEAST_SHARED = 2**30


def everywhere(imports: Sequence[str]) -> Iterator[Finding]:
    """What must hold on any machine: imports, locked versions, nothing in the way, an op."""
    for name in imports:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken package raises whatever it likes
            said = f"cannot be imported ({type(error).__name__}: {_line(error)})"
            yield Finding("wrong", name, f"{said}; mend the lock file and build again")
    yield from _versions()
    found = shadowed()
    if found:
        said = f"not the image's own: {', '.join(found[:5])}; bind no folder with packages"
        yield Finding("wrong", "shadowed", said)
    elif site.ENABLE_USER_SITE:
        yield Finding("wrong", "shadowed", "packages of the home folder count; PYTHONNOUSERSITE=1")
    else:
        yield Finding("ok", "shadowed", "every module is the image's own")
    if "torch" in imports:
        yield _op("cpu")


def here(run: Path, home: str, gpus: int) -> Iterator[Finding]:
    """What this node brings: driver, GPUs, network, folders.

    Args:
        run: A folder that must be writable.
        home: The user's home folder on the host, which must not show.
        gpus: How many GPUs should be seen.
    """
    yield from _driver(gpus)
    yield from _reduce(gpus)
    yield _infiniband()
    yield _writable(run)
    shared = os.statvfs("/dev/shm")
    size = shared.f_frsize * shared.f_blocks
    said = f"/dev/shm has {size / 2**30:.1f} GiB"
    level, more = ("ok", "") if size >= _LEAST_SHARED else ("note", "; loaders may want more")
    yield Finding(level, "shared memory", said + more)
    if home not in ("", "/") and Path(home).is_dir() and any(Path(home).iterdir()):
        said = f"{home} of the host shows inside; bind single folders of it"
        yield Finding("note" if run.is_relative_to(home) else "wrong", "home", said)
    else:
        yield Finding("ok", "home", "does not show")


def _versions() -> Iterator[Finding]:
    lock = os.environ.get("INSIGHTV_LOCK", "")
    if not lock or not Path(lock).is_file():
        yield Finding("wrong", "versions", "the image has no lock file (INSIGHTV_LOCK); build it "
                      "with `insightv image build`")  # fmt: skip
        return
    differing = unlocked(Path(lock))
    if differing:
        yield Finding("wrong", "versions", f"{'; '.join(differing[:5])}; build the image again")
    else:
        yield Finding("ok", "versions", "as locked")


def _driver(gpus: int) -> Iterator[Finding]:
    """Driver against CUDA, and the C library under --nv."""
    libc = " ".join(platform.libc_ver())
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        said = str(error)
        if "GLIBC" in said:
            mend = f"the host's driver wants a newer C library than the image's {libc}"
            yield Finding("wrong", "C library", f"{mend}; build on a newer base")
        elif gpus:
            yield Finding("wrong", "driver", f"no libcuda ({said}); --nv found no driver on the "
                          "host: see docs/containers.md")  # fmt: skip
        else:
            yield Finding("note", "driver", "none, and no GPU was asked for")
        return
    yield Finding("ok", "C library", f"{libc} loads the host's driver")
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    able = (version.value // 1000, version.value % 1000 // 10)
    import torch

    built = torch.version.cuda
    if built is None:
        yield Finding("wrong", "CUDA", "the image's torch is built without CUDA; use train.sif")
        return
    shown = f"driver up to CUDA {able[0]}.{able[1]}, torch of CUDA {built}"
    if able[0] < int(built.split(".")[0]):
        yield Finding("wrong", "CUDA", f"{shown}; ask for a newer driver, or lock an older torch")
        return
    yield Finding("ok", "CUDA", shown)
    seen = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(seen)}))
    if seen < gpus:
        yield Finding("wrong", "GPUs", f"{seen} of {gpus} are seen; see CUDA_VISIBLE_DEVICES")
    else:
        yield Finding("ok", "GPUs", f"{seen}: {names}")
    if seen:
        yield _op("cuda")


def _op(device: str) -> Finding:
    """A product whose value is known."""
    import torch

    try:
        ones = torch.ones(64, 64, device=device)
        found = (ones @ ones).sum().item()
    except RuntimeError as error:
        return Finding("wrong", f"{device} op", f"{_line(error)}; another torch must be locked")
    right = found == 64.0**3
    said = f"matrix product {'right' if right else f'wrong: {found}'}, torch {torch.__version__}"
    return Finding("ok" if right else "wrong", f"{device} op", said)


def _reduce(gpus: int) -> Iterator[Finding]:
    """All-reduce among all GPUs by NCCL; without any, between two processes by gloo."""
    backend, count = ("nccl", gpus) if gpus else ("gloo", 2)
    about, hint = f"{backend} all-reduce", "; set NCCL_DEBUG=INFO" if gpus else ""
    with tempfile.TemporaryDirectory() as folder:
        words = [str(count), backend, f"{folder}/meet"]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", _REDUCE, str(rank), *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(count)
        ]
        try:
            said = [process.communicate(timeout=_SECONDS)[0] for process in ranks]
        except subprocess.TimeoutExpired:
            for process in ranks:
                process.kill()
            yield Finding("wrong", about, f"hangs for {_SECONDS:.0f} s{hint}")
            return
    for process, text in zip(ranks, said, strict=True):
        if process.returncode:
            last = (text.strip().splitlines() or ["no word"])[-1]
            yield Finding("wrong", about, f"{last[:200]}{hint}")
            return
    yield Finding("ok", about, f"among {count} {'GPUs' if gpus else 'processes'}")


def _infiniband() -> Finding:
    about, folder = "InfiniBand", Path("/sys/class/infiniband")
    devices = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not devices:
        return Finding("note", about, "no device on this node")
    shown = ", ".join(devices)
    if not Path("/dev/infiniband").is_dir():
        return Finding("wrong", about, f"{shown}, but no /dev/infiniband; mount dev in Apptainer")
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError:
        said = f"{shown}, but the image has no libibverbs: NCCL would use Ethernet; build with it"
        return Finding("wrong", about, said)
    return Finding("ok", about, shown)


def _writable(run: Path) -> Finding:
    try:
        with tempfile.NamedTemporaryFile(dir=run) as file:
            file.write(b"1")
            file.flush()
    except OSError as error:
        return Finding("wrong", "run directory", f"{run}: {error.strerror}; name a folder of yours")
    return Finding("ok", "run directory", f"{run} can be written")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason"])[0]


def main() -> None:
    """Prints the findings."""
    parser = argparse.ArgumentParser(prog="insightv.inspection")
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--imports", default=os.environ.get("INSIGHTV_IMPORTS", _IMPORTS))
    parser.add_argument("--run", type=Path, default=Path())
    parser.add_argument("--home", default="")
    parser.add_argument("--gpus", type=int, default=0)
    asked = parser.parse_args()
    imports = [name for name in asked.imports.split(",") if name]
    found = list(everywhere(imports))
    if not asked.build and not any(finding.about == "torch" for finding in found):
        found += here(asked.run, asked.home, asked.gpus)
    if asked.build:  # whoever reads the end of a log finds there what is wrong
        found.sort(key=lambda finding: finding.level == "wrong")
    for finding in found:
        print(finding.level, finding.about, finding.said, sep="\t", flush=True)
    sys.exit(2 if any(finding.level == "wrong" for finding in found) else 0)


if __name__ == "__main__":
    main()

"""What is said of files and folders that cannot be used, and who may read what was written."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hpc.disk import share, told


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o2775])
def test_files_are_as_open_as_their_folder(tmp_path: Path, mode: int) -> None:
    (tmp_path / "below").mkdir(mode=0o700)
    file = tmp_path / "model.safetensors"
    file.touch(mode=0o600)
    tmp_path.chmod(mode)
    share(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == mode & 0o666
    assert stat.S_IMODE((tmp_path / "below").stat().st_mode) == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="a file that its reader may not read")
def test_an_unreadable_file_is_not_called_unwritable() -> None:
    folder = Path(tempfile.mkdtemp())  # others may not enter pytest's own
    folder.chmod(0o755)
    file = folder / "weights"
    file.touch(mode=0o600)
    code = (
        "import os, sys; from pathlib import Path; from hpc.disk import told; os.setuid(65534)\n"
        "try: Path(sys.argv[1]).read_bytes()\n"
        "except OSError as error: print(told(error, '/runs/a'))"
    )
    said = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True)
    assert said.stdout.startswith(f"{file}: cannot be read (Permission denied)"), said


def test_a_full_disk_names_where(tmp_path: Path) -> None:
    problem = told(OSError(errno.ENOSPC, "full"), tmp_path)
    assert str(problem).startswith(f"{tmp_path}: cannot write (No space left on device)")
    assert told(OSError(errno.EIO, "broken"), tmp_path) is None

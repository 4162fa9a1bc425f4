"""Writing files so that a reader never sees half of one, and a full disk is said plainly."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpc.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


def told(error: OSError, path: Path | str, failed: str = "cannot write") -> UserError | None:
    """What to say of a file system's failure that a user can mend; None for any other."""
    named = Path(error.filename if isinstance(error.filename, str) else path)
    if error.errno in _CLOSED and named.is_file() and not os.access(named, os.R_OK):
        return unreadable(named, error)
    what = f"{path}: {failed} ({os.strerror(error.errno or 0)})"
    if error.errno in _FULL:
        return UserError(f"{what}; free some space and run again, what is finished is kept")
    if error.errno in _CLOSED:
        return UserError(f"{what}; check the folder's permissions or choose another run directory")
    return None


def expanded(path: Path | str) -> Path:
    """A path as people write it, with ``~`` and ``~NAME`` for home folders.

    Raises:
        UserError: Nobody here is called NAME.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no such home folder; write the path out") from None


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the failures of a file system that a user can mend into one line.

    Raises:
        UserError: No space or quota left, or no right to write at ``path``.
    """
    try:
        yield
    except OSError as error:
        if (problem := told(error, path)) is not None:
            raise problem from error
        raise


def unreadable(path: Path, error: OSError) -> UserError:
    """What to say of a file that is there and cannot be read."""
    return UserError(
        f"{path}: cannot be read ({error.strerror}); check its permissions, and its disk"
    )


def share(folder: Path) -> None:
    """Opens the files in a folder to whom the folder is open.

    safetensors writes through temporary files, which only their owner may read.
    """
    mode = folder.stat().st_mode & 0o666
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(mode)


def make_folder(path: Path) -> Path:
    """Creates a folder and its parents.

    Raises:
        UserError: It cannot be created.
    """
    if path.is_dir():  # cheaper, on a network file system, than to be refused
        return path
    try:
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError) as error:
        raise UserError(f"{path}: cannot be made a folder ({error.strerror})") from error
    return path


def write_all(descriptor: int, data: bytes) -> None:
    """Writes every byte, however the kernel splits it."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str, sync_names: bool = True, durable: bool = True) -> None:
    """Replaces a file at once: readers see the old text or the new, never a part.

    Args:
        path: The file.
        text: Its new text, stored as UTF-8.
        sync_names: Whether to sync the folder, too, so that the new name is durable.
        durable: Whether the text must survive a power failure.

    Raises:
        UserError: The disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    with disk_errors(path):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                write_all(descriptor, text.encode())
                if durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if sync_names and durable:
            sync_folder(path.parent)

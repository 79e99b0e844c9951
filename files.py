"""Files that can be relied on: written whole or not at all, one process at a time in a folder, and what went wrong in words.

write_whole(path, data)                 # the old file or the new one, also after a crash; never half of one
with FolderLock(folder): …              # a second training of the same run is refused
print(explain(error))                   # "results/x: there is no room left on its disk; make room, or …"
"""

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt


# Writing


def write_whole(path: Path, data: bytes | memoryview, make_room: Callable[[], None] | None = None, durable: bool = True) -> None:
    """Write a file whole or not at all; folders are made.

    Args:
        make_room: called when the new file is on the disk, before it takes its place, as to move the old one away.
        durable: wait until it is on the disk, so that it outlives the machine too.

    Raises:
        OSError: it can't be written, for which `explain` has words; the old file is untouched then.
    """
    try:
        with made_folder(path.parent), _whole(path) as part:
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            if make_room:
                make_room()
            os.replace(part, path)
            if durable:
                sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error  # a failing write doesn't say of what


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name to write to first, under which nothing stays."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder, and remove it and those made for it where they stay empty, as when what was to be written is refused."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for each in made:
            with contextlib.suppress(OSError):  # there is something in it
                each.rmdir()


def check_folder(folder: Path) -> None:
    """Make sure, before hours of work, that files can be written into a folder; nothing stays there.

    Raises:
        OSError: they can't, for which `explain` has words.
    """
    try:
        with made_folder(folder), _whole(folder / "check") as part:
            part.write_bytes(bytes(4096))
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from error


def write_text(path: Path, text: str) -> None:
    """`write_whole` for text."""
    write_whole(path, text.encode())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete what writers left that were killed; nobody else may be writing into the folder."""
    for part in folder.rglob(".*.part"):
        part.unlink(missing_ok=True)


# One at a time


class FolderLock:
    """Keeps other processes, on this machine or another, from using a folder; made if need be, and removed if it stays empty.

    The system itself lets go of the lock when its holder ends, however that happens, so that a lock file which a killed run has
    left holds nobody up. Processes that are forked meanwhile don't hold it.

    Raises:
        ValueError: another process is using the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / ".lock"

    def __enter__(self) -> "FolderLock":
        with contextlib.ExitStack() as stack:  # undone in reverse, at once where the rest fails
            stack.enter_context(made_folder(self.folder))
            file = self._open_locked()
            stack.callback(self._let_go, file)
            try:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}")
                file.flush()
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error  # a failing write doesn't say of what
            self._held = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _let_go(self, file: TextIO) -> None:
        if os.name == "nt":
            file.close()  # which can't be removed while it is open
        with contextlib.suppress(OSError):
            self.path.unlink()
        with contextlib.suppress(OSError):  # a full disk refuses what was still to be written
            file.close()

    def _open_locked(self) -> TextIO:
        while True:
            file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
            if not _lock(file):
                file.seek(0)
                holder = file.read().strip() or "unknown"
                file.close()
                raise ValueError(f"{self.folder}: another training is using it ({holder}): wait for it, stop it, or set another exp_name")
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                return file
            file.close()  # its holder has just removed it


_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_UNABLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def _lock(file: TextIO) -> bool:
    """False if another process holds the lock; a disk that knows no locks can't keep anybody out."""
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which the data workers would inherit and hold on to
        else:
            file.seek(2**30)  # Windows keeps others from reading what is locked
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno not in (*_HELD, *_UNABLE):
            raise
        if error.errno in _UNABLE:
            print(f"warning: {file.name}: this disk knows no locks, so that nothing keeps two trainings from one run", file=sys.stderr)
        return error.errno in _UNABLE
    return True


# In words

_EXPLANATIONS = {
    errno.ENOSPC: "there is no room left on its disk; make room, or choose a folder on another one",
    errno.EDQUOT: "your share of its disk is used up; make room, or choose a folder on another one",
    errno.EFBIG: "it would be larger than its disk or your limits (ulimit -f) allow",
    errno.EACCES: "no permission; change those of the file and its folder, or choose another",
    errno.EPERM: "no permission; change those of the file and its folder, or choose another",
    errno.EROFS: "its disk can only be read; choose a folder on another one",
    errno.EISDIR: "is a folder, where a file is needed; give a file's path",
    errno.ENOTDIR: "a part of this path is a file, where a folder is needed; rename that file, or choose another folder",
    errno.EEXIST: "is there already, and is no folder; rename it, or choose another folder",
    errno.ENOENT: "no such file or folder; correct the path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ELOOP: "its links lead in a circle; give the path of the file itself",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n), or lower num_workers",
    errno.EIO: "its disk reports an error; look at the system's log, and copy what you need to another disk",
}


def explain(error: OSError) -> str:
    """What went wrong with which file, and what to do, in one sentence."""
    if error.errno not in _EXPLANATIONS:
        return str(error)
    return f"{error.filename or 'a file'}: {_EXPLANATIONS[error.errno]}"

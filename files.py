"""Files that can be relied on: written whole or not at all, one process at a time in a folder, and what went wrong in words.

write_whole(path, data)                 # the old file or the new one, also after a crash; never half of one
with FolderLock(folder): …              # a second training of the same run is refused
print(explain(error))                   # "results/x: there is no room left on its disk; make room, or …"
"""

import contextlib
import errno
import os
import re
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TextIO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


# Writing


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Write a file or a folder whole or not at all; this is the only atomic writer.

    Yields a path in the same folder to write to. What is there at the end takes the place of `path`; after an error it is removed,
    and the old file is untouched. Missing folders are made.

    Args:
        durable: wait until the disk has it, so that it survives a power cut.

    Raises:
        OSError: the file cannot be written; `explain` has words for it.
    """
    unique = f"{os.getpid()}.{uuid.uuid4().hex[:8]}"  # two containers may give their processes the same number
    name = os.fsdecode(os.fsencode(path.name)[: _LONGEST_NAME - len(f"..{unique}.old.part")])
    part, old = (path.with_name(f".{name}.{unique}{ending}") for ending in (".part", ".old.part"))
    try:
        with made_folder(path.parent):
            try:
                yield part
                if durable:
                    for each in (part, *(part.iterdir() if part.is_dir() else ())):
                        sync(each)
                _take_place(part, path, old)
                if durable:
                    sync(path.parent)
            finally:
                _remove(part)
                if path.exists():
                    _remove(old)
    except OSError as error:
        named = str(error.filename or part)  # a failing write does not name its file
        if error.errno is None or not named.startswith(str(part)):
            raise
        raise OSError(error.errno, error.strerror or str(error), named.replace(str(part), str(path))) from error


_LONGEST_NAME = 255  # bytes, on nearly all disks


def _take_place(part: Path, path: Path, old: Path) -> None:
    if not (part.is_dir() and path.is_dir()):
        os.replace(part, path)
        return
    try:
        path.rename(old)  # the system replaces a file in one step, but not a folder
        os.replace(part, path)
    finally:
        if not path.exists():  # an error or a signal came between the two
            old.rename(path)


def write_whole(path: Path, data: bytes | memoryview, *, durable: bool = True) -> None:
    """`replacing` for bytes."""
    with replacing(path, durable=durable) as part:
        part.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """`replacing` for text."""
    write_whole(path, text.encode())


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk, where the system can."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in _UNABLE:  # some network disks don't know this for folders
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, name: str = "*", idle_seconds: float = 0, nested: bool = True) -> list[Path]:
    """Delete what killed writers left of `name` (a pattern) in a folder, and in the folders in it; the deleted paths.

    A folder that a writer had moved away, to put a new one in its place, is moved back.

    Args:
        idle_seconds: leave what has been written to since, by a writer that may still run.
    """
    removed = []
    for part in folder.glob(f"{'**/' if nested else ''}.{name}.part"):
        with contextlib.suppress(FileNotFoundError):  # another process removes it too
            newest = max(each.stat().st_mtime for each in (part, *(part.iterdir() if part.is_dir() else ())))
            if time.time() - newest < idle_seconds:
                continue
            moved = re.fullmatch(r"\.(.+)\.\d+\.[0-9a-f]{8}\.old\.part", part.name)
            if moved and not part.with_name(moved[1]).exists():
                part.rename(part.with_name(moved[1]))
            else:
                _remove(part)
                removed.append(part)
    return removed


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder, and remove it and those made for it if they stay empty, as after a refused write."""
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
        OSError: they cannot; `explain` has words for it.
    """
    part = folder / f".check.{os.getpid()}.part"
    try:
        with made_folder(folder):
            try:
                part.write_bytes(bytes(4096))
            finally:
                _remove(part)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from error


# One at a time


class FolderLock:
    """Keeps other processes, on this machine or another, from using a folder; makes the folder, and removes it if it stays empty.

    The system releases the lock when its holder ends, however it ends, so the lock file of a killed run blocks nobody. Processes
    forked meanwhile do not hold the lock.

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
                raise OSError(error.errno, error.strerror, str(self.path)) from error  # a failing write does not name its file
            self._held = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _let_go(self, file: TextIO) -> None:
        if os.name == "nt":
            file.close()  # Windows cannot remove an open file
        with contextlib.suppress(OSError):
            self.path.unlink()
        with contextlib.suppress(OSError):  # a full disk refuses the buffered rest
            file.close()

    def _open_locked(self) -> TextIO:
        while True:
            file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
            if not _lock(file):
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise ValueError(f"{self.folder}: in use by {holder}; wait for it, stop it, or choose another folder (exp_name)")
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                return file
            file.close()  # its holder has just removed it


_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_UNABLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def _lock(file: TextIO) -> bool:
    """False if another process holds the lock; on a disk without locks always True, with a warning."""
    try:
        if sys.platform == "win32":
            file.seek(2**30)  # Windows stops others from reading locked bytes
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which data workers would inherit and keep
    except OSError as error:
        if error.errno not in (*_HELD, *_UNABLE):
            raise
        if error.errno in _UNABLE:
            print(f"warning: {file.name}: this disk has no locks; make sure that only one training uses the folder", file=sys.stderr)
        return error.errno in _UNABLE
    return True


# The system's errors

_EXPLANATIONS = {
    errno.ENOSPC: "there is no room left on its disk; make room, or choose a folder on another one",
    errno.EDQUOT: "your quota on its disk is used up; make room, or choose a folder on another one",
    errno.EFBIG: "it would be larger than its disk or your limits (ulimit -f) allow",
    errno.EACCES: "no permission; change those of the file and its folder, or choose another",
    errno.EPERM: "no permission; change those of the file and its folder, or choose another",
    errno.EROFS: "its disk is read-only; choose a folder on another one",
    errno.EISDIR: "is a folder; give the path of a file",
    errno.ENOTDIR: "a part of this path is a file and not a folder; rename that file, or choose another folder",
    errno.EEXIST: "exists and is not a folder; rename it, or choose another folder",
    errno.ENOENT: "no such file or folder; correct the path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ELOOP: "its links form a circle; give the path of the file itself",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n), or lower num_workers",
    errno.ENODEV: "its disk can't map files into memory; choose a folder on another one (cache_dir for decoded images)",
    errno.EIO: "its disk reports an error; look at the system's log, and copy your files to another disk",
}


def explain(error: OSError) -> str:
    """What went wrong with which file, and what to do, in one sentence."""
    if error.errno not in _EXPLANATIONS:
        return str(error)
    if not error.filename:
        return f"{error.strerror}: {_EXPLANATIONS[error.errno]}"
    return f"{error.filename}: {_EXPLANATIONS[error.errno]}"

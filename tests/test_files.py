"""Files: whole or not at all, one process at a time in a folder, and the system's errors in words."""

import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

import files
from helpers import REPOSITORY


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def put(path, content):
    """Write a file, or a folder of files, by the atomic writer."""
    if isinstance(content, bytes):
        files.write_whole(path, content)
        return
    with files.replacing(path) as part:
        part.mkdir()
        for name, data in content.items():
            (part / name).write_bytes(data)


def content_of(path):
    return {each.name: each.read_bytes() for each in path.iterdir()} if path.is_dir() else path.read_bytes()


# Writing

OLD = {"file": b"old", "folder": {"a": b"old", "b": b"old"}}
NEW = {"file": b"newer", "folder": {"a": b"newer", "c": b"newer"}}
kinds = pytest.mark.parametrize("kind", OLD)


@kinds
def test_the_new_takes_the_place_of_the_old_and_nothing_else_stays(tmp_path, kind):
    path = tmp_path / "deep" / "er" / "x"
    for content in (OLD[kind], NEW[kind]):
        put(path, content)
        assert content_of(path) == content
        assert [each.name for each in path.parent.iterdir()] == ["x"]
    files.write_text(tmp_path / "text", "ö\n")
    assert (tmp_path / "text").read_bytes() == "ö\n".encode()


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Interrupted()], ids=["OSError", "interrupted"])
@pytest.mark.parametrize(("kind", "call"), [*((kind, call) for kind in OLD for call in ("body", "fsync", "replace")), ("folder", "rename")])
def test_after_any_failure_the_old_is_untouched_and_the_error_names_it(tmp_path, monkeypatch, kind, call, error):
    def fail(*_):
        raise error

    path = tmp_path / "made" / "x"
    for old in [OLD[kind]] if call == "rename" else [None, OLD[kind]]:
        if old:
            put(path, old)
        with monkeypatch.context() as patch, pytest.raises(type(error)) as caught:
            if call != "body":
                patch.setattr(os, call, fail)
            with files.replacing(path) as part:
                part.write_bytes(b"new") if kind == "file" else part.mkdir()
                if call == "body":
                    fail()
        if isinstance(error, OSError):
            assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
        assert [each.name for each in tmp_path.rglob("[!ab]*")] == (["made", "x"] if old else [])
        assert not old or content_of(path) == old


def test_errors_name_the_file_as_it_will_be_called_and_those_of_other_files_stay(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, files.replacing(tmp_path / "store"):
        (tmp_path / "source.png").read_bytes()
    assert caught.value.filename == str(tmp_path / "source.png")
    with pytest.raises(FileNotFoundError) as caught, files.replacing(tmp_path / "store") as part:
        (part / "gt.bin").write_bytes(b"")  # whose folder was never made
    assert caught.value.filename == str(tmp_path / "store" / "gt.bin")
    (tmp_path / "folder" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match="folder") as caught:
        files.write_whole(tmp_path / "folder", b"x")
    assert caught.value.filename == str(tmp_path / "folder")
    with pytest.raises(FileNotFoundError) as caught, files.replacing(tmp_path / "nothing was written"):
        pass
    assert caught.value.filename == str(tmp_path / "nothing was written")
    with pytest.raises(ValueError, match=r"^mine$"), files.replacing(tmp_path / "x"):
        raise ValueError("mine")
    assert names(tmp_path) == ["folder", "folder/in the way"]


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit of file sizes")
def test_a_disk_that_takes_no_more_leaves_the_old_file(tmp_path):
    import resource

    path, before = tmp_path / "x", resource.getrlimit(resource.RLIMIT_FSIZE)
    files.write_whole(path, b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="x") as caught:
            files.write_whole(path, bytes(10**6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


@kinds
def test_bytes_are_on_the_disk_before_their_name_and_the_name_at_the_end(tmp_path, monkeypatch, kind):
    """… unless the caller can make the file again; `durable` says so."""
    happened, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: happened.append(os.fstat(descriptor).st_ino) or sync(descriptor))
    monkeypatch.setattr(os, "replace", lambda *paths: happened.append("replace") or replace(*paths))
    put(tmp_path / "x", NEW[kind])
    written = [tmp_path / "x", *(each for each in (tmp_path / "x").glob("*"))]
    place = happened.index("replace")
    assert {each.stat().st_ino for each in written} == set(happened[:place])
    assert happened[place + 1 :] == [tmp_path.stat().st_ino]
    happened.clear()
    files.write_whole(tmp_path / "y", b"", durable=False)
    assert happened == ["replace"]


def test_two_writers_of_one_process_do_not_meet(tmp_path):
    with files.replacing(tmp_path / "x") as first, files.replacing(tmp_path / "x") as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert (tmp_path / "x").read_bytes() == b"first"  # which ended last


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    kept = ("mine.part", ".hidden", ".x.part.txt", "samples/.x")
    stack = contextlib.ExitStack()
    (tmp_path / "samples").mkdir()
    parts = [stack.enter_context(files.replacing(tmp_path / name)) for name in ("last.pth.tar", "samples/1.png", "store")]
    parts[2].mkdir()
    for path in (*(tmp_path / name for name in kept), *parts[:2], parts[2] / "gt.bin"):
        path.touch()
    assert files.remove_leftovers(tmp_path, "no such name*") == []
    assert files.remove_leftovers(tmp_path, idle_seconds=60) == []  # their writers may still run
    for path in parts[1:]:
        os.utime(path, (time.time() - 100,) * 2)
    assert files.remove_leftovers(tmp_path, idle_seconds=60) == [parts[1]]  # a file in the other one is new
    assert files.remove_leftovers(tmp_path, "last.*") == [parts[0]]
    assert files.remove_leftovers(tmp_path) == [parts[2]]
    assert names(tmp_path) == sorted(["samples", *kept])


def test_a_folder_is_tried_before_work_begins(tmp_path):
    files.check_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file") as caught:
        files.check_folder(tmp_path / "file" / "a")
    assert caught.value.filename == str(tmp_path / "file" / "a")
    assert names(tmp_path) == ["file"]


# One at a time

HOLD = "import sys, time, files, pathlib\nwith files.FolderLock(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
FORK = HOLD.replace("print('held', flush=True)", "import os; child = os.fork(); child and os.write(1, b'held\\n%d\\n' % child)")


@pytest.mark.slow
@pytest.mark.parametrize("code", [HOLD, pytest.param(FORK, marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="forks"))])
def test_a_folder_is_used_by_one_process_until_that_ends(tmp_path, code):
    """… however it ends, and whatever it has forked meanwhile."""
    folder = tmp_path / "results" / "run"
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=str(process.pid)) as caught, files.FolderLock(folder):
            pass
        assert str(folder) in str(caught.value)
        process.kill()
        process.wait()
        assert names(tmp_path) == ["results", "results/run", "results/run/.lock"]  # left by the killed one, and in nobody's way
        with files.FolderLock(folder):
            assert str(os.getpid()) in (folder / ".lock").read_text()
        if code == FORK:
            os.kill(int(process.stdout.readline()), signal.SIGKILL)
    assert names(tmp_path) == ["results", "results/run"]


def test_a_folder_that_stays_empty_is_removed_and_any_other_kept(tmp_path):
    with files.FolderLock(tmp_path / "a" / "b"):
        pass
    assert names(tmp_path) == []
    with files.FolderLock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert names(tmp_path) == ["a", "a/b", "a/b/kept"]


def test_a_lock_file_that_its_holder_removes_meanwhile_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    lock, calls = fcntl.lockf, []

    def removed_meanwhile(*arguments):
        calls.append(1)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        return lock(*arguments)

    monkeypatch.setattr(fcntl, "lockf", removed_meanwhile)
    with files.FolderLock(tmp_path):
        assert len(calls) == 2
        assert (tmp_path / ".lock").read_text()


def test_a_disk_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
    with files.FolderLock(tmp_path):
        assert str(tmp_path) in capsys.readouterr().err


# In words


def test_a_systems_error_names_the_file_and_not_its_number():
    known = (
        errno.ENOSPC,
        errno.EACCES,
        errno.EROFS,
        errno.EISDIR,
        errno.ENOTDIR,
        errno.EEXIST,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.EIO,
    )
    for number in known:
        said = files.explain(OSError(number, os.strerror(number), "results/run"))
        assert said.startswith("results/run: ")
        assert os.strerror(number) not in said
    assert "results/run" in files.explain(OSError(errno.EDOM, "unknown here", "results/run"))
    assert files.explain(FileNotFoundError("data: our own words")) == "data: our own words"


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "n" * 200])
def test_names_as_long_as_a_disk_allows_can_be_written(tmp_path, name):
    for data in (b"one", b"two"):
        files.write_whole(tmp_path / name, data)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"two"


def test_a_folder_that_a_killed_writer_had_moved_away_comes_back(tmp_path):
    old = tmp_path / ".store.123.0123abcd.old.part"
    old.mkdir()
    (old / "x").write_text("old")
    assert files.remove_leftovers(tmp_path) == []
    assert (tmp_path / "store/x").read_text() == "old"
    (tmp_path / ".store.123.0123abcd.old.part").mkdir()
    assert files.remove_leftovers(tmp_path) == [old]  # the new one had taken its place


def test_leftovers_of_others_in_inner_folders_can_be_spared(tmp_path):
    part = tmp_path / "test/.x.png.1.part"
    part.parent.mkdir()
    part.touch()
    assert files.remove_leftovers(tmp_path, nested=False) == []
    assert files.remove_leftovers(tmp_path) == [part]


def test_disks_that_cannot_sync_folders_are_used_all_the_same(tmp_path, monkeypatch):
    """As CIFS and sshfs; an error for the file itself still counts."""
    sync = os.fsync

    def refuse(descriptor, kind):
        if kind(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", lambda descriptor: refuse(descriptor, stat.S_ISDIR))
    files.write_whole(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
    monkeypatch.setattr(os, "fsync", lambda descriptor: refuse(descriptor, stat.S_ISREG))
    with pytest.raises(OSError):
        files.write_whole(tmp_path / "b", b"x")

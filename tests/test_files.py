"""Files: whole or not at all, one process at a time in a folder, and mistakes in words."""

import errno
import os
import signal
import subprocess
import sys

import pytest

import files
from helpers import REPOSITORY


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


# Writing


def test_a_file_is_written_whole_and_replaced(tmp_path):
    files.write_text(tmp_path / "a" / "b.txt", "one")
    files.write_text(tmp_path / "a" / "b.txt", "öne")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "öne".encode()
    assert names(tmp_path) == ["a", "b.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_names_it(tmp_path, monkeypatch, call):
    path = tmp_path / "b.txt"
    files.write_text(path, "old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=r"b\.txt") as caught:
        files.write_text(path, "new")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["b.txt"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_body_that_fails_leaves_everything_as_it_was(tmp_path, kind):
    path = tmp_path / "made" / "thing"
    for old in (False, True):
        if old:
            put(path, kind, "old")
        before = names(tmp_path)
        with pytest.raises(RuntimeError), files.replacing(path) as part:
            put(part, kind, "half")
            raise RuntimeError
        assert names(tmp_path) == before
    assert content(path) == "old"


def put(path, kind, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        path.mkdir(exist_ok=True)
        (path / "inside.txt").write_text(text)
    else:
        path.write_text(text)


def content(path):
    return (path / "inside.txt" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("durable", [True, False])
def test_what_is_written_takes_the_place_of_the_old(tmp_path, kind, durable):
    path = tmp_path / "thing"
    for text in ("one", "two"):
        with files.replacing(path, durable=durable) as part:
            assert part.parent == path.parent
            put(part, kind, text)
        assert content(path) == text
    assert [each.name for each in tmp_path.iterdir()] == ["thing"]


def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path, monkeypatch):
    put(tmp_path / "thing", "folder", "old")

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="thing"), files.replacing(tmp_path / "thing") as part:
        put(part, "folder", "new")
    assert content(tmp_path / "thing") == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["thing"]


def test_another_files_error_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source\.txt"), files.replacing(tmp_path / "a.txt"):
        (tmp_path / "source.txt").read_bytes()


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "samples").mkdir()
    for name in (".last.pth.tar.77.part", "samples/.1.png.77.part", "mine.part", ".hidden"):
        (tmp_path / name).touch()
    put(tmp_path / ".store.77.part", "folder", "half")
    assert files.remove_leftovers(tmp_path, "other.*") == []
    assert files.remove_leftovers(tmp_path, idle_seconds=600) == []
    for path in (tmp_path / ".store.77.part", tmp_path / ".store.77.part" / "inside.txt"):
        os.utime(path, (path.stat().st_mtime - 900,) * 2)
    assert files.remove_leftovers(tmp_path, idle_seconds=600) == [tmp_path / ".store.77.part"]
    assert len(files.remove_leftovers(tmp_path)) == 2
    assert names(tmp_path) == [".hidden", "mine.part", "samples"]


def test_a_folder_is_checked_without_a_trace(tmp_path):
    files.check_folder(tmp_path / "a" / "b")
    assert names(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        files.check_folder(tmp_path / "file" / "b")


# One at a time

HOLD = "import sys, time, files, pathlib\nwith files.FolderLock(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def holder(folder, code=HOLD):
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.slow
def test_a_folder_is_used_by_one_process(tmp_path):
    folder = tmp_path / "results" / "run"
    process = holder(folder)
    try:
        expected = rf"run.* {process.pid} "
        with pytest.raises(ValueError, match=expected), files.FolderLock(folder):
            pass
    finally:
        process.kill()
        process.communicate()
    assert names(tmp_path) == [".lock", "results", "run"]  # left by the killed one, and in nobody's way
    with files.FolderLock(folder):
        assert f"process {os.getpid()} on " in (folder / ".lock").read_text()
    assert names(tmp_path) == ["results", "run"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_what_a_holder_has_forked_does_not_hold(tmp_path):
    forked = HOLD.replace("print('held', flush=True)", "import os; child = os.fork(); child and os.write(1, b'held\\n%d\\n' % child)")
    process = holder(tmp_path / "run", forked)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with files.FolderLock(tmp_path / "run"):
        pass
    os.kill(int(process.stdout.readline()), signal.SIGKILL)
    process.stdout.close()


def test_a_folder_that_stays_empty_is_removed_and_any_other_kept(tmp_path):
    with files.FolderLock(tmp_path / "a" / "b"):
        pass
    assert names(tmp_path) == []
    with files.FolderLock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert names(tmp_path) == ["a", "b", "kept"]


def test_a_lock_file_that_its_holder_removes_meanwhile_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    lock, calls = files._lock, []

    def removed_meanwhile(file):
        calls.append(1)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        return lock(file)

    monkeypatch.setattr(files, "_lock", removed_meanwhile)
    with files.FolderLock(tmp_path):
        assert len(calls) == 2
        assert "process" in (tmp_path / ".lock").read_text()


# In words


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG])
def test_a_systems_error_becomes_a_sentence_with_a_remedy(number):
    said = files.explain(OSError(number, os.strerror(number), "results/run"))
    assert said.startswith("results/run: ")
    assert "Errno" not in said


def test_our_own_words_stay():
    sentence = "data: no such folder; put the originals into it"
    assert files.explain(FileNotFoundError(sentence)) == sentence

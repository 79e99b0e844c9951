"""Checkpoints: whole or not there, verified when they are read, and kept in a row."""

import contextlib
import errno
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoints
import files
import weights
from helpers import REPOSITORY
from runs import same, tensors


def state(update, value=0.0):
    return {"update": update, "weights": {"a": torch.full((50,), value), "b": torch.arange(6)}, "name": "x"}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back(tmp_path):
    saved = {"update": 3, "weights": {"a": torch.arange(4.0)}, "list": [1.5, "x", torch.ones(2, dtype=torch.long)]}
    checkpoints.save(tmp_path / "folder" / "last.pth.tar", saved)
    found = torch.load(tmp_path / "folder" / "last.pth.tar", weights_only=True)
    assert found["update"] == 3
    assert torch.equal(found["weights"]["a"], torch.arange(4.0))
    assert names(tmp_path / "folder") == ["last.pth.tar"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_checkpoint_that_is_not_finite_is_never_written(tmp_path, bad):
    checkpoints.save_last(tmp_path, state(1), None, 1)
    before = (tmp_path / "last.pth.tar").read_bytes()
    with pytest.raises(ValueError, match=r"last\.pth\.tar.*part\.weights\.0"):
        checkpoints.save_last(tmp_path, {"update": 2, "part": {"weights": [torch.tensor([1.0, bad])]}}, 1, 1)
    assert (tmp_path / "last.pth.tar").read_bytes() == before
    assert names(tmp_path) == ["last.pth.tar"]


@pytest.mark.parametrize("keep_last", [0, 1, 3])
def test_the_newest_ones_are_kept(tmp_path, keep_last):
    before = None
    for update in (5, 10, 10, 15, 20, 100):
        checkpoints.save_last(tmp_path, state(update), before, keep_last)
        before = update
    (tmp_path / "update_mine.pth.tar").touch()  # nothing else is ever deleted
    checkpoints.save_last(tmp_path, state(101), before, keep_last)
    old = [path.name for path in checkpoints.numbered(tmp_path)]
    assert old == [f"update_{update:07d}.pth.tar" for update in (100, 20, 15)][:keep_last]
    assert [weights.read(path)["update"] for path in checkpoints.present(tmp_path)] == [101, 100, 20, 15][: keep_last + 1]
    assert (tmp_path / "update_mine.pth.tar").exists()


def test_a_last_one_that_is_not_this_runs_is_kept(tmp_path):
    (tmp_path / "last.pth.tar").write_bytes(b"damaged")
    checkpoints.save_last(tmp_path, state(2), None, 1)
    assert (tmp_path / "damaged_last.pth.tar").read_bytes() == b"damaged"
    assert weights.read(tmp_path / "last.pth.tar")["update"] == 2
    for number, content in ((2, b"again"), (3, b"and again")):
        (tmp_path / "last.pth.tar").write_bytes(content)
        checkpoints.save_last(tmp_path, state(3), None, 1)
        assert (tmp_path / f"damaged_last_{number}.pth.tar").read_bytes() == content
    assert (tmp_path / "damaged_last.pth.tar").read_bytes() == b"damaged"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error", "x"),
        PermissionError(errno.EACCES, "Permission denied", "x"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes"),
        MemoryError(),
    ],
)
def test_what_the_machine_fails_at_is_no_damage(tmp_path, monkeypatch, error):
    """… so that no older checkpoint is taken, and the newest stays where it is."""
    checkpoints.save(tmp_path / "best.pth.tar", state(1))
    checkpoints.save(tmp_path / "last.pth.tar", state(2))
    with monkeypatch.context() as patch, pytest.raises(type(error)) as caught:
        patch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(error))
        checkpoints.read_newest(checkpoints.present(tmp_path))
    assert caught.value is error
    assert checkpoints.read_newest(checkpoints.present(tmp_path))[1]["update"] == 2


@pytest.mark.parametrize("at", [1, 2])
def test_whenever_the_machine_is_switched_off_a_whole_checkpoint_is_there(tmp_path, monkeypatch, at):
    """Before either of the two renames that put the new one in the place of the old."""
    checkpoints.save_last(tmp_path, state(1), None, 1)
    replace, calls = os.replace, []

    def off(*paths):
        calls.append(paths)
        if len(calls) == at:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", off)
        checkpoints.save_last(tmp_path, state(2), 1, 1)
    path, found, problems = checkpoints.read_newest(checkpoints.present(tmp_path))
    assert (found["update"], problems) == (1, [])
    assert path.name == ("last.pth.tar" if at == 1 else "update_0000001.pth.tar")


def test_the_new_checkpoint_is_on_the_disk_before_the_old_one_moves(tmp_path, monkeypatch):
    checkpoints.save_last(tmp_path, state(1), None, 1)
    order, sync, replace = [], files.sync, os.replace
    monkeypatch.setattr(files, "sync", lambda path: order.append(("sync", path.name)) or sync(path))
    monkeypatch.setattr(os, "replace", lambda *paths: order.append(("replace", Path(paths[1]).name)) or replace(*paths))
    checkpoints.save_last(tmp_path, state(2), 1, 1)
    assert order[0][0] == "sync"
    assert order[0][1].endswith(".part")
    assert [name for kind, name in order if kind == "replace"] == ["update_0000001.pth.tar", "last.pth.tar"]


def test_the_order_in_which_they_are_tried(tmp_path):
    for name in ("best.pth.tar", "update_0000100.pth.tar", "update_0000020.pth.tar", "last.pth.tar"):
        checkpoints.save(tmp_path / name, state(1))
    for name in ("last.pth.tar", "update_0000100.pth.tar", "update_0000020.pth.tar", "best.pth.tar"):
        path, _, problems = checkpoints.read_newest(checkpoints.present(tmp_path))
        assert path.name == name
        path.write_bytes(b"PK")
    assert len(problems) == 3
    with pytest.raises(ValueError, match=r"last\.pth\.tar"):
        checkpoints.read_newest(checkpoints.present(tmp_path))


def test_the_best_one_is_taken_where_it_is_newer(tmp_path):
    for name, update in (("last.pth.tar", 30), ("update_0000010.pth.tar", 10), ("best.pth.tar", 20)):
        checkpoints.save(tmp_path / name, state(update))
    assert checkpoints.read_newest(checkpoints.present(tmp_path))[1]["update"] == 30
    (tmp_path / "last.pth.tar").write_bytes(b"PK")
    assert checkpoints.read_newest(checkpoints.present(tmp_path))[1]["update"] == 20
    (tmp_path / "last.pth.tar").unlink()
    assert checkpoints.read_newest(checkpoints.present(tmp_path))[1]["update"] == 20


def test_later_ones_of_a_run_gone_back_on_keep_nothing_from_being_kept(tmp_path):
    checkpoints.save(tmp_path / "update_0001800.pth.tar", state(1800))
    for before, update in ((None, 1000), (1000, 1100), (1100, 1200)):
        checkpoints.save_last(tmp_path, state(update), before, 1)
    assert [path.name for path in checkpoints.numbered(tmp_path)] == ["update_0001800.pth.tar", "update_0001100.pth.tar"]


def test_a_changed_byte_is_noticed_or_harmless(tmp_path):
    """Any byte of the file, changed: refused, or everything in it is as it was."""
    path = tmp_path / "last.pth.tar"
    checkpoints.save(path, state(7, 0.5))
    whole, expected = path.read_bytes(), tensors(weights.read(path))
    draw, refused = random.Random(0), 0
    for _ in range(600):
        place = draw.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
        try:
            found = tensors(weights.read(path))
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert found.keys() == expected.keys()
            assert all(same(found[name], expected[name]) for name in expected), place
    assert refused > 200


def test_a_changed_weight_is_named_as_damage(tmp_path):
    path = tmp_path / "last.pth.tar"
    checkpoints.save(path, {"a": torch.full((1000,), 3.0)})
    data = path.read_bytes()
    place = data.index(torch.full((4,), 3.0).numpy().tobytes()) + 400
    path.write_bytes(data[:place] + b"\x01" + data[place + 1 :])
    assert (torch.load(path, weights_only=True)["a"] != 3).any()  # which PyTorch doesn't notice
    with pytest.raises(ValueError, match=path.name):
        weights.read(path)


@contextlib.contextmanager
def small_disk(folder, mebibytes):
    """A disk of its own in memory, where this process may have one."""
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    if not mount or os.name == "nt" or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("no permission to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    with small_disk(tmp_path / "disk", 2) as disk:
        checkpoints.save_last(disk / "run", {"update": 1, "a": torch.ones(150_000)}, None, 1)
        with pytest.raises(OSError, match=r"No space left on device: '.*last\.pth\.tar'") as caught:
            checkpoints.save_last(disk / "run", {"update": 2, "a": torch.ones(450_000)}, 1, 1)
        assert caught.value.errno == errno.ENOSPC
        assert names(disk / "run") == ["last.pth.tar"]
        assert weights.read(disk / "run" / "last.pth.tar")["update"] == 1


@pytest.mark.slow
def test_a_training_on_a_full_disk_ends_with_one_sentence(tmp_path):
    from helpers import write_set

    write_set(tmp_path / "data" / "Train", [(40, 40)])
    arguments = [
        "--model_arch_name", "rcan_x2", "--upscale_factor", "2", "--channels", "16", "--reduction", "4", "--num_rg", "2", "--num_rcab", "2",
        "--train_sets", "Train", "--valid_sets", "--data_root", str(tmp_path / "data"), "--cache_dir", str(tmp_path / "cache"),
        "--lr_patch_size", "8", "--batch_size", "1", "--num_workers", "0", "--save_every", "2", "--keep_last", "100",
        "--epochs", "1", "--steps_per_epoch", "400",
    ]  # fmt: skip
    with small_disk(tmp_path / "disk", 4) as disk:
        command = [sys.executable, str(REPOSITORY / "train.py"), *arguments, "--results_dir", str(disk)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 1
        last_line = done.stderr.strip().splitlines()[-1]
        assert last_line.startswith("error: ")
        assert str(disk / "rcan_x2") in last_line
        assert "Traceback" not in done.stderr
        kept = checkpoints.present(disk / "rcan_x2")
        updates = [weights.read(path)["update"] for path in kept]  # all of them are whole
        assert len(updates) > 3
        assert updates == sorted(updates, reverse=True)
        assert not list(disk.rglob("*.part"))

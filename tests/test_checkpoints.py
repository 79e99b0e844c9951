"""Checkpoints: a whole one on the disk at any moment, kept in a row, found and checked when a run resumes."""

import errno
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import checkpoints
import weights
from config import Config, released_weights
from helpers import REPOSITORY, write_set
from runs import same, tensors

# Writing


def state(update, value=0.0):
    return {"update": update, "weights": {"a": torch.full((50,), value), "b": torch.arange(6)}, "list": [1.5, "x"]}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def newest(folder):
    path, found, problems = checkpoints.read_newest(checkpoints.present(folder))
    return path.name, found["update"], len(problems)


def test_a_checkpoint_comes_back(tmp_path):
    checkpoints.save(tmp_path / "folder" / "last.pth.tar", state(3, 0.5))
    found = torch.load(tmp_path / "folder" / "last.pth.tar", weights_only=True)
    assert all(same(value, tensors(state(3, 0.5))[name]) for name, value in tensors(found).items())
    assert names(tmp_path / "folder") == ["last.pth.tar"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_written(tmp_path, bad):
    checkpoints.save_last(tmp_path, state(1), None, 1)
    before = (tmp_path / "last.pth.tar").read_bytes()
    with pytest.raises(ValueError, match=r"last\.pth\.tar.*part\.weights\.0"):
        checkpoints.save_last(tmp_path, {"update": 2, "part": {"weights": [torch.tensor([1.0, bad])]}}, 1, 1)
    assert (tmp_path / "last.pth.tar").read_bytes() == before
    assert names(tmp_path) == ["last.pth.tar"]


def test_a_disk_that_refuses_the_new_one_leaves_the_last_one_in_place(tmp_path, monkeypatch):
    checkpoints.save_last(tmp_path, state(1), None, 1)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=r"last\.pth\.tar"):
        checkpoints.save_last(tmp_path, state(2), 1, 1)
    assert names(tmp_path) == ["last.pth.tar"]
    assert newest(tmp_path) == ("last.pth.tar", 1, 0)


@pytest.mark.parametrize("keep_last", [0, 1, 3])
def test_the_newest_ones_are_kept(tmp_path, keep_last):
    before = None
    for update in (5, 10, 10, 15, 20, 100):
        checkpoints.save_last(tmp_path, state(update), before, keep_last)
        before = update
    (tmp_path / "update_mine.pth.tar").touch()  # nothing else is ever deleted
    checkpoints.save_last(tmp_path, state(101), before, keep_last)
    kept = [weights.read(path)["update"] for path in checkpoints.present(tmp_path)]
    assert kept == [101, 100, 20, 15][: keep_last + 1]
    numbered = [f"update_{update:07d}.pth.tar" for update in reversed(kept[1:])]
    assert names(tmp_path) == ["last.pth.tar", *numbered, "update_mine.pth.tar"]


def test_later_ones_of_a_run_that_was_rewound_do_not_count(tmp_path):
    checkpoints.save(tmp_path / "update_0001800.pth.tar", state(1800))
    for before, update in ((None, 1000), (1000, 1100), (1100, 1200)):
        checkpoints.save_last(tmp_path, state(update), before, 1)
    assert [path.name for path in checkpoints.numbered(tmp_path)] == ["update_0001800.pth.tar", "update_0001100.pth.tar"]


def test_a_last_one_that_is_not_this_runs_is_kept(tmp_path):
    kept = []
    for content, name in ((b"1", "damaged_last"), (b"2", "damaged_last_2"), (b"3", "damaged_last_3")):
        (tmp_path / "last.pth.tar").write_bytes(content)
        checkpoints.save_last(tmp_path, state(3), None, 1)
        kept.append((tmp_path / f"{name}.pth.tar", content))
        assert [path.read_bytes() for path, _ in kept] == [content for _, content in kept]
    assert newest(tmp_path) == ("last.pth.tar", 3, 0)


@pytest.mark.parametrize(("keep_last", "last"), [(0, "whole"), (1, "whole"), (1, "damaged"), (1, "saved again")])
def test_a_power_cut_between_any_two_system_calls_leaves_a_whole_checkpoint(tmp_path, monkeypatch, keep_last, last):
    """Such a cut empties the files that nobody has waited for; it is tried before each call of a C function."""
    folder, states, synced, sync = tmp_path / "run", [], set(), os.fsync

    def wait_for(descriptor):
        sync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def watch(*_):
        seen = {(path, path.stat().st_ino in synced, path.stat().st_ino) for path in folder.glob("*.pth.tar")}
        if not states or states[-1][0] != seen:
            states.append((seen, {path.name: path.read_bytes() if whole else b"" for path, whole, _ in seen}))

    monkeypatch.setattr(os, "fsync", wait_for)
    checkpoints.save_last(folder, state(1), None, keep_last)
    checkpoints.save_last(folder, state(2), 1, keep_last)
    if last == "damaged":
        (folder / "last.pth.tar").write_bytes(b"PK")
    before, after = {"whole": (2, 3), "damaged": (None, 3), "saved again": (2, 2)}[last]
    sys.setprofile(watch)
    try:
        checkpoints.save_last(folder, state(after), before, keep_last)
    finally:
        sys.setprofile(None)
    watch()
    assert len(states) > 1
    for number, (_, contents) in enumerate(states):
        (tmp_path / str(number)).mkdir()
        for name, content in contents.items():
            (tmp_path / str(number) / name).write_bytes(content)
        assert newest(tmp_path / str(number))[1] in (before or 1, after)
    assert newest(folder)[:2] == ("last.pth.tar", after)


# Finding


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error", "x"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes"),
        MemoryError(),
    ],
)
def test_what_the_machine_fails_at_is_no_damage(tmp_path, monkeypatch, error):
    """… so no older checkpoint is taken, and the newest stays where it is."""
    checkpoints.save(tmp_path / "best.pth.tar", state(1))
    checkpoints.save(tmp_path / "last.pth.tar", state(2))
    with monkeypatch.context() as patch, pytest.raises(type(error)) as caught:
        patch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(error))
        newest(tmp_path)
    assert caught.value is error
    assert newest(tmp_path) == ("last.pth.tar", 2, 0)


def test_the_order_in_which_they_are_tried(tmp_path):
    files = {"last.pth.tar": 30, "best.pth.tar": 25, "update_0000020.pth.tar": 20, "update_0000010.pth.tar": 10}
    for name, update in files.items():
        checkpoints.save(tmp_path / name, state(update))
    for number, (name, update) in enumerate(files.items()):
        assert newest(tmp_path) == (name, update, number)
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"last\.pth\.tar"):
        newest(tmp_path)


def test_any_changed_bit_is_noticed_or_harmless(tmp_path):
    path, draw, refused = tmp_path / "last.pth.tar", random.Random(0), 0
    checkpoints.save(path, state(7, 0.5))
    whole, expected = path.read_bytes(), tensors(weights.read(path))
    assert whole.count(torch.full((50,), 0.5).numpy().tobytes()) == 1
    places = [whole.index(torch.full((50,), 0.5).numpy().tobytes()) + 9, *(draw.randrange(len(whole)) for _ in range(200))]
    for number, place in enumerate(places):  # the first in a weight, which PyTorch does not notice
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
        try:
            found = tensors(weights.read(path))
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert number > 0
            assert found.keys() == expected.keys()
            assert all(same(found[name], expected[name]) for name in expected), place
    assert refused > 60


# Checking and restoring


def test_a_setting_that_is_younger_than_the_checkpoint_has_its_default(tmp_path):
    config = Config(results_dir=str(tmp_path), exp_name="run")
    parts = ("state_dict", "ema_state_dict", "optimizer", "scheduler", "scaler", "meter", "data", "random_states")
    older = {name: value for name, value in asdict(config).items() if name != "ema_decay"}
    checkpoints.save(config.experiment_dir / "last.pth.tar", {"update": 6, "epoch": 3, "config": older, **{key: {} for key in parts}})
    said = []
    path, found = checkpoints.find(config, said.append)
    assert (path, found["update"], len(said)) == (config.experiment_dir / "last.pth.tar", 6, 1)
    with pytest.raises(ValueError, match=r"ema_decay.*0\.999.*0\.5"):
        checkpoints.find(Config(results_dir=str(tmp_path), exp_name="run", ema_decay=0.5), said.append)


def test_a_part_that_does_not_fit_is_named(tmp_path):
    path, layer, other = tmp_path / "last.pth.tar", torch.nn.Linear(2, 2), torch.nn.Linear(3, 2)
    checkpoint = {"data": "3 images", "state_dict": torch.nn.Linear(2, 2).state_dict(), "other": other.state_dict()}
    checkpoints.restore({"state_dict": layer}, checkpoint, path, "3 images")
    assert all(torch.equal(tensor, checkpoint["state_dict"][name]) for name, tensor in layer.state_dict().items())
    for parts, data, named in (
        ({"state_dict": layer}, "4 images", "3 images.*4 images"),
        ({"discriminator": layer}, "3 images", "discriminator"),
        ({"other": layer}, "3 images", "other.*weight"),
    ):
        with pytest.raises(ValueError, match=rf"last\.pth\.tar.*{named}"):
            checkpoints.restore(parts, checkpoint, path, data)


def test_adams_moments_take_the_strides_of_their_weights(tmp_path):
    """… as fused Adam walks through both in the order of memory."""
    optimizers = []
    for layout in (torch.channels_last, torch.contiguous_format):
        layer = torch.nn.Conv2d(3, 4, 3).to(memory_format=layout)
        layer(torch.rand(1, 3, 5, 5)).sum().backward()
        optimizers.append(torch.optim.Adam(layer.parameters(), fused=True))
        optimizers[-1].step()
    checkpoint = {"data": "", "optimizer": optimizers[0].state_dict()}
    checkpoints.restore({"optimizer": optimizers[1]}, checkpoint, tmp_path / "last.pth.tar", "")
    first, second = (next(iter(optimizer.state.items())) for optimizer in optimizers)
    assert torch.equal(first[1]["exp_avg"], second[1]["exp_avg"])
    assert second[1]["exp_avg"].stride() == second[0].stride() != first[0].stride()


@pytest.mark.slow
def test_a_training_on_a_full_disk_ends_with_one_sentence_and_keeps_what_it_has_saved(tmp_path):
    write_set(tmp_path / "data" / "Train", [(40, 40)])
    arguments = [
        "--model_arch_name", "rcan_x2", "--upscale_factor", "2", "--channels", "16", "--reduction", "4", "--num_rg", "2", "--num_rcab", "2",
        "--train_sets", "Train", "--valid_sets", "--data_root", str(tmp_path / "data"), "--cache_dir", str(tmp_path / "cache"),
        "--lr_patch_size", "8", "--batch_size", "1", "--num_workers", "0", "--save_every", "2", "--keep_last", "100",
        "--epochs", "1", "--steps_per_epoch", "400", "--exp_name", "rcan_x2",
    ]  # fmt: skip
    disk, mount = tmp_path / "disk", shutil.which("mount")
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if not mount or os.name == "nt" or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("no permission to mount a small disk")
    try:
        command = [sys.executable, str(REPOSITORY / "train.py"), *arguments, "--results_dir", str(disk)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith(f"error: {disk / 'rcan_x2'}")
        assert "Traceback" not in done.stderr
        updates = [weights.read(path)["update"] for path in checkpoints.present(disk / "rcan_x2")]  # all of them are whole
        assert len(updates) > 3
        assert updates == sorted(updates, reverse=True)
        assert not list(disk.rglob("*.part"))
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_the_weights_to_test_are_given_or_the_best_or_the_last_or_the_released(tmp_path):
    def found(**settings):
        config = Config(results_dir=str(tmp_path), **settings)
        return checkpoints.weights_to_test(config.model_path, config.experiment_dir, config.exp_name, config.upscale_factor)

    assert found() == (released_weights(4),)
    with pytest.raises(FileNotFoundError, match="typo"):  # a name that was given is not replaced by other weights
        found(exp_name="typo")
    (tmp_path / "rcan_x4").mkdir()
    for name in ("last.pth.tar", "best.pth.tar"):
        (tmp_path / "rcan_x4" / name).touch()
        assert found() == (tmp_path / "rcan_x4" / name,)
    assert found(model_path="w.pth") == (Path("w.pth"),)
    assert found(model_path=("a.pth", "b.pth"), exp_name="typo") == (Path("a.pth"), Path("b.pth"))


def test_a_best_score_counts_while_its_file_and_its_images_are_there(tmp_path):
    last, checkpoint = tmp_path / "last.pth.tar", {"best_psnr": 30.0, "validation": "a"}
    assert "best.pth.tar" in checkpoints.outdated_best(checkpoint, last, tmp_path, "a")  # it was not copied along
    (tmp_path / "best.pth.tar").touch()
    assert checkpoints.outdated_best(checkpoint, last, tmp_path, "a") == ""
    assert "valid_sets" in checkpoints.outdated_best(checkpoint, last, tmp_path, "b")
    assert checkpoints.outdated_best({"best_psnr": 30.0}, last, tmp_path, "b") == ""  # older checkpoints don't tell
    assert checkpoints.outdated_best(checkpoint, tmp_path / "other" / "last.pth.tar", tmp_path, "a")
    assert checkpoints.outdated_best({**checkpoint, "best_psnr": -math.inf}, last, tmp_path, "b") == ""  # there is none


def test_a_run_resumes_with_the_images_that_it_was_started_with(tmp_path):
    now = "5 images of 9 pixels, 0123, content 7"
    for before in (now, "5 images of 9 pixels, 0123"):  # older checkpoints lack the content
        checkpoints.restore({}, {"data": before}, tmp_path / "last.pth.tar", now)
    with pytest.raises(ValueError, match=r"last\.pth\.tar"):
        checkpoints.restore({}, {"data": "5 images of 9 pixels, 0123, content 8"}, tmp_path / "last.pth.tar", now)

"""The store: what the files hold, built once, and again when anything in it or its sources has changed."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

import image_files
import store as store_module
from dataset import EvaluationSet, find_pairs, gt_sizes
from helpers import REPOSITORY, noise_image, write_set
from store import PairStore


def build(tmp_path, folder, scale, **options):
    pairs = find_pairs(folder, scale)
    return PairStore.open_or_build({folder.name: pairs}, scale, "BI", tmp_path / "cache", progress=False, **options)


def test_the_store_holds_what_the_files_hold(tmp_path):
    folder = write_set(tmp_path / "Set", [(25, 38), (64, 40), (33, 57)])
    store = build(tmp_path, folder, 4)
    assert len(store) == 3
    for index, (_, lr, gt) in enumerate(EvaluationSet(find_pairs(folder, 4), 4)):
        assert (store.gt(index) == gt).all()
        assert (store.lr(index) == lr).all()
    with pytest.raises(ValueError, match="read-only"):
        store.gt(0)[0] = 0


def test_a_store_is_used_again(tmp_path):
    folder = write_set(tmp_path / "Set", [(24, 24)] * 3)
    inode = (build(tmp_path, folder, 4).folder / "manifest.json").stat().st_ino
    assert (build(tmp_path, folder, 4).folder / "manifest.json").stat().st_ino == inode


def cut(store):
    os.truncate(store.folder / "gt.bin", 100)


def damage(store):
    data = bytearray((store.folder / "lr.bin").read_bytes())
    data[5] ^= 1
    (store.folder / "lr.bin").write_bytes(data)


def lose_manifest(store):
    (store.folder / "manifest.json").unlink()


def garble_manifest(store):
    (store.folder / "manifest.json").write_text('{"version": 1')


def change_manifest(store):
    (store.folder / "manifest.json").write_text("[1, 2]")


def shorten_manifest(store):
    manifest = json.loads((store.folder / "manifest.json").read_text())
    (store.folder / "manifest.json").write_text(json.dumps({**manifest, "checksums": manifest["checksums"][:1]}))


@pytest.mark.parametrize("harm", [cut, damage, lose_manifest, garble_manifest, change_manifest, shorten_manifest])
def test_a_damaged_store_is_built_again(tmp_path, harm):
    folder = write_set(tmp_path / "Set", [(24, 24)] * 3)
    harm(build(tmp_path, folder, 4))
    store = build(tmp_path, folder, 4)
    for index, (_, lr, gt) in enumerate(EvaluationSet(find_pairs(folder, 4), 4)):
        assert (store.gt(index) == gt).all()
        assert (store.lr(index) == lr).all()


@pytest.mark.parametrize("change", ["content", "added", "removed", "lr"])
def test_a_stale_store_is_built_again(tmp_path, change):
    folder = write_set(tmp_path / "Set", [(24, 24)] * 3)
    build(tmp_path, folder, 4)
    if change == "content":
        image_files.write_image(folder / "GT" / "b.png", noise_image(24, 24, 9))
    if change == "added":
        image_files.write_image(folder / "GT" / "d.png", noise_image(24, 28, 9))
    if change == "removed":
        (folder / "GT" / "a.png").unlink()
    if change == "lr":
        for name in "abc":
            image_files.write_image(folder / "LRbicx4" / f"{name}.png", noise_image(6, 6, 9))
    store, images = build(tmp_path, folder, 4), EvaluationSet(find_pairs(folder, 4), 4)
    assert len(store) == len(images)
    for index, (_, lr, gt) in enumerate(images):
        assert (store.gt(index) == gt).all()
        assert (store.lr(index) == lr).all()


def test_an_interrupted_build_leaves_nothing_that_is_taken_for_a_store(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "Set", [(24, 24)] * 3)
    make_lr = store_module.make_lr

    def fail(pair, *arguments):
        if pair.name == "b":
            raise KeyboardInterrupt
        return make_lr(pair, *arguments)

    monkeypatch.setattr(store_module, "make_lr", fail)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, folder, 4)
    assert not (tmp_path / "cache").exists()
    monkeypatch.undo()
    assert len(build(tmp_path, folder, 4)) == 3


def test_what_a_killed_build_left_is_removed_when_it_is_old(tmp_path):
    folder = write_set(tmp_path / "Set", [(24, 24)])
    store = build(tmp_path, folder, 4)
    old, fresh = (store.folder.with_name(f".{store.folder.name}.{number}.part") for number in (1, 2))
    for left, age in ((old, 3600), (fresh, 0)):
        shutil.copytree(store.folder, left)
        for path in (*left.iterdir(), left):
            os.utime(path, (path.stat().st_mtime - age,) * 2)
    cut(store)
    build(tmp_path, folder, 4)
    assert not old.exists()
    assert fresh.exists()


def test_a_store_that_another_process_has_built_meanwhile_is_kept(tmp_path, monkeypatch):
    """Its files may be in use already."""
    folder = write_set(tmp_path / "Set", [(24, 24)] * 3)
    make_lr, inodes = store_module.make_lr, []

    def while_another_builds(*arguments):
        if not inodes:
            inodes.append(0)
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: 1)
                inodes[0] = (build(tmp_path, folder, 4).folder / "gt.bin").stat().st_ino
        return make_lr(*arguments)

    monkeypatch.setattr(store_module, "make_lr", while_another_builds)
    assert (build(tmp_path, folder, 4).folder / "gt.bin").stat().st_ino == inodes[0]
    assert [path.name[0] for path in (tmp_path / "cache").iterdir()] == ["S"]  # and no leftovers


def test_sizes_that_are_known_are_not_read_again(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "Set", [(25, 38), (64, 40)])
    sizes = gt_sizes(find_pairs(folder, 4), 4)
    monkeypatch.setattr(image_files, "image_size", lambda _: pytest.fail("a header is read again"))
    assert build(tmp_path, folder, 4, sizes=sizes).gt_sizes == sizes


@pytest.mark.slow
def test_two_runs_that_build_at_once_share_one_store(tmp_path):
    folder = write_set(tmp_path / "Set", [(64, 64)] * 20)
    build_it = f"PairStore.open_or_build({{'Set': pairs}}, 4, 'BI', {str(tmp_path / 'cache')!r})"
    code = f"import dataset; from store import PairStore; pairs = dataset.find_pairs({str(folder)!r}, 4); {build_it}"
    builders = [subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [builder.communicate()[1] for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], errors
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_broken_source_is_named_and_nothing_is_left(tmp_path):
    folder = write_set(tmp_path / "Set", [(64, 64)] * 3)
    data = (folder / "GT" / "b.png").read_bytes()
    (folder / "GT" / "b.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"b\.png"):
        build(tmp_path, folder, 4)
    assert not (tmp_path / "cache").exists()


def test_too_little_disk_is_said_before_the_build(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "Set", [(24, 24)])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="cache_dir"):
        build(tmp_path, folder, 4)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_needs_little_memory_of_its_own(tmp_path):
    """A store of 1.6 GB is read through in a forked worker; what the worker has for itself stays far below."""
    code = f"""
import dataset, os, pathlib
from store import PairStore
folder, sizes = pathlib.Path({str(tmp_path)!r}), [(8000, 8000)] * 8
store = PairStore(folder, sizes, 4)
for file, size in (("gt.bin", 8 * 8000 * 8000 * 3), ("lr.bin", 8 * 2000 * 2000 * 3)):
    with open(folder / file, "wb") as empty:
        empty.truncate(size)
if os.fork():
    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
batches = dataset.TrainBatches(store, 16, 48, 0)
for update in range(50):
    batches[update]
sum(int(store.gt(i).sum()) for i in range(8))
lines = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()
print(sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Swap:"))), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 100 * 1024  # KiB


def test_the_manifest_can_be_read_by_people(tmp_path):
    store = build(tmp_path, write_set(tmp_path / "Set", [(24, 30)]), 2)
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert manifest["gt_sizes"] == [[24, 30]]
    assert manifest["sources"][0][0] == "a"
    assert manifest["degradation"] == "BI"

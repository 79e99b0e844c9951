"""The decode-once store: what the files hold, built again when anything has changed, and never half of one."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import dataset
import image_files
import imgproc
import store
import train
from config import Config
from dataset import EvaluationSet, TrainBatches, find_pairs, gt_sizes
from helpers import REPOSITORY, noise_image, write_set
from runs import small_runs
from store import PairStore


def build(folder, scale=4, **changes):
    sets = {folder.name: find_pairs(folder, scale)}
    return PairStore.open_or_build(sets, scale, "BI", folder.parent / "cache", progress=False, **changes)


def assert_right(found, folder, scale=4):
    """The store holds what reading and degrading the set gives."""
    images = EvaluationSet(find_pairs(folder, scale), scale)
    assert len(found) == len(images)
    for index, (_, lr, gt) in enumerate(images):
        assert (found.gt(index) == gt).all()
        assert (found.lr(index) == lr).all()


def only_store(folder):
    """The one entry of the cache, which is no leftover."""
    (path,) = (folder.parent / "cache").iterdir()
    assert not path.name.startswith(".")
    return path


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "Set", [(25, 38), (64, 40), (33, 57)])


def test_it_holds_what_the_files_hold_and_is_used_again(folder):
    found = build(folder)
    assert_right(found, folder)
    with pytest.raises(ValueError, match="read-only"):
        found.gt(0)[0] = 0
    manifest = json.loads((found.folder / "manifest.json").read_text())
    assert (manifest["degradation"], manifest["gt_sizes"]) == ("BI", [[24, 36], [64, 40], [32, 56]])
    assert [source[0] for source in manifest["sources"]] == ["a", "b", "c"]
    assert found.names == ["a.png", "b.png", "c.png"]
    before = {path: path.stat().st_ino for path in found.folder.iterdir()}
    again = build(folder)
    assert {path: path.stat().st_ino for path in again.folder.iterdir()} == before
    assert_right(again, folder)


def test_other_folders_scales_and_degradations_have_stores_of_their_own(tmp_path):
    for name in ("one", "two"):
        write_set(tmp_path / name / "Set", [(24, 24)], seed=ord(name[0]))
    for place, scale, degradation in (("one", 2, "BI"), ("two", 2, "BI"), ("one", 3, "BI"), ("one", 3, "BD"), ("one", 3, "DN")):
        sets = {"Set": find_pairs(tmp_path / place / "Set", scale, degradation)}
        found = PairStore.open_or_build(sets, scale, degradation, tmp_path / "cache", progress=False)
        ((_, lr, gt),) = EvaluationSet(sets["Set"], scale, degradation)
        assert (found.gt(0) == gt).all()
        assert (found.lr(0) == lr).all()
    assert len(list((tmp_path / "cache").iterdir())) == 5


@pytest.mark.parametrize("harm", ["cut", "gone", "flipped", "no manifest", "half a manifest", "a list", "fewer checksums"])
def test_a_damaged_store_is_built_again(folder, harm):
    path = build(folder).folder
    manifest, pixels = path / "manifest.json", path / "lr.bin"
    content, data = manifest.read_text(), pixels.read_bytes()
    fewer = {**json.loads(content), "checksums": json.loads(content)["checksums"][:1]}
    changed = {"half a manifest": content[:30], "a list": "[1, 2]", "fewer checksums": json.dumps(fewer)}
    if harm in ("gone", "no manifest"):
        (pixels if harm == "gone" else manifest).unlink()
    elif harm in changed:
        manifest.write_text(changed[harm])
    else:
        pixels.write_bytes(data[:100] if harm == "cut" else data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    assert_right(build(folder), folder)
    assert only_store(folder) == path
    assert pixels.read_bytes() == data


@pytest.mark.parametrize("change", ["content", "added", "removed", "lr"])
def test_a_store_of_other_sources_is_built_again(folder, change):
    build(folder)
    if change == "content":
        image_files.write_image(folder / "GT" / "b.png", noise_image(64, 40, 9))
    if change == "added":
        image_files.write_image(folder / "GT" / "d.png", noise_image(24, 28, 9))
    if change == "removed":
        (folder / "GT" / "a.png").unlink()
    if change == "lr":
        for pair, (height, width) in zip(find_pairs(folder, 4), gt_sizes(find_pairs(folder, 4), 4), strict=True):
            image_files.write_image(folder / "LRbicx4" / f"{pair.name}.png", noise_image(height // 4, width // 4, 9))
    assert_right(build(folder), folder)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ValueError("b.png: damaged"), MemoryError()], ids=lambda error: type(error).__name__
)
def test_a_build_that_ends_early_leaves_nothing(folder, monkeypatch, error):
    read = image_files.read_image

    def fail(path, **options):
        if path.name == "b.png":
            raise error
        return read(path, **options)

    with monkeypatch.context() as patch, pytest.raises(type(error)) as caught:
        patch.setattr(image_files, "read_image", fail)
        build(folder)
    assert caught.value is error
    assert not (folder.parent / "cache").exists()
    assert_right(build(folder), folder)


def test_a_store_that_another_process_has_built_meanwhile_is_kept(folder, monkeypatch):
    """… as that process may be using it; only a damaged one is replaced."""
    read, before = image_files.read_image, {}

    def another_builds_first(path, **options):
        with monkeypatch.context() as patch:
            patch.setattr(image_files, "read_image", read)
            if not before:
                before[0] = 0
                before.update((each, each.stat().st_ino) for each in build(folder).folder.iterdir())
        return read(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "cores", lambda: 1)
        patch.setattr(image_files, "read_image", another_builds_first)
        found = build(folder)
    assert {0: 0, **{path: path.stat().st_ino for path in only_store(folder).iterdir()}} == before
    assert_right(found, folder)


def test_what_killed_builds_left_is_removed_when_it_is_old(folder):
    path = build(folder).folder
    old, fresh, other = (path.with_name(f".{name}.1.part") for name in (f"{path.name}.7", path.name, "Other"))
    for left, age in ((old, 3600), (fresh, 0), (other, 3600)):
        shutil.copytree(path, left)
        for each in (*left.iterdir(), left):
            os.utime(each, (time.time() - age,) * 2)
    (path / "manifest.json").unlink()
    assert_right(build(folder), folder)
    assert [each.exists() for each in (old, fresh, other)] == [False, True, True]


def test_a_file_that_changes_while_it_is_read_and_a_full_disk_are_named(folder, monkeypatch):
    with pytest.raises(ValueError, match=r"b\.png"):
        build(folder, sizes=[(24, 36), (64, 44), (32, 56)])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=str(folder.parent / "cache")):
        build(folder)
    assert not (folder.parent / "cache").exists()


def test_preparing_a_run_reads_each_header_and_each_image_once(tmp_path, monkeypatch):
    calls = {name: Counter() for name in ("image_size", "read_image")}
    for name, paths in calls.items():
        real = getattr(image_files, name)
        monkeypatch.setattr(image_files, name, lambda path, real=real, paths=paths, **given: paths.update([path]) or real(path, **given))
    config = small_runs(Config, tmp_path)()
    train.prepare(config)
    gt = sorted((tmp_path / "data").rglob("*.png"))
    assert calls["image_size"] == calls["read_image"] == dict.fromkeys(gt, 1)
    train.prepare(config)  # finds the store
    assert calls["image_size"] == dict.fromkeys(gt, 2)
    assert calls["read_image"] == {path: 1 + ("Valid" in path.parts) for path in gt}


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_lr_is_made_on_the_whole_image(tmp_path, scale):
    """Away from a crop's edge, degrading the GT crop gives the LR crop; the phase is right at every scale."""
    found = build(write_set(tmp_path / "Set", [(200, 190)] * 3), scale)
    batch, borders = TrainBatches(found, 50, 20, 0)[0], []
    for lr, gt in zip(batch["lr"].numpy(), batch["gt"].numpy(), strict=True):
        difference = abs(imgproc.degrade(gt, scale).astype(int) - lr)
        assert difference[3:-3, 3:-3].max() <= 1
        borders.append(difference.max())
    assert max(borders) > 1  # where a crop does not know its surroundings


def test_pixels_of_a_large_store_are_checked_in_part(folder, monkeypatch):
    """Opening takes a second at most; the first image is always among those that are checked."""
    path = build(folder).folder
    data = np.fromfile(path / "gt.bin", np.uint8)
    monkeypatch.setattr(store, "_CHECKED_BYTES", 1)
    data[-1] ^= 1
    data.tofile(path / "gt.bin")
    assert build(folder).gt(2)[-1, -1, -1] == data[-1]
    data[0] ^= 1
    data.tofile(path / "gt.bin")
    assert_right(build(folder), folder)


# In processes


def start(folder, **options):
    code = f"import dataset, store, pathlib; pairs = dataset.find_pairs({str(folder)!r}, 4); " + (
        f"store.PairStore.open_or_build({{'Set': pairs}}, 4, 'BI', {str(folder.parent / 'cache')!r}, progress=False)"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stderr=subprocess.PIPE, **options)


@pytest.mark.slow
def test_two_runs_that_build_at_once_share_one_store(tmp_path):
    folder = write_set(tmp_path / "Set", [(64, 64)] * 20)
    builders = [start(folder) for _ in range(2)]
    errors = [builder.communicate()[1] for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], errors
    only_store(folder)
    assert_right(build(folder), folder)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_build_that_is_killed_is_done_again_from_what_is_there_then(tmp_path):
    folder = write_set(tmp_path / "Set", [(300, 300)] * 100)
    builder = start(folder)
    while not list(folder.parent.glob("cache/.*")) and builder.poll() is None:
        time.sleep(0.001)
    builder.kill()
    builder.communicate()
    (left,) = (folder.parent / "cache").iterdir()
    assert left.suffix == ".part"
    image_files.write_image(folder / "GT" / "a.png", noise_image(300, 300))
    assert_right(build(folder), folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_needs_little_memory_of_its_own(tmp_path):
    """A store of 1.6 GB is read through in a forked worker; what the worker has for itself stays far below."""
    code = f"""
import dataset, os, pathlib
from store import PairStore
folder, sizes = pathlib.Path({str(tmp_path)!r}), [(8000, 8000)] * 8
(folder / "manifest.json").write_text('{{"checksums": []}}')
store = PairStore(folder, sizes, 4)
for file, side in (("gt.bin", 8000), ("lr.bin", 2000)):
    with open(folder / file, "wb") as empty:
        empty.truncate(8 * side * side * 3)
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

"""Data on its way: pairs, the store, batches that show the same in lr and gt, prefetchers."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dataset
import image_files
import imgproc
from dataset import EvaluationSet, TrainBatches, find_pairs, fit_to_patch, gt_sizes
from helpers import REPOSITORY, drawn_image, noise_image, write_set
from store import PairStore


def enlarged(lr, scale):
    """Each LR pixel as a block, so that every crop and turn can be compared exactly."""
    return lr.repeat(scale, 0).repeat(scale, 1)


def build(tmp_path, folder, scale, **kw):
    pairs = find_pairs(folder, scale)
    return PairStore.open_or_build({folder.name: pairs}, scale, "BI", tmp_path / "cache", progress=False, **kw)


@pytest.fixture
def blocks(tmp_path):
    """Set folders, by scale, of three random LR images and their enlargements."""

    def make(scale):
        folder = tmp_path / f"Blocks{scale}"
        for index, (height, width) in enumerate([(13, 20), (16, 11), (25, 14)]):
            lr = noise_image(height, width, index)
            image_files.write_image(folder / f"LRbicx{scale}" / f"{index}.png", lr)
            image_files.write_image(folder / "GT" / f"{index}.png", enlarged(lr, scale))
        return folder

    return make


# Pairs


@pytest.mark.parametrize(
    ("gt", "lr", "scale", "name"),
    [
        ("GT/a.png", "LRbicx4/a.png", 4, "a"),
        ("GTmod12/a.png", "LRbicx3/a.jpg", 3, "a"),
        ("HR/a.png", "LR_bicubic/X2/ax2.png", 2, "a"),
        ("image_SRF_4/img_001_SRF_4_HR.png", "image_SRF_4/img_001_SRF_4_LR.png", 4, "img_001"),
        ("a.png", None, 4, "a"),
        ("GT/a.png", "LRbicx3/other.png", 4, "a"),
    ],
)
def test_the_folders_that_people_have_are_found(tmp_path, gt, lr, scale, name):
    image_files.write_image(tmp_path / gt, noise_image(24, 36))
    if lr:
        image_files.write_image(tmp_path / lr, noise_image(24 // scale, 36 // scale))
    used = tmp_path / lr if lr and "other" not in lr else None
    assert find_pairs(tmp_path, scale) == [dataset.Pair(name, tmp_path / gt, used)]
    assert gt_sizes(find_pairs(tmp_path, scale), scale) == [(24, 36)]


def test_originals_of_any_size_are_cropped(tmp_path):
    write_set(tmp_path, [(25, 38), (31, 29)])
    assert gt_sizes(find_pairs(tmp_path, 4), 4) == [(24, 36), (28, 28)]


def test_missing_and_empty_folders_are_named(tmp_path):
    (tmp_path / "Empty").mkdir()
    for name, problem in (("Empty", "no image is in it"), ("Gone", "no such folder")):
        with pytest.raises(FileNotFoundError, match=f"{tmp_path / name}: {problem}; put the originals into {tmp_path / name / 'GT'}"):
            find_pairs(tmp_path / name, 4)


@pytest.mark.parametrize(("extra", "culprit"), [("GT/b.png", "b.png"), ("LRbicx2/c.png", "c.png")])
def test_a_file_without_partner_is_named(tmp_path, extra, culprit):
    for path, size in (("GT/a.png", 8), ("LRbicx2/a.png", 4), (extra, 4)):
        image_files.write_image(tmp_path / path, noise_image(size, size))
    with pytest.raises(ValueError, match=rf"{culprit}: has no partner in .*{'LRbicx2' if 'GT' in extra else 'GT'}"):
        find_pairs(tmp_path, 2)


def test_two_files_of_one_name_and_a_mis_sized_lr_are_named(tmp_path):
    image_files.write_image(tmp_path / "GT" / "a.png", noise_image(24, 36))
    image_files.write_image(tmp_path / "LRbicx4" / "a.png", noise_image(5, 9))
    with pytest.raises(ValueError, match=r"a\.png: lr is 9x5, but gt 36x24 at x4 needs 9x6"):
        gt_sizes(find_pairs(tmp_path, 4), 4)
    image_files.write_image(tmp_path / "GT" / "a.jpg", noise_image(24, 36))
    with pytest.raises(ValueError, match="has the same name as"):
        find_pairs(tmp_path, 4)


def test_images_smaller_than_a_patch_are_refused_or_skipped(tmp_path):
    pairs = find_pairs(write_set(tmp_path, [(40, 40), (30, 50), (33, 33)]), 2)
    sizes = gt_sizes(pairs, 2)
    with pytest.raises(ValueError, match=r"b\.png: 50x30 is smaller than a GT patch of 32, as are 1 of 3 images: .*small_images='skip'"):
        fit_to_patch(pairs, sizes, 32)
    assert fit_to_patch(pairs, sizes, 32, "skip").tolist() == [0, 2]
    with pytest.raises(ValueError, match=r"3 of 3 images: set a smaller lr_patch_size$"):
        fit_to_patch(pairs, sizes, 64, "skip")


@pytest.mark.parametrize("lr_name", ["matrix4", "matrix4x4"])
def test_names_that_end_like_a_scale_stay_whole(tmp_path, lr_name):
    image_files.write_image(tmp_path / "GT" / "matrix4.png", noise_image(24, 24))
    image_files.write_image(tmp_path / "LRbicx4" / f"{lr_name}.png", noise_image(6, 6))
    assert [(pair.name, pair.lr.stem) for pair in find_pairs(tmp_path, 4)] == [("matrix4", lr_name)]


def test_scored_pictures_are_decoded_first_by_one_process_of_a_machine(tmp_path):
    write_set(tmp_path / "Set", [(40, 44), (40, 44)])
    path = sorted((tmp_path / "Set" / "GT").iterdir())[1]
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=rf"{path.name}: the image is damaged or cut off"):
        dataset.open_test_sets(tmp_path, ["Set"], 2)
    assert len(dataset.open_test_sets(tmp_path, ["Set"], 2, decode=False)["Set"]) == 2


def test_test_sets_are_checked_before_the_first_is_scored(tmp_path):
    write_set(tmp_path / "a" / "Set", [(24, 24)])
    write_set(tmp_path / "b" / "Set", [(24, 18)])
    assert list(dataset.open_test_sets(tmp_path, ["a/Set"], 4)) == ["Set"]
    with pytest.raises(ValueError, match="another set is called 'Set' too"):
        dataset.open_test_sets(tmp_path, ["a/Set", "b/Set"], 2)
    with pytest.raises(ValueError, match=r"a\.png: 16x24 is too small to be scored: .* needs 19"):
        dataset.open_test_sets(tmp_path, ["b/Set"], 4)


def test_what_a_person_is_told(tmp_path):
    text = dataset.describe_pairs("train", "Mine", find_pairs(write_set(tmp_path, [(8, 8)] * 4), 2))
    assert text == f"train Mine: 4 images in {tmp_path / 'GT'}, LR made exactly from the originals\n    a.png, b.png, c.png, …"


def test_test_images_are_cropped_and_made_or_read(tmp_path, blocks):
    write_set(tmp_path / "Set", [(25, 38)])
    [(name, lr, gt)] = EvaluationSet(find_pairs(tmp_path / "Set", 4), 4)
    assert name == "a"
    assert (gt == drawn_image(25, 38)[:24, :36]).all()
    assert (lr == imgproc.degrade(gt, 4)).all()
    for name, lr, gt in EvaluationSet(find_pairs(blocks(3), 3), 3):
        assert (gt == enlarged(lr, 3)).all(), name


def test_noise_differs_between_pictures_and_not_between_runs(tmp_path):
    for name in "ab":
        image_files.write_image(tmp_path / "GT" / f"{name}.png", drawn_image(24, 24))
    first, second = (lr for _, lr, _ in EvaluationSet(find_pairs(tmp_path, 2, "DN"), 2, "DN"))
    assert (first != second).any()
    assert (first == EvaluationSet(find_pairs(tmp_path, 2, "DN"), 2, "DN")[0][1]).all()


# The store


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
    make_lr = dataset.make_lr

    def fail(pair, *arguments):
        if pair.name == "b":
            raise KeyboardInterrupt
        return make_lr(pair, *arguments)

    monkeypatch.setattr(dataset, "make_lr", fail)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, folder, 4)
    assert not (tmp_path / "cache").exists()
    monkeypatch.undo()
    assert len(build(tmp_path, folder, 4)) == 3


def test_what_a_killed_build_left_is_removed_when_it_is_old(tmp_path):
    folder = write_set(tmp_path / "Set", [(24, 24)])
    store = build(tmp_path, folder, 4)
    old, fresh = (store.folder.with_name(f"{store.folder.name}.building-{number}") for number in (1, 2))
    for left, age in ((old, 3600), (fresh, 0)):
        shutil.copytree(store.folder, left)
        for path in (*left.iterdir(), left):
            os.utime(path, (path.stat().st_mtime - age,) * 2)
    cut(store)
    build(tmp_path, folder, 4)
    assert not old.exists()
    assert fresh.exists()


def test_two_runs_that_build_at_once_share_one_store(tmp_path):
    folder = write_set(tmp_path / "Set", [(64, 64)] * 20)
    build_it = f"PairStore.open_or_build({{'Set': pairs}}, 4, 'BI', {str(tmp_path / 'cache')!r})"
    code = f"import dataset; pairs = dataset.find_pairs({str(folder)!r}, 4); {build_it}"
    builders = [subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [builder.communicate()[1] for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], errors
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_broken_source_is_named_and_nothing_is_left(tmp_path):
    folder = write_set(tmp_path / "Set", [(64, 64)] * 3)
    data = (folder / "GT" / "b.png").read_bytes()
    (folder / "GT" / "b.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"b\.png: the image is damaged or cut off"):
        build(tmp_path, folder, 4)
    assert not (tmp_path / "cache").exists()


def test_too_little_disk_is_said_before_the_build(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "Set", [(24, 24)])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"decoded images need .* GiB, but .* GiB are free; make room, or set cache_dir"):
        build(tmp_path, folder, 4)
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_needs_little_memory_of_its_own(tmp_path):
    """A store of 1.6 GB is read through in a forked worker; what the worker has for itself stays far below."""
    code = f"""
import dataset, os, pathlib
from store import PairStore
import image_files
folder, sizes = pathlib.Path({str(tmp_path)!r}), [(8000, 8000)] * 8
store = PairStore(folder, sizes, 4)
for file, starts in (("gt.bin", store._gt_starts), ("lr.bin", store._lr_starts)):
    with open(folder / file, "wb") as empty:
        empty.truncate(int(starts[-1]))
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


# Batches


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_lr_and_gt_show_the_same_through_every_augmentation(tmp_path, blocks, scale):
    store = build(tmp_path, blocks(scale), scale)
    batches = TrainBatches(store, batch_size=16, lr_patch_size=7, seed=0)
    seen, corners = set(), set()
    for update in range(40):
        batch = batches[update]
        for lr, gt in zip(batch["lr"].numpy(), batch["gt"].numpy(), strict=True):
            assert lr.shape == (7, 7, 3)
            assert (gt == enlarged(lr, scale)).all()
            found = origin(store, lr)
            seen.add(found[:2])
            corners.add((found[0], *found[2:]))
    assert seen == {(image, orientation) for image in range(3) for orientation in range(8)}
    for image, (height, width) in enumerate(store.lr_sizes):  # places reach from edge to edge
        tops, lefts = zip(*((top, left) for which, top, left in corners if which == image), strict=True)
        assert (min(tops), max(tops), min(lefts), max(lefts)) == (0, height - 7, 0, width - 7)


def origin(store, lr):
    """(image, orientation, top, left) of a patch in a store of random pictures."""
    for image in range(len(store)):
        windows = np.lib.stride_tricks.sliding_window_view(store.lr(image), lr.shape)[:, :, 0]
        for orientation in range(8):
            turned = np.array([imgproc.flip_rotate(window.copy(), orientation)[0, 0] for window in windows.reshape(-1, *lr.shape)])
            for place in np.flatnonzero((turned == lr[0, 0]).all(1)):
                top, left = divmod(int(place), windows.shape[1])
                if (imgproc.flip_rotate(windows[top, left].copy(), orientation) == lr).all():
                    return image, orientation, top, left
    raise AssertionError("the patch is not in the store")


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_lr_is_made_on_the_whole_image(tmp_path, scale):
    """Away from the crop's edge, degrading the gt crop gives the lr crop; the phase is right at every scale."""
    store = build(tmp_path, write_set(tmp_path / "Set", [(200, 190)] * 3), scale)
    batch, borders = TrainBatches(store, 50, 20, 0)[0], []
    for lr, gt in zip(batch["lr"].numpy(), batch["gt"].numpy(), strict=True):
        by_crop = imgproc.degrade(gt, scale).astype(int)
        assert abs(by_crop[3:-3, 3:-3] - lr[3:-3, 3:-3]).max() <= 1
        borders.append(abs(by_crop - lr)[:, 0].max())
    assert max(borders) > 1  # where a crop would not know its surroundings


def test_every_image_is_seen_once_before_any_is_seen_again(tmp_path):
    store = build(tmp_path, write_set(tmp_path / "Set", [(24, 24)] * 7), 2)
    batches = TrainBatches(store, 4, 12, 0, usable=np.array([0, 2, 3, 5, 6]))
    drawn = [image for update in range(10) for image in batches._images(update)]
    passes = [tuple(drawn[start : start + 5]) for start in range(0, 40, 5)]
    assert all(sorted(images) == [0, 2, 3, 5, 6] for images in passes)
    assert len(set(passes)) > 3


def test_a_set_of_one_image_fills_a_batch(tmp_path):
    store = build(tmp_path, write_set(tmp_path / "Set", [(24, 24)]), 2)
    assert TrainBatches(store, 16, 12, 0)[0]["gt"].shape == (16, 24, 24, 3)


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in ("lr", "gt"))


def test_batches_depend_on_seed_and_update_alone(tmp_path):
    store = build(tmp_path, write_set(tmp_path / "Set", [(40, 40)] * 5), 2)
    batches = TrainBatches(store, 4, 12, seed=3)
    assert same(batches[7], TrainBatches(store, 4, 12, seed=3)[7])
    assert not same(batches[7], batches[8])
    assert not same(batches[7], TrainBatches(store, 4, 12, seed=4)[7])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_change_nothing(tmp_path, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    store = build(tmp_path, write_set(tmp_path / "Set", [(40, 40)] * 5), 2)
    batches = TrainBatches(store, 4, 12, seed=3)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(2, 8), num_workers=2, multiprocessing_context=method)
    found = list(loader)
    assert len(found) == 6
    assert all(same(batch, batches[update]) for update, batch in enumerate(found, 2))


def test_shares_of_processes_make_the_whole_batch(tmp_path):
    store = build(tmp_path, write_set(tmp_path / "Set", [(40, 40)] * 5), 2)
    shares = [TrainBatches(store, 6, 12, 0, rank=rank, world_size=3)[4] for rank in range(3)]
    whole = TrainBatches(store, 6, 12, 0)[4]
    assert same({name: torch.cat([share[name] for share in shares]) for name in whole}, whole)
    with pytest.raises(ValueError, match="batch_size=6 can't be shared by 4 processes"):
        TrainBatches(store, 6, 12, 0, world_size=4)


# Prefetchers


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])
def test_prefetchers_give_floats_in_order_and_end(tmp_path, device, channels_last):
    store = build(tmp_path, write_set(tmp_path / "Set", [(40, 40)] * 5), 2)
    batches, device = TrainBatches(store, 4, 12, 0), torch.device(device)
    feed = dataset.prefetch(dataset.load(batches, 3, 6, 1, pin_memory=device.type == "cuda"), device, channels_last)
    assert iter(feed) is feed
    for update in range(3, 6):
        batch = next(feed)
        for name, size in (("lr", 12), ("gt", 24)):
            assert batch[name].shape == (4, 3, size, size)
            assert batch[name].dtype == torch.float32
            assert batch[name].device.type == device.type
            assert batch[name].is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            assert torch.allclose(batch[name].cpu(), batches[update][name].permute(0, 3, 1, 2) / 255, rtol=1e-6)
    with pytest.raises(StopIteration):
        next(feed)


def test_the_manifest_can_be_read_by_people(tmp_path):
    store = build(tmp_path, write_set(tmp_path / "Set", [(24, 30)]), 2)
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert manifest["gt_sizes"] == [[24, 30]]
    assert manifest["sources"][0][0] == "a"
    assert manifest["degradation"] == "BI"

"""Image sets, pairs, evaluation sets, batches that show the same in lr and gt, prefetchers."""

import multiprocessing

import numpy as np
import pytest
import torch

import dataset
import image_files
import imgproc
from dataset import EvaluationSet, TrainBatches, find_pairs, fit_to_patch, gt_sizes
from helpers import drawn_image, noise_image, write_set
from store import PairStore


def enlarged(lr, scale):
    """Each LR pixel as a block, so that every crop and rotation can be compared exactly."""
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


def test_gt_images_of_any_size_are_cropped(tmp_path):
    write_set(tmp_path, [(25, 38), (31, 29)])
    assert gt_sizes(find_pairs(tmp_path, 4), 4) == [(24, 36), (28, 28)]


def test_missing_and_empty_folders_are_named(tmp_path):
    (tmp_path / "Empty").mkdir()
    for name in ("Empty", "Gone"):
        with pytest.raises(FileNotFoundError, match=str(tmp_path / name / "GT")):
            find_pairs(tmp_path / name, 4)


@pytest.mark.parametrize(("extra", "culprit"), [("GT/b.png", "b.png"), ("LRbicx2/c.png", "c.png")])
def test_a_file_without_partner_is_named(tmp_path, extra, culprit):
    for path, size in (("GT/a.png", 8), ("LRbicx2/a.png", 4), (extra, 4)):
        image_files.write_image(tmp_path / path, noise_image(size, size))
    with pytest.raises(ValueError, match=rf"{culprit}.*{'LRbicx2' if 'GT' in extra else 'GT'}"):
        find_pairs(tmp_path, 2)


def test_two_files_of_one_name_and_a_mis_sized_lr_are_named(tmp_path):
    image_files.write_image(tmp_path / "GT" / "a.png", noise_image(24, 36))
    image_files.write_image(tmp_path / "LRbicx4" / "a.png", noise_image(5, 9))
    with pytest.raises(ValueError, match=r"a\.png.* 9x5.* 36x24.* 9x6"):
        gt_sizes(find_pairs(tmp_path, 4), 4)
    image_files.write_image(tmp_path / "GT" / "a.jpg", noise_image(24, 36))
    with pytest.raises(ValueError, match=r"a\.png.*a\.jpg"):
        find_pairs(tmp_path, 4)


def test_images_smaller_than_a_patch_are_refused_or_skipped(tmp_path):
    pairs = find_pairs(write_set(tmp_path, [(40, 40), (30, 50), (33, 33)]), 2)
    sizes = gt_sizes(pairs, 2)
    with pytest.raises(ValueError, match=r"b\.png.* 50x30.* 32.* 1 of 3 .*small_images"):
        fit_to_patch(pairs, sizes, 32)
    assert fit_to_patch(pairs, sizes, 32, "skip").tolist() == [0, 2]
    with pytest.raises(ValueError, match=r"3 of 3 .*lr_patch_size"):
        fit_to_patch(pairs, sizes, 64, "skip")


@pytest.mark.parametrize("lr_name", ["matrix4", "matrix4x4"])
def test_names_that_end_like_a_scale_stay_whole(tmp_path, lr_name):
    image_files.write_image(tmp_path / "GT" / "matrix4.png", noise_image(24, 24))
    image_files.write_image(tmp_path / "LRbicx4" / f"{lr_name}.png", noise_image(6, 6))
    assert [(pair.name, pair.lr.stem) for pair in find_pairs(tmp_path, 4)] == [("matrix4", lr_name)]


def test_scored_images_are_decoded_first_by_one_process_of_a_machine(tmp_path):
    write_set(tmp_path / "Set", [(40, 44), (40, 44)])
    path = sorted((tmp_path / "Set" / "GT").iterdir())[1]
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=path.name):
        dataset.open_test_sets(tmp_path, ["Set"], 2)
    assert len(dataset.open_test_sets(tmp_path, ["Set"], 2, decode=False)["Set"]) == 2


def test_test_sets_are_checked_before_the_first_is_scored(tmp_path):
    write_set(tmp_path / "a" / "Set", [(24, 24)])
    write_set(tmp_path / "b" / "Set", [(24, 18)])
    assert list(dataset.open_test_sets(tmp_path, ["a/Set"], 4)) == ["Set"]
    with pytest.raises(ValueError, match="'Set'"):
        dataset.open_test_sets(tmp_path, ["a/Set", "b/Set"], 2)
    with pytest.raises(ValueError, match=r"a\.png.* 16x24.* 19"):
        dataset.open_test_sets(tmp_path, ["b/Set"], 4)


def test_the_summary_of_a_set_names_folder_number_and_first_images(tmp_path):
    text = dataset.describe_pairs("train", "Mine", find_pairs(write_set(tmp_path, [(8, 8)] * 4), 2))
    assert all(part in text for part in ("train", "Mine", "4 images", str(tmp_path / "GT"), "a.png", "c.png"))
    assert "d.png" not in text


def test_test_images_are_cropped_and_made_or_read(tmp_path, blocks):
    write_set(tmp_path / "Set", [(25, 38)])
    [(name, lr, gt)] = EvaluationSet(find_pairs(tmp_path / "Set", 4), 4)
    assert name == "a"
    assert (gt == drawn_image(25, 38)[:24, :36]).all()
    assert (lr == imgproc.degrade(gt, 4)).all()
    for name, lr, gt in EvaluationSet(find_pairs(blocks(3), 3), 3):
        assert (gt == enlarged(lr, 3)).all(), name


@pytest.mark.parametrize("room", [10**9, 6000, 0])
def test_images_are_decoded_once_where_memory_allows(tmp_path, monkeypatch, room):
    """Two GT images of 40x44 are 5280 bytes each."""
    write_set(tmp_path / "Set", [(40, 44), (40, 44)])
    read, decoded = image_files.read_image, []
    monkeypatch.setattr(image_files, "read_image", lambda path: decoded.append(path.name) or read(path))
    monkeypatch.setattr(EvaluationSet, "KEPT_BYTES", room)
    images = dataset.open_test_sets(tmp_path, ["Set"], 2)["Set"]
    evaluations = [[images[index] for index in range(2)] for _ in range(2)]
    assert len(decoded) == {10**9: 2, 6000: 4, 0: 6}[room]
    for (name, lr, gt), again in zip(*evaluations, strict=True):
        assert name == again[0]
        assert (lr == again[1]).all()
        assert (gt == again[2]).all()


def test_noise_differs_between_images_and_not_between_runs(tmp_path):
    for name in "ab":
        image_files.write_image(tmp_path / "GT" / f"{name}.png", drawn_image(24, 24))
    first, second = (lr for _, lr, _ in EvaluationSet(find_pairs(tmp_path, 2, "DN"), 2, "DN"))
    assert (first != second).any()
    assert (first == EvaluationSet(find_pairs(tmp_path, 2, "DN"), 2, "DN")[0][1]).all()


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
    """(image, orientation, top, left) of a patch in a store of random images."""
    for image in range(len(store)):
        windows = np.lib.stride_tricks.sliding_window_view(store.lr(image), lr.shape)[:, :, 0]
        for orientation in range(8):
            rotated = np.array([imgproc.flip_rotate(window.copy(), orientation)[0, 0] for window in windows.reshape(-1, *lr.shape)])
            for place in np.flatnonzero((rotated == lr[0, 0]).all(1)):
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
    drawn = [ord(name[0]) - ord("a") for update in range(10) for name in batches.names(update)]
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


@pytest.mark.slow
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
    with pytest.raises(ValueError, match=r"batch_size=6.* 4 "):
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

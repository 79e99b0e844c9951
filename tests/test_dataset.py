"""Image sets, pairs by name, evaluation images, batches that show the same in LR and GT, prefetchers."""

import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dataset
import image_files
import imgproc
from dataset import EvaluationSet, TrainBatches, find_pairs, fit_to_patch, gt_sizes
from helpers import drawn_image, noise_image, write_set
from runtime import Interrupted, StopRequest


def write(path, height, width):
    image_files.write_image(path, noise_image(height, width))


# Pairs


@pytest.mark.parametrize(
    ("gt", "lr", "scale", "name"),
    [
        ("GT/a.png", "LRbicx4/a.png", 4, "a"),
        ("GTmod12/a.png", "LRbicx3/a.jpg", 3, "a"),
        ("HR/a.png", "LR_bicubic/X2/ax2.png", 2, "a"),
        ("image_SRF_4/img_001_SRF_4_HR.png", "image_SRF_4/img_001_SRF_4_LR.png", 4, "img_001"),
        ("a.png", None, 4, "a"),
        ("GT/matrix4.png", "LRbicx4/matrix4.png", 4, "matrix4"),  # a name that ends like a scale stays whole
        ("GT/matrix4.png", "LRbicx4/matrix4x4.png", 4, "matrix4"),
    ],
)
def test_the_folders_that_people_have_are_found(tmp_path, gt, lr, scale, name):
    write(tmp_path / gt, 24, 36)
    write(tmp_path / "LRbicx8" / "other.png", 3, 3)  # of another scale
    if lr:
        write(tmp_path / lr, 24 // scale, 36 // scale)
    assert find_pairs(tmp_path, scale) == [dataset.Pair(name, tmp_path / gt, tmp_path / lr if lr else None)]
    assert gt_sizes(find_pairs(tmp_path, scale), scale) == [(24, 36)]


@pytest.mark.parametrize("degradation", ["BI", "BD", "DN"])
def test_lr_images_are_those_of_the_degradation_and_pair_by_name(tmp_path, degradation):
    for name in ("b", "a"):
        write(tmp_path / "GT" / f"{name}.png", 24, 24)
        for folder in ("LRbicx3", "LRBDx3", "LRDNx3"):
            write(tmp_path / folder / f"{name}x3.png", 8, 8)
    folder = tmp_path / {"BI": "LRbicx3", "BD": "LRBDx3", "DN": "LRDNx3"}[degradation]
    expected = [dataset.Pair(name, tmp_path / "GT" / f"{name}.png", folder / f"{name}x3.png") for name in ("a", "b")]
    assert find_pairs(tmp_path, 3, degradation) == expected


def test_what_cannot_be_paired_is_named(tmp_path):
    (tmp_path / "Empty").mkdir()
    (tmp_path / "File").touch()
    for name in ("Empty", "Gone", "File"):
        with pytest.raises(FileNotFoundError, match=str(tmp_path / name / "GT")):
            find_pairs(tmp_path / name, 4)
    for extra, other in (("GT/b.png", "LRbicx2"), ("LRbicx2/c.png", "GT")):
        folder = tmp_path / other
        for file in ("GT/a.png", "LRbicx2/a.png", extra):
            write(folder / file, 4, 4)
        with pytest.raises(ValueError, match=rf"{folder / extra}.*{folder / other}"):
            find_pairs(folder, 2)
    write(tmp_path / "Twins" / "GT" / "a.png", 8, 8)
    write(tmp_path / "Twins" / "GT" / "a.jpg", 8, 8)
    with pytest.raises(ValueError, match=r"GT/a\.png.*GT/a\.jpg|GT/a\.jpg.*GT/a\.png"):
        find_pairs(tmp_path / "Twins", 4)
    with pytest.raises(ValueError, match="train_sets"):
        dataset.open_training_sets(tmp_path, [], 4)


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_a_name_that_reports_cannot_hold_is_refused(tmp_path):
    path = write_set(tmp_path, [(8, 8)]) / "GT" / "a.png"
    path.rename(path.with_name(b"\xe9.png".decode(errors="surrogateescape")))
    with pytest.raises(ValueError, match="udce9"):
        find_pairs(tmp_path, 2)


def test_sizes_are_cropped_to_the_scale_and_a_wrong_one_is_named(tmp_path):
    write_set(tmp_path / "Set", [(25, 38), (31, 29)])
    assert gt_sizes(find_pairs(tmp_path / "Set", 4), 4) == [(24, 36), (28, 28)]
    write(tmp_path / "Wrong" / "GT" / "a.png", 24, 36)
    write(tmp_path / "Wrong" / "LRbicx4" / "a.png", 5, 9)
    pairs = find_pairs(tmp_path / "Wrong", 4)
    for measure in (lambda: gt_sizes(pairs, 4), lambda: EvaluationSet(pairs, 4)[0]):
        with pytest.raises(ValueError, match=r"LRbicx4/a\.png.*9x5.*36x24.*9x6"):
            measure()
    write(tmp_path / "Small" / "a.png", 3, 30)
    with pytest.raises(ValueError, match=r"Small/a\.png"):
        gt_sizes(find_pairs(tmp_path / "Small", 4), 4)


def test_images_smaller_than_a_patch_are_refused_or_skipped(tmp_path):
    pairs = find_pairs(write_set(tmp_path, [(40, 40), (30, 50), (32, 33)]), 2)
    sizes = gt_sizes(pairs, 2)
    with pytest.raises(ValueError, match=r"b\.png.*50x30.*32.*small_images"):
        fit_to_patch(pairs, sizes, 32)
    assert fit_to_patch(pairs, sizes, 32, "skip").tolist() == [0, 2]
    with pytest.raises(ValueError, match=r"a\.png.*40x40.*64.*lr_patch_size"):
        fit_to_patch(pairs, sizes, 64, "skip")


def test_the_summary_names_the_folder_the_count_and_the_first_pairs(tmp_path):
    text = dataset.describe_pairs("train", "Mine", find_pairs(write_set(tmp_path, [(8, 8)] * 4), 2), "as found")
    assert all(part in text for part in ("train", "Mine", "4", str(tmp_path / "GT"), "a.png", "b.png", "c.png", "as found"))
    assert "d.png" not in text


# Evaluation


def test_evaluation_images_are_cropped_and_lr_is_made_or_read(tmp_path):
    write_set(tmp_path / "Set", [(25, 38)])
    ((name, lr, gt),) = EvaluationSet(find_pairs(tmp_path / "Set", 4), 4)
    assert name == "a"
    assert (gt == drawn_image(25, 38)[:24, :36]).all()
    assert (lr == imgproc.degrade(gt, 4)).all()
    image_files.write_image(tmp_path / "Set" / "LRbicx4" / "a.png", noise_image(6, 9))
    assert (EvaluationSet(find_pairs(tmp_path / "Set", 4), 4)[0][1] == noise_image(6, 9)).all()


def test_noise_differs_between_images_and_not_between_runs(tmp_path):
    for name in "ab":
        image_files.write_image(tmp_path / "GT" / f"{name}.png", drawn_image(24, 24))
    first, second = (lr for _, lr, _ in EvaluationSet(find_pairs(tmp_path, 2, "DN"), 2, "DN"))
    assert (first != second).any()
    assert (first == EvaluationSet(find_pairs(tmp_path, 2, "DN"), 2, "DN")[0][1]).all()


@pytest.fixture
def decoded(monkeypatch):
    """How often each file is decoded."""
    found, read = Counter(), image_files.read_image
    monkeypatch.setattr(image_files, "read_image", lambda path, **given: found.update([path.name]) or read(path, **given))
    return found


def test_evaluation_images_are_decoded_once_as_far_as_memory_goes(tmp_path, monkeypatch, decoded):
    write_set(tmp_path / "Set", [(40, 44), (40, 44), (40, 44)])
    images = dataset.open_test_sets(tmp_path, ["Set"], 2)["Set"]
    first = list(images)
    assert all((one[2] == other[2]).all() for one, other in zip(first, list(images), strict=True))
    assert decoded == {"a.png": 1, "b.png": 1, "c.png": 1}
    decoded.clear()
    monkeypatch.setattr(EvaluationSet, "KEPT_BYTES", 2 * 40 * 44 * 3 * 5 // 4 + 1)  # of GT, and of LR at x2
    images = EvaluationSet(find_pairs(tmp_path / "Set", 2), 2)
    for _ in range(2):
        assert all((one[1] == other[1]).all() for one, other in zip(first, list(images), strict=True))
    assert decoded == {"a.png": 1, "b.png": 1, "c.png": 2}


def test_all_sets_are_found_measured_and_decoded_before_the_first_is_scored(tmp_path, decoded):
    write_set(tmp_path / "Set", [(40, 44), (40, 44)])
    assert len(dataset.open_test_sets(tmp_path, ["Set"], 2, decode=False)["Set"]) == 2  # another process decodes them
    assert not decoded
    path = tmp_path / "Set" / "GT" / "b.png"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"b\.png"):
        dataset.open_test_sets(tmp_path, ["Set"], 2)
    for name, sizes in (("a/Set", [(24, 24)]), ("b/Set", [(24, 18)]), ("c/Set5", [(24, 24)])):
        write_set(tmp_path / name, sizes)
    assert list(dataset.open_test_sets(tmp_path, ["a/Set"], 4)) == ["Set"]
    for names, scale, named in (
        (["a/Set", "b/Set"], 2, "b/Set"),  # of the same name
        (["b/Set"], 4, r"a\.png.*16x24.*19"),  # SSIM needs 11 + 2 * 4
        (["c/Set5"], 2, "Set5.*5"),  # 1 image
        (["a/Set", "Gone"], 2, "Gone"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=named):
            dataset.open_test_sets(tmp_path, names, scale)
    assert dataset.absent_sets(tmp_path, ["a/Set", "Gone"]) == ["Gone"]


# Batches


class InMemory:
    """Random LR images, and GT images in which each LR pixel is a block, so any crop can be compared exactly."""

    def __init__(self, scale, lr_sizes):
        self.upscale_factor = scale
        self.names = [str(index) for index in range(len(lr_sizes))]
        self.lr_sizes = lr_sizes
        self.gt_sizes = [(height * scale, width * scale) for height, width in lr_sizes]
        self.content = "0"

    def __len__(self):
        return len(self.lr_sizes)

    def lr(self, index):
        return noise_image(*self.lr_sizes[index], index)

    def gt(self, index):
        return enlarged(self.lr(index), self.upscale_factor)


def enlarged(lr, scale):
    return lr.repeat(scale, 0).repeat(scale, 1)


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_lr_and_gt_show_the_same_through_every_augmentation(scale):
    store = InMemory(scale, [(13, 20), (16, 11), (25, 14)])
    origins = {
        imgproc.flip_rotate(store.lr(image)[top : top + 7, left : left + 7], orientation).tobytes(): (image, orientation, top, left)
        for image, (height, width) in enumerate(store.lr_sizes)
        for orientation in range(8) for top in range(height - 6) for left in range(width - 6)
    }  # fmt: skip
    batches, found = TrainBatches(store, batch_size=16, lr_patch_size=7, seed=0), []
    for update in range(40):
        batch = batches[update]
        for lr, gt in zip(batch["lr"].numpy(), batch["gt"].numpy(), strict=True):
            assert (gt == enlarged(lr, scale)).all()
            found.append(origins[lr.tobytes()])
    assert {place[:2] for place in found} == {(image, orientation) for image in range(3) for orientation in range(8)}
    for image, (height, width) in enumerate(store.lr_sizes):  # places reach from edge to edge
        tops, lefts = zip(*(place[2:] for place in found if place[0] == image), strict=True)
        assert (min(tops), max(tops), min(lefts), max(lefts)) == (0, height - 7, 0, width - 7)


def test_every_image_is_seen_once_before_any_is_seen_again():
    batches = TrainBatches(InMemory(2, [(12, 12)] * 7), 4, 6, 0, usable=np.array([0, 2, 3, 5, 6]))
    drawn = [name for update in range(10) for name in batches.names(update)]
    passes = [tuple(drawn[start : start + 5]) for start in range(0, 40, 5)]
    assert all(sorted(images) == ["0", "2", "3", "5", "6"] for images in passes)
    assert len(set(passes)) > 3
    assert TrainBatches(InMemory(2, [(12, 12)]), 16, 6, 0)[0]["gt"].shape == (16, 12, 12, 3)  # of one image


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in ("lr", "gt"))


def test_batches_depend_on_seed_and_update_alone():
    store = InMemory(2, [(20, 20)] * 5)
    batches = TrainBatches(store, 4, 6, seed=3)
    assert equal(batches[7], TrainBatches(store, 4, 6, seed=3)[7])
    assert not equal(batches[7], batches[8])
    assert not equal(batches[7], TrainBatches(store, 4, 6, seed=4)[7])
    prints = {TrainBatches(InMemory(2, sizes), 4, 6, 0).fingerprint for sizes in ([(20, 20)], [(20, 21)], [(20, 20)] * 2, [(10, 40)])}
    assert len(prints) == 4


def test_shares_of_processes_make_the_whole_batch():
    store = InMemory(2, [(20, 20)] * 5)
    shares = [TrainBatches(store, 6, 6, 0, rank=rank, world_size=3)[4] for rank in range(3)]
    whole = TrainBatches(store, 6, 6, 0)[4]
    assert equal({name: torch.cat([share[name] for share in shares]) for name in whole}, whole)
    with pytest.raises(ValueError, match=r"batch_size=6.*4"):
        TrainBatches(store, 6, 6, 0, world_size=4)


class Photographs(InMemory):
    """Images of a size that leaves room around patches, with LR made by bicubic."""

    def __init__(self, scale):
        super().__init__(scale, [(40, 44), (24, 30)])
        self.gt = lambda index: drawn_image(*self.gt_sizes[index])
        self.lr = lambda index: imgproc.degrade(self.gt(index), scale)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_photo_patch_is_cut_from_a_degraded_part_of_the_image(scale, monkeypatch):
    """Without damage it is what bicubic makes of the whole image, since its surroundings were degraded too."""
    monkeypatch.setattr(imgproc, "PHOTO", dict.fromkeys(imgproc.PHOTO, (0.0, 0.0)))
    plain, drawn = (TrainBatches(Photographs(scale), 6, 12, 5, draws_lr=draws) for draws in (False, True))
    for update in range(6):
        assert equal(plain[update], drawn[update])


def test_photos_are_drawn_anew_by_seed_update_and_index():
    photos = [TrainBatches(Photographs(2), 6, 12, seed, draws_lr=True) for seed in (1, 1, 2)]
    assert equal(photos[0][7], photos[1][7]) and not equal(photos[0][7], photos[2][7])
    parts = [TrainBatches(Photographs(2), 6, 12, 1, rank=rank, world_size=3, draws_lr=True)[7] for rank in range(3)]
    assert equal({name: torch.cat([part[name] for part in parts]) for name in ("lr", "gt")}, photos[0][7])
    again = TrainBatches(Photographs(2), 6, 12, 1)[7]
    assert torch.equal(again["gt"], photos[0][7]["gt"]) and not torch.equal(again["lr"], photos[0][7]["lr"])


def test_the_blocks_of_jpeg_lie_anywhere_in_a_photo_patch(monkeypatch):
    """Blocks begin with the part that is degraded, whose first row is compared with that of the patch. They have up to 16 pixels."""
    images = Photographs(2)
    images.gt_sizes, images.lr_sizes = [(80, 88)], [(40, 44)]
    rows = np.arange(80, dtype=np.uint8)[:, None, None].repeat(88, 1).repeat(3, 2)  # each pixel holds its row
    images.gt = lambda index: rows
    begins = []
    monkeypatch.setattr(imgproc, "degrade_photo", lambda gt, scale, random: begins.append(gt.min() // 2) or gt[::scale, ::scale])
    batches = TrainBatches(images, 1, 12, 3, draws_lr=True)
    tops = [int(batches[update]["gt"].min()) // 2 for update in range(600)]
    assert {(top - begin) % 16 for top, begin in zip(tops, begins, strict=True) if top >= 20} == set(range(16))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])
def test_prefetchers_give_floats_in_order_and_end(device, channels_last):
    batches, device = TrainBatches(InMemory(2, [(20, 20)] * 5), 4, 6, 0), torch.device(device)
    before = torch.get_rng_state()
    feed = dataset.prefetch(dataset.load(batches, 3, 6, 0, pin_memory=device.type == "cuda"), device, channels_last)
    for update, batch in enumerate(feed, 3):
        for name, size in (("lr", 6), ("gt", 12)):
            assert batch[name].shape == (4, 3, size, size)
            assert batch[name].dtype == torch.float32
            assert batch[name].device.type == device.type
            assert batch[name].is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            assert torch.allclose(batch[name].cpu(), batches[update][name].permute(0, 3, 1, 2) / 255, rtol=1e-6)
    assert update == 5
    assert torch.equal(torch.get_rng_state(), before)  # else a resumed run would draw other numbers


# LR images that are on the disk


def with_lr(folder, degradation, change=lambda lr: lr, scale=2):
    write_set(folder, [(64, 80)] * 3)
    place = {"BI": "LRbicx", "BD": "LRBDx", "DN": "LRDNx", "photo": "LRphotox"}[degradation]
    for index, file in enumerate(sorted((folder / "GT").iterdir())):
        lr = imgproc.degrade(image_files.read_image(file), scale, degradation, seed=100 + index)
        image_files.write_image(folder / f"{place}{scale}" / file.name, change(lr))
    return find_pairs(folder, scale, degradation)


@pytest.mark.parametrize("degradation", ["BI", "BD", "DN"])
def test_lr_images_are_recognised_as_their_degradation(tmp_path, degradation):
    assert dataset.check_lr(with_lr(tmp_path / "Set", degradation), 2, degradation)[0]


@pytest.mark.parametrize(
    ("degradation", "change"),
    [
        ("BI", lambda lr: np.clip(lr.astype(int) + np.indices(lr.shape).sum(0) % 2, 0, 255).astype(np.uint8)),  # rounded otherwise
        ("BI", lambda lr: np.roll(lr, 1, 0)),
        ("BI", lambda lr: np.where(np.indices(lr.shape).sum(0) == 3, 255 - lr, lr)),  # a few values, but far off
        ("BD", lambda lr: np.roll(lr, 1, 1)),
        ("DN", lambda lr: np.clip(lr.astype(int) + 10, 0, 255).astype(np.uint8)),
        ("DN", lambda lr: imgproc.imresize(imgproc.imresize(lr, 0.5), 2)),  # without noise
    ],
)
def test_lr_images_of_another_kind_are_not(tmp_path, degradation, change):
    assert not dataset.check_lr(with_lr(tmp_path / "Set", degradation, change), 2, degradation)[0]


def test_folders_within_gt_and_lr_belong_to_the_names(tmp_path):
    """As in REDS, where each clip has a folder."""
    for clip in ("000", "001"):
        image_files.write_image(tmp_path / f"Set/GT/{clip}/1.png", drawn_image(24, 24))
        image_files.write_image(tmp_path / f"Set/LRbicx2/{clip}/1x2.png", drawn_image(12, 12))
    pairs = find_pairs(tmp_path / "Set", 2)
    assert [(pair.name, pair.lr.parent.name) for pair in pairs] == [("000/1", "000"), ("001/1", "001")]
    shutil.rmtree(tmp_path / "Set/GT/001")
    shutil.rmtree(tmp_path / "Set/LRbicx2/000")
    with pytest.raises(ValueError, match=r"000.1\.png|001.1x2\.png"):  # another clip is no partner
        find_pairs(tmp_path / "Set", 2)


def test_lr_folders_of_unknown_names_are_named(tmp_path):
    write_set(tmp_path / "Set", [(40, 44)])
    for name in ("LR", "LRx2", "LRbicx4", "LR_bicubic/X2"):
        image_files.write_image(tmp_path / "Set" / name / "z.png", drawn_image(8, 8))
    shutil.rmtree(tmp_path / "Set/LR_bicubic/X2")
    text = dataset.describe_pairs("test", "Set", find_pairs(tmp_path / "Set", 2), "").splitlines()[-1]
    assert "LR, LRx2;" in text


def test_an_absent_set_that_can_be_fetched_says_how(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"download\.py --items Set5"):
        find_pairs(tmp_path / "Set5", 4)
    with pytest.raises(FileNotFoundError) as caught:
        find_pairs(tmp_path / "Mine", 4)
    assert "download.py" not in str(caught.value)


# Workers, and waiting for them


@pytest.mark.parametrize(
    ("room", "wanted", "processes", "expected"),
    [(64, 8, 1, (6, 1)), (64, 2, 1, (2, 2)), (10_000, 8, 4, (8, 2)), (64, 8, 4, (0, 1)), (10, 1, 1, (0, 1)), (0, 0, 1, (0, 2))],
)
def test_workers_hold_no_more_than_the_shared_memory(monkeypatch, room, wanted, processes, expected):
    """64 patches of 48 at x4 are 7.17 MiB a batch; Docker gives 64 MiB."""
    batches = TrainBatches(InMemory(4, [(48, 48)]), 64 * processes, 48, 0, world_size=processes)
    assert batches.bytes == 64 * 3 * 48**2 * 17
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room * 2**20))
    workers, ahead, sentence = dataset.fit_workers(batches, wanted, processes)
    assert (workers, ahead) == expected
    assert bool(sentence) == (expected != (wanted, 2))
    assert not workers or (workers * ahead + 2) * batches.bytes * processes <= room * 2**20


def test_a_long_temporary_folder_leaves_the_work_to_one_process(monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/" + "t" * 90)
    assert dataset.fit_workers(TrainBatches(InMemory(2, [(8, 8)]), 4, 6, 0), 2)[0] == 0


class Slow(TrainBatches):
    """Makes a batch of `late` only when it is told."""

    late, told = 2, None

    def __getitem__(self, update):
        if update >= self.late:
            self.told.wait()
        return super().__getitem__(update)


@pytest.fixture
def slow(monkeypatch):
    batches = Slow(InMemory(2, [(9, 10)]), 4, 6, 0)
    batches.told = multiprocessing.get_context("fork").Event()
    yield batches
    batches.told.set()


@pytest.mark.slow
def test_batches_that_come_late_come_all_and_in_order(slow):
    prefetcher = dataset.prefetch(dataset.load(slow, 0, 6, 2), torch.device("cpu"))
    threading.Timer(2.5, slow.told.set).start()  # after two of the loader's timeouts
    expected = [TrainBatches.__getitem__(slow, update)["lr"] for update in range(6)]
    found = list(prefetcher)
    assert len(found) == 6
    assert all(
        torch.equal((255 * batch["lr"]).round().to(torch.uint8), lr.permute(0, 3, 1, 2)) for batch, lr in zip(found, expected, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("end", ["stop", "full", "too long"])
def test_a_wait_for_data_ends(slow, monkeypatch, end):
    stop = StopRequest()
    prefetcher = dataset.prefetch(dataset.load(slow, 2, 6, 1), torch.device("cpu"), stop=stop)
    start = time.monotonic()
    monkeypatch.setattr(prefetcher, "PATIENCE", 0.5)
    if end == "stop":
        stop.requested = start
    elif end == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    else:
        monkeypatch.setattr(prefetcher, "LONGEST_WAIT", 1)
    with pytest.raises(Interrupted if end == "stop" else ValueError):
        next(prefetcher)
    assert time.monotonic() - start < 30


def test_other_pixels_of_the_same_size_have_another_fingerprint():
    stores = [InMemory(2, [(20, 20)]), InMemory(2, [(20, 20)])]
    stores[1].content = "1"
    first, second = (TrainBatches(store, 4, 6, 0).fingerprint for store in stores)
    assert first != second
    assert first.partition(", content")[0] == second.partition(", content")[0]  # which older checkpoints hold

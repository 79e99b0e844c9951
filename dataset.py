"""Image sets, LR/GT pairs, evaluation sets, training batches and prefetchers.

A batch is a few copies out of the decode-once store (store.py). It is a function of (seed, update) alone, so neither the number of
workers nor a resume changes the run.

    pairs = find_pairs("data/T91", upscale_factor=4)
    batches = TrainBatches(PairStore.open_or_build({"T91": pairs}, 4, "BI", ".cache"), batch_size=16, lr_patch_size=48, seed=0)
    for batch in prefetch(load(batches, first=0, last=1000, num_workers=1), device): batch["lr"], batch["gt"]
"""

import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import image_files
import imgproc
from imgproc import RGB
from runtime import Interrupted, StopRequest, cores

# Finding pairs


@dataclass(frozen=True)
class Pair:
    """One image of a set: its name, its GT file, and its LR file or None if LR is made from GT."""

    name: str
    gt: Path
    lr: Path | None


GT_FOLDERS = ("GT", "GTmod12", "HR")
LR_FOLDERS = {
    "BI": ("LRbicx{scale}", "LR_bicubic/X{scale}"),
    "BD": ("LRBDx{scale}",),
    "DN": ("LRDNx{scale}",),
    "photo": ("LRphotox{scale}",),
}


def find_pairs(folder: str | os.PathLike, upscale_factor: int, degradation: str = "BI") -> list[Pair]:
    """The images of a set, sorted by name; pairs are made by file stem, never by order.

    GT images lie in `GT`, `GTmod12` or `HR`, in `image_SRF_<scale>` with LR images beside them, or in the folder itself. LR
    images lie in `LRbicx<scale>`, `LR_bicubic/X<scale>`, `LRBDx<scale>` or `LRDNx<scale>`; their names may end in `x<scale>`.
    These folders may hold further folders, which then belong to the names, as in `GT/000/00000001.png` of REDS.

    Raises:
        FileNotFoundError: the folder is missing or holds no image.
        ValueError: an image lacks its partner, or two have the same name.
    """
    folder = Path(folder).absolute()
    gt_files, lr_files = _find_files(folder, upscale_factor, degradation)
    if not gt_files:
        problem = "no image is in it" if folder.is_dir() else "is a file, not a folder" if folder.exists() else "no such folder"
        beside = image_files.passed_over(folder) if folder.is_dir() else ""
        fetch = f", or fetch it with python scripts/download.py --items {folder.name}" if folder.name in DOWNLOADABLE else ""
        raise FileNotFoundError(
            f"{folder}: {problem}{f' ({beside})' if beside else ''}; put the GT images into {folder / 'GT'} as .png or .jpg, "
            f"or name another data_root or set{fetch}"
        )
    gt = _by_name(gt_files, folder, lambda name: name.removesuffix(f"_SRF_{upscale_factor}_HR"))
    lr = _by_name(lr_files, folder, lambda name: name if name in gt else _without_scale(name, upscale_factor))
    if lr and gt.keys() != lr.keys():
        name = min(gt.keys() ^ lr.keys())
        found, missing = (gt[name], lr_files[0].parent) if name in gt else (lr[name], gt_files[0].parent)
        raise ValueError(
            f"{found}: has no partner in {missing}, where {len(gt)} GT images and {len(lr)} LR images should pair: "
            "add it, or move the LR folder away, and all LR images are made from GT"
        )
    return [Pair(name, gt[name], lr.get(name)) for name in sorted(gt)]


def _find_files(folder: Path, scale: int, degradation: str) -> tuple[list[Path], list[Path]]:
    gt_files = _first_images(folder / name for name in GT_FOLDERS)
    lr_files = _first_images(folder / name.format(scale=scale) for name in LR_FOLDERS[degradation])
    both = _images_in(folder / f"image_SRF_{scale}", nested=False)
    if both and not gt_files:
        gt_files = [file for file in both if file.stem.endswith("_HR")]
        lr_files = [file for file in both if file.stem.endswith("_LR")] if degradation == "BI" else []
    return gt_files or _images_in(folder, nested=False), lr_files


def _first_images(folders: Iterable[Path]) -> list[Path]:
    return next(filter(None, map(_images_in, folders)), [])


def _images_in(folder: Path, nested: bool = True) -> list[Path]:
    return image_files.list_images(folder, nested) if folder.is_dir() else []


DOWNLOADABLE = ("DIV2K", "DIV2K_valid", "Flickr2K", "BSDS200", "Set5", "Set14", "B100", "Urban100")  # by scripts/download.py


def _without_scale(stem: str, scale: int) -> str:
    return re.sub(rf"(x{scale}|_SRF_{scale}_LR)$", "", stem)


def _by_name(files: Sequence[Path], folder: Path, to_name: Callable[[str], str]) -> dict[str, Path]:
    """The files by their names within the set's GT or LR folder."""
    named: dict[str, Path] = {}
    parents = files[0].parents if files else []
    root = next(
        (each for each in parents if _NESTED.fullmatch(each.name) and each.is_relative_to(folder)), files[0].parent if files else folder
    )
    for file in files:
        name = to_name(unicodedata.normalize("NFC", file.relative_to(root).with_suffix("").as_posix()))  # macOS splits ü into two
        if any("\ud800" <= character <= "\udfff" for character in str(file)):  # Python's stand-in for a byte that is not UTF-8
            raise ValueError(f"{str(file)!r}: the name is not UTF-8, but reports are; rename it")
        if name in named:
            raise ValueError(f"{file}: has the same name as {named[name]}; rename one")
        named[name] = file
    return named


def open_training_sets(
    data_root: str | os.PathLike, names: Sequence[str], upscale_factor: int, degradation: str = "BI"
) -> dict[str, list[Pair]]:
    """The pairs of each training set, by name.

    Raises:
        FileNotFoundError, ValueError: as `find_pairs`; or there is no name.
    """
    if not names:
        raise ValueError("train_sets is empty: name at least one, as in --train_sets DIV2K Flickr2K")
    return {name: find_pairs(Path(data_root) / name, upscale_factor, degradation) for name in names}


Size = tuple[int, int]  # (height, width)


def gt_sizes(pairs: Sequence[Pair], upscale_factor: int) -> list[Size]:
    """(height, width) of each GT image, cropped to a multiple of the scale; reads headers only.

    Raises:
        ValueError: a GT image smaller than the scale, or an LR image of another size than its GT needs.
    """
    sizes = []
    for pair in pairs:
        height, width = (side // upscale_factor for side in image_files.image_size(pair.gt))
        if not height or not width:
            raise ValueError(f"{pair.gt}: smaller than {upscale_factor} pixels, the upscale_factor; remove it")
        if pair.lr and image_files.image_size(pair.lr) != (height, width):
            _raise_size(pair, image_files.image_size(pair.lr), upscale_factor)
        sizes.append((height * upscale_factor, width * upscale_factor))
    return sizes


def _raise_size(pair: Pair, lr_size: Size, scale: int) -> None:
    height, width = image_files.image_size(pair.gt)
    raise ValueError(
        f"{pair.lr}: lr is {lr_size[1]}x{lr_size[0]}, but gt {width}x{height} at x{scale} needs {width // scale}x{height // scale}: "
        "replace it, or move the LR folder away, and all LR images are made from GT"
    )


def describe_pairs(split: str, name: str, pairs: Sequence[Pair], lr: str) -> str:
    """A summary for the log: where, how many, what `check_lr` says of LR, the first three pairs, and what is passed over beside them."""
    folders = [_folder_of(pair.name, file) for pair in pairs[:1] for file in (pair.gt, pair.lr) if file]
    first = ", ".join(pair.gt.name if pair.lr is None else f"{pair.gt.name} with {pair.lr.name}" for pair in pairs[:3])
    lines = [f"{split} {name}: {len(pairs)} images in {folders[0]}, LR {lr}"]
    lines.append(first + (", …" if len(pairs) > 3 else ""))
    lines += filter(None, (image_files.passed_over(folder, nested=bool(_NESTED.fullmatch(folder.name))) for folder in folders))
    further = sorted(folders[0].parent.iterdir()) if folders[0].name in GT_FOLDERS else []
    unknown = [each.name for each in further if re.match(r"LR(?!_bicubic$)", each.name, re.I) and not _NESTED.fullmatch(each.name)]
    lines += [f"not used, as the names are unknown: {', '.join(unknown)}; LR images belong into LRbicx4, for example"] if unknown else []
    return "\n    ".join(lines)


_NESTED = re.compile("|".join((*GT_FOLDERS, r"LR\w+x\d", r"X\d")))  # folders whose own folders belong to the set


def _folder_of(name: str, file: Path) -> Path:
    """The folder of GT or LR images that a pair's file is in, perhaps in a folder of it."""
    return file.parents[name.count("/")]


AS_GIVEN = "LR as given"  # LR images that are no known degradation of the GT images
_COMPARED = 5  # images of a set


def check_lr(pairs: Sequence[Pair], upscale_factor: int, degradation: str) -> tuple[bool, str]:
    """Whether LR images on disk are what this degradation makes of GT, compared on a few images; and what was found, in words.

    DN's noise is not repeated: in the middle tones, its mean must be 0 and its standard deviation 30.
    """
    if pairs[0].lr is None:
        return True, "drawn anew for each patch, and by name for whole images" if degradation == "photo" else "made exactly when needed"
    chosen = [pairs[index] for index in np.linspace(0, len(pairs) - 1, min(_COMPARED, len(pairs))).astype(int)]
    noise, shares, worst = [np.zeros(0)], [], 0
    for pair in chosen:
        gt = imgproc.crop_to_multiple(image_files.read_image(pair.gt), upscale_factor)
        exact = make_lr(replace(pair, lr=None), gt, upscale_factor, "BI" if degradation == "DN" else degradation).astype(int)
        off = make_lr(pair, gt, upscale_factor, degradation) - exact
        noise.append(off[abs(exact - 128) < 32])  # elsewhere the noise is clipped
        shares.append(float(np.mean(off != 0)))
        worst = max(worst, int(abs(off).max()))
    name = {"BI": "MATLAB's bicubic", "DN": "MATLAB's bicubic with noise of 30"}.get(degradation, degradation)
    where = f"in {_folder_of(pairs[0].name, pairs[0].lr).name}, {len(chosen)} compared"
    if degradation == "DN":
        values = np.concatenate(noise)
        fits = len(values) < 1000 or (abs(values.mean()) < 3 and 27 < values.std() < 33)
        return fits, f"{where}: {name if fits else f'NOT {name}, but off by {values.mean():.1f} with a deviation of {values.std():.1f}'}"
    if not worst:
        return True, f"{where}: exactly {name}"
    found = f"{np.mean(shares):.1%} of the values differ, by up to {worst}"
    if np.mean(shares) < 0.01 and worst <= 2:  # another program's rounding
        return True, f"{where}: {name}, but for {found}"
    return False, f"{where}: NOT {name}, {found}; scores will not compare with the papers'"


def fit_to_patch(pairs: Sequence[Pair], sizes: Sequence[Size], gt_patch_size: int, small_images: str = "refuse") -> NDArray[np.intp]:
    """Indices of the images that a patch can be cut from.

    Raises:
        ValueError: some are too small and `small_images` is "refuse", or none is left.
    """
    fitting = np.array([min(size) >= gt_patch_size for size in sizes], bool)
    if not fitting.all() and (small_images == "refuse" or not fitting.any()):
        first = int(np.flatnonzero(~fitting)[0])
        raise ValueError(
            f"{pairs[first].gt}: {sizes[first][1]}x{sizes[first][0]} is smaller than a GT patch of {gt_patch_size}, as are "
            f"{(~fitting).sum()} of {len(sizes)} images: set a smaller lr_patch_size"
            + (", or small_images='skip' to train without them" if fitting.any() else "")
        )
    return np.flatnonzero(fitting)


def make_lr(pair: Pair, gt: RGB, upscale_factor: int, degradation: str) -> RGB:
    """The LR image of a pair, read, or made from the cropped GT; what DN and photo draw depends on the name."""
    if pair.lr is None:
        return imgproc.degrade(gt, upscale_factor, degradation, seed=zlib.crc32(pair.name.encode()))
    lr = image_files.read_image(pair.lr)
    if (lr.shape[0] * upscale_factor, lr.shape[1] * upscale_factor) != gt.shape[:2]:
        _raise_size(pair, lr.shape[:2], upscale_factor)
    return lr


class EvaluationSet:
    """Images to score: `images[i]` is (name, lr, gt), uint8 (H, W, 3), gt cropped to a multiple of the scale.

    Decoded images are kept for the next evaluation, as long as they fit into `KEPT_BYTES`.
    """

    KEPT_BYTES = 2**29  # of each set, in each process

    def __init__(self, pairs: Sequence[Pair], upscale_factor: int, degradation: str = "BI") -> None:
        self.pairs = list(pairs)
        self.upscale_factor = upscale_factor
        self.degradation = degradation
        self._kept: dict[int, tuple[str, RGB, RGB]] = {}
        self._free = self.KEPT_BYTES

    def __len__(self) -> int:
        return len(self.pairs)

    def content(self) -> str:
        """A checksum of all names and pixels."""
        crc = 0
        for name, lr, gt in (self[index] for index in range(len(self))):
            for part in (name.encode(), lr.tobytes(), gt.tobytes()):
                crc = zlib.crc32(part, crc)
        return f"{crc:08x}"

    def __getitem__(self, index: int) -> tuple[str, RGB, RGB]:
        if index in self._kept:
            return self._kept[index]
        pair = self.pairs[index]
        gt = imgproc.crop_to_multiple(image_files.read_image(pair.gt), self.upscale_factor)
        found = pair.name, make_lr(pair, gt, self.upscale_factor, self.degradation), gt
        size = sum(image.nbytes for image in found[1:])
        if self._free >= size:
            self._kept[index] = found
            self._free -= size
        return found


# Images in the sets that papers score; with one less, the mean is of another set
BENCHMARKS = {"Set5": 5, "Set14": 14, "B100": 100, "BSD100": 100, "BSDS100": 100, "Urban100": 100, "Manga109": 109}


def absent_sets(data_root: str | os.PathLike, names: Sequence[str]) -> list[str]:
    """Those of the sets whose folder does not exist."""
    return [name for name in names if not (Path(data_root) / name).exists()]


def open_test_sets(
    data_root: str | os.PathLike, names: Sequence[str], upscale_factor: int, degradation: str = "BI", *, decode: bool = True
) -> dict[str, EvaluationSet]:
    """The sets to score, by name; all are found, measured and decoded once before the first is scored.

    Args:
        decode: False where another process of this machine decodes all; each image is then decoded when it is first needed.

    Raises:
        FileNotFoundError: a set is missing.
        ValueError: two sets have the same name, an image is damaged, has no partner or is too small, or a set that papers score
            is not complete.
    """
    sets: dict[str, EvaluationSet] = {}
    for folder in (Path(data_root) / name for name in names):
        if folder.name in sets:
            raise ValueError(f"{folder}: another set is called {folder.name!r} too; rename one folder")
        pairs = find_pairs(folder, upscale_factor, degradation)
        if len(pairs) != BENCHMARKS.get(folder.name, len(pairs)):
            raise ValueError(
                f"{folder}: {len(pairs)} images, but {folder.name} has {BENCHMARKS[folder.name]}; complete it, "
                "or rename the folder if it is another set"
            )
        for pair, size in zip(pairs, gt_sizes(pairs, upscale_factor), strict=True):
            if min(size) < 2 * upscale_factor + imgproc.SSIM_WINDOW:
                raise ValueError(
                    f"{pair.gt}: {size[1]}x{size[0]} is too small to be scored: with {upscale_factor} border pixels, "
                    f"SSIM's window needs {2 * upscale_factor + imgproc.SSIM_WINDOW}; remove it"
                )
        sets[folder.name] = EvaluationSet(pairs, upscale_factor, degradation)
    if decode:  # a damaged image would otherwise end a run after hours of training
        jobs = [(images, index) for images in sets.values() for index in range(len(images))]
        in_parallel(lambda job: job[0][job[1]], jobs, progress="")
    return sets


Job = TypeVar("Job")
Made = TypeVar("Made")


def in_parallel(work: Callable[[Job], Made], jobs: Sequence[Job], progress: str = "") -> list[Made]:
    """Results in their order, by one thread a core; after an error or a signal, no further job is begun.

    Args:
        progress: the label of a progress bar; empty: none.
    """
    with ThreadPoolExecutor(cores()) as pool:
        try:
            return list(tqdm(pool.map(work, jobs), progress, len(jobs), unit="image", disable=not progress))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# Training batches


class DecodedPairs(Protocol):
    """Training images in memory, as `store.PairStore` holds them: uint8 (H, W, 3), sizes as (height, width)."""

    upscale_factor: int
    names: list[str]
    gt_sizes: list[Size]
    lr_sizes: list[Size]

    @property
    def content(self) -> str: ...  # a checksum of all names and pixels
    def __len__(self) -> int: ...
    def gt(self, index: int) -> RGB: ...
    def lr(self, index: int) -> RGB: ...


class TrainBatches(Dataset):
    """`batches[update]` is the batch of that update: {"lr": uint8 (n, h, w, 3), "gt": uint8 (n, H, W, 3)}, aligned.

    Every image is drawn once before any is drawn again. Each draw (image, place, orientation) is a function of seed and update.

    Args:
        batch_size: of all processes together; this process gets its share.
        usable: indices of the images to draw from; None for all.
        rank, world_size: which share.
        draws_lr: make LR of the GT patch and its surroundings as "photo", drawn anew each time, instead of cutting it from the store.

    Raises:
        ValueError: the batch cannot be shared out evenly.
    """

    def __init__(
        self,
        store: DecodedPairs,
        batch_size: int,
        lr_patch_size: int,
        seed: int,
        *,
        usable: NDArray[np.intp] | None = None,
        rank: int = 0,
        world_size: int = 1,
        draws_lr: bool = False,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch_size={batch_size} is not a multiple of the {world_size} processes: set a multiple")
        self.store = store
        self.batch_size = batch_size
        self.lr_patch_size = lr_patch_size
        self.seed = seed
        self.draws_lr = draws_lr
        self.usable = np.arange(len(store)) if usable is None else usable
        sizes = [store.gt_sizes[image] for image in self.usable]
        self.fingerprint = f"{len(sizes)} images of {sum(h * w for h, w in sizes)} pixels, {zlib.crc32(repr(sizes).encode()):08x}"
        self.fingerprint += f", content {store.content}"  # last, as older checkpoints have the part before it alone
        self.share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.bytes = 3 * lr_patch_size**2 * (1 + store.upscale_factor**2) * batch_size // world_size  # of a batch

    def __getitem__(self, update: int) -> dict[str, Tensor]:
        images = self._images(update)[self.share]
        random = np.random.default_rng((self.seed, _PLACES, update))
        places = random.random((self.batch_size, 2))[self.share]
        orientations = random.integers(8, size=self.batch_size)[self.share]
        scale, size = self.store.upscale_factor, self.lr_patch_size
        lr = np.empty((len(images), size, size, 3), np.uint8)
        gt = np.empty((len(images), size * scale, size * scale, 3), np.uint8)
        for i, (image, place, orientation) in enumerate(zip(images, places, orientations, strict=True)):
            room = np.subtract(self.store.lr_sizes[image], size) + 1
            top, left = (place * room).astype(int)  # in LR pixels, so both crops show the same
            if self.draws_lr:
                cut = self._draw_lr(image, top, left, np.random.default_rng((self.seed, _PHOTOS, update, self.share.start + i)))
            else:
                cut = self.store.lr(image)[top : top + size, left : left + size]
            lr[i] = imgproc.flip_rotate(cut, orientation)
            top, left, side = top * scale, left * scale, size * scale
            gt[i] = imgproc.flip_rotate(self.store.gt(image)[top : top + side, left : left + side], orientation)
        return {"lr": torch.from_numpy(lr), "gt": torch.from_numpy(gt)}

    def _draw_lr(self, image: int, top: int, left: int, random: np.random.Generator) -> RGB:
        """The LR patch at this place (LR pixels), of a degraded part of the image that begins a random number of pixels before it.

        So the blocks of JPEG (8 pixels, or 16 for colours) lie anywhere in the patch, and blur sees what is beside it.
        """
        scale, size = self.store.upscale_factor, self.lr_patch_size
        first_row, first_column = (max(0, start - _SURROUNDINGS - int(random.integers(16))) for start in (top, left))
        rows, columns = (
            slice(first * scale, (start + size + _SURROUNDINGS) * scale) for first, start in ((first_row, top), (first_column, left))
        )
        lr = imgproc.degrade_photo(self.store.gt(image)[rows, columns], scale, random)
        return lr[top - first_row :, left - first_column :][:size, :size]

    def names(self, update: int) -> list[str]:
        """The images of an update's patches, over all processes."""
        return [self.store.names[image] for image in self._images(update)]

    def _images(self, update: int) -> list[int]:
        positions = range(update * self.batch_size, (update + 1) * self.batch_size)
        return [int(self._order(position // len(self.usable))[position % len(self.usable)]) for position in positions]

    def _order(self, passed: int) -> NDArray[np.intp]:
        """The order of the images after `passed` passes over all of them."""
        if getattr(self, "_passed", None) != passed:
            self._passed, self._shuffled = passed, np.random.default_rng((self.seed, _ORDER, passed)).permutation(self.usable)
        return self._shuffled


_ORDER, _PLACES, _PHOTOS = 0, 1, 2  # separate streams of random numbers
_SURROUNDINGS = 4  # LR pixels around a patch that blur and interpolation may look at
_TICK = 1  # seconds that the loader waits for a batch before it looks around


def load(batches: TrainBatches, first: int, last: int, num_workers: int, pin_memory: bool = False, ahead: int = 2) -> DataLoader:
    """Batches of the updates `first` to `last` - 1, in order, cut by `num_workers` processes (0: by this process), `ahead` by each."""
    own = torch.Generator()  # the default would draw a number from PyTorch's global generator, and a resumed run would differ
    return DataLoader(
        batches,
        batch_size=None,
        sampler=range(first, last),
        num_workers=num_workers,
        prefetch_factor=ahead if num_workers else None,
        pin_memory=pin_memory,
        generator=own,
        timeout=_TICK if num_workers else 0,
        worker_init_fn=_outlive_signals,
    )


_LONGEST_TEMPORARY = 70  # bytes: a socket's path has 107, and Python appends up to 34
SHARED_MEMORY = Path("/dev/shm")  # where workers put batches; Docker gives it 64 MB


def fit_workers(batches: TrainBatches, num_workers: int, processes: int = 1) -> tuple[int, int, str]:
    """How many workers, each how many batches ahead, fit into the shared memory; and a sentence if these are fewer than wanted.

    Args:
        processes: training processes on this machine.
    """
    room = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else math.inf
    held = int(room / (1.1 * max(batches.bytes, 1) * processes)) - 2 if room < math.inf else sys.maxsize  # two more are on their way
    if num_workers and os.name != "nt" and len(tempfile.gettempdir()) > _LONGEST_TEMPORARY:
        return 0, 2, f"TMPDIR={tempfile.gettempdir()} is too long for the sockets of data workers: continuing with num_workers=0"
    ahead = 2 if held >= 2 * num_workers else 1
    workers = max(0, min(num_workers, held // ahead))
    if (workers, ahead) == (num_workers, 2) or not num_workers:
        return num_workers, 2, ""
    wanted = f"{processes} x {num_workers} workers" if processes > 1 else f"{num_workers} workers"
    sentence = (
        f"{SHARED_MEMORY} has {room / 2**20:.0f} MiB free, too little for {wanted} with 2 batches of {batches.bytes / 2**20:.1f} MiB each: "
        f"continuing with num_workers={workers}{f', {ahead} ahead' if workers else ''}; docker run --shm-size 2g gives more"
    )
    return workers, ahead, sentence


def _outlive_signals(_worker: int) -> None:
    """Ctrl-C, torchrun and timeout signal the whole process group, but the run still needs its workers to stop in order."""
    if hasattr(os, "setsid"):
        os.setsid()
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


# Prefetchers: uint8 (n, h, w, 3) to float32 (n, 3, h, w) in [0, 1] on the device


def prefetch(
    loader: DataLoader, device: torch.device, channels_last: bool = True, stop: StopRequest | None = None
) -> "CPUPrefetcher | CUDAPrefetcher":
    """The prefetcher for a device."""
    return (CUDAPrefetcher if device.type == "cuda" else CPUPrefetcher)(loader, device, channels_last, stop)


class CPUPrefetcher:
    """Iterates once over a loader's batches: {"lr", "gt"}, float32 (n, 3, h, w) in [0, 1].

    Raises:
        Interrupted: a stop was requested, and no batch has come since.
        ValueError: the workers have no shared memory left, or none of them has made a batch for `LONGEST_WAIT`.
    """

    LONGEST_WAIT = 600  # seconds
    PATIENCE = 3  # seconds from a stop request, in which the batch may still come

    def __init__(self, loader: DataLoader, device: torch.device, channels_last: bool = True, stop: StopRequest | None = None) -> None:
        self._loader = loader
        self._batches = iter(loader)
        self._device = device
        self._channels_last = channels_last
        self._stop = stop

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        return {name: self._convert(pixels) for name, pixels in self._wait().items()}

    def _wait(self) -> dict[str, Tensor]:
        start = time.monotonic()
        while True:
            try:
                return next(self._batches)
            except RuntimeError as error:  # the loader's timeout, after which it can be asked again
                if "timed out" not in str(error):
                    raise
            if self._stop and self._stop.requested is not None and time.monotonic() - self._stop.requested > self.PATIENCE:
                raise Interrupted
            waited = time.monotonic() - start
            size = getattr(self._loader.dataset, "bytes", 0)
            if waited > 5 and SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free < size:
                raise ValueError(f"{SHARED_MEMORY}: is full, so the workers can't hand over a batch: lower num_workers, or make room in it")
            if waited > self.LONGEST_WAIT:
                raise ValueError(
                    f"no batch has come for {waited / 60:.0f} minutes; is the disk of cache_dir slow? num_workers=0 does without workers"
                )

    def _convert(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2)  # already channels_last in memory
        pixels = pixels if self._channels_last else pixels.contiguous()
        return pixels.to(torch.float32).div_(255)


class CUDAPrefetcher(CPUPrefetcher):
    """The same; copies and converts the next batch ahead, on its own stream. Needs pinned memory."""

    def __init__(self, loader: DataLoader, device: torch.device, channels_last: bool = True, stop: StopRequest | None = None) -> None:
        super().__init__(loader, device, channels_last, stop)
        self._stream = torch.cuda.Stream(device)
        self._ahead: dict[str, Tensor] | None = None
        self._begun = False

    def __next__(self) -> dict[str, Tensor]:
        if not self._begun:  # not in __init__, as a stop request may interrupt it
            self._begun, self._ahead = True, self._fetch()
        if self._ahead is None:
            raise StopIteration
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        batch = self._ahead
        for tensor in batch.values():  # or its memory would be reused while this stream still reads it
            tensor.record_stream(torch.cuda.current_stream(self._device))
        self._ahead = self._fetch()
        return batch

    def _fetch(self) -> dict[str, Tensor] | None:
        with torch.cuda.stream(self._stream):
            try:
                return super().__next__()
            except StopIteration:
                return None

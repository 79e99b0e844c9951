"""The decode-once cache of training images: raw uint8 GT and LR, memory-mapped and shared by all processes."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import files
import image_files
import imgproc
from dataset import Pair, Size, gt_sizes, make_lr
from runtime import cores


class PairStore:
    """Decoded training images in two files of raw uint8, gt.bin and lr.bin, memory-mapped; manifest.json says what is where.

    `store.gt(i)` and `store.lr(i)` are read-only views, (H, W, 3). Opening takes no memory of its own, and a store can be
    handed to other processes.
    """

    VERSION = 1

    def __init__(self, folder: Path, sizes: Sequence[Size], upscale_factor: int, names: Sequence[str] = ()) -> None:
        self.folder = folder
        self.names = list(names) or [str(index) for index in range(len(sizes))]
        self.upscale_factor = upscale_factor
        self.gt_sizes = [tuple(size) for size in sizes]
        self.lr_sizes = [(height // upscale_factor, width // upscale_factor) for height, width in sizes]
        self._gt_starts, self._lr_starts = _starts(self.gt_sizes), _starts(self.lr_sizes)
        self._maps: dict[str, NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        return len(self.gt_sizes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # each process maps the files itself

    def gt(self, index: int) -> imgproc.RGB:
        return self._view("gt.bin", self._gt_starts, self.gt_sizes, index)

    def lr(self, index: int) -> imgproc.RGB:
        return self._view("lr.bin", self._lr_starts, self.lr_sizes, index)

    def _view(self, file: str, starts: NDArray[np.int64], sizes: Sequence[Size], index: int) -> imgproc.RGB:
        if file not in self._maps:
            self._maps[file] = np.asarray(np.memmap(self.folder / file, np.uint8, "r"))
        return self._maps[file][starts[index] : starts[index + 1]].reshape(*sizes[index], 3)

    @classmethod
    def open_or_build(
        cls, sets: Mapping[str, Sequence[Pair]], upscale_factor: int, degradation: str, cache_dir: str | os.PathLike, progress: bool = True
    ) -> "PairStore":
        """The store of these sets, built where there is none or where it is damaged or older than its sources.

        Raises:
            OSError: the disk has too little room.
            ValueError: a source can't be read, or a pair doesn't fit.
        """
        pairs = [pair for members in sets.values() for pair in members]
        sizes = gt_sizes(pairs, upscale_factor)
        expected = {
            "version": cls.VERSION,
            "upscale_factor": upscale_factor,
            "degradation": degradation,
            "gt_sizes": [list(size) for size in sizes],
            "sources": [_fingerprint(pair) for pair in pairs],
        }
        folder = Path(cache_dir).absolute() / _store_name(sets, upscale_factor, degradation)
        arguments = (folder, sizes, upscale_factor, [pair.gt.name for pair in pairs])
        store = cls(*arguments)
        if folder.is_dir():
            problem = store._problem(expected)
            if problem is None:
                return store
            store._maps.clear()  # some systems don't move files that are open
            if progress:
                tqdm.write(f"{folder}: {problem}; building it again")
        _build(cls(*arguments), pairs, expected, progress)
        return cls(*arguments)  # not `store`, which may have mapped the old files

    def _problem(self, expected: Mapping[str, Any]) -> str | None:
        """What is wrong with the files on disk, or None."""
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
            checksums = list(manifest["checksums"])
        except (OSError, ValueError, KeyError, TypeError):
            return "its manifest is missing or damaged"
        if {key: manifest.get(key) for key in expected} != expected:
            return "its sources have changed"
        for file, starts in (("gt.bin", self._gt_starts), ("lr.bin", self._lr_starts)):
            if not (self.folder / file).is_file() or (self.folder / file).stat().st_size != starts[-1]:
                return f"{file} is cut off"
        step = 1 + int(self._gt_starts[-1] // _CHECKED_BYTES)  # all images of a small store, an even choice of a large one
        for index in range(0, len(self), step):
            if [_checksum(self.gt(index), self.lr(index))] != checksums[index : index + 1]:
                return f"image {index} is damaged"
        return None


_CHECKED_BYTES = 2**30  # compared with their checksums whenever a store is opened; a second's work


def _starts(sizes: Sequence[Size]) -> NDArray[np.int64]:
    return np.cumsum([0] + [height * width * 3 for height, width in sizes], dtype=np.int64)


def _store_name(sets: Mapping[str, Sequence[Pair]], scale: int, degradation: str) -> str:
    folders = sorted({str(folder) for pairs in sets.values() for pair in pairs for folder in (pair.gt.parent, pair.lr and pair.lr.parent)})
    names = "+".join(re.sub(r"\W+", "-", Path(name).name) for name in sets)[:60]
    return f"{names}_{degradation}x{scale}_{hashlib.sha256(json.dumps(folders).encode()).hexdigest()[:8]}"


def _fingerprint(pair: Pair) -> list[Any]:
    files = [pair.gt] if pair.lr is None else [pair.gt, pair.lr]
    return [pair.name, *([str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files)]


def _checksum(gt: imgproc.RGB, lr: imgproc.RGB) -> int:
    return zlib.crc32(lr, zlib.crc32(gt))


def _build(store: PairStore, pairs: Sequence[Pair], manifest: dict[str, Any], progress: bool) -> None:
    """Decode everything into a folder of its own, and move that into place when it is complete and on the disk."""
    with files.made_folder(store.folder.parent):
        _remove_leftovers(store.folder)
        _check_room(store)
        _build_there(store, pairs, manifest, progress)


def _build_there(store: PairStore, pairs: Sequence[Pair], manifest: dict[str, Any], progress: bool) -> None:
    building = store.folder.with_name(f"{store.folder.name}.building-{os.getpid()}")
    try:
        building.mkdir()
        checksums = _decode_all(store, pairs, building, manifest["degradation"], progress)
        (building / "manifest.json").write_text(json.dumps({**manifest, "checksums": checksums}), encoding="utf-8")
        for file in building.iterdir():
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
        if store.folder.is_dir() and store._problem(manifest) is None:
            return  # another process was faster
        store._maps.clear()
        _move_into_place(building, store.folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _decode_all(store: PairStore, pairs: Sequence[Pair], folder: Path, degradation: str, progress: bool) -> list[int]:
    maps = {
        file: _allocate(folder / file, int(starts[-1])) for file, starts in (("gt.bin", store._gt_starts), ("lr.bin", store._lr_starts))
    }

    def decode(index: int) -> int:  # in a thread: decoding and resizing release the interpreter's lock
        gt = imgproc.crop_to_multiple(image_files.read_image(pairs[index].gt), store.upscale_factor)
        if gt.shape[:2] != store.gt_sizes[index]:
            raise ValueError(f"{pairs[index].gt}: changed while it was read; start again")
        lr = make_lr(pairs[index], gt, store.upscale_factor, degradation)
        gt, lr = np.ascontiguousarray(gt), np.ascontiguousarray(lr)
        maps["gt.bin"][store._gt_starts[index] : store._gt_starts[index + 1]] = gt.reshape(-1)
        maps["lr.bin"][store._lr_starts[index] : store._lr_starts[index + 1]] = lr.reshape(-1)
        return _checksum(gt, lr)

    with ThreadPoolExecutor(cores()) as pool:
        try:
            bar = tqdm(pool.map(decode, range(len(pairs))), "decoding once", len(pairs), unit="image", disable=not progress)
            checksums = list(bar)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for written in maps.values():
        written.flush()
    return checksums


def _allocate(path: Path, size: int) -> NDArray[np.uint8]:
    """A file of its full size, mapped; a disk that can't hold it is an OSError here and not a crash later."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    return np.memmap(path, np.uint8, "r+")


def _check_room(store: PairStore) -> None:
    needed = int(store._gt_starts[-1] + store._lr_starts[-1])
    free = shutil.disk_usage(store.folder.parent).free
    if free < needed * 1.02 + 2**20:
        raise OSError(
            f"{store.folder.parent}: the decoded images need {needed / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB are free; "
            "make room, or set cache_dir to another disk"
        )


def _remove_leftovers(folder: Path) -> None:
    """Delete what interrupted builds left; a build that still runs has written within the last ten minutes."""
    for left in (*folder.parent.glob(f"{folder.name}.building-*"), *folder.parent.glob(f"{folder.name}.stale-*")):
        with contextlib.suppress(FileNotFoundError):  # another process removes it too
            newest = max(file.stat().st_mtime for file in (left, *left.iterdir()))
            if time.time() - newest > 600 or left.name.endswith(f"-{os.getpid()}"):
                shutil.rmtree(left, ignore_errors=True)


def _move_into_place(building: Path, folder: Path) -> None:
    stale = folder.with_name(f"{folder.name}.stale-{os.getpid()}")
    if folder.exists():
        folder.rename(stale)
    building.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)

"""The decode-once cache of training images: raw uint8 GT and LR in two files, memory-mapped and shared by all processes.

store = PairStore.open_or_build({"T91": dataset.find_pairs("data/T91", 4)}, 4, "BI", cache_dir=".cache")
store.gt(0), store.lr(0)                       # read-only views, uint8 (H, W, 3) and (h, w, 3)
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import files
import image_files
import imgproc
from dataset import Pair, Size, gt_sizes, in_parallel, make_lr
from imgproc import RGB


class PairStore:
    """Decoded training images: gt.bin and lr.bin hold the pixels, manifest.json the sources, sizes and checksums.

    Opening a store takes no memory of its own. Worker processes may receive one: each maps the files itself.
    """

    VERSION = 1

    def __init__(self, folder: Path, sizes: Sequence[Size], upscale_factor: int, names: Sequence[str] = ()) -> None:
        self.folder = folder
        self.names = list(names) or [str(index) for index in range(len(sizes))]
        self.upscale_factor = upscale_factor
        self.gt_sizes = list(sizes)
        self.lr_sizes = [(height // upscale_factor, width // upscale_factor) for height, width in sizes]
        self._starts = {file: _starts(sizes) for file, sizes in (("gt.bin", self.gt_sizes), ("lr.bin", self.lr_sizes))}
        self._maps: dict[str, NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        return len(self.gt_sizes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    @property
    def content(self) -> str:
        """A checksum of all names and pixels."""
        checksums = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))["checksums"]
        return f"{zlib.crc32(repr((self.names, checksums)).encode()):08x}"

    def gt(self, index: int) -> RGB:
        return self._view("gt.bin", self.gt_sizes, index)

    def lr(self, index: int) -> RGB:
        return self._view("lr.bin", self.lr_sizes, index)

    def _view(self, file: str, sizes: Sequence[Size], index: int) -> RGB:
        if file not in self._maps:
            self._maps[file] = np.asarray(np.memmap(self.folder / file, np.uint8, "r"))
        start, end = self._starts[file][index : index + 2]
        return self._maps[file][start:end].reshape(*sizes[index], 3)

    @classmethod
    def open_or_build(
        cls,
        sets: Mapping[str, Sequence[Pair]],
        upscale_factor: int,
        degradation: str,
        cache_dir: str | os.PathLike,
        *,
        sizes: Sequence[Size] | None = None,
        progress: bool = True,
    ) -> "PairStore":
        """The store of these sets; built if there is none, or if it is damaged or older than its sources.

        Args:
            sizes: what `dataset.gt_sizes` says of all pairs, where the caller has read their headers already.

        Raises:
            OSError: the disk has too little room.
            ValueError: a source cannot be read, or a pair does not fit.
        """
        pairs = [pair for members in sets.values() for pair in members]
        sizes = gt_sizes(pairs, upscale_factor) if sizes is None else sizes
        expected = {
            "version": cls.VERSION,
            "upscale_factor": upscale_factor,
            "degradation": degradation,
            "gt_sizes": [list(size) for size in sizes],
            "sources": [_fingerprint(pair) for pair in pairs],
        }
        folder = Path(cache_dir).absolute() / _store_name(sets, upscale_factor, degradation)

        def unopened() -> PairStore:  # a new one each time, as an older one may have mapped files that were replaced
            return cls(folder, sizes, upscale_factor, [pair.gt.name for pair in pairs])

        store = unopened()
        problem = store._problem(expected) if folder.is_dir() else ""
        if problem is None:
            return store
        if problem and progress:
            tqdm.write(f"{folder}: {problem}; building it again")
        store._maps.clear()  # some systems do not move open files
        with files.made_folder(folder.parent):
            files.remove_leftovers(folder.parent, f"{folder.name}.*", idle_seconds=600)  # a build that still runs has just written
            _check_room(store)
            with contextlib.suppress(_BuiltMeanwhileError), files.replacing(folder) as building:
                building.mkdir()
                checksums = _decode_all(store, pairs, building, degradation, progress)
                (building / "manifest.json").write_text(json.dumps({**expected, "checksums": checksums}), encoding="utf-8")
                if folder.is_dir() and unopened()._problem(expected) is None:
                    raise _BuiltMeanwhileError  # by another process, which may be using its files already
        return unopened()

    def _problem(self, expected: Mapping[str, Any]) -> str | None:
        """What is wrong with the files on disk, or None."""
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
            checksums = list(manifest["checksums"])
        except (OSError, ValueError, KeyError, TypeError):
            return "its manifest is missing or damaged"
        if {key: manifest.get(key) for key in expected} != expected:
            return "its sources have changed"
        for file, starts in self._starts.items():
            if not (self.folder / file).is_file() or (self.folder / file).stat().st_size != starts[-1]:
                return f"{file} is cut off"
        step = 1 + int(self._starts["gt.bin"][-1] // _CHECKED_BYTES)  # all images of a small store, evenly spread ones of a large store
        for index in range(0, len(self), step):
            if [_checksum(self.gt(index), self.lr(index))] != checksums[index : index + 1]:
                return f"image {index} is damaged"
        return None


class _BuiltMeanwhileError(Exception):
    pass


_CHECKED_BYTES = 2**30  # compared with their checksums whenever a store is opened; a second's work


def _starts(sizes: Sequence[Size]) -> NDArray[np.int64]:
    return np.cumsum([0] + [height * width * 3 for height, width in sizes], dtype=np.int64)


def _store_name(sets: Mapping[str, Sequence[Pair]], scale: int, degradation: str) -> str:
    folders = sorted({str(folder) for pairs in sets.values() for pair in pairs for folder in (pair.gt.parent, pair.lr and pair.lr.parent)})
    names = "+".join(re.sub(r"\W+", "-", Path(name).name) for name in sets)[:60]
    return f"{names}_{degradation}x{scale}_{hashlib.sha256(json.dumps(folders).encode()).hexdigest()[:8]}"


def _fingerprint(pair: Pair) -> list[Any]:
    sources = [pair.gt] if pair.lr is None else [pair.gt, pair.lr]
    return [pair.name, *([str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in sources)]


def _checksum(gt: RGB, lr: RGB) -> int:
    return zlib.crc32(lr.data, zlib.crc32(gt.data))


def _check_room(store: PairStore) -> None:
    needed = sum(int(starts[-1]) for starts in store._starts.values())
    free = shutil.disk_usage(store.folder.parent).free
    if free < needed * 1.02 + 2**20:
        raise OSError(
            f"{store.folder.parent}: the decoded images need {needed / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB are free; "
            "make room, or set cache_dir to another disk"
        )


def _decode_all(store: PairStore, pairs: Sequence[Pair], folder: Path, degradation: str, progress: bool) -> list[int]:
    """Fill gt.bin and lr.bin; the checksum of each pair."""
    maps = {file: _allocate(folder / file, int(starts[-1])) for file, starts in store._starts.items()}

    def decode(index: int) -> int:  # in a thread: decoding and resizing release the interpreter's lock
        gt = imgproc.crop_to_multiple(image_files.read_image(pairs[index].gt), store.upscale_factor)
        if gt.shape[:2] != store.gt_sizes[index]:
            raise ValueError(f"{pairs[index].gt}: changed while it was read; start again")
        lr = make_lr(pairs[index], gt, store.upscale_factor, degradation)
        gt, lr = np.ascontiguousarray(gt), np.ascontiguousarray(lr)
        for file, image in (("gt.bin", gt), ("lr.bin", lr)):
            start, end = store._starts[file][index : index + 2]
            maps[file][start:end] = image.reshape(-1)
        return _checksum(gt, lr)

    checksums = in_parallel(decode, range(len(pairs)), "decoding once" if progress else "")
    for written in maps.values():
        written.flush()
    return checksums


def _allocate(path: Path, size: int) -> np.memmap:
    """A file of its full size, mapped; a disk that cannot hold it is an OSError here and not a crash later."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    return np.memmap(path, np.uint8, "r+")

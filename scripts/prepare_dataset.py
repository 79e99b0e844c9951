"""Lay out a set: GT images in `GT`, LR images in `LRbicx2` to `LRbicx8`, and if asked for in `LRBDx3` and `LRDNx3`:

    python scripts/prepare_dataset.py --input DIV2K_train_HR --output data/DIV2K
    python scripts/prepare_dataset.py --input data/Set5/GT --output data/Set5 --degradations BI BD DN
    python scripts/prepare_dataset.py --input DIV2K_train_HR --output data/DIV2K_sub --sub_image_size 480 --sub_image_step 240
    python scripts/prepare_dataset.py --input DIV2K_train_HR --output data/DIV2K --verify True

The LR images equal, bit for bit, those that training and testing make where there are none. Training here needs no sub-images, as it
decodes each image once; they are for other programs. Each is cut from the LR image of the whole image.

Run the same command again at any time: it makes what is missing, and makes again what came from a GT image that has changed. For
this, prepared.json lists the files made here, each with the name, bytes and time of its GT image. (Comparing only times would miss an
older image in the place of a newer one, and could not tell these files from yours.) Files that it doesn't list are never overwritten.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import environment  # noqa: F401 (names missing packages)

# isort: split

import filecmp
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

import dataset
import files
import image_files
import imgproc
from runtime import cores, run_script

MANIFEST = "prepared.json"

Factor = Literal[2, 3, 4, 8]


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    input: str  # folder of GT images; those of the set itself stay where they are
    output: str  # folder of the set, as data/DIV2K
    upscale_factors: tuple[Factor, ...] = (2, 3, 4, 8)  # of BI and photo
    degradations: tuple[Literal["BI", "BD", "DN", "photo"], ...] = ("BI",)  # as in config.py; photo is drawn by the image's name
    bd_dn_upscale_factors: tuple[Factor, ...] = (3,)  # of BD and DN; the paper has only 3
    sub_image_size: int = 0  # cut the images into squares of this side, GT pixels; smaller images stay whole; 0: don't cut
    sub_image_step: int = 0  # from one sub-image to the next, GT pixels; 0: their size, so that only the last ones overlap
    verify: bool = False  # only compare what is there with what its GT image gives; writes nothing
    num_workers: int = 0  # images in work at the same time; 0: one for each core that this process may use


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is missing or out of date, or verify what is there.

    Raises:
        OSError: the input is missing, or the output can't be written.
        ValueError: a GT image can't be used, a file is in the way or, for `verify`, differs or is missing.
    """
    config = tyro.cli(PrepareConfig, args=argv, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    if config.num_workers < 0:
        raise ValueError(f"num_workers={config.num_workers} must be 0 or more")
    whole, of_paper = config.upscale_factors, config.bd_dn_upscale_factors
    factors = {"BI": whole, "BD": of_paper, "DN": of_paper, "photo": whole}
    kinds = [(kind, factor) for kind in imgproc.DEGRADATIONS if kind in config.degradations for factor in sorted(set(factors[kind]))]
    if not kinds:
        raise ValueError("nothing to make: give at least one of degradations, and one of its upscale factors")
    output = Path(config.output).absolute()
    manifest = read_manifest(output)
    grid = choose_grid(config, math.lcm(*(factor for _, factor in kinds)), manifest)
    sources = find_sources(Path(config.input).absolute(), output, kinds, grid, manifest)
    number = sum(len(source.outputs) for source in sources)
    print(f"{len(sources)} GT images, {number} files belong to them in {output}")
    if config.verify:
        problems = run(compare, sources, "verifying", config.num_workers)
        if problems:
            raise ValueError(f"{len(problems)} of {number} files are not what their GT images give:{_listed(problems)}")
        print("all are as their GT images give")
        return
    with files.FolderLock(output):
        files.remove_leftovers(output)
        jobs = plan(sources, output, grid, manifest)
        print(f"{sum(len(job.outputs) for job in jobs)} of them have to be made")
        problems = run(make, jobs, "preparing", config.num_workers)
    if problems:
        raise ValueError(f"{len(problems)} of {len(sources)} GT images can't be used; all others are done:{_listed(problems)}")
    for degradation, factor in kinds:  # check the set as training will
        dataset.gt_sizes(dataset.find_pairs(output, factor, degradation), factor)


# Sub-images

Box = tuple[int, int, int, int]  # top, left, height, width, in GT pixels


@dataclass(frozen=True)
class Grid:
    """Where sub-images lie, in GT pixels; all places and sizes are multiples of `alignment`, so that LR pixels match."""

    size: int
    step: int
    alignment: int

    def places(self, side: int) -> list[tuple[int, int]]:
        """(start, length) along one side; the last one is moved back to the edge, or what is aligned of it."""
        usable = side // self.alignment * self.alignment
        length = min(self.size, usable)
        return [(start, length) for start in (*range(0, usable - length, self.step), usable - length)]

    def boxes(self, height: int, width: int) -> list[Box]:
        """All sub-images of an image, row by row."""
        return [(top, left, rows, columns) for top, rows in self.places(height) for left, columns in self.places(width)]


def choose_grid(config: PrepareConfig, alignment: int, manifest: dict[str, Any]) -> Grid | None:
    """The grid asked for, aligned as the files that are there already; None: whole images.

    Raises:
        ValueError: size and step don't fit the scales, or not what is there.
    """
    size, step = config.sub_image_size, config.sub_image_step or config.sub_image_size
    before = manifest["sub_images"]
    if before and before[2] % alignment == 0:
        alignment = before[2]  # made with further scales
    grid = Grid(size, step, alignment) if size or step else None
    if manifest["files"] and before != (list(vars(grid).values()) if grid else None):
        there = "sub-images of size {}, step {} and alignment {}".format(*before) if before else "whole images"
        raise ValueError(f"{config.output}: {there} are in it ({MANIFEST}); take those settings, or another output")
    for name, value in (("sub_image_size", size), ("sub_image_step", step)) if grid else ():
        if value <= 0 or value % alignment:
            below = value // alignment * alignment
            right = f"{below} or {below + alignment}" if below > 0 else f"{alignment}"
            raise ValueError(f"{name}={value} is no positive multiple of {alignment}, which the upscale factors need; set {right}")
    if step > size:
        raise ValueError(f"sub_image_step={step} leaves gaps between sub-images of {size}; set at most {size}")
    return grid


# What belongs where


@dataclass(frozen=True)
class Source:
    """A GT image, and the files that are made of it: by path, the degradation ("" for GT), its scale, and the part of the image."""

    pair: dataset.Pair
    state: list[Any]  # of its file: name, bytes, time in ns
    outputs: dict[Path, tuple[str, int, Box]]

    @property
    def gt(self) -> Path:
        return self.pair.gt

    def is_copy(self, path: Path) -> bool:
        """Whether an output is the GT image as a whole, byte for byte."""
        return path.name == self.gt.name and not self.outputs[path][0]

    def render(self, gt: imgproc.RGB) -> Iterator[tuple[Path, imgproc.RGB]]:
        """What each output has to hold: cuts of the GT image, or of the LR image of the whole GT image."""
        whole = {("", 1): gt}
        for path, (degradation, factor, box) in self.outputs.items():
            if (degradation, factor) not in whole:
                cropped = imgproc.crop_to_multiple(gt, factor)
                whole[degradation, factor] = dataset.make_lr(self.pair, cropped, factor, degradation)
            top, left, height, width = (value // factor for value in box)
            yield path, whole[degradation, factor][top : top + height, left : left + width]


def find_sources(folder: Path, output: Path, kinds: Sequence[tuple[str, int]], grid: Grid | None, manifest: dict[str, Any]) -> list[Source]:
    """The GT images of a folder, measured by their headers, with the files that belong into the set.

    Raises:
        FileNotFoundError: the folder is missing or holds no image.
        ValueError: the set holds other GT images; or some can't be read, are too small or named as one of a pair (all are listed).
    """
    pairs = dataset.find_pairs(folder, 1)  # at scale 1 there are no LR images
    try:
        place = dataset.find_pairs(output, 1)[0].gt.parent
        in_place = place.samefile(pairs[0].gt.parent)
        if not in_place and place.name != dataset.GT_FOLDERS[0]:
            raise ValueError(f"{place}: holds the GT images of this set; give this folder as input, or take another output")
        if grid and (in_place or not any((output / name).parent == place for name in manifest["files"])):
            raise ValueError(f"{place}: holds images already, with which sub-images can't be mixed; take another output")
    except FileNotFoundError:
        place, in_place = output / dataset.GT_FOLDERS[0], False
    smallest = grid.alignment if grid else max(factor for _, factor in kinds)
    sources, problems = [], []
    for pair in pairs:
        try:
            height, width = image_files.image_size(pair.gt)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        if min(height, width) < smallest:
            problems.append(f"{pair.gt}: {width}x{height} is too small, at least {smallest}x{smallest} is needed; remove it")
        if re.search(r"_SRF_\d_[HL]R$", pair.name):
            problems.append(f"{pair.gt}: is named as one of a pair; take a folder of GT images only, without _SRF_ in their names")
        parts = {pair.name: (0, 0, height, width)}
        if grid:
            parts = {f"{pair.name}_s{number:03d}": box for number, box in enumerate(grid.boxes(height, width), 1)}
        outputs = {place / (f"{part}.png" if grid else pair.gt.name): ("", 1, box) for part, box in parts.items() if not in_place}
        outputs |= {_lr_path(output, part, *kind): (*kind, box) for kind in kinds for part, box in parts.items()}
        state = pair.gt.stat()
        sources.append(Source(pair, [pair.gt.name, state.st_size, state.st_mtime_ns], outputs))
    if problems:
        raise ValueError(f"{folder}: nothing was written, as of {len(pairs)} GT images some can't be used:{_listed(problems)}")
    return sources


def _lr_path(output: Path, name: str, degradation: str, factor: int) -> Path:
    """Where training finds the LR image or, where it is absent, will look first."""
    folders = [output / folder.format(scale=factor) for folder in dataset.LR_FOLDERS[degradation]]
    known = [folder / f"{stem}.png" for folder in folders for stem in (name, f"{name}x{factor}")]
    return next((path for path in known if os.path.lexists(path)), known[0])


# Making


def read_manifest(output: Path) -> dict[str, Any]:
    """The grid, and the files made here that still exist: by path below `output`, the state of the GT image that each is made from.

    Raises:
        ValueError: it is damaged.
    """
    path = output / MANIFEST
    if not path.is_file():
        return {"version": 2, "sub_images": None, "files": {}}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["version"] == 2 and len(manifest["sub_images"] or "abc") == 3
        manifest["files"] = {name: [*state] for name, state in manifest["files"].items() if (output / name).is_file()}
    except (ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise ValueError(f"{path}: is damaged or of another version; remove it with the files made here, or take another output")
    return manifest


def plan(sources: Sequence[Source], output: Path, grid: Grid | None, manifest: dict[str, Any]) -> list[Source]:
    """What there is to make: sources, each with the outputs that it lacks.

    Files that are out of date are removed, and those to be made are listed in the manifest before they exist. So what an interrupted
    run leaves is either right or absent.

    Raises:
        ValueError: files are in the way, or are out of date but not to be made in this run.
    """
    gt_folder = sources[0].gt.parent
    made = {name: state for name, state in manifest["files"].items() if (output / name).parent != gt_folder}  # copies became GT images
    now = {source.pair.name: source.state for source in sources}
    old = {output / name: state[0] for name, state in made.items() if state != now.get(Path(state[0]).stem, state)}
    expected = {path: source for source in sources for path in source.outputs}
    problems = [
        f"{path}: was made from an older {name}; remove it, or give its scale and degradation too"
        for path, name in old.items() if path not in expected
    ]  # fmt: skip
    missing = {path for path in expected if path in old or not os.path.lexists(path)}
    for path, source in expected.items():
        is_ours = path in missing or path.relative_to(output).as_posix() in made
        if not is_ours and not (source.is_copy(path) and filecmp.cmp(path, source.gt, shallow=False)):
            problems.append(f"{path}: is not from this script; move it away, or leave its scale and degradation out")
    if problems:
        raise ValueError(f"nothing was written, as files are in the way:{_listed(problems)}")
    if old:
        print(f"{len(old)} files are made again, as their GT images have changed, first {min(old)}")
    for path in old:
        path.unlink()
    if missing:
        made |= {path.relative_to(output).as_posix(): source.state for path, source in expected.items() if path in missing}
        text = json.dumps({**manifest, "sub_images": [*vars(grid).values()] if grid else None, "files": made}, indent=1, sort_keys=True)
        files.write_text(output / MANIFEST, text)
    jobs = [replace(source, outputs={path: part for path, part in source.outputs.items() if path in missing}) for source in sources]
    return [job for job in jobs if job.outputs]


def make(source: Source) -> list[str]:
    """Write a GT image's files; returns what is wrong with the image, if it can't be decoded.

    Raises:
        OSError: something can't be written.
    """
    try:
        gt = image_files.read_image(source.gt)
    except (ValueError, OSError) as error:
        return [str(error)]
    for path, image in source.render(gt):
        if source.is_copy(path):
            files.write_whole(path, source.gt.read_bytes(), durable=False)
            os.utime(path, ns=(source.state[2], source.state[2]))  # so that the copy can stand for the GT image later
        else:
            image_files.write_image(path, image)
    return []


def compare(source: Source) -> list[str]:
    """Which files of a GT image are missing or hold other values."""
    try:
        gt = image_files.read_image(source.gt)
    except (ValueError, OSError) as error:
        return [str(error)]
    problems = []
    for path, expected in source.render(gt):
        try:
            found = image_files.read_image(path)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        if found.shape != expected.shape:
            problems.append(f"{path}: {found.shape[1]}x{found.shape[0]}, but {expected.shape[1]}x{expected.shape[0]} are right")
        elif not np.array_equal(found, expected):
            distance = np.abs(found.astype(np.int16) - expected)
            count = np.count_nonzero(distance)
            problems.append(f"{path}: {count:,} of {distance.size:,} values differ, by up to {distance.max()}")
    return problems


def run(work: Callable[[Source], list[str]], sources: Sequence[Source], label: str, num_workers: int) -> list[str]:
    """Do the work for each source in threads, as decoding, resizing and encoding release the interpreter's lock; joins the problems."""
    with ThreadPoolExecutor(num_workers or cores()) as pool:
        try:
            results = list(tqdm(pool.map(work, sources), label, len(sources), unit="image", disable=not sources))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [problem for problems in results for problem in problems]


def _listed(lines: Sequence[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)


if __name__ == "__main__":
    run_script(main)

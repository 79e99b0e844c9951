"""Lay out a set: originals in `GT`, LR images in `LRbicx2` to `LRbicx8`, and if asked for in `LRBDx3` and `LRDNx3`:

    python scripts/prepare_dataset.py --input DIV2K_train_HR --output data/DIV2K
    python scripts/prepare_dataset.py --input data/Set5/GT --output data/Set5 --degradations BI BD DN
    python scripts/prepare_dataset.py --input DIV2K_train_HR --output data/DIV2K_sub --sub_image_size 480 --sub_image_step 240
    python scripts/prepare_dataset.py --input DIV2K_train_HR --output data/DIV2K --verify True

The LR images are bit for bit what training and testing make where there are none. Training here needs no sub-images, as it
decodes each picture once; they are for programs that don't. Each is cut from the LR image of the whole picture.

What is there is kept, and nothing is ever deleted: the same command goes on after an interruption, and another scale or
original adds only what is missing. prepared.json says from which state of its original (name, bytes, time) a file is made;
files that it doesn't know are the user's, and are never written to.
"""

import contextlib
import filecmp
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataset
import files
import image_files
import imgproc
from runtime import run_script

MANIFEST = "prepared.json"

Factor = Literal[2, 3, 4, 8]


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    input: str  # the folder of originals; those in the set's own GT folder stay where they are
    output: str  # the set's folder, as data/DIV2K
    upscale_factors: tuple[Factor, ...] = (2, 3, 4, 8)  # of BI
    degradations: tuple[Literal["BI", "BD", "DN"], ...] = ("BI",)  # bicubic; blur and decimation; bicubic and noise
    bd_dn_upscale_factors: tuple[Factor, ...] = (3,)  # of BD and DN; the paper has only 3
    sub_image_size: int = 0  # cut the pictures into squares of this side, GT pixels; smaller ones stay whole; 0: don't cut
    sub_image_step: int = 0  # from one sub-image to the next, GT pixels; 0: their size, so that only the last ones overlap
    overwrite: bool = False  # make again what was made from originals that have changed since
    verify: bool = False  # only compare what is there with what its original gives; writes nothing
    num_workers: int = 0  # pictures in work at the same time; 0: one for each core that this process may use


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is missing, or verify what is there.

    Raises:
        OSError: the input is missing, or the output can't be written.
        ValueError: an original can't be used, a file there contradicts it, or, for `verify`, differs.
    """
    config = tyro.cli(PrepareConfig, args=argv, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    if config.num_workers < 0:
        raise ValueError(f"num_workers={config.num_workers} must be 0 or more")
    if config.verify and config.overwrite:
        raise ValueError("verify=True writes nothing, so overwrite=True contradicts it; set one of them")
    output = Path(config.output).absolute()
    manifest = read_manifest(output)
    grid = choose_grid(config, manifest)
    originals = read_originals(Path(config.input).absolute(), max(_factors(config)), grid)
    targets = find_targets(config, originals, grid)
    print(_summary(originals, grid))
    if config.verify:
        verify(originals, targets, config.num_workers)
    else:
        prepare(config, originals, targets, {**manifest, "sub_images": asdict(grid) if grid else None})


def _wanted(config: PrepareConfig) -> list[tuple[str, int]]:
    """(degradation, upscale_factor) of each LR folder."""
    factors = {"BI": config.upscale_factors, "BD": config.bd_dn_upscale_factors, "DN": config.bd_dn_upscale_factors}
    return [(kind, factor) for kind in imgproc.DEGRADATIONS if kind in config.degradations for factor in sorted(set(factors[kind]))]


def _factors(config: PrepareConfig) -> list[int]:
    factors = sorted({factor for _, factor in _wanted(config)})
    if not factors:
        raise ValueError("nothing to make: give at least one of degradations, and one of its upscale factors")
    return factors


# Sub-images


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

    def boxes(self, size: dataset.Size) -> list["Box"]:
        """All of a picture's sub-images, row by row."""
        rows, columns = (self.places(side) for side in size)
        return [(top, left, height, width) for top, height in rows for left, width in columns]


Box = tuple[int, int, int, int]  # top, left, height, width, in GT pixels


def choose_grid(config: PrepareConfig, manifest: Mapping[str, Any]) -> Grid | None:
    """The grid asked for, aligned as in the files that are there already; None: whole pictures.

    Raises:
        ValueError: size and step don't fit the scales, or not what is there.
    """
    size, step = config.sub_image_size, config.sub_image_step or config.sub_image_size
    before = manifest["sub_images"]
    if manifest["made_from"] and (before and [before["size"], before["step"]]) != ([size, step] if size else None):
        there = f"sub-images of size {before['size']} and step {before['step']}" if before else "whole pictures"
        raise ValueError(f"{config.output}: {there} are in it ({MANIFEST}), which can't be mixed; take those settings, or another output")
    factors = _factors(config)
    if not size and not step:
        return None
    if not size:
        raise ValueError(f"sub_image_step={step} needs sub_image_size; set both, or none for whole pictures")
    alignment = before["alignment"] if before and manifest["made_from"] else math.lcm(*factors)
    if any(alignment % factor for factor in factors):
        raise ValueError(
            f"{config.output}: its sub-images are aligned to {alignment} pixels, but upscale factors {_join(factors)} need "
            f"{math.lcm(alignment, *factors)}; take another output"
        )
    for name, value in (("sub_image_size", size), ("sub_image_step", step)):
        if value <= 0 or value % alignment:
            right = sorted({max(alignment, value // alignment * alignment + more) for more in (0, alignment)})
            raise ValueError(
                f"{name}={value} is no multiple of {alignment}, which upscale factors {_join(factors)} need; set {_join(right, ' or ')}"
            )
    if step > size:
        raise ValueError(f"sub_image_step={step} leaves gaps between sub-images of {size}; set at most {size}")
    return Grid(size, step, alignment)


# Originals


@dataclass(frozen=True)
class Original:
    """A picture to prepare, and the parts that it is cut into: one of its own name, or numbered sub-images."""

    path: Path
    size: dataset.Size
    fingerprint: str  # name, size and time of its file
    parts: dict[str, Box]


def read_originals(folder: Path, smallest: int, grid: Grid | None) -> list[Original]:
    """The pictures of a folder, by their headers.

    Raises:
        FileNotFoundError: the folder is missing or holds no image.
        ValueError: some can't be read, are too small or too large, or have one name; all are listed.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; input must be the folder of the originals")
    files = image_files.list_images(folder)
    if not files:
        raise FileNotFoundError(
            f"{folder}: no image is in it (folders in it are not searched); known are {', '.join(image_files.IMAGE_SUFFIXES)}"
        )
    smallest = grid.alignment if grid else smallest
    originals, problems = [], _name_problems(files)
    for file in files:
        try:
            originals.append(_read_original(file, smallest, grid))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"{folder}: nothing was written, as of {len(files)} originals some can't be used:{_listed(problems)}")
    return originals


def _name_problems(files: Sequence[Path]) -> list[str]:
    problems, named = [], {}
    for file in files:
        if file.stem in named:
            problems.append(f"{file}: has the same name as {named[file.stem].name}; rename one")
        if re.search(r"_SRF_\d_[HL]R$", file.stem):  # of a folder that holds pairs, or a pair's name without its partner
            problems.append(f"{file}: is named as one of a pair; take a folder of originals only, without _SRF_…_HR in their names")
        named[file.stem] = file
    return problems


def _read_original(file: Path, smallest: int, grid: Grid | None) -> Original:
    height, width = image_files.image_size(file)
    if min(height, width) < smallest:
        raise ValueError(f"{file}: {width}x{height} is too small, at least {smallest}x{smallest} is needed; remove it")
    if height * width > image_files.MAX_PIXELS:
        raise ValueError(f"{file}: {width}x{height} is more than {image_files.MAX_PIXELS:,} pixels; cut it into parts")
    state = file.stat()
    boxes = {file.stem: (0, 0, height, width)}
    if grid:
        boxes = {f"{file.stem}_s{number:03d}": box for number, box in enumerate(grid.boxes((height, width)), 1)}
    return Original(file, (height, width), f"{file.name}, {state.st_size} bytes, {state.st_mtime_ns} ns", boxes)


def _summary(originals: Sequence[Original], grid: Grid | None) -> str:
    parts = [box for original in originals for box in original.parts.values()]
    if grid is None:
        return f"{len(originals)} originals"
    small = sum((height, width) != (grid.size, grid.size) for _, _, height, width in parts)
    smaller = f", {small} of them smaller, as their originals are" if small else ""
    return f"{len(originals)} originals, {len(parts)} sub-images of {grid.size}x{grid.size} every {grid.step} pixels{smaller}"


# Folders to fill


@dataclass(frozen=True)
class Target:
    """A folder of the set: the originals, or the LR images of one scale and degradation; and what is in it, by name."""

    folder: Path
    upscale_factor: int  # 1: the originals
    degradation: str
    files: dict[str, Path]
    copies: bool = False  # whole originals, byte for byte
    in_place: bool = False  # the originals lie here, so that there is nothing to make
    sub_images: bool = False

    def path(self, original: Original, part: str) -> Path:
        """Where this script puts the image."""
        return self.folder / (original.path.name if self.copies else f"{part}.png")

    def present(self, original: Original) -> dict[str, Path]:
        """The parts of a picture that are there, whoever made them."""
        return {part: self.files[part] for part in original.parts if part in self.files}

    def render(self, original: Original, picture: imgproc.RGB) -> dict[str, imgproc.RGB]:
        """What the files have to hold: cuts of the whole picture, or of the LR image of the whole picture."""
        scale, image = self.upscale_factor, picture
        if self.degradation:
            gt = imgproc.crop_to_multiple(picture, scale)
            image = dataset.make_lr(dataset.Pair(original.path.stem, original.path, None), gt, scale, self.degradation)
        places = {part: tuple(value // scale for value in box) for part, box in original.parts.items()}
        return {part: image[top : top + height, left : left + width] for part, (top, left, height, width) in places.items()}


def find_targets(config: PrepareConfig, originals: Sequence[Original], grid: Grid | None) -> list[Target]:
    """The folders that `dataset.find_pairs` will look into, the originals' first.

    Raises:
        ValueError: sub-images would be mixed with other pictures, or two files have one name.
    """
    output, source = Path(config.output).absolute(), Path(config.input)
    folder = _first_with_images([*(output / name for name in dataset.GT_FOLDERS), output])
    in_place = folder.is_dir() and folder.samefile(source)
    if grid and _images_in(folder) and (in_place or not (output / MANIFEST).is_file()):
        raise ValueError(f"{folder}: holds pictures already, with which sub-images can't be mixed; take another output")
    gt_files = _by_name(_images_in(folder), lambda stem: stem)
    targets = [Target(folder, 1, "", gt_files, copies=grid is None, in_place=in_place, sub_images=grid is not None)]
    names = gt_files.keys() | {part for original in originals for part in original.parts}
    for degradation, factor in _wanted(config):
        folder = _first_with_images([output / name.format(scale=factor) for name in dataset.LR_FOLDERS[degradation]])
        files = _by_name(_images_in(folder), lambda stem, ending=f"x{factor}": stem if stem in names else stem.removesuffix(ending))
        targets.append(Target(folder, factor, degradation, files, sub_images=grid is not None))
    return targets


def _first_with_images(folders: Sequence[Path]) -> Path:
    return next(filter(_images_in, folders), folders[0])


def _images_in(folder: Path) -> list[Path]:
    return image_files.list_images(folder) if folder.is_dir() else []


def _by_name(files: Sequence[Path], to_name: Callable[[str], str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for file in files:
        if named.setdefault(to_name(file.stem), file) != file:
            raise ValueError(f"{file}: has the same name as {named[to_name(file.stem)].name}; move one away")
    return named


# The manifest


def read_manifest(output: Path) -> dict[str, Any]:
    """What this script has made in a folder, or is about to make: settings, and the state of the originals by folder and name.

    Whether a file is there, only the file itself says. A state of null is that of an old file that is being overwritten.

    Raises:
        ValueError: it is damaged.
    """
    path = output / MANIFEST
    if not path.is_file():
        return {"version": 1, "sub_images": None, "made_from": {}}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["version"] == 1 and {"sub_images", "made_from"} <= manifest.keys()
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(
            f"{path}: is damaged or of another version; move it away (then all files count as the user's), or take another output"
        )
    return manifest


def _states(manifest: Mapping[str, Any], target: Target, output: Path) -> dict[str, Any]:
    states = manifest["made_from"].setdefault(target.folder.relative_to(output).as_posix(), {})
    if target.in_place:
        states.clear()  # they may have been copies, but are the originals now
    return states


def _write_manifest(output: Path, manifest: Mapping[str, Any]) -> None:
    made_from = {folder: states for folder, states in manifest["made_from"].items() if states}
    text = json.dumps({**manifest, "made_from": made_from}, indent=1)
    path = output / MANIFEST
    if path.read_text(encoding="utf-8") != text if path.is_file() else made_from:
        with _writing(path):
            files.write_text(path, text)


# Making what is missing


@dataclass(frozen=True)
class Job:
    """What a picture lacks: targets, and the parts to make there."""

    original: Original
    missing: list[tuple[Target, list[str]]]


States = dict[Path, dict[str, Any]]  # of each target's folder: by name, the fingerprint that its files are made from


def prepare(config: PrepareConfig, originals: Sequence[Original], targets: Sequence[Target], manifest: dict[str, Any]) -> None:
    """Make what is missing, and check the set as training will.

    Raises:
        OSError: something can't be written.
        ValueError: what is there contradicts the originals, and nothing was written; or some originals can't be decoded.
    """
    output = Path(config.output).absolute()
    _check_changes(config, originals, targets, manifest["made_from"])
    states = {target.folder: _states(manifest, target, output) for target in targets}
    kept = _count_foreign(originals, targets, states)
    jobs = plan(originals, targets, states)
    _note(jobs, states)  # before writing, so that an interrupted run will know its own files
    _write_manifest(output, manifest)
    problems = dict(zip((job.original.path for job in jobs), _in_parallel(make, jobs, "preparing", config.num_workers), strict=True))
    _note_results(jobs, states, problems)
    _write_manifest(output, manifest)
    made = sum(len(parts) for job in jobs for _, parts in job.missing if not problems[job.original.path])
    print(f"{made} files made" if jobs else "nothing was missing")
    if kept:
        print(f"{kept} LR images are not from this script and are kept; --verify True compares them with what their originals give")
    for target in targets:
        print(f"{target.folder}: {len(_images_in(target.folder))} images")
    failures = [problem for problem in problems.values() if problem]
    if failures:
        raise ValueError(f"{len(failures)} of {len(originals)} originals can't be used; all others are done:{_listed(failures)}")
    for degradation, factor in _wanted(config):
        dataset.gt_sizes(dataset.find_pairs(output, factor, degradation), factor)


def _count_foreign(originals: Sequence[Original], targets: Sequence[Target], states: States) -> int:
    """LR images that are there and that this script has not made."""
    foreign = ((target, original) for target in targets for original in originals if original.path.stem not in states[target.folder])
    return sum(len(target.present(original)) for target, original in foreign if target.degradation)


def _check_changes(config: PrepareConfig, originals: Sequence[Original], targets: Sequence[Target], made_from: Mapping[str, Any]) -> None:
    """Refuse originals that have changed, unless all that was made from them is made again."""
    output, here = Path(config.output).absolute(), {target.folder: target for target in targets}
    changed: dict[Path, list[str]] = {}
    for folder, known in ((output / name, known) for name, known in made_from.items()):
        old = [original for original in originals if known.get(original.path.stem, original.fingerprint) != original.fingerprint]
        if folder in here:
            old = [original for original in old if here[folder].present(original)]
        if old and _images_in(folder):
            changed[folder] = [original.path.name for original in old]
    names = _join(sorted({name for each in changed.values() for name in each}))
    if changed and not config.overwrite:
        raise ValueError(
            f"{originals[0].path.parent}: these have changed since they were prepared, or are other pictures of the same name: {names}; "
            "set --overwrite True to make theirs again, or take another output"
        )
    others = changed.keys() - here.keys()
    if others:
        raise ValueError(f"{_join(sorted(others))}: made from the old {names} too; add these scales and degradations to this run")


def plan(originals: Sequence[Original], targets: Sequence[Target], states: States) -> list[Job]:
    """What there is to make, after a look at the header of each file that is there; what has changed is made again.

    Raises:
        ValueError: files there are not what the originals need.
    """
    problems, jobs = _unpaired(originals, targets) + _left_over(originals, targets), []
    for original in tqdm(originals, "looking", unit="image", leave=False):
        missing = []
        for target in (target for target in targets if not target.in_place):
            present, again = target.present(original), _is_changed(original, target, states)
            known = original.path.stem in states[target.folder]
            for part, file in present.items():
                problems += _problems(original, target, part, file, known, again)
            parts = [part for part in original.parts if again or part not in present]
            if parts:
                missing.append((target, parts))
        if missing:
            jobs.append(Job(original, missing))
    if problems:
        raise ValueError(f"nothing was written, as files are in the way:{_listed(problems)}")
    return jobs


def _is_changed(original: Original, target: Target, states: States) -> bool:
    made_from = states[target.folder].get(original.path.stem, original.fingerprint)
    return made_from != original.fingerprint and bool(target.present(original))


def _problems(original: Original, target: Target, part: str, file: Path, known: bool, again: bool) -> list[str]:
    """What is wrong with a file that is there, if anything."""
    if again:  # to be overwritten
        return [] if file == target.path(original, part) else [f"{file}: is not from this script; move it away"]
    if target.sub_images and not known:
        return [f"{file}: is not from this script; take another output for sub-images"]
    if target.copies and not known:
        same = filecmp.cmp(file, original.path, shallow=False)
        return [] if same else [f"{file}: is another file than {original.path}; rename one, or take another output"]
    height, width = (side // target.upscale_factor for side in original.parts[part][2:])
    try:
        found = image_files.image_size(file)
    except (ValueError, OSError) as error:
        return [f"{error}; or remove it, and it is made again"]
    needed = f"{width}x{height} are needed; remove it, and it is made again"
    return [] if found == (height, width) else [f"{file}: {found[1]}x{found[0]}, but {needed}"]


def _unpaired(originals: Sequence[Original], targets: Sequence[Target]) -> list[str]:
    """What training would refuse: pictures there whose original isn't in the input, with LR images at some scales only."""
    (gt, *others), problems = targets, []
    parts = {part for original in originals for part in original.parts}
    for target in others:
        lacking = sorted(gt.files.keys() - target.files.keys() - parts)
        if lacking:
            count = f"{gt.files[lacking[0]]}: this and {len(lacking) - 1} more there" if lacking[1:] else str(gt.files[lacking[0]])
            problems.append(
                f"{count} would have no partner in {target.folder}, as the input lacks the originals; take an input that has all"
            )
        for name in sorted(target.files.keys() - gt.files.keys() - parts):
            problems.append(f"{target.files[name]}: its original is neither in the input nor in {gt.folder}; move it away")
    return problems


def _left_over(originals: Sequence[Original], targets: Sequence[Target]) -> list[str]:
    """Sub-images of places that an original no longer has, since it is smaller than before."""
    parts = {original.path.stem: original.parts for original in originals}
    problems = []
    for target in (target for target in targets if target.sub_images):
        stems = {file: re.sub(r"_s\d{3,}$", "", name) for name, file in target.files.items()}
        left = [file for file, stem in stems.items() if stem in parts and file.stem not in parts[stem]]
        if left:
            problems.append(
                f"{target.folder}: the originals, as they are now, have no {_join(file.name for file in left)}; move these away"
            )
    return problems


def _note(jobs: Sequence[Job], states: States) -> None:
    for job in jobs:
        for target, parts in job.missing:  # what is there says nothing of its state until it is overwritten
            overwritten = any(part in target.files for part in parts)
            states[target.folder][job.original.path.stem] = None if overwritten else job.original.fingerprint


def _note_results(jobs: Sequence[Job], states: States, problems: Mapping[Path, str | None]) -> None:
    for job in jobs:
        for target, _ in job.missing:
            name = job.original.path.stem
            if not problems[job.original.path]:
                states[target.folder][name] = job.original.fingerprint
            elif not target.present(job.original):
                del states[target.folder][name]


def make(job: Job) -> str | None:
    """Write what a picture lacks; returns what is wrong with the original, if it can't be decoded.

    Raises:
        OSError: something can't be written.
    """
    try:
        picture = _decode(job.original)
    except (ValueError, OSError) as error:
        return str(error)
    for target, parts in job.missing:
        with _writing(target.folder):
            if target.copies:
                _copy(job.original.path, target.path(job.original, parts[0]))
                continue
            images = target.render(job.original, picture)
            for part in parts:
                image_files.write_image(target.path(job.original, part), images[part])
    return None


def _decode(original: Original) -> imgproc.RGB:
    picture = image_files.read_image(original.path)
    if picture.shape[:2] != original.size:
        raise ValueError(f"{original.path}: changed while it was read; start again")
    return picture


def _copy(source: Path, path: Path) -> None:
    """Copy a file with its time of change, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        shutil.copyfile(source, part)
        os.utime(part, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns))  # so that the copy can stand for the original later
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# Verifying


def verify(originals: Sequence[Original], targets: Sequence[Target], num_workers: int) -> None:
    """Compare every file with what its original gives, value by value.

    Raises:
        ValueError: some differ or are missing; each is listed, with how many values differ and by how much.
    """
    found = _in_parallel(lambda original: compare(original, targets), originals, "verifying", num_workers)
    problems = [problem for each in found for problem in each]
    files = sum(len(original.parts) for target in targets if not target.in_place for original in originals)
    if problems:
        raise ValueError(f"{len(problems)} of {files} files are not what their originals give:{_listed(problems)}")
    for target in targets:
        print(f"{target.folder}: {len(target.files)} images{', the originals' if target.in_place else ', all as their originals give'}")


def compare(original: Original, targets: Sequence[Target]) -> list[str]:
    """What differs, of one picture, in all folders."""
    try:
        picture = _decode(original)
    except (ValueError, OSError) as error:
        return [str(error)]
    problems = []
    for target in (target for target in targets if not target.in_place):
        for part, image in target.render(original, picture).items():
            file = target.files.get(part)
            problem = f"{target.path(original, part)}: is missing" if file is None else _difference(file, image)
            problems += [problem] if problem else []
    return problems


def _difference(file: Path, expected: imgproc.RGB) -> str | None:
    try:
        found = image_files.read_image(file)
    except (ValueError, OSError) as error:
        return str(error)
    if found.shape != expected.shape:
        return f"{file}: {found.shape[1]}x{found.shape[0]}, but {expected.shape[1]}x{expected.shape[0]} are right"
    distance = np.abs(found.astype(np.int16) - expected)
    count = np.count_nonzero(distance)
    return f"{file}: {count:,} of {distance.size:,} values differ, by up to {distance.max()}" if count else None


# Helpers

Item, Result = TypeVar("Item"), TypeVar("Result")


def _in_parallel(function: Callable[[Item], Result], items: Sequence[Item], label: str, num_workers: int) -> list[Result]:
    """In threads, each with one picture: decoding, resizing and encoding release the interpreter's lock."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(num_workers or cores) as pool:
        try:
            return list(tqdm(pool.map(function, items), label, len(items), unit="image", disable=not items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"{path}: can't be written ({reason}); make room or take another output, and start again: what is done is kept"
        ) from None


def _join(values: Iterable[object], by: str = ", ") -> str:
    return by.join(map(str, values))


def _listed(lines: Sequence[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)


if __name__ == "__main__":
    run_script(main)

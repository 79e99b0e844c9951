"""Upscale your own images; no GT images are needed:

python inference.py --input photo.jpg --output large.png            # the light network of this repository
python inference.py --input photos --output upscaled                # a folder
python inference.py --input photos --output upscaled --outscale 2.5 --output_format same --existing skip
python inference.py --model_path results/rcan_x4/best.pth.tar --input photos --output upscaled
"""

import environment  # noqa: F401 (names missing packages)

# isort: split

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

import html_report
import image_files
import imgproc
import utils
import weights
from config import released_weights
from files import check_folder, explain
from image_files import FORMATS, IMAGE_SUFFIXES, Photo, check_writable, list_images, read_photo, write_photo
from runtime import run_script, start_runtime
from upscaling import upscale


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    input: str  # read this image, or every image in this folder and the folders in it
    output: str = "results/inference"  # write into this folder, under the inputs' names and folders; for one image also a file's path
    existing: Literal["refuse", "skip", "overwrite"] = "refuse"  # where a result is already there: stop, leave it, or replace it
    model_path: str = ""  # load weights of any known layout; empty: this repository's light network
    upscale_factor: Literal[2, 3, 4, 8] | None = None  # of the light network, None: 4; with model_path it must be that of the file
    outscale: float | None = None  # multiply the input's size by this, adjusting by bicubic; None: the network's scale
    output_format: Literal["png", "same", "jpg", "webp", "tif", "bmp"] = "png"  # write this format; same: each input's own
    quality: int | None = None  # compress JPEG and WebP to this quality, 1 to 100; at 100, WebP is lossless; None: 95
    self_ensemble: bool = False  # average over the eight flips and rotations of the image (RCAN+); eight times as slow
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # compute in this precision; auto: bf16 where the device is fast at it
    tile: int = 0  # cut images into tiles of this side, LR pixels, if memory is too small; changes results; 0: whole images
    tile_overlap: int | None = None  # blend neighbouring tiles over this many LR pixels; None: 32
    compare: bool = False  # also write report.html into the output folder: each result beside bicubic, with a slider and zoom

    def __post_init__(self) -> None:
        for name in ("input", "output", "model_path"):
            if getattr(self, name).startswith("~"):
                raise ValueError(f"{name}={getattr(self, name)!r}: ~ is only replaced by shells, and not here: write the whole path")
        if self.outscale is not None and not 0 < self.outscale <= 64:
            raise ValueError(f"outscale={self.outscale} must be greater than 0 and at most 64")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} must be 1 to 100")
        if self.tile_overlap is not None and not self.tile:
            raise ValueError(f"tile_overlap={self.tile_overlap} has no effect without tiles: leave it out, or set --tile 256")
        if self.tile < 0 or self.overlap < 0 or 0 < self.tile <= 2 * self.overlap:
            raise ValueError(f"tile={self.tile} must be 0, or more than twice tile_overlap={self.overlap}, as in --tile 256")

    @property
    def overlap(self) -> int:
        return 32 if self.tile_overlap is None else self.tile_overlap


def main(argv: Sequence[str] | None = None) -> None:
    """Upscale a file or a folder, print every written path, and list what failed."""
    config = tyro.cli(InferenceConfig, args=argv, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    source, output = Path(config.input), Path(config.output)
    inputs = find_inputs(source, output)
    targets = plan_outputs(inputs, source, output, config.output_format)
    if config.quality is not None and {"JPEG", "WEBP"}.isdisjoint(FORMATS[path.suffix.lower()] for path in targets.values()):
        raise ValueError(
            f"quality={config.quality} has no effect, as no result is JPEG or WebP: leave it out, or choose another output_format"
        )
    if source.is_dir() and (others := image_files.passed_over(source, nested=True)):
        print(others)
    page = (output.parent if output in targets.values() else output) / "report.html" if config.compare else None
    inputs = keep_existing(targets, config.existing)
    page = html_report.keep_existing(page, config.existing)
    if not inputs:
        if page:
            print(f"note: {page}: not written, as no image is upscaled")
        return
    for folder in {path.parent for path in targets.values()}:
        check_folder(folder)
    runtime = start_runtime(alone=True)
    path = Path(config.model_path) if config.model_path else released_weights(config.upscale_factor or 4)
    network = weights.load(path)
    if config.upscale_factor not in (None, network.upscale_factor):
        raise ValueError(
            f"upscale_factor={config.upscale_factor}, but {path} enlarges {network.upscale_factor} times: leave upscale_factor out, choose "
            "other weights, or set --outscale for another size of the results"
        )
    network = network.to(runtime.device)
    precision = utils.choose_precision(config.precision, runtime.device)
    print(f"{weights.describe(network)}; computing in {precision}")
    if config.tile:
        print(f"tiles of {config.tile} pixels: the network's attention averages over a tile, so results differ from those of whole images")

    def enlarge(image: NDArray) -> NDArray:
        return upscale(network, image, config.self_ensemble, precision=precision, tile=config.tile, tile_overlap=config.overlap)

    report = html_report.Report("Upscaled images", [f"{weights.describe(network)}; computed in {precision}"], count=len(inputs))

    def show(file: Path, photo: Photo, result: Photo) -> None:
        if page:
            report.add_enlarged(str(targets[file].relative_to(page.parent)), photo, result, inputs.index(file))

    failed = []
    bar = tqdm(upscale_files(inputs, targets, enlarge, network.upscale_factor, config, show), "upscaling", len(inputs), unit="image")
    for file, written in bar:
        try:
            bar.write("\n    ".join([str(targets[file].absolute()), *written.result()]))
        except (ValueError, OSError, MemoryError) as error:  # the remaining files are still processed
            problem = explain(error) if isinstance(error, OSError) else str(error) or "too little memory; free some, or set --tile 256"
            failed.append(problem if str(file) in problem else f"{file}: {problem}")
    if page:
        report.notes += [f"Failed: {problem}" for problem in failed]
        report.notes += [f"Not compared, as the result was already there: {file}" for file in targets if file not in inputs]
        bar.write("\n    note: ".join([str(page.absolute()), *report.write(page)]))
    if failed:
        listed = "".join(f"\n    {problem}" for problem in failed)
        raise ValueError(f"{len(failed)} of {len(inputs)} images failed:{listed}" if len(inputs) > 1 else failed[0])


# Files


def find_inputs(path: Path, output: Path) -> list[Path]:
    """The image, or all images in the folder and the folders in it, except hidden ones and those in `output`.

    Raises:
        FileNotFoundError: there is no such path, or no image in the folder.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder; give an image or a folder of images with --input")
    results = output.resolve() if output.resolve() != path.resolve() else None
    found = [file for file in list_images(path, nested=True) if results is None or not file.parent.resolve().is_relative_to(results)]
    if not found:
        others = image_files.passed_over(path, nested=True)
        known = ", ".join(IMAGE_SUFFIXES)
        raise FileNotFoundError(f"{path.absolute()}: no image in it; known endings are {known}{f'; {others}' if others else ''}")
    return found


def plan_outputs(inputs: Sequence[Path], root: Path, folder: Path, output_format: str) -> dict[Path, Path]:
    """The path of each result: the name and folder of its input, or `folder` itself if it is the path of an image, for one input.

    Inputs that would share a path keep their endings in the name. With "same", formats that aren't written become PNG.

    Raises:
        ValueError: a result would overwrite an input or another result, or its format can't be written.
    """

    def target(file: Path, name: str) -> Path:
        nested = file.parent.relative_to(root) if root.is_dir() else Path()
        own = file.suffix.lower() if file.suffix.lower() in FORMATS else ".png"
        return folder / nested / f"{name}{own if output_format == 'same' else f'.{output_format}'}"

    if folder.suffix.lower() in (*IMAGE_SUFFIXES, ".heic", ".heif") and not folder.is_dir():
        if root.is_dir():
            raise ValueError(f"output={str(folder)!r} is the name of one image, but {root} is a folder: give a folder with --output")
        if folder.suffix.lower() not in FORMATS:
            raise ValueError(f"output={str(folder)!r}: {folder.suffix} can't be written; choose {', '.join(FORMATS)}")
        if output_format not in ("png", "same") and FORMATS[folder.suffix.lower()] != FORMATS[f".{output_format}"]:
            raise ValueError(f"output={str(folder)!r} contradicts output_format={output_format!r}: leave one out")
        targets = {inputs[0]: folder}
    else:
        shared = Counter(str(target(file, file.stem)).lower() for file in inputs)  # some systems don't tell A from a
        targets = {file: target(file, file.stem) for file in inputs}
        targets = {file: target(file, file.name) if shared[str(path).lower()] > 1 else path for file, path in targets.items()}
    taken: dict[str, Path] = {}
    for file, path in targets.items():
        other = taken.setdefault(str(path).lower(), file)
        if other != file:
            raise ValueError(f"{file} and {other} would both be written to {path}: rename one")
    resolved = {file.resolve() for file in inputs}
    for file, path in targets.items():
        if path.resolve() in resolved:
            raise ValueError(f"{path}: would be overwritten by the upscaled {file.name}: choose another --output")
    return targets


def keep_existing(targets: Mapping[Path, Path], existing: str) -> list[Path]:
    """The inputs to upscale: all, or with "skip" those without a result.

    Raises:
        ValueError: a result is already there, and `existing` is "refuse".
    """
    present = [path for path in targets.values() if path.exists()]
    if present and existing == "refuse":
        raise ValueError(
            f"{present[0]}: is already there, as are {len(present)} of {len(targets)} results; set --existing skip to keep them, "
            "--existing overwrite to replace them, or another --output"
        )
    if present and existing == "skip":
        print(f"skipped {len(present)} of {len(targets)} images, whose results are already there, whatever made them")
        return [file for file, path in targets.items() if not path.exists()]
    return list(targets)


# Pixels


Notes = list[str]


def upscale_files(
    inputs: Sequence[Path],
    targets: Mapping[Path, Path],
    enlarge: Callable[[NDArray], NDArray],
    scale: int,
    config: InferenceConfig,
    show: Callable[[Path, Photo, Photo], None],
) -> Iterator[tuple[Path, Future[Notes]]]:
    """Each image with the notes for the user, or the error, that its upscaling ends with.

    While the network computes, the image before is written and the image after is read.
    """
    with ThreadPoolExecutor(2) as pool:
        before: list[tuple[Path, Future[Notes]]] = []
        following = pool.submit(read_photo, inputs[0])
        for index, file in enumerate(inputs):
            photo = following
            if index + 1 < len(inputs):
                following = pool.submit(read_photo, inputs[index + 1])
            written: Future[Notes] = Future()
            try:
                result, notes = upscale_photo(photo.result(), targets[file].suffix, enlarge, scale, config)
                written = pool.submit(_write, targets[file], result, config.quality or 95, notes, partial(show, file, photo.result()))
                if result.pixels.nbytes > MANY_BYTES:
                    wait([written])
                del result
            except Exception as error:
                written.set_exception(error.with_traceback(None))  # which keeps images alive
            del photo
            yield from before
            before = [(file, written)]
        yield from before


MANY_BYTES = 2**28  # no further image is computed while one as large waits in memory


def _write(target: Path, result: Photo, quality: int, notes: Notes, show: Callable[[Photo], None]) -> Notes:
    write_photo(target, result, quality)
    show(result)
    return notes


def upscale_photo(
    photo: Photo, suffix: str, enlarge: Callable[[NDArray], NDArray], scale: int, config: InferenceConfig
) -> tuple[Photo, Notes]:
    """The photo for a file with this ending, and notes and warnings for the user."""
    height, width = photo.pixels.shape[:2]
    factor = config.outscale or scale
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    notes = [f"note: {note}" for note in (*photo.notes, *check_writable(photo, suffix, size))]
    if factor > scale:
        notes.append(f"note: larger than the network's x{scale}; the rest is bicubic")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = enlarge_photo(photo, enlarge, size)
    return result, notes + [f"warning: {warning.message}" for warning in caught]


def enlarge_photo(photo: Photo, enlarge: Callable[[NDArray], NDArray], size: tuple[int, int]) -> Photo:
    """Enlarge pixels and alpha by the network, then bicubically to (height, width) where the network gives another size."""
    hidden = np.zeros(photo.pixels.shape[:2], bool) if photo.alpha is None else photo.alpha == 0
    pixels = _to_size(enlarge(imgproc.spread_colours(photo.pixels, hidden)), size)
    if photo.gray:
        pixels = np.repeat(_mean(pixels)[:, :, None], 3, 2)
    if photo.alpha is None:
        return replace(photo, pixels=pixels)
    if (photo.alpha == photo.alpha[0, 0]).all():
        alpha = np.full(size, photo.alpha[0, 0])
    else:
        alpha = _mean(_to_size(enlarge(np.repeat(photo.alpha[:, :, None], 3, 2)), size))
    return replace(photo, pixels=pixels, alpha=alpha)


def _to_size(image: NDArray, size: tuple[int, int]) -> NDArray:
    return image if image.shape[:2] == size else imgproc.imresize_to(image, *size)


def _mean(image: NDArray) -> NDArray:
    """(H, W, 3) -> (H, W), rounded, of the same type: the network's three channels of a gray image differ a little."""
    return np.round(image.mean(2)).astype(image.dtype)


if __name__ == "__main__":
    run_script(main)

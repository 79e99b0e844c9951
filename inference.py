"""Enlarge your own images; no GT images are needed:

python inference.py photo.jpg                                       # 4 times, into results/inference
python inference.py photo.jpg holiday -s 2 -o enlarged              # images and folders
python inference.py holiday -o enlarged --outscale 2.5 --output_format same --existing skip
python inference.py --model_path results/rcan_x4/best.pth.tar --input photos --output enlarged
"""

import environment  # noqa: F401 (names missing packages)

# isort: split
from config import answer_help
from config_inference import InferenceConfig, parse

if __name__ == "__main__":
    answer_help(parse)

import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

import html_report
import image_files
import imgproc
import model
import utils
import weights
from config import released_weights
from files import check_folder, explain
from image_files import FORMATS, IMAGE_SUFFIXES, Photo, check_writable, list_images, read_photo, write_photo
from runtime import run_script, start_runtime
from upscaling import upscale


def main(argv: Sequence[str] | None = None) -> None:
    """Enlarge images: print a forecast, each result, and what failed."""
    begin = time.monotonic()
    config = parse(argv)
    output = Path(config.output)
    inputs = find_inputs([Path(path) for path in (*config.images, *config.input)], output)
    targets = plan_outputs(inputs, output, config.output_format)
    if config.quality is not None and {"JPEG", "WEBP"}.isdisjoint(FORMATS[path.suffix.lower()] for path in targets.values()):
        raise ValueError(
            f"quality={config.quality} has no effect, as no result is JPEG or WebP: leave it out, or choose another output_format"
        )
    page = (output.parent if output in targets.values() else output) / "report.html" if config.compare else None
    waiting = keep_existing(targets, config.existing)
    page = html_report.keep_existing(page, config.existing)
    if not waiting:
        if page:
            print(f"note: {page}: not written, as no image is enlarged")
        return
    for folder in {path.parent for path in targets.values()}:
        check_folder(folder)
    enlargers = Enlargers(config)
    sizes = {file: size for file in waiting if (size := _area(file))}
    seconds = enlargers.seconds_per_pixel() * sum(sizes.values())
    many = f"{len(waiting)} images" if len(waiting) > 1 else waiting[0].name
    device = {"cpu": "the CPU", "cuda": "the GPU"}.get(enlargers.device.type, enlargers.device.type)
    print(f"enlarging {many} {config.outscale or enlargers.scale:g} times on {device}, about {_duration(seconds)}", flush=True)
    if config.tile:
        print(f"tiles of {config.tile} pixels: the network's attention averages over a tile, so results differ from those of whole images")
    report = html_report.Report("Enlarged images", count=len(waiting))

    lock = threading.Lock()  # two images may be written at a time

    def show(file: Path, photo: Photo, result: Photo) -> None:
        if page:
            with lock:
                report.add_enlarged(str(targets[file].relative_to(page.parent)), photo, result, waiting.index(file))

    failed, done = [], 0
    with tqdm(total=sum(sizes.values()), bar_format="{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left", leave=False) as bar:
        enlargers.say = bar.write
        for file, written in upscale_files(waiting, targets, enlargers, bar.update, config, show):
            try:
                bar.write("\n    ".join([str(targets[file].absolute()), *written.result()]))
            except (ValueError, OSError, MemoryError) as error:  # the remaining files are still processed
                problem = explain(error) if isinstance(error, OSError) else str(error) or "too little memory; free some, or set --tile 256"
                failed.append(problem if str(file) in problem else f"{file}: {problem}")
            done += sizes.get(file, 0)
            bar.update(done - bar.n)
    if page:
        report.notes += map(enlargers.describe, enlargers.used)
        report.notes += [f"Failed: {problem}" for problem in failed]
        report.notes += [f"Not compared, as the result was already there: {file}" for file in targets if file not in waiting]
        print("\n    note: ".join([str(page.absolute()), *report.write(page)]))
    count = len(waiting) - len(failed)
    print(f"{count} {'image' if count == 1 else 'images'} in {_duration(time.monotonic() - begin)}")
    if failed:
        listed = "".join(f"\n    {problem}" for problem in failed)
        raise ValueError(f"{len(failed)} of {len(waiting)} images failed:{listed}" if len(waiting) > 1 else failed[0])


def _area(file: Path) -> int:
    """Pixels, from the header; 0 where it can't be read, which reading the pixels will report."""
    try:
        height, width = image_files.image_size(file)
    except (ValueError, OSError):
        return 0
    return height * width


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


# Networks


class Enlargers:
    """Enlarges images by the network that fits them; weights are loaded when the first image needs them."""

    QUALITY, NOISE, BLOCKINESS = 85, 2.5, 1.2  # below or beyond which the photo weights gain (docs/images.md)
    JUDGED = 1024  # pixels; side of the middle part of an image that is judged

    def __init__(self, config: InferenceConfig, device: torch.device | None = None) -> None:
        self.config = config
        self.say: Callable[[str], object] = print
        self.speed = 0.0  # seconds for each pixel of the input
        self.used: list[str] = []  # kinds of weights that images were enlarged by
        self.device = device or start_runtime(alone=True).device
        self.precision = utils.choose_precision(config.precision, self.device)
        self.scale: int = config.upscale_factor or 4
        self.networks: dict[str, model.RCAN] = {}
        self.has_photo = released_weights(self.scale, "photo").is_file()
        if config.weights == "photo" and not self.has_photo:
            raise ValueError(
                f"weights='photo' lacks {released_weights(self.scale, 'photo')}: set another upscale_factor, or --weights clean"
            )
        if config.model_path:
            self.scale = self.network("").upscale_factor
        if config.upscale_factor not in (None, self.scale):
            raise ValueError(
                f"upscale_factor={config.upscale_factor}, but {config.model_path} enlarges {self.scale} times: leave upscale_factor out, "
                "choose other weights, or set --outscale for another size of the results"
            )

    def network(self, kind: str) -> model.RCAN:
        """The network of `model_path` for "", or this repository's "clean" or "photo"."""
        if kind not in self.networks:
            path = released_weights(self.scale, kind) if kind else Path(self.config.model_path)
            self.networks[kind] = weights.load(path).to(self.device)
        return self.networks[kind]

    def describe(self, kind: str) -> str:
        return f"{weights.describe(self.network(kind))}; computing in {self.precision}"

    def choose(self, photo: Photo) -> tuple[str, str]:
        """The kind of weights for an image, and why, in words."""
        kind, why = self._choose(photo)
        if kind not in self.used:
            self.used.append(kind)
            if self.config.verbose:
                self.say(self.describe(kind))
        return kind, why

    def _choose(self, photo: Photo) -> tuple[str, str]:
        if self.config.model_path or self.config.weights != "auto":
            return "" if self.config.model_path else self.config.weights, ""
        if not self.has_photo:
            return "clean", f"clean weights, as there are none for photographs at x{self.scale}"
        top, left = (max(0, (side - self.JUDGED) // 2) for side in photo.pixels.shape[:2])
        pixels = photo.pixels[top:, left:][: self.JUDGED, : self.JUDGED]
        pixels = pixels if photo.bits == 8 else np.round(pixels / 257).astype(np.uint8)
        if photo.lossy == "WEBP" or (photo.quality or 100) < self.QUALITY:
            quality = f" of quality {photo.quality:.0f}" if photo.quality else ""
            return "photo", f"photo weights, as it is a {photo.lossy}{quality}; --weights clean takes the others"
        if (blockiness := imgproc.blockiness(pixels)) > self.BLOCKINESS:
            return "photo", f"photo weights, as blocks of JPEG are seen ({blockiness:.1f}); --weights clean takes the others"
        if (noise := imgproc.noise_level(pixels)) > self.NOISE:
            return "photo", f"photo weights, as it is noisy ({noise:.1f}); --weights clean takes the others"
        return "clean", "clean weights, as little noise and compression is seen; --weights photo takes the others"

    def enlarge(self, kind: str, image: NDArray, progress: Callable[[float], object] | None = None) -> NDArray:
        config = self.config
        return upscale(
            self.network(kind), image, config.self_ensemble,
            precision=self.precision, tile=config.tile, tile_overlap=config.overlap, progress=progress,
        )  # fmt: skip

    def seconds_per_pixel(self) -> float:
        """Of the input, measured on small black images; the networks of a scale are equally fast."""
        kind = "" if self.config.model_path else "photo" if self.config.weights == "photo" else "clean"
        seconds, side = 0.0, 16
        while seconds < 0.05 and side < 512:  # the first one is slower
            side *= 2
            image = np.zeros((side, side, 3), np.uint8)
            start = time.monotonic()
            self.enlarge(kind, image)
            seconds = time.monotonic() - start if side > 32 else 0
        self.speed = seconds / side**2
        return self.speed


# Files


def find_inputs(sources: Sequence[Path], output: Path) -> dict[Path, Path]:
    """Each image, and where it lies in the folder that was named: all images in folders, except hidden ones and those in `output`.

    Raises:
        FileNotFoundError: there is no such path, or no image in the folder.
    """
    inputs: dict[Path, Path] = {}
    known_files: set[Path] = set()

    def add(file: Path, nested: Path) -> None:
        if file.resolve() not in known_files:
            inputs[file] = nested
        known_files.add(file.resolve())

    several = sum(source.is_dir() for source in sources) > 1  # whose images may have the same names
    for source in sources:
        if source.is_file():
            add(source, Path())
            continue
        if not source.is_dir():
            raise FileNotFoundError(f"{source}: no such file or folder; name images or folders of images")
        within = output.resolve() != source.resolve() and output.resolve().is_relative_to(source.resolve())
        found = [
            file for file in list_images(source, nested=True) if not within or not file.parent.resolve().is_relative_to(output.resolve())
        ]
        others = image_files.passed_over(source, nested=True)
        if not found:
            known = ", ".join(IMAGE_SUFFIXES)
            raise FileNotFoundError(f"{source.absolute()}: no image in it; known endings are {known}{f'; {others}' if others else ''}")
        if others:
            print(others)
        for file in found:
            add(file, Path(source.resolve().name if several else "") / file.parent.relative_to(source))
    return inputs


def plan_outputs(inputs: Mapping[Path, Path], folder: Path, output_format: str) -> dict[Path, Path]:
    """The path of each result: the name and folder of its input, or `folder` itself if it is the path of an image, for one input.

    Inputs that would share a path keep their endings in the name. With "same", formats that aren't written become PNG.

    Args:
        inputs: as `find_inputs` returns them.

    Raises:
        ValueError: a result would overwrite an input or another result, or its format can't be written.
    """

    def target(file: Path, name: str) -> Path:
        own = file.suffix.lower() if file.suffix.lower() in FORMATS else ".png"
        return folder / inputs[file] / f"{name}{own if output_format == 'same' else f'.{output_format}'}"

    if folder.suffix.lower() in (*IMAGE_SUFFIXES, ".heic", ".heif") and not folder.is_dir():
        if len(inputs) > 1:
            raise ValueError(f"output={str(folder)!r} is the name of one image, but {len(inputs)} are to be enlarged: name a folder")
        if folder.suffix.lower() not in FORMATS:
            raise ValueError(f"output={str(folder)!r}: {folder.suffix} can't be written; choose {', '.join(FORMATS)}")
        if output_format not in ("png", "same") and FORMATS[folder.suffix.lower()] != FORMATS[f".{output_format}"]:
            raise ValueError(f"output={str(folder)!r} contradicts output_format={output_format!r}: leave one out")
        targets = dict.fromkeys(inputs, folder)
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
    enlargers: Enlargers,
    advance: Callable[[float], object],
    config: InferenceConfig,
    show: Callable[[Path, Photo, Photo], None],
) -> Iterator[tuple[Path, Future[Notes]]]:
    """Each input, and how it ended: notes for the user, or an error.

    While the network computes, the image before is written and the image after is read.

    Args:
        advance: called with the pixels of the input that the network is done with.
        show: called with an input and its result, once it is written.
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
                height, width = photo.result().pixels.shape[:2]
                if (seconds := enlargers.speed * height * width) > LONG and len(inputs) > 1:
                    enlargers.say(f"{file.name}, {width}x{height}: about {_duration(seconds)}")
                result, notes = upscale_photo(photo.result(), targets[file].suffix, enlargers, advance, config)
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


LONG = 10  # seconds, beyond which an image of several is announced
MANY_BYTES = 2**28  # no further image is computed while one as large waits in memory


def _write(target: Path, result: Photo, quality: int, notes: Notes, show: Callable[[Photo], None]) -> Notes:
    write_photo(target, result, quality)
    try:
        show(result)
    except (ValueError, OSError, MemoryError) as error:  # the image itself is written
        notes.append(f"note: it is not on the page ({str(error) or 'too little memory'})")
    return notes


def upscale_photo(
    photo: Photo, suffix: str, enlargers: Enlargers, advance: Callable[[float], object], config: InferenceConfig
) -> tuple[Photo, Notes]:
    """The photo for a file with this ending, and notes and warnings for the user."""
    height, width = photo.pixels.shape[:2]
    factor = config.outscale or enlargers.scale
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    passes = 1 if photo.alpha is None or (photo.alpha == photo.alpha[0, 0]).all() else 2
    pixels = height * width / passes
    kind, why = enlargers.choose(photo)
    notes = [f"{width}x{height} to {size[1]}x{size[0]}{f', {why}' if why else ''}"]
    notes += [f"note: {note}" for note in (*photo.notes, *check_writable(photo, suffix, size))]
    if factor > enlargers.scale:
        notes.append(f"note: larger than the network's x{enlargers.scale}; the rest is bicubic")
    if factor < enlargers.scale:
        notes.append(f"note: enlarged {enlargers.scale} times, then reduced by bicubic")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")  # those of other threads, which read and write meanwhile
        warnings.simplefilter("always", UserWarning)  # those of `upscale`
        warnings.filterwarnings("ignore", module=r"(PIL|tifffile)\.")
        result = enlarge_photo(photo, lambda image: enlargers.enlarge(kind, image, lambda part: advance(part * pixels)), size)
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

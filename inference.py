"""Upscale your own pictures; no originals are needed:

python inference.py --model_path results/rcan_x4/best.pth.tar --input photo.jpg --output upscaled
python inference.py --input photos --output upscaled                # the light network that comes with this repository
python inference.py --input photos --output upscaled --outscale 2.5 --output_format same
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

import image_files
import imgproc
import utils
import weights
from config import released_weights
from files import check_folder, explain
from image_files import FORMATS, Photo, check_writable, read_photo, write_photo
from runtime import run_script, start_runtime
from upscaling import upscale


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    input: str  # a picture, or a folder of pictures, with all folders in it
    output: str = "results/inference"  # the folder for the upscaled pictures, which keep their names and folders
    model_path: str = ""  # weights of any known layout; empty: the light network of this repository for upscale_factor
    upscale_factor: Literal[2, 3, 4, 8] = 4  # which light network to take where model_path is empty
    outscale: float | None = None  # final size, in times the input's; None: the network's scale. The rest is bicubic
    output_format: Literal["png", "same", "jpg", "webp", "tif", "bmp"] = "png"  # of the results; same: as the input's
    quality: int = 95  # of JPEG and WebP, 1 to 100; at 100, WebP is lossless
    self_ensemble: bool = False  # mean over the eight turns of the picture; eight times as slow
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"  # of the network; auto: bf16 where the device is fast at it
    tile: int = 0  # side of tiles, LR pixels, for pictures too large for memory even in strips; changes the result. 0: none
    tile_overlap: int = 32  # LR pixels that tiles share and are blended over

    def __post_init__(self) -> None:
        if self.outscale is not None and not 0 < self.outscale <= 64:
            raise ValueError(f"outscale={self.outscale} must be greater than 0 and at most 64")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} must be 1 to 100")
        if self.tile < 0 or self.tile_overlap < 0 or 0 < self.tile <= 2 * self.tile_overlap:
            raise ValueError(f"tile={self.tile} must be 0, or more than twice tile_overlap={self.tile_overlap}, as in --tile 256")


def main(argv: Sequence[str] | None = None) -> None:
    """Upscale a file or a folder, print every written path, and list what failed."""
    config = tyro.cli(InferenceConfig, args=argv, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    files = find_inputs(Path(config.input), Path(config.output))
    targets = plan_outputs(files, Path(config.input), Path(config.output), config.output_format)
    check_folder(Path(config.output))
    runtime = start_runtime()
    path = Path(config.model_path) if config.model_path else released_weights(config.upscale_factor)
    network = weights.load(path).to(runtime.device)
    print(weights.describe(network))
    if config.tile:
        print(f"tiles of {config.tile} pixels: the network's averages are those of a tile, so the results are not those of whole pictures")
    precision = utils.choose_precision(config.precision, runtime.device)
    options = {"self_ensemble": config.self_ensemble, "precision": precision, "tile": config.tile, "tile_overlap": config.tile_overlap}
    enlarge = partial(upscale, network, **options)
    failed = []
    for file in (bar := tqdm(files, "upscaling", unit="image")):
        try:
            notes = upscale_file(file, targets[file], enlarge, network.upscale_factor, config)
            bar.write("\n    ".join([str(targets[file].absolute()), *notes]))
        except (ValueError, OSError, MemoryError) as error:  # the others are still wanted
            problem = explain(error) if isinstance(error, OSError) else str(error) or "there is too little memory for it"
            failed.append(problem if str(file) in problem else f"{file}: {problem}")
    if failed:
        listed = "".join(f"\n    {problem}" for problem in failed)
        raise ValueError(f"{len(failed)} of {len(files)} pictures were not upscaled:{listed}" if len(files) > 1 else failed[0])


# Files


def find_inputs(path: Path, output: Path) -> list[Path]:
    """The picture, or those in the folder and its folders; hidden ones and those in `output` are passed over.

    Raises:
        FileNotFoundError: there is no such path, or no picture in the folder.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder; give a picture or a folder of pictures with --input")
    folders = [path, *sorted(folder for folder in path.rglob("*") if folder.is_dir() and not _is_hidden(folder.relative_to(path)))]
    inside = output.resolve() if output.resolve() != path.resolve() else None
    folders = [folder for folder in folders if inside is None or not folder.resolve().is_relative_to(inside)]
    files = [file for folder in folders for file in image_files.list_images(folder)]
    if not files:
        raise FileNotFoundError(f"{path.absolute()}: no picture in it; known endings are {', '.join(image_files.IMAGE_SUFFIXES)}")
    return files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def plan_outputs(files: Sequence[Path], root: Path, folder: Path, output_format: str) -> dict[Path, Path]:
    """Where each upscaled picture goes: its own name and folder; two that would share a name keep their endings in it.

    Raises:
        ValueError: one would overwrite an input, two would be one file, or a format can't be written.
    """
    unknown = [file for file in files if file.suffix.lower() not in FORMATS] if output_format == "same" else []
    if unknown:
        raise ValueError(f"{unknown[0]}: can't be written in its own format; choose --output_format png, jpg, webp, tif or bmp")
    wanted = {file: _target(file, root, folder, output_format, file.stem) for file in files}
    shared = Counter(str(target).lower() for target in wanted.values())  # some systems don't tell A from a
    targets = {
        file: _target(file, root, folder, output_format, file.name) if shared[str(target).lower()] > 1 else target
        for file, target in wanted.items()
    }
    taken: dict[str, Path] = {}
    for file, target in targets.items():
        other = taken.setdefault(str(target).lower(), file)
        if other != file:
            raise ValueError(f"{file} and {other} would both be written to {target}: rename one")
    originals = {file.resolve() for file in files}
    for file, target in targets.items():
        if target.resolve() in originals:
            raise ValueError(f"{target}: would be overwritten by the upscaled {file.name}: choose another --output")
    return targets


def _target(file: Path, root: Path, folder: Path, output_format: str, name: str) -> Path:
    nested = file.parent.relative_to(root) if root.is_dir() else Path()
    suffix = file.suffix.lower() if output_format == "same" else f".{output_format}"
    return folder / nested / f"{name}{suffix}"


# Pixels


def upscale_file(file: Path, target: Path, enlarge: Callable[[NDArray], NDArray], scale: int, config: InferenceConfig) -> list[str]:
    """Read, upscale and write one picture; sentences on what a person should know of it.

    Raises:
        OSError, ValueError: it can't be read, upscaled or written; nothing is written then.
    """
    photo = read_photo(file)
    height, width = photo.pixels.shape[:2]
    factor = config.outscale or scale
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    notes = [f"note: {note}" for note in (*photo.notes, *check_writable(photo, target.suffix, size))]
    if factor > scale:
        notes.append(f"note: larger than the network's x{scale}; the rest is bicubic")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = enlarge_photo(photo, enlarge, size)
    write_photo(target, result, config.quality)
    return notes + [f"warning: {warning.message}" for warning in caught]


def enlarge_photo(photo: Photo, enlarge: Callable[[NDArray], NDArray], size: tuple[int, int]) -> Photo:
    """Colours and alpha by the network, brought to (height, width) by bicubic where it gives another size; gray stays gray."""
    pixels = _to_size(enlarge(photo.pixels), size)
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
    """(H, W, 3) -> (H, W), rounded, of the same type: what a gray picture's three results have in common."""
    return np.round(image.mean(2)).astype(image.dtype)


if __name__ == "__main__":
    run_script(main)

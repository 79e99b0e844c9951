"""Upscale your own pictures; no originals are needed:

python inference.py --model_path results/rcan_x4/best.pth.tar --input photo.jpg --output upscaled
python inference.py --input photos --output upscaled                # the light network that comes with this repository
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

import imgproc
import utils
import weights
from config import released_weights


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    input: str  # a picture, or a folder of pictures
    output: str = "results/inference"  # the folder for the upscaled pictures; they keep their names and are PNG
    model_path: str = ""  # weights; empty: the light network of this repository for upscale_factor
    upscale_factor: Literal[2, 3, 4, 8] = 4  # which light network to take where model_path is empty
    self_ensemble: bool = False  # mean over the eight turns of the picture; eight times as slow


def main(argv: Sequence[str] | None = None) -> None:
    """Upscale a file or a folder, and print every written path."""
    config = tyro.cli(InferenceConfig, args=argv, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    files = find_inputs(Path(config.input))
    targets = plan_outputs(files, Path(config.output))
    runtime = utils.start_runtime()
    path = Path(config.model_path) if config.model_path else released_weights(config.upscale_factor)
    network = weights.load(path).to(runtime.device)
    print(weights.describe(network))
    failed = []
    for file in (bar := tqdm(files, "upscaling", unit="image")):
        try:
            sr = utils.upscale(network, imgproc.read_image(file), config.self_ensemble)
            imgproc.write_image(targets[file], sr)
            bar.write(str(targets[file].absolute()))
        except (ValueError, OSError) as error:  # the others are still wanted
            failed.append(str(error))
    if failed:
        raise ValueError(f"{len(failed)} of {len(files)} pictures were not upscaled: {'; '.join(failed)}")


def find_inputs(path: Path) -> list[Path]:
    """The picture, or those in the folder.

    Raises:
        FileNotFoundError: there is no such path, or no picture in the folder.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder; give a picture or a folder of pictures with --input")
    files = imgproc.list_images(path)
    if not files:
        raise FileNotFoundError(f"{path.absolute()}: no picture in it; known endings are {', '.join(imgproc.IMAGE_SUFFIXES)}")
    return files


def plan_outputs(files: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Where each upscaled picture goes.

    Raises:
        ValueError: two would get one name, or one would overwrite its original.
    """
    targets: dict[Path, Path] = {}
    taken: dict[Path, Path] = {}
    for file in files:
        target = folder / f"{file.stem}.png"
        if target in taken:
            raise ValueError(f"{file} and {taken[target]} would both be written to {target}: rename one")
        if target.resolve() == file.resolve():
            raise ValueError(f"{file}: would be overwritten by its upscaled picture: choose another --output")
        targets[file], taken[target] = target, file
    return targets


if __name__ == "__main__":
    utils.run(main)

"""Score weights on photographs as people have them: clean, compressed, noisy, both, and blurred.

    python scripts/photo_grid.py --weights assets/weights/rcan_light_x4.pth.tar --sets data/DemoTest data/Set14

Each LR image is MATLAB's bicubic of the GT image with the damage of a cell. Prints, and writes as JSON, the mean PSNR on Y of bicubic
and of each weights file, in dB.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import environment  # noqa: F401 (names missing packages)

# isort: split

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import tyro
from tqdm import tqdm

import dataset
import files
import imgproc
import weights
from imgproc import RGB
from reports import markdown_table, provenance, to_json
from runtime import run_script, start_runtime
from upscaling import upscale


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    weights: tuple[str, ...]  # files of one scale
    sets: tuple[str, ...]  # folders of GT images
    output: str = "results/photo_grid.json"  # write the table here


def compressed(quality: int, image: RGB, seed: int) -> RGB:
    return imgproc.compress(image, "JPEG", quality)


def noisy(sigma: float, image: RGB, seed: int) -> RGB:
    noise = np.random.default_rng(seed).normal(0, sigma, image.shape)
    return np.clip(np.floor(image + noise + 0.5), 0, 255).astype(np.uint8)


Damage = Callable[[RGB, int], RGB]  # an image and a seed
CELLS: dict[str, tuple[float, list[Damage]]] = {  # sigma of the blur before downscaling, LR pixels; and what happens to LR
    "clean": (0, []),
    **{f"JPEG {quality}": (0, [partial(compressed, quality)]) for quality in (92, 75, 50, 30)},
    **{f"noise {sigma}": (0, [partial(noisy, sigma)]) for sigma in (4, 8, 12)},
    "noise 8, JPEG 50": (0, [partial(noisy, 8), partial(compressed, 50)]),
    "blur 0.5": (0.5, []),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print and write the table: a row for each cell and set."""
    config = tyro.cli(GridConfig, args=argv, use_underscores=True)
    files.check_folder(Path(config.output).parent)
    device = start_runtime(alone=True).device
    networks = {Path(path).name.split(".")[0]: weights.load(path).to(device) for path in config.weights}
    scales = {network.upscale_factor for network in networks.values()}
    if len(scales) != 1 or len(networks) < len(config.weights):
        raise ValueError(f"weights={config.weights}: give files of one scale and of different names")
    (scale,) = scales
    table = [["set", "damage", "bicubic", *networks]]
    for folder in map(Path, config.sets):
        pairs = dataset.find_pairs(folder, scale)
        for cell, (blur, damages) in tqdm(CELLS.items(), folder.name, unit="cell"):
            scores = []
            for pair in pairs:
                gt = imgproc.crop_to_multiple(imgproc.read_image(pair.gt), scale)
                soft = cv2.GaussianBlur(gt, (0, 0), blur * scale) if blur else gt
                lr = imgproc.imresize(soft, 1 / scale)
                for damage in damages:
                    lr = damage(lr, zlib.crc32(pair.name.encode()))
                results = [imgproc.imresize(lr, scale), *(upscale(network, lr) for network in networks.values())]
                scores.append([imgproc.psnr(sr, gt, scale) for sr in results])
            table.append([folder.name, cell, *(f"{value:.2f}" for value in np.mean(scores, 0))])
    print(f"{markdown_table(table)}\n{'replaces' if Path(config.output).exists() else 'in'} {config.output}")
    files.write_text(Path(config.output), to_json({**provenance(), "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)

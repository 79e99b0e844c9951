"""Lay out the photographs that come with scikit-image as a small data set:

python scripts/demo_data.py --output data        # data/DemoTrain/GT/*.png and data/DemoTest/GT/*.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import environment  # noqa: F401 (names missing packages)

# isort: split

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import skimage.data
import tyro

import image_files
import imgproc
from runtime import run_script

TEST_PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")
TRAIN_PHOTOGRAPHS = (
    "brick", "camera", "coins", "grass", "gravel", "hubble_deep_field", "immunohistochemistry", "moon", "page", "retina", "rocket", "text",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    output: str = "data"  # the folder for the two sets, DemoTrain and DemoTest


def main(argv: Sequence[str] | None = None) -> None:
    """Write both sets; files that exist are kept."""
    config = tyro.cli(DemoConfig, args=argv, use_underscores=True)
    images = {f"DemoTest/GT/{name}.png": _photograph(name) for name in TEST_PHOTOGRAPHS}
    images |= {f"DemoTrain/GT/{name}.png": _photograph(name) for name in TRAIN_PHOTOGRAPHS}
    left, right, _ = skimage.data.stereo_motorcycle()
    images |= {"DemoTrain/GT/motorcycle_left.png": left, "DemoTrain/GT/motorcycle_right.png": right}
    for name, image in images.items():
        path = Path(config.output) / name
        if not path.exists():
            image_files.write_image(path, _as_rgb(image))
    print(f"{len(images)} photographs of scikit-image in {Path(config.output).absolute()}: DemoTrain and DemoTest")


def _photograph(name: str) -> np.ndarray:
    return getattr(skimage.data, name)()


def _as_rgb(image: np.ndarray) -> imgproc.RGB:
    return np.ascontiguousarray(np.repeat(image[:, :, None], 3, 2) if image.ndim == 2 else image[:, :, :3])


if __name__ == "__main__":
    run_script(main)

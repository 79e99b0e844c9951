"""Draw LR, bicubic, SR and GT side by side, with their scores:

python scripts/figure.py --gt data/DemoTest/GT/chelsea.png --sr results/quickstart/test/DemoTest/chelsea.png --output chelsea.png
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import image_files
import imgproc
from runtime import run_script


@dataclass(frozen=True, kw_only=True)
class FigureConfig:
    gt: tuple[str, ...]  # the originals, one row of the figure each
    sr: tuple[str, ...]  # the upscaled pictures, in the same order
    output: str  # the figure to write
    upscale_factor: int = 4  # between LR and GT
    sr_name: str = "RCAN"  # what the upscaled pictures are called
    side: int = 128  # of the part shown, GT pixels; it is the part where SR and bicubic differ most
    zoom: int = 2  # how much larger it is drawn


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the figure: one row for each picture."""
    config = tyro.cli(FigureConfig, args=argv, use_underscores=True)
    if len(config.gt) != len(config.sr):
        raise ValueError(f"--gt names {len(config.gt)} pictures, --sr {len(config.sr)}: give one upscaled picture for each original")
    rows = [draw_row(Path(gt), Path(sr), config) for gt, sr in zip(config.gt, config.sr, strict=True)]
    image_files.write_image(config.output, np.concatenate(rows))
    print(Path(config.output).absolute())


def draw_row(gt_path: Path, sr_path: Path, config: FigureConfig) -> imgproc.RGB:
    """One labelled row: LR (nearest neighbour), bicubic, SR and GT."""
    scale = config.upscale_factor
    gt, sr = imgproc.crop_to_multiple(image_files.read_image(gt_path), scale), image_files.read_image(sr_path)
    if gt.shape != sr.shape:
        raise ValueError(f"{sr_path}: sr is {sr.shape[1]}x{sr.shape[0]}, but gt at x{scale} {gt.shape[1]}x{gt.shape[0]}")
    lr = imgproc.degrade(gt, scale)
    bicubic = imgproc.imresize(lr, scale)
    top, left = find_part(bicubic, sr, gt, min(config.side, *gt.shape[:2]) // scale * scale)
    side = min(config.side, *gt.shape[:2]) // scale * scale
    panels = {
        f"LR  {lr.shape[1]}x{lr.shape[0]}": lr.repeat(scale, 0).repeat(scale, 1),
        f"bicubic  {_score(bicubic, gt, scale)}": bicubic,
        f"{config.sr_name}  {_score(sr, gt, scale)}": sr,
        f"GT  {gt_path.stem}": gt,
    }
    return np.concatenate(
        [_labelled(panel[top : top + side, left : left + side], label, config.zoom) for label, panel in panels.items()], axis=1
    )


def find_part(bicubic: imgproc.RGB, sr: imgproc.RGB, gt: imgproc.RGB, side: int) -> tuple[int, int]:
    """Top and left of the square in which the squared error falls most from bicubic to SR."""
    gain = ((bicubic.astype(float) - gt) ** 2 - (sr.astype(float) - gt) ** 2).sum(2)
    sums = cv2.integral(gain)
    squares = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(squares.argmax(), squares.shape)
    return int(top), int(left)


def _score(image: imgproc.RGB, gt: imgproc.RGB, scale: int) -> str:
    return f"{imgproc.psnr(image, gt, scale):.2f} dB"


def _labelled(panel: imgproc.RGB, label: str, zoom: int) -> imgproc.RGB:
    enlarged = panel.repeat(zoom, 0).repeat(zoom, 1)
    bar = np.full((26, enlarged.shape[1], 3), 255, np.uint8)
    cv2.putText(bar, label, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    framed = np.concatenate((bar, enlarged))
    return cv2.copyMakeBorder(framed, 0, 4, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))


if __name__ == "__main__":
    run_script(main)

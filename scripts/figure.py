"""Draw LR, bicubic, SR and GT side by side with their PSNR, or the learning curves of runs (which needs matplotlib):

python scripts/figure.py --gt data/DemoTest/GT/chelsea.png --sr results/quickstart/test/DemoTest/chelsea.png --output chelsea.png
python scripts/figure.py --runs results/a results/b --levels VDSR=31.35 --output curve.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import environment  # noqa: F401 (names missing packages)

# isort: split

import json
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import tyro

import image_files
import imgproc
from runtime import run_script


@dataclass(frozen=True, kw_only=True)
class FigureConfig:
    output: str  # the figure to write

    # A comparison: one row for each image
    gt: tuple[str, ...] = ()  # GT images
    sr: tuple[str, ...] = ()  # the upscaled images, in the same order
    upscale_factor: int = 4  # between LR and GT
    sr_name: str = "RCAN"  # label of the upscaled images
    side: int = 128  # of the crop, GT pixels; the crop in which SR gains most over bicubic
    zoom: int = 2  # enlargement of the crop

    # Learning curves: one line for each run
    runs: tuple[str, ...] = ()  # folders of runs, or their log.jsonl files
    valid_set: str = "Set5"  # the set whose PSNR is drawn
    levels: tuple[str, ...] = ()  # horizontal lines, as NAME=DB


def main(argv: Sequence[str] | None = None) -> None:
    """Write the figure and print its path."""
    config = tyro.cli(FigureConfig, args=argv, use_underscores=True)
    if bool(config.gt) == bool(config.runs):
        raise ValueError("give either --gt and --sr, for a comparison, or --runs, for learning curves")
    if config.runs:
        draw_curves(config)
    else:
        if len(config.gt) != len(config.sr):
            raise ValueError(f"--gt names {len(config.gt)} images, --sr {len(config.sr)}: give one upscaled image for each GT image")
        rows = [draw_row(Path(gt), Path(sr), config) for gt, sr in zip(config.gt, config.sr, strict=True)]
        image_files.write_image(config.output, np.concatenate(rows))
    print(Path(config.output).absolute())


# Comparisons


def draw_row(gt_path: Path, sr_path: Path, config: FigureConfig) -> imgproc.RGB:
    """One labelled row: LR (nearest neighbour), bicubic, SR and GT."""
    scale = config.upscale_factor
    gt, sr = imgproc.crop_to_multiple(image_files.read_image(gt_path), scale), image_files.read_image(sr_path)
    if gt.shape != sr.shape:
        raise ValueError(f"{sr_path}: SR is {sr.shape[1]}x{sr.shape[0]}, but GT at x{scale} is {gt.shape[1]}x{gt.shape[0]}")
    lr = imgproc.degrade(gt, scale)
    bicubic = imgproc.imresize(lr, scale)
    side = min(config.side, *gt.shape[:2]) // scale * scale
    top, left = find_crop(bicubic, sr, gt, side)
    panels = {
        f"LR  {lr.shape[1]}x{lr.shape[0]}": lr.repeat(scale, 0).repeat(scale, 1),
        f"bicubic  {imgproc.psnr(bicubic, gt, scale):.2f} dB": bicubic,
        f"{config.sr_name}  {imgproc.psnr(sr, gt, scale):.2f} dB": sr,
        f"GT  {gt_path.stem}": gt,
    }
    crops = {label: panel[top : top + side, left : left + side] for label, panel in panels.items()}
    return np.concatenate([draw_panel(crop, label, config.zoom) for label, crop in crops.items()], axis=1)


def find_crop(bicubic: imgproc.RGB, sr: imgproc.RGB, gt: imgproc.RGB, side: int) -> tuple[int, int]:
    """Top and left of the square in which the squared error falls most from bicubic to SR."""
    gain = ((bicubic.astype(float) - gt) ** 2 - (sr.astype(float) - gt) ** 2).sum(2)
    sums = cv2.integral(gain)
    squares = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(squares.argmax(), squares.shape)
    return int(top), int(left)


def draw_panel(crop: imgproc.RGB, label: str, zoom: int) -> imgproc.RGB:
    """The enlarged crop in a white frame, below its label."""
    enlarged = crop.repeat(zoom, 0).repeat(zoom, 1)
    height, width = enlarged.shape[:2]
    panel = np.full((26 + height + 4, width + 4, 3), 255, np.uint8)
    cv2.putText(panel, label, (8, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    panel[26:-4, 2:-2] = enlarged
    return panel


# Learning curves


def draw_curves(config: FigureConfig) -> None:
    """PSNR of `valid_set` over wall-clock time."""
    curves = {path: read_curve(Path(path), config.valid_set) for path in config.runs}
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=110)
    for path, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=Path(path).stem)
    for text in config.levels:
        name, _, level = text.partition("=")
        try:
            axes.axhline(float(level), color="gray", linewidth=0.8, linestyle="--")
        except ValueError:
            raise ValueError(f"--levels {text}: must be NAME=DB, as in VDSR=31.35") from None
        axes.text(0.01, float(level), f"{name} {level}", transform=axes.get_yaxis_transform(), fontsize=8, va="bottom", color="gray")
    axes.set(xlabel="wall-clock time (minutes)", ylabel=f"{config.valid_set}, PSNR on Y (dB)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.output)
    pyplot.close(figure)


def read_curve(path: Path, valid_set: str) -> list[tuple[float, float]]:
    """(minutes, dB) of each evaluation in a run's log.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: the log holds no evaluation of the set.
    """
    log = path / "log.jsonl" if path.is_dir() else path
    if not log.is_file():
        raise FileNotFoundError(f"{log}: no such log; give the folder of a run with --runs")
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    curve = [(line["seconds"] / 60, line[f"{valid_set}/psnr"]) for line in lines if f"{valid_set}/psnr" in line]
    if not curve:
        raise ValueError(f"{log}: holds no evaluation of {valid_set}; give another --valid_set")
    return curve


if __name__ == "__main__":
    run_script(main)

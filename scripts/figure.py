"""Draw methods side by side with LR, bicubic and GT, or the learning curves of runs (which needs matplotlib):

python scripts/figure.py --gt data/DemoTest/GT/chelsea.png --sr results/quickstart/test/DemoTest/chelsea.png --output chelsea.png
python scripts/figure.py --gt gt/a.png gt/b.png --sr one/a.png one/b.png two/a.png two/b.png --sr_names One Two --output two.png
python scripts/figure.py --lr photo.png --sr photo_x4.png --crop 120 80 128 96 --output photo_compared.png     # without GT
python scripts/figure.py --runs results/a results/b --over updates --levels VDSR=31.35 --output curve.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import environment  # noqa: F401 (names missing packages)

# isort: split

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import cv2
import numpy as np
import tyro

import image_files
import imgproc
from reports import draw_panel
from runtime import run_script


@dataclass(frozen=True, kw_only=True)
class FigureConfig:
    output: str  # the figure to write

    # A comparison: one row for each image
    gt: tuple[str, ...] = ()  # GT images
    lr: tuple[str, ...] = ()  # LR images, where there are no GT images, or where LR is not bicubic's
    sr: tuple[str, ...] = ()  # the upscaled images: all of the first method in the order of --gt or --lr, then all of the next method
    sr_names: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--sr_name"])] = ("RCAN",)  # the methods
    upscale_factor: int = 4  # between LR and GT
    crop: tuple[int, int, int, int] | None = None  # LEFT TOP WIDTH HEIGHT in GT pixels (equal to SR pixels); None: see side
    side: int = 128  # of a square crop, GT pixels: where the first method gains most over bicubic, or without GT, differs most from it
    zoom: int = 2  # enlargement of the crop

    # Learning curves: one line for each run
    runs: tuple[str, ...] = ()  # folders of runs, or their log.jsonl files
    over: Literal["minutes", "updates"] = "minutes"  # the horizontal axis
    valid_set: str = "Set5"  # the set whose PSNR is drawn
    levels: tuple[str, ...] = ()  # horizontal lines, as NAME=DB


CURVES = ("runs", "over", "valid_set", "levels")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the figure; print the crop of each row, and the figure's path."""
    config = tyro.cli(FigureConfig, args=argv, use_underscores=True)
    if bool(config.runs) == bool(config.gt or config.lr):
        raise ValueError("give --gt and --sr for a comparison, --lr and --sr for one without GT, or --runs for learning curves")
    if config.gt and len(config.lr) not in (0, len(config.gt)):
        raise ValueError(f"--lr names {len(config.lr)} images, --gt {len(config.gt)}: give one LR image for each GT image, or none")
    changed = [name for name, value in vars(config).items() if name != "output" and value != getattr(FigureConfig, name)]
    useless = [name for name in changed if (name in CURVES) != bool(config.runs) or (name == "side" and config.crop)]
    if useless:
        options, others = (", ".join(f"--{name}" for name in changed if (name in useless) == wanted) for wanted in (True, False))
        raise ValueError(f"{options}: no effect with {others}; leave it out")
    if config.runs:
        draw_curves(config)
    else:
        sources, names = config.gt or config.lr, config.sr_names
        if len({*names, "bicubic"}) <= len(names):
            raise ValueError(f"--sr_names {' '.join(names)}: give distinct names other than bicubic")
        if config.upscale_factor < 1 or config.side < config.upscale_factor or config.zoom < 1:
            sizes = f"--side {config.side} --zoom {config.zoom} --upscale_factor {config.upscale_factor}"
            raise ValueError(f"{sizes}: each must be 1 or more, and --side no less than --upscale_factor")
        if len(config.sr) != len(sources) * len(names):
            kind = "--gt" if config.gt else "--lr"
            raise ValueError(
                f"--sr names {len(config.sr)} images, {kind} {len(sources)}, --sr_names {len(names)} ({', '.join(names)}): give as many "
                f"upscaled images as {kind} has for each method, one method after another"
            )
        rows = [
            draw_row(row, Path(source), [Path(sr) for sr in config.sr[row :: len(sources)]], config) for row, source in enumerate(sources)
        ]
        width = max(row.shape[1] for row in rows)
        rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
        image_files.write_image(config.output, np.concatenate(rows))
    print(Path(config.output).absolute())


# Comparisons


def draw_row(number: int, source: Path, sr_paths: Sequence[Path], config: FigureConfig) -> imgproc.RGB:
    """One labelled row: LR (nearest neighbour), bicubic, the SR of each method, and GT where there is one."""
    scale = config.upscale_factor
    image = image_files.read_image(source)
    if config.gt and min(image.shape[:2]) < scale:
        raise ValueError(f"{source}: GT is {image.shape[1]}x{image.shape[0]}, smaller than an LR pixel at x{scale}")
    gt = imgproc.crop_to_multiple(image, scale) if config.gt else None
    lr = image_files.read_image(config.lr[number]) if config.lr or gt is None else imgproc.degrade(gt, scale)
    methods = {"bicubic": imgproc.imresize(lr, scale)}
    height, width = methods["bicubic"].shape[:2]
    if gt is not None and gt.shape != methods["bicubic"].shape:
        raise ValueError(
            f"{config.lr[number]}: {lr.shape[1]}x{lr.shape[0]} at x{scale} does not make {gt.shape[1]}x{gt.shape[0]} of {source}"
        )
    for name, path in zip(config.sr_names, sr_paths, strict=True):
        methods[name] = image_files.read_image(path)
        found = methods[name].shape[1::-1]
        if found != (width, height):
            raise ValueError(f"{path}: SR is {found[0]}x{found[1]}, but {source} at x{scale} needs {width}x{height}")
    first = methods[config.sr_names[0]]
    if config.crop:
        left, top, columns, rows = config.crop
        if min(left, top) < 0 or min(columns, rows) < 1 or left + columns > width or top + rows > height:
            raise ValueError(f"--crop {left} {top} {columns} {rows}: not within {source}, which has {width}x{height} pixels as GT or SR")
    else:
        columns = rows = min(config.side, width, height) // scale * scale
        top, left = find_crop(methods["bicubic"], first, first if gt is None else gt, rows)
    print(f"{source.stem}: --crop {left} {top} {columns} {rows}, in pixels of {'SR' if gt is None else 'GT'}")
    panels = [(f"LR  {lr.shape[1]}x{lr.shape[0]}{f'  {source.stem}' if gt is None else ''}", lr.repeat(scale, 0).repeat(scale, 1))]
    for name, sr in methods.items():
        panels.append((name if gt is None else f"{name}  {imgproc.psnr(sr, gt, scale):.2f} dB", sr))
    if gt is not None:
        panels.append((f"GT  {source.stem}", gt))
    return np.concatenate(
        [draw_panel(panel[top : top + rows, left : left + columns], label, config.zoom) for label, panel in panels], axis=1
    )


def find_crop(bicubic: imgproc.RGB, sr: imgproc.RGB, gt: imgproc.RGB, side: int) -> tuple[int, int]:
    """Top and left of the square in which the squared error falls most from bicubic to SR."""
    gain = ((bicubic.astype(float) - gt) ** 2 - (sr.astype(float) - gt) ** 2).sum(2)
    sums = cv2.integral(gain)
    squares = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(squares.argmax(), squares.shape)
    return int(top), int(left)


# Learning curves


def draw_curves(config: FigureConfig) -> None:
    """PSNR of `valid_set` over minutes or updates, each run a line with a marker for each evaluation; bicubic and levels dashed."""
    paths = [Path(run) for run in config.runs]
    curves = [read_curve(path, config.valid_set, config.over) for path in paths]
    levels = {f"bicubic {bicubic:.2f}": bicubic for _, bicubic in curves if bicubic is not None}
    for text in config.levels:
        name, _, value = text.partition("=")
        try:
            levels[f"{name} {value}"] = float(value)
        except ValueError:
            raise ValueError(f"--levels {text}: must be NAME=DB, as in VDSR=31.35") from None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=110)
    for label, (points, _) in zip(label_runs(paths), curves, strict=True):
        axes.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3.5)
    for label, level in levels.items():
        axes.axhline(level, color="gray", linewidth=0.8, linestyle="--")
        axes.annotate(  # at the right and below, as curves end flat and above
            label, (0.99, level), xytext=(0, -2), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
            fontsize=8, ha="right", va="top", color="gray",
        )  # fmt: skip
    # bad first evaluations must not flatten the rest: 1 dB below all levels and medians, the axis ends
    lowest = min([*levels.values(), *(statistics.median(psnr for _, psnr in points) for points, _ in curves)]) - 1
    if any(psnr < lowest for points, _ in curves for _, psnr in points):
        axes.set_ylim(bottom=lowest)
    axes.set_xlim(left=0)
    xlabel = {"minutes": "wall-clock time (minutes)", "updates": "updates"}[config.over]
    axes.set(xlabel=xlabel, ylabel=f"{config.valid_set}, PSNR on Y (dB)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.output)
    pyplot.close(figure)


def label_runs(paths: Sequence[Path]) -> list[str]:
    """The name of each run's folder, or of its log without ending; with as many folders above as tell equal names apart."""
    runs = [(path.parent if path.name == "log.jsonl" else path).absolute() for path in paths]
    labels = [run.name if run.is_dir() else run.stem for run in runs]
    for depth in range(2, max(len(run.parts) for run in runs) + 1):
        labels = [
            Path(*run.parts[-depth:]).as_posix() if labels.count(label) > 1 else label for run, label in zip(runs, labels, strict=True)
        ]
    return labels


def read_curve(path: Path, valid_set: str, over: str = "minutes") -> tuple[list[tuple[float, float]], float | None]:
    """(minutes or updates, dB) of each evaluation in a run's log, and bicubic's dB, which older logs lack.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: the log holds no evaluation of the set, or is none.
    """
    log = path / "log.jsonl" if path.is_dir() else path
    if not log.is_file():
        raise FileNotFoundError(f"{log}: no such log; give the folder of a run with --runs")
    texts = log.read_text(encoding="utf-8", errors="replace").splitlines()
    points, bicubic, sets = list[tuple[float, float]](), None, set[str]()
    for number, text in enumerate(texts, start=1):
        try:
            line = dict(json.loads(text))
        except (ValueError, TypeError):
            if number == len(texts):  # a killed run may leave half a line
                break
            raise ValueError(f"{log}: line {number} is not that of a run's log; give a run's folder or log.jsonl with --runs") from None
        sets |= {name.removesuffix("/psnr") for name in line if name.endswith("/psnr")}
        if (psnr := line.get(f"{valid_set}/psnr")) is not None:  # null: infinite
            points.append((line["update"] if over == "updates" else line["seconds"] / 60, psnr))
            bicubic = line.get(f"{valid_set}/bicubic_psnr", bicubic)
    if not points:
        raise ValueError(f"{log}: holds no evaluation of {valid_set}, only of: {', '.join(sorted(sets)) or 'no set'}; change --valid_set")
    return points, bicubic


if __name__ == "__main__":
    run_script(main)

"""Score the images of any method, whatever program wrote them, by the papers' protocol:

    python scripts/score.py --sr swinir/Set5 --gt data/Set5 --upscale_factor 4
    python scripts/score.py --sr swinir/Set5 edsr/Set5 --gt data/Set5 --upscale_factor 4 --metrics lpips dists     # by pyiqa

SR and GT images pair by name. SR names may go on after the GT name, as in babyx4.png, if all of a folder go on in the same way. The table
is printed; scores.csv and scores.json go to results/scores/<path of the SR folder>.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import environment  # noqa: F401 (names missing packages)

# isort: split

import csv
import importlib.util
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import tyro
from tqdm import tqdm

import dataset
import files
import image_files
import imgproc
import utils
from imgproc import RGB
from reports import markdown_table
from runtime import run_script


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    sr: tuple[str, ...]  # folders of upscaled images, one for each method
    gt: str  # a set, such as data/Set5, or the folder of its GT images
    upscale_factor: int  # GT is cropped to a multiple of it, and SR must have that size
    border: int | None = None  # pixels dropped on each side for PSNR and SSIM; None: upscale_factor, as in the papers
    only_y_channel: bool = True  # PSNR and SSIM on Y of YCbCr, as in the papers; False: on RGB
    metrics: tuple[str, ...] = ()  # beside psnr and ssim: names of the package pyiqa, such as lpips or dists
    output: str = ""  # folder for scores.csv and scores.json; empty: results/scores/<path of the SR folder>
    overwrite: bool = False  # replace the scores of other folders or settings


Metric = Callable[[RGB, RGB], float]  # (sr, gt)
Scores = dict[str, Any]  # {metric: mean, "images": {name: {metric: value}}, "uncounted": {metric: {name: why}}}


def main(argv: Sequence[str] | None = None) -> None:
    """Score each folder of `sr`, print the table and write it."""
    config = tyro.cli(ScoreConfig, args=argv, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    scale, border = config.upscale_factor, config.upscale_factor if config.border is None else config.border
    if scale < 1 or border < 0:
        raise ValueError(f"upscale_factor={scale} must be at least 1, and border={border} at least 0")
    if not config.sr or len({Path(folder).resolve() for folder in config.sr}) < len(config.sr):
        raise ValueError(f"--sr {' '.join(config.sr)}: give one folder, or several different ones")
    gt = {pair.name: pair.gt for pair in dataset.find_pairs(config.gt, scale)}
    methods = {folder: pair_images(Path(folder), gt) for folder in config.sr}
    notes = {folder: check_sizes(pairs, gt, scale, border) for folder, pairs in methods.items()}
    for folder in methods:
        notes[folder] += filter(None, [image_files.passed_over(folder, nested=True)])
    names = [*dict.fromkeys(("psnr", "ssim", *config.metrics))]
    asked = {"gt": str(next(iter(gt.values())).parent), "upscale_factor": scale, "border": border}
    asked |= {"only_y_channel": config.only_y_channel, "metrics": names}
    results: dict[str, Scores] = {folder: {"protocol": {"sr": str(Path(folder).absolute()), **asked}} for folder in methods}
    place = "+".join(re.sub(r"[\\/:.]+", "_", folder).strip("_") for folder in methods)
    output = Path(config.output or Path("results", "scores", place)).absolute()
    check_output(output, [scores["protocol"] for scores in results.values()], config.overwrite)
    metrics = {name: open_metric(name, border, config.only_y_channel) for name in names}
    for folder, pairs in methods.items():
        results[folder] = {**score(pairs, gt, metrics, results[folder]["protocol"]), **results[folder]}
        for note in [*notes[folder], *results[folder].pop("notes")]:
            print(f"warning: {folder}: {note}", file=sys.stderr)
    protocol = utils.PROTOCOL.format(scale=border).replace("Y of YCbCr", "Y of YCbCr" if config.only_y_channel else "RGB")
    further = f"; {', '.join(names[2:])} by pyiqa on whole RGB images" if names[2:] else ""
    print(f"{len(gt)} images of {asked['gt']}: {protocol}{further}\n\n{table_of(results, names)}\n")
    written = results if len(results) > 1 else results[config.sr[0]]
    files.write_text(output / "scores.json", json.dumps(written, indent=2, allow_nan=False) + "\n")
    files.write_text(output / "scores.csv", csv_of(results, names))
    print(f"scores.csv and scores.json: {output}")


# Finding and checking, before anything is scored


def pair_images(folder: Path, gt: Mapping[str, Path]) -> dict[str, Path]:
    """The SR file of each GT image: named as the GT image, or with one more ending, such as x4, that all files of the folder share."""
    if any("\ud800" <= character <= "\udfff" for character in str(folder)):  # Python's stand-in for a byte that is not UTF-8
        raise ValueError(f"{str(folder)!r}: the name is not UTF-8, but reports are; rename it")
    found = image_files.list_images(folder, nested=True) if folder.is_dir() else []
    if not found:
        problem = "no image is in it" if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder}: {problem}; give the folder that holds the upscaled images with --sr")
    sr: dict[str, Path] = {}
    for file in found:
        name = file.relative_to(folder).with_suffix("").as_posix()
        if name in sr:
            raise ValueError(f"{file}: has the same name as {sr[name].name}; move one away")
        sr[name] = file
    endings = {"", *(stem[len(name) :] for stem in sr for name in gt if stem.startswith(name))}
    if any(name[-1].isdigit() for name in gt):
        endings = {ending for ending in endings if not ending[:1].isdigit()}  # 10 is not the image 1
    ending = max(sorted(endings), key=lambda ending: sum(name + ending in sr for name in gt))  # none, where others pair no more
    pairs = {name: sr[name + ending] for name in gt if name + ending in sr}
    without_sr = ", ".join(gt[name].name for name in gt if name not in pairs)
    without_gt = ", ".join(file.name for file in sr.values() if file not in pairs.values())
    if without_sr or without_gt:
        raise ValueError(
            f"{folder}: GT without SR: {without_sr or 'none'}; SR without GT: {without_gt or 'none'}. Name each SR image as its GT image, "
            "with the same ending in all, and move others away: a mean over other images is another number"
        )
    return pairs


def check_sizes(pairs: Mapping[str, Path], gt: Mapping[str, Path], scale: int, border: int) -> list[str]:
    """A note on each SR image that has the size of the whole GT image, and is cropped with it; reads headers only."""
    notes = []
    for name, file in pairs.items():
        sr_size, gt_size = image_files.image_size(file), image_files.image_size(gt[name])
        height, width = (side // scale * scale for side in gt_size)
        size, needed = (f"{shape[1]}x{shape[0]}" for shape in (sr_size, (height, width)))
        if min(height, width) - 2 * border < imgproc.SSIM_WINDOW:
            raise ValueError(f"{gt[name]}: {needed} without a border of {border} is smaller than SSIM's window of 11; move it away")
        if sr_size == gt_size != (height, width):  # each pixel still has its partner
            notes.append(f"{name}: SR has the size of the whole GT, {size}; both are cropped to {needed}")
        elif sr_size != (height, width):
            is_lr = scale > 1 and sr_size == (height // scale, width // scale)
            remedy = "that is the size of LR: give the folder of upscaled images" if is_lr else "check --upscale_factor and the folders"
            raise ValueError(f"{file}: SR is {size}, but GT at x{scale} is {needed}; {remedy}")
    return notes


def check_output(folder: Path, protocols: Sequence[Mapping[str, Any]], overwrite: bool) -> None:
    """ValueError if the folder holds scores of other folders or settings, unless `overwrite` is set; names what will be replaced."""
    files.check_folder(folder)
    there = [path for path in (folder / "scores.json", folder / "scores.csv") if path.exists()]
    try:
        found = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        known = [scores["protocol"] for scores in ([found] if "protocol" in found else found.values())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or another program's
        known = []
    if there and known != protocols and not overwrite:
        raise ValueError(f"{there[0]}: holds scores of other folders or settings; choose another --output, or set --overwrite True")
    if there:
        print(f"warning: {there[0]}: will be replaced", file=sys.stderr)


# Scoring

OWN = {"psnr": imgproc.psnr, "ssim": imgproc.ssim}


def open_metric(name: str, border: int, only_y_channel: bool) -> Metric:
    """PSNR or SSIM as in test.py; any other name is a metric of the optional package pyiqa, on whole RGB images.

    Raises:
        ValueError: the package or its weights are missing, or it does not know the name.
    """
    if name in OWN:
        return partial(OWN[name], border=border, only_y_channel=only_y_channel)
    if importlib.util.find_spec("pyiqa") is None:
        raise ValueError(f"--metrics {name}: only psnr and ssim come with this repository; for the metrics of pyiqa: pip install pyiqa")
    print(f"{name}: pyiqa downloads its weights, unless it needs none or they are in {torch.hub.get_dir()}", file=sys.stderr)
    try:
        import pyiqa

        if name not in pyiqa.list_models():
            raise ValueError(f"--metrics {name}: pyiqa does not know it; pyiqa.list_models() lists what it knows")
        metric = pyiqa.create_metric(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(f"--metrics {name}: pyiqa cannot open it ({error}); it needs its weights in {torch.hub.get_dir()}") from None

    def compute(sr: RGB, gt: RGB) -> float:
        images = [torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255 for image in (sr, gt)]  # (1, 3, H, W)
        try:
            return float(metric(*images[: 1 if metric.metric_mode == "NR" else 2]))  # NR: without a reference, as niqe
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"--metrics {name}: pyiqa cannot score an image with it ({error}); leave it out") from None

    return compute


def score(pairs: Mapping[str, Path], gt_files: Mapping[str, Path], metrics: Mapping[str, Metric], protocol: Mapping[str, Any]) -> Scores:
    """All metrics of a method's images, their means over the images that count, and notes on what a person may not expect."""
    images: dict[str, dict[str, float | None]] = {}
    uncounted: dict[str, dict[str, str]] = {}
    notes = []
    for name, file in tqdm(pairs.items(), protocol["sr"], unit="image", leave=False):
        sr, gt = (imgproc.crop_to_multiple(image_files.read_image(path), protocol["upscale_factor"]) for path in (file, gt_files[name]))
        images[name] = {}
        for metric, compute in metrics.items():
            value = compute(sr, gt)
            why = why_uncounted(metric, value, gt, protocol["border"])
            images[name][metric] = None if why else value
            if why:
                uncounted.setdefault(metric, {})[name] = why
                notes.append(f"{name}: {metric} is {value:.2f}{' of a flat GT' if why == 'flat' else ''}, and not in the mean")
        photo = image_files.read_photo(file)
        dropped = [] if photo.bits == 8 else ["16 bits are rounded to 8"]
        dropped += ["alpha is dropped"] if photo.alpha is not None and photo.alpha.min() < np.iinfo(photo.alpha.dtype).max else []
        notes += [f"{name}: {text}" for text in (*photo.notes, *dropped)]
    counted = {metric: [found for values in images.values() if (found := values[metric]) is not None] for metric in metrics}
    means = {metric: float(np.mean(values)) if values else None for metric, values in counted.items()}
    return {**means, "images": images, "uncounted": uncounted, "notes": notes}


def why_uncounted(metric: str, value: float, gt: RGB, border: int) -> str:
    """Why a value does not count in the mean, in a word, or "": not finite, or PSNR of a flat GT, which says little of a method."""
    if math.isfinite(value):
        return "flat" if metric == "psnr" and imgproc.is_flat(gt, border) else ""
    return str(value)


# Reporting


def table_of(results: Mapping[str, Scores], metrics: Sequence[str]) -> str:
    """A row for each image and the mean, a column for each method."""

    def cell(scores: Scores, image: str | None) -> str:
        values = scores if image is None else scores["images"][image]
        texts = [
            scores["uncounted"].get(metric, {}).get(image, "–")
            if values[metric] is None
            else f"{values[metric]:.{2 if metric == 'psnr' else 4}f}"
            for metric in metrics
        ]
        return " / ".join(texts).replace("/ 0.", "/ .")

    images = next(iter(results.values()))["images"]
    rows = [[image or "mean", *(cell(scores, image) for scores in results.values())] for image in (*images, None)]
    return markdown_table([["", *(f"{folder}: {' / '.join(metrics)}" for folder in results)], *rows])


def csv_of(results: Mapping[str, Scores], metrics: Sequence[str]) -> str:
    """A row for each image of each method, and one for the mean; what does not count is empty."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("method", "image", *metrics))
    for folder, scores in results.items():
        for image, values in (*scores["images"].items(), ("mean", scores)):
            writer.writerow((folder, image, *(values[metric] for metric in metrics)))
    return text.getvalue()


if __name__ == "__main__":
    run_script(main)

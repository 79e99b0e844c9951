"""Score weights on benchmark sets, beside bicubic and the paper:

    python test.py --model_path results/rcan_x4/best.pth.tar --data_root data --test_sets Set5 Set14 B100
    python test.py --model_path x2.pt x3.pt x4.pt x8.pt --test_sets Set5 Set14 B100 Urban100 Manga109 --self_ensemble True

The file alone tells the network's size; no setting of its training is needed. Images, metrics.json, metrics.csv and report.md go to
results/<exp_name>/test, named after the weights where exp_name is empty. Several weights have a folder each, and results/table/test
holds the scores of all. Scores are those of the images as written, by the papers' protocol.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import dataset
import files
import image_files
import imgproc
import model
import utils
import weights
from config import Config, parse, weights_name
from reports import markdown_table, provenance
from runtime import Runtime, run_script, start_runtime
from upscaling import upscale
from utils import Scores


@dataclass(frozen=True)
class Result:
    """The scores of one file of weights, {set: scores} for each method; "network" is that of the written images."""

    name: str
    upscale_factor: int
    description: str
    scores: Mapping[str, Mapping[str, Scores]]  # {"bicubic" | "network" | "plain": {set: …}}
    peak_memory: float | None  # GiB


def main(argv: Sequence[str] | None = None) -> None:
    """Score every file of `model_path` on `test_sets`."""
    config = parse(Config, "test", argv)
    runtime = start_runtime()
    networks = {path: weights.load(path) for path in config.weights_paths}  # all weights and sets first: a mistake costs no time
    names = [weights_name(path) for path in networks]
    if len(set(names)) < len(names) or len(networks) < len(config.weights_paths):
        raise ValueError(f"model_path={config.model_path!r}: two have the same name in results ({', '.join(names)}); rename one")
    if not config.test_sets:
        raise ValueError("test_sets is empty: name at least one, as in --test_sets Set5 Set14")
    absent = dataset.absent_sets(config.data_root, config.test_sets)
    present = [name for name in config.test_sets if name not in absent] or config.test_sets  # opening these raises the error
    sets = {
        path: dataset.open_test_sets(config.data_root, present, network.upscale_factor, config.degradation, decode=runtime.local_rank == 0)
        for path, network in networks.items()
    }
    if runtime.is_main:
        for path in networks:
            files.check_folder(config.test_dir(path))
        warn(networks, absent, config)
    results = []
    for path, network in networks.items():
        if runtime.is_main:
            print(weights.describe(network))
        results.append(score(path, network.to(runtime.device), sets[path], config, runtime))
        network.cpu()
        if runtime.is_main:
            write(config.test_dir(path), results[-1:], absent, config)
    if runtime.is_main:
        if len(results) > 1:
            write(config.test_dir(), results, absent, config)
        print(report(results, absent, config))
        print(f"\n{'images and ' if config.save_images else ''}metrics: {config.test_dir().absolute()}")


def warn(networks: Mapping[Path, model.RCAN], absent: Sequence[str], config: Config) -> None:
    """Name what a person may not expect of the scores."""
    for name in absent:
        print(f"warning: {Path(config.data_root) / name}: no such folder; {name} is not scored", file=sys.stderr)
    for path, network in networks.items():
        if network.degradation not in (None, config.degradation):
            print(
                f"warning: {path} was trained for degradation={network.degradation!r}, but is tested on {config.degradation!r}; "
                f"its scores are not comparable with those on {network.degradation!r}",
                file=sys.stderr,
            )


def score(path: Path, network: model.RCAN, sets: Mapping[str, dataset.EvaluationSet], config: Config, runtime: Runtime) -> Result:
    """Upscale and score every image of every set by each method."""
    scale = network.upscale_factor
    methods: dict[str, Callable[[imgproc.RGB], imgproc.RGB]] = {"bicubic": partial(imgproc.imresize, scale=scale)}
    if config.self_ensemble:
        methods["plain"] = partial(upscale, network)
    methods["network"] = partial(upscale, network, self_ensemble=config.self_ensemble)
    scores: dict[str, dict[str, Scores]] = {method: {} for method in methods}
    upscale(network, np.zeros((32, 32, 3), np.uint8))  # the first call is slower, and no image's time shall hold that
    utils.reset_peak_memory(runtime.device)
    for name, images in sets.items():
        folder = config.test_dir(path) / name

        def save(image_name: str, _lr: imgproc.RGB, sr: imgproc.RGB, _gt: imgproc.RGB, folder: Path = folder) -> None:
            image_files.write_image(folder / f"{image_name}.png", sr)

        for method, upscaler in methods.items():
            on_image = save if config.save_images and method == "network" else None
            label = {"bicubic": "", "plain": f"{name}, plain"}.get(method, name)
            found = utils.evaluate(upscaler, images, scale, runtime, on_image=on_image, progress=label)
            assert found is not None, "evaluation ends early only at a StopRequest"
            scores[method][name] = found
    return Result(weights_name(path), scale, weights.describe(network), scores, utils.peak_memory(runtime.device))


# Reports


# The paper's tables 2 and 3, BI: PSNR in dB and SSIM on each of PAPER_SETS; RCAN+ at x4 only
PAPER = {
    2: {
        "bicubic": "33.66 / .9299, 30.24 / .8688, 29.56 / .8431, 26.88 / .8403, 30.80 / .9339",
        "RCAN": "38.27 / .9614, 34.12 / .9216, 32.41 / .9027, 33.34 / .9384, 39.44 / .9786",
    },
    3: {
        "bicubic": "30.39 / .8682, 27.55 / .7742, 27.21 / .7385, 24.46 / .7349, 26.95 / .8556",
        "RCAN": "34.74 / .9299, 30.65 / .8482, 29.32 / .8111, 29.09 / .8702, 34.44 / .9499",
    },
    4: {
        "bicubic": "28.42 / .8104, 26.00 / .7027, 25.96 / .6675, 23.14 / .6577, 24.89 / .7866",
        "RCAN": "32.63 / .9002, 28.87 / .7889, 27.77 / .7436, 26.82 / .8087, 31.22 / .9173",
        "RCAN+": "32.73 / .9013, 28.98 / .7910, 27.85 / .7455, 27.10 / .8142, 31.65 / .9208",
    },
    8: {
        "bicubic": "24.40 / .6580, 23.10 / .5660, 23.67 / .5480, 20.74 / .5160, 21.47 / .6500",
        "RCAN": "27.31 / .7878, 25.23 / .6511, 24.98 / .6058, 23.00 / .6452, 25.24 / .8029",
    },
}
PAPER_SETS = ("Set5", "Set14", "B100", "Urban100", "Manga109")
_SAME_SET = {"BSD100": "B100", "BSDS100": "B100"}


def report(results: Sequence[Result], absent: Sequence[str], config: Config) -> str:
    """The scores as Markdown: the protocol, and a table for each scale."""
    protocol = utils.PROTOCOL.format(scale="scale" if len(results) > 1 else results[0].upscale_factor)
    ensemble = "+ is the self-ensemble of 8, whose images are written" if config.self_ensemble else "no self-ensemble"
    parts = [f"{config.degradation}: {protocol}, whole images, fp32, {ensemble}"]
    for scale in dict.fromkeys(result.upscale_factor for result in results):
        parts.append(table_of([result for result in results if result.upscale_factor == scale], scale, config))
    if absent:
        parts.append(f"Not scored, as there is no such folder in {config.data_root}: {', '.join(absent)}.")
    return "\n\n".join(parts)


def table_of(results: Sequence[Result], scale: int, config: Config) -> str:
    sets = list(results[0].scores["network"])
    rows = [[f"x{scale}, {config.degradation}", *sets]]
    rows.append(["bicubic", *(_cell(results[0].scores["bicubic"][name]) for name in sets)])
    for result in results:
        if "plain" in result.scores:
            rows.append([f"**{result.name}**", *(_cell(result.scores["plain"][name]) for name in sets)])
        label = result.name + ("+" if config.self_ensemble else "")
        rows.append([f"**{label}**", *(_cell(result.scores["network"][name]) for name in sets)])
        rows.append([f"{label}: seconds an image", *(f"{result.scores['network'][name]['seconds']:.2f}" for name in sets)])
        if result.peak_memory is not None:
            rows.append([f"{label}: peak memory, GiB", f"{result.peak_memory:.2f}", *[""] * (len(sets) - 1)])
    if config.degradation == "BI" and any(_SAME_SET.get(name, name) in PAPER_SETS for name in sets):
        for method, text in PAPER[scale].items():
            if config.self_ensemble or method != "RCAN+":
                known = dict(zip(PAPER_SETS, text.split(", "), strict=True))
                rows.append([f"*paper: {method}*", *(known.get(_SAME_SET.get(name, name), "–") for name in sets)])
    return markdown_table(rows)


def _cell(scores: Scores) -> str:
    return f"{scores['psnr']:.2f} / {scores['ssim']:.4f}".replace("/ 0.", "/ .")


def write(folder: Path, results: Sequence[Result], absent: Sequence[str], config: Config) -> None:
    """Write metrics.json, metrics.csv with a row for each image, and report.md."""
    metrics = {result.name: metrics_of(result, config) for result in results}
    files.write_text(folder / "metrics.json", json.dumps(metrics if len(results) > 1 else metrics[results[0].name], indent=2) + "\n")
    files.write_text(folder / "metrics.csv", rows_of(results, config))
    lines = [*(result.description for result in results), *(f"{name}: {value}" for name, value in provenance().items())]
    files.write_text(folder / "report.md", "\n".join([report(results, absent, config), "", *(f"- {line}" for line in lines), ""]))


def metrics_of(result: Result, config: Config) -> dict[str, Any]:
    """{set: the scores of the written images, the protocol, and the scores of the other methods}"""
    protocol = {
        "upscale_factor": result.upscale_factor,
        "degradation": config.degradation,
        "self_ensemble": config.self_ensemble,
        "peak_memory_gib": result.peak_memory,
    }
    others = {method: sets for method, sets in result.scores.items() if method != "network"}
    return {
        name: {**scores, **protocol, **{method: sets[name] for method, sets in others.items()}}
        for name, scores in result.scores["network"].items()
    }


def rows_of(results: Sequence[Result], config: Config) -> str:
    """As CSV, a row for each image and one for the mean; the columns of the other methods follow those of the written images."""
    text = io.StringIO()
    writer = csv.writer(text)
    methods = ["network", *(method for method in results[0].scores if method != "network")]
    columns = [f"{method}_{metric}" for method in methods[1:] for metric in ("psnr", "ssim")]
    writer.writerow(("weights", "upscale_factor", "degradation", "self_ensemble", "set", "image", "psnr", "ssim", *columns, "seconds"))
    for result in results:
        protocol = (result.name, result.upscale_factor, config.degradation, config.self_ensemble)
        for name, scores in result.scores["network"].items():
            of_set = [result.scores[method][name] for method in methods]
            for image in scores["images"]:
                values = [found["images"][image][metric] for found in of_set for metric in ("psnr", "ssim")]
                writer.writerow((*protocol, name, image, *values, ""))
            means = [found[metric] for found in of_set for metric in ("psnr", "ssim")]
            writer.writerow((*protocol, name, "mean", *means, scores["seconds"]))
    return text.getvalue()


if __name__ == "__main__":
    run_script(main)

"""Score weights on benchmark sets, beside bicubic and the paper:

    python test.py --model_path results/rcan_x4/best.pth.tar --data_root data --test_sets Set5 Set14 B100
    python test.py --model_path x2.pt x3.pt x4.pt x8.pt --test_sets Set5 Set14 B100 Urban100 Manga109 --self_ensemble True

The file alone tells the network's size; no setting of its training is needed. Images, metrics.json, metrics.csv, report.md and
report.html, a page to compare each image with bicubic, go to results/<exp_name>/test, named after the weights where exp_name is empty.
Several weights have a folder each, and results/table/test holds the scores of all. A folder that holds the scores of other weights is
left as it is. Scores are those of the images as written, by the papers' protocol.
"""

import environment  # noqa: F401 (names missing packages)

# isort: split
from config import Config, answer_help, parse

if __name__ == "__main__":
    answer_help(lambda: parse(Config, "test"))

import csv
import io
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import checkpoints
import dataset
import files
import html_report
import image_files
import imgproc
import model
import utils
import weights
from reports import markdown_table, provenance, to_json
from runtime import Runtime, run_script, start_runtime
from upscaling import upscale
from utils import Scores


@dataclass(frozen=True)
class Result:
    """The scores of one file of weights, {set: scores} for each method; "network" is that of the written images."""

    name: str
    upscale_factor: int
    description: str
    folder: Path  # of its images and reports
    given: frozenset[str]  # sets whose LR images are not those of the degradation
    scores: Mapping[str, Mapping[str, Scores]]  # {"bicubic" | "network" | "plain": {set: …}}
    peak_memory: float | None  # GiB


def main(argv: Sequence[str] | None = None) -> None:
    """Score every file of `model_path` on `test_sets`."""
    config = parse(Config, "test", argv)
    runtime = start_runtime()
    paths = checkpoints.weights_to_test(config.model_path, config.experiment_dir, config.exp_name, config.upscale_factor)
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"model_path={config.model_path!r} names a file twice: name each once")
    networks = {path: weights.load(path) for path in paths}  # all weights and sets first: a mistake costs no time
    if not config.test_sets:
        raise ValueError("test_sets is empty: name at least one, as in --test_sets Set5 Set14")
    absent = dataset.absent_sets(config.data_root, config.test_sets)
    present = [name for name in config.test_sets if name not in absent] or config.test_sets  # opening these raises the error
    sets = {
        path: dataset.open_test_sets(config.data_root, present, network.upscale_factor, config.degradation, decode=runtime.local_rank == 0)
        for path, network in networks.items()
    }
    folders = runtime.gather(choose_folders(config, paths) if runtime.is_main else {})[0]
    given: dict[Path, frozenset[str]] = dict.fromkeys(paths, frozenset())
    if runtime.is_main:
        for folder in folders.values():
            files.check_folder(folder)
        warn(networks, absent, config)
        given = {path: frozenset(check_lr(sets[path], networks[path].upscale_factor, config)) for path in paths}
    results = []
    for path, network in networks.items():
        if runtime.is_main:
            print(weights.describe(network))
            take(folders[path], [path])
        scores = score(folders[path], network.to(runtime.device), sets[path], config, runtime)
        name = weights_name(path) if len(paths) == 1 else (folders[path] if config.exp_name else folders[path].parent).name
        memory = utils.peak_memory(runtime.device)
        results.append(Result(name, network.upscale_factor, weights.describe(network), folders[path], given[path], scores, memory))
        network.cpu()
        if runtime.is_main:
            write(folders[path], results[-1:], absent, config)
            write_page(folders[path] / "report.html", results[-1], sets[path], absent, config)
    if runtime.is_main:
        if len(results) > 1:
            take(folders[None], paths)
            write(folders[None], results, absent, config)
        print(report(results, absent, config))
        print(f"\n{'images, report.html and ' if config.save_images else ''}metrics: {folders[None].absolute()}")


# Folders

_MADE_FROM = "made_from.json"  # in each folder of scores: the weights
_ENDINGS = (".pth.tar", ".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar")


def weights_name(path: Path) -> str:
    """The name of weights in results: a run's folder, or the file's name without its ending."""
    if path.name in (checkpoints.BEST, checkpoints.LAST):
        return path.absolute().parent.name or path.name.split(".")[0]
    ending = next((ending for ending in _ENDINGS if path.name.endswith(ending)), "")
    return path.name.removesuffix(ending).lstrip(".") or "weights"


def choose_folders(config: Config, paths: Sequence[Path]) -> dict[Path | None, Path]:
    """The folder for the scores of each file of weights, and by None that of all: results/<exp_name or name of the weights>/test.

    Another degradation and self-ensemble have their own folders (test_BD, test_plus). Where a folder is a run's, or holds the scores
    of other weights, the name is longer: with the weights' folder before it, then with a number.

    Raises:
        ValueError: `exp_name` chooses a folder that holds the scores of other weights.
    """
    kind = "test" + ("" if config.degradation == "BI" else f"_{config.degradation}") + ("_plus" if config.self_ensemble else "")
    results, found = Path(config.results_dir), dict[Path | None, Path]()

    def choose(names: Iterable[str], sources: Sequence[Path], place: Callable[[str], Path]) -> Path:
        for name in names:
            if place(name) not in found.values() and _may_hold(place(name), sources):
                return place(name)
        raise ValueError(f"{place(config.exp_name)}: holds the scores of other weights; choose another exp_name, or move it away")

    for path in paths:
        name, parent = weights_name(path), path.absolute().parent
        is_run = parent == (results / name).absolute()
        others = any((results / name / checkpoint).is_file() for checkpoint in (checkpoints.BEST, checkpoints.LAST)) and not is_run
        longer = f"{name}_{path.name.split('.')[0]}" if is_run else f"{parent.name}_{name}"
        names: Iterable[str] = itertools.chain([] if others else [name], [longer], (f"{longer}_{number}" for number in itertools.count(2)))
        if not config.exp_name:
            found[path] = choose(names, [path], lambda name: results / name / kind)
        elif len(paths) == 1:
            found[path] = choose([config.exp_name], [path], lambda name: results / name / kind)
        else:
            found[path] = choose(names, [path], lambda name: results / config.exp_name / kind / name)
    if len(paths) == 1:
        found[None] = found[paths[0]]
    else:
        names = [config.exp_name] if config.exp_name else itertools.chain(["table"], (f"table_{number}" for number in itertools.count(2)))
        found[None] = choose(names, paths, lambda name: results / name / kind)
    return found


def _may_hold(folder: Path, sources: Sequence[Path]) -> bool:
    """Whether a folder is free, or holds earlier scores of the same files."""
    try:
        made_from = json.loads((folder / _MADE_FROM).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return bool(made_from == [str(path.absolute()) for path in sources])


def take(folder: Path, sources: Sequence[Path]) -> None:
    """Mark a folder as one of these weights."""
    files.write_text(folder / _MADE_FROM, to_json([str(path.absolute()) for path in sources], indent=2) + "\n")


# Scores


def check_lr(sets: Mapping[str, dataset.EvaluationSet], scale: int, config: Config) -> list[str]:
    """Print where each set's images are from; the sets whose LR images are not those of the degradation."""
    given = []
    for name, images in sets.items():
        fits, found = dataset.check_lr(images.pairs, scale, config.degradation)
        print(dataset.describe_pairs("test", f"{name} x{scale}", images.pairs, found))
        given += [] if fits else [name]
    return given


def warn(networks: Mapping[Path, model.RCAN], absent: Sequence[str], config: Config) -> None:
    """Name what a person may not expect of the scores."""
    for name in absent:
        print(f"warning: {Path(config.data_root) / name}: no such folder; {name} is not scored", file=sys.stderr)
    if not config.model_path and config.experiment_dir not in [path.parent for path in networks]:
        print(f"note: {config.experiment_dir} holds no run, so this repository's light network is scored", file=sys.stderr)
    for path, network in networks.items():
        if network.degradation not in (None, config.degradation):
            print(
                f"warning: {path} was trained for degradation={network.degradation!r}, but is tested on {config.degradation!r}; "
                f"its scores are not comparable with those on {network.degradation!r}",
                file=sys.stderr,
            )


def score(
    folder: Path, network: model.RCAN, sets: Mapping[str, dataset.EvaluationSet], config: Config, runtime: Runtime
) -> dict[str, dict[str, Scores]]:
    """Upscale and score every image of every set by each method; the network's images go to the folder."""
    scale = network.upscale_factor
    methods: dict[str, Callable[[imgproc.RGB], imgproc.RGB]] = {"bicubic": partial(imgproc.imresize, scale=scale)}
    if config.self_ensemble:
        methods["plain"] = partial(upscale, network)
    methods["network"] = partial(upscale, network, self_ensemble=config.self_ensemble)
    scores: dict[str, dict[str, Scores]] = {method: {} for method in methods}
    upscale(network, np.zeros((32, 32, 3), np.uint8))  # the first call is slower, and no image's time shall hold that
    utils.reset_peak_memory(runtime.device)
    for name, images in sets.items():

        def save(image_name: str, _lr: imgproc.RGB, sr: imgproc.RGB, _gt: imgproc.RGB, place: Path = folder / name) -> None:
            image_files.write_image(place / f"{image_name}.png", sr)

        for method, upscaler in methods.items():
            on_image = save if config.save_images and method == "network" else None
            label = {"bicubic": "", "plain": f"{name}, plain"}.get(method, name)
            found = utils.evaluate(upscaler, images, scale, runtime, on_image=on_image, progress=label)
            assert found is not None, "evaluation ends early only at a StopRequest"
            scores[method][name] = found
    return scores


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
    return "\n\n".join([part if isinstance(part, str) else markdown_table(part) for part in parts_of(results, absent, config)])


Rows = list[list[str]]


def parts_of(results: Sequence[Result], absent: Sequence[str], config: Config) -> list[str | Rows]:
    """The paragraphs and tables of the reports."""
    protocol = utils.PROTOCOL.format(scale="scale" if len(results) > 1 else results[0].upscale_factor)
    ensemble = "+ is the self-ensemble of 8, whose images are written" if config.self_ensemble else "no self-ensemble"
    given = all(result.given >= result.scores["network"].keys() for result in results)
    parts: list[str | Rows] = [f"{dataset.AS_GIVEN if given else config.degradation}: {protocol}, whole images, fp32, {ensemble}"]
    for scale in dict.fromkeys(result.upscale_factor for result in results):
        parts.append(table_of([result for result in results if result.upscale_factor == scale], scale, config))
    uncounted = dict.fromkeys(
        f"{name}/{image} ({why})"
        for result in results
        for sets in result.scores.values()
        for name, scores in sets.items()
        for image, why in scores.get("not_in_psnr", {}).items()
    )
    if uncounted:
        parts.append(f"Not in the mean PSNR, as theirs is infinite or says little: {', '.join(uncounted)}.")
    if absent:
        parts.append(f"Not scored, as there is no such folder in {config.data_root}: {', '.join(absent)}.")
    return parts


def table_of(results: Sequence[Result], scale: int, config: Config) -> Rows:
    sets, given = list(results[0].scores["network"]), results[0].given
    label = f"x{scale}, {dataset.AS_GIVEN if given.issuperset(sets) else config.degradation}"
    rows = [[label, *(f"{name} ({dataset.AS_GIVEN})" if name in given else name for name in sets)]]
    rows.append(["bicubic", *(_cell(results[0].scores["bicubic"][name]) for name in sets)])
    for result in results:
        if "plain" in result.scores:
            rows.append([f"**{result.name}**", *(_cell(result.scores["plain"][name]) for name in sets)])
        label = result.name + ("+" if config.self_ensemble else "")
        rows.append([f"**{label}**", *(_cell(result.scores["network"][name]) for name in sets)])
        rows.append([f"{label}: seconds an image", *(f"{result.scores['network'][name]['seconds']:.2f}" for name in sets)])
        if result.peak_memory is not None:
            rows.append([f"{label}: peak memory, GiB", f"{result.peak_memory:.2f}", *[""] * (len(sets) - 1)])
    published = {name: "–" if name in given else _SAME_SET.get(name, name) for name in sets}
    if config.degradation == "BI" and not {*PAPER_SETS}.isdisjoint(published.values()):
        for method, text in PAPER[scale].items():
            if config.self_ensemble or method != "RCAN+":
                known = dict(zip(PAPER_SETS, text.split(", "), strict=True))
                rows.append([f"*paper: {method}*", *(known.get(published[name], "–") for name in sets)])
    return rows


def _cell(scores: Scores) -> str:
    return f"{scores['psnr']:.2f} / {scores['ssim']:.4f}".replace("/ 0.", "/ .")


def write(folder: Path, results: Sequence[Result], absent: Sequence[str], config: Config) -> None:
    """Write metrics.json, metrics.csv with a row for each image, and report.md."""
    metrics = {result.name: metrics_of(result, config) for result in results}
    name_replaced(folder / "metrics.json", metrics if len(results) > 1 else metrics[results[0].name])
    files.write_text(folder / "metrics.json", to_json(metrics if len(results) > 1 else metrics[results[0].name], indent=2) + "\n")
    files.write_text(folder / "metrics.csv", rows_of(results, config))
    lines = [*(result.description for result in results), *(f"{name}: {value}" for name, value in provenance().items())]
    files.write_text(folder / "report.md", "\n".join([report(results, absent, config), "", *(f"- {line}" for line in lines), ""]))


def write_page(path: Path, result: Result, sets: Mapping[str, dataset.EvaluationSet], absent: Sequence[str], config: Config) -> None:
    """Write report.html: each image beside bicubic and GT, from the largest loss of quality to the largest gain."""
    if not config.save_images:
        if path.exists():
            print(f"note: {path}: is of earlier scores; without --save_images False it is written anew", file=sys.stderr)
        return
    label = result.name + ("+" if config.self_ensemble else "")
    found = []
    for name, images in sets.items():
        bicubic, network = (result.scores[method][name]["images"] for method in ("bicubic", "network"))
        for index, pair in enumerate(images.pairs):
            before, after = bicubic[pair.name]["psnr"], network[pair.name]["psnr"]
            gain = 0.0 if before == after else after - before  # both may be infinite
            found.append((gain, name, index, f"{gain:+.2f} dB: bicubic {before:.2f} dB, {label} {after:.2f} dB"))
    parts = parts_of([result], absent, config)
    lines = [part for part in parts if isinstance(part, str)] + [f"{result.description}. Images are sorted by gain, the worst first."]
    page = html_report.Report(f"{label} on {', '.join(sets)}", lines, [part for part in parts if not isinstance(part, str)], len(found))
    for _, name, index, note in sorted(found):  # the images are read again, one after the other, as all of them may not fit into memory
        image_name, lr, gt = sets[name][index]
        sr = image_files.read_image(path.parent / name / f"{image_name}.png")
        page.add(f"{name}/{image_name}", note, [("bicubic", imgproc.imresize(lr, result.upscale_factor)), (label, sr), ("GT", gt)])
    for note in page.write(path):
        print(f"note: {path}: {note}", file=sys.stderr)


def name_replaced(path: Path, metrics: Mapping[str, Any]) -> None:
    """Say which earlier scores in a report are not among the new ones."""
    try:
        gone = sorted(json.loads(path.read_text(encoding="utf-8")).keys() - metrics.keys())
    except (OSError, ValueError, AttributeError):
        return
    if gone:
        print(f"note: {path}: the earlier scores of {', '.join(gone)} are replaced; score all sets at once to keep them", file=sys.stderr)


def metrics_of(result: Result, config: Config) -> dict[str, Any]:
    """{set: the scores of the written images, the protocol, and the scores of the other methods}"""
    protocol = {
        "upscale_factor": result.upscale_factor,
        "self_ensemble": config.self_ensemble,
        "peak_memory_gib": result.peak_memory,
    }
    others = {method: sets for method, sets in result.scores.items() if method != "network"}
    return {
        name: {
            **scores,
            "degradation": _degradation(result, name, config),
            **protocol,
            **{method: sets[name] for method, sets in others.items()},
        }
        for name, scores in result.scores["network"].items()
    }


def _degradation(result: Result, name: str, config: Config) -> str:
    return dataset.AS_GIVEN if name in result.given else config.degradation


def rows_of(results: Sequence[Result], config: Config) -> str:
    """As CSV, a row for each image and one for the mean; the columns of the other methods follow those of the written images."""
    text = io.StringIO()
    writer = csv.writer(text)
    methods = ["network", *(method for method in results[0].scores if method != "network")]
    columns = [f"{method}_{metric}" for method in methods[1:] for metric in ("psnr", "ssim")]
    writer.writerow(("weights", "upscale_factor", "degradation", "self_ensemble", "set", "image", "psnr", "ssim", *columns, "seconds"))
    for result in results:
        for name, scores in result.scores["network"].items():
            protocol = (result.name, result.upscale_factor, _degradation(result, name, config), config.self_ensemble)
            of_set = [result.scores[method][name] for method in methods]
            for image in scores["images"]:
                values = [found["images"][image][metric] for found in of_set for metric in ("psnr", "ssim")]
                writer.writerow((*protocol, name, image, *map(_finite, values), ""))
            means = [found[metric] for found in of_set for metric in ("psnr", "ssim")]
            writer.writerow((*protocol, name, "mean", *map(_finite, means), scores["seconds"]))
    return text.getvalue()


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else ""


if __name__ == "__main__":
    run_script(main)

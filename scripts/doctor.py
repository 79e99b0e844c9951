"""Say on one screen whether training and testing will work here, and if not, why:

python scripts/doctor.py                                    # with the settings of config.py
python scripts/doctor.py --data_root data --train_sets T91 BSDS200 --model_arch_name rcan_light_x4

It takes the settings of train.py and test.py, reads what they would read at their start, but for a checkpoint to resume from, and writes
nothing. Exit code 1 means that one of the two would fail.
"""

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import image_files

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

if TYPE_CHECKING:
    from config import Config
    from dataset import Pair

CHECKED_PAIRS = 10  # of each set, whose LR images are compared with exact ones

Problems = dict[str, list[str]]  # {"training" or "testing": sentences}


def main(argv: Sequence[str] | None = None) -> None:
    """Print what was found; exits with code 1 if training or testing would fail."""
    missing = check_packages()  # before anything of ours is imported, which would need them
    if missing:
        raise SystemExit(f"error: {'; '.join(missing)}: run pip install -r {REPOSITORY / 'requirements.txt'}")
    from config import Config, parse

    config = parse(Config, None, argv)
    problems: Problems = {"training": [], "testing": []}
    say("device", describe_device(config))
    check_data(config, problems)
    check_weights(config, problems)
    check_disk(config, problems)
    for work, reasons in problems.items():
        say(work, "would start" if not reasons else f"would fail: {'; '.join(dict.fromkeys(reasons))}")
    if any(problems.values()):
        sys.exit(1)


def say(topic: str, text: str) -> None:
    print(f"{topic:10} {text}")


# Packages


def check_packages() -> list[str]:
    """Say which versions are there; what is missing or too old."""
    wanted = re.findall(r"^([\w-]+)>=([\d.]+)", (REPOSITORY / "requirements.txt").read_text(encoding="utf-8"), re.M)
    found, problems = [f"python {platform.python_version()}"], []
    for name, least in wanted:
        version = next(filter(None, map(_version, (name, *_SAME.get(name, ())))), None)
        if version is None:
            problems.append(f"{name} is missing")
            continue
        found.append(f"{name} {version}")
        if _numbers(version) < _numbers(least):
            problems.append(f"{name} is {version}, but at least {least} is needed")
    if not problems:
        problems += filter(None, map(_broken, ("torch", "torchvision", "cv2")))
    if sys.version_info < (3, 10):  # noqa: UP036 (who runs it by hand may have an older one)
        problems.append(f"Python is {platform.python_version()}, but at least 3.10 is needed")
    say("versions", ", ".join(found))
    return problems


_SAME = {"opencv-python-headless": ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless")}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _broken(module: str) -> str:
    """What goes wrong on importing, as when torch and torchvision don't fit each other; empty if nothing."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"{module} is installed, but can't be imported ({str(error).splitlines()[0]})"
    return ""


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.match(r"[\d.]*\d", version)[0].split(".")]


# The machine


def describe_device(config: "Config") -> str:
    """Device, memory, and the precision that training would take."""
    import torch

    import utils

    if torch.cuda.is_available():
        device = torch.device("cuda")
        names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        text = ", ".join(f"{found.name} with {found.total_memory / 2**30:.0f} GiB" for found in names)
    else:
        device = torch.device("cpu")
        text = f"no GPU; {platform.machine()} CPU, {torch.get_num_threads()} threads{_memory()}"
    compiler = "" if not config.compile or device.type == "cuda" or _has_compiler() else "; compile=True, but no C++ compiler was found"
    precision = utils.choose_precision(config.precision, device)
    return f"{text}; precision={config.precision!r} is {precision} in training, fp32 in testing{compiler}"


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return ""
    return f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"


def _has_compiler() -> bool:
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")))


# Data


def check_data(config: "Config", problems: Problems) -> None:
    """Every set that the settings name, as training and testing would open it; and what else lies beside them."""
    root = Path(config.data_root)
    say("data", str(root.absolute()))
    for name in config.train_sets:
        _check_set(name, "train", problems["training"], config, lambda pairs, sizes: _fit(pairs, sizes, config))
    for name in config.valid_sets:
        _check_set(name, "valid", problems["training"], config, _nothing)
    scales = _tested_scales(config)
    for name in config.test_sets:
        if not (root / name).is_dir() and any((root / other).is_dir() for other in config.test_sets):
            say("", f"test {name}: no such folder; it would not be scored")
            continue
        for scale in scales:
            _check_set(name, "test", problems["testing"], config, _nothing, scale)
    named = {*config.train_sets, *config.valid_sets, *config.test_sets}
    others = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name not in named) if root.is_dir() else []
    if others:
        say("", f"not named by the settings: {', '.join(others)}")


def _tested_scales(config: "Config") -> list[int]:
    import weights

    scales = []
    for path in config.weights_paths:
        try:
            scales.append(weights.load(path).upscale_factor)
        except (OSError, ValueError):  # said where weights are checked
            continue
    return list(dict.fromkeys(scales)) or [config.upscale_factor]


def _check_set(
    name: str, split: str, reasons: list[str], config: "Config", check: Callable[..., str], upscale_factor: int | None = None
) -> None:
    import dataset

    scale = upscale_factor or config.upscale_factor
    try:
        pairs = dataset.find_pairs(Path(config.data_root) / name, scale, config.degradation)
        sizes = dataset.gt_sizes(pairs, scale)
        if split != "train":
            dataset.open_test_sets(config.data_root, [name], scale, config.degradation)
        extra = check(pairs, sizes)
        smallest, largest = (f"{width}x{height}" for height, width in (min(sizes, key=_area), max(sizes, key=_area)))
        span = smallest if smallest == largest else f"{smallest} to {largest}"
        say("", f"{split} {name} x{scale}: {len(pairs)} images, {span}{extra}; LR {compare_lr(pairs, scale, config.degradation)}")
    except (OSError, ValueError) as error:
        say("", f"{split} {name} x{scale}: PROBLEM: {error}")
        reasons.append(f"{split} set {name}")


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _nothing(_pairs: Sequence["Pair"], _sizes: Sequence[tuple[int, int]]) -> str:
    return ""


def _fit(pairs: Sequence["Pair"], sizes: Sequence[tuple[int, int]], config: "Config") -> str:
    import dataset

    usable = dataset.fit_to_patch(pairs, sizes, config.gt_patch_size, config.small_images)
    return "" if len(usable) == len(pairs) else f", {len(pairs) - len(usable)} too small for a patch and left out"


def compare_lr(pairs: Sequence["Pair"], upscale_factor: int, degradation: str) -> str:
    """Whether LR images on disk are what this repository makes of their originals: MATLAB's bicubic, bit for bit, for BI."""
    import numpy as np

    import dataset
    import imgproc

    if pairs[0].lr is None:
        return "made exactly when needed"
    if degradation == "DN":
        return f"in {pairs[0].lr.parent.name}, with noise of their own"
    chosen = [pairs[index] for index in np.linspace(0, len(pairs) - 1, min(CHECKED_PAIRS, len(pairs))).astype(int)]
    differing, worst = [], 0
    for pair in chosen:
        gt = imgproc.crop_to_multiple(image_files.read_image(pair.gt), upscale_factor)
        lr = dataset.make_lr(pair, gt, upscale_factor, degradation).astype(int)
        off = abs(lr - imgproc.degrade(gt, upscale_factor, degradation))
        differing.append(np.mean(off > 0))
        worst = max(worst, int(off.max()))
    kind = "MATLAB's bicubic" if degradation == "BI" else degradation
    where = f"in {pairs[0].lr.parent.name}, {len(chosen)} compared"
    if not worst:
        return f"{where}: exactly {kind}"
    return f"{where}: NOT {kind}, {np.mean(differing):.1%} of the values differ, by up to {worst}; scores will not compare with the papers'"


# Weights and room


def check_weights(config: "Config", problems: Problems) -> None:
    """What test.py would load, and what training would start from."""
    for path in config.weights_paths:
        _check_weights(path, problems["testing"])
    if config.pretrained_model_path:
        _check_start(config, problems["training"])


def _check_weights(path: Path, reasons: list[str]) -> None:
    import torch

    import weights

    try:
        network = weights.load(path)
        with torch.inference_mode():
            finite = bool(torch.isfinite(network(torch.rand(1, 3, 8, 8))).all())
        say("weights", weights.describe(network) + ("" if finite else "; PROBLEM: its output is not finite"))
        reasons += [] if finite else [f"weights {path}"]
    except (OSError, ValueError) as error:
        say("weights", f"PROBLEM: {_shortened(str(error))}")
        reasons.append(f"weights {path}")


def _check_start(config: "Config", reasons: list[str]) -> None:
    """Whether the network to train can begin with `pretrained_model_path`."""
    import model
    import weights

    try:
        network = model.ARCHITECTURES[config.model_arch_name](**config.model_arguments)
        say("weights", weights.transfer(network, config.pretrained_model_path).splitlines()[0])
    except (OSError, ValueError) as error:
        say("weights", f"PROBLEM: {_shortened(str(error))}")
        reasons.append(f"pretrained_model_path={config.pretrained_model_path!r}")


def _shortened(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:400]} …"


def check_disk(config: "Config", problems: Problems) -> None:
    """Room and rights for results and for decoded training images."""
    needs = {config.results_dir: ("results", 2**30), config.cache_dir: ("decoded images", _decoded_bytes(config))}
    for folder, (what, needed) in needs.items():
        existing = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        problem = ""
        if not os.access(existing, os.W_OK) or not existing.is_dir():
            problem = f"{existing} can't be written to"
        elif free < needed:
            problem = f"{needed / 2**30:.1f} GiB are needed"
        say("disk", f"{Path(folder).absolute()}: {free / 2**30:.1f} GiB free for {what}{f'; PROBLEM: {problem}' if problem else ''}")
        if problem:
            problems["training"].append(f"disk for {what}")
            problems["testing"] += [f"disk for {what}"] if folder == config.results_dir and free < 2**20 else []


def _decoded_bytes(config: "Config") -> int:
    import dataset

    total = 0
    for name in config.train_sets:
        try:
            pairs = dataset.find_pairs(Path(config.data_root) / name, config.upscale_factor, config.degradation)
            sizes = dataset.gt_sizes(pairs, config.upscale_factor)
        except (OSError, ValueError):  # said where data is checked
            continue
        total += sum(3 * height * width for height, width in sizes)
    return int(total * (1 + 1 / config.upscale_factor**2))


def _run(script: Callable[[], Any]) -> None:
    try:
        from utils import run
    except (ImportError, OSError, RuntimeError):  # packages are missing or broken, which the script says
        script()
    else:
        run(script)


if __name__ == "__main__":
    _run(main)

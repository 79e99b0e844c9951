"""Say on one screen whether training and testing will work here, and if not, why:

python scripts/doctor.py                                    # with the settings of config.py
python scripts/doctor.py --data_root data --train_sets T91 BSDS200 --model_arch_name rcan_light_x4

It takes the settings of train.py and test.py, reads what both read at their start (except a checkpoint to resume from), and writes
nothing. Exit code 1 means that one of the two would fail.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

BROKEN = ""
for package in ("numpy", "cv2", "torch", "torchvision"):
    try:
        importlib.import_module(package)
    except Exception as error:  # a broken package can raise anything; main says what is missing, old or broken
        BROKEN = f"{package} cannot be imported ({type(error).__name__}: {str(error).splitlines()[0]})"
        break
if not BROKEN and sys.version_info >= (3, 10):
    import torch

    import checkpoints
    import dataset
    import model
    import utils
    import weights
    from config import Config, parse, released_weights
    from runtime import missing_compiler, run_script, try_device, unused_gpu

OPENCV = ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless")  # any of them will do


def main(argv: Sequence[str] | None = None) -> None:
    """Print what was found; exit with code 1 if training or testing would fail."""
    if problems := check_packages() or ([BROKEN] if BROKEN else []):
        raise SystemExit(f"error: {'; '.join(problems)}: run pip install -r {REPOSITORY / 'requirements.txt'}")
    config = parse(Config, None, argv)
    failing: dict[str, list[str]] = {"training": [], "testing": []}
    check_device(config, failing)
    scales = check_weights(config, failing)
    decoded = check_data(config, scales, failing)
    check_disk(config, decoded, failing)
    for work, reasons in failing.items():
        say(work, "would start" if not reasons else f"would fail: {'; '.join(dict.fromkeys(reasons))}")
    if any(failing.values()):
        sys.exit(1)


def say(topic: str, text: str) -> None:
    print(f"{topic:10} {text}")


# Packages and devices


def check_packages() -> list[str]:
    """Print the versions; return what is missing or too old."""
    wanted = re.findall(r"^([\w-]+)>=([\d.]+)", (REPOSITORY / "requirements.txt").read_text(encoding="utf-8"), re.M)
    found, problems = [f"python {platform.python_version()}"], []
    if sys.version_info < (3, 10):  # noqa: UP036 (a person may start this script by an older one)
        problems.append(f"Python is {platform.python_version()}, but at least 3.10 is needed")
    for name, least in wanted:
        names = (name, *OPENCV) if name.startswith("opencv") else (name,)
        version = next((each.version for other in names for each in importlib.metadata.distributions(name=other)), None)
        if version is None:
            problems.append(f"{name} is missing")
            continue
        found.append(f"{name} {version}")
        have, need = ([int(number) for number in re.findall(r"\d+", text)] for text in (version.split("+")[0], least))
        if have < need:
            problems.append(f"{name} is {version}, but at least {least} is needed")
    say("versions", ", ".join(found))
    return problems


def check_device(config: Config, failing: dict[str, list[str]]) -> None:
    """Print device, memory and the precision of training, and try a convolution."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        text = ", ".join(f"{gpu.name} with {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)
    else:
        text = f"no GPU; {platform.machine()} CPU, {torch.get_num_threads()} threads"
        if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
            text += f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    text += f"; precision={config.precision!r} is {utils.choose_precision(config.precision, device)} in training, fp32 in testing"
    say("device", text)
    if unused := unused_gpu():
        say("", unused)
    if config.compile and (lacking := missing_compiler(device)):
        say("", f"PROBLEM: {lacking}")
        failing["training"].append("compile=True")
    try:
        try_device(device)
    except ValueError as error:
        say("", f"PROBLEM: {error}")
        failing["training"].append(f"device {device}")
        failing["testing"].append(f"device {device}")


# Weights, data and disk


def check_weights(config: Config, failing: dict[str, list[str]]) -> list[int]:
    """Load what test.py would load, and what training would start from; return the scales to test at."""
    scales = []
    try:
        paths = checkpoints.weights_to_test(config.model_path, config.experiment_dir, config.exp_name, config.upscale_factor)
    except OSError as error:
        say("weights", f"PROBLEM: {error}")
        failing["testing"].append(f"exp_name={config.exp_name!r}")
        paths = ()
    if paths == (released_weights(config.upscale_factor),) and not config.model_path:
        say("weights", f"{config.experiment_dir} holds no run yet; test.py would score this repository's light network:")
    for path in paths:
        try:
            network = weights.load(path)
            with torch.inference_mode():
                if not torch.isfinite(network(torch.rand(1, 3, 8, 8))).all():
                    raise ValueError(f"{path}: its output is not finite; take other weights")
            say("weights", weights.describe(network))
            scales.append(network.upscale_factor)
        except (OSError, ValueError) as error:
            say("weights", f"PROBLEM: {str(error)[:400]}")
            failing["testing"].append(f"weights {path}")
    if config.pretrained_model_path:
        try:
            network = model.ARCHITECTURES[config.model_arch_name](**config.model_arguments)
            say("weights", weights.transfer(network, config.pretrained_model_path).splitlines()[0])
        except (OSError, ValueError) as error:
            say("weights", f"PROBLEM: {str(error)[:400]}")
            failing["training"].append(f"pretrained_model_path={config.pretrained_model_path!r}")
    return list(dict.fromkeys(scales)) or [config.upscale_factor]


def check_data(config: Config, tested_scales: Sequence[int], failing: dict[str, list[str]]) -> int:
    """Open every set that the settings name, as training and testing do; return the bytes of the decoded training images."""
    root = Path(config.data_root)
    say("data", str(root.absolute()))
    decoded = sum(check_set(name, "train", config.upscale_factor, config, failing["training"]) for name in config.train_sets)
    for name in config.valid_sets:
        check_set(name, "valid", config.upscale_factor, config, failing["training"])
    absent = dataset.absent_sets(root, config.test_sets)
    for name in config.test_sets:
        if name in absent and len(absent) < len(config.test_sets):
            say("", f"test {name}: no such folder; test.py would leave it out")
            continue
        for scale in tested_scales:
            check_set(name, "test", scale, config, failing["testing"])
    named = {*config.train_sets, *config.valid_sets, *config.test_sets}
    if others := sorted(path.name for path in root.glob("*") if path.is_dir() and path.name not in named):
        say("", f"not named by the settings: {', '.join(others)}")
    return decoded


def check_set(name: str, split: str, scale: int, config: Config, reasons: list[str]) -> int:
    """Print a line on a set, and add to `reasons` if it can't be used; return the bytes of its decoded images."""
    try:
        pairs = dataset.find_pairs(Path(config.data_root) / name, scale, config.degradation)
        sizes = dataset.gt_sizes(pairs, scale)
        skipped = 0
        if split == "train":
            skipped = len(pairs) - len(dataset.fit_to_patch(pairs, sizes, config.gt_patch_size, config.small_images))
        else:
            dataset.open_test_sets(config.data_root, [name], scale, config.degradation)
        ordered = [f"{width}x{height}" for height, width in sorted(sizes, key=lambda size: size[0] * size[1])]
        span = " to ".join(dict.fromkeys((ordered[0], ordered[-1])))
        left_out = f", {skipped} smaller than a patch and left out" if skipped else ""
        _, lr = dataset.check_lr(pairs, scale, config.degradation)
        say("", f"{split} {name} x{scale}: {len(pairs)} images, {span}{left_out}; LR {lr}")
        for line in dataset.describe_pairs(split, name, pairs, lr).splitlines()[2:]:
            say("", line.strip())
        return sum(3 * height * width + 3 * height * width // scale**2 for height, width in sizes)
    except (OSError, ValueError) as error:
        say("", f"{split} {name} x{scale}: PROBLEM: {error}")
        reasons.append(f"{split} set {name}")
        return 0


def check_disk(config: Config, decoded: int, failing: dict[str, list[str]]) -> None:
    """Room and rights for results and for decoded training images."""
    for what, folder, needed in (("results", config.results_dir, 2**30), ("decoded images", config.cache_dir, decoded)):
        place = Path(folder).absolute()
        existing = next(path for path in (place, *place.parents) if path.exists())
        free, writable = shutil.disk_usage(existing).free, existing.is_dir() and os.access(existing, os.W_OK)
        problem = f"{existing} can't be written to" if not writable else f"{needed / 2**30:.1f} GiB are needed" if free < needed else ""
        say("disk", f"{place}: {free / 2**30:.1f} GiB free for {what}{f'; PROBLEM: {problem}' if problem else ''}")
        if problem:
            failing["training"].append(f"disk for {what}")
            if what == "results" and (not writable or free < 2**20):
                failing["testing"].append(f"disk for {what}")


if __name__ == "__main__":
    if BROKEN or sys.version_info < (3, 10):
        main()
    else:
        run_script(main)

"""Measure this machine: MATLAB's bicubic, cutting batches, updates, and upscaling:

    python scripts/benchmark.py --model_arch_name rcan_light_x4 --batch_size 8 --lr_patch_size 32

Each figure is the best and the median of several runs, since other programs only ever make it slower.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from reports import provenance

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataset
import image_files
import imgproc
import model
import utils
from runtime import run_script, start_runtime
from store import PairStore


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    model_arch_name: str = "rcan_light_x4"  # the network to time
    batch_size: int = 16  # patches in an update
    lr_patch_size: int = 48  # side of the LR patch, LR pixels
    runs: int = 7  # of each measurement


def main(argv: Sequence[str] | None = None) -> None:
    """Print one line for each measurement."""
    config = tyro.cli(BenchmarkConfig, args=argv, use_underscores=True)
    if config.model_arch_name not in model.ARCHITECTURES:
        raise ValueError(f"model_arch_name={config.model_arch_name!r} is unknown; known are {', '.join(model.ARCHITECTURES)}")
    for name, value in provenance().items():
        print(f"{name} {value}")
    time_resizing(config.runs)
    time_cutting(config)
    time_network(config)


def time_resizing(runs: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (1404, 2040, 3), dtype=np.uint8)
    for scale in (2, 3, 4, 8):
        best, median = _time(lambda scale=scale: imgproc.imresize(picture, 1 / scale), runs)
        print(f"imresize 2040x1404 at 1/{scale}, one core: {best:.3f} s (median {median:.3f})")


def time_cutting(config: BenchmarkConfig) -> None:
    """Pairs per second and core, from a store of eight pictures of 480x480."""
    with tempfile.TemporaryDirectory() as folder:
        for index in range(8):
            picture = np.random.default_rng(index).integers(0, 256, (480, 480, 3), dtype=np.uint8)
            image_files.write_image(Path(folder) / "Set" / "GT" / f"{index}.png", picture)
        pairs = dataset.find_pairs(Path(folder) / "Set", 4)
        store = PairStore.open_or_build({"Set": pairs}, 4, "BI", Path(folder) / "cache", progress=False)
        batches = dataset.TrainBatches(store, 16, 48, seed=0)
        best, median = _time(lambda: [batches[update] for update in range(20)], config.runs)
        print(f"GT-192/LR-48 pairs from the store, one core: {320 / best:,.0f} a second (median {320 / median:,.0f})")


def time_network(config: BenchmarkConfig) -> None:
    """Forward and backward at each precision, on the first GPU or on the CPU."""
    device = start_runtime().device
    network = model.ARCHITECTURES[config.model_arch_name]().to(device, memory_format=torch.channels_last)
    lr = torch.rand(config.batch_size, 3, config.lr_patch_size, config.lr_patch_size, device=device).to(memory_format=torch.channels_last)
    for name, dtype in utils.PRECISIONS.items():
        if name == "fp16" and device.type == "cpu":
            continue  # minutes an update: CPUs only imitate it

        def update(dtype: torch.dtype = dtype) -> None:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                sr = network(lr)
            sr.float().mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()

        best, median = _time(update, config.runs)
        print(f"{config.model_arch_name}, forward and backward, {name}, {tuple(lr.shape)}: {best * 1e3:.0f} ms (median {median * 1e3:.0f})")


def _time(work: Callable[[], object], runs: int) -> tuple[float, float]:
    work()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds), statistics.median(seconds)


if __name__ == "__main__":
    run_script(main)

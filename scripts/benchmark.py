"""Measure this machine: the speed of training and upscaling, and the memory that upscaling a large image takes:

    python scripts/benchmark.py --model_arch_name rcan_light_x4 --batch_size 8 --lr_patch_size 32
    python scripts/benchmark.py --parts memory --width 1920 --height 1080 --modes strips tiles      # whole: in one piece, 16 GiB

Each speed is the best and the median of several runs, as other programs only ever slow one down. Memory is the peak of a whole
process, Python and PyTorch included; on a GPU, of what is allocated there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import environment  # noqa: F401 (names missing packages)

# isort: split

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import skimage.data
import torch
import tyro

import dataset
import image_files
import imgproc
import model
import utils
import weights
from config import released_weights
from reports import markdown_table, provenance
from runtime import run_script, start_runtime
from store import PairStore
from upscaling import upscale


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    parts: tuple[Literal["speed", "memory"], ...] = ("speed", "memory")  # what to measure

    # Speed
    model_arch_name: str = "rcan_light_x4"  # the network to time
    batch_size: int = 16  # patches in an update
    lr_patch_size: int = 48  # side of the LR patch, LR pixels
    runs: int = 7  # of each measurement

    # Memory
    model_path: str = ""  # weights; empty: the light network of this repository at x4
    width: int = 640  # of the LR image, pixels
    height: int = 360  # of the LR image, pixels
    modes: tuple[Literal["whole", "strips", "tiles"], ...] = ("whole", "strips", "tiles")  # how to upscale it; whole: in one piece
    tile: int = 256  # side of the tiles, LR pixels


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each speed, and a Markdown table of memory."""
    config = tyro.cli(BenchmarkConfig, args=argv, use_underscores=True)
    if config.model_arch_name not in model.ARCHITECTURES:
        raise ValueError(f"model_arch_name={config.model_arch_name!r} is unknown; known are {', '.join(model.ARCHITECTURES)}")
    for name, value in provenance().items():
        print(f"{name} {value}")
    if "speed" in config.parts:
        time_resizing(config)
        time_cropping(config)
        time_network(config)
    if "memory" in config.parts:
        print(measure_memory(config))


# Speed


def time_resizing(config: BenchmarkConfig) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1404, 2040, 3), dtype=np.uint8)
    for scale in (2, 3, 4, 8):
        best, median = measure(partial(imgproc.imresize, image, 1 / scale), config.runs)
        print(f"imresize 2040x1404 at 1/{scale}, one core: {best:.3f} s (median {median:.3f})")


def time_cropping(config: BenchmarkConfig) -> None:
    """Pairs a second and core, from a store of eight images of 480x480."""
    with tempfile.TemporaryDirectory() as folder:
        for index in range(8):
            image = np.random.default_rng(index).integers(0, 256, (480, 480, 3), dtype=np.uint8)
            image_files.write_image(Path(folder) / "Set" / "GT" / f"{index}.png", image)
        pairs = dataset.find_pairs(Path(folder) / "Set", 4)
        store = PairStore.open_or_build({"Set": pairs}, 4, "BI", Path(folder) / "cache", progress=False)
        batches = dataset.TrainBatches(store, 16, 48, seed=0)
        best, median = measure(lambda: [batches[update] for update in range(20)], config.runs)
        print(f"GT-192/LR-48 pairs from the store, one core: {320 / best:,.0f} a second (median {320 / median:,.0f})")


def time_network(config: BenchmarkConfig) -> None:
    """An update's forward and backward, and upscaling an image, at each precision, on the first GPU or on the CPU."""
    device = start_runtime().device
    network = model.ARCHITECTURES[config.model_arch_name]().to(device).to(memory_format=torch.channels_last)
    lr = torch.rand(config.batch_size, 3, config.lr_patch_size, config.lr_patch_size, device=device).to(memory_format=torch.channels_last)

    def update(dtype: torch.dtype) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            sr = network(lr)
        sr.float().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    for name, dtype in utils.PRECISIONS.items():
        if name == "fp16" and device.type == "cpu":
            continue  # minutes an update: CPUs only imitate it
        works: dict[str, Callable[[], object]] = {
            f"forward and backward, {name}, {tuple(lr.shape)}": partial(update, dtype),
            f"upscaling, {name}, 128x128": partial(upscale, network, make_image(128, 128), precision=name),
        }
        for title, work in works.items():
            best, median = measure(work, config.runs)
            print(f"{config.model_arch_name}, {title}: {best * 1e3:.0f} ms (median {median * 1e3:.0f})")


def measure(work: Callable[[], object], runs: int) -> tuple[float, float]:
    """Best and median seconds, after one run that is not counted."""
    work()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds), statistics.median(seconds)


# Memory


def measure_memory(config: BenchmarkConfig) -> str:
    """A Markdown table: seconds, peak memory and differences of each mode, which runs in a process of its own."""
    rows = [["", "seconds", "peak memory, GiB", f"differs from {config.modes[0]}"]]
    first, network = None, ""
    for mode in config.modes:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                sr, seconds, gib, network = pool.submit(upscale_by, mode, config).result()
            except BrokenProcessPool:
                raise ValueError(f"{mode}: its process was killed, as for lack of memory: leave it out of --modes") from None
        first = sr if first is None else first
        off = abs(sr.astype(np.int16) - first)
        text = f"in {np.mean(off > 0):.2%} of the values, by up to {off.max()}; PSNR {imgproc.psnr(sr, first, 0, False):.2f} dB"
        rows.append([mode, f"{seconds:.1f}", "–" if gib is None else f"{gib:.2f}", text if off.any() else "nowhere"])
    return f"\n{config.width}x{config.height}, {network}\n\n{markdown_table(rows)}"


def upscale_by(mode: str, config: BenchmarkConfig) -> tuple[imgproc.RGB, float, float | None, str]:
    """The SR image, the seconds and GiB that it took, and the network's description."""
    device = start_runtime().device
    network = weights.load(config.model_path or released_weights(4)).to(device)
    lr = make_image(config.height, config.width)
    upscale(network, lr[:32, :32])  # the first call is slower
    utils.reset_peak_memory(device)
    start = time.perf_counter()
    sr = upscale(network, lr, strip_rows=config.height if mode == "whole" else None, tile=config.tile if mode == "tiles" else 0)
    return sr, time.perf_counter() - start, utils.peak_memory(device), weights.describe(network)


def make_image(height: int, width: int) -> imgproc.RGB:
    """A photograph of scikit-image, repeated to this size."""
    photograph = skimage.data.retina()
    repeats = (-(-height // photograph.shape[0]), -(-width // photograph.shape[1]), 1)
    return np.ascontiguousarray(np.tile(photograph, repeats)[:height, :width])


if __name__ == "__main__":
    run_script(main)

"""Measure what upscaling a large picture takes: in one piece, in strips, and in tiles; each in a process of its own:

python scripts/memory.py --width 1920 --height 1080                     # one piece takes 16 GiB: leave it out with --modes strips tiles
python scripts/memory.py --width 640 --height 360 --model_path results/rcan_x4/best.pth.tar

The picture is one of scikit-image's photographs. Memory is that of the whole process, Python and PyTorch included (on a GPU, what is
allocated there), seconds those of the first picture after a small one.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import skimage.data
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import imgproc
import utils
import weights
from config import released_weights
from runtime import run_script, start_runtime
from upscaling import upscale


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    model_path: str = ""  # weights; empty: the light network of this repository at x4
    width: int = 640  # of the picture to upscale, pixels
    height: int = 360  # of the picture to upscale, pixels
    tile: int = 256  # side of the tiles, pixels
    modes: tuple[Literal["whole", "strips", "tiles"], ...] = ("whole", "strips", "tiles")  # what to measure
    worker: str = ""  # for the processes that this script starts: where to leave the picture


def main(argv: Sequence[str] | None = None) -> None:
    """Print a Markdown table."""
    config = tyro.cli(MemoryConfig, args=argv, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    if config.worker:
        print(json.dumps(measure(config)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {mode: _measure_apart(config, mode, Path(folder) / f"{mode}.npy") for mode in config.modes}
        pictures = {mode: np.load(Path(folder) / f"{mode}.npy", mmap_mode="r") for mode in config.modes}
        whole = pictures.get("whole", next(iter(pictures.values())))
        rows = [_row(mode, found[mode], pictures[mode], whole) for mode in config.modes]
    against = "one piece" if "whole" in config.modes else config.modes[0]
    print(f"{config.width}x{config.height}, {found[config.modes[0]]['network']}\n")
    print(f"| | seconds | peak memory, GiB | differs from {against} |\n| --- | --- | --- | --- |")
    print("\n".join(rows))


def measure(config: MemoryConfig) -> dict[str, float | str]:
    """Upscale in one mode, and leave the picture in a file."""
    (mode,) = config.modes
    runtime = start_runtime()
    network = weights.load(config.model_path or released_weights(4)).to(runtime.device)
    lr = picture(config.height, config.width)
    upscale(network, lr[:32, :32])
    utils.reset_peak_memory(runtime.device)
    start = time.perf_counter()
    sr = upscale(network, lr, strip_rows=config.height if mode == "whole" else None, tile=config.tile if mode == "tiles" else 0)
    found = {"seconds": time.perf_counter() - start, "gib": utils.peak_memory(runtime.device) or 0.0}
    np.save(config.worker, sr)
    return {**found, "network": weights.describe(network)}


def picture(height: int, width: int) -> imgproc.RGB:
    """A photograph of this size, repeated where it is too small."""
    photograph = skimage.data.retina()
    repeats = (-(-height // photograph.shape[0]), -(-width // photograph.shape[1]), 1)
    return np.ascontiguousarray(np.tile(photograph, repeats)[:height, :width])


def _measure_apart(config: MemoryConfig, mode: str, file: Path) -> dict[str, float | str]:
    settings = {**asdict(config), "modes": mode, "worker": file}
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{mode}: ended with code {done.returncode} (-9: out of memory): {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _row(mode: str, found: dict[str, float | str], sr: imgproc.RGB, whole: imgproc.RGB) -> str:
    off, far = 0, 0
    for top in range(0, sr.shape[0], 256):  # a difference of whole pictures would take more memory than they
        difference = np.abs(sr[top : top + 256].astype(np.int16) - whole[top : top + 256])
        off, far = off + np.count_nonzero(difference), max(far, int(difference.max()))
    texts = (
        "nowhere" if not off else f"in {off / sr.size:.2%} of the values, by up to {far}; PSNR {imgproc.psnr(sr, whole, 0, False):.2f} dB"
    )
    return f"| {mode} | {found['seconds']:.1f} | {found['gib']:.2f} | {texts} |"


if __name__ == "__main__":
    run_script(main)

"""Running: how scripts end, devices and processes, seeds, averaged weights, evaluation, and the run log."""

import contextlib
import copy
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from tqdm import tqdm

import files
import imgproc
from runtime import REPOSITORY, Runtime, StopRequest


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch; batches don't depend on it, as they are a function of (seed, update)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(wanted: str, device: torch.device) -> str:
    """fp32, bf16 or fp16; for "auto", bf16 where the device computes it faster than fp32, else fp32."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    cpu = Path("/proc/cpuinfo")  # elsewhere than on Linux nothing says it, and fp32 is safe
    flags = cpu.read_text(encoding="utf-8", errors="replace") if cpu.is_file() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


# Averaged weights


class EMA:
    """Exponential moving average of a network's weights: average * decay + new * (1 - decay).

    The decay rises from 2/11 with (1 + update) / (10 + update), so that the first random weights are soon forgotten.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, update: int, skipped: Tensor | None = None) -> None:
        """Take in the weights after the update number `update`, counted from 1; buffers are copied.

        Args:
            skipped: 1 for an update that was left out, which changes nothing; on the network's device, which is not waited for.
        """
        share = torch.full((), 1 - min(self.decay, (1 + update) / (10 + update)), device=next(network.parameters()).device)
        if skipped is not None:
            share = share * (1 - skipped)
        averages, news = list(self.network.parameters()), list(network.parameters())
        torch._foreach_mul_(averages, 1 - share)  # all at once; one by one, 1,600 tensors keep a GPU waiting
        torch._foreach_add_(averages, torch._foreach_mul(news, share))
        for average, new in zip(self.network.buffers(), network.buffers(), strict=True):
            average.copy_(new)


# Evaluation


Scores = dict[str, Any]  # {"psnr": dB, "ssim": 0..1, "seconds": to upscale an image, "images": {name: {"psnr": …, "ssim": …}}}


def evaluate(
    upscaler: Callable[[imgproc.RGB], imgproc.RGB],
    images: Sequence[tuple[str, imgproc.RGB, imgproc.RGB]],
    upscale_factor: int,
    runtime: Runtime,
    *,
    on_image: Callable[[str, imgproc.RGB, imgproc.RGB, imgproc.RGB], None] | None = None,
    progress: str = "",
    stop: StopRequest | None = None,
) -> Scores | None:
    """PSNR and SSIM by the papers' protocol: on uint8, MATLAB's Y, `upscale_factor` pixels off each border, mean over images.

    Args:
        upscaler: lr -> sr, uint8 (H, W, 3).
        images: `images[i]` is (name, lr, gt); each process takes every world_size-th, and all get all scores.
        on_image: called with (name, lr, sr, gt) after each image, in the process that made it.
        progress: a label for a progress bar, or none.
        stop: where it becomes true in any process, evaluating ends before the next image, and all get None.
    """
    mine = range(runtime.rank, len(images), runtime.world_size)
    scores, seconds, stopped = {}, {}, False
    for index in tqdm(mine, progress, unit="image", leave=False, disable=not (progress and runtime.is_main)):
        if stopped := bool(stop):
            break
        name, lr, gt = images[index]
        start = time.perf_counter()
        sr = upscaler(lr)
        seconds[name] = time.perf_counter() - start
        scores[name] = {
            "psnr": imgproc.psnr(sr, gt, upscale_factor),
            "ssim": imgproc.ssim(sr, gt, upscale_factor),
        }
        if on_image:
            on_image(name, lr, sr, gt)
    parts = runtime.gather((stopped, scores, seconds))
    if any(stopped for stopped, *_ in parts):
        return None
    scores = dict(sorted((name, score) for _, part, _ in parts for name, score in part.items()))
    seconds = {name: value for *_, part in parts for name, value in part.items()}
    means = {metric: float(np.mean([score[metric] for score in scores.values()])) for metric in ("psnr", "ssim")}
    return {**means, "seconds": float(np.mean(list(seconds.values()))), "images": scores}


PROTOCOL = "PSNR in dB and SSIM on Y of YCbCr, {scale} border pixels dropped, pictures as written (uint8)"


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure `peak_memory` anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak stays that of the whole process
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float | None:
    """GiB that were in use at once: allocated on a GPU, or this whole process's on a CPU; None where it can't be known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**30 if sys.platform == "darwin" else 2**20)


# Random generators


def random_states() -> dict[str, Any]:
    """The states of all random generators, as plain types."""
    version, internal, gauss = random.getstate()
    numpy_state = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Continue where `random_states` was called."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


# The run log


@cache  # so that it names the code that this process runs, also when the folder changes meanwhile
def provenance() -> dict[str, str]:
    """The command, the commit and the versions that made a result."""
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a plain str, which weights_only=True reads
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _commit() -> str:
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"


class RunLog:
    """What a run says: a progress bar, a JSON line a report in log.jsonl, and TensorBoard; only in the main process.

    Opening it at update N drops what an interrupted run has logged after N, as that is done again.
    """

    def __init__(self, folder: Path, update: int, total_updates: int, enabled: bool = True) -> None:
        self.enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "log.jsonl"
        _keep_lines_until(self._path, update)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._board = SummaryWriter(str(folder), purge_step=update + 1)
        self._bar = tqdm(total=total_updates, initial=update, unit="update", dynamic_ncols=True, smoothing=0.05)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self) -> None:
        if self.enabled:
            self._bar.update()

    def write(self, update: int, values: Mapping[str, Any], shown: str = "") -> None:
        """One report: a line in the file, numbers to TensorBoard, `shown` beside the progress bar."""
        if not self.enabled:
            return
        try:
            self._file.write(json.dumps({"update": update, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error  # a failing write doesn't say of what
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._board.add_scalar(name, value, update)
        if shown:
            self._bar.set_postfix_str(shown)

    def put_on_disk(self) -> None:
        """Make sure that what a checkpoint takes for logged outlives the machine."""
        if self.enabled:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._path)) from error

    def picture(self, update: int, name: str, image: imgproc.RGB) -> None:
        if self.enabled:
            self._board.add_image(name, image, update, dataformats="HWC")

    def say(self, text: str) -> None:
        if self.enabled:
            self._bar.write(text)

    def close(self) -> None:
        if self.enabled:
            self._bar.close()
            self._board.close()
            self._file.close()


def _keep_lines_until(path: Path, update: int) -> None:
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _logged_update(line) <= update]
        if kept != lines:
            files.write_text(path, "".join(kept))


def _logged_update(line: str) -> float:
    """The update that a line reports, or infinity for a line that was cut off."""
    try:
        return json.loads(line)["update"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf

"""Seeds, precision, EMA, the guard against bad updates, evaluation, memory and random generators: what the scripts share."""

import contextlib
import copy
import math
import random
import re
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from tqdm import tqdm

import imgproc
from imgproc import RGB
from runtime import Interrupted, Poll, Runtime, StopRequest


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch; batches are a function of (seed, update) and do not depend on these generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(wanted: str, device: torch.device) -> str:
    """fp32, bf16 or fp16; "auto" is bf16 where the device computes it faster than fp32, else fp32."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    cpu = Path("/proc/cpuinfo")  # other systems do not tell, and fp32 is safe
    flags = cpu.read_text(encoding="utf-8", errors="replace") if cpu.is_file() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


class EMA:
    """Exponential moving average of a network's weights: average · decay + new · (1 − decay).

    The decay starts at 2/11 and rises as (1 + update) / (10 + update), which soon forgets the first random weights.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, update: int, skipped: Tensor | None = None) -> None:
        """Take in the weights after update number `update`, counted from 1; buffers are copied.

        Args:
            skipped: 1 for a skipped update, which changes nothing; a tensor on the device, so nothing waits for the device.
        """
        share = torch.full((), 1.0 - min(self.decay, (1 + update) / (10 + update)), device=next(network.parameters()).device)
        if skipped is not None:
            share = share * (1 - skipped)
        for average, new in zip(self.network.parameters(), network.parameters(), strict=True):
            average.lerp_(new, share)
        for kept, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            kept.copy_(buffer)


class UpdateGuard(nn.Module):
    """Decides which updates to skip: those with a non-finite loss or gradient, or a loss `threshold` times the running mean.

    The decision is made on the device and is the same in all processes. The running mean covers about the last 100 accepted updates
    and is used once it covers 20.
    """

    KNOWN, LONG = 20, 100  # updates
    in_a_row: Tensor  # updates skipped without a break, up to now
    longest: Tensor  # such a row since the last `check`
    accepted: Tensor  # updates, up to LONG
    running_loss: Tensor

    def __init__(self, threshold: float, world_size: int) -> None:
        super().__init__()
        self.threshold = threshold
        self.world_size = world_size
        for name in ("in_a_row", "accepted", "running_loss"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("longest", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def forward(self, loss: Tensor, norms: Sequence[Tensor]) -> Tensor:
        """1 to skip the update, else 0; from its loss and the norms of its gradients, which are the same in all processes."""
        loss = loss.detach().float().clone()
        if self.world_size > 1:  # the loss can be infinite in one process while the gradient, as L1's, is finite
            torch.distributed.all_reduce(loss)
            loss /= self.world_size
        refused = ~torch.isfinite(torch.stack([*norms, loss])).all()
        if self.threshold:
            refused |= (self.accepted >= self.KNOWN) & (loss > self.threshold * self.running_loss)
            learned = self.running_loss.lerp(loss, 1 / (self.accepted + 1))
            self.running_loss = torch.where(refused, self.running_loss, learned)
            self.accepted = (self.accepted + ~refused).clamp(max=self.LONG)
        skipped = refused.float()
        self.in_a_row = (self.in_a_row + 1) * skipped
        self.longest = torch.maximum(self.longest, self.in_a_row)
        return skipped

    def check(self, max_skipped: int) -> None:
        """ValueError if so many updates in a row were skipped since the last call; a row that has not ended counts on."""
        longest, self.longest = int(self.longest), self.in_a_row.clone()
        if longest >= max_skipped:
            raise ValueError(
                f"{longest} updates in a row were skipped, as their loss or gradient was not finite or far too large: the last checkpoint "
                "is sound; start again from it with pretrained_model_path, another exp_name, and a lower learning_rate or precision='fp32'"
            )


# Evaluation


class EvaluationImages(Protocol):
    """`images[i]` is (name, lr, gt), uint8 (H, W, 3); a list of such tuples, or a `dataset.EvaluationSet`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[str, RGB, RGB]: ...


# {"psnr": dB, "ssim": 0..1, "seconds": to upscale an image, "images": {name: {"psnr": …, "ssim": …}}, "not_in_psnr": {name: why}}
Scores = dict[str, Any]


def evaluate(
    upscaler: Callable[[RGB], RGB],
    images: EvaluationImages,
    upscale_factor: int,
    runtime: Runtime,
    *,
    on_image: Callable[[str, RGB, RGB, RGB], None] | None = None,
    progress: str = "",
    stop: StopRequest | None = None,
) -> Scores | None:
    """PSNR and SSIM by the papers' protocol: on uint8, MATLAB's Y, `upscale_factor` pixels off each border, mean over images.

    The mean PSNR leaves out images whose PSNR says nothing: those that are flat in GT, and those equal to GT, whose PSNR is infinite.
    "not_in_psnr" names them. Where none is left, the mean is infinite. SSIM counts all.

    Args:
        upscaler: lr -> sr, uint8 (H, W, 3).
        images: each process scores every world_size-th image, and all processes get all scores.
        on_image: called with (name, lr, sr, gt) after each image, in the process that made it.
        progress: the label of a progress bar; empty: none.
        stop: once it is true in any process, the evaluation ends before the next image, and all processes get None.
    """
    rounds = range(-(-len(images) // runtime.world_size))  # in each, every process has an image, but for the last round
    scores: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    flat: dict[str, str] = {}
    interrupting, poll = stop.interrupting if stop is not None else contextlib.nullcontext, Poll(runtime)
    for number in tqdm(rounds, progress, unit="image", leave=False, disable=not (progress and runtime.is_main)):
        if any(poll(bool(stop))):
            break
        index = number * runtime.world_size + runtime.rank
        with contextlib.suppress(Interrupted):  # the next poll tells the others
            if index < len(images):
                name, lr, gt = images[index]
                with interrupting():
                    start = time.perf_counter()
                    sr = upscaler(lr)
                    seconds[name] = time.perf_counter() - start
                scores[name] = {
                    "psnr": imgproc.psnr(sr, gt, upscale_factor),
                    "ssim": imgproc.ssim(sr, gt, upscale_factor),
                }
                if imgproc.is_flat(gt, upscale_factor):
                    flat[name] = "GT is flat"
                if on_image:
                    on_image(name, lr, sr, gt)
    poll.finish()
    parts = runtime.gather((scores, seconds, flat))
    scores, seconds, flat = ({name: value for part in kind for name, value in part.items()} for kind in zip(*parts, strict=True))
    if len(scores) < len(images):
        return None
    scores = dict(sorted(scores.items()))
    equal = {name: "equal to GT" for name, score in scores.items() if score["psnr"] == math.inf}
    uncounted = {name: {**equal, **flat}[name] for name in scores if name in equal or name in flat}
    counted = [score["psnr"] for name, score in scores.items() if name not in uncounted]
    return {
        "psnr": float(np.mean(counted)) if counted else math.inf,
        "ssim": float(np.mean([score["ssim"] for score in scores.values()])),
        "seconds": float(np.mean(list(seconds.values()))),
        "images": scores,
        **({"not_in_psnr": uncounted} if uncounted else {}),
    }


PROTOCOL = "PSNR in dB and SSIM on Y of YCbCr, {scale} border pixels dropped, images as written (uint8)"


def reset_peak_memory(device: torch.device) -> None:
    """Restart the measurement of `peak_memory`, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float | None:
    """GiB in use at once: allocated on a GPU, or by this whole process on a CPU; None if the system does not tell."""
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
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
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


def checksum(networks: Sequence[nn.Module]) -> str:
    """Of all their tensors, to compare between processes."""
    crc = 0
    for tensor in (tensor for network in networks for tensor in network.state_dict().values()):
        crc = zlib.crc32(tensor.cpu().contiguous().numpy().tobytes(), crc)
    return f"{crc:08x}"

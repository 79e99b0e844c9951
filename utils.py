"""Running: how scripts end, devices and processes, seeds, averaged weights, evaluation, and the run log."""

import contextlib
import copy
import json
import math
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

import files
import imgproc

REPOSITORY = Path(__file__).resolve().parent


# Entry points


STOPPED = 75  # exit code of a training that was asked to stop, and has saved itself ("try again", in sysexits.h)


def run(main: Callable[[], None]) -> None:
    """Call a script's main. A mistake of the user's ends in one sentence and exit code 1, one of ours in a traceback.

    With `--debug` on the command line, every mistake shows its traceback. SIGTERM and SIGUSR1 end a script as Ctrl-C does, so that
    nothing is left half-written; a training takes them for a request to save itself, by `StopRequest`.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a file's name may hold what can't be printed
    debug = "--debug" in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        with _signals(_terminate, "SIGTERM", "SIGUSR1"):
            _call_together(main)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        sentence = None if debug else _sentence(error)
        if sentence is None:
            raise
        print(f"error{_who()}: {sentence}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _call_together(main: Callable[[], None]) -> None:
    """Call main, and part from the other processes; NCCL, after a mistake of one, could keep it waiting for them."""
    alike = False
    try:
        main()
        alike = True
    except SystemExit as end:
        alike = end.code == STOPPED
        raise
    finally:
        started = torch.distributed.is_available() and torch.distributed.is_initialized()
        if started and (alike or torch.distributed.get_backend() == "gloo"):
            torch.distributed.destroy_process_group()


def _sentence(error: Exception) -> str | None:
    """What to tell the user, or None for a mistake of ours."""
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(innermost.filename).resolve().parent in (REPOSITORY, REPOSITORY / "scripts")
    if isinstance(error, OSError):
        return files.explain(error)
    if isinstance(error, ValueError) and ours and (innermost.line or "").startswith("raise "):
        return str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        what = str(error).split(". ")[0] or "out of memory"
        return f"{what}: {_LESS}"
    return next((sentence for part, sentence in _KNOWN.items() if isinstance(error, RuntimeError) and part in str(error)), None)


_PEER = "another process of this run has ended, its own message says why: the same command goes on from the last checkpoint"
_LESS = "in training, lower batch_size or lr_patch_size, raise accumulation_steps, or set activation_checkpointing=True"
_KNOWN = {  # parts of what PyTorch says where the mistake is not ours
    "can't allocate memory": f"there is too little memory: {_LESS}",
    "DataLoader worker (pid": "a process that cuts batches has ended, or was ended, as for lack of memory: "
    "lower num_workers; the same command goes on from the last checkpoint",
    "Connection closed by peer": _PEER,
    "Connection reset by peer": _PEER,
    "Broken pipe": _PEER,
}


def _who() -> str:
    return f" (process {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""


def _terminate(number: int, _frame: object) -> None:
    sys.exit(128 + number)


@contextlib.contextmanager
def _signals(handler: Callable[[int, Any], None], *names: str) -> Iterator[None]:
    """Signals by name go to a handler; in the main thread and where they exist."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before: dict[int, Any] = {}
    try:
        with contextlib.suppress(ValueError):  # not the main thread
            before = {number: signal.signal(number, handler) for number in numbers}
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class StopRequest:
    """Becomes true at Ctrl-C, SIGTERM or SIGUSR1, so that a run can save itself; another one ends it at once.

    What comes within a second of the first is taken for the same request, as torchrun and terminals tell a process twice.
    Signals reach the main thread only; elsewhere, as under a test runner's threads, it stays false.
    """

    SAME = 1.0  # seconds

    def __init__(self) -> None:
        self.requested: float | None = None

    def __enter__(self) -> "StopRequest":
        self._handling = contextlib.ExitStack()
        self._handling.enter_context(_signals(self._request, "SIGINT", "SIGTERM", "SIGUSR1"))
        return self

    def __exit__(self, *_: object) -> None:
        self._handling.close()

    def __bool__(self) -> bool:
        return self.requested is not None

    def _request(self, _number: int, _frame: object) -> None:
        if self.requested is None:
            self.requested = time.monotonic()
        elif time.monotonic() - self.requested > self.SAME:
            raise KeyboardInterrupt


# Devices and processes

Found = TypeVar("Found")


@dataclass(frozen=True)
class Runtime:
    """Where this process runs, and which of how many it is; `control` is the group for what goes between CPUs."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    control: Any = None
    local_rank: int = 0  # on this machine

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait_for_all(self) -> None:
        if self.world_size > 1:
            waiting = torch.distributed.barrier(self.control, async_op=True)
            while not waiting.is_completed():  # looking again and again, as a signal reaches Python alone
                time.sleep(0.005)
            waiting.wait()  # which says what went wrong

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, in all of them."""
        values = [value] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(values, value, self.control)
        return values

    def in_turns(self, find: Callable[[], Found]) -> Found:
        """Call `find` in the main process, then in the first of each machine, then in the others, which find what those have made."""
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        found = None
        for now in range(3):
            if now == turn:
                found = find()
            self.wait_for_all()
        return found


class Poll:
    """Asks all processes yes-or-no questions at every update, without waiting: the answers are those of the update before.

    With one process, the answers are its own, at once.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._asked: tuple[Any, Tensor] | None = None

    def __call__(self, *answers: bool) -> list[bool]:
        """For each question, whether any process said yes."""
        if self.runtime.world_size == 1:
            return list(answers)
        heard = self.finish() or [False] * len(answers)
        votes = torch.tensor(answers, dtype=torch.int32)
        self._asked = torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX, self.runtime.control, async_op=True), votes
        return heard

    def finish(self) -> list[bool]:
        """Hear what was asked last."""
        if self._asked is None:
            return []
        work, votes = self._asked
        work.wait()
        self._asked = None
        return [bool(vote) for vote in votes]


def start_runtime() -> Runtime:
    """The device and process group of this process: torchrun's environment decides, else the first GPU, else the CPU."""
    local_rank, rank, world_size = (int(os.environ.get(name, alone)) for name, alone in (("LOCAL_RANK", 0), ("RANK", 0), ("WORLD_SIZE", 1)))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True  # so that a resumed run replays
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; who wants it fast takes bf16
    else:
        device = torch.device("cpu")
    control = None
    if world_size > 1:
        if not torch.distributed.is_initialized():
            fast = device.type == "cuda" and torch.distributed.is_nccl_available()
            place = {"store": _fresh_store(rank, world_size), "rank": rank, "world_size": world_size}
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if fast else "gloo", timeout=_TIMEOUT, **place)
        patience = timedelta(hours=2)  # others wait while the main process decodes the training images
        control = torch.distributed.new_group(backend="gloo", timeout=patience)
    return Runtime(device, rank, world_size, control, local_rank)


_TIMEOUT = timedelta(minutes=10)  # for what goes between processes at every update


def _fresh_store(rank: int, world_size: int) -> torch.distributed.Store:
    """Where the processes find each other, without what an earlier start has left.

    torchrun's own store lives on when it starts all processes again; the address of one that is gone would then, by chance, be
    taken for that of its successor. So the first process gives this start a name, and the others make sure that it has heard them.
    """
    store, _, _ = next(iter(rendezvous("env://", timeout=_TIMEOUT)))
    own, late = uuid.uuid4().hex, time.monotonic() + _TIMEOUT.total_seconds()
    if rank == 0:
        store.set("start", own)
        for other in range(1, world_size):
            store.set(f"{own}/heard/{store.get(f'{own}/here/{other}').decode()}", "")
        return torch.distributed.PrefixStore(own, store)
    while True:
        start = store.get("start").decode()
        store.set(f"{start}/here/{rank}", own)
        try:
            store.wait([f"{start}/heard/{own}"], timedelta(seconds=2))
            return torch.distributed.PrefixStore(start, store)
        except torch.distributed.DistStoreError:  # the name of an earlier start, or the first process is slow
            if time.monotonic() > late:
                raise


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
    upscaler: Callable[[imgproc.Picture], imgproc.Picture],
    images: Sequence[tuple[str, imgproc.Picture, imgproc.Picture]],
    upscale_factor: int,
    runtime: Runtime,
    *,
    on_image: Callable[[str, imgproc.Picture, imgproc.Picture, imgproc.Picture], None] | None = None,
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

    def picture(self, update: int, name: str, image: imgproc.Picture) -> None:
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

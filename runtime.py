"""How scripts start and end: errors in a sentence, signals, devices, the process group, agreement between ranks."""

import contextlib
import errno
import importlib.util
import inspect
import os
import shutil
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

import files

REPOSITORY = Path(__file__).resolve().parent


STOPPED = 75  # exit code of a training that was asked to stop and has saved itself ("try again" in sysexits.h)


# Entry points


def run_script(main: Callable[[], None]) -> None:
    """Call a script's main. A mistake of the user prints one sentence and exits with 1; a mistake of ours shows a traceback.

    `--debug` on the command line shows the traceback of every mistake. SIGTERM, SIGHUP (a closed terminal) and SIGUSR1 end a script as
    Ctrl-C does, and nothing is left half-written; a training saves itself first (`StopRequest`).
    """
    streams = sys.stdout, sys.stderr
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # some file names cannot be printed
    outputs = _Lasting(sys.stdout), _Lasting(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, outputs[0]), cast(TextIO, outputs[1])
    debug = "--debug" in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != "--debug"]

    def terminate(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    together = False  # whether all processes end for the same reason
    try:
        with _signals(terminate, "SIGTERM", "SIGHUP", "SIGUSR1"):
            main()
            sys.stdout.flush()
            lost = outputs[0].error
            if lost and lost.errno not in (errno.EPIPE, errno.EIO):  # nobody misses what `head` or a closed terminal did not take
                raise OSError(lost.errno, lost.strerror, "standard output")
        together = True
    except SystemExit as end:
        together = end.code == STOPPED
        raise
    except (ValueError, OSError, RuntimeError, MemoryError, EOFError) as error:
        sentence = None if debug else _sentence(error)
        if sentence is None:
            raise
        who = f" (process {os.environ['RANK']})" if (os.environ.get("RANK") or "0") != "0" else ""
        print(f"error{who}: {sentence}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    finally:
        for output in outputs:
            output.flush()
        sys.stdout, sys.stderr = streams
        started = torch.distributed.is_available() and torch.distributed.is_initialized()
        if started and (together or torch.distributed.get_backend() == "gloo"):  # NCCL would wait for processes that go on
            torch.distributed.destroy_process_group()


class _Lasting:
    """A standard stream that drops what can't be written, as the work goes on when its reader, terminal or disk is gone."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (None: closed before the start)
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, write: Callable[..., object], *text: str) -> None:
        if self.error:
            return
        try:
            write(*text)
        except OSError as error:
            self.error = error
            with contextlib.suppress(OSError):  # the rest of its buffer goes nowhere when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _sentence(error: Exception) -> str | None:
    """The sentence for the user, or None for a mistake of ours."""
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(innermost.filename).resolve().parent in (REPOSITORY, REPOSITORY / "scripts")
    reset = isinstance(error, ConnectionResetError) and error.errno  # the system, about the pipe to a data worker
    if reset or (isinstance(error, EOFError) and "multiprocessing" in innermost.filename):
        return _WORKER
    if isinstance(error, OSError):
        return files.explain(error)
    if isinstance(error, ValueError) and ours and (innermost.line or "").startswith("raise "):
        return str(error)
    if is_out_of_memory(error):
        what = str(error).split(". ")[0].splitlines()[0] if str(error) else "out of memory"
        return f"{what}: {_LESS}"
    return next((sentence for part, sentence in _KNOWN.items() if isinstance(error, RuntimeError) and part in str(error)), None)


STUCK = (
    "this process was asked to stop while it waited for its data, and the others wait for it, so nothing is saved now; run the same "
    "command again to resume from the last checkpoint"
)
_PEER = "another process of this run has ended and says why itself; run the same command again to resume from the last checkpoint"
_LESS = "in training, lower batch_size or lr_patch_size, raise accumulation_steps, or set activation_checkpointing=True"
_WORKER = (
    "a worker process that cuts batches has ended, perhaps for lack of memory: lower num_workers, and run the same command again to "
    "resume from the last checkpoint"
)
_COMPILER = "torch.compile needs a compiler (g++ or clang++; Triton with a GPU), and none works here: install one, or set compile=False"
_KNOWN = {  # parts of PyTorch's messages about mistakes that are not ours
    STUCK: STUCK,
    "no kernel image is available": "this PyTorch isn't built for this GPU: install one that is, or set CUDA_VISIBLE_DEVICES= for the CPU",
    "No working C++ compiler found": _COMPILER,
    "InvalidCxxCompiler": _COMPILER,
    "Failed to find C compiler": _COMPILER,
    "Cannot find a working triton": _COMPILER,
    "NCCL error": f"the connection between GPUs failed (NCCL_DEBUG=INFO shows why); {_PEER}",
    "DataLoader worker (pid": _WORKER,
    "Connection closed by peer": _PEER,
    "Connection reset by peer": _PEER,
    "Broken pipe": _PEER,
}


# Parts of what the CPU's allocator, CUDA, cuBLAS and cuDNN say; cuDNN's plans that lack memory fail with the last two
_NO_MEMORY = ("allocate memory", "out of memory", "alloc_failed", "device_allocation_failed", "unable to find an engine")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of the CPU or the GPU is too small."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in _NO_MEMORY)


@contextlib.contextmanager
def _signals(handler: Callable[[int, Any], None], *names: str) -> Iterator[None]:
    """Send signals, by name, to a handler; in the main thread only, and only those that the system has, but SIGHUP not under nohup."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    numbers = [each for each in numbers if not (each == getattr(signal, "SIGHUP", None) and signal.getsignal(each) is signal.SIG_IGN)]
    before: dict[int, Any] = {}
    try:
        with contextlib.suppress(ValueError):  # not the main thread
            before = {number: signal.signal(number, handler) for number in numbers}
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Interrupted(BaseException):
    """A stop request has ended work whose result is not needed; no Exception, as libraries catch those."""


class StopRequest:
    """Becomes true at Ctrl-C, SIGTERM, SIGHUP or SIGUSR1; the run then saves itself. Another signal ends it at once.

    Signals within a second of the first count as the same request, since torchrun and terminals send them twice. Python delivers
    signals to the main thread only; in other threads the request stays false.
    """

    SAME = 1.0  # seconds

    def __init__(self) -> None:
        self.requested: float | None = None
        self._interrupts = False

    def __enter__(self) -> "StopRequest":
        self._handling = contextlib.ExitStack()
        self._handling.enter_context(_signals(self._request, "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"))
        return self

    def __exit__(self, *_: object) -> None:
        self._handling.close()

    def __bool__(self) -> bool:
        return self.requested is not None

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Work that may be dropped: a request made before or during it raises `Interrupted`."""
        self._interrupts = True
        try:
            if self:
                raise Interrupted
            yield
        finally:
            self._interrupts = False

    def _request(self, _number: int, _frame: object) -> None:
        if self.requested is None:
            self.requested = time.monotonic()
            if self._interrupts:
                raise Interrupted
        elif time.monotonic() - self.requested > self.SAME:
            raise KeyboardInterrupt


# Devices and processes

Found = TypeVar("Found")


@dataclass(frozen=True)
class Runtime:
    """Where this process runs, and which of how many it is; `control` is the process group for messages between CPUs."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    control: Any = None
    local_rank: int = 0  # on this machine
    local_world_size: int = 1  # processes on this machine

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print in the main process."""
        if self.is_main:
            print(text)

    def wait_for_all(self) -> None:
        if self.world_size > 1:
            _finish(torch.distributed.barrier(self.control, async_op=True))

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, in all of them."""
        values = [value] * self.world_size
        if self.world_size > 1:
            self.wait_for_all()  # which signals can end, unlike the next line, which then doesn't wait
            torch.distributed.all_gather_object(values, value, self.control)
        return values

    def in_turns(self, find: Callable[[], Found]) -> Found:
        """Call `find` in the main process, then in the first of each machine, then in the others, which find what the first ones made."""
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        found: list[Found] = []
        for now in range(3):
            if now == turn:
                found.append(find())
            self.wait_for_all()
        return found[0]

    def check_agreement(self, own: Mapping[str, Any]) -> None:
        """Refuse to start unless all processes are about to do the same: equal values by equal names.

        Raises:
            ValueError: one has other settings, images or weights, as when machines do not share their disks.
        """
        for rank, other in enumerate(self.gather(dict(own))):
            differing = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
            if differing:
                differences = "; ".join(f"{name} is {other.get(name)!r} and {own.get(name)!r}" for name in differing)
                raise ValueError(
                    f"processes {rank} and {self.rank} would train differently ({differences}): give all machines the same settings "
                    "and images, and a results_dir on a disk that they share"
                )


def parallel(network: nn.Module, runtime: Runtime) -> nn.Module:
    """The network, or its DDP wrapper, which averages gradients over all processes."""
    if runtime.world_size == 1:
        return network
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its name before PyTorch 2.15
    options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True}  # buffers are constants; gradients need no second copy
    return DistributedDataParallel(network, [runtime.device] if runtime.device.type == "cuda" else None, **options)


def synchronised(network: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Processes exchange gradients in the last part of an update only."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) and not last else contextlib.nullcontext()


def _finish(work: Any) -> None:
    """Wait for the other processes; polled, as no signal could end a blocking wait."""
    while not work.is_completed():
        time.sleep(0.001)
    work.wait()  # raises what went wrong


class Poll:
    """Asks all processes yes-or-no questions at every update without waiting: the answers are those of the update before.

    A single process gets its own answers at once.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._asked: tuple[Any, Tensor] | None = None

    def __call__(self, *answers: bool) -> list[bool]:
        """For each question, whether any process answered yes."""
        if self.runtime.world_size == 1:
            return list(answers)
        heard = self.finish() or [False] * len(answers)
        votes = torch.tensor(answers, dtype=torch.int32)
        self._asked = torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX, self.runtime.control, async_op=True), votes
        return heard

    def finish(self) -> list[bool]:
        """The answers to the last questions."""
        if self._asked is None:
            return []
        work, votes = self._asked
        _finish(work)
        self._asked = None
        return [bool(vote) for vote in votes]


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_runtime(alone: bool = False) -> Runtime:
    """The device and process group of this process: torchrun's environment decides, else the first GPU, else the CPU.

    Args:
        alone: the script works in one process only.

    Raises:
        ValueError: torchrun's environment is incomplete, or the GPU can't be used.
    """
    if alone and os.environ.get("WORLD_SIZE", "1") != "1":
        what = f"WORLD_SIZE={os.environ['WORLD_SIZE']}"
        raise ValueError(f"{what}, but this script works in one process: start it without torchrun, or unset WORLD_SIZE and RANK")
    rank, world_size, local_rank, local_world_size = _read_environment()
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True  # a resumed run replays bit for bit
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32; bf16 is there for speed
        try_device(device)
    else:
        device = torch.device("cpu")
        if rank == 0 and (unused := unused_gpu()):
            print(f"warning: {unused}", file=sys.stderr)
    control = None
    if world_size > 1:
        if not torch.distributed.is_initialized():
            cards = torch.cuda.device_count()  # NCCL refuses two processes on one card
            fast = torch.distributed.is_nccl_available() and local_world_size <= cards
            torch.distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if fast else "gloo",
                store=_fresh_store(rank, world_size),
                rank=rank,
                world_size=world_size,
                timeout=_TIMEOUT,
            )
        longest = timedelta(hours=2)  # the others wait while the main process decodes the training images
        control = torch.distributed.new_group(backend="gloo", timeout=longest)
    return Runtime(device, rank, world_size, control, local_rank, local_world_size)


def _read_environment() -> tuple[int, int, int, int]:
    """Rank, number of processes, and both on this machine, as torchrun sets them; alone where it sets none."""
    values = dict[str, int]()
    for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", None)):
        text = os.environ.get(name)
        if text is not None and not text.isdecimal():
            raise ValueError(f"the environment variable {name}={text!r} must be a number: unset it, or start with torchrun, which sets it")
        values[name] = int(text) if text is not None else values["WORLD_SIZE"] if alone is None else alone
    rank, world_size = values["RANK"], values["WORLD_SIZE"]
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if world_size > 1 and name not in os.environ]
    if missing or rank >= world_size:
        what = f"{', '.join(missing)} missing" if missing else f"RANK={rank}"
        raise ValueError(f"WORLD_SIZE={world_size} with {what} is not a start by torchrun: use torchrun, or unset WORLD_SIZE and RANK")
    return rank, world_size, values["LOCAL_RANK"], values["LOCAL_WORLD_SIZE"]


def try_device(device: torch.device) -> None:
    """Run a small convolution, as a GPU that this PyTorch isn't built for is reported as available.

    Raises:
        ValueError: it fails.
    """
    try:
        nn.functional.conv2d(torch.ones(1, 3, 8, 8, device=device), torch.ones(4, 3, 3, 3, device=device)).sum().item()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{device}: can't be used by this PyTorch {torch.__version__} ({reason}): install one that is built for it "
            "(pytorch.org has the commands), free its memory, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        ) from None


def unused_gpu() -> str:
    """A sentence on a GPU that PyTorch doesn't use, or an empty one."""
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ""
    if shutil.which("nvidia-smi"):
        built = "was built without CUDA" if torch.version.cuda is None else f"needs a driver for CUDA {torch.version.cuda}"
        return f"there is nvidia-smi, but PyTorch {torch.__version__} {built}, so the CPU is used; pytorch.org helps to install another"
    if torch.backends.mps.is_available():
        return "Apple's GPU (MPS) is not used, as nothing here was tested on it; the CPU is used"
    return ""


def missing_compiler(device: torch.device) -> str:
    """A sentence on what torch.compile lacks here, or an empty one."""
    if device.type == "cuda":
        found = importlib.util.find_spec("triton") and any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang")))
    else:
        found = any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")))
    return "" if found else f"compile=True: {_COMPILER}"


_TIMEOUT = timedelta(minutes=10)  # of messages between processes at every update


def _fresh_store(rank: int, world_size: int) -> torch.distributed.Store:
    """The store through which the processes of this start find each other, free of an earlier start's entries.

    torchrun's store survives when torchrun restarts all processes, and a process could mistake the old address of a dead peer for
    that of its successor. So rank 0 gives each start a name, and the others make sure that rank 0 has heard them under that name.
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
        except torch.distributed.DistStoreError:  # the name of an earlier start, or rank 0 is slow
            if time.monotonic() > late:
                raise

"""How scripts start and end: errors in a sentence, signals, devices, the process group, agreement between ranks."""

import contextlib
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

import files

REPOSITORY = Path(__file__).resolve().parent


# Entry points


STOPPED = 75  # exit code of a training that was asked to stop, and has saved itself ("try again", in sysexits.h)


def run_script(main: Callable[[], None]) -> None:
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


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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

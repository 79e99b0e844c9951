"""Kill trainings at random moments, start them again, and compare them with trainings that nobody killed:

python scripts/torture.py --kills 20                              # L1 and composite, 0 and 2 workers: about 5 minutes on two cores
python scripts/torture.py --kills 3 --trainings l1 --workers 2 --updates 60

A victim is a real training on scikit-image's photographs, fp32 on the CPU. SIGKILL hits it while it computes, saves, evaluates or
starts, but not its workers, which must notice by themselves; the same command then starts it again at once, until it is finished.
Every tensor of its checkpoints and every number of its log must equal those of the straight run bit for bit, across steps of the
learning rate and evaluations. Exit code 1: something differs. The runs stay in <output>/<number>, the newest verdict in
<output>/verdict.md.
"""

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from reports import provenance

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import weights
from runtime import run_script
from utils import REPOSITORY

Kind = Literal["l1", "composite"]
MOMENTS = ("loop", "save", "evaluation", "start")  # at which a kill is aimed
ORPHANS_MAY_LIVE = 10.0  # seconds; PyTorch's workers look every 5 s whether their training is still there
POLL = 0.0005  # seconds; a temporary file lives for a few thousandths


@dataclass(frozen=True, kw_only=True)
class TortureConfig:
    kills: int = 20  # over all victims together, shared evenly
    updates: int = 120  # of each run
    trainings: tuple[Kind, ...] = ("l1", "composite")  # the kinds of training to kill
    workers: tuple[int, ...] = (0, 2)  # numbers of data workers to try with each kind
    output: str = "results/torture"  # the folder for pictures, runs and verdicts; nothing in it is deleted
    seed: int = 0  # of the random moments
    threads: int = 1  # that PyTorch computes with
    timeout: float = 10.0  # minutes that one sitting of a training may last

    def __post_init__(self) -> None:
        for name, least in (("kills", 1), ("updates", 12), ("threads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.timeout <= 0:
            raise ValueError(f"timeout={self.timeout} must be more than 0, in minutes")
        for name in ("trainings", "workers"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={values} must name at least one, and each once")
        if min(self.workers) < 0:
            raise ValueError(f"workers={self.workers} must be at least 0 each")

    @property
    def eval_every(self) -> int:
        """Updates between evaluations; the last comes after the last update."""
        return max(3, self.updates // 6)

    @property
    def save_every(self) -> int:
        """Updates between checkpoints; no divisor of `eval_every`, so that the two meet and miss each other."""
        return next(every for every in itertools.count(max(2, self.updates // 15)) if self.eval_every % every)

    @property
    def expected(self) -> list[tuple[int, str]]:
        """What a log must hold, in this order: the update and "report" or "evaluation"."""
        lines = [(update, kind) for update in range(1, self.updates + 1) for kind in ("report", "evaluation")]
        return [(update, kind) for update, kind in lines if kind == "report" or self.is_evaluated(update)]

    def is_evaluated(self, update: int) -> bool:
        return update % self.eval_every == 0 or update == self.updates


# What both kinds are trained with, and by which script and with what else each of them
COMMON: dict[str, Any] = {
    "upscale_factor": 2, "channels": 16, "reduction": 4, "num_rg": 2, "num_rcab": 2, "train_sets": "DemoTrain", "valid_sets": "DemoTest",
    "small_images": "skip", "lr_patch_size": 16, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32", "log_every": 1,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "l1": ("train.py", {"model_arch_name": "rcan_light_x2"}),
    "composite": (
        "train_improved.py",
        {
            "model_arch_name": "rcan_light_cbam_x2", "use_composite_loss": True, "vgg19_weights_path": "random",
            "perceptual_layers": "conv2_2", "perceptual_weight": 0.006, "adversarial_weight": 0.001, "discriminator_channels": 8,
            "best_metric": "newest",
        },
    ),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Print and write the verdict; exit code 1 if anything differs."""
    config = tyro.cli(TortureConfig, args=argv, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    if os.name != "posix":
        raise ValueError("torture.py kills with SIGKILL, which this system doesn't know: run it on Linux or macOS")
    started = time.monotonic()
    results = _new_folder(Path(config.output))
    _prepare_pictures(config)
    dice = random.Random(config.seed)
    pairs = list(itertools.product(config.trainings, config.workers))
    shares = [config.kills // len(pairs) + (index < config.kills % len(pairs)) for index in range(len(pairs))]
    outcomes = [torture(config, results, *pair, kills, dice) for pair, kills in zip(pairs, shares, strict=True)]
    text = verdict(config, outcomes, (time.monotonic() - started) / 60)
    for folder in (results, Path(config.output)):
        (folder / "verdict.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    if not all(outcome.equal for outcome in outcomes):
        sys.exit(1)


def _new_folder(output: Path) -> Path:
    """The first of output/1, output/2 … that isn't there yet, made."""
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            (output / str(number)).mkdir(parents=True)
            return output / str(number)


def _prepare_pictures(config: TortureConfig) -> None:
    data = Path(config.output) / "data"
    if all((data / name / "GT").is_dir() for name in (COMMON["train_sets"], COMMON["valid_sets"])):
        return
    command = [sys.executable, str(REPOSITORY / "scripts" / "demo_data.py"), "--output", str(data)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{data}: the pictures could not be made: {done.stderr.strip()[-500:]}")


# One victim


@dataclass(frozen=True)
class Comparison:
    """How much of two runs was compared, and what differs, each by its name."""

    tensors: int = 0
    others: int = 0  # numbers, settings and texts
    lines: int = 0
    differences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kill:
    """What one SIGKILL has hit, and what it cost."""

    moment: str  # one of MOMENTS
    logged: int | None  # the newest update that the killed sitting had logged, if any
    resumed: int  # the update that the run went on from
    gone_after: float | None  # seconds until its last worker was gone; None: longer than ORPHANS_MAY_LIVE

    @property
    def done_again(self) -> int:
        """Updates that the next sitting had to repeat."""
        return 0 if self.logged is None else self.logged - self.resumed


@dataclass(frozen=True)
class Outcome:
    """Everything found about one victim."""

    kind: str
    workers: int
    planned: int  # kills
    kills: tuple[Kill, ...]
    checkpoints: Comparison
    log: Comparison
    lost: int  # updates that the log lacks in the end
    problems: tuple[str, ...] = ()  # what went wrong beside differences

    @property
    def equal(self) -> bool:
        return not (self.checkpoints.differences or self.log.differences or self.lost or self.problems)


def torture(config: TortureConfig, results: Path, kind: str, workers: int, kills: int, dice: random.Random) -> Outcome:
    """Train once straight and once with kills, and compare.

    Raises:
        ValueError: a training ended by itself with an error, or took too long.
    """
    straight, victim = (Training(config, results, kind, workers, role) for role in ("straight", "killed"))
    pace = run_straight(straight)
    print(f"{straight.name}: {config.updates} updates, {pace.start:.1f} s until the first, then {pace.update:.3f} s each", flush=True)
    killed = run_killed(victim, choose_moments(config, kills, dice), pace, dice)
    pairs = [(straight.folder / name, victim.folder / name) for name in ("last.pth.tar", "best.pth.tar")]
    return Outcome(
        kind,
        workers,
        kills,
        tuple(killed),
        add_up(compare_checkpoints(*pair) for pair in pairs),
        compare_logs(straight.log, victim.log, config.expected),
        count_lost(victim.log, config.updates),
        tuple(find_problems(killed, config.save_every)),
    )


@dataclass(frozen=True)
class Training:
    """A run: the command that starts it and goes on with it, and where it lies."""

    config: TortureConfig
    results: Path
    kind: str
    workers: int
    role: str  # straight or killed

    @property
    def name(self) -> str:
        return f"{self.kind}_workers{self.workers}_{self.role}"

    @property
    def folder(self) -> Path:
        return self.results / self.name

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def command(self) -> list[str]:
        script, own = KINDS[self.kind]
        config = self.config
        settings = {
            **COMMON, **own, "exp_name": self.name, "results_dir": self.results, "num_workers": self.workers,
            "data_root": Path(config.output) / "data", "cache_dir": self.results / f"cache_{self.role}",
            "epochs": config.updates, "steps_per_epoch": 1,  # so that any number of updates is whole epochs
            "eval_every": config.eval_every, "save_every": config.save_every,
            "warmup_updates": config.updates // 10, "halve_every": config.updates // 3,
        }  # fmt: skip
        return [sys.executable, str(REPOSITORY / script), *(f"--{part}={value}" for part, value in settings.items())]

    @property
    def environment(self) -> dict[str, str]:
        # unbuffered, as a killed process never writes what it has buffered
        own = {"OMP_NUM_THREADS": str(self.config.threads), "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        return {**os.environ, **own}


@dataclass(frozen=True)
class Pace:
    """How fast a training is here, in seconds."""

    start: float  # until the first update is logged
    update: float


def run_straight(training: Training) -> Pace:
    """Train without a kill."""
    with Sitting(training, 1) as sitting:
        sitting.wait_for(lambda: sitting.look().newest is not None)
        start = sitting.age
        sitting.finish()
        return Pace(start, (sitting.age - start) / training.config.updates)


@dataclass(frozen=True)
class Moment:
    """When to kill: at the first chance once an update is logged, or while the training starts."""

    name: str  # one of MOMENTS
    update: int


def choose_moments(config: TortureConfig, kills: int, dice: random.Random) -> list[Moment]:
    """As many of each name, in random order, each in its own part of the run."""
    names = [MOMENTS[index % len(MOMENTS)] for index in range(kills)]
    dice.shuffle(names)
    last = config.updates - 2 * config.save_every  # so that a save, missed once, comes again
    return [Moment(name, 1 + int((index + dice.random()) / kills * last)) for index, name in enumerate(names)]


def run_killed(training: Training, moments: Sequence[Moment], pace: Pace, dice: random.Random) -> list[Kill]:
    """Train with a kill at each moment, each time started again by the same command, until the run is finished."""
    sittings: list[Sitting] = []
    with contextlib.ExitStack() as stack:
        for moment in moments:
            sitting = stack.enter_context(Sitting(training, len(sittings) + 1))
            sittings.append(sitting)
            if not sitting.wait_for(_chance(sitting, moment, pace, dice)):
                break
            time.sleep(dice.uniform(0, {"loop": 3 * pace.update, "evaluation": 0.2}.get(moment.name, 0)))
            if not sitting.kill():
                break
            print(f"{training.name}: kill {len(sittings)} of {len(moments)}, {_described(sitting)}", flush=True)
        last = stack.enter_context(Sitting(training, len(sittings) + 1))  # of a finished run, it finds nothing to do
        last.finish()
        resumed = [sitting.find_resumed() for sitting in (*sittings, last)]
        return [
            Kill(sitting.hit, sitting.newest, next(found for found in resumed[number:] if found is not None), sitting.gone_after())
            for number, sitting in enumerate(sittings, start=1)
            if sitting.killed_at is not None
        ]


def _chance(sitting: "Sitting", moment: Moment, pace: Pace, dice: random.Random) -> Callable[[], bool]:
    """Whether the moment has come."""
    if moment.name == "start":
        delay = dice.uniform(0, pace.start)
        return lambda: sitting.age > delay
    now = {"loop": lambda: True, "save": sitting.is_saving, "evaluation": lambda: sitting.look().evaluating}[moment.name]
    return lambda: (sitting.look().newest or 0) >= moment.update and now()


def _described(sitting: "Sitting") -> str:
    logged = "no update logged by this sitting" if sitting.newest is None else f"update {sitting.newest} logged"
    return f"during {sitting.hit}, {sitting.age:.1f} s after its start, {logged}"


# A process


@dataclass(frozen=True)
class Seen:
    """What the log says of the present sitting."""

    newest: int | None = None  # update that it has logged
    evaluating: bool = False


class Sitting:
    """One process of a training, from its start to its end.

    What it says goes to a file, through a pipe that ends when the last process that holds it has ended: this is how workers that
    outlive their training are found.

    Args:
        number: of the sitting, from 1; names the file.
    """

    def __init__(self, training: Training, number: int) -> None:
        self.training = training
        self.said = training.results / "said" / f"{training.name}_{number:02d}.txt"
        self.said.parent.mkdir(exist_ok=True)
        self.killed_at: float | None = None
        self.hit: str | None = None  # which of MOMENTS the kill has hit
        self.newest: int | None = None  # update that this sitting had logged when it was killed
        self._log_before = _text(training.log)
        self._parts_before = self._parts()
        self._signature: tuple[int, int] | None = None
        self._seen = Seen()
        self._silent_at: float | None = None
        self._has_logged = False  # by its end

    def __enter__(self) -> "Sitting":
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            self.training.command,
            env=self.training.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that nothing of it stays when the torture is stopped
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._listener.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._listener.join(ORPHANS_MAY_LIVE)

    def _listen(self) -> None:
        with open(self.said, "wb", buffering=0) as file, self.process.stdout as pipe:
            for chunk in iter(lambda: os.read(pipe.fileno(), 2**16), b""):
                file.write(chunk)
        self._silent_at = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since its start, or up to its kill."""
        return (self.killed_at or time.monotonic()) - self.started

    def wait_for(self, chance: Callable[[], bool]) -> bool:
        """Wait until `chance` says true; False if the training was finished before.

        Raises:
            ValueError: it ended with an error, or takes too long.
        """
        while not chance():
            if self.process.poll() is not None:
                self._check_end()
                return False
            if self.age > 60 * self.training.config.timeout:
                raise ValueError(f"{self.training.name}: not finished after {self.training.config.timeout:g} minutes: {self._last_words()}")
            time.sleep(POLL)
        return True

    def finish(self) -> None:
        """Let it come to its end; raises as `wait_for`."""
        self.wait_for(lambda: False)
        self._has_logged = self._logs()

    def kill(self) -> bool:
        """End it, but not its workers, without a chance to do anything more; False if the end came first."""
        now = time.monotonic()
        self.process.kill()
        if self.process.wait() != -signal.SIGKILL:
            self._check_end()
            return False
        self.killed_at = now
        self.newest, self.hit = self.look().newest, self._find_hit()
        self._has_logged = self._logs()
        return True

    def _check_end(self) -> None:
        if self.process.returncode:
            self._listener.join(1)  # its last words may still be on their way
            raise ValueError(f"{self.training.name}: ended by itself with code {self.process.returncode}: {self._last_words()}")

    def _last_words(self, most: int = 12) -> str:
        lines = _text(self.said).replace("\r", "\n").splitlines()
        return "\n".join([line for line in lines if line.strip()][-most:])

    def look(self) -> Seen:
        """What its log says by now."""
        try:
            status = self.training.log.stat()
        except FileNotFoundError:
            return self._seen
        signature = (status.st_mtime_ns, status.st_size)
        if signature != self._signature:
            self._signature, self._seen = signature, self._read_log()
        return self._seen

    def _logs(self) -> bool:
        """Whether the log is more than what sittings before have left."""
        return _text(self.training.log) != self._log_before

    def _read_log(self) -> Seen:
        if not self._logs():
            return Seen()
        own: list[dict[str, Any]] = []
        for line in read_log(_text(self.training.log)):
            own = [] if line.get("event") == "start" else [*own, line]
        reports = [line["update"] for line in own if _key(line)[1] == "report"]
        last = _key(own[-1]) if own else (0, "")
        return Seen(reports[-1] if reports else None, last[1] == "report" and self.training.config.is_evaluated(last[0]))

    def is_saving(self) -> bool:
        """Whether it is writing a checkpoint."""
        return bool(self._parts() - self._parts_before)

    def _parts(self) -> set[Path]:
        return set(self.training.folder.glob("*.pth.tar*part*"))

    def _find_hit(self) -> str:
        """Seen from what it has left behind."""
        seen = self.look()
        if self.is_saving():
            return "save"
        if seen.newest is None:
            return "start"
        return "evaluation" if seen.evaluating else "loop"

    def find_resumed(self) -> int | None:
        """The update that it went on from, 0 for a new run, None if it was killed before it came so far."""
        found = re.search(r"going on from .*: update (\d+)", _text(self.said))
        if found:
            return int(found[1])
        return 0 if self._has_logged else None

    def gone_after(self) -> float | None:
        """Seconds from the kill to the end of its last worker; None if one lives longer than it may."""
        self._listener.join(max(0.0, self.killed_at + ORPHANS_MAY_LIVE - time.monotonic()))
        if self._silent_at is None or self._silent_at - self.killed_at > ORPHANS_MAY_LIVE:
            return None
        return self._silent_at - self.killed_at


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


# Comparing

# What may differ in checkpoints, and the beginnings of what may differ in a line of the log
IGNORED = ("/seconds", "/provenance/command", "/config/exp_name", "/config/cache_dir")
TIMES = ("seconds", "time/", "memory/")


def compare_checkpoints(straight: Path, killed: Path) -> Comparison:
    """Every tensor bit for bit, and every other value, but for IGNORED.

    Raises:
        FileNotFoundError, ValueError: one is missing or can't be read.
    """
    one, other = (dict(_leaves(weights.read(path))) for path in (straight, killed))
    names = [name for name in dict.fromkeys([*one, *other]) if name not in IGNORED]
    differences = []
    for name in names:
        if name not in one or name not in other:
            differences.append(f"{killed.name}: {name} is missing in the {'straight' if name in other else 'killed'} run")
        elif not _same(one[name], other[name]):
            differences.append(f"{killed.name}: {name} differs{_shown(one[name], other[name])}")
    tensors = sum(isinstance(one.get(name), torch.Tensor) for name in names)
    return Comparison(tensors, len(names) - tensors, 0, tuple(differences))


def _leaves(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    members = value if isinstance(value, Mapping) else dict(enumerate(value)) if isinstance(value, list | tuple) else {}
    if not members:
        yield name, value
    for key, member in members.items():
        yield from _leaves(member, f"{name}/{key}")


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return repr(one) == repr(other)  # which tells 0.0 from -0.0 and from 0, and finds a NaN equal to itself
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _shown(one: Any, other: Any) -> str:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return ""
    return f": {other!r}, {one!r} in the straight run"


def read_log(text: str) -> list[dict[str, Any]]:
    """The lines of a log; one that is cut off or garbled becomes an event of that name."""
    return [_parsed(line) for line in text.splitlines(keepends=True)]


def _parsed(line: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(line)
        if line.endswith("\n") and isinstance(found, dict) and "update" in found:
            return found
    return {"update": 0, "event": "garbled line"}


def _key(line: Mapping[str, Any]) -> tuple[int, str]:
    return line["update"], line.get("event", "report")


def _without_starts(path: Path) -> list[dict[str, Any]]:
    """As each sitting writes one."""
    return [line for line in read_log(_text(path)) if line.get("event") != "start"]


def compare_logs(straight: Path, killed: Path, expected: Sequence[tuple[int, str]]) -> Comparison:
    """Both logs must hold exactly the expected lines, in order, and these the same values, but for TIMES."""
    one, other = _without_starts(straight), _without_starts(killed)
    differences = [*_misplaced(one, expected, "straight"), *_misplaced(other, expected, "killed")]
    first = {_key(line): line for line in one}
    compared = [(first[_key(line)], line) for line in other if _key(line) in first]
    names = [[name for name in dict.fromkeys([*a, *b]) if not name.startswith(TIMES)] for a, b in compared]
    for (a, b), shared in zip(compared, names, strict=True):
        update, event = _key(b)
        for name in shared:
            if name not in a or name not in b:
                differences.append(f"update {update}, {event}: {name} is missing in the {'straight' if name in b else 'killed'} run")
            elif not _same(a[name], b[name]):
                differences.append(f"update {update}, {event}: {name} differs{_shown(a[name], b[name])}")
    return Comparison(0, sum(map(len, names)), len(compared), tuple(differences))


def _misplaced(lines: Sequence[Mapping[str, Any]], expected: Sequence[tuple[int, str]], role: str) -> list[str]:
    """Lines that are missing, there more than once, unexpected, or out of order."""
    keys = [_key(line) for line in lines]
    counts = Counter(keys)
    found = [f"update {update}: {event} missing in the {role} run's log" for update, event in expected if not counts[update, event]]
    known = set(expected)
    for (update, event), count in counts.items():
        if (update, event) not in known:
            found.append(f"update {update}: {event} unexpected in the {role} run's log")
        elif count > 1:
            found.append(f"update {update}: {event} {count} times in the {role} run's log")
    if not found and keys != list(expected):
        before, after = next(pair for pair in itertools.pairwise(keys) if expected.index(pair[0]) > expected.index(pair[1]))
        found.append(f"update {after[0]}: {after[1]} after the {before[1]} of update {before[0]} in the {role} run's log")
    return found


def count_lost(log: Path, updates: int) -> int:
    """Updates that a log lacks."""
    return len(set(range(1, updates + 1)) - {update for update, event in map(_key, _without_starts(log)) if event == "report"})


def find_problems(kills: Sequence[Kill], save_every: int) -> list[str]:
    """Workers that lived on, and kills that cost more than the updates since a checkpoint."""
    problems = []
    for number, kill in enumerate(kills, start=1):
        if kill.gone_after is None:
            problems.append(f"kill {number}: a worker was still alive after {ORPHANS_MAY_LIVE:g} s")
        if kill.done_again > save_every:
            problems.append(f"kill {number}: {kill.done_again} updates done again, though saved every {save_every}: a checkpoint was lost")
    return problems


def add_up(comparisons: Iterable[Comparison]) -> Comparison:
    """All of them as one."""
    known = list(comparisons)
    sums = (sum(getattr(each, name) for each in known) for name in ("tensors", "others", "lines"))
    return Comparison(*sums, tuple(difference for each in known for difference in each.differences))


# The verdict


def verdict(config: TortureConfig, outcomes: Sequence[Outcome], minutes: float) -> str:
    """A table with a line for each victim, what differs, and the sum in the last line."""
    about = ", ".join(f"{name} {value}" for name, value in provenance().items() if name not in ("command", "device"))
    lines = [
        f"{config.updates} updates each, fp32 on the CPU with {config.threads} thread(s); learning rate: warm-up over "
        f"{config.updates // 10} updates, halved every {config.updates // 3}; evaluated every {config.eval_every} and at the end, saved "
        f"every {config.save_every}; seed {config.seed}; {about}; {minutes:.1f} minutes.\n",
        _table(outcomes),
        f"\nNot compared: in checkpoints {', '.join(IGNORED)}; in logs the line of each start, and {', '.join(TIMES)}….\n",
    ]
    for outcome in outcomes:
        found = [*outcome.problems, *outcome.log.differences, *outcome.checkpoints.differences]
        lines += [f"- {outcome.kind}, {outcome.workers} workers: {each}" for each in found[:_MOST]]
        lines += [f"- {outcome.kind}, {outcome.workers} workers: and {len(found) - _MOST} more"] * (len(found) > _MOST)
    return "\n".join([*lines, *[""] * (len(lines) > 3), _last_line(outcomes)])


_MOST = 20  # differences to list of a victim


def _table(outcomes: Sequence[Outcome]) -> str:
    columns = {
        "training": lambda found: found.kind,
        "workers": lambda found: found.workers,
        "kills survived": lambda found: f"{len(found.kills)} of {found.planned}",
        f"during {' / '.join(MOMENTS)}": lambda found: _counted(found.kills),
        "updates done again": lambda found: sum(kill.done_again for kill in found.kills),
        "updates lost": lambda found: found.lost,
        "workers gone after, s": lambda found: _longest(found.kills),
        "tensors + other values compared": lambda found: f"{found.checkpoints.tensors} + {found.checkpoints.others}",
        "differing": lambda found: len(found.checkpoints.differences),
        "log lines (values) compared": lambda found: f"{found.log.lines} ({found.log.others})",
        "differing ": lambda found: len(found.log.differences),
    }
    rows = [columns.keys(), ["---"] * len(columns), *([str(text(found)) for text in columns.values()] for found in outcomes)]
    return "\n".join(f"| {' | '.join(text.strip() for text in row)} |" for row in rows)


def _counted(kills: Sequence[Kill]) -> str:
    counts = Counter(kill.moment for kill in kills)
    return " / ".join(str(counts[name]) for name in MOMENTS)


def _longest(kills: Sequence[Kill]) -> str:
    if any(kill.gone_after is None for kill in kills):
        return f"over {ORPHANS_MAY_LIVE:g}"
    return f"at most {max((kill.gone_after for kill in kills), default=0):.1f}"


def _last_line(outcomes: Sequence[Outcome]) -> str:
    survived, planned, lost = (sum(values) for values in zip(*((len(o.kills), o.planned, o.lost) for o in outcomes), strict=True))
    late = f" ({planned - survived} came after the end)" if survived < planned else ""
    start = f"{survived} of {planned} kills survived{late}, {lost} updates lost, "
    if all(outcome.equal for outcome in outcomes):
        return start + "every tensor and every logged number equal"
    values, logged = (sum(len(getattr(outcome, part).differences) for outcome in outcomes) for part in ("checkpoints", "log"))
    problems = sum(len(outcome.problems) for outcome in outcomes)
    return start + f"NOT EQUAL: {values} differences in checkpoints, {logged} in logs, {problems} other problems, listed above"


if __name__ == "__main__":
    run_script(main)

"""The kill proof: a training that SIGKILL hits at random moments ends as the training that nobody killed, bit for bit.

    pytest tests/test_kills.py --kills 20        # L1 and composite, 0 and 2 workers: two minutes on two cores

Real trainings run as processes, fp32 on the CPU, across steps of the learning rate, saves and evaluations. A kill hits the training but
not its workers, which must notice by themselves; the same command then starts it again at once.
"""

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import weights
from helpers import REPOSITORY, write_set
from runs import same, tensors

SAVE_EVERY, EVAL_EVERY = 4, 10  # updates
PART = 24  # updates for each kill
ORPHANS_MAY_LIVE = 15.0  # seconds; PyTorch's workers look every 5 s whether their training still lives
PAIRS = [("l1", 0), ("composite", 2), ("l1", 2), ("composite", 0)]  # and number of workers
MOMENTS = ("loop", "evaluation", "save", "start")
SETTINGS = {
    "upscale_factor": 2, "channels": 16, "reduction": 4, "num_rg": 2, "num_rcab": 2, "train_sets": "Train", "valid_sets": "Valid",
    "lr_patch_size": 16, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32", "log_every": 1,
    "steps_per_epoch": 1, "eval_every": EVAL_EVERY, "save_every": SAVE_EVERY, "warmup_updates": 6, "halve_every": 20, "keep_last": 2,
}  # fmt: skip
COMPOSITE = {
    "use_composite_loss": True, "vgg19_weights_path": "random", "perceptual_layers": "conv2_2", "discriminator_channels": 8,
    "best_metric": "newest", "optimizer": "muon",
}  # fmt: skip
KINDS = {
    "l1": ("train.py", {"model_arch_name": "rcan_light_x2"}),
    "composite": ("train_improved.py", {"model_arch_name": "rcan_light_cbam_x2", **COMPOSITE}),
}


class Training:
    """A run and its attempts: processes started by the same command."""

    def __init__(self, folder: Path, kind: str, workers: int, name: str, updates: int) -> None:
        script, own = KINDS[kind]
        places = {"data_root": folder / "data", "cache_dir": folder / f"cache_{name}", "results_dir": folder / "results", "exp_name": name}
        settings = {**SETTINGS, **own, **places, "num_workers": workers, "epochs": updates}
        self.command = [sys.executable, str(REPOSITORY / script), *(f"--{key}={value}" for key, value in settings.items())]
        self.folder = folder / "results" / name
        self.said = folder / f"{name}.txt"
        self.alive: list[int] = []  # a pipe for each attempt, which ends when the last of its processes has ended

    def start(self) -> None:
        ours, theirs = os.pipe()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": os.environ.get("RCAN_KILLS_ON", "")}
        with open(self.said, "a") as said:
            options = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": said, "start_new_session": True}
            self.process = subprocess.Popen(self.command, env=environment, pass_fds=[theirs], **options)
        os.close(theirs)
        self.alive.append(ours)
        self.starts_before = sum(line.get("event") == "start" for line in self.lines())
        self.started = time.monotonic()

    def lines(self) -> list[dict]:
        """The whole lines of the log."""
        with contextlib.suppress(FileNotFoundError):
            text = (self.folder / "log.jsonl").read_text()
            return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return []

    def reached(self) -> tuple[int | None, int]:
        """The update that this attempt resumed from, None before it logs, and the newest update that it has logged."""
        lines = self.lines()
        starts = [index for index, line in enumerate(lines) if line.get("event") == "start"]
        if len(starts) <= self.starts_before:
            return None, 0
        return lines[starts[-1]]["update"], max(line["update"] for line in lines[starts[-1] :])

    def is_in(self, moment: str) -> bool:
        if moment == "save":
            return any(self.folder.glob(".*.pth.tar.*.part"))
        if moment == "evaluation":
            last = self.lines()[-1]
            return "event" not in last and last["update"] % EVAL_EVERY == 0
        return True

    def wait(self) -> None:
        assert self.process.wait(300) == 0, self.said.read_text()[-2000:]

    def check_orphans(self) -> None:
        """Every process of every attempt ends by itself."""
        for pipe in self.alive:
            assert select.select([pipe], [], [], ORPHANS_MAY_LIVE)[0], "a worker outlives its training"
            os.close(pipe)


def kill(training: Training, moment: str, update: int, rng: random.Random, start_seconds: float) -> tuple[str, int, int | None] | None:
    """Start an attempt and kill it in this moment, once it has logged the update; the moment, and updates logged and resumed from.

    None if the training was finished before.
    """
    training.start()
    delay = rng.uniform(0, start_seconds)
    while True:
        if training.process.poll() is not None:
            training.wait()
            return None
        if moment == "start" and time.monotonic() - training.started > delay:
            break
        newest = 0 if moment == "start" else training.reached()[1]
        if newest >= update and (training.is_in(moment) or newest >= update + PART // 2):  # the moment may be missed on a busy machine
            time.sleep(rng.uniform(0, {"loop": 0.1, "evaluation": 0.05}.get(moment, 0)))
            break
        time.sleep(0.0005 if moment == "save" else 0.005)
    training.process.kill()
    assert training.process.wait() == -signal.SIGKILL
    resumed, logged = training.reached()
    return moment, logged, resumed


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize(("kind", "workers"), PAIRS)
def test_a_killed_run_ends_as_the_run_that_nobody_killed(kind, workers, tmp_path, pytestconfig, capsys):
    index, kills = PAIRS.index((kind, workers)), pytestconfig.getoption("--kills") or 2
    kills = kills // len(PAIRS) + (index < kills % len(PAIRS))
    if not kills:
        pytest.skip("--kills 4 or more has a kill for each kind")
    write_set(tmp_path / "data" / "Train", [(60, 70), (80, 64), (90, 90), (64, 64)])
    write_set(tmp_path / "data" / "Valid", [(120, 136), (128, 130), (100, 180)], seed=9)
    count = PART * (kills + 1)
    straight, killed = (Training(tmp_path, kind, workers, name, count) for name in ("straight", "killed"))
    straight.start()
    while not straight.lines() and straight.process.poll() is None:
        time.sleep(0.01)
    start_seconds = time.monotonic() - straight.started
    straight.wait()

    rng = random.Random(index)
    moments = [MOMENTS[(number + index) % len(MOMENTS)] for number in range(kills)]
    rng.shuffle(moments)
    updates = [PART * number + rng.randrange(1, PART // 2) for number in range(kills)]  # each in its own part of the run
    hits = [kill(killed, moment, update, rng, start_seconds) for moment, update in zip(moments, updates, strict=True)]
    killed.start()
    killed.wait()
    for training in (straight, killed):
        training.check_orphans()

    assert None not in hits  # all kills came before the end
    starts = [line["update"] for line in killed.lines() if line.get("event") == "start"]
    again = [logged - resumed for (_, logged, _), resumed in zip(hits, resumed_after(hits, starts[-1]), strict=True) if logged]
    assert max(again, default=0) <= SAVE_EVERY
    reports = [line["update"] for line in killed.lines() if "event" not in line]
    assert reports == list(range(1, count + 1))  # each update is in the log once

    def told(training):  # all that a log says but for starts and times
        lines = [line for line in training.lines() if line.get("event") != "start"]
        return [{name: value for name, value in line.items() if not name.startswith(("time/", "seconds", "memory/"))} for line in lines]

    assert told(killed) == told(straight)
    compared = [0, 0]
    for name in ("last.pth.tar", "best.pth.tar"):
        one, other = (tensors(weights.read(training.folder / name)) for training in (straight, killed))
        assert one.keys() == other.keys()
        expected = ("/seconds", "/config/exp_name", "/config/cache_dir", "/provenance/command", "/provenance/commit")
        assert [part for part in one if not same(one[part], other[part]) and part not in expected] == []
        for value in one.values():
            compared[not hasattr(value, "shape")] += 1
    values = sum(len(line) - 1 for line in told(killed))
    with capsys.disabled():
        print(
            f"\n{kind}, {workers} workers: {len(hits)} kills survived ({', '.join(moments)}), 0 updates lost, {sum(again)} done again, "
            f"{compared[0]} tensors, {compared[1]} other values and {len(told(killed))} log lines of {values} values equal"
        )


def resumed_after(hits, final: int) -> list[int]:
    """For each kill, the update from which the next attempt that got so far went on."""
    found, known = [], final
    for _, _, resumed in reversed([*hits[1:], ("", 0, final)]):
        known = known if resumed is None else resumed
        found.append(known)
    return found[::-1]

"""Small trainings for the tests: their settings, stopping them, and comparing what they leave."""

import json
import os
import signal
import socket
import subprocess
import sys

import torch

import train
import weights
from helpers import REPOSITORY, TINY, write_set


def small_runs(kind, folder):
    """A way to make settings, of this class, of a run of six updates on small images, and to change some."""
    write_set(folder / "data" / "Train", [(24, 30), (40, 26), (33, 33)])
    write_set(folder / "data" / "Valid", [(32, 36), (28, 30)], seed=9)

    def make(**changes):
        return kind(
            **{
                **TINY, "model_arch_name": "rcan_x2", "upscale_factor": 2, "exp_name": "run",
                "results_dir": str(folder / "results"), "data_root": str(folder / "data"), "cache_dir": str(folder / "cache"),
                "train_sets": ("Train",), "valid_sets": ("Valid",),
                "epochs": 3, "steps_per_epoch": 2, "batch_size": 4, "lr_patch_size": 10, "num_workers": 0, "learning_rate": 1e-3,
                "precision": "fp32", "log_every": 1, "eval_every": 2, "save_every": 3, **changes,
            }
        )  # fmt: skip

    return make


def stop_after(monkeypatch, updates, step=train.PixelStep):
    """Ask the run to stop, as Ctrl-C does, after so many updates of this attempt."""
    call, done = step.__call__, []

    def counted(self, lr, gt):
        done.append(1)
        if len(done) == updates:
            os.kill(os.getpid(), signal.SIGINT)
        return call(self, lr, gt)

    monkeypatch.setattr(step, "__call__", counted)


def tensors(value, name=""):
    if isinstance(value, dict):
        return {key: tensor for part, member in value.items() for key, tensor in tensors(member, f"{name}/{part}").items()}
    if isinstance(value, list | tuple):
        return tensors(dict(enumerate(value)), name)
    return {name: value}


TIMES = ("/seconds", "/random_states/cuda")


def same(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def same_checkpoints(first, second, *ignored):
    """The names of all tensors and numbers that differ in two files, but for times and commands, and `ignored` parts."""
    first, second = (tensors(weights.read(path)) for path in (first, second))
    ignored = (*TIMES, "/config/exp_name", *ignored)
    names = [name for name in first if not name.startswith(ignored)]
    assert names == [name for name in second if not name.startswith(ignored)]
    return [name for name in names if not same(first[name], second[name])]


def log_lines(config):
    """What a run has logged, without its starts and times."""
    lines = [json.loads(line) for line in (config.experiment_dir / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line.get("event") != "start"]
    return [{name: value for name, value in line.items() if not name.startswith(("time/", "seconds", "memory/"))} for line in lines]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def in_processes(code, *arguments, count=2):
    """Run code in processes of one group, as torchrun does; what each has printed."""
    environment = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=REPOSITORY,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, said
    return [out for out, _ in said]

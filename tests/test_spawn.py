"""Windows and macOS start processes anew (spawn) instead of forking them: every data set and the training must survive it."""

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

import dataset
from config import Config
from helpers import REPOSITORY, write_set
from runs import log_lines, same_checkpoints, small_runs
from store import PairStore

pytestmark = pytest.mark.slow
METHODS = [method for method in ("spawn", "forkserver") if method in multiprocessing.get_all_start_methods()]


@pytest.mark.parametrize("method", METHODS)
def test_training_batches(tmp_path, method):
    pairs = dataset.find_pairs(write_set(tmp_path / "Train", [(40, 44), (36, 60)]), 2)
    store = PairStore.open_or_build({"Train": pairs}, 2, "BI", tmp_path / "cache", progress=False)
    batches = dataset.TrainBatches(store, 2, 8, seed=1)
    loader = DataLoader(batches, batch_size=None, sampler=range(4), num_workers=2, multiprocessing_context=method)
    for number, batch in enumerate(loader):
        assert all(torch.equal(batch[name], batches[number][name]) for name in ("lr", "gt"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prepared", [False, True])
def test_images_to_score(tmp_path, method, prepared):
    folder = write_set(tmp_path / "Valid", [(40, 44), (36, 60)])
    if prepared:
        for image in dataset.EvaluationSet(dataset.find_pairs(folder, 2), 2):
            dataset.image_files.write_image(folder / "LRbicx2" / f"{image[0]}.png", image[1])
    images = dataset.open_test_sets(tmp_path, ["Valid"], 2)["Valid"]
    loader = DataLoader(images, batch_size=None, sampler=range(len(images)), num_workers=2, multiprocessing_context=method)
    for number, (name, lr, gt) in enumerate(loader):
        expected = images[number]
        assert name == expected[0]
        assert (lr.numpy() == expected[1]).all()
        assert (gt.numpy() == expected[2]).all()


SPAWNED = """
import multiprocessing, runpy, sys
if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    sys.path.insert(0, {repository!r})
    sys.argv = [{script!r}, *sys.argv[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("method", METHODS[:1])
def test_training(tmp_path, method):
    """train.py with two workers that are started anew, as a program of its own; the run is that without workers."""
    make = small_runs(Config, tmp_path)
    config, plain = make(exp_name="spawned", num_workers=2), make(exp_name="plain")
    (tmp_path / "spawned.py").write_text(
        SPAWNED.format(method=method, repository=str(REPOSITORY), script=str(REPOSITORY / "train.py")), encoding="utf-8"
    )
    for settings, command in ((config, tmp_path / "spawned.py"), (plain, REPOSITORY / "train.py")):
        given = {name: getattr(settings, name) for name in vars(settings) if getattr(settings, name) != getattr(Config, name)}
        arguments = [
            text for name, value in given.items() for text in (f"--{name}", *map(str, value if isinstance(value, tuple) else [value]))
        ]
        done = subprocess.run(
            [sys.executable, str(command), *arguments], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
    found = same_checkpoints(config.experiment_dir / "last.pth.tar", plain.experiment_dir / "last.pth.tar", "/provenance/command")
    assert found == ["/config/num_workers"]
    assert log_lines(config) == log_lines(plain)


LISTEN = """
import sys, runpy
heard = []
def hear(event, arguments):
    if event in ("socket.bind", "socket.connect") and isinstance(arguments[1], tuple):  # not the sockets within this machine
        heard.append((event, str(arguments[1:])))
sys.addaudithook(hear)
sys.argv = sys.argv[1:]
sys.path.insert(0, {repository!r})
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("heard", heard)
"""


def test_a_training_opens_no_connection_and_listens_nowhere(tmp_path):
    """Only torchrun, which is asked for, opens a port."""
    config = small_runs(Config, tmp_path)(num_workers=2)
    given = {name: getattr(config, name) for name in vars(config) if getattr(config, name) != getattr(Config, name)}
    arguments = [text for name, value in given.items() for text in (f"--{name}", *map(str, value if isinstance(value, tuple) else [value]))]
    command = [sys.executable, "-c", LISTEN.format(repository=str(REPOSITORY)), str(REPOSITORY / "train.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "heard []" in done.stdout

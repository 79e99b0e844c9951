"""What every test gets: real data where there is some, and the same seed."""

import os
import signal
from pathlib import Path

if "RCAN_TEST_CUDA" not in os.environ:  # equality to the last bit is promised for CPUs; RCAN_TEST_CUDA=1 runs what a GPU adds
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, the programs that tests start would ignore it

import pytest
import torch

from helpers import REPOSITORY


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with Set5, T91 …; tests that ask for it are skipped where there is none."""
    for folder in filter(None, (os.environ.get("RCAN_DATA"), REPOSITORY / "data", REPOSITORY.parent / "shared" / "data")):
        if (Path(folder) / "Set5" / "GT").is_dir():
            return Path(folder)
    pytest.skip("no Set5/GT in $RCAN_DATA, data/ or ../shared/data")


@pytest.fixture(autouse=True)
def _same_start():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # one is enough, as the networks are tiny
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, help="kills of the kill proof, over all kinds of training (tests/test_kills.py; default 2)")
    parser.addoption("--mutations", type=int, default=300, help="damaged image files to read (tests/test_image_files.py)")


def pytest_configure(config):
    if config.getoption("--kills") is not None and config.getoption("-m") == "not slow":
        config.option.markexpr = ""  # whoever asks for kills means the slow test

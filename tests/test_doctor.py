"""scripts/doctor.py: what it finds, what it calls a problem, and its exit code."""

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import image_files
import imgproc
import weights
from helpers import REPOSITORY, tiny, write_set

sys.path.insert(0, str(REPOSITORY / "scripts"))
doctor = importlib.import_module("doctor")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in which training and testing would start."""
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "data" / "Train", [(64, 72), (80, 64)])
    write_set(tmp_path / "data" / "Set5", [(64, 64)] * 5, seed=9)
    weights.export(tiny(2), tmp_path / "w.pth")
    return tmp_path


@pytest.fixture
def examine(place, capsys):
    """What the doctor prints, and the works that would fail: {"training", "testing"} or fewer."""

    def run(*more):
        arguments = ["--model_arch_name", "rcan_light_x2", "--upscale_factor", "2", "--train_sets", "Train", "--lr_patch_size", "24"]
        code = 0
        try:
            doctor.main([*arguments, "--model_path", "w.pth", *more])
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr().out
        failing = {line.split()[0] for line in said.splitlines() if line.split()[1:3] == ["would", "fail:"]}
        assert code == bool(failing)
        return said, failing

    return run


def test_a_sound_place_passes_on_one_screen_and_nothing_is_written(place, examine):
    before = sorted(place.rglob("*"))
    said, failing = examine()
    assert not failing
    assert sorted(place.rglob("*")) == before
    assert len(said.splitlines()) <= 24
    assert f"torch {torch.__version__.split('+')[0]}" in said
    for part in ("train Train x2: 2 images, 72x64 to 64x80", "test Set5 x2: 5 images, 64x64", "8 channels", "native layout", "GiB"):
        assert part in said


def test_lr_images_are_compared_with_exact_ones(place, examine):
    for file in image_files.list_images(place / "data/Set5/GT"):
        image_files.write_image(place / "data/Set5/LRbicx2" / file.name, imgproc.degrade(image_files.read_image(file), 2))
    said, failing = examine()
    assert not failing
    assert said.count("LRbicx2, 5 compared: exactly") == 2  # once to validate, once to test
    lr = image_files.read_image(place / "data/Set5/LRbicx2/a.png")
    lr[0, :32, 0] = np.where(lr[0, :32, 0] < 200, lr[0, :32, 0] + 6, lr[0, :32, 0] - 6)
    image_files.write_image(place / "data/Set5/LRbicx2/a.png", lr)
    said, failing = examine()
    assert not failing  # it trains and tests, but its scores compare with nobody's
    assert said.count("LRbicx2, 5 compared: NOT") == 2
    assert "0.2% of the values differ, by up to 6" in said  # 32 of 5 x 3072


@pytest.mark.parametrize(
    ("harm", "name", "failing"),
    [
        (lambda place: (place / "data/Train/GT/a.png").write_bytes(b""), "a.png", {"training"}),
        (lambda place: (place / "data/Set5/GT/a.png").unlink(), "Set5", {"training", "testing"}),
        (lambda place: (place / "w.pth").write_bytes(b"x"), "w.pth", {"testing"}),
        (lambda place: torch.save({"conv1.weight": torch.zeros(1)}, place / "w.pth"), "w.pth", {"testing"}),
        (lambda place: (place / "results").write_text("a file"), "results", {"training", "testing"}),
        (lambda place: (place / ".cache").write_text("a file"), ".cache", {"training"}),
        (lambda place: shutil.rmtree(place / "data"), "data", {"training", "testing"}),
    ],
    ids=["image", "incomplete set", "weights", "part of weights", "results", "cache", "no data"],
)
def test_each_harm_is_named_and_fails_what_it_would(place, examine, harm, name, failing):
    harm(place)
    said, found = examine()
    assert found == failing
    assert name in "".join(line for line in said.splitlines() if "PROBLEM" in line)


def test_small_images_and_absent_sets_are_as_in_training_and_testing(place, examine):
    assert examine("--lr_patch_size", "70")[1] == {"training"}
    write_set(place / "data" / "Train", [(40, 40), (64, 72)])
    assert examine()[1] == {"training"}
    said, failing = examine("--small_images", "skip", "--test_sets", "Set5", "Urban100")
    assert not failing
    assert "Train x2: 2 images, 40x40 to 72x64, 1 " in said
    assert "test Urban100" in said
    assert examine("--small_images", "skip", "--test_sets", "Urban100")[1] == {"testing"}


def test_weights_to_start_from_must_fit_the_network(examine):
    start = ["--pretrained_model_path", "w.pth"]
    assert examine(*start)[1] == {"training"}
    assert not examine(*start, "--channels", "8", "--reduction", "4", "--num_rg", "2", "--num_rcab", "2")[1]


def test_weights_whose_output_is_not_finite_fail_testing(place, examine):
    network = tiny(2)
    network.conv3.bias.data.fill_(3e38)
    network.mean.fill_(3e38)
    weights.export(network, place / "w.pth")
    assert examine()[1] == {"testing"}


@pytest.mark.parametrize(
    ("results", "cache", "failing"),
    [(10**6, 10**6, {"training", "testing"}), (2**25, 2**31, {"training"}), (2**31, 36_479, {"training"}), (2**31, 36_480, set())],
)
def test_too_little_room_is_a_problem(place, monkeypatch, examine, results, cache, failing):
    """Results want 1 GiB in training; the cache holds 64x72 + 80x64 pixels, and a quarter as many of LR, 3 bytes each: 36,480."""
    (place / "cache").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=cache if path.name == "cache" else results))
    assert examine("--cache_dir", "cache")[1] == failing


def test_packages_that_are_missing_or_old_are_named(monkeypatch):
    real = importlib.metadata.distributions
    versions = {"torch": [], "numpy": ["1.20.1"], "opencv-python-headless": [], "opencv-python": ["99.0"], "scipy": ["1.11"]}

    def distributions(name):
        return [SimpleNamespace(version=version) for version in versions[name]] if name in versions else real(name=name)

    monkeypatch.setattr(importlib.metadata, "distributions", distributions)
    torch_problem, numpy_problem = doctor.check_packages()  # and opencv-python does as well as opencv-python-headless
    assert "torch" in torch_problem
    assert "numpy is 1.20.1" in numpy_problem
    with pytest.raises(SystemExit, match="torch is missing"):
        doctor.main([])


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_without_packages_or_with_a_broken_one_there_is_a_sentence_and_no_traceback(tmp_path, broken):
    (tmp_path / "torch.py").write_text("raise OSError('no such symbol')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path) if broken else ""}
    options = [] if broken else ["-S"]  # -S: no packages
    words = [sys.executable, *options, str(REPOSITORY / "scripts" / "doctor.py")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1
    assert "torch" in done.stderr
    assert ("no such symbol" in done.stderr) == broken
    assert "pip install -r" in done.stderr
    assert "Traceback" not in done.stderr

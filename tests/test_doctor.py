"""The doctor: what it finds, what it calls a problem, and its exit code."""

import importlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import image_files
import imgproc
import weights
from helpers import REPOSITORY, drawn_image, tiny, write_set

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


def examine(capsys, *more, code=None):
    arguments = ["--model_arch_name", "rcan_light_x2", "--upscale_factor", "2", "--train_sets", "Train", "--lr_patch_size", "24"]
    arguments += ["--model_path", "w.pth", *more]
    if code:
        with pytest.raises(SystemExit, match=str(code)):
            doctor.main(arguments)
    else:
        doctor.main(arguments)
    return capsys.readouterr().out


def write_lr(folder, change=0):
    for file in image_files.list_images(folder / "GT"):
        lr = imgproc.degrade(image_files.read_image(file), 2)
        lr[0, 0, 0] = np.clip(int(lr[0, 0, 0]) + (change if file.stem == "a" else 0), 0, 255)
        image_files.write_image(folder / "LRbicx2" / file.name, lr)


def test_a_sound_place_passes_on_one_screen_and_nothing_is_written(place, capsys):
    before = sorted(place.rglob("*"))
    said = examine(capsys)
    assert sorted(place.rglob("*")) == before
    assert len(said.splitlines()) <= 24
    assert f"torch {torch.__version__.split('+')[0]}" in said
    assert "train Train x2: 2 images, 72x64 to 64x80" in said
    assert "LR made exactly when needed" in said
    assert "RCAN x2, 2 groups of 2 blocks, 8 channels" in said
    assert "native layout" in said
    assert "training   would start" in said
    assert "testing    would start" in said
    assert "GiB free for decoded images" in said


def test_lr_images_are_compared_with_exact_ones(place, capsys):
    write_lr(place / "data" / "Set5")
    assert "LR in LRbicx2, 5 compared: exactly MATLAB's bicubic" in examine(capsys)
    write_lr(place / "data" / "Set5", change=6 if imgproc.degrade(drawn_image(64, 64, 9), 2)[0, 0, 0] < 200 else -6)
    said = examine(capsys)
    assert "NOT MATLAB's bicubic, 0.0% of the values differ, by up to 6; scores will not compare" in said  # 1 of 5 x 3072 values


@pytest.mark.parametrize(
    ("harm", "message", "fails"),
    [
        (lambda place: (place / "data/Train/GT/a.png").write_bytes(b""), "train Train x2: PROBLEM: .*a.png: the file is empty", "training"),
        (lambda place: (place / "data/Set5/GT/a.png").unlink(), "Set5 x2: PROBLEM: .*4 images, but Set5 has 5", "both"),
        (lambda place: (place / "w.pth").write_bytes(b"x"), "PROBLEM: w.pth: not a file of weights", "testing"),
        (lambda place: torch.save({"conv1.weight": torch.zeros(1)}, place / "w.pth"), "PROBLEM: w.pth: holds no RCAN", "testing"),
        (lambda place: (place / "results").write_text("a file"), "results can't be written to", "training"),
    ],
)
def test_each_harm_is_named_and_ends_with_code_1(place, capsys, harm, message, fails):
    harm(place)
    said = examine(capsys, code=1)
    assert re.search(message, said)
    assert ("training   would fail" in said) == (fails in ("training", "both"))
    assert ("testing    would fail" in said) == (fails in ("testing", "both"))


def test_small_images_and_absent_sets_are_as_in_training_and_testing(place, capsys):
    assert "smaller than a GT patch of 140" in examine(capsys, "--lr_patch_size", "70", code=1)
    write_set(place / "data" / "Train", [(40, 40), (64, 72)])
    assert "1 too small for a patch and left out" in examine(capsys, "--small_images", "skip")
    said = examine(capsys, "--small_images", "skip", "--test_sets", "Set5", "Urban100")
    assert "test Urban100: no such folder; it would not be scored" in said
    assert "no such folder" in examine(capsys, "--small_images", "skip", "--test_sets", "Urban100", code=1)


def test_weights_to_start_from_must_fit_the_network(place, capsys):
    start = ["--pretrained_model_path", "w.pth"]
    said = examine(capsys, *start, code=1)
    assert "PROBLEM: w.pth: " in said
    assert "weights don't fit the network to train" in said
    assert "training   would fail: pretrained_model_path='w.pth'" in said
    size = ["--channels", "8", "--reduction", "4", "--num_rg", "2", "--num_rcab", "2"]
    assert "started from w.pth" in examine(capsys, *start, *size)


def test_too_little_room_is_a_problem(place, capsys, monkeypatch):
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _path: usage)
    said = examine(capsys, code=1)
    assert "PROBLEM: 1.0 GiB are needed" in said
    assert "training   would fail: disk for results" in said


def test_packages_that_are_missing_old_or_broken_are_named(monkeypatch, capsys):
    versions = {"torch": None, "numpy": "1.20.1"}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, real(name)))
    assert doctor.check_packages() == ["torch is missing", "numpy is 1.20.1, but at least 1.26 is needed"]
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "opencv-python-headless" else real(name) or "99")
    assert doctor.check_packages() == []  # opencv-python will do as well
    monkeypatch.setattr(
        doctor.importlib, "import_module", lambda name: 1 / 0 if name == "x" else (_ for _ in ()).throw(OSError("no symbol"))
    )
    assert doctor.check_packages()[0] == "torch is installed, but can't be imported (no symbol)"
    assert "python 3." in capsys.readouterr().out


def test_without_any_package_there_is_a_sentence_and_no_traceback(tmp_path):
    script = str(REPOSITORY / "scripts/doctor.py")
    code = f"import runpy, sys; sys.argv = ['doctor']; runpy.run_path({script!r}, run_name='__main__')"
    without = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path, env=without)  # -S: no packages
    assert done.returncode == 1
    assert "torch is missing" in done.stderr
    assert "run pip install -r" in done.stderr
    assert "Traceback" not in done.stderr

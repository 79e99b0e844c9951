"""A user's mistakes, one of each kind, in training and testing: one sentence with the name and the value, an exit code, nothing changed.

The scripts run in this process, by the function that their main guard calls. Of a folder that holds everything that can be wrong,
names, sizes, times and contents are compared before and after.
"""

import contextlib
import importlib.util
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import image_files
import train
import train_improved
import weights
from helpers import REPOSITORY, TINY, drawn_image, tiny, write_set
from reports import provenance
from runtime import run_script

specification = importlib.util.spec_from_file_location("scoring", REPOSITORY / "test.py")  # `import test` is CPython's
scoring = importlib.util.module_from_spec(specification)
sys.modules["scoring"] = scoring  # which dataclasses look up
specification.loader.exec_module(scoring)
MAIN = {"train.py": train.main, "train_improved.py": train_improved.main, "test.py": scoring.main}


def trained(*more, scale=2, train_set="Good", valid_set="Good"):
    settings = {"model_arch_name": f"rcan_x{scale}", "upscale_factor": scale, **TINY, "exp_name": "new", "epochs": 1, "steps_per_epoch": 1,
                "batch_size": 2, "lr_patch_size": 8, "num_workers": 0, "precision": "fp32", "train_sets": train_set,
                "valid_sets": valid_set}  # fmt: skip
    return [*(word for name, value in settings.items() for word in (f"--{name}", value)), *more]


TEST = ["--model_path", "weights/good.pth", "--test_sets"]
COMPOSITE = ["--preset", "light_perceptual", "--train_sets", "Good", "--valid_sets", "Good", "--lr_patch_size", 8]


class Code:
    """What a pickle does that runs code: this one would leave a file."""

    def __reduce__(self):
        return os.system, ("echo > code_was_run",)


def make_data(data):
    write_set(data / "Good", [(40, 44), (36, 48)])
    good = (data / "Good" / "GT" / "b.png").read_bytes()
    for name, content in {"NoBytes": b"", "Text": b"a letter\n" * 30, "Cut": good[: len(good) // 2]}.items():
        write_set(data / name, [(40, 44)])
        (data / name / "GT" / "b.png").write_bytes(content)
    (data / "Empty" / "GT").mkdir(parents=True)
    (data / "File").write_text("not a folder")
    for name, size in {"OnePixel": (1, 1), "Small": (14, 14)}.items():
        write_set(data / name, [(40, 44)])
        image_files.write_image(data / name / "GT" / "b.png", drawn_image(*size))
    write_set(data / "Unpaired", [(40, 44), (36, 48)])
    image_files.write_image(data / "Unpaired" / "LRbicx2" / "a.png", drawn_image(20, 22))
    write_set(data / "WrongSize", [(40, 44)])
    image_files.write_image(data / "WrongSize" / "LRbicx2" / "a.png", drawn_image(20, 21))
    write_set(data / "Twins", [(40, 44)])
    image_files.write_image(data / "Twins" / "GT" / "a.jpg", drawn_image(40, 44))
    write_set(data / "Set5", [(40, 44)])
    write_set(data / "Locked", [(40, 44), (36, 48)])
    (data / "Locked" / "GT" / "b.png").chmod(0)


def make_weights(folder):
    folder.mkdir()
    state = tiny(2).state_dict()
    weights.export(tiny(2), folder / "good.pth")
    weights.export(tiny(2, channels=16), folder / "wide.pth")
    good = (folder / "good.pth").read_bytes()
    for name, content in {
        "empty.pth": b"", "text.pth": b"notes\n" * 20, "page.pth": b"<!DOCTYPE html><html>sign in</html>", "half.pth": good[:900],
        "code.pkl": pickle.dumps(Code()),
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)
    (folder / "folder.pth").mkdir()
    nan = {**state, "conv1.weight": torch.full_like(state["conv1.weight"], math.nan)}
    for name, content in {
        "code.pth": {"state_dict": Code()}, "list.pth": [1, 2], "nan.pth": {"state_dict": nan},
        "lacks.pth": {name: state[name] for name in state if name != "conv1.bias"}, "shape.pth": {**state, "conv1.bias": torch.zeros(9)},
    }.items():  # fmt: skip
        torch.save(content, folder / name)


@pytest.fixture(scope="module")
def place():
    """Where all cases run, as none of them changes anything; other users can reach it, too."""
    folder = Path(tempfile.mkdtemp()).resolve()
    folder.chmod(0o777)
    make_data(folder / "data")
    make_weights(folder / "weights")
    (folder / "file").write_text("not a folder")
    (folder / "read_only").mkdir()
    (folder / "read_only").chmod(0o555)
    for taken in ("runs/folder/last.pth.tar", "runs/folder2/log.jsonl", "runs/lock/.lock"):
        (folder / taken).mkdir(parents=True)
    yield folder
    (folder / "read_only").chmod(0o777)  # else only root can delete what is in it
    shutil.rmtree(folder)


def snapshot(folder):
    def described(path):
        return None if path.is_dir() else (path.stat().st_size, path.stat().st_mtime_ns)

    return {str(path.relative_to(folder)): described(path) for path in sorted(folder.rglob("*"))}


@pytest.fixture
def ended(monkeypatch, capsys):
    """Run a script as its main guard does: exit code and stderr; an exception is what would end in a traceback."""

    def run(script, arguments, folder):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "1000")
        provenance.cache_clear()  # it names the command
        capsys.readouterr()
        try:
            run_script(MAIN[script])
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


@contextlib.contextmanager
def as_nobody(folder):
    """As another user where this one is root, for whom permissions do not matter; skipped where that is impossible."""
    if not hasattr(os, "seteuid"):
        pytest.skip("the permissions are those of Windows")
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        if not os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
            pytest.skip(f"{folder} cannot be reached by another user")
        yield
    finally:
        if root:
            os.seteuid(0)


def data_cases():
    for name, named in {
        "Gone": "data/Gone", "Empty": "data/Empty", "File": "data/File", "NoBytes": "NoBytes/GT/b.png", "Text": "Text/GT/b.png",
        "Cut": "Cut/GT/b.png", "OnePixel": "OnePixel/GT/b.png", "Unpaired": "Unpaired/GT/b.png", "WrongSize": "WrongSize/LRbicx2/a.png",
        "Twins": "Twins/GT/a.png",
    }.items():  # fmt: skip
        yield "train.py", trained(train_set=name), [named]
        yield "train.py", trained(valid_set=name), [named]
        yield "test.py", [*TEST, name], [named]
    yield "train.py", trained(train_set="Small"), ["Small/GT/b.png", "lr_patch_size", "small_images"]
    yield "test.py", [*TEST, "Small"], ["Small/GT/b.png"]
    yield "test.py", [*TEST, "Set5"], ["data/Set5"]  # which is not complete
    yield "test.py", [*TEST, "Good", "../data/Good"], ["Good"]
    yield "test.py", TEST, ["test_sets"]


def weights_cases():
    for name in ("gone.pth", "folder.pth", "empty.pth", "text.pth", "page.pth", "half.pth", "code.pth", "code.pkl", "list.pth", "nan.pth",
                 "lacks.pth", "shape.pth"):  # fmt: skip
        yield "test.py", ["--model_path", f"weights/{name}", "--test_sets", "Good"], [f"weights/{name}"]
    for name in ("gone.pth", "half.pth", "lacks.pth", "wide.pth"):
        yield "train.py", trained("--pretrained_model_path", f"weights/{name}"), [f"weights/{name}"]
        yield "train.py", trained("--resume", f"weights/{name}"), [f"weights/{name}"]
    for name in ("gone.pth", "folder.pth", "text.pth", "code.pth", "good.pth"):
        yield "train_improved.py", [*COMPOSITE, "--vgg19_weights_path", f"weights/{name}"], [f"weights/{name}", "vgg19-dcbb9e9d.pth"]
    yield "test.py", ["--model_path", "weights/good.pth", "weights/../weights/good.pth", "--test_sets", "Good"], ["model_path=", "good"]


def other_cases():
    yield "train.py", trained("--results_dir", "file"), ["file/new"]
    yield "train.py", trained("--cache_dir", "file/deeper"), ["file/deeper"]
    yield "train.py", trained("--exp_name", "n" * 300), ["nnnn"]
    for run, file in (("folder", "last.pth.tar"), ("folder2", "log.jsonl"), ("lock", ".lock")):
        yield "train.py", trained("--results_dir", "runs", "--exp_name", run), [f"runs/{run}/{file}"]
    yield "test.py", [*TEST, "Good", "--results_dir", "file"], ["file/good/test"]
    yield "train.py", trained("--use_composite_loss", "True"), ["use_composite_loss", "train_improved.py"]
    yield "train_improved.py", [*COMPOSITE, "--perceptual_layers", "conv9_9"], ["conv9_9", "conv1_1"]
    yield "test.py", [*TEST, "Good", "--mode", "train"], ["mode='train'"]


CASES = [*data_cases(), *weights_cases(), *other_cases()]


def named(case):
    script, arguments, _ = case
    return " ".join([script, *map(str, arguments[len(trained()) - 4 if arguments[0] == "--model_arch_name" else 0 :])])[:90]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_mistake_is_one_sentence_and_changes_nothing(place, ended, case):
    script, arguments, names = case
    before = snapshot(place)
    code, said = ended(script, arguments, place)
    assert snapshot(place) == before
    assert code == 1
    assert [line for line in said.splitlines() if line.startswith("error")] == said.strip().splitlines()[-1:]
    assert "Traceback" not in said
    assert all(name in said.splitlines()[-1] for name in names)


def test_what_is_right_is_not_refused(place, ended, tmp_path):
    """The same arguments, without a mistake: the cases above fail for what they name, and not for something else."""
    for script, arguments in (
        ("train.py", trained("--results_dir", tmp_path, "--cache_dir", tmp_path / "cache")),
        ("test.py", [*TEST, "Good", "--results_dir", tmp_path]),
    ):
        before = snapshot(place)
        code, said = ended(script, arguments, place)
        assert code == 0, said
        assert snapshot(place) == before
    assert not (place / "code_was_run").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        ("train.py", trained(train_set="Locked"), "Locked/GT/b.png"),
        ("train.py", trained("--results_dir", "read_only"), "read_only/new"),
        ("test.py", [*TEST, "Good", "--results_dir", "read_only"], "read_only/good/test"),
    ],
)
def test_missing_permission_is_a_sentence(place, ended, script, arguments, named):
    before = snapshot(place)
    with as_nobody(place):
        code, said = ended(script, arguments, place)
    assert (code, snapshot(place)) == (1, before)
    assert said.splitlines()[-1].startswith("error: ")
    assert named in said.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        ("train.py", trained("--results_dir", "disk"), "disk/new"),
        ("train.py", trained("--cache_dir", "disk"), "cache_dir"),
        ("test.py", [*TEST, "Good", "--results_dir", "disk/deeper"], "disk/deeper/good/test"),
    ],
)
def test_a_full_disk_is_a_sentence_and_nothing_is_left(place, ended, script, arguments, named):
    disk, mount = place / "disk", shutil.which("mount")
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not mount or os.name == "nt" or subprocess.run([mount, *options], capture_output=True).returncode:
        disk.rmdir()
        pytest.skip("no permission to mount a small disk")
    try:
        with contextlib.suppress(OSError), open(disk / "filling", "wb", buffering=0) as filling:
            while True:
                filling.write(bytes(4096))
        before = snapshot(place)
        code, said = ended(script, arguments, place)
        assert (code, snapshot(place)) == (1, before)
        assert said.splitlines()[-1].startswith("error: ")
        assert named in said.splitlines()[-1]
    finally:
        os.chdir(REPOSITORY)
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
        disk.rmdir()


def test_debug_shows_the_traceback_of_a_mistake(place, ended):
    with pytest.raises(FileNotFoundError, match="data/Gone"):
        ended("test.py", ["--debug", *TEST, "Gone"], place)
    assert "--debug" not in sys.argv


@pytest.mark.parametrize(
    "mistake",
    [lambda: np.zeros(3).reshape(2, 2), lambda: torch.zeros(3) + torch.zeros(2), lambda: {}["key"], lambda: 1 / 0, lambda: int("x")],
    ids=["numpy", "torch", "key", "division", "int"],
)
def test_a_mistake_of_ours_is_never_made_a_sentence(place, ended, monkeypatch, mistake):
    monkeypatch.setattr(scoring.dataset, "absent_sets", lambda *_: mistake())
    with pytest.raises((ValueError, RuntimeError, KeyError, ZeroDivisionError)):
        ended("test.py", [*TEST, "Good"], place)

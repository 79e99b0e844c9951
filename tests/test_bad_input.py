"""Bad input: each mistake ends in one sentence with the name, the value and the remedy, and nothing is written or changed.

The scripts run in this process, by the function that their main guard calls; the last section runs some as commands. Of what a
folder holds, names, sizes, times and contents are compared before and after.
"""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.util
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

import files
import image_files
import inference
import train
import train_improved
import weights
from config import Config, parse
from config_improved import ImprovedConfig, parse_improved
from helpers import REPOSITORY, TINY, drawn_image, tiny, write_set
from reports import provenance
from runtime import run_script


def loaded(name, path):
    """A module by its path; `import test` would be CPython's."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # which dataclasses look up
    spec.loader.exec_module(module)
    return module


scoring = loaded("scoring", REPOSITORY / "test.py")
MAIN = {"train.py": train.main, "train_improved.py": train_improved.main, "test.py": scoring.main, "inference.py": inference.main}


# A folder with everything that can be wrong


def network_options(scale=2):
    sizes = [word for name, value in TINY.items() for word in (f"--{name}", value)]
    return ["--model_arch_name", f"rcan_x{scale}", "--upscale_factor", scale, *sizes]


SHORT = [
    *("--exp_name", "new", "--epochs", 1, "--steps_per_epoch", 1, "--batch_size", 2, "--lr_patch_size", 8),
    *("--num_workers", 0, "--precision", "fp32"),
]


def trained(*more, scale=2, train_set="Good", valid_sets=("Good",)):
    return [*network_options(scale), *SHORT, "--train_sets", train_set, "--valid_sets", *valid_sets, *more]


def black_png(width, height):
    """A PNG of one bit a pixel, all black; 30,000 x 30,000 are some 100 KB."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer, row = zlib.compressobj(1), bytes(1 + -(-width // 8))
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def make_data(data):
    """Sets with the picture b.png, or a whole folder, that can't be used."""
    write_set(data / "Good", [(40, 44), (36, 48)])
    good = (data / "Good" / "GT" / "b.png").read_bytes()
    middle = len(good) // 2
    changed = good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :]
    for name, content in {
        "NoBytes": b"", "Zeros": bytes(4000), "Text": b"a letter\n" * 30, "Start": good[:8], "Cut": good[:middle], "Changed": changed,
        "Huge": black_png(30_000, 30_000),
    }.items():  # fmt: skip
        write_set(data / name, [(40, 44)])
        (data / name / "GT" / "b.png").write_bytes(content)
    (data / "Empty" / "GT").mkdir(parents=True)
    (data / "Folder" / "GT" / "b.png").mkdir(parents=True)
    (data / "File").write_text("not a folder")
    for name, size in {"OnePixel": (1, 1), "Small": (14, 14)}.items():
        write_set(data / name, [(40, 44)])
        image_files.write_image(data / name / "GT" / "b.png", drawn_image(*size))
    write_set(data / "Unpaired", [(40, 44), (36, 48)])
    image_files.write_image(data / "Unpaired" / "LRbicx2" / "a.png", drawn_image(20, 22))
    for name, width in {"WrongSize": 21, "CutLR": 22}.items():
        write_set(data / name, [(40, 44)])
        image_files.write_image(data / name / "LRbicx2" / "a.png", drawn_image(20, width))
    lr = data / "CutLR" / "LRbicx2" / "a.png"
    lr.write_bytes(lr.read_bytes()[:200])
    write_set(data / "Twins", [(40, 44)])
    image_files.write_image(data / "Twins" / "GT" / "a.jpg", drawn_image(40, 44))
    write_set(data / "Set5", [(40, 44)])
    for name, locked in {"Locked": "GT/b.png", "LockedFolder": "GT"}.items():
        write_set(data / name, [(40, 44), (36, 48)])
        (data / name / locked).chmod(0)


class Code:
    """What a pickle does that runs code: this one would leave a file."""

    def __reduce__(self):
        return os.system, ("echo > code_was_run",)


def make_weights(folder):
    """Files that are no weights of an RCAN, and some that are."""
    folder.mkdir()
    state = tiny(2).state_dict()
    weights.export(tiny(2), folder / "good.pth")
    weights.export(tiny(2, channels=16), folder / "wide.pth")
    weights.export(tiny(2), folder / "good.safetensors")
    good, safe = (folder / "good.pth").read_bytes(), (folder / "good.safetensors").read_bytes()
    middle = len(good) // 2
    for name, content in {
        "empty.pth": b"", "text.pth": b"notes\n" * 20, "zeros.pth": bytes(5000), "page.pth": b"<!DOCTYPE html><html>sign in</html>",
        "half.pth": good[:middle], "changed.pth": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
        "half.safetensors": safe[: len(safe) // 2], "code.pkl": pickle.dumps(Code()), "locked.pth": good,
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)
    (folder / "locked.pth").chmod(0)
    (folder / "folder.pth").mkdir()
    nan = {**state, "conv1.weight": torch.full_like(state["conv1.weight"], math.nan)}
    for name, content in {
        "code.pth": {"state_dict": Code()}, "module.pth": tiny(2), "list.pth": [1, 2], "nothing.pth": {},
        "vgg.pth": {"features.0.weight": torch.ones(3, 3, 3, 3)}, "several.pth": {"one": state, "other": state},
        "nan.pth": {"state_dict": nan}, "lacks.pth": {name: state[name] for name in state if name != "conv1.bias"},
        "shape.pth": {**state, "conv1.bias": torch.zeros(9)}, "integers.pth": {**state, "conv1.bias": torch.zeros(8, dtype=torch.int8)},
    }.items():  # fmt: skip
        torch.save(content, folder / name)


def make_run(folder):
    """A finished training of one update, in runs/done, and copies whose state can't be gone on from."""
    with inside(folder):
        train.main([str(word) for word in trained("--results_dir", "runs", "--exp_name", "done", "--cache_dir", "cache_of_done")])
    found = weights.read(folder / "runs" / "done" / "last.pth.tar")
    torch.save({**found, "data": "2 images of 9 pixels, 0"}, folder / "weights" / "other_images.pth.tar")
    nan = {**found["state_dict"], "conv1.bias": torch.full((8,), math.nan)}
    torch.save({**found, "state_dict": nan}, folder / "weights" / "nan.pth.tar")
    whole = (folder / "runs" / "done" / "last.pth.tar").read_bytes()
    (folder / "weights" / "half.pth.tar").write_bytes(whole[: len(whole) // 2])


@contextlib.contextmanager
def inside(folder):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def place():
    """Where all cases run, as none of them changes anything; other users can reach it, too."""
    folder = Path(tempfile.mkdtemp()).resolve()
    folder.chmod(0o777)
    make_data(folder / "data")
    make_weights(folder / "weights")
    make_run(folder)
    (folder / "file").write_text("not a folder")
    (folder / "read_only").mkdir()
    (folder / "read_only").chmod(0o555)
    for taken in ("taken/a.png", "runs/folder/last.pth.tar", "runs/folder2/log.jsonl", "runs/lock/.lock"):
        (folder / taken).mkdir(parents=True)
    (folder / "damaged" / "new").mkdir(parents=True)
    shutil.copy(folder / "weights" / "half.pth.tar", folder / "damaged" / "new" / "last.pth.tar")
    yield folder
    for path in (folder / "data" / "LockedFolder" / "GT", folder / "read_only"):
        path.chmod(0o777)  # else only root can delete what is in it
    shutil.rmtree(folder)


def snapshot(folder):
    """Everything in a folder: of files, sizes, times and contents."""
    return {str(path.relative_to(folder)): None if path.is_dir() else described(path) for path in sorted(folder.rglob("*"))}


def described(path):
    about = path.stat()
    content = hashlib.sha256(path.read_bytes()).hexdigest() if about.st_mode & 0o400 else ""
    return about.st_size, about.st_mtime_ns, content


def remove(folder, names):
    """Delete what a case has left that fails, for the others."""
    for path in (folder / name for name in sorted(names, reverse=True)):
        path.rmdir() if path.is_dir() else path.unlink()


@contextlib.contextmanager
def permissions_matter(folder):
    """As another user where this one is root, for whom they don't; skipped where that is impossible."""
    if not hasattr(os, "seteuid"):
        pytest.skip("the permissions are those of Windows")
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # nobody
    try:
        if not os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
            pytest.skip(f"{folder} can't be reached by another user")
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def ended(monkeypatch, capsys):
    """Run a script as its main guard does: (exit code, stdout, stderr); an exception is what would end in a traceback."""

    def run(script, arguments, folder, other_user=False):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "1000")
        provenance.cache_clear()
        capsys.readouterr()
        code = 0
        with permissions_matter(folder) if other_user else contextlib.nullcontext():
            try:
                run_script(MAIN[script])
            except SystemExit as end:
                code = end.code
            finally:
                provenance.cache_clear()  # it names the command
        return code, *capsys.readouterr()

    return run


# The table


class Case(NamedTuple):
    script: str
    arguments: list
    says: tuple  # parts of the sentence: which name and value, what is wrong, and the remedy
    code: int = 1
    other_user: bool = False


TEST = ["--model_path", "weights/good.pth", "--test_sets"]
UPSCALE = ["--model_path", "weights/good.pth", "--output", "out", "--input"]
PERMISSION = "no permission; change those of the file and its folder, or choose another"
COPY = "copy or download it again"
DAMAGED = ("the image is damaged or cut off", COPY)
NO_IMAGE = "not an image that can be read here; known are .png, .jpg"
CHECKPOINT = "can't be resumed, lacking ema_state_dict, optimizer, scheduler"


def data_cases():
    refused = {  # sets that nothing can be done with
        "Gone": ("data/Gone: no such folder", "put the originals into"),
        "Empty": ("data/Empty: no image is in it", "put the originals into"),
        "Folder": ("data/Folder: no image is in it", "put the originals into"),
        "File": ("data/File: is a file, not a folder", "put the originals into"),
        "NoBytes": ("data/NoBytes/GT/b.png: the file is empty", COPY),
        "Zeros": ("data/Zeros/GT/b.png", NO_IMAGE),
        "Text": ("data/Text/GT/b.png", NO_IMAGE),
        "Start": ("data/Start/GT/b.png", NO_IMAGE),
        "Cut": ("data/Cut/GT/b.png", *DAMAGED),
        "Changed": ("data/Changed/GT/b.png", *DAMAGED),
        "CutLR": ("data/CutLR/LRbicx2/a.png", *DAMAGED),
        "OnePixel": ("data/OnePixel/GT/b.png: smaller than 2 pixels, the upscale_factor; remove it",),
        "Unpaired": ("data/Unpaired/GT/b.png: has no partner in", "LRbicx2", "2 originals and 1 LR", "add it, or move"),
        "WrongSize": ("data/WrongSize/LRbicx2/a.png: lr is 21x20, but gt 44x40 at x2 needs 22x20", "put the right one there, or"),
        "Twins": ("data/Twins/GT/a.png: has the same name as", "a.jpg; rename one"),
        "Huge": ("data/Huge/GT/b.png: more than 110,000,000 pixels; cut it into parts",),
        "Locked": ("data/Locked/GT/b.png", PERMISSION),
        "LockedFolder": ("data/LockedFolder/GT", PERMISSION),
    }
    for name, says in refused.items():
        locked = name.startswith("Locked")
        yield Case("train.py", trained(train_set=name), says, other_user=locked)
        yield Case("train.py", trained(valid_sets=("Good", name)), says, other_user=locked)
        yield Case("test.py", [*TEST, "Good", name] if name != "Gone" else [*TEST, name], says, other_user=locked)
    smaller = "data/Small/GT/b.png: 14x14 is smaller than a GT patch of 16, as are 1 of 2 images: set a smaller lr_patch_size, or small"
    unscored = "data/Small/GT/b.png: 14x14 is too small to be scored", "SSIM's window needs 15; remove it"
    incomplete = "data/Set5: 1 images, but Set5 has 5; complete it, or rename the folder"
    yield Case("train.py", trained(train_set="Small"), (smaller,))
    for says, name in ((unscored, "Small"), ((incomplete,), "Set5")):
        yield Case("train.py", trained(valid_sets=(name,)), says)
        yield Case("test.py", [*TEST, name], says)
    yield Case("test.py", [*TEST, "Good", "../data/Good"], ("data/../data/Good: another set is called 'Good' too; rename one folder",))
    for name in ("NoBytes", "Zeros", "Text", "Start", "Cut", "Changed", "Huge", "Locked"):
        says = refused[name][1:] if name not in ("NoBytes", "Huge") else refused[name]
        says = {
            "Cut": ("the picture is damaged, cut off or of an unknown kind", "open and save it anew"),
            "Changed": ("the picture is damaged, cut off or of an unknown kind", "open and save it anew"),
        }.get(name, ("not a picture that can be read here; known are .png",) if says == (NO_IMAGE,) else says)
        file = f"data/{name}/GT/b.png"
        yield Case("inference.py", [*UPSCALE, file], (file, *says), other_user=name == "Locked")
    for path, says in {
        "gone.png": ("gone.png: no such file or folder; give a picture or a folder of pictures with --input",),
        "data/Empty": ("data/Empty: no picture in it; known endings are .png",),
        "data/Folder/GT/b.png": ("data/Folder/GT/b.png: no picture in it; known endings are .png",),
        "data/File": ("data/File: not a picture that can be read here; known are .png",),
    }.items():
        yield Case("inference.py", [*UPSCALE, path], says)
    yield Case("inference.py", [*UPSCALE, "data/LockedFolder"], ("data/LockedFolder/GT", PERMISSION), other_user=True)


def weights_cases():
    unreadable = {
        "gone.pth": ("no such weights; train them with train.py, or give the path",),
        "folder.pth": ("is a folder, where a file of weights is needed; give the path of a file",),
        "empty.pth": ("it is empty", COPY),
        "text.pth": ("it is no file of PyTorch", COPY),
        "zeros.pth": ("it is no file of PyTorch", COPY),
        "page.pth": ("it is a web page", "download it with one"),
        "half.pth": ("it is damaged or cut off", COPY),
        "changed.pth": ("it is damaged or cut off", COPY),
        "half.safetensors": ("it is no whole safetensors file", COPY),
        "code.pth": ("it holds code or objects beside the weights, as", "system; save a state_dict of tensors alone"),
        "code.pkl": ("it is a pickle of another program, which may hold code; save a state_dict with torch.save",),
        "module.pth": ("it holds code or objects beside the weights, as model.RCAN; save a state_dict of tensors alone",),
        "locked.pth": (PERMISSION,),
    }
    other = {
        "list.pth": ("holds no RCAN of a known layout", "but list; the README lists"),
        "nothing.pth": ("holds no RCAN of a known layout", "but nothing; the README lists"),
        "vgg.pth": ("holds no RCAN of a known layout", "but features.0.weight; the README lists"),
        "several.pth": ("holds several networks, one, other; save the state_dict of one",),
        "nan.pth": ("conv1.weight is not finite; take another file",),
        "lacks.pth": ("missing conv1.bias; take another file",),
        "shape.pth": ("conv1.bias is (9,), not (8,); take another file",),
        "integers.pth": ("conv1.bias is int8, not dense floating point; take another file",),
    }
    for name, says in {**unreadable, **other}.items():
        path, locked = f"weights/{name}", name == "locked.pth"
        yield Case("test.py", ["--model_path", path, "--test_sets", "Good"], (path, *says), other_user=locked)
        yield Case("inference.py", ["--model_path", path, "--input", "data/Good/GT/a.png"], (path, *says), other_user=locked)
        yield Case("train.py", trained("--pretrained_model_path", path), (path, *says), other_user=locked)
        resumed = says if name in unreadable else ("can't be resumed, lacking", "to start from its weights, set pretrained_model_path")
        if name != "nan.pth":  # but nan.pth.tar, below
            yield Case("train.py", trained("--resume", path), (path, *resumed), other_user=locked)
    wide = "channels is 16 in the file, 8 in the network; set these as in the file, or take other weights"
    yield Case("train.py", trained("--pretrained_model_path", "weights/wide.pth"), ("weights/wide.pth", wide))
    both = ["--model_path", "weights/good.pth", "weights/../weights/good.pth"]
    yield Case("test.py", [*both, "--test_sets", "Good"], ("model_path=", "would be filed under one name (good, good); rename one"))
    yield Case("train.py", trained("--resume", "weights/good.pth"), ("weights/good.pth", CHECKPOINT))
    yield from checkpoint_cases()
    composite = ["--preset", "light_perceptual", "--train_sets", "Good", "--valid_sets", "Good", "--lr_patch_size", 8]
    for name, says in {
        "gone.pth": ("vgg19_weights_path='weights/gone.pth': no such file; put vgg19-",),
        "folder.pth": ("vgg19_weights_path='weights/folder.pth': no such file; put vgg19-",),
        "text.pth": ("weights/text.pth: can't be read safely as weights", "put vgg19-"),
        "code.pth": ("weights/code.pth: can't be read safely as weights", "put vgg19-"),
        "good.pth": ("weights/good.pth: these are not VGG19's weights, 32 are absent", "put vgg19-"),
    }.items():
        yield Case("train_improved.py", [*composite, "--vgg19_weights_path", f"weights/{name}"], says)


def checkpoint_cases():
    """Going on from a run: runs/done, which is at x2, after one epoch of one update."""
    done, settings = "runs/done/last.pth.tar", "the run was started with other settings"
    back = "set them back, or set another exp_name"
    resumed = ["--resume", done]
    yield Case("train.py", trained(*resumed, scale=4), (done, settings, "upscale_factor was 2, is 4", back))
    yield Case("train.py", trained(*resumed, "--channels", 16), (done, settings, "channels was 8, is 16", back))
    yield Case("train.py", trained(*resumed, "--seed", 5), (done, settings, "seed was 0, is 5", back))
    cosine = trained(*resumed, "--schedule", "cosine", "--epochs", 4)
    yield Case("train.py", cosine, (done, settings, "epochs was 1, is 4; schedule was 'step', is 'cosine'", back))
    late = ["--start_epoch", 3, "--epochs", 9]
    yield Case("train.py", trained(*resumed, *late), (f"start_epoch=3, but {done} stopped in epoch 1: set start_epoch=0",))
    nowhere = "start_epoch=3, but there is no results/new/last.pth.tar to go on from: set start_epoch=0"
    yield Case("train.py", trained(*late), (nowhere,))
    own = ["--results_dir", "runs", "--exp_name", "done"]
    yield Case("train.py", trained(*own, "--resume", "never"), ("resume='never'", done, "set resume='auto' to go on with it, or another"))
    yield Case("train.py", trained(*own, "--resume", "weights/good.pth"), ("resume='weights/good.pth'", done, "set resume='auto'"))
    half = "weights/half.pth.tar"
    anew = "bring a copy back, or set another exp_name to start anew"
    yield Case("train.py", trained("--resume", half), (half, "it is damaged or cut off", COPY, anew))
    damaged = "damaged/new/last.pth.tar"
    yield Case("train.py", trained("--results_dir", "damaged"), (damaged, "it is damaged or cut off", anew))
    for run, file in (("folder", "last.pth.tar"), ("folder2", "log.jsonl")):
        folder = f"runs/{run}/{file}: is a folder, where a file of the run belongs; rename it, or set another exp_name"
        yield Case("train.py", trained("--results_dir", "runs", "--exp_name", run), (folder,))
    nan = "weights/nan.pth.tar", "state_dict.conv1.bias in it is not finite", anew
    yield Case("train.py", trained("--resume", nan[0], "--epochs", 2), nan)
    images = "the training images have changed since the run was started", "bring the old ones back, or set another exp_name"
    yield Case("train.py", trained("--resume", "weights/other_images.pth.tar", "--cache_dir", "cache_of_done"), images)


def output_cases():
    upscale = [*UPSCALE[:2], "--input", "data/Good/GT/a.png", "--output"]
    file = "a part of this path is a file, where a folder is needed; rename that file, or choose another folder"
    yield Case("train.py", trained("--results_dir", "file"), ("file/new", file))
    yield Case("train.py", trained("--results_dir", "file/deeper"), ("file/deeper/new", file))
    yield Case("train.py", trained("--results_dir", "read_only"), ("read_only/new", PERMISSION), other_user=True)
    yield Case("train.py", trained("--cache_dir", "file"), ("file: is there already, and is no folder; rename it, or choose another",))
    yield Case("train.py", trained("--cache_dir", "file/deeper"), ("file/deeper", file))
    yield Case("train.py", trained("--cache_dir", "read_only"), ("read_only/", PERMISSION), other_user=True)
    locked = "runs/lock/.lock: is a folder, where a file is needed"
    yield Case("train.py", trained("--results_dir", "runs", "--exp_name", "lock"), (locked, "give a file's path"))
    long, too_long = "n" * 300, ("nnnn", "the name is too long; choose a shorter one")
    yield Case("train.py", trained("--exp_name", long), too_long)
    for more in ([], ["--save_images", "False"]):
        tested = [*TEST, "Good", *more, "--results_dir"]
        yield Case("test.py", [*tested, "file"], ("file/good/test", file))
        yield Case("test.py", [*tested, "file/deeper"], ("file/deeper/good/test", file))
        yield Case("test.py", [*tested, "read_only"], ("read_only/good", PERMISSION), other_user=True)
    yield Case("test.py", [*TEST, "Good", "--exp_name", long], too_long)
    taken = "is there already, and is no folder; rename it, or choose another folder"
    yield Case("inference.py", [*upscale, "file"], ("file", taken))
    yield Case("inference.py", [*upscale, "file/deeper"], ("file/deeper", file))
    yield Case("inference.py", [*upscale, "read_only"], ("read_only: ", PERMISSION), other_user=True)
    yield Case("inference.py", [*upscale, long], too_long)
    yield Case("inference.py", [*upscale, "taken"], ("taken/a.png: is a folder, where a file is needed",))
    overwritten = "data/Good/GT/a.png: would be overwritten by the upscaled a.png: choose another --output"
    yield Case("inference.py", [*upscale, "data/Good/GT"], (overwritten,))


def settings_cases():
    """Contradictions, and slips of the command line, which ends with 2 and shows what is right."""
    plain, composite = trained(), ["--preset", "light_perceptual", "--train_sets", "Good", "--valid_sets", "Good"]
    photo = [*UPSCALE, "data/Good/GT/a.png"]
    for script, arguments, says in (
        ("train.py", [*plain, "--upscale_factor", 4], ("model_arch_name='rcan_x2' contradicts upscale_factor=4: set",)),
        ("train.py", [*plain, "--attention", "cbam"], ("attention='cbam' contradicts model_arch_name='rcan_x2': set attention=None",)),
        ("train.py", [*plain, "--initial_spatial_gate", 0.9], ("initial_spatial_gate=0.9 contradicts model_arch_name='rcan_x2'", "set")),
        ("train.py", [*plain, "--accumulation_steps", 3], ("accumulation_steps=3 contradicts batch_size=2", "set a divisor")),
        ("train.py", [*plain, "--accumulation_steps", 0], ("accumulation_steps=0 must be at least 1",)),
        ("train.py", [*plain, "--start_epoch", 7], ("start_epoch=7 is not before the end, epochs=1: raise epochs",)),
        ("train.py", [*plain, "--epochs", 9, "--start_epoch", 2, "--resume", "never"], ("start_epoch=2 contradicts resume='never': set",)),
        ("train.py", [*plain, "--valid_sets", "Good", "Good"], ("valid_sets=('Good', 'Good') names a set twice",)),
        ("train.py", [*plain, "--skip_threshold", 0.5], ("skip_threshold=0.5 would skip ordinary updates: set it to 0, or above 1",)),
        ("train.py", [*plain, "--epochs", 2**62, "--steps_per_epoch", 9], ("epochs=4611686018427387904", "lower epochs")),
        ("train.py", [*plain, "--resume", ""], ("resume='' must be 'auto', 'never', or the path of a checkpoint",)),
        ("train.py", [*plain, "--batchsize", 4], ("--batchsize", "--batch_size")),
        ("train.py", ["stray", *plain], ("Unrecognized options: stray",)),
        ("train_improved.py", [*composite, "--preset", "sharp"], ("'sharp'", "'light_perceptual'")),
        ("train_improved.py", [*composite, "--lr_patch_size", 5], ("lr_patch_size=5", "needs 32: set lr_patch_size to at least 8")),
        ("train_improved.py", [*composite, "--lr_patch_size", 3, "--adversarial_weight", 0], ("needs 16: set lr_patch_size to at least",)),
        ("train_improved.py", [*composite, "--lr_patch_size", 8, "--batch_size", 1], ("batch_size=1 contradicts adversarial_weight=", "2")),
        ("train_improved.py", [*composite, "--perceptual_layers"], ("contradicts perceptual_layers=(): name a layer, or set",)),
        ("train_improved.py", [*composite, "--perceptual_layers", "relu5_4", "relu5_4"], ("names a layer twice: name each once",)),
        (
            "train_improved.py",
            [*composite, "--l1_weight", 0, "--perceptual_weight", 0, "--adversarial_weight", 0],
            ("l1_weight, perceptual_weight and adversarial_weight are all 0, so that nothing is trained: raise one",),
        ),
        ("test.py", [*TEST, "Good", "--self_ensemble", "perhaps"], ("--self_ensemble", "'True', 'False'")),
        ("test.py", [*TEST, "Good", "--degradation", "JPEG"], ("--degradation", "'BI', 'BD', 'DN'")),
        ("inference.py", [*photo, "--tile", 64], ("tile=64 must be 0, or more than twice tile_overlap=32, as in --tile 256",)),
        ("inference.py", [*photo, "--tile", -1], ("tile=-1 must be 0, or more than twice",)),
        ("inference.py", [*photo, "--outscale", "nan"], ("outscale=nan must be greater than 0 and at most 64",)),
        ("inference.py", [*photo, "--quality", 101], ("quality=101 must be 1 to 100",)),
        ("inference.py", [*photo, "--output_format", "gif"], ("--output_format", "'webp'")),
        ("inference.py", UPSCALE[:-1], ("--input", "required")),
    ):
        yield Case(script, arguments, says, code=2)
    leave = "leave mode at None, or run another script"
    yield Case("train.py", [*plain, "--mode", "test"], ("mode='test' contradicts this script, which can only train", leave))
    yield Case("train_improved.py", [*composite, "--mode", "valid"], ("mode='valid' contradicts this script, which can only train", leave))
    yield Case("test.py", [*TEST, "Good", "--mode", "train"], ("mode='train' contradicts this script, which can only test", leave))
    own = "use_composite_loss=True contradicts train.py", "set it to False or run train_improved.py"
    yield Case("train.py", [*plain, "--use_composite_loss", "True"], own)
    yield Case("train.py", [*plain, "--train_sets"], ("train_sets is empty: name at least one, as in --train_sets",))
    yield Case("test.py", TEST, ("test_sets is empty: name at least one, as in --test_sets Set5 Set14",))
    layer = "'conv9_9'] can't be used; known are conv1_1"
    yield Case("train_improved.py", [*composite, "--lr_patch_size", 8, "--perceptual_layers", "conv9_9"], (layer,))


CASES = [*data_cases(), *weights_cases(), *output_cases(), *settings_cases()]


def as_parameter(case):
    words = [str(word)[:40] for word in case.arguments]
    start = len(network_options()) + len(SHORT) if words[:1] == ["--model_arch_name"] else 0
    return pytest.param(case, id=" ".join([case.script, *words[start:]]))


@pytest.mark.parametrize("case", [as_parameter(case) for case in CASES])
def test_a_mistake_is_one_sentence_and_changes_nothing(place, ended, case):
    before = snapshot(place)
    code, out, err = ended(case.script, case.arguments, place, case.other_user)
    after = snapshot(place)
    remove(place, after.keys() - before.keys())
    assert after == before
    assert code == case.code
    assert "Traceback" not in out + err
    said = " ".join(err.replace("│", " ").split())
    if code == 1:
        assert [line for line in err.splitlines() if line.startswith("error")] == err.strip().splitlines()[-1:]
        said = err.strip().splitlines()[-1]
        assert said.count("error: ") == 1
    for part in case.says:
        assert part in said


def test_the_table_is_large_and_knows_every_script():
    assert len(CASES) >= 80
    assert len({(case.script, *map(str, case.arguments)) for case in CASES}) == len(CASES)
    assert {case.script for case in CASES} == MAIN.keys()
    assert all(part for case in CASES for part in case.says)


def test_what_is_right_is_not_refused(place, ended, tmp_path):
    """The same arguments, without a mistake: the cases above fail for what they say, and not for something else."""
    for script, arguments in (
        ("train.py", trained("--results_dir", tmp_path, "--cache_dir", tmp_path / "cache")),
        ("test.py", [*TEST, "Good", "--results_dir", tmp_path]),
        ("inference.py", [*UPSCALE[:2], "--input", "data/Good/GT/a.png", "--output", tmp_path]),
    ):
        before = snapshot(place)
        code, _, err = ended(script, arguments, place)
        assert code == 0, err
        assert snapshot(place) == before
    assert not (place / "code_was_run").exists()


# A disk that is full


@contextlib.contextmanager
def full_disk(folder):
    """A disk of its own without room, where this process may have one."""
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not mount or os.name == "nt" or subprocess.run([mount, *options], capture_output=True).returncode:
        folder.rmdir()
        pytest.skip("no permission to mount a small disk")
    try:
        with contextlib.suppress(OSError), open(folder / "filling", "wb", buffering=0) as filling:
            while True:
                filling.write(bytes(4096))
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


ROOM = "there is no room left on its disk; make room, or choose a folder on another one"


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("train.py", trained("--results_dir", "disk"), ("disk/new", ROOM)),
        ("train.py", trained("--cache_dir", "disk"), ("disk: the decoded images need", "make room, or set cache_dir to another disk")),
        ("test.py", [*TEST, "Good", "--results_dir", "disk"], ("disk/good/test: ", ROOM)),
        (
            "test.py",
            [*TEST, "Good", "--save_images", "False", "--results_dir", "disk/deeper"],
            ("disk/deeper/good/test: ", ROOM),
        ),
        ("inference.py", [*UPSCALE[:2], "--input", "data/Good/GT/a.png", "--output", "disk/deeper"], ("disk/deeper: ", ROOM)),
    ],
    ids=["results of training", "cache", "pictures of test", "scores of test", "upscaled"],
)
def test_a_full_disk_is_said_and_nothing_is_left(place, ended, script, arguments, says):
    with full_disk(place / "disk") as disk:
        try:
            before = snapshot(place)
            code, _, err = ended(script, arguments, place)
            after = snapshot(place)
        finally:
            os.chdir(REPOSITORY)  # off the disk
        assert disk.is_dir()
    (place / "disk").rmdir()
    assert code == 1
    last_line = err.strip().splitlines()[-1]
    assert last_line.startswith("error: ")
    for part in says:
        assert part in last_line
    assert after == before


def test_a_disk_that_fills_up_while_scores_are_written_keeps_the_old_ones(place, ended, tmp_path, monkeypatch):
    arguments = [*TEST, "Good", "--save_images", "False", "--results_dir", tmp_path]
    assert ended("test.py", arguments, place)[0] == 0
    before = snapshot(tmp_path)

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    code, _, err = ended("test.py", arguments, place)
    assert code == 1
    assert err.strip().splitlines()[-1] == f"error: {tmp_path}/good/test/metrics.json: {ROOM}"
    assert snapshot(tmp_path) == before


# Every setting

OWN = {  # lines of config_improved.py
    "preset", "model_arch_name", "attention", "initial_spatial_gate", "perceptual_layers", "vgg19_weights_path", "adversarial_loss",
    "discriminator_channels", "discriminator_learning_rate",
}  # fmt: skip
KINDS = [(kind, field.name, get_type_hints(kind)[field.name]) for kind in (Config, ImprovedConfig) for field in dataclasses.fields(kind)]
EVERY_FIELD = [pytest.param(*member, id=f"{member[0].__name__}.{member[1]}") for member in KINDS]

WRONG_TYPES = {  # in the edited file
    int: ("5", 5.0, True, None, (5,)),
    float: ("0.5", True, None, (0.5,), 1j),
    bool: (1, "True", None),
    str: (5, None, ("a",), b"a", Path("a")),
    int | None: ("5", 5.0, False, (5,)),
    float | None: ("0.5", True, (0.5,)),
    tuple[str, ...]: ("Set5", ["Set5"], None, (5,), ("Set5", None)),
    tuple[float, float]: (0.9, (0.9,), (0.9, 0.99, 0.999), [0.9, 0.999], ("0.9", "0.999"), None),
    str | tuple[str, ...]: (5, None, ["w.pth"], (5,), b"w.pth"),
}
UNREADABLE_WORDS = {  # on the command line; a word is right for any str, but for one that no path can hold
    int: ["five"],
    float: ["half"],
    bool: ["perhaps"],
    str: [],
    int | None: ["five"],
    float | None: ["half"],
    tuple[str, ...]: ["a\0b"],
    tuple[float, float]: ["0.9", "half"],
    str | tuple[str, ...]: ["a\0b"],
}


def is_choice(hint):
    return any(get_origin(part) is Literal for part in (hint, *get_args(hint)))


def choices(hint):
    return [value for part in (hint, *get_args(hint)) if get_origin(part) is Literal for value in get_args(part)]


@pytest.mark.parametrize(("kind", "name", "hint"), EVERY_FIELD)
def test_another_type_in_the_file_is_refused_with_the_files_name(kind, name, hint):
    wrong = (0, -1, 5.5, "nonsense", "", ("cbam",), True) if is_choice(hint) else WRONG_TYPES[hint]
    file = "config_improved.py" if kind is ImprovedConfig and name in OWN else "config.py"
    for value in wrong:
        with pytest.raises(ValueError, match="must be") as error:
            kind(**{name: value})
        said = str(error.value)
        assert said.startswith(f"{name}={value!r} must be ")
        assert said.endswith(f"; correct its line in {file}")
        for choice in choices(hint):
            assert repr(choice) in said


@pytest.mark.parametrize(("kind", "name", "hint"), EVERY_FIELD)
def test_another_type_on_the_command_line_is_refused_with_the_options_name(kind, name, hint, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    words = ["nonsense"] if is_choice(hint) else UNREADABLE_WORDS[hint]
    with pytest.raises(SystemExit) as end:
        parse(Config, "train", [f"--{name}", *words]) if kind is Config else parse_improved([f"--{name}", *words])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert name in said
    for word in words[-1:]:
        assert word.replace("\0", "\\x00") in said
    for choice in choices(hint):
        assert str(choice) in said


ZERO_IS_RIGHT = {  # as the comment on the line, or the loop, says
    "seed", "start_epoch", "num_workers", "warmup_updates", "clip_grad_norm", "skip_threshold", "save_every_minutes", "keep_last",
    "l1_weight", "perceptual_weight", "adversarial_weight", "ema_decay", "adam_betas",
}  # fmt: skip
NUMBERS = [member for member in KINDS if member[2] in (int, float, int | None, float | None, tuple[float, float])]


HUGE = {"2 to the 63": 2**63, "400 digits": 10**400, "minus 5000 digits": -(10**5000)}
MEANINGLESS = [pytest.param(value, id=name) for name, value in HUGE.items()] + [-1, 0, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", MEANINGLESS)
@pytest.mark.parametrize(("kind", "name", "hint"), [pytest.param(*member, id=f"{member[0].__name__}.{member[1]}") for member in NUMBERS])
def test_a_number_that_means_nothing_is_refused(kind, name, hint, value):
    both = [(value, 0.5), (0.5, value)] if hint == tuple[float, float] else [value]
    for given in both:
        if value == 0 and name in ZERO_IS_RIGHT:
            assert getattr(kind(**{name: given}), name) == given
            continue
        with pytest.raises(ValueError, match=r"must be|must lie") as error:
            kind(**{name: given})
        assert str(error.value).startswith(f"{name}=")
        if -(2**64) < value < 2**64 or value != value:
            assert str(error.value).startswith(f"{name}={given} ")


def test_numbers_are_all_known():
    """A new number needs a decision on whether 0 is one of its values."""
    assert {name for _, name, _ in NUMBERS} > ZERO_IS_RIGHT
    assert {hint for _, _, hint in KINDS if not is_choice(hint)} == WRONG_TYPES.keys() == UNREADABLE_WORDS.keys()
    own = {field.name for field in dataclasses.fields(ImprovedConfig)} - {field.name for field in dataclasses.fields(Config)}
    assert own < OWN


BAD_NAMES = {"a\0b": "must not hold a null character", "\ud800": "must be UTF-8", "caf\udce9": "must be UTF-8"}


@pytest.mark.parametrize(("name", "says"), BAD_NAMES.items(), ids=["null", "surrogate", "latin-1"])
def test_what_can_be_no_name_is_refused(name, says):
    for kind, field, hint in KINDS:
        values = {str: [name], tuple[str, ...]: [("a", name)], str | tuple[str, ...]: [name, ("a", name)]}.get(hint, [])
        for value in values:
            with pytest.raises(ValueError, match=f"^{field}=.* {says}"):
                kind(**{field: value})


def test_a_picture_whose_name_is_no_text_is_refused(tmp_path):
    """Python writes a byte that is no UTF-8, as old archives have them, as half a character, which no report can hold."""
    write_set(tmp_path / "Set", [(40, 44)])
    try:
        (tmp_path / "Set" / "GT" / "a.png").rename(tmp_path / "Set" / "GT" / "caf\udce9.png")
    except (OSError, UnicodeError):
        pytest.skip("names are UTF-8 on this disk")
    with pytest.raises(ValueError, match=r"caf\\udce9\.png': the name is not UTF-8, .* rename it"):
        scoring.dataset.find_pairs(tmp_path / "Set", 2)


# What shows a traceback


def test_debug_shows_the_traceback_of_a_mistake(place, ended):
    with pytest.raises(FileNotFoundError, match="data/Gone: no such folder"):
        ended("test.py", ["--debug", *TEST, "Gone"], place)
    assert "--debug" not in sys.argv
    code, _, err = ended("test.py", [*TEST, "Gone"], place)
    assert code == 1
    assert "data/Gone: no such folder" in err


@pytest.mark.parametrize(
    "mistake",
    [lambda: np.zeros(3).reshape(2, 2), lambda: torch.zeros(3) + torch.zeros(2), lambda: {}["key"], lambda: 1 / 0, lambda: int("x")],
    ids=["numpy", "torch", "key", "division", "int"],
)
def test_a_mistake_of_ours_is_never_made_a_sentence(place, ended, monkeypatch, mistake):
    monkeypatch.setattr(scoring, "find_sets", lambda _config: mistake())
    with pytest.raises((ValueError, RuntimeError, KeyError, ZeroDivisionError)):
        ended("test.py", [*TEST, "Good"], place)


def test_a_failed_assertion_of_ours_is_never_made_a_sentence(place, ended, monkeypatch):
    def wrong(_config):
        raise AssertionError("ours")

    monkeypatch.setattr(scoring, "find_sets", wrong)
    with pytest.raises(AssertionError, match="ours"):
        ended("test.py", [*TEST, "Good"], place)


def command(script, arguments, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, str(REPOSITORY / script), *map(str, arguments)]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "code", "last_line"),
    [
        ("train.py", trained(valid_sets=("Cut",)), 1, "error: {place}/data/Cut/GT/b.png: the image is damaged or cut off"),
        ("inference.py", [*UPSCALE, "data/NoBytes/GT/b.png"], 1, "error: data/NoBytes/GT/b.png: the file is empty; copy or download"),
        ("test.py", ["--debug", *TEST, "Gone"], 1, "FileNotFoundError: {place}/data/Gone: no such folder"),
    ],
    ids=["training", "inference", "debug"],
)
def test_the_commands_end_likewise(place, script, arguments, code, last_line):
    before = snapshot(place)
    done = command(script, arguments, place)
    assert done.returncode == code
    assert done.stderr.strip().splitlines()[-1].startswith(last_line.format(place=place))
    assert ("Traceback" in done.stderr) == ("--debug" in arguments)
    assert snapshot(place) == before

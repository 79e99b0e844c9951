"""As a user: train.py, test.py and inference.py as commands on small images, and runs that are told to stop."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pytest import approx

import image_files
import imgproc
import weights
from helpers import REPOSITORY, write_set
from runtime import STOPPED, StopRequest

pytestmark = pytest.mark.slow
signals = pytest.mark.skipif(sys.platform == "win32", reason="signals")
SMALL = ["--channels", "8", "--reduction", "4", "--num_rg", "1", "--num_rcab", "2"]
ENDLESS = ("--epochs", "10000", "--num_workers", "2")


def started(command, folder, **environment):
    """A program in a process group of its own."""
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def command(script, *arguments, cwd):
    """Run a script of this repository as a person would; what it prints."""
    process = started([sys.executable, REPOSITORY / script, *arguments], cwd)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def train_arguments(scale, *more):
    return [
        "--model_arch_name", f"rcan_x{scale}", "--upscale_factor", scale, "--exp_name", "run", *SMALL, "--train_sets", "Train",
        "--valid_sets", "Valid", "--epochs", 2, "--steps_per_epoch", 10, "--batch_size", 4, "--lr_patch_size", 8, "--learning_rate", 1e-3,
        "--log_every", 5, "--eval_every", 10, "--save_every", 10, "--num_workers", 1, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which train.py has trained a run at x3."""
    folder = tmp_path_factory.mktemp("place")
    write_set(folder / "data" / "Train", [(40, 50), (64, 37)])
    write_set(folder / "data" / "Valid", [(45, 50), (97, 131)], seed=5)
    assert str(folder / "results" / "run") in command("train.py", *train_arguments(3), cwd=folder)
    assert weights.read(folder / "results/run/last.pth.tar")["update"] == 20
    return folder


def test_from_training_to_the_same_score_and_the_same_image(place, tmp_path):
    before = (place / "results/run/last.pth.tar").stat().st_mtime_ns
    command("train.py", *train_arguments(3), cwd=place)  # has nothing to do
    assert (place / "results/run/last.pth.tar").stat().st_mtime_ns == before
    # no word about the network's size: the file alone tells it
    command("test.py", "--model_path", "results/run/best.pth.tar", "--test_sets", "Valid", cwd=place)
    metrics = json.loads((place / "results/run/test/metrics.json").read_text())
    assert metrics["Valid"]["psnr"] == approx(weights.read(place / "results/run/best.pth.tar")["best_psnr"], abs=1e-6)
    gt = imgproc.crop_to_multiple(image_files.read_image(place / "data/Valid/GT/a.png"), 3)
    image_files.write_image(tmp_path / "a.png", imgproc.degrade(gt, 3))
    command(
        "inference.py",
        "--model_path",
        place / "results/run/best.pth.tar",
        "--input",
        "a.png",
        "--output",
        "out",
        "--precision",
        "fp32",
        cwd=tmp_path,
    )
    tested = image_files.read_image(place / "results/run/test/Valid/a.png")
    assert (image_files.read_image(tmp_path / "out/a.png") == tested).all()


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_other_scales_train_and_test(tmp_path, scale):
    write_set(tmp_path / "data" / "Train", [(97, 131)])
    write_set(tmp_path / "data" / "Valid", [(97, 131)], seed=5)
    arguments = ["--epochs", "1", "--steps_per_epoch", "2", "--batch_size", "2", "--model_arch_name", f"rcan_cbam_x{scale}"]
    command("train.py", *train_arguments(scale, *arguments), cwd=tmp_path)
    command("test.py", "--model_path", "results/run/best.pth.tar", "--test_sets", "Valid", cwd=tmp_path)
    expected = (97 // scale * scale, 131 // scale * scale, 3)
    assert image_files.read_image(tmp_path / "results/run/test/Valid/a.png").shape == expected


def test_improved_training_from_plain_weights_to_a_score(place):
    """Each light preset, the second from the first's weights, and a second time."""
    common = [*SMALL, "--model_arch_name", "rcan_light_cbam_x3", "--upscale_factor", 3, "--train_sets", "Train", "--valid_sets", "Valid"]
    common += ["--batch_size", 2, "--lr_patch_size", 11, "--steps_per_epoch", 4, "--eval_every", 4, "--log_every", 2, "--num_workers", 0]
    command("train_improved.py", "--preset", "light", *common, "--pretrained_model_path", "results/run/best.pth.tar", cwd=place)
    folder, size = place / "results/rcan_light_cbam_x3_light_c8_r4_g1_b2", "_c8_r4_g1_b2"
    found = weights.read(folder / "best.pth.tar")
    assert found["best_metric"] == "psnr"
    assert "discriminator_state_dict" not in found
    terms = ["--vgg19_weights_path", "random", "--perceptual_layers", "conv2_1", "--discriminator_channels", 4]
    composite = ["--preset", "light_perceptual", *common, *terms, "--pretrained_model_path", folder / "best.pth.tar"]
    perceptual = folder.with_name(f"{folder.name.removesuffix(size)}_perceptual{size}")
    for _ in range(2):
        command("train_improved.py", *composite, cwd=place)
        found = weights.read(perceptual / "best.pth.tar")
        assert (found["update"], found["best_metric"]) == (4, "newest")
    command("test.py", "--model_path", perceptual / "best.pth.tar", "--test_sets", "Valid", cwd=place)
    metrics = json.loads((perceptual / "test/metrics.json").read_text())
    assert metrics["Valid"]["psnr"] == approx(found["best_psnr"], abs=1e-6)


# Told to stop


def wait_for_log(log, lines=3):
    for _ in range(900):
        if log.is_file() and len(log.read_text().splitlines()) >= lines:
            return
        time.sleep(0.1)
    raise AssertionError(f"{log}: no {lines} lines after 90 s")


def endless(place, folder, *more):
    arguments = train_arguments(3, *ENDLESS, "--data_root", place / "data", "--cache_dir", place / ".cache", *more)
    return started([sys.executable, REPOSITORY / "train.py", *arguments], folder)


@signals
@pytest.mark.parametrize(("name", "everybody"), [("SIGTERM", True), ("SIGINT", True), ("SIGHUP", True), ("SIGUSR1", False)])
def test_a_run_that_is_told_to_stop_saves_itself(place, tmp_path, name, everybody):
    """The signal reaches the whole group, workers too, as from a terminal, torchrun and timeout; or the training alone."""
    process = endless(place, tmp_path)
    wait_for_log(tmp_path / "results/run/log.jsonl")
    (os.killpg if everybody else os.kill)(process.pid, getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == STOPPED == 75
    assert "Traceback" not in err
    assert weights.read(tmp_path / "results/run/last.pth.tar")["update"] > 0
    assert not (tmp_path / "results/run/.lock").exists()


@signals
def test_a_closed_terminal_stops_a_run_which_saves_itself(place, tmp_path):
    """The terminal goes away with its end of the line, so that nothing can be printed any more."""
    import pty

    ours, theirs = pty.openpty()
    arguments = train_arguments(3, *ENDLESS, "--data_root", place / "data", "--cache_dir", place / ".cache")
    command = [sys.executable, str(REPOSITORY / "train.py"), *map(str, arguments)]
    process = subprocess.Popen(command, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    threading.Thread(target=drain, args=(ours,), daemon=True).start()
    wait_for_log(tmp_path / "results/run/log.jsonl")
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == STOPPED
    assert weights.read(tmp_path / "results/run/last.pth.tar")["update"] > 0


def drain(terminal):
    with contextlib.suppress(OSError):
        while os.read(terminal, 2**16):
            pass


@signals
def test_little_shared_memory_means_fewer_workers_and_not_a_hang(place, tmp_path):
    """As in Docker, whose /dev/shm has 64 MB: here 2 MB, and batches of 0.3 MB."""
    unshare = shutil.which("unshare")
    mount = "mount -t tmpfs -o size=2m tmpfs /dev/shm"
    if not unshare or subprocess.run([unshare, "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no permission to mount a small /dev/shm")
    more = ["--batch_size", 64, "--lr_patch_size", 12, "--num_workers", 8, "--epochs", 1, "--steps_per_epoch", 4]
    arguments = train_arguments(3, *more, "--data_root", place / "data", "--cache_dir", place / ".cache")
    script = f"{mount} && exec {shlex.join([sys.executable, str(REPOSITORY / 'train.py'), *map(str, arguments)])}"
    done = subprocess.run([unshare, "-m", "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "/dev/shm" in done.stdout
    assert weights.read(tmp_path / "results/run/last.pth.tar")["update"] == 4


@signals
def test_a_second_signal_leaves_a_training_as_its_last_checkpoint(place, tmp_path):
    """An update of seconds, in which both signals come: the run ends without finishing it."""
    slow = ["--channels", 64, "--num_rg", 10, "--num_rcab", 20, "--batch_size", 64, "--accumulation_steps", 64]
    slow += ["--num_workers", 0, "--precision", "fp32"]
    process = endless(place, tmp_path, *slow, "--save_every", 1, "--log_every", 1)
    while not (tmp_path / "results/run/last.pth.tar").exists() and process.poll() is None:
        time.sleep(0.1)
    time.sleep(0.5)  # the next update has begun
    process.send_signal(signal.SIGTERM)
    time.sleep(StopRequest.SAME + 0.3)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "Traceback" not in err
    logged = [json.loads(line)["update"] for line in (tmp_path / "results/run/log.jsonl").read_text().splitlines()]
    assert weights.read(tmp_path / "results/run/last.pth.tar")["update"] >= max(logged) - 1
    assert not list(tmp_path.rglob("*.part"))


@signals
def test_a_data_worker_that_is_killed_ends_the_run_with_a_sentence(place, tmp_path):
    process = endless(place, tmp_path, "--save_every", "5")
    wait_for_log(tmp_path / "results/run/log.jsonl", 12)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        process.communicate()
        pytest.skip("the system does not list a process's children")
    os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "num_workers" in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    assert weights.read(tmp_path / "results/run/last.pth.tar")["update"] > 0

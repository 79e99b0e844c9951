"""As a user: train.py, test.py and inference.py as commands, on small pictures; and every mistake in one sentence."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx

import image_files
import imgproc
import weights
from helpers import REPOSITORY, drawn_image, noise_image, tiny, write_set
from runtime import STOPPED, StopRequest
from upscaling import upscale

SMALL = ["--channels", "8", "--reduction", "4", "--num_rg", "1", "--num_rcab", "2"]


def command(script, *arguments, cwd, **environment):
    """Run a script of this repository as a person would."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / script), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def train_arguments(scale, *more):
    return [
        *("--model_arch_name", f"rcan_x{scale}", "--upscale_factor", scale, "--exp_name", "run", *SMALL, "--train_sets", "Train"),
        *(
            "--valid_sets",
            "Valid",
            "--epochs",
            2,
            "--steps_per_epoch",
            10,
            "--batch_size",
            4,
            "--lr_patch_size",
            8,
            "--learning_rate",
            1e-3,
        ),
        *("--log_every", 5, "--eval_every", 10, "--save_every", 10, "--num_workers", 1, *more),
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which a run at x3 was trained by the command."""
    folder = tmp_path_factory.mktemp("place")
    write_set(folder / "data" / "Train", [(40, 50), (64, 37)])
    write_set(folder / "data" / "Valid", [(45, 50), (97, 131)], seed=5)
    done = command("train.py", *train_arguments(3), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "finished: update 20" in done.stdout
    assert str(folder / "results" / "run") in done.stdout
    return folder


def test_the_same_command_again_has_nothing_to_do(place):
    done = command("train.py", *train_arguments(3), cwd=place)
    assert done.returncode == 0, done.stderr
    assert "already finished at update 20" in done.stdout


@pytest.fixture(scope="module")
def tested(place):
    # no word about the network's size: the file alone says it
    done = command("test.py", "--model_path", "results/run/best.pth.tar", "--test_sets", "Valid", cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "results" / "run" / "test", done.stdout


def test_training_and_testing_give_the_same_score(place, tested):
    metrics = json.loads((tested[0] / "metrics.json").read_text())
    assert metrics["Valid"]["psnr"] == approx(weights.read(place / "results/run/best.pth.tar")["best_psnr"], abs=1e-6)


def test_the_scores_are_those_of_the_written_pictures(place, tested):
    folder, said = tested
    metrics = json.loads((folder / "metrics.json").read_text())["Valid"]
    assert list(metrics["images"]) == ["a", "b"]
    for name, score in metrics["images"].items():
        gt = imgproc.crop_to_multiple(image_files.read_image(place / "data" / "Valid" / "GT" / f"{name}.png"), 3)
        sr = image_files.read_image(folder / "Valid" / f"{name}.png")
        assert score == {"psnr": imgproc.psnr(sr, gt, 3), "ssim": imgproc.ssim(sr, gt, 3)}
        bicubic = imgproc.imresize(imgproc.degrade(gt, 3), 3)
        assert metrics["bicubic"]["images"][name]["psnr"] == imgproc.psnr(bicubic, gt, 3)
    assert metrics["psnr"] == approx(np.mean([score["psnr"] for score in metrics["images"].values()]), abs=1e-12)
    ssim = f"{metrics['ssim']:.4f}"[1:]
    assert f"| **run** | {metrics['psnr']:.2f} / {ssim} |" in said
    assert (folder / "report.md").read_text().startswith(said[said.index("BI: PSNR") : said.index("\n\npictures and metrics")])
    assert "paper: " not in said  # which has no figures for this set
    assert 0 < metrics["seconds"] < 60
    assert "on Y of YCbCr, 3 border pixels dropped" in said
    assert "no self-ensemble" in said
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [(row["image"], float(row["psnr"])) for row in rows] == [
        *((name, score["psnr"]) for name, score in metrics["images"].items()),
        ("mean", metrics["psnr"]),
    ]


def test_self_ensemble_is_said_and_differs(place, tested):
    arguments = ["--model_path", "results/run/best.pth.tar", "--test_sets", "Valid", "--self_ensemble", "True"]
    done = command("test.py", *arguments, "--save_images", "False", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "self-ensemble of 8" in done.stdout
    metrics = json.loads((place / "results/run/test_plus/metrics.json").read_text())["Valid"]
    network = weights.load(place / "results/run/best.pth.tar")
    gt = imgproc.crop_to_multiple(image_files.read_image(place / "data/Valid/GT/a.png"), 3)
    sr = upscale(network, imgproc.degrade(gt, 3), self_ensemble=True)
    assert metrics["images"]["a"]["psnr"] == approx(imgproc.psnr(sr, gt, 3), abs=1e-3)
    plain = json.loads((tested[0] / "metrics.json").read_text())["Valid"]  # not overwritten
    assert metrics["plain"]["images"] == plain["images"] != metrics["images"]
    for label, scores in (("run", plain), ("run+", metrics)):
        assert f"| **{label}** | {scores['psnr']:.2f} / " in done.stdout
    assert (metrics["self_ensemble"], metrics["degradation"], metrics["upscale_factor"]) == (True, "BI", 3)
    assert metrics["peak_memory_gib"] > 0.1
    row = next(csv.DictReader((place / "results/run/test_plus/metrics.csv").read_text().splitlines()))
    assert (row["image"], float(row["plain_psnr"]), float(row["psnr"])) == (
        "a",
        plain["images"]["a"]["psnr"],
        metrics["images"]["a"]["psnr"],
    )
    assert not (place / "results/run/test_plus/Valid").exists()


def test_several_weights_make_one_table(tmp_path):
    write_set(tmp_path / "data" / "Set5", [(64, 64)] * 5)
    for scale in (2, 4):
        network = tiny(scale)
        network.degradation = "BI"
        weights.export(network, tmp_path / f"w{scale}.safetensors")
    arguments = ["--model_path", "w2.safetensors", "w4.safetensors", "--test_sets", "Set5", "Urban100"]
    done = command("test.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning: data/Urban100: no such folder; Urban100 is not scored" in done.stderr
    report = (tmp_path / "results/table/test/report.md").read_text()
    assert "Not scored, as there is no such folder in data: Urban100." in report
    together = json.loads((tmp_path / "results/table/test/metrics.json").read_text())
    for scale, published in ((2, "38.27 / .9614"), (4, "32.63 / .9002")):
        alone = json.loads((tmp_path / f"results/w{scale}/test/metrics.json").read_text())
        assert together[f"w{scale}"] == alone
        assert len(list((tmp_path / f"results/w{scale}/test/Set5").iterdir())) == 5
        assert f"| x{scale}, BI | Set5 |" in report
        assert f"| *paper: RCAN* | {published} |" in report
        assert f"| **w{scale}** | {alone['Set5']['psnr']:.2f} / " in report
    rows = list(csv.DictReader((tmp_path / "results/table/test/metrics.csv").read_text().splitlines()))
    assert [row["upscale_factor"] for row in rows] == ["2"] * 6 + ["4"] * 6
    assert "RCAN+" not in report  # not asked for
    assert "w2: peak memory, GiB" in report
    for degradation in ("BD", "DN"):
        done = command("test.py", "--model_path", "w2.safetensors", "--test_sets", "Set5", "--degradation", degradation, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"warning: w2.safetensors was trained for degradation='BI', but is tested on '{degradation}'" in done.stderr
        assert (tmp_path / f"results/w2/test_{degradation}/metrics.json").is_file()
        assert "paper" not in done.stdout


def test_inference_gives_exactly_the_scale_for_any_size(place, tmp_path):
    sizes = {"dot": (1, 1), "line": (1, 9), "bild ü": (13, 20)}
    for name, size in sizes.items():
        image_files.write_image(tmp_path / "in" / f"{name}.png", noise_image(*size))
    image_files.write_image(tmp_path / "in" / "photo.JPG", drawn_image(10, 12))
    (tmp_path / "in" / ".DS_Store").write_bytes(b"x")
    done = command("inference.py", "--model_path", place / "results/run/best.pth.tar", "--input", "in", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, (height, width) in {**sizes, "photo": (10, 12)}.items():
        path = tmp_path / "out" / f"{name}.png"
        assert image_files.read_image(path).shape == (3 * height, 3 * width, 3)
        assert str(path) in done.stdout
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_inference_does_the_others_and_lists_what_failed(place, tmp_path):
    for name in ("a", "c"):
        image_files.write_image(tmp_path / "in" / f"{name}.png", noise_image(4, 5))
    (tmp_path / "in" / "b.png").write_bytes(b"")
    done = command("inference.py", "--model_path", place / "results/run/best.pth.tar", "--input", "in", "--output", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "error: 1 of 3 pictures were not upscaled:\n    in/b.png: the file is empty" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]


def test_inference_of_one_file_equals_test(place, tested, tmp_path):
    gt = imgproc.crop_to_multiple(image_files.read_image(place / "data/Valid/GT/a.png"), 3)
    image_files.write_image(tmp_path / "a.png", imgproc.degrade(gt, 3))
    done = command("inference.py", "--model_path", place / "results/run/best.pth.tar", "--input", "a.png", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (image_files.read_image(tmp_path / "out/a.png") == image_files.read_image(tested[0] / "Valid/a.png")).all()


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_other_scales_train_and_test(tmp_path, scale):
    write_set(tmp_path / "data" / "Train", [(97, 131)])
    write_set(tmp_path / "data" / "Valid", [(97, 131)], seed=5)
    arguments = ["--epochs", "1", "--steps_per_epoch", "2", "--batch_size", "2", "--model_arch_name", f"rcan_cbam_x{scale}"]
    done = command("train.py", *train_arguments(scale, *arguments), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = command("test.py", "--model_path", "results/run/best.pth.tar", "--exp_name", "run", "--test_sets", "Valid", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = (97 // scale * scale, 131 // scale * scale, 3)
    assert image_files.read_image(tmp_path / "results/run/test/Valid/a.png").shape == expected


def test_improved_training_from_plain_weights_to_a_score(place):
    """Each preset's command, the second from the first's weights, and a second time."""
    common = [*SMALL, "--model_arch_name", "rcan_light_cbam_x3", "--upscale_factor", 3, "--train_sets", "Train", "--valid_sets", "Valid"]
    common += ["--batch_size", 2, "--lr_patch_size", 11, "--steps_per_epoch", 4, "--eval_every", 4, "--log_every", 2, "--num_workers", 0]
    start = ["--pretrained_model_path", "results/run/best.pth.tar"]
    done = command("train_improved.py", "--preset", "light", *common, *start, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "dB / " in done.stdout
    assert "chosen by psnr" in done.stdout
    folder = "results/rcan_light_cbam_x3_light"
    assert "discriminator_state_dict" not in weights.read(place / folder / "last.pth.tar")
    terms = ["--vgg19_weights_path", "random", "--perceptual_layers", "conv2_1", "--discriminator_channels", 4]
    start = ["--pretrained_model_path", f"{folder}/best.pth.tar"]
    composite = ["train_improved.py", "--preset", "light_perceptual", *common, *terms, *start]
    done = command(*composite, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "chosen by newest" in done.stdout
    assert "VGG19 was never trained" in done.stderr
    assert "already finished at update 4" in command(*composite, cwd=place).stdout
    done = command("test.py", "--model_path", f"{folder}_perceptual/best.pth.tar", "--test_sets", "Valid", cwd=place)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((place / f"{folder}_perceptual/test/metrics.json").read_text())
    assert metrics["Valid"]["psnr"] == approx(weights.read(place / f"{folder}_perceptual/best.pth.tar")["best_psnr"], abs=1e-6)


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
        env={**os.environ, **environment},
    )


def wait_for_log(log, lines=3):
    for _ in range(900):
        if log.is_file() and len(log.read_text().splitlines()) >= lines:
            return
        time.sleep(0.1)
    raise AssertionError(f"{log}: no {lines} lines after 90 s")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("name", "everybody"), [("SIGTERM", True), ("SIGINT", True), ("SIGUSR1", False)])
def test_a_run_that_is_told_to_stop_saves_itself(place, tmp_path, name, everybody):
    """The whole group is told, workers too, as by a terminal, torchrun and timeout; or the training alone."""
    arguments = train_arguments(3, *ENDLESS, "--data_root", place / "data", "--cache_dir", place / ".cache")
    process = started([sys.executable, REPOSITORY / "train.py", *arguments], tmp_path)
    wait_for_log(tmp_path / "results/run/log.jsonl")
    (os.killpg if everybody else os.kill)(process.pid, getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == STOPPED == 75
    assert "stopped and saved; the same command goes on from here" in out
    assert "Traceback" not in err
    assert weights.read(tmp_path / "results/run/last.pth.tar")["update"] > 0
    assert not (tmp_path / "results/run/.lock").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_second_signal_leaves_at_once(tmp_path):
    code = "import time, utils\ndef main():\n    with StopRequest():\n        print('ready', flush=True)\n        time.sleep(100)\n"
    process = started([sys.executable, "-c", f"{code}run_script(main)"], tmp_path, PYTHONPATH=str(REPOSITORY))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(StopRequest.SAME + 0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1] == "stopped\n"
    assert process.returncode == 130


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_second_signal_leaves_a_training_as_its_last_checkpoint(place, tmp_path):
    """An update of seconds, in which both signals come: the run ends without finishing it."""
    arguments = train_arguments(3, *ENDLESS, "--data_root", place / "data", "--cache_dir", place / ".cache", "--num_workers", 0)
    slow = ["--channels", 64, "--num_rg", 10, "--num_rcab", 20, "--batch_size", 16, "--accumulation_steps", 16]
    process = started([sys.executable, REPOSITORY / "train.py", *arguments, *slow, "--save_every", 1, "--log_every", 1], tmp_path)
    wait_for_log(tmp_path / "results/run/log.jsonl", 2)
    time.sleep(0.5)  # the next one has begun
    process.send_signal(signal.SIGTERM)
    time.sleep(StopRequest.SAME + 0.3)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert err.strip().endswith("stopped")
    assert "Traceback" not in err
    logged = [json.loads(line)["update"] for line in (tmp_path / "results/run/log.jsonl").read_text().splitlines()]
    assert weights.read(tmp_path / "results/run/last.pth.tar")["update"] >= max(logged) - 1
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 138), ("SIGINT", 130)])
def test_a_script_that_is_ended_tidies_up(tmp_path, name, code):
    program = (
        "import time, utils, signal, pathlib\nsignal.signal(signal.SIGINT, signal.default_int_handler)\ndef main():\n    try:\n"
        "        print('ready', flush=True)\n        time.sleep(100)\n    finally:\n        pathlib.Path('tidied').touch()\nutils.run(main)"
    )
    process = started([sys.executable, "-c", program], tmp_path, PYTHONPATH=str(REPOSITORY))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=20)
    assert process.returncode == code
    assert (tmp_path / "tidied").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_data_worker_that_is_killed_ends_the_run_with_a_sentence(place, tmp_path):
    arguments = train_arguments(3, *ENDLESS, "--data_root", place / "data", "--cache_dir", place / ".cache")
    process = started([sys.executable, REPOSITORY / "train.py", *arguments, "--save_every", "5"], tmp_path)
    wait_for_log(tmp_path / "results/run/log.jsonl", 12)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        process.communicate()
        pytest.skip("doesn't know a process's children")
    os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: a process that cuts batches has ended, or was ended, as for lack of memory: lower num_workers;" in err
    assert "Traceback" not in err
    assert weights.read(tmp_path / "results/run/last.pth.tar")["update"] > 0


SRUN = """
setsid "$@" &
task=$!
trap 'kill -USR1 -- -$task' USR1
trap 'kill -KILL -- -$task' TERM
while kill -0 $task 2>/dev/null; do wait $task; done
wait $task
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_the_slurm_script_saves_and_queues_up_again(place, tmp_path):
    """With stand-ins for SLURM's programs: srun hands USR1 on and ends all at TERM, scontrol writes down what it is asked for."""
    for name, text in {
        "srun": SRUN,
        "scontrol": 'echo "$@" >> asked.txt; [ "$1" = show ] && echo 127.0.0.1; true',
    }.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for script in ("bin/activate", "bin/torchrun"):
        if not (Path(sys.prefix) / script).exists():
            pytest.skip("no virtual environment")
    arguments = train_arguments(3, *ENDLESS, "--data_root", place / "data", "--cache_dir", place / ".cache")
    environment = {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "VENV": sys.prefix, "SLURM_JOB_NODELIST": "a",
        "SLURM_JOB_ID": "4321", "SLURM_JOB_NUM_NODES": "1", "SLURM_SUBMIT_DIR": str(tmp_path), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    process = started(["bash", REPOSITORY / "scripts/slurm.sh", REPOSITORY / "train.py", *arguments], tmp_path, **environment)
    wait_for_log(tmp_path / "results/run/log.jsonl")
    process.send_signal(signal.SIGUSR1)
    time.sleep(StopRequest.SAME + 0.2)
    process.send_signal(signal.SIGTERM)  # which is neither handed on, nor queues up before the run has ended
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert "stopped and saved; the same command goes on from here" in out
    assert (tmp_path / "asked.txt").read_text().splitlines() == ["show hostnames a", "requeue 4321"]
    assert weights.read(tmp_path / "results/run/last.pth.tar")["update"] > 0
    refused = started(["bash", REPOSITORY / "scripts/slurm.sh", REPOSITORY / "train.py", "--mode", "test"], tmp_path, **environment)
    assert refused.communicate(timeout=90)
    assert refused.returncode == 1  # and a mistake does not queue up again
    assert "requeue" not in (tmp_path / "asked.txt").read_text().splitlines()[2:]


# Mistakes

SMALL_COMPOSITE = ["--preset", "light_perceptual", "--train_sets", "Small", "--valid_sets", "Small", "--lr_patch_size", "8"]


@pytest.mark.parametrize(
    ("script", "arguments", "code", "message"),
    [
        ("train.py", ["--data_root", "nowhere"], 1, "nowhere/Set5: no such folder; put the originals into"),
        ("train.py", ["--model_arch_name", "rcan_x2"], None, "contradicts upscale_factor=4"),
        ("train.py", ["--use_composite_loss", "True"], 1, "contradicts train.py, which trains with L1 alone"),
        ("train.py", ["--mode", "test"], 1, "mode='test' contradicts this script"),
        ("train.py", ["--epoch", "3"], 2, "--epochs"),
        ("train_improved.py", ["--preset", "sharp"], 2, "light_perceptual"),
        ("train_improved.py", ["--mode", "test"], 1, "mode='test' contradicts this script"),
        ("train_improved.py", ["--preset", "perceptual", "--lr_patch_size", "4"], None, "needs 32: set lr_patch_size to at least 8"),
        ("train_improved.py", ["--preset", "perceptual", "--l1_weight", "-1"], None, "l1_weight=-1.0 must be at least 0"),
        (
            "train_improved.py",
            [*SMALL_COMPOSITE, "--vgg19_weights_path", "gone.pth"],
            1,
            "vgg19_weights_path='gone.pth': no such file; put vgg19-",
        ),
        (
            "train_improved.py",
            [*SMALL_COMPOSITE, "--vgg19_weights_path", "w.pth"],
            1,
            "w.pth: these are not VGG19's weights, 32 are absent",
        ),
        ("train_improved.py", [*SMALL_COMPOSITE, "--perceptual_layers", "conv9_9"], 1, "'conv9_9'] can't be used; known are conv1_1"),
        ("test.py", ["--model_path", "gone.pth"], 1, "gone.pth: no such weights; train them with train.py, or give the path"),
        ("test.py", ["--model_path", "notes.txt"], 1, "notes.txt: not a file of weights that can be read safely"),
        ("test.py", ["--model_path", "w.pth", "--test_sets", "Set77"], 1, "data/Set77: no such folder"),
        ("test.py", ["--model_path", "w.pth", "--test_sets", "Broken"], 1, "b.png: the image is damaged or cut off"),
        ("test.py", ["--model_path", "w.pth", "--test_sets"], 1, "test_sets is empty"),
        ("test.py", ["--model_path", "w.pth", "--test_sets", "Set14"], 1, "data/Set14: 2 images, but Set14 has 14; complete it, or rename"),
        ("test.py", ["--model_path", "w.pth", "other/w.pth"], 1, "two would be filed under one name (w, w); rename one"),
        ("test.py", ["--model_path", "cut.pth"], 1, "none was loaded: missing conv1.bias; missing trunk.1"),
        ("inference.py", ["--model_path", "w.pth", "--input", "gone.png"], 1, "gone.png: no such file or folder"),
        ("inference.py", ["--model_path", "w.pth", "--input", "other"], 1, "no picture in it"),
        ("inference.py", ["--model_path", "w.pth", "--input", "data/Broken/GT/b.png"], 1, "b.png: the picture is damaged, cut off"),
        ("inference.py", ["--model_path", "w.pth"], 2, "--input"),
    ],
)
def test_a_mistake_is_one_sentence_and_not_success(tmp_path, script, arguments, code, message):
    weights.export(tiny(2), tmp_path / "w.pth")
    weights.export(tiny(4), tmp_path / "other" / "w.pth")
    cut = tiny(2).state_dict()
    torch.save(
        {name: cut[name] for name in cut if name not in ("conv1.bias", "trunk.1.residual_group.0.residual_channel_attention_block.0.bias")},
        tmp_path / "cut.pth",
    )
    (tmp_path / "notes.txt").write_text("notes")
    write_set(tmp_path / "data" / "Set14", [(64, 64)] * 2)
    write_set(tmp_path / "data" / "Small", [(64, 64)] * 2)
    write_set(tmp_path / "data" / "Broken", [(64, 64), (64, 64)])
    data = (tmp_path / "data/Broken/GT/b.png").read_bytes()
    (tmp_path / "data/Broken/GT/b.png").write_bytes(data[: len(data) // 2])
    done = command(script, *arguments, cwd=tmp_path)
    assert done.returncode == code if code else done.returncode in (1, 2)
    said = " ".join(done.stderr.replace("│", " ").split())
    assert message in said
    assert "Traceback" not in said
    if code == 1:
        assert "error: " in done.stderr.strip().splitlines()[-1] or "error: 1 of 1 pictures" in done.stderr

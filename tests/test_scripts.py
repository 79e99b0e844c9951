"""The smaller scripts: figures, benchmark, demonstration data, and those for shells."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import image_files
import imgproc
import weights
from helpers import REPOSITORY, TINY, drawn_image, tiny, write_set
from runtime import StopRequest

sys.path.insert(0, str(REPOSITORY / "scripts"))
benchmark, demo_data, figure = (importlib.import_module(name) for name in ("benchmark", "demo_data", "figure"))


def test_demo_photographs_are_kept_apart(tmp_path):
    demo_data.main(["--output", str(tmp_path)])
    train, test = ({path.stem for path in image_files.list_images(tmp_path / name / "GT")} for name in ("DemoTrain", "DemoTest"))
    assert test == {"astronaut", "chelsea", "coffee"}
    assert len(train) == 14
    assert not train & test
    path = tmp_path / "DemoTest/GT/chelsea.png"
    assert image_files.read_image(path).shape == (300, 451, 3)
    before = path.stat().st_mtime_ns
    demo_data.main(["--output", str(tmp_path)])
    assert path.stat().st_mtime_ns == before


# Figures


def test_a_comparison_shows_the_crop_that_gains_most(tmp_path, capsys):
    gt = drawn_image(98, 121)
    image_files.write_image(tmp_path / "gt.png", gt)
    gt = gt[:96, :120]
    bicubic = imgproc.imresize(imgproc.degrade(gt, 4), 4)
    sr = bicubic.copy()
    sr[40:60, 60:90] = gt[40:60, 60:90]
    image_files.write_image(tmp_path / "sr.png", sr)
    top, left = figure.find_crop(bicubic, sr, gt, 40)
    assert 20 <= top <= 40
    assert 50 <= left <= 60
    arguments = ["--gt", str(tmp_path / "gt.png"), "--sr", str(tmp_path / "sr.png"), "--output", str(tmp_path / "f.png"), "--side", "43"]
    figure.main(arguments)  # 43 becomes 40, a multiple of the scale
    assert str(tmp_path / "f.png") in capsys.readouterr().out
    drawn = image_files.read_image(tmp_path / "f.png")
    assert drawn.shape == (26 + 80 + 4, 4 * (80 + 4), 3)
    panels = [drawn[26:-4, start + 2 : start + 82] for start in range(0, drawn.shape[1], 84)]
    nearest = imgproc.degrade(gt, 4).repeat(4, 0).repeat(4, 1)
    for panel, image in zip(panels, (nearest, bicubic, sr, gt), strict=True):
        assert (panel[::2, ::2] == image[top : top + 40, left : left + 40]).all()
    image_files.write_image(tmp_path / "sr.png", gt[:50])
    with pytest.raises(ValueError, match=r"sr\.png: .*120x50.*120x96"):
        figure.main(arguments)
    for wrong in (["--gt", "a", "b", "--sr", "a"], [], ["--gt", "a", "--runs", "b"]):
        with pytest.raises(ValueError, match="--gt"):
            figure.main([*wrong, "--output", str(tmp_path / "g.png")])


def test_a_learning_curve_is_read_off_the_log_and_drawn(tmp_path):
    lines = [{"update": 1, "seconds": 30}, {"update": 2, "event": "evaluation", "seconds": 90.0, "Set5/psnr": 31.5}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert figure.read_curve(tmp_path, "Set5") == figure.read_curve(tmp_path / "log.jsonl", "Set5") == [(1.5, 31.5)]
    with pytest.raises(ValueError, match="Set14"):
        figure.read_curve(tmp_path, "Set14")
    with pytest.raises(FileNotFoundError, match="gone"):
        figure.read_curve(tmp_path / "gone", "Set5")
    pytest.importorskip("matplotlib")
    arguments = ["--runs", str(tmp_path), "--output", str(tmp_path / "new" / "curve.png"), "--levels"]
    figure.main([*arguments, "VDSR=31.35"])
    assert np.ptp(image_files.read_image(tmp_path / "new" / "curve.png")) == 255
    with pytest.raises(ValueError, match="VDSR"):
        figure.main([*arguments, "VDSR"])


# Benchmark


def test_best_and_median_are_without_the_first_run(monkeypatch):
    """A work that takes 9, 1, 6, 2 seconds of a clock of ours: best 1, median 2."""
    clock, taken = [0.0], iter([9, 1, 6, 2])
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert benchmark.measure(lambda: clock.__setitem__(0, clock[0] + next(taken)), 3) == (1, 2)


def test_a_photograph_of_any_size():
    image = benchmark.make_image(1500, 2000)
    assert image.shape == (1500, 2000, 3)
    assert (image[1411:] == image[:89]).all()  # 1411x1411, repeated
    assert np.ptp(image) > 200


@pytest.mark.slow
def test_the_benchmark_measures_each_part(tmp_path, capsys):
    weights.export(tiny(2), tmp_path / "w.pth")
    memory = ["--parts", "memory", "--model_path", str(tmp_path / "w.pth"), "--width", "60", "--height", "130", "--tile", "48"]
    benchmark.main(memory)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[0] for row in table[2:]] == ["whole", "strips", "tiles"]
    assert all(float(seconds) >= 0 for _, seconds, _, _ in table[2:])
    whole, strips, tiles = (row[3] for row in table[2:])
    assert whole == strips != tiles  # tiles have averages of their own
    benchmark.main(["--parts", "speed", "--batch_size", "1", "--lr_patch_size", "8", "--runs", "1"])
    out = capsys.readouterr().out
    assert all(part in out for part in ("1/8", "pairs", "forward and backward, fp32, (1, 3, 8, 8)", "upscaling, bf16"))
    with pytest.raises(ValueError, match="model_arch_name='rcan_x5'"):
        benchmark.main(["--model_arch_name", "rcan_x5"])


# Shells

needs_bash = pytest.mark.skipif(sys.platform == "win32", reason="bash")


def bash(*words, **environment):
    return subprocess.run(["bash", *map(str, words)], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)


@needs_bash
@pytest.mark.slow
def test_shell_scripts_refuse_a_slip_and_an_old_python(tmp_path):
    scripts = sorted((REPOSITORY / "scripts").glob("*.sh"))
    assert len(scripts) == 4
    for script in (*scripts, REPOSITORY / ".ci" / "run"):
        assert bash("-n", script).returncode == 0
    assert bash(REPOSITORY / "scripts/quickstart.sh", "--fast").returncode == 2
    (tmp_path / "python").write_text("#!/bin/bash\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    for script in ("quickstart.sh", "run_tests.sh"):
        done = bash(REPOSITORY / "scripts" / script, PYTHON=str(tmp_path / "python"), VENV=str(tmp_path / "venv"))
        assert done.returncode == 1
        assert str(tmp_path / "python") in done.stderr
    assert not (tmp_path / "venv").exists()


STAND_INS = {
    "srun": """setsid "$@" &
        task=$!
        trap 'kill -USR1 -- -$task' USR1
        trap 'kill -KILL -- -$task' TERM
        while kill -0 $task 2>/dev/null; do wait $task; done
        wait $task""",
    "scontrol": 'echo "$@" >> asked.txt; [ "$1" = show ] && echo 127.0.0.1; true',
}


@needs_bash
@pytest.mark.slow
def test_a_slurm_job_saves_itself_and_queues_up_again(tmp_path):
    """With stand-ins for SLURM's programs: srun hands USR1 on and kills all at TERM, scontrol writes down what it is asked for."""
    if not all((Path(sys.prefix) / "bin" / name).exists() for name in ("activate", "torchrun")):
        pytest.skip("no virtual environment")
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    write_set(tmp_path / "data" / "Own", [(40, 44), (36, 40)])
    size = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    settings = "--model_arch_name rcan_x2 --upscale_factor 2 --train_sets Own --valid_sets Own --lr_patch_size 8 --batch_size 2"
    arguments = [REPOSITORY / "train.py", *settings.split(), *size, "--exp_name", "run", "--epochs", "10000", "--log_every", "5"]
    environment = {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "VENV": sys.prefix, "SLURM_JOB_NODELIST": "a",
        "SLURM_JOB_ID": "4321", "SLURM_JOB_NUM_NODES": "1", "SLURM_SUBMIT_DIR": str(tmp_path), "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def started(*more):
        words = ["bash", *map(str, [REPOSITORY / "scripts/slurm.sh", *arguments, *more])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(words, cwd=tmp_path, env={**os.environ, **environment}, start_new_session=True, **pipes)

    process, log = started(), tmp_path / "results/run/log.jsonl"
    late = time.monotonic() + 90
    while not (log.is_file() and len(log.read_text().splitlines()) >= 3):
        assert time.monotonic() < late
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    time.sleep(StopRequest.SAME + 0.2)
    process.send_signal(signal.SIGTERM)  # which is neither handed on, nor queues up before the run has ended
    _, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert (tmp_path / "asked.txt").read_text().splitlines() == ["show hostnames a", "requeue 4321"]
    assert weights.read(tmp_path / "results/run/last.pth.tar")["update"] > 0
    refused = started("--mode", "test")
    refused.communicate(timeout=90)
    assert refused.returncode == 1  # and a mistake does not queue up again
    assert "requeue" not in (tmp_path / "asked.txt").read_text().splitlines()[2:]

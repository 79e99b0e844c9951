"""The smaller scripts: figures, benchmark, demonstration data, and those for shells."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import image_files
import imgproc
import weights
from helpers import REPOSITORY, TINY, drawn_image, write_set
from reports import draw_panel
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


@pytest.mark.parametrize("given", ["gt", "lr", "gt lr"])
def test_a_comparison_of_two_methods_in_a_chosen_crop_with_and_without_gt(tmp_path, capsys, given):
    """Two images, of different size, one below the other; panels are told from each other by their own pixels."""
    gts = [drawn_image(60, 80), drawn_image(72, 84, 1)]
    known = "gt" in given
    lrs = [imgproc.degrade(255 - gt if given == "gt lr" else gt, 4) for gt in gts]
    methods = {"One": [255 - gt for gt in gts], "Two": [gt[::-1].copy() for gt in gts]}
    for kind, images in {"gt": gts, "lr": lrs, **methods}.items():
        for number, image in enumerate(images):
            image_files.write_image(tmp_path / f"{kind}{number}.png", image)
    words = " ".join(f"--{kind} {kind}0.png {kind}1.png" for kind in given.split())
    words += " --sr One0.png One1.png Two0.png Two1.png --sr_names One Two"
    arguments = [str(tmp_path / word) if word.endswith("png") else word for word in words.split()]
    arguments += ["--output", str(tmp_path / "f.png")]
    figure.main([*arguments, "--crop", "5", "3", "42", "20", "--zoom", "3"])
    drawn = image_files.read_image(tmp_path / "f.png")
    columns = 5 if known else 4
    assert drawn.shape == (2 * (26 + 60 + 4), columns * (126 + 4), 3)
    panels = drawn.reshape(2, 90, columns, 130, 3).swapaxes(1, 2)
    for row in range(2):
        expected = [lrs[row].repeat(4, 0).repeat(4, 1), imgproc.imresize(lrs[row], 4), methods["One"][row], methods["Two"][row]]
        for panel, image in zip(panels[row], [*expected, gts[row]][:columns], strict=True):
            assert (panel[26:-4:3, 2:-2:3] == image[3:23, 5:47]).all()
        for number, name in enumerate(("bicubic", "One", "Two"), start=1):
            label = f"{name}  {imgproc.psnr(expected[number], gts[row], 4):.2f} dB" if known else name
            assert (panels[row, number] == draw_panel(expected[number][3:23, 5:47], label, 3)).all()
    figure.main([*arguments, "--side", "64"])  # the first image has room for 60
    squares = image_files.read_image(tmp_path / "f.png")
    assert squares.shape == (150 + 158, columns * 132, 3)
    assert (squares[:150, columns * 124 :] == 255).all()
    crop = re.findall(r"--crop (\d+ \d+ 60 60)", capsys.readouterr().out)[0]
    figure.main([*arguments, "--crop", *crop.split()])  # draws the same row again
    assert (image_files.read_image(tmp_path / "f.png")[:150] == squares[:150, : columns * 124]).all()
    for wrong, named in (("--crop 40 3 41 20", "80x60"), ("--sr_name One", "--sr_names 1"), ("--over updates", "--over")):
        with pytest.raises(ValueError, match=named):
            figure.main([*arguments, *wrong.split()])


def write_log(path, psnrs, cut="", **more):
    """A log with an evaluation each 100 updates and 30 seconds."""
    lines = [{"update": 1, "seconds": 1}]
    lines += [{"update": 100 * n, "seconds": 30.0 * n, "Set5/psnr": psnr, **more} for n, psnr in enumerate(psnrs, start=1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + cut)


def test_a_learning_curve_is_read_off_the_log(tmp_path):
    write_log(tmp_path / "log.jsonl", [30.0, None, 31.5], cut='{"update": 400, "Set5/ps')  # null: infinite
    expected = [(0.5, 30.0), (1.5, 31.5)]
    assert figure.read_curve(tmp_path, "Set5") == figure.read_curve(tmp_path / "log.jsonl", "Set5") == (expected, None)
    write_log(tmp_path / "log.jsonl", [30.0, 31.0], **{"Set5/bicubic_psnr": 28.4})
    assert figure.read_curve(tmp_path, "Set5", "updates") == ([(100, 30.0), (200, 31.0)], 28.4)
    with pytest.raises(ValueError, match=r"Set14.*Set5"):
        figure.read_curve(tmp_path, "Set14")
    with pytest.raises(FileNotFoundError, match="gone"):
        figure.read_curve(tmp_path / "gone", "Set5")
    (tmp_path / "other.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"other\.txt: line 1"):
        figure.read_curve(tmp_path / "other.txt", "Set5")


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / name for name in ("a/run", "b/run", "c/v1.5", "old.jsonl", "d/log.jsonl")]
    for path in paths[:3]:
        path.mkdir(parents=True)
    paths[4].parent.mkdir()
    assert figure.label_runs(paths) == ["a/run", "b/run", "v1.5", "old", "d"]


def test_learning_curves_show_every_evaluation_and_bicubic(tmp_path, monkeypatch):
    pyplot, drawn = pytest.importorskip("matplotlib.pyplot"), []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    write_log(tmp_path / "a" / "log.jsonl", [9.0, 29.5, 30.0, 30.5, 31.0], **{"Set5/bicubic_psnr": 28.4})
    write_log(tmp_path / "old.jsonl", [30.25])  # without bicubic
    arguments = ["--runs", str(tmp_path / "a"), str(tmp_path / "old.jsonl"), "--output", str(tmp_path / "new" / "curve.png")]
    figure.main([*arguments, "--over", "updates", "--levels", "VDSR=31.35"])
    assert np.ptp(image_files.read_image(tmp_path / "new" / "curve.png")) == 255
    (axes,) = drawn[0].axes
    curves = {line.get_label(): line for line in axes.lines if line.get_marker() != "None"}
    assert {name: line.get_xydata().tolist() for name, line in curves.items()} == {
        "a": [[100, 9.0], [200, 29.5], [300, 30.0], [400, 30.5], [500, 31.0]],
        "old": [[100, 30.25]],
    }
    assert sorted(line.get_ydata()[0] for line in axes.lines if line not in curves.values()) == [28.4, 31.35]
    assert axes.get_xlim()[0] == 0
    assert axes.get_ylim()[0] == pytest.approx(28.4 - 1)  # 9 dB would flatten the rest
    assert axes.get_ylim()[1] > 31.35
    with pytest.raises(ValueError, match="VDSR"):
        figure.main([*arguments, "--levels", "VDSR"])


# Benchmark


def test_contestants_take_turns_after_one_that_is_not_counted():
    """Rates and shares are of the best times: a limit of 8 GFLOP in 1 s, and 2 GFLOP in 1 s, a quarter of it."""
    turns, taken = [], {"limit": iter([9, 2, 1]), "ours": iter([9, 1, 3])}

    def turn(name):
        turns.append(name)
        return [float(next(taken[name]))]

    rows = [benchmark.Row("forward", name, "fp32", partial(turn, name), amount, "GFLOP/s") for name, amount in (("limit", 8), ("ours", 2))]
    benchmark.take_turns([*rows, benchmark.Row("forward", "absent", note="not installed")], 2)
    assert turns == ["limit", "ours"] * 3
    figures = rows[1].figures({("fp32", "GFLOP/s"): 8})
    assert (figures["seconds_best"], figures["seconds_median"], figures["rate"], figures["share_of_limit"]) == (1, 2, 2, 0.25)


def test_operations_are_counted_as_by_hand():
    """3x3 from 3 to 8 channels on 10x12: 2 * 9 * 3 * 8 * 120."""
    assert benchmark.count_gigaflops(torch.nn.Conv2d(3, 8, 3, padding=1), (1, 3, 10, 12)) == 2 * 9 * 3 * 8 * 120 / 1e9


def test_a_failing_command_is_named_with_its_last_line():
    with pytest.raises(ValueError, match="7: lost"):
        benchmark.run_command([sys.executable, "-c", "import sys; print('lost', file=sys.stderr); sys.exit(7)"])


def test_a_photograph_of_any_size():
    image = benchmark.make_image(1500, 2000)
    assert image.shape == (1500, 2000, 3)
    assert (image[1411:] == image[:89]).all()  # 1411x1411, repeated
    assert np.ptp(image) > 200


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the other programs
def test_the_benchmark_measures_each_part(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)  # not installed
    for program in ("onnxscript", "onnxruntime", "spandrel", "torchsr"):
        pytest.importorskip(program)
    sizes = "--image 12 --batch_size 1 --lr_patch_size 8 --runs 1 --compile False --image_sizes 24x16 --batch_sizes 1 --lr_patch_sizes 8"
    benchmark.main([*sizes.split(), "--model_arch_name", "rcan_light_x4", "--precisions", "fp32", "--output", str(tmp_path / "b.json")])
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["machine"]["torch"] == torch.__version__
    rows = {(row["part"], row["name"]): row for row in found["rows"]}
    (absent,) = [name for (part, name), row in rows.items() if row["note"]]
    assert absent == "openvino" in capsys.readouterr().out
    for (part, name), row in rows.items():
        if name == absent:
            assert absent in row["note"]
            continue
        assert 0 < row["seconds_best"] <= row["seconds_median"], name
        assert part == "memory" or (row["rate"] > 0 and row["share_of_limit"] > 0), name
        assert part not in ("memory", "start") or row["peak_gib"] > 0.01, name
        if part == "forward" and "limit" not in name:
            assert row["largest_difference"] < (0.5 / 255 + 1e-5 if "fp32" in name else 0.05), name  # half a step is upscale's rounding
    assert {part for part, _ in rows} == {"forward", "train", "loader", "start", "memory"}
    names = " ".join(name for _, name in rows)
    for part in (
        "spandrel",
        "torchSR",
        "ONNX Runtime",
        "train.py, fp32",
        "plain loop",
        "Pillow",
        "inference.py",
        "upscale 24x16",
        "checkpointing",
    ):
        assert part in names


def test_the_benchmark_refuses_impossible_sizes(capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(["--image_sizes", "24by16"])
    assert end.value.code == 2
    assert "24by16" in capsys.readouterr().err


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

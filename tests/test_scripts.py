"""One-off jobs: the demonstration data, the figure, the learning curve."""

import importlib
import json
import sys

import numpy as np
import pytest

import image_files
import imgproc
from helpers import REPOSITORY, drawn_image

sys.path.insert(0, str(REPOSITORY / "scripts"))
demo_data, figure, learning_curve = (importlib.import_module(name) for name in ("demo_data", "figure", "learning_curve"))


def test_demo_photographs_are_kept_apart(tmp_path, capsys):
    demo_data.main(["--output", str(tmp_path)])
    train, test = ({path.stem for path in image_files.list_images(tmp_path / name / "GT")} for name in ("DemoTrain", "DemoTest"))
    assert test == {"astronaut", "chelsea", "coffee"}
    assert len(train) == 14
    assert not train & test
    assert "17 photographs" in capsys.readouterr().out
    path = tmp_path / "DemoTest/GT/chelsea.png"
    assert image_files.read_image(path).shape == (300, 451, 3)
    before = path.stat().st_mtime_ns
    demo_data.main(["--output", str(tmp_path)])
    assert path.stat().st_mtime_ns == before


def test_the_figure_shows_the_part_that_gains_most(tmp_path, capsys):
    gt = drawn_image(96, 120)
    bicubic = imgproc.imresize(imgproc.degrade(gt, 4), 4)
    sr = bicubic.copy()
    sr[40:60, 60:90] = gt[40:60, 60:90]
    top, left = figure.find_part(bicubic, sr, gt, 40)
    assert top <= 40
    assert top + 40 >= 60
    assert left <= 60
    assert left + 40 >= 90
    for name, image in (("gt", gt), ("sr", sr)):
        image_files.write_image(tmp_path / f"{name}.png", image)
    arguments = ["--gt", str(tmp_path / "gt.png"), "--sr", str(tmp_path / "sr.png"), "--output", str(tmp_path / "f.png"), "--side", "40"]
    figure.main(arguments)
    drawn = image_files.read_image(tmp_path / "f.png")
    assert drawn.shape == (26 + 80 + 4, 4 * (80 + 4), 3)
    panels = [drawn[26:-4, start + 2 : start + 82] for start in range(0, drawn.shape[1], 84)]
    for panel, image in zip(panels, (None, bicubic, sr, gt), strict=True):
        if image is not None:
            assert (panel[::2, ::2] == image[top : top + 40, left : left + 40]).all()
    assert str(tmp_path / "f.png") in capsys.readouterr().out
    image_files.write_image(tmp_path / "sr.png", gt[:50])
    with pytest.raises(ValueError, match="sr is 120x50, but gt at x4 120x96"):
        figure.main(arguments)


def test_the_learning_curve_is_read_off_the_log(tmp_path):
    lines = [{"update": 1, "seconds": 30}, {"update": 2, "event": "evaluation", "seconds": 90.0, "Set5/psnr": 31.5}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert learning_curve.read_curve(tmp_path, "Set5") == [(1.5, 31.5)]
    with pytest.raises(ValueError, match="no evaluation of Set14"):
        learning_curve.read_curve(tmp_path, "Set14")
    with pytest.raises(FileNotFoundError, match=r"gone: no such log"):
        learning_curve.read_curve(tmp_path / "gone", "Set5")
    with pytest.raises(ValueError, match="must be NAME=DB"):
        learning_curve.main(["--runs", str(tmp_path), "--output", "x.png", "--levels", "VDSR"])


def test_the_learning_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "log.jsonl").write_text('{"update": 2, "seconds": 90.0, "Set5/psnr": 31.5}\n')
    learning_curve.main(["--runs", str(tmp_path), "--output", str(tmp_path / "curve.png"), "--levels", "VDSR=31.35"])
    assert np.ptp(image_files.read_image(tmp_path / "curve.png")) == 255

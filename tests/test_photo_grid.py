"""The grid of damaged photographs: its cells are what their names say, and its scores those of a hand."""

import json

import numpy as np
import pytest
import skimage.data
from pytest import approx

import imgproc
import weights
from helpers import tiny
from image_files import write_image
from scripts import photo_grid


def test_the_grid_scores_bicubic_and_each_file(tmp_path, capsys):
    gt = skimage.data.astronaut()[:96, :128]
    write_image(tmp_path / "Set/GT/a.png", gt)
    for name in ("one", "other"):
        weights.export(tiny(2), tmp_path / f"{name}.pth")
    files = ["--weights", str(tmp_path / "one.pth"), str(tmp_path / "other.pth")]
    photo_grid.main([*files, "--sets", str(tmp_path / "Set"), "--output", str(tmp_path / "o/grid.json")])
    header, *rows = json.loads((tmp_path / "o/grid.json").read_text())["rows"]
    assert header == ["set", "damage", "bicubic", "one", "other"]
    bicubic = {damage: float(value) for _, damage, value, *_ in rows}
    assert list(bicubic) == list(photo_grid.CELLS)
    lr = imgproc.degrade(gt, 2)
    assert bicubic["clean"] == approx(imgproc.psnr(imgproc.imresize(lr, 2), gt, 2), abs=0.005)
    assert bicubic["JPEG 30"] == approx(imgproc.psnr(imgproc.imresize(imgproc.compress(lr, "JPEG", 30), 2), gt, 2), abs=0.005)
    assert bicubic["clean"] > bicubic["JPEG 92"] > bicubic["JPEG 50"] > bicubic["JPEG 30"]
    assert bicubic["noise 4"] > bicubic["noise 12"] and bicubic["clean"] > bicubic["blur 0.5"]
    assert all(one == other for *_, one, other in rows) and "noise 12" in capsys.readouterr().out
    off = photo_grid.noisy(8, np.full((99, 99, 3), 128, np.uint8), 1).astype(float) - 128
    assert off.std() == approx(8, rel=0.05)
    with pytest.raises(ValueError, match="one scale"):
        photo_grid.main([*files[:2], *files[1:2], "--sets", str(tmp_path / "Set"), "--output", str(tmp_path / "o/grid.json")])

"""The local page's handler: what it makes of a file is what inference.py makes of it, and mistakes are told in words."""

import importlib
import sys
from functools import partial

import numpy as np
import pytest
import torch

import image_files
import imgproc
import inference
from config import released_weights
from helpers import REPOSITORY, drawn_image, noise_image
from image_files import Photo, read_photo, write_image, write_photo

sys.path.insert(0, str(REPOSITORY / "scripts"))
demo = importlib.import_module("demo")


@pytest.fixture
def enlarge(tmp_path):
    """enlarge_file with the page's settings, and a list of what it told."""
    told = []
    config = demo.DemoConfig(max_megapixels=0.05)
    call = partial(demo.enlarge_file, tell=lambda *said: told.append(said), folder=tmp_path, device=torch.device("cpu"), config=config)
    return call, told


@pytest.mark.parametrize("scale", [2, 4])
def test_a_file_becomes_what_inference_writes(tmp_path, enlarge, scale):
    path = tmp_path / "a.png"
    write_photo(path, Photo(drawn_image(13, 20), np.ascontiguousarray(noise_image(13, 20)[:, :, 0]), dpi=(100, 100)))
    before, after, target, notes = enlarge[0](path, scale, released_weights(scale).name)
    inference.main(["--input", str(path), "--output", str(tmp_path / "out"), "--upscale_factor", str(scale)])
    assert target.name == f"a_x{scale}.png"
    assert target.read_bytes() == (tmp_path / "out/a.png").read_bytes()
    assert before.shape == after.shape == (13 * scale, 20 * scale, 3)
    assert "white" in notes[0]
    shares = [share for share, _ in enlarge[1]]
    assert shares == sorted(shares) and shares[-1] < 1
    opaque = tmp_path / "b.png"
    write_image(opaque, drawn_image(9, 9))
    before, after, target, _ = enlarge[0](opaque, scale, released_weights(scale).name)
    assert (after == image_files.read_image(target)).all()
    assert (before == imgproc.imresize(drawn_image(9, 9), scale)).all()


def test_16_bits_are_kept(tmp_path, enlarge):
    deep = np.random.default_rng(0).integers(0, 65536, (6, 9, 3), dtype=np.uint16)
    write_photo(tmp_path / "a.tif", Photo(deep))
    _, after, target, _ = enlarge[0](tmp_path / "a.tif", 2, released_weights(2).name)
    assert read_photo(target).bits == 16
    assert after.dtype == np.uint8


def test_mistakes_are_told_in_words(tmp_path, enlarge):
    write_image(tmp_path / "large.png", drawn_image(100, 120))
    with pytest.raises(ValueError, match=r"large\.png.*120x100.*x3.*max_megapixels"):
        enlarge[0](tmp_path / "large.png", 3, released_weights(3).name)  # 0.108 megapixels
    for name in ("../weights/rcan_light_x4.pth.tar", "rcan_light_x2.pth.tar", "gone"):
        with pytest.raises(ValueError, match=r"x4.*rcan_light_x4"):
            enlarge[0](tmp_path / "large.png", 4, name)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png"):
        enlarge[0](tmp_path / "text.png", 2, released_weights(2).name)


def test_the_weights_of_the_repository_are_offered(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "released_weights", lambda scale: tmp_path / f"rcan_light_x{scale}.pth.tar")
    for name in ("rcan_a_x4", "rcan_light_x4", "rcan_light_photo_x4", "rcan_light_x2", "other_x4"):
        (tmp_path / f"{name}.pth.tar").touch()
    assert demo.weights_of(4) == [f"{name}.pth.tar" for name in ("rcan_light_x4", "rcan_a_x4", "rcan_light_photo_x4")]
    assert demo.weights_of(8) == []


def test_without_gradio_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"requirements-demo\.txt"):
        demo.main([])
    assert (REPOSITORY / "requirements-demo.txt").is_file()
    for wrong in ("--port=0", "--max_megapixels=0"):
        with pytest.raises((SystemExit, ValueError)):
            demo.main([wrong])

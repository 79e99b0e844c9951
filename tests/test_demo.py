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
from image_files import Photo, write_image, write_photo

sys.path.insert(0, str(REPOSITORY / "scripts"))
demo = importlib.import_module("demo")


@pytest.fixture
def enlarge(tmp_path):
    """enlarge_file with the page's settings, and a list of what it told."""
    told = []
    config = demo.DemoConfig(max_megapixels=0.05)
    call = partial(demo.enlarge_file, tell=lambda *said: told.append(said), folder=tmp_path, device=torch.device("cpu"), config=config)
    return call, told


ALPHA = np.ascontiguousarray(noise_image(13, 20)[:, :, 0])
DEEP = np.random.default_rng(0).integers(0, 65536, (13, 20, 3), dtype=np.uint16)


@pytest.mark.parametrize("photo", [Photo(drawn_image(13, 20)), Photo(drawn_image(13, 20), ALPHA, dpi=(100, 100)), Photo(DEEP)])
def test_a_file_becomes_what_inference_writes(tmp_path, enlarge, photo):
    write_photo(tmp_path / "a.png", photo)
    before, after, target, notes = enlarge[0](tmp_path / "a.png", 2, "clean")
    inference.main(["--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "out"), "-s", "2", "--weights", "clean"])
    assert target.name == "a_x2.png"
    assert target.read_bytes() == (tmp_path / "out/a.png").read_bytes()
    assert ("white" in notes[0]) == (photo.alpha is not None)
    if photo.alpha is None:
        assert (after == image_files.read_image(target)).all()
        assert abs(before.astype(int) - imgproc.imresize(image_files.read_image(tmp_path / "a.png"), 2)).max() <= photo.bits // 16
    shares = [share for share, _ in enlarge[1]]
    assert shares == sorted(shares) and shares[-1] < 1
    assert max(share for share, text in enlarge[1] if "26" in text) == pytest.approx(0.8)  # all parts of 40x26 add up


def test_mistakes_are_told_in_words(tmp_path, enlarge):
    write_image(tmp_path / "large.png", drawn_image(100, 120))
    write_image(tmp_path / "small.png", drawn_image(9, 12))
    with pytest.raises(ValueError, match=r"large\.png.*120x100.*x3.*max_megapixels"):
        enlarge[0](tmp_path / "large.png", 3, "auto")  # 0.108 megapixels
    for kind in ("../weights/rcan_light_x4.pth.tar", "gone"):
        with pytest.raises(ValueError, match=kind):
            enlarge[0](tmp_path / "small.png", 2, kind)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png"):
        enlarge[0](tmp_path / "text.png", 2, "auto")


def test_the_weights_of_the_repository_are_offered():
    offered = {scale: ["auto", "clean", *(["photo"] if released_weights(scale, "photo").is_file() else [])] for scale in (2, 3, 4, 8)}
    assert {scale: demo.kinds(scale) for scale in (2, 3, 4, 8)} == offered
    assert "photo" in offered[2] and "photo" not in offered[8]


def test_without_gradio_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"requirements-demo\.txt"):
        demo.main([])
    assert (REPOSITORY / "requirements-demo.txt").is_file()
    for wrong in ("--port=0", "--max_megapixels=0"):
        with pytest.raises((SystemExit, ValueError)):
            demo.main([wrong])

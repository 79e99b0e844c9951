"""test.py, the scoring script: scores are those of the written images, beside bicubic and the paper, and mistakes end it early."""

import csv
import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from pytest import approx

import image_files
import imgproc
import weights
from config import released_weights
from helpers import REPOSITORY, drawn_image, tiny, write_set
from upscaling import upscale

SCRIPT = str(REPOSITORY / "test.py")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a set whose GT images are no multiple of the scale, and weights w2 and w3."""
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "data" / "Own", [(46, 40), (37, 53)])
    for scale in (2, 3):
        network = tiny(scale)
        network.degradation = "BI"
        weights.export(network, tmp_path / f"w{scale}.pth")
    return tmp_path


@pytest.fixture
def score(place, monkeypatch, capsys):
    """Run test.py with these arguments; (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
        code = 0
        try:
            runpy.run_path(SCRIPT, run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def rows(folder):
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def pairs(place, scale):
    """{name: (lr, gt)} of the set."""
    gts = {name: image_files.read_image(place / "data" / "Own" / "GT" / f"{name}.png") for name in ("a", "b")}
    gts = {name: imgproc.crop_to_multiple(gt, scale) for name, gt in gts.items()}
    return {name: (imgproc.degrade(gt, scale), gt) for name, gt in gts.items()}


def cell(scores):
    return f"{scores['psnr']:.2f} / {scores['ssim']:.4f}".replace(" 0.", " .")


def table(text):
    """The rows of the Markdown tables in a text, by their first cell."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {line[0].strip("*"): line[1:] for line in lines}


def test_scores_are_those_of_the_written_images(place, score):
    code, out, _ = score("--model_path", "w3.pth", "--test_sets", "Own")
    assert code == 0
    folder = place / "results" / "w3" / "test"
    found = metrics(folder)["Own"]
    network = weights.load("w3.pth")
    for name, (lr, gt) in pairs(place, 3).items():
        sr = image_files.read_image(folder / "Own" / f"{name}.png")
        assert (sr == upscale(network, lr)).all()
        assert found["images"][name] == {"psnr": imgproc.psnr(sr, gt, 3), "ssim": imgproc.ssim(sr, gt, 3)}
        assert found["bicubic"]["images"][name]["psnr"] == imgproc.psnr(imgproc.imresize(lr, 3), gt, 3)
    for metric in ("psnr", "ssim"):
        assert found[metric] == approx(np.mean([image[metric] for image in found["images"].values()]), abs=1e-12)
    assert (found["upscale_factor"], found["degradation"], found["self_ensemble"]) == (3, "BI", False)
    assert found["seconds"] > 0
    assert found["peak_memory_gib"] is None or found["peak_memory_gib"] > 0.05
    expected = {**found["images"], "mean": found}
    assert [(row["image"], float(row["psnr"]), float(row["ssim"])) for row in rows(folder)] == [
        (name, image["psnr"], image["ssim"]) for name, image in expected.items()
    ]
    assert float(rows(folder)[0]["bicubic_psnr"]) == found["bicubic"]["images"]["a"]["psnr"]
    assert [row["seconds"] for row in rows(folder)] == ["", "", str(found["seconds"])]
    printed = table(out)
    assert (printed["x3, BI"], printed["w3"], printed["bicubic"]) == (["Own"], [cell(found)], [cell(found["bicubic"])])
    assert table((folder / "report.md").read_text()) == printed
    assert not [name for name in printed if "paper" in name]  # which has no scores of this set
    assert str(folder) in out


def test_self_ensemble_has_its_own_folder_and_the_plain_scores_beside_it(place, score):
    assert score("--model_path", "w2.pth", "--test_sets", "Own")[0] == 0
    arguments = ["--model_path", "w2.pth", "--test_sets", "Own", "--self_ensemble", "True", "--save_images", "False"]
    code, out, _ = score(*arguments)
    assert code == 0
    plain, plus = (metrics(place / "results" / "w2" / folder)["Own"] for folder in ("test", "test_plus"))
    network = weights.load("w2.pth")
    for name, (lr, gt) in pairs(place, 2).items():
        assert plus["images"][name]["psnr"] == imgproc.psnr(upscale(network, lr, self_ensemble=True), gt, 2)
    assert plus["plain"]["images"] == plain["images"] != plus["images"]
    assert plus["self_ensemble"] is True
    printed = table(out)
    assert (printed["w2"], printed["w2+"]) == ([cell(plain)], [cell(plus)])
    first = rows(place / "results" / "w2" / "test_plus")[0]
    assert (float(first["plain_psnr"]), float(first["psnr"])) == (plain["images"]["a"]["psnr"], plus["images"]["a"]["psnr"])
    assert sorted(path.name for path in (place / "results" / "w2" / "test_plus").iterdir()) == ["metrics.csv", "metrics.json", "report.md"]


def test_several_weights_make_one_table_beside_the_paper(place, score):
    write_set(place / "data" / "Set5", [(32, 32)] * 5)
    code, out, err = score("--model_path", "w2.pth", "w3.pth", "--test_sets", "Own", "Set5", "Urban100")
    assert code == 0
    assert "data/Urban100" in err
    together = place / "results" / "table" / "test"
    for scale, published in ((2, "38.27 / .9614"), (3, "34.74 / .9299")):
        alone = place / "results" / f"w{scale}" / "test"
        assert metrics(together)[f"w{scale}"] == metrics(alone)
        assert len(list((alone / "Set5").iterdir())) == 5
        own = table((alone / "report.md").read_text())
        assert own[f"x{scale}, BI"] == ["Own", "Set5"]
        assert own["paper: RCAN"] == ["–", published]
        assert table(out)[f"w{scale}"] == own[f"w{scale}"] == [cell(metrics(alone)[name]) for name in ("Own", "Set5")]
        assert "paper: RCAN+" not in own  # published for the self-ensemble
    report = (together / "report.md").read_text()
    assert "Urban100" in report
    assert "38.27 / .9614" in report
    assert "34.74 / .9299" in report
    assert [row["weights"] for row in rows(together)] == ["w2"] * 9 + ["w3"] * 9


@pytest.mark.parametrize("degradation", ["BD", "DN"])
def test_another_degradation_is_warned_of_and_not_compared_with_the_paper(place, score, degradation):
    write_set(place / "data" / "Set5", [(32, 32)] * 5)
    code, out, err = score("--model_path", "w2.pth", "--test_sets", "Set5", "--degradation", degradation)
    assert code == 0
    assert all(word in err for word in ("w2.pth", "'BI'", f"'{degradation}'"))
    assert metrics(place / "results" / "w2" / f"test_{degradation}")["Set5"]["degradation"] == degradation
    assert "paper" not in out


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--model_path", "w2.pth", "gone.pth", "--test_sets", "Own"], ["gone.pth"]),
        (["--model_path", "w2.pth", "notes.txt", "--test_sets", "Own"], ["notes.txt"]),
        (["--model_path", "cut.pth", "--test_sets", "Own"], ["cut.pth", "conv1.bias"]),
        (["--model_path", "w2.pth", "other/w2.pth", "--test_sets", "Own"], ["model_path", "w2, w2"]),
        (["--model_path", "w2.pth", "w2.pth", "--test_sets", "Own"], ["model_path"]),
        (["--model_path", "w2.pth", "--test_sets"], ["test_sets"]),
        (["--model_path", "w2.pth", "--test_sets", "Gone", "Gone2"], ["data/Gone"]),
        (["--model_path", "w2.pth", "--test_sets", "Own", "Set14"], ["data/Set14", "14"]),
        (["--model_path", "w2.pth", "--test_sets", "Own", "Broken"], ["data/Broken/GT/b.png"]),
        (["--model_path", "w2.pth", "--test_sets", "Own", "--results_dir", "notes.txt"], ["notes.txt"]),
    ],
)
def test_a_mistake_ends_with_its_name_before_anything_is_scored(place, score, arguments, names):
    weights.export(tiny(2), place / "other" / "w2.pth")
    torch.save({name: value for name, value in tiny(2).state_dict().items() if name != "conv1.bias"}, place / "cut.pth")
    (place / "notes.txt").write_text("notes")
    write_set(place / "data" / "Set14", [(32, 32)] * 2)
    write_set(place / "data" / "Broken", [(40, 44), (40, 44)])
    data = (place / "data/Broken/GT/b.png").read_bytes()
    (place / "data/Broken/GT/b.png").write_bytes(data[: len(data) // 2])
    before = sorted(place.rglob("*"))
    code, out, err = score(*arguments)
    assert code == 1
    assert not out
    assert err.splitlines()[-1].startswith("error")
    assert all(name in err.splitlines()[-1] for name in names)
    assert sorted(place.rglob("*")) == before


def test_a_set_that_is_given_by_its_path_lies_anywhere(place, score):
    write_set(place / "elsewhere" / "Mine", [(32, 36)])
    assert score("--model_path", "w2.pth", "--test_sets", str(place / "elsewhere" / "Mine"))[0] == 0
    assert list(metrics(place / "results" / "w2" / "test")) == ["Mine"]
    assert (place / "results" / "w2" / "test" / "Mine" / "a.png").is_file()


def test_lr_images_on_disk_are_the_input(place, score):
    lr = drawn_image(23, 20, seed=7)
    image_files.write_image(place / "data" / "Own" / "LRbicx2" / "a.png", lr)
    image_files.write_image(place / "data" / "Own" / "LRbicx2" / "b.png", drawn_image(18, 26, seed=8))
    assert score("--model_path", "w2.pth", "--test_sets", "Own")[0] == 0
    sr = image_files.read_image(place / "results" / "w2" / "test" / "Own" / "a.png")
    assert (sr == upscale(weights.load("w2.pth"), lr)).all()


# As a command


@pytest.mark.slow
def test_the_released_weights_score_what_the_documents_say(data_root, tmp_path):
    """The documents' table (PSNR, SSIM) on Set5, and bicubic by MATLAB's kernel, to the last printed digit."""
    documented = {4: (31.52, 0.8861, 28.43), 2: (37.32, 0.9578, 33.67)}
    paths = [str(released_weights(scale)) for scale in documented]
    arguments = ["--model_path", *paths, "--data_root", str(data_root), "--test_sets", "Set5", "--save_images", "False"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = metrics(tmp_path / "results" / "table" / "test")
    for path, (psnr, ssim, bicubic) in zip(paths, documented.values(), strict=True):
        scores = found[path.rsplit("/", 1)[-1].split(".")[0]]["Set5"]
        assert (scores["psnr"], scores["ssim"], scores["bicubic"]["psnr"]) == (
            approx(psnr, abs=0.006),
            approx(ssim, abs=0.00006),
            approx(bicubic, abs=0.006),
        )

"""test.py, the scoring script: scores are those of the written images, beside bicubic and the paper, and mistakes end it early."""

import csv
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx

import image_files
import imgproc
import weights
from config import Config, released_weights
from helpers import REPOSITORY, Page, drawn_image, tiny, write_set
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


def test_the_page_shows_the_written_images_from_the_largest_loss_of_quality(place, score):
    write_set(place / "data" / "Other", [(40, 44)], seed=5)
    code, out, _ = score("--model_path", "w2.pth", "--test_sets", "Own", "Other")
    assert code == 0 and "report.html" in out
    folder = place / "results" / "w2" / "test"
    page, found = Page(folder / "report.html"), metrics(folder)
    gains = {
        f"{name}/{image}": found[name]["images"][image]["psnr"] - found[name]["bicubic"]["images"][image]["psnr"]
        for name in found
        for image in found[name]["images"]
    }
    assert list(page.figures) == sorted(gains, key=gains.get) and len(gains) == 3
    assert all(f"{gain:+.2f} dB" in page.text for gain in gains.values())
    assert cell(found["Own"]) in page.text
    for name, (lr, gt) in pairs(place, 2).items():
        shown = page.figures[f"Own/{name}"]
        assert list(shown) == ["bicubic", "w2", "GT"]
        expected = (imgproc.imresize(lr, 2), image_files.read_image(folder / "Own" / f"{name}.png"), gt)
        assert all((one == two).all() for one, two in zip(shown.values(), expected, strict=True))
    before = (folder / "report.html").read_bytes()
    code, out, err = score("--model_path", "w2.pth", "--test_sets", "Own", "--save_images", "False")
    assert (folder / "report.html").read_bytes() == before
    assert "report.html" in err and "report.html" not in out  # it is of earlier scores


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
    assert sorted(path.name for path in (place / "results" / "w2" / "test_plus").iterdir()) == [
        "made_from.json",
        "metrics.csv",
        "metrics.json",
        "report.md",
    ]


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
        (["--exp_name", "typo", "--test_sets", "Own"], ["results/typo", "exp_name"]),
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
    documented = {4: (31.62, 0.8872, 28.43), 2: (37.56, 0.9590, 33.67)}
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


# Where scores are filed


@pytest.fixture
def module(place, monkeypatch):
    """The functions of test.py, whose name belongs to one of Python's own modules."""
    return runpy.run_path(SCRIPT)


def folders(module, *paths, **settings):
    config = Config(model_path=tuple(map(str, paths)), **settings)
    found = module["choose_folders"](config, [Path(path) for path in paths])
    return list(dict.fromkeys(folder.as_posix() for folder in found.values()))


@pytest.mark.parametrize(
    ("paths", "settings", "expected"),
    [
        (["results/mine/best.pth.tar"], {}, ["mine/test"]),
        (["best.pth.tar"], {}, ["PLACE/test"]),  # the folder that it lies in
        (["downloads/RCAN_x4-DIV2K.pth.tar"], {}, ["RCAN_x4-DIV2K/test"]),
        (["RCAN_psnr31.52.pth"], {}, ["RCAN_psnr31.52/test"]),
        ([".hidden.safetensors"], {}, ["hidden/test"]),
        (["results/mine/best.pth.tar"], {"exp_name": "again"}, ["again/test"]),
        (["a.pth"], {"degradation": "BD"}, ["a/test_BD"]),
        (["a.pth"], {"self_ensemble": True}, ["a/test_plus"]),
        (["a.pth"], {"degradation": "DN", "self_ensemble": True}, ["a/test_DN_plus"]),
        (["a.pth", "run/best.pth.tar"], {}, ["a/test", "run/test", "table/test"]),
        (["A/net_g.pth", "B/net_g.pth"], {}, ["net_g/test", "B_net_g/test", "table/test"]),
        (["A/net_g.pth", "B/net_g.pth"], {"exp_name": "all"}, ["all/test/net_g", "all/test/B_net_g", "all/test"]),
    ],
)
def test_scores_are_filed_under_the_weights_name_and_the_protocol(module, place, paths, settings, expected):
    assert folders(module, *paths, **settings) == [f"results/{folder.replace('PLACE', place.name)}" for folder in expected]


def test_scores_of_other_weights_stay_as_they_are(module, place):
    for path in ("A/net_g.pth", "B/net_g.pth", "results/rcan_x4/best.pth.tar", "C/rcan_x4.pt", "A/w.pth", "B/w.pth"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()
    assert folders(module, "C/rcan_x4.pt")[0] == "results/C_rcan_x4/test"  # results/rcan_x4 is a run's
    taken = Path(folders(module, "A/net_g.pth")[0])
    module["take"](taken, [Path("A/net_g.pth")])
    assert folders(module, "A/net_g.pth")[0] == "results/net_g/test"  # the same file again
    assert folders(module, "B/net_g.pth")[0] == "results/B_net_g/test"
    with pytest.raises(ValueError, match="exp_name"):
        folders(module, "B/net_g.pth", exp_name="net_g")
    module["take"](Path("results/table/test"), [Path("A/w.pth"), Path("B/w.pth")])
    assert folders(module, "A/w.pth", "A/net_g.pth")[-1] == "results/table_2/test"


@pytest.mark.slow
def test_two_files_of_one_name_have_two_reports(place, score):
    for folder, offset in (("A", 0.0), ("B", 0.1)):
        network = tiny(2)
        network.conv3.bias.data += offset
        weights.export(network, place / folder / "net_g.pth")
        assert score("--model_path", f"{folder}/net_g.pth", "--test_sets", "Own")[0] == 0
    found = [metrics(place / "results" / name / "test")["Own"]["psnr"] for name in ("net_g", "B_net_g")]
    assert found[0] != found[1]


# LR images that are not what they seem, and images that say nothing


def test_lr_images_of_another_program_are_labelled_and_never_beside_the_paper(place, score):
    """Nearest-neighbour LR, in a set that the paper scores."""
    write_set(place / "data" / "Set5", [(46, 40)] * 5)
    for file in (place / "data/Set5/GT").iterdir():
        gt = imgproc.crop_to_multiple(image_files.read_image(file), 2)
        image_files.write_image(place / "data/Set5/LRbicx2" / file.name, np.ascontiguousarray(gt[::2, ::2]))
    code, out, _ = score("--model_path", "w2.pth", "--test_sets", "Own", "Set5")
    assert code == 0
    found = metrics(place / "results/w2/test")
    assert [found[name]["degradation"] for name in ("Own", "Set5")] == ["BI", "LR as given"]
    assert not [row for row in table(out) if row.startswith("paper")]
    shutil.rmtree(place / "data/Set5/LRbicx2")
    _, out, _ = score("--model_path", "w2.pth", "--test_sets", "Set5")
    assert [row for row in table(out) if row.startswith("paper")]
    assert metrics(place / "results/w2/test")["Set5"]["degradation"] == "BI"


def test_flat_images_do_not_count_in_the_mean_psnr_of_any_method(place, score):
    image_files.write_image(place / "data/Own/GT/flat.png", np.full((40, 40, 3), 128, np.uint8))
    code, out, _ = score("--model_path", "w2.pth", "--test_sets", "Own")
    assert code == 0
    text = (place / "results/w2/test/metrics.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["Own"]
    assert found["psnr"] == approx(np.mean([found["images"][name]["psnr"] for name in "ab"]))
    assert found["ssim"] == approx(np.mean([found["images"][name]["ssim"] for name in ("a", "b", "flat")]))
    assert found["bicubic"]["images"]["flat"]["psnr"] is None  # bicubic repeats it exactly
    assert found["bicubic"]["psnr"] == approx(np.mean([found["bicubic"]["images"][name]["psnr"] for name in "ab"]))
    assert list(found["not_in_psnr"]) == ["flat"]
    assert "Own/flat" in out

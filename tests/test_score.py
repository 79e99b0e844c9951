"""scripts/score.py: pairs by name, the papers' numbers, what does not count, and results that are never replaced unasked."""

import csv
import importlib
import json
import runpy
import sys
import types

import numpy as np
import pytest
import torch
from pytest import approx

import image_files
import weights
from helpers import REPOSITORY, drawn_image, tiny, write_set
from runtime import run_script

sys.path.insert(0, str(REPOSITORY / "scripts"))
score = importlib.import_module("score")
OFFSETS = {"1": 5, "10": 10, "2": 20}  # of SR from GT, in each channel


def image(seed, height=40, width=48):
    return drawn_image(height, width, seed) // 2 + 40  # away from 0 and 255, so that an offset clips nothing


def write(folder, images, ending=""):
    for name, values in images.items():
        image_files.write_image(folder / f"{name}{ending}.png", values)


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def read(folder):
    return json.loads((folder / "scores.json").read_text(), parse_constant=refuse)


def rows(folder):
    return list(csv.DictReader((folder / "scores.csv").read_text().splitlines()))


def table(out):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A set of three images, and SR images that differ from them by known offsets."""
    monkeypatch.chdir(tmp_path)
    gts = {name: image(seed) for seed, name in enumerate(OFFSETS)}
    write(tmp_path / "data" / "Own" / "GT", gts)
    write(tmp_path / "sr", {name: gt + OFFSETS[name] for name, gt in gts.items()})
    return tmp_path


@pytest.fixture
def run(place, monkeypatch, capsys):
    """Run the script as its main guard does: (exit code, stdout, stderr)."""

    def run(*more, sr=("sr",), gt="data/Own", scale=4):
        arguments = ["--sr", *map(str, sr), "--gt", str(gt), "--upscale_factor", str(scale), *more]
        monkeypatch.setattr(sys, "argv", ["score.py", *arguments])
        code = 0
        try:
            run_script(score.main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Numbers


@pytest.mark.slow
def test_the_official_images_of_set5_score_as_published(data_root, run, place):
    official = data_root / "Set5" / "SRx4_rcan_official"
    if not official.is_dir():
        pytest.skip(f"{official} is not there")
    code, out, _ = run("--output", "o", sr=[official], gt=data_root / "Set5")
    assert code == 0
    assert (read(place / "o")["psnr"], read(place / "o")["ssim"]) == (approx(32.63, abs=0.005), approx(0.9002, abs=0.00005))
    assert table(out)["mean"] == ["32.63 / .9002"]


def offset_psnr(offset, peak=255):
    return 20 * np.log10(peak / offset)


@pytest.mark.parametrize(("y", "share"), [("True", 219 / 255), ("False", 1)])  # Y has 219 steps from black to white
def test_psnr_of_constant_offsets(place, run, y, share):
    code, out, err = run("--only_y_channel", y, "--output", "o")
    assert (code, "warning" in err) == (0, False)
    found, expected = read(place / "o"), {name: offset_psnr(offset * share) for name, offset in OFFSETS.items()}
    assert {name: values["psnr"] for name, values in found["images"].items()} == approx(expected)
    assert found["psnr"] == approx(np.mean([*expected.values()]))
    assert found["ssim"] == approx(np.mean([values["ssim"] for values in found["images"].values()]))
    assert found["protocol"]["only_y_channel"] is (y == "True")
    assert ("RGB" in out) is (y == "False")
    assert table(out) == {
        "": ["sr: psnr / ssim"],
        "---": ["---"],
        **{name: [f"{values['psnr']:.2f} / {values['ssim']:.4f}".replace("/ 0.", "/ .")] for name, values in found["images"].items()},
        "mean": [f"{found['psnr']:.2f} / {found['ssim']:.4f}".replace("/ 0.", "/ .")],
    }
    assert [(row["method"], row["image"], float(row["psnr"]), float(row["ssim"])) for row in rows(place / "o")] == [
        ("sr", name, values["psnr"], values["ssim"]) for name, values in {**found["images"], "mean": found}.items()
    ]


def test_the_border_is_the_scale_or_what_is_asked_for(place, run):
    gt = image_files.read_image(place / "data/Own/GT/1.png")
    sr = gt + 5
    sr[2:-2, 2:-2] = gt[2:-2, 2:-2] + 10  # seen alone behind a border of 2
    image_files.write_image(place / "sr/1.png", sr)
    for more, scale, border in (([], 2, 2), (["--border", "2"], 4, 2), (["--border", "0"], 4, 0)):
        assert run(*more, "--output", f"o{scale}{border}", scale=scale)[0] == 0
        found = read(place / f"o{scale}{border}")
        assert found["protocol"]["border"] == border
        outer = 0 if border else 1 - 36 * 44 / (40 * 48)
        expected = 10 * np.log10(255**2 / ((219 / 255) ** 2 * (outer * 25 + (1 - outer) * 100)))
        assert found["images"]["1"]["psnr"] == approx(expected)


def test_images_that_test_py_wrote_score_as_it_says(place, run, monkeypatch):
    write_set(place / "data" / "Odd", [(46, 41), (37, 53)])  # no multiples of the scale
    weights.export(tiny(3), place / "w3.pth")
    monkeypatch.setattr(sys, "argv", ["test.py", "--model_path", "w3.pth", "--test_sets", "Odd"])
    runpy.run_path(str(REPOSITORY / "test.py"), run_name="__main__")
    assert run("--output", "o", sr=["results/w3/test/Odd"], gt="data/Odd", scale=3)[0] == 0
    metrics, found = json.loads((place / "results/w3/test/metrics.json").read_text())["Odd"], read(place / "o")
    assert all(found[key] == metrics[key] for key in ("psnr", "ssim", "images"))


# Pairs


@pytest.mark.parametrize("ending", ["", "x4", "_x4", "_SR", "_SRF_4_SR", "_x4_SR", "_out", "_RCAN", "x4_swinIR-L (best)"])
def test_sr_images_pair_by_name_with_any_common_ending(place, run, ending):
    for file in [*(place / "sr").iterdir()]:
        file.rename(file.with_name(f"{file.stem}{ending}.png"))
    (place / "sr" / "readme.txt").write_text("not an image")
    assert run("--only_y_channel", "False", "--output", "o")[0] == 0
    found = {name: values["psnr"] for name, values in read(place / "o")["images"].items()}
    assert found == approx({name: offset_psnr(offset) for name, offset in OFFSETS.items()})


@pytest.mark.parametrize(
    ("gt_files", "sr_files"),
    [
        (["HR/a.png", "HR/b.png"], ["ax4.png", "bx4.jpg"]),
        (["GTmod12/a.png", "LRbicx4/a.png"], ["a.png"]),
        (["a.png", "b.png"], ["a_b.png", "b_b.png"]),
        (["image_SRF_4/a_SRF_4_HR.png", "image_SRF_4/a_SRF_4_LR.png"], ["a_SRF_4_RCAN.png"]),
        (["head.png", "header.png"], ["headers.png", "heads.png"]),
    ],
)
def test_every_layout_of_gt_is_known(place, run, gt_files, sr_files):
    for file in gt_files:
        image_files.write_image(place / "set" / file, image(3, 16, 16) if "LR" in file else image(3, 64, 64))
    for file in sr_files:
        image_files.write_image(place / "method" / file, image(3, 64, 64) + 5)
    assert run("--only_y_channel", "False", sr=["method"], gt="set")[0] == 0
    found = read(place / "results/scores/method")
    assert len(found["images"]) == len(sr_files)
    assert found["psnr"] == approx(offset_psnr(5), abs=0.3)  # of which JPEG takes a little


GT, LR = image(0), image(1, 10, 12)
MISTAKES = {
    "missing": ({"1": GT, "10": GT}, ["sr: ", " 2.png"]),
    "extra": ({"1": GT, "10": GT, "2": GT, "three": GT}, ["sr: ", "three.png"]),
    "ending": ({"1_x": GT, "10_y": GT, "2_x": GT}, ["sr: ", " 10.png", "10_y.png"]),
    "digits": ({"11": GT, "101": GT, "21": GT}, ["sr: ", " 1.png", "101.png"]),
    "none": ({}, ["sr: "]),
    "size": ({"1": GT, "10": GT[:36], "2": GT}, ["sr/10.png", "48x36", "48x40"]),
    "lr": ({"1": LR, "10": LR, "2": LR}, ["sr/1.png", "12x10", "48x40", "LR"]),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_images_that_do_not_fit_are_named_and_nothing_is_written(place, run, kind):
    images, names = MISTAKES[kind]
    for file in (place / "sr").iterdir():
        file.unlink()
    write(place / "sr", images)
    code, out, err = run()
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert all(name in err for name in names)
    assert not (place / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"sr": ["gone"]}, ["gone"]),
        ({"sr": ["sr", "data/../sr"]}, ["sr data/../sr"]),
        ({"sr": ["sr", "sr/"]}, ["sr sr/"]),
        ({"sr": []}, ["--sr"]),
        ({"gt": "data/Gone"}, ["data/Gone"]),
        ({"gt": "sr/1.png"}, ["sr/1.png"]),
        ({"scale": 0}, ["upscale_factor=0"]),
        ({"more": ["--border", "-1"]}, ["border=-1"]),
        ({"more": ["--border", "15"]}, ["Own/GT/1.png", "48x40", "15"]),
        ({"more": ["--output", "sr/1.png"]}, ["sr/1.png"]),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(place, run, arguments, names):
    before = snapshot(place)
    code, out, err = run(*arguments.pop("more", []), **arguments)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert all(name in err for name in names)
    assert snapshot(place) == before


def test_twins_and_damaged_images_are_named(place, run):
    image_files.write_image(place / "sr/2.bmp", GT)
    code, _, err = run()
    assert (code, "2.png" in err and "2.bmp" in err) == (1, True)
    (place / "sr/2.bmp").unlink()
    (place / "sr/2.png").write_bytes((place / "sr/2.png").read_bytes()[:200])
    code, _, err = run()
    assert (code, "sr/2.png" in err, (place / "results").exists()) == (1, True, False)


@pytest.mark.skipif(sys.platform != "linux", reason="names are text here, and not bytes")
def test_a_folder_that_reports_cannot_name_is_refused(place, run):
    (place / "sr").rename(place / "sr\udcff")
    code, out, err = run(sr=["sr\udcff"])
    assert (code, out, "sr\\udcff" in err, (place / "results").exists()) == (1, "", True, False)


def test_sr_of_the_size_of_the_whole_gt_is_cropped_with_it_and_named(place, run):
    gt = image(5, 43, 50)
    write(place / "data/Odd/GT", {"odd": gt})
    for sr, noted in ((gt + 5, True), (gt[:40, :48] + 5, False)):
        image_files.write_image(place / "method/odd.png", sr)
        code, _, err = run("--only_y_channel", "False", "--output", "o", sr=["method"], gt="data/Odd")
        assert (code, "odd: " in err, "50x43" in err) == (0, noted, noted)
        assert read(place / "o")["psnr"] == approx(offset_psnr(5))


# What does not count, and what is changed


def test_equal_and_flat_images_do_not_count_in_the_mean_psnr(place, run):
    flat = np.full((40, 48, 3), (90, 120, 33), np.uint8)
    flat[:4] = 0  # the border is not looked at
    write(place / "data/Own/GT", {"10": flat})
    write(place / "sr", {"1": image_files.read_image(place / "data/Own/GT/1.png"), "10": flat + 1})
    code, out, err = run()
    found = read(place / "results/scores/sr")
    assert code == 0
    assert found["uncounted"] == {"psnr": {"1": "inf", "10": "flat"}}
    assert [found["images"][name]["psnr"] for name in ("1", "10")] == [None, None]
    assert found["psnr"] == found["images"]["2"]["psnr"] == approx(offset_psnr(20 * 219 / 255))
    assert found["images"]["1"]["ssim"] == 1
    assert found["ssim"] == approx(np.mean([values["ssim"] for values in found["images"].values()]))
    assert table(out)["1"] == ["inf / 1.0000"]
    assert table(out)["10"][0].startswith("flat / ")
    assert "sr: 1: " in err and "sr: 10: " in err and "sr: 2: " not in err
    assert [row["psnr"] for row in rows(place / "results/scores/sr")] == ["", "", str(found["psnr"]), str(found["psnr"])]


def test_a_gt_with_one_flat_channel_counts(place, run):
    gt = image_files.read_image(place / "data/Own/GT/1.png")
    gt[:, :, 0] = 77
    write(place / "data/Own/GT", {"1": gt})
    write(place / "sr", {"1": gt + 5})
    assert run("--only_y_channel", "False", "--output", "o")[0] == 0
    assert read(place / "o")["images"]["1"]["psnr"] == approx(offset_psnr(5))


def test_where_no_image_counts_there_is_no_mean(place, run):
    code, out, _ = run("--output", "o", sr=["data/Own/GT"])
    assert code == 0
    assert (read(place / "o")["psnr"], read(place / "o")["ssim"]) == (None, 1)
    assert table(out)["mean"] == ["– / 1.0000"]


def test_depth_and_transparency_that_are_dropped_are_named(place, run):
    for name, changes in {"1": {"bits": 16}, "10": {"alpha": 200}, "2": {"alpha": 255}}.items():
        pixels = image_files.read_image(place / "sr" / f"{name}.png")
        pixels = pixels.astype(np.uint16) * 257 if "bits" in changes else pixels
        alpha = np.full(pixels.shape[:2], changes["alpha"], np.uint8) if "alpha" in changes else None
        image_files.write_photo(place / "sr" / f"{name}.png", image_files.Photo(pixels, alpha))
    code, _, err = run("--only_y_channel", "False", "--output", "o")
    assert code == 0
    assert ["sr: 1: " in err, "sr: 10: " in err, "sr: 2: " in err] == [True, True, False]
    assert "16" in err and "alpha" in err
    assert read(place / "o")["images"]["1"]["psnr"] == approx(offset_psnr(5))


# Several methods, and results that are there


def test_several_methods_are_beside_each_other(place, run):
    write(place / "other", {name: image(seed) + 7 for seed, name in enumerate(OFFSETS)}, "x4")
    code, out, _ = run("--only_y_channel", "False", sr=["sr", "other"])
    assert code == 0
    folder = place / "results/scores/sr+other"
    found = read(folder)
    assert (found["other"]["psnr"], found["sr"]["images"]["10"]["psnr"]) == (approx(offset_psnr(7)), approx(offset_psnr(10)))
    assert [(row["method"], row["image"]) for row in rows(folder)] == [
        (method, name) for method in ("sr", "other") for name in (*OFFSETS, "mean")
    ]
    assert [cell.split(" / ")[0] for cell in table(out)["10"]] == [f"{offset_psnr(10):.2f}", f"{offset_psnr(7):.2f}"]
    assert run("--only_y_channel", "False", "--output", "alone", sr=["other"])[0] == 0
    assert read(place / "alone") == found["other"]


def test_scores_of_something_else_are_not_replaced_unasked(place, run):
    write(place / "other", {name: image(seed) + 7 for seed, name in enumerate(OFFSETS)})
    assert run("--output", "o")[0] == 0
    first = snapshot(place / "o")
    write(place / "sr", {"1": image(0) + 6})  # a better method, in the same folder
    code, _, err = run("--output", "o")
    assert (code, "o/scores.json" in err) == (0, True)
    second = snapshot(place / "o")
    assert first != second
    refused = [{"sr": ["other"]}, {"sr": ["sr", "other"]}, {"gt": "other"}, {"scale": 2}, {"more": ["--only_y_channel", "False"]}]
    for arguments in refused:
        code, _, err = run("--output", "o", *arguments.pop("more", []), **arguments)
        assert (code, "o/scores.json" in err, snapshot(place / "o") == second) == (1, True, True)
    assert run("--output", "o", "--overwrite", "True", sr=["other"])[0] == 0
    assert snapshot(place / "o") != second


@pytest.mark.parametrize(
    ("name", "text"),
    [("scores.csv", "mine"), ("scores.json", "[1]"), ("scores.json", '{"a": 1}'), ("scores.json", '{"a": {}}'), ("scores.json", "{")],
)
def test_files_of_another_program_are_not_replaced_unasked(place, run, name, text):
    (place / "o").mkdir()
    (place / "o" / name).write_text(text)
    code, _, err = run("--output", "o")
    assert (code, f"o/{name}" in err) == (1, True)
    assert snapshot(place / "o") == {place / "o" / name: text.encode()}
    assert run("--output", "o", "--overwrite", "True")[0] == 0


# Further metrics


def test_without_pyiqa_further_metrics_are_refused(place, run, monkeypatch):
    monkeypatch.setattr(score.importlib.util, "find_spec", lambda _name: None)
    code, out, err = run("--metrics", "lpips")
    assert (code, out, "lpips" in err and "pip install pyiqa" in err) == (1, "", True)
    assert not (place / "results").exists()
    assert run("--metrics", "psnr", "ssim")[0] == 0


class StandIn:
    """A metric of pyiqa's interface: the mean difference, or the mean of SR, of images in [0, 1]."""

    def __init__(self, mode):
        self.metric_mode = mode

    def __call__(self, *images):
        assert [found.shape for found in images] == [(1, 3, 40, 48)] * (2 if self.metric_mode == "FR" else 1)
        return torch.full((1, 1), float((images[0] - images[1]).mean() if self.metric_mode == "FR" else images[0].max() - 2))


@pytest.fixture
def pyiqa(monkeypatch):
    """A stand-in for the package: far, niq, absent (weights that cannot be had), failing, nan."""

    def create_metric(name):
        if name == "absent":
            raise OSError("no connection")
        assert name in module.list_models()  # as the package does
        values = {"far": StandIn("FR"), "niq": StandIn("NR"), "nan": lambda *_: torch.tensor(torch.nan)}
        found = values.get(name, lambda *_: torch.zeros(2) + torch.zeros(3))
        if name not in ("far", "niq"):
            found = type("Failing", (), {"metric_mode": "FR", "__call__": lambda _self, *images, call=found: call(*images)})()
        return found

    module = types.ModuleType("pyiqa")
    module.list_models = lambda: ["far", "niq", "absent", "failing", "nan"]
    module.create_metric = create_metric
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    monkeypatch.setattr(score.importlib.util, "find_spec", lambda name: module if name == "pyiqa" else None)


def test_metrics_of_pyiqa_see_whole_rgb_images(place, run, pyiqa):
    code, out, err = run("--metrics", "far", "niq", "--output", "o")
    assert code == 0
    found = read(place / "o")
    assert {name: values["far"] for name, values in found["images"].items()} == approx({k: v / 255 for k, v in OFFSETS.items()})
    assert found["far"] == approx(35 / 3 / 255)
    assert found["images"]["2"]["niq"] == approx(image_files.read_image(place / "sr/2.png").max() / 255 - 2)
    assert [*rows(place / "o")[0]] == ["method", "image", "psnr", "ssim", "far", "niq"]
    assert table(out)[""] == ["sr: psnr / ssim / far / niq"]
    assert torch.hub.get_dir() in err  # where weights go is said before


def test_a_value_that_is_not_finite_is_null_and_named(place, run, pyiqa):
    code, out, err = run("--metrics", "nan", "--output", "o")
    assert code == 0
    found = read(place / "o")
    assert (found["nan"], found["images"]["1"]["nan"]) == (None, None)
    assert found["psnr"] is not None
    assert table(out)["1"][0].endswith(" / nan")
    assert "sr: 1: nan" in err


@pytest.mark.parametrize("name", ["absent", "failing", "unknown"])
def test_a_metric_that_pyiqa_cannot_give_is_named(place, run, pyiqa, name):
    code, out, err = run("--metrics", name)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: ") and name in err.splitlines()[-1]
    assert not (place / "results").exists()

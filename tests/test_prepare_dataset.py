"""scripts/prepare_dataset.py: what it makes is what training makes, and what is there stays."""

import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest

import dataset
import files
import image_files
import imgproc
from helpers import REPOSITORY, drawn_image, noise_image
from runtime import run_script

sys.path.insert(0, str(REPOSITORY / "scripts"))
prepare_dataset = importlib.import_module("prepare_dataset")

Grid = prepare_dataset.Grid
ALL = ("--degradations", "BI", "BD", "DN")
X2 = ("--upscale_factors", "2")
SUB = ("--upscale_factors", "2", "4", "--sub_image_size", "16", "--sub_image_step", "8")


def prepare(source: Path, output: Path, *more: str) -> None:
    prepare_dataset.main(["--input", str(source), "--output", str(output), *more])


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in a folder: time of change and contents, by path; also hidden files."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (_, data) in snapshot(folder).items()}


def changed(before: dict, after: dict) -> set[str]:
    """Names that came, went or differ."""
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def lr_of(path: Path, scale: int, degradation: str = "BI") -> imgproc.RGB:
    """The LR image of a whole GT image, as training makes it where a set has none."""
    gt = imgproc.crop_to_multiple(image_files.read_image(path), scale)
    return dataset.make_lr(dataset.Pair(path.stem, path, None), gt, scale, degradation)


@pytest.fixture
def source(tmp_path) -> Path:
    """GT images of awkward sizes, in two formats."""
    folder = tmp_path / "gt images"
    image_files.write_image(folder / "a.png", noise_image(37, 50))
    image_files.write_image(folder / "b.jpg", drawn_image(41, 29))
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "Set"


@pytest.fixture
def error_of(capsys):
    """What a call says that ends with exit code 1."""

    def error_of(*arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_script(lambda: prepare(*arguments))
        assert ended.value.code == 1
        return capsys.readouterr().err

    return error_of


# What is made


def test_training_sees_the_same_with_and_without_the_lr_folders(source, output):
    prepare(source, output, *ALL, "--bd_dn_upscale_factors", "2", "3")
    kinds = [("BI", 2), ("BI", 3), ("BI", 4), ("BI", 8), ("BD", 2), ("BD", 3), ("DN", 2), ("DN", 3)]
    for degradation, scale in kinds:
        read = dataset.find_pairs(output, scale, degradation)
        assert all(pair.lr is not None for pair in read)
        on_the_fly = dataset.EvaluationSet(dataset.find_pairs(source, scale, degradation), scale, degradation)
        for (name, lr, gt), (made_name, made_lr, made_gt) in zip(dataset.EvaluationSet(read, scale, degradation), on_the_fly, strict=True):
            assert name == made_name
            assert np.array_equal(lr, made_lr)
            assert np.array_equal(gt, made_gt)
    folders = {"BI": "LRbicx", "BD": "LRBDx", "DN": "LRDNx"}
    assert {path.name for path in output.iterdir()} == {"GT", "prepared.json"} | {f"{folders[kind]}{scale}" for kind, scale in kinds}
    for name in ("a.png", "b.jpg"):
        assert (output / "GT" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.data
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_lr_images_of_set5_are_matlabs(data_root, tmp_path, scale):
    prepare(data_root / "Set5" / "GT", tmp_path, "--upscale_factors", str(scale))
    matlab = image_files.list_images(data_root / f"Set5/LRbicx{scale}_matlab")
    assert len(matlab) == 5
    for file in matlab:
        assert np.array_equal(image_files.read_image(tmp_path / f"LRbicx{scale}" / file.name), image_files.read_image(file))


def test_places_of_sub_images():
    grid = Grid(size=480, step=240, alignment=24)
    assert grid.places(960) == [(0, 480), (240, 480), (480, 480)]
    assert grid.places(1000) == [(0, 480), (240, 480), (480, 480), (504, 480)]  # 1000 is cut to 984; 984 - 480 = 504
    assert grid.places(500) == [(0, 480)]
    assert grid.places(510) == [(0, 480), (24, 480)]
    assert grid.places(300) == [(0, 288)]
    assert Grid(16, 16, 4).boxes(20, 35) == [(0, 0, 16, 16), (0, 16, 16, 16), (4, 0, 16, 16), (4, 16, 16, 16)]


def test_sub_images_cover_all_that_is_aligned():
    for side in range(12, 150):
        covered = np.zeros(side, bool)
        for start, length in Grid(48, 24, 12).places(side):
            assert start % 12 == length % 12 == 0
            covered[start : start + length] = True
        assert covered.sum() == side // 12 * 12
        assert covered[: side // 12 * 12].all()


def test_sub_images_are_cut_from_the_whole(source, output):
    prepare(source, output, *ALL, "--upscale_factors", "2", "4", "--sub_image_size", "36", "--sub_image_step", "12")
    places = {"a": [(0, 0, 36, 36), (0, 12, 36, 36)], "b": [(0, 0, 36, 24)]}  # 36x48 and 36x24 are aligned to 12; b is smaller
    for stem, path in (("a", source / "a.png"), ("b", source / "b.jpg")):
        whole = {"GT": image_files.read_image(path), "LRbicx2": lr_of(path, 2), "LRbicx4": lr_of(path, 4)}
        whole |= {"LRBDx3": lr_of(path, 3, "BD"), "LRDNx3": lr_of(path, 3, "DN")}
        for number, box in enumerate(places[stem], 1):
            for folder, image in whole.items():
                scale = 1 if folder == "GT" else int(folder[-1])
                y, x, height, width = (value // scale for value in box)
                cut = image_files.read_image(output / folder / f"{stem}_s{number:03d}.png")
                assert np.array_equal(cut, image[y : y + height, x : x + width])
    assert len(dataset.find_pairs(output, 3, "DN")) == 3


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--sub_image_size", "50"], "sub_image_size=50 .*24"),  # 24 = lcm(2, 3, 4, 8)
        (["--sub_image_size", "-24"], "sub_image_size=-24 "),
        (["--sub_image_size", "48", "--sub_image_step", "30"], "sub_image_step=30 .*24 or 48"),
        (["--sub_image_size", "48", "--sub_image_step", "72"], "sub_image_step=72 .*48"),
        (["--sub_image_step", "24"], "sub_image_size=0 "),
        (["--num_workers", "-1"], "num_workers=-1 "),
        (["--degradations"], "degradations"),
    ],
)
def test_impossible_settings_are_refused(source, output, more, named):
    with pytest.raises(ValueError, match=named):
        prepare(source, output, *more)
    assert not output.exists()


@pytest.mark.parametrize(
    ("first", "second"), [((), SUB), (SUB, ()), (SUB, (*SUB[:-1], "16")), (SUB, (*SUB, "--upscale_factors", "3"))]
)  # fmt: skip
def test_whole_images_and_different_sub_images_are_not_mixed(source, output, first, second):
    prepare(source, output, *first)
    before = snapshot(output)
    with pytest.raises(ValueError, match=str(output)):
        prepare(source, output, *second)
    assert snapshot(output) == before


def test_sub_images_are_not_mixed_with_the_users_images(source, output):
    image_files.write_image(output / "GT/mine.png", noise_image(20, 20))
    for given in (source, output / "GT"):
        with pytest.raises(ValueError, match=str(output / "GT")):
            prepare(given, output, *SUB)
    assert list(snapshot(output)) == ["GT/mine.png"]


def test_sub_images_are_not_cut_from_sub_images_of_the_same_set(source, output):
    prepare(source, output, *SUB)
    before = snapshot(output)
    with pytest.raises(ValueError, match=str(output / "GT")):
        prepare(output / "GT", output, *SUB)
    assert snapshot(output) == before


# Running again


@pytest.mark.parametrize("more", [ALL, SUB, (*SUB, *X2)])
def test_a_second_run_writes_nothing_also_for_fewer_scales(source, output, more):
    prepare(source, output, *(SUB if more != ALL else ALL))
    before = snapshot(output)
    prepare(source, output, *more)
    assert snapshot(output) == before


def test_another_scale_and_another_gt_image_only_add(source, output):
    prepare(source, output, "--upscale_factors", "4")
    before = snapshot(output)
    image_files.write_image(source / "c.png", drawn_image(20, 30))
    prepare(source, output, "--upscale_factors", "2", "4")
    new = {"GT/c.png", "LRbicx2/a.png", "LRbicx2/b.png", "LRbicx2/c.png", "LRbicx4/c.png"}
    assert changed(before, snapshot(output)) == new | {"prepared.json"}


@pytest.mark.parametrize(("more", "name"), [((), "LRbicx3/b.png"), ((), "GT/b.jpg"), (SUB, "LRbicx2/a_s003.png")])
def test_a_removed_file_is_made_again(source, output, more, name):
    prepare(source, output, *more)
    before = snapshot(output)
    (output / name).unlink()
    prepare(source, output, *more)
    assert changed(before, snapshot(output)) <= {name, "prepared.json"}
    assert (output / name).read_bytes() == before[name][1]


@pytest.mark.parametrize("folder", ["GT", "HR", "GTmod12", ""])
def test_gt_images_of_the_set_itself_stay_where_they_are(source, output, folder):
    output.mkdir()
    source.rename(output / (folder or "."))
    before = snapshot(output)
    for given in (output / folder, output):
        prepare(given, output, *X2)
        assert changed(before, snapshot(output)) == {"LRbicx2/a.png", "LRbicx2/b.png", "prepared.json"}
    assert len(dataset.find_pairs(output, 2)) == 2


def test_the_copies_stand_for_the_gt_images_when_those_are_gone_or_are_edited(source, output):
    prepare(source, output, *X2)
    before = snapshot(output)
    source.rename(source.with_name("elsewhere"))
    prepare(output / "GT", output, *X2)
    assert snapshot(output) == before
    image_files.write_image(output / "GT/a.png", noise_image(37, 50, 1))
    edited = snapshot(output)["GT/a.png"]
    prepare(output / "GT", output, *X2)
    assert changed(before, snapshot(output)) == {"GT/a.png", "LRbicx2/a.png", "prepared.json"}
    assert snapshot(output)["GT/a.png"] == edited
    assert np.array_equal(image_files.read_image(output / "LRbicx2/a.png"), lr_of(output / "GT/a.png", 2))
    with pytest.raises(ValueError, match=str(output / "GT/a.png")):  # now another image than the old one
        prepare(source.with_name("elsewhere"), output, *X2)


@pytest.mark.parametrize("more", [("--upscale_factors", "2", "4"), SUB])
def test_an_interrupted_run_goes_on(source, output, tmp_path, monkeypatch, more):
    prepare(source, tmp_path / "whole", *more)
    whole, write, count = contents(tmp_path / "whole"), files.write_whole, []

    def interrupted(path, *arguments, **options):
        count.append(path)
        if len(count) >= 4:  # the manifest and two images are written
            (output / ".half.png.1.part").write_bytes(b"half")  # as after a kill
            raise KeyboardInterrupt
        write(path, *arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(files, "write_whole", interrupted)
        prepare(source, output, *more, "--num_workers", "1")
    before = snapshot(output)
    assert 2 < len(before) < len(whole)
    prepare(source, output, *more)
    assert contents(output) == whole
    left = {name for name in before if name.endswith(".part")}
    assert len(left) == 1
    assert changed(before, snapshot(output)) & before.keys() <= {"prepared.json", *left}  # what was made stays


# GT images that change or can't be used


@pytest.mark.parametrize("more", [("--upscale_factors", "2", "4"), SUB])
@pytest.mark.parametrize("years", [-1, 1])  # an older file in the place of a newer one is noticed too
def test_what_comes_from_a_changed_gt_image_is_made_again(source, output, tmp_path, more, years):
    prepare(source, output, *more)
    before = snapshot(output)
    image_files.write_image(source / "a.png", noise_image(37, 50, 1))  # of the same size
    time = (source / "b.jpg").stat().st_mtime + years * 3e7
    os.utime(source / "a.png", (time, time))
    prepare(source, output, *more)
    ours = {name for name in before if Path(name).name.startswith("a")}
    assert changed(before, snapshot(output)) == ours | {"prepared.json"}
    prepare(source, tmp_path / "anew", *more)
    assert contents(output) == contents(tmp_path / "anew")


def test_an_interruption_while_making_again_is_noticed(source, output, monkeypatch):
    prepare(source, output, *X2)
    image_files.write_image(source / "a.png", noise_image(37, 50, 1))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(image_files, "write_image", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(source, output, *X2)
    prepare(source, output, *X2)
    prepare(source, output, *X2, "--verify", "True")


def test_files_out_of_date_that_this_run_would_not_make_are_named(source, output):
    prepare(source, output, "--upscale_factors", "2", "4")
    image_files.write_image(source / "a.png", noise_image(37, 50, 1))
    before = snapshot(output)
    with pytest.raises(ValueError, match=str(output / "LRbicx4/a.png")):
        prepare(source, output, *X2)
    assert snapshot(output) == before


def test_sub_images_of_a_place_that_is_gone_are_named(source, output):
    prepare(source, output, *SUB)
    image_files.write_image(source / "b.jpg", drawn_image(20, 29))
    before = snapshot(output)
    with pytest.raises(ValueError, match=r"GT/b_s007\.png(.|\n)*b_s012\.png"):
        prepare(source, output, *SUB)
    assert snapshot(output) == before


def test_all_unusable_gt_images_are_named_before_anything_is_written(source, output, error_of):
    (source / "empty.png").write_bytes(b"")
    (source / "text.png").write_text("not an image")
    image_files.write_image(source / "small.png", noise_image(7, 30))
    image_files.write_image(source / "img_SRF_2_LR.png", noise_image(20, 20))
    message = error_of(source, output)
    assert all(str(source / name) in message for name in ("empty.png", "text.png", "small.png", "img_SRF_2_LR.png"))
    assert str(source / "a.png") not in message
    image_files.write_image(source / "a.bmp", noise_image(37, 50))
    assert str(source / "a.bmp") in error_of(source, output)  # two of one name
    assert not output.exists()


def test_one_damaged_gt_image_does_not_stop_the_others(source, output, error_of):
    data = (source / "a.png").read_bytes()
    (source / "damaged.png").write_bytes(data[: len(data) // 2])  # its header is right
    assert str(source / "damaged.png") in error_of(source, output, *X2)
    assert set(snapshot(output)) == {"GT/a.png", "GT/b.jpg", "LRbicx2/a.png", "LRbicx2/b.png", "prepared.json"}
    (source / "damaged.png").write_bytes(data)
    prepare(source, output, *X2)
    assert len(dataset.find_pairs(output, 2)) == 3


@pytest.mark.parametrize("exists", [True, False])
def test_a_missing_or_empty_input_is_named(tmp_path, output, exists, error_of):
    if exists:
        (tmp_path / "in").mkdir()
    assert str(tmp_path / "in") in error_of(tmp_path / "in", output)
    assert not output.exists()


# The user's files


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("GT/a.png", noise_image(37, 50, 5)),
        ("HR/a.png", noise_image(37, 50)),
        ("LRbicx2/a.png", noise_image(18, 25)),
        ("LR_bicubic/X2/ax2.png", noise_image(18, 25)),
    ],
)
def test_a_file_of_the_user_is_named_and_nothing_is_written(source, output, name, image, error_of):
    image_files.write_image(output / name, image)
    before = snapshot(output)
    assert str(output / name).removesuffix("/a.png") in error_of(source, output, *X2)
    assert snapshot(output) == before


def test_a_file_of_the_user_that_would_break_the_pairs_is_named(source, output, error_of):
    image_files.write_image(output / "GT/other.png", noise_image(37, 50))
    assert str(output / "GT/other.png") in error_of(source, output, *X2)
    assert (output / "GT/other.png").is_file()


def test_a_copy_that_the_user_made_is_used_and_is_not_ours(source, output, error_of):
    image_files.write_image(output / "GT/a.png", image_files.read_image(source / "a.png"))
    prepare(source, output, *X2)
    image_files.write_image(source / "a.png", noise_image(37, 50, 1))
    before = snapshot(output)
    assert str(output / "GT/a.png") in error_of(source, output, *X2)
    assert snapshot(output) == before


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"version": 1, "sub_images": null, "made_from": {}}',
        '{"version": 2, "files": {}}',
        '{"version": 3, "sub_images": null, "files": {}}',
    ],
)
def test_a_damaged_manifest_is_refused(source, output, text):
    output.mkdir()
    (output / "prepared.json").write_text(text)
    with pytest.raises(ValueError, match=r"Set/prepared\.json"):
        prepare(source, output)
    assert list(snapshot(output)) == ["prepared.json"]


# Verifying


@pytest.mark.parametrize(
    ("more", "name"), [(ALL, "LRDNx3/b.png"), (ALL, "GT/a.png"), (SUB, "LRbicx4/a_s004.png"), (SUB, "GT/a_s002.png")]
)  # fmt: skip
def test_one_changed_value_is_found(source, output, more, name, error_of):
    prepare(source, output, *more)
    prepare(source, output, *more, "--verify", "True")
    image = image_files.read_image(output / name)
    image[1, 2, 0] = image[1, 2, 0] - 1 if image[1, 2, 0] else 1
    image_files.write_image(output / name, image)
    before = snapshot(output)
    message = error_of(source, output, *more, "--verify", "True")
    assert f"{output / name}: 1 of {image.size:,} " in message
    assert message.count(str(output)) == 1
    assert snapshot(output) == before


def test_missing_unreadable_and_differing_files_are_all_named(source, output, error_of):
    prepare(source, output, "--upscale_factors", "2", "4")
    (output / "LRbicx2/a.png").unlink()
    (output / "LRbicx2/b.png").write_bytes(b"")
    image_files.write_image(output / "LRbicx4/a.png", noise_image(9, 9))
    message = error_of(source, output, "--upscale_factors", "2", "4", "--verify", "True")
    assert [name for name in contents(source.parent) if str(source.parent / name) in message] == ["Set/LRbicx2/b.png", "Set/LRbicx4/a.png"]
    assert str(output / "LRbicx2/a.png") in message


def test_published_lr_images_are_verified_where_they_lie(source, output, error_of):
    source.rename(output)
    for name in ("a.png", "b.jpg"):
        image_files.write_image(output / f"LR_bicubic/X4/{name[0]}x4.png", lr_of(output / name, 4))
    prepare(output, output, "--upscale_factors", "4", "--verify", "True")
    image_files.write_image(output / "LR_bicubic/X4/bx4.png", noise_image(10, 7))
    assert str(output / "LR_bicubic/X4/bx4.png") in error_of(output, output, "--upscale_factors", "4", "--verify", "True")

"""scripts/prepare_dataset.py: what it makes is what training makes, and what is there stays."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import dataset
import image_files
import imgproc
from helpers import REPOSITORY, drawn_image, noise_image
from runtime import run_script

sys.path.insert(0, str(REPOSITORY / "scripts"))
prepare_dataset = importlib.import_module("prepare_dataset")

Grid = prepare_dataset.Grid
ALL = ("--degradations", "BI", "BD", "DN")
SUB = ("--upscale_factors", "2", "4", "--sub_image_size", "16", "--sub_image_step", "8")


def prepare(source: Path, output: Path, *more: str) -> None:
    prepare_dataset.main(["--input", str(source), "--output", str(output), *more])


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in a folder: time of change and contents, by path; also hidden files."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def lr_of(path: Path, scale: int, degradation: str = "BI") -> imgproc.RGB:
    """The LR image of a whole original, as made on the fly where a set has none."""
    gt = imgproc.crop_to_multiple(image_files.read_image(path), scale)
    return dataset.make_lr(dataset.Pair(path.stem, path, None), gt, scale, degradation)


@pytest.fixture
def source(tmp_path) -> Path:
    """Originals of awkward sizes, in two formats."""
    folder = tmp_path / "originals"
    image_files.write_image(folder / "a.png", noise_image(37, 50))
    image_files.write_image(folder / "b.jpg", drawn_image(41, 29))
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "Set"


# What is made


def test_lr_images_are_those_that_degrade_makes(source, output):
    prepare(source, output, *ALL)
    a = image_files.read_image(source / "a.png")
    for scale in (2, 3, 4, 8):
        expected = imgproc.degrade(imgproc.crop_to_multiple(a, scale), scale)
        assert np.array_equal(image_files.read_image(output / f"LRbicx{scale}/a.png"), expected)
    assert np.array_equal(image_files.read_image(output / "LRBDx3/a.png"), imgproc.degrade(imgproc.crop_to_multiple(a, 3), 3, "BD"))
    assert sorted(folder.name for folder in output.iterdir()) == sorted(
        ["GT", "LRBDx3", "LRDNx3", "LRbicx2", "LRbicx3", "LRbicx4", "LRbicx8", "prepared.json"]
    )


def test_training_sees_the_same_with_and_without_the_lr_folders(source, output, capsys):
    prepare(source, output, *ALL, "--bd_dn_upscale_factors", "2", "3")
    for degradation, scale in [("BI", 2), ("BI", 3), ("BI", 4), ("BI", 8), ("BD", 2), ("BD", 3), ("DN", 2), ("DN", 3)]:
        read = dataset.find_pairs(output, scale, degradation)
        assert all(pair.lr is not None for pair in read)
        on_the_fly = dataset.EvaluationSet(dataset.find_pairs(source, scale, degradation), scale, degradation)
        for (name, lr, gt), (made_name, made_lr, made_gt) in zip(dataset.EvaluationSet(read, scale, degradation), on_the_fly, strict=True):
            assert name == made_name
            assert np.array_equal(lr, made_lr)
            assert np.array_equal(gt, made_gt)
    printed = capsys.readouterr().out
    assert f"{output / 'GT'}: 2 images" in printed
    assert f"{output / 'LRDNx2'}: 2 images" in printed


def test_originals_are_copied_byte_for_byte(source, output):
    prepare(source, output, "--upscale_factors", "4")
    assert sorted(file.name for file in (output / "GT").iterdir()) == ["a.png", "b.jpg"]
    for name in ("a.png", "b.jpg"):
        assert (output / "GT" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.data
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_lr_images_of_set5_are_matlabs(data_root, tmp_path, scale):
    prepare(data_root / "Set5" / "GT", tmp_path, "--upscale_factors", str(scale))
    files = image_files.list_images(data_root / f"Set5/LRbicx{scale}_matlab")
    assert len(files) == 5
    for file in files:
        assert np.array_equal(image_files.read_image(tmp_path / f"LRbicx{scale}" / file.name), image_files.read_image(file))


# Sub-images


def test_places_of_sub_images():
    grid = Grid(size=480, step=240, alignment=24)
    assert grid.places(960) == [(0, 480), (240, 480), (480, 480)]
    assert grid.places(1000) == [(0, 480), (240, 480), (480, 480), (504, 480)]  # 1000 is cut to 984; 984 - 480 = 504
    assert grid.places(500) == [(0, 480)]
    assert grid.places(510) == [(0, 480), (24, 480)]
    assert grid.places(300) == [(0, 288)]
    assert Grid(16, 16, 4).boxes((20, 35)) == [(0, 0, 16, 16), (0, 16, 16, 16), (4, 0, 16, 16), (4, 16, 16, 16)]


def test_sub_images_cover_all_that_is_aligned():
    for side in range(12, 150):
        covered = np.zeros(side, bool)
        for start, length in Grid(48, 24, 12).places(side):
            assert start % 12 == length % 12 == 0
            covered[start : start + length] = True
        assert covered.sum() == side // 12 * 12
        assert covered[: side // 12 * 12].all()


def test_sub_images_are_cut_from_the_whole(source, output):
    prepare(source, output, *ALL, "--upscale_factors", "2", "4", "--sub_image_size", "24", "--sub_image_step", "12")
    places = {"a": [(0, 0), (0, 12), (0, 24), (12, 0), (12, 12), (12, 24)], "b": [(0, 0), (12, 0)]}  # 36x48 and 36x24 are aligned to 12
    for stem, path in (("a", source / "a.png"), ("b", source / "b.jpg")):
        gt = image_files.read_image(path)
        lrs = {folder: lr_of(path, int(folder[-1]), kind) for folder, kind in
               (("LRbicx2", "BI"), ("LRbicx4", "BI"), ("LRBDx3", "BD"), ("LRDNx3", "DN"))}  # fmt: skip
        for number, (top, left) in enumerate(places[stem], 1):
            name = f"{stem}_s{number:03d}.png"
            assert np.array_equal(image_files.read_image(output / "GT" / name), gt[top : top + 24, left : left + 24])
            for folder, lr in lrs.items():
                scale = int(folder[-1])
                y, x, side = top // scale, left // scale, 24 // scale
                assert np.array_equal(image_files.read_image(output / folder / name), lr[y : y + side, x : x + side])
    assert len(dataset.find_pairs(output, 3, "DN")) == 8
    assert dataset.gt_sizes(dataset.find_pairs(output, 4), 4) == [(24, 24)] * 8


def test_a_picture_smaller_than_a_sub_image_stays_whole(source, output, capsys):
    prepare(source, output, "--upscale_factors", "4", "--sub_image_size", "40")
    assert image_files.read_image(output / "GT/a_s001.png").shape == (36, 40, 3)
    assert image_files.read_image(output / "GT/b_s001.png").shape == (40, 28, 3)
    assert image_files.read_image(output / "LRbicx4/b_s001.png").shape == (10, 7, 3)
    assert "3 sub-images of 40x40 every 40 pixels, 3 of them smaller" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--sub_image_size", "50"], "sub_image_size=50 is no multiple of 24, which upscale factors 2, 3, 4, 8 need; set 48 or 72"),
        (["--sub_image_size", "48", "--sub_image_step", "30"], "sub_image_step=30 is no multiple of 24.*set 24 or 48"),
        (["--sub_image_size", "48", "--sub_image_step", "72"], "sub_image_step=72 leaves gaps between sub-images of 48; set at most 48"),
        (["--sub_image_size", "-7"], "sub_image_size=-7 is no multiple of 24.*set 24$"),
        (["--sub_image_step", "24"], "sub_image_step=24 needs sub_image_size"),
        (["--num_workers", "-1"], "num_workers=-1 must be 0 or more"),
        (["--verify", "True", "--overwrite", "True"], "contradicts"),
        (["--degradations"], "nothing to make"),
    ],
)
def test_impossible_settings_are_refused(source, output, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        prepare(source, output, *more)
    assert not output.exists()


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        ((), SUB, "whole pictures are in it"),
        (SUB, (), "sub-images of size 16 and step 8 are in it"),
        (SUB, (*SUB[:-1], "16"), "sub-images of size 16 and step 8 are in it"),
        (SUB, (*SUB, "--upscale_factors", "3"), "aligned to 4 pixels, but upscale factors 3 need 12; take another output"),
    ],
)
def test_sets_of_different_sub_images_are_not_mixed(source, output, first, second, sentence):
    prepare(source, output, *first)
    before = snapshot(output)
    with pytest.raises(ValueError, match=sentence):
        prepare(source, output, *second)
    assert snapshot(output) == before


def test_sub_images_are_not_mixed_with_the_users_pictures(source, output):
    image_files.write_image(output / "GT/mine.png", noise_image(20, 20))
    for originals in (source, output / "GT"):
        with pytest.raises(ValueError, match="holds pictures already, with which sub-images can't be mixed"):
            prepare(originals, output, *SUB)
    assert list(snapshot(output)) == ["GT/mine.png"]


def test_fewer_scales_keep_the_alignment_of_the_sub_images(source, output):
    prepare(source, output, *SUB)
    before = snapshot(output)
    prepare(source, output, *SUB, "--upscale_factors", "2")
    assert snapshot(output) == before


# Running again


@pytest.mark.parametrize("more", [ALL, SUB])
def test_a_second_run_writes_nothing(source, output, more, capsys):
    prepare(source, output, *more)
    before = snapshot(output)
    prepare(source, output, *more)
    assert snapshot(output) == before
    assert "nothing was missing" in capsys.readouterr().out


def test_another_scale_and_another_original_only_add(source, output):
    prepare(source, output, "--upscale_factors", "4")
    before = snapshot(output)
    image_files.write_image(source / "c.png", drawn_image(20, 30))
    prepare(source, output, "--upscale_factors", "2", "4")
    after = snapshot(output)
    assert after.keys() - before.keys() == {"GT/c.png", "LRbicx2/a.png", "LRbicx2/b.png", "LRbicx2/c.png", "LRbicx4/c.png"}
    assert {name for name in before if after[name] != before[name]} == {"prepared.json"}


@pytest.mark.parametrize(("more", "name"), [((), "LRbicx3/b.png"), ((), "GT/b.jpg"), (SUB, "LRbicx2/a_s003.png"), (SUB, "GT/b_s001.png")])
def test_a_removed_file_is_made_again(source, output, more, name):
    prepare(source, output, *more)
    before = snapshot(output)
    (output / name).unlink()
    prepare(source, output, *more)
    after = snapshot(output)
    assert after[name][1] == before[name][1]
    assert {other for other in before if after[other] != before[other]} <= {name}


def test_originals_in_the_sets_own_folder_stay_where_they_are(source, output):
    source.rename(output)
    (output / "GT").mkdir()
    for name in ("a.png", "b.jpg"):
        (output / name).rename(output / "GT" / name)
    before = snapshot(output)
    prepare(output / "GT", output, "--upscale_factors", "2")
    after = snapshot(output)
    assert after.keys() - before.keys() == {"LRbicx2/a.png", "LRbicx2/b.png", "prepared.json"}
    assert {name: after[name] for name in before} == before


def test_a_complete_set_of_the_user_gets_no_manifest(source, output):
    prepare(source, output)
    (output / "prepared.json").unlink()
    before = snapshot(output)
    prepare(source, output)
    assert snapshot(output) == before


def test_the_copies_stand_for_the_originals_when_those_are_gone(source, output):
    prepare(source, output, "--upscale_factors", "4")
    before = snapshot(output)
    source.rename(source.with_name("elsewhere"))
    prepare(output / "GT", output, "--upscale_factors", "4", "8")
    after = snapshot(output)
    assert after.keys() - before.keys() == {"LRbicx8/a.png", "LRbicx8/b.png"}
    assert {name for name in before if after[name] != before[name]} == {"prepared.json"}


@pytest.mark.parametrize(("folder", "lr_folder", "ending"), [("HR", "LR_bicubic/X4", "x4"), ("GTmod12", "LRbicx4", "")])
def test_published_layouts_are_kept_and_completed(output, capsys, folder, lr_folder, ending):
    for name in ("a", "b"):
        image_files.write_image(output / folder / f"{name}.png", drawn_image(24, 36, ord(name)))
    image_files.write_image(output / lr_folder / f"a{ending}.png", lr_of(output / folder / "a.png", 4))
    before = snapshot(output)
    prepare(output / folder, output, "--upscale_factors", "2", "4")
    after = snapshot(output)
    assert after.keys() - before.keys() == {"LRbicx2/a.png", "LRbicx2/b.png", f"{lr_folder}/b.png", "prepared.json"}
    assert {name: after[name] for name in before} == before
    assert "1 LR images are not from this script and are kept" in capsys.readouterr().out
    prepare(output / folder, output, "--upscale_factors", "2", "4", "--verify", "True")


# Interruptions


@pytest.mark.parametrize(("more", "files"), [(("--upscale_factors", "2", "4"), 6), (SUB, 96)])
def test_an_interrupted_run_goes_on(source, output, tmp_path, monkeypatch, more, files):
    prepare(source, tmp_path / "whole", *more)
    write, count = image_files.write_image, []

    def interrupted(path, image):
        count.append(path)
        if len(count) == 3:
            raise KeyboardInterrupt
        write(path, image)

    monkeypatch.setattr(imgproc, "write_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, output, *more, "--num_workers", "1")
    monkeypatch.undo()
    before = snapshot(output)
    assert 0 < len(before) - 1 < files
    prepare(source, output, *more)
    after, whole = snapshot(output), snapshot(tmp_path / "whole")
    assert {name: content for name, (_, content) in after.items()} == {name: content for name, (_, content) in whole.items()}
    assert {name: after[name] for name in before} == before


def test_an_interrupted_overwriting_is_noticed(source, output, monkeypatch):
    prepare(source, output, "--upscale_factors", "2")
    image_files.write_image(source / "a.png", noise_image(37, 50, 1))

    def interrupted(path, image):
        raise KeyboardInterrupt

    monkeypatch.setattr(imgproc, "write_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, output, "--upscale_factors", "2", "--overwrite", "True")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"have changed since they were prepared.*: a\.png;"):
        prepare(source, output, "--upscale_factors", "2")
    prepare(source, output, "--upscale_factors", "2", "--overwrite", "True")
    assert np.array_equal(image_files.read_image(output / "LRbicx2/a.png"), lr_of(source / "a.png", 2))
    before = snapshot(output)
    prepare(source, output, "--upscale_factors", "2")
    assert snapshot(output) == before


def test_a_copy_is_whole_or_not_there(source, output, monkeypatch):
    def full(source, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_dataset.shutil, "copyfile", full)
    with pytest.raises(OSError, match=r"GT: can't be written \(No space left on device\); make room"):
        prepare(source, output)
    assert [name for name in snapshot(output) if name.startswith("GT")] == []


# Originals that change or can't be used


@pytest.mark.parametrize("in_place", [False, True])
def test_a_changed_original_is_named_and_overwritten_only_if_asked(source, output, in_place):
    originals = source
    if in_place:
        originals = output / "GT"
        originals.mkdir(parents=True)
        for name in ("a.png", "b.jpg"):
            (source / name).rename(originals / name)
    prepare(originals, output, "--upscale_factors", "2", "4")
    image_files.write_image(originals / "a.png", noise_image(37, 50, 1))  # of the same size
    before = snapshot(output)
    with pytest.raises(ValueError, match=r"changed since they were prepared, or are other pictures of the same name: a\.png; set --overwr"):
        prepare(originals, output, "--upscale_factors", "2", "4")
    with pytest.raises(ValueError, match=r"LRbicx4: made from the old a\.png too; add these scales"):
        prepare(originals, output, "--upscale_factors", "2", "--overwrite", "True")
    assert snapshot(output) == before
    prepare(originals, output, "--upscale_factors", "2", "4", "--overwrite", "True")
    after = snapshot(output)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"LRbicx2/a.png", "LRbicx4/a.png", "prepared.json"} | (set() if in_place else {"GT/a.png"})
    assert after["GT/a.png"][1] == (originals / "a.png").read_bytes()
    prepare(originals, output, "--upscale_factors", "2", "4", "--verify", "True")
    prepare(originals, output, "--upscale_factors", "2", "4")
    assert snapshot(output) == after


@pytest.mark.parametrize("more", [("--upscale_factors", "2"), SUB])
def test_a_changed_original_whose_files_were_removed_is_made_anew(source, output, more):
    prepare(source, output, *more)
    for file in output.glob("*/a*.png"):
        file.unlink()
    image_files.write_image(source / "a.png", noise_image(37, 50, 1))
    prepare(source, output, *more)
    prepare(source, output, *more, "--verify", "True")
    before = snapshot(output)
    prepare(source, output, *more)
    assert snapshot(output) == before


def test_sub_images_of_a_place_that_is_gone_are_named(source, output):
    prepare(source, output, *SUB)
    image_files.write_image(source / "b.jpg", drawn_image(20, 29))
    before = snapshot(output)
    with pytest.raises(ValueError, match=r"GT: the originals, as they are now, have no b_s007\.png, .*b_s012\.png; move these"):
        prepare(source, output, *SUB, "--overwrite", "True")
    assert snapshot(output) == before


def test_all_unusable_originals_are_listed_before_anything_is_written(source, output):
    (source / "empty.png").write_bytes(b"")
    (source / "text.png").write_text("not a picture")
    image_files.write_image(source / "small.png", noise_image(7, 30))
    image_files.write_image(source / "a.bmp", noise_image(37, 50))
    image_files.write_image(source / "img_SRF_2_LR.png", noise_image(20, 20))
    with pytest.raises(ValueError, match="nothing was written, as of 7 originals some can't be used") as refused:
        prepare(source, output)
    sentences = str(refused.value).split("\n  ")[1:]
    assert [Path(sentence.split(": ")[0]).name for sentence in sentences] == [
        "a.png",
        "img_SRF_2_LR.png",
        "empty.png",
        "small.png",
        "text.png",
    ]
    assert "has the same name as a.bmp" in sentences[0]
    assert "30x7 is too small, at least 8x8 is needed" in sentences[3]
    assert not output.exists()


def test_one_damaged_original_does_not_stop_the_others(source, output, capsys):
    data = (source / "a.png").read_bytes()
    (source / "damaged.png").write_bytes(data[: len(data) // 2])  # its header is right
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: prepare(source, output, "--upscale_factors", "2"))
    assert ended.value.code == 1
    assert "1 of 3 originals can't be used; all others are done:\n  " + str(source / "damaged.png") in capsys.readouterr().err
    assert set(snapshot(output)) == {"GT/a.png", "GT/b.jpg", "LRbicx2/a.png", "LRbicx2/b.png", "prepared.json"}
    assert json.loads((output / "prepared.json").read_text())["made_from"]["LRbicx2"].keys() == {"a", "b"}
    (source / "damaged.png").write_bytes(data)
    prepare(source, output, "--upscale_factors", "2")
    assert len(dataset.find_pairs(output, 2)) == 3


@pytest.mark.parametrize("exists", [True, False])
def test_a_missing_or_empty_input_is_named(tmp_path, output, exists):
    if exists:
        (tmp_path / "in").mkdir()
    with pytest.raises(FileNotFoundError, match="no image is in it" if exists else "no such folder"):
        prepare(tmp_path / "in", output)


# The user's files


@pytest.mark.parametrize(
    ("name", "image", "sentence"),
    [
        ("GT/a.png", noise_image(37, 50, 5), r"GT.a\.png: is another file than .*originals.a\.png; rename one"),
        ("GT/a.jpg", noise_image(37, 50), r"GT.a\.jpg: is another file than .*originals.a\.png"),
        ("GT/other.png", noise_image(37, 50), r"GT.other\.png would have no partner in .*LRbicx2, as the input lacks the originals"),
        ("LRbicx2/a.png", noise_image(19, 25), r"LRbicx2.a\.png: 25x19, but 25x18 are needed; remove it"),
        ("LRbicx2/other.png", noise_image(18, 25), r"LRbicx2.other\.png: its original is neither in the input nor in .*GT; move it"),
    ],
)
def test_a_file_in_the_way_is_named_and_nothing_is_written(source, output, name, image, sentence):
    image_files.write_image(output / name, image)
    before = snapshot(output)
    for more in ((), ("--overwrite", "True")):
        with pytest.raises(ValueError, match=sentence):
            prepare(source, output, "--upscale_factors", "2", *more)
    assert snapshot(output) == before


def test_a_users_lr_image_is_never_overwritten(source, output, capsys):
    mine = noise_image(18, 25)
    image_files.write_image(output / "LRbicx2/a.png", mine)
    before = snapshot(output)["LRbicx2/a.png"]
    prepare(source, output, "--upscale_factors", "2")
    assert "1 LR images are not from this script and are kept; --verify True" in capsys.readouterr().out
    image_files.write_image(source / "a.png", noise_image(37, 50, 1))
    prepare(source, output, "--upscale_factors", "2", "--overwrite", "True")
    assert snapshot(output)["LRbicx2/a.png"] == before
    assert (output / "GT/a.png").read_bytes() == (source / "a.png").read_bytes()
    with pytest.raises(ValueError, match=r"1 of 4 files are not what their originals give:\n  .*LRbicx2.a\.png: .* values differ"):
        prepare(source, output, "--upscale_factors", "2", "--verify", "True")


def test_a_users_file_that_took_the_place_of_ours_is_not_overwritten(source, output):
    prepare(source, output, "--upscale_factors", "2")
    (output / "LRbicx2/a.png").rename(output / "LRbicx2/ax2.png")
    image_files.write_image(source / "a.png", noise_image(37, 50, 1))
    before = snapshot(output)
    with pytest.raises(ValueError, match=r"ax2\.png: is not from this script; move it away"):
        prepare(source, output, "--upscale_factors", "2", "--overwrite", "True")
    assert snapshot(output) == before


def test_a_copy_that_was_edited_becomes_the_original(source, output):
    prepare(source, output, "--upscale_factors", "2")
    image_files.write_image(output / "GT/a.png", noise_image(37, 50, 1))
    edited = snapshot(output)["GT/a.png"]
    with pytest.raises(ValueError, match=r"have changed since they were prepared.*: a\.png;"):
        prepare(output / "GT", output, "--upscale_factors", "4")
    prepare(output / "GT", output, "--upscale_factors", "2", "--overwrite", "True")
    assert snapshot(output)["GT/a.png"] == edited
    prepare(output / "GT", output)
    assert np.array_equal(image_files.read_image(output / "LRbicx2/a.png"), lr_of(output / "GT/a.png", 2))
    with pytest.raises(ValueError, match=r"GT.a\.png: is another file than .*originals.a\.png"):
        prepare(source, output, "--overwrite", "True")


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 2, "sub_images": null, "made_from": {}}'])
def test_a_damaged_manifest_is_refused(source, output, text):
    output.mkdir()
    (output / "prepared.json").write_text(text)
    with pytest.raises(ValueError, match=r"prepared\.json: is damaged or of another version"):
        prepare(source, output)
    assert list(snapshot(output)) == ["prepared.json"]


# Verifying


@pytest.mark.parametrize(
    ("more", "name"), [(ALL, "LRDNx3/b.png"), (ALL, "LRbicx8/a.png"), (SUB, "LRbicx4/a_s004.png"), (SUB, "GT/a_s002.png")]
)
def test_one_changed_value_is_found(source, output, more, name, capsys):
    prepare(source, output, *more)
    prepare(source, output, *more, "--verify", "True")
    assert capsys.readouterr().out.count("images, all as their originals give") == (7 if more == ALL else 3)
    image = image_files.read_image(output / name)
    image[1, 2, 0] = image[1, 2, 0] - 1 if image[1, 2, 0] else 1
    image_files.write_image(output / name, image)
    before = snapshot(output)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: prepare(source, output, *more, "--verify", "True"))
    assert ended.value.code == 1
    assert f"{output / name}: 1 of {image.size:,} values differ, by up to 1\n" in capsys.readouterr().err
    assert snapshot(output) == before


def test_missing_and_unreadable_files_are_found(source, output):
    prepare(source, output, "--upscale_factors", "2")
    (output / "LRbicx2/a.png").unlink()
    (output / "LRbicx2/b.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 4 files.*\n  .*a\.png: is missing\n  .*b\.png: the file is empty"):
        prepare(source, output, "--upscale_factors", "2", "--verify", "True")

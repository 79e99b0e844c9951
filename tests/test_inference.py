"""People's own images: names, folders, formats, sizes, and what happens to the others when one fails."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageCms
from pytest import approx

import image_files
import imgproc
import inference
import weights
from helpers import REPOSITORY, Enlarge, Page, drawn_image, noise_image, tiny
from image_files import Photo, read_photo, write_image, write_photo
from upscaling import upscale

RGB = drawn_image(12, 17)
ALPHA = np.ascontiguousarray(noise_image(12, 17, 3)[:, :, 0])
DEEP = np.random.default_rng(1).integers(0, 65536, (12, 17, 4), dtype=np.uint16)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def three(gray):
    return np.repeat(gray[:, :, None], 3, 2)


@pytest.fixture
def network_path(tmp_path):
    weights.export(tiny(2), tmp_path / "w.pth")
    return tmp_path / "w.pth"


@pytest.fixture
def run(network_path):
    def call(*arguments):
        inference.main([str(argument) for argument in ("--model_path", network_path, *arguments)])

    return call


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# Pixels


def double(image):
    return upscale(Enlarge(), image)


def spread(pixels, alpha):
    return imgproc.spread_colours(pixels, alpha == 0)


def twice(image):
    return image.repeat(2, 0).repeat(2, 1)


@pytest.mark.parametrize(("pixels", "alpha"), [(RGB, ALPHA), (DEEP[:, :, :3], DEEP[:, :, 3])], ids=["8", "16"])
def test_alpha_bits_profile_and_resolution_are_kept(pixels, alpha):
    result = inference.enlarge_photo(Photo(pixels, alpha, icc_profile=b"p", dpi=(1, 2)), double, (24, 34))
    assert (result.pixels == twice(spread(pixels, alpha))).all()
    assert (result.alpha == twice(alpha)).all()
    assert (result.pixels.dtype, result.alpha.dtype) == (pixels.dtype, pixels.dtype)
    assert (result.icc_profile, result.dpi) == (b"p", (1, 2))


def test_gray_becomes_the_mean_of_the_networks_channels():
    network, gray = tiny(2), three(RGB[:, :, 0])  # a network whose three channels differ
    colours = upscale(network, gray)
    assert (colours[:, :, :1] != colours).any()
    found = inference.enlarge_photo(Photo(gray, gray=True), lambda image: upscale(network, image), (24, 34)).pixels
    assert (found == three(np.round(colours.mean(2)).astype(np.uint8))).all()


def test_alpha_of_one_value_stays_exactly_that():
    calls = []

    def count(image):
        calls.append(image)
        return double(image)

    result = inference.enlarge_photo(Photo(RGB, np.full((12, 17), 200, np.uint8)), count, (24, 34))
    assert result.alpha.shape == (24, 34)
    assert (result.alpha == 200).all()
    assert len(calls) == 1


@pytest.mark.parametrize("deep", [False, True])
def test_another_final_size_is_matlabs_bicubic_of_the_result(deep):
    pixels, alpha = (DEEP[:, :, :3], DEEP[:, :, 3]) if deep else (RGB, ALPHA)
    result = inference.enlarge_photo(Photo(pixels, alpha), double, (18, 26))
    assert (result.pixels == imgproc.imresize_to(twice(spread(pixels, alpha)), 18, 26)).all()
    assert (result.alpha == imgproc.imresize_to(twice(alpha), 18, 26)).all()


# Files


def test_a_file_becomes_what_the_network_gives(tmp_path, run, network_path):
    for name, size in {"dot": (1, 1), "line": (1, 9), "bild ü": (13, 20)}.items():
        write_image(tmp_path / "in" / f"{name}.png", noise_image(*size))
        run("--input", tmp_path / "in" / f"{name}.png", "--output", tmp_path / "out", "--precision", "fp32")
        expected = upscale(weights.load(network_path), noise_image(*size))
        assert expected.shape == (2 * size[0], 2 * size[1], 3)
        assert (image_files.read_image(tmp_path / "out" / f"{name}.png") == expected).all()


@pytest.mark.parametrize(
    ("outscale", "size"), [(1, (12, 17)), (2, (24, 34)), (1.3, (16, 22)), (1.1, (13, 19)), (0.01, (1, 1)), (5, (60, 85))]
)
def test_outscale_is_the_final_size(tmp_path, run, outscale, size):
    write_image(tmp_path / "a.png", RGB)
    run("--input", tmp_path / "a.png", "--output", tmp_path / "o", "--outscale", outscale)
    assert image_files.image_size(tmp_path / "o/a.png") == size


def test_folders_names_and_formats_are_kept(tmp_path, run, capsys):
    folder = tmp_path / "in"
    names = ["a.png", "b.JPG", "sub/a.png", "sub/日本 語.webp", "sub/deep/ü.tif", "sub/c.bmp"]
    for name in [*names, ".hidden/x.png", "sub/.hidden.png"]:
        write_image(folder / name, drawn_image(6, 7))
    for name in ("notes.txt", ".DS_Store"):
        (folder / name).write_text("x")
    run("--input", folder, "--output", folder / "out", "--output_format", "same")
    assert written(folder / "out") == sorted(name.replace("JPG", "jpg") for name in names)
    assert all(image_files.image_size(folder / "out" / name) == (12, 14) for name in written(folder / "out"))
    said = "".join(capsys.readouterr())
    assert all(str(folder / "out" / name) in said for name in written(folder / "out"))
    run("--input", folder, "--output", folder / "out", "--existing", "overwrite")  # the results are no inputs
    assert len(list((folder / "out").rglob("*.png"))) == len(names)


def test_inputs_of_one_name_keep_their_endings_and_nothing_is_overwritten(tmp_path):
    files = [tmp_path / name for name in ("a.jpg", "a.png", "b.png")]

    def plan(files, folder, output_format):
        return inference.plan_outputs(dict.fromkeys(files, Path()), folder, output_format)

    targets = plan(files, tmp_path / "out", "png")
    assert [target.name for target in targets.values()] == ["a.jpg.png", "a.png.png", "b.png"]
    with pytest.raises(ValueError, match=r"a\.png\.tif and .*a\.png .*a\.png\.png"):
        plan([*files, tmp_path / "a.png.tif"], tmp_path / "out", "png")
    gif = tmp_path / "x.gif"
    assert plan([gif], tmp_path / "out", "same") == {gif: tmp_path / "out/x.png"}  # GIF is not written
    with pytest.raises(ValueError, match=r"a\.png"):
        plan(files[1:], tmp_path, "png")
    with pytest.raises(ValueError, match=r"a\.jpg"):
        plan(files, tmp_path, "same")


def test_what_is_lost_is_noted(tmp_path, run, capsys):
    first = Image.fromarray(RGB)
    first.save(tmp_path / "in.tif", save_all=True, append_images=[first], icc_profile=SRGB)
    run("--input", tmp_path / "in.tif", "--output", tmp_path / "o", "--outscale", 3, "--output_format", "bmp")
    assert "".join(capsys.readouterr()).count("note: ") == 3  # the second page, the bicubic part, the colour profile
    assert image_files.image_size(tmp_path / "o/in.bmp") == (36, 51)


def test_quality_is_that_of_the_files(tmp_path, run):
    write_image(tmp_path / "a.png", noise_image(12, 17))
    for quality in (20, 95):
        run("--input", tmp_path / "a.png", "--output", tmp_path / str(quality), "--output_format", "jpg", "--quality", quality)
    assert 2 * (tmp_path / "20/a.jpg").stat().st_size < (tmp_path / "95/a.jpg").stat().st_size


# The command line, and what it says


def test_several_images_and_folders_by_position(tmp_path, run, capsys):
    for name in ("a.png", "in/b.png", "in/sub/c.png", "d.png"):
        write_image(tmp_path / name, drawn_image(6, 7))
    run("-s", 2, "-o", tmp_path / "out", tmp_path / "a.png", tmp_path / "in", "--input", tmp_path / "d.png", tmp_path / "in" / "b.png")
    assert written(tmp_path / "out") == ["a.png", "b.png", "d.png", "sub/c.png"]
    first, *_, last = capsys.readouterr().out.splitlines()
    assert "4 images 2 times" in first and "4 images in" in last


def test_an_output_above_the_input_and_two_folders_of_the_same_names(tmp_path, run, monkeypatch):
    for name in ("one/a.png", "two/a.png", "two/b.png"):
        write_image(tmp_path / name, drawn_image(6, 7))
    monkeypatch.chdir(tmp_path)
    run("one", "-o", ".")
    assert image_files.image_size(tmp_path / "a.png") == (12, 14)
    run("one", "two", tmp_path / "two/b.png", "-o", "both")  # the file is known from its folder
    assert written(tmp_path / "both") == ["one/a.png", "two/a.png", "two/b.png"]


def test_progress_ends_with_the_last_pass(network_path):
    config = inference.InferenceConfig(images=("a",), model_path=str(network_path))
    for alpha in (None, ALPHA, np.full_like(ALPHA, 9)):
        parts = []
        inference.upscale_photo(Photo(RGB, alpha), ".png", inference.Enlargers(config), parts.append, config)
        assert sum(parts) == approx(12 * 17)


def test_the_estimate_is_of_the_size(tmp_path, monkeypatch):
    monkeypatch.setattr(inference.time, "monotonic", lambda clock=[0.0]: clock[0])
    passed = inference.time.monotonic.__defaults__[0]
    monkeypatch.setattr(inference, "upscale", lambda network, lr, *_, **options: passed.__setitem__(0, passed[0] + lr[..., 0].size / 1e5))
    assert inference.Enlargers(inference.InferenceConfig(images=("a",))).seconds_per_pixel() == approx(1e-5)


def damaged(kind):
    photo = Photo(skimage.data.astronaut()[:192, :192])
    if kind == "noisy":
        noise = np.random.default_rng(0).normal(0, 8, photo.pixels.shape)
        return replace(photo, pixels=np.clip(photo.pixels + noise, 0, 255).astype(np.uint8))
    if kind == "blocks":
        return replace(photo, pixels=imgproc.compress(photo.pixels, "JPEG", 40)[3:, 5:])
    return replace(photo, pixels=photo.pixels.astype(np.uint16) * 257) if kind == "16 bits" else photo


@pytest.mark.parametrize(("kind", "chosen"), [("clean", "clean"), ("16 bits", "clean"), ("noisy", "photo"), ("blocks", "photo")])
def test_weights_are_chosen_by_what_the_pixels_are(kind, chosen):
    for weights_, expected in (("auto", chosen), ("clean", "clean"), ("photo", "photo")):
        enlargers = inference.Enlargers(inference.InferenceConfig(images=("a",), weights=weights_))
        found, why = enlargers.choose(damaged(kind))
        assert found == expected and bool(why) == (weights_ == "auto")


@pytest.mark.parametrize(
    ("name", "options", "lossy"),
    [("a.jpg", {}, "JPEG"), ("a.webp", {}, "WEBP"), ("a.webp", {"lossless": True}, ""), ("a.png", {}, "")],
)
@pytest.mark.parametrize("profile", [None, SRGB])
def test_lossy_files_are_recognised(tmp_path, name, options, lossy, profile):
    Image.fromarray(RGB).save(tmp_path / name, **options, **({"icc_profile": profile} if profile else {}))
    assert read_photo(tmp_path / name).lossy == lossy


@pytest.mark.parametrize("quality", [30, 50, 75, 92])
def test_the_quality_of_a_jpeg_is_read_off_its_tables(tmp_path, quality):
    Image.fromarray(skimage.data.astronaut()[100:356, 100:356]).save(tmp_path / "a.jpg", quality=quality)
    photo = read_photo(tmp_path / "a.jpg")
    assert photo.quality == approx(quality, abs=1)
    chosen, why = inference.Enlargers(inference.InferenceConfig(images=("a",))).choose(photo)
    assert chosen == ("photo" if quality < 85 else "clean") and (str(quality) in why) == (quality < 85)
    Image.fromarray(RGB).save(tmp_path / "a.png")
    assert read_photo(tmp_path / "a.png").quality is None


def test_lossy_animations_are_recognised(tmp_path):
    frames = [Image.fromarray(image) for image in (RGB, RGB[::-1])]
    for lossless in (False, True):
        frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=lossless)
        assert read_photo(tmp_path / "a.webp").lossy == ("" if lossless else "WEBP")


def test_photo_weights_that_are_absent_are_refused(run):
    with pytest.raises(ValueError, match="rcan_light_photo_x8"):
        inference.Enlargers(inference.InferenceConfig(images=("a",), weights="photo", upscale_factor=8))


# Mistakes


def test_what_fails_is_listed_and_the_others_are_done(tmp_path, run):
    for name in ("a.png", "c.png"):
        write_image(tmp_path / "in" / name, RGB)
    write_photo(tmp_path / "in" / "b.png", Photo(RGB, ALPHA))  # JPEG has no alpha
    (tmp_path / "in" / "d.png").write_bytes(b"text")
    (tmp_path / "o/e.jpg").mkdir(parents=True)
    write_image(tmp_path / "in" / "e.png", RGB)
    with pytest.raises(ValueError, match=r"3 of 5.*\n.*b\.png.*\n.*d\.png.*\n.*e\.(png|jpg)"):
        run("--input", tmp_path / "in", "--output", tmp_path / "o", "--output_format", "jpg", "--existing", "overwrite")
    assert written(tmp_path / "o") == ["a.jpg", "c.jpg"]


def test_a_result_that_cannot_be_written_is_named_and_spares_the_others(tmp_path, run, monkeypatch):
    """… though it is written while the next image is computed."""
    for name in ("a.png", "b.png", "c.png"):
        write_image(tmp_path / "in" / name, RGB)
    write = inference.write_photo

    def limited(path, *arguments):
        if path.name == "b.png":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, *arguments)

    monkeypatch.setattr(inference, "write_photo", limited)
    with pytest.raises(ValueError, match=r"1 of 3.*\n.*b\.png"):
        run("--input", tmp_path / "in", "--output", tmp_path / "o")
    assert written(tmp_path / "o") == ["a.png", "c.png"]


def test_memory_that_runs_out_for_one_image_spares_the_others(tmp_path, run, monkeypatch):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "in" / name, RGB)
    failures = [MemoryError()]
    enlarge = inference.enlarge_photo

    def limited(*arguments):
        if failures:
            raise failures.pop()
        return enlarge(*arguments)

    monkeypatch.setattr(inference, "enlarge_photo", limited)
    with pytest.raises(ValueError, match=r"1 of 2.*\n.*a\.png"):
        run("--input", tmp_path / "in", "--output", tmp_path / "o")
    assert written(tmp_path / "o") == ["b.png"]


@pytest.mark.parametrize(
    ("given", "output", "error", "named"),
    [
        ("gone.png", "o", FileNotFoundError, "gone.png"),
        ("empty", "o", FileNotFoundError, "empty"),
        ("nothing.png", "o", ValueError, "nothing.png"),
        ("file", "o", ValueError, "file"),  # its content counts, not its name
        ("a.png", ".", ValueError, "a.png"),  # would be overwritten
        ("a.png", "file", OSError, "file"),
        ("a.png", "file/deeper", OSError, "file"),
        ("a.png", "n" * 300, OSError, "n" * 300),
        ("a.png", "taken", OSError, "taken/a.png"),
    ],
)
def test_an_input_or_output_that_cannot_be_used_is_named_and_nothing_changes(tmp_path, run, monkeypatch, given, output, error, named):
    monkeypatch.chdir(tmp_path)
    write_image("a.png", RGB)
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken/a.png").mkdir(parents=True)
    (tmp_path / "nothing.png").touch()
    (tmp_path / "file").write_text("no image")
    if error is OSError and output != "taken":  # before the network is loaded
        monkeypatch.setattr(weights, "load", lambda path: pytest.fail("loads weights first"))
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises((error, ValueError), match=named):
        run("--input", given, "--output", output)
    assert sorted(map(str, tmp_path.rglob("*"))) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("outscale", "0"), ("outscale", "nan"), ("outscale", "65"), ("quality", "0"), ("quality", "101"), ("tile", "64"), ("tile", "-1"),
     ("output_format", "gif"), ("tile_overlap", "-1")],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(tmp_path, run, capsys, name, value):
    with pytest.raises((SystemExit, ValueError)) as error:  # older versions of tyro leave the sentence to run_script
        run("--input", tmp_path, "--output", tmp_path / "o", f"--{name}", value)
    assert name in f"{capsys.readouterr().err} {error.value}"
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_the_command_ends_with_the_right_code(tmp_path, network_path):
    write_image(tmp_path / "in/a.png", RGB)
    (tmp_path / "in/b.png").touch()

    def command(*arguments):
        words = [sys.executable, REPOSITORY / "inference.py", "--model_path", network_path, *arguments]
        done = subprocess.run(
            list(map(str, words)), cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert "Traceback" not in done.stderr
        return done

    done = command("--input", "in/a.png", "--output", "out")
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "out/a.png") in done.stdout
    for given in ("in", "in/b.png"):
        done = command("--input", given, "--output", "out", "--existing", "overwrite")
        assert done.returncode == 1
        assert "in/b.png" in done.stderr.strip().splitlines()[-1]
    assert command("--output", "out").returncode == 2
    assert read_photo(tmp_path / "out/a.png").pixels.shape == (24, 34, 3)
    assert written(tmp_path / "out") == ["a.png"]


# What is already there


@pytest.mark.parametrize("existing", ["refuse", "skip", "overwrite"])
def test_a_result_that_is_there_is_refused_skipped_or_replaced(tmp_path, run, monkeypatch, existing):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "in" / name, RGB)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").write_bytes(b"another file")
    if existing == "refuse":
        monkeypatch.setattr(weights, "load", lambda path: pytest.fail("loads weights first"))
        with pytest.raises(ValueError, match=r"out.a\.png"):
            run("--input", tmp_path / "in", "--output", tmp_path / "out")
        assert written(tmp_path / "out") == ["a.png"]
    else:
        run("--input", tmp_path / "in", "--output", tmp_path / "out", "--existing", existing)
        assert written(tmp_path / "out") == ["a.png", "b.png"]
    assert ((tmp_path / "out/a.png").read_bytes() == b"another file") == (existing != "overwrite")


def test_a_second_run_that_skips_loads_nothing(tmp_path, run, monkeypatch):
    write_image(tmp_path / "a.png", RGB)
    run("--input", tmp_path / "a.png", "--output", tmp_path / "out")
    monkeypatch.setattr(weights, "load", lambda path: pytest.fail("loads weights"))
    run("--input", tmp_path / "a.png", "--output", tmp_path / "out", "--existing", "skip")


def test_the_output_of_one_image_may_be_a_file(tmp_path, run):
    write_image(tmp_path / "a.png", RGB)
    run("--input", tmp_path / "a.png", "--output", tmp_path / "new/large.jpg")
    assert written(tmp_path / "new") == ["large.jpg"]
    with Image.open(tmp_path / "new/large.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (34, 24))
    with pytest.raises(ValueError, match="output_format"):
        run("--input", tmp_path / "a.png", "--output", tmp_path / "b.png", "--output_format", "jpg")
    for source, output in (("a.png", "b.gif"), ("a.png", "b.heic"), (".", "b.png")):
        with pytest.raises(ValueError, match=output):
            run("--input", tmp_path / source, "--output", tmp_path / output)


def test_a_factor_that_the_weights_do_not_have_is_refused(tmp_path, run):
    write_image(tmp_path / "a.png", RGB)
    with pytest.raises(ValueError, match=r"upscale_factor=4.*w\.pth"):
        run("--input", tmp_path / "a.png", "--output", tmp_path / "o", "--upscale_factor", 4)
    run("--input", tmp_path / "a.png", "--output", tmp_path / "o", "--upscale_factor", 2)


def test_names_may_be_as_long_as_the_disk_allows(tmp_path, run):
    for length in (245, 251):
        write_image(tmp_path / "in" / ("n" * length + ".png"), RGB)
    run("--input", tmp_path / "in", "--output", tmp_path / "out")
    assert written(tmp_path / "out") == ["n" * 245 + ".png", "n" * 251 + ".png"]


def test_no_hidden_colour_bleeds_into_the_rim():
    """A yellow disc whose surroundings are black under alpha 0, enlarged by bicubic."""
    distance = np.hypot(*(np.mgrid[:64, :64] - 31.5))
    alpha = np.round(255 * np.clip(24.5 - distance, 0, 1)).astype(np.uint8)
    pixels = np.where(alpha[:, :, None] > 0, np.array([250, 240, 60], np.uint8), np.uint8(0))
    result = inference.enlarge_photo(Photo(pixels, alpha), lambda image: imgproc.imresize(image, 2), (128, 128))
    seen = result.alpha > 0
    assert abs(result.pixels[seen].astype(int) - (250, 240, 60)).max() == 0


@pytest.mark.parametrize(("name", "value"), [("quality", 50), ("tile_overlap", 8)])
def test_options_without_effect_are_refused(tmp_path, run, name, value):
    write_image(tmp_path / "a.png", RGB)
    with pytest.raises((SystemExit, ValueError)):
        run("--input", tmp_path / "a.png", "--output", tmp_path / "o", f"--{name}", value)
    assert not (tmp_path / "o").exists()
    needed = {"quality": ("--output_format", "jpg"), "tile_overlap": ("--tile", 32)}[name]
    run("--input", tmp_path / "a.png", "--output", tmp_path / "o", f"--{name}", value, *needed)


def test_files_beside_images_are_named(tmp_path, run, capsys):
    write_image(tmp_path / "in/a.png", RGB)
    (tmp_path / "in/b.heic").write_bytes(b"x")
    run("--input", tmp_path / "in", "--output", tmp_path / "out")
    assert "1 .heic" in "".join(capsys.readouterr())


# A page to compare


def test_compare_shows_each_result_beside_bicubic(tmp_path, run, capsys):
    write_image(tmp_path / "in/a.png", RGB)
    write_image(tmp_path / "in/deep/b <i>.png", drawn_image(9, 14, seed=1))
    (tmp_path / "in/c.png").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"c\.png"):
        run("--input", tmp_path / "in", "--output", tmp_path / "out", "--outscale", 2.5, "--compare")
    page = Page(tmp_path / "out/report.html")
    assert str(tmp_path / "out/report.html") in capsys.readouterr().out
    assert list(page.figures) == ["a.png", "deep/b <i>.png"]
    for name, image in zip(page.figures, (RGB, drawn_image(9, 14, seed=1)), strict=True):
        result = image_files.read_image(tmp_path / "out" / name)
        before, after = page.figures[name].values()
        assert (after == result).all()
        assert (before == imgproc.imresize_to(image, *result.shape[:2])).all()
    assert "c.png" in page.text  # which failed


@pytest.mark.parametrize("existing", ["refuse", "skip", "overwrite"])
def test_a_page_that_is_there_is_treated_as_any_result(tmp_path, run, existing):
    write_image(tmp_path / "a.png", RGB)
    write_image(tmp_path / "b.png", RGB)
    arguments = ("--output", tmp_path / "out", "--compare", "--existing", existing)
    run("--input", tmp_path / "a.png", *arguments)
    if existing == "refuse":
        with pytest.raises(ValueError, match=r"report\.html"):
            run("--input", tmp_path / "b.png", *arguments)
        assert written(tmp_path / "out") == ["a.png", "report.html"]
    else:
        run("--input", tmp_path / "b.png", *arguments)
        assert list(Page(tmp_path / "out/report.html").figures) == (["b.png"] if existing == "overwrite" else ["a.png"])

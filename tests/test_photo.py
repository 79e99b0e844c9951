"""People's pictures: every mode, 16 bits, orientation, profiles and resolution, in every format; and inference on them."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps
from pytest import approx

import image_files
import imgproc
import inference
import weights
from helpers import Enlarge, drawn_image, noise_image, tiny
from image_files import FORMATS, Photo, check_writable, read_photo, write_photo
from upscaling import upscale

RGB = drawn_image(12, 17)
GRAY = np.ascontiguousarray(RGB[:, :, 0])
ALPHA = np.ascontiguousarray(noise_image(12, 17, 3)[:, :, 0])
DEEP = np.random.default_rng(1).integers(0, 65536, (12, 17, 4), dtype=np.uint16)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def three(gray):
    return np.repeat(gray[:, :, None], 3, 2)


# 8 bits, as Pillow writes them: (image, pixels, alpha, gray)


def palette(transparent):
    image = Image.fromarray(RGB).quantize(16)
    if transparent:
        image.info["transparency"] = 3
    return image


def pillow_cases():
    full, paletted = Image.fromarray(RGB), palette(False)
    bilevel = Image.fromarray(GRAY).point(lambda value: 255 * (value > 128)).convert("1")
    clear = palette(True)
    return {
        "L": (Image.fromarray(GRAY), three(GRAY), None, True),
        "1": (bilevel, three(np.array(bilevel.convert("L"))), None, True),
        "LA": (Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(ALPHA)]), three(GRAY), ALPHA, True),
        "RGB": (full, RGB, None, False),
        "RGBA": (Image.merge("RGBA", [*full.split(), Image.fromarray(ALPHA)]), RGB, ALPHA, False),
        "P": (paletted, np.array(paletted.convert("RGB")), None, False),
        "P, transparent": (clear, np.array(clear.convert("RGBA"))[:, :, :3], np.array(clear.convert("RGBA"))[:, :, 3], False),
    }


@pytest.mark.parametrize("mode", pillow_cases())
def test_every_mode_of_png_is_read_and_written_as_it_is(tmp_path, mode):
    image, pixels, alpha, gray = pillow_cases()[mode]
    image.save(tmp_path / "in.png", **({"transparency": 3} if mode == "P, transparent" else {}))
    photo = read_photo(tmp_path / "in.png")
    assert (photo.pixels == pixels).all()
    assert (photo.alpha is None) == (alpha is None)
    assert alpha is None or (photo.alpha == alpha).all()
    assert (photo.gray, photo.bits) == (gray, 8)
    write_photo(tmp_path / "out.png", photo)
    with Image.open(tmp_path / "out.png") as written:
        kept = {"1": "L", "P": "RGB", "P, transparent": "RGBA"}.get(mode, mode)
        assert written.mode == kept
        assert (np.array(written) == np.array(image.convert(kept))).all()


@pytest.mark.parametrize("gray", [False, True])
def test_a_transparent_colour_of_sixteen_bits_becomes_alpha(tmp_path, gray):
    pixels = three(DEEP[:, :, 0]) if gray else DEEP[:, :, :3]
    write_photo(tmp_path / "plain.png", Photo(pixels, gray=gray))
    key = (pixels[0, 0, :1] if gray else pixels[0, 0]).astype(">u2").tobytes()
    write_with_chunk(tmp_path / "plain.png", tmp_path / "in.png", b"tRNS", key)
    photo = read_photo(tmp_path / "in.png")
    assert (photo.alpha == 65535 * (pixels != pixels[0, 0]).any(2)).all()
    assert (photo.pixels == pixels).all()


def write_with_chunk(source, target, name, content):
    """A PNG with a further chunk after its header."""
    data = source.read_bytes()
    chunk = len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")
    target.write_bytes(data[:33] + chunk + data[33:])


@pytest.mark.parametrize("gray", [False, True])
def test_a_transparent_colour_becomes_alpha(tmp_path, gray):
    colour = int(GRAY[0, 0]) if gray else tuple(map(int, RGB[0, 0]))
    Image.fromarray(GRAY if gray else RGB).save(tmp_path / "in.png", transparency=colour)
    photo = read_photo(tmp_path / "in.png")
    expected = 255 * ((GRAY[0, 0] != GRAY) if gray else (RGB[0, 0] != RGB).any(2))
    assert (photo.alpha == expected).all()
    assert photo.gray == gray


@pytest.mark.parametrize("with_alpha", [False, True])
@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff"])
def test_sixteen_bits_come_back_bit_for_bit(tmp_path, suffix, gray, with_alpha):
    pixels = three(DEEP[:, :, 0]) if gray else DEEP[:, :, :3]
    photo = Photo(pixels, DEEP[:, :, 3] if with_alpha else None, gray, SRGB, (300.0, 150.0))
    write_photo(tmp_path / f"a{suffix}", photo)
    found = read_photo(tmp_path / f"a{suffix}")
    assert (found.pixels == pixels).all()
    assert found.pixels.dtype == np.uint16
    assert (found.alpha is None) == (not with_alpha)
    assert not with_alpha or (found.alpha == DEEP[:, :, 3]).all()
    assert (found.gray, found.icc_profile) == (gray, SRGB)
    assert found.dpi == approx((300, 150), abs=0.02)
    if not (suffix != ".png" and gray and with_alpha):  # which Pillow doesn't know
        with Image.open(tmp_path / f"a{suffix}") as image:  # another program reads the same
            image.load()
            assert image.size == (17, 12)
            assert image.info["icc_profile"] == SRGB
    if suffix == ".png" or not (gray and with_alpha):  # OpenCV too reads the same
        other = image_files.decode_deep((tmp_path / f"a{suffix}").read_bytes())
        colours = three(other) if other.ndim == 2 else other[:, :, 2::-1]
        assert (colours == pixels).all()


@pytest.mark.parametrize("compression", ["zlib", None])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiffs_of_other_programs(tmp_path, compression, planar):
    values = DEEP[:, :, :3] if planar == "contig" else np.moveaxis(DEEP[:, :, :3], 2, 0)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", planarconfig=planar, compression=compression)
    assert (read_photo(tmp_path / "a.tif").pixels == DEEP[:, :, :3]).all()
    tifffile.imwrite(tmp_path / "b.tif", DEEP[:, :, 0], photometric="miniswhite", compression=compression)
    assert (read_photo(tmp_path / "b.tif").pixels == three(65535 - DEEP[:, :, 0])).all()
    Image.fromarray(RGB).save(tmp_path / "c.tif", compression="tiff_lzw")
    assert (read_photo(tmp_path / "c.tif").pixels == RGB).all()


def test_alpha_of_tiffs_is_what_the_file_says(tmp_path):
    alpha = np.full((12, 17), 32768, np.uint16)
    alpha[0] = 0
    stored = np.dstack([np.round(DEEP[:, :, :3] * (alpha[:, :, None] / 65535)).astype(np.uint16), alpha])
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", extrasamples=["assocalpha"])
    photo = read_photo(tmp_path / "a.tif")
    assert (photo.alpha == alpha).all()
    assert abs(photo.pixels[1:].astype(int) - DEEP[1:, :, :3]).max() <= 1  # halved and doubled
    tifffile.imwrite(tmp_path / "b.tif", DEEP, photometric="rgb", extrasamples=["unspecified"])
    photo = read_photo(tmp_path / "b.tif")
    assert photo.alpha is None
    assert photo.notes == ("it has a further channel, which is not said to be alpha and was left out",)
    tifffile.imwrite(tmp_path / "c.tif", DEEP, photometric="rgb", extrasamples=["unassalpha"])
    assert (read_photo(tmp_path / "c.tif").pixels == DEEP[:, :, :3]).all()


def test_resolution_turns_with_the_picture_and_needs_a_unit(tmp_path):
    tags = Image.Exif()
    tags[274] = 6
    Image.fromarray(RGB).save(tmp_path / "a.jpg", exif=tags, dpi=(300, 150))
    assert read_photo(tmp_path / "a.jpg").dpi == approx((150, 300))
    tifffile.imwrite(tmp_path / "b.tif", DEEP[:, :, :3], photometric="rgb", resolution=(1, 1), resolutionunit="NONE")
    assert read_photo(tmp_path / "b.tif").dpi is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"photometric": "separated"}, "its samples are uint16 of 16 bits, SEPARATED; convert it to gray or RGB of 8 or 16 bits first"),
        ({"dtype": np.float32}, "its samples are float32 of 32 bits, MINISBLACK; convert it"),
        ({"dtype": np.uint32}, "its samples are uint32 of 32 bits, MINISBLACK; convert it"),
    ],
)
def test_sound_pictures_of_other_kinds_are_not_called_damaged(tmp_path, options, message):
    values = DEEP if "photometric" in options else DEEP[:, :, 0].astype(options.pop("dtype"))
    tifffile.imwrite(tmp_path / "a.tif", values, **options)
    with pytest.raises(ValueError, match=rf"a\.tif: {message}"):
        read_photo(tmp_path / "a.tif")


def test_pages_and_frames_are_said(tmp_path):
    first, second = Image.fromarray(RGB), Image.fromarray(RGB[::-1])
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second])
    first.save(tmp_path / "a.webp", save_all=True, append_images=[second], lossless=True)
    tifffile.imwrite(tmp_path / "b.tif", np.stack([DEEP[:, :, :3]] * 2), photometric="rgb")
    for name in ("a.tif", "a.webp", "b.tif"):
        photo = read_photo(tmp_path / name)
        assert photo.notes == ("it holds 2 pages or frames, of which only the first is taken",)
        assert (photo.pixels == (DEEP[:, :, :3] if name == "b.tif" else RGB)).all()


# Colours of print


def cmyk(profile=None):
    inks = np.dstack([255 - RGB, np.zeros_like(GRAY)])
    image = Image.frombytes("CMYK", (17, 12), inks.tobytes())
    encoded = io.BytesIO()
    image.save(encoded, "TIFF", **({"icc_profile": profile} if profile else {}))
    return encoded.getvalue()


def test_cmyk_becomes_rgb_without_its_profile(tmp_path):
    for name, profile in (("plain", None), ("damaged", b"no profile")):
        (tmp_path / f"{name}.tif").write_bytes(cmyk(profile))
        photo = read_photo(tmp_path / f"{name}.tif")
        assert (photo.pixels == RGB).all()  # with no black ink, RGB is what is left of white
        assert photo.icc_profile is None
    Image.frombytes("CMYK", (17, 12), np.dstack([255 - RGB, np.zeros_like(GRAY)]).tobytes()).save(tmp_path / "a.jpg", quality=100)
    assert abs(read_photo(tmp_path / "a.jpg").pixels.astype(int) - RGB).mean() < 12


def test_lab_becomes_srgb(tmp_path):
    lab = ImageCms.profileToProfile(Image.fromarray(RGB), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
    lab.save(tmp_path / "a.tif")
    assert abs(read_photo(tmp_path / "a.tif").pixels.astype(int) - RGB).mean() < 3


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_the_orientation_tag_is_applied_once(tmp_path, suffix, orientation):
    tags = Image.Exif()
    tags[274] = orientation
    Image.fromarray(RGB).save(tmp_path / f"a{suffix}", exif=tags, **({"lossless": True} if suffix == ".webp" else {}))
    with Image.open(tmp_path / f"a{suffix}") as image:
        expected = np.array(ImageOps.exif_transpose(image))
    photo = read_photo(tmp_path / f"a{suffix}")
    assert (photo.pixels == expected).all()
    write_photo(tmp_path / "again.png", photo)
    assert (read_photo(tmp_path / "again.png").pixels == expected).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_sixteen_bits_is_pillows_of_eight(tmp_path, orientation):
    small = np.arange(6, dtype=np.uint16).reshape(2, 3)
    tags = Image.Exif()
    tags[274] = orientation
    Image.fromarray(small.astype(np.uint8)).save(tmp_path / "8.png", exif=tags)
    expected = read_photo(tmp_path / "8.png").pixels
    tifffile.imwrite(tmp_path / "16.tif", small * 257, photometric="minisblack", extratags=[(274, 3, 1, orientation, True)])
    write_photo(tmp_path / "plain.png", Photo(three(small * 257), gray=True))
    write_with_chunk(tmp_path / "plain.png", tmp_path / "16.png", b"eXIf", tags.tobytes().removeprefix(b"Exif\0\0"))
    for name in ("16.tif", "16.png"):
        assert (read_photo(tmp_path / name).pixels == expected.astype(np.uint16) * 257).all(), name


# Profiles, resolution, formats


@pytest.mark.parametrize("suffix", FORMATS)
def test_profile_and_resolution_go_along_where_the_format_has_them(tmp_path, suffix):
    write_photo(tmp_path / f"a{suffix}", Photo(RGB, None, False, SRGB, (300.0, 300.0)), quality=100)
    photo = read_photo(tmp_path / f"a{suffix}")
    assert photo.icc_profile == (None if suffix == ".bmp" else SRGB)
    assert photo.dpi == (None if suffix == ".webp" else approx((300, 300), abs=0.5))
    exact = suffix not in (".jpg", ".jpeg")
    assert (photo.pixels == RGB).all() if exact else abs(photo.pixels.astype(int) - RGB).mean() < 2


def test_a_gray_profile_is_not_put_on_rgb(tmp_path):
    assert check_writable(Photo(three(GRAY), gray=True, icc_profile=b"gray", dpi=(1, 1)), ".webp", (1, 1)) == (
        "WEBP can't hold the colour profile of this picture; its colours may look a little different",
        "WEBP holds no resolution (dpi)",
    )
    write_photo(tmp_path / "a.webp", Photo(three(GRAY), gray=True, icc_profile=SRGB))
    assert read_photo(tmp_path / "a.webp").icc_profile is None
    assert check_writable(Photo(RGB, icc_profile=SRGB, dpi=(1, 1)), ".png", (1, 1)) == ()


@pytest.mark.parametrize("suffix", FORMATS)
def test_gray_stays_gray_in_every_format(tmp_path, suffix):
    write_photo(tmp_path / f"a{suffix}", Photo(three(GRAY), gray=True), quality=100)
    with Image.open(tmp_path / f"a{suffix}") as image:
        assert image.mode == ("RGB" if suffix == ".webp" else "L")
        values = np.array(image.convert("RGB")).astype(int)
    assert (values == values[:, :, :1]).all()
    assert abs(values - three(GRAY)).max() <= (3 if suffix in (".jpg", ".jpeg") else 0)


def test_what_a_format_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    deep, clear = Photo(DEEP[:, :, :3]), Photo(RGB, ALPHA)
    for photo, suffix, message in [
        *((deep, suffix, "16 bits a channel, which .* choose --output_format png or tif") for suffix in (".jpg", ".webp", ".bmp")),
        *((clear, suffix, "has alpha, which .* choose --output_format png, webp or tif") for suffix in (".jpeg", ".bmp")),
        (Photo(RGB), ".gif", "unknown ending '.gif'"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_photo(tmp_path / f"a{suffix}", photo)
    for suffix, side in ((".webp", 16384), (".jpg", 65536)):
        with pytest.raises(ValueError, match=f"would be 9x{side}, but .* holds {side - 1} at most"):
            check_writable(Photo(RGB), suffix, (side, 9))
    check_writable(Photo(RGB), ".png", (70000, 9))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"text", "not a picture that can be read here; known are .png"),
        (b"II*\0text and more of it", "damaged, cut off or of an unknown kind"),
        (b"\x89PNG\r\n\x1a\n", "not a picture|damaged"),
    ],
)
def test_a_broken_picture_is_one_sentence(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.png: .*({message})"):
        read_photo(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_photo(tmp_path / "b.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".bmp"])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_cut_off_picture_is_noticed(tmp_path, suffix, bits):
    if bits == 16 and suffix not in (".png", ".tif"):
        pytest.skip("8 bits only")
    pixels = np.random.default_rng(0).integers(0, 2**bits, (40, 40, 3), dtype=f"uint{bits}")
    write_photo(tmp_path / f"a{suffix}", Photo(pixels))
    data = (tmp_path / f"a{suffix}").read_bytes()
    (tmp_path / f"a{suffix}").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(ValueError, match=r"a\.\w+: "):
        read_photo(tmp_path / f"a{suffix}")


def test_huge_pictures_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(imgproc, "MAX_PIXELS", 100)
    for name, pixels in (("b.png", RGB), ("c.tif", DEEP[:, :, :3])):
        write_photo(tmp_path / name, Photo(pixels))
        with pytest.raises(ValueError, match="more than 100 pixels; cut it into parts"):
            read_photo(tmp_path / name)


# Enlarging


def double(image):
    return upscale(Enlarge(), image)


def test_gray_alpha_and_bits_are_kept_by_the_network():
    for pixels, alpha in ((RGB, ALPHA), (DEEP[:, :, :3], DEEP[:, :, 3])):
        result = inference.enlarge_photo(Photo(pixels, alpha, icc_profile=b"p", dpi=(1, 2)), double, (24, 34))
        assert (result.pixels == pixels.repeat(2, 0).repeat(2, 1)).all()
        assert (result.alpha == alpha.repeat(2, 0).repeat(2, 1)).all()
        assert (result.pixels.dtype, result.alpha.dtype) == (pixels.dtype, pixels.dtype)
        assert (result.icc_profile, result.dpi) == (b"p", (1, 2))
    network = tiny(2)  # whose three channels differ
    gray = inference.enlarge_photo(Photo(three(GRAY), gray=True), lambda image: upscale(network, image), (24, 34)).pixels
    colours = upscale(network, three(GRAY))
    assert (colours[:, :, :1] != colours).any()
    assert (gray == three(np.round(colours.mean(2)).astype(np.uint8))).all()


def test_alpha_of_one_value_stays_exactly_that():
    calls = []

    def count(image):
        calls.append(image)
        return double(image)

    result = inference.enlarge_photo(Photo(RGB, np.full((12, 17), 200, np.uint8)), count, (24, 34))
    assert (result.alpha == np.full((24, 34), 200)).all()
    assert result.alpha.shape == (24, 34)
    assert len(calls) == 1


@pytest.mark.parametrize("pixels", [RGB, DEEP[:, :, :3]], ids=["8", "16"])
def test_another_final_size_is_matlabs_bicubic_of_the_result(pixels):
    result = inference.enlarge_photo(Photo(pixels, ALPHA if pixels.dtype == np.uint8 else DEEP[:, :, 3]), double, (18, 26))
    large = pixels.repeat(2, 0).repeat(2, 1)
    assert (result.pixels == imgproc.imresize_to(large, 18, 26)).all()
    assert result.alpha.shape == (18, 26)


def test_bicubic_to_a_size_is_bicubic_by_a_scale():
    assert (imgproc.imresize_to(RGB, 24, 34) == imgproc.imresize(RGB, 2)).all()
    column = np.repeat(RGB[:, :1], 17, 1)  # all columns alike: only the rows' scale matters
    assert (imgproc.imresize_to(column, 6, 17)[:, :9] == imgproc.imresize(column, 0.5)).all()
    wide = imgproc.imresize(DEEP, 0.5)
    assert wide.dtype == np.uint16
    shallow = imgproc.imresize((DEEP // 257).astype(np.uint8), 0.5)
    assert abs(wide / 257 - shallow).max() < 1.6  # of the 8 bits, which are rounded three times
    with pytest.raises(ValueError, match="a picture of 0x3 can't be made"):
        imgproc.imresize_to(RGB, 3, 0)


# Files


def run(*arguments):
    inference.main([str(argument) for argument in arguments])


@pytest.fixture
def network_path(tmp_path):
    weights.export(tiny(2), tmp_path / "w.pth")
    return tmp_path / "w.pth"


def test_folders_names_and_formats_are_kept(tmp_path, network_path, capsys):
    folder = tmp_path / "in"
    names = ["a.png", "b.JPG", "sub/a.png", "sub/日本 語.webp", "sub/deep/ü.tif", "sub/c.bmp"]
    for name in names:
        image_files.write_image(folder / name, drawn_image(6, 7))
    image_files.write_image(folder / ".hidden/x.png", RGB)
    (folder / "notes.txt").write_text("x")
    run("--input", folder, "--output", folder / "out", "--output_format", "same", "--model_path", network_path)
    written = sorted(str(path.relative_to(folder / "out")) for path in (folder / "out").rglob("*") if path.is_file())
    assert written == sorted(name.replace("JPG", "jpg") for name in names)
    assert all(read_photo(folder / "out" / name).pixels.shape == (12, 14, 3) for name in written)
    said = capsys.readouterr()
    assert all(str(folder / "out" / name) in said.out + said.err for name in written)
    run("--input", folder, "--output", folder / "out", "--model_path", network_path)  # the results are no inputs
    assert len([path for path in (folder / "out").rglob("*.png") if path.is_file()]) == len(names)


def test_two_of_one_name_keep_their_endings(tmp_path):
    files = [tmp_path / name for name in ("a.jpg", "a.png", "b.png")]
    targets = inference.plan_outputs(files, tmp_path, tmp_path / "out", "png")
    assert [target.name for target in targets.values()] == ["a.jpg.png", "a.png.png", "b.png"]
    with pytest.raises(ValueError, match=r"a\.png\.tif and .*a\.png would both be written to .*a\.png\.png: rename one"):
        inference.plan_outputs([*files, tmp_path / "a.png.tif"], tmp_path, tmp_path / "out", "png")
    with pytest.raises(ValueError, match=r"x\.gif: can't be written in its own format; choose --output_format png"):
        inference.plan_outputs([tmp_path / "x.gif"], tmp_path, tmp_path / "out", "same")
    with pytest.raises(ValueError, match=r"a\.png: would be overwritten by the upscaled a\.png"):
        inference.plan_outputs(files[1:], tmp_path, tmp_path, "png")
    with pytest.raises(ValueError, match=r"a\.jpg: would be overwritten"):
        inference.plan_outputs(files, tmp_path, tmp_path, "same")


def test_a_note_for_each_thing_that_a_person_should_know(tmp_path, network_path, capsys, monkeypatch):
    first = Image.fromarray(RGB)
    first.save(tmp_path / "in.tif", save_all=True, append_images=[first], icc_profile=SRGB)
    run("--input", tmp_path / "in.tif", "--output", tmp_path / "o", "--model_path", network_path, "--outscale", 3, "--output_format", "bmp")
    said = capsys.readouterr()
    said = said.out + said.err
    for note in ("holds 2 pages", "larger than the network's x2; the rest is bicubic", "BMP can't hold the colour profile"):
        assert f"note: {note}" in said or f"note: it {note}" in said
    assert read_photo(tmp_path / "o/in.bmp").pixels.shape == (36, 51, 3)


def twelve_bits():
    """A gray TIFF of 4 x 2 pixels with 12 bits each: tags 256 to 279 of TIFF 6.0, then 12 bytes of pixels."""
    entries = [(256, 4), (257, 2), (258, 12), (259, 1), (262, 1), (273, 8 + 2 + 9 * 12 + 4), (277, 1), (278, 2), (279, 12)]
    table = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + bytes(range(12))


def test_memory_that_runs_out_for_one_picture_spares_the_others(tmp_path, network_path, monkeypatch):
    for name in ("a.png", "b.png"):
        image_files.write_image(tmp_path / "in" / name, RGB)
    real = inference.enlarge_photo

    def limited(photo, enlarge, size):
        if not (tmp_path / "o").exists():
            (tmp_path / "o").mkdir()
            raise MemoryError
        return real(photo, enlarge, size)

    monkeypatch.setattr(inference, "enlarge_photo", limited)
    with pytest.raises(ValueError, match=r"1 of 2 pictures were not upscaled:\n.*a\.png: there is too little memory for it"):
        run("--input", tmp_path / "in", "--output", tmp_path / "o", "--model_path", network_path)
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["b.png"]


def test_what_fails_is_listed_and_the_others_are_done(tmp_path, network_path):
    for name in ("a.png", "c.png"):
        image_files.write_image(tmp_path / "in" / name, RGB)
    write_photo(tmp_path / "in" / "b.png", Photo(RGB, ALPHA))
    (tmp_path / "in" / "d.png").write_bytes(b"text")
    (tmp_path / "in" / "e.tif").write_bytes(twelve_bits())
    message = r"3 of 5 pictures were not upscaled:\n.*b\.png: .* has alpha.*\n.*d\.png: not a picture.*\n.*e\.tif: its samples .* 12 bits"
    with pytest.raises(ValueError, match=message):
        run("--input", tmp_path / "in", "--output", tmp_path / "o", "--model_path", network_path, "--output_format", "jpg")
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["a.jpg", "c.jpg"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--outscale", "0"], "outscale=0.0 must be greater than 0"),
        (["--outscale", "nan"], "outscale=nan must be"),
        (["--quality", "0"], "quality=0 must be 1 to 100"),
        (["--tile", "50"], "tile=50 must be 0, or more than twice tile_overlap=32"),
        (["--tile", "-1"], "tile=-1 must be"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, arguments, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:  # older versions of tyro leave the sentence to run_script
        run("--input", tmp_path, *arguments)
    assert message in " ".join(f"{capsys.readouterr().err} {error.value}".replace("│", " ").split())


@pytest.mark.parametrize(
    ("outscale", "size"), [(1, (12, 17)), (2, (24, 34)), (1.3, (16, 22)), (1.1, (13, 19)), (0.01, (1, 1)), (5, (60, 85))]
)
def test_outscale_is_the_final_size(tmp_path, network_path, outscale, size):
    image_files.write_image(tmp_path / "a.png", RGB)
    run("--input", tmp_path / "a.png", "--output", tmp_path / "o", "--model_path", network_path, "--outscale", outscale)
    assert read_photo(tmp_path / "o/a.png").pixels.shape[:2] == size

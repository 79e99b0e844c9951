"""What photos say beside pixels: carried into every format that holds it, upright and of the new size, and named where it is lost."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, PngImagePlugin

import metadata
from helpers import drawn_image
from image_files import Photo, check_writable, read_photo, write_photo

RGB = drawn_image(12, 17)
XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf tiff:Orientation=\"6\"/></x:xmpmeta>"


def exif(orientation=6):
    found = Image.Exif()
    found[271], found[306], found[315], found[274] = "Maker", "2024:05:01 12:00:00", "A. Person", orientation
    found.get_ifd(ExifTags.IFD.Exif).update({33434: 0.01, 40962: 17, 40963: 12, 37500: b"note"})
    found.get_ifd(ExifTags.IFD.GPSInfo).update({1: "N", 2: (48.0, 8.0, 0.0)})
    return found


def saved(path, **options):
    Image.fromarray(RGB).save(path, **options)
    return path


def chunk_after_header(path, *chunks):
    """A PNG with further chunks."""
    data = saved(path).read_bytes()
    path.write_bytes(data[:33] + b"".join(metadata.png_chunk(*chunk) for chunk in chunks) + data[33:])
    return path


def rewritten(source, target):
    """The metadata of a photo that is read, enlarged twice and written, and what was said to be left out."""
    photo = read_photo(source)
    large = Photo(photo.pixels.repeat(2, 0).repeat(2, 1), metadata=photo.metadata)
    said = " ".join(check_writable(large, target.suffix, large.pixels.shape[:2]))
    write_photo(target, large)
    with open(target, "rb") as file:
        return metadata.read(file), said


@pytest.mark.parametrize("target", ["jpg", "png", "webp"])
@pytest.mark.parametrize("source", ["jpg", "png", "webp", "tif"])
def test_exif_is_carried_upright_and_with_the_new_size(tmp_path, source, target):
    options = {"quality": 95} if source in ("jpg", "webp") else {}
    found, said = rewritten(saved(tmp_path / f"a.{source}", exif=exif(), **options), tmp_path / f"b.{target}")
    result = Image.Exif()
    result.load(found.exif)
    assert (result[271], result[306], result[315], result[274]) == ("Maker", "2024:05:01 12:00:00", "A. Person", 1)
    assert said == ""
    if source == "tif":  # Pillow wrote no settings there
        return
    settings = result.get_ifd(ExifTags.IFD.Exif)
    assert (float(settings[33434]), settings[37500]) == (0.01, b"note")
    assert (settings[40962], settings[40963]) == (24, 34)  # on its side, and twice as large
    assert result.get_ifd(ExifTags.IFD.GPSInfo)[2] == (48.0, 8.0, 0.0)


def test_the_settings_of_a_tiff_are_read():
    with io.BytesIO(exif().tobytes()[6:]) as file:  # EXIF is a TIFF without an image
        settings = metadata.read(file).for_pillow("JPEG", (34, 24))["exif"]
    result = Image.Exif()
    result.load(settings)
    assert float(result.get_ifd(ExifTags.IFD.Exif)[33434]) == 0.01
    assert result.get_ifd(ExifTags.IFD.GPSInfo)[1] == "N"


@pytest.mark.parametrize(("target", "kept"), [("jpg", True), ("png", True), ("webp", True), ("tif", True), ("bmp", False)])
@pytest.mark.parametrize("source", ["jpg", "png", "webp"])
def test_xmp_is_carried_upright_or_named(tmp_path, source, target, kept):
    if source == "png":
        path = chunk_after_header(tmp_path / "a.png", (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)))
    else:
        path = saved(tmp_path / f"a.{source}", xmp=XMP)
    found, said = rewritten(path, tmp_path / f"b.{target}")
    assert found.xmp == (XMP.replace(b'"6"', b'"1"') if kept else b"")
    assert ("XMP" in said) == (not kept)


@pytest.mark.parametrize(
    ("target", "names"), [("png", []), ("jpg", ["parameters", "big"]), ("webp", ["parameters"]), ("tif", ["parameters"])]
)
def test_text_of_any_length_goes_from_png_to_png_and_is_named_elsewhere(tmp_path, target, names):
    long = "{'node': 12345} " * 200_000  # 3 MB, as image generators write
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a tree, Steps: 40")
    text.add_itxt("ü", "ein Baum", "de")
    text.add_text("big", long, zip=True)
    _, said = rewritten(saved(tmp_path / "a.png", pnginfo=text), tmp_path / f"b.{target}")
    assert all(name in said for name in names)
    if target == "png":
        with Image.open(tmp_path / "b.png") as image:
            assert (image.text["parameters"], image.text["big"]) == ("a tree, Steps: 40", long)


def test_comments_are_carried_or_named(tmp_path):
    path = saved(tmp_path / "a.jpg", comment="hello")
    assert rewritten(path, tmp_path / "b.jpg")[0].comment == b"hello"
    rewritten(path, tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as image:
        assert image.text["Comment"] == "hello"
    assert "comment" in rewritten(path, tmp_path / "b.webp")[1]


def test_a_tiff_holds_the_texts_and_names_the_rest(tmp_path):
    found, said = rewritten(saved(tmp_path / "a.jpg", exif=exif()), tmp_path / "b.tif")
    result = Image.Exif()
    result.load(found.exif)
    assert (result[271], result[315]) == ("Maker", "A. Person")
    assert "GPS" in said
    tifffile.imwrite(tmp_path / "geo.tif", RGB, photometric="rgb", metadata=None, extratags=[(33550, 12, 3, (1.0, 2.0, 3.0), True)])
    assert "33550" in rewritten(tmp_path / "geo.tif", tmp_path / "c.png")[1]


@pytest.mark.parametrize(
    ("kind", "content", "unusual"),
    [
        (b"gAMA", struct.pack(">I", 100_000), True),  # linear
        (b"gAMA", struct.pack(">I", 45_455), False),  # sRGB's
        (b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000), True),  # Adobe RGB's primaries
        (b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000), False),  # sRGB's
        (b"cICP", bytes([9, 16, 0, 1]), True),  # PQ
        (b"cICP", bytes([1, 13, 0, 1]), False),  # sRGB
    ],
)
@pytest.mark.parametrize("deep", [False, True])
def test_what_a_png_says_of_its_colours_stays_or_is_named(tmp_path, kind, content, unusual, deep):
    path = chunk_after_header(tmp_path / "a.png", (kind, content))
    photo = read_photo(path)
    if deep:
        photo = Photo(photo.pixels.astype(np.uint16) * 257, metadata=photo.metadata)
    write_photo(tmp_path / "b.png", photo)
    with open(tmp_path / "b.png", "rb") as file:
        assert list(metadata.png_chunks(file, (kind,))) == [(kind, content)]
    assert bool(photo.metadata.left_out("JPEG")) == bool(photo.metadata.left_out("TIFF")) == unusual
    assert not photo.metadata.left_out("PNG")


def test_adobe_rgb_by_exif_alone_is_named_where_exif_is_not_written(tmp_path):
    found = Image.Exif()
    found[271] = "Maker"
    found[ExifTags.IFD.Exif] = {40961: 65535, 40965: {1: "R03", 2: b"0100"}}
    path = saved(tmp_path / "a.jpg", exif=found)
    assert "Adobe RGB" in rewritten(path, tmp_path / "b.bmp")[1]
    result = Image.Exif()
    result.load(rewritten(path, tmp_path / "b.jpg")[0].exif)
    assert result.get_ifd(ExifTags.IFD.Interop)[1] == "R03"


def test_blocks_longer_than_jpegs_are_named_and_the_rest_is_written(tmp_path):
    found = exif()
    found[ExifTags.IFD.Exif] = {37500: bytes(70_000)}
    photo = Photo(RGB, metadata=metadata.Metadata(found.tobytes(), XMP, b"c" * 70_000))
    said = " ".join(check_writable(photo, ".jpg", (12, 17)))
    assert "EXIF" in said and "comment" in said and "XMP" not in said
    write_photo(tmp_path / "a.jpg", photo)
    with open(tmp_path / "a.jpg", "rb") as file:
        assert metadata.read(file) == metadata.Metadata(xmp=XMP.replace(b'"6"', b'"1"'))


@pytest.mark.filterwarnings("ignore")  # Pillow's
@pytest.mark.parametrize("damage", ["exif", "text", "exif type"])
def test_damage_beside_the_pixels_is_named_and_the_pixels_are_read(tmp_path, damage):
    """Sound for browsers: a malformed eXIf chunk, or a text chunk with a wrong checksum."""
    chunk = {"exif": (b"eXIf", b"nonsense"), "exif type": (b"eXIf", exif().tobytes()[6:40]), "text": (b"tEXt", b"a\0b")}[damage]
    path = chunk_after_header(tmp_path / "a.png", chunk)
    if damage == "text":
        data = bytearray(path.read_bytes())
        data[data.index(b"a\0b") + 3] ^= 1
        path.write_bytes(bytes(data))
    photo = read_photo(path)
    assert (photo.pixels == RGB).all()
    assert photo.notes or photo.metadata.lost


def test_chunks_that_are_not_known_are_named(tmp_path):
    path = chunk_after_header(tmp_path / "a.png", (b"tIME", bytes(7)), (b"caBX", b"who made it"))
    said = " ".join(read_photo(path).metadata.left_out("PNG"))
    assert "tIME" in said and "caBX" in said


@pytest.mark.parametrize("spelling", ["='6'", ' = "6"', "> 6 <", ">6<"])
def test_every_spelling_of_xmps_orientation_is_reset(tmp_path, spelling):
    path = saved(tmp_path / "a.jpg", xmp=f"<x tiff:Orientation{spelling}/>".encode())
    with open(path, "rb") as file:
        assert metadata.read(file).xmp == f"<x tiff:Orientation{spelling}/>".replace("6", "1").encode()


def test_a_text_that_unpacks_to_gigabytes_is_cut(tmp_path):
    bomb = zlib.compress(bytes(200 * 2**20), 9)
    path = chunk_after_header(tmp_path / "a.png", (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb))
    with open(path, "rb") as file:
        assert len(metadata.read(file).xmp) <= metadata.LONGEST


def test_a_heif_is_read_where_its_package_is(tmp_path):
    pytest.importorskip("pillow_heif")
    saved(tmp_path / "a.heic", quality=-1)
    assert abs(read_photo(tmp_path / "a.heic").pixels.astype(int) - RGB).mean() < 3


def test_nothing_is_found_where_nothing_is():
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, "png")
    assert metadata.read(buffer) == metadata.Metadata()

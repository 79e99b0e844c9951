"""Image files: every kind gives the right values, and a damaged or hostile file one sentence, never a crash, a hang or a full memory.

A decoder written in C can end its process, so mutated files are read in another one. To read one again after a failure:

    python tests/test_image_files.py FILE ...
"""

import faulthandler
import io
import json
import random
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from pytest import approx

if __name__ == "__main__":  # else pytest sees to both
    warnings.simplefilter("error")
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import image_files
import metadata
from image_files import (
    FORMATS,
    Photo,
    check_writable,
    image_size,
    list_images,
    passed_over,
    read_image,
    read_photo,
    write_image,
    write_photo,
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")  # image_files hides them, but pytest shows them

RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (12, 17, 3), dtype=np.uint8) // 64 * 64
GRAY, ALPHA = RGB[:, :, 0].copy(), RGB[:, :, 1].copy()
DEEP = RANDOM.integers(0, 65536, (12, 17, 4), dtype=np.uint16)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
FULL, LEVELS = Image.fromarray(RGB), Image.fromarray(GRAY)
CLEAR = Image.fromarray(np.dstack([RGB, ALPHA]))


def three(gray):
    return np.repeat(gray[:, :, None], 3, 2)


def saved(image, kind, **options):
    encoded = io.BytesIO()
    image.save(encoded, kind, **options)
    return encoded.getvalue()


def tiff(values, photometric="rgb", **options):
    encoded = io.BytesIO()
    tifffile.imwrite(encoded, values, photometric=photometric, **{"metadata": None, **options})
    return encoded.getvalue()


def opencv(values, suffix=".png"):
    return cv2.imencode(suffix, values)[1].tobytes()


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def with_chunk(png_file, name, content):
    """A PNG with a further chunk after its header."""
    return png_file[:33] + chunk(name, content) + png_file[33:]


def png(width, height, bits, colour, *chunks, interlace=0):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def interlaced(values, colour):
    """Adam7 (PNG, third edition, section 8.1)."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    big = values.astype(values.dtype.newbyteorder(">"))
    rows = b"".join(b"\0" + row.tobytes() for y, x, down, right in passes for row in big[y::down, x::right])
    return png(values.shape[1], values.shape[0], 8 * values.itemsize, colour, chunk(b"IDAT", zlib.compress(rows)), interlace=1)


def run_lengths():
    """A BMP of 8 bits with runs: 12 rows of 17 pixels."""
    rows = b"\x08\x01\x09\x02\0\0" * 11 + b"\0\x03\x01\x02\x03\0\x0e\x02\0\x01"
    colours = bytes(range(16))
    start = 54 + len(colours)
    header = struct.pack("<IiiHHIIiiII", 40, 17, 12, 1, 8, 1, len(rows), 2835, 2835, 4, 4)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + colours + rows


def exif(orientation):
    tags = Image.Exif()
    tags[274] = orientation
    return tags


def gray_press():
    """An ICC profile of a press that prints every colour as middle gray, L* = 50, and black ink as black (ICC.1, lut8Type)."""
    identity = struct.pack(">9i", *(65536 * (index % 4 == 0) for index in range(9)))
    lab = bytes([128, 128, 128, 0, 128, 128]) * 2**3  # without and with black, for every mixture of the other inks
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + bytes(range(256)) * 4 + lab + bytes(range(256)) * 3
    header = struct.pack(">I4sI4s4s4s", 144 + len(table), b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return header + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table


# Every kind


@dataclass
class Kind:
    data: bytes
    pixels: np.ndarray | None = None  # None: any
    alpha: np.ndarray | None = None
    gray: bool = False
    off: float = 0  # mean difference of the pixels that is allowed
    notes: int = 0


@cache
def kinds():
    """A small whole file of every kind, with what it holds."""
    palette, bilevel = FULL.quantize(16), LEVELS.point(lambda value: 255 * (value > 128)).convert("1")
    in_palette, levels, black = np.array(palette.convert("RGB")), three(GRAY), three(255 * (GRAY > 128).astype(np.uint8))
    index = np.array(palette)
    cmyk = Image.frombytes("CMYK", (17, 12), np.dstack([255 - RGB, np.zeros_like(GRAY)]).tobytes())
    lab_profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    lab = ImageCms.profileToProfile(FULL, ImageCms.createProfile("sRGB"), lab_profile, outputMode="LAB")
    gray16, rgb16, alpha16 = three(DEEP[:, :, 0]), DEEP[:, :, :3], DEEP[:, :, 3]
    bgr, key = rgb16[:, :, ::-1], DEEP[0, 0].astype(">u2").tobytes()
    multiplied = np.round(rgb16 * (alpha16[:, :, None] / 65535)).astype(np.uint16)
    meta = {"icc_profile": SRGB, "exif": exif(6), "dpi": (72, 144)}
    found = {
        "png": Kind(saved(FULL, "png", **meta), np.rot90(RGB, 3)),
        "png gray": Kind(saved(LEVELS, "png"), levels, gray=True),
        "png 1 bit": Kind(saved(bilevel, "png"), black, gray=True),
        "png gray alpha": Kind(saved(CLEAR.convert("LA"), "png"), None, ALPHA, gray=True),
        "png rgba": Kind(saved(CLEAR, "png"), RGB, ALPHA),
        "png palette": Kind(saved(palette, "png"), in_palette),
        "png palette index": Kind(saved(palette, "png", transparency=3), in_palette, np.where(index == 3, 0, 255)),
        "png palette alphas": Kind(saved(palette, "png", transparency=bytes(range(0, 160, 10))), in_palette, 10 * index),
        "png gray key": Kind(saved(LEVELS, "png", transparency=64), levels, np.where(GRAY == 64, 0, 255), gray=True),
        "png key": Kind(saved(FULL, "png", transparency=(0, 64, 0)), RGB, 255 * (RGB != (0, 64, 0)).any(2)),
        "png frames": Kind(saved(FULL, "png", save_all=True, append_images=[FULL.rotate(180)]), RGB, notes=1),
        "png interlaced": Kind(interlaced(RGB, 2), RGB),
        "png deep": Kind(opencv(bgr), rgb16),
        "png deep gray": Kind(opencv(DEEP[:, :, 0]), gray16, gray=True),
        "png deep rgba": Kind(opencv(np.dstack([bgr, alpha16])), rgb16, alpha16),
        "png deep gray alpha": Kind(interlaced(DEEP[:, :, [0, 3]], 4), gray16, alpha16, gray=True),
        "png deep key": Kind(with_chunk(opencv(bgr), b"tRNS", key[:6]), rgb16, 65535 * (rgb16 != rgb16[0, 0]).any(2)),
        "png deep gray key": Kind(
            with_chunk(opencv(DEEP[:, :, 0]), b"tRNS", key[:2]), gray16, 65535 * (gray16 != gray16[0, 0]).any(2), gray=True
        ),
        "jpeg": Kind(saved(FULL, "jpeg", quality=100, subsampling=0, **meta), np.rot90(RGB, 3), off=1),
        "jpeg progressive": Kind(saved(FULL, "jpeg", progressive=True, quality=95, subsampling=0), RGB, off=4),
        "jpeg gray": Kind(saved(LEVELS, "jpeg", quality=100, icc_profile=SRGB), levels, gray=True, off=1),
        "jpeg cmyk": Kind(saved(cmyk, "jpeg", quality=100, icc_profile=SRGB), RGB, off=1),  # no ink's profile, so it is not used
        "jpeg previews": Kind(saved(FULL, "mpo", quality=95, subsampling=0, save_all=True, append_images=[FULL]), RGB, off=4, notes=1),
        "webp": Kind(saved(FULL, "webp", icc_profile=SRGB, exif=exif(6))),
        "webp lossless": Kind(saved(FULL, "webp", lossless=True), RGB),
        "webp alpha": Kind(saved(CLEAR, "webp", lossless=True, exact=True), RGB, ALPHA),
        "webp frames": Kind(saved(FULL, "webp", save_all=True, append_images=[FULL.rotate(180)], lossless=True), RGB, notes=1),
        "bmp": Kind(saved(FULL, "bmp"), RGB),
        "bmp gray": Kind(saved(LEVELS, "bmp"), levels, gray=True),
        "bmp 1 bit": Kind(saved(bilevel, "bmp"), black, gray=True),
        "bmp rle": Kind(run_lengths()),
        "gif": Kind(saved(palette, "gif", save_all=True, append_images=[palette.rotate(180)]), in_palette, notes=1),
        "ppm": Kind(saved(FULL, "ppm"), RGB),
        "pgm deep": Kind(b"P5 17 12 65535\n" + DEEP[:, :, 0].astype(">u2").tobytes(), gray16, gray=True),
        "tiff": Kind(saved(FULL, "tiff", exif=exif(6)), np.rot90(RGB, 3)),
        "tiff jpeg": Kind(saved(LEVELS, "tiff", compression="jpeg", quality=95), levels, gray=True, off=4),
        "tiff 1 bit": Kind(saved(bilevel, "tiff", compression="group4"), black, gray=True),
        "tiff palette": Kind(saved(palette, "tiff"), in_palette),
        "tiff rgba": Kind(saved(CLEAR, "tiff"), RGB, ALPHA),
        "tiff gray multiplied": Kind(
            tiff(
                np.dstack([np.minimum(GRAY, 128), np.full_like(GRAY, 128)]),
                "minisblack",
                planarconfig="contig",
                extrasamples=["assocalpha"],
            ),
            three(np.where(GRAY == 64, 128, np.where(GRAY > 64, 255, 0))),
            np.full_like(GRAY, 128),
            gray=True,
            off=1,
        ),
        "tiff white": Kind(tiff(GRAY, "miniswhite"), 255 - levels, gray=True),
        "tiff pages": Kind(saved(FULL, "tiff", save_all=True, append_images=[LEVELS]), RGB, notes=1),
        "tiff cmyk": Kind(saved(cmyk, "tiff"), RGB),  # without black ink, RGB is what is left of white
        "tiff lab": Kind(saved(lab, "tiff"), RGB, off=3),
        "tiff lab profile": Kind(saved(lab, "tiff", icc_profile=lab_profile.tobytes()), RGB, off=3),
        "tiff deep": Kind(tiff(rgb16), rgb16),
        "tiff deep lzw": Kind(opencv(bgr, ".tif"), rgb16),  # OpenCV's own compression
        "tiff deep gray": Kind(tiff(DEEP[:, :, 0], "minisblack"), gray16, gray=True),
        "tiff deep white": Kind(tiff(DEEP[:, :, 0], "miniswhite"), 65535 - gray16, gray=True),
        "tiff deep gray alpha": Kind(
            tiff(DEEP[:, :, [0, 3]], "minisblack", planarconfig="contig", extrasamples=["unassalpha"]), gray16, alpha16, gray=True
        ),
        "tiff deep rgba": Kind(tiff(DEEP, extrasamples=["unassalpha"], rowsperstrip=3), rgb16, alpha16),
        "tiff deep multiplied": Kind(tiff(np.dstack([multiplied, alpha16]), extrasamples=["assocalpha"]), rgb16, alpha16, off=2),
        "tiff deep unspecified": Kind(tiff(DEEP, extrasamples=["unspecified"]), rgb16, notes=1),
        "tiff deep planes": Kind(tiff(np.moveaxis(rgb16, 2, 0), planarconfig="separate", compression="zlib"), rgb16),
        "tiff deep tiles": Kind(tiff(rgb16, tile=(16, 16), predictor=2, compression="zlib"), rgb16),
        "tiff deep big": Kind(tiff(rgb16, byteorder=">", bigtiff=True), rgb16),  # which Pillow doesn't know
        "tiff deep pages": Kind(tiff(np.stack([rgb16, rgb16])), rgb16, notes=1),
    }
    for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        found[f"tiff {name}"] = Kind(saved(FULL, "tiff", compression=name), RGB)
        found[f"tiff gray {name}"] = Kind(saved(LEVELS, "tiff", compression=name, dpi=(72, 72)), levels, gray=True)
    return found


@pytest.mark.parametrize("name", kinds())
def test_every_kind_of_file_gives_its_values(tmp_path, name):
    kind, path = kinds()[name], tmp_path / "a.png"
    path.write_bytes(kind.data)
    photo = read_photo(path)
    if kind.pixels is not None:
        assert photo.pixels.shape == kind.pixels.shape
        assert abs(photo.pixels.astype(int) - kind.pixels).mean() <= kind.off
    assert photo.bits == (16 if "deep" in name else 8)
    assert (photo.alpha is None) == (kind.alpha is None)
    assert kind.alpha is None or (photo.alpha == kind.alpha).all()
    assert (photo.gray, len(photo.notes)) == (kind.gray, kind.notes)
    assert not kind.gray or (photo.pixels == photo.pixels[:, :, :1]).all()
    rounded = np.round(photo.pixels / (257 if photo.bits == 16 else 1)).astype(np.uint8)
    assert abs(read_image(path, orient=True).astype(int) - rounded).max() <= (1 if "lab" in name else 0)
    assert read_image(path).shape == (*image_size(path), 3)


def test_photos_use_the_profile_of_cmyk_and_benchmarks_the_plain_formula(tmp_path):
    cmyk = Image.frombytes("CMYK", (17, 12), np.dstack([255 - RGB, np.zeros_like(GRAY)]).tobytes())
    cmyk.save(tmp_path / "a.tif", icc_profile=gray_press())
    photo = read_photo(tmp_path / "a.tif")
    assert abs(photo.pixels.astype(int) - 119).max() <= 1  # sRGB of L* = 50
    assert photo.icc_profile is None
    assert (read_image(tmp_path / "a.tif") == RGB).all()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "tiff", "gif", "ppm"])
def test_one_pixel_is_an_image(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(saved(Image.new("RGB", (1, 1), "white"), kind))
    for found in (read_image(tmp_path / "a.png"), read_photo(tmp_path / "a.png").pixels):
        assert (found == np.full((1, 1, 3), 255)).all()
    assert image_size(tmp_path / "a.png") == (1, 1)


@pytest.mark.parametrize("name", ["float", "32 bits", "signed", "inks", "five channels", "volume", "12 bits"])
def test_samples_that_cannot_be_kept_are_refused(tmp_path, name):
    (tmp_path / "a.tif").write_bytes(
        {
            "float": lambda: tiff(DEEP[:, :, 0].astype(np.float32), "minisblack"),
            "32 bits": lambda: tiff(DEEP[:, :, 0].astype(np.uint32), "minisblack"),
            "signed": lambda: tiff(DEEP[:, :, 0].astype(np.int16), "minisblack"),
            "inks": lambda: tiff(DEEP, "separated"),
            "five channels": lambda: tiff(np.dstack([DEEP, DEEP[:, :, 0]]), planarconfig="contig"),
            "volume": lambda: tiff(np.stack([DEEP[:, :, 0]] * 3), "minisblack", volumetric=True),
            "12 bits": twelve_bits,
        }[name]()
    )
    for read in (read_image, read_photo):
        with pytest.raises(ValueError, match=r"a\.tif: "):
            read(tmp_path / "a.tif")


def twelve_bits():
    """A gray TIFF of 4 x 2 pixels with 12 bits each: tags 256 to 279 of TIFF 6.0, then 12 bytes of pixels."""
    entries = [(256, 4), (257, 2), (258, 12), (259, 1), (262, 1), (273, 8 + 2 + 9 * 12 + 4), (277, 1), (278, 2), (279, 12)]
    table = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + bytes(range(12))


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied_once(tmp_path, orientation):
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(saved(FULL, "png", exif=exif(orientation))))))
    tag = [(274, 3, 1, orientation, True)]
    for name, data in {
        "a.png": saved(FULL, "png", exif=exif(orientation)),
        "a.webp": saved(FULL, "webp", exif=exif(orientation), lossless=True),
        "a.tif": saved(FULL, "tiff", exif=exif(orientation)),
        "deep.png": with_chunk(
            opencv(RGB[:, :, ::-1].astype(np.uint16) * 257), b"eXIf", exif(orientation).tobytes().removeprefix(b"Exif\0\0")
        ),
        "deep.tif": tiff(RGB.astype(np.uint16) * 257, extratags=tag),
    }.items():
        path = tmp_path / name
        path.write_bytes(data)
        photo = read_photo(path)
        assert (photo.pixels == expected.astype(photo.pixels.dtype) * (257 if "deep" in name else 1)).all(), name
        assert (read_image(path, orient=True) == expected).all(), name
        plain = expected if path.suffix == ".tif" else RGB  # TIFF's tag belongs to its pixels
        assert (read_image(path) == plain).all(), name
        assert image_size(path) == plain.shape[:2], name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_deep_tiff_of_any_compression_is_upright(tmp_path, orientation):
    deep = Image.fromarray(DEEP[:, :, 0])
    (tmp_path / "8").write_bytes(saved(LEVELS, "tiff", exif=exif(orientation)))
    (tmp_path / "levels").write_bytes(tiff(GRAY.astype(np.uint16) * 257, "minisblack", extratags=[(274, 3, 1, orientation, True)]))
    assert (read_image(tmp_path / "levels") == read_image(tmp_path / "8")).all()
    doubled = np.dstack([GRAY, GRAY]).astype(np.uint16) * 257  # gray and alpha, which Pillow doesn't know
    tags = {"extratags": [(274, 3, 1, orientation, True)], "planarconfig": "contig", "extrasamples": ["unassalpha"]}
    (tmp_path / "doubled").write_bytes(tiff(doubled, "minisblack", **tags))
    assert (read_image(tmp_path / "doubled") == read_image(tmp_path / "8")).all()
    assert image_size(tmp_path / "doubled") == image_size(tmp_path / "8")
    found = []
    for compression in (None, "tiff_lzw"):  # by tifffile and by OpenCV
        (tmp_path / "16").write_bytes(saved(deep, "tiff", compression=compression, exif=exif(orientation), dpi=(300, 150)))
        found.append(read_photo(tmp_path / "16"))
    assert (found[0].pixels == found[1].pixels).all()
    assert found[0].dpi == found[1].dpi == approx((150, 300) if orientation >= 5 else (300, 150))


def test_resolution_rotates_with_the_image_and_needs_a_unit(tmp_path):
    for kind in ("png", "jpeg", "tiff"):
        (tmp_path / "a").write_bytes(saved(FULL, kind, exif=exif(6), dpi=(300, 150)))
        assert read_photo(tmp_path / "a").dpi == approx((150, 300), abs=0.02)
    (tmp_path / "b").write_bytes(tiff(DEEP[:, :, :3], resolution=(1, 1), resolutionunit="NONE"))
    assert read_photo(tmp_path / "b").dpi is None


# Writing


@pytest.mark.parametrize("name", ["png gray", "png gray alpha", "png 1 bit", "png rgba", "png palette", "png palette index", "bmp"])
def test_png_keeps_what_every_kind_holds(tmp_path, name):
    (tmp_path / "in").write_bytes(kinds()[name].data)
    photo = read_photo(tmp_path / "in")
    write_photo(tmp_path / "out.png", photo)
    with Image.open(tmp_path / "in") as image, Image.open(tmp_path / "out.png") as written:
        mode = {(True, False): "L", (True, True): "LA", (False, False): "RGB", (False, True): "RGBA"}[photo.gray, photo.alpha is not None]
        assert written.mode == mode
        assert (np.array(written) == np.array(image.convert(mode))).all()


@pytest.mark.parametrize("with_alpha", [False, True])
@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_come_back_bit_for_bit(tmp_path, suffix, gray, with_alpha):
    pixels, path = three(DEEP[:, :, 0]) if gray else DEEP[:, :, :3], tmp_path / f"a{suffix}"
    write_photo(path, Photo(pixels, DEEP[:, :, 3] if with_alpha else None, gray, SRGB, (300.0, 150.0)))
    found = read_photo(path)
    assert (found.pixels == pixels).all()
    assert (found.bits, found.gray, found.icc_profile) == (16, gray, SRGB)
    assert (found.alpha is None) == (not with_alpha)
    assert not with_alpha or (found.alpha == DEEP[:, :, 3]).all()
    assert found.dpi == approx((300, 150), abs=0.02)
    if suffix == ".png" or not (gray and with_alpha):  # which other programs read too
        with Image.open(path) as image:
            image.load()
            assert (image.size, image.info["icc_profile"]) == ((17, 12), SRGB)
        other = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert ((three(other) if other.ndim == 2 else other[:, :, 2::-1]) == pixels).all()


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_alpha_and_the_colours_below_it_come_back(tmp_path, suffix):
    write_photo(tmp_path / f"a{suffix}", Photo(RGB, ALPHA), quality=100)
    photo = read_photo(tmp_path / f"a{suffix}")
    assert (photo.pixels == RGB).all()
    assert (photo.alpha == ALPHA).all()


@pytest.mark.parametrize("suffix", FORMATS)
def test_profile_resolution_and_gray_go_along_where_the_format_has_them(tmp_path, suffix):
    off = 2 if FORMATS[suffix] == "JPEG" else 0
    write_photo(tmp_path / f"a{suffix}", Photo(RGB, None, False, SRGB, (300.0, 300.0)), quality=100)
    photo = read_photo(tmp_path / f"a{suffix}")
    assert photo.icc_profile == (None if suffix == ".bmp" else SRGB)
    assert photo.dpi == (None if suffix == ".webp" else approx((300, 300), abs=0.5))
    assert abs(photo.pixels.astype(int) - RGB).mean() <= off
    write_photo(tmp_path / f"b{suffix}", Photo(three(GRAY), gray=True, icc_profile=b"gray"), quality=100)
    with Image.open(tmp_path / f"b{suffix}") as image:
        assert image.mode == ("RGB" if suffix == ".webp" else "L")
        assert ("icc_profile" in image.info) == (suffix not in (".webp", ".bmp"))  # a gray profile doesn't fit RGB
        assert abs(np.array(image.convert("RGB")).astype(int) - three(GRAY)).mean() <= off


def test_what_a_format_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    deep, clear = Photo(DEEP[:, :, :3]), Photo(RGB, ALPHA)
    for photo, suffix in [
        *((deep, suffix) for suffix in (".jpg", ".webp", ".bmp")),
        (clear, ".jpeg"),
        (clear, ".bmp"),
        (Photo(RGB), ".gif"),
    ]:
        with pytest.raises(ValueError):
            write_photo(tmp_path / f"a{suffix}", photo)
    with pytest.raises(ValueError, match=r"a\.xyz"):
        write_image(tmp_path / "a.xyz", RGB)
    for wrong in (RGB / 255, GRAY, RGB[:0]):
        with pytest.raises(ValueError, match=r"a\.png"):
            write_image(tmp_path / "a.png", wrong)
    assert not list(tmp_path.iterdir())
    for suffix, side in ((".webp", 16384), (".jpg", 65536)):
        check_writable(Photo(RGB), suffix, (side - 1, 9))
        with pytest.raises(ValueError, match=f"9x{side}"):
            check_writable(Photo(RGB), suffix, (side, 9))
    assert [len(check_writable(Photo(RGB, icc_profile=SRGB, dpi=(1, 1)), suffix, (70, 9))) for suffix in (".png", ".bmp", ".webp")] == [
        0,
        1,
        1,
    ]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp", ".PNG"])
def test_what_was_written_is_read_again(tmp_path, suffix):
    path = tmp_path / "neuer Ordner" / f"画像 ü{suffix}"
    write_image(path, RGB)
    assert (read_image(path) == RGB).all()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_hidden_and_other_files_are_not_listed(tmp_path):
    for name in (".DS_Store", "Thumbs.db", "._a.png", "notes.txt", "b.JPG", "a.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    assert [file.name for file in list_images(tmp_path)] == ["a.png", "b.JPG"]


# Damaged files


def cut(name):
    data = kinds()[name].data
    return data[: len(data) * 2 // 3]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"text", b"II*\0text and more of it", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        saved(FULL, "pcx"),
        *("cut", "flipped"), *("png", "png deep", "jpeg", "webp lossless", "bmp", "tiff", "tiff deep", "tiff deep lzw", "pgm deep"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_in_one_line(tmp_path, content):
    path = tmp_path / "a.png"
    if content in ("cut", "flipped"):
        data = opencv(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
        content = data[:2000] if content == "cut" else data[:2000] + bytes([data[2000] ^ 255]) + data[2001:]
    path.write_bytes(cut(content) if isinstance(content, str) else content)
    for read in (read_image, read_photo):
        with pytest.raises(ValueError, match=r"a\.png: ") as error:
            read(path)
        assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "nothing.png", tmp_path):
        for read in (read_image, read_photo, image_size):
            with pytest.raises(FileNotFoundError, match=path.name):
                read(path)


def test_the_size_needs_the_header_only_and_the_limit_no_decoding(tmp_path, monkeypatch):
    for name in ("png", "jpeg", "bmp", "tiff deep"):
        data = kinds()[name].data
        (tmp_path / "a").write_bytes(data[:-30])
        assert image_size(tmp_path / "a") == (12, 17)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 12 * 17 - 1)
    for name in ("png", "png deep", "tiff", "tiff deep"):
        (tmp_path / "a").write_bytes(kinds()[name].data)
        for read in (read_image, read_photo, image_size):
            with pytest.raises(ValueError, match="203"):
                read(tmp_path / "a")


# Mutated files, in a process of their own

SECONDS = 10  # for one read
MEMORY = 10**9  # bytes, of the whole process
EXTREMES = (0, 1, 2, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 30_000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
OPERATIONS = ("flip", "replace", "delete", "repeat", "cut", "insert", "splice", "little", "big")


def mutated(data, other, operation, position, length, value):
    """`data` after one change; numbers beyond its end are taken modulo its length."""
    position %= len(data) + 1
    before, after = data[:position], data[position:]
    size = 2 + 2 * (length % 2)  # of a number in a header
    extreme = EXTREMES[value % len(EXTREMES)] % 256**size
    removed, inserted = {
        "flip": (1, bytes([(after or b"\0")[0] ^ 1 << value % 8])),
        "replace": (length % 4 + 1, bytes([value % 256]) * (length % 4 + 1)),
        "delete": (length % 64, b""),
        "repeat": (0, after[: length % 64] * (value % 4 + 1)),
        "cut": (len(after), b""),
        "insert": (0, random.Random(value).randbytes(length % 32)),
        "splice": (len(after), other[length % (len(other) + 1) :]),
        "little": (size, extreme.to_bytes(size, "little")),
        "big": (size, extreme.to_bytes(size, "big")),
    }[operation]
    return before + inserted + after[removed:]


def with_right_sums(data):
    """A PNG whose chunks have the checksums of what they hold now, so that a changed header is believed."""
    start = 8
    while start + 12 <= len(data):
        end = start + 8 + int.from_bytes(data[start : start + 4], "big")
        if end + 4 > len(data):
            break
        data = data[:end] + zlib.crc32(data[start + 4 : end]).to_bytes(4, "big") + data[end + 4 :]
        start = end + 4
    return data


@st.composite
def mutated_files(draw):
    names = st.sampled_from(sorted(kinds()))
    number, long = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)
    data = kinds()[draw(names)].data
    change = st.tuples(st.sampled_from(OPERATIONS), number, number, long)
    for operation, position, length, value in draw(st.lists(change, min_size=1, max_size=4)):
        data = mutated(data, kinds()[draw(names)].data if operation == "splice" else b"", operation, position, length, value)
    return with_right_sums(data) if data.startswith(b"\x89PNG") and draw(st.booleans()) else data


def attempt(read, path):
    """What a reader returns, or its error, a sentence that names the file."""
    start = time.perf_counter()
    try:
        result = read(path)
    except ValueError as error:
        result = str(error)
        assert result.startswith(f"{path}: ") and "; " in result and "\n" not in result, result
    assert time.perf_counter() - start < SECONDS, f"{read} took {time.perf_counter() - start:.1f} s"
    assert peak_memory() < MEMORY, f"{read} needed {peak_memory():,} bytes"
    return result


read_upright = partial(read_image, orient=True)


def check(path):
    """Read a file in every way; returns "read" or the error of read_image, image_size, read_photo, read_image with `orient`."""
    size, said = attempt(image_size, path), []
    assert isinstance(size, str) or (min(size) > 0 and size[0] * size[1] <= image_files.MAX_PIXELS)
    for read in (read_image, read_photo, read_upright):
        image = attempt(read, path)
        if isinstance(image, Photo):
            assert image.alpha is None or (image.alpha.shape, image.alpha.dtype) == (image.pixels.shape[:2], image.pixels.dtype)
            assert image.dpi is None or all(0 < value < 1e6 for value in image.dpi)
            image = image.pixels
        if not isinstance(image, str):
            assert image.dtype == np.uint8 or (read is read_photo and image.dtype == np.uint16)
            assert image.shape[2:] == (3,)
            assert image.shape[:2] in (size, size if read is read_image else size[::-1])
        said.append(image if isinstance(image, str) else "read")
        del image  # counts as memory
    return [said[0], size if isinstance(size, str) else "read", *said[1:]]


def peak_memory():
    """Bytes that this process held at most."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent held when it made this process
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments):
    """Read the files named, or else many mutated ones, of which the current one stays in the working folder."""
    faulthandler.enable()
    if arguments[0] != "--mutations":
        print(json.dumps({name: check(Path(name).absolute()) for name in arguments} | {"bytes": peak_memory()}, indent=0))
        return
    path, seen, outcomes = Path("current.png").absolute(), set(), Counter()

    @settings(max_examples=int(arguments[1]), deadline=None, database=None, derandomize=True, suppress_health_check=HealthCheck)
    @given(mutated_files())
    def read_mutated(data):
        if data in seen:
            return
        path.write_bytes(data or b"\0")
        faulthandler.dump_traceback_later(5 * SECONDS, exit=True)  # a hang
        outcomes[tuple(result == "read" for result in check(path))] += 1
        faulthandler.cancel_dump_traceback_later()
        seen.add(data)

    read_mutated()
    print(json.dumps({"files": len(seen), "read": outcomes[(True,) * 4], "refused": outcomes[(False,) * 4]}))


def in_a_process_of_its_own(folder, *arguments):
    try:
        finished = subprocess.run(
            [sys.executable, __file__, *arguments], cwd=folder, capture_output=True, text=True, errors="replace", timeout=900
        )
        output, failed = finished.stdout + finished.stderr[-8000:], finished.returncode
    except subprocess.TimeoutExpired as error:
        output, failed = f"{error}", True
    if failed:
        current = folder / "current.png"
        pytest.fail(f"{output}\n{current}: {current.read_bytes().hex() if current.exists() else arguments}", pytrace=False)
    return json.loads(finished.stdout)


@pytest.mark.slow
def test_mutated_files_are_read_or_refused_in_one_sentence(tmp_path, request):
    mutations = int(request.config.getoption("--mutations", default=300))
    found = in_a_process_of_its_own(tmp_path, "--mutations", str(mutations * 4 // 3))  # some come twice
    assert found["files"] >= mutations
    assert found["read"] > 0.05 * mutations  # not everything ends at the first byte
    assert found["refused"] > 0.05 * mutations


def zeros(width, height, bits, colour):
    """A whole black PNG, made without holding it."""
    packer, row, parts = zlib.compressobj(1), bytes(1 + (width * bits * {0: 1, 2: 3}[colour] + 7) // 8), []
    for _ in range(height):
        parts.append(packer.compress(row))
    return png(width, height, bits, colour, chunk(b"IDAT", b"".join(parts) + packer.flush()))


def bomb(name, before):
    """A PNG of one pixel with 100 MB of zeros in a chunk."""
    return png(1, 1, 8, 0, chunk(name, before + zlib.compress(bytes(100_000_000), 1)), chunk(b"IDAT", zlib.compress(b"\0\7")))


def resized(data, width, height):
    """The file of 17x12, with another size in its header."""
    if data.startswith(b"\x89PNG"):
        return with_right_sums(data[:16] + struct.pack(">II", width, height) + data[24:])
    if data.startswith(b"BM"):
        return data[:18] + struct.pack("<ii", width, height) + data[26:]
    if data.startswith(b"II"):  # tags Width and Length
        for tag, old, new in ((256, 17, width), (257, 12, height)):
            entry = next(entry for kind in (3, 4) if (entry := struct.pack("<HHII", tag, kind, 1, old)) in data)
            data = data.replace(entry, struct.pack("<HHII", tag, 4, 1, new))
        return data
    if data.startswith(b"RIFF"):  # an animation's canvas
        return data[:24] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + data[30:]
    start = next(data.find(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in data)
    return data[: start + 5] + struct.pack(">HH", height, width) + data[start + 9 :]


def hostile_files():
    """Files, and a value that what is said of each contains."""
    files = {name: kind.data for name, kind in kinds().items()}
    hostile = {
        "black.png": (zeros(30_000, 30_000, 1, 0), "110,000,000"),
        "canvas.webp": (resized(files["webp frames"], 12_000, 9000), "40,000,000"),
        "runs.bmp": (resized(files["bmp rle"], 1_000_001, 12), "10,000,000"),
    }
    tiffs = ("tiff", "tiff tiff_lzw", "tiff tiff_adobe_deflate", "tiff gray packbits", "tiff deep gray alpha")
    for kind in ("png", "png deep", "bmp", *tiffs):
        for width, height in ((12_000, 14_000), (30_000, 30_000), (65_535, 65_535)):
            hostile[f"{kind} {width}x{height}"] = resized(files[kind], width, height), "110,000,000"
    jpegs = ("jpeg", "jpeg progressive", "jpeg cmyk", "tiff jpeg")
    for kind in ("png", "png 1 bit", "png deep", "bmp", "tiff", "tiff tiff_lzw", "tiff tiff_adobe_deflate", *jpegs):
        hostile[f"{kind} lie"] = resized(files[kind], 10_000, 10_000), "10000x10000"
    for name, before in ((b"iCCP", b"a\0\0"), (b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")):
        hostile[f"{name.decode()}.png"] = bomb(name, before), ""
    return hostile


@pytest.mark.slow
def test_hostile_files_are_refused_without_memory(tmp_path):
    hostile = hostile_files()
    for name, (data, _) in hostile.items():
        (tmp_path / name).write_bytes(data)
    found = in_a_process_of_its_own(tmp_path, *hostile)
    for name, (_, value) in hostile.items():
        for sentence in found[name]:
            assert value in sentence.removeprefix(str(tmp_path / name)), f"{name}: {sentence}"
            assert sentence != "read"
    assert found["bytes"] < 250e6  # nothing is decoded


@pytest.mark.slow
def test_large_images_and_false_lengths_take_little_memory(tmp_path):
    data = kinds()["png deep"].data
    start = data.index(b"IDAT")
    (tmp_path / "length.png").write_bytes(data[: start - 4] + b"\xff\xff\xff\xff" + data[start:])  # a chunk of 4 GB, it says
    assert in_a_process_of_its_own(tmp_path, "length.png")["bytes"] < 250e6
    (tmp_path / "photo.png").write_bytes(zeros(11_656, 8742, 8, 2))  # 102 megapixels within 1 GB
    assert in_a_process_of_its_own(tmp_path, "photo.png")["photo.png"] == ["read"] * 4


if __name__ == "__main__":
    main(sys.argv[1:])


# Sound files that used to be refused, and files that are not what they seem


def png_with(path, kind, content):
    write_image(path, RGB)
    data = path.read_bytes()
    path.write_bytes(data[:33] + metadata.png_chunk(kind, content) + data[33:])
    return path


def test_large_profiles_and_texts_are_no_damage(tmp_path):
    """Printers' profiles have 1.5 MB and more."""
    profile = np.random.default_rng(0).bytes(1_500_000)
    assert read_photo(png_with(tmp_path / "a.png", b"iCCP", b"Printer\0\0" + zlib.compress(profile))).icc_profile == profile
    path = png_with(tmp_path / "b.png", b"zTXt", b"workflow\0\0" + zlib.compress(b"{'node': 12345} " * 100_000))
    assert (read_image(path) == RGB).all()


@pytest.mark.parametrize("suffix", [".jpg", ".bmp"])
def test_alpha_that_is_opaque_everywhere_needs_no_format_with_alpha(tmp_path, suffix):
    write_photo(tmp_path / f"a{suffix}", Photo(RGB, np.full(RGB.shape[:2], 255, np.uint8)), quality=100)
    assert read_photo(tmp_path / f"a{suffix}").alpha is None


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_the_transparent_gray_of_a_png_is_found_at_any_depth(tmp_path, depth):
    """Two pixels, black and white; white is transparent."""
    row = {1: b"\x40", 2: b"\x30", 4: b"\x0f", 8: b"\x00\xff"}[depth]
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, 0, 0, 0, 0)),
        (b"tRNS", struct.pack(">H", 2**depth - 1)),
        (b"IDAT", zlib.compress(b"\0" + row)),
        (b"IEND", b""),
    ]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(metadata.png_chunk(*chunk) for chunk in chunks))
    photo = read_photo(tmp_path / "a.png")
    assert photo.pixels[0, :, 0].tolist() == [0, 255]
    assert photo.alpha.tolist() == [[255, 0]]


@pytest.mark.parametrize("kind", ["dng", "preview first", "cr2"])
def test_raw_photographs_are_refused_and_not_read_from_their_previews(tmp_path, kind):
    tags = {"dng": [(50706, 1, 4, bytes([1, 4, 0, 0]), True)], "preview first": [], "cr2": []}[kind]
    options = {"subfiletype": 1} if kind == "preview first" else {}
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb", metadata=None, extratags=tags, **options)
    if kind == "cr2":  # "CR" and a version follow the header
        data = (tmp_path / "a.tif").read_bytes()
        start = int.from_bytes(data[4:8], "little")
        count = int.from_bytes(data[start : start + 2], "little")
        moved = data[start : start + 2 + 12 * count + 4]
        (tmp_path / "a.tif").write_bytes(data[:4] + struct.pack("<I", len(data)) + b"CR\2\0" + data[12:] + moved)
    for read in (read_image, read_photo):
        with pytest.raises(ValueError, match=r"a\.tif.*raw"):
            read(tmp_path / "a.tif")


@pytest.mark.parametrize("extra", [1, 2, 5])
def test_further_bands_of_a_tiff_are_named_or_the_file_is_refused(tmp_path, extra):
    bands = np.concatenate([RGB, np.repeat(ALPHA[:, :, None], extra, 2)], 2)
    tifffile.imwrite(tmp_path / "a.tif", bands, photometric="rgb", extrasamples=["unspecified"] * extra, metadata=None)
    try:
        photo = read_photo(tmp_path / "a.tif")
    except ValueError as error:
        assert "a.tif" in str(error)
    else:
        assert (photo.pixels == RGB).all()
        assert photo.alpha is None
        assert len(photo.notes) == 1


def test_a_tiff_without_a_resolution_gets_none(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.tif")
    assert read_photo(tmp_path / "a.tif").dpi is None


# Folders


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".gif", ".ppm", ".pgm", ".avif"])
def test_every_ending_that_is_listed_is_read(tmp_path, suffix):
    image = Image.fromarray(RGB[:, :, 0] if suffix == ".pgm" else RGB)
    image.save(tmp_path / f"a{suffix}", {".jfif": "JPEG", ".jpe": "JPEG", ".pgm": "PPM"}.get(suffix, suffix[1:].upper()))
    assert list_images(tmp_path) == [tmp_path / f"a{suffix}"]
    assert read_image(tmp_path / f"a{suffix}").shape == RGB.shape


def test_folders_in_folders_and_links_are_entered_once(tmp_path):
    for name in ("GT/000/1.png", "GT/001/1.png", "elsewhere/2.png"):
        write_image(tmp_path / name, RGB)
    (tmp_path / "GT/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "GT/000/circle").symlink_to(tmp_path / "GT")
    found = [path.relative_to(tmp_path / "GT").as_posix() for path in list_images(tmp_path / "GT", nested=True)]
    assert found == ["000/1.png", "001/1.png", "link/2.png"]
    assert list_images(tmp_path / "GT") == []


def test_what_is_passed_over_is_counted_by_ending(tmp_path):
    write_image(tmp_path / "a.png", RGB)
    write_image(tmp_path / "inner/b.png", RGB)
    for name in ("c.heic", "d.HEIC", "e.txt", "Thumbs.db", ".DS_Store", "inner/f.xcf"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "dead.png").symlink_to(tmp_path / "gone")
    flat, nested = passed_over(tmp_path), passed_over(tmp_path, nested=True)
    assert all(part in flat for part in ("2 .heic", "1 .txt", "inner", "1 dead"))
    assert all(part in nested for part in ("2 .heic", "1 .txt", "1 .xcf"))
    assert ".db" not in flat + nested
    assert passed_over(tmp_path / "inner", nested=True).endswith("inner: 1 .xcf")
    (tmp_path / "inner/f.xcf").unlink()
    assert passed_over(tmp_path / "inner") == ""

"""Damaged and hostile picture files: a right value or one sentence that names the file, and never a crash, a hang or a full memory.

A decoder written in C can end its process, so that all files are read in another one:

    python tests/test_mutated_images.py FILE ...     # read these again, as after a failure
"""

import faulthandler
import io
import json
import random
import re
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # else pytest sees to it
    warnings.simplefilter("error")
    sys.path.insert(0, str(REPOSITORY))

import image_files  # noqa: E402

MUTATIONS = 10_000
SECONDS = 10  # for one read
MEMORY = 10**9  # bytes, of the whole process

# Files to begin with


def seeds() -> dict[str, bytes]:
    """Small whole files of every kind, each read differently."""
    random_numbers = np.random.default_rng(0)
    rgb = random_numbers.integers(0, 256, (12, 17, 3), dtype=np.uint8) // 64 * 64
    gray, alpha = rgb[:, :, 0], rgb[:, :, 1]
    deep = random_numbers.integers(0, 65536, (12, 17, 4), dtype=np.uint16)
    full, single = Image.fromarray(rgb), Image.fromarray(gray)
    with_alpha = Image.fromarray(np.dstack([rgb, alpha]))
    palette, cmyk = full.quantize(16), full.convert("CMYK")
    srgb, lab = (ImageCms.ImageCmsProfile(ImageCms.createProfile(name)) for name in ("sRGB", "LAB"))
    in_lab = ImageCms.profileToProfile(full, srgb, lab, outputMode="LAB")
    upright = Image.Exif()
    upright[274], upright[305] = 6, "a program"
    meta = {"exif": upright, "dpi": (72, 144)}
    files = {
        "png": saved(full, "png", icc_profile=srgb.tobytes(), **meta),
        "png gray": saved(single, "png", transparency=64),
        "png 1 bit": saved(single.convert("1"), "png"),
        "png palette": saved(palette, "png", transparency=bytes(range(0, 160, 10))),
        "png rgba": saved(with_alpha, "png"),
        "png la": saved(with_alpha.convert("LA"), "png"),
        "png frames": saved(full, "png", save_all=True, append_images=[with_alpha, single]),
        "png deep": coded(deep[:, :, :3], ".png"),
        "png deep rgba": coded(deep, ".png"),
        "png deep gray": coded(deep[:, :, 0], ".png"),
        "png interlaced": interlaced(rgb[:9, :9]),
        "jpeg": saved(full, "jpeg", **meta),
        "jpeg progressive": saved(full, "jpeg", progressive=True, subsampling=0),
        "jpeg gray": saved(single, "jpeg", icc_profile=srgb.tobytes()),
        "jpeg cmyk": saved(cmyk, "jpeg", icc_profile=srgb.tobytes()),
        "jpeg frames": saved(full, "mpo", save_all=True, append_images=[full]),
        "webp": saved(full, "webp", icc_profile=srgb.tobytes(), exif=upright),
        "webp lossless": saved(full, "webp", lossless=True),
        "webp alpha": saved(with_alpha, "webp"),
        "webp frames": saved(with_alpha, "webp", save_all=True, append_images=[full], lossless=True),
        "bmp": saved(full, "bmp"),
        "bmp gray": saved(single, "bmp"),
        "bmp 1 bit": saved(single.convert("1"), "bmp"),
        "bmp rle": run_lengths(),
        "gif": saved(palette, "gif", save_all=True, append_images=[palette, palette]),
        "ppm": saved(full, "ppm"),
    }
    compressions = {"raw": None, "lzw": "tiff_lzw", "deflate": "tiff_adobe_deflate", "packbits": "packbits", "jpeg": "jpeg"}
    for name, compression in compressions.items():
        files[f"tiff {name}"] = saved(full, "tiff", compression=compression, exif=upright)
        files[f"tiff gray {name}"] = saved(single, "tiff", compression=compression, dpi=(72, 72))
    files |= {
        "tiff 1 bit": saved(single.convert("1"), "tiff", compression="group4"),
        "tiff palette": saved(palette, "tiff"),
        "tiff rgba": saved(with_alpha, "tiff"),
        "tiff cmyk": saved(cmyk, "tiff"),
        "tiff lab": saved(in_lab, "tiff", icc_profile=lab.tobytes()),
        "tiff pages": saved(full, "tiff", save_all=True, append_images=[single]),
        "tiff deep lzw": coded(deep[:, :, :3], ".tif"),
        "tiff deep gray": saved(Image.fromarray(deep[:, :, 0]), "tiff", exif=upright),
    }
    for name, values, options in (
        ("raw", deep[:, :, :3], {"photometric": "rgb"}),
        ("big endian", deep[:, :, :3], {"photometric": "rgb", "byteorder": ">", "compression": "zlib"}),
        ("rgba", deep, {"photometric": "rgb", "extrasamples": ["assocalpha"], "rowsperstrip": 3}),
        ("planar", np.moveaxis(deep[:, :, :3], 2, 0), {"photometric": "rgb", "planarconfig": "separate", "compression": "zlib"}),
        ("gray alpha", deep[:, :, :2], {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unassalpha"]}),
        ("tiles", deep[:, :, :3], {"photometric": "rgb", "tile": (16, 16), "bigtiff": True}),
    ):
        encoded = io.BytesIO()
        tifffile.imwrite(encoded, values, resolution=(72, 72), resolutionunit="INCH", extratags=[(274, 3, 1, 6, True)], **options)
        files[f"tiff deep {name}"] = encoded.getvalue()
    return files


def saved(image: Image.Image, kind: str, **options) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, kind, **{name: value for name, value in options.items() if value is not None})
    return encoded.getvalue()


def coded(values: np.ndarray, suffix: str) -> bytes:
    return cv2.imencode(suffix, values)[1].tobytes()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, bits: int, colour: int, *chunks: bytes, interlace: int = 0) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def interlaced(rgb: np.ndarray) -> bytes:
    """Adam7 (PNG, third edition, section 8.1)."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = b"".join(b"\0" + row.tobytes() for y, x, down, right in passes for row in rgb[y::down, x::right] if row.size)
    return png(rgb.shape[1], rgb.shape[0], 8, 2, chunk(b"IDAT", zlib.compress(rows)), interlace=1)


def run_lengths() -> bytes:
    """A BMP of 8 bits with runs: 12 rows of 17 pixels."""
    rows = b"\x08\x01\x09\x02\0\0" * 11 + b"\0\x03\x01\x02\x03\0\x0e\x02\0\x01"
    colours = bytes(range(16))
    start = 54 + len(colours)
    header = struct.pack("<IiiHHIIiiII", 40, 17, 12, 1, 8, 1, len(rows), 2835, 2835, 4, 4)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + colours + rows


# What is done to them

EXTREMES = (0, 1, 2, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 30_000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
OPERATIONS = ("flip", "replace", "delete", "repeat", "cut", "insert", "splice", "field16", "field32", "field16be", "field32be")


def mutated(data: bytes, other: bytes, operation: str, position: int, length: int, value: int) -> bytes:
    """`data` after one change; numbers beyond its end are taken modulo its length."""
    position %= len(data) + 1
    if operation == "flip":
        return data[:position] + bytes([data[position] ^ 1 << value % 8]) + data[position + 1 :] if position < len(data) else data
    if operation == "replace":
        return data[:position] + bytes([value % 256]) * (length % 4 + 1) + data[position + length % 4 + 1 :]
    if operation == "delete":
        return data[:position] + data[position + length % 64 :]
    if operation == "repeat":
        return data[:position] + data[position : position + length % 64] * (value % 4 + 1) + data[position:]
    if operation == "cut":
        return data[:position]
    if operation == "insert":
        return data[:position] + random.Random(value).randbytes(length % 32) + data[position:]
    if operation == "splice":
        return data[:position] + other[length % (len(other) + 1) :]
    extreme = EXTREMES[value % len(EXTREMES)]
    size, order = (2 if "16" in operation else 4), ("big" if operation.endswith("be") else "little")
    return data[:position] + (extreme % 256**size).to_bytes(size, order) + data[position + size :]


def with_right_sums(data: bytes) -> bytes:
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
def mutated_files(draw, files: dict[str, bytes]) -> bytes:
    names = st.sampled_from(sorted(files))
    number, long = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)
    data = files[draw(names)]
    change = st.tuples(st.sampled_from(OPERATIONS), number, number, long)
    for operation, position, length, value in draw(st.lists(change, min_size=1, max_size=4)):
        data = mutated(data, files[draw(names)] if operation == "splice" else data, operation, position, length, value)
    return with_right_sums(data) if data.startswith(b"\x89PNG") and draw(st.booleans()) else data


# The process that reads them


def attempt(read, path: Path):
    """What a reader returns, or its error, a sentence that names the file."""
    start = time.perf_counter()
    try:
        result = read(path)
    except ValueError as error:
        result = error
        message = str(error)
        assert message.startswith(f"{path}: "), message
        assert "; " in message, f"no remedy in: {message}"
        assert "\n" not in message, f"several lines: {message}"
    assert time.perf_counter() - start < SECONDS, f"{read.__name__} took {time.perf_counter() - start:.1f} s"
    assert peak_memory() < MEMORY, f"{read.__name__} needed {peak_memory():,} bytes"
    return result


def check(path: Path) -> list[str]:
    """Read a file in every way; returns "read" or the error of read_image, image_size and read_photo."""
    size = attempt(image_files.image_size, path)
    image = attempt(image_files.read_image, path)
    if not isinstance(size, ValueError):
        assert min(size) > 0
        assert size[0] * size[1] <= image_files.MAX_PIXELS
    if not isinstance(image, ValueError):
        assert image.dtype == np.uint8
        assert image.shape == (*size, 3)
        image = "read"  # as the pixels count as memory
    picture = attempt(image_files.read_photo, path)
    if not isinstance(picture, ValueError):
        assert picture.pixels.dtype in (np.uint8, np.uint16)
        assert picture.pixels.ndim == 3
        assert picture.pixels.shape[2] == 3
        assert picture.alpha is None or (picture.alpha.shape, picture.alpha.dtype) == (picture.pixels.shape[:2], picture.pixels.dtype)
        assert picture.dpi is None or all(0 < value < 1e6 for value in picture.dpi)
        assert isinstance(size, ValueError) or sorted(picture.pixels.shape[:2]) == sorted(size)  # a photo is upright
    return [str(result) if isinstance(result, ValueError) else "read" for result in (image, size, picture)]


def peak_memory() -> int:
    """Bytes that this process held at most."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent held when it made this process
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments: list[str]) -> None:
    """Read the files named, or else many mutated ones, the current of which stays in the folder where this was started."""
    faulthandler.enable()
    if arguments[0] != "--mutations":
        print(json.dumps({name: check(Path(name).absolute()) for name in arguments} | {"bytes": peak_memory()}, indent=0))
        return
    path, seen, outcomes = Path("current.png").absolute(), set(), Counter()

    @settings(max_examples=int(arguments[1]), deadline=None, database=None, derandomize=True, suppress_health_check=HealthCheck)
    @given(mutated_files(seeds()))
    def read_mutated(data: bytes) -> None:
        if data in seen:
            return
        path.write_bytes(data or b"\0")
        faulthandler.dump_traceback_later(5 * SECONDS, exit=True)  # a hang
        outcomes[tuple(result == "read" for result in check(path))] += 1
        faulthandler.cancel_dump_traceback_later()
        seen.add(data)

    read_mutated()
    read, refused = outcomes[True, True, True], outcomes[False, False, False]
    print(json.dumps({"files": len(seen), "read": read, "refused": refused, "bytes": peak_memory()}))


# The tests


def in_a_process_of_its_own(folder: Path, *arguments: str) -> dict:
    command = [sys.executable, __file__, *arguments]
    try:
        finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=600)
        output, failed = finished.stdout + finished.stderr[-8000:], finished.returncode
    except subprocess.TimeoutExpired as error:
        output, failed = f"{error}", True
    if failed:
        current = folder / "current.png"
        pytest.fail(f"{output}\n{current}: {current.read_bytes().hex() if current.exists() else arguments}", pytrace=False)
    return json.loads(finished.stdout)


@pytest.mark.slow
def test_mutated_files_are_read_or_refused_in_one_sentence(tmp_path):
    found = in_a_process_of_its_own(tmp_path, "--mutations", str(MUTATIONS * 4 // 3))  # some come twice
    print(found)
    assert found["files"] >= MUTATIONS
    assert found["read"] > 0.05 * MUTATIONS  # it is not that nothing gets past the first byte
    assert found["refused"] > 0.05 * MUTATIONS


def test_whole_files_of_every_kind_are_read(tmp_path):
    for number, data in enumerate(seeds().values()):
        (tmp_path / f"{number}.png").write_bytes(data)
    names = sorted(path.name for path in tmp_path.iterdir())
    found = in_a_process_of_its_own(tmp_path, *names)
    assert {name: found[name] for name in names} == dict.fromkeys(names, ["read"] * 3)


def zeros(width: int, height: int, bits: int, colour: int) -> bytes:
    """A whole black PNG, made without holding it."""
    channels = {0: 1, 2: 3}[colour]
    packer, row, parts = zlib.compressobj(1), bytes(1 + (width * bits * channels + 7) // 8), []
    for _ in range(height):
        parts.append(packer.compress(row))
    return png(width, height, bits, colour, chunk(b"IDAT", b"".join(parts) + packer.flush()))


def bomb(name: bytes, before: bytes) -> bytes:
    """A PNG of one pixel with 100 MB of zeros in a chunk."""
    return png(1, 1, 8, 0, chunk(name, before + zlib.compress(bytes(100_000_000), 1)), chunk(b"IDAT", zlib.compress(b"\0\7")))


def resized(data: bytes, width: int, height: int) -> bytes:
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


def hostile_files() -> dict[str, tuple[bytes, str]]:
    """Files, and a pattern of what all three readers say of each."""
    files = seeds()
    limit = r"more than {:,} pixels; cut it into parts \({}\)$"
    large = limit.format(110_000_000, "it (is ({0}x{1}|{1}x{0})|has {2:,})")  # some of the TIFFs lie on their side
    hostile = {
        "text.png": (b"no picture at all", "not an? (image|picture) that can be read here; known are .png"),
        "page.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an? (image|picture) that can be read here"),
        "empty.png": (b"", "the file is empty; copy or download it again"),
        "black.png": (zeros(30_000, 30_000, 1, 0), large.format(30_000, 30_000, 30_000**2)),
        "canvas.webp": (resized(files["webp frames"], 12_000, 9000), limit.format(40_000_000, "it is 12000x9000")),
        "runs.bmp": (resized(files["bmp rle"], 1_000_001, 12), limit.format(10_000_000, "it is 1000001x12")),
    }
    tiffs = ("tiff raw", "tiff lzw", "tiff deflate", "tiff gray packbits", "tiff deep gray alpha")
    for kind in ("png", "png palette", "png deep", "bmp", *tiffs):
        for width, height in ((12_000, 14_000), (30_000, 30_000), (65_535, 65_535)):
            hostile[f"{kind} {width}x{height}"] = resized(files[kind], width, height), large.format(width, height, width * height)
    jpegs = ("jpeg", "jpeg progressive", "jpeg cmyk", "tiff jpeg")
    for kind in ("png", "png 1 bit", "png deep", "bmp", "tiff raw", "tiff lzw", "tiff deflate", *jpegs):
        hostile[f"{kind} lie"] = resized(files[kind], 10_000, 10_000), r"its header says 10000x10000, but there are \d+ bytes"
    for name, before in ((b"iCCP", b"a\0\0"), (b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")):
        hostile[f"{name.decode()}.png"] = bomb(name, before), "damaged.*too large"
    return hostile


@pytest.mark.slow
def test_hostile_files_are_refused_and_say_why(tmp_path):
    hostile = hostile_files()
    for name, (data, _) in hostile.items():
        (tmp_path / name).write_bytes(data)
    found = in_a_process_of_its_own(tmp_path, *hostile)
    for name, (_, pattern) in hostile.items():
        for sentence in found[name]:
            assert re.search(f": .*{pattern}", sentence), f"{name}: {sentence}"
    assert found["bytes"] < 250e6  # nothing is decoded


def test_a_chunk_with_a_false_length_takes_no_memory(tmp_path):
    data = seeds()["png deep"]
    start = data.index(b"IDAT")
    (tmp_path / "a.png").write_bytes(data[: start - 4] + b"\xff\xff\xff\xff" + data[start:])
    assert in_a_process_of_its_own(tmp_path, "a.png")["bytes"] < 250e6


@pytest.mark.slow
def test_a_photograph_of_102_megapixels_is_read_within_one_gigabyte(tmp_path):
    (tmp_path / "a.png").write_bytes(zeros(11_656, 8742, 8, 2))
    assert in_a_process_of_its_own(tmp_path, "a.png")["a.png"] == ["read"] * 3


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "tiff", "gif", "ppm"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_one_pixel_is_a_picture(tmp_path, kind, mode):
    path = tmp_path / "a.png"
    image = Image.new("RGB", (1, 1), "white").convert(mode)
    path.write_bytes(saved(image.convert("RGB") if mode == "P" and kind in ("jpeg", "webp", "ppm") else image, kind))
    assert (image_files.read_image(path) == np.full((1, 1, 3), 255)).all()
    assert image_files.image_size(path) == (1, 1)
    assert (image_files.read_photo(path).pixels == np.full((1, 1, 3), 255)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_deep_tiff_is_turned_once(tmp_path, compression, orientation):
    deep = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint16) * 257
    upright = Image.Exif()
    upright[274] = orientation
    for name, values in (("deep", deep), ("shallow", (deep // 257).astype(np.uint8))):
        (tmp_path / name).write_bytes(saved(Image.fromarray(values), "tiff", compression=compression, exif=upright))
    expected = image_files.read_image(tmp_path / "shallow")
    assert (image_files.read_image(tmp_path / "deep") == expected).all()
    assert image_files.image_size(tmp_path / "deep") == expected.shape[:2]
    assert (image_files.read_photo(tmp_path / "deep").pixels == expected.astype(np.uint16) * 257).all()


if __name__ == "__main__":
    main(sys.argv[1:])

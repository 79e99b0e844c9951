"""Image files: one decoder and one encoder. (being merged)"""

import io
import logging
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

import files

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
MAX_PIXELS = 110_000_000  # a photograph of 102 megapixels fits, and no picture of 8 bits takes 1 GB to be read
KINDS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")  # Pillow's other kinds may start programs, as EPS does
cv2.setNumThreads(0)  # its threads do not survive a fork, as in workers; each call here is too small to gain from them
_silence = getattr(getattr(cv2.utils, "logging", cv2), "setLogLevel", None)  # OpenCV has had it in two places
if _silence:
    _silence(0)  # about damaged files, of which an error tells

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is checked instead
warnings.filterwarnings("ignore", module=r"PIL\.")  # as above

# What the decoders raise for broken data
DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, ArithmeticError, EOFError, LookupError, struct.error, zlib.error, cv2.error,
)  # fmt: skip

NO_MEMORY = "there is too little memory to read it; free some, or copy the file again if it is damaged"

# What a byte of a file can hold at most: a run of deflate takes 2 bits for 258 bytes, an LZW code 9 for 4096, a run of PackBits
# 2 bytes for 128, and a JPEG's block of 64 pixels 1 bit
_PIXELS_A_BYTE = {
    "PNG": 8 * 1032, "JPEG": 512, "MPO": 512, "BMP 0": 8, "TIFF 1": 8, "TIFF 5": 8 * 3641, "TIFF 7": 512, "TIFF 8": 8 * 1032,
    "TIFF 32773": 8 * 64, "TIFF 32946": 8 * 1032,
}  # fmt: skip

# WebP's decoder takes three times the memory of the others, that of BMP with runs as much time for 10 megapixels as others for 110
_MAX_PIXELS_OF = {"WEBP": 40_000_000, "BMP 1": 10_000_000, "BMP 2": 10_000_000}

RGB = NDArray[np.uint8]  # (H, W, 3), RGB


# Files


def read_image(path: str | os.PathLike) -> RGB:
    """Read an image file as RGB uint8 (H, W, 3), whatever it holds.

    Gray and palette become RGB, 16 bits are rounded to 8, alpha is dropped; of orientation tags, only TIFF's own is applied.
    Any path that the system allows is read, also a non-ASCII one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, cut off, no image, or has more than `MAX_PIXELS`. The message names the file.
    """
    with open_file(path) as file, _named_errors(path):
        return _decode(file)


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) from the file's header alone, without decoding.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, no image, or has more than `MAX_PIXELS`. The message names it.
    """
    with open_file(path) as file, _named_errors(path):
        try:
            with open_header(file) as image:
                return image.height, image.width
        except UnidentifiedImageError:
            return _deep_tiff_size(file)


def write_image(path: str | os.PathLike, image: RGB) -> None:
    """Write RGB uint8 (H, W, 3) in the format that the name's ending says; folders are made, and no half file is left.

    Raises:
        ValueError: not such an image, or an unknown ending.
    """
    path = Path(path)
    _check_image(image, "image")
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"{path}: unknown ending {path.suffix!r}; known are {', '.join(IMAGE_SUFFIXES)}")
    done, encoded = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    assert done
    write_bytes(path, encoded.tobytes())


def open_file(path: str | os.PathLike) -> BinaryIO:
    """A picture file, to be read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.stat().st_size:
        raise ValueError(f"{path}: the file is empty; copy or download it again")
    return path.open("rb")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a picture file whole or not at all; folders are made."""
    files.write_whole(path, data, durable=False)


def list_images(folder: str | os.PathLike) -> list[Path]:
    """The image files of `folder`, sorted by name; hidden files and other endings are passed over."""
    visible = (file for file in Path(folder).iterdir() if not file.name.startswith("."))
    return sorted(file for file in visible if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())


class TooLargeError(ValueError):
    """A picture that takes too much memory; the message says what to do."""


@contextmanager
def _named_errors(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except TooLargeError as error:
        raise ValueError(f"{path}: {error}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image that can be read here; known are {', '.join(IMAGE_SUFFIXES)}") from None
    except MemoryError:
        raise ValueError(f"{path}: {NO_MEMORY}") from None
    except DECODING_ERRORS as error:
        raise ValueError(f"{path}: the image is damaged or cut off ({one_line(error)}); copy or download it again") from None


def one_line(error: Exception) -> str:
    """What a decoder says, for a sentence."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def open_header(file: BinaryIO) -> Image.Image:
    """A picture by Pillow, not decoded, of a size that is worth trying.

    Raises:
        UnidentifiedImageError: Pillow doesn't know it.
        TooLargeError: it has more than `MAX_PIXELS`.
        ValueError: its bytes can't hold so many pixels; or one of `DECODING_ERRORS`.
    """
    file.seek(0)
    try:
        image = Image.open(file, formats=KINDS)
    except Image.DecompressionBombError as error:  # beyond Pillow's own limit
        count = re.search(r"\d+", str(error))
        raise TooLargeError(_too_large(MAX_PIXELS, f"it has {int(count[0]):,}" if count else "it has far more")) from None
    kind = image.format
    if kind == "TIFF":
        kind += f" {image.tag_v2.get(259, 1)}"
    elif kind == "BMP":
        kind += f" {image.info.get('compression', 0)}"
    check_size(file, image.width, image.height, kind)
    return image


def check_size(file: BinaryIO, width: int, height: int, kind: str) -> None:
    """Refuse a picture that takes too much memory, and a header that lies.

    Args:
        kind: Pillow's name; for TIFF and BMP, with the number of their compression.
    """
    limit = min(MAX_PIXELS, _MAX_PIXELS_OF.get(kind, MAX_PIXELS))
    if width * height > limit:
        raise TooLargeError(_too_large(limit, f"it is {width}x{height}"))
    length, most = os.fstat(file.fileno()).st_size, _PIXELS_A_BYTE.get(kind)
    if width < 1 or height < 1 or (most and width * height > most * length):
        raise ValueError(f"its header says {width}x{height}, but there are {length} bytes")


def _too_large(limit: int, found: str) -> str:
    return f"more than {limit:,} pixels; cut it into parts ({found})"


def _decode(file: BinaryIO) -> RGB:
    head = file.read(32)
    try:
        image = open_header(file)
    except UnidentifiedImageError:
        return _decode_deep(file, _deep_tiff_size(file))
    with image:
        image.load()
        if not image.mode.startswith(("I", "F")) and not has_16_bits(image, head):
            return to_array(image, "RGB")
        size = image.height, image.width
    del image  # its pixels, which Pillow cut or clipped
    return _decode_deep(file, size)


def _decode_deep(file: BinaryIO, size: tuple[int, int]) -> RGB:
    file.seek(0)
    image = _to_rgb8(decode_deep(file.read()))
    if image.shape[:2] != size:
        raise ValueError(f"its header says {size[1]}x{size[0]}, but {image.shape[1]}x{image.shape[0]} were found")
    return image


def _deep_tiff_size(file: BinaryIO) -> tuple[int, int]:
    """(height, width) of a TIFF that Pillow doesn't know, as one with 16-bit colour; raises as `open_header` does."""
    file.seek(0)
    head = file.read(8)
    if not head.startswith(tuple(TiffImagePlugin.PREFIXES)):
        raise UnidentifiedImageError
    tags = TiffImagePlugin.ImageFileDirectory_v2(head + (file.read(8) if head[2] == 43 else b""))  # BigTIFF's is longer
    file.seek(tags.next)
    tags.load(file)
    width, height = tags[256], tags[257]
    if not isinstance(width, int) or not isinstance(height, int):
        raise ValueError(f"its header says {width}x{height}")
    check_size(file, width, height, f"TIFF {tags.get(259, 1)}")
    return (width, height) if tags.get(274) in (5, 6, 7, 8) else (height, width)  # the tag Orientation: turned by OpenCV


def to_array(image: Image.Image, mode: str) -> NDArray[np.uint8]:
    """(H, W, 3) of "RGB", or (H, W) of alpha alone, "A"; in strips, as copies of the whole by Pillow and NumPy take 14 bytes a pixel."""
    values = np.empty((image.height, image.width, 3) if mode == "RGB" else (image.height, image.width), np.uint8)
    for rows in _strips(image.height, image.width):
        strip = image.crop((0, rows.start, image.width, rows.stop))
        if mode == "A" or strip.mode in ("P", "PA", "RGBa"):
            strip = strip.convert("RGBA")
        values[rows] = strip.getchannel("A") if mode == "A" else strip.convert("RGB")
    return values


def _strips(height: int, width: int) -> Iterator[slice]:
    step = max(1, 2**20 // width)
    return (slice(top, min(top + step, height)) for top in range(0, height, step))


def has_16_bits(image: Image.Image, head: bytes) -> bool:
    """Whether a PNG or TIFF file holds 16 bits a sample, which Pillow cuts to 8; `head` is how the file begins."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,))) == 16  # BitsPerSample, one for each channel
    return head.startswith(b"\x89PNG\r\n\x1a\n") and head[24] == 16  # IHDR: length, name, width, height, bit depth


def decode_deep(data: bytes) -> NDArray | None:
    """All bits of a file's samples, (H, W) or (H, W, 3 or 4) in the order BGR or BGRA; None where OpenCV can't.

    A TIFF is turned as its tag Orientation says.
    """
    if data.startswith(b"\x89PNG"):  # only what makes pixels: OpenCV takes the memory that any chunk's length asks for
        needed = (b"IHDR", b"tRNS", b"IDAT")
        data = b"".join([data[:8], *(data[start:end] for name, start, end in png_chunks(data) if name in needed), _PNG_END])
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)  # BGR, BGRA or gray


_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of a PNG's whole chunks up to IEND, with their lengths and checksums: 8 bytes before, 4 after the content."""
    start = 8
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        name = data[start + 4 : start + 8]
        if end > len(data) or name == b"IEND":
            return
        yield name, start, end
        start = end


def _to_rgb8(deep: NDArray | None) -> RGB:
    if deep is None or deep.dtype not in (np.uint8, np.uint16) or (deep.ndim == 3 and deep.shape[2] < 3):
        raise ValueError(f"samples of type {None if deep is None else deep.dtype} are not 8 or 16 bits")
    rgb = np.empty((*deep.shape[:2], 3), np.uint8)
    for rows in _strips(*deep.shape[:2]):
        strip = deep[rows] if deep.dtype == np.uint8 else np.round(deep[rows] / 257)  # 65535 / 255
        rgb[rows] = strip[:, :, None] if strip.ndim == 2 else strip[:, :, 2::-1]
    return rgb


def _check_image(image: NDArray, name: str) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"{name} is {image.dtype} {image.shape}; it must be uint8 (H, W, 3)")


# Photographs


FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP"}
LONGEST_SIDE = {"JPEG": 65535, "WEBP": 16383}  # pixels, by the formats' definitions

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # about damaged files, of which an error tells


@dataclass(frozen=True)
class Photo:
    """A picture to upscale.

    Args:
        pixels: uint8 or uint16, (H, W, 3), RGB; of a gray picture, three equal channels.
        alpha: of the same type, (H, W), or None; the pixels are not multiplied by it.
        gray: whether it is to be written as gray.
        icc_profile: what its colours mean, or None for sRGB.
        dpi: resolution for printing, horizontal and vertical, or None.
        notes: sentences on what did not come along.
    """

    pixels: NDArray
    alpha: NDArray | None = None
    gray: bool = False
    icc_profile: bytes | None = None
    dpi: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def bits(self) -> int:
        """8 or 16."""
        return 8 * self.pixels.dtype.itemsize


# Reading


def read_photo(path: str | os.PathLike) -> Photo:
    """Read a picture with all that has to come along; EXIF's orientation is applied.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, cut off, no picture, of a kind that can't be upscaled, or has more than
            `MAX_PIXELS`. The message names the file.
    """
    with open_file(path) as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is wrong with a file is said below, or doesn't matter
                return _decode_photo(file)
        except UnsupportedError as error:
            raise ValueError(f"{path}: {error}; convert it to gray or RGB of 8 or 16 bits first") from None
        except UnidentifiedImageError:
            raise ValueError(f"{path}: not a picture that can be read here; known are {', '.join(FORMATS)}") from None
        except TooLargeError as error:
            raise ValueError(f"{path}: {error}") from None
        except MemoryError:
            raise ValueError(f"{path}: {NO_MEMORY}") from None
        except (*DECODING_ERRORS, RuntimeError) as error:  # NotImplementedError is one of these
            reason = one_line(error)
            raise ValueError(f"{path}: the picture is damaged, cut off or of an unknown kind ({reason}); open and save it anew") from None


class UnsupportedError(ValueError):
    """A sound picture of a kind that can't be upscaled."""


def _decode_photo(file: BinaryIO) -> Photo:
    head = file.read(32)
    try:
        image = open_header(file)
    except UnidentifiedImageError:
        if head[:4] in (b"II*\0", b"MM\0*"):  # gray and alpha with 16 bits, and other kinds that Pillow doesn't know
            return _decode_deep_tiff(file)
        raise
    with image:
        if image.format == "TIFF" and max(image.tag_v2.get(258, (1,))) > 8:
            return _decode_deep_tiff(file)
        image.load()
        if not has_16_bits(image, head):
            return _from_pillow(image)
        profile, dpi = image.info.get("icc_profile"), _plain_dpi(image.info.get("dpi"))
        orientation = image.getexif().get(274, 1)
    del image  # its pixels of 8 bits
    return _upright(replace(_decode_deep_png(file), icc_profile=profile, dpi=dpi), orientation)


def _from_pillow(image: Image.Image) -> Photo:
    notes = _frame_notes(getattr(image, "n_frames", 1) if image.format != "MPO" else 1)  # MPO: a camera's JPEG with its previews
    profile, dpi = image.info.get("icc_profile"), _plain_dpi(image.info.get("dpi"))
    notes += (_UNKNOWN_CHANNEL,) if image.mode == "RGBX" else ()
    transparent = "transparency" in image.info
    dpi = _turned_dpi(dpi, image.getexif().get(274, 1))
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("CMYK", "LAB", "YCbCr", "HSV"):
        image, profile = _to_srgb(image, profile), None
    gray = image.mode in ("1", "L", "LA", "La")
    has_alpha = transparent or image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
    if image.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"):
        raise UnsupportedError(f"its colour mode {image.mode} can't be upscaled")
    alpha = to_array(image, "A") if has_alpha else None
    return Photo(to_array(image, "RGB"), alpha, gray, profile, dpi, notes)


def _frame_notes(count: int) -> tuple[str, ...]:
    return (f"it holds {count} pages or frames, of which only the first is taken",) if count > 1 else ()


_UNKNOWN_CHANNEL = "it has a further channel, which is not said to be alpha and was left out"


def _turned_dpi(dpi: tuple[float, float] | None, orientation: int) -> tuple[float, float] | None:
    return dpi[::-1] if dpi and orientation >= 5 else dpi


def _plain_dpi(dpi: Any) -> tuple[float, float] | None:
    if dpi is None or not all(0 < float(value) < 1e6 for value in dpi):
        return None
    return float(dpi[0]), float(dpi[1])


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB by the picture's profile; without a usable one, by the plain formulas."""
    if profile and image.mode != "HSV":
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass  # a damaged profile, or one for another kind of picture
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, lab, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return image.convert("RGB")


def _decode_deep_png(file: BinaryIO) -> Photo:
    file.seek(0)
    data = file.read()
    deep = decode_deep(data)
    if deep is None or deep.dtype != np.uint16:
        raise ValueError("its 16-bit samples can't be decoded")
    gray = data[25] in (0, 4)  # IHDR's colour type: gray, gray and alpha
    alpha = deep[:, :, 3] if deep.ndim == 3 and deep.shape[2] == 4 else None
    clear = next((data[start + 8 : end - 4] for name, start, end in png_chunks(data) if name == b"tRNS"), b"")
    if deep.ndim == 2 and len(clear) == 2:  # one gray value that is transparent; OpenCV knows it for RGB only
        alpha = np.where(deep == int.from_bytes(clear, "big"), 0, 65535).astype(np.uint16)
    pixels = np.repeat(deep[:, :, None], 3, 2) if deep.ndim == 2 else deep[:, :, 2::-1]
    return Photo(pixels, alpha, gray)


def _decode_deep_tiff(file: BinaryIO) -> Photo:
    file.seek(0)
    data = file.read()
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page = tiff.pages[0]
        check_size(file, page.imagewidth, page.imagelength, f"TIFF {int(page.compression)}")
        kind = tifffile.PHOTOMETRIC(page.photometric)
        if page.dtype != np.uint16 or page.bitspersample != 16 or kind not in _DEEP_KINDS:
            raise UnsupportedError(f"its samples are {page.dtype} of {page.bitspersample} bits, {kind.name}")
        values, turned = _samples(page, data)
        further = page.extrasamples[0] if page.extrasamples else None
        notes = _frame_notes(len(tiff.pages))
        tags = {number: page.tags[number].value for number in (274, 34675) if number in page.tags}
        has_unit = 296 in page.tags and page.tags[296].value != tifffile.RESUNIT.NONE
        dpi = page.get_resolution(tifffile.RESUNIT.INCH) if has_unit and 282 in page.tags else None
    if kind == tifffile.PHOTOMETRIC.MINISWHITE:
        values[:, :, 0] = 65535 - values[:, :, 0]
    gray = values.shape[2] < 3
    colours, alpha = values[:, :, :1] if gray else values[:, :, :3], None
    if values.shape[2] in (2, 4):
        if further == tifffile.EXTRASAMPLE.UNSPECIFIED:
            notes += (_UNKNOWN_CHANNEL,)
        else:
            alpha = values[:, :, -1]
        if further == tifffile.EXTRASAMPLE.ASSOCALPHA:
            colours = _unmultiplied(colours, alpha)
    pixels = np.repeat(colours, 3, 2) if gray else colours
    orientation, dpi = int(tags.get(274, 1)), _plain_dpi(dpi)
    if turned:
        dpi, orientation = _turned_dpi(dpi, orientation), 1
    return _upright(Photo(pixels, alpha, gray, tags.get(34675), dpi, notes), orientation)


_DEEP_KINDS = (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.MINISWHITE, tifffile.PHOTOMETRIC.RGB)


def _unmultiplied(colours: NDArray, alpha: NDArray) -> NDArray:
    """Colours that were stored multiplied by alpha."""
    divisor = np.maximum(alpha, 1)[:, :, None].astype(np.float32) / 65535
    return np.clip(np.round(colours / divisor), 0, 65535).astype(np.uint16)


def _samples(page: tifffile.TiffPage, data: bytes) -> tuple[NDArray, bool]:
    """(H, W, 1 to 4), and whether they are turned already as the tag Orientation says."""
    turned = False
    try:
        values = page.asarray()
    except (ValueError, NotImplementedError):  # a compression that needs further packages; OpenCV knows the usual ones
        values, turned = decode_deep(data), True
        if values is None or values.dtype != np.uint16:
            raise
        values = values if values.ndim == 2 else values[:, :, [2, 1, 0, 3][: values.shape[2]]]
    if not turned and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and values.ndim == 3 and values.shape[0] == page.samplesperpixel:
        values = np.moveaxis(values, 0, 2)
    values = values[:, :, None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[2] > 4:
        raise UnsupportedError(f"its samples lie as {values.shape}, not as at most RGB and alpha")
    return values.copy(), turned


def _upright(photo: Photo, orientation: int) -> Photo:
    """As EXIF's tag 274 says; for arrays, as Pillow's own function cuts to 8 bits."""

    def turned(values: NDArray) -> NDArray:
        if orientation in (2, 4, 5, 7):
            values = values[:, ::-1]
        return np.ascontiguousarray(np.rot90(values, {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)))

    alpha = None if photo.alpha is None else turned(photo.alpha)
    return replace(photo, pixels=turned(photo.pixels), alpha=alpha, dpi=_turned_dpi(photo.dpi, orientation))


# Writing


def check_writable(photo: Photo, suffix: str, size: tuple[int, int]) -> tuple[str, ...]:
    """Refuse what a format can't hold, before the work is done; returns sentences on what it loses beside pixels.

    Args:
        suffix: of the file to write, as ".jpg".
        size: (height, width) of the picture to write.

    Raises:
        ValueError: the format knows no alpha, no 16 bits or no picture of this size.
    """
    kind = FORMATS[suffix.lower()]
    if photo.alpha is not None and kind in ("JPEG", "BMP"):
        raise ValueError(f"the picture has alpha, which {kind} doesn't hold; choose --output_format png, webp or tif")
    if photo.bits == 16 and kind not in ("PNG", "TIFF"):
        raise ValueError(f"the picture has 16 bits a channel, which {kind} doesn't hold; choose --output_format png or tif")
    if max(size) > LONGEST_SIDE.get(kind, max(size)):
        raise ValueError(
            f"the result would be {size[1]}x{size[0]}, but {kind} holds {LONGEST_SIDE[kind]} at most; choose --output_format png"
        )
    notes = []
    if photo.icc_profile and not _holds_profile(photo, kind):
        notes.append(f"{kind} can't hold the colour profile of this picture; its colours may look a little different")
    if photo.dpi and kind == "WEBP":
        notes.append("WEBP holds no resolution (dpi)")
    return tuple(notes)


def _holds_profile(photo: Photo, kind: str) -> bool:
    return kind != "BMP" and not (kind == "WEBP" and photo.gray)  # WebP has no gray, and a gray profile doesn't fit RGB


def write_photo(path: str | os.PathLike, photo: Photo, quality: int = 95) -> None:
    """Write a picture in the format that the name's ending says; folders are made, and no half file is left.

    Args:
        quality: of JPEG and WebP, 1 to 100; at 100, WebP is lossless.

    Raises:
        ValueError: an unknown ending, or what the format can't hold.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: unknown ending {path.suffix!r}; known are {', '.join(FORMATS)}")
    check_writable(photo, path.suffix, photo.pixels.shape[:2])
    kind = FORMATS[path.suffix.lower()]
    if kind == "TIFF":
        encoded = _encode_tiff(photo)
    elif photo.bits == 16:
        encoded = _encode_deep_png(photo)
    else:
        encoded = _encode_with_pillow(photo, kind, quality)
    write_bytes(path, encoded)


def _channels(photo: Photo) -> NDArray:
    """(H, W, 1 to 4): gray or RGB, then alpha."""
    colours = photo.pixels[:, :, :1] if photo.gray else photo.pixels
    return colours if photo.alpha is None else np.concatenate([colours, photo.alpha[:, :, None]], 2)


def _encode_with_pillow(photo: Photo, kind: str, quality: int) -> bytes:
    values = _channels(photo)
    image = Image.fromarray(np.ascontiguousarray(values[:, :, 0] if values.shape[2] == 1 else values))  # L, LA, RGB or RGBA
    options: dict[str, Any] = {"icc_profile": photo.icc_profile} if photo.icc_profile and _holds_profile(photo, kind) else {}
    options |= {"dpi": photo.dpi} if photo.dpi and kind != "WEBP" else {}
    if kind == "JPEG":
        options |= {"quality": quality, "subsampling": 0}
    if kind == "WEBP":
        options |= {"quality": quality, "lossless": quality == 100, "exact": True}
        image = image.convert("RGBA" if photo.alpha is not None else "RGB")  # it knows no gray
    encoded = io.BytesIO()
    image.save(encoded, kind, **options)
    return encoded.getvalue()


def _encode_tiff(photo: Photo) -> bytes:
    values = _channels(photo)
    encoded = io.BytesIO()
    tifffile.imwrite(
        encoded,
        values[:, :, 0] if values.shape[2] == 1 else values,
        photometric="minisblack" if photo.gray else "rgb",
        planarconfig="contig" if values.shape[2] > 1 else None,
        extrasamples=["unassalpha"] if photo.alpha is not None else None,
        compression="zlib",
        extratags=[(34675, 7, len(photo.icc_profile), photo.icc_profile, True)] if photo.icc_profile else [],  # ICC's tag
        resolution=photo.dpi,
        resolutionunit="INCH" if photo.dpi else None,
        metadata=None,
        software=False,
    )
    return encoded.getvalue()


def _encode_deep_png(photo: Photo) -> bytes:
    """PNG of 16 bits with a colour profile and a resolution, which neither Pillow nor OpenCV writes (PNG, third edition)."""
    values = _channels(photo)
    height, width, count = values.shape
    rows = np.ascontiguousarray(values, ">u2").view(np.uint8).reshape(height, -1)
    filtered = np.empty((height, rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = 2  # each row as its difference from the one above
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[count], 0, 0, 0))]
    if photo.icc_profile:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(photo.icc_profile)))
    if photo.dpi:
        chunks.append((b"pHYs", struct.pack(">IIB", *(round(value / 0.0254) for value in photo.dpi), 1)))  # pixels a metre
    chunks += [(b"IDAT", zlib.compress(filtered, 6)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

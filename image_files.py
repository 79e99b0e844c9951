"""Image files: one decoder and one encoder.

    rgb = read_image("baby.png")                # uint8 (H, W, 3), for training and benchmarks
    photo = read_photo("holiday.tif")           # with alpha, 16 bits, gray, colour profile and resolution
    write_photo("large.tif", photo)

Pillow decodes 8 bits a channel. OpenCV (PNG) and tifffile (TIFF) decode 16, which Pillow would cut to 8. Every error names the file.
A header is checked before its pixels take memory. iPhones' .heic files are read where the package pillow-heif is installed.
"""

import contextlib
import io
import logging
import os
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageCms, TiffImagePlugin, UnidentifiedImageError

import files
import metadata
from metadata import Metadata

RGB = NDArray[np.uint8]  # (H, W, 3)

MAX_PIXELS = 110_000_000  # admits a photograph of 102 megapixels; reading 8 bits a channel stays below 1 GB
FORMATS = {  # that are written, by their endings
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF",
    ".tiff": "TIFF",
}  # fmt: skip
_HEIF = (".heic", ".heif")
IMAGE_SUFFIXES = (*FORMATS, ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", *(_HEIF if metadata.HAS_HEIF else ()))  # that are read

cv2.setNumThreads(0)  # OpenCV's threads do not survive a fork, as in data workers, and each call here is too small to gain from them
_set_opencv_log_level = getattr(getattr(cv2.utils, "logging", cv2), "setLogLevel", None)  # OpenCV has moved it
if _set_opencv_log_level:
    _set_opencv_log_level(0)
logging.getLogger("tifffile").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is checked instead
warnings.filterwarnings("ignore", module=r"(PIL|tifffile)\.")  # our errors report damage


@dataclass(frozen=True)
class Photo:
    """An image with everything that its upscaled version should keep.

    Args:
        pixels: uint8 or uint16, (H, W, 3), RGB; three equal channels if `gray`.
        alpha: of the same type, (H, W), not multiplied into the pixels; None: the image is opaque.
        gray: write one channel of colour.
        icc_profile: the colour space; None: sRGB.
        dpi: horizontal and vertical resolution for printing; None: unknown.
        metadata: EXIF, XMP, comments, text, and what a PNG says of its colours.
        notes: sentences on what was left out.
        lossy: the compression that its pixels come from ("JPEG", "WEBP"); empty: none, or another one.
        quality: of JPEG, about, as libjpeg counts; None: unknown.
    """

    pixels: NDArray
    alpha: NDArray | None = None
    gray: bool = False
    icc_profile: bytes | None = None
    dpi: tuple[float, float] | None = None
    metadata: Metadata = field(default_factory=Metadata)
    notes: tuple[str, ...] = ()
    lossy: str = ""
    quality: float | None = None

    @property
    def bits(self) -> int:
        """8 or 16."""
        return 8 * self.pixels.dtype.itemsize

    @property
    def transparency(self) -> NDArray | None:
        """`alpha`, or None where it is opaque everywhere, so that any format can hold the image."""
        return None if self.alpha is None or (self.alpha == np.iinfo(self.alpha.dtype).max).all() else self.alpha


# Reading


def read_image(path: str | os.PathLike, orient: bool = False) -> RGB:
    """Read an image file as RGB uint8 (H, W, 3), whatever it holds.

    Gray and palette images become RGB, 16 bits are rounded to 8, alpha is dropped. CMYK is converted by the plain formula.

    Args:
        orient: apply the EXIF orientation. The orientation of TIFF, which belongs to its pixels, is always applied.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, damaged, no image, of an unsupported kind, or has more than `MAX_PIXELS`. The message names it.
    """
    with _open(path) as file:
        image, orientation = _decode(file, orient)
        pixels = image.pixels if isinstance(image, Photo) else _to_array(image, "RGB")
        del image  # before more memory is needed
        if pixels.dtype == np.uint16:
            rgb = np.empty(pixels.shape, np.uint8)
            for rows in _strips(*pixels.shape[:2]):
                rgb[rows] = np.round(pixels[rows] / 257)  # 65535 / 255
            pixels = rgb
        return _rotate(pixels, orientation)


def read_photo(path: str | os.PathLike) -> Photo:
    """Read an image file with its alpha, depth, colour profile and resolution; the EXIF orientation is applied.

    Raises:
        FileNotFoundError, ValueError: as `read_image`.
    """
    with _open(path) as file:
        image, orientation = _decode(file, orient=True)
        photo = image if isinstance(image, Photo) else _to_photo(image, file)
        del image
        alpha = None if photo.alpha is None else _rotate(photo.alpha, orientation)
        dpi = photo.dpi[::-1] if photo.dpi and orientation in _ON_ITS_SIDE else photo.dpi
        return replace(photo, pixels=_rotate(photo.pixels, orientation), alpha=alpha, dpi=dpi, metadata=metadata.read(file))


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) that `read_image` would give, from the file's header alone.

    Raises:
        FileNotFoundError, ValueError: as `read_image`, as far as the header tells.
    """
    with _open(path) as file:
        try:
            image = _open_with_pillow(file)
            if not isinstance(image, TiffImagePlugin.TiffImageFile):
                return image.height, image.width
            size, orientation = (image.tag_v2[257], image.tag_v2[256]), image.tag_v2.get(274)  # only newer Pillow's size is upright
        except UnidentifiedImageError:
            page = _open_with_tifffile(file)
            size, orientation = (page.imagelength, page.imagewidth), _tag(page, 274)
        return size[::-1] if orientation in _ON_ITS_SIDE else size


def list_images(folder: str | os.PathLike, nested: bool = False) -> list[Path]:
    """The image files of `folder`, sorted, without hidden files and other endings.

    Args:
        nested: also those of the folders in it, and of the folders that links lead to.
    """
    return sorted(file for file in _walk(Path(folder), nested) if file.suffix.lower() in IMAGE_SUFFIXES)


def passed_over(folder: str | os.PathLike, nested: bool = False) -> str:
    """A sentence on what `list_images` doesn't list, by ending, or an empty one."""
    others = Counter(file.suffix.lower() or "without an ending" for file in _walk(Path(folder), nested))
    dead = sum(1 for file in Path(folder).iterdir() if file.is_symlink() and not file.exists())
    found = [f"{dead} dead link(s)"] if dead else []
    found += [f"{count} {suffix}" for suffix, count in sorted(others.items()) if suffix not in (*IMAGE_SUFFIXES, *_OF_SYSTEMS)]
    if not nested:
        inner = [each.name for each in sorted(Path(folder).iterdir()) if each.is_dir() and not each.name.startswith(".")]
        found += [f"the images in {name}/" for name in inner if list_images(Path(folder) / name)]
    if not found:
        return ""
    remedy = "; to read .heic, pip install pillow-heif" if others.keys() & {*_HEIF} - {*IMAGE_SUFFIXES} else ""
    return f"passed over in {folder}: {', '.join(found)}{remedy}"


def _raise(error: OSError) -> None:
    raise error


_OF_SYSTEMS = (".db", ".ini")  # Thumbs.db, desktop.ini


def _walk(folder: Path, nested: bool) -> Iterator[Path]:
    """Visible files; a folder that is reached twice, as by a link to itself, is entered once."""
    entered = {folder.resolve()}
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        yield from (Path(place, name) for name in names if not name.startswith(".") and Path(place, name).is_file())
        inner = [name for name in sorted(folders) if nested and not name.startswith(".") and Path(place, name).resolve() not in entered]
        entered.update(Path(place, name).resolve() for name in inner)
        folders[:] = inner


# Writing


def write_image(path: str | os.PathLike, image: RGB) -> None:
    """Write RGB uint8 (H, W, 3) in the format of the path's ending, WebP without loss; folders are made, and no half file is left.

    Raises:
        ValueError: the array is no such image, or the ending is unknown.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"{path}: image is {image.dtype} {image.shape}; it must be uint8 (H, W, 3)")
    if Path(path).suffix.lower() == ".png":  # by OpenCV, which takes a seventh of Pillow's time for files a fifth larger
        encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
        files.write_whole(Path(path), encoded, durable=False)
    else:
        write_photo(path, Photo(image), quality=100)


def write_photo(path: str | os.PathLike, photo: Photo, quality: int = 95) -> None:
    """Write a photo in the format of the path's ending; folders are made, and no half file is left.

    Args:
        quality: of JPEG and WebP, 1 to 100; at 100, WebP is lossless.

    Raises:
        ValueError: the ending is unknown, or the format can't hold the photo.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: unknown ending {path.suffix!r}; known are {', '.join(FORMATS)}")
    files.write_whole(path, encode_photo(photo, path.suffix, quality), durable=False)


def encode_photo(photo: Photo, suffix: str, quality: int = 95) -> bytes:
    """The bytes of a file with this ending, as `write_photo` writes them."""
    check_writable(photo, suffix, photo.pixels.shape[:2])
    kind = FORMATS[suffix.lower()]
    if kind in _OPAQUE:
        photo = replace(photo, alpha=photo.transparency)
    colours = photo.pixels[:, :, :1] if photo.gray else photo.pixels
    values = colours if photo.alpha is None else np.concatenate([colours, photo.alpha[:, :, None]], 2)  # (H, W, 1 to 4)
    if kind == "TIFF":
        encoded = _encode_tiff(values, photo)
    elif photo.bits == 16:
        encoded = _encode_deep_png(values, photo)
    else:
        encoded = _encode_with_pillow(values, photo, kind, quality)
    if kind == "PNG":
        chunks = b"".join(metadata.png_chunk(*chunk) for chunk in photo.metadata.png_chunks(photo.pixels.shape[:2]))
        encoded = encoded[:_PNG_HEADER] + chunks + encoded[_PNG_HEADER:]
    return encoded


_OPAQUE = ("JPEG", "BMP")  # hold no alpha
_PNG_HEADER = 33  # bytes of the signature and IHDR


def check_writable(photo: Photo, suffix: str, size: tuple[int, ...]) -> tuple[str, ...]:
    """Refuse what a format can't hold, before hours of work; returns sentences on what the format loses beside pixels.

    Args:
        suffix: of the file to write, as ".jpg".
        size: (height, width) of the image to write.

    Raises:
        ValueError: the format holds no alpha, no 16 bits or no image of this size.
    """
    kind = FORMATS[suffix.lower()]
    if kind in _OPAQUE and photo.transparency is not None:
        raise ValueError(f"the image has alpha, which {kind} doesn't hold; choose --output_format png, webp or tif")
    if photo.bits == 16 and kind not in ("PNG", "TIFF"):
        raise ValueError(f"the image has 16 bits a channel, which {kind} doesn't hold; choose --output_format png or tif")
    longest = {"JPEG": 65535, "WEBP": 16383}.get(kind, max(size))  # pixels, by the formats' definitions
    if max(size) > longest:
        raise ValueError(f"the result would be {size[1]}x{size[0]}, but {kind} holds {longest} at most; choose --output_format png")
    notes = []
    if photo.icc_profile and not _holds_profile(photo, kind):
        notes.append(f"{kind} can't hold the colour profile of this image; its colours may look a little different")
    if photo.dpi and kind == "WEBP":
        notes.append("WEBP holds no resolution (dpi)")
    return (*notes, *photo.metadata.left_out(kind))


def _holds_profile(photo: Photo, kind: str) -> bool:
    return kind != "BMP" and not (kind == "WEBP" and photo.gray)  # WebP has no gray, and a gray profile doesn't fit RGB


# Errors


class _RefusedError(ValueError):
    """A sound image that is too large or of an unsupported kind; the message says what to do."""


_DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, ArithmeticError, EOFError, LookupError, RuntimeError, struct.error, zlib.error, cv2.error,
    tifffile.TiffFileError,
)  # fmt: skip


@contextlib.contextmanager
def _open(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to decode; what the decoders raise becomes a ValueError of one line that names the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ValueError(f"{path}: the file is empty; copy or download it again")
        try:
            yield file
        except _RefusedError as error:
            raise ValueError(f"{path}: {error}") from None
        except UnidentifiedImageError:
            raise ValueError(f"{path}: not an image of a known format; known are {', '.join(IMAGE_SUFFIXES)}") from None
        except MemoryError:
            raise ValueError(f"{path}: too little memory to read it; free some, or copy the file again if it is damaged") from None
        except _DECODING_ERRORS as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{path}: the image is damaged or cut off ({reason}); copy or download it again") from None


# Headers


def _open_with_pillow(file: BinaryIO) -> Image.Image:
    """An image of plausible size, not decoded yet. Raises UnidentifiedImageError where Pillow doesn't know it."""
    file.seek(0)
    try:
        image = _open_sound_parts(file)
    except Image.DecompressionBombError as error:  # beyond Pillow's own limit
        raise _RefusedError(f"more than {MAX_PIXELS:,} pixels; cut it into parts ({error})") from None
    kind = image.format or ""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _refuse_raw(file, image.tag_v2.get(254, 0), 50706 in image.tag_v2)
        kind += f" {image.tag_v2.get(259, 1)}"
    elif kind == "BMP":
        kind += f" {image.info.get('compression', 0)}"
    _check_size(file, image.width, image.height, kind)
    return image


def _open_sound_parts(file: BinaryIO) -> Image.Image:
    """An image, also a PNG in which text or the like is damaged, but not its pixels."""
    try:
        return Image.open(file, formats=metadata.FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        header = file.read(_PNG_HEADER)
        if not header.startswith(b"\x89PNG\r\n\x1a\n"):
            raise
        kinds = (b"PLTE", b"tRNS", b"iCCP", b"sRGB", b"gAMA", b"pHYs", b"eXIf", b"IDAT", b"IEND")
        sound = b"".join(metadata.png_chunk(*chunk) for chunk in metadata.png_chunks(file, kinds))
        image = Image.open(io.BytesIO(header + sound), formats=["PNG"])
        image.info["damaged"] = True
        return image


def _open_with_tifffile(file: BinaryIO) -> tifffile.TiffPage:
    """The first page of a TIFF, as `_open_with_pillow`."""
    file.seek(0)
    if file.read(4) not in TiffImagePlugin.PREFIXES:
        raise UnidentifiedImageError
    file.seek(0)
    page = tifffile.TiffFile(file).pages.first
    _refuse_raw(file, _tag(page, 254) or 0, 50706 in page.tags)
    _check_size(file, page.imagewidth, page.imagelength, f"TIFF {int(page.compression)}")
    return page


def _refuse_raw(file: BinaryIO, subfile: int, is_dng: bool) -> None:
    """Refuse what cameras store raw: TIFF files whose first image is a preview."""
    file.seek(8)
    if is_dng or int(subfile) & 1 or file.read(4) == b"CR\2\0":  # NewSubfileType's bit for reduced images; Canon's CR2
        raise _RefusedError("is a raw photograph, whose first image is a preview; develop it to TIFF or PNG with your camera's program")


def _tag(page: tifffile.TiffPage, number: int) -> Any:
    return page.tags[number].value if number in page.tags else None


# What a byte of a file can hold at most: deflate takes 2 bits for a run of 258 bytes, LZW a code of 9 bits for 4096, PackBits 2 bytes
# for 128, and JPEG 1 bit for a block of 64 pixels. The number behind TIFF and BMP is their compression.
_PIXELS_PER_BYTE = {
    "PNG": 8 * 1032, "JPEG": 512, "MPO": 512, "BMP 0": 8, "TIFF 1": 8, "TIFF 5": 8 * 3641, "TIFF 7": 512, "TIFF 8": 8 * 1032,
    "TIFF 32773": 8 * 64, "TIFF 32946": 8 * 1032,
}  # fmt: skip

# WebP's decoder takes three times the memory of others; BMP with runs takes as long for 10 megapixels as others for 110
_LOWER_LIMITS = {"WEBP": 40_000_000, "BMP 1": 10_000_000, "BMP 2": 10_000_000}  # pixels


def _check_size(file: BinaryIO, width: int, height: int, kind: str) -> None:
    """Refuse an image that takes too much memory, and a header that lies."""
    limit = min(MAX_PIXELS, _LOWER_LIMITS.get(kind, MAX_PIXELS))
    if width * height > limit:
        raise _RefusedError(f"more than {limit:,} pixels; cut it into parts (it is {width}x{height})")
    length = os.fstat(file.fileno()).st_size
    if width < 1 or height < 1 or width * height > length * _PIXELS_PER_BYTE.get(kind, MAX_PIXELS):
        raise ValueError(f"its header says {width}x{height}, but there are {length} bytes")


# Decoding


def _decode(file: BinaryIO, orient: bool) -> tuple[Image.Image | Photo, int]:
    """The first image of a file, and the EXIF orientation that its pixels still need (1 without `orient`).

    Images of 8 bits come as Pillow's, so that callers convert only what they want; images of 16 bits come as a Photo.
    """
    try:
        image = _open_with_pillow(file)
    except UnidentifiedImageError:  # Pillow doesn't know every TIFF
        return _decode_tiff(file), 1
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        if max(image.tag_v2.get(258, (1,))) > 8:  # BitsPerSample, of each channel
            return _decode_tiff(file), 1
        on_its_side = image.tag_v2.get(274) in _ON_ITS_SIDE
        image.load()  # which also applies the orientation, but leaves the resolution
        if on_its_side and "dpi" in image.info:
            image.info["dpi"] = image.info["dpi"][::-1]
        return image, 1
    image.load()
    orientation = 1
    if orient:
        with contextlib.suppress(*_DECODING_ERRORS):  # damaged EXIF, which `metadata.read` names
            orientation = image.getexif().get(274, 1)
    file.seek(24)
    if image.format == "PNG" and file.read(1) == b"\x10":  # bits a channel
        return _decode_deep_png(file, image), orientation
    if image.mode == "I":  # a PGM with more than 8 bits, scaled to 16 by Pillow
        return _split(np.asarray(image)[:, :, None].astype(np.uint16)), orientation
    if image.mode == "F":
        raise _RefusedError("its pixels are floating-point numbers; convert it to 8 or 16 bits first")
    return image, orientation


_ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF orientations with height and width swapped


def _rotate(values: NDArray, orientation: int) -> NDArray:
    """Upright pixels, for EXIF's orientation (tag 274)."""
    if orientation in (2, 4, 5, 7):
        values = values[:, ::-1]
    return np.ascontiguousarray(np.rot90(values, {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)))


def _strips(height: int, width: int) -> Iterator[slice]:
    """Slices of rows: copies of a whole image by Pillow and NumPy would take 14 bytes a pixel."""
    step = max(1, 2**20 // width)
    return (slice(top, min(top + step, height)) for top in range(0, height, step))


# 8 bits


def _to_array(image: Image.Image, mode: str) -> NDArray[np.uint8]:
    """(H, W, 3) of "RGB", or (H, W) of alpha alone, "A"."""
    values = np.empty((image.height, image.width, 3) if mode == "RGB" else (image.height, image.width), np.uint8)
    for rows in _strips(image.height, image.width):
        strip = image.crop((0, rows.start, image.width, rows.stop))
        if strip.mode == "La":  # Pillow converts it to LA only
            strip = strip.convert("LA")
        if mode == "A" or strip.mode in ("P", "PA", "RGBa"):
            strip = strip.convert("RGBA")
        values[rows] = np.asarray(strip.getchannel("A") if mode == "A" else strip.convert("RGB"))
    return values


def _to_photo(image: Image.Image, file: BinaryIO) -> Photo:
    profile, alpha = image.info.get("icc_profile"), None
    frames = getattr(_open_with_pillow(file), "n_frames", 1)  # opened again, as counting moves to other frames
    if image.format == "MPO":
        notes: tuple[str, ...] = ("its further images (previews, depth, HDR gain map) were left out",)
    else:
        notes = _note_on_frames(frames)
    if image.format in ("AVIF", "HEIF"):
        notes += (f"{image.format} is read with 8 bits a channel; HDR is not kept",)
    further = len(image.getbands()) - (image.mode == "RGBX")
    if image.info.get("damaged"):
        notes += ("damaged text or the like beside its pixels was left out",)
    if image.mode == "RGBX" or (isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(277, 1) > further):
        notes += (_UNKNOWN_CHANNEL,)
    file.seek(24)
    depth = file.read(1)[0] if image.format == "PNG" else 8  # bits a channel
    if image.mode == "L" and depth in (2, 4) and "transparency" in image.info:
        image.info["transparency"] *= 255 // (2**depth - 1)  # Pillow enlarges the values of the pixels, but not this one
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        alpha = _to_array(image, "A")
    if isinstance(image, TiffImagePlugin.TiffImageFile) and 282 not in image.tag_v2:
        image.info.pop("dpi", None)  # invented by Pillow
    dpi, gray = _plausible_dpi(image.info.get("dpi")), image.mode in ("1", "L", "LA", "La")
    lossy, quality = _lossy_compression(image, file), _jpeg_quality(image)
    if image.mode in ("CMYK", "LAB", "YCbCr"):
        image, profile = _to_srgb(image, profile), None
    return Photo(_to_array(image, "RGB"), alpha, gray, profile, dpi, notes=notes, lossy=lossy, quality=quality)


def _lossy_compression(image: Image.Image, file: BinaryIO) -> str:
    if image.format == "WEBP":  # chunks of a name, a length and data, of which "VP8L" has lossless pixels, and "VP8 " others
        position, kind = 12, b""
        while kind not in (b"VP8 ", b"VP8L"):
            file.seek(position)
            header = file.read(8)
            if len(header) < 8:
                return ""
            kind, length = header[:4], int.from_bytes(header[4:], "little")
            position += 24 if kind == b"ANMF" else 8 + length + length % 2  # a frame's place, and then its own chunks
        return "WEBP" if kind == b"VP8 " else ""
    return "JPEG" if image.format in ("JPEG", "MPO") else ""


def _jpeg_quality(image: Image.Image) -> float | None:
    """What quality libjpeg needs for quantisation tables as coarse as these (its jpeg_quality_scaling, reversed)."""
    tables = getattr(image, "quantization", None)
    if not tables or 0 not in tables:
        return None
    coarseness = 100 * sum(tables[0]) / _TABLE_OF_50
    return 5000 / coarseness if coarseness > 100 else 100 - coarseness / 2


_TABLE_OF_50 = 3688  # sum of the standard's table for luma (ITU-T T.81, table K.1)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB by the image's profile; without a usable one, by the plain formulas."""
    sources: list[Any] = [io.BytesIO(profile)] if profile else []
    sources += [ImageCms.createProfile("LAB")] if image.mode == "LAB" else []
    for source in sources:
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):  # damaged, or for another kind of image
            transform = ImageCms.buildTransform(ImageCms.ImageCmsProfile(source), ImageCms.createProfile("sRGB"), image.mode, "RGB")
            return transform.apply(image)
    return image.convert("RGB")


def _note_on_frames(count: int) -> tuple[str, ...]:
    return (f"it holds {count} pages or frames, of which only the first is taken",) if count > 1 else ()


_UNKNOWN_CHANNEL = "it has further channels, which are not said to be alpha and were left out"


def _plausible_dpi(dpi: Any) -> tuple[float, float] | None:
    if dpi is None or not all(0 < float(value) < 1e6 for value in dpi):
        return None
    return float(dpi[0]), float(dpi[1])


# 16 bits


def _split(values: NDArray) -> Photo:
    """A photo from (H, W, 1 to 4): gray or RGB, then alpha."""
    gray = values.shape[2] < 3
    pixels = np.repeat(values[:, :, :1], 3, 2) if gray else values[:, :, :3]
    return Photo(pixels, values[:, :, -1] if values.shape[2] in (2, 4) else None, gray)


def _decode_deep_png(file: BinaryIO, image: Image.Image) -> Photo:
    """All bits of a PNG, of which Pillow has read the rest."""
    file.seek(0)
    header = file.read(_PNG_HEADER)
    pixels = b"".join(metadata.png_chunk(*chunk) for chunk in metadata.png_chunks(file, (b"IDAT",)))
    # alone, as OpenCV takes the memory that any other chunk's length asks for
    values = _decode_with_opencv(header + pixels + metadata.png_chunk(b"IEND", b""), image.size)
    if header[25] == 4:  # the header's colour type: gray and alpha, which OpenCV makes BGRA
        values = values[:, :, 2:]
    photo = _split(values)
    if "transparency" in image.info:
        transparent = (photo.pixels == np.asarray(image.info["transparency"])).all(2)
        photo = replace(photo, alpha=np.where(transparent, 0, 65535).astype(np.uint16))
    return replace(photo, icc_profile=image.info.get("icc_profile"), dpi=_plausible_dpi(image.info.get("dpi")))


def _decode_with_opencv(data: bytes, size: tuple[int, int], dtype: Any = np.uint16) -> NDArray:
    """(H, W, 1 to 4), gray, RGB or RGBA; a TIFF comes upright."""
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)  # gray, BGR or BGRA
    if values is None or values.dtype != dtype or sorted(values.shape[:2]) != sorted(size):
        found = "nothing" if values is None else f"{values.dtype} {values.shape}"
        raise ValueError(f"its header says {np.dtype(dtype)}, {size[0]}x{size[1]}, but OpenCV finds {found}")
    return values[:, :, None] if values.ndim == 2 else values[:, :, [2, 1, 0, 3][: values.shape[2]]]


def _decode_tiff(file: BinaryIO) -> Photo:
    page = _open_with_tifffile(file)
    kind, count, orientation = page.photometric, page.samplesperpixel, _tag(page, 274)
    readable = (page.dtype, page.bitspersample) in ((np.uint8, 8), (np.uint16, 16)) and kind in _TIFF_KINDS
    if not readable or count > 4 or page.imagedepth != 1:
        found = f"{count} x {page.dtype} of {page.bitspersample} bits, photometric {int(kind)}, depth {page.imagedepth}"
        raise _RefusedError(f"its samples are {found}; convert it to gray or RGB of 8 or 16 bits first")
    peak = np.iinfo(page.dtype).max
    try:
        planes = page.asarray(squeeze=False, maxworkers=1)[:, 0]  # (planes, H, W, samples), of which one number is 1
        values = _rotate(np.moveaxis(planes, 0, 2).reshape(*planes.shape[1:3], count), orientation).copy()
    except (ValueError, NotImplementedError, ImportError):  # the compression needs further packages; OpenCV knows the usual ones
        file.seek(0)
        values = _decode_with_opencv(file.read(), (page.imagewidth, page.imagelength), page.dtype)
    if kind == tifffile.PHOTOMETRIC.MINISWHITE:
        values[:, :, 0] = peak - values[:, :, 0]
    photo = _split(values)
    notes = _note_on_frames(len(page.parent.pages))
    further = page.extrasamples[0] if photo.alpha is not None and page.extrasamples else None
    if further == tifffile.EXTRASAMPLE.UNSPECIFIED:
        photo, notes = replace(photo, alpha=None), (*notes, _UNKNOWN_CHANNEL)
    elif further == tifffile.EXTRASAMPLE.ASSOCALPHA:  # the pixels were multiplied by it
        divisor = np.maximum(values[:, :, -1:], 1).astype(np.float32) / peak
        photo = replace(photo, pixels=np.clip(np.round(photo.pixels / divisor), 0, peak).astype(values.dtype))
    has_unit = _tag(page, 296) not in (None, tifffile.RESUNIT.NONE) and 282 in page.tags
    dpi = _plausible_dpi(page.get_resolution(tifffile.RESUNIT.INCH) if has_unit else None)
    dpi = dpi[::-1] if dpi and orientation in _ON_ITS_SIDE else dpi
    return replace(photo, icc_profile=_tag(page, 34675), dpi=dpi, notes=notes)


_TIFF_KINDS = (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.MINISWHITE, tifffile.PHOTOMETRIC.RGB)


# Encoding


def _encode_with_pillow(values: NDArray, photo: Photo, kind: str, quality: int) -> bytes:
    image = Image.fromarray(np.ascontiguousarray(values[:, :, 0] if values.shape[2] == 1 else values))  # L, LA, RGB or RGBA
    options = photo.metadata.for_pillow(kind, photo.pixels.shape[:2])
    if photo.icc_profile and _holds_profile(photo, kind):
        options["icc_profile"] = photo.icc_profile
    if photo.dpi and kind != "WEBP":
        options["dpi"] = photo.dpi
    if kind == "JPEG":
        options |= {"quality": quality, "subsampling": 0}
    if kind == "WEBP":
        options |= {"quality": quality, "lossless": quality == 100, "exact": True}
        image = image.convert("RGB" if photo.alpha is None else "RGBA")  # it knows no gray
    encoded = io.BytesIO()
    image.save(encoded, kind, **options)
    return encoded.getvalue()


def _encode_tiff(values: NDArray, photo: Photo) -> bytes:
    encoded = io.BytesIO()
    profile = [(34675, 7, len(photo.icc_profile), photo.icc_profile, True)] if photo.icc_profile else []  # ICC's tag
    tifffile.imwrite(
        encoded,
        values[:, :, 0] if values.shape[2] == 1 else values,
        photometric="minisblack" if photo.gray else "rgb",
        planarconfig="contig" if values.shape[2] > 1 else None,
        extrasamples=["unassalpha"] if photo.alpha is not None else None,
        compression="zlib",
        extratags=[*profile, *photo.metadata.tiff_tags()],
        resolution=photo.dpi,
        resolutionunit="INCH" if photo.dpi else None,
        metadata=None,
        software=False,
    )
    return encoded.getvalue()


def _encode_deep_png(values: NDArray, photo: Photo) -> bytes:
    """PNG of 16 bits with colour profile and resolution, which neither Pillow nor OpenCV writes (PNG, third edition)."""
    height, width, count = values.shape
    rows = np.ascontiguousarray(values, ">u2").view(np.uint8).reshape(height, -1)
    filtered = np.full((height, rows.shape[1] + 1), 2, np.uint8)  # filter 2: each row as its difference from the one above
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[count], 0, 0, 0))]
    if photo.icc_profile:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(photo.icc_profile)))
    if photo.dpi:
        chunks.append((b"pHYs", struct.pack(">IIB", *(round(value / 0.0254) for value in photo.dpi), 1)))  # pixels a metre
    chunks += [(b"IDAT", zlib.compress(filtered.data, 6)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(metadata.png_chunk(name, data) for name, data in chunks)

"""Pure functions on pixels: reading and writing, MATLAB's bicubic, degradations, crops and turns, PSNR and SSIM.

An image is RGB uint8, (H, W, 3), everywhere in this file.

    gt = read_image("baby.png")
    lr = degrade(gt, upscale_factor=4)                # what the paper's network is given
    psnr(sr, gt, border=4), ssim(sr, gt, border=4)    # as the papers count them
"""

import math
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, UnidentifiedImageError
from scipy import ndimage, sparse

import files

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
MAX_PIXELS = 110_000_000  # a photograph of 102 megapixels fits, and no picture of 8 bits takes 1 GB to be read
KINDS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")  # Pillow's other kinds may start programs, as EPS does
DEGRADATIONS = ("BI", "BD", "DN")
SSIM_WINDOW = 11  # pixels

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

Picture = NDArray[np.uint8]  # (H, W, 3), RGB


# Files


def read_image(path: str | os.PathLike) -> Picture:
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


def write_image(path: str | os.PathLike, image: Picture) -> None:
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


def _decode(file: BinaryIO) -> Picture:
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


def _decode_deep(file: BinaryIO, size: tuple[int, int]) -> Picture:
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


def _to_rgb8(deep: NDArray | None) -> Picture:
    if deep is None or deep.dtype not in (np.uint8, np.uint16) or (deep.ndim == 3 and deep.shape[2] < 3):
        raise ValueError(f"samples of type {None if deep is None else deep.dtype} are not 8 or 16 bits")
    rgb = np.empty((*deep.shape[:2], 3), np.uint8)
    for rows in _strips(*deep.shape[:2]):
        strip = deep[rows] if deep.dtype == np.uint8 else np.round(deep[rows] / 257)  # 65535 / 255
        rgb[rows] = strip[:, :, None] if strip.ndim == 2 else strip[:, :, 2::-1]
    return rgb


# MATLAB's bicubic


def imresize(image: NDArray, scale: float) -> NDArray:
    """MATLAB's `imresize(image, scale, 'bicubic')`, bit for bit.

    The size becomes ceil(size * scale). Cubic kernel with a = -0.5, widened when shrinking (antialiasing); taps outside
    the image take the edge pixel; rows first, then columns, each pass rounded to uint8.

    Args:
        image: uint8 or uint16, (H, W) or (H, W, C); the result is of the same type.
        scale: greater than 0; 1/4 makes LR images for x4.

    Raises:
        ValueError: another type or shape, or a scale that is not positive.
    """
    _check_resizable(image)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale={scale} must be a positive number")
    return _resize(image, (math.ceil(image.shape[0] * scale), math.ceil(image.shape[1] * scale)), (scale, scale))


def imresize_to(image: NDArray, height: int, width: int) -> NDArray:
    """MATLAB's `imresize(image, [height width], 'bicubic')`: as `imresize`, to a size, each side with a scale of its own.

    Raises:
        ValueError: another type or shape, or a side below 1.
    """
    _check_resizable(image)
    if min(height, width) < 1:
        raise ValueError(f"a picture of {width}x{height} can't be made: each side must be at least 1")
    return _resize(image, (height, width), (height / image.shape[0], width / image.shape[1]))


def _check_resizable(image: NDArray) -> None:
    if image.dtype not in (np.uint8, np.uint16) or image.ndim not in (2, 3) or not image.size:
        raise ValueError(f"image is {image.dtype} {image.shape}; imresize needs uint8 or uint16, (H, W) or (H, W, C), not empty")


def _resize(image: NDArray, size: tuple[int, int], scales: tuple[float, float]) -> NDArray:
    rows = _resize_first_axis(image, size[0], scales[0])
    return np.ascontiguousarray(_resize_first_axis(rows.swapaxes(0, 1), size[1], scales[1]).swapaxes(0, 1))


def _resize_first_axis(image: NDArray, new_size: int, scale: float) -> NDArray:
    weights = _bicubic_weights(image.shape[0], new_size, scale)
    lines = image.reshape(image.shape[0], -1)
    peak = np.iinfo(image.dtype).max
    resized = np.empty((new_size, lines.shape[1]), image.dtype)
    for start in range(0, lines.shape[1], _STRIP):
        strip = slice(start, start + _STRIP)
        values = weights @ lines[:, strip].astype(np.float64)  # taps are added in their order, as MATLAB does
        values += 0.5
        np.clip(values, 0, peak, out=values)  # 255 + 0.5 is cut to 255, as it would be by rounding first
        resized[:, strip] = values  # to integers: drops the fraction, so that halves went up
    return resized.reshape(-1, *image.shape[1:])


_STRIP = 256  # columns at a time, so that float64 copies stay in the cache


@lru_cache(maxsize=256)
def _bicubic_weights(size: int, new_size: int, scale: float) -> sparse.csr_array:
    """(new_size, size): each output pixel as a weighted sum of input pixels."""
    support = 4 / min(scale, 1.0)
    taps = math.ceil(support) + 2
    centres = np.arange(1, new_size + 1) / scale + 0.5 * (1 - 1 / scale)  # in input pixels, from 1
    positions = np.floor(centres - support / 2)[:, None] + np.arange(taps)  # (new_size, taps)
    weights = _cubic((centres[:, None] - positions) * min(scale, 1.0))
    weights /= weights.sum(1, keepdims=True)
    columns = np.clip(positions - 1, 0, size - 1).astype(np.int32)
    keep = weights != 0
    ends = np.concatenate(([0], keep.sum(1).cumsum()))
    return sparse.csr_array((weights[keep], columns[keep], ends), shape=(new_size, size))


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' kernel with a = -0.5 (Keys 1981, equation 15)."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


# Degradations


def degrade(gt: Picture, upscale_factor: int, degradation: str = "BI", seed: int = 0) -> Picture:
    """Make the LR image that the paper's protocol gives to the network (RCAN, section 4.1).

    "BI" is MATLAB's bicubic. "BD" blurs with a Gaussian of sigma 1.6, rounds, and takes every scale-th pixel.
    "DN" is BI with Gaussian noise of sigma 30 of 255, drawn from `seed`.

    Args:
        gt: uint8 (H, W, 3); H and W multiples of `upscale_factor` (see `crop_to_multiple`).

    Raises:
        ValueError: another size, or an unknown degradation.
    """
    _check_image(gt, "gt")
    height, width = gt.shape[:2]
    if height % upscale_factor or width % upscale_factor:
        raise ValueError(f"gt is {width}x{height}, not a multiple of upscale_factor={upscale_factor}; crop it first")
    if degradation == "BI":
        return imresize(gt, 1 / upscale_factor)
    if degradation == "BD":
        return _blur(gt, upscale_factor)[(upscale_factor - 1) // 2 :: upscale_factor, (upscale_factor - 1) // 2 :: upscale_factor].copy()
    if degradation == "DN":
        lr = imresize(gt, 1 / upscale_factor)
        noise = np.random.default_rng(seed).normal(0, 30, lr.shape)
        return np.clip(np.floor(lr + noise + 0.5), 0, 255).astype(np.uint8)
    raise ValueError(f"degradation={degradation!r} is unknown; known are {', '.join(DEGRADATIONS)}")


def _blur(gt: Picture, upscale_factor: int, sigma: float = 1.6) -> Picture:
    """Gaussian of the paper's BD: 7 wide at odd scales, 12 at even ones, where its centre lies between two pixels."""
    width = 7 if upscale_factor % 2 else 2 * math.ceil(3 * sigma) + 2
    offsets = np.arange(width) - (width - 1) / 2
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    blurred = gt.astype(np.float64)
    for axis in (0, 1):  # an even kernel's middle tap is the left one of the two, as in MATLAB's imfilter
        blurred = ndimage.correlate1d(blurred, kernel, axis, mode="nearest", origin=0 if width % 2 else -1)
    return np.floor(blurred + 0.5).astype(np.uint8)


# Crops and turns


def crop_to_multiple(image: Picture, factor: int) -> Picture:
    """Drop rows at the bottom and columns at the right until both sizes are multiples of `factor`."""
    return image[: image.shape[0] // factor * factor, : image.shape[1] // factor * factor]


def turn(image: Picture, orientation: int) -> Picture:
    """One of the eight ways to lay a picture down: `orientation % 4` quarter turns to the left, mirrored first from 4 on."""
    if orientation not in range(8):
        raise ValueError(f"orientation={orientation} must be 0 to 7")
    for operation in _TURNS[orientation]:
        image = operation(image)
    return image


# OpenCV's copies are 15 times as fast as NumPy's strided ones; a mirrored quarter turn is a transposition
_TURNS = (
    (),
    (partial(cv2.rotate, rotateCode=cv2.ROTATE_90_COUNTERCLOCKWISE),),
    (partial(cv2.rotate, rotateCode=cv2.ROTATE_180),),
    (partial(cv2.rotate, rotateCode=cv2.ROTATE_90_CLOCKWISE),),
    (partial(cv2.flip, flipCode=1),),
    (cv2.transpose,),
    (partial(cv2.flip, flipCode=0),),
    (cv2.transpose, partial(cv2.rotate, rotateCode=cv2.ROTATE_180)),
)


# Metrics


def rgb_to_y(image: Picture) -> NDArray[np.float64]:
    """MATLAB's luma, BT.601 in 16 to 235, not rounded: (H, W, 3) uint8 -> (H, W) float64."""
    return image @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def psnr(sr: Picture, gt: Picture, border: int, only_y_channel: bool = True) -> float:
    """Peak signal-to-noise ratio in dB, peak 255; equal images give inf.

    Args:
        sr, gt: uint8 (H, W, 3), of one size.
        border: pixels dropped on each side; the scale, in the papers' protocol.
        only_y_channel: of MATLAB's Y, as the papers count, or else of all three channels together.
    """
    difference = np.subtract(*_comparable(sr, gt, border, only_y_channel))
    mean_square = np.mean(difference * difference)
    return float(10 * np.log10(255**2 / mean_square)) if mean_square else math.inf


def ssim(sr: Picture, gt: Picture, border: int, only_y_channel: bool = True) -> float:
    """Structural similarity (Wang et al. 2004): 11x11 Gaussian of sigma 1.5, valid region only, K = (0.01, 0.03), L = 255.

    Arguments as for `psnr`; without `only_y_channel`, the mean over the three channels.
    """
    sr_values, gt_values = _comparable(sr, gt, border, only_y_channel)
    if min(sr_values.shape[:2]) < SSIM_WINDOW:
        raise ValueError(f"images of {sr.shape[1]}x{sr.shape[0]} less a border of {border} are smaller than SSIM's window of {SSIM_WINDOW}")
    sr_mean, gt_mean = _window_mean(sr_values), _window_mean(gt_values)
    sr_variance = _window_mean(sr_values**2) - sr_mean**2
    gt_variance = _window_mean(gt_values**2) - gt_mean**2
    covariance = _window_mean(sr_values * gt_values) - sr_mean * gt_mean
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * sr_mean * gt_mean + c1) * (2 * covariance + c2)
    similarity /= (sr_mean**2 + gt_mean**2 + c1) * (sr_variance + gt_variance + c2)
    return float(similarity.mean())


def _window_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    radius = SSIM_WINDOW // 2
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    return cv2.sepFilter2D(values, cv2.CV_64F, kernel, kernel)[radius:-radius, radius:-radius]


def _comparable(sr: Picture, gt: Picture, border: int, only_y_channel: bool) -> list[NDArray[np.float64]]:
    for name, image in (("sr", sr), ("gt", gt)):
        _check_image(image, name)
    if sr.shape != gt.shape:
        raise ValueError(f"sr is {sr.shape[1]}x{sr.shape[0]}, but gt {gt.shape[1]}x{gt.shape[0]}; they must be of one size")
    if border < 0 or min(sr.shape[:2]) <= 2 * border:
        raise ValueError(f"border={border} leaves nothing of an image of {sr.shape[1]}x{sr.shape[0]}")
    inner = (slice(border, sr.shape[0] - border), slice(border, sr.shape[1] - border))
    return [rgb_to_y(image[inner]) if only_y_channel else image[inner].astype(np.float64) for image in (sr, gt)]


def _check_image(image: NDArray, name: str) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"{name} is {image.dtype} {image.shape}; it must be uint8 (H, W, 3)")

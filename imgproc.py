"""Arithmetic on pixels: MATLAB's bicubic, degradations, crops, flips and rotations, PSNR and SSIM.

An image is RGB uint8, (H, W, 3), everywhere in this file.

    gt = read_image("baby.png")
    lr = degrade(gt, upscale_factor=4)                # the paper's input of the network
    psnr(sr, gt, border=4), ssim(sr, gt, border=4)    # as the papers count them
"""

import io
import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import sparse

from image_files import RGB
from image_files import read_image as read_image  # other programs call imgproc.read_image and imgproc.write_image
from image_files import write_image as write_image

DEGRADATIONS = ("BI", "BD", "DN", "photo")
SSIM_WINDOW = 11  # pixels


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
    """MATLAB's `imresize(image, [height width], 'bicubic')`: as `imresize`, with a scale of its own for each side.

    Raises:
        ValueError: another type or shape, or a side below 1.
    """
    _check_resizable(image)
    if min(height, width) < 1:
        raise ValueError(f"the size {width}x{height} must be at least 1x1")
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
        values = weights @ lines[:, strip].astype(np.float64)  # adds the taps in their order, as MATLAB does
        values += 0.5
        np.clip(values, 0, peak, out=values)
        resized[:, strip] = values  # drops the fraction, so halves are rounded up
    return resized.reshape(-1, *image.shape[1:])


_STRIP = 256  # columns at a time: their float64 copies stay in the cache


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


def degrade(gt: RGB, upscale_factor: int, degradation: str = "BI", seed: int = 0) -> RGB:
    """Make the LR image: of the paper's protocol (RCAN, section 4.1), or such as people have.

    "BI" is MATLAB's bicubic. "BD" blurs with a Gaussian of sigma 1.6, rounds, and takes every scale-th pixel.
    "DN" is BI with Gaussian noise of sigma 30 of 255, drawn from `seed`. "photo" is a photograph as cameras and websites leave it,
    drawn from `seed` within the ranges of `PHOTO`.

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
        start = (upscale_factor - 1) // 2
        return _blur(gt, upscale_factor)[start::upscale_factor, start::upscale_factor].copy()
    if degradation == "DN":
        lr = imresize(gt, 1 / upscale_factor)
        noise = np.random.default_rng(seed).normal(0, 30, lr.shape)
        return _to_uint8(lr + noise)
    if degradation == "photo":
        return degrade_photo(gt, upscale_factor, np.random.default_rng(seed))
    raise ValueError(f"degradation={degradation!r} is unknown; known are {', '.join(DEGRADATIONS)}")


def _blur(gt: RGB, upscale_factor: int, sigma: float = 1.6) -> RGB:
    """The Gaussian of the paper's BD: 7 pixels wide at odd scales; 12 at even ones, centred between two pixels."""
    from scipy import ndimage  # only here, as every script would take 0.2 s longer to start

    width = 7 if upscale_factor % 2 else 2 * math.ceil(3 * sigma) + 2
    offsets = np.arange(width) - (width - 1) / 2
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    blurred: NDArray = gt.astype(np.float64)
    for axis in (0, 1):  # an even kernel's middle tap is the left one of the two, as in MATLAB's imfilter
        blurred = ndimage.correlate1d(blurred, kernel, axis, mode="nearest", origin=0 if width % 2 else -1)
    return np.floor(blurred + 0.5).astype(np.uint8)


def _to_uint8(values: NDArray) -> RGB:
    return np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)


# What "photo" draws from. Real-ESRGAN (Wang et al. 2021, section 3 and its published options) and BSRGAN (Zhang et al. 2021,
# section 3) have the same steps, with blur to sigma 3, noise to 30 and JPEG from 30. Those ranges are meant for networks that also
# invent detail; here a part of the images stays clean, and damage is what an ordinary camera or website does.
PHOTO: dict[str, tuple[float, float]] = {
    "blurred": (0.4, 0.7),  # share of the images, and of the blurred ones those with a sigma for each side
    "sigma": (0.1, 0.6),  # of the Gaussian, LR pixels
    "resampled": (0.25, 0.15),  # shares of area averaging and of bilinear interpolation; the rest is MATLAB's bicubic
    "noisy": (0.5, 0.4),  # share of the images, and of the noisy ones those with equal noise in R, G and B
    "noise": (0.5, 14),  # standard deviation at white, of 255
    "dark noise": (0.2, 1),  # standard deviation at black, as a part of that at white: photons' noise grows with the light
    "compressed": (0.75, 0.15),  # share of the images, and of those the compressed ones that are compressed twice
    "quality": (30, 95),  # of JPEG, as libjpeg counts, and of WebP
    "webp": (0.1, 0.5),  # share of WebP among compressions, and of full colour resolution (4:4:4) among JPEGs
}


def degrade_photo(gt: RGB, upscale_factor: int, random: np.random.Generator) -> RGB:
    """Blur, shrink, add noise and compress, each or none of them, with values drawn from the ranges of `PHOTO`.

    The compressor's blocks start at the first pixel.

    Args:
        gt: uint8 (H, W, 3); H and W multiples of `upscale_factor`.
    """

    def happens(share: float) -> bool:
        return random.random() < share

    if happens(PHOTO["blurred"][0]):
        sigmas = random.uniform(*PHOTO["sigma"], 2 if happens(PHOTO["blurred"][1]) else 1) * upscale_factor
        gt = np.asarray(cv2.GaussianBlur(gt, (0, 0), sigmas[0], sigmaY=sigmas[-1]), np.uint8)
    area, bilinear = PHOTO["resampled"]
    method = random.random()
    if method < area + bilinear:
        size = (gt.shape[1] // upscale_factor, gt.shape[0] // upscale_factor)
        lr: RGB = np.asarray(cv2.resize(gt, size, interpolation=cv2.INTER_AREA if method < area else cv2.INTER_LINEAR), np.uint8)
    else:
        lr = imresize(gt, 1 / upscale_factor)
    if happens(PHOTO["noisy"][0]):
        at_white = random.uniform(*PHOTO["noise"])
        at_black = at_white * random.uniform(*PHOTO["dark noise"])
        channels = 1 if happens(PHOTO["noisy"][1]) else 3
        deviation = np.sqrt(at_black**2 + (at_white**2 - at_black**2) / 255 * lr)
        lr = _to_uint8(lr + deviation * random.standard_normal((*lr.shape[:2], channels), np.float32))
    if happens(PHOTO["compressed"][0]):
        for _ in range(2 if happens(PHOTO["compressed"][1]) else 1):
            quality = int(random.uniform(*PHOTO["quality"]))
            is_webp, full_colour = (happens(share) for share in PHOTO["webp"])
            lr = compress(lr, "WEBP", quality) if is_webp else compress(lr, "JPEG", quality, subsampling=0 if full_colour else 2)
    return lr


def compress(image: RGB, kind: str, quality: int, **options: int) -> RGB:
    """What is left of an image after Pillow has written it as "JPEG" or "WEBP" of this quality."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, quality=quality, **options)
    return np.asarray(Image.open(file))


def noise_level(image: RGB) -> float:
    """An estimate of the standard deviation of noise, of 255, at the smoothest tenth of the places (Immerkaer 1996; Liu et al. 2012).

    The second difference in both directions leaves nothing of edges and ramps; texture hides in the rougher places.
    """
    luma = rgb_to_y(image).astype(np.float32)
    difference = cv2.filter2D(luma, -1, np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32) / 6)[1:-1, 1:-1]
    height, width = (size // 8 * 8 for size in difference.shape)
    if not height or not width:
        return 0.0
    squares = np.square(difference[:height, :width]).reshape(height // 8, 8, width // 8, 8).mean((1, 3))
    return float(np.sqrt(np.quantile(squares, 0.1)))


def blockiness(image: RGB) -> float:
    """How much larger differences of neighbours are across the borders of 8x8 blocks, as JPEG's, than elsewhere; 1: as large.

    The blocks may begin anywhere, as after a crop: the largest of the eight phases counts.
    """
    luma = rgb_to_y(image).astype(np.float32)
    ratios = []
    for values in (luma, luma.T):
        if values.shape[1] < 32:
            return 1.0
        steps = abs(2 * (values[:, 1:-2] - values[:, 2:-1]) - (values[:, :-3] - values[:, 3:]))  # of a step or a slope, its size
        means = [float(np.minimum(steps[:, phase::8], 16).mean()) for phase in range(8)]
        ratios.append([(mean + 1) / ((sum(means) - mean) / 7 + 1) for mean in means])  # differences below 1 of 255 are not seen
    return float(max(ratios[0]) * max(ratios[1])) ** 0.5


# Transparency


def spread_colours(image: NDArray, hidden: NDArray[np.bool_]) -> NDArray:
    """The image with hidden pixels in the colour of the nearest visible one, so that filters bring no hidden colour to an edge.

    Args:
        image: uint8 or uint16, (H, W, 3).
        hidden: (H, W); where all pixels are hidden, nothing changes.
    """
    if not hidden.any() or hidden.all():
        return image
    _, labels = cv2.distanceTransformWithLabels(hidden.astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    colours = np.empty((labels.max() + 1, 3), image.dtype)  # by label: each visible pixel has one, hidden ones that of the nearest
    colours[labels[~hidden]] = image[~hidden]
    return colours[labels]


# Crops, flips and rotations


def crop_to_multiple(image: RGB, factor: int) -> RGB:
    """Drop rows at the bottom and columns at the right until both sizes are multiples of `factor`."""
    return image[: image.shape[0] // factor * factor, : image.shape[1] // factor * factor]


def flip_rotate(image: RGB, orientation: int) -> RGB:
    """One of eight orientations: flipped horizontally from 4 on, then rotated counter-clockwise by `orientation % 4` quarters."""
    if orientation not in range(8):
        raise ValueError(f"orientation={orientation} must be 0 to 7")
    for operation in _FLIPS_ROTATIONS[orientation]:
        image = operation(image)
    return image


# OpenCV copies 15 times as fast as NumPy with strides. A flip and a quarter rotation are a transposition.
_FLIPS_ROTATIONS: tuple[tuple[Callable[..., Any], ...], ...] = (
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


def rgb_to_y(image: RGB) -> NDArray[np.float64]:
    """MATLAB's luma, BT.601 in 16 to 235, not rounded: (H, W, 3) uint8 -> (H, W) float64."""
    return image @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def psnr(sr: RGB, gt: RGB, border: int, only_y_channel: bool = True) -> float:
    """Peak signal-to-noise ratio in dB, peak 255; equal images give inf.

    Args:
        sr, gt: uint8 (H, W, 3), of the same size.
        border: pixels dropped on each side; in the papers, the scale.
        only_y_channel: compare MATLAB's Y, as the papers do; else all three channels together.
    """
    difference = np.subtract(*_comparable(sr, gt, border, only_y_channel))
    mean_square = np.mean(difference * difference)
    return float(10 * np.log10(255**2 / mean_square)) if mean_square else math.inf


def ssim(sr: RGB, gt: RGB, border: int, only_y_channel: bool = True) -> float:
    """Structural similarity (Wang et al. 2004): 11x11 Gaussian of sigma 1.5, valid region only, K = (0.01, 0.03), L = 255.

    Arguments as for `psnr`; without `only_y_channel`, the result is the mean over the three channels.
    """
    sr_values, gt_values = _comparable(sr, gt, border, only_y_channel)
    if min(sr_values.shape[:2]) < SSIM_WINDOW:
        size = f"{sr.shape[1]}x{sr.shape[0]}"
        raise ValueError(f"images of {size} without a border of {border} are smaller than SSIM's window of {SSIM_WINDOW}")
    sr_mean, gt_mean = _window_mean(sr_values), _window_mean(gt_values)
    sr_variance = _window_mean(sr_values**2) - sr_mean**2
    gt_variance = _window_mean(gt_values**2) - gt_mean**2
    covariance = _window_mean(sr_values * gt_values) - sr_mean * gt_mean
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * sr_mean * gt_mean + c1) * (2 * covariance + c2)
    similarity /= (sr_mean**2 + gt_mean**2 + c1) * (sr_variance + gt_variance + c2)
    return float(similarity.mean())


def is_flat(gt: RGB, border: int) -> bool:
    """Whether all of an image within its border is of one Y, so that its PSNR says little about a method."""
    values = rgb_to_y(gt[border : gt.shape[0] - border, border : gt.shape[1] - border])
    return bool(values.max() - values.min() < 1e-9)


def _window_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    radius = SSIM_WINDOW // 2
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    blurred: NDArray = cv2.sepFilter2D(values, cv2.CV_64F, kernel, kernel)
    return blurred[radius:-radius, radius:-radius]


def _comparable(sr: RGB, gt: RGB, border: int, only_y_channel: bool) -> list[NDArray[np.float64]]:
    for name, image in (("sr", sr), ("gt", gt)):
        _check_image(image, name)
    if sr.shape != gt.shape:
        raise ValueError(f"sr is {sr.shape[1]}x{sr.shape[0]}, but gt {gt.shape[1]}x{gt.shape[0]}; they must be of the same size")
    if border < 0 or min(sr.shape[:2]) <= 2 * border:
        raise ValueError(f"border={border} leaves nothing of an image of {sr.shape[1]}x{sr.shape[0]}")
    inner = (slice(border, sr.shape[0] - border), slice(border, sr.shape[1] - border))
    return [rgb_to_y(image[inner]) if only_y_channel else image[inner].astype(np.float64) for image in (sr, gt)]


def _check_image(image: NDArray, name: str) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"{name} is {image.dtype} {image.shape}; it must be uint8 (H, W, 3)")

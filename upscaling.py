"""Upscale an image exactly, in little memory, and never to a damaged pixel.

    sr = upscale(network, lr)                          # uint8 or uint16, (h, w, 3) -> (scale h, scale w, 3)

RCAN's attention averages over the whole image, so cutting an image into tiles changes the result. But nearly all of the memory is
used by the upsampler and the last convolution, which only look at a few pixels around: large images pass through them in strips of
rows. They pass through each pair of convolutions in the trunk likewise, while the averages are taken over the whole image. The
result equals that of one piece, to the rounding of float32 (about 1e-6). `tile` is for images that are too large even then, and
changes the result.
"""

import contextlib
import copy
import gc
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import model
from runtime import is_out_of_memory
from utils import PRECISIONS

Strips = Iterator[tuple[int, Tensor]]  # (first row, (1, 3, rows, W)), from the top to the bottom, without gaps
STRIP_BYTES = 384 * 2**20  # memory of the upsampler; larger strips are no faster
ASIDE_BYTES = 2**29  # a larger feature map waits in a file
MIN_ROWS = 4


def upscale(
    network: nn.Module,
    lr: NDArray,
    self_ensemble: bool = False,
    *,
    precision: str = "fp32",
    strip_rows: int | None = None,
    tile: int = 0,
    tile_overlap: int = 32,
    progress: Callable[[float], object] | None = None,
) -> NDArray:
    """Upscale an image.

    Args:
        lr: uint8 or uint16, (h, w, 3); the result is of the same type, (scale h, scale w, 3).
        self_ensemble: average over the eight flips and rotations of the image (RCAN+).
        precision: "fp32", "bf16" or "fp16". If the output is not finite, the image is computed again in fp32, with a warning. Images
            of 16 bits are always computed in fp32, because bf16 has 8 bits and fp16 11.
        strip_rows: LR rows that the upsampler gets at a time; None: as many as take about `STRIP_BYTES`. When memory runs out, half
            as many are tried, with a warning, down to `MIN_ROWS`.
        tile: side of the tiles, in LR pixels, that the image is cut into, blended over `tile_overlap` pixels; 0: none. The attention
            averages over each tile, so the result is not that of the whole image.
        progress: called, while strips or tiles are computed, with the part of the work that was done since the last call.

    Raises:
        ValueError: the network's output is not finite, or the image doesn't fit into memory.
    """
    precision = "fp32" if lr.dtype == np.uint16 else precision
    while True:
        try:
            return _upscale(
                network, lr, self_ensemble, PRECISIONS[precision], strip_rows, tile, tile_overlap, progress or (lambda part: None)
            )
        except _NotFiniteError:
            if precision == "fp32":
                raise ValueError(
                    f"the network's output for an image of {lr.shape[1]}x{lr.shape[0]} is not finite; are its weights damaged?"
                ) from None
            warnings.warn(f"the output in {precision} is not finite; this image is computed again in fp32", stacklevel=2)
            precision = "fp32"
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        height, width = (min(tile or side, side) for side in (max(lr.shape[:2]) if self_ensemble else lr.shape[0], lr.shape[1]))
        tried = min(height, strip_rows or _affordable_rows(network, max(height, width) if self_ensemble else width))
        strip_rows = _fewer_rows(tried, lr.shape, tile)  # outside of `except`, as the error keeps tensors alive


class _NotFiniteError(Exception):
    pass


def _fewer_rows(rows: int, shape: tuple[int, ...], tile: int) -> int:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if rows <= MIN_ROWS:
        advice = "smaller tiles" if tile else "tiles, as in --tile 256, which change the result a little, or a smaller image"
        raise ValueError(f"an image of {shape[1]}x{shape[0]} doesn't fit into memory, even {rows} rows at a time: use {advice}")
    fewer = max(MIN_ROWS, rows // 2)
    warnings.warn(f"out of memory; trying again with {fewer} instead of {rows} rows at a time, to the same result", stacklevel=3)
    return fewer


def _affordable_rows(network: nn.Module, width: int) -> int:
    """LR rows of this width whose upsampling takes about `STRIP_BYTES`."""
    if not isinstance(network, model.RCAN):
        return sys.maxsize
    row = 3 * 4 * _values_while_enlarging(network) * width  # bytes: three maps live at a time, float32
    return max(MIN_ROWS, STRIP_BYTES // row)


def _values_while_enlarging(network: model.RCAN) -> int:
    """Of the largest feature map, for each LR pixel."""
    channels, pixels = network.arguments["channels"], network.upscale_factor**2
    return max(channels, 3 * pixels) if network.folds_upsampler else channels * pixels


@torch.inference_mode()
def _upscale(
    network: nn.Module,
    lr: NDArray,
    self_ensemble: bool,
    dtype: torch.dtype,
    strip_rows: int | None,
    tile: int,
    tile_overlap: int,
    progress: Callable[[float], object],
) -> NDArray:
    device = next(network.parameters()).device
    peak = np.iinfo(lr.dtype).max
    pixels = torch.from_numpy(lr.astype(np.float32)).to(device).permute(2, 0, 1)[None].div_(peak)  # (1, 3, h, w) in [0, 1]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32 and not isinstance(network, model.RCAN))
    if isinstance(network, model.RCAN) and dtype != torch.float32:
        network = _reduced(network, dtype)

    def advance(part: float) -> None:
        progress(part / 8 if self_ensemble else part)

    def strips(x: Tensor) -> Strips:
        width = min(tile or x.shape[3], x.shape[3])  # in this orientation
        rows = strip_rows or _affordable_rows(network, width)
        is_tiled = 0 < tile < max(x.shape[2:])
        parts = _tiles(network, x, rows, tile, tile_overlap, advance) if is_tiled else _strips(network, x, rows, advance)
        for top, strip in parts:
            if not torch.isfinite(strip).all():
                raise _NotFiniteError
            yield top, strip

    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)
    with exact, autocast:
        return _mean_of_orientations(strips, pixels, peak, lr.dtype) if self_ensemble else _collect(strips(pixels), pixels, peak, lr.dtype)


def _reduced(network: model.RCAN, dtype: torch.dtype) -> model.RCAN:
    """A copy of the network with weights of this type, which autocast would convert for each strip and image anew.

    It is kept for the next image, and takes over the weights each time, as they may have changed.
    """
    known = _REDUCED.setdefault(network, {})
    kind = network.mean.device, dtype
    if kind not in known:
        known[kind] = copy.deepcopy(network).to(dtype)
    reduced = known[kind]
    reduced.folds_upsampler = network.folds_upsampler
    for ours, theirs in zip(reduced.parameters(), network.parameters(), strict=True):
        ours.copy_(theirs)
    reduced.mean = network.mean  # in float32, to which the output is added
    return reduced


_REDUCED: weakref.WeakKeyDictionary[nn.Module, dict[tuple[torch.device, torch.dtype], model.RCAN]] = weakref.WeakKeyDictionary()


def _collect(strips: Strips, pixels: Tensor, peak: int, dtype: np.dtype) -> NDArray:
    sr = np.empty(0, dtype)
    for top, strip in strips:
        if not sr.size:
            scale = strip.shape[3] // pixels.shape[3]
            sr = np.empty((pixels.shape[2] * scale, strip.shape[3], 3), dtype)
        sr[top : top + strip.shape[2]] = _round(strip[0].permute(1, 2, 0), peak).cpu().numpy()
    return sr


def _mean_of_orientations(strips: Callable[[Tensor], Strips], pixels: Tensor, peak: int, dtype: np.dtype) -> NDArray:
    total = np.empty(0, np.float32)
    for orientation in range(8):
        oriented = torch.rot90(pixels.flip(3) if orientation >= 4 else pixels, orientation % 4, (2, 3))
        for top, strip in strips(oriented):
            if not total.size:
                scale = strip.shape[3] // pixels.shape[3]
                total = np.zeros((pixels.shape[2] * scale, pixels.shape[3] * scale, 3), np.float32)
            view = np.rot90(total[:, ::-1] if orientation >= 4 else total, orientation % 4)  # no copy
            view[top : top + strip.shape[2]] += strip[0].permute(1, 2, 0).float().cpu().numpy()
    return _round(torch.from_numpy(total).div_(8), peak).numpy().astype(dtype)


def _round(values: Tensor, peak: int) -> Tensor:
    rounded = values.float().clamp(0, 1).mul_(peak).round_()
    return rounded.to(torch.uint8 if peak == 255 else torch.int32)


# In strips


def _strips(network: nn.Module, x: Tensor, rows: int, advance: Callable[[float], None]) -> Strips:
    """The output of `network(x)`, from `rows` LR rows at a time; `advance` is called with parts of the work that add up to 1."""
    if rows >= x.shape[2] or not isinstance(network, model.RCAN):
        yield 0, network(x)
        advance(1)
        return
    channels = network.arguments["channels"]
    work = sum(weight.numel() for weight in network.trunk.parameters())  # multiplications for each LR pixel, as those of the tail
    share = work / (work + 9 * channels * (_values_while_enlarging(network) + 2 * channels))
    trunk = _trunk(network, x, rows, lambda part: advance(part * share))
    for top, bottom in _cuts(x.shape[2], rows):
        above, below = max(0, top - _TAIL_REACH), min(x.shape[2], bottom + _TAIL_REACH)
        part = x[:, :, above:below]
        deep = network.conv2(trunk[:, :, above:below]) + network.shallow_features(part)  # again, to store one map less
        sr = network.enlarge(deep) + network.mean
        scale = network.upscale_factor
        yield top * scale, sr[:, :, (top - above) * scale : (bottom - above) * scale]
        advance((bottom - top) / x.shape[2] * (1 - share))


_TAIL_REACH = 3  # LR rows: conv2 looks 1 far, the steps of the upsampler 1 + 1/2 + 1/4, conv3 1/8 at x8; less at other scales


def _trunk(network: model.RCAN, x: Tensor, rows: int, advance: Callable[[float], None]) -> Tensor:
    """The output of the residual groups, with two feature maps in memory, and the input of a group as well if it is small."""
    rows = max(1, rows * _values_while_enlarging(network) // network.arguments["channels"] // 2)  # as many values as while enlarging
    features = _by_rows(network.shallow_features, x, rows, reach=1)  # (1, C, h, w)
    for group in network.trunk:
        start = _Aside(features, rows)
        *blocks, last = group.get_submodule("residual_group").children()
        for block in blocks:
            *convolutions, attention = block.get_submodule("residual_channel_attention_block").children()
            assert isinstance(attention, model.ChannelAttention)
            residual = _by_rows(nn.Sequential(*convolutions), features, rows, reach=2)
            for gate in attention.gates:
                residual.mul_(gate(residual))
            features = residual.add_(features)
            del residual  # or the next block would find a third map in memory
            advance(1 / len(network.trunk) / len(blocks))
        features = start.add_to(_by_rows(last, features, rows, reach=1))
    return features


class _Aside:
    """A feature map that is needed again after a group: a large one waits in a temporary file.

    Args:
        rows: that are written and read at a time.
    """

    def __init__(self, features: Tensor, rows: int) -> None:
        self.rows = rows
        self.kept = features
        self.file = None
        if features.device.type == "cpu" and features.nbytes > ASIDE_BYTES:
            self.kept = torch.empty(0)
            self.file = tempfile.TemporaryFile()  # noqa: SIM115 (`add_to` closes it)
            try:
                for top, bottom in _cuts(features.shape[2], rows):
                    self.file.write(features[:, :, top:bottom].permute(0, 2, 3, 1).contiguous().view(torch.uint8).numpy().data)
                self.file.flush()
            except OSError as error:
                with contextlib.suppress(OSError):
                    self.file.close()
                needed = f"{features.nbytes / 2**30:.1f} GiB"
                raise ValueError(
                    f"a feature map of {needed} can't wait in {tempfile.gettempdir()}: {error.strerror}; set TMPDIR to a folder with room"
                ) from None

    def add_to(self, features: Tensor) -> Tensor:
        if self.file is None:
            return features.add_(self.kept)
        with self.file:
            self.file.seek(0)
            for top, bottom in _cuts(features.shape[2], self.rows):
                part = features[:, :, top:bottom].permute(0, 2, 3, 1)  # (1, rows, w, C)
                data = bytearray(part.numel() * part.element_size())
                if self.file.readinto(data) < len(data):
                    raise ValueError(f"{tempfile.gettempdir()}: a file of this program was cut short; set TMPDIR to another folder")
                part.add_(torch.frombuffer(data, dtype=part.dtype).view(part.shape))
        return features


def _by_rows(layers: Callable[[Tensor], Tensor], x: Tensor, rows: int, reach: int) -> Tensor:
    """`layers(x)`, in strips of rows, for layers that keep the size and look `reach` rows far."""
    if rows >= x.shape[2]:
        return layers(x)
    result = torch.empty(0)
    for top, bottom in _cuts(x.shape[2], rows):
        above, below = max(0, top - reach), min(x.shape[2], bottom + reach)
        strip = layers(x[:, :, above:below])[:, :, top - above : bottom - above]
        if not result.numel():
            layout = torch.channels_last if strip.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
            size = (*strip.shape[:2], *x.shape[2:])
            result = torch.empty(size, dtype=strip.dtype, device=strip.device, memory_format=layout)
        result[:, :, top:bottom] = strip
    return result


def _cuts(size: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, step):
        yield start, min(size, start + step)


# In tiles


def _tiles(network: nn.Module, x: Tensor, rows: int, tile: int, overlap: int, advance: Callable[[float], None]) -> Strips:
    """Tiles that are computed independently and blended where they overlap; a row of tiles at a time."""
    height, width = (min(tile, size) for size in x.shape[2:])
    tops, lefts = _starts(x.shape[2], height, overlap), _starts(x.shape[3], width, overlap)
    count = len(tops) * len(lefts)
    band, scale = None, 1
    for index, top in enumerate(tops):
        row = torch.empty(0)
        for column, left in enumerate(lefts):
            part = x[:, :, top : top + height, left : left + width]
            sr = torch.cat([strip.float() for _, strip in _strips(network, part, rows, lambda part: advance(part / count))], 2)
            if not row.numel():
                scale = sr.shape[2] // height
                row = sr.new_zeros(1, 3, sr.shape[2], x.shape[3] * scale)
                across = _blending(lefts, width, x.shape[3], overlap, scale).to(sr.device)  # (tiles, W)
                down = _blending(tops, height, x.shape[2], overlap, scale).to(sr.device)  # (tiles, H)
            place = slice(left * scale, (left + width) * scale)
            row[..., place] += sr * across[column, place]
        row *= down[index, top * scale : (top + height) * scale, None]
        if band is not None:
            row[:, :, : band.shape[2]] += band
        finished = (tops[index + 1] - top) * scale if index + 1 < len(tops) else row.shape[2]
        yield top * scale, row[:, :, :finished]
        band = row[:, :, finished:]


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """First pixels of the tiles, evenly spread, each overlapping the next by at least `overlap`."""
    if size <= tile:
        return [0]
    count = 1 + -(-(size - tile) // (tile - overlap))
    return [round(index * (size - tile) / (count - 1)) for index in range(count)]


def _blending(starts: list[int], tile: int, size: int, overlap: int, scale: int) -> Tensor:
    """(tiles, size * scale): the share of each tile in each pixel; they sum to 1.

    A quarter of the overlap at each cut edge, where a tile lacks its surroundings, is not used.
    """
    shares = torch.zeros(len(starts), size * scale, dtype=torch.float64)
    inside = torch.arange(1, tile * scale + 1, dtype=torch.float64)
    unused = overlap * scale // 4
    for share, start in zip(shares, starts, strict=True):
        from_left = inside - unused if start else torch.full_like(inside, torch.inf)
        from_right = inside.flip(0) - unused if start + tile < size else torch.full_like(inside, torch.inf)
        share[start * scale : (start + tile) * scale] = torch.minimum(from_left, from_right).clamp(0, overlap * scale - 2 * unused + 1)
    return (shares / shares.sum(0)).float()

"""The settings of inference.py, which are its command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args, get_type_hints

import tyro

Images = tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="IMAGE ...")]]
Output = Annotated[str, tyro.conf.arg(aliases=["-o"])]
Chosen = tyro.conf.FlagConversionOff[bool]  # --self_ensemble True, as test.py has it
Factor = Annotated[Literal[2, 3, 4, 8] | None, tyro.conf.arg(aliases=["-s"])]


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    images: Images = ()  # images, and folders of images, which are searched with the folders in them
    input: tuple[str, ...] = ()  # the same, as an option
    output: Output = "results/inference"  # write into this folder; for one image also the path of the result
    upscale_factor: Factor = None  # enlarge as many times; None: 4, or what model_path was trained for
    outscale: float | None = None  # multiply the input's size by this, adjusting by bicubic; None: the network's scale
    weights: Literal["auto", "clean", "photo"] = "auto"  # photo: for compressed or noisy images; auto: by what each image is
    model_path: str = ""  # load weights of any known layout instead of this repository's
    existing: Literal["refuse", "skip", "overwrite"] = "refuse"  # where a result is already there: stop, leave it, or replace it
    output_format: Literal["png", "same", "jpg", "webp", "tif", "bmp"] = "png"  # write this format; same: each input's own
    quality: int | None = None  # compress JPEG and WebP to this quality, 1 to 100; at 100, WebP is lossless; None: 95
    self_ensemble: Chosen = False  # average over the eight flips and rotations of the image (RCAN+); eight times as slow
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # compute in this precision; auto: bf16 where the device is fast at it
    tile: int = 0  # cut images into tiles of this side, LR pixels, if memory is too small; changes results; 0: whole images
    tile_overlap: int | None = None  # blend neighbouring tiles over this many LR pixels; None: 32
    compare: bool = False  # also write report.html into the output folder: each result beside bicubic, with a slider and zoom
    verbose: bool = False  # also print the network, its weights and the precision

    def __post_init__(self) -> None:
        if not (self.images or self.input):
            raise ValueError("there is nothing to enlarge: name images or folders, as in python inference.py photo.jpg")
        for path in (*self.images, *self.input, self.output, self.model_path):
            if path.startswith("~"):
                raise ValueError(f"{path}: ~ is only replaced by shells, and not here: write the whole path")
        if self.weights not in get_args(get_type_hints(type(self))["weights"]):  # as a page can send
            raise ValueError(f"weights={self.weights!r} are unknown; choose auto, clean or photo")
        if self.model_path and self.weights != "auto":
            raise ValueError(f"weights={self.weights!r} has no effect with model_path={self.model_path!r}: leave one out")
        if self.outscale is not None and not 0 < self.outscale <= 64:
            raise ValueError(f"outscale={self.outscale} must be greater than 0 and at most 64")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} must be 1 to 100")
        if self.tile_overlap is not None and not self.tile:
            raise ValueError(f"tile_overlap={self.tile_overlap} has no effect without tiles: leave it out, or set --tile 256")
        if self.tile < 0 or self.overlap < 0 or 0 < self.tile <= 2 * self.overlap:
            raise ValueError(f"tile={self.tile} must be 0, or more than twice tile_overlap={self.overlap}, as in --tile 256")

    @property
    def overlap(self) -> int:
        return 32 if self.tile_overlap is None else self.tile_overlap


def parse(argv: Sequence[str] | None = None) -> InferenceConfig:
    return tyro.cli(InferenceConfig, args=argv, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,))
